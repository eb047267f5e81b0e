"""What does `GradientFlowMonitor` cost? Times training steps of the networks in workloads.json with and without it.

    python benchmarks/monitor_cost.py --every 20

A step is one iteration of a training loop: reset the gradients, forward, loss, backward, one step of SGD. The loop runs
in blocks of 2 × `every` steps that alternate between no monitor, a monitor that never measures (the cost of its hook)
and one that does. Each round gives a ratio, and the median over the rounds is reported. The networks are trained in
three ways: plain nn.Sequential, `MLP`, and `MLP.loss_backward`.

tests/test_monitor.py checks that training computes the same numbers with the monitor.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import torch_manualbp as mbp
from training_step import as_mlp, load_workloads

NETWORKS = ("rl64", "rl256", "deep", "mnist", "nerf")
NEVER = 1 << 60
Loop = Callable[[int], None]


def loop(model: nn.Sequential, backward: Callable[[], object]) -> Loop:
    """A training loop that takes the number of steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            backward()
            optimizer.step()

    return run


def ways_to_train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> dict[str, tuple[nn.Sequential, Loop]]:
    """The model and the loop of each way to train; each has its own model."""
    plain, fused, direct = model, as_mlp(model), as_mlp(model)
    return {
        "nn.Sequential": (plain, loop(plain, lambda: F.mse_loss(plain(x), y).backward())),  # type: ignore[no-untyped-call]
        "MLP": (fused, loop(fused, lambda: F.mse_loss(fused(x), y).backward())),  # type: ignore[no-untyped-call]
        "loss_backward": (direct, loop(direct, lambda: direct.loss_backward(x, y))),
    }


def cost(model: nn.Sequential, run: Loop, every: int, rounds: int) -> tuple[float, float, float]:
    """Seconds of a step without a monitor, and the fraction that it adds with measurements and by its hook alone."""
    steps = 2 * every
    run(steps)
    samples: dict[int, list[float]] = {0: [], NEVER: [], every: []}
    for _ in range(rounds):
        for period, seconds in samples.items():
            with mbp.GradientFlowMonitor(model, every=period) if period else contextlib.nullcontext():
                run(1)  # the monitor measures the first step, so start after it
                start = time.perf_counter()
                run(steps)
                seconds.append((time.perf_counter() - start) / steps)
    alone = samples[0]
    measured, hook = (
        statistics.median(own / other - 1 for own, other in zip(samples[period], alone, strict=True))
        for period in (every, NEVER)
    )
    return statistics.median(alone), measured, hook


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    options = parser.parse_args()
    sys.stdout.write(f"| network | trained by | step | measured every {options.every} steps | the hook alone |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    for load in load_workloads(options.networks):
        torch.manual_seed(0)
        x, y = torch.randn(load.batch, load.sizes[0]), torch.randn(load.batch, load.sizes[-1])
        for way, (model, run) in ways_to_train(nn.Sequential(*mbp.MLP(load.sizes)), x, y).items():
            alone, measured, hook = cost(model, run, options.every, options.rounds)
            sys.stdout.write(f"| {load.name} | {way} | {alone * 1e3:.3g} ms | {measured:+.1%} | {hook:+.1%} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
