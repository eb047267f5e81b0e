"""How much memory does a training step need beyond its input, target and parameters, as the batch grows?

    python benchmarks/peak_memory.py --json build/peak_memory.json --figure build/peak_memory.png

Each point is measured in a fresh process (Linux), as the increase of the peak resident size during one step of the
tcnn64 network. A loss outside the network needs the output and its gradient, 128 bytes a row; `MLP.loss` needs neither.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_manualbp as mbp
from results import add_options, header, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = [32, 64, 64, 64, 64, 16]
BATCHES = [1_000, 10_000, 30_000, 100_000, 300_000, 1_000_000]


def autograd_step(model: nn.Module, x: Tensor, target: Tensor) -> None:
    """The usual training step, with the loss outside the network."""
    F.mse_loss(model(x), target).backward()  # type: ignore[no-untyped-call]


def loss_step(model: nn.Module, x: Tensor, target: Tensor) -> None:
    """The loss is computed inside the network, in one pass."""
    assert isinstance(model, mbp.MLP)
    model.loss(x, target).backward()  # type: ignore[no-untyped-call]


MODES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor, Tensor], None]]] = {
    "eager": (lambda: nn.Sequential(*mbp.MLP(SIZES)), autograd_step),
    "MLP, store": (lambda: mbp.MLP(SIZES), autograd_step),
    "MLP, recompute": (lambda: mbp.MLP(SIZES, activations="recompute"), autograd_step),
    "MLP.loss": (lambda: mbp.MLP(SIZES), loss_step),
}


def highest_resident_bytes() -> int:
    """The peak resident size (VmHWM) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def measure(mode: str, batch: int) -> int:
    """The bytes by which one step raises the peak resident size."""
    make, step = MODES[mode]
    model = make()
    x, target = torch.randn(batch, SIZES[0]), torch.randn(batch, SIZES[-1])
    step(model, x[:100].clone(), target[:100].clone())  # starts the threads and the autograd engine
    before = highest_resident_bytes()
    step(model, x, target)
    return highest_resident_bytes() - before


def draw(result: dict[str, Any]) -> "Figure":
    """Draws MiB against rows, both on logarithmic axes."""
    from torch_manualbp.inspection._figure import slide_figure

    with slide_figure(11, 6.2) as figure:
        axes = figure.add_subplot()
        for mode, marker, align in zip(result["bytes"], "osv^", ("bottom", "top", "center", "center"), strict=True):
            values = result["bytes"][mode]
            (line,) = axes.loglog(result["rows"], [max(v / 2**20, 0.1) for v in values], marker=marker, label=mode)
            axes.annotate(
                f"  {mode}", (result["rows"][-1], values[-1] / 2**20), color=line.get_color(), fontsize=16, va=align,
                annotation_clip=False,
            )  # fmt: skip
        axes.set_xlabel("rows of the batch")
        axes.set_ylabel("memory of a step (MiB)")
        axes.set_title("Peak memory of a training step, beside input, target and parameters")
    return figure


def main() -> None:
    """Prints a table in MiB, and saves the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    add_options(parser)
    parser.add_argument("--one", nargs=2, metavar=("MODE", "BATCH"), help="measure one point in this process")
    options = parser.parse_args()
    if options.one:
        print(measure(options.one[0], int(options.one[1])))
        return
    load = os.getloadavg()[0]
    table: dict[str, list[int]] = {}
    print(f"| rows | {' | '.join(MODES)} |\n|---|{'---|' * len(MODES)}")
    for batch in options.batches:
        cells = []
        for mode in MODES:
            command = [sys.executable, __file__, "--one", mode, str(batch)]
            size = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            table.setdefault(mode, []).append(size)
            cells.append(f"{size / 2**20:.1f}")
        print(f"| {batch:,} | {' | '.join(cells)} |", flush=True)
    save({"header": header(load), "rows": options.batches, "bytes": table}, options, draw)


if __name__ == "__main__":
    main()
