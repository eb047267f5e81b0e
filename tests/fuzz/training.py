"""Trains drawn networks by `fit` in one op and by its composition step by step: all numbers must have the same bits.

The composition (`loss_backward`, ``clip_grad_norm_``, ``optimizer.step()``) is what the other tests compare with plain
torch.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor, nn

import torch_manualbp as mbp
from fuzz.differential import UndecidableError
from torch_manualbp import _ops

__all__ = ["Case", "UndecidableError", "check", "draw", "simpler"]

RULES = ("SGD", "Adam", "AdamW")
OPTIONS: dict[str, tuple[tuple[str, object], ...]] = {
    "SGD": (("momentum", 0.9), ("weight_decay", 0.1), ("maximize", True)),
    "Adam": (("amsgrad", True), ("weight_decay", 0.1), ("maximize", True), ("betas", (0.5, 0.99))),
    "AdamW": (("amsgrad", True), ("weight_decay", 0.0), ("eps", 1e-3)),
}


@dataclass(frozen=True)
class Case:
    """A training run."""

    sizes: tuple[int, ...]
    rows: int
    batch_size: int
    rule: str
    options: tuple[str, ...] = ()
    dtype: str = "float32"
    loss: str = "mse"
    epochs: int = 2
    clip: float | None = None
    frozen: tuple[int, ...] = ()  # indices of parameters
    bias: bool = True
    shuffle: bool = True
    drop_last: bool = False
    threads: int = 1
    strided: bool = False
    mixed: bool = False  # computed in bfloat16


def draw(seed: int) -> Case:
    """The case of this seed."""
    rng = Random(seed)
    sizes = tuple(rng.choice((1, 2, 7, 16, 33, 64, 130, 300)) for _ in range(rng.choice((2, 3, 4, 6))))
    rows = rng.choice((1, 3, 50, 200, 1000))
    rule = rng.choice(RULES)
    bias = rng.random() < 0.8
    return Case(
        sizes,
        rows,
        batch_size=rng.choice((1, 7, 64, 1500)) if rows <= 50 else rng.choice((33, 100, 500)),
        rule=rule,
        options=tuple(name for name, _ in OPTIONS[rule] if rng.random() < 0.3),
        dtype=rng.choice(("float32", "float32", "float64", "bfloat16", "float16")),
        loss=rng.choice(("mse", "cross_entropy", "bce_with_logits")),
        clip=rng.choice((None, 0.01, 100.0)),
        frozen=tuple(k for k in range((len(sizes) - 1) * (1 + bias)) if rng.random() < 0.15),
        bias=bias,
        shuffle=rng.random() < 0.7,
        drop_last=rng.random() < 0.2,
        threads=rng.choice((1, 2, 3)),
        strided=rng.random() < 0.2,
        mixed=rng.random() < 0.3,
    )


def _data(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.rows)
    dtype, step = getattr(torch, case.dtype), 1 + case.strided
    input = torch.randn(case.rows * step, case.sizes[0], generator=generator).to(dtype)[::step]
    if case.loss == "cross_entropy":
        return input, torch.randint(case.sizes[-1], (case.rows * step,), generator=generator)[::step]
    return input, torch.rand(case.rows * step, case.sizes[-1], generator=generator).to(dtype)[::step]


def _optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    options = {name: value for name, value in OPTIONS[case.rule] if name in case.options}
    kind = getattr(torch.optim, case.rule)
    return mbp.fuse(kind(model.parameters(), lr=0.01, **options))


def check(case: Case) -> None:
    """Raises AssertionError if a number of the model, of the optimizer's state or of the losses differs."""
    torch.manual_seed(0)
    model = mbp.MLP(case.sizes, bias=case.bias, dtype=getattr(torch, case.dtype))
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(k not in case.frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UndecidableError
    if case.drop_last and case.batch_size > case.rows:
        raise UndecidableError  # no batch at all
    other = copy.deepcopy(model)
    optimizer, other_optimizer = _optimizer(case, model), _optimizer(case, other)
    input, target = _data(case)
    made, train = [], _ops.train

    def counted(*args: object) -> torch.Tensor | None:
        losses: torch.Tensor | None = train(*args)
        made.append(0 if losses is None else len(losses))
        return losses

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(case.threads)
        _ops.train = counted
        history = mbp.fit(
            *(model, input, target, optimizer),
            loss=case.loss,
            epochs=case.epochs,
            batch_size=case.batch_size,
            shuffle=case.shuffle,
            drop_last=case.drop_last,
            generator=torch.Generator().manual_seed(7),
            max_grad_norm=case.clip,
            dtype=torch.bfloat16 if case.mixed and case.dtype == "float32" else None,
        )
    finally:
        _ops.train = train
        torch.set_num_threads(threads)
    losses = _composed(case, other, other_optimizer, input, target)
    assert sum(made) == len(losses), "steps were not made by the op"
    assert _same(history.step_losses, torch.tensor(losses, dtype=history.step_losses.dtype)), "losses differ"
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert _same(one, two), f"{name} differs"
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            expected = other_optimizer.state_dict()["state"][index][name]
            assert value is expected or _same(value, expected), f"{name} of parameter {index} differs"


def _composed(
    case: Case, model: mbp.MLP, optimizer: torch.optim.Optimizer, input: Tensor, target: Tensor
) -> list[float]:
    generator, losses = torch.Generator().manual_seed(7), []
    for _ in range(case.epochs):
        order = torch.randperm(case.rows, generator=generator) if case.shuffle else torch.arange(case.rows)
        for rows in order.split(case.batch_size):
            if case.drop_last and len(rows) < case.batch_size:
                continue
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=case.mixed and case.dtype == "float32"):
                losses.append(model.loss_backward(input[rows], target[rows], case.loss).item())
            if case.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            optimizer.step()
    return losses


def _same(one: Tensor, two: Tensor) -> bool:
    return torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)


def simpler(case: Case) -> Iterator[Case]:
    """Yields simpler cases."""
    for simple in (
        {"epochs": 1}, {"clip": None}, {"frozen": ()}, {"options": ()}, {"dtype": "float32"}, {"loss": "mse"},
        {"mixed": False}, {"strided": False}, {"threads": 1}, {"shuffle": False}, {"drop_last": False}, {"rule": "SGD", "options": ()},
        {"rows": case.batch_size}, {"rows": 1, "batch_size": 1},
    ):  # fmt: skip
        if (simplified := replace(case, **simple)) != case:
            yield simplified
    if len(case.sizes) > 2:
        for k in range(len(case.sizes)):
            yield replace(case, sizes=case.sizes[:k] + case.sizes[k + 1 :], frozen=())
