"""mlp_loss and MLP.loss: value and gradients against torch's own losses in float64, and what they refuse."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import torch_manualbp as mbp
from helpers import DTYPES
from torch_manualbp._losses import LossSpec

# Largest difference to the float64 loss, relative to the largest entry: sums of at most 3000 terms, and for halves one
# rounding of each output and each gradient.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}

LOSSES = ("mse", "cross_entropy", "bce_with_logits")
SIZES = {
    "one layer": (9, [5, 4]),
    "odd": (33, [7, 9, 17, 3]),
    "tall": (1100, [16, 33, 8]),  # slices of the batch
    "wide": (300, [300, 520, 10]),  # layer by layer, in several blocks of rows
    "scalar output": (20, [3, 8, 1]),
}


def make(batch, sizes, loss, dtype=torch.float64):
    model = mbp.MLP(sizes, dtype=dtype)
    input = torch.randn(batch, sizes[0]).to(dtype)
    if loss == "cross_entropy":
        return model, input, torch.randint(sizes[-1], (batch,))
    return model, input, torch.rand(batch, sizes[-1]).to(dtype)


def torch_loss(loss, **options):
    named = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy, "bce_with_logits": F.binary_cross_entropy_with_logits}
    return lambda output, target: named[loss](output, target, **options)


def gradients(value, model, *others):
    return [value.detach(), *torch.autograd.grad(value, [*others, *model.parameters()])]


def assert_near(got, want, dtype):
    for g, w in zip(got, want, strict=True):
        largest = w.abs().max() if w.numel() else torch.tensor(0.0)
        assert (g.double() - w).abs().max() <= TOLERANCE[dtype] * largest if w.numel() else g.shape == w.shape


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", SIZES)
def test_value_and_gradients_equal_torch(case, loss, reduction):
    model, input, target = make(*SIZES[case], loss)
    plain, x = nn.Sequential(*copy.deepcopy(model)), input.clone().requires_grad_()
    want = gradients(torch_loss(loss, reduction=reduction)(plain(x), target), plain, x)
    input.requires_grad_()
    assert_near(gradients(model.loss(input, target, loss, reduction), model, input), want, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_dtype_is_near_float64(loss, dtype):
    model, input, target = make(40, [6, 3], loss, dtype)  # one layer: no ReLU can flip
    plain = nn.Sequential(*copy.deepcopy(model)).double()
    wide = target.double() if target.is_floating_point() else target
    want = gradients(torch_loss(loss)(plain(input.double()), wide), plain)
    assert_near(gradients(model.loss(input, target, loss), model), want, dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_ignores_a_class_and_smooths_labels(reduction, smoothing):
    model, input, target = make(50, [4, 8, 6], "cross_entropy")
    target[::3] = 2
    options = {"ignore_index": 2, "label_smoothing": smoothing, "reduction": reduction}
    plain = nn.Sequential(*copy.deepcopy(model))
    want = gradients(torch_loss("cross_entropy", **options)(plain(input), target), plain)
    got = model.loss(input, target, "cross_entropy", reduction, ignore_index=2, label_smoothing=smoothing)
    assert_near(gradients(got, model), want, torch.float64)


def test_a_batch_of_ignored_rows_gives_nan_mean_and_no_gradient():
    model, input, _ = make(5, [4, 3], "cross_entropy")
    value, *grads = gradients(model.loss(input, torch.full((5,), -100), "cross_entropy"), model)
    assert value.isnan()
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_empty_batch_is_torchs(loss):
    model, input, target = make(0, [4, 8, 3], loss)
    plain = nn.Sequential(*copy.deepcopy(model))
    want = gradients(torch_loss(loss)(plain(input), target), plain)
    torch.testing.assert_close(gradients(model.loss(input, target, loss), model), want, equal_nan=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_large_outputs_do_not_overflow(loss):
    model, input, target = make(8, [4, 3], loss)
    input *= 1e5
    plain = nn.Sequential(*copy.deepcopy(model))
    want = gradients(torch_loss(loss)(plain(input), target), plain)
    assert all(w.isfinite().all() for w in want)
    assert_near(gradients(model.loss(input, target, loss), model), want, torch.float64)


@pytest.mark.parametrize("loss", LOSSES)
def test_nan_reaches_the_loss_and_the_gradients(loss):
    model, input, target = make(8, [4, 3], loss)
    input[2, 1] = float("nan")
    assert all(result.isnan().any() for result in gradients(model.loss(input, target, loss), model))


@pytest.mark.parametrize("scale", [0.0, -2.5, float("nan"), float("inf")])
def test_the_gradient_that_arrives_is_honoured(scale):
    model, input, target = make(30, [4, 8, 3], "mse")
    ones = torch.autograd.grad(model.loss(input, target), list(model.parameters()))
    scaled = torch.autograd.grad(model.loss(input, target) * scale, list(model.parameters()))
    for one, got in zip(ones, scaled, strict=True):
        torch.testing.assert_close(got, one * scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_and_gradgradcheck(loss):
    model, input, target = make(5, [3, 4, 2], loss)
    leaves = [input.requires_grad_(), *(p.detach().requires_grad_() for p in model.parameters())]

    def value(x, w0, b0, w1, b1):
        return mbp.mlp_loss(x, target, [w0, w1], [b0, b1], loss=loss)

    assert gradcheck(value, leaves)
    assert gradgradcheck(value, leaves)


def test_backward_may_run_twice_when_the_graph_is_retained():
    model, input, target = make(30, [4, 8, 3], "mse")
    value = model.loss(input, target)
    value.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    value.backward()
    for parameter, once in zip(model.parameters(), first, strict=True):
        assert torch.equal(parameter.grad, 2 * once)


def test_frozen_parameters_get_no_gradient():
    model, input, target = make(30, [4, 8, 3], "mse")
    model[0].weight.requires_grad_(False)
    model.loss(input, target).backward()
    assert [p.grad is None for p in model.parameters()] == [True, False, False, False]


def test_without_grad_mode_the_loss_is_the_same_and_not_recorded():
    model, input, target = make(30, [4, 8, 3], "cross_entropy")
    with torch.no_grad():
        value = model.loss(input, target, "cross_entropy")
    assert not value.requires_grad
    assert torch.equal(value, model.loss(input, target, "cross_entropy").detach())


def test_targets_that_only_torch_knows_are_left_to_torch():
    model, input, _ = make(6, [4, 3], "cross_entropy")
    probabilities = torch.rand(6, 3, dtype=torch.float64).softmax(1)
    want = F.cross_entropy(nn.Sequential(*model)(input), probabilities)
    torch.testing.assert_close(model.loss(input, probabilities, "cross_entropy"), want)
    target = torch.rand(6, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model.loss(input, target), target)
    assert grad.abs().sum() > 0


# --- loss_backward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", SIZES)
def test_loss_backward_equals_backward_bit_for_bit(case, loss):
    model, input, target = make(*SIZES[case], loss, dtype=torch.float32)
    by_hand = copy.deepcopy(model)
    for _ in range(2):  # a fresh step, and one that accumulates
        value = model.loss(input, target, loss)
        value.backward()
        assert torch.equal(by_hand.loss_backward(input, target, loss), value.detach())
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_loss_backward_lays_fresh_gradients_out_in_one_buffer():
    model, input, target = make(30, [4, 8, 3], "mse")
    assert not model.loss_backward(input, target).requires_grad
    assert len({p.grad.untyped_storage().data_ptr() for p in model.parameters()}) == 1


def test_loss_backward_skips_frozen_parameters_and_works_without_biases():
    model = mbp.MLP([4, 8, 3], bias=False)
    model[2].weight.requires_grad_(False)
    model.loss_backward(torch.randn(6, 4), torch.randn(6, 3))
    assert model[0].weight.grad is not None
    assert model[2].weight.grad is None


def test_loss_backward_goes_through_the_graph_where_somebody_listens():
    model, input, target = make(6, [4, 8, 3], "mse")
    seen = []
    model[0].weight.register_hook(lambda grad: seen.append("tensor"))
    model[2].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    model[2].register_forward_hook(lambda *args: seen.append("forward"))
    model.register_forward_hook(lambda *args: seen.append("network"))
    input.requires_grad_()
    model.loss_backward(input, target)
    assert sorted(seen) == ["accumulated", "forward", "network", "tensor"]
    assert input.grad is not None


def test_loss_backward_counts_a_shared_layer_twice():
    layer = nn.Linear(4, 4, dtype=torch.float64)
    model = mbp.MLP([4, 4, 4], dtype=torch.float64)
    model[0] = model[2] = layer
    plain = copy.deepcopy(nn.Sequential(*model))
    input, target = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    model.loss_backward(input, target)
    F.mse_loss(plain(input), target).backward()
    torch.testing.assert_close(layer.weight.grad, plain[0].weight.grad)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss": "hinge"}, ValueError, "`loss` must be one of 'mse', 'cross_entropy', 'bce_with_logits', got 'hinge'"),
        ({"reduction": "none"}, ValueError, "`reduction` must be one of 'mean', 'sum', got 'none'"),
        ({"label_smoothing": 2.0}, ValueError, "`label_smoothing` must be between 0 and 1, got 2.0"),
        ({"target": [1.0]}, TypeError, "`target` must be a Tensor, got list"),
        ({"target": torch.zeros(5, 2)}, RuntimeError, r"`target` must have shape \(5, 3\), got \(5, 2\)"),
        ({"target": torch.zeros(5, 3, dtype=torch.int64)}, RuntimeError, "`target` must have the dtype of `input`"),
        (
            {"loss": "cross_entropy", "target": torch.zeros(4, dtype=torch.int64)},
            RuntimeError,
            r"`target` must have shape \(5,\), got \(4,\)",
        ),
        (
            {"loss": "cross_entropy", "target": torch.zeros(5, dtype=torch.int32)},
            RuntimeError,
            "must hold class indices .int64., got int32",
        ),
        (
            {"loss": "cross_entropy", "target": torch.tensor([0, 1, 3, 0, 0])},
            IndexError,
            "`target` is out of bounds: class 3 at row 2, but the output has 3 classes",
        ),
        ({"biases": [None, None]}, ValueError, r"`biases` must have one item per weight \(1\), got 2"),
        ({"weights": []}, ValueError, "`weights` must hold at least one weight"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"input": torch.zeros(5, 4), "target": torch.zeros(5, 3), "weights": [torch.zeros(3, 4)]}
    with pytest.raises(error, match=message):
        mbp.mlp_loss(**{**arguments, **change})


def test_a_spec_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match="`loss` must be one of"):
        LossSpec("l1")
