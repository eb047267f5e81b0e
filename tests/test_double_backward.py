"""The backward pass of the backward pass: the op, its node in the graph, and what is built on gradients of gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import torch_manualbp as mbp
from helpers import (
    DTYPES,
    LARGE,
    TOLERANCE,
    assert_close,
    assert_equal,
    calls_of,
    closed_mlp,
    integer_net,
    integers,
    normal_net,
    on_leaves,
    one_layer,
    plain_mlp,
    recomputing_mlp,
    smooth_net,
    twins,
)
from torch_manualbp import _function, _ops, reference

FUNCTIONS = [one_layer, mbp.mlp, closed_mlp, recomputing_mlp]


def plain(function):
    """The same network in plain torch."""
    closed = function in (one_layer, closed_mlp)
    return lambda input, weights, biases: plain_mlp(input, weights, biases, final_relu=closed)


def sizes_of(function, sizes):
    return [sizes[0], sizes[-1]] if function is one_layer else sizes


# --- the op ---------------------------------------------------------------------------------------------------------


class Call:
    """A network, the first backward pass of it, and gradients by all its results."""

    def __init__(self, net, final_relu=False, scales=(), make=integers):
        def like(tensor):
            return make(*tensor.shape).to(tensor.dtype)

        self.net, self.scales, self.layers = net, scales, len(net.weights)
        output, self.hidden = _ops.mlp(*net, final_relu, True)
        self.grad, self.output = like(output), output if final_relu else None
        needs = [True] * (1 + 2 * self.layers)
        args = (self.grad, net.input, net.weights, self.hidden, self.output, needs, scales)
        self.df, *self.first = _ops.mlp_backward_store(*args)
        self.cotangents = [like(result) for result in self.first]

    def run(self, subset=None, needs=None):
        """The results of the op, for a subset of the cotangents."""
        subset, needs = subset or [True] * (1 + 2 * self.layers), needs or [True] * (3 + self.layers)
        v, *rest = [each if there else None for each, there in zip(self.cotangents, subset, strict=True)]
        return _ops.mlp_double_backward(
            *(self.grad, self.net.input, self.net.weights, self.hidden, self.output, self.df),
            *(v, rest[: self.layers], rest[self.layers :], needs, self.scales),
        )

    def autograd(self, subset=None, dtype=torch.float64):
        """The same by autograd through the backward pass in plain torch."""
        widths = [weight.shape[0] for weight in self.net.weights[:-1]]
        leading = self.net.input.shape[:-1]
        pieces = self.hidden.split([leading.numel() * width for width in widths]) if widths else ()
        leaves = [self.grad, self.net.input, *pieces, *self.net.weights]
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        grad, input, *rest = leaves
        pieces, weights = rest[: self.layers - 1], rest[self.layers - 1 :]
        h = [input, *(piece.view(*leading, width) for piece, width in zip(pieces, widths, strict=True))]
        first = reference.mlp_backward(grad, h, weights, self.output, scales=self.scales)
        results = [first.dinput, *first.dweights, *first.dbiases]
        subset = subset or [True] * len(results)
        total = sum(
            (result * cotangent).sum()
            for result, cotangent, there in zip(results, self.cotangents, subset, strict=True)
            if there
        )
        dgrad, dinput, *rest = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        dhidden = (
            torch.cat([each.flatten() for each in rest[: self.layers - 1]]) if self.layers > 1 else input.new_empty(0)
        )
        return [dgrad, dinput, dhidden.flatten(), *rest[self.layers - 1 :]]


def assert_all_equal(got, want):
    for one, other in zip(got, want, strict=True):
        assert_equal(one.double(), other.double())


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("leading", [(6,), (), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize(
    "sizes", [[3, 2], [4, 5, 1], [7, 1, 6, 3, 2], [3, 0, 2], [0, 3], [3, 0], [16, 32, 16]], ids=str
)
def test_the_op_equals_autograd(sizes, leading, final_relu):
    call = Call(integer_net(leading, sizes), final_relu)
    assert_all_equal(call.run(), call.autograd())


@pytest.mark.parametrize("final_relu", [False, True])
def test_each_subset_of_cotangents(final_relu):
    call = Call(integer_net(5, [4, 16, 3, 2]), final_relu)
    for subset in itertools.product([False, True], repeat=7):
        if any(subset):
            assert_all_equal(call.run(subset), call.autograd(subset))


def test_exactly_the_gradients_asked_for():
    call = Call(integer_net(5, [4, 6, 3, 2]))
    for subset in ([True, *[False] * 6], [False, True, *[False] * 5], [True] * 7):
        everything = call.run(subset)
        assert [tensor.shape for tensor in everything] == [(5, 2), (5, 4), (45,), (6, 4), (3, 6), (2, 3)]
        for needs in itertools.product([False, True], repeat=6):
            assert_equal(call.run(subset, needs), list(itertools.compress(everything, needs)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", LARGE)
def test_large_networks(shape, dtype):
    # Sums of integers are exact in float64, and nearly all in float32.
    batch, sizes = LARGE[shape]
    call = Call(integer_net(batch, sizes, dtype), final_relu=True)
    for subset in ([True, *[False] * (2 * call.layers)], [True] * (1 + 2 * call.layers)):
        for got, want in zip(call.run(subset), call.autograd(subset), strict=True):
            error, scale = (got.double() - want).abs().max(), want.abs().max()
            assert error <= (0 if dtype == torch.float64 else 1e-5 * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[5, 7, 3], [20, 32, 48, 1], [3, 2]], ids=str)
def test_dtypes(sizes, dtype):
    for batch in (1, 9, 300):
        call = Call(normal_net(batch, sizes, dtype), final_relu=True, make=torch.randn)
        for subset in ([True, *[False] * (2 * call.layers)], [True] * (1 + 2 * call.layers)):
            for got, want in zip(call.run(subset), call.autograd(subset), strict=True):
                assert got.dtype == dtype
                if want.numel():  # each c_k is rounded, and some masked sums cancel
                    assert (got.double() - want).abs().max() <= 64 * TOLERANCE[dtype] * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_op_with_dropout(dtype):
    for scales in ([2.0, 0.0, 0.5], [2.0, 4.0, 0.0]):
        call = Call(integer_net(40, [5, 16, 6, 3], dtype), scales[2] > 0, scales)
        assert_all_equal(call.run(), call.autograd())


def test_any_layout_of_the_cotangents():
    call = Call(integer_net((2, 5), [4, 6, 3]))
    want = call.run()
    call.cotangents = [
        each.mT.contiguous().mT if each.dim() > 1 else each.repeat_interleave(2)[::2] for each in call.cotangents
    ]
    assert_all_equal(call.run(), want)
    call.cotangents = [each[(0,) * each.dim()].expand_as(each) for each in call.cotangents]
    assert_all_equal(call.run(), call.autograd())
    call.grad = call.grad[0, 0, 0].expand_as(call.grad)
    call.df = (
        Call.__new__(Call).__class__
        and _ops.mlp_backward_store(call.grad, call.net.input, call.net.weights, call.hidden, None, [True] * 5)[0]
    )
    assert_all_equal(call.run(), call.autograd())


def test_nan_and_infinities_pass_as_in_torch():
    net = integer_net(6, [4, 5, 3]).map(lambda tensor: tensor.float())
    net.input[0, 1], net.input[3, 2] = float("nan"), float("inf")
    call = Call(net)
    call.cotangents[0][1, 1], call.cotangents[0][2, 0] = float("nan"), float("inf")
    assert_all_equal(call.run(), call.autograd(dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LARGE)
def test_the_number_of_threads_changes_no_bit(shape, dtype):
    torch.manual_seed(0)
    batch, sizes = LARGE[shape]
    call = Call(normal_net(min(batch, 20_000), sizes, dtype), make=torch.randn)
    for subset in (None, [True, *[False] * (2 * call.layers)]):
        torch.set_num_threads(1)
        alone = call.run(subset)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_equal(call.run(subset), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(dtype):
    net, grad, v = (
        normal_net(600, [19, 33, 40, 5], dtype),
        torch.randn(600, 5).to(dtype),
        torch.randn(600, 19).to(dtype),
    )

    def by_grad_output(rows):
        leaves, g = net._replace(input=net.input[rows]).recorded(), grad[rows].clone().requires_grad_()
        (slope,) = torch.autograd.grad(mbp.mlp(*leaves), leaves.input, g, create_graph=True)
        return torch.autograd.grad(slope, g, v[rows])[0]

    whole = by_grad_output(slice(None))
    for rows in (slice(0, 1), slice(5, 12), slice(100, 164), slice(1, 400)):
        assert_equal(by_grad_output(rows), whole[rows])


def further(call, needs=None):
    """The first backward pass where the activations have gradients of their own, by the op and in plain torch."""
    torch.manual_seed(1)
    net, layers, leading = call.net, call.layers, call.net.input.shape[:-1]
    needs = needs or [True] * (1 + 2 * layers)
    grad_hidden = integers(*call.hidden.shape).to(call.hidden.dtype)
    h, grad_h = (_ops.split_hidden(flat, net.input.shape, net.weights) for flat in (call.hidden, grad_hidden))
    got = _ops.mlp_backward_further(
        call.grad, grad_hidden, net.input, net.weights, call.hidden, call.output, needs, call.scales
    )
    want = reference.mlp_backward(call.grad, [net.input, *h], net.weights, call.output, grad_h, needs, call.scales)
    assert leading == call.grad.shape[:-1]
    return got, [each for each in (want.dinput, *want.dweights, *want.dbiases) if each is not None]


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("leading", [(6,), (), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("sizes", [[3, 2], [4, 5, 1], [7, 1, 6, 3, 2], [3, 0, 2], [16, 32, 16]], ids=str)
def test_gradients_of_activations_are_added(sizes, leading, final_relu):
    for scales in ([], [2.0] * (len(sizes) - 2) + [0.0]):
        assert_all_equal(*further(Call(integer_net(leading, sizes), final_relu, scales)))
    frozen = [False] * (2 * len(sizes) - 3) + [False, True]
    assert_all_equal(*further(Call(integer_net(leading, sizes), final_relu), frozen))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", LARGE)
def test_gradients_of_activations_are_added_in_large_networks(shape, dtype):
    batch, sizes = LARGE[shape]
    call = Call(integer_net(min(batch, 20_000), sizes, dtype))
    for got, want in zip(*further(call), strict=True):
        assert (got - want).abs().max() <= (0 if dtype == torch.float64 else 1e-5 * want.abs().max())
    torch.set_num_threads(1)
    alone = further(call)[0]
    torch.set_num_threads(3)
    assert_equal(further(call)[0], alone)


ERRORS = {
    "hidden size": ({"hidden": torch.ones(3)}, r"`hidden` must have shape \(24,\), got \(3,\)"),
    "df size": ({"df": torch.ones(3)}, r"`df` must have shape \(24,\), got \(3,\)"),
    "df dtype": ({"df": torch.ones(24).double()}, r"`df` must have the dtype of `input`"),
    "grad_dinput": ({"grad_dinput": torch.ones(3, 5)}, r"`grad_dinput` must have shape \(4, 5\), got \(3, 5\)"),
    "dweight": ({"grad_dweights": [None, torch.ones(3)]}, r"`grad_dweights\[1\]` must have shape \(2, 6\), got \(3,\)"),
    "dbias": ({"grad_dbiases": [torch.ones(3), None]}, r"`grad_dbiases\[0\]` must have shape \(6,\), got \(3,\)"),
    "lists": ({"grad_dbiases": [None]}, r"must have one item per weight \(2\), got 2 and 1"),
    "nothing": ({"grad_dinput": None}, r"one of `grad_dinput`, `grad_dweights` and `grad_dbiases` must be given"),
    "needs": ({"needs": [True]}, r"`needs` must have 3 \+ 2 items, got 1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    changes, message = ERRORS[case]
    call = Call(integer_net(4, [5, 6, 2], torch.float32))
    args = {
        **{"grad_output": call.grad, "input": call.net.input, "weights": call.net.weights, "hidden": call.hidden},
        **{"output": None, "df": call.df, "grad_dinput": call.cotangents[0], "needs": [True] * 5},
        **{"grad_dweights": [None, None], "grad_dbiases": [None, None]},
    }
    assert len(_ops.mlp_double_backward(**args)) == 5
    with pytest.raises(RuntimeError, match="mlp_double_backward: .*" + message):
        _ops.mlp_double_backward(**{**args, **changes})


def test_errors_where_activations_have_gradients():
    call = Call(integer_net(4, [5, 6, 2], torch.float32))
    args = (call.net.input, call.net.weights, call.hidden, None, [True] * 5)
    with pytest.raises(RuntimeError, match=r"mlp_backward_further: `grad_hidden` must have shape \(24,\), got \(23,\)"):
        _ops.mlp_backward_further(call.grad, call.hidden[1:], *args)
    with pytest.raises(RuntimeError, match="mlp_backward_further: `input` must be float64 or float32, got bfloat16"):
        further(Call(integer_net(4, [5, 6, 2], torch.bfloat16)))


@pytest.mark.parametrize("final_relu", [False, True])
def test_opcheck(final_relu):
    call = Call(integer_net((2, 3), [5, 7, 4, 3]), final_relu)
    first = (call.grad, call.net.input, call.net.weights, call.hidden, call.output, [True, False] * 3 + [True], [])
    opcheck(_ops.mlp_backward_store, first)
    opcheck(_ops.mlp_backward_further, (call.grad, call.df, *first[1:]))
    cotangents = (call.cotangents[0], [None, *call.cotangents[2:4]], [call.cotangents[4], None, None])
    for needs in ([True] * 6, [False, False, True, False, True, True]):
        opcheck(_ops.mlp_double_backward, (*first[:5], call.df, *cotangents, needs, []))


# --- the node -------------------------------------------------------------------------------------------------------


def gradients(function, net, penalty, frozen=()):
    """What a scalar function of the gradients leaves in `.grad`, which may be None, and the gradients themselves."""
    leaves = net.recorded()
    for name, leaf in zip(net.names(), leaves.leaves(), strict=True):
        leaf.requires_grad_(name not in frozen)
    output = function(*leaves)
    learning = [leaf for leaf in leaves.leaves() if leaf.requires_grad]
    first = penalty(output, leaves, learning)
    return [*first, *(leaf.grad for leaf in leaves.leaves())]


def of_the_input(output, leaves, learning):
    """The penalty of WGAN-GP, (‖∂f/∂x‖ − 1)²."""
    (slope,) = torch.autograd.grad(output.sum(), leaves.input, create_graph=True)
    (slope.norm(dim=-1) - 1).square().mean().backward()
    return [slope.detach()]


def of_everything(output, leaves, learning):
    first = torch.autograd.grad(output.pow(3).sum(), learning, create_graph=True)
    sum(grad.square().sum() for grad in first).backward()
    return [grad.detach() for grad in first]


def with_the_loss(output, leaves, learning):
    """A training step with a penalty."""
    (slope,) = torch.autograd.grad(output.sum(), leaves.input, create_graph=True)
    (output.square().mean() + slope.square().mean()).backward()
    return []


def of_one(index):
    """A penalty on the gradient of one leaf, so that the other cotangents are missing."""

    def penalty(output, leaves, learning):
        (grad,) = torch.autograd.grad(output.sum(), learning[index % len(learning)], create_graph=True)
        if grad.requires_grad:
            grad.square().sum().backward()
        return [grad.detach(), torch.tensor(grad.requires_grad)]

    return penalty


PENALTIES = [of_the_input, of_everything, with_the_loss, *map(of_one, range(7))]


@pytest.mark.parametrize("biases", ["all", "none", "mixed"])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_of_gradients_and_missing_ones_are_those_of_plain_torch(function, penalty, biases):
    net = smooth_net(5, sizes_of(function, [4, 8, 6, 3]), biases, final_relu=True)
    for one, other in zip(gradients(function, net, penalty), gradients(plain(function), net, penalty), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize(
    "frozen", [["weights[0]"], ["weights[0]", "biases[0]"], ["weights[1]"], ["biases[1]"]], ids=str
)
@pytest.mark.parametrize("penalty", PENALTIES[:3])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_frozen_parameters(function, penalty, frozen):
    net = smooth_net(5, sizes_of(function, [4, 8, 6, 3]), final_relu=True)
    pair = [gradients(each, net, penalty, frozen) for each in (function, plain(function))]
    for one, other in zip(*pair, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("frozen", [["input"], ["input", "weights[0]", "biases[0]"], ["input", "weights[2]"]], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_an_input_without_a_gradient(function, frozen):
    net = smooth_net(5, [4, 8, 6, 3], final_relu=True)
    pair = [gradients(each, net, of_everything, frozen) for each in (function, plain(function))]
    for one, other in zip(*pair, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_leading_dimensions(function, leading):
    net = smooth_net(leading, sizes_of(function, [4, 8, 3]), final_relu=True)
    pair = [gradients(each, net, of_everything) for each in (function, plain(function))]
    for one, other in zip(*pair, strict=True):
        assert_close(one, other)


def test_a_penalty_runs_on_our_ops_alone(monkeypatch):
    monkeypatch.setattr(_function, "SMALL", 0)  # nothing that is not used is computed
    net = smooth_net(5, [4, 8, 6, 1])
    ops = calls_of(lambda: gradients(mbp.mlp, net, of_the_input))
    assert ops == ["mlp", "mlp_backward_store", "mlp_double_backward"]
    ops = calls_of(lambda: gradients(mbp.mlp, net, with_the_loss))
    assert ops == ["mlp", "mlp_backward_store", "mlp_double_backward", "mlp_backward"]
    ops = calls_of(lambda: gradients(mbp.mlp, net, of_everything))
    assert ops == ["mlp", "mlp_backward_store", "mlp_double_backward", "mlp_backward_further"]
    with FlopCounterMode(display=False) as counter:
        gradients(mbp.mlp, net, of_the_input)
    counts = counter.get_flop_counts()["Global"]
    assert {str(op) for op in counts} == {
        f"manualbp.{op}" for op in ("mlp", "mlp_backward_store", "mlp_double_backward")
    }
    layers = [2 * 5 * 4 * 8, 2 * 5 * 8 * 6, 2 * 5 * 6 * 1]
    assert counter.get_total_flops() == 4 * sum(layers) - layers[-1]  # a_{K−1} is not needed


def test_flops_of_all_cotangents():
    call = Call(integer_net(5, [4, 8, 6, 1]))
    with FlopCounterMode(display=False) as counter:
        call.run()
    assert counter.get_total_flops() == 4 * 2 * 5 * (4 * 8 + 8 * 6 + 6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_third_derivatives(function):
    net = smooth_net(2, sizes_of(function, [3, 5, 2]), final_relu=True)
    flat, leaves = on_leaves(function, net)

    def second(*leaves):
        first = torch.autograd.grad(flat(*leaves).pow(4).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), leaves, create_graph=True)

    assert gradcheck(second, leaves, fast_mode=True)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_hessian(function, vectorize):
    net = smooth_net(3, sizes_of(function, [4, 5, 2]), final_relu=True)

    def hessian(function):
        flat, leaves = on_leaves(function, net)
        leaves = tuple(leaf.detach() for leaf in leaves)
        return torch.autograd.functional.hessian(lambda *each: flat(*each).pow(3).sum(), leaves, vectorize=vectorize)

    hessians = hessian(function), hessian(plain(function))
    for one, other in zip(itertools.chain(*hessians[0]), itertools.chain(*hessians[1]), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("activations", ["store", "recompute"])
def test_hessian_vector_products(activations):
    x, target = torch.randn(7, 4).double(), torch.randn(7, 3).double()
    model, eager = twins([4, 8, 6, 3], dtype=torch.float64)
    mbp.fuse(model, activations=activations)
    direction = [torch.randn_like(parameter) for parameter in model.parameters()]
    products = []
    for each in (model, eager):
        parameters = list(each.parameters())
        grads = torch.autograd.grad(F.mse_loss(each(x), target), parameters, create_graph=True)
        inner = sum((grad * d).sum() for grad, d in zip(grads, direction, strict=True))
        products.append(torch.autograd.grad(inner, parameters))
    for one, other in zip(*products, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
def test_gradients_of_gradients_of_a_loss_run_on_our_ops(loss):
    net, target = smooth_net(6, [4, 8, 3]), torch.rand(6, 3).double()
    target = target.argmax(-1) if loss == "cross_entropy" else target
    function = {
        "mse": F.mse_loss,
        "cross_entropy": F.cross_entropy,
        "bce_with_logits": F.binary_cross_entropy_with_logits,
    }

    def penalty(value, leaves):
        grads = torch.autograd.grad(value, leaves.leaves(), create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        return [leaf.grad for leaf in leaves.leaves()]

    ours, eager = net.recorded(), net.recorded()
    names = calls_of(lambda: penalty(mbp.mlp_loss(ours.input, target, ours.weights, ours.biases, loss=loss), ours))
    assert {"mlp_loss", "mlp_backward_store", "mlp_double_backward"} <= set(names)
    want = penalty(function[loss](plain_mlp(*eager), target), eager)
    for leaf, other in zip(ours.leaves(), want, strict=True):
        assert_close(leaf.grad, other)


@pytest.mark.parametrize("penalty", [of_the_input, of_everything])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_penalty_in_other_dtypes_is_as_near_as_plain_torchs(dtype, penalty):
    net = normal_net(16, [8, 32, 32, 1], dtype).map(lambda tensor: tensor / 2)
    exact = gradients(plain(mbp.mlp), net.map(lambda tensor: tensor.double()), penalty)
    ours, eager = (gradients(each, net, penalty) for each in (mbp.mlp, plain(mbp.mlp)))
    for got, other, want in zip(ours, eager, exact, strict=True):
        if want is None:
            assert got is None
        else:
            # Masks of half-precision activations may differ from the exact ones, in torch as here.
            limit = max(2 * float((other.double() - want).norm()), 1e-6)
            assert float((got.double() - want).norm()) <= limit


def test_wgan_training_follows_plain_torch():
    model, eager = twins([2, 16, 16, 1], dtype=torch.float64)
    x = torch.randn(8, 2).double()
    for _ in range(3):
        for each in (model, eager):
            optimizer = torch.optim.SGD(each.parameters(), 0.1)
            optimizer.zero_grad()
            points = x.clone().requires_grad_()
            output = each(points)
            (slope,) = torch.autograd.grad(output.sum(), points, create_graph=True)
            (output.mean() + 10 * (slope.norm(dim=1) - 1).square().mean()).backward()
            optimizer.step()
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        assert_close(one, other)


def test_the_graph_continues_on_both_sides():
    # Spectral weights, a network below, and an incoming gradient that is learned.
    def run(function):
        torch.manual_seed(0)
        below, scale = nn.Linear(3, 4).double(), torch.ones(2).double().requires_grad_()
        net, x = smooth_net(5, [4, 8, 2]).recorded(), torch.randn(5, 3).double().requires_grad_()
        weights = [weight / weight.norm() for weight in net.weights]
        output = (function(below(x).tanh(), weights, net.biases) * scale).square().sum()
        (slope,) = torch.autograd.grad(output, x, create_graph=True)
        slope.square().sum().backward()
        return [x.grad, scale.grad, *(p.grad for p in below.parameters()), *(leaf.grad for leaf in net.leaves())]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    ours = run(mbp.mlp)
    torch.set_rng_state(state)
    for one, other in zip(ours, run(plain_mlp), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("name", ["weights[1]", "weights[0]"])
def test_a_weight_changed_in_place_between_the_passes_raises(name):
    net = smooth_net(5, [4, 8, 3])
    leaves = net.recorded()
    (slope,) = torch.autograd.grad(mbp.mlp(*leaves).sum(), leaves.input, create_graph=True)
    with torch.no_grad():
        dict(zip(net.names(), leaves.leaves(), strict=True))[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        slope.sum().backward()


def test_what_the_second_pass_does_not_read_may_change():
    net = smooth_net(5, [4, 8, 3])
    found = []
    for function in (mbp.mlp, plain_mlp):
        leaves = net.map(torch.clone).recorded()
        (slope,) = torch.autograd.grad(function(*leaves).sum(), leaves.input, create_graph=True)
        with torch.no_grad():
            for bias in leaves.biases:
                bias.fill_(float("nan"))
        slope.square().sum().backward()
        found.append([leaf.grad for leaf in leaves.leaves()])
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


def test_both_passes_twice():
    leaves = smooth_net(5, [4, 8, 3]).recorded()
    first = torch.autograd.grad(mbp.mlp(*leaves).square().sum(), leaves.leaves(), create_graph=True)
    total = sum(grad.square().sum() for grad in first)
    once = torch.autograd.grad(total, leaves.leaves(), retain_graph=True)
    assert_equal(torch.autograd.grad(total, leaves.leaves()), once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


def test_dropout():
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))
    eager = eager.double()
    x = torch.randn(9, 4).double()
    found = []
    for activations in (None, "store", "recompute"):
        model = mbp.fuse(eager, activations=activations) if activations else eager
        model.zero_grad()
        torch.manual_seed(3)
        points = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        slope.square().sum().backward()
        found.append([points.grad, *(parameter.grad for parameter in model.parameters())])
        mbp.unfuse(model) if activations else None
    for one, other, third in zip(*found, strict=True):
        assert_close(one, other)
        assert_close(one, third)
