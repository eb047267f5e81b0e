"""Does memory grow over many training steps? Resident memory over 100,000 small steps of each way to train.

    python benchmarks/memory_growth.py                                 (2 minutes; Linux)
    python benchmarks/memory_growth.py --steps 5000 --figure build/memory_growth.png

Each way runs in its own process, so that none reuses memory that another has freed. A leak of 64 bytes a step adds up
to 6 MiB. The memory that one step needs is measured by peak_memory.py.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_manualbp as mbp

SIZES, BATCH = [17, 64, 64, 6], 16
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "memory_growth.png"
POINTS = 100


def autograd_step(model: nn.Module, x: Tensor, target: Tensor) -> None:
    """The loss is computed outside the network."""
    F.mse_loss(model(x), target).backward()  # type: ignore[no-untyped-call]


def loss_step(model: mbp.MLP, x: Tensor, target: Tensor) -> None:
    """The loss is computed inside the network."""
    model.loss(x, target).backward()  # type: ignore[no-untyped-call]


def loss_backward_step(model: mbp.MLP, x: Tensor, target: Tensor) -> None:
    """There is no autograd graph."""
    model.loss_backward(x, target)


def refused_step(model: mbp.MLP, x: Tensor, target: Tensor) -> None:
    """A step that succeeds, followed by one that raises."""
    model.loss_backward(x, target)
    try:
        model.loss_backward(x, target[:, :1])
    except RuntimeError:
        return
    raise AssertionError("a target of the wrong shape was accepted")


WAYS: dict[str, tuple[Callable[[], nn.Module], Callable[..., None]]] = {
    "eager": (lambda: nn.Sequential(*mbp.MLP(SIZES)), autograd_step),
    "MLP, store": (lambda: mbp.MLP(SIZES), autograd_step),
    "MLP, recompute": (lambda: mbp.MLP(SIZES, activations="recompute"), autograd_step),
    "MLP.loss": (lambda: mbp.MLP(SIZES), loss_step),
    "loss_backward": (lambda: mbp.MLP(SIZES), loss_backward_step),
    "loss_backward, refused": (lambda: mbp.MLP(SIZES), refused_step),
}


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def growth(way: str, steps: int) -> list[int]:
    """Resident bytes after each hundredth of the steps, minus those after the first."""
    torch.manual_seed(0)
    make, step = WAYS[way]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, target = torch.randn(BATCH, SIZES[0]), torch.randn(BATCH, SIZES[-1])
    held = []
    for _ in range(POINTS):
        for _ in range(steps // POINTS):
            optimizer.zero_grad()
            step(model, x, target)
            optimizer.step()
        held.append(resident_bytes())
    return [bytes_ - held[0] for bytes_ in held]


def plot(table: dict[str, list[int]], steps: int, path: Path) -> None:
    """Plots MiB against steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    at = [steps // POINTS * (i + 1) for i in range(POINTS)]
    for (way, values), style in zip(table.items(), ("-", "-", "--", "-.", ":", "-"), strict=False):
        axes.plot(at, [value / 2**20 for value in values], style, label=way)
    axes.plot(at, [64 * step / 2**20 for step in at], color="gray", linewidth=1)
    axes.annotate("a leak of 64 bytes a step", (at[-1] * 0.62, 64 * at[-1] * 0.66 / 2**20), ha="right", color="gray")
    axes.set_xlabel("training steps")
    axes.set_ylabel("growth of resident memory (MiB)")
    axes.set_title("Memory over many steps")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Prints and plots the growth of each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--figure", type=Path, default=FIGURE, help="default: docs/figures/memory_growth.png")
    parser.add_argument("--one", metavar="WAY", help="measure one way in this process, and print it as JSON")
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        print(json.dumps(growth(options.one, options.steps)))
        return
    table: dict[str, list[int]] = {}
    print(f"| {options.steps:,} steps | growth of resident memory, KiB |\n|---|---|")
    for way in WAYS:
        command = [sys.executable, __file__, "--one", way, "--steps", str(options.steps)]
        table[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {way} | {table[way][-1] / 2**10:.0f} |", flush=True)
    plot(table, options.steps, options.figure)


if __name__ == "__main__":
    main()
