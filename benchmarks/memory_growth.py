"""Does memory grow over many training steps? Resident memory over 100,000 small steps of each way to train.

    python benchmarks/memory_growth.py                                 (2 minutes; Linux)
    python benchmarks/memory_growth.py --steps 5000 --json build/memory_growth.json --figure build/memory_growth.png
    python benchmarks/memory_growth.py --only fit --sizes 1 1 1 1 1 --rows 1 --steps 1000000

Each way runs in its own process, so that none reuses memory that another has freed. A leak of 64 bytes a step adds up
to 6 MiB. The memory that one step needs is measured by peak_memory.py. `make figures` draws the numbers of
docs/figures/data/memory_growth.json.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_manualbp as mbp
from results import add_options, header, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES, ROWS = [17, 64, 64, 6], 16
BATCHES = 10  # of an epoch of `fit`
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
        model.loss_backward(x, torch.cat([target, target]))
    except RuntimeError:
        return
    raise AssertionError("a target of the wrong shape was accepted")


# Trains a network with an optimizer on a batch x (B, D_in) with target (B, D_out), for this many steps.
Train = Callable[[Any, torch.optim.Optimizer, Tensor, Tensor, int], None]


def by(step: Callable[..., None]) -> Train:
    """The usual loop around one of the steps above."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            step(model, x, target)
            optimizer.step()

    return train


def by_train_step(model: mbp.MLP, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, steps: int) -> None:
    """Each step is one call, the update included."""
    for _ in range(steps):
        model.train_step(x, target, optimizer)


def by_fit(model: mbp.MLP, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, steps: int) -> None:
    """All steps are one call, whose epochs have several batches."""
    batches = min(BATCHES, steps)
    x, target = x.repeat(batches, 1), target.repeat(batches, 1)
    mbp.fit(model, x, target, optimizer, epochs=steps // batches, batch_size=len(x) // batches)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the loops."""
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def fused_adam(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with state, updated by our kernels."""
    return mbp.fuse(torch.optim.Adam(model.parameters(), lr=1e-6))


Way = tuple[Callable[[Sequence[int]], nn.Module], Callable[[nn.Module], torch.optim.Optimizer], Train]
WAYS: dict[str, Way] = {
    "eager": (lambda sizes: nn.Sequential(*mbp.MLP(sizes)), sgd, by(autograd_step)),
    "MLP, store": (mbp.MLP, sgd, by(autograd_step)),
    "MLP, recompute": (partial(mbp.MLP, activations="recompute"), sgd, by(autograd_step)),
    "MLP.loss": (mbp.MLP, sgd, by(loss_step)),
    "loss_backward": (mbp.MLP, sgd, by(loss_backward_step)),
    "loss_backward, refused": (mbp.MLP, sgd, by(refused_step)),
    "loss_backward, fuse(Adam)": (mbp.MLP, fused_adam, by(loss_backward_step)),
    "train_step": (mbp.MLP, fused_adam, by_train_step),
    "fit": (mbp.MLP, fused_adam, by_fit),
}


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def held(way: str, steps: int, sizes: Sequence[int], rows: int) -> list[int]:
    """Resident bytes after each hundredth of the steps."""
    torch.manual_seed(0)
    make, make_optimizer, train = WAYS[way]
    model = make(sizes)
    optimizer = make_optimizer(model)
    x, target = torch.randn(rows, sizes[0]), torch.randn(rows, sizes[-1])
    points = []
    for _ in range(POINTS):
        train(model, optimizer, x, target, steps // POINTS)
        points.append(resident_bytes())
    return points


def draw(result: dict[str, Any]) -> "Figure":
    """Draws the growth against the steps, beside a leak, and the growth of each way after the last step."""
    from torch_manualbp.inspection._figure import BLUE, GRAY, slide_figure

    steps, ways = result["steps"], result["bytes"]
    at = [steps // POINTS * (i + 1) for i in range(POINTS)]
    with slide_figure(13.33, 5.6) as figure:
        left, right = figure.subplots(1, 2)
        leak = [64 * step / 2**20 for step in at]
        left.plot(at, leak, "--", color=GRAY)
        left.text(at[-1], leak[-1] * 0.3, "a leak of 64 bytes a step", ha="right", fontsize=16, color=GRAY)
        for values in ways.values():
            left.plot(at, [(value - values[0]) / 2**20 for value in values], color=BLUE, linewidth=2)
        left.text(at[-1] * 0.5, leak[-1] * 0.06, f"{len(ways)} ways to train", ha="center", fontsize=16, color=BLUE)
        left.set(xlabel="training steps", ylabel="growth of resident memory (MiB)", title="Memory over many steps")
        left.set_xticks([0, steps // 2, steps])
        left.xaxis.set_major_formatter("{x:,.0f}")
        growths = [(values[-1] - values[0]) / 2**10 for values in ways.values()]
        bars = right.barh(list(ways), growths, color=BLUE)
        right.bar_label(bars, [f"{growth:.0f}" for growth in growths], padding=4)
        right.invert_yaxis()
        right.grid(visible=False, axis="y")
        right.margins(x=0.12)
        right.set(xlabel="KiB after the last step", title=f"Each way (the leak: {1024 * leak[-1]:,.0f} KiB)")
    return figure


def main() -> None:
    """Prints the memory of each way, and saves its growth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of the network (default: 17 64 64 6)")
    parser.add_argument("--rows", type=int, default=ROWS, help="of a batch (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="default: all")
    add_options(parser)
    parser.add_argument("--one", metavar="WAY", help="measure one way in this process, and print it as JSON")
    options = parser.parse_args()
    if options.steps < POINTS:
        parser.error(f"--steps must be at least {POINTS}")
    if options.one:
        torch.set_num_threads(1)
        print(json.dumps(held(options.one, options.steps, options.sizes, options.rows)))
        return
    load = os.getloadavg()[0]
    table: dict[str, list[int]] = {}
    print(
        f"| {options.steps:,} steps | MiB after 1 % | after 50 % | after 100 % | growth, KiB |\n|---|---|---|---|---|"
    )
    for way in options.only:
        network = ["--sizes", *map(str, options.sizes), "--rows", str(options.rows)]
        command = [sys.executable, __file__, "--one", way, "--steps", str(options.steps), *network]
        values = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        table[way] = values
        marks = " | ".join(f"{values[at] / 2**20:.1f}" for at in (0, POINTS // 2 - 1, -1))
        print(f"| {way} | {marks} | {(values[-1] - values[0]) / 2**10:.0f} |", flush=True)
    result = {"header": header(load), "steps": options.steps, "bytes": table}
    save(result, options, draw)


if __name__ == "__main__":
    main()
