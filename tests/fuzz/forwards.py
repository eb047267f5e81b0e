"""Draws forwards, small programs of layers, ReLUs and whatever else, and compares the fused model with the plain one.

The model is called several times. In one of the calls the program is another, as if a flag had been set: what the plan
of the first calls expects does not happen. Values, gradients and errors must be those of the plain model all the same.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch_manualbp as mbp
from fuzz.differential import UndecidableError
from torch_manualbp import _chains, _route

__all__ = ["Case", "UndecidableError", "check", "draw", "simpler"]

WIDTH = 8
MODES = ("plain", "plain", "plain", "no_grad", "inference", "vmap", "checkpoint", "compile")


@dataclass(frozen=True)
class Step:
    """One statement: a function of registers, whose result becomes a new register."""

    name: str
    layer: int
    one: int  # registers, counted from the last
    two: int


@dataclass(frozen=True)
class Case:
    """A model, its forward, the other forward of one call, and how it is called."""

    program: tuple[Step, ...]
    other: tuple[Step, ...]
    mode: str = "plain"
    rows: int = 3
    returned: int = 1  # registers
    frozen: tuple[int, ...] = ()


class Masked(nn.Linear):
    """A subclass with a computed weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.5, self.bias)


class Block(nn.Module):
    """A module with a forward of its own in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x))


def _written(model: "Program", x: Tensor, k: int) -> Tensor:
    with torch.no_grad():
        model.layers[k].weight.mul_(1.5)
    return x


STEPS: dict[str, Callable[["Program", int, Tensor, Tensor], Any]] = {
    "linear": lambda m, k, x, y: m.layers[k](x),
    "functional linear": lambda m, k, x, y: F.linear(x, m.layers[k].weight * 2),
    "masked": lambda m, k, x, y: m.masked[k % 2](x),
    "block": lambda m, k, x, y: m.blocks[k % 2](x),
    "F.relu": lambda m, k, x, y: F.relu(x),
    "relu": lambda m, k, x, y: x.relu(),
    "module": lambda m, k, x, y: m.act(x),
    "relu_": lambda m, k, x, y: F.relu_(x),
    "module in place": lambda m, k, x, y: m.act_in_place(x),
    "clamp": lambda m, k, x, y: x.clamp(min=0),
    "dropout": lambda m, k, x, y: F.dropout(x, 0.3, m.training),
    "dropout module": lambda m, k, x, y: m.drop(x),
    "identity": lambda m, k, x, y: m.identity(x),
    "add": lambda m, k, x, y: x + y,
    "mul": lambda m, k, x, y: x * y,
    "add_": lambda m, k, x, y: x.add_(y),
    "mul_": lambda m, k, x, y: x.mul_(0.5),
    "set": lambda m, k, x, y: x.__setitem__((..., 0), 1.0) or x,
    "tanh": lambda m, k, x, y: torch.tanh(x),
    "view": lambda m, k, x, y: x.unsqueeze(0).squeeze(0),
    "flip": lambda m, k, x, y: x.flip(-1),
    "cat": lambda m, k, x, y: torch.cat([x, y], -1)[..., ::2],
    "clone": lambda m, k, x, y: x.clone(),
    "detach": lambda m, k, x, y: x.detach(),
    "sum": lambda m, k, x, y: x + y.sum(),
    "random": lambda m, k, x, y: x + torch.rand(WIDTH, dtype=x.dtype),
    "keep": lambda m, k, x, y: (setattr(m, "kept", x), x)[1],
    "no_grad": lambda m, k, x, y: torch.no_grad()(lambda: m.layers[k](x))(),
    "write": lambda m, k, x, y: _written(m, x, k),
    "shape": lambda m, k, x, y: x.reshape(x.shape),
}
USUAL = ("linear", "F.relu", "linear", "F.relu", "module", "masked", "block")


class Program(nn.Module):
    """Runs the steps that are set."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.masked = nn.ModuleList(Masked(WIDTH, WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.act, self.act_in_place, self.drop = nn.ReLU(), nn.ReLU(inplace=True), nn.Dropout(0.2)
        self.identity = nn.Identity()
        self.steps: tuple[Step, ...] = ()
        self.returned = 1
        self.kept: Any = None

    def forward(self, x: Tensor) -> list[Tensor]:
        registers = [x]
        for step in self.steps:
            one, two = (registers[-1 - index % len(registers)] for index in (step.one, step.two))
            registers.append(STEPS[step.name](self, step.layer, one, two))
            del one, two
        return registers[-self.returned :]


def draw(seed: int) -> Case:
    """The case of this seed."""
    rng = Random(seed)

    def step() -> Step:
        name = rng.choice(USUAL) if rng.random() < 0.8 else rng.choice(tuple(STEPS))
        near = rng.random() < 0.93
        return Step(name, rng.randrange(4), 0 if near else rng.randrange(6), rng.randrange(6))

    program = tuple(step() for _ in range(rng.randrange(2, 12)))
    other = list(program)
    for _ in range(rng.choice((0, 1, 1, 2))):
        position = rng.randrange(len(other) + 1)
        if rng.random() < 0.3 and len(other) > 1:
            other.pop(min(position, len(other) - 1))
        else:
            other.insert(position, step())
    return Case(
        program,
        tuple(other),
        mode=rng.choice(MODES[:-1] if rng.random() < 0.995 else MODES),
        rows=rng.choice((1, 3, 20)),
        returned=rng.choice((1, 1, 1, 2, 4)),
        frozen=tuple(k for k in range(4) if rng.random() < 0.1),
    )


def _call(case: Case, model: Program, x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    if case.mode == "vmap":
        return list(torch.func.vmap(lambda row: tuple(model(row)), randomness="different")(x))
    if case.mode == "checkpoint":
        return list(checkpoint(model, x, use_reentrant=False))
    if case.mode == "compile":
        torch._dynamo.reset()
        return list(torch.compile(model, backend="eager")(x))
    with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(case.mode, nullcontext)():
        return model(x)


def _results(case: Case, model: Program, x: Tensor) -> list[Any]:
    """Outputs and gradients of a call, or the class of the error."""
    x = x.clone().requires_grad_(case.mode not in ("no_grad", "inference"))
    try:
        outputs = _call(case, model, x * 1)
        if not all(type(tensor) is Tensor for tensor in outputs):
            raise AssertionError(f"a {[type(tensor) for tensor in outputs]} left the model")
        if model.kept is not None and type(model.kept) is not Tensor and case.mode not in ("vmap", "compile"):
            raise AssertionError(f"a {type(model.kept)} was kept")
        leaves = [tensor for tensor in (x, *model.parameters()) if tensor.requires_grad]
        total = sum(((1 + k) * tensor.square().sum() for k, tensor in enumerate(outputs)), torch.zeros(()))
        grads = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else ()
        return [*[tensor.detach() for tensor in outputs], *grads]
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return [error]


def check(case: Case) -> None:
    """Raises AssertionError if an output or gradient of a call differs."""
    least, left = list(_chains.LEAST), _route._OUTPUTS_LEFT_TO_TORCH
    _chains.LEAST[:], _route._OUTPUTS_LEFT_TO_TORCH = [0, 0], 0  # chains for a few rows too
    try:
        torch.manual_seed(0)
        plain = Program().double()
        for k in case.frozen:
            plain.layers[k].requires_grad_(False)
        fused = mbp.fuse(copy.deepcopy(plain))
        x = torch.randn(case.rows, WIDTH, dtype=torch.float64)
        for call in range(5):
            results = []
            for model in (plain, fused):
                model.steps, model.returned = case.other if call == 2 else case.program, case.returned
                results.append(_results(case, model, x))
            _compare(call, *results, may_refuse=case.other != case.program)
            plain.kept = fused.kept = None
            fused.load_state_dict(plain.state_dict())
    finally:
        _chains.LEAST[:], _route._OUTPUTS_LEFT_TO_TORCH = least, left


def _compare(call: int, expected: list[Any], actual: list[Any], *, may_refuse: bool) -> None:
    failed = [isinstance(result[0], Exception) for result in (expected, actual)]
    if failed[1] and not failed[0]:
        message = str(actual[0])
        if may_refuse and call == 2 and message.startswith("a fused model:"):
            return
        raise AssertionError(f"call {call}: only the fused model raises {message}")
    if failed[0]:
        if not failed[1] and "modified by an inplace operation" in str(expected[0]):
            return  # a chain does not save what torch has saved
        assert failed[1], f"call {call}: only the plain model raises {expected[0]}"
        assert type(expected[0]) is type(actual[0]), f"call {call}: {expected[0]!r} and {actual[0]!r}"
        return
    for k, (one, two) in enumerate(zip(expected, actual, strict=True)):
        if one is None or two is None:
            assert one is two is None, f"call {call}: result {k} is {'missing' if two is None else 'not missing'}"
            continue
        assert one.shape == two.shape, f"call {call}: result {k} has shape {two.shape}, not {one.shape}"
        error, size = (one - two).abs().max().item(), one.abs().max().item()
        assert not error > 1e-9 * max(size, 1), f"call {call}: result {k} is off by {error}, of {size}"


def simpler(case: Case) -> Iterator[Case]:
    """Yields simpler cases."""
    for simple in ({"mode": "plain"}, {"rows": 1}, {"returned": 1}, {"frozen": ()}, {"other": case.program}):
        if (simplified := replace(case, **simple)) != case:
            yield simplified
    for name in ("program", "other"):
        steps = getattr(case, name)
        for k in range(len(steps)):
            yield replace(case, **{name: steps[:k] + steps[k + 1 :]})
    if case.program == case.other:
        for k in range(len(case.program)):
            shorter = case.program[:k] + case.program[k + 1 :]
            yield replace(case, program=shorter, other=shorter)
