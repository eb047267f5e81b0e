"""How far are outputs and gradients from float64, here and in eager, as depth, width and batch size grow?

    python benchmarks/numerical_error.py --json build/numerical_error.json        (ten minutes)
    python benchmarks/numerical_error.py --quick

The error is ‖got − want‖ / ‖want‖, over the output or over all gradients together, where `want` comes from float64
autograd on the same numbers (for float64: from exact Python integers, for one layer). Each cell is the median over
random networks. A pre-activation within rounding of 0 may fall on either side of the ReLU, also in eager; this is part
of the gradients' error and grows with the number of units. The kernels sum in parts of 64 terms, and sums over the
batch also in slices and blocks, which is more accurate than one running sum. Half precision is summed in float32 and
rounded when a tensor is stored. Under autocast the network is float32, so that the rounding of its weights and input is
part of the error. docs/numerics.md has the results.

tests/helpers.py and tests/fuzz bound the errors of single elements.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_manualbp as mbp
from results import add_options, header, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Step = Callable[[nn.Sequential, Tensor, Tensor], tuple[Tensor | None, list[Tensor]]]


def eager(model: nn.Sequential, x: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output and gradients of the plain nn.Sequential."""
    output = nn.Sequential(*model)(x)
    return output.detach(), list(torch.autograd.grad(F.mse_loss(output, target), list(model.parameters())))


def ours(activations: Literal["store", "recompute"]) -> Step:
    """`MLP` in a memory mode."""

    def step(model: nn.Sequential, x: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
        fused = mbp.fuse(nn.Sequential(*model), activations=activations)
        output = fused(x)
        return output.detach(), list(torch.autograd.grad(F.mse_loss(output, target), list(model.parameters())))

    return step


def one_pass(model: nn.Sequential, x: Tensor, target: Tensor) -> tuple[None, list[Tensor]]:
    """`MLP.loss`, which does not return the output."""
    assert isinstance(model, mbp.MLP)
    return None, list(torch.autograd.grad(model.loss(x, target), list(model.parameters())))


PEERS: dict[str, Step] = {"eager": eager, "MLP, store": ours("store"), "recompute": ours("recompute"), "loss": one_pass}
QUANTITIES = ("output", "gradients")
Found = dict[str, float | None]  # the error of each peer; None if it has no such result


class Sweep(NamedTuple):
    """Networks that differ in one number, and a description of the rest; `network` returns widths and batch size."""

    axis: str
    shared: str
    values: list[int]
    network: Callable[[int], tuple[list[int], int]]


def sweeps(quick: bool) -> list[Sweep]:
    """The sweeps over depth, width and batch size."""
    depths, widths, batches = ([2, 10], [16, 256], [1, 256]) if quick else (
        [1, 2, 5, 10, 20, 50], [4, 16, 64, 256, 1024, 2048], [1, 16, 256, 4096, 65536]
    )  # fmt: skip
    return [
        Sweep("layers", "64 wide, 256 rows", depths, lambda n: ([64] * (n + 1), 256)),
        Sweep("wide", "3 layers, 256 rows", widths, lambda n: ([n] * 4, 256)),
        Sweep("rows", "3 layers, 64 wide", batches, lambda n: ([64] * 4, n)),
    ]


def relative(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """‖got − want‖ / ‖want‖ of all tensors together."""
    difference = sum(float((one.double() - other).pow(2).sum()) for one, other in zip(got, want, strict=True))
    size = sum(float(other.pow(2).sum()) for other in want)
    return float((difference / size) ** 0.5)


def errors(
    sizes: list[int], batch: int, dtype: torch.dtype, draws: int, autocast: torch.dtype | None = None
) -> tuple[Found, Found]:
    """The median errors of the output and of the gradients."""
    outputs: dict[str, list[float]] = {peer: [] for peer in PEERS}
    gradients: dict[str, list[float]] = {peer: [] for peer in PEERS}
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
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                got, got_grads = step(model, x, target)
            gradients[peer].append(relative(got_grads, grads))
            if got is not None:
                outputs[peer].append(relative([got], [output]))
    return medians(outputs), medians(gradients)


def float64_errors(terms: int, draws: int) -> tuple[Found, Found]:
    """The errors of a float64 layer's output and weight gradient, sums of `terms` products, against exact integers."""
    layers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "eager": F.linear,
        "MLP, store": lambda x, weight: mbp.mlp(x, [weight]),
        "recompute": lambda x, weight: mbp.mlp(x, [weight], activations="recompute"),
    }
    found: list[dict[str, list[float]]] = [{peer: [] for peer in PEERS} for _ in range(2)]
    for seed in range(draws):
        torch.manual_seed(seed)
        # The products of 30-bit integers need 60 bits, more than float64 has.
        a, b = (torch.randint(-(2**30), 2**30, (4, terms)).double() for _ in range(2))
        want = [
            [sum(int(x) * int(y) for x, y in zip(row, other, strict=True)) for other in b.tolist()]
            for row in a.tolist()
        ]
        size = sum(value**2 for row in want for value in row)
        for peer, layer in layers.items():
            weight = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
            (grad,) = torch.autograd.grad(layer(b.t(), weight), weight, a.t())  # also a bᵀ, summed over the batch
            for of_peer, got in zip(found, (layer(a, b), grad), strict=True):
                pairs = [pair for rows in zip(got.tolist(), want, strict=True) for pair in zip(*rows, strict=True)]
                of_peer[peer].append(float((sum((int(one) - value) ** 2 for one, value in pairs) / size) ** 0.5))
    return medians(found[0]), medians(found[1])


def medians(values: dict[str, list[float]]) -> Found:
    """The median of each peer's values."""
    return {peer: statistics.median(of_peer) if of_peer else None for peer, of_peer in values.items()}


def print_table(title: str, rows: Iterable[tuple[str, tuple[Found, Found]]]) -> None:
    """Prints a row for the output and one for the gradients of each network; `rows` may compute them lazily."""
    print(f"\n**{title}**\n\n| network | error of | {' | '.join(PEERS)} |\n|---|---|{'---|' * len(PEERS)}")
    for label, found in rows:
        for what, of_peer in zip(QUANTITIES, found, strict=True):
            cells = ["–" if (value := of_peer[peer]) is None else f"{value:.2e}" for peer in PEERS]
            print(f"| {label} | {what} | {' | '.join(cells)} |", flush=True)


def draw(result: dict[str, Any]) -> "Figure":
    """Draws a panel for each sweep: output and gradients, eager and ours. Equal curves lie on each other."""
    from matplotlib.ticker import NullFormatter

    from torch_manualbp.inspection._figure import BLUE, ORANGE, slide_figure

    with slide_figure(13.33, 6.0) as figure:
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (axis, sweep) in zip(panels, result["float32"].items(), strict=True):
            for what, color in (("output", BLUE), ("gradients", ORANGE)):
                eager, mlp = sweep[what]["eager"], sweep[what]["MLP, store"]
                axes.loglog(sweep["values"], eager, color=color, linewidth=9, alpha=0.3, label=f"{what}, eager")
                axes.loglog(sweep["values"], mlp, "o-", color=color, linewidth=2, label=f"{what}, MLP")
            axes.axhline(2**-24, color="black", linewidth=1.5, linestyle=":", label="unit of rounding, $2^{-24}$")
            axes.set_xlabel({"layers": "layers", "wide": "units of a layer", "rows": "rows of the batch"}[axis])
            axes.set_title(sweep["shared"])
        panels[0].set_ylabel("relative error in float32")
        ticks = {5e-8: r"$5\cdot 10^{-8}$", 1e-7: "$10^{-7}$", 2e-7: r"$2\cdot 10^{-7}$", 5e-7: r"$5\cdot 10^{-7}$"}
        panels[0].set_yticks(list(ticks), list(ticks.values()))
        panels[0].yaxis.set_minor_formatter(NullFormatter())
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, columnspacing=1.2)
    return figure


def main() -> None:
    """Prints the tables, and saves the errors in float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, help="random networks per row; default: 5, or 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="few points, for a first impression")
    add_options(parser)
    options = parser.parse_args()
    draws = options.draws or (3 if options.quick else 5)
    load = os.getloadavg()[0]
    in_float32: dict[str, dict[str, Any]] = {}

    def measure(dtype: torch.dtype, autocast: torch.dtype | None = None) -> Iterable[tuple[str, tuple[Found, Found]]]:
        single = dtype is torch.float32 and autocast is None
        name = f"autocast to {autocast}" if autocast else f"{dtype}"
        for sweep in sweeps(options.quick):
            curves: dict[str, dict[str, list[float | None]]] = {what: {p: [] for p in PEERS} for what in QUANTITIES}
            for n in sweep.values if single else sweep.values[-1:] if options.quick else sweep.values[1::2]:
                found = errors(*sweep.network(n), dtype, draws, autocast)
                for what, of_peer in zip(QUANTITIES, found, strict=True):
                    for peer, error in of_peer.items():
                        curves[what][peer].append(error)
                yield f"{name.replace('torch.', '')}, {n:,} {sweep.axis} ({sweep.shared})", found
            if single:
                in_float32[sweep.axis] = {"shared": sweep.shared, "values": sweep.values, **curves}

    print_table("float32: depth, width and batch", measure(torch.float32))
    print_table(
        "Half precision: depth, width and batch",
        (row for dtype in (torch.bfloat16, torch.float16) for row in measure(dtype)),
    )
    print_table(
        "Autocast: depth, width and batch",
        (row for dtype in (torch.bfloat16, torch.float16) for row in measure(torch.float32, dtype)),
    )
    terms = (100, 1000) if options.quick else (10, 100, 1000, 10_000)
    print_table(
        "float64: sums of products, against exact integers",
        ((f"float64, sums of {n:,} terms", float64_errors(n, draws)) for n in terms),
    )
    save({"header": header(load), "draws": draws, "float32": in_float32}, options, draw)


if __name__ == "__main__":
    main()
