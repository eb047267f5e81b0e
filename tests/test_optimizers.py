"""Every optimiser of torch updates a fused network like the plain one, for each way to compute gradients."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from helpers import twins

STEPS = 5

# All of torch.optim but SparseAdam, which needs sparse gradients.
OPTIMISERS = {
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 1e-2},
    "Adagrad": {"lr": 1e-2},
    "Adam": {"lr": 1e-2, "amsgrad": True},
    "AdamW": {"lr": 1e-2},
    "Adamax": {"lr": 1e-2},
    "ASGD": {"lr": 1e-2},
    "LBFGS": {"lr": 0.1, "max_iter": 3, "line_search_fn": "strong_wolfe"},  # 100 iterations make rounding visible
    "Muon": {"lr": 1e-2},
    "NAdam": {"lr": 1e-2},
    "RAdam": {"lr": 1e-2},
    "RMSprop": {"lr": 1e-3, "momentum": 0.9},
    "Rprop": {"lr": 1e-3},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
}
FORMS = {"default": {}, "for loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def accepts(name, option):
    return option in getattr(torch.optim, name).__init__.__code__.co_varnames


CASES = [
    (name, form)
    for name, form in itertools.product(OPTIMISERS, FORMS)
    if all(accepts(name, option) for option in FORMS[form])
]


def test_no_optimiser_of_torch_is_left_out():
    known = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    assert set(OPTIMISERS) >= known - {"SparseAdam"}


def autograd(model, input, target):
    loss = F.mse_loss(model(input), target)
    loss.backward()
    return loss


def fused_loss(model, input, target):
    loss = model.loss(input, target)
    loss.backward()
    return loss


def by_hand(model, input, target):
    return model.loss_backward(input, target)


def networks_and_data(bias=True):
    """Our network, the plain one with equal parameters, an input and a target."""
    data = torch.randn(20, 5).double(), torch.randn(20, 3).double()
    return *twins([5, 9, 8, 3], bias, torch.float64), *data


def train(model, gradients, optimiser, input, target, set_to_none=True):
    def closure():
        optimiser.zero_grad(set_to_none=set_to_none)
        return gradients(model, input, target)

    for _ in range(STEPS):
        optimiser.step(closure)


def assert_same_parameters(ours, theirs, start):
    for one, other, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        assert not torch.equal(one, before)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [autograd, fused_loss, by_hand])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_training_gives_the_parameters_of_the_plain_network(name, form, gradients):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    ours, theirs, input, target = networks_and_data(bias=name != "Muon")  # which accepts only matrices
    start = copy.deepcopy(list(ours.parameters()))
    for model, way in ((ours, gradients), (theirs, autograd)):
        optimiser = getattr(torch.optim, name)(model.parameters(), **OPTIMISERS[name], **FORMS[form])
        train(model, way, optimiser, input, target)
    assert_same_parameters(ours, theirs, start)


@pytest.mark.parametrize("gradients", [autograd, fused_loss, by_hand])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_that_are_zeroed_in_place(form, gradients):
    ours, theirs, input, target = networks_and_data()
    start = copy.deepcopy(list(ours.parameters()))
    for model, way in ((ours, gradients), (theirs, autograd)):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, **FORMS[form])
        train(model, way, optimiser, input, target, set_to_none=False)
    assert_same_parameters(ours, theirs, start)


@pytest.mark.parametrize("gradients", [autograd, fused_loss, by_hand])
def test_options_per_layer_a_schedule_and_clipped_gradients(gradients):
    ours, theirs, input, target = networks_and_data()
    start = copy.deepcopy(list(ours.parameters()))
    for model, way in ((ours, gradients), (theirs, autograd)):
        groups = [
            {"params": model[0].parameters(), "lr": 0.1},
            {"params": [*model[2].parameters(), *model[4].parameters()]},
        ]
        optimiser = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
        for _ in range(STEPS):
            optimiser.zero_grad()
            way(model, input, target)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            nn.utils.clip_grad_value_(model.parameters(), 0.2)
            optimiser.step()
            schedule.step()
    assert_same_parameters(ours, theirs, start)


def test_an_optimiser_that_steps_during_backward():
    ours, theirs, input, target = networks_and_data()
    start = copy.deepcopy(list(ours.parameters()))
    for model, way in ((ours, by_hand), (theirs, autograd)):
        for parameter in model.parameters():
            optimiser = torch.optim.SGD([parameter], lr=0.1)

            def step(_, optimiser=optimiser):
                optimiser.step()
                optimiser.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
        for _ in range(STEPS):
            way(model, input, target)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert_same_parameters(ours, theirs, start)


def test_a_saved_optimiser_goes_on_with_the_plain_network():
    ours, theirs, input, target = networks_and_data()
    start = copy.deepcopy(list(ours.parameters()))
    first, second = (torch.optim.Adam(model.parameters(), lr=1e-2) for model in (ours, theirs))
    train(ours, by_hand, first, input, target)
    theirs.load_state_dict(ours.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(ours, by_hand, first, input, target)
    train(theirs, autograd, second, input, target)
    assert_same_parameters(ours, theirs, start)


def test_averaged_weights():
    ours, theirs, input, target = networks_and_data()
    averages = []
    for model, way in ((ours, by_hand), (theirs, autograd)):
        optimiser, average = torch.optim.SGD(model.parameters(), lr=0.1), AveragedModel(model)
        for _ in range(STEPS):
            train(model, way, optimiser, input, target)
            average.update_parameters(model)
        averages.append(average(input))
    torch.testing.assert_close(*averages, rtol=1e-9, atol=1e-11)
