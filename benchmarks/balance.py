"""How evenly is a training step divided among up to 192 threads? A model: work is counted, and nothing is timed.

    python benchmarks/balance.py                                        (a table)
    python benchmarks/balance.py --json build/balance.json --figure build/balance.png
    python benchmarks/balance.py --before old.json --figure build/balance.png

The passes of csrc/cpu run as they are, on as many threads as asked for, with kernels that count work instead of doing
it; balance.cpp has the costs. The time of a step is the work of the busiest thread from one barrier to the next, and
5 µs for each parallel region. Efficiency is the time of one thread divided by T times that of T threads. The model
leaves out that clock rates fall with the number of busy cores, that cores share bandwidth, and NUMA.

Of the workloads, those with at least 5 GFLOP a step are shown, and the others with as many rows as make 5 GFLOP.
"""

import argparse
import json
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import add_options, save
from training_step import load_workloads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
THREADS = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192]
NAMES = ["rl256", "mnist", "nerf", "tcnn64", "tcnn128", "apex", "dlrm_bot", "dlrm_top"]
LEAST_FLOPS = 5e9
# A region costs two threads 5 µs; 39e9 multiply-adds a second are the peak of a 2.45 GHz core with AVX2.
BARRIER = 5e-6 * 39e9
WAYS = {"drop-in": "model(x), loss, backward()", "loss": "MLP.loss, loss_backward"}
Curves = dict[str, dict[str, list[float]]]  # network, way: the efficiency at each of THREADS


def compile_counter(folder: Path) -> Path:
    """Compiles balance.cpp."""
    program = folder / "balance"
    sources = [ROOT / "benchmarks" / "balance.cpp", ROOT / "csrc" / "cpu" / "pool.cpp"]
    flags = ["-std=c++17", "-O1", f"-I{ROOT / 'tests' / 'csrc' / 'torch_stub'}", "-ldl", "-pthread"]
    subprocess.run([*shlex.split(os.environ.get("CXX", "c++")), *sources, "-o", program, *flags], check=True)
    return program


def efficiencies(program: Path, sizes: list[int], rows: int) -> dict[str, list[float]]:
    """The efficiency of each way at each of THREADS."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for threads in THREADS:
        command = [str(program), str(rows), str(threads), *map(str, sizes)]
        for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
            way, work, regions = line.split()
            times[way].append(float(work) + (threads > 1) * int(regions) * BARRIER)
    return {way: [t[0] / n / each for n, each in zip(THREADS, t, strict=True)] for way, t in times.items()}


def curves() -> Curves:
    """The efficiencies of all networks, by name and number of rows."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        program = compile_counter(Path(folder))
        for workload in load_workloads(NAMES):
            flops = 6 * sum(a * b for a, b in zip(workload.sizes, workload.sizes[1:], strict=False))
            rows = workload.batch
            while flops * rows < LEAST_FLOPS:
                rows *= 2
            result[f"{workload.name}, {rows:,} rows"] = efficiencies(program, workload.sizes, rows)
    return result


def draw(result: dict[str, Any]) -> "Figure":
    """Draws a panel for each way: a line for each network, dotted as it was before."""
    from torch_manualbp.inspection._figure import slide_figure

    ticks = [2, 8, 16, 32, 64, 128, 192]
    with slide_figure(13.33, 6.4) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (way, title) in zip(panels, WAYS.items(), strict=True):
            for i, (name, values) in enumerate(result["curves"].items()):
                axes.plot(result["threads"], values[way], marker="os^vDP*X"[i], label=name)
                if before := result.get("before"):
                    color = axes.lines[-1].get_color()
                    axes.plot(result["threads"], before[name][way], ":", color=color, linewidth=1.5)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.set_ylim(0, 1.02)
            axes.set_xlabel("threads")
            axes.set_title(title)
        panels[0].set_ylabel("efficiency (a model)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main() -> None:
    """Counts, prints a table, and writes what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the JSON of an earlier version, to be drawn as dotted lines")
    add_options(parser)
    options = parser.parse_args()
    result: dict[str, Any] = {"threads": THREADS, "curves": curves()}
    if options.before:
        result["before"] = json.loads(options.before.read_text())["curves"]
    print("| network | way |", *(f"{n} |" for n in THREADS[1:]))
    print("|---|---|" + "--:|" * len(THREADS[1:]))
    for name, values in result["curves"].items():
        for way, title in WAYS.items():
            print(f"| {name} | {title} |", *(f"{value:.2f} |" for value in values[way][1:]))
    save(result, options, draw)


if __name__ == "__main__":
    main()
