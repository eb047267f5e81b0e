"""The public functions: values, which calls reach the kernels, and argument errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import torch_manualbp as mbp
from helpers import (
    BATCHES,
    DTYPES,
    WIDTHS,
    assert_equal,
    assert_exact,
    calls_of,
    closed_mlp,
    integer_net,
    integers,
    normal_net,
    one_layer,
    oracle,
    plain_mlp,
    recomputing_mlp,
    recorded_calls,
    results,
)

pytestmark = pytest.mark.cuda

# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_out", WIDTHS)
@pytest.mark.parametrize("d_in", WIDTHS)
def test_linear_relu_and_its_gradients_equal_plain_torch(d_in, d_out, dtype):
    for batch in (*BATCHES, 13, 67):
        for biases in ("all", "none"):
            net, grad = integer_net(batch, [d_in, d_out], dtype, biases), integers(batch, d_out, dtype=dtype)
            assert_exact(results(one_layer, net, grad), oracle(net, grad, final_relu=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", range(1, 6))
@pytest.mark.parametrize("width", WIDTHS)
def test_mlp_and_its_gradients_equal_plain_torch(width, layers, dtype):
    for batch in BATCHES:
        for biases in ("all", "none", "mixed"):
            net = integer_net(batch, [width] * (layers + 1), dtype, biases)
            grad = integers(batch, width, dtype=dtype)
            for function in (mbp.mlp, closed_mlp, recomputing_mlp):
                truth = oracle(net, grad, final_relu=function is closed_mlp)
                assert_exact(results(function, net, grad), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize(("function", "sizes"), [(one_layer, [5, 3]), (mbp.mlp, [5, 7, 3]), (closed_mlp, [5, 7, 3])])
def test_any_leading_dimensions(function, sizes, leading, dtype):
    net, grad = integer_net(leading, sizes, dtype), integers(*leading, sizes[-1], dtype=dtype)
    got = results(function, net, grad)
    assert got[0].shape == (*leading, sizes[-1])
    assert_exact(got, oracle(net, grad, final_relu=function is not mbp.mlp))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[0, 3], [3, 0], [0, 0], [4, 0, 3], [0, 4, 3], [4, 3, 0], [4, 0, 0, 3]], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_layers_without_units(batch, sizes, dtype):
    # A layer without inputs gives relu(bias); one without outputs gives an empty result and a zero gradient.
    net, grad = integer_net(batch, sizes, dtype), integers(batch, sizes[-1], dtype=dtype)
    for function in (mbp.mlp, recomputing_mlp, closed_mlp, *([one_layer] if len(sizes) == 2 else [])):
        truth = oracle(net, grad, final_relu=function in (one_layer, closed_mlp))
        assert_exact(results(function, net, grad), truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_is_its_layers_one_after_another_bit_for_bit(dtype):
    net = normal_net(37, [19, 33, 8, 5], dtype)
    h = net.input
    for weight, bias in zip(net.weights, net.biases, strict=True):
        h = mbp.linear_relu(h, weight, bias)
    assert_equal(closed_mlp(*net), h)


def test_mlp_without_biases_needs_no_argument_for_them():
    net = integer_net(5, [4, 3, 2], biases="none")
    assert_equal(mbp.mlp(net.input, net.weights), plain_mlp(*net))
    assert_equal(mbp.mlp(net.input, net.weights, None), mbp.mlp(*net))
    assert_equal(mbp.mlp(net.input, net.weights, activations="recompute"), mbp.mlp(*net))


def test_layers_may_come_in_any_iterable():
    net = integer_net(5, [4, 3, 2])
    assert_equal(mbp.mlp(net.input, tuple(net.weights), iter(net.biases)), plain_mlp(*net))
    assert_equal(mbp.mlp(net.input, torch.nn.ParameterList(net.weights), net.biases).detach(), plain_mlp(*net))


def test_arguments_are_not_changed():
    net = normal_net(5, [4, 3, 2])
    before = net.map(torch.clone)
    grad = torch.randn(5, 2, dtype=torch.float64)
    grad_before = grad.clone()
    results(mbp.mlp, net, grad)
    results(one_layer, net._replace(weights=net.weights[:1], biases=net.biases[:1]), torch.ones(5, 3).double())
    assert_equal([*net.leaves(), grad], [*before.leaves(), grad_before])


# --- which calls reach the kernels ----------------------------------------------------------------------------------


@pytest.mark.not_emulated("the emulated ops have other names")
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_pass_is_one_call(dtype):
    net = normal_net(3, [4, 5, 2], dtype)
    assert calls_of(lambda: mbp.mlp(*net)) == ["mlp"]
    assert calls_of(lambda: mbp.mlp(*net.recorded()).sum().backward()) == ["mlp", "mlp_backward"]
    assert calls_of(lambda: mbp.linear_relu(net.input, net.weights[0])) == ["linear_relu"]
    call = calls_of(lambda: mbp.linear_relu(net.recorded().input, net.weights[0]).sum().backward())
    assert call == ["linear_relu", "linear_relu_backward"]


@pytest.mark.not_emulated("the emulated ops have other names")
def test_activations_are_kept_only_for_a_backward_pass():
    net = normal_net(3, [4, 5, 2])
    with recorded_calls() as calls:
        mbp.mlp(*net)
        with torch.no_grad():
            mbp.mlp(*net.recorded())
        mbp.mlp(*net.recorded())
        mbp.mlp(*net.recorded(), activations="recompute")
    assert [args[-1] for _, args in calls] == [False, False, True, False]


@pytest.mark.parametrize("bias", [torch.tensor(2.0), torch.tensor([2.0]), torch.ones(1, 5), torch.ones(3, 5)], ids=repr)
def test_linear_relu_takes_the_biases_that_broadcast_in_torch(bias):
    input, weight = integers(3, 4).float(), integers(5, 4).float()
    assert_equal(mbp.linear_relu(input, weight, bias), F.relu(F.linear(input, weight, bias)))


def test_linear_relu_takes_a_weight_without_rows_as_torch_does():
    input, weight = integers(3, 4), integers(4)
    assert_equal(mbp.linear_relu(input, weight), F.relu(F.linear(input, weight)))


@pytest.mark.parametrize("layout", ["sparse weight", "sparse input", "nested input"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_tensors_that_are_not_strided_run_as_plain_torch(layout):
    input, weight = integers(3, 4), integers(5, 4)
    if layout == "nested input":
        pieces = [integers(2, 4), integers(3, 4)]
        nested = torch.nested.nested_tensor(pieces, layout=torch.jagged)
        got = mbp.linear_relu(nested, weight).unbind()
        assert_equal(list(got), [F.relu(F.linear(piece, weight)) for piece in pieces])
        assert_equal(list(mbp.mlp(nested, [weight]).unbind()), [F.linear(piece, weight) for piece in pieces])
        return
    got_input = input.to_sparse() if layout == "sparse input" else input
    got_weight = weight.to_sparse() if layout == "sparse weight" else weight
    assert_equal(mbp.linear_relu(got_input, got_weight), F.relu(F.linear(input, weight)))
    assert_equal(mbp.mlp(got_input, [got_weight]), F.linear(input, weight))


# --- errors ---------------------------------------------------------------------------------------------------------

X, W, B = torch.ones(2, 3), torch.ones(5, 3), torch.ones(5)
LINEAR_RELU_ERRORS = {
    "input width": ((X[:, :2], W, B), RuntimeError, r"`weight` has 3 columns but `input` has 2 .*\(5, 3\).*\(2, 2\)"),
    "input without dimensions": ((X[0, 0], W, B), RuntimeError, r"`input` must have at least one dimension.*\(\)"),
    "weight without dimensions": ((X, W[0, 0], B[:1]), RuntimeError, r"`weight` must be .*got shape \(\)"),
    "weight of 3 dimensions": ((X, W[None], B), RuntimeError, r"`weight` must be .*got shape \(1, 5, 3\)"),
    "bias length": ((X, W, B[:4]), RuntimeError, r"`bias` must have shape \(5,\).*\(5, 3\), got \(4,\)"),
    "weight dtype": ((X, W.double(), B.double()), RuntimeError, r"`input` .* `weight` \(float64\), got float32: pass .*float64"),
    "bias dtype": ((X, W, B.bfloat16()), RuntimeError, r"`bias` .* dtype of `input` \(float32\), got bfloat16"),
    "input dtype": ((X.half(), W, B), RuntimeError, r"`input` .* dtype of `weight` \(float32\), got float16"),
    "integers": ((X.long(), W.long(), B.long()), RuntimeError, r"`input` must be float64, .* got int64"),
    "booleans": ((X.bool(), W.bool(), None), RuntimeError, r"`input` must be float64, .* got bool"),
    "complex": ((X.cfloat(), W.cfloat(), None), RuntimeError, r"`input` must be float64, .* got complex64"),
    "float8": ((X.to(torch.float8_e4m3fn), W, B), RuntimeError, r"`input` .*dtype of `weight` .* got an unsupported dtype"),
    "weight device": ((X, W.to("meta"), B), RuntimeError, r"`weight` .* device of `input` \(cpu\), got meta"),
    "bias device": ((X, W, B.to("meta")), RuntimeError, r"`bias` .* device of `input` \(cpu\), got meta"),
    "input device": ((X.to("meta"), W, B), RuntimeError, r"device"),  # torch's own message: meta runs as plain torch
    "input type": (([[1.0]], W, B), TypeError, r"`input` must be a Tensor, got list"),
    "weight type": ((X, None, B), TypeError, r"`weight` must be a Tensor, got NoneType"),
    "bias type": ((X, W, 1.0), TypeError, r"`bias` must be a Tensor or None, got float"),
}  # fmt: skip
MLP_ERRORS = {
    "input width": ((X[:, :2], [W], [B]), RuntimeError, r"`weights\[0\]` has 3 columns but `input` has 2 features"),
    "input without dimensions": ((X[0, 0], [W], [B]), RuntimeError, r"`input` must have at least one dimension"),
    "layers that do not fit": (
        (X, [W, torch.ones(2, 4)], [B, None]), RuntimeError,
        r"`weights\[1\]` has 4 columns but `weights\[0\]` has 5 rows.*\(2, 4\).*\(5, 3\)",
    ),
    "weight of 1 dimension": ((X, [W, B], None), RuntimeError, r"`weights\[1\]` must be .*got shape \(5,\)"),
    "bias length": ((X, [W], [B[:4]]), RuntimeError, r"`biases\[0\]` must have shape \(5,\).*got \(4,\)"),
    "weight dtype": ((X, [W, W.t().double()], None), RuntimeError, r"`weights\[1\]` must have the dtype of `input`"),
    "bias dtype": ((X, [W], [B.half()]), RuntimeError, r"`biases\[0\]` must have the dtype of `input`.*got float16"),
    "integers": ((X.int(), [W.int()], None), RuntimeError, r"`input` must be float64, .* got int32"),
    "weight device": ((X, [W, W.t().to("meta")], None), RuntimeError, r"`weights\[1\]` .* device .*got meta"),
    "bias device": ((X, [W], [B.to("meta")]), RuntimeError, r"`biases\[0\]` .* device .*got meta"),
    "input device": ((X.to("meta"), [W], [B]), RuntimeError, r"device"),
    "input type": ((None, [W], [B]), TypeError, r"`input` must be a Tensor, got NoneType"),
    "one weight, not in a sequence": ((X, W, None), TypeError, r"`weights` must be a sequence of tensors"),
    "one bias, not in a sequence": ((X, [W], B), TypeError, r"`biases` must be a sequence of tensors"),
    "weight type": ((X, [W, None], None), TypeError, r"`weights\[1\]` must be a Tensor, got NoneType"),
    "bias type": ((X, [W], ["b"]), TypeError, r"`biases\[0\]` must be a Tensor or None, got str"),
    "no weights": ((X, []), ValueError, r"`weights` must hold at least one weight"),
    "fewer biases": ((X, [W, W.t()], [B]), ValueError, r"`biases` must have one item per weight \(2\), got 1"),
    "more biases": ((X, [W], [B, B]), ValueError, r"`biases` must have one item per weight \(1\), got 2"),
}  # fmt: skip


@pytest.mark.not_emulated("the emulated ops have other names")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", LINEAR_RELU_ERRORS)
def test_linear_relu_errors_name_the_argument(case, grad):
    _check_error(mbp.linear_relu, LINEAR_RELU_ERRORS[case], grad)


@pytest.mark.not_emulated("the emulated ops have other names")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", MLP_ERRORS)
def test_mlp_errors_name_the_argument(case, grad):
    _check_error(mbp.mlp, MLP_ERRORS[case], grad)


def _check_error(function, case, grad):
    args, error, message = case
    prefix = "" if message == "device" else f"{function.__name__}: "
    input = args[0]
    if grad and isinstance(input, torch.Tensor) and input.is_floating_point():
        input = input.detach().requires_grad_()
    with pytest.raises(error, match=prefix + message):
        function(input, *args[1:])


def test_unknown_activations_mode_is_a_value_error_that_lists_the_modes():
    with pytest.raises(ValueError, match=r"mlp: `activations` must be one of 'store', 'recompute', got 'sore'"):
        mbp.mlp(X, [W], [B], activations="sore")


@pytest.mark.parametrize(
    "function", [mbp.linear_relu, lambda x, w, b: mbp.mlp(x, [w], [b])], ids=["linear_relu", "mlp"]
)
@pytest.mark.parametrize("case", ["input width", "bias length", "weight of 3 dimensions", "weight dtype", "bias dtype"])
def test_errors_are_of_the_class_that_torch_raises(case, function):
    args, error, _ = LINEAR_RELU_ERRORS[case]
    with pytest.raises(error):
        F.linear(*args)
    with pytest.raises(error):
        function(*args)


def test_a_failed_call_does_not_spoil_the_next():
    with pytest.raises(RuntimeError):
        mbp.mlp(X, [W, W])
    assert_equal(mbp.mlp(X, [W], [B]), F.linear(X, W, B))


# --- proxies of tensors ---------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Everything that can be called on a proxy of a tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.body = mbp.LinearReLU(4, 5, dtype=torch.float64), mbp.MLP([5, 6, 3], dtype=torch.float64)
        self.weight = nn.Parameter(integers(3, 3))

    def forward(self, input, target):
        h = self.body(self.first(input))
        h = mbp.mlp(mbp.linear_relu(h, self.weight), [self.weight, self.weight], activations="recompute")
        return h.sum() + mbp.mlp_loss(h, target, [self.weight], reduction="sum")


def test_a_symbolic_trace_has_our_calls_in_it_and_trains():
    model, input, target = Everything(), integers(7, 4), integers(7, 3)
    traced = torch.fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert [call for call in calls if getattr(call, "__module__", "").startswith("torch_manualbp")] == [
        *(mbp.linear_relu, mbp.linear_relu, mbp.mlp, mbp.mlp_loss),
    ]
    for each in (model, traced):
        each.zero_grad()
        value = each(input, target)
        value.backward()
    assert_equal(value, model(input, target))
    for one, other in zip(traced.parameters(), model.parameters(), strict=True):
        assert_equal(one.grad, other.grad)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx_records_what_torch_can_differentiate(mode):
    model, input = mbp.MLP([4, 5, 3], dtype=torch.float64), integers(7, 4)
    graph = make_fx(lambda tensor: model(tensor), tracing_mode=mode, _allow_non_fake_inputs=True)(input)
    assert not any("manualbp" in str(node.target) for node in graph.graph.nodes)
    leaf = input.clone().requires_grad_()
    graph(leaf).sum().backward()
    want = input.clone().requires_grad_()
    model(want).sum().backward()
    torch.testing.assert_close(leaf.grad, want.grad)


def test_make_fx_records_a_backward_pass_that_torch_can_differentiate():
    model, input = mbp.MLP([4, 5, 3], dtype=torch.float64), integers(7, 4).requires_grad_()
    output = model(input)
    graph = make_fx(lambda grad: torch.autograd.grad(output, input, grad, retain_graph=True)[0])(
        torch.ones_like(output)
    )
    assert not any("manualbp" in str(node.target) for node in graph.graph.nodes)
    grad = integers(7, 3)
    torch.testing.assert_close(graph(grad), torch.autograd.grad(output, input, grad)[0])


class Layered(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.layer = function, nn.Linear(4, 3)

    def forward(self, input):
        return self.function(input, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize(
    "model",
    [
        Layered(mbp.linear_relu),
        Layered(lambda input, weight, bias: mbp.mlp(input, [weight], [bias])),
        mbp.LinearReLU(4, 3),
        mbp.MLP([4, 3]),
    ],
    ids=["linear_relu", "mlp", "LinearReLU", "MLP"],
)
def test_expanded_weights_give_gradients_of_each_example(model):
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    input = torch.randn(6, 4)
    call_for_per_sample_grads(model)(input).sum().backward()
    for parameter in model.parameters():
        of_each = parameter.grad_sample
        (of_all,) = torch.autograd.grad(model(input).sum(), parameter)
        assert of_each.shape == (6, *parameter.shape)
        torch.testing.assert_close(of_each.sum(0), of_all)
