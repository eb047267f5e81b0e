"""``python -m torch_manualbp.demo``: ten seconds in a terminal. Speed on this machine, a trace, a diagnosis."""

import copy
import datetime
import itertools
import os
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_manualbp.conversion import fuse
from torch_manualbp.info import info
from torch_manualbp.inspection._table import Table, printable
from torch_manualbp.inspection.gradient_flow import gradient_flow
from torch_manualbp.inspection.trace import trace
from torch_manualbp.modules import MLP

# Widths and rows: a small network, a wide one, a deep one, and a tall batch. An eager step takes 0.2 to 20 ms.
_NETWORKS = (
    ([17, 64, 64, 6], 64),
    ([784, 512, 512, 10], 128),
    ([64] * 51, 32),
    ([32, 64, 64, 64, 64, 16], 16_384),
)
_BUSY = 0.5  # load average; torch's threads wait for each other, so one busy core can slow a step hundredfold
_SAMPLE_SECONDS = 0.005  # a sample lasts this long or one step, so that the clock hardly counts


def demo(seconds: float = 5.0) -> None:
    """Prints the speed of training steps relative to PyTorch eager, a trace, and why a network does not train.

    The three ways to compute a step take turns, so that a slow moment of the machine affects all of them alike. Each
    turn gives a ratio to eager, of which the median and the middle half are shown. Networks that are slower than eager
    on this machine are shown like the others.

    Args:
        seconds: how long to measure speed; the rest takes less than a second.
    """
    parts: list[tuple[str, Callable[[], str]]] = [
        ("1. A training step: forward, mean squared error, backward; float32", lambda: _speed(seconds)),
        ("2. Both passes of a network: print(mbp.trace(model, x, y))", _trace),
        ("3. Why does it not train? mbp.gradient_flow(model, x, y)", _diagnosis),
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for heading, part in parts:
            print(printable(f"{heading}\n{'-' * len(heading)}\n{part()}\n"), flush=True)


def _speed(seconds: float) -> str:
    names, rows, worst, load = ("fuse(model)", "MLP.loss_backward"), [], 0.0, os.getloadavg()[0]
    for sizes, batch in _NETWORKS:
        steps = _steps(sizes, batch)
        eager, *others = ([grad.clone() for grad in step()] for step in steps)
        worst = max([worst, *(_difference(grads, eager) for grads in others)])
        rounds = _rounds(steps, seconds / len(_NETWORKS))
        median = statistics.median(samples[0] for samples in rounds)
        ratios = ([samples[0] / samples[k] for samples in rounds] for k in (1, 2))
        rows.append((_widths(sizes), f"{batch:,}", f"{median * 1e3:.3g} ms", *map(_shown, ratios)))
    facts = info()
    notes = [
        f"{facts['cpu']}, {facts['threads']} thread(s), {facts['instruction set'].split()[0]}, "
        f"torch {facts['torch']}, {datetime.date.today()}",
        "Above 1 is faster than eager, below 1 slower; in brackets the middle half of the turns.",
        f"Gradients differ from eager's by at most {worst:.0e} of their norm.",
    ]
    if load > _BUSY:
        notes.append(f"Other programs were running (load average {load:.1f}): an idle machine gives other numbers.")
    return Table("", ("network", "rows", "eager", *names), rows, "<>>>>", notes).text()


def _steps(sizes: Sequence[int], batch: int) -> list[Callable[[], list[Tensor]]]:
    """The same step in three ways, which return the gradients: eager, fused, and without a graph."""
    mlp = MLP(sizes)
    plain = nn.Sequential(*copy.deepcopy(list(mlp)))
    fused = fuse(copy.deepcopy(plain))
    x, y = torch.randn(batch, sizes[0]), torch.randn(batch, sizes[-1])

    def by_graph(model: nn.Module) -> None:
        F.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]

    def step(model: nn.Module, backward: Callable[[], object]) -> Callable[[], list[Tensor]]:
        parameters = list(model.parameters())

        def run() -> list[Tensor]:
            for parameter in parameters:
                parameter.grad = None
            backward()
            return [parameter.grad for parameter in parameters if parameter.grad is not None]

        return run

    return [
        step(plain, lambda: by_graph(plain)),
        step(fused, lambda: by_graph(fused)),
        step(mlp, lambda: mlp.loss_backward(x, y, "mse")),
    ]


def _rounds(steps: Sequence[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Seconds of each step, in rounds that time each of them once and begin with a different one."""
    repeats = [max(1, round(_SAMPLE_SECONDS / min(_seconds(step, 1) for _ in range(3)))) for step in steps]
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 5 or time.perf_counter() < end:
        samples = [0.0] * len(steps)
        for k in range(len(steps)):
            turn = (k + len(rounds)) % len(steps)
            samples[turn] = _seconds(steps[turn], repeats[turn])
        rounds.append(samples)
    return rounds


def _seconds(step: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - begin) / repeats


def _difference(grads: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest ‖grad − wanted‖ / ‖wanted‖."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(grads, wanted, strict=True))


def _shown(ratios: Sequence[float]) -> str:
    low, median, high = statistics.quantiles(ratios, n=4)
    return f"{median:.2f}× ({low:.2f}–{high:.2f})"


def _widths(sizes: Sequence[int]) -> str:
    groups = [(width, len(list(same))) for width, same in itertools.groupby(sizes)]
    return "–".join(f"{width}×{count}" if count > 1 else str(width) for width, count in groups)


def _trace() -> str:
    traced = trace(MLP([2, 3, 1]), torch.randn(4, 2), torch.randn(4, 1))
    return (
        f"{traced}\ntrace.verify(): at most {float(traced.verify()):.0e} from float64 autograd, relative to the terms"
    )


def _diagnosis() -> str:
    model, x, y = MLP([64] * 11 + [1]), torch.randn(256, 64), torch.randn(256, 1)
    before = gradient_flow(model, x, y)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    after = gradient_flow(model, x, y)
    lines = []
    for name, flow in (("as PyTorch initialises it", before), ("after nn.init.kaiming_normal_", after)):
        found = "; ".join(f"{word}: {text}" for word, text in flow.explanation.items()) or "nothing found"
        lines += textwrap.wrap(f"{_widths([64] * 11 + [1])} {name}: {found}", 88, subsequent_indent="  ")
    return "\n".join(lines)


if __name__ == "__main__":
    demo()
