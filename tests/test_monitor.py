"""The monitor sees what training computes, in every way to train, and training computes the same with and without it."""

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_manualbp as mbp

SIZES = [6, 16, 16, 3]


def plain(sizes=SIZES):
    return nn.Sequential(*mbp.MLP(sizes))


MODELS = {
    "plain": plain,
    "fused": lambda: mbp.fuse(plain()),
    "MLP": lambda: mbp.MLP(SIZES),
    "recompute": lambda: mbp.MLP(SIZES, activations="recompute"),
}


def autograd(model, x, y):
    F.mse_loss(model(x), y).backward()


STEPS = {
    "autograd": autograd,
    "loss": lambda model, x, y: model.loss(x, y).backward(),
    "loss_backward": lambda model, x, y: model.loss_backward(x, y),
}
WAYS = [(name, "autograd") for name in MODELS] + [("MLP", "loss"), ("MLP", "loss_backward")]


def train(model, step, steps=7, lr=0.1, seed=1, rows=40):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        x, y = torch.randn(rows, 6, generator=generator), torch.randn(rows, 3, generator=generator)
        optimizer.zero_grad()
        step(model, x, y)
        optimizer.step()
    return x, y


@pytest.mark.parametrize(("name", "how"), WAYS)
def test_training_is_the_same_bit_for_bit(name, how):
    alone = MODELS[name]()
    watched = copy.deepcopy(alone)
    state = torch.get_rng_state()
    train(alone, STEPS[how])
    with mbp.GradientFlowMonitor(watched, every=2) as monitor:
        train(watched, STEPS[how])
    assert torch.equal(state, torch.get_rng_state())
    assert len(monitor.history) == 4
    for p, q in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(("name", "how"), WAYS)
def test_it_sees_the_gradient_of_the_loss_and_the_step_that_follows(name, how):
    model = MODELS[name]()
    reference = copy.deepcopy(model).double()
    with mbp.GradientFlowMonitor(model) as monitor:
        x, y = train(model, STEPS[how], steps=1)
    (flow,) = monitor.history
    assert flow.step == 1
    expected = mbp.gradient_flow(reference, x.double(), y.double())
    for k, (got, want) in enumerate(zip(flow.layers, expected.layers, strict=True)):
        assert got.dl_df == pytest.approx(want.dl_df / 40, rel=1e-4)  # the loss is the mean over 40 examples
        for quantity in ("f", "h", "dead", "always_on", "growth", "growth_theory", "forward_growth", "forward_theory"):
            value = getattr(want, quantity)
            assert getattr(got, quantity) == (value and pytest.approx(value, rel=1e-4)), quantity
        before = reference[2 * k].weight
        change = (model[2 * k].weight.double() - before).norm() / before.norm()
        assert got.update_ratio == pytest.approx(change.item(), rel=1e-4)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_inside_the_network_are_seen_like_losses_outside(loss, reduction):
    y = torch.randint(3, (40,)) if loss == "cross_entropy" else torch.rand(40, 3)
    if loss == "cross_entropy":
        y[:7] = -100
    function = {
        "mse": F.mse_loss,
        "cross_entropy": F.cross_entropy,
        "bce_with_logits": F.binary_cross_entropy_with_logits,
    }
    model, x = mbp.MLP(SIZES), torch.randn(40, 6)
    flows = []
    for step in (
        lambda: function[loss](model(x), y, reduction=reduction).backward(),
        lambda: model.loss(x, y, loss, reduction).backward(),
        lambda: model.loss_backward(x, y, loss, reduction),
    ):
        with mbp.GradientFlowMonitor(model) as monitor:
            step()
        flows.append(monitor.history[0])
    for flow in flows[1:]:
        for got, want in zip(flow.layers, flows[0].layers, strict=True):
            assert got.dl_df == pytest.approx(want.dl_df, rel=1e-4)


def test_losses_inside_the_network_stay_in_one_pass():
    from helpers import calls_of

    model, x, y = mbp.MLP(SIZES), torch.randn(40, 6), torch.randn(40, 3)
    with mbp.GradientFlowMonitor(model):
        calls = calls_of(lambda: model.loss_backward(x, y))
        assert [call for call in calls if not call.startswith("flow")] == ["mlp_loss"]
        model.register_forward_hook(lambda *_: None)  # a hook that must be called
        assert "mlp" in calls_of(lambda: model.loss_backward(x, y))


def test_every_and_rows():
    model = mbp.MLP(SIZES)
    with mbp.GradientFlowMonitor(model, every=3, rows=7) as monitor:
        train(model, autograd, steps=8)
        with torch.no_grad():
            model(torch.randn(4, 6))  # no training: not counted
        model(torch.randn(4, 6))  # never sent back: counted, not measured
    assert [flow.step for flow in monitor.history] == [1, 4, 7]
    assert str(monitor).startswith("GradientFlowMonitor: 9 steps seen, 3 measured")
    train(model, autograd, steps=1)
    assert len(monitor.history) == 3  # it is over
    assert not model._manualbp_watchers


def test_batches_may_differ_in_size_and_models_in_dtype():
    model = mbp.MLP(SIZES)
    reference = copy.deepcopy(model)
    seen, expected = [], []
    with mbp.GradientFlowMonitor(model, every=1) as monitor:
        for rows, dtype in ((40, torch.float32), (9, torch.float32), (9, torch.float64), (40, torch.float32)):
            x, y = torch.randn(rows, 6, dtype=dtype), torch.randn(rows, 3, dtype=dtype)
            autograd(model.to(dtype), x, y)
            expected.append(mbp.gradient_flow(reference, x.float(), y.float()).layers[0].f)
    seen = [flow.layers[0].f for flow in monitor.history]
    assert seen == pytest.approx(expected, rel=1e-5)


def test_sampled_rows_stand_for_the_batch():
    model = mbp.MLP([6, 64, 64, 3])
    x, y = torch.randn(5000, 6), torch.randn(5000, 3)
    with mbp.GradientFlowMonitor(model, rows=500) as few, mbp.GradientFlowMonitor(model, rows=5000) as all_rows:
        autograd(model, x, y)
    for a, b in zip(few.history[0].layers, all_rows.history[0].layers, strict=True):
        assert a.f == pytest.approx(b.f, rel=0.1)
        assert a.dl_df == pytest.approx(b.dl_df, rel=0.1)


def test_no_graph_is_kept_alive():
    model = mbp.MLP(SIZES)
    with mbp.GradientFlowMonitor(model) as monitor:
        x = torch.randn(40, 6)
        output = model(x)
        node, seen = weakref.ref(output.grad_fn), weakref.ref(x)
        output.sum().backward()
        del output, x
        gc.collect()
        assert len(monitor.history) == 1
        assert node() is None
        assert seen() is None


def test_what_is_no_step_is_not_measured():
    model = mbp.MLP(SIZES)
    with mbp.GradientFlowMonitor(model, every=1) as monitor:
        output = model(torch.randn(4, SIZES[0])).sum()
        output.backward(retain_graph=True)
        output.backward()  # the same step again
        model(torch.randn(0, SIZES[0])).sum().backward()  # nothing to measure
        model.loss_backward(torch.randn(4, SIZES[0]), torch.randn(4, SIZES[-1]))
    assert [flow.step for flow in monitor.history] == [1, 3]


def test_accumulated_gradients_wait_for_the_step():
    model = mbp.MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mbp.GradientFlowMonitor(model, every=100) as monitor:
        for _ in range(3):
            autograd(model, torch.randn(10, 6), torch.randn(10, 3))
        assert monitor.history[0].layers[0].update_ratio is None
        optimizer.step()
        autograd(model, torch.randn(10, 6), torch.randn(10, 3))
        assert monitor.history[0].layers[0].update_ratio > 0


def test_without_a_step_there_is_no_update():
    model = mbp.MLP(SIZES)
    with mbp.GradientFlowMonitor(model) as monitor:
        autograd(model, torch.randn(10, 6), torch.randn(10, 3))
    assert monitor.history[0].layers[0].update_ratio is None


def test_a_part_of_a_larger_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 6)
            self.head = mbp.fuse(plain())

        def forward(self, tokens):
            return self.head(input=self.embedding(tokens))

    model, tokens = Model(), torch.randint(10, (4, 5))
    with mbp.GradientFlowMonitor(model.head) as monitor:
        model(tokens).square().mean().backward()
    assert len(monitor.history[0].layers) == 3
    assert model.embedding.weight.grad is not None
    with pytest.raises(TypeError, match="Model"):
        mbp.GradientFlowMonitor(model)


@pytest.mark.parametrize(
    ("gain", "bias", "lr", "diagnosis"),
    [(0.3, 0, 1e-3, "vanishing"), (1, 0, 1e-3, None), (2.5, 0, 1e-12, "exploding"), (1, -50, 1e-3, "dead")],
)
def test_diagnosis_in_training(gain, bias, lr, diagnosis):
    model = mbp.MLP([64] * 21)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=gain * math.sqrt(2 / 64))
        nn.init.constant_(layer.bias, 0.0)
    nn.init.constant_(model[8].bias, bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with mbp.GradientFlowMonitor(model, every=5) as monitor:
        for _ in range(10):
            optimizer.zero_grad()
            model.loss_backward(torch.randn(100, 64), torch.randn(100, 64))
            optimizer.step()
    assert diagnosis in monitor.diagnosis if diagnosis else monitor.diagnosis == []
    assert (diagnosis or "nothing found") in str(monitor)


def test_units_that_die_in_training_are_found_when_they_do():
    model = mbp.MLP([8, 64, 64, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    with mbp.GradientFlowMonitor(model, every=1) as monitor:
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(100, 8)), torch.randn(100, 1)).backward()
            optimizer.step()
    assert monitor.history[0].diagnosis == []
    assert monitor.diagnosis != []
    assert "from step 1: nothing found" in str(monitor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    model = mbp.MLP(SIZES, dtype=dtype)
    with mbp.GradientFlowMonitor(model) as monitor:
        F.mse_loss(model(torch.randn(30, 6).to(dtype)), torch.randn(30, 3).to(dtype)).backward()
    assert all(layer.dl_df > 0 for layer in monitor.history[0].layers)


def test_autocast():
    model = mbp.MLP(SIZES)
    with mbp.GradientFlowMonitor(model) as monitor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(30, 6)).float().square().mean()
        loss.backward()
    assert all(layer.dl_df > 0 for layer in monitor.history[0].layers)


def test_copies_of_a_watched_model_are_not_watched():
    model = mbp.MLP(SIZES)
    with mbp.GradientFlowMonitor(model) as monitor:
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        for other in copies:
            autograd(other, torch.randn(10, 6), torch.randn(10, 3))
            other.loss_backward(torch.randn(10, 6), torch.randn(10, 3))
        assert monitor.history == []


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


def test_scalars_are_written_once_each():
    model, writer = mbp.MLP(SIZES), Writer()
    with mbp.GradientFlowMonitor(model, every=2).write_to(writer, "net") as monitor:
        train(model, autograd, steps=4)
    tags = [(tag, step) for tag, _, step in writer.scalars]
    assert len(set(tags)) == len(tags)
    assert {step for _, step in tags} == {1, 3}
    values = {(tag, step): value for tag, value, step in writer.scalars}
    for flow in monitor.history:
        assert values["net/gradient_ratio", flow.step] == flow.gradient_ratio
        assert values["net/update_ratio/2", flow.step] == flow.layers[1].update_ratio
        assert values["net/dead/0", flow.step] == flow.layers[0].dead
    assert not any("dead/4" in tag for tag, _ in tags)  # the last layer has no ReLU


@pytest.mark.parametrize("layers", [3, 20])
def test_plot_shows_every_layer_over_the_steps(layers):
    model = mbp.MLP([6] * (layers + 1))
    with mbp.GradientFlowMonitor(model, every=2) as monitor:
        for _ in range(6):
            model(torch.randn(10, 6)).square().mean().backward()
    figure = monitor.plot()
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [3] * layers
    assert list(figure.axes[0].lines[0].get_xdata()) == [1, 3, 5]
    assert len(figure.axes[1].lines) == layers - 1
    figure.canvas.draw()


def test_misuse():
    model = mbp.MLP(SIZES)
    monitor = mbp.GradientFlowMonitor(model)
    assert monitor.diagnosis == []
    with pytest.raises(ValueError, match="nothing has been measured"):
        monitor.plot()
    with monitor, pytest.raises(RuntimeError, match="active already"):
        monitor.__enter__()
    for name in ("every", "rows"):
        with pytest.raises(ValueError, match=f"`{name}` must be a positive int, got 0"):
            mbp.GradientFlowMonitor(model, **{name: 0})


def test_a_target_that_does_not_fit_is_named_as_without_a_monitor():
    model, x = mbp.MLP(SIZES), torch.randn(5, SIZES[0])
    with mbp.GradientFlowMonitor(model), pytest.raises(RuntimeError, match="`target` must have shape"):
        model.loss_backward(x, torch.randn(5, SIZES[-1] + 1))


def test_an_error_in_training_passes_and_removes_the_hook():
    model = mbp.MLP(SIZES)
    with pytest.raises(ZeroDivisionError), mbp.GradientFlowMonitor(model):
        raise ZeroDivisionError
    assert not model._manualbp_watchers
