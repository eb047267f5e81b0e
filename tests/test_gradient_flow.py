"""`gradient_flow` measures what autograd computes, agrees with theory, and diagnoses deliberate faults."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_manualbp as mbp
from torch_manualbp import _ops
from torch_manualbp._layers import Layer
from torch_manualbp.inspection.gradient_flow import (
    EXPLODING,
    VANISHING,
    GradientFlow,
    LayerFlow,
    _compose_backward,
    _compose_forward,
    dead_share_limit,
    run_backward,
    run_forward,
    weight_changes,
)


def deep(width=64, layers=30, gain=1.0, dtype=torch.float32):
    """A network without biases whose weights have `gain` times the standard deviation of He's initialisation."""
    model = mbp.MLP([width] * (layers + 1), dtype=dtype)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=gain * math.sqrt(2 / width))
        nn.init.zeros_(layer.bias)
    return model


def flow_of(model, rows=256, loss="mse"):
    dtype = model[0].weight.dtype
    x = torch.randn(rows, model[0].in_features).to(dtype)
    return mbp.gradient_flow(model, x, torch.randn(rows, model[-1].out_features).to(dtype), loss)


def linear(output, target):
    """A loss whose gradient does not depend on the output, as the theory assumes."""
    return (output * target).sum()


def test_numbers_equal_autograd():
    model = nn.Sequential(
        nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Linear(7, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)
    ).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    r = mbp.gradient_flow(model, x, y)
    h, hs, fs = x, [], []
    for module in model:
        if isinstance(module, nn.Linear):
            hs.append(h)
            fs.append(h := module(h))
            h.retain_grad()
        else:
            h = module(h)
    ((fs[-1] - y).square().mean(1)).sum().backward()  # Σ ℓ_i

    def size(t):
        return t.square().mean().sqrt().item()

    relu = (True, False, True, False)
    linears = [module for module in model if isinstance(module, nn.Linear)]
    for k, layer in enumerate(r.layers):
        assert (layer.name, layer.d_in, layer.d_out) == (("0", "2", "3", "5")[k], *reversed(linears[k].weight.shape))
        assert layer.f == pytest.approx(size(fs[k]))
        assert layer.h == pytest.approx(size(hs[k]))
        assert layer.dl_df == pytest.approx(size(fs[k].grad))
        weight = linears[k].weight
        assert layer.update_ratio == pytest.approx((weight.grad.norm() / 20 / weight.norm()).item())
        if relu[k]:
            assert layer.dead == pytest.approx((fs[k] <= 0).all(0).double().mean().item())
            assert layer.always_on == pytest.approx((fs[k] > 0).all(0).double().mean().item())
        else:
            assert layer.dead is layer.always_on is None
        if k == 0:
            assert layer.growth is layer.growth_theory is layer.forward_growth is layer.forward_theory is None
            continue
        assert layer.growth == pytest.approx(size(fs[k - 1].grad) / size(fs[k].grad))
        assert layer.forward_growth == pytest.approx(size(fs[k]) / size(fs[k - 1]))
        half, variance = 0.5 if relu[k - 1] else 1, weight.var(correction=0).item()
        assert layer.growth_theory == pytest.approx(math.sqrt(half * layer.d_out * variance))
        assert layer.forward_theory == pytest.approx(math.sqrt(half * layer.d_in * variance))
    top = size(fs[-1].grad) * math.sqrt(3)
    assert r.gradient_ratio == pytest.approx(size(fs[0].grad) * math.sqrt(9) / top)


@pytest.mark.parametrize(("gain", "diagnosis"), [(0.5, ["vanishing"]), (1, []), (2, ["exploding"])])
@pytest.mark.parametrize("width", [64, 256])
def test_thirty_layers(width, gain, diagnosis):
    r = flow_of(deep(width, 30, gain))
    assert r.diagnosis == diagnosis
    for word in ("vanishing", "exploding", "dead"):
        assert (word in r.diagnosis) == (word in diagnosis)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_he_initialisation_is_healthy_whatever_the_seed(seed):
    torch.manual_seed(seed)
    assert flow_of(deep(64)).diagnosis == []
    assert flow_of(deep(256)).diagnosis == []


def test_pytorch_initialisation_vanishes_in_thirty_layers_only():
    assert "vanishing" in flow_of(mbp.MLP([128] * 31)).diagnosis
    assert flow_of(mbp.MLP([784, 512, 512, 10]), loss="mse").diagnosis == []


@pytest.mark.slow
@pytest.mark.parametrize("gain", [0.5, 1, 2])
@pytest.mark.parametrize("width", [256, 512])
def test_theory_predicts_the_growth_of_each_layer(width, gain):
    r = flow_of(deep(width, 30, gain), loss=linear)
    for layer in r.layers[1:]:
        assert layer.growth_theory == pytest.approx(gain, rel=0.03)
        assert layer.growth == pytest.approx(layer.growth_theory, rel=0.15)
        assert layer.forward_theory == pytest.approx(gain, rel=0.03)
        # This varies more, because f is the same for all.
        assert layer.forward_growth == pytest.approx(layer.forward_theory, rel=0.2)


@pytest.mark.parametrize("gain", [0.5, 1, 2])
def test_theory_predicts_the_mean_growth_with_a_real_loss(gain):
    layers = flow_of(deep(256, 30, gain)).layers[1:]
    for measured, predicted in (("growth", "growth_theory"), ("forward_growth", "forward_theory")):
        ratios = [getattr(layer, measured) / getattr(layer, predicted) for layer in layers]
        assert math.prod(ratios) ** (1 / len(ratios)) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("gain", "diagnosis"), [(1e-3, "vanishing"), (30, "exploding")])
def test_float32_networks_that_under_and_overflow_are_measured_all_the_same(gain, diagnosis):
    r = flow_of(deep(256, 30, gain))
    assert r.diagnosis == [diagnosis]
    assert all(math.isfinite(layer.f) and layer.f > 0 and layer.dl_df > 0 for layer in r.layers)


def test_a_layer_whose_units_are_all_off():
    model = deep(64, 5)
    nn.init.constant_(model[4].bias, -100.0)
    r = flow_of(model)
    assert r.diagnosis == ["dead"]  # not vanishing, because dead units explain the missing gradient
    assert r.layers[2].dead == 1
    assert [layer.dl_df for layer in r.layers[:3]] == [0, 0, 0]
    assert "100% of the units of layer 2 (4)" in r.explanation["dead"]


def test_the_limit_of_dead_units():
    assert dead_share_limit(256) == 0.625
    assert dead_share_limit(4) == 1
    model = deep(256, 4)
    for share, diagnosis in ((0.6, []), (0.65, ["dead"])):
        with torch.no_grad():
            model[2].bias[: int(256 * share)] = -100.0
        assert flow_of(model).diagnosis == diagnosis


@pytest.mark.parametrize(
    ("ratio", "diagnosis"),
    [(VANISHING / 1.1, ["vanishing"]), (VANISHING * 1.1, []), (EXPLODING / 1.1, []), (EXPLODING * 1.1, ["exploding"])],
)
def test_the_limits_of_the_gradient_ratio(ratio, diagnosis):
    one = LayerFlow("0", 4, 4, 1.0, 1.0, 0.0, 0.0, ratio, None, None, None, None, 0.1)
    assert (
        GradientFlow((one, LayerFlow("2", 4, 4, 1.0, 1.0, None, None, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1))).diagnosis
        == diagnosis
    )


def test_a_narrow_output_is_no_exploding_gradient():
    """Norms are compared, since ∂ℓ/∂f of one output is √512 times larger than that of 512 units of equal norm."""
    model = mbp.MLP([512, 512, 1])
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    assert flow_of(model).gradient_ratio == pytest.approx(1, rel=0.3)


def test_nan_and_inf_are_found():
    model = deep(16, 3)
    x, y = torch.randn(10, 16), torch.randn(10, 16)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    r = mbp.gradient_flow(model, x, y)
    assert "exploding" in r.diagnosis
    assert "layer 1 (2)" in r.explanation["exploding"]


def test_no_gradient_at_all_is_no_finding():
    model = deep(16, 3)
    x = torch.randn(10, 16)
    r = mbp.gradient_flow(model, x, model(x).detach().double())
    assert math.isnan(r.gradient_ratio) or r.diagnosis == []
    r = mbp.gradient_flow(model, x, torch.full((10,), -100), "cross_entropy")
    assert math.isnan(r.gradient_ratio)
    assert r.diagnosis == []


@pytest.mark.parametrize(
    "model",
    [
        mbp.LinearReLU(5, 3),
        mbp.MLP([5, 3], bias=False),
        mbp.fuse(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU())),
        mbp.MLP([5, 8, 3], dtype=torch.bfloat16),
        mbp.MLP([5, 8, 3]).requires_grad_(False),
    ],
    ids=["LinearReLU", "one layer", "fused", "bfloat16", "frozen"],
)
def test_kinds_of_models(model):
    dtype = next(model.parameters()).dtype
    x = torch.randn(7, 5).to(dtype)
    for loss, y in (("mse", torch.randn(7, 3).to(dtype)), ("cross_entropy", torch.randint(3, (7,)))):
        r = mbp.gradient_flow(model, x, y, loss)
        assert all(math.isfinite(layer.f) and math.isfinite(layer.dl_df) for layer in r.layers)
        assert str(r)


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits"])
def test_a_target_of_another_dtype_is_promoted_or_refused_as_torch_does(loss):
    model, x, y = mbp.MLP([5, 8, 3]), torch.randn(7, 5), torch.randint(2, (7, 3))
    want = mbp.gradient_flow(model, x, y.float(), loss)
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64):
        if dtype.is_floating_point or (loss == "mse" and not dtype.is_complex):
            assert mbp.gradient_flow(model, x, y.to(dtype), loss) == want
        else:
            with pytest.raises(RuntimeError):
                mbp.gradient_flow(model, x, y.to(dtype), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize(
    ("sizes", "relus"),
    [([3, 1], [True]), ([5, 64, 17, 3], [True, True, False]), ([4, 9, 8, 16, 2], [False, True, False, True]), ([3, 0, 2], [True, False])],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_the_kernels_measure_what_plain_torch_does(sizes, relus, rows, dtype, layout):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        tensor = torch.randn(*shape, 2, generator=generator, dtype=dtype)[..., 0]
        return tensor if layout == "strided" else tensor.contiguous()

    weights = [normal(d_in, d_out).t() for d_in, d_out in itertools.pairwise(sizes)]
    biases = [normal(d) if k != 1 else None for k, d in enumerate(sizes[1:])]
    weights = weights if layout == "strided" else [weight.contiguous() for weight in weights]
    layers = [Layer("", *layer) for layer in zip(weights, biases, relus, strict=True)]
    x, gradient = normal(rows, sizes[0]), normal(rows, sizes[-1])
    tolerance = 1e-4 if dtype is torch.float32 else 1e-11
    output, f = _compose_forward(x, weights, biases, relus)
    plain = _compose_backward(x, weights, relus, f, gradient)
    memory = run_backward(run_forward(layers, -x), -gradient)
    of_other_size = run_backward(run_forward(layers, x.repeat(2, 1)), gradient.repeat(2, 1))
    for reused in (None, memory, of_other_size):
        forward = run_forward(layers, x, reused)
        torch.testing.assert_close(forward.output, output, rtol=tolerance, atol=tolerance)
        passes = run_backward(forward, gradient)
        assert (reused is not None and passes.f is reused.f) == (reused is memory)
        for got, want in zip(passes, plain, strict=True):
            torch.testing.assert_close(got, want.to(got.dtype), rtol=tolerance, atol=tolerance)
    moved = [weight + 0.5 for weight in weights]
    expected = [0.5 * math.sqrt(weight.numel()) for weight in weights]
    assert weight_changes(moved, passes.weights).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_kernels_measure_the_same_on_one_thread_and_on_two():
    x, y = torch.randn(400, 256), torch.randn(400, 256)
    model = mbp.MLP([256] * 6)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(mbp.gradient_flow(model, x, y).to_dict())
    assert results[0] == results[1]


MEMORY = torch.ones(28)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.ones(2, 2, 3)}, "`input` must be a matrix"),
        ({"input": torch.ones(4, 5)}, "`weights\\[0\\]` has 3 columns"),
        ({"relus": [True]}, "`relus` must have one item per weight"),
        ({"grad_output": torch.ones(4, 3)}, "`grad_output` must have shape"),
        ({"grad_output": torch.ones(4, 2).double()}, "`grad_output` must have the dtype of `input`"),
        ({"f": torch.ones(4)}, "`f` must have shape"),
        ({"df": torch.ones(2 * 4 * 7)[::2]}, "`df` must be contiguous"),
        ({"copies": torch.ones(26)}, "`copies` must have shape"),
        ({"input": MEMORY[:12].view(4, 3)}, "`f` must not share memory with another argument"),
        ({"grad_output": MEMORY[20:].view(2, 4).t()}, "`f` must not share memory with another argument"),
        ({"biases": [None, MEMORY[26:]]}, "`f` must not share memory with another argument"),
        ({"df": MEMORY}, "`f` must not share memory with another argument"),
    ],
)
def test_what_the_kernels_refuse(change, message):
    weights = [torch.ones(5, 3), torch.ones(2, 5)]
    valid = {
        "grad_output": torch.ones(4, 2),
        "input": torch.ones(4, 3),
        "weights": weights,
        "biases": [None, torch.ones(2)],
        "relus": [True, False],
        "f": MEMORY,
        "has_f": False,
        "df": torch.empty(28),
        "copies": torch.empty(25),
    }
    _ops.flow_backward(**valid)
    with pytest.raises(RuntimeError, match=message):
        _ops.flow_backward(**{**valid, **change})
    for name in ("f", "h"):
        forward = {key: valid[key] for key in ("input", "weights", "biases", "relus", "f")}
        with pytest.raises(RuntimeError, match=f"`{name}` must have shape \\(28,\\), got \\(5,\\)"):
            _ops.flow_forward(**{**forward, "h": torch.ones(28), name: torch.ones(5)})
    with pytest.raises(RuntimeError, match="`copies` must have an item for each of all weights"):
        _ops.flow_update(weights, torch.ones(24))
    with pytest.raises(RuntimeError, match="`copies` must have shape"):
        _ops.flow_update(weights, torch.ones(26))
    with pytest.raises(RuntimeError, match="`copies` must be contiguous"):
        _ops.flow_update(weights, torch.ones(1).expand(25))


def test_more_dimensions_are_more_examples():
    model = mbp.MLP([5, 8, 3])
    x, y = torch.randn(4, 6, 5), torch.randn(4, 6, 3)
    assert mbp.gradient_flow(model, x, y) == mbp.gradient_flow(model, x.reshape(24, 5), y.reshape(24, 3))
    classes = torch.randint(3, (4, 6))
    r = mbp.gradient_flow(model, x, classes, "cross_entropy")
    assert r == mbp.gradient_flow(model, x.reshape(24, 5), classes.flatten(), "cross_entropy")


def test_nothing_else_is_touched():
    model, x, y = mbp.MLP([5, 8, 3]), torch.randn(4, 5, requires_grad=True), torch.randn(4, 3)
    state, before = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    mbp.gradient_flow(model, x, y)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in (x, *model.parameters()))
    assert all(map(torch.equal, before, model.parameters()))


def test_table_and_dict():
    r = flow_of(deep(64, 30, 0.5))
    lines = str(r).splitlines()
    assert len(lines) == 1 + 1 + 30 + 1
    assert "a factor of 0.5 per layer; theory predicts 0.5 from" in lines[-1]
    assert len({len(line) for line in lines[1:-1]}) == 1  # aligned
    assert lines[-1].startswith("vanishing: the gradient of the first layer is")
    assert str(flow_of(deep(64, 3))).endswith("nothing found")
    d = json.loads(json.dumps(r.to_dict()))
    assert d["diagnosis"] == ["vanishing"]
    assert d["layers"][3]["growth"] == r.layers[3].growth
    assert d["step"] is None


def test_plot_shows_every_layer():
    figure = flow_of(deep(64, 12, 0.5)).plot()
    sizes, growth, shares = figure.axes
    assert "vanishing" in figure.get_suptitle()
    assert [len(line.get_xdata()) for line in sizes.lines] == [12, 12]
    assert sizes.get_yscale() == "log"
    assert [len(line.get_xdata()) for line in growth.lines[:4]] == [11] * 4
    assert len(shares.patches) == 22
    flow_of(mbp.MLP([3, 2])).plot().canvas.draw()  # one layer without ReLU, which leaves two panels empty


@pytest.mark.slow
def test_matplotlib_is_imported_only_to_plot():
    code = "import sys, torch_manualbp; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_matplotlib_missing_is_a_clear_error(no_matplotlib):
    r = flow_of(mbp.MLP([3, 2]))
    with pytest.raises(ImportError, match="figures need matplotlib"):
        r.plot()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m, x, y: (m, x[0], y), ValueError, r"`input` must have shape \(…, 5\)"),
        (lambda m, x, y: (m, x[:0], y[:0]), ValueError, "hold examples"),
        (lambda m, x, y: (m, x[:, :4], y), ValueError, r"\(…, 5\)"),
        (lambda m, x, y: (m, x, y[:, :2]), ValueError, r"`target` must have shape \(4, 3\)"),
        (lambda m, x, y: (m, x, y, "hinge"), ValueError, "`loss` must be one of"),
        (lambda m, x, y: (nn.Sequential(m, nn.Tanh()), x, y), TypeError, "Tanh"),
        (lambda m, x, y: (m, [1], y), TypeError, "`input` must be a Tensor"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        mbp.gradient_flow(*change(mbp.MLP([5, 8, 3]), torch.randn(4, 5), torch.randn(4, 3)))


def test_cross_entropy_of_mnist_size():
    model, x = mbp.MLP([784, 512, 512, 10]), torch.randn(64, 784)
    r = mbp.gradient_flow(model, x, torch.randint(10, (64,)), "cross_entropy")
    top = (F.softmax(model(x), 1) - F.one_hot(torch.randint(10, (64,)), 10)).square().mean().sqrt()
    assert r.layers[-1].dl_df == pytest.approx(top.item(), rel=0.05)


def test_a_replaced_linear_is_refused(monkeypatch):
    model, input, target = mbp.MLP([4, 5, 3]), torch.randn(7, 4), torch.randn(7, 3)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda input, weight, bias=None: input @ weight.t())
    with pytest.raises(TypeError, match="linear or ReLU is replaced"):
        mbp.gradient_flow(model, input, target)
