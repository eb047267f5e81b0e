"""`trace`: the lecture's quantities, computed by the training kernels, and the methods that show or check them."""

import contextlib
import copy
import json
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import torch_manualbp as mbp
from helpers import DTYPES, LARGE, assert_equal, calls_of, integer_net, integers, normal_net, oracle
from torch_manualbp.inspection._verify import Differences

NAN, INF = float("nan"), float("inf")
DOUBLE = torch.float64


def network(net, relus=None):
    """The plain nn.Sequential of a `Net`; `relus` selects the layers that a ReLU follows."""
    children = []
    for k, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
        layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        children.append(layer)
        if k < len(net.weights) - 1 if relus is None else relus[k]:
            children.append(nn.ReLU())
    return nn.Sequential(*children)


def random_problem(seed):
    """A network, an input and a target of random shapes, with or without biases, with ReLUs after any layers."""
    torch.manual_seed(seed)
    sizes = torch.randint(1, 12, (int(torch.randint(2, 7, ())),)).tolist()
    net = normal_net(int(torch.randint(1, 9, ())), sizes, biases=("all", "none", "mixed")[seed % 3])
    relus = None if seed % 2 else (torch.rand(len(sizes) - 1) < 0.7).tolist()
    model = network(net, relus)
    loss = ("mse", "cross_entropy", "bce_with_logits", F.smooth_l1_loss)[seed // 2 % 4]
    batch, width = len(net.input), sizes[-1]
    target = {
        "cross_entropy": torch.randint(width, (batch,)),
        "bce_with_logits": torch.rand(batch, width, dtype=DOUBLE),
    }.get(loss, torch.randn(batch, width, dtype=DOUBLE))
    return mbp.fuse(model) if seed % 5 == 0 else model, net.input, target, loss, ("sum", "mean")[seed // 8 % 2]


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(50))
def test_random_networks_agree_with_autograd_and_finite_differences(seed):
    model, *arguments = random_problem(seed)
    differences = mbp.trace(model, *arguments).verify()
    assert differences <= 1e-12
    assert max(differences.values()) <= 1e-12
    finite = differences.finite_differences
    assert sum(value == value for value in finite.values()) >= len(finite) / 2  # few are at a kink
    assert all(value <= 1e-5 for value in finite.values() if value == value)


@pytest.mark.parametrize("seed", range(0, 50, 3))
def test_loss_and_gradients_are_those_of_the_model_itself(seed):
    model, input, target, loss, reduction = random_problem(seed)
    t = mbp.trace(model, input, target, loss, reduction)
    function = (
        loss
        if callable(loss)
        else getattr(
            F, {"mse": "mse_loss", "cross_entropy": "cross_entropy"}.get(loss, "binary_cross_entropy_with_logits")
        )
    )
    x = input.clone().requires_grad_()
    output = model(x)
    value = function(output, target) if callable(loss) else function(output, target, reduction=reduction)
    value.backward()
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(t.output, output.detach(), **close)
    torch.testing.assert_close(t.loss, value.detach(), **close)
    torch.testing.assert_close(t.losses.sum(), value.detach(), **close)
    torch.testing.assert_close(t.dl_dh[0], x.grad, **close)
    parameters = dict(model.named_parameters())
    for layer, dbeta, domega in zip(t.layers, t.dl_dbeta, t.dl_domega, strict=True):
        torch.testing.assert_close(domega, parameters[layer.parameter_name("weight")].grad, **close)
        assert (dbeta is None) == (layer.bias is None)
        if dbeta is not None:
            torch.testing.assert_close(dbeta, parameters[layer.parameter_name("bias")].grad, **close)


@pytest.mark.parametrize("seed", range(0, 50, 7))
def test_without_kernels_the_numbers_are_autograds(seed, monkeypatch):
    model, *arguments = random_problem(seed)
    want = mbp.trace(model, *arguments)
    monkeypatch.setattr(sys.modules["torch_manualbp.inspection.trace"], "route", lambda *_: "torch")
    assert calls_of(mbp.trace, model, *arguments) == []
    got = mbp.trace(model, *arguments)
    assert got.verify() <= 1e-12
    for name in ("f", "h", "dl_df", "dl_dh", "dl_dbeta", "dl_domega", "output", "loss"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-12, atol=1e-13)
        for tensor in getattr(got, name) if isinstance(getattr(got, name), tuple) else [getattr(got, name)]:
            assert tensor is None or not tensor.requires_grad


@pytest.mark.parametrize("target_dtype", [*DTYPES, torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", "cross_entropy"])
def test_a_target_of_another_dtype_is_promoted_or_refused_as_torch_does(loss, dtype, target_dtype):
    model, input, target = mbp.MLP([4, 3], dtype=dtype), torch.randn(6, 4).to(dtype), torch.rand(6, 3)
    if not (target_dtype.is_floating_point or target_dtype.is_complex):
        target = torch.randint(2, (6,) if loss == "cross_entropy" else (6, 3))
    target = target.to(target_dtype)
    function = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}.get(loss, F.binary_cross_entropy_with_logits)
    try:
        want = function(model(input), target)
        want.backward()
    except RuntimeError as error:
        with pytest.raises((type(error), ValueError)):  # a ValueError if there is one class per row
            mbp.trace(model, input, target, loss, "mean")
        return
    t = mbp.trace(model, input, target, loss, "mean")
    t.verify()
    precision = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}
    close = {"rtol": precision[dtype], "atol": precision[dtype]}
    torch.testing.assert_close(t.dl_domega[0], model[0].weight.grad, **close)
    torch.testing.assert_close(t.dl_dbeta[0], model[0].bias.grad, **close)
    close = {"rtol": max(precision[dtype], precision[want.dtype]), "atol": 0}
    torch.testing.assert_close(t.loss, want.detach(), **close)
    torch.testing.assert_close(t.losses.sum(), want.detach(), **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, [1] * 5), (5, [7, 9, 17, 3]), (32, [64] * 12), *LARGE.values()], ids=str)
def test_numbers_are_those_of_training_bit_for_bit(shape, dtype):
    net = normal_net(*shape, dtype)
    model = mbp.MLP(shape[1], dtype=dtype)
    model.load_state_dict(network(net).state_dict())
    target = torch.randn(len(net.input), shape[1][-1]).to(dtype)
    t = mbp.trace(model, net.input, target, reduction="mean")
    x = net.input.clone().requires_grad_()
    loss = F.mse_loss(model(x), target)
    loss.backward()
    assert_equal(t.output, model(x).detach())
    assert_equal(t.loss, loss.detach())
    assert_equal(t.dl_dh[0], x.grad)
    for k in range(len(t.f)):
        assert_equal(t.dl_domega[k], model[2 * k].weight.grad)
        assert_equal(t.dl_dbeta[k], model[2 * k].bias.grad)
    for k in range(len(t.f) - 1):
        assert_equal(torch.relu(t.f[k]), t.h[k + 1])  # so f_k > 0 exactly where h_{k+1} > 0
        assert_equal(t.dl_df[k], t.dl_dh[k + 1].where(t.f[k] > 0, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("closed", [False, True])
def test_integers_are_exact_at_the_kink_too(dtype, closed):
    net = integer_net(6, [5, 7, 4, 3], dtype, biases="mixed")
    grad = integers(6, 3, dtype=dtype)
    model = network(net, [True, True, closed])
    t = mbp.trace(model, net.input, grad, loss=lambda output, target: (output * target).sum())
    truth = oracle(net, grad, final_relu=closed)
    got = [t.output, t.dl_dh[0], *t.dl_domega, *(dbeta for dbeta in t.dl_dbeta if dbeta is not None)]
    for name, one, want in zip(truth.names, got, truth.values, strict=True):
        torch.testing.assert_close(one, want, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert any((f == 0).any() for f in t.f[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
def test_verify_knows_what_a_dtype_can_do(dtype, loss):
    for sizes, biases in (([20, 100, 60, 4], "mixed"), ([64] * 25 + [4], "none")):
        net = normal_net(40, sizes, dtype, biases=biases)
        target = torch.randint(4, (40,)) if loss == "cross_entropy" else torch.rand(40, 4).to(dtype)
        t = mbp.trace(network(net), net.input, target, loss, "mean")
        assert t.verify() >= 0
        assert bool(t.verify().finite_differences) == (dtype is DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_verify_accepts_a_converged_network(loss, dtype):
    """At convergence, the terms of a gradient cancel, so that rounding dominates what is left."""
    model = mbp.MLP([3, 16, 2], dtype=dtype)
    x, y = torch.randn(3, 3, dtype=dtype), torch.tensor([0, 1, 1])
    y = y if loss == "cross_entropy" else F.one_hot(y, 2).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2 if loss == "mse" else 1.0)
    for _ in range(1000):
        optimizer.zero_grad()
        assert model.loss_backward(x, y, loss, "mean").isfinite()
        optimizer.step()
    t = mbp.trace(model, x, y, loss)
    assert t.loss < (1e-10 if loss == "mse" else 1e-3)
    t.verify()


@pytest.mark.parametrize("name", ["f", "h", "loss", "losses", "dl_df", "dl_dh", "dl_dbeta", "dl_domega"])
def test_verify_finds_what_is_wrong(name):
    net = normal_net(4, [3, 5, 2])
    t = mbp.trace(network(net), net.input, torch.randn(4, 2, dtype=DOUBLE))
    wrong = copy.deepcopy(t)
    value = getattr(wrong, name)
    where = value if isinstance(value, torch.Tensor) else value[1]
    where.view(-1)[0] += 1e-6 + where.view(-1)[0].abs() * 1e-6
    label = name if isinstance(value, torch.Tensor) else f"{name}[1]"
    with pytest.raises(AssertionError, match=rf"differences from autograd.*{re.escape(label)} by"):
        wrong.verify()
    assert t.verify() <= 1e-12
    with pytest.raises(AssertionError, match=re.escape("f[0]")):
        t.verify(tolerance=-1)


def test_verify_finds_a_wrong_shape():
    net = normal_net(4, [3, 5, 2])
    t = mbp.trace(network(net), net.input, torch.randn(4, 2, dtype=DOUBLE))
    t.dl_dbeta[1].unsqueeze_(0)
    with pytest.raises(AssertionError, match=re.escape("verify: dl_dbeta[1] has the shape (1, 2), not (2,)")):
        t.verify()


def test_differences_compare_as_the_largest_of_them():
    differences = Differences({"f[0]": 0.0, "dl_df[0]": 2.0, "loss": 1.0})
    assert float(differences) == 2.0
    assert [differences < 2, differences <= 2, differences > 2, differences >= 2] == [False, True, False, True]
    assert [differences < 3, differences <= 1, differences > 1, differences >= 3] == [True, False, True, False]
    differences["h[0]"] = float("nan")
    assert [differences < 3, differences <= 3, differences > 3, differences >= 3] == [False] * 4


def test_verify_finds_a_wrong_derivative_of_the_loss_by_finite_differences():
    class Wrong(torch.autograd.Function):  # a wrong backward, which autograd uses
        @staticmethod
        def forward(ctx, output):
            return output.square().sum()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.ones(4, 2, dtype=DOUBLE)

    net = normal_net(4, [3, 5, 2])
    t = mbp.trace(network(net), net.input, None, lambda output, target: Wrong.apply(output))
    with pytest.raises(AssertionError, match="differences from finite differences"):
        t.verify()


def test_nan_and_infinity_pass_as_in_training():
    model = mbp.MLP([1, 2, 1], dtype=DOUBLE)
    x = torch.tensor([[NAN], [1.0]], dtype=DOUBLE)
    t = mbp.trace(model, x, torch.zeros(2, 1, dtype=DOUBLE))
    assert t.output[0].isnan()
    assert t.output[1].isfinite()
    assert t.dl_df[0][0].isnan().all()
    assert t.dl_df[0][1].isfinite().all()
    assert "nan" in str(t)


# --- the toy network of the lecture ---------------------------------------------------------------------------------


def toy():
    """f_0 = 1 + 2·0.5 = 2, f_1 = −1 + 3·2 = 5, f_2 = 0.5 − 0.1·5 = 0 (off), f_3 = 2 + 4·0 = 2."""
    model = mbp.MLP([1, 1, 1, 1, 1], dtype=DOUBLE)
    for k, (omega, beta) in enumerate([(2.0, 1.0), (3.0, -1.0), (-0.5, 4.0), (4.0, 2.0)]):
        nn.init.constant_(model[2 * k].weight, omega)
        nn.init.constant_(model[2 * k].bias, beta)
    return mbp.trace(model, torch.tensor([[0.5]], dtype=DOUBLE), torch.tensor([[3.0]], dtype=DOUBLE))


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", "cross_entropy"])
def test_called_alike_the_loss_is_one_number_everywhere(loss):
    model, x = mbp.MLP([3, 5, 2], dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    y = torch.tensor([0, 1, 1, 0]) if loss == "cross_entropy" else torch.rand(4, 2, dtype=DOUBLE)
    t = mbp.trace(model, x, y, loss)
    torch.testing.assert_close(t.loss, model.loss(x, y, loss).detach())
    of_examples = mbp.per_sample_gradients(model, x, y, loss)
    ratios = [layer.update_ratio for layer in mbp.gradient_flow(model, x, y, loss).layers]
    for k, dl_domega in enumerate(t.dl_domega):
        torch.testing.assert_close(dl_domega, of_examples[f"{2 * k}.weight"].mean(0))
        assert ratios[k] == pytest.approx((dl_domega.norm() / model[2 * k].weight.norm()).item())
    torch.testing.assert_close(mbp.trace(model, x, y, loss, "sum").loss, model.loss(x, y, loss, "sum").detach())


def test_toy_network_by_hand():
    t = toy()
    assert [f.item() for f in t.f] == [2, 5, 1.5, 8]
    assert [h.item() for h in t.h] == [0.5, 2, 5, 1.5]
    assert (t.output.item(), t.loss.item(), t.losses.tolist()) == (8, 25, [25])
    assert [d.item() for d in reversed(t.dl_df)] == [10, 40, -20, -60]
    assert [d.item() for d in reversed(t.dl_dh)] == [40, -20, -60, -120]
    assert [d.item() for d in t.dl_dbeta] == [-60, -20, 40, 10]
    assert [d.item() for d in t.dl_domega] == [-30, -40, 200, 15]


def test_print_shows_the_passes_in_the_order_of_the_lecture():
    lines = [re.sub(r"\s+", " ", line).strip() for line in str(toy()).splitlines()]
    assert lines == [
        "Forward pass (mse)",
        "h_0 = x = 0.5",
        "f_0 = β_0 + ω_0 · h_0 = 2",
        "h_1 = a[f_0] = 2",
        "f_1 = β_1 + ω_1 · h_1 = 5",
        "h_2 = a[f_1] = 5",
        "f_2 = β_2 + ω_2 · h_2 = 1.5",
        "h_3 = a[f_2] = 1.5",
        "f_3 = β_3 + ω_3 · h_3 = 8",
        "ℓ = (f_3 − y)² = 25",
        "Backward pass, in reverse order",
        "∂ℓ/∂f_3 = 2(f_3 − y) = 10",
        "∂ℓ/∂h_3 = ω_3 · ∂ℓ/∂f_3 = 40",
        "∂ℓ/∂f_2 = I[f_2 > 0] · ∂ℓ/∂h_3 = 40",
        "∂ℓ/∂h_2 = ω_2 · ∂ℓ/∂f_2 = -20",
        "∂ℓ/∂f_1 = I[f_1 > 0] · ∂ℓ/∂h_2 = -20",
        "∂ℓ/∂h_1 = ω_1 · ∂ℓ/∂f_1 = -60",
        "∂ℓ/∂f_0 = I[f_0 > 0] · ∂ℓ/∂h_1 = -60",
        "Gradients of the parameters",
        "∂ℓ/∂β_3 = ∂ℓ/∂f_3 = 10",
        "∂ℓ/∂ω_3 = ∂ℓ/∂f_3 · h_3 = 15",
        "∂ℓ/∂β_2 = ∂ℓ/∂f_2 = 40",
        "∂ℓ/∂ω_2 = ∂ℓ/∂f_2 · h_2 = 200",
        "∂ℓ/∂β_1 = ∂ℓ/∂f_1 = -20",
        "∂ℓ/∂ω_1 = ∂ℓ/∂f_1 · h_1 = -40",
        "∂ℓ/∂β_0 = ∂ℓ/∂f_0 = -60",
        "∂ℓ/∂ω_0 = ∂ℓ/∂f_0 · h_0 = -30",
    ]


@pytest.mark.parametrize(
    ("loss", "value", "gradient"),
    [
        ("mse", "Σ_d (f_0 − y_i)² / 2", "2(f_0 − y_i) / 2"),
        ("cross_entropy", "−log softmax[f_0]_y", "softmax[f_0] − onehot[y_i]"),
        ("bce_with_logits", "−log p(y_i | sigmoid[f_0]) / 2", "(sigmoid[f_0] − y_i) / 2"),
    ],
)
def test_print_shows_the_formulas_of_the_losses(loss, value, gradient):
    target = torch.tensor([1]) if loss == "cross_entropy" else torch.zeros(1, 2)
    text = str(mbp.trace(mbp.MLP([3, 2]), torch.randn(1, 3), target, loss, "mean"))
    rows = dict(re.findall(r"^ +(\S+) += (.+?)  ", text, re.MULTILINE))
    assert (rows["ℓ_i"], rows["∂ℓ_i/∂f_0"]) == (value, gradient)


def test_print_shows_shapes_and_norms_of_a_batch():
    net = normal_net(6, [3, 5, 2], biases="mixed")
    t = mbp.trace(network(net, [True, True]), net.input, torch.randint(2, (6,)), "cross_entropy", "mean")
    text = str(t)
    assert "f_0 = Ω_0 h_0" in re.sub(" +", " ", text)
    assert "6 × 5" in text
    assert f"{t.f[0].norm().item():.6g}" in text
    assert "∂ℓ_i/∂h_2 = (softmax[h_2] − onehot[y_i]) / 6" in text
    assert "∂L/∂β_0" not in text
    assert "I[f_1 > 0] ⊙ ∂ℓ_i/∂h_2" in text
    assert repr(t) == f"Trace(3–5–2, batch 6, float64, cross_entropy = {t.loss.item():.6g})"


def test_notebooks_get_a_table():
    for t in (toy(), mbp.trace(mbp.MLP([3, 5, 2]), torch.randn(4, 3), torch.randn(4, 2))):
        html = t._repr_html_()
        assert html.startswith("<div><table>")
        assert html.count("<tr>") == html.count("</tr>") == len(str(t).splitlines())
        assert "I[f<sub>0</sub> &gt; 0]" in html


def test_to_dict_is_json_with_every_number():
    net = normal_net(4, [3, 5, 2], biases="mixed")
    t = mbp.trace(network(net), net.input, torch.randn(4, 2, dtype=DOUBLE), reduction="mean")
    again = json.loads(json.dumps(t.to_dict()))
    for name in ("f", "h", "dl_df", "dl_dh", "dl_domega"):
        for got, want in zip(again[name], getattr(t, name), strict=True):
            assert_equal(torch.tensor(got, dtype=DOUBLE), want)
    assert again["dl_dbeta"][0] is None
    assert again["loss"] == t.loss.item()
    assert (again["loss_function"], again["reduction"]) == ("mse", "mean")
    assert [layer["relu"] for layer in again["layers"]] == [True, False]
    json.dumps(mbp.trace(network(net), net.input, {"any": net.input}, lambda o, t: o.sum()).to_dict())


def drawn_texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize(
    "sizes", [[1, 1, 1], [3, 5, 2], [3, 1], pytest.param([4] * 40, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("batch", [1, 50])
def test_plot_draws_both_passes(sizes, batch, tmp_path):
    t = mbp.trace(mbp.MLP(sizes), torch.randn(batch, sizes[0]), torch.randn(batch, sizes[-1]))
    figure = t.plot()
    figure.savefig(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").stat().st_size > 10_000
    texts = " ".join(drawn_texts(figure))
    assert "Forward pass" in texts
    assert "Backward pass" in texts


def test_plot_draws_the_toy_network_with_the_numbers_of_the_lecture():
    texts = drawn_texts(toy().plot())
    t = toy()
    for name, value in (("f_{2}", t.f[2]), ("h_{3}", t.h[3]), (r"\partial \ell/\partial f_{0}", t.dl_df[0])):
        assert f"${name}$" in texts
        assert number_in_circle(value) in texts
    assert number_in_circle(t.dl_domega[1]) in texts
    assert number_in_circle(t.layers[1].weight) in texts
    assert number_in_circle(t.losses[0]) in texts


def number_in_circle(value):
    return f"{value.item():.3g}".replace("-", "−")


def test_network_plot_colours_weights_by_sign_and_shows_where_relu_is_off():
    model = mbp.MLP([1, 2, 1])
    for parameter, values in zip(model.parameters(), ([[2.0], [-3.0]], [0.0, 0.0], [[4.0, 5.0]], [1.0]), strict=True):
        parameter.data = torch.tensor(values)
    x, y = torch.tensor([[-7.0], [0.5]]), torch.zeros(2, 1)
    figure = mbp.trace(model, x, y).plot("network", example=1)
    assert any("example 1 of 2" in text for text in drawn_texts(figure))
    from matplotlib.patches import Circle, FancyArrowPatch

    (axes,) = figure.axes
    circles = [patch for patch in axes.patches if isinstance(patch, Circle)]
    assert len(circles) == 2 * (1 + 2 + 2 + 1 + 1)  # x, f_0, h_1, f_1, ℓ in both passes
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    red, blue, dotted = "#b21", "#216", ":"
    from matplotlib.colors import to_hex

    colors = [to_hex(arrow.get_edgecolor())[:4] for arrow in arrows]
    # Forward: Ω_0 has a positive and a negative weight, Ω_1 two positive ones. Backward: ∂ℓ/∂f_1 = 2 (5 − 0), h_1 is
    # (1, 0), so that ∂ℓ/∂Ω_1 = (10, 0) and ∂ℓ/∂Ω_0 = (20, 0).
    assert (colors.count(red), colors.count(blue)) == (1 + 2 + 2, 1)
    assert [arrow.get_linestyle() for arrow in arrows].count(dotted) == 2  # the second ReLU, in both passes
    texts = drawn_texts(figure)
    for number in ("2", "−3", "4", "5", "10", "20", "40"):
        assert number in texts


def test_maps_have_numbers_where_there_is_room():
    t = mbp.trace(mbp.MLP([3, 2, 2]), torch.randn(4, 3), torch.randn(4, 2))
    assert f"{t.f[1][3, 1].item():.2g}".replace("-", "−") in drawn_texts(t.plot("maps"))
    large = mbp.trace(mbp.MLP([3, 40, 2]), torch.randn(4, 3), torch.randn(4, 2))
    assert f"{large.f[1][3, 1].item():.2g}".replace("-", "−") not in drawn_texts(large.plot("maps"))


def test_maps_have_one_scale_for_each_pass_and_colours_for_numbers_far_below_the_largest():
    t = mbp.trace(mbp.MLP([3, 20, 2]), torch.randn(8, 3), torch.randn(8, 2))
    for gradients in (*t.dl_df, *t.dl_dh):
        gradients[1:] *= 1e-3  # one example has nearly all of the gradient, as one that is misclassified
    figure = t.plot("maps")
    images = [image for axes in figure.axes for image in axes.images]
    assert len({image.norm for image in images}) == 2
    backward = images[-1]
    assert abs(backward.norm(float(t.dl_df[1][0].abs().max())) - 0.5) <= 0.5
    assert abs(backward.norm(float(t.dl_df[1][1].abs().max())) - 0.5) > 0.05
    assert backward.norm(0.0) == 0.5


@pytest.mark.parametrize(
    ("sizes", "options", "error", "message"),
    [
        ([2, 2, 1], {"kind": "diagram"}, ValueError, "network"),
        ([2, 9, 1], {"kind": "network"}, ValueError, "9 units, and there is room for 8"),
        ([2] * 9, {"kind": "network"}, ValueError, "8 layers need 17 columns"),
        ([2] * 9, {"kind": "maps"}, ValueError, "15 panels"),
        ([2, 2, 1], {"kind": "network", "example": 3}, IndexError, "no example 3 in a batch of 3"),
    ],
)
def test_plot_says_why_it_cannot_draw(sizes, options, error, message):
    t = mbp.trace(mbp.MLP(sizes), torch.randn(3, 2), torch.randn(3, sizes[-1]))
    with pytest.raises(error, match=message):
        t.plot(**options)


@pytest.mark.slow
def test_plot_survives_zeros_nan_and_infinity(tmp_path):
    for value in (0.0, NAN, INF):
        for sizes in ([2, 3, 1], [2] * 20):
            t = mbp.trace(mbp.MLP(sizes), torch.full((2, 2), value), torch.zeros(2, sizes[-1]))
            for kind in (None, "bars", *(["network"] if len(sizes) == 3 else [])):
                t.plot(kind).savefig(tmp_path / "trace.png")


@pytest.mark.slow
def test_matplotlib_is_imported_only_to_draw_and_its_absence_is_reported(no_matplotlib):
    code = "import sys, torch_manualbp; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    t = toy()
    with pytest.raises(ImportError, match="pip install matplotlib"):
        t.plot()


# --- per example ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
def test_per_sample_gradients_are_those_of_each_example_alone(loss, reduction):
    net = normal_net(5, [4, 6, 3])
    model = network(net)
    target = torch.randint(3, (5,)) if loss == "cross_entropy" else torch.rand(5, 3, dtype=DOUBLE)
    t = mbp.trace(model, net.input, target, loss, reduction)
    share = 1.0 if reduction == "sum" else 1 / 5
    for i in range(5):
        alone = mbp.trace(model, net.input[i], target[i], loss, reduction)
        torch.testing.assert_close(t.losses[i], alone.loss * share)
        for k in (0, 1, -1):
            torch.testing.assert_close(t.per_sample_dl_dbeta(k)[i], alone.dl_dbeta[k] * share)
            torch.testing.assert_close(t.per_sample_dl_domega(k)[i], alone.dl_domega[k] * share)
            torch.testing.assert_close(t.dl_df[k][i], alone.dl_df[k][0] * share)
    for k in range(2):
        torch.testing.assert_close(t.per_sample_dl_domega(k).sum(0), t.dl_domega[k])
        torch.testing.assert_close(t.per_sample_dl_dbeta(k).sum(0), t.dl_dbeta[k])


def test_per_sample_gradients_of_layers_that_are_not_there():
    t = mbp.trace(mbp.MLP([2, 3, 1], bias=False), torch.randn(4, 2), torch.randn(4, 1))
    with pytest.raises(ValueError, match="layer 1 has no bias"):
        t.per_sample_dl_dbeta(1)
    for method in (t.per_sample_dl_dbeta, t.per_sample_dl_domega):
        with pytest.raises(IndexError):
            method(2)


def test_ignored_classes_count_for_nothing():
    net = normal_net(4, [3, 5, 2])
    target = torch.tensor([0, -100, 1, -100])
    t = mbp.trace(network(net), net.input, target, "cross_entropy", "mean")
    torch.testing.assert_close(t.loss, F.cross_entropy(t.output, target))
    torch.testing.assert_close(t.losses.sum(), t.loss)
    assert t.losses[1] == 0
    assert (t.dl_df[0][[1, 3]] == 0).all()
    t.verify()


def test_class_probabilities():
    net = normal_net(4, [3, 5, 2])
    target = torch.rand(4, 2, dtype=DOUBLE).softmax(1)
    t = mbp.trace(network(net), net.input, target, "cross_entropy", "mean")
    torch.testing.assert_close(t.loss, F.cross_entropy(t.output, target))
    torch.testing.assert_close(t.losses.sum(), t.loss)
    t.verify()


# --- callables ------------------------------------------------------------------------------------------------------


def squares(output, target):
    return (output - target).square().sum(1)


def test_callable_with_a_value_per_example_is_reduced():
    net = normal_net(4, [3, 5, 2])
    target = torch.randn(4, 2, dtype=DOUBLE)
    for reduction, share in (("sum", 1), ("mean", 4)):
        t = mbp.trace(network(net), net.input, target, squares, reduction)
        reference = mbp.trace(network(net), net.input, target, "mse", "sum")
        torch.testing.assert_close(t.losses * share, reference.losses)
        torch.testing.assert_close(t.loss * share, reference.loss)
        torch.testing.assert_close(t.dl_domega[0] * share, reference.dl_domega[0])
        t.verify()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_scalar_of_a_callable_is_the_loss_whatever_the_reduction(reduction):
    net = normal_net(4, [3, 5, 2])
    target = torch.randn(4, 2, dtype=DOUBLE)
    for function, name in ((nn.MSELoss(reduction="sum"), "sum"), (nn.MSELoss(), "mean")):
        t = mbp.trace(network(net), net.input, target, function, reduction)
        reference = mbp.trace(network(net), net.input, target, "mse", name)
        torch.testing.assert_close(t.loss, reference.loss)
        torch.testing.assert_close(t.losses, reference.losses)
        torch.testing.assert_close(t.dl_df[0], reference.dl_df[0])


def test_callable_that_couples_examples_has_no_losses_but_right_gradients():
    def contrast(output, target):
        return (output @ output.T).logsumexp(1).sum() - output.sum() * 0.3

    net = normal_net(4, [3, 5, 2])
    t = mbp.trace(network(net), net.input, None, contrast)
    assert t.losses is None
    assert mbp.trace(network(net), net.input, net.input, contrast).losses is None  # even though the target can be split
    assert t.verify() <= 1e-12
    assert "∂L/∂f_1 = ∂contrast/∂f_1" in re.sub(" +", " ", str(t))
    assert "contrast(f_1, y_i)" in str(t)
    alone = mbp.trace(network(net), net.input[0], None, contrast)
    assert_equal(alone.losses, alone.loss.reshape(1))


def test_callable_that_refuses_a_single_example_has_no_losses():
    def picky(output, target):
        if len(output) == 1:
            raise RuntimeError("more than one example, please")
        return output.sum()

    net = normal_net(4, [3, 5, 2])
    t = mbp.trace(network(net), net.input, torch.zeros(4), picky)
    assert t.losses is None
    assert_equal(t.dl_df[1], torch.ones(4, 2, dtype=DOUBLE))


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda o, t: 3.0, TypeError, "must return a Tensor, got float"),
        (lambda o, t: o, ValueError, r"scalar or one value per example, shape \(4,\), got shape \(4, 2\)"),
        (lambda o, t: o.detach().sum(), ValueError, "cannot trace back"),
        (3, TypeError, "`loss` must be one of .* or a callable.*, got int"),
        ("l1", ValueError, "`loss` must be one of 'mse', .* got 'l1'"),
    ],
)
def test_bad_losses(loss, error, message):
    with pytest.raises(error, match=f"trace: .*{message}"):
        mbp.trace(mbp.MLP([3, 2]), torch.randn(4, 3), torch.randn(4, 2), loss)


# --- models, inputs and side effects --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda: mbp.LinearReLU(3, 4),
    lambda: nn.Linear(3, 4),
    lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU()),
    lambda: mbp.fuse(nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 4))),
    lambda: mbp.MLP([3, 4, 4, 4], activations="recompute"),
    lambda: nn.Sequential(nn.Sequential(mbp.LinearReLU(3, 4), nn.ReLU()), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)),
    lambda: nn.Sequential(nn.Linear(3, 0), nn.ReLU(), nn.Linear(0, 4)),
])  # fmt: skip
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_models(make, batch):
    model = make().double()
    x, y = torch.randn(batch, 3, dtype=DOUBLE), torch.randn(batch, 4, dtype=DOUBLE)
    t = mbp.trace(model, x, y)
    torch.testing.assert_close(t.output, model(x).detach())
    torch.testing.assert_close(t.loss, F.mse_loss(t.output, y), equal_nan=True)  # 0/0 without rows
    assert t.verify() <= 1e-12
    assert len(t.f) == len(t.dl_df) == len(t.dl_domega) == len(t.dl_dbeta) == len(t.layers)
    assert [h.shape for h in t.h] == [d.shape for d in t.dl_dh]
    str(t), t._repr_html_(), t.to_dict()


def test_trace_is_a_snapshot_and_leaves_no_trace():
    model = mbp.MLP([3, 5, 2])
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    t = mbp.trace(model, x, y)
    before = copy.deepcopy(t.to_dict())
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert calls == []
    with torch.no_grad():
        for tensor in (*model.parameters(), x, y):
            tensor.add_(1)
    assert t.to_dict() == before
    t.verify()
    assert t.to_dict() == before
    assert not any(tensor.requires_grad for tensor in (*t.f, *t.h, *t.dl_df, t.loss, t.losses, t.layers[0].weight))


def test_trace_runs_our_kernels():
    model = mbp.MLP([3, 5, 5, 2])
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    assert calls_of(mbp.trace, model, x, y) == ["mlp"] * 3 + ["mlp_backward"] * 4
    with torch.no_grad():
        assert calls_of(mbp.trace, nn.Sequential(*model), x, y) == ["mlp"] * 3 + ["mlp_backward"] * 4


def test_modes_of_torch_do_not_matter():
    model, x, y = mbp.MLP([3, 5, 2], dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE), torch.randn(4, 2, dtype=DOUBLE)
    want = mbp.trace(model, x, y)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            got = mbp.trace(model, x.clone(), y.clone())
            assert_equal(got.dl_domega[0], want.dl_domega[0])
            assert got.verify() <= 1e-12


def test_other_devices_and_dispatch_run_on_torch(monkeypatch):
    model, x, y = mbp.MLP([3, 5, 2], dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE), torch.randn(4, 2, dtype=DOUBLE)
    want = mbp.trace(model, x, y)
    monkeypatch.setattr(sys.modules["torch_manualbp.inspection.trace"], "route", lambda *_: "torch")
    assert calls_of(mbp.trace, model, x, y) == []
    got = mbp.trace(model, x, y)
    assert got.verify() <= 1e-12
    torch.testing.assert_close(got.dl_domega, want.dl_domega)
    assert_equal(torch.relu(got.f[0]), got.h[1])


class Tripling(TorchFunctionMode):
    """Triples the output of linear layers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 3 * result if function is F.linear else result


@pytest.mark.parametrize("name", ["linear", "relu", "mode"])
@pytest.mark.parametrize("closed", [False, True])
def test_what_replaces_linear_or_relu_is_followed_as_by_a_plain_model(closed, name, monkeypatch):
    net = normal_net(4, [3, 5, 2], biases="mixed")
    model, target = network(net, [True, closed]), torch.randn(4, 2, dtype=DOUBLE)
    mode = contextlib.nullcontext()
    if name == "mode":
        mode = Tripling()
    else:
        function = getattr(F, name)
        monkeypatch.setattr(F, name, lambda *args, **kwargs: 3 * function(*args, **kwargs))
    with mode:
        t = mbp.trace(model, net.input, target)
        f = model[0](net.input)
        h = model[1](f)
        output = model[2:](h)
        loss = F.mse_loss(output, target)
    grads = torch.autograd.grad(loss, [f, h, model[0].weight, model[2].weight, model[2].bias])
    got = [t.dl_df[0], t.dl_dh[1], *t.dl_domega, t.dl_dbeta[1]]
    for one, other in zip([t.f[0], t.h[1], t.output, t.loss, *got], [f, h, output, loss, *grads], strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-13)


def test_one_example_without_a_batch_dimension():
    model = mbp.MLP([3, 5, 2])
    x, y = torch.randn(3), torch.randn(2)
    one, batch = mbp.trace(model, x, y), mbp.trace(model, x[None], y[None])
    assert one.output.shape == (1, 2)
    assert one.to_dict() == batch.to_dict()
    assert mbp.trace(model, x, torch.tensor(1), "cross_entropy").losses.shape == (1,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "`input` must be a Tensor, got list"),
        ({"input": torch.randn(2, 4, 3)}, ValueError, r"`input` must have shape \(B, D_0\) or \(D_0,\), got \(2, 4, 3\)"),
        ({"input": torch.randn(4, 5)}, RuntimeError, r"`weights\[0\]`.*5"),
        ({"input": torch.randn(4, 3).double()}, RuntimeError, "dtype"),
        ({"target": torch.randn(4)}, ValueError, r"`target` must have shape \(4, 2\) for 'mse', got \(4,\)"),
        ({"target": 3.0}, TypeError, "`target` must be a Tensor, got float"),
        ({"target": torch.zeros(4, 1, dtype=torch.long), "loss": "cross_entropy"}, ValueError, r"shape \(4,\) .* got \(4, 1\)"),
        ({"reduction": "none"}, ValueError, "`reduction` must be one of 'mean', 'sum', got 'none'"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    arguments = {"model": mbp.MLP([3, 5, 2]), "input": torch.randn(4, 3), "target": torch.randn(4, 2)} | change
    with pytest.raises(error, match=message):
        mbp.trace(**arguments)
