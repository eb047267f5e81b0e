"""How fast is training in half precision? Steps under autocast, or of a model in half precision, beside eager's.

    python benchmarks/half_precision.py --rounds 5                      (autocast to bfloat16; 20 minutes with AVX2)
    python benchmarks/half_precision.py --mode bfloat16 --workloads rl64 rl256
    python benchmarks/half_precision.py --mode float16-autocast --quick

Steps, rounds and ratios are those of training_step.py, whose peers run under autocast, or with model, input and target
in half precision. One more column, "float32", is the drop-in without either: what half precision gains or costs on this
machine. Where the CPU has no instructions for half precision, eager converts number by number, and takes up to 30 times
as long as in float32.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from training_step import (
    Builder,
    GradientCheck,
    Step,
    arguments,
    as_json,
    by_hand,
    drop_in,
    eager,
    environment,
    load_workloads,
    measure,
    one_pass,
    parse,
    prepared,
    report_failures,
    table,
    write,
)

MODES = ("bfloat16-autocast", "float16-autocast", "bfloat16", "float16")
PEERS: dict[str, Builder] = {"eager": eager, "mbp.MLP": drop_in, "MLP.loss": one_pass, "loss_backward": by_hand}


class RoughCheck(GradientCheck):
    """Finds gradients that are wrong, not those that are rounded."""

    tolerance = 0.75  # rounding gives 0.3 in the lowest layers of the deepest network


def under_autocast(dtype: torch.dtype, build: Builder) -> Builder:
    """A peer whose forward and loss run under autocast."""

    def built(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
        step = build(model, x, target)
        autocast = partial(torch.autocast, "cpu", dtype)
        return Step(lambda: _within(autocast, step.run), step.gradients)

    return built


def _within(context: Callable[[], torch.autocast], run: Callable[[], object]) -> None:
    with context():
        run()


def in_dtype(dtype: torch.dtype, build: Builder) -> Builder:
    """A peer with model, input and target in half precision."""
    return lambda model, x, target: build(model.to(dtype), x.to(dtype), target.to(dtype))


def builders(mode: str) -> dict[str, Builder]:
    """The peers in this mode, and the drop-in in float32."""
    dtype: torch.dtype = getattr(torch, mode.removesuffix("-autocast"))
    change = under_autocast if mode.endswith("autocast") else in_dtype
    return {**{peer: change(dtype, build) for peer, build in PEERS.items()}, "float32": drop_in}


def options() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = arguments("Times training steps in half precision and compares them with eager.")
    parser.add_argument("--mode", choices=MODES, default=MODES[0])
    return parser


def main() -> None:
    """Measures, prints the table and writes the files."""
    args = parse(options())
    load = os.getloadavg()[0]
    workloads = load_workloads(args.workloads)
    peers = builders(args.mode)
    results = {}
    with prepared(args) as peak:
        for workload in workloads:
            sys.stderr.write(f"{workload.name}: {args.rounds} rounds of {', '.join(peers)}\n")
            results[workload.name] = measure(workload, list(peers), args.rounds, peers, RoughCheck)
            report_failures(workload.name, results[workload.name])
    command = shlex.join(["python", *sys.argv])
    header = {**environment(load), "mode": args.mode, "command": command, "rounds": str(args.rounds)}
    legend = (
        "Speed relative to eager in the same mode (median of the rounds), time of a step (median; shortest to longest "
        "round), GFLOP/s:"
    )
    body = [legend, "", table(results, workloads, None)]
    write(header, body, as_json(results, workloads, peak, header), args)


if __name__ == "__main__":
    main()
