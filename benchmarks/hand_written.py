"""How much faster do models with a forward of their own run after `fuse`, and nothing else changed?

    python benchmarks/hand_written.py --json hand_written.json --markdown hand_written.md
    python benchmarks/hand_written.py --quick --models nerf tabular

A step is forward, mean squared error and backward; without gradients, a call on as many rows or on one. Peers: the
model as it is, fused, fused as an nn.Sequential of the same layers (where it is one), and compiled with
backend="manualbp". They alternate as in training_step.py; before a model is timed, the outputs of all peers are
compared with the plain one's.
"""

import copy
import itertools
import os
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_manualbp as mbp
from training_step import (
    Step,
    aligned,
    arguments,
    autograd_step,
    environment,
    measure_steps,
    parse,
    prepared,
    report_failures,
    write,
)

PLAIN, FUSED, SEQUENTIAL, COMPILED = "plain", "fuse(model)", "as a fused Sequential", "compiled"


class Layers(nn.Module):
    """Linear layers with ReLUs between them, called one by one."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))

    def forward(self, x: Any) -> Any:
        """The output."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)

    def as_sequential(self) -> nn.Sequential:
        """The same layers, which it shares."""
        children = [child for layer in self.layers for child in (layer, nn.ReLU())]
        return nn.Sequential(*children[:-1])


class WithTanh(Layers):
    """Nothing fuses here."""

    def forward(self, x: Any) -> Any:
        """The output."""
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


class Nerf(nn.Module):
    """The loop of a neural radiance field, with a skip connection in its middle."""

    def __init__(self, width: int = 128, depth: int = 8, inputs: int = 63) -> None:
        super().__init__()
        sizes = [inputs] + [width + (k == depth // 2) * inputs for k in range(1, depth)]
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.out = nn.Linear(width, 4)

    def forward(self, x: Any) -> Any:
        """The output."""
        h = x
        for k, layer in enumerate(self.layers):
            if k == len(self.layers) // 2:
                h = torch.cat([x, h], -1)
            h = F.relu(layer(h))
        return self.out(h)


class FeedForward(nn.Module):
    """The feed-forward part of an OPT layer."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation_fn = nn.ReLU()

    def forward(self, x: Any) -> Any:
        """The output."""
        h = self.fc2(self.activation_fn(self.fc1(self.norm(x))))
        return x + F.dropout(h, 0.0, self.training)


class Masked(nn.Linear):
    """A layer of a masked autoregressive network."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.mask: Tensor
        self.register_buffer("mask", (torch.arange(d_out)[:, None] % d_in >= torch.arange(d_in)).float())

    def forward(self, x: Any) -> Any:
        """The output."""
        return F.linear(x, self.mask * self.weight, self.bias)


class Flow(nn.Module):
    """A masked autoregressive transform."""

    def __init__(self, inputs: int = 32, width: int = 128) -> None:
        super().__init__()
        self.first, self.hidden = Masked(inputs, width), nn.ModuleList(Masked(width, width) for _ in range(2))
        self.last = Masked(width, 2 * inputs)

    def forward(self, x: Any) -> Any:
        """The output."""
        h = F.relu(self.first(x))
        for layer in self.hidden:
            h = F.relu(layer(h))
        shift, scale = self.last(h).chunk(2, -1)
        return (x - shift) * torch.exp(-torch.tanh(scale))


class Dlrm(nn.Module):
    """The dense part of a recommender: two networks and the products between features."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom, self.top = Layers(13, 512, 256, 64), Layers(64 + 28, 512, 256, 1)
        self.features = nn.Parameter(torch.randn(7, 64))

    def forward(self, x: Any) -> Any:
        """The output."""
        dense = F.relu(self.bottom(x))
        all_features = torch.cat([dense.unsqueeze(1), self.features.expand(len(x), -1, -1)], 1)
        products = torch.bmm(all_features, all_features.transpose(1, 2))
        rows, columns = torch.triu_indices(8, 8, 1)
        return self.top(torch.cat([dense, products[:, rows, columns]], 1))


class Tabular(nn.Module):
    """A network for tables: blocks of Linear, ReLU, Dropout."""

    def __init__(self, inputs: int = 64, width: int = 256, p: float = 0.1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(size, width) for size in (inputs, width, width))
        self.dropout, self.head = nn.Dropout(p), nn.Linear(width, 2)

    def forward(self, x: Any) -> Any:
        """The output."""
        for block in self.blocks:
            x = self.dropout(F.relu(block(x)))
        return self.head(x)


@dataclass(frozen=True)
class Case:
    """A model and the shape of its input."""

    name: str
    build: Callable[[], nn.Module]
    rows: int
    inputs: int


CASES = [
    Case("17-64-64-6", lambda: Layers(17, 64, 64, 6), 64, 17),
    Case("17-256-256-1", lambda: Layers(17, 256, 256, 1), 256, 17),
    Case("479-1024-1024-1", lambda: Layers(479, 1024, 1024, 1), 2048, 479),
    Case("nerf", Nerf, 8192, 63),
    Case("opt block", FeedForward, 512, 256),
    Case("opt stack", lambda: nn.Sequential(*[FeedForward() for _ in range(4)]), 512, 256),
    Case("flow", Flow, 512, 32),
    Case("dlrm", Dlrm, 2048, 13),
    Case("tabular", Tabular, 1024, 64),
    Case("tabular 256", lambda: Tabular(256), 256, 256),
    Case("tanh 64-64-64-64", lambda: WithTanh(64, 64, 64, 64), 64, 64),
]
MODES = ("train", "no_grad", "no_grad, 1 row")


def peers_of(case: Case, model: nn.Module, mode: str, compilers: bool) -> dict[str, nn.Module]:
    """The model of each peer; all have the same parameters."""
    peers = {PLAIN: copy.deepcopy(model), FUSED: mbp.fuse(copy.deepcopy(model))}
    if type(model) is Layers:
        peers[SEQUENTIAL] = mbp.fuse(copy.deepcopy(model).as_sequential())
    if compilers and mode == "train":
        torch._dynamo.reset()
        peers[COMPILED] = torch.compile(copy.deepcopy(model), backend="manualbp")  # type: ignore[assignment]
    return peers


def step_of(model: nn.Module, x: Tensor, target: Tensor, mode: str) -> Step:
    """What is timed; its `gradients` are the output of a call from a fixed seed."""

    def output() -> list[Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            return [model(x)]

    for _ in range(3):  # the first call is observed
        output()
    if mode == "train":
        step = autograd_step(lambda: F.mse_loss(model(x), target), list(model.parameters()))
        return Step(step.run, output)

    def call() -> None:
        with torch.no_grad():
            model(x)

    return Step(call, output)


def measure(case: Case, mode: str, rounds: int, compilers: bool) -> Any:
    """Checks the peers, then times them in rounds."""
    torch.manual_seed(0)
    model, x = case.build(), torch.randn(1 if mode.endswith("1 row") else case.rows, case.inputs)
    target = torch.randn_like(model(x))
    expected: list[Tensor] = []

    def check(peer: str, step: Step) -> None:
        (actual,) = step.gradients()
        expected.append(actual)
        if not torch.allclose(actual, expected[0], rtol=1e-3, atol=1e-4):
            raise SystemExit(f"{case.name}: the output of {peer} is wrong")

    peers = peers_of(case, model, mode, compilers)
    builders = {name: partial(step_of, peer, x, target, mode) for name, peer in peers.items()}
    return measure_steps(builders, check, rounds)


def table(results: dict[tuple[str, str], Any]) -> str:
    """An aligned Markdown table: the median of the rounds' ratios, their middle half, and the median time."""
    names = [PLAIN, FUSED, SEQUENTIAL, COMPILED]
    rows = [["model", "mode", *names]]
    for (case, mode), timings in results.items():
        row = [case, mode]
        for name in names:
            timing = timings.get(name)
            if timing is None or timing.error:
                row.append("" if timing is None else "failed")
                continue
            low, _, high = statistics.quantiles(timing.speedups, n=4) if len(timing.speedups) > 1 else [1.0, 1.0, 1.0]
            spread = "" if name == PLAIN else f" ({low:.2f}–{high:.2f})"
            row.append(f"{timing.speedup:.2f}×{spread} {timing.median_seconds * 1e3:8.3f} ms")
        rows.append(row)
    return aligned(rows)


def main() -> None:
    """Measures, prints the table and writes the files."""
    parser = arguments("Times models with a forward of their own, plain and fused.")
    parser.add_argument("--models", nargs="+", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: all")
    args = parse(parser)
    load = os.getloadavg()[0]
    results = {}
    with prepared(args):
        for case in CASES:
            if args.models and case.name not in args.models:
                continue
            for mode in args.modes:
                sys.stderr.write(f"{case.name}, {mode}\n")
                compilers = not (args.quick or args.no_compile)
                results[case.name, mode] = measure(case, mode, args.rounds, compilers)
                report_failures(case.name, results[case.name, mode])
    header = {**environment(load), "command": shlex.join(["python", *sys.argv]), "rounds": str(args.rounds)}
    samples = {
        "header": header,
        "models": [
            {"model": case, "mode": mode, "peers": {name: timing.__dict__ for name, timing in timings.items()}}
            for (case, mode), timings in results.items()
        ],
    }
    title = "Speed relative to plain PyTorch: median of the rounds (middle half), median time."
    write(header, [title, "", table(results)], samples, args)


if __name__ == "__main__":
    main()
