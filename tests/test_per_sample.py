"""Per-sample gradients equal a loop over the examples with autograd; norms and clipped sums equal theirs."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.overrides import TorchFunctionMode

import torch_manualbp as mbp
from helpers import BATCHES, DTYPES, recorded_calls
from torch_manualbp import per_sample

LOSSES = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}
SIZES = ([4, 1], [3, 5, 2], [17, 64, 64, 6], [1, 1, 1, 1], [5, 300, 9])
FUNCTIONS = {
    "gradients": mbp.per_sample_gradients,
    "norms": mbp.per_sample_gradient_norms,
    "clipped": lambda model, input, target, loss="mse": mbp.clipped_gradients(model, input, target, 0.5, loss),
}


def problem(batch, sizes, loss="mse", dtype=torch.float64, **options):
    model = mbp.MLP(sizes, dtype=dtype, **options)
    input = torch.randn(batch, sizes[0]).to(dtype)
    if loss == "cross_entropy":
        return model, input, torch.randint(sizes[-1], (batch,))
    return model, input, torch.rand(batch, sizes[-1]).to(dtype)


def one_by_one(model, input, target, loss="mse"):
    """Autograd's gradient of each example's own loss, as {parameter name: (B, *shape)}."""
    function = LOSSES.get(loss, loss)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = nn.Sequential(*model) if isinstance(model, nn.Sequential) else model
    rows = [
        torch.autograd.grad(function(plain(x), y), list(learning.values())) for x, y in zip(input, target, strict=True)
    ]
    return {
        name: torch.stack([row[i] for row in rows]) if rows else p.new_empty(0, *p.shape)
        for i, (name, p) in enumerate(learning.items())
    }


def norms_of(grads, batch):
    return torch.cat([g.reshape(batch, g[0].numel() if batch else 0) for g in grads.values()], 1).norm(dim=1)


def equal_to_a_loop(model, input, target, loss, tolerance):
    """Checks gradients, norms and clipped sums, in the dtype of the model, within `tolerance` of the norm of each."""
    expected = {name: each.double() for name, each in one_by_one(model, input, target, loss).items()}
    norms = norms_of(expected, len(input))
    sums = {name: torch.tensordot((0.5 / norms).clamp(max=1), each, 1) for name, each in expected.items()}
    pairs = [(mbp.per_sample_gradient_norms(model, input, target, loss), norms)]
    for got, want in (
        (mbp.per_sample_gradients(model, input, target, loss), expected),
        (mbp.clipped_gradients(model, input, target, 0.5, loss), sums),
    ):
        assert list(got) == list(want)
        pairs += [(got[name], want[name]) for name in want]
    for got, want in pairs:
        assert (got.dtype, got.shape) == (input.dtype, want.shape)
        assert (got.double() - want).norm() <= tolerance * want.norm()


def check(model, input, target, loss="mse", max_norm=0.5):
    expected, batch = one_by_one(model, input, target, loss), len(input)
    grads = mbp.per_sample_gradients(model, input, target, loss)
    assert list(grads) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value)
        assert not grads[name].requires_grad
    norms = norms_of(expected, batch)
    torch.testing.assert_close(mbp.per_sample_gradient_norms(model, input, target, loss), norms)
    factor = (max_norm / norms).clamp(max=1)
    clipped = mbp.clipped_gradients(model, input, target, max_norm, loss)
    assert list(clipped) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(clipped[name], torch.tensordot(factor, value, 1))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equal_to_a_loop_over_the_examples(sizes, loss):
    check(*problem(7, sizes, loss), loss)


@pytest.mark.parametrize("batch", BATCHES)
def test_any_number_of_examples(batch):
    check(*problem(batch, [3, 5, 2]))


def test_equal_to_vmap_of_grad():
    model, input, target = problem(9, [6, 8, 8, 3], "cross_entropy")
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(model, parameters, (x,)), y)

    expected = vmap(grad(loss), (None, 0, 0))(parameters, input, target)
    for name, value in mbp.per_sample_gradients(model, input, target, "cross_entropy").items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_over_the_batch_is_the_gradient_of_the_loss_on_the_batch(loss):
    model, input, target = problem(8, [6, 9, 4], loss)
    LOSSES[loss](model(input), target).backward()
    for name, value in mbp.per_sample_gradients(model, input, target, loss).items():
        torch.testing.assert_close(value.mean(0), model.get_parameter(name).grad)


def test_tiles_of_the_batch_make_no_difference(monkeypatch):
    model, input, target = problem(300, [6, 9, 4])
    expected = [mbp.per_sample_gradient_norms(model, input, target), mbp.clipped_gradients(model, input, target, 0.1)]
    monkeypatch.setattr(per_sample, "_TILE_NUMBERS", 1)  # 64 rows, the minimum
    torch.testing.assert_close(mbp.per_sample_gradient_norms(model, input, target), expected[0])
    torch.testing.assert_close(mbp.clipped_gradients(model, input, target, 0.1), expected[1])


def test_memory_of_norms_and_clipped_sums_does_not_grow_with_the_batch(monkeypatch):
    """Except for the result, no tensor has more rows than a tile."""
    monkeypatch.setattr(per_sample, "_TILE_NUMBERS", 64 * 40)
    model, input, target = problem(1000, [6, 9, 4])
    tiles = -(-1000 // (64 * 40 // 28))
    for function in (mbp.per_sample_gradient_norms, FUNCTIONS["clipped"]):
        with recorded_calls() as calls:
            function(model, input, target)
        assert [len(args[0]) for _, args in calls][:-1] == [64 * 40 // 28] * (tiles - 1)


def test_a_function_may_be_the_loss_of_an_example():
    def lecture(output, target):
        return ((output - target) ** 2).sum()

    def about_a_class(output, target):
        return -(output.log_softmax(0) * (torch.arange(4) == target)).sum()

    check(*problem(6, [3, 5, 2]), lecture)
    model, input, target = problem(6, [3, 5, 4], "cross_entropy")
    torch.testing.assert_close(
        mbp.per_sample_gradients(model, input, target, about_a_class),
        mbp.per_sample_gradients(model, input, target, "cross_entropy"),
    )


def test_class_probabilities():
    model, input, _ = problem(6, [3, 5, 4])
    check(model, input, torch.rand(6, 4).double().softmax(1), "cross_entropy")


def test_an_ignored_class_has_no_gradient():
    model, input, target = problem(6, [3, 5, 4], "cross_entropy")
    target[[1, 4]] = -100
    grads = mbp.per_sample_gradients(model, input, target, "cross_entropy")
    norms = mbp.per_sample_gradient_norms(model, input, target, "cross_entropy")
    assert norms[[1, 4]].tolist() == [0, 0]
    assert (norms[[0, 2, 3, 5]] > 0).all()
    assert all((g[[1, 4]] == 0).all() for g in grads.values())
    kept = [0, 2, 3, 5]
    torch.testing.assert_close(
        mbp.clipped_gradients(model, input, target, 0.1, "cross_entropy"),
        mbp.clipped_gradients(model, input[kept], target[kept], 0.1, "cross_entropy"),
    )


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_nan_stays_with_its_example_or_shows_in_the_sum(function):
    model, input, target = problem(4, [3, 5, 2])
    input[2, 0] = torch.nan
    result = function(model, input, target)
    if function is mbp.per_sample_gradient_norms:
        assert result.isnan().tolist() == [False, False, True, False]
    elif function is mbp.per_sample_gradients:
        assert result["0.weight"].isnan().any((1, 2)).tolist() == [False, False, True, False]
    else:
        assert result["0.weight"].isnan().any()


def test_frozen_parameters_are_left_out_of_dict_norm_and_work():
    model, input, target = problem(6, [3, 5, 6, 2])
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    check(model, input, target)
    model.requires_grad_(False)
    assert mbp.per_sample_gradients(model, input, target) == {}
    assert mbp.clipped_gradients(model, input, target, 1.0) == {}
    assert mbp.per_sample_gradient_norms(model, input, target).tolist() == [0] * 6


@pytest.mark.parametrize(
    "model",
    [
        mbp.MLP([3, 5, 2], bias=False, dtype=torch.float64),
        mbp.LinearReLU(3, 2, dtype=torch.float64),
        nn.Linear(3, 2, dtype=torch.float64),
        nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 2), nn.ReLU()).double(),
        mbp.fuse(nn.Sequential(nn.Sequential(nn.Linear(3, 5), nn.ReLU()), mbp.LinearReLU(5, 2)).double()),
    ],
    ids=["no bias", "LinearReLU", "Linear", "linear after linear", "nested, fused"],
)
def test_kinds_of_models(model):
    check(model, torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64))


def test_strided_inputs():
    model, input, target = problem(6, [3, 5, 2])
    check(model, input.t().contiguous().t(), target.repeat(1, 2)[:, ::2])
    check(model, input[:1].expand(6, 3), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    model, input, target = problem(200, [6, 32, 4], dtype=dtype)
    exact = mbp.MLP([6, 32, 4], dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.005}[dtype]
    for function in FUNCTIONS.values():
        got, want = function(model, input, target), function(exact, input.double(), target.double())
        for a, b in zip(got.values(), want.values(), strict=True) if isinstance(got, dict) else [(got, want)]:
            assert a.dtype is dtype
            assert (a.double() - b).norm() <= tolerance * b.norm()


INTEGERS = (torch.int64, torch.uint8, torch.bool)
TARGETS = [(loss, dtype) for loss in ("mse", "bce_with_logits", "function") for dtype in (*DTYPES, *INTEGERS)]
TARGETS += [("cross_entropy", dtype) for dtype in DTYPES] + [("classes", dtype) for dtype in INTEGERS]


@pytest.mark.parametrize(("loss", "target_dtype"), TARGETS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_target_of_another_dtype_is_promoted_or_refused_as_torch_does(dtype, loss, target_dtype):
    """The reference is the loop, in which torch promotes or rejects each example's target."""
    model, input, target = problem(9, [6, 5, 4], "cross_entropy" if loss == "classes" else "mse", dtype)
    target = (target if target_dtype.is_floating_point else target.round()).to(target_dtype)
    loss = "cross_entropy" if loss == "classes" else loss
    loss = (lambda output, target: (output - 2 * target).abs().sum()) if loss == "function" else loss
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.005}[dtype]
    try:
        one_by_one(model, input, target, loss)
    except RuntimeError as error:
        for function in FUNCTIONS.values():
            with pytest.raises(type(error)):
                function(model, input, target, loss)
    else:
        equal_to_a_loop(model, input, target, loss, tolerance)


def test_float16_gradients_do_not_overflow_before_the_mean_is_taken():
    model = mbp.LinearReLU(1, 4, bias=False, dtype=torch.float16)
    nn.init.constant_(model.weight, 30000.0)
    input, target = torch.ones(1, 1).half(), torch.full((1, 4), -30000.0).half()
    gradient = mbp.per_sample_gradients(model, input, target)["weight"]
    assert gradient.flatten().tolist() == [30000.0] * 4  # 2 · 60000 is above 65504, and the sum would be too


def test_float16_norms_do_not_overflow_in_the_squares():
    model = mbp.LinearReLU(64, 1, dtype=torch.float16)
    nn.init.ones_(model.weight)
    x, y = torch.full((1, 64), 100.0, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.float16)
    norm = mbp.per_sample_gradient_norms(model, x, y, lambda output, target: (output - target).sum())
    assert norm.item() == pytest.approx(800, rel=1e-2)  # its square is above 65504


@pytest.mark.parametrize("size", [1e-24, 1e24])
def test_squares_that_float32_does_not_hold(size):
    model, input, target = problem(5, [3, 5, 2], dtype=torch.float32)

    def loss(output, target):
        return size * (output * target).sum()

    each = mbp.per_sample_gradients(model, input, target, loss)
    wanted = torch.cat([grad.double().flatten(1) for grad in each.values()], 1).norm(dim=1)
    norms = mbp.per_sample_gradient_norms(model, input, target, loss)
    torch.testing.assert_close(norms.double(), wanted, rtol=1e-5, atol=0)
    one = mbp.clipped_gradients(model, input[:1], target[:1], size / 100, loss)
    clipped = torch.cat([grad.double().flatten() for grad in one.values()]).norm()
    assert clipped.item() == pytest.approx(size / 100, rel=1e-5)


def test_a_gradient_that_is_expanded():
    model, input, target = problem(5, [3, 5, 2])
    for loss in (lambda output, target: output.sum(), lambda output, target: (output * target).sum()):
        each = mbp.per_sample_gradients(model, input, target, loss)
        clipped = mbp.clipped_gradients(model, input, target, 1e9, loss)
        torch.testing.assert_close(clipped, {name: grad.sum(0) for name, grad in each.items()})


def test_clipping_bounds_each_example_and_leaves_small_gradients_alone():
    model, input, target = problem(5, [3, 5, 2])
    total = {name: g.sum(0) for name, g in mbp.per_sample_gradients(model, input, target).items()}
    torch.testing.assert_close(mbp.clipped_gradients(model, input, target, 1e9), total)
    one = mbp.clipped_gradients(model, input[:1], target[:1], 1e-3)
    assert torch.cat([g.flatten() for g in one.values()]).norm().item() == pytest.approx(1e-3)
    assert all((g == 0).all() for g in mbp.clipped_gradients(model, input, target, 0).values())


# --- replaced linear or relu -----------------------------------------------------------------------------------------


def tripled(function):
    """The function times 3."""
    return lambda *args, **kwargs: 3 * function(*args, **kwargs)


class Tripling(TorchFunctionMode):
    """Triples and counts linear layers."""

    def __init__(self, factor=3):
        super().__init__()
        self.factor, self.calls = factor, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is not F.linear:
            return result
        self.calls += 1
        return self.factor * result


@contextlib.contextmanager
def another_meaning(name):
    with pytest.MonkeyPatch.context() as patch:
        if name == "mode":
            with Tripling():
                yield
            return
        owner, attribute = {"F": F, "torch": torch}[name.partition(".")[0]], name.partition(".")[2]
        patch.setattr(owner, attribute, tripled(getattr(owner, attribute)))
        yield


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["F.linear", "F.relu", "torch.relu", "mode"])
def test_what_replaces_linear_or_relu_is_followed_as_by_a_plain_model(name, loss):
    model, input, target = problem(7, [3, 5, 4, 2], loss)
    before = mbp.per_sample_gradients(model, input, target, loss)
    with another_meaning(name):
        check(model, input, target, loss)
        assert not torch.allclose(mbp.per_sample_gradients(model, input, target, loss)["0.weight"], before["0.weight"])
    torch.testing.assert_close(mbp.per_sample_gradients(model, input, target, loss), before, rtol=0, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_mode_that_looks_on_sees_every_layer_and_changes_nothing(function):
    model, input, target = problem(7, [3, 5, 4, 2])
    expected = function(model, input, target)
    with Tripling(factor=1) as mode:
        torch.testing.assert_close(function(model, input, target), expected)
    assert mode.calls == 3


@pytest.fixture
def by_definition(monkeypatch):
    """Takes the path for replaced functions, in tiles of two rows."""
    monkeypatch.setattr(per_sample, "undisturbed", lambda input: False)
    monkeypatch.setattr(per_sample, "_TILE_NUMBERS", 100)


@pytest.mark.usefixtures("by_definition")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("loss", [*LOSSES, "function"])
def test_by_definition_the_gradients_are_the_same(loss, batch):
    model, input, target = problem(batch, [3, 5, 4, 2], loss)
    check(model, input, target, (lambda output, target: (output - target).sum()) if loss == "function" else loss)


@pytest.mark.usefixtures("by_definition")
def test_by_definition_frozen_parameters_and_ignored_classes_are_left_out_too():
    test_frozen_parameters_are_left_out_of_dict_norm_and_work()
    test_an_ignored_class_has_no_gradient()


def test_nothing_else_is_touched():
    model, input, target = problem(5, [3, 5, 2])
    input.requires_grad_()
    state = torch.get_rng_state()
    for function in FUNCTIONS.values():
        function(model, input, target)
    assert input.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_autocast_and_no_grad_make_no_difference(function):
    model, input, target = problem(5, [3, 5, 2], dtype=torch.float32)
    expected = function(model, input, target)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(function(model, input, target), expected)
    with torch.no_grad():
        torch.testing.assert_close(function(model, input, target), expected)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m, x, y: (m, x[0], y), ValueError, r"`input` must have shape \(B, D_0\).* got \(3,\)"),
        (lambda m, x, y: (m, x, y[:4]), ValueError, r"`target` must have shape \(5, 2\) for 'mse', got \(4, 2\)"),
        (lambda m, x, y: (m, x, y[:, 0]), ValueError, r"`target` must have shape \(5, 2\)"),
        (lambda m, x, y: (m, x, y, "hinge"), ValueError, "`loss` must be one of 'mse'.* got 'hinge'"),
        (lambda m, x, y: (m, x, y[:4], lambda o, t: o.sum()), ValueError, "`target` must have 5 rows"),
        (lambda m, x, y: (m, x, torch.full((5,), 2), "cross_entropy"), IndexError, "out of bounds"),
        (lambda m, x, y: (m, x.numpy(), y), TypeError, "`input` must be a Tensor"),
        (lambda m, x, y: (nn.Sequential(m, nn.Tanh()), x, y), TypeError, "Tanh"),
        (lambda m, x, y: (nn.Sequential(m[0], nn.ReLU(), m[0]), x, y), ValueError, "shares a parameter"),
        (lambda m, x, y: (m, torch.randn(5, 4, dtype=torch.float64), y), RuntimeError, "3 columns"),
    ],
)
def test_bad_arguments(function, change, error, message):
    with pytest.raises(error, match=message):
        function(*change(*problem(5, [3, 5, 2])))


def test_a_negative_norm_is_an_error():
    with pytest.raises(ValueError, match="`max_norm` must not be negative, got -1"):
        mbp.clipped_gradients(*problem(5, [3, 5, 2]), -1)
