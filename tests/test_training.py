"""train_step and fit equal the loops of plain PyTorch that they stand for, and History tells what happened."""

import copy
import json
import math
import pickle
import signal
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_manualbp as mbp
from helpers import assert_equal, calls_of, plain_network
from torch_manualbp import _steps, training

SIZES, ROWS = [4, 9, 7, 3], 23


def mixed():
    """Fused runs with dropout and a Tanh between them."""
    return nn.Sequential(
        *(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh()),
        nn.Linear(6, 3),
    )


class ConvNet(nn.Module):
    """Rows are flat images (4,) = 2 × 2."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 5, 2, padding=1), nn.BatchNorm2d(5), nn.Linear(45, 3)

    def forward(self, input):
        return self.head(torch.relu(self.norm(self.conv(input.unflatten(1, (1, 2, 2))))).flatten(1))


MODELS = {
    "MLP": lambda: mbp.MLP(SIZES),
    "recomputing MLP": lambda: mbp.MLP(SIZES, activations="recompute"),
    "fused": lambda: mbp.fuse(plain_network(SIZES)),
    "fused runs": lambda: mbp.fuse(mixed()),
    "plain": mixed,
    "convolution": ConvNet,
}
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, amsgrad=True),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
    "fused SGD": lambda parameters: mbp.fuse(torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2)),
    "fused Adam": lambda parameters: mbp.fuse(torch.optim.Adam(parameters, lr=0.02)),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3),
}
LOSSES = {
    "mse": lambda output, target: F.mse_loss(output, target),
    "cross_entropy": lambda output, target: F.cross_entropy(output, target),
    "bce_with_logits": lambda output, target: F.binary_cross_entropy_with_logits(output, target),
}


def data(loss="mse", rows=ROWS):
    target = torch.randint(3, (rows,)) if loss == "cross_entropy" else torch.rand(rows, 3)
    return torch.randn(rows, 4), target


def adam(model):
    return OPTIMIZERS["Adam"](model.parameters())


def gradients(model, input, target, loss):
    """The gradients of a hand-written step into .grad; those of a fused network are the ones of loss_backward."""
    if isinstance(model, mbp.MLP):
        return model.loss_backward(input, target, loss)
    value = LOSSES[loss](model(input), target)
    value.backward()
    return value.detach()


def plain_step(model, input, target, optimizer, loss="mse", max_grad_norm=None):
    """The step that a loop of PyTorch makes; its first loss."""
    values = []

    def closure():
        optimizer.zero_grad()
        values.append(gradients(model, input, target, loss))
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        return values[-1]

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    return values[0]


def twin_of(model):
    """A copy for the hand-written loop: a fused network that is one run becomes an MLP, which has loss_backward."""
    if type(model).__name__ == "FusedSequential" and len(model) == 5:
        twin = mbp.MLP(SIZES)
        twin.load_state_dict(model.state_dict())
        return twin
    return copy.deepcopy(model)


def assert_same_training(model, optimizer, twin, other):
    """Equal parameters, buffers and optimizer states, bit for bit."""
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, twin.state_dict()[name])
    ours, theirs = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for key in ours:
        for name, value in ours[key].items():
            if isinstance(value, torch.Tensor):
                assert_equal(value, theirs[key][name])


# --- train_step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "max_grad_norm"), [("mse", None), ("cross_entropy", 0.05), ("bce_with_logits", 9.0)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_train_step_is_gradients_clip_step(model, optimizer, loss, max_grad_norm):
    model = MODELS[model]()
    twin = twin_of(model)
    ours, theirs = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](twin.parameters())
    for seed in range(3):
        batch = data(loss)
        torch.manual_seed(seed)
        value = mbp.train_step(model, *batch, ours, loss, max_grad_norm=max_grad_norm)
        torch.manual_seed(seed)
        assert_equal(value, plain_step(twin, *batch, theirs, loss, max_grad_norm))
        assert not value.requires_grad
    assert_same_training(model, ours, twin, theirs)


def test_the_method_is_the_function():
    model = mbp.MLP(SIZES)
    twin = copy.deepcopy(model)
    ours, theirs = adam(model), adam(twin)
    x, y = data("cross_entropy")
    y[::3] = 1
    options = {"ignore_index": 1, "label_smoothing": 0.2, "max_grad_norm": 0.1}
    assert_equal(
        model.train_step(x, y, ours, "cross_entropy", "sum", **options),
        mbp.train_step(twin, x, y, theirs, "cross_entropy", "sum", **options),
    )
    assert_same_training(model, ours, twin, theirs)
    want = F.cross_entropy(model(x), y, reduction="sum", ignore_index=1, label_smoothing=0.2)
    torch.testing.assert_close(model.train_step(x, y, ours, "cross_entropy", "sum", **options), want.detach())


@pytest.mark.parametrize("model", ["MLP", "fused"])
def test_one_op_computes_the_gradients_of_a_network(model):
    model = MODELS[model]()
    optimizer = adam(model)
    assert calls_of(lambda: mbp.train_step(model, *data(), optimizer)) == ["mlp_loss"]


def test_a_fused_class_with_methods_named_like_ours_keeps_them():
    class Own(nn.Sequential):
        def loss_backward(self, *args):
            raise AssertionError

        train_step = whole_network = loss_of = tell = _loss_backward = _whole = loss_backward

    model = mbp.fuse(Own(*plain_network(SIZES)))
    twin = twin_of(model)
    optimizer, other = adam(model), adam(twin)
    batch = data()
    assert_equal(mbp.train_step(model, *batch, optimizer), plain_step(twin, *batch, other))
    assert_same_training(model, optimizer, twin, other)


@pytest.mark.parametrize("model", MODELS)
def test_grad_is_untouched(model):
    model = MODELS[model]()
    stranger, frozen = nn.Parameter(torch.ones(3)), next(model.parameters())
    optimizer = torch.optim.SGD([*model.parameters(), stranger], lr=0.1, weight_decay=0.1)
    frozen.requires_grad_(False)
    before = []
    for k, parameter in enumerate([*model.parameters(), stranger]):
        if parameter is not frozen:
            parameter.grad = torch.full_like(parameter, 7.0) if k % 2 else None
        before.append((parameter, parameter.grad, parameter.detach().clone()))
    mbp.train_step(model, *data(), optimizer)
    mbp.fit(model, *data(), optimizer)
    for parameter, grad, numbers in before:
        assert parameter.grad is grad
        assert grad is None or bool((grad == 7).all())
        # What has no gradient in this step is not updated, whatever its `.grad` was.
        assert torch.equal(parameter, numbers) == (parameter is stranger or parameter is frozen)


class BrokenError(Exception):
    pass


def broken(*args):
    raise BrokenError


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model, optimizer: model.register_forward_pre_hook(broken),
        lambda model, optimizer: model[0].weight.register_hook(broken),
        lambda model, optimizer: optimizer.register_step_pre_hook(broken),
        lambda model, optimizer: optimizer.register_step_post_hook(broken),
    ],
    ids=["forward", "backward", "before the update", "after the update"],
)
@pytest.mark.parametrize("model", ["MLP", "fused", "plain"])
def test_grad_is_put_back_after_an_error(model, spoil):
    model = MODELS[model]()
    optimizer = adam(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.grad for parameter in model.parameters()]
    spoil(model, optimizer)
    with pytest.raises(BrokenError):
        mbp.train_step(model, *data(), optimizer)
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert parameter.grad is grad
        assert bool((grad == 1).all())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("model", MODELS)
def test_train_step_needs_no_grad_mode(model, mode):
    model = MODELS[model]()
    twin = copy.deepcopy(model)
    ours, theirs = adam(model), adam(twin)
    batch = data()
    with mode():
        inside = [tensor.clone() for tensor in batch]  # in inference mode these are inference tensors
        torch.manual_seed(1)
        first = mbp.train_step(model, *inside, ours)
    torch.manual_seed(1)
    assert_equal(first.clone(), mbp.train_step(twin, *batch, theirs))
    mbp.train_step(model, *batch, ours)  # no state has become an inference tensor
    assert not any(value.is_inference() for state in ours.state.values() for value in state.values())


def test_hooks_see_the_gradients_of_the_step():
    model = mbp.MLP(SIZES)
    optimizer = adam(model)
    seen = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(("backward", p.grad.clone())))
    optimizer.register_step_pre_hook(lambda *_: seen.append(("step", model[0].weight.grad.clone())))
    batch = data()
    twin = copy.deepcopy(model)
    twin.loss_backward(*batch)
    model.train_step(*batch, optimizer)
    assert [name for name, _ in seen[-2:]] == ["backward", "step"]
    assert_equal(seen[-2][1], twin[0].weight.grad)
    assert_equal(seen[-1][1], twin[0].weight.grad)


def test_a_monitor_sees_the_steps():
    model = mbp.MLP(SIZES)
    optimizer = adam(model)
    with mbp.GradientFlowMonitor(model, every=2) as monitor:
        for _ in range(3):
            model.train_step(*data(), optimizer)
        mbp.fit(model, *data(), optimizer, batch_size=10)
    assert [flow.step for flow in monitor.history] == [1, 3, 5]
    assert monitor.history[0].layers[0].update_ratio > 0


def test_a_function_as_the_loss():
    model, twin = MODELS["MLP"](), MODELS["MLP"]()
    twin.load_state_dict(model.state_dict())
    ours, theirs = adam(model), adam(twin)
    x, y = data()
    value = mbp.train_step(model, x, y, ours, nn.HuberLoss())
    theirs.zero_grad()
    want = F.huber_loss(twin(x), y)
    want.backward()
    theirs.step()
    assert_equal(value, want.detach())
    assert_same_training(model, ours, twin, theirs)


class Scaled(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, output, target):
        return F.mse_loss(output, target) * torch.exp(-self.log_scale) + self.log_scale


@pytest.mark.parametrize("learns", [True, False])
def test_a_loss_with_parameters(learns):
    model, loss = MODELS["MLP"](), Scaled()
    loss.log_scale.grad = torch.tensor(3.0)
    optimizer = torch.optim.SGD([*model.parameters(), *(loss.parameters() if learns else ())], lr=0.1)
    mbp.fit(model, *data(), optimizer, loss=loss)
    assert loss.log_scale.grad == 3
    assert bool(loss.log_scale != 0) == learns


class Wrapper:
    """Around an optimizer, with what training needs."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups, self.steps = optimizer, optimizer.param_groups, 0

    def step(self):
        self.steps += 1
        self.optimizer.step()


class Forwarder:
    """Around an optimizer: passes every attribute on."""

    def __init__(self, optimizer):
        self.__dict__["optimizer"] = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


@pytest.mark.parametrize("optimizer", ["Adam", "LBFGS"])
@pytest.mark.parametrize("wrapper", [Wrapper, Forwarder])
def test_a_wrapper_around_an_optimizer(wrapper, optimizer):
    model = mbp.MLP(SIZES)
    twin = copy.deepcopy(model)
    ours, theirs = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](twin.parameters())
    wrapped, batch = wrapper(ours), data()
    if (wrapper, optimizer) == (Wrapper, "LBFGS"):
        with pytest.raises(TypeError, match="closure"):  # this one cannot pass a closure on
            model.train_step(*batch, wrapped)
        return
    model.train_step(*batch, wrapped)
    twin.train_step(*batch, theirs)
    assert_same_training(model, ours, twin, theirs)
    assert wrapper is Forwarder or wrapped.steps == 1


class Subclass(torch.optim.SGD):
    """An optimizer whose step needs a closure under the usual name, and is decorated."""

    @torch.enable_grad()
    def step(self, closure):
        value = closure()
        super().step()
        return value


def test_an_optimizer_of_the_user_gets_the_closure_that_it_needs():
    model = mbp.MLP(SIZES)
    twin = copy.deepcopy(model)
    ours, theirs = Subclass(model.parameters(), lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    batch = data()
    assert_equal(model.train_step(*batch, ours), twin.train_step(*batch, theirs))
    assert_same_training(model, ours, twin, theirs)


def test_a_step_without_a_signature_gets_no_closure():
    class Compiled:
        step, param_groups = staticmethod(vars), []  # like other functions written in C, `vars` has none

    model = mbp.MLP(SIZES)
    batch = data()
    want = model.loss(*batch).detach()
    assert_equal(model.train_step(*batch, Compiled()), want)


def test_clipping_is_left_to_a_model_that_does_it_itself():
    class Sharded(nn.Sequential):
        def clip_grad_norm_(self, max_norm):
            for parameter in self.parameters():
                parameter.grad.fill_(max_norm)

    model = Sharded(nn.Linear(4, 3))
    before = model[0].bias.detach().clone()
    mbp.train_step(model, *data(), torch.optim.SGD(model.parameters(), lr=1.0), max_grad_norm=2.0)
    assert_equal(model[0].bias, before - 2)


def test_an_optimizer_that_steps_during_backward():
    model = mbp.MLP(SIZES)
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    twin = mbp.MLP(SIZES)
    twin.load_state_dict(model.state_dict())
    idle, other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    batch = data()
    assert_equal(model.train_step(*batch, idle), twin.train_step(*batch, other))
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert_equal(one, two)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "MLP"}, TypeError, r"train_step: `model` must be an nn.Module, got str"),
        ({"optimizer": torch.optim.Adam}, TypeError, r"`optimizer` must be a torch.optim.Optimizer.* the class Adam"),
        ({"optimizer": None}, TypeError, r"`optimizer` must be a torch.optim.Optimizer, or wrap one, got NoneType"),
        ({"max_grad_norm": 0.0}, ValueError, r"train_step: `max_grad_norm` must be positive, got 0.0"),
        ({"max_grad_norm": math.nan}, ValueError, r"`max_grad_norm` must be positive, got nan"),
        ({"max_grad_norm": "1"}, TypeError, r"`max_grad_norm` must be a number or None, got str"),
        ({"max_grad_norm": True}, TypeError, r"`max_grad_norm` must be a number or None, got bool"),
        ({"input": [[1.0]]}, TypeError, r"train_step: `input` must be a Tensor, got list"),
        ({"target": None}, TypeError, r"train_step: `target` must be a Tensor, got NoneType"),
        ({"loss": "l1"}, ValueError, r"train_step: `loss` must be one of 'mse'.*, got 'l1'"),
        ({"loss": 3}, TypeError, r"train_step: `loss` must be one of 'mse'.* or a function .*, got int"),
        ({"loss": F.l1_loss, "reduction": "sum"}, ValueError, r"options of the losses that have a name"),
        ({"loss": lambda output, target: 0.0}, TypeError, r"train_step: `loss` must return a Tensor, got float"),
        ({"reduction": "none"}, ValueError, r"`reduction` must be one of 'mean', 'sum', got 'none'"),
        ({"label_smoothing": 2.0}, ValueError, r"`label_smoothing` must be between 0 and 1"),
        ({"input": torch.ones(23, 5)}, RuntimeError, r"5"),
    ],
)
def test_train_step_says_what_is_wrong(change, error, message):
    model, (x, y) = mbp.MLP(SIZES), data()
    arguments = {"model": model, "input": x, "target": y, "optimizer": adam(model), **change}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        mbp.train_step(**arguments)
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, before[name])


def test_a_scheduler_is_no_optimizer():
    model = mbp.MLP(SIZES)
    scheduler = torch.optim.lr_scheduler.ConstantLR(adam(model))
    with pytest.raises(TypeError, match=r"MLP.train_step: `optimizer` must be .*, got ConstantLR"):
        model.train_step(*data(), scheduler)


# --- fit: the loop ----------------------------------------------------------------------------------------------------


def plain_fit(model, input, target, optimizer, loss="mse", epochs=2, batch_size=5, drop_last=False, **options):
    """The loop that `fit` stands for; the loss of each step."""
    generator, max_grad_norm = options.get("generator"), options.get("max_grad_norm")
    values = []
    for _ in range(epochs):
        for rows in torch.randperm(len(input), generator=generator).split(batch_size):
            if not drop_last or len(rows) == batch_size:
                values.append(plain_step(model, input[rows], target[rows], optimizer, loss, max_grad_norm))
    return torch.stack(values).double()


@pytest.mark.parametrize("seconds", [0.0, 10.0], ids=["returning after each step", "returning after each epoch"])
@pytest.mark.parametrize(("optimizer", "loss"), [("SGD", "mse"), ("Adam", "cross_entropy"), ("LBFGS", "mse")])
@pytest.mark.parametrize("model", MODELS)
def test_fit_is_the_loop_of_steps(monkeypatch, model, optimizer, loss, seconds):
    monkeypatch.setattr(_steps, "_SECONDS", seconds)
    model = MODELS[model]()
    twin = twin_of(model)
    ours, theirs = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](twin.parameters())
    batch = data(loss)
    torch.manual_seed(5)
    history = mbp.fit(model, *batch, ours, loss=loss, epochs=2, batch_size=5, max_grad_norm=0.1)
    torch.manual_seed(5)  # for the order of the rows and for dropout
    assert_equal(history.step_losses, plain_fit(twin, *batch, theirs, loss, max_grad_norm=0.1))
    assert_same_training(model, ours, twin, theirs)


def test_the_loop_in_plain_torch_alone():
    """No function of ours in the loop, and no copy of its text."""
    model = mixed()
    twin = copy.deepcopy(model)
    ours, theirs = adam(model), adam(twin)
    x, y = data("cross_entropy")
    torch.manual_seed(3)
    history = mbp.fit(model, x, y, ours, loss="cross_entropy", epochs=3, batch_size=10)
    torch.manual_seed(3)
    values = []
    for _ in range(3):
        order = torch.randperm(ROWS)
        for first in (0, 10, 20):
            rows = order[first : first + 10]
            theirs.zero_grad()
            loss = nn.CrossEntropyLoss()(twin(x[rows]), y[rows])
            loss.backward()
            theirs.step()
            values.append(loss.item())
    assert history.step_losses.tolist() == values
    assert_same_training(model, ours, twin, theirs)


class Recorder(nn.Module):
    """Remembers the batches and modes that it was called with."""

    def __init__(self):
        super().__init__()
        self.linear, self.inner, self.seen = nn.Linear(1, 1), nn.Dropout(0.0), []

    def forward(self, input):
        self.seen.append((input[:, 0].tolist(), self.training, self.inner.training, torch.is_grad_enabled()))
        return self.linear(input)

    def batches(self):
        return [rows for rows, *_ in self.seen]


def numbered(rows):
    """Row i is the number i."""
    return torch.arange(float(rows)).unsqueeze(1), torch.zeros(rows, 1)


def still(model):
    return torch.optim.SGD(model.parameters(), lr=0.0)


def test_batches_are_those_of_randperm():
    model = Recorder()
    mbp.fit(model, *numbered(7), still(model), epochs=2, batch_size=3, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    orders = [torch.randperm(7, generator=generator).tolist() for _ in range(2)]
    assert model.batches() == [order[first : first + 3] for order in orders for first in (0, 3, 6)]


def test_batches_without_shuffling_draw_no_random_numbers():
    model = Recorder()
    before = torch.get_rng_state()
    mbp.fit(model, *numbered(7), still(model), epochs=2, batch_size=3, shuffle=False)
    assert model.batches() == [[0, 1, 2], [3, 4, 5], [6]] * 2
    assert_equal(torch.get_rng_state(), before)


def test_a_generator_leaves_the_default_one_alone():
    model = Recorder()
    before = torch.get_rng_state()
    mbp.fit(model, *numbered(7), still(model), generator=torch.Generator().manual_seed(4))
    assert_equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("rows", "sizes"), [(7, [3, 3]), (6, [3, 3]), (3, [3])])
def test_drop_last(rows, sizes):
    model = Recorder()
    history = mbp.fit(model, *numbered(rows), still(model), batch_size=3, drop_last=True)
    assert list(map(len, model.batches())) == sizes
    assert history.steps_per_epoch == len(history.step_losses) == len(sizes)
    assert history.loss == pytest.approx([history.step_losses.mean().item()], rel=1e-12)


def test_a_batch_larger_than_the_data_is_all_of_it():
    model = Recorder()
    mbp.fit(model, *numbered(7), still(model), batch_size=100, shuffle=False)
    assert model.batches() == [list(range(7))]


def test_the_loss_of_an_epoch_is_the_mean_over_its_rows():
    model = mbp.MLP(SIZES)
    x, y = data()
    history = mbp.fit(model, x, y, still(model), epochs=2, batch_size=5)  # the last step has 3 rows
    assert history.loss == pytest.approx([F.mse_loss(model(x), y).item()] * 2, rel=1e-6)
    assert len(history.step_losses) == 10
    assert history.step_losses.dtype is torch.float64


def test_other_inputs_than_rows_of_floats():
    embedding = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 2))
    x, y = torch.randint(10, (20, 6)), torch.randint(2, (20,))
    first, *_, last = mbp.fit(embedding, x, y, adam(embedding), loss="cross_entropy", epochs=20).loss
    assert last < first
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)).double()
    seen = []
    convolution.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randn(20, 3, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    first, *_, last = mbp.fit(convolution, images, y, adam(convolution), loss="cross_entropy", epochs=20).loss
    assert last < first
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in seen)


def test_the_input_gets_no_gradient():
    model = mbp.MLP(SIZES)
    x, y = data()
    mbp.fit(model, x.requires_grad_(), y.requires_grad_(), adam(model))
    assert x.grad is None
    assert y.grad is None


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("model", ["MLP", "fused runs", "convolution"])
def test_fit_needs_no_grad_mode(model, mode, shuffle):
    model = MODELS[model]()
    twin = copy.deepcopy(model)
    ours, theirs = adam(model), adam(twin)
    batch = data()
    options = {"epochs": 2, "batch_size": 5, "shuffle": shuffle, "validation": batch, "patience": 2}
    torch.manual_seed(1)
    with mode():
        inside = [tensor.clone() for tensor in batch]
        history = mbp.fit(model, *inside, ours, **{**options, "validation": inside})
    torch.manual_seed(1)
    assert history.to_dict() == mbp.fit(twin, *batch, theirs, **options).to_dict()
    assert_same_training(model, ours, twin, theirs)
    mbp.fit(model, *batch, ours)


def test_no_epoch():
    model = mbp.MLP(SIZES)
    history = mbp.fit(model, *data(), adam(model), epochs=0, patience=1)
    assert history.to_dict()["loss"] == history.to_dict()["step_losses"] == []
    assert (history.stopped, history.best_epoch, history.restored) == ("epochs", None, False)
    assert str(history) == "0 epochs of 1 step"


# --- fit: modes, validation, schedulers, callbacks --------------------------------------------------------------------


def test_each_module_has_its_own_mode_afterwards():
    model = Recorder().eval()
    model.inner.train()
    mbp.fit(model, *numbered(4), still(model), epochs=2, batch_size=2, validation=numbered(2))
    modes = [(training, inner, recorded) for _, training, inner, recorded in model.seen]
    assert modes == [(True, True, True)] * 2 + [(False, False, False)] + [(True, True, True)] * 2 + [(False,) * 3]
    assert (model.training, model.inner.training, model.linear.training) == (False, True, False)


@pytest.mark.parametrize("at_once", [4, 4096])
@pytest.mark.parametrize("loss", [*LOSSES, "function"])
@pytest.mark.parametrize("model", MODELS)
def test_validation_loss(monkeypatch, model, loss, at_once):
    monkeypatch.setattr(training, "_ROWS_AT_ONCE", at_once)
    model, function = MODELS[model](), LOSSES.get(loss, F.l1_loss)
    x, y = data(loss, 10)
    loss = function if loss == "function" else loss
    history = mbp.fit(model, x, y, adam(model), loss=loss, epochs=2, batch_size=3, validation=[x, y])
    want = function(model.eval()(x), y).item()
    assert len(history.validation_loss) == 2
    assert history.validation_loss[-1] == pytest.approx(want, rel=1e-5)


def test_validation_of_a_network_takes_one_call():
    model = mbp.MLP(SIZES)
    optimizer = adam(model)
    calls = calls_of(lambda: mbp.fit(model, *data(), optimizer, batch_size=10, validation=data(rows=100)))
    assert calls == ["mlp_loss"] * 4


def drifting(rate=1.0):
    """A model whose weight grows by `rate` in each step of `fit`, with data whose loss is least after 3 steps."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False, track_running_stats=True))
    nn.init.zeros_(model[0].weight)

    class Drift(torch.optim.SGD):
        def step(self):
            with torch.no_grad():
                model[0].weight.add_(rate)

    return model, Drift(model.parameters(), lr=0.1)


def distance_from_three(model):
    return lambda output, target: (model[0].weight - 3).square().sum() + 0 * output.sum()


@pytest.mark.parametrize("patience", [1, 2, 5])
@pytest.mark.parametrize("validated", [True, False])
def test_patience_restores_the_best_weights_and_buffers(validated, patience):
    model, optimizer = drifting()
    states, parameters = [], list(model.parameters())
    validation = (torch.ones(4, 1), torch.ones(4)) if validated else None
    history = mbp.fit(
        *(model, torch.randn(4, 1), torch.ones(4), optimizer),
        **{"loss": distance_from_three(model), "epochs": 20, "validation": validation, "patience": patience},
        callback=lambda history: states.append(copy.deepcopy(model.state_dict())),
    )
    # The weight after epoch k is k + 1; the training loss is that before the step of the epoch.
    best = 2 if validated else 3
    assert history.best_epoch == best
    assert len(history.loss) == best + 1 + patience
    assert (history.stopped, history.restored) == ("patience", True)
    assert states[best].keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, states[best][name])
    assert not torch.equal(states[-1]["1.running_var"], states[best]["1.running_var"])
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))
    assert f"the weights are those of epoch {best}, the best" in str(history)


def test_the_best_weights_are_restored_after_the_last_epoch_too():
    model, optimizer = drifting()
    data = (torch.ones(4, 1), torch.ones(4))
    history = mbp.fit(model, *data, optimizer, loss=distance_from_three(model), epochs=5, validation=data, patience=9)
    assert (history.stopped, history.restored, history.best_epoch) == ("epochs", True, 2)
    assert model[0].weight.item() == 3


def test_without_patience_the_last_weights_stay():
    model, optimizer = drifting()
    history = mbp.fit(model, torch.ones(4, 1), torch.ones(4), optimizer, loss=distance_from_three(model), epochs=6)
    assert (history.stopped, history.restored, history.best_epoch) == ("epochs", False, 3)
    assert model[0].weight.item() == 6


def test_an_equal_loss_is_no_improvement():
    model = mbp.MLP(SIZES)
    history = mbp.fit(model, *data(), still(model), epochs=9, patience=3, validation=data())
    assert (len(history.loss), history.stopped, history.best_epoch) == (4, "patience", 0)


def test_nan_is_no_improvement():
    model = mbp.MLP(SIZES)
    x, y = data()
    history = mbp.fit(model, x * math.nan, y, adam(model), epochs=9, patience=3)
    assert (len(history.loss), history.stopped, history.best_epoch, history.restored) == (3, "patience", None, False)
    assert "nan" in str(history)


def test_a_scheduler_steps_once_per_epoch():
    model = mbp.MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    history = mbp.fit(model, *data(), optimizer, epochs=5, batch_size=5, scheduler=scheduler)
    assert history.learning_rate == [0.1, 0.1, 0.05, 0.05, 0.025]


@pytest.mark.parametrize("validated", [True, False])
def test_a_scheduler_that_waits_for_a_plateau_gets_the_loss(validated):
    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics, *args):
            seen.append(metrics)
            super().step(metrics, *args)

    seen, model = [], mbp.MLP(SIZES)
    optimizer = adam(model)
    validation = data() if validated else None
    history = mbp.fit(model, *data(), optimizer, epochs=3, scheduler=Plateau(optimizer), validation=validation)
    assert seen == (history.validation_loss if validated else history.loss)


def test_callback():
    lengths, model = [], mbp.MLP(SIZES)

    def callback(history):
        lengths.append((len(history.loss), len(history.validation_loss), len(history.step_losses)))
        return history.loss if len(lengths) < 3 else True  # a list that is true is not True

    history = mbp.fit(model, *data(), adam(model), epochs=9, batch_size=5, validation=data(), callback=callback)
    assert lengths == [(1, 1, 5), (2, 2, 10), (3, 3, 15)]
    assert history.stopped == "callback"


def test_progress(capsys):
    pytest.importorskip("tqdm")
    model = mbp.MLP(SIZES)
    mbp.fit(model, *data(), adam(model), epochs=3, batch_size=5, validation=data(), progress=True)
    shown = capsys.readouterr().err
    assert "15/15" in shown
    assert "loss=" in shown
    assert "validation=" in shown


def test_progress_without_tqdm_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    model = mbp.MLP(SIZES)
    with pytest.raises(ImportError, match=r"fit: `progress=True` needs tqdm: `pip install tqdm`"):
        mbp.fit(model, *data(), adam(model), progress=True)


# --- fit: Ctrl-C ------------------------------------------------------------------------------------------------------


def interrupt(*_):
    signal.raise_signal(signal.SIGINT)


def steps_of(make, count):
    """The model after `count` steps without an interrupt, and its optimizer."""
    model = make()
    optimizer = adam(model)
    for _ in range(count):
        mbp.train_step(model, *numbered(2), optimizer)
    return model, optimizer


def make_line():
    torch.manual_seed(0)
    return nn.Linear(1, 1)


@pytest.mark.parametrize(
    "place",
    [
        lambda model, optimizer, hook: model.register_forward_hook(hook),
        lambda model, optimizer, hook: model.weight.register_hook(hook),
        lambda model, optimizer, hook: optimizer.register_step_pre_hook(hook),
        lambda model, optimizer, hook: optimizer.register_step_post_hook(hook),
    ],
    ids=["forward", "backward", "before the update", "after the update"],
)
def test_ctrl_c_in_a_step_takes_effect_at_the_end_of_a_step(monkeypatch, place):
    monkeypatch.setattr(_steps, "_SECONDS", 0.0)  # at the end of this one
    calls = []

    def hook(*_):
        calls.append(None)
        if len(calls) == 5:
            interrupt()

    model = make_line().eval()
    optimizer = adam(model)
    place(model, optimizer, hook)
    handler = signal.getsignal(signal.SIGINT)
    x, y = (tensor.repeat(3, 1) for tensor in numbered(2))  # three equal steps in an epoch
    with pytest.raises(KeyboardInterrupt) as caught:
        mbp.fit(model, x, y, optimizer, epochs=9, batch_size=2, shuffle=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same_training(model, optimizer, *steps_of(make_line, 5))
    history = caught.value.history
    assert (len(history.loss), len(history.step_losses), history.stopped) == (1, 5, "interrupt")
    assert str(history).splitlines()[-1].startswith("1 epoch of 3 steps, and 2 steps of the next; interrupted")
    if sys.version_info >= (3, 11):
        assert "1 epoch of 3 steps, and 2 steps of the next" in caught.value.__notes__[0]
    assert not model.training
    assert model.weight.grad is None


@pytest.mark.parametrize("way", ["signal", "exception"])
@pytest.mark.parametrize("where", ["callback", "scheduler", "validation"])
def test_ctrl_c_between_the_steps(where, way):
    def stop(*_):
        if way == "signal":
            interrupt()
        raise KeyboardInterrupt

    class Scheduler:
        step = stop

    model = make_line()
    optimizer = adam(model)
    options = {"callback": {"callback": stop}, "scheduler": {"scheduler": Scheduler()}, "validation": {}}[where]
    if where == "validation":
        model.register_forward_hook(lambda module, *_: None if module.training else stop())
        options = {"validation": numbered(2)}
    with pytest.raises(KeyboardInterrupt) as caught:
        mbp.fit(model, *numbered(2), optimizer, epochs=9, **options)
    history = caught.value.history
    assert_same_training(model, optimizer, *steps_of(make_line, 1))
    assert (len(history.loss), len(history.step_losses)) == (0 if where == "validation" else 1, 1)
    assert history.stopped == "interrupt"
    assert model.training


def test_a_second_ctrl_c_interrupts_the_step():
    def hook(*_):
        interrupt()
        interrupt()
        raise AssertionError

    model = make_line()
    before = copy.deepcopy(model.state_dict())
    model.register_forward_hook(hook)
    with pytest.raises(KeyboardInterrupt) as caught:
        mbp.fit(model, *numbered(2), adam(model))
    assert len(caught.value.history.step_losses) == 0
    assert_equal(model.weight, before["weight"])


def test_a_handler_of_the_program_runs_at_the_end_of_the_step(monkeypatch):
    seen, model = [], make_line()
    optimizer = adam(model)
    handler = signal.signal(signal.SIGINT, lambda *_: seen.append(model.weight.item()))
    try:
        model.register_forward_hook(lambda *_: None if seen else interrupt())
        before = model.weight.item()
        history = mbp.fit(model, *numbered(2), optimizer, epochs=3)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert history.stopped == "epochs"
    assert len(seen) == 1
    assert seen[0] != before


def test_signals_that_are_ignored_stay_so():
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        model = make_line()
        model.register_forward_hook(interrupt)
        assert mbp.fit(model, *numbered(2), adam(model)).stopped == "epochs"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


def test_another_thread_than_the_main_one():
    results = []

    def train():
        model = make_line()
        results.append(mbp.fit(model, *numbered(2), adam(model), epochs=2))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert results[0].stopped == "epochs"


def test_an_error_is_not_an_interrupt():
    model = make_line()
    model.register_forward_hook(broken)
    with pytest.raises(BrokenError):
        mbp.fit(model.eval(), *numbered(2), adam(model))
    assert not model.training


# --- fit: errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": None}, TypeError, r"fit: `model` must be an nn.Module, got NoneType"),
        ({"optimizer": "Adam"}, TypeError, r"fit: `optimizer` must be a torch.optim.Optimizer"),
        ({"input": [1.0]}, TypeError, r"fit: `input` must be a Tensor, got list"),
        ({"target": None}, TypeError, r"fit: `target` must be a Tensor, got NoneType"),
        ({"input": torch.tensor(1.0)}, ValueError, r"fit: `input` must have rows, got a tensor of shape \(\)"),
        (
            {"target": torch.ones(22, 3)},
            ValueError,
            r"`input` and `target` must have the same .*\(23, 4\) and \(22, 3\)",
        ),
        ({"input": torch.ones(0, 4), "target": torch.ones(0, 3)}, ValueError, r"`input` must have at least one row"),
        ({"target": torch.ones(23, 3, device="meta")}, ValueError, r"must be on the same device, got cpu and meta"),
        ({"loss": "l1"}, ValueError, r"fit: `loss` must be one of"),
        ({"loss": None}, TypeError, r"fit: `loss` must be one of"),
        ({"epochs": -1}, ValueError, r"fit: `epochs` must be at least 0, got -1"),
        ({"epochs": 1.5}, TypeError, r"fit: `epochs` must be an int, got float"),
        ({"batch_size": 0}, ValueError, r"fit: `batch_size` must be at least 1, got 0"),
        ({"batch_size": True}, TypeError, r"fit: `batch_size` must be an int, got bool"),
        ({"batch_size": 24, "drop_last": True}, ValueError, r"`drop_last` leaves no step: 23 rows .* `batch_size`=24"),
        ({"generator": 7}, TypeError, r"fit: `generator` must be a torch.Generator or None, got int"),
        ({"max_grad_norm": -1.0}, ValueError, r"fit: `max_grad_norm` must be positive"),
        ({"scheduler": 3}, TypeError, r"fit: `scheduler` must have a method `step`, got int"),
        (
            {"validation": torch.ones(2, 3)},
            TypeError,
            r"fit: `validation` must be a pair \(input, target\), got Tensor",
        ),
        ({"validation": (torch.ones(2, 3),)}, TypeError, r"fit: `validation` must be a pair"),
        ({"validation": (torch.ones(2, 4), [1])}, TypeError, r"fit: `validation\[1\]` must be a Tensor, got list"),
        ({"validation": (torch.ones(2, 4), torch.ones(3, 3))}, ValueError, r"`validation\[0\]` and `validation\[1\]`"),
        ({"validation": (torch.ones(0, 4), torch.ones(0, 3))}, ValueError, r"`validation\[0\]` must have at least one"),
        ({"patience": 0}, ValueError, r"fit: `patience` must be at least 1, got 0"),
        ({"patience": "long"}, TypeError, r"fit: `patience` must be an int, got str"),
        ({"callback": 3}, TypeError, r"fit: `callback` must be a function of a History, got int"),
    ],
)
def test_fit_says_what_is_wrong(change, error, message):
    model, (x, y) = mbp.MLP(SIZES), data()
    arguments = {"model": model, "input": x, "target": y, "optimizer": adam(model), **change}
    args = [arguments.pop(name) for name in ("model", "input", "target", "optimizer")]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        mbp.fit(*args, **arguments)
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, before[name])


def test_a_generator_of_another_device():
    model = mbp.MLP(SIZES)
    with torch.device("meta"), pytest.raises(ValueError, match=r"`generator` must be on meta.*, got cpu"):
        mbp.fit(model, *(tensor.cpu() for tensor in data_on_cpu()), adam(model), generator=torch.Generator("cpu"))


def data_on_cpu():
    with torch.device("cpu"):
        return data()


# --- History ----------------------------------------------------------------------------------------------------------


def some_history(epochs=3, rate=0.5, **options):
    model = mbp.MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, rate)
    return mbp.fit(model, *data(), optimizer, epochs=epochs, batch_size=5, scheduler=scheduler, **options)


def test_a_history_as_json_and_back():
    history = some_history(validation=data(), patience=5)
    again = mbp.History.from_dict(json.loads(json.dumps(history.to_dict())))
    assert again.to_dict() == history.to_dict()
    assert (str(again), repr(again)) == (str(history), repr(history))
    assert_equal(again.step_losses, history.step_losses)
    assert set(history.to_dict()) == {
        *("steps_per_epoch", "loss", "validation_loss", "learning_rate", "step_losses"),
        *("best_epoch", "stopped", "restored"),
    }
    assert pickle.loads(pickle.dumps(history)).to_dict() == history.to_dict()


def test_a_dictionary_is_a_copy():
    history = some_history()
    history.to_dict()["loss"].append(1.0)
    assert len(history.loss) == 3


def test_a_history_as_text():
    history = some_history(validation=data())
    header, *rows, last = str(history).splitlines()
    assert header.split() == ["epoch", "loss", "validation", "loss", "learning", "rate"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]
    assert [row.split()[-1] for row in rows] == ["0.1", "0.05", "0.025"]
    assert rows[1].split()[1:3] == [f"{history.loss[1]:.4g}", f"{history.validation_loss[1]:.4g}"]
    assert last == f"3 epochs of 5 steps; the best was epoch {history.best_epoch}"
    assert repr(history) == (
        f"History(epochs=3, loss={history.loss[-1]:.4g}, validation_loss={history.validation_loss[-1]:.4g}, "
        f"best_epoch={history.best_epoch}, stopped='epochs')"
    )


def test_long_histories_are_shown_in_part():
    _, *rows, last = str(some_history(epochs=12)).splitlines()
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3", "4", "…", "7", "8", "9", "10", "11"]
    assert last.startswith("12 epochs of 5 steps")
    assert str(some_history(epochs=10)).splitlines()[10].split()[0] == "9"


def test_an_optimizer_without_a_learning_rate():
    model, optimizer = mbp.MLP(SIZES), None
    optimizer = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.param_groups = [{"params": list(model.parameters())}]
    history = mbp.fit(model, *data(), optimizer, epochs=2)
    assert history.learning_rate == [None, None]
    assert str(history).splitlines()[1].split()[0] == "0"


@pytest.mark.parametrize("options", [{}, {"validation": True}, {"rate": 1.0}, {"epochs": 1}], ids=str)
def test_plot(tmp_path, options):
    pytest.importorskip("matplotlib")
    options = {**options, "validation": data()} if "validation" in options else options
    history = some_history(**options)
    figure = history.plot()
    changes = options.get("rate", 0.5) != 1 and options.get("epochs", 3) > 1
    assert [axes.get_title() for axes in figure.axes] == ["Loss", "Learning rate"][: 1 + changes]
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert list(curves["training"]) == history.loss
    assert list(curves["training, steps"]) == history.step_losses.tolist()
    assert ("validation" in curves) == bool(history.validation_loss)
    figure.savefig(tmp_path / "history.png", dpi=20)


def test_a_plot_of_many_steps_draws_means(monkeypatch):
    pytest.importorskip("matplotlib")
    from torch_manualbp.inspection import training_plot

    monkeypatch.setattr(training_plot, "MOST_POINTS", 4)
    history = some_history(epochs=2)  # ten steps: three each, and one
    line, *_ = history.plot().axes[0].lines
    assert list(line.get_ydata()) == [part.mean().item() for part in history.step_losses.split(3)]
    assert list(line.get_xdata()) == pytest.approx([0.3, 0.9, 1.5, 1.9])


def test_a_plot_of_losses_that_no_axis_can_show():
    pytest.importorskip("matplotlib")
    model = mbp.MLP(SIZES)
    x, y = data()
    mbp.fit(model, x * math.nan, y, adam(model), epochs=2).plot()
    with pytest.raises(ValueError, match="no step has been made"):
        mbp.fit(model, x, y, adam(model), epochs=0).plot()
