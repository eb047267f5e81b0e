"""How does the time of a training step scale with threads, batch size and depth? Compares this library with eager.

    python benchmarks/scaling.py --json build/scaling.json
    python benchmarks/scaling.py --quick --json build/scaling.json --figure build/scaling.png

The peers, the rounds and the checks of the gradients are those of training_step.py: at each point, all peers and all
thread counts alternate. Speeds are medians of the rounds' ratios. A time in the figure is eager's median time divided
by the peer's speed relative to eager.

training_step.py compares with compilers, and peak_memory.py measures memory.
"""

import argparse
import json
import os
import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from results import add_options, header, save
from training_step import PEERS as BUILDERS
from training_step import REFERENCE, Builder, Step, Workload, load_workloads, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PEERS = {"eager": "o", "mbp.MLP": "s", "MLP.loss": "^", "loss_backward": "v"}
Curves = dict[str, dict[str, list[float]]]  # peer: "seconds" of a step and "speedup" over eager, one value per point


def curves(workloads: list[Workload], rounds: int) -> Curves:
    """Measures each peer on each workload."""
    points = [measure(workload, list(PEERS), rounds) for workload in workloads]
    return {
        peer: {
            "seconds": [point[peer].median_seconds for point in points],
            "speedup": [point[peer].speedup for point in points],
        }
        for peer in PEERS
    }


def with_threads(build: Builder, count: int) -> Builder:
    """The same peer with `count` threads, independent of what other peers set."""

    def builder(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
        step = build(model, x, target)

        def run() -> None:
            torch.set_num_threads(count)
            step.run()

        return Step(run, step.gradients)

    return builder


def by_threads(workload: Workload, counts: list[int], rounds: int) -> dict[str, list[float]]:
    """The speed of each peer at each thread count, relative to itself at the first count."""
    names = {(peer, n): peer if n == counts[0] else f"{peer}, {n} threads" for peer in PEERS for n in counts}
    builders = {name: with_threads(BUILDERS[peer], n) for (peer, n), name in names.items()}
    usual = torch.get_num_threads()
    timings = measure(workload, list(builders), rounds, builders)
    torch.set_num_threads(usual)

    def speed(peer: str, n: int) -> float:
        pairs = zip(timings[peer].seconds, timings[names[peer, n]].seconds, strict=True)
        return statistics.median(first / own for first, own in pairs)

    return {peer: [speed(peer, n) for n in counts] for peer in PEERS}


def draw(result: dict[str, Any]) -> "Figure":
    """Draws three panels: threads, batch size and depth."""
    from matplotlib.ticker import LogLocator, MultipleLocator, NullLocator

    from torch_manualbp.inspection._figure import GRAY, slide_figure

    names, counts = list(result["threads"]["speedup"]), result["threads"]["counts"]
    width = 0.8 / len(PEERS)
    with slide_figure(13.33, 5.6) as figure:
        threads, batch, depth = figure.subplots(1, 3)
        for i, peer in enumerate(PEERS):
            speeds = [peers[peer][-1] for peers in result["threads"]["speedup"].values()]
            threads.bar([x + (i - (len(PEERS) - 1) / 2) * width for x in range(len(names))], speeds, width, label=peer)
        threads.set_xticks(range(len(names)), names, rotation=25)
        threads.yaxis.set_major_locator(MultipleLocator(0.5))
        threads.grid(visible=False)
        for level, style in ((1, "-"), (counts[-1], "--")):
            threads.axhline(level, color=GRAY, linestyle=style, linewidth=1.5)
        threads.set_ylabel(f"speed with {counts[-1]} threads / with {counts[0]}")
        threads.set_title("Threads (dashed: ideal)")
        for axes, key, label, title in (
            (batch, "batch", "rows of the batch", "Batch: 32–64×4–16"),
            (depth, "depth", "layers", f"Depth: 64 wide, {result['depth']['rows']} rows"),
        ):
            points, peers = result[key]["points"], result[key]["curves"]
            for peer, marker in PEERS.items():
                pairs = zip(peers[REFERENCE]["seconds"], peers[peer]["speedup"], strict=True)
                axes.loglog(points, [1e3 * seconds / speedup for seconds, speedup in pairs], marker=marker, label=peer)
            axes.set_xticks(points, [f"{point:,}" for point in points], rotation=45 if key == "batch" else 0)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.tick_params(which="minor", labelsize=14)
            axes.set_xlabel(label)
            axes.set_ylabel("time of a step (ms)")
            axes.set_title(title)
            axes.grid(which="both")
        figure.legend(*threads.get_legend_handles_labels(), loc="outside lower center", ncols=len(PEERS))
    return figure


def main() -> None:
    """Measures, prints or writes the JSON, and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="default: 9, or 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="few points and rounds, for a first impression")
    add_options(parser)
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 9)
    load = os.getloadavg()[0]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = sorted({1, cpus}) if options.quick else list(range(1, cpus + 1))
    rows = [1, 32, 1024] if options.quick else [4**k for k in range(9)]
    layers = [2, 8] if options.quick else [2, 5, 10, 20, 50]
    names = ["rl256"] if options.quick else ["rl256", "nerf", "tcnn64", "dlrm_top"]
    batches = [Workload(f"{n} rows", [32, 64, 64, 64, 64, 16], n) for n in rows]
    depths = [Workload(f"{n} layers", [64] * (n + 1), 256) for n in layers]
    result = {
        "header": header(load),
        "threads": {
            "counts": counts,
            "speedup": {w.name: by_threads(w, counts, rounds) for w in load_workloads(names)},
        },
        "batch": {"points": rows, "curves": curves(batches, rounds)},
        "depth": {"points": layers, "rows": 256, "curves": curves(depths, rounds)},
    }
    if not options.json:
        print(json.dumps(result, indent=1))
    save(result, options, draw)


if __name__ == "__main__":
    main()
