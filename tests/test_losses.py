"""mlp_loss, MLP.loss and MLP.loss_backward equal torch.nn.functional's losses; forward computes the gradients."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import torch_manualbp as mbp
from helpers import (
    DTYPES,
    LARGE,
    TOLERANCE,
    Net,
    assert_equal,
    assert_exact,
    calls_of,
    integer_net,
    integers,
    normal_net,
    oracle,
    plain_mlp,
    smooth_net,
)
from torch_manualbp._losses import LOSSES as TABLE
from torch_manualbp._losses import LossSpec, NamedLoss
from torch_manualbp._route import target_is_ours

pytestmark = pytest.mark.cuda

LOSSES = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}
REDUCTIONS = ("mean", "sum")
NAN, INF = float("nan"), float("inf")


def make_target(loss, leading, width, dtype=torch.float64):
    """A target that suits this loss."""
    if loss == "cross_entropy":
        return torch.randint(width, leading)
    return (torch.randn(*leading, width) if loss == "mse" else torch.rand(*leading, width)).to(dtype)


def fused(loss, **options):
    """Our loss as function(net, target)."""
    return lambda net, target: mbp.mlp_loss(net.input, target, *net[1:], loss=loss, **options)


def plain(loss, **options):
    """Torch's loss as function(net, target)."""
    return lambda net, target: LOSSES[loss](plain_mlp(*net), target, **options)


def loss_and_gradients(function, net, target):
    """The loss and the gradient of each leaf."""
    leaves = net.recorded()
    value = function(leaves, target)
    return [value.detach(), *torch.autograd.grad(value, leaves.leaves())]


def assert_loss_close(got, want, dtype=torch.float64):
    """Within 16 TOLERANCE of the largest element, since a loss rounds more often than a sum, and sums may cancel."""
    for one, other in zip(got, want, strict=True):
        assert (one.shape, one.dtype) == (other.shape, dtype)
        if one.numel():
            difference = (one.double() - other.double()).abs().max()
            assert difference <= 16 * TOLERANCE[dtype] * other.double().abs().max(), difference


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [[3, 2], [5, 7, 4], [9, 1, 16, 17], [33, 100, 64, 7]], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 67, 700])
def test_loss_and_gradients_equal_torch(batch, sizes, loss, reduction):
    net, target = normal_net(batch, sizes, biases="mixed"), make_target(loss, (batch,), sizes[-1])
    options = {"reduction": reduction}
    assert_loss_close(
        loss_and_gradients(fused(loss, **options), net, target), loss_and_gradients(plain(loss, **options), net, target)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*LARGE, "small"])
def test_squared_error_of_integers_is_exact(shape, dtype):
    batch, sizes = {**LARGE, "small": (7, [5, 6, 4])}[shape]
    net, target = integer_net(batch, sizes, dtype), integers(batch, sizes[-1], dtype=dtype)
    output = oracle(net, target).values[0]
    difference = output.double() - target.double()
    truth = oracle(net, (2 * difference).to(dtype))
    assert difference.pow(2).sum() < 2**24
    value, *grads = loss_and_gradients(fused("mse", reduction="sum"), net, target)
    assert_equal(value, difference.pow(2).sum().to(dtype))
    assert_exact([output, *grads], truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_other_dtypes_are_near_float64(loss, reduction, dtype):
    # With one layer there is no ReLU that could flip, and gradients are those of the loss times the input.
    net = normal_net(64, [20, 10]).map(lambda tensor: tensor.to(dtype).double())
    target = make_target(loss, (64,), 10)
    target = target if loss == "cross_entropy" else target.to(dtype).double()
    want = loss_and_gradients(plain(loss, reduction=reduction), net, target)
    low = target if loss == "cross_entropy" else target.to(dtype)
    assert_loss_close(
        loss_and_gradients(fused(loss, reduction=reduction), net.map(lambda t: t.to(dtype)), low), want, dtype
    )


# With more leading dimensions cross_entropy takes the classes in the second: test_targets_that_only_torch_knows.
LEADING = [(loss, leading) for loss in LOSSES for leading in ((), (1,), (4,), (0,))]
LEADING += [(loss, leading) for loss in ("mse", "bce_with_logits") for leading in ((2, 3), (2, 0, 3))]


@pytest.mark.parametrize(("loss", "leading"), LEADING, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_leading_dimensions(reduction, loss, leading):
    net, target = normal_net(leading, [5, 6, 3]), make_target(loss, leading, 3)
    got, want = (loss_and_gradients(f(loss, reduction=reduction), net, target) for f in (fused, plain))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, equal_nan=True)  # the mean of nothing is NaN


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{"ignore_index": 2}, {"label_smoothing": 0.3}, {"label_smoothing": 1.0}], ids=str)
def test_options_of_cross_entropy(options, reduction):
    net, target = normal_net(40, [5, 6, 4]), make_target("cross_entropy", (40,), 4)
    options = {"reduction": reduction, **options}
    assert_loss_close(*(loss_and_gradients(f("cross_entropy", **options), net, target) for f in (fused, plain)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_count_for_nothing(reduction):
    net, target = normal_net(8, [5, 6, 4]), torch.tensor([0, -100, 1, 2, -100, 3, -100, 0])
    got = loss_and_gradients(fused("cross_entropy", reduction=reduction), net, target)
    assert_loss_close(got, loss_and_gradients(plain("cross_entropy", reduction=reduction), net, target))
    assert not got[1][target == -100].any()
    net.input[1] = NAN  # not even if its output is NaN
    torch.testing.assert_close(
        *(loss_and_gradients(f("cross_entropy", reduction=reduction), net, target)[0] for f in (fused, plain))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "row",
    [[NAN, 1, 2], [1, NAN, 2], [1, 2, INF], [INF, -INF, 0], [-INF, 1, 2], [-INF, -INF, 3], [-INF] * 3, [1, -2, 3]],
    ids=str,
)
def test_an_ignored_row_has_the_gradient_of_torch_where_its_output_is_not_finite(row, dtype):
    # The gradient is 0 times softmax, which is NaN where softmax is. The output is the bias.
    bias = torch.tensor(row, dtype=dtype).requires_grad_()
    net = Net(torch.ones(2, 1, dtype=dtype), [torch.zeros(3, 1, dtype=dtype)], [bias])
    grads = []
    for function in (fused, plain):
        value = function("cross_entropy", ignore_index=1)(net, torch.tensor([1, 1]))
        grads += torch.autograd.grad(value, bias)
    assert_equal(*grads)


def test_a_batch_that_is_all_ignored():
    net, target = normal_net(3, [5, 4]), torch.full((3,), -100)
    for reduction in REDUCTIONS:
        got, want = (loss_and_gradients(f("cross_entropy", reduction=reduction), net, target) for f in (fused, plain))
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits"])
def test_large_logits_do_not_overflow(loss, scale):
    net = Net(scale * torch.randn(20, 6, dtype=torch.float64), [torch.eye(6, dtype=torch.float64)], [None])
    target = make_target(loss, (20,), 6)
    got, want = (loss_and_gradients(f(loss), net, target) for f in (fused, plain))
    assert all(tensor.isfinite().all() for tensor in got)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("loss", "where"),
    [*itertools.product(LOSSES, ["input", "weights"]), ("mse", "target"), ("bce_with_logits", "target")],
)
def test_nan_propagates(where, loss):
    net, target = normal_net(5, [3, 4, 2]), make_target(loss, (5,), 2)
    {"input": net.input, "target": target, "weights": net.weights[1]}[where][1, 1] = NAN
    got, want = (loss_and_gradients(f(loss), net, target) for f in (fused, plain))
    assert got[0].isnan()
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize(("logit", "label"), list(itertools.product([INF, -INF], [0.0, 0.5, 1.0])))
def test_infinite_logits_give_a_number_where_torch_does(logit, label):
    net = Net(torch.tensor([[logit]]).double(), [torch.ones(1, 1).double()], [None])
    target = torch.tensor([[label]]).double()
    got, want = (f("bce_with_logits")(net, target) for f in (fused, plain))
    if not want.isnan():
        assert_equal(got, want)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
@pytest.mark.parametrize("loss", LOSSES)
def test_layouts_of_the_target(loss, layout):
    net = normal_net(6, [5, 4])
    if loss == "cross_entropy":
        layouts = {
            "transposed": torch.randint(4, (2, 6)).t()[:, 1],
            "expanded": torch.tensor([2]).expand(6),
            "sliced": torch.randint(4, (18,))[::3],
        }
    else:
        layouts = {
            "transposed": torch.rand(4, 6).double().t(),
            "expanded": torch.rand(1, 4).double().expand(6, 4),
            "sliced": torch.rand(12, 8).double()[1::2, ::2],
        }
    target = layouts[layout]
    assert_loss_close(
        loss_and_gradients(fused(loss), net, target), loss_and_gradients(fused(loss), net, target.clone())
    )
    assert_loss_close(loss_and_gradients(fused(loss), net, target), loss_and_gradients(plain(loss), net, target))


# --- derivatives and the graph --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [[3, 2], [4, 5, 3]], ids=str)
def test_derivatives(sizes, loss, reduction):
    net, target = smooth_net(4, sizes).recorded(), make_target(loss, (4,), sizes[-1])
    layers = len(net.weights)

    def flat(input, *parameters):
        return fused(loss, reduction=reduction)(Net(input, parameters[:layers], parameters[layers:]), target)

    assert gradcheck(flat, net.leaves())
    assert gradgradcheck(flat, net.leaves())


@pytest.mark.parametrize("loss", LOSSES)
def test_each_subset_of_requires_grad_gets_its_gradients_and_no_other(loss):
    net, target = normal_net(7, [5, 4, 3]), make_target(loss, (7,), 3)
    everything = loss_and_gradients(fused(loss), net, target)
    for subset in itertools.product([False, True], repeat=len(net.leaves())):
        leaves = net.recorded()
        for leaf, need in zip(leaves.leaves(), subset, strict=True):
            leaf.requires_grad_(need)
        value = fused(loss)(leaves, target)
        assert value.requires_grad == any(subset)
        assert_equal(value.detach(), everything[0])
        if any(subset):
            value.backward()
        for leaf, need, want in zip(leaves.leaves(), subset, everything[1:], strict=True):
            assert (leaf.grad is not None) == need
            if need:
                assert_equal(leaf.grad, want)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [8.0, 0.0, -2.5, NAN, INF])
def test_the_gradient_that_arrives_scales_the_gradients(scale, loss):
    net, target = normal_net(7, [5, 4, 3]), make_target(loss, (7,), 3)
    value, *grads = loss_and_gradients(fused(loss), net, target)
    want = [value * scale, *(gradient * scale for gradient in grads)]
    assert_equal(loss_and_gradients(lambda net, target: fused(loss)(net, target) * scale, net, target), want)


def test_backward_twice_accumulates():
    net, target = normal_net(7, [5, 4, 3]), make_target("mse", (7,), 3)
    want = loss_and_gradients(fused("mse"), net, target)[1:]
    leaves = net.recorded()
    value = fused("mse")(leaves, target)
    value.backward(retain_graph=True)
    value.backward()
    assert_equal([leaf.grad for leaf in leaves.leaves()], [2 * gradient for gradient in want])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


@pytest.mark.not_emulated("the emulated ops have other names")
@pytest.mark.parametrize("loss", LOSSES)
def test_one_node_and_one_call(loss):
    net, target = normal_net(7, [5, 4, 3]), make_target(loss, (7,), 3)
    value = fused(loss)(net.recorded(), target)
    assert type(value.grad_fn).__name__ == "MLPLossFunctionBackward"
    assert calls_of(lambda: fused(loss)(net.recorded(), target).backward()) == ["mlp_loss"]


@pytest.mark.parametrize("name", ["input", "weights[0]", "weights[1]"])
def test_gradients_of_arguments_changed_in_place_are_not_silently_wrong(name):
    # The gradients were computed before the change: backward returns them or raises the version error.
    net, target = normal_net(3, [4, 5, 2]), make_target("mse", (3,), 2)
    want = loss_and_gradients(fused("mse"), net, target)[1:]
    leaves = net.map(torch.clone).recorded()
    value = fused("mse")(leaves, target)
    with torch.no_grad():
        dict(zip(net.names(), leaves.leaves(), strict=True))[name].mul_(2)
    try:
        value.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        assert_equal([leaf.grad for leaf in leaves.leaves()], want)


def test_without_grad_the_loss_is_the_same_bit_for_bit():
    net, target = normal_net(300, [9, 16, 3], torch.float32), torch.randn(300, 3)
    recorded = fused("mse")(net.recorded(), target)
    with torch.no_grad():
        unrecorded = fused("mse")(net.recorded(), target)
    assert not unrecorded.requires_grad
    assert_equal(recorded.detach(), unrecorded)
    assert_equal(fused("mse")(net, target), unrecorded)


@pytest.mark.slow
@pytest.mark.not_emulated("the emulated ops have no shapes for torch.compile")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # in torch's own forward AD
@pytest.mark.parametrize("loss", LOSSES)
def test_transforms_go_through_plain_torch(loss):
    net, target = smooth_net(5, [4, 6, 3]), make_target(loss, (5,), 3)

    def of(function):
        return lambda input: function(loss)(net._replace(input=input), target)

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        torch.testing.assert_close(*(transform(of(f))(net.input) for f in (fused, plain)), rtol=1e-10, atol=1e-10)
    torch.compiler.reset()
    compiled = torch.compile(of(fused), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(net.input), of(plain)(net.input), rtol=1e-12, atol=1e-12)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["class probabilities", "bytes", "target that requires grad", "images"])
def test_targets_that_only_torch_knows(kind):
    net = normal_net(6, [5, 3])
    if kind == "class probabilities":
        loss, target = "cross_entropy", torch.rand(6, 3).softmax(1).double()
    elif kind == "bytes":
        loss, target = "cross_entropy", torch.randint(3, (6,), dtype=torch.uint8)
    elif kind == "target that requires grad":
        loss, target = "mse", torch.randn(6, 3).double().requires_grad_()
    else:  # classes are in dimension 1, which is the middle one of a 3-D input
        net, loss, target = normal_net((2, 4), [5, 3]), "cross_entropy", torch.randint(4, (2, 3))
    assert_equal(loss_and_gradients(fused(loss), net, target), loss_and_gradients(plain(loss), net, target))
    if target.requires_grad:
        assert_equal(*(torch.autograd.grad(f(loss)(net, target), target) for f in (fused, plain)))


# Target dtypes that torch accepts or rejects explicitly.
TARGET_DTYPES = (*DTYPES, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)


def in_dtype(target, dtype):
    """The same target, rounded if `dtype` has no fractions."""
    return (target if dtype.is_floating_point or dtype.is_complex else target.round()).to(dtype)


def result_of(function, *args):
    """The result of function(*args), or the class of the exception it raises."""
    try:
        return function(*args)
    except Exception as error:
        return type(error)


def ways(model, input, target, loss):
    """Functions that return the loss and set the model's gradients: each of our ways, and torch's."""
    weights, biases = [layer.weight for layer in model[::2]], [layer.bias for layer in model[::2]]

    def of(function):
        model.zero_grad()
        value = function()
        if value.requires_grad:
            value.backward()
        return value.detach(), grads_of(model)

    ours = [
        lambda: of(lambda: model.loss(input, target, loss)),
        lambda: of(lambda: model.loss_backward(input, target, loss)),
        lambda: of(lambda: mbp.mlp_loss(input, target, weights, biases, loss=loss)),
    ]
    return ours, lambda: of(lambda: LOSSES[loss](nn.Sequential(*model)(input), target))


def assert_as_torch(got, want, dtype):
    """The same error, or the same dtypes and numbers, within the precision of the network and of the loss."""
    if isinstance(want, type):
        assert got is want
        return
    assert got[0].dtype is want[0].dtype
    assert_loss_close(got[1], want[1], dtype)
    precision = 16 * max(TOLERANCE[dtype], TOLERANCE[want[0].dtype])
    torch.testing.assert_close(got[0], want[0], rtol=precision, atol=precision, equal_nan=True)


@pytest.mark.parametrize("target_dtype", TARGET_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", [*LOSSES, "classes"])
def test_a_target_of_another_dtype_is_promoted_or_refused_as_torch_does(loss, dtype, target_dtype):
    model, input, _ = model_and_data(dtype=dtype, sizes=(5, 3))
    target = in_dtype(torch.rand(40, 3), target_dtype)
    if loss == "classes":
        loss, target = "cross_entropy", torch.randint(3, (40,)).to(target_dtype)
    ours, torchs = ways(model, input, target, loss)
    want = result_of(torchs)
    for way in ours:
        assert_as_torch(result_of(way), want, dtype)


def test_a_gradient_of_the_gradient_with_a_wider_target():
    net, target = smooth_net(4, [3, 5, 2]).map(torch.Tensor.float), torch.randn(4, 2).double()
    results = []
    for function in (fused, plain):
        leaves = net.recorded()
        (grad,) = torch.autograd.grad(function("mse")(leaves, target), leaves.input, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), leaves.weights))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target_dtype", TARGET_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_of_the_output_alone_is_that_of_autograd(loss, dtype, target_dtype):
    output, target = torch.randn(6, 3).to(dtype), make_target(loss, (6,), 3)
    target = target if loss == "cross_entropy" else in_dtype(target, target_dtype)

    def by_autograd():
        leaf = output.clone().requires_grad_()
        return torch.autograd.grad(LOSSES[loss](leaf, target, reduction="sum"), leaf)

    want, got = result_of(by_autograd), result_of(LossSpec(loss).output_gradient, output, target, 0.25)
    if isinstance(want, type):
        assert got is want
    else:
        assert_loss_close([4 * got], want, dtype)


def test_the_gradient_of_a_mean_does_not_overflow_in_its_sum():
    output, target = torch.full((1, 8), 30000.0).half(), torch.full((1, 8), -30000.0).half()
    for y in (target, target.double()):
        assert_equal(LossSpec("mse").output_gradient(output, y, 1 / 8), torch.full((1, 8), 15000.0).half())


# (shape of the input without its features, outputs, shape of the target)
SHAPES = [
    ((5,), 3, (5, 3)), ((5,), 3, (5, 1)), ((5,), 3, (3,)), ((5,), 3, ()), ((5,), 3, (1, 3)), ((5,), 3, (5, 2)),
    ((5,), 3, (4, 3)), ((5,), 3, (5, 5, 3)), ((5,), 1, (5,)), ((5,), 1, (5, 3)), ((5,), 1, (1, 5)), ((), 3, (3,)),
    ((), 3, (5, 3)), ((), 3, ()), ((), 1, (7,)), ((2, 5), 3, (2, 5, 3)), ((2, 5), 3, (5, 3)), ((2, 1), 3, (1, 2, 3)),
    ((0,), 3, (0, 3)), ((0,), 3, (1, 3)), ((0,), 3, (2, 3)),
]  # fmt: skip
CLASS_SHAPES = [
    ((5,), 3, (5,)), ((5,), 3, (4,)), ((5,), 3, ()), ((5,), 3, (5, 1)), ((5,), 3, (5, 3)), ((), 3, ()), ((), 3, (1,)),
    ((), 3, (3,)), ((), 3, (2,)), ((2, 5), 3, (2, 3)), ((2, 5), 3, (2, 5)), ((0,), 3, (0,)), ((0,), 3, (2,)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "leading", "outputs", "shape"),
    [(loss, *case) for loss in LOSSES for case in (CLASS_SHAPES if loss == "cross_entropy" else SHAPES)],
    ids=str,
)
def test_our_op_decides_about_no_shape_that_torch_takes_or_refuses_otherwise(loss, leading, outputs, shape):
    output = torch.randn(*leading, outputs)
    target = torch.ones(shape, dtype=torch.int64) if loss == "cross_entropy" else torch.rand(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about broadcasting shapes
        by_torch = result_of(LOSSES[loss], output, target)
    is_ours = target_is_ours(torch.ones(*leading, 4), target, LossSpec(loss), [torch.ones(outputs, 4)])
    fits = shape == (leading if loss == "cross_entropy" else (*leading, outputs))
    assert fits or not is_ours or by_torch is RuntimeError
    assert is_ours or not fits or (loss == "cross_entropy" and len(leading) == 2)


def test_an_option_that_is_refused_spoils_no_later_call():
    net, target = normal_net(6, [5, 3]), torch.randint(3, (6,))
    with pytest.raises(RuntimeError, match="ignore_index"):
        fused("cross_entropy", ignore_index=-100.0)(net, target)
    torch.testing.assert_close(*(f("cross_entropy", ignore_index=-100)(net, target) for f in (fused, plain)))


# --- errors ---------------------------------------------------------------------------------------------------------

X, W, Y = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4)
CLASSES, BCE = {"loss": "cross_entropy"}, {"loss": "bce_with_logits"}
ERRORS = {
    "unknown loss": ((X, Y, [W]), {"loss": "l1"}, ValueError, "`loss` must be one of 'mse', .*, got 'l1'"),
    "unknown reduction": ((X, Y, [W]), {"reduction": "none"}, ValueError, "`reduction` must be one of .*, got 'none'"),
    "smoothing": ((X, Y, [W]), {"label_smoothing": 1.5}, ValueError, "`label_smoothing` must be .*, got 1.5"),
    "smoothing of no classes": ((X, Y, [W]), {"label_smoothing": 0.1}, ValueError, "is for 'cross_entropy'.* with 'mse'"),
    "target type": ((X, [1], [W]), {}, TypeError, "`target` must be a Tensor, got list"),
    "target shape": ((X, Y[:, :3], [W]), {}, RuntimeError, r"`target` must have shape \(2, 4\), got \(2, 3\)"),
    "class too large": ((X, torch.tensor([1, 4]), [W]), CLASSES, IndexError, "class 4 at row 1.* 4 classes"),
    "class negative": ((X, torch.tensor([-1, 3]), [W]), CLASSES, IndexError, "class -1 at row 0"),
    "classes as int32": ((X, torch.ones(2).int(), [W]), CLASSES, RuntimeError, "must hold class indices.*int32"),
    "integer target": ((X, Y.long(), [W]), BCE, RuntimeError, "`target` must have the dtype of `input`.*got int64"),
    "target device": ((X, Y.to("meta"), [W]), {}, RuntimeError, r"`target` .* device of `input` \(cpu\), got meta"),
    "weight shape": ((X, Y, [W.t()]), {}, RuntimeError, r"`weights\[0\]` has 4 columns but `input` has 3 features"),
    "no weights": ((X, Y, []), {}, ValueError, "`weights` must hold at least one weight"),
    "biases": ((X, Y, [W], []), {}, ValueError, r"`biases` must have one item per weight \(1\), got 0"),
}  # fmt: skip


@pytest.mark.cpu_only("a GPU reports a class out of bounds later, for the whole process")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case, grad):
    args, options, error, message = ERRORS[case]
    with pytest.raises(error, match="mlp_loss: .*" + message):
        mbp.mlp_loss(args[0].clone().requires_grad_(grad), *args[1:], **options)


def test_a_spec_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match="`loss` must be one of"):
        LossSpec("l1")


@pytest.mark.parametrize("classes", [False, True])
def test_all_python_code_computes_a_loss_that_is_added_to_the_table(classes, monkeypatch):
    def function(f, y, reduction="mean"):
        return (F.nll_loss if classes else F.smooth_l1_loss)(f.square(), y, reduction=reduction)

    added = NamedLoss(
        name="added",
        by_torch=lambda reduction, *_: lambda f, y: function(f, y, reduction=reduction),
        of_classes=classes,
        cancels=False,
        formula="loss[{f}, {y}]",
        gradient_formula="slope[{f}, {y}]",
    )
    monkeypatch.setitem(TABLE, "added", added)
    model, x, y = model_and_data("cross_entropy" if classes else "mse")
    value = function(model(x), y)
    value.backward()
    t = mbp.trace(model, x, y, "added", "mean")
    t.verify()
    assert_loss_close([t.loss, t.losses.sum(), t.dl_domega[0]], [value, value, model[0].weight.grad])
    assert f"loss[f_2, y_i] / {y.numel()}" in str(t)
    grads = mbp.per_sample_gradients(model, x, y, "added")
    assert_loss_close([grad.mean(0) for grad in grads.values()], grads_of(model))
    flow, want = (mbp.gradient_flow(model, x, y, loss) for loss in ("added", function))
    assert [layer.dl_df for layer in flow.layers] == pytest.approx([layer.dl_df for layer in want.layers])


# --- MLP.loss and MLP.loss_backward ---------------------------------------------------------------------------------


def model_and_data(loss="mse", dtype=torch.float64, sizes=(5, 8, 6, 3), batch=40):
    model = mbp.MLP(sizes, dtype=dtype)
    return model, torch.randn(batch, sizes[0], dtype=dtype), make_target(loss, (batch,), sizes[-1], dtype)


def grads_of(model):
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_of_a_model_is_the_loss_of_its_output(loss, reduction):
    model, input, target = model_and_data(loss)
    value = model.loss(input, target, loss, reduction)
    value.backward()
    got = grads_of(model)
    model.zero_grad()
    want = LOSSES[loss](model(input), target, reduction=reduction)
    want.backward()
    assert_loss_close([value, *got], [want, *grads_of(model)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("batch", "sizes"), [(40, [5, 8, 6, 3]), (1100, [16, 33, 8]), (300, [300, 520, 10])], ids=str)
def test_loss_backward_equals_loss_and_backward_bit_for_bit(batch, sizes, loss, dtype):
    model, input, target = model_and_data(loss, dtype, sizes, batch)
    by_hand = copy.deepcopy(model)
    for _ in range(2):  # the first step is fresh, the second accumulates
        value = model.loss(input, target, loss)
        value.backward()
        assert_equal(by_hand.loss_backward(input, target, loss), value.detach())
        assert_equal(grads_of(by_hand), grads_of(model))


@pytest.mark.not_emulated("the emulated ops have other names")
def test_loss_backward_leaves_no_graph_and_adds_up():
    model, input, target = model_and_data()
    for times in (1, 2, 3):
        value = model.loss_backward(input, target)
        assert not value.requires_grad
        for parameter in model.parameters():
            assert not parameter.grad.requires_grad
            assert parameter.grad.shape == parameter.shape
        if times == 1:
            first = grads_of(model)
    torch.testing.assert_close(grads_of(model), [3 * gradient for gradient in first], rtol=1e-12, atol=0)
    assert calls_of(model.loss_backward, input, target) == ["mlp_loss"]


def test_fresh_gradients_lie_in_one_buffer():
    model, input, target = model_and_data()
    model.loss_backward(input, target)
    assert len({parameter.grad.untyped_storage().data_ptr() for parameter in model.parameters()}) == 1


def test_loss_backward_without_biases():
    model = mbp.MLP([5, 8, 3], bias=False).double()
    input, target = torch.randn(40, 5).double(), torch.randn(40, 3).double()
    model.loss_backward(input, target)
    got = grads_of(model)
    model.zero_grad()
    F.mse_loss(model(input), target).backward()
    assert_loss_close(got, grads_of(model))


def test_gradients_of_one_step_survive_the_next():
    model, input, target = model_and_data()
    model.loss_backward(input, target)
    kept = [parameter.grad for parameter in model.parameters()]
    copies = grads_of(model)
    model.zero_grad()
    model.loss_backward(2 * input, target)
    assert_equal(kept, copies)


@pytest.mark.parametrize("frozen", [["0.weight"], ["2.bias", "4.weight"], ["0.weight", "0.bias", "2.weight"]], ids=str)
def test_frozen_parameters_get_no_gradient(frozen):
    model, input, target = model_and_data()
    model.loss_backward(input, target)
    want = dict(zip(model.state_dict(), grads_of(model), strict=True))
    model.zero_grad()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    model.loss_backward(input, target)
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("watch", ["parameter", "accumulation", "child", "whole", "input", "shared", "appended"])
def test_hooks_and_other_users_of_the_graph_are_respected(watch):
    model, input, target = model_and_data(sizes=(5, 5, 5, 3))
    if watch == "shared":
        model[2].weight = model[0].weight
    if watch == "appended":
        model.append(nn.Tanh())
    want = F.mse_loss(model(input), target)
    want.backward()
    expected, seen = grads_of(model), []
    model.zero_grad()
    if watch == "parameter":
        model[0].weight.register_hook(lambda gradient: seen.append(gradient))
    elif watch == "accumulation":
        model[0].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))
    elif watch == "child":
        model[1].register_forward_hook(lambda *_: seen.append("child"))
    elif watch == "whole":
        model.register_forward_hook(lambda *_: seen.append("whole"))
    elif watch == "input":
        input.requires_grad_()
    value = model.loss_backward(input, target)
    assert not value.requires_grad
    torch.testing.assert_close(value, want.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grads_of(model), expected, rtol=1e-11, atol=1e-13)
    assert bool(seen) == (watch in ("parameter", "accumulation", "child", "whole"))
    assert (input.grad is not None) == (watch == "input")


def test_training_by_loss_backward_follows_autograd():
    torch.manual_seed(0)
    ours = mbp.MLP([6, 16, 1], dtype=torch.float64)
    theirs = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    theirs.load_state_dict(ours.state_dict())
    input, target = torch.randn(64, 6).double(), torch.randn(64, 1).double()
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(25):
            optimizer.zero_grad()
            if model is ours:
                value = model.loss_backward(input, target)
            else:
                value = F.mse_loss(model(input), target)
                value.backward()
            optimizer.step()
        losses.append(value.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_loss_of_a_model_passes_options_on():
    model, input, target = model_and_data("cross_entropy")
    options = {"ignore_index": 1, "label_smoothing": 0.2}
    want = F.cross_entropy(model(input), target, **options)
    torch.testing.assert_close(model.loss(input, target, "cross_entropy", **options), want, rtol=1e-12, atol=0)
    got = model.loss_backward(input, target, "cross_entropy", **options)
    torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["loss", "loss_backward"])
def test_unknown_loss_of_a_model_is_a_value_error(method):
    model, input, target = model_and_data()
    with pytest.raises(ValueError, match="`loss` must be one of"):
        getattr(model, method)(input, target, "huber")
