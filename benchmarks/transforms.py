"""How fast are torch.func's transforms of our networks? Times an ``nn.Sequential`` and an `MLP` under the same ones.

    python benchmarks/transforms.py --json build/transforms.json --markdown build/transforms.md

- ensemble: ``vmap(grad(loss))`` over the stacked parameters of E networks (torch.func.stack_module_state), one batch
- backward: the same by ``vmap(loss)`` and one ``.backward()``
- per sample: ``vmap(grad(loss), (None, 0, 0))``, the gradient of each row of a batch

Rounds and checks work as in training_step.py: both peers alternate in one process, and the median of the rounds' ratios
is reported. Gradients are checked first: those of the first network, or the mean over the rows, must be eager's.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from training_step import Builder, Step, Timing, Workload, as_mlp, eager, measure

Parameters = dict[str, Tensor]


def _stacked(model: nn.Module, count: int) -> Parameters:
    """The parameters of `model` and of count − 1 others that differ from it."""
    models = [copy.deepcopy(model) for _ in range(count)]
    torch.manual_seed(0)
    for other in models[1:]:
        for parameter in other.parameters():
            parameter.detach().add_(torch.randn_like(parameter), alpha=0.01)
    return stack_module_state(models)[0]


def _loss_of(model: nn.Module) -> Callable[..., Tensor]:
    return lambda parameters, x, target: F.mse_loss(functional_call(model, parameters, (x,)), target)


def ensemble(count: int, model: nn.Module, x: Tensor, target: Tensor) -> Step:
    """``vmap(grad(loss))`` of `count` networks on one batch."""
    parameters = {name: parameter.detach() for name, parameter in _stacked(model, count).items()}
    run = partial(vmap(grad(_loss_of(model)), (0, None, None)), parameters, x, target)
    return Step(run, lambda: [gradient[0] for gradient in run().values()])


def backward(count: int, model: nn.Module, x: Tensor, target: Tensor) -> Step:
    """``vmap(loss)`` of `count` networks, and ``.backward()``."""
    parameters = _stacked(model, count)
    losses = vmap(_loss_of(model), (0, None, None))

    def run() -> None:
        for parameter in parameters.values():
            parameter.grad = None
        losses(parameters, x, target).sum().backward()  # type: ignore[no-untyped-call]

    return Step(run, lambda: [parameter.grad[0] for parameter in parameters.values()])  # type: ignore[index]


def per_sample(count: int, model: nn.Module, x: Tensor, target: Tensor) -> Step:
    """``vmap(grad(loss))`` over the rows of a batch, as in PyTorch's tutorial; `count` is 1, one network."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: Parameters, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, parameters, (x.unsqueeze(0),)), target.unsqueeze(0))

    run = partial(vmap(grad(loss), (None, 0, 0)), parameters, x, target)
    return Step(run, lambda: [gradient.mean(0) for gradient in run().values()])


@dataclass(frozen=True)
class Row:
    """A row of the table: what is computed, of how many networks, of which sizes, on how many rows."""

    transform: Callable[[int, nn.Module, Tensor, Tensor], Step]
    networks: int
    sizes: tuple[int, ...]
    rows: int

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.networks} × {'–'.join(map(str, self.sizes))}, {self.rows} rows"

    def measure(self, rounds: int) -> dict[str, Timing]:
        """The timings of an eager step, which is the reference of the check, and of both peers."""
        builders: dict[str, Builder] = {
            "eager": eager,
            "nn.Sequential": lambda model, x, target: self.transform(self.networks, model, x, target),
            "mbp.MLP": lambda model, x, target: self.transform(self.networks, as_mlp(model), x, target),
        }
        return measure(Workload(self.name, list(self.sizes), self.rows), list(builders), rounds, builders)


ROWS = [
    Row(ensemble, 10, (17, 64, 64, 6), 64),
    Row(ensemble, 5, (17, 256, 256, 1), 256),
    Row(backward, 10, (17, 64, 64, 6), 64),
    Row(backward, 5, (17, 256, 256, 1), 256),
    Row(per_sample, 1, (17, 64, 64, 6), 64),
    Row(per_sample, 1, (17, 256, 256, 1), 512),
]


def table(measured: Sequence[tuple[Row, dict[str, Timing]]]) -> str:
    """The table in Markdown."""
    lines = [
        f"| {'torch.func':10} | {'networks':30} | {'nn.Sequential, ms':>17} | {'mbp.MLP, ms':>11} | {'speedup':>7} |",
        f"|{'-' * 12}|{'-' * 32}|{'-' * 18}:|{'-' * 12}:|{'-' * 8}:|",
    ]
    for row, timings in measured:
        plain, ours = (timings[peer] for peer in ("nn.Sequential", "mbp.MLP"))
        times = f"{plain.median_seconds * 1e3:17.3f} | {ours.median_seconds * 1e3:11.3f} | {speedup(timings):6.2f}×"
        lines.append(f"| {row.transform.__name__.replace('_', ' '):10} | {row.name:30} | {times} |")
    return "\n".join(lines) + "\n"


def speedup(timings: dict[str, Timing]) -> float:
    """The time of the ``nn.Sequential`` / that of the `MLP`, the median over the rounds."""
    pairs = zip(timings["nn.Sequential"].seconds, timings["mbp.MLP"].seconds, strict=True)
    return float(torch.tensor([plain / ours for plain, ours in pairs], dtype=torch.float64).median())


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    measured = [(row, row.measure(rounds)) for row in ROWS]
    for row, timings in measured:
        for peer, timing in timings.items():
            if timing.error:
                raise SystemExit(f"{row.transform.__name__}, {row.name}: {peer}: {timing.error}")
    text = table(measured)
    sys.stdout.write(text)
    report: list[dict[str, Any]] = [
        {
            "transform": row.transform.__name__,
            "networks": row.name,
            "speedup": speedup(timings),
            "seconds": {peer: timing.seconds for peer, timing in timings.items()},
        }
        for row, timings in measured
    ]
    for path, content in ((options.json, json.dumps(report, indent=1) + "\n"), (options.markdown, text)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)


if __name__ == "__main__":
    main()
