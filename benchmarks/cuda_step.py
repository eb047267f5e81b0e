"""How fast is a training step on a GPU? Compares eager, torch.compile and this library, in three dtypes.

    python benchmarks/cuda_step.py --json build/gpu/step.json --markdown build/gpu/step.md
    python benchmarks/cuda_step.py --device cpu --quick     (tries the program out: says nothing about a GPU)

The peers and the rounds are those of training_step.py. A sample is a number of steps between two synchronisations with
the device. Two more peers: our narrow kernels (MANUALBP_CUDA_NARROW=1), and a step that was captured in a CUDA graph.

Before a network is timed, the gradients of every peer are compared with float64: their error must be at most three
times that of eager in the same dtype.
"""

import argparse
import copy
import datetime
import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_manualbp.info import info
from training_step import (
    PEERS,
    REFERENCE,
    Step,
    Timing,
    Workload,
    aligned,
    as_mlp,
    eager,
    measure_steps,
    parse,
    report_failures,
    write,
)

WIDTHS = {64: 65536, 128: 65536, 256: 16384, 512: 8192, 1024: 4096}  # and rows
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NARROW = "MANUALBP_CUDA_NARROW"  # read at each call


def captured(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
    """A step of an `mbp.MLP` as one CUDA graph, captured after three steps on a stream beside."""
    mlp = as_mlp(model)

    def step() -> None:
        F.mse_loss(mlp(x), target).backward()  # type: ignore[no-untyped-call]

    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            mlp.zero_grad()
            step()
    torch.cuda.current_stream().wait_stream(beside)
    mlp.zero_grad()  # so that the graph allocates the gradients
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return Step(graph.replay, lambda: [p.grad for p in mlp.parameters() if p.grad is not None])


def on_device(step: Step, narrow: bool, synchronize: Callable[[], object]) -> Step:
    """The same step, timed between two synchronisations, with the narrow kernels or without them."""

    def run() -> None:
        os.environ[NARROW] = str(int(narrow))
        step.run()

    def repeat(steps: int) -> float:
        os.environ[NARROW] = str(int(narrow))
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step.run()
        synchronize()
        return time.perf_counter() - start

    return Step(run, step.gradients, repeat, step.close)


class Check:
    """Compares gradients with float64's; the first step that it sees, eager's, sets the error that is allowed."""

    def __init__(self, model: nn.Sequential, x: Tensor, target: Tensor) -> None:
        reference = eager(copy.deepcopy(model).double(), x.double(), target.double())
        reference.run()
        self.expected = reference.gradients()
        self.allowed: float | None = None

    def __call__(self, peer: str, step: Step) -> None:
        """Ends the program if a gradient is wrong."""
        step.run()
        pairs = zip(step.gradients(), self.expected, strict=True)
        error = max(float((actual.double() - wanted).norm() / wanted.norm()) for actual, wanted in pairs)
        if self.allowed is None:
            self.allowed = max(3 * error, 1e-5)
        if not error <= self.allowed:  # NaN is wrong too
            raise SystemExit(f"{peer}: the gradients are off by {error:.1e} (allowed: {self.allowed:.1e})")


def measure(
    workload: Workload, dtype: torch.dtype, device: torch.device, peers: list[str], rounds: int
) -> dict[str, Timing]:
    """Checks the peers, eager first, then times them in rounds."""
    model, x, target = workload.build()
    model, x, target = model.to(device, dtype), x.to(device, dtype), target.to(device, dtype)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def build(peer: str) -> Step:
        builder = captured if peer == "CUDA graph" else PEERS["mbp.MLP" if peer == "narrow" else peer]
        return on_device(builder(copy.deepcopy(model), x, target), peer == "narrow", synchronize)

    return measure_steps({peer: partial(build, peer) for peer in peers}, Check(model, x, target), rounds)


def main() -> None:
    """Measures, prints the table and writes the files."""
    parser = argparse.ArgumentParser(description="Times a training step of ReLU networks on a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, help="default: 31, or 5 with --quick")
    parser.add_argument("--quick", action="store_true", help="one width, 256 rows, no compiler")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--markdown", type=Path, help="also write the output to this file")
    args = parse(parser)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no GPU (--device cpu tries the program out)")
    peers = [REFERENCE, *([] if args.quick else ["torch.compile"]), "mbp.MLP", "MLP.loss", "loss_backward"]
    peers += ["narrow", "CUDA graph"] if on_gpu else []
    rows, samples = [["network", "rows", "dtype", *peers]], []
    for width in (64,) if args.quick else WIDTHS:
        workload = Workload(str(width), [width] * 5, 256 if args.quick else WIDTHS[width])
        for name, dtype in DTYPES.items():
            sys.stderr.write(f"{width} wide, {name}: {args.rounds} rounds of {', '.join(peers)}\n")
            wanted = [peer for peer in peers if peer != "narrow" or width <= 128]
            timings = measure(workload, dtype, device, wanted, args.rounds)
            report_failures(f"{width} wide, {name}", timings)
            cells = ["–" if peer not in timings else text(timings[peer]) for peer in peers]
            rows.append([f"{width}×5", f"{workload.batch:,}", name, *cells])
            samples += [
                {
                    "width": width,
                    "rows": workload.batch,
                    "dtype": name,
                    "peer": peer,
                    "error": each.error,
                    "seconds": each.seconds,
                }
                for peer, each in timings.items()
            ]
    facts = info()
    header = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU: this rehearsal says nothing about a GPU",
        "software": f"torch {facts['torch']}, torch_manualbp {facts['torch_manualbp']}, Python {facts['python']}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.argv]),
        "rounds": str(args.rounds),
    }
    write(
        header,
        ["Speed relative to eager (median of the rounds) and median time of a step:", "", aligned(rows)],
        samples,
        args,
    )


def text(timing: Timing) -> str:
    """A cell of the table."""
    return "failed" if timing.error else f"{timing.speedup:5.2f}× {timing.median_seconds * 1e6:9.1f} µs"


if __name__ == "__main__":
    main()
