"""How the time of a training step grows with threads, with the batch, and with depth: this library beside eager.

    python benchmarks/scaling.py --figure build/scaling.png --json build/scaling.json
    python benchmarks/scaling.py --quick

The peers, the rounds and the checks of the gradients are those of training_step.py; a point is the median of a peer's
times. Left to others: the comparison with compilers (training_step.py), memory (peak_memory.py).
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from training_step import Workload, load_workloads, measure

PEERS = {"eager": "o", "mbp.MLP": "s", "MLP.loss": "^", "loss_backward": "v"}
Curves = dict[str, list[float]]  # peer: median seconds of a step at each point


def curves(workloads: list[Workload], rounds: int) -> Curves:
    """Each peer's median time of a step on each of the workloads."""
    points = [measure(workload, list(PEERS), rounds) for workload in workloads]
    return {peer: [point[peer].median_seconds for point in points] for peer in PEERS}


def by_threads(workloads: list[Workload], counts: list[int], rounds: int) -> dict[str, Curves]:
    """Each workload with so many threads."""
    everything: dict[str, Curves] = {}
    usual = torch.get_num_threads()
    for workload in workloads:
        columns = []
        for count in counts:
            torch.set_num_threads(count)
            columns.append(curves([workload], rounds))
        everything[workload.name] = {peer: [column[peer][0] for column in columns] for peer in PEERS}
    torch.set_num_threads(usual)
    return everything


def plot(result: dict[str, Any], path: Path) -> None:
    """Three panels."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, (threads, batch, depth) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    names, counts = list(result["threads"]["curves"]), result["threads"]["counts"]
    width = 0.8 / len(PEERS)
    for i, peer in enumerate(PEERS):
        speedups = [times[peer][0] / times[peer][-1] for times in result["threads"]["curves"].values()]
        threads.bar([x + (i - (len(PEERS) - 1) / 2) * width for x in range(len(names))], speedups, width, label=peer)
    threads.set_xticks(range(len(names)), names)
    threads.axhline(counts[-1], color="gray", linestyle="--", linewidth=1)
    threads.axhline(1, color="gray", linewidth=1)
    threads.set_ylabel(f"speed with {counts[-1]} threads / with {counts[0]}")
    threads.set_title("Threads (dashed: the ideal)")
    threads.set_ylim(0, 1.35 * counts[-1])  # room for the legend
    for axes, key, label, title in (
        (batch, "batch", "rows of the batch", "Batch: 32–64×4–16"),
        (depth, "depth", "layers", f"Depth: 64 wide, {result['depth']['rows']} rows"),
    ):
        for peer, marker in PEERS.items():
            milliseconds = [1e3 * seconds for seconds in result[key]["curves"][peer]]
            axes.loglog(result[key]["points"], milliseconds, marker=marker, label=peer)
        axes.set_xlabel(label)
        axes.set_ylabel("time of a step (ms)")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    depth.xaxis.set_minor_formatter(NullFormatter())
    depth.set_xticks(result["depth"]["points"], [str(point) for point in result["depth"]["points"]])
    for axes in (threads, batch, depth):
        axes.legend(loc="upper left", ncols=2 if axes is threads else 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints the JSON or writes it, and draws it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="default: 9, or 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="few points and rounds: a look, not a result")
    parser.add_argument("--json", type=Path, help="write the times to this file")
    parser.add_argument("--figure", type=Path, help="where to save the plot")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 9)
    names = ["rl256"] if options.quick else ["rl256", "mnist", "nerf", "tcnn64", "dlrm_bot"]
    rows = [1, 32, 1024] if options.quick else [4**k for k in range(9)]
    layers = [2, 8] if options.quick else [2, 5, 10, 20, 50]
    counts = sorted({1, os.cpu_count() or 1}) if options.quick else list(range(1, (os.cpu_count() or 1) + 1))
    batches = [Workload(f"{n} rows", [32, 64, 64, 64, 64, 16], n) for n in rows]
    depths = [Workload(f"{n} layers", [64] * (n + 1), 256) for n in layers]
    result = {
        "threads": {"counts": counts, "curves": by_threads(load_workloads(names), counts, rounds)},
        "batch": {"points": rows, "curves": curves(batches, rounds)},
        "depth": {"points": layers, "rows": 256, "curves": curves(depths, rounds)},
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text)
    else:
        print(text, end="")
    if options.figure:
        plot(result, options.figure)


if __name__ == "__main__":
    main()
