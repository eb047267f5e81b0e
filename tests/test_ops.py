"""The registered ops and their binary: argument errors of the C++ entries, the needs mask, fake kernels."""

import itertools

import pytest
import torch
from torch.library import opcheck

import torch_manualbp as mbp
from helpers import DTYPES, LEVELS, assert_equal, integer_net, integers, normal_net, oracle
from torch_manualbp import _ops

B, SIZES = 6, [5, 7, 4, 3]
LAYERS = len(SIZES) - 1
ALL = [True] * (1 + 2 * LAYERS)


def linear_relu_args(dtype=torch.float64):
    """Arguments of both linear_relu ops, as (forward, backward without needs)."""
    net = integer_net(B, [5, 3], dtype)
    output = _ops.linear_relu(net.input, net.weights[0], net.biases[0])
    forward = (net.input, net.weights[0], net.biases[0])
    return forward, (integers(B, 3, dtype=dtype), net.input, net.weights[0], output)


def mlp_args(dtype=torch.float64, final_relu=False, leading=B, sizes=SIZES):
    """Arguments of both mlp ops, as (forward, backward without needs)."""
    net = integer_net(leading, sizes, dtype, biases="mixed")
    output, hidden = _ops.mlp(*net, final_relu, True)
    grad = integers(*output.shape, dtype=dtype)
    return (*net, final_relu, True), (grad, *net, hidden, output if final_relu else None)


def stacked_args(count=3, dtype=torch.float64, final_relu=False, leading=B, sizes=SIZES, make=integer_net):
    """Arguments of both mlp_stacked ops for `count` networks, as (forward, backward without needs); and the networks."""
    nets = [make(leading, sizes, dtype, biases="mixed") for _ in range(count)]

    def stack(each):
        return None if each[0] is None else torch.stack(each)

    input = torch.stack([net.input for net in nets])
    weights, biases = (
        [stack(each) for each in zip(*parts, strict=True)] for parts in list(zip(*nets, strict=True))[1:]
    )
    forward = (input, weights, biases, final_relu, True)
    output, *hidden = _ops.mlp_stacked(*forward)
    grad = integers(*output.shape, dtype=dtype)
    return forward, (grad, input, weights, biases, hidden, output if final_relu else None), nets


def mlp_loss_args(loss, dtype=torch.float64, leading=B, sizes=SIZES):
    """Arguments of mlp_loss without needs and flat."""
    net = integer_net(leading, sizes, dtype, biases="mixed")
    shape = net.input.shape[:-1]
    target = torch.randint(sizes[-1], shape) if loss == "cross_entropy" else torch.rand(*shape, sizes[-1]).to(dtype)
    return (net.input, target, *net[1:], loss, True, -100, 0.1)


def update_args(rule, dtype=torch.float32):
    """Arguments of update, for a matrix and a vector in two groups; of these, the second has amsgrad or a momentum."""
    parameters = [torch.randn(3, 5).to(dtype), torch.randn(7).to(dtype)]
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    if rule == "sgd":
        return (
            parameters,
            gradients,
            "sgd",
            [torch.ones(7).to(dtype)],
            [0.1, 0, 0, 0, 0, 0, 0.1, 0.9, 0, 0, 0, 0],
            [0, 1],
            [False],
        )
    states = [torch.ones_like(parameter) for _ in range(2) for parameter in parameters]
    options = [0.1, 0.9, 0.99, 1e-8, 0, 0, 0, 0, 0.1, 0.9, 0.99, 1e-8, 0, 0, 1, 0]
    return (
        parameters,
        gradients,
        "adam",
        [*states, torch.tensor(1.0), torch.tensor(2.0), torch.ones(7).to(dtype)],
        options,
        [0, 1],
        [],
    )


# --- the needs mask -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_relu_backward_returns_exactly_the_gradients_asked_for(dtype):
    _, args = linear_relu_args(dtype)
    everything = _ops.linear_relu_backward(*args, [True] * 3)
    assert [grad.shape for grad in everything] == [(B, 5), (3, 5), (3,)]
    for needs in itertools.product([False, True], repeat=3):
        assert_equal(_ops.linear_relu_backward(*args, needs), list(itertools.compress(everything, needs)))


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_backward_returns_exactly_the_gradients_asked_for(dtype, final_relu):
    _, args = mlp_args(dtype, final_relu)
    everything = _ops.mlp_backward(*args, [True] * (1 + 2 * LAYERS))
    shapes = [(B, 5), (7, 5), (4, 7), (3, 4), (7,), (4,), (3,)]
    assert [grad.shape for grad in everything] == shapes
    for needs in itertools.product([False, True], repeat=1 + 2 * LAYERS):
        wanted = list(itertools.compress(everything, needs))
        assert_equal(_ops.mlp_backward(*args, needs), wanted)
        assert_equal(_ops.mlp_backward(*args[:4], None, args[-1], needs), wanted)  # activations are recomputed


def separately(nets, grads, final_relu, needs, recompute=False):
    """The outputs and the gradients of networks that are called one by one, stacked."""
    outputs, gradients = [], []
    for net, grad in zip(nets, grads, strict=True):
        output, hidden = _ops.mlp(*net, final_relu, True)
        outputs.append(output)
        kept = None if recompute else hidden
        gradients.append(_ops.mlp_backward(grad, *net, kept, output if final_relu else None, needs))
    return torch.stack(outputs), [torch.stack(each) for each in zip(*gradients, strict=True)]


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_stacked_backward_returns_exactly_the_gradients_asked_for(dtype, final_relu):
    _, args, nets = stacked_args(3, dtype, final_relu)
    _, everything = separately(nets, args[0], final_relu, ALL)
    for needs in itertools.product([False, True], repeat=1 + 2 * LAYERS):
        wanted = list(itertools.compress(everything, needs))
        assert_equal(_ops.mlp_stacked_backward(*args, needs), wanted)
        assert_equal(_ops.mlp_stacked_backward(*args[:4], [], args[-1], needs), wanted)  # activations are recomputed


STACKS = {
    "small": (7, 6, [5, 7, 4, 3]),
    "one row": (5, 1, [5, 7, 4, 3]),
    "no rows": (3, 0, [4, 5, 2]),
    "no dimension of rows": (3, (), [4, 5, 2]),
    "many dimensions": (3, (2, 3), [4, 5, 2]),
    "short": (3, 250, [30, 100, 90, 20]),
    "tall": (2, 3000, [33, 100, 7]),
    "wide": (2, 200, [300, 520, 10]),
    "one layer": (4, 9, [6, 5]),
}


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", STACKS)
def test_stacked_networks_have_the_bits_of_separate_ones_on_any_number_of_threads(shape, dtype, final_relu):
    count, leading, sizes = STACKS[shape]
    needs = [True] * (2 * len(sizes) - 1)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        forward, backward, nets = stacked_args(count, dtype, final_relu, leading, sizes, normal_net)
        output, gradients = separately(nets, backward[0], final_relu, needs)
        assert_equal(_ops.mlp_stacked(*forward)[0], output)
        assert_equal(_ops.mlp_stacked(*forward[:-1], False), [output])
        assert_equal(_ops.mlp_stacked_backward(*backward, needs), gradients)
        assert_equal(_ops.mlp_stacked_backward(*backward[:4], [], backward[-1], needs), gradients)
        strided = torch.utils._pytree.tree_map_only(torch.Tensor, spread_out, backward)
        assert_equal(_ops.mlp_stacked_backward(*strided, needs), gradients)
        assert_equal(_ops.mlp_stacked(*torch.utils._pytree.tree_map_only(torch.Tensor, spread_out, forward))[0], output)


def spread_out(tensor):
    """The same numbers in another layout: dimensions in reverse order, elements two apart."""
    order = list(reversed(range(tensor.dim())))
    memory = tensor.new_zeros([2 * size for size in (tensor.shape[d] for d in order)])
    view = memory[tuple(slice(None, None, 2) for _ in order)].permute(order)
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("count", [2, 40])
def test_networks_that_share_their_parameters_have_the_bits_of_separate_ones(count, rows, dtype, final_relu):
    net = normal_net(rows, [20, 33, 16, 3], dtype, biases="mixed")
    input = torch.randn(count, rows, 20).to(dtype)
    weights = [weight.expand(count, *weight.shape) for weight in net.weights]
    biases = [None if bias is None else bias.expand(count, *bias.shape) for bias in net.biases]
    output, *hidden = _ops.mlp_stacked(input, weights, biases, final_relu, True)
    grad = torch.randn(output.shape).to(dtype)
    nets = [net._replace(input=one) for one in input]
    for needs in (ALL, [True] + [False] * 6, [False, True, False, False, False, False, False], [False] * 7):
        want, gradients = separately(nets, grad, final_relu, needs)
        assert_equal(output, want)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            last = output if final_relu else None
            for kept in (hidden, [], [one.clone() for one in hidden]):
                assert_equal(_ops.mlp_stacked_backward(grad, input, weights, biases, kept, last, needs), gradients)


def test_networks_that_share_rows_and_activations_differ_in_the_gradient_of_their_output():
    net = normal_net(6, SIZES, torch.float64)
    output, *hidden = _ops.mlp_stacked(*net, False, True)  # one network, without a first dimension
    assert_equal(output, _ops.mlp(*net, False, True)[0])
    grads = torch.randn(5, 6, 3).double()
    shared = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.expand(5, *t.shape), (*net, hidden))
    _, gradients = separately([net] * 5, grads, False, ALL)
    assert_equal(_ops.mlp_stacked_backward(grads, *shared, None, ALL), gradients)
    assert_equal(_ops.mlp_stacked_backward(grads[0], *net, hidden, None, ALL), [gradient[0] for gradient in gradients])


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
def test_mlp_loss_returns_the_loss_and_exactly_the_gradients_asked_for(loss, flat):
    args = mlp_loss_args(loss)
    value, *everything = _ops.mlp_loss(*args, [True] * (1 + 2 * LAYERS), False)
    assert value.shape == ()
    assert [grad.shape for grad in everything] == [(B, 5), (7, 5), (4, 7), (3, 4), (7,), (4,), (3,)]
    for needs in itertools.product([False, True], repeat=1 + 2 * LAYERS):
        assert_equal(_ops.mlp_loss(*args, needs, flat), [value, *itertools.compress(everything, needs)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_gradients_are_aligned_parts_of_one_buffer_that_do_not_overlap(dtype):
    needs = [True, True, False, True, True, True, True]
    _, of_input, *grads = _ops.mlp_loss(*mlp_loss_args("mse", dtype), needs, True)
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1
    assert of_input.untyped_storage().data_ptr() != grads[0].untyped_storage().data_ptr()
    ends = 0
    for grad in grads:
        assert grad.is_contiguous()
        assert grad.storage_offset() * grad.element_size() % 64 == 0
        assert grad.storage_offset() >= ends
        ends = grad.storage_offset() + grad.numel()
    assert ends * grads[0].element_size() <= grads[0].untyped_storage().nbytes()


def test_hidden_holds_the_activations_one_after_another():
    net = integer_net(B, SIZES)
    _, hidden = _ops.mlp(*net, False, True)
    h = net.input
    for weight, bias, piece in zip(net.weights, net.biases, hidden.split([B * 7, B * 4]), strict=False):
        h = torch.relu(torch.nn.functional.linear(h, weight, bias))
        assert_equal(piece.view(B, -1), h)


@pytest.mark.parametrize("final_relu", [False, True])
def test_without_store_the_output_is_the_same_and_nothing_is_kept(final_relu):
    net = normal_net(B, [5, 7, 9, 8, 3])
    output, hidden = _ops.mlp(*net, final_relu, False)
    assert hidden.shape == (0,)
    assert_equal(output, _ops.mlp(*net, final_relu, True)[0])


def test_the_mask_is_the_output_that_is_passed_not_a_new_forward_pass():
    (input, weight, _), (grad, *_) = linear_relu_args()
    output = integers(B, 3).abs()
    want = torch.where(output > 0, grad, 0)
    assert_equal(_ops.linear_relu_backward(grad, input, weight, output, [False, False, True]), [want.sum(0)])


# --- registration with torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_linear_relu(dtype):
    forward, backward = linear_relu_args(dtype)
    opcheck(_ops.linear_relu, forward)
    opcheck(_ops.linear_relu_backward, (*backward, [True, False, True]))


@pytest.mark.parametrize("final_relu", [False, True])
def test_opcheck_of_mlp(final_relu):
    forward, backward = mlp_args(final_relu=final_relu)
    opcheck(_ops.mlp, forward)
    opcheck(_ops.mlp_backward, (*backward, [True, False, True, True, False, True, True]))


@pytest.mark.parametrize("final_relu", [False, True])
def test_opcheck_of_mlp_stacked(final_relu):
    forward, backward, _ = stacked_args(final_relu=final_relu)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # its derivative is in `_transforms`
    opcheck(_ops.mlp_stacked, (*forward[:-1], False), test_utils=tests)
    opcheck(_ops.mlp_stacked_backward, (*backward, [True, False, True, True, False, True, True]), test_utils=tests)


@pytest.mark.parametrize("leading", [(), (6,), (2, 3)], ids=str)
@pytest.mark.parametrize("final_relu", [False, True])
def test_fake_mlp_stacked_has_the_shapes_of_the_real_one(final_relu, leading):
    forward, backward, (net, *_) = stacked_args(3, torch.float32, final_relu, leading)
    for args in (forward, (*net, final_relu, True)):
        for store in (False, True):
            same_metadata(_ops.mlp_stacked(*to_meta(args[:-1]), store), _ops.mlp_stacked(*args[:-1], store))
    for needs in (ALL, [False] * 7, [k % 2 == 0 for k in range(7)]):
        real = _ops.mlp_stacked_backward(*backward, needs)
        same_metadata(_ops.mlp_stacked_backward(*to_meta(backward), needs), real)


STACKED_ERRORS = {
    "no networks": (0, lambda a: a[0][:0], r"`weights\[0\]` must hold at least one network, got \(0, 7, 5\)"),
    "input": (0, lambda a: a[0][:2], r"`input` must have 3 items, one per network in `weights\[0\]`, got \(2, 6, 5\)"),
    "weight": (1, lambda a: [a[1][0], a[1][1][:2], a[1][2]], r"`weights\[1\]` must have 3 items"),
    "bias": (2, lambda a: [a[2][0], a[2][1][:1], a[2][2]], r"`biases\[1\]` must have 3 items"),
    "width": (1, lambda a: [a[1][0], a[1][0], a[1][2]], r"`weights\[1\]` has 5 columns but `weights\[0\]` has 7 rows"),
    "dtype": (1, lambda a: [a[1][0].float(), *a[1][1:]], r"`weights\[0\]` must have the dtype of `input` \(float64\)"),
    "dimension": (1, lambda a: [a[1][0], a[1][1][0], a[1][2]], r"`weights\[1\]` must have 3 items"),
}


@pytest.mark.parametrize("case", STACKED_ERRORS)
def test_mlp_stacked_errors_name_the_argument(case):
    forward, _, _ = stacked_args()
    which, change, message = STACKED_ERRORS[case]
    args = list(forward)
    args[which] = change(forward)
    if case == "no networks":
        args[1] = [weight[:0] for weight in args[1]]
    with pytest.raises(RuntimeError, match=f"mlp_stacked: {message}"):
        _ops.mlp_stacked(*args)


STACKED_BACKWARD_ERRORS = {
    "grad_output": (0, lambda a: a[0][0], r"`grad_output` must have shape \(3, 6, 3\), got \(6, 3\)"),
    "hidden": (4, lambda a: a[4][:1], r"`hidden` must be empty or have 2 items, got 1"),
    "shape of hidden": (4, lambda a: a[4][::-1], r"`hidden\[0\]` must have shape \(3, 6, 7\), got \(3, 6, 4\)"),
    "output": (5, lambda a: a[0][:1], r"`output` must have shape \(3, 6, 3\), got \(1, 6, 3\)"),
    "needs": (6, lambda a: [True], r"`needs` must have 1 \+ 2 x 3 items, got 1"),
}


@pytest.mark.parametrize("case", STACKED_BACKWARD_ERRORS)
def test_mlp_stacked_backward_errors_name_the_argument(case):
    _, backward, _ = stacked_args()
    which, change, message = STACKED_BACKWARD_ERRORS[case]
    args = [*backward, ALL]
    args[which] = change(backward)
    with pytest.raises(RuntimeError, match=f"mlp_stacked_backward: {message}"):
        _ops.mlp_stacked_backward(*args)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
def test_opcheck_of_mlp_loss(loss):
    opcheck(_ops.mlp_loss, (*mlp_loss_args(loss), [True, False, True, True, False, True, True], False))


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_opcheck_of_update(rule):
    # Not traced: torch.compile and others capture torch's own step.
    opcheck(_ops.update, update_args(rule), test_utils=("test_schema", "test_autograd_registration"))


def same_metadata(fake, real):
    fake, real = (torch.utils._pytree.tree_leaves(result) for result in (fake, real))
    assert [(t.shape, t.stride(), t.dtype) for t in fake] == [(t.shape, t.stride(), t.dtype) for t in real]
    assert all(tensor.device.type == "meta" for tensor in fake)


def to_meta(args):
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_linear_relu_has_the_shapes_of_the_real_one(dtype):
    forward, backward = linear_relu_args(dtype)
    same_metadata(_ops.linear_relu(*to_meta(forward)), _ops.linear_relu(*forward))
    for needs in itertools.product([False, True], repeat=3):
        real = _ops.linear_relu_backward(*backward, needs)
        same_metadata(_ops.linear_relu_backward(*to_meta(backward), needs), real)


@pytest.mark.parametrize("leading", [(), (0,), (6,), (2, 0, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("sizes", [[4, 3], [5, 7, 4, 3], [4, 0, 3]], ids=str)
@pytest.mark.parametrize("final_relu", [False, True])
def test_fake_mlp_has_the_shapes_of_the_real_one(final_relu, sizes, leading):
    forward, backward = mlp_args(torch.float32, final_relu, leading, sizes)
    for store in (False, True):
        args = (*forward[:-1], store)
        same_metadata(_ops.mlp(*to_meta(args)), _ops.mlp(*args))
    count = 2 * len(sizes) - 1
    for needs in ([True] * count, [False] * count, [k % 2 == 0 for k in range(count)]):
        same_metadata(_ops.mlp_backward(*to_meta(backward), needs), _ops.mlp_backward(*backward, needs))


@pytest.mark.parametrize("leading", [(), (0,), (6,)], ids=str)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
def test_fake_mlp_loss_has_the_shapes_of_the_real_one(loss, leading):
    args = mlp_loss_args(loss, torch.float32, leading)
    for needs in ([True] * 7, [False] * 7, [k % 2 == 0 for k in range(7)]):
        same_metadata(_ops.mlp_loss(*to_meta(args), needs, False), _ops.mlp_loss(*args, needs, False))


def test_transposed_inputs_give_contiguous_results_fake_and_real():
    net = integer_net(B, [5, 3])
    net = net.map(lambda tensor: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor)
    forward = (net.input, net.weights[0], None)
    real = _ops.linear_relu(*forward)
    assert real.is_contiguous()
    same_metadata(_ops.linear_relu(*to_meta(forward)), real)
    backward = (integers(3, B).t(), net.input, net.weights[0], real, [True] * 3)
    same_metadata(_ops.linear_relu_backward(*to_meta(backward)), _ops.linear_relu_backward(*backward))


@pytest.mark.parametrize("leading", [(), (0,), (6,), (2, 3)], ids=str)
def test_mlp_with_dropout_is_registered_as_without(leading):
    (*net, _, _), (grad, *_) = mlp_args(torch.float32, True, leading)
    scales = [2.0, 0.0, 1.5]
    rows = net[0].shape[:-1].numel()
    kept = torch.rand(rows * (7 + 3)) < 0.5
    forward = (*net, True, True, kept, scales)
    output, hidden = _ops.mlp_dropout(*forward)
    same_metadata(_ops.mlp_dropout(*to_meta(forward)), (output, hidden))
    opcheck(_ops.mlp_dropout, forward)
    for stored, mask in ((hidden, None), (hidden, kept), (None, kept)):
        backward = (grad, *net, stored, output, ALL, mask, scales)
        same_metadata(_ops.mlp_dropout_backward(*to_meta(backward)), _ops.mlp_dropout_backward(*backward))
        opcheck(_ops.mlp_dropout_backward, backward)


def test_isa_names_a_level():
    assert _ops.isa() in LEVELS


# --- argument errors of the C++ entries -----------------------------------------------------------------------------
# test_functional tests errors through the public functions; these are errors that only direct calls can make.

LINEAR_RELU_BACKWARD_ERRORS = {
    "grad_output shape": ({"grad_output": torch.ones(B, 4)}, r"`grad_output` must have shape \(6, 3\), got \(6, 4\)"),
    "grad_output dimensions": ({"grad_output": torch.ones(3)}, r"`grad_output` must have shape \(6, 3\), got \(3,\)"),
    "grad_output dtype": ({"grad_output": torch.ones(B, 3).half()}, r"`grad_output` must have the dtype of `input`"),
    "output shape": ({"output": torch.ones(B - 1, 3)}, r"`output` must have shape \(6, 3\), got \(5, 3\)"),
    "output dtype": ({"output": torch.ones(B, 3).double()}, r"`output` must have the dtype of `input`"),
    "output strides": ({"output": torch.ones(3, B).t()}, r"`output` must be contiguous"),
    "weight shape": ({"weight": torch.ones(3, 4)}, r"`weight` has 4 columns but `input` has 5 features"),
    "needs length": ({"needs": [True] * 2}, r"`needs` must have 3 items, got 2"),
}
MLP_BACKWARD_ERRORS = {
    "grad_output shape": ({"grad_output": torch.ones(B, 4)}, r"`grad_output` must have shape \(6, 3\), got \(6, 4\)"),
    "grad_output dtype": ({"grad_output": torch.ones(B, 3).half()}, r"`grad_output` must have the dtype of `input`"),
    "biases length": ({"biases": [None], "hidden": None}, r"`biases` must have one item per weight \(3\), got 1"),
    "bias shape": ({"biases": [None, torch.ones(5), None], "hidden": None}, r"`biases\[1\]` must have shape \(4,\)"),
    "hidden size": ({"hidden": torch.ones(65)}, r"`hidden` must have shape \(66,\), got \(65,\)"),
    "hidden dimensions": ({"hidden": torch.ones(6, 11)}, r"`hidden` must have shape \(66,\), got \(6, 11\)"),
    "hidden dtype": ({"hidden": torch.ones(66).double()}, r"`hidden` must have the dtype of `input`"),
    "output shape": ({"output": torch.ones(B, 2)}, r"`output` must have shape \(6, 3\), got \(6, 2\)"),
    "output strides": ({"output": torch.ones(3, B).t()}, r"`output` must be contiguous"),
    "weights": ({"weights": [torch.ones(7, 5), torch.ones(4, 7), torch.ones(3, 5)]}, r"`weights\[2\]` has 5 columns"),
    "no weights": ({"weights": []}, r"`weights` must hold at least one weight"),
    "needs length": ({"needs": ALL[1:]}, r"`needs` must have 1 \+ 2 x 3 items, got 6"),
}
PLAN_ERRORS = {
    "no layers": ({"widths": [5]}, r"`widths` must have at least 2 items, got 1"),
    "batch": ({"batch": -1}, r"`batch` and `widths` must not be negative, got -1 and \(5, 7, 4, 3\)"),
    "widths": ({"widths": [5, -7, 4, 3]}, r"`batch` and `widths` must not be negative, got 6 and \(5, -7, 4, 3\)"),
    "item_size": ({"item_size": 1}, r"`item_size` must be 8, 4 or 2, got 1"),
    "threads": ({"threads": 0}, r"`threads` must be positive, got 0"),
    "needs length": ({"needs": ALL[1:]}, r"`needs` must have 1 \+ 2 x 3 items, got 6"),
    "recomputed": ({"recomputed": 4}, r"`recomputed` must be between 0 and 3, got 4"),
}


@pytest.mark.parametrize("case", PLAN_ERRORS)
def test_plan_errors_name_the_argument(case):
    changes, message = PLAN_ERRORS[case]
    args = {"batch": B, "widths": SIZES, "item_size": 4, "threads": 1, "needs": ALL, "store": True, "recomputed": 0}
    assert len(_ops.plan(**args)) == 7
    with pytest.raises(RuntimeError, match="plan: " + message):
        _ops.plan(**{**args, **changes})


@pytest.mark.parametrize("case", LINEAR_RELU_BACKWARD_ERRORS)
def test_linear_relu_backward_errors_name_the_argument(case):
    changes, message = LINEAR_RELU_BACKWARD_ERRORS[case]
    _, (grad, input, weight, output) = linear_relu_args(torch.float32)
    args = {"grad_output": grad, "input": input, "weight": weight, "output": output, "needs": [True] * 3}
    assert len(_ops.linear_relu_backward(**args)) == 3
    with pytest.raises(RuntimeError, match="linear_relu_backward: " + message):
        _ops.linear_relu_backward(**{**args, **changes})


@pytest.mark.parametrize("case", MLP_BACKWARD_ERRORS)
def test_mlp_backward_errors_name_the_argument(case):
    changes, message = MLP_BACKWARD_ERRORS[case]
    names = ("grad_output", "input", "weights", "biases", "hidden", "output")
    args = {**dict(zip(names, mlp_args(torch.float32, final_relu=True)[1], strict=True)), "needs": ALL}
    assert len(_ops.mlp_backward(**args)) == 7
    with pytest.raises(RuntimeError, match="mlp_backward: " + message):
        _ops.mlp_backward(**{**args, **changes})


DROPOUT_ERRORS = {
    "scales length": ({"scales": [2.0]}, r"`scales` must be empty or have one item per layer \(3\), got 1"),
    "negative": ({"scales": [2.0, -1.0, 0.0]}, r"`scales\[1\]` must not be negative, got -1"),
    "nan": ({"scales": [float("nan"), 2.0, 0.0]}, r"`scales\[0\]` must not be negative, got nan"),
    "no relu": ({"scales": [2.0, 2.0, 2.0]}, r"`scales\[2\]` must be 0, since no ReLU follows, got 2"),
    "no mask": ({"kept": None}, r"`kept` must be given with `scales`"),
    "mask without scales": ({"scales": []}, r"`kept` must have shape \(0,\), got \(66,\)"),
    "mask size": ({"kept": torch.ones(65, dtype=torch.bool)}, r"`kept` must have shape \(66,\), got \(65,\)"),
    "mask dimensions": (
        {"kept": torch.ones(6, 11, dtype=torch.bool)},
        r"`kept` must have shape \(66,\), got \(6, 11\)",
    ),
    "mask dtype": ({"kept": torch.ones(66)}, r"`kept` must hold bools, got float32"),
    "mask strides": ({"kept": torch.ones(132, dtype=torch.bool)[::2]}, r"`kept` must be contiguous"),
}


@pytest.mark.parametrize("op", ["mlp_dropout", "mlp_dropout_backward"])
@pytest.mark.parametrize("case", DROPOUT_ERRORS)
def test_dropout_errors_name_the_argument(case, op):
    changes, message = DROPOUT_ERRORS[case]
    (*net, final_relu, _), (grad, *_) = mlp_args(torch.float32)
    args = {**dict(zip(("input", "weights", "biases"), net, strict=True)), "kept": torch.ones(66, dtype=torch.bool)}
    args |= {"scales": [2.0, 1.5, 0.0]}
    args |= (
        {"final_relu": final_relu, "store": True}
        if op == "mlp_dropout"
        else {**{"grad_output": grad, "hidden": None, "output": None, "needs": ALL}}
    )
    assert len(getattr(_ops, op)(**args)) == (2 if op == "mlp_dropout" else 7)
    with pytest.raises(RuntimeError, match=f"{op}: " + message):
        getattr(_ops, op)(**{**args, **changes})


UPDATE_ERRORS = {
    "rule": ("adam", {"rule": "lamb"}, r"`rule` must be sgd or adam, got lamb"),
    "options length": ("sgd", {"options": [0.1] * 7}, r"`options` must have 6 items for each group, got 7"),
    "groups length": ("sgd", {"groups": [0]}, r"`groups` must have one item per parameter \(2\), got 1"),
    "group": ("adam", {"groups": [0, 2]}, r"`groups` must be between 0 and 1, got 2"),
    "negative group": ("adam", {"groups": [-1, 0]}, r"`groups` must be between 0 and 1, got -1"),
    "states of sgd": ("sgd", {"states": []}, r"`states` must have 1 items, got 0"),
    "states of adam": ("adam", {"states": [torch.ones(7)] * 8}, r"`states` must have 7 items, got 8"),
    "fresh of sgd": ("sgd", {"fresh": []}, r"`fresh` must have 1 items, got 0"),
    "fresh of adam": ("adam", {"fresh": [True]}, r"`fresh` must have 0 items, got 1"),
    "gradients length": (
        "sgd",
        {"gradients": [torch.ones(3, 5)]},
        r"`gradients` must have one item per parameter \(2\)",
    ),
    "gradient shape": (
        "sgd",
        {"gradients": [torch.ones(3, 5), torch.ones(6)]},
        r"`gradients\[1\]` must have the shape of `parameters\[1\]` \(7,\), got \(6,\)",
    ),
    "state shape": (
        "sgd",
        {"states": [torch.ones(1, 7)]},
        r"`states\[0\]` must have the shape of `parameters\[1\]` \(7,\), got \(1, 7\)",
    ),
    "step": (
        "adam",
        {"states": [*update_args("adam")[3][:4], torch.ones(2), *update_args("adam")[3][5:]]},
        r"`states\[4\]` must be a single number, got \(2,\)",
    ),
}


@pytest.mark.parametrize("case", UPDATE_ERRORS)
def test_update_errors_name_the_argument(case):
    rule, changes, message = UPDATE_ERRORS[case]
    names = ("parameters", "gradients", "rule", "states", "options", "groups", "fresh")
    args = dict(zip(names, update_args(rule), strict=True))
    assert _ops.update(**args)
    with pytest.raises(RuntimeError, match="update: " + message):
        _ops.update(**{**args, **changes})


@pytest.mark.parametrize("name", ["parameters", "gradients", "states"])
def test_update_of_freed_storage_is_an_error(name):
    names = ("parameters", "gradients", "rule", "states", "options", "groups", "fresh")
    args = dict(zip(names, update_args("adam"), strict=True))
    args[name][1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"update: `{name}\[1\]` has no memory: its storage was freed"):
        _ops.update(**args)


LEFT_TO_TORCH = {
    "dtype of a gradient": lambda p, g, s: g.__setitem__(1, g[1].double()),
    "dtype of a state": lambda p, g, s: s.__setitem__(1, s[1].double()),
    "dtype of a parameter": lambda p, g, s: p.__setitem__(1, p[1].to(torch.complex64)),
    "strides of a gradient": lambda p, g, s: g.__setitem__(0, g[0].t().contiguous().t()),
    "strides of a state": lambda p, g, s: s.__setitem__(2, s[2].t().contiguous().t()),
    "memory with gaps": lambda p, g, s: p.__setitem__(1, p[1].repeat_interleave(2)[::2]),
    "expanded memory": lambda p, g, s: p.__setitem__(1, p[1][:1].expand(7)),
    "gradient that is the parameter": lambda p, g, s: g.__setitem__(1, p[1]),
    "count in integers": lambda p, g, s: s.__setitem__(4, s[4].long()),
    "count that is not a number": lambda p, g, s: s.__setitem__(4, torch.tensor(float("nan"))),
    "another device": lambda p, g, s: g.__setitem__(0, g[0].to("meta")),
    "sparse": lambda p, g, s: g.__setitem__(0, g[0].to_sparse()),
}


@pytest.mark.parametrize("case", LEFT_TO_TORCH)
def test_update_changes_nothing_if_it_returns_false(case):
    parameters, gradients, rule, states, *rest = update_args("adam")
    LEFT_TO_TORCH[case](parameters, gradients, states)
    before = [tensor.clone() for tensor in (*parameters, *states)]
    assert not _ops.update(parameters, gradients, rule, states, *rest)
    assert_equal([*parameters, *states], before)


def test_mlp_without_weights_or_with_too_few_biases_is_an_error():
    input, weight = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="mlp: `weights` must hold at least one weight"):
        _ops.mlp(input, [], [], False, True)
    with pytest.raises(RuntimeError, match=r"mlp: `biases` must have one item per weight \(1\), got 0"):
        _ops.mlp(input, [weight], [], False, True)


@pytest.mark.parametrize("op", ["mlp", "mlp_backward", "plan"])
def test_more_elements_than_64_bits_count_are_an_error(op):
    # With 2^61 rows, 8 hidden features and no output, h_1 has 2^64 elements, which overflows to 0 in 64 bits.
    input, weights = torch.ones(1, 1).expand(2**61, 1), [torch.ones(8, 1), torch.ones(0, 8)]
    calls = {
        "mlp": lambda: _ops.mlp(input, weights, [None, None], False, True),
        "mlp_backward": lambda: _ops.mlp_backward(
            torch.ones(1, 0).expand(2**61, 0), input, weights, [], torch.ones(0), None, [False] * 5
        ),
        "plan": lambda: _ops.plan(2**61, [1, 8, 0], 4, 1, [False] * 5, True, 0),
    }
    with pytest.raises(RuntimeError, match=r"on an `input` of 2305843009213693952 rows is larger than any memory"):
        calls[op]()


def test_more_parameters_than_64_bits_count_bytes_of_are_an_error():
    weight = torch.ones(1, 1).expand(2**31, 2**30)
    with pytest.raises(RuntimeError, match=r"larger than any memory|memory"):
        _ops.linear_relu(torch.ones(1, 1).expand(1, 2**30), weight, None)


def test_an_output_without_elements_takes_no_time_however_many_rows_it_has():
    assert _ops.linear_relu(torch.ones(1, 1).expand(2**50, 1), torch.ones(0, 1), None).shape == (2**50, 0)


@pytest.mark.parametrize("op", ["linear_relu", "mlp"])
def test_without_cuda_kernels_the_devices_are_named(op):
    # This kernel is called for tensors on a GPU if the package is built only for the CPU.
    kernel = _ops._reject_mixed_devices(op)
    meta, cpu = torch.empty(2, 3, device="meta"), torch.empty(5, 3)
    many = (lambda weight: weight) if op == "linear_relu" else (lambda weight: [weight])
    with pytest.raises(RuntimeError, match=r"`weight(s\[0\])?` must be on the device of `input` \(meta\), got cpu"):
        kernel(meta, many(cpu), many(None))
    with pytest.raises(RuntimeError, match=f"{op}: no kernel for tensors on meta"):
        kernel(meta, many(cpu.to("meta")), many(None))


@pytest.mark.parametrize("which", range(4))
def test_a_tensor_whose_storage_was_freed_is_an_error(which):
    args = list(linear_relu_args(torch.float32)[1])
    args[which] = args[which].clone()
    args[which].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"has no memory: its storage was freed"):
        _ops.linear_relu_backward(*args, [True] * 3)


@pytest.mark.parametrize("which", range(6))
def test_backward_refuses_tensors_on_several_devices(which):
    _, args = mlp_args(final_relu=True)
    args = [arg if k != which else to_meta(arg) for k, arg in enumerate(args)]
    with pytest.raises(RuntimeError, match=r"must be on the device of `\w+(\[0\])?` \((cpu|meta)\), got (cpu|meta)"):
        _ops.mlp_backward(*args, ALL)
    _, args = linear_relu_args()
    args = [arg if k != which % 4 else to_meta(arg) for k, arg in enumerate(args)]
    with pytest.raises(RuntimeError, match=r"must be on the device of"):
        _ops.linear_relu_backward(*args, [True] * 3)


@pytest.mark.parametrize("op", ["linear_relu", "mlp", "mlp_backward", "mlp_stacked", "mlp_loss"])
def test_tensors_that_are_stored_negated_count_as_what_they_are(op):
    # A real tensor can have the negative bit, as the imaginary part of a conjugate does.
    args = {
        "linear_relu": lambda: linear_relu_args()[0],
        "mlp": lambda: mlp_args()[0],
        "mlp_backward": lambda: (*mlp_args()[1][:4], None, None, ALL),  # the biases are read
        "mlp_stacked": lambda: stacked_args()[0],
        "mlp_loss": lambda: (*mlp_loss_args("mse"), ALL, False),
    }[op]()

    def negated(tensor):
        return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag if tensor.is_floating_point() else tensor

    stored = torch.utils._pytree.tree_map_only(torch.Tensor, negated, args)
    assert any(
        tensor.is_neg() for tensor in torch.utils._pytree.tree_leaves(stored) if isinstance(tensor, torch.Tensor)
    )
    assert_equal(getattr(_ops, op)(*stored), getattr(_ops, op)(*args))


def test_a_bias_that_is_stored_negated_counts_as_what_it_is():
    net = integer_net(B, SIZES)
    bias = torch.complex(torch.zeros(7).double(), -net.biases[0]).conj().imag
    assert bias.is_neg()
    assert_equal(mbp.mlp(net.input, net.weights, [bias, *net.biases[1:]]), mbp.mlp(*net))


def test_results_do_not_share_memory():
    forward, backward = mlp_args(final_relu=True)
    made = [*_ops.mlp(*forward), *_ops.mlp_backward(*backward, ALL)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in made}) == len(made)


def test_raw_ops_agree_with_the_oracle():
    net = integer_net(B, SIZES)
    grad = integers(B, SIZES[-1])
    output, hidden = _ops.mlp(*net, False, True)
    grads = _ops.mlp_backward(grad, *net, hidden, None, ALL)
    assert_equal([output, *grads], oracle(net, grad).values)


# --- the binary -----------------------------------------------------------------------------------------------------


def test_an_absent_binary_is_an_import_error_with_the_cure(tmp_path):
    with pytest.raises(ImportError, match=r"_C\.abi3\.so is missing.*pip install --no-build-isolation \."):
        _ops._load(tmp_path / "_C.abi3.so")


@pytest.mark.parametrize("content", [b"", b"not a shared library", b"\x7fELF\x02\x01\x01" + b"\0" * 99], ids=repr)
def test_a_broken_binary_is_an_import_error_with_cause_and_cure(tmp_path, content):
    binary = tmp_path / "_C.abi3.so"
    binary.write_bytes(content)
    with pytest.raises(ImportError, match=r"(?s)_C\.abi3\.so cannot be loaded by torch.*pip install") as caught:
        _ops._load(binary)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_binary_is_an_import_error_not_a_crash(tmp_path, share):
    content = _ops.BINARY.read_bytes()
    binary = tmp_path / "_C.abi3.so"
    binary.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ImportError, match=r"_C\.abi3\.so is incomplete.*pip install"):
        _ops._load(binary)


def test_the_binary_in_use_lies_in_the_package():
    assert _ops.BINARY.exists()
    assert _ops.BINARY.parent.name == "torch_manualbp"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_input_gradient_of_few_rows_has_the_bits_of_many(dtype):
    # A weight of more than 1 MiB is read row by row for few rows, and by tiles for many.
    weight, grad = torch.randn(530, 603, dtype=dtype), torch.randn(30, 530, dtype=dtype)
    x, needs = torch.randn(30, 603, dtype=dtype), [True, False, False]

    def gradient(rows):
        return _ops.mlp_backward(grad[:rows], x[:rows], [weight], [None], torch.empty(0, dtype=dtype), None, needs)[0]

    whole = gradient(30)
    for rows in (1, 2, 3, 4, 5, 7, 12):
        assert_equal(gradient(rows), whole[:rows])
    assert (whole.double() - grad.double() @ weight.double()).abs().max() < 1e-4
