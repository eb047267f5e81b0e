"""The autograd Functions: derivatives of every order, which gradients are computed, and behaviour in the graph.

Derivatives are checked against finite differences (gradcheck, gradgradcheck) in float64. Networks of more than 100
numbers are checked in fast mode, which projects the Jacobian on random vectors instead of evaluating each column.
"""

import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import torch_manualbp as mbp
from helpers import (
    WIDTHS,
    Net,
    assert_equal,
    assert_exact,
    closed_mlp,
    integer_net,
    integers,
    normal_net,
    on_leaves,
    one_layer,
    oracle,
    plain_mlp,
    recomputing_mlp,
    recorded_calls,
    results,
    smooth_net,
)
from torch_manualbp import _function

MIXED_WIDTHS = ([2, 64, 1], [9, 1, 7, 2], [100, 17, 8], [17, 16, 9, 8, 7, 2])


def ends_in_relu(function):
    return function in (one_layer, closed_mlp)


def check_derivatives(function, net):
    flat, leaves = on_leaves(function, net)
    fast = sum(leaf.numel() for leaf in leaves) > 100
    assert gradcheck(flat, leaves, fast_mode=fast)
    assert gradgradcheck(flat, leaves, fast_mode=fast)


# --- derivatives ----------------------------------------------------------------------------------------------------


# test_derivatives_of_any_leading_dimensions covers empty batches.
@pytest.mark.slow
@pytest.mark.parametrize("d_out", WIDTHS)
@pytest.mark.parametrize("d_in", WIDTHS)
@pytest.mark.parametrize("batch", [1, 5])
def test_linear_relu_derivatives(batch, d_in, d_out):
    biases = "all" if (d_in + d_out) % 2 else "none"
    check_derivatives(one_layer, smooth_net(batch, [d_in, d_out], biases, final_relu=True))


@pytest.mark.slow
@pytest.mark.parametrize("layers", range(1, 6))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("batch", [1, 5])
def test_mlp_derivatives(batch, width, layers):
    check_derivatives(mbp.mlp, smooth_net(batch, [width] * (layers + 1), "mixed"))


@pytest.mark.slow
@pytest.mark.parametrize("biases", ["all", "none", "mixed"])
@pytest.mark.parametrize("sizes", MIXED_WIDTHS, ids=str)
@pytest.mark.parametrize("function", [mbp.mlp, closed_mlp, recomputing_mlp])
def test_mlp_derivatives_where_widths_differ(function, sizes, biases):
    check_derivatives(function, smooth_net(3, sizes, biases, final_relu=ends_in_relu(function)))


@pytest.mark.parametrize("sizes", [[7, 0, 3], [0, 3, 2], [3, 2, 0]], ids=str)
@pytest.mark.parametrize("function", [mbp.mlp, closed_mlp, recomputing_mlp])
def test_derivatives_of_layers_without_units(function, sizes):
    check_derivatives(function, smooth_net(3, sizes, final_relu=True))


@pytest.mark.slow
@pytest.mark.parametrize("leading", [(), (3,), (1, 1), (2, 3), (2, 0, 3), (2, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("function", [one_layer, mbp.mlp, closed_mlp, recomputing_mlp])
def test_derivatives_of_any_leading_dimensions(function, leading):
    check_derivatives(function, smooth_net(leading, [3, 2] if function is one_layer else [3, 4, 2], final_relu=True))


@pytest.mark.parametrize("function", [one_layer, mbp.mlp, closed_mlp, recomputing_mlp])
def test_third_derivative(function):
    net = smooth_net(2, [3, 4] if function is one_layer else [3, 4, 4, 2], final_relu=True).recorded()
    flat, leaves = on_leaves(function, net)

    def second(*leaves):
        (first,) = torch.autograd.grad(flat(*leaves).pow(3).sum(), leaves[1], create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), leaves[0], create_graph=True)[0]

    assert gradcheck(second, leaves)


@pytest.mark.parametrize("function", [mbp.mlp, closed_mlp, recomputing_mlp])
def test_gradient_penalty_equals_plain_torch(function):
    # WGAN-GP: (|d output / d input| - 1)^2, minimised over the weights.
    net = normal_net(6, [5, 16, 16, 1])

    def penalty(function):
        leaves = net.recorded()
        (slope,) = torch.autograd.grad(function(*leaves).sum(), leaves.input, create_graph=True)
        loss = (slope.norm(dim=-1) - 1).pow(2).sum()
        return torch.autograd.grad(loss, leaves.leaves()[:4], allow_unused=True, materialize_grads=True)

    plain = penalty(lambda *net: plain_mlp(*net, final_relu=ends_in_relu(function)))
    for got, want in zip(penalty(function), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_hessian_of_a_linear_function_of_the_output_is_zero():
    # The gradient of the input's gradient is then constant in the output, so only `hidden` carries it.
    net = smooth_net(3, [4, 5, 2]).recorded()
    (slope,) = torch.autograd.grad(mbp.mlp(*net).sum(), net.input, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), net.input, allow_unused=True, materialize_grads=True)
    assert_equal(second, torch.zeros_like(net.input))


@pytest.mark.parametrize("function", [one_layer, mbp.mlp, closed_mlp, recomputing_mlp])
def test_jacobian_vectorized_over_grad_outputs(function):
    net = smooth_net(2, [4, 3] if function is one_layer else [4, 5, 3], final_relu=True)
    flat, leaves = on_leaves(function, net)
    inputs = tuple(leaf.detach() for leaf in leaves)
    one_by_one = torch.autograd.functional.jacobian(flat, inputs)
    at_once = torch.autograd.functional.jacobian(flat, inputs, vectorize=True)
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-12, atol=1e-12)


# --- each subset of requires_grad -----------------------------------------------------------------------------------


def _without_frozen_layers_below(subset):
    """[input, *weights, *biases], starting at the lowest layer with a trainable parameter."""
    need_input, *parameters = subset
    layers = len(parameters) // 2
    weights, biases = parameters[:layers], parameters[layers:]
    first = 0 if need_input else next(k for k in range(layers) if weights[k] or biases[k])
    return [need_input, *weights[first:], *biases[first:]]


@pytest.mark.parametrize("function", [one_layer, mbp.mlp, closed_mlp, recomputing_mlp])
def test_each_subset_of_requires_grad_gets_its_gradients_and_no_other(function):
    net, grad = integer_net(7, [5, 3] if function is one_layer else [5, 4, 3]), integers(7, 3)
    truth = oracle(net, grad, final_relu=ends_in_relu(function))
    for subset in itertools.product([False, True], repeat=len(net.leaves())):
        leaves = net.recorded()
        for leaf, need in zip(leaves.leaves(), subset, strict=True):
            leaf.requires_grad_(need)
        with recorded_calls() as calls:
            output = function(*leaves)
            assert output.requires_grad == any(subset)
            if any(subset):
                output.backward(grad)
        assert_equal(output.detach(), truth.values[0])
        for leaf, need, want in zip(leaves.leaves(), subset, truth.values[1:], strict=True):
            assert (leaf.grad is not None) == need
            if need:
                assert_equal(leaf.grad, want)
        asked = [list(args[-1]) for name, args in calls if name.endswith("backward")]
        assert asked == ([_without_frozen_layers_below(subset)] if any(subset) else [])


@pytest.mark.parametrize("biases", ["all", "none", "mixed"])
def test_gradcheck_of_each_subset_of_requires_grad(biases):
    net = smooth_net(3, [4, 3, 2], biases)
    for subset in itertools.product([False, True], repeat=len(net.leaves())):
        if any(subset):
            flat, leaves = on_leaves(mbp.mlp, net)
            leaves = [leaf.requires_grad_(need) for leaf, need in zip(leaves, subset, strict=True)]
            assert gradcheck(flat, leaves)
            assert gradgradcheck(flat, leaves)


def test_inputs_option_of_backward_limits_what_is_accumulated():
    net = normal_net(3, [4, 5, 2]).recorded()
    mbp.mlp(*net).sum().backward(inputs=[net.weights[1]])
    assert [leaf.grad is not None for leaf in net.leaves()] == [False, False, True, False, False]


# --- behaviour in the graph -----------------------------------------------------------------------------------------


@pytest.fixture(params=[one_layer, mbp.mlp, closed_mlp, recomputing_mlp], ids=lambda function: function.__name__)
def case(request):
    """A function and an integer network for it."""
    return request.param, integer_net(8, [6, 5] if request.param is one_layer else [6, 9, 4, 5])


def test_one_node_records_the_call(case):
    function, net = case
    output = function(*net.recorded())
    name = "LinearReLUFunctionBackward" if function is one_layer else "MLPFunctionBackward"
    assert output.grad_fn.name() == name
    assert {type(edge).__name__ for edge, _ in output.grad_fn.next_functions if edge} == {"AccumulateGrad"}


def test_the_graph_continues_below_and_above_the_call():
    net = integer_net(4, [6, 5, 3])

    def middle(function):
        leaves = net.recorded()
        output = function(leaves.input * 2, [weight * 3 for weight in leaves.weights], leaves.biases) * 2
        return [output, *torch.autograd.grad(output.pow(2).sum(), leaves.leaves())]

    for got, want in zip(middle(mbp.mlp), middle(plain_mlp), strict=True):
        assert_equal(got, want)


def test_gradients_accumulate_into_grad(case):
    function, net = case
    leaves = net.recorded()
    grad = integers(8, 5)
    truth = oracle(net, grad, final_relu=ends_in_relu(function))
    for times in (1, 2, 3):
        function(*leaves).backward(grad)
        for leaf, want in zip(leaves.leaves(), truth.values[1:], strict=True):
            assert_equal(leaf.grad, times * want)


def test_backward_twice_needs_retain_graph(case):
    function, net = case
    leaves = net.recorded()
    output = function(*leaves)
    first = torch.autograd.grad(output.sum(), leaves.leaves(), retain_graph=True)
    second = torch.autograd.grad(output.sum(), leaves.leaves())
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()


def test_create_graph_then_backward_twice(case):
    function, net = case
    leaves = net.recorded()
    grads = torch.autograd.grad(function(*leaves).pow(2).sum(), leaves.leaves(), create_graph=True)
    total = sum(grad.pow(2).sum() for grad in grads)
    first = torch.autograd.grad(total, leaves.leaves(), retain_graph=True)
    second = torch.autograd.grad(total, leaves.leaves())
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)


def test_create_graph_gives_the_gradients_of_the_kernels(case):
    function, net = case
    leaves = net.recorded()
    grad = integers(8, 5)
    composed = torch.autograd.grad(function(*leaves), leaves.leaves(), grad, create_graph=True)
    for got, want in zip(composed, results(function, net, grad)[1:], strict=True):
        assert_equal(got.detach(), want)


def test_expanded_grad_output_of_a_sum(case):
    function, net = case
    leaves = net.recorded()
    function(*leaves).sum().backward()
    truth = oracle(net, torch.ones(8, 5, dtype=torch.float64), final_relu=ends_in_relu(function))
    assert_exact([truth.values[0], *(leaf.grad for leaf in leaves.leaves())], truth)


def test_a_tensor_that_was_not_used_has_no_gradient():
    net = normal_net(3, [4, 5, 2]).recorded()
    unused = torch.zeros(1, requires_grad=True)
    grads = torch.autograd.grad(mbp.mlp(*net).sum(), [net.input, unused], allow_unused=True)
    assert grads[0] is not None
    assert grads[1] is None


def test_without_grad_the_result_is_the_same_bit_for_bit(case):
    function, net = case
    net = net.map(lambda tensor: (tensor + 0.1).float())
    recorded = function(*net.recorded())
    assert recorded.requires_grad
    with torch.no_grad():
        unrecorded = function(*net.recorded())
    with torch.inference_mode():
        inference = function(*net.recorded())
    assert not unrecorded.requires_grad
    assert_equal(unrecorded, recorded.detach())
    assert_equal(inference.clone(), recorded.detach())


def test_output_and_gradients_own_their_memory(case):
    function, net = case
    grad = integers(8, 5)
    made = results(function, net, grad)
    for tensor in made:
        assert tensor._base is None
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    storages = {tensor.untyped_storage().data_ptr() for tensor in [grad, *net.leaves(), *made]}
    assert len(storages) == 1 + len(net.leaves()) + len(made)


def test_a_weight_shared_between_layers_gets_the_sum_of_its_gradients():
    input, weight, bias = integers(8, 5), integers(5, 5, high=1), integers(5)
    results = []
    for function in (mbp.mlp, plain_mlp):
        leaves = Net(input, [weight], [bias]).recorded()
        output = function(leaves.input, leaves.weights * 3, leaves.biases * 3)
        results.append([output, *torch.autograd.grad(output.sum(), leaves.leaves())])
    for got, want in zip(*results, strict=True):
        assert_equal(got, want)


def test_one_tensor_as_input_and_weight():
    tensor = integers(5, 5).requires_grad_()
    got = torch.autograd.grad(mbp.linear_relu(tensor, tensor).sum(), tensor)
    want = torch.autograd.grad(F.relu(F.linear(tensor, tensor)).sum(), tensor)
    assert_equal(got, want)


def test_hooks_on_tensors_see_and_change_gradients():
    net = integer_net(4, [3, 5, 2])
    leaves = net.recorded()
    seen = []
    leaves.input.register_hook(lambda grad: seen.append(grad) or grad * 2)
    output = mbp.mlp(*leaves)
    output.register_hook(lambda grad: grad * 3)
    output.backward(torch.ones(4, 2, dtype=torch.float64))
    truth = oracle(net, torch.full((4, 2), 3.0, dtype=torch.float64))
    assert_equal(seen, [truth.values[1]])
    assert_equal(leaves.input.grad, 2 * truth.values[1])
    assert_equal(leaves.weights[0].grad, truth.values[2])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_gradients(case, use_reentrant):
    function, net = case
    grad = integers(8, 5)
    got = net.recorded()
    checkpoint(function, *got, use_reentrant=use_reentrant).backward(grad)
    for leaf, want in zip(got.leaves(), results(function, net, grad)[1:], strict=True):
        assert_equal(leaf.grad, want)


def test_saved_tensor_hooks_see_what_backward_uses(case):
    function, net = case
    grad = integers(8, 5)
    packed = []
    leaves = net.recorded()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.clone(), lambda t: t):
        output = function(*leaves)
    for got, want in zip(
        torch.autograd.grad(output, leaves.leaves(), grad), results(function, net, grad)[1:], strict=True
    ):
        assert_equal(got, want)
    tensors = {one_layer: 3, mbp.mlp: 5, closed_mlp: 6, recomputing_mlp: 7}  # input, weights and activations
    assert len(packed) == tensors[function]
    kept = sum(map(torch.Size.numel, packed))
    parameters = sum(leaf.numel() for leaf in net.leaves()[1:])
    activations = {one_layer: 8 * 5, mbp.mlp: 8 * (9 + 4), closed_mlp: 8 * (9 + 4 + 5), recomputing_mlp: 0}
    assert kept <= net.input.numel() + parameters + activations[function]


def test_the_graph_dies_with_its_output(case):
    function, net = case
    input = net.input.clone()
    alive = weakref.ref(input)
    output = function(input, *net.recorded()[1:])
    del input
    assert alive() is not None  # saved for backward
    del output
    assert alive() is None


# --- in-place changes between forward and backward ------------------------------------------------------------------


SAVED = [(f, name) for f in (mbp.mlp, closed_mlp, recomputing_mlp) for name in ("input", "weights[0]", "weights[1]")]


@pytest.mark.parametrize(("function", "name"), [*SAVED, (recomputing_mlp, "biases[0]")])
def test_a_saved_tensor_changed_in_place_raises(function, name):
    net = normal_net(3, [4, 5, 2])
    leaves = net.recorded()
    output = function(*leaves)
    with torch.no_grad():
        dict(zip(net.names(), leaves.leaves(), strict=True))[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("name", ["input", "weight"])
def test_linear_relu_with_a_saved_tensor_changed_in_place_raises(name):
    tensors = {"input": torch.randn(3, 4, requires_grad=True), "weight": torch.randn(2, 4, requires_grad=True)}
    output = mbp.linear_relu(**tensors)
    with torch.no_grad():
        tensors[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize(("function", "sizes"), [(one_layer, [4, 3]), (closed_mlp, [4, 5, 3])])
def test_output_of_a_relu_changed_in_place_raises(function, sizes):
    # As in eager, where relu saves its result.
    output = function(*normal_net(3, sizes).recorded())
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("function", [mbp.mlp, recomputing_mlp])
def test_output_of_mlp_may_be_changed_in_place(function):
    net = integer_net(6, [4, 5, 3])
    leaves = net.recorded()
    output = function(*leaves)
    output.mul_(3).add_(1)
    output.sum().backward()
    truth = oracle(net, torch.full((6, 3), 3.0, dtype=torch.float64))
    assert_equal(output.detach(), 3 * truth.values[0] + 1)
    assert_exact([truth.values[0], *(leaf.grad for leaf in leaves.leaves())], truth)


@pytest.mark.parametrize("function", [one_layer, mbp.mlp, closed_mlp])  # recomputing_mlp reads the biases in backward
def test_biases_may_be_changed_in_place(function):
    net, grad = integer_net(8, [6, 5] if function is one_layer else [6, 9, 5]), integers(8, 5)
    truth = oracle(net, grad, final_relu=ends_in_relu(function))
    leaves = net.recorded()
    output = function(*leaves)
    with torch.no_grad():
        for bias in leaves.biases:
            bias.fill_(float("nan"))
    assert_exact([output.detach(), *torch.autograd.grad(output, leaves.leaves(), grad)], truth)


# --- backward reads what forward used, and nothing else -------------------------------------------------------------


def _set_to_zero(tensor):
    tensor.data = torch.zeros_like(tensor)


def _widen(tensor):
    tensor.data = tensor.data.double()


def _transpose(tensor):
    tensor.data = tensor.data.t()


def _put_into_a_buffer(tensor):
    buffer = torch.zeros(tensor.numel() + 5, dtype=tensor.dtype)
    tensor.data = buffer[5:].view(tensor.shape)


EXCHANGES = [_set_to_zero, _widen, _transpose, _put_into_a_buffer]
NETWORKS = [one_layer, mbp.mlp, closed_mlp, recomputing_mlp]


def _in_plain_torch(function):
    return lambda input, weights, biases: plain_mlp(input, weights, biases, final_relu=ends_in_relu(function))


def _square_net(function, leading, dtype):
    return integer_net(leading, [5, 5] if function is one_layer else [5, 5, 5, 5], dtype)


@pytest.mark.parametrize("leading", [7, (2, 3), ()], ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("function", NETWORKS)
def test_backward_reads_the_parameters_that_forward_used(function, exchange, leading):
    net = _square_net(function, leading, torch.float32)
    gradients = []
    for each in (function, _in_plain_torch(function)):
        leaves = net.recorded()
        output = each(*leaves)
        before = [(parameter, parameter.data) for parameter in leaves.leaves()[1:]]
        for parameter, _ in before:
            if parameter.dim() == 2 or exchange is not _transpose:
                exchange(parameter)
        output.sum().backward()
        gradients.append([leaf.grad for leaf in leaves.leaves()])
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == other.dtype
        assert_equal(one, other)


@pytest.mark.parametrize("leading", [7, (2, 3), ()], ids=str)
@pytest.mark.parametrize("function", NETWORKS)
def test_backward_reads_the_input_as_torchs_linear_does(function, leading):
    # torch saves a 2-D input itself, so that `.data = …` replaces its memory, but saves a view of any other input.
    net = _square_net(function, leading, torch.float64)
    gradients = []
    for each in (function, _in_plain_torch(function)):
        leaves = net.recorded()
        leaves.input.requires_grad_(False)
        output = each(*leaves)
        leaves.input.data = torch.ones_like(leaves.input)
        output.sum().backward()
        gradients.append([leaf.grad for leaf in leaves.leaves()[1:]])
    if function is not recomputing_mlp or leading != 7:  # which also recomputes h_1 … from that matrix
        for one, other in zip(*gradients, strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("exchange", EXCHANGES[:1] + EXCHANGES[2:])
@pytest.mark.parametrize("function", NETWORKS)
def test_gradients_of_gradients_read_the_parameters_that_forward_used(function, exchange):
    net = smooth_net(4, [5, 5] if function is one_layer else [5, 5, 5], final_relu=True)
    gradients = []
    for each in (function, _in_plain_torch(function)):
        leaves = net.recorded()
        output = each(*leaves)
        for weight in leaves.weights:
            exchange(weight)
        first = torch.autograd.grad(output.square().sum(), leaves.leaves(), create_graph=True)
        sum(gradient.square().sum() for gradient in first).backward()
        gradients.append([*first, *(leaf.grad for leaf in leaves.leaves())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("exchange", [_set_to_zero, _put_into_a_buffer])
def test_a_second_backward_of_a_loss_reads_the_parameters_that_forward_used(exchange, create_graph):
    net, target = smooth_net(4, [5, 5, 5]), torch.randn(4, 5).double()

    def plain_loss(input, target, weights, biases):
        return F.mse_loss(plain_mlp(input, weights, biases), target)

    gradients = []
    for loss in (mbp.mlp_loss, plain_loss):
        leaves = net.recorded()
        value = loss(leaves.input, target, leaves.weights, leaves.biases)
        value.backward(retain_graph=True)
        for weight in leaves.weights:
            exchange(weight)
        second = torch.autograd.grad(value, leaves.leaves(), create_graph=create_graph)
        if create_graph:
            sum(gradient.square().sum() for gradient in second).backward()
        gradients.append([*second, *(leaf.grad for leaf in leaves.leaves())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def _step_on(*names):
    """Changes the named leaves in place, as an optimizer does."""

    def change(net, leaves):
        with torch.no_grad():
            for name, leaf in zip(net.names(), leaves.leaves(), strict=True):
                if name in names:
                    leaf.mul_(2)

    return change


@pytest.mark.parametrize(
    ("function", "frozen", "changed"),
    [
        (mbp.mlp, ["input"], ["weights[0]", "biases[0]", "biases[1]", "biases[2]"]),
        (closed_mlp, ["input"], ["weights[0]", "biases[0]"]),
        (one_layer, ["input"], ["weights[0]", "biases[0]"]),
        (mbp.mlp, ["input", "weights[0]", "biases[0]"], ["input", "weights[0]", "biases[0]", "weights[1]"]),
        (mbp.mlp, ["input", "weights[0]"], ["input", "weights[0]"]),
        (recomputing_mlp, ["input", "weights[0]", "biases[0]"], ["input", "weights[0]", "biases[0]"]),
        (one_layer, ["input", "weights[0]"], ["input", "weights[0]"]),
        (one_layer, ["weights[0]"], ["input"]),
    ],
)
def test_what_backward_does_not_read_may_change(function, frozen, changed):
    net = integer_net(6, [4, 3] if function is one_layer else [4, 5, 6, 3])
    leaves = net.recorded()
    for name, leaf in zip(net.names(), leaves.leaves(), strict=True):
        leaf.requires_grad_(name not in frozen)
    output = function(*leaves)
    learning = [leaf for leaf in leaves.leaves() if leaf.requires_grad]
    first = torch.autograd.grad(output[:, 0].sum(), learning, retain_graph=True)
    _step_on(*changed)(net, leaves)
    second = torch.autograd.grad(output[:, 0].sum(), learning)
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)


def test_everything_may_change_after_a_loss_whose_gradients_are_computed():
    net, target = integer_net(6, [4, 5, 3]), integers(6, 3)
    leaves = net.recorded()
    value = mbp.mlp_loss(leaves.input, target, leaves.weights, leaves.biases, reduction="sum")
    want = torch.autograd.grad(value, leaves.leaves(), retain_graph=True)
    value = mbp.mlp_loss(leaves.input, target, leaves.weights, leaves.biases, reduction="sum")
    _step_on(*net.names())(net, leaves)
    target.mul_(2)
    for one, other in zip(torch.autograd.grad(value, leaves.leaves(), retain_graph=True), want, strict=True):
        assert_equal(one, other)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # a second pass needs them
        value.backward()


# --- backward for some of the inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["backward", "grad"])
@pytest.mark.parametrize("function", NETWORKS)
def test_backward_for_a_part_of_the_inputs_computes_that_part(function, call, monkeypatch):
    monkeypatch.setattr(_function, "SMALL", 0)
    net, grad = integer_net(6, [4, 3] if function is one_layer else [4, 5, 6, 3]), integers(6, 3)
    truth = oracle(net, grad, final_relu=ends_in_relu(function))
    for wanted in itertools.chain.from_iterable(itertools.combinations(range(len(net.names())), n) for n in (1, 2)):
        leaves = net.recorded()
        some = [leaves.leaves()[i] for i in wanted]
        with recorded_calls() as calls:
            output = function(*leaves)
            if call == "grad":
                got = torch.autograd.grad(output, some, grad)
            else:
                output.backward(grad, inputs=some)
                got = [leaf.grad for leaf in some]
        for one, i in zip(got, wanted, strict=True):
            assert_equal(one, truth.values[1 + i])
        (asked,) = [list(args[-1]) for name, args in calls if name.endswith("backward")]
        whole = call == "grad" and 1 in wanted  # torch's errors take too long to ask about the other parameters
        assert asked == [i in wanted or (whole and i > 0) for i in range(len(asked))]


# Of a network of three layers: the input, the weights, the biases.
ASKED = {"input": [0], "layer": [3, 6], "parameters": range(1, 7), "all": range(7)}


@pytest.mark.parametrize("asked", ASKED)
def test_only_the_gradients_that_autograd_grad_asks_for_are_computed(asked, monkeypatch):
    errors, executes = [], _function._engine_executes

    def counted(node):
        try:
            return executes(node)
        except RuntimeError:
            errors.append(node)
            raise

    monkeypatch.setattr(_function, "_engine_executes", counted)
    net = normal_net(300, [40, 50, 30, 20]).recorded()
    wanted = [net.leaves()[i] for i in ASKED[asked]]
    output = mbp.mlp(*net)
    with recorded_calls() as calls:
        torch.autograd.grad(output.sum(), wanted)
    ((op, arguments),) = calls
    assert op == "mlp_backward"
    assert arguments[6] == [i in ASKED[asked] for i in range(7)]
    assert len(errors) <= 2  # of 20 to 120 µs each


def test_a_small_network_asks_the_engine_nothing(monkeypatch):
    monkeypatch.setattr(_function, "_engine_executes", None)  # its errors take longer than the gradients
    net = normal_net(3, [4, 5, 2]).recorded()
    with recorded_calls() as calls:
        (got,) = torch.autograd.grad(mbp.mlp(*net).sum(), net.weights[1])
    assert list(calls[-1][1][-1]) == [True] * 5
    torch.testing.assert_close(got, torch.autograd.grad(plain_mlp(*net).sum(), net.weights[1])[0])


def test_backward_for_a_part_reaches_tensors_inside_the_graph(monkeypatch):
    monkeypatch.setattr(_function, "SMALL", 0)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    made, input = weight * 2, torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    output = mbp.mlp(input, [made, torch.ones(2, 3, dtype=torch.float64, requires_grad=True)])
    with recorded_calls() as calls:
        (gradient,) = torch.autograd.grad(output.sum(), [made])
    assert [list(args[-1]) for _, args in calls] == [[False, True, False, False, False]]
    (want,) = torch.autograd.grad(plain_mlp(input, [made, torch.ones(2, 3).double()]).sum(), [made])
    torch.testing.assert_close(gradient, want)


def test_a_gradient_penalty_leaves_the_gradients_that_torch_leaves():
    net = smooth_net(5, [4, 8, 8, 1])
    found = []
    for function in (mbp.mlp, plain_mlp):
        leaves = net.recorded()
        (slope,) = torch.autograd.grad(function(*leaves).sum(), leaves.input, create_graph=True)
        (slope.norm(dim=1) - 1).square().mean().backward()
        found.append([leaf.grad for leaf in leaves.leaves()])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)  # zeros for the hidden biases, none for the last
        if one is not None:
            torch.testing.assert_close(one, other)
