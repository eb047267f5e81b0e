"""How fast is a training step? Compares PyTorch eager, torch.compile, JAX and this library with the peak rate.

    python benchmarks/training_step.py --json step.json --markdown step.md
    python benchmarks/training_step.py --quick --workloads toy rl64

A step resets the gradients (sets .grad to None), runs forward and mean squared error against a fixed target, and runs
backward, in float32 and without an optimiser. Peers are timed in rounds: each round times every peer once, starting
with a different one, and gives each a ratio to eager. The median ratio is reported, so a slow period of the machine
affects all peers alike; beside the median time of a step stand the shortest and the longest of the rounds. All peers
share one process except JAX (an optional extra), whose threads would compete with torch's: it runs in a process that is
idle while the others are timed (jax_step.py). The peak is the rate of fused multiply-adds in registers, measured
between the workloads with the same number of threads (fma_peak.cpp).

Before a workload is timed, the gradients of every peer are checked. Part of eager's time on tall batches is page
faults, because glibc returns freed memory to the system; `--keep-memory` makes glibc keep it, for all peers.

peak_memory.py measures memory, scaling.py the scaling with threads, batch and depth. Only the CPU is measured.
"""

import argparse
import contextlib
import copy
import ctypes
import datetime
import gc
import importlib.util
import itertools
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_manualbp as mbp
from torch_manualbp.info import info

HERE = Path(__file__).parent
SAMPLE_SECONDS = 0.03  # a sample lasts at least this long, so that the clock and thread wake-ups hardly count
REFERENCE = "eager"
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}

# ---------------------------------------------------------------------------------------------------------- the peers


@dataclass(frozen=True)
class Step:
    """A training step of one peer."""

    run: Callable[[], object]  # what is timed
    gradients: Callable[[], list[Tensor]]  # of the last run, in the order of nn.Sequential.parameters()
    repeat: Callable[[int], float] | None = None  # the seconds of this many runs, if another process must measure them
    close: Callable[[], object] = lambda: None


AnyStep = TypeVar("AnyStep", bound=Step)


def autograd_step(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Step:
    """A step whose gradients come from `loss().backward()`."""

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        loss().backward()  # type: ignore[no-untyped-call]

    return Step(run, lambda: [parameter.grad for parameter in parameters if parameter.grad is not None])


def eager(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
    """The usual training step in PyTorch."""
    return autograd_step(lambda: F.mse_loss(model(x), target), list(model.parameters()))


def compiled(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
    """torch.compile of the network and the loss with fixed shapes, so that it can fuse as much as possible."""
    torch._dynamo.reset()

    @torch.compile(dynamic=False, fullgraph=True)
    def loss(x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(model(x), target)

    return autograd_step(lambda: loss(x, target), list(model.parameters()))


class JaxProcess:
    """A process of jax_step.py, which answers requests."""

    def __init__(self, kind: str, model: nn.Sequential, **data: Tensor) -> None:
        """Sends the network and the data to the process, and waits until it is ready."""
        arrays = {name: tensor.numpy() for name, tensor in data.items()}
        linears = [layer for layer in model if isinstance(layer, nn.Linear)]
        for k, layer in enumerate(linears):
            arrays |= {f"weight{k}": layer.weight.detach().numpy(), f"bias{k}": layer.bias.detach().numpy()}
        # Use as many threads as torch, which takes NPROC: with one thread, JAX 0.10.2 kept 1.9 CPUs busy under the
        # flags that its issues recommend, and 1.0 with NPROC. The flags are for older versions.
        threads, flags = torch.get_num_threads(), os.environ.get("XLA_FLAGS", "")
        if threads == 1:
            flags += " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(tempfile.TemporaryDirectory())
            np.savez(f"{self._folder}/network.npz", **arrays)  # type: ignore[arg-type]
            self._server = subprocess.Popen(
                [sys.executable, str(HERE / "jax_step.py"), f"{self._folder}/network.npz", kind],
                env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": str(threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            stack.callback(self._server.communicate)
            stack.callback(self._server.kill)  # callbacks run in reverse order
            self._answer()
            self.close = stack.pop_all().close

    def _answer(self) -> str:
        assert self._server.stdout
        if not (line := self._server.stdout.readline()):
            raise RuntimeError(f"jax_step.py ended with exit code {self._server.wait()}")
        return line.strip()

    def ask(self, request: object) -> str:
        """The answer to a request."""
        assert self._server.stdin
        print(request, file=self._server.stdin, flush=True)
        return self._answer()

    def run(self, steps: int) -> float:
        """The seconds of this many steps."""
        return float(self.ask(steps))

    def results(self) -> list[Tensor]:
        """The results of the last step, in the order of nn.Sequential.parameters()."""
        with np.load(self.ask(f"{self._folder}/results.npz")) as file:
            return [torch.from_numpy(array) for array in file.values()]


def jax_jit(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
    """`jax.jit` of the same loss and its gradients, in another process."""
    process = JaxProcess("gradients", model, x=x, target=target)
    return Step(lambda: process.run(1), process.results, process.run, process.close)


def as_mlp(model: nn.Sequential, activations: Literal["store", "recompute"] = "store") -> mbp.MLP:
    """An `mbp.MLP` with the same sizes and parameter values."""
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    mlp = mbp.MLP([linears[0].in_features, *(layer.out_features for layer in linears)], activations=activations)
    mlp.to(linears[0].weight)
    mlp.load_state_dict(model.state_dict())
    return mlp


def drop_in(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
    """The same program with `mbp.MLP` as a drop-in for the nn.Sequential."""
    mlp = as_mlp(model)
    return autograd_step(lambda: F.mse_loss(mlp(x), target), list(mlp.parameters()))


def recompute(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
    """`mbp.MLP` that recomputes the activations in backward, which saves memory and costs time."""
    mlp = as_mlp(model, "recompute")
    return autograd_step(lambda: F.mse_loss(mlp(x), target), list(mlp.parameters()))


def one_pass(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
    """`MLP.loss`: forward, loss and backward in one pass over the batch."""
    mlp = as_mlp(model)
    return autograd_step(lambda: mlp.loss(x, target), list(mlp.parameters()))


def by_hand(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
    """`MLP.loss_backward`: the same pass without an autograd graph."""
    mlp = as_mlp(model)
    parameters = list(mlp.parameters())

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        mlp.loss_backward(x, target)

    return Step(run, lambda: [parameter.grad for parameter in parameters if parameter.grad is not None])


# Builds a peer's step from its own copy of the network, an input (B, D_in) and a target (B, D_out).
Builder = Callable[[nn.Sequential, Tensor, Tensor], Step]

PEERS: dict[str, Builder] = {
    REFERENCE: eager,
    "torch.compile": compiled,
    "JAX jit": jax_jit,
    "mbp.MLP": drop_in,
    "recompute": recompute,
    "MLP.loss": one_pass,
    "loss_backward": by_hand,
}

COMPILERS = ("torch.compile", "JAX jit")


def available_peers(compilers: bool) -> list[str]:
    """The peers to measure: all, or all that compile nothing."""
    has_jax = importlib.util.find_spec("jax") is not None
    if compilers and not has_jax:
        sys.stderr.write("JAX is not installed (pip install jax): its column is left out\n")
    return [peer for peer in PEERS if (compilers or peer not in COMPILERS) and (has_jax or peer != "JAX jit")]


# ------------------------------------------------------------------------------------------------------ the workloads


@dataclass(frozen=True)
class Workload:
    """A network and a batch size."""

    name: str
    sizes: list[int]
    batch: int

    @property
    def flops(self) -> int:
        """Operations of a step: 2·B·in·out per layer for each of f_k, ∂ℓ/∂Ω_k and (except for k = 0) ∂ℓ/∂h_k."""
        layers = [d_in * d_out for d_in, d_out in pairwise(self.sizes)]
        return 6 * self.batch * sum(layers) - 2 * self.batch * layers[0]

    def build(self) -> tuple[nn.Sequential, Tensor, Tensor]:
        """The network with PyTorch's initialisation, an input (B, D_in) and a target (B, D_out), from a fixed seed."""
        torch.manual_seed(8)  # the first seed with which gradients pass through the toy network, one unit wide
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(self.sizes):
            layers += [nn.Linear(d_in, d_out), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        x = torch.randn(self.batch, self.sizes[0])
        target = torch.randn(self.batch, self.sizes[-1])
        safe = _without_flips(model, x)
        x[~safe] = x[safe][0]
        return model, x, target


@torch.no_grad()
def _without_flips(model: nn.Sequential, x: Tensor) -> Tensor:
    """Which examples (B,) have no pre-activation so close to zero that float32 rounding may switch a ReLU.

    Such a switch adds or removes the gradient of a whole example, which no tolerance could distinguish from an error.
    Pre-activations are about 0.1 to 1 here and their rounding errors about 1e-7.
    """
    safe = torch.ones(len(x), dtype=torch.bool)
    h = x.double()
    for layer in copy.deepcopy(model).double():
        if isinstance(layer, nn.ReLU):
            safe &= (h.abs() > 1e-6).all(1)
        h = layer(h)
    return safe


def load_workloads(names: Sequence[str] | None = None) -> list[Workload]:
    """All workloads of workloads.json, or the named ones."""
    table = json.loads((HERE / "workloads.json").read_text())
    for name in names or ():
        if name not in table:
            raise SystemExit(f"no workload is called {name!r}; there are: {', '.join(table)}")
    return [Workload(name, table[name]["sizes"], table[name]["batch"]) for name in names or table]


# --------------------------------------------------------------------------------------------------------- correctness


class GradientCheck:
    """Compares the gradients of a float32 step with eager's in float64, relative to the largest element."""

    tolerance = 1e-4  # rounding gives 1e-6 on the deepest network

    def __init__(self, model: nn.Sequential, x: Tensor, target: Tensor) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        reference = eager(copy.deepcopy(model).double(), x.double(), target.double())
        reference.run()
        self.expected = reference.gradients()

    def __call__(self, peer: str, step: Step) -> None:
        """Ends the program if a gradient is wrong, because timing a wrong result is pointless."""
        step.run()
        for name, actual, expected in zip(self.names, step.gradients(), self.expected, strict=True):
            error = float((actual.double() - expected).abs().max() / expected.abs().max())
            if not error <= self.tolerance:  # NaN is wrong too
                raise SystemExit(
                    f"{peer}: the gradient of {name} is off by {error:.1e} (allowed: {self.tolerance:.0e})"
                )


# ------------------------------------------------------------------------------------------------------------- timing


@dataclass
class Timing:
    """The measurements of one peer on one workload."""

    repetitions: int = 0  # steps per sample
    seconds: list[float] = field(default_factory=list)  # per step, one value per round
    speedups: list[float] = field(default_factory=list)  # eager's time / this peer's time, one value per round
    error: str = ""

    @property
    def speedup(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.speedups)

    @property
    def median_seconds(self) -> float:
        """The median time of a step."""
        return statistics.median(self.seconds)


def sample(step: Step, repetitions: int) -> float:
    """Seconds per step, after one step that refills the caches."""
    step.run()
    if step.repeat:
        return step.repeat(repetitions) / repetitions
    start = time.perf_counter()
    for _ in range(repetitions):
        step.run()
    return (time.perf_counter() - start) / repetitions


def repetitions_for(step: Step, seconds: float) -> int:
    """The number of steps for which a sample lasts this many seconds."""
    repetitions = 1
    while (elapsed := sample(step, repetitions) * repetitions) < seconds:
        repetitions = math.ceil(1.2 * repetitions * seconds / elapsed)
    return repetitions


def one_round(
    steps: Mapping[str, Step], timings: Mapping[str, Timing], sample: Callable[[Step, int], float] = sample
) -> None:
    """Times each step once, starting with a different one each round; speeds are relative to the first peer."""
    peers = list(steps)
    first = len(timings[peers[0]].seconds) % len(peers)
    for peer in peers[first:] + peers[:first]:
        timings[peer].seconds.append(sample(steps[peer], timings[peer].repetitions))
    for peer in peers:
        timings[peer].speedups.append(timings[peers[0]].seconds[-1] / timings[peer].seconds[-1])


def measure(
    workload: Workload,
    peers: Sequence[str],
    rounds: int,
    builders: Mapping[str, Builder] = PEERS,
    check: type[GradientCheck] = GradientCheck,
) -> dict[str, Timing]:
    """Checks the peers, eager first, then times them in rounds."""
    model, x, target = workload.build()
    steps = {peer: partial(builders[peer], copy.deepcopy(model), x, target) for peer in peers}
    return measure_steps(steps, check(model, x, target), rounds)


def measure_steps(
    builders: Mapping[str, Callable[[], AnyStep]], check: Callable[[str, AnyStep], None], rounds: int
) -> dict[str, Timing]:
    """Builds and checks the steps, the reference first, then times them in rounds."""
    timings = {peer: Timing() for peer in builders}
    with contextlib.ExitStack() as stack:
        steps: dict[str, AnyStep] = {}
        for peer, build in builders.items():
            try:
                step = build()
                stack.callback(step.close)
                check(peer, step)
            except Exception as error:  # if a compiler is missing or fails, measure the others
                timings[peer].error = f"{type(error).__name__}: {error}"
                continue
            timings[peer].repetitions = repetitions_for(step, SAMPLE_SECONDS)
            steps[peer] = step
        gc.collect()
        gc.disable()
        for _ in range(rounds):
            one_round(steps, timings)
        gc.enable()
    return timings


# ----------------------------------------------------------------------------------------------------------- the peak


class FmaPeak:
    """The peak rate of fused multiply-adds per instruction set: the highest GFLOP/s of all threads measured so far."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.threads = threads
        self.gflops: dict[str, float] = {}
        compilers = [shlex.split(os.environ.get("CXX", "")), ["g++"], ["clang++"], ["c++"]]
        compiler = next((words for words in compilers if words and shutil.which(words[0])), [])
        library = str(folder / "fma_peak.so")
        flags = ["-O3", "-ffp-contract=fast", "-shared", "-fPIC", "-o", library, str(HERE / "fma_peak.cpp")]
        if not compiler or subprocess.run([*compiler, *flags], capture_output=True, check=False).returncode != 0:
            self._measure = None
            return
        peak = ctypes.CDLL(library)
        peak.fma_peak_level.restype = ctypes.c_char_p
        names = map(peak.fma_peak_level, itertools.count())
        self._levels = [name.decode() for name in itertools.takewhile(bool, names)]
        self._measure = peak.fma_peak_gflops
        self._measure.restype, self._measure.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_double]

    def update(self) -> None:
        """Measures again, because the load on a shared machine varies."""
        if self._measure is None:
            return
        seconds = 0.05
        for number, level in [*enumerate(self._levels)] * 4:
            with ThreadPoolExecutor(self.threads) as pool:  # ctypes releases the GIL
                gflops = sum(pool.map(self._measure, [number] * self.threads, [seconds] * self.threads))
            if gflops > 0:  # 0 if the CPU lacks this instruction set
                self.gflops[level] = max(gflops, self.gflops.get(level, 0))

    @property
    def limit(self) -> float | None:
        """The highest rate of all instruction sets; None if it could not be measured."""
        return max(self.gflops.values(), default=None)

    def __str__(self) -> str:
        if not self.gflops:
            return "not measured (no C++ compiler found)"
        return ", ".join(f"{rate:.0f} GFLOP/s ({level})" for level, rate in self.gflops.items())


# --------------------------------------------------------------------------------------------------------- the report


def geometric_mean(timings: Sequence[Timing]) -> float | None:
    """The geometric mean of the median speedups; None if a workload failed, as means over fewer rows do not compare."""
    if any(timing.error for timing in timings):
        return None
    return statistics.geometric_mean([timing.speedup for timing in timings])


def table(results: dict[str, dict[str, Timing]], workloads: Sequence[Workload], limit: float | None) -> str:
    """An aligned Markdown table with one row per workload."""
    peers = list(next(iter(results.values())))
    rows = [["workload", *peers]]
    for workload in workloads:
        row = [workload.name]
        for timing in results[workload.name].values():
            if timing.error:
                row.append("failed")
                continue
            gflops = workload.flops / timing.median_seconds * 1e-9
            share = f"{gflops / limit:6.1%}" if limit else "     –"
            shortest, longest = min(timing.seconds) * 1e3, max(timing.seconds) * 1e3
            times = f"{timing.median_seconds * 1e3:9.3f} ms ({shortest:8.3f} to {longest:8.3f})"
            row.append(f"{timing.speedup:5.2f}× {times} {gflops:8.2f} {share}")
        rows.append(row)
    means = [geometric_mean([results[workload.name][peer] for workload in workloads]) for peer in peers]
    rows.append(["geometric mean", *("–" if mean is None else f"{mean:5.2f}×" for mean in means)])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; the first row is its header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def environment(load: float) -> dict[str, str]:
    """The machine, the software and the settings."""
    facts = info()
    settings = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("MALLOC_", "OMP_", "KMP_", "MKL_", "MANUALBP_", "XLA_"))
        or name in ("LD_PRELOAD", "ATEN_CPU_CAPABILITY")
    }
    return {
        "machine": f"{facts['cpu']}, {facts['threads']} of {os.cpu_count()} CPUs used, {facts['platform']}",
        "instruction set": facts["instruction set"],
        "software": f"torch {facts['torch']}, torch_manualbp {facts['torch_manualbp']}, Python {facts['python']}",
        "load at the start": f"{load:.1f} processes" + (" (the machine was busy: expect noise)" if load > 0.5 else ""),
        "environment": " ".join(f"{name}={value}" for name, value in settings.items()) or "defaults",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def about_jax(peers: Sequence[str]) -> dict[str, str]:
    """JAX's version, or a note that it is not installed if compilers were requested."""
    if "JAX jit" in peers:
        return {"JAX": version("jax")}
    return {"JAX": "not installed, left out"} if set(COMPILERS) & set(peers) else {}


def as_json(
    results: dict[str, dict[str, Timing]], workloads: Sequence[Workload], peak: FmaPeak, header: dict[str, str]
) -> dict[str, Any]:
    """All measurements, including the raw samples."""
    peers = list(next(iter(results.values())))
    return {
        "header": header,
        "fma_peak_gflops": peak.gflops or None,
        "workloads": {
            workload.name: {
                "sizes": workload.sizes,
                "batch": workload.batch,
                "flops": workload.flops,
                "peers": {
                    peer: {"error": timing.error}
                    if timing.error
                    else {
                        "speedup": timing.speedup,
                        "median_seconds": timing.median_seconds,
                        "shortest_and_longest_seconds": [min(timing.seconds), max(timing.seconds)],
                        "gflops": workload.flops / timing.median_seconds * 1e-9,
                        "repetitions": timing.repetitions,
                        "seconds": timing.seconds,
                    }
                    for peer, timing in results[workload.name].items()
                },
            }
            for workload in workloads
        },
        "geometric_mean": {
            peer: geometric_mean([results[workload.name][peer] for workload in workloads]) for peer in peers
        },
    }


def arguments(description: str) -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help="some of the networks (default: all)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, help="default: 31, or 5 with --quick")
    parser.add_argument("--quick", action="store_true", help="few rounds without compilers, for a first impression")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile and JAX out")
    parser.add_argument("--keep-memory", action="store_true", help="malloc never returns memory to the system")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--markdown", type=Path, help="also write the output to this file")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line, and checks it before the work, not after it."""
    args = parser.parse_args()
    args.rounds = args.rounds if args.rounds is not None else 5 if args.quick else 31
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    for path in filter(None, (args.json, args.markdown)):
        path.parent.mkdir(parents=True, exist_ok=True)
    return args


@contextlib.contextmanager
def prepared(args: argparse.Namespace) -> Iterator[FmaPeak]:
    """Sets malloc, threads and compiler up as the arguments ask for."""
    if args.keep_memory and not KEEP_MEMORY.items() <= os.environ.items():  # read by malloc when the process starts
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **KEEP_MEMORY})
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # start with an empty cache and leave none behind
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no compiler pool during the measurement
        yield FmaPeak(Path(folder), torch.get_num_threads())


def report_failures(workload: str, timings: Mapping[str, Timing]) -> None:
    """Prints the errors of peers that failed."""
    for peer, timing in timings.items():
        if timing.error:
            sys.stderr.write(f"{workload}: {peer} failed: {timing.error}\n")


def write(header: Mapping[str, str], body: Sequence[str], samples: object, args: argparse.Namespace) -> None:
    """Prints the header and the body, and writes the files that the arguments name."""
    text = "\n".join([*(f"- {name}: {value}" for name, value in header.items()), "", *body]) + "\n"
    sys.stdout.write(text)
    if args.markdown:
        args.markdown.write_text(text)
    if args.json:
        args.json.write_text(json.dumps(samples, indent=1) + "\n")


def main() -> None:
    """Measures, prints the table and writes the files."""
    args = parse(arguments("Times a training step of ReLU networks and compares peers."))
    load = os.getloadavg()[0]  # the mean number of running processes over the last minute
    workloads = load_workloads(args.workloads)
    peers = available_peers(compilers=not (args.quick or args.no_compile))
    results: dict[str, dict[str, Timing]] = {}
    with prepared(args) as peak:
        for workload in workloads:
            peak.update()
            sys.stderr.write(f"{workload.name}: {args.rounds} rounds of {', '.join(peers)}\n")
            results[workload.name] = measure(workload, peers, args.rounds)
            report_failures(workload.name, results[workload.name])
        peak.update()
    header = {
        **environment(load),
        "FMA peak": str(peak),
        **about_jax(peers),
        "command": shlex.join(["python", *sys.argv]),
        "rounds": str(args.rounds),
    }
    legend = (
        f"Speed relative to {REFERENCE} (median of the rounds), time of a step (median; shortest to longest round), "
        "GFLOP/s, share of the FMA peak:"
    )
    body = [legend, "", table(results, workloads, peak.limit)]
    write(header, body, as_json(results, workloads, peak, header), args)


if __name__ == "__main__":
    main()
