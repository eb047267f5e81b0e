"""How far are outputs and gradients from float64, as networks grow deeper and wider and batches longer? Beside eager.

    python benchmarks/numerical_error.py            (a minute)
    python benchmarks/numerical_error.py --quick

An error is ‖got − want‖ / ‖want‖, over the output or over all gradients together, where `want` is float64 autograd on
the same numbers (for float64: on one layer, against integers of Python, which are exact). Each cell is the median over
random networks. A pre-activation within rounding of 0 may fall on either side of the ReLU, in eager too: that is part
of the error of the gradients, and grows with the number of units. Sums over the batch are made in slices and blocks,
which makes them better than a plain sum; halves are summed in float32 and rounded where a tensor is stored. Sums over
features are made in one go, in ascending order (so that a row does not depend on its batch): their error grows with the
square root of the width, while the BLAS behind eager adds up parts. Measured, MKL on Zen 4: gradients of 3 layers of 64
0.8 times eager's error, of 256 1.7 times, of 2048 2.7 times.

Left to others: which elements may differ by how much (tests/helpers.py, tests/fuzz).
"""

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_manualbp as mbp

Step = Callable[[nn.Sequential, Tensor, Tensor], tuple[Tensor | None, list[Tensor]]]


def eager(model: nn.Sequential, x: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The plain composition."""
    output = nn.Sequential(*model)(x)
    return output.detach(), list(torch.autograd.grad(F.mse_loss(output, target), list(model.parameters())))


def ours(activations: str) -> Step:
    """`MLP` in a memory mode."""

    def step(model: nn.Sequential, x: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
        fused = mbp.fuse(nn.Sequential(*model), activations=activations)
        output = fused(x)
        return output.detach(), list(torch.autograd.grad(F.mse_loss(output, target), list(model.parameters())))

    return step


def one_pass(model: nn.Sequential, x: Tensor, target: Tensor) -> tuple[None, list[Tensor]]:
    """`MLP.loss`: its output is never seen."""
    assert isinstance(model, mbp.MLP)
    return None, list(torch.autograd.grad(model.loss(x, target), list(model.parameters())))


PEERS: dict[str, Step] = {"eager": eager, "MLP, store": ours("store"), "recompute": ours("recompute"), "loss": one_pass}


def relative(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """‖got − want‖ / ‖want‖ of all tensors together."""
    difference = sum(float((one.double() - other).pow(2).sum()) for one, other in zip(got, want, strict=True))
    size = sum(float(other.pow(2).sum()) for other in want)
    return float((difference / size) ** 0.5)


def errors(sizes: list[int], batch: int, dtype: torch.dtype, draws: int) -> dict[str, tuple[float | None, float]]:
    """The median errors of each peer: of the output (None if there is none) and of the gradients."""
    found: dict[str, list[tuple[float | None, float]]] = {peer: [] for peer in PEERS}
    for seed in range(draws):
        torch.manual_seed(seed)
        model = mbp.MLP(sizes)
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        model.to(dtype)
        x, target = torch.randn(batch, sizes[0]).to(dtype), torch.randn(batch, sizes[-1]).to(dtype)
        exact = mbp.MLP(sizes, dtype=torch.float64)
        exact.load_state_dict(model.state_dict())
        output, grads = eager(exact, x.double(), target.double())
        for peer, step in PEERS.items():
            got, got_grads = step(model, x, target)
            found[peer].append((None if got is None else relative([got], [output]), relative(got_grads, grads)))
    medians: dict[str, tuple[float | None, float]] = {}
    for peer, pairs in found.items():
        outputs = [error for error, _ in pairs if error is not None]
        gradients = statistics.median(error for _, error in pairs)
        medians[peer] = (statistics.median(outputs) if outputs else None, gradients)
    return medians


def float64_errors(terms: int, draws: int) -> dict[str, float]:
    """Of sums of so many products in float64, against exact integer arithmetic: a layer and its weight gradient."""
    found: dict[str, list[float]] = {"eager": [], "MLP, store": []}
    for seed in range(draws):
        torch.manual_seed(seed)
        # Integers of 30 bits: their products need 60, more than float64 keeps.
        x, weight = (torch.randint(-(2**30), 2**30, (4, terms)).double() for _ in range(2))
        want = [
            [sum(int(a) * int(b) for a, b in zip(row, other, strict=True)) for other in weight.tolist()]
            for row in x.tolist()
        ]
        size = sum(value**2 for row in want for value in row)
        for name, got in (("eager", F.linear(x, weight)), ("MLP, store", mbp.mlp(x, [weight]))):
            pairs = [pair for rows in zip(got.tolist(), want, strict=True) for pair in zip(*rows, strict=True)]
            found[name].append(float((sum((int(one) - value) ** 2 for one, value in pairs) / size) ** 0.5))
    return {name: statistics.median(values) for name, values in found.items()}


def print_table(title: str, rows: list[tuple[str, list[int], int, torch.dtype]], draws: int) -> None:
    """Two rows, output and gradients, for each network."""
    print(f"\n**{title}**\n\n| network | error of | {' | '.join(PEERS)} |\n|---|---|{'---|' * len(PEERS)}")
    for label, sizes, batch, dtype in rows:
        found = errors(sizes, batch, dtype, draws)
        for i, what in enumerate(("output", "gradients")):
            values = [found[peer][i] for peer in PEERS]
            cells = ["–" if value is None else f"{value:.2e}" for value in values]
            print(f"| {label} | {what} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, help="random networks per row; default: 5, or 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="few points: a look, not a result")
    options = parser.parse_args()
    draws = options.draws or (3 if options.quick else 5)
    depths, widths, batches = ([2, 10], [16, 256], [1, 256]) if options.quick else (
        [1, 2, 5, 10, 20, 50], [4, 16, 64, 256, 1024, 2048], [1, 16, 256, 4096, 65536]
    )  # fmt: skip
    single = torch.float32
    print_table(
        "float32: depth, width and batch",
        [(f"{n} layers, 64 wide, 256 rows", [64] * (n + 1), 256, single) for n in depths]
        + [(f"3 layers, {n} wide, 256 rows", [n] * 4, 256, single) for n in widths]
        + [(f"3 layers, 64 wide, {n} rows", [64] * 4, n, single) for n in batches],
        draws,
    )
    networks = [("32-64-64-64-64-16", [32, 64, 64, 64, 64, 16], 1024)]
    if not options.quick:
        networks += [("784-512-512-10", [784, 512, 512, 10], 128), ("64 × 21 layers", [64] * 22, 256)]
    halves = (torch.float32, torch.bfloat16, torch.float16)
    print_table(
        "Storage types",
        [
            (f"{str(dtype).removeprefix('torch.')}, {name}, {batch} rows", sizes, batch, dtype)
            for dtype in halves
            for name, sizes, batch in networks
        ],
        draws,
    )
    print("\n**float64: sums of products, against exact integers**\n")
    print("| terms | error of | eager | ours |\n|---|---|---|---|")
    for terms in (100, 1000) if options.quick else (10, 100, 1000, 10_000):
        found = float64_errors(terms, draws)
        print(f"| float64, {terms:,} terms | output | {found['eager']:.2e} | {found['MLP, store']:.2e} |")


if __name__ == "__main__":
    main()
