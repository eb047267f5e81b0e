"""What does a small call cost? Compares plain PyTorch with this library, in a tight loop and cold, after other work.

    python benchmarks/small_calls.py --json calls.json --markdown calls.md
    python benchmarks/small_calls.py --quick --groups lone call --modes cold
    PYTHONPATH=. python benchmarks/small_calls.py --against ../old      # two checkouts, in processes that alternate

A tight loop repeats a single call, so caches and branch predictors are warm. In real programs they are not, so a cold
call is timed individually, after a step of an environment in Python, a distribution, some numpy, and writing half a
mebibyte of memory. A rollout step includes such work and is timed as a whole.

The peers alternate as in training_step.py. Speeds are relative to plain PyTorch: the median of the rounds' ratios, with
their middle half in brackets. Before a case is timed, the results of all peers are compared with those of plain.

training_step.py covers large batches, compilers and the limit of the machine.
"""

import argparse
import copy
import gc
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

import torch_manualbp as mbp
from training_step import (
    Builder,
    Step,
    Timing,
    aligned,
    autograd_step,
    by_hand,
    drop_in,
    eager,
    environment,
    load_workloads,
    one_round,
    repetitions_for,
    sample,
)

PLAIN = "plain"
SAMPLE_SECONDS = 0.005  # per sample of a tight loop: short, so that other load disturbs only a few rounds
COLD_CALLS = 25  # per sample
BUFFER_BYTES = 512 * 1024  # written between cold calls: exceeds a first-level cache, fills much of a second-level one
PASSES = 4  # processes per checkout with --against: small calls depend on a process's memory layout

# ----------------------------------------------------------------------------------------------------- the other work


class CartPole:
    """The cart-pole task (Barto, Sutton and Anderson, 1983) in plain Python, like many environments."""

    def __init__(self) -> None:
        self.random = random.Random(8)
        self.reset()

    def reset(self) -> None:
        """Starts an episode near the upright position."""
        self.state = [self.random.uniform(-0.05, 0.05) for _ in range(4)]
        self.steps = 0

    def step(self, action: int) -> tuple[list[float], float, bool]:
        """Pushes left or right for 0.02 s; returns the new state, the reward, and whether the episode is over."""
        position, velocity, angle, rate = self.state
        cosine, sine = math.cos(angle), math.sin(angle)
        push = ((10.0 if action else -10.0) + 0.05 * rate * rate * sine) / 1.1
        turn = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine * cosine / 1.1))
        self.state = [
            position + 0.02 * velocity,
            velocity + 0.02 * (push - 0.05 * turn * cosine / 1.1),
            angle + 0.02 * rate,
            rate + 0.02 * turn,
        ]
        self.steps += 1
        over = abs(self.state[0]) > 2.4 or abs(self.state[2]) > 0.2095 or self.steps == 500
        if over:
            self.reset()
        return self.state, 1.0, over


class OtherWork:
    """Typical work of a program between two calls of a network."""

    def __init__(self) -> None:
        self.cart_pole = CartPole()
        self.logits = torch.zeros(1, 2)
        self.mean = np.zeros(4)
        self.buffer = np.zeros(BUFFER_BYTES // 8)

    def __call__(self) -> None:
        """Does this work once."""
        distribution = Categorical(logits=self.logits)
        action = distribution.sample()  # type: ignore[no-untyped-call]
        distribution.log_prob(action)  # type: ignore[no-untyped-call]
        state, reward, _ = self.cart_pole.step(int(action))
        self.mean += 0.01 * (np.asarray(state) - self.mean)
        self.buffer += reward


OTHER_WORK = OtherWork()


def tight(step: Step, repetitions: int) -> float:
    """Seconds per call: the mean of consecutive calls, after a warm-up."""
    for _ in range(repetitions // 4):
        step.run()
    return sample(step, repetitions)


def nothing() -> None:
    """No other work, for calls that include it."""


def cold(other_work: Callable[[], None], step: Step, repetitions: int) -> float:
    """Seconds per call: the median of calls that each follow other work."""
    seconds = []
    for _ in range(repetitions):
        other_work()
        start = time.perf_counter()
        step.run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# --------------------------------------------------------------------------------------------------------- the calls


def relu(_: int) -> nn.Module:
    """A ReLU of any width, for `network`."""
    return nn.ReLU()


def network(
    sizes: Sequence[int], between: Sequence[Callable[[int], nn.Module]] = (relu,), closed: bool = False
) -> nn.Sequential:
    """Linear layers, each followed by the modules that `between` makes for its width, the last only if `closed`."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        layers += [nn.Linear(d_in, d_out), *(make(d_out) for make in between)]
    return nn.Sequential(*(layers if closed else layers[: -len(between)]))


class ActorCritic(nn.Module):
    """Two networks, each with a head, like the policies of stable-baselines3."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.policy, self.value = network(sizes, closed=True), network(sizes, closed=True)
        self.action_head, self.value_head = nn.Linear(sizes[-1], 2), nn.Linear(sizes[-1], 1)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits of the two actions and the value."""
        return self.action_head(self.policy(state)), self.value_head(self.value(state))


def rollout(model: nn.Module, x: Tensor, _: Tensor) -> Step:
    """A rollout step of PPO: both networks, an action, a step of the environment, and recording the experience."""
    cart_pole = CartPole()
    kept, steps = np.zeros((2048, 8), np.float32), 0

    def run() -> None:
        nonlocal steps
        state = np.asarray(cart_pole.state, np.float32)
        with torch.no_grad():
            logits, value = model(torch.as_tensor(state).unsqueeze(0))
            distribution = Categorical(logits=logits)
            action = distribution.sample()  # type: ignore[no-untyped-call]
            log_prob = distribution.log_prob(action)  # type: ignore[no-untyped-call]
        chosen = int(action)
        _, reward, _ = cart_pole.step(chosen)
        row = kept[steps % len(kept)]
        row[:4] = state
        row[4:] = chosen, reward, float(value), float(log_prob)
        steps += 1

    return Step(run, lambda: list(model(x)))


def forward(model: nn.Module, x: Tensor, _: Tensor) -> Step:
    """Only the call of the network; its autograd graph is dropped."""
    return Step(lambda: model(x), lambda: [model(x)])


def gradient_penalty(model: nn.Module, x: Tensor, target: Tensor) -> Step:
    """The gradients of the penalty (‖∂f/∂x‖ - 1)² on a critic."""
    x = x.clone().requires_grad_()

    def loss() -> Tensor:
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        penalty: Tensor = (gradient.norm(dim=1) - 1) ** 2
        return penalty.mean()

    return _critic_step(model, loss)


def critic_step(model: nn.Module, x: Tensor, target: Tensor) -> Step:
    """The gradients of a critic's loss with the penalty."""
    x = x.clone().requires_grad_()

    def loss() -> Tensor:
        output = model(x)
        (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        penalised: Tensor = output.mean() + 10 * ((gradient.norm(dim=1) - 1) ** 2).mean()
        return penalised

    return _critic_step(model, loss)


def autograd_grad(model: nn.Module, x: Tensor, target: Tensor) -> Step:
    """The gradients of the parameters by ``torch.autograd.grad``."""
    parameters = list(model.parameters())

    def run() -> list[Tensor]:
        return list(torch.autograd.grad(F.mse_loss(model(x), target), parameters))

    return Step(lambda: run(), run)


def hessian_product(model: nn.Module, x: Tensor, target: Tensor) -> Step:
    """The Hessian of the loss times a vector of ones."""
    parameters = list(model.parameters())
    ones = [torch.ones_like(parameter) for parameter in parameters]

    def run() -> list[Tensor]:
        gradients = torch.autograd.grad(F.mse_loss(model(x), target), parameters, create_graph=True)
        return list(torch.autograd.grad(gradients, parameters, ones))

    return Step(lambda: run(), run)


def _critic_step(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """The last bias may have no gradient."""
    step = autograd_step(loss, list(model.parameters()))
    return Step(step.run, lambda: [each.grad for each in model.parameters() if each.grad is not None])


def autocast(model: nn.Module, x: Tensor, target: Tensor) -> Step:
    """A training step in mixed precision."""

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.mse_loss(model(x), target)

    return autograd_step(loss, list(model.parameters()))


def linear_relu(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
    """A training step of a `LinearReLU` that replaces [Linear, ReLU]."""
    layer = mbp.LinearReLU(x.shape[1], target.shape[1])
    layer.load_state_dict(model[0].state_dict())
    return autograd_step(lambda: F.mse_loss(layer(x), target), list(layer.parameters()))


def fuse(build: Callable[..., Step]) -> dict[str, Builder]:
    """A program, unchanged and after `mbp.fuse`."""
    return {PLAIN: build, "fuse": lambda model, x, target: build(mbp.fuse(model), x, target)}


@dataclass(frozen=True)
class Case:
    """A network, an input, and the operation to time."""

    group: str
    name: str
    sizes: Sequence[int]
    rows: int
    peers: Mapping[str, Builder]  # plain PyTorch first
    make: Callable[[Sequence[int]], nn.Module] = network
    training: bool = True
    graph: bool = True  # whether operations are recorded for a backward pass
    modes: Sequence[str] = ("tight", "cold")
    other_work: Callable[[], None] = OTHER_WORK  # before each cold call
    tolerance: float = 1e-3  # of ‖got - want‖ / ‖want‖: above a ReLU switched by rounding, below a mistake

    def steps(self) -> dict[str, Step]:
        """The checked step of each peer, on its own copy of the network."""
        torch.manual_seed(8)  # the first seed with which gradients pass through the toy network, one unit wide
        model: Any = self.make(self.sizes).train(self.training)
        x, target = torch.randn(self.rows, self.sizes[0]), torch.randn(self.rows, self.sizes[-1])
        steps: dict[str, Step] = {}
        results: dict[str, Tensor] = {}
        for peer, build in self.peers.items():
            steps[peer] = build(copy.deepcopy(model), x, target)
            torch.manual_seed(8)  # so that all peers drop the same units
            steps[peer].run()
            results[peer] = torch.cat([result.detach().flatten() for result in steps[peer].gradients()])
            error = float((results[peer] - results[PLAIN]).norm() / results[PLAIN].norm())
            if not error <= self.tolerance:  # NaN is wrong too
                raise SystemExit(
                    f"{self.group}, {self.name}, {self.rows} rows: {peer} is off by {error:.1e} "
                    f"(allowed: {self.tolerance:.0e})"
                )
        return steps


def cases() -> Iterator[Case]:
    """Yields all cases, group by group."""
    nets = {workload.name: workload.sizes for workload in load_workloads()}
    critic = [64, 256, 256, 1]

    ours = {**fuse(eager), "mbp.MLP": drop_in, "loss_backward": by_hand}
    for name, rows in (("toy", 1), ("rl64", 1), ("rl64", 64)):
        yield Case("training", name, nets[name], rows, ours)

    ours = {**fuse(eager), "LinearReLU": linear_relu}
    for rows in (1, 2, 64):
        yield Case("lone", "4-64", [4, 64], rows, ours, partial(network, closed=True))

    make = partial(network, between=[relu, lambda _: nn.Dropout(0.1)])
    for rows in (1, 64):
        yield Case("dropout", "20-64-64-3", [20, 64, 64, 3], rows, fuse(eager), make)

    layers: dict[str, list[Callable[[int], nn.Module]]] = {
        "Tanh": [lambda _: nn.Tanh()],
        "BatchNorm": [nn.BatchNorm1d, relu],
    }
    for name, between in layers.items():
        make = partial(network, between=between)
        for rows in (1, 64):
            if name != "BatchNorm" or rows > 1:  # one row has no variance
                yield Case("unfusable", f"8-64-64-2, {name}", [8, 64, 64, 2], rows, fuse(eager), make)
            inference = f"8-64-64-2, {name}, inference"
            yield Case("unfusable", inference, [8, 64, 64, 2], rows, fuse(forward), make, training=False, graph=False)

    for name, sizes in {"10-400-400-3": [10, 400, 400, 3], "23-400-300-4": [23, 400, 300, 4], **nets}.items():
        for rows in (1, 2, 4, 8, 16):
            yield Case("inference", name, sizes, rows, fuse(forward), graph=False)

    for name, sizes in (("toy", nets["toy"]), ("rl64", nets["rl64"]), ("4-64-64", [4, 64, 64])):
        make = partial(network, closed=name == "4-64-64")
        for graph in (False, True):
            yield Case("call", name + ", with graph" * graph, sizes, 1, fuse(forward), make, graph=graph)

    yield Case("rollout", "2 × 4-64-64", [4, 64, 64], 1, fuse(rollout), ActorCritic, modes=["cold"], other_work=nothing)

    for group, build in (("penalty", gradient_penalty), ("critic", critic_step)):
        for name, sizes, rows in (
            ("64-256-256-1", critic, 64),
            ("64-256-256-1", critic, 256),
            ("2-50×6-1", [2, *[50] * 6, 1], 10_000),
        ):
            yield Case(group, name, sizes, rows, fuse(build), modes=["tight"])
    for group, build in (("grad", autograd_grad), ("hessian", hessian_product)):
        for name, sizes, rows in (
            ("toy", nets["toy"], 1),
            ("rl64", nets["rl64"], 64),
            ("64-256-256-1", critic, 256),
            ("32-128-128-1", [32, 128, 128, 1], 4096),
        ):
            yield Case(group, name, sizes, rows, fuse(build), modes=["tight"])
    for name, sizes, rows in (("64-256-256-1", critic, 64), ("64-256-256-1", critic, 256), ("rl64", nets["rl64"], 64)):
        yield Case("autocast", name, sizes, rows, fuse(autocast), modes=["tight"], tolerance=0.05)


GROUPS = list(dict.fromkeys(case.group for case in cases()))
MODES = ["tight", "cold"]


# ------------------------------------------------------------------------------------------------------- measurement

LABELS = ("group", "network", "rows", "peer", "mode")
Entry = dict[str, Any]  # the labels and the measurements


def entry(labels: Sequence[Any], reference: Sequence[float], own: Sequence[float], speedups: Sequence[float]) -> Entry:
    """Makes an entry of the seconds per call of a reference and of a peer and the peer's speed, one per round."""
    low, median, high = np.quantile(speedups, [0.25, 0.5, 0.75]).tolist()
    return {
        **dict(zip(LABELS, labels, strict=True)),
        "reference_seconds": statistics.median(reference),
        "median_seconds": statistics.median(own),
        "speedup": median,
        "middle_half": [low, high],
        "seconds": list(own),
    }


@dataclass(frozen=True)
class Measurement:
    """A case measured in one mode."""

    case: Case
    mode: str
    steps: Mapping[str, Step]
    timings: Mapping[str, Timing]

    def one_round(self) -> None:
        """Times each peer once."""
        with torch.set_grad_enabled(self.case.graph):
            one_round(self.steps, self.timings, tight if self.mode == "tight" else partial(cold, self.case.other_work))

    def entries(self) -> list[Entry]:
        """The results, relative to plain."""
        labels, reference = (self.case.group, self.case.name, self.case.rows), self.timings[PLAIN].seconds
        return [entry((*labels, p, self.mode), reference, t.seconds, t.speedups) for p, t in self.timings.items()]


def prepare(case: Case, modes: Sequence[str]) -> Iterator[Measurement]:
    """Yields the case in each of the modes that apply to it, with checked peers."""
    with torch.set_grad_enabled(case.graph):
        steps = case.steps()
        repetitions = {peer: repetitions_for(step, SAMPLE_SECONDS) for peer, step in steps.items()}
    for mode in modes:
        if mode in case.modes:
            counts = repetitions if mode == "tight" else dict.fromkeys(steps, COLD_CALLS)
            yield Measurement(case, mode, steps, {peer: Timing(count) for peer, count in counts.items()})


def measure(cases: Sequence[Case], modes: Sequence[str], rounds: int) -> list[Entry]:
    """Each round goes through all cases, so a slow period of a few seconds affects only a few rounds of each case."""
    measurements = [measurement for case in cases for measurement in prepare(case, modes)]
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for measurement in measurements:
            measurement.one_round()
    gc.enable()
    return [entry for measurement in measurements for entry in measurement.entries()]


def compare(old: Path, new: Path, options: Sequence[str]) -> list[Entry]:
    """Measures with another checkout as the reference, in alternating processes.

    Each process measures its checkout relative to plain, and a speed is the quotient of the two ratios: a period in
    which the machine is slow cancels out.
    """
    runs: dict[Path, list[list[Entry]]] = {old: [], new: []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calls.json"
        command = [sys.executable, __file__, *options, "--json", str(file)]
        for i in range(PASSES):
            for path in (old, new) if i % 2 == 0 else (new, old):
                environ = {**os.environ, "PYTHONPATH": str(path)}
                subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, check=True)
                runs[path].append(json.loads(file.read_text())["calls"])
    entries = []
    for before, after in zip(zip(*runs[old], strict=True), zip(*runs[new], strict=True), strict=True):
        labels = [before[0][label] for label in LABELS]
        reference, own = ([e["median_seconds"] for e in one] for one in (before, after))
        speedups = [b["speedup"] / a["speedup"] for a, b in zip(before, after, strict=True)]
        entries.append(entry(labels, reference, own, speedups))
    return entries


# -------------------------------------------------------------------------------------------------------- the report


def table(entries: Sequence[Entry], reference: str) -> str:
    """One line per peer and case, with the reference's time, its own time and its speed in each mode."""
    modes = [mode for mode in MODES if any(e["mode"] == mode for e in entries)]
    lines: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for e in entries:
        low, high = e["middle_half"]
        times = [f"{e[key] * 1e6:7.1f}" for key in ("reference_seconds", "median_seconds")]
        line = lines.setdefault(tuple(str(e[label]) for label in LABELS[:-1]), {})
        line[e["mode"]] = [*times, f"{e['speedup']:.2f}× ({low:.2f}–{high:.2f})"]
    head = [*LABELS[:-1], *(text for mode in modes for text in (f"{mode}: {reference}, µs", "µs", "speed"))]
    rows = [[*key, *(cell for mode in modes for cell in line.get(mode, "–––"))] for key, line in lines.items()]
    return aligned([head, *rows])


def checkout_of_package() -> str:
    """The commit of the measured package, if it is a git checkout."""
    command = ["git", "-C", str(Path(mbp.__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not in a git repository"


def seconds_of_others() -> float:
    """CPU time that all other processes have used since boot; NaN without /proc/stat.

    A call on two threads waits for both, so one busy CPU turns a call of microseconds into one of milliseconds.
    """
    try:
        user, nice, system, _, _, *interrupts_and_steal = Path("/proc/stat").read_text().split()[1:9]
    except OSError:
        return math.nan
    ticks = sum(map(int, (user, nice, system, *interrupts_and_steal)))
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Times small calls of plain PyTorch and this library.")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, metavar="NAME", help=", ".join(GROUPS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: both")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, help="default: 31, or 5 with --quick")
    parser.add_argument("--quick", action="store_true", help="few rounds, for a first impression")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="alternate with another checkout, already built"
    )
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--markdown", type=Path, help="also write the output to this file")
    args = parser.parse_args()
    args.rounds = args.rounds if args.rounds is not None else 5 if args.quick else 31
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.against and not (args.against / "torch_manualbp").is_dir():
        parser.error(f"--against: {args.against} holds no torch_manualbp")
    for path in filter(None, (args.json, args.markdown)):
        path.parent.mkdir(parents=True, exist_ok=True)  # fail before the work, not after it
    return args


def main() -> None:
    """Measures, prints the table and writes the files."""
    args = parse_arguments()
    load, others, start = os.getloadavg()[0], seconds_of_others(), time.perf_counter()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.against:
        options = ["--groups", *args.groups, "--modes", *args.modes, "--threads", str(torch.get_num_threads())]
        options += ["--rounds", str(math.ceil(args.rounds / PASSES))]
        calls = compare(args.against.resolve(), Path(mbp.__file__).parents[1], options)
    else:
        calls = measure([case for case in cases() if case.group in args.groups], args.modes, args.rounds)
    shown = [e for e in calls if e["peer"] != PLAIN]
    others = (seconds_of_others() - others) / (time.perf_counter() - start)
    reference = "before" if args.against else PLAIN
    header = {
        **environment(load),
        "others meanwhile": f"{others:.2f} CPUs used",
        "commit": checkout_of_package(),
        "command": shlex.join(["python", *sys.argv]),
        "rounds": str(args.rounds),
    }
    slower = [e for e in shown if e["speedup"] < 1]
    lines = [
        *(f"- {name}: {value}" for name, value in header.items()),
        "",
        f"Time of a call, and speed relative to {reference} (median of the rounds; in brackets their middle half):",
        "",
        table(shown, reference),
        "",
        f"{len(slower)} of {len(shown)} are slower than {reference}, "
        f"{sum(e['middle_half'][1] < 1 for e in slower)} of them with their whole middle half.",
    ]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if args.markdown:
        args.markdown.write_text(text)
    if args.json:
        args.json.write_text(json.dumps({"header": header, "calls": calls}, indent=1) + "\n")


if __name__ == "__main__":
    main()
