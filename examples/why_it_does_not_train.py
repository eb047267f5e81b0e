"""Trains four deep networks that differ only in their initialisation; three do not train, and one call says why.

    python examples/why_it_does_not_train.py --output why_it_does_not_train.png

All have 20 layers. Their weights are too small, too large, or of He's variance 2/D; or a bias is so low that ReLU lets
nothing through. Each is trained for a while on the same task, observed by a `GradientFlowMonitor`. The lecture asks
what happens if most factors of the chain rule are below 0.5, or above 2; the column "factor" answers it.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import torch_manualbp as mbp
from torch_manualbp.inspection.gradient_flow import GradientFlow

WIDTH, LAYERS, ROWS = 64, 20, 256
EXPECTED = {"too small": ["vanishing"], "too large": ["exploding"], "biases too low": ["dead"], "He": []}


@dataclass
class Case:
    """An initialisation: the standard deviation relative to He's, and the bias of one layer in the middle."""

    name: str
    gain: float
    bias: float = 0.0

    def network(self) -> mbp.MLP:
        """The network before training."""
        model = mbp.MLP([WIDTH] * LAYERS + [1])
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=self.gain * math.sqrt(2 / WIDTH))
            nn.init.zeros_(layer.bias)
        nn.init.constant_(layers[LAYERS // 2].bias, self.bias)
        return model


CASES = (Case("too small", 0.5), Case("too large", 2.0), Case("biases too low", 1.0, bias=-50.0), Case("He", 1.0))


@dataclass
class Result:
    """The result of a case."""

    case: Case
    flow: GradientFlow  # before training
    losses: list[float]


def task() -> tuple[Tensor, Tensor]:
    """Inputs, and a smooth function of them, standardised."""
    x = torch.randn(ROWS, WIDTH)
    y = torch.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    return x, (y - y.mean()) / y.std()


def train(case: Case, steps: int) -> Result:
    """Plain SGD, always with the same learning rate."""
    torch.manual_seed(0)
    x, y = task()
    model = case.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    with mbp.GradientFlowMonitor(model, every=steps) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            losses.append(model.loss_backward(x, y).item())
            optimizer.step()
    return Result(case, monitor.history[0], losses)


def draw(results: list[Result]) -> Figure:
    """Left: the gradient on its way back through the layers. Right: what training makes of it."""
    figure = Figure(figsize=(13, 6), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2)
    for result, color in zip(results, ("#4c78a8", "#e45756", "#333333", "#54a24b"), strict=True):
        label = f"{result.case.name}: {', '.join(result.flow.diagnosis) or 'nothing found'}"
        label += f" ({zeros} layers get 0)" if (zeros := sum(layer.dl_df == 0 for layer in result.flow.layers)) else ""
        sizes = [layer.dl_df or math.nan for layer in result.flow.layers]  # 0 has no place on a logarithmic scale
        left.semilogy(range(LAYERS), sizes, "o-", markersize=4, color=color, label=label)
        losses = [loss if math.isfinite(loss) else math.nan for loss in result.losses]
        gone = "" if math.isfinite(result.losses[-1]) else f": {losses[0]:.0e}, NaN from step {losses.index(math.nan)}"
        style = "--" if result.flow.diagnosis == ["dead"] else "-"  # it lies on top of another line
        right.semilogy(losses, style, linewidth=2, color=color, label=result.case.name + gone)
    left.set_title("Gradient before the first step", fontsize=17)
    left.set_xlabel("layer $k$ (the backward pass goes from right to left)", fontsize=14)
    left.set_ylabel(r"root mean square of $\partial L/\partial f_k$", fontsize=14)
    left.set_xticks(range(0, LAYERS, 2))
    right.set_title("Training", fontsize=17)
    right.set_xlabel("step", fontsize=14)
    right.set_ylim(top=30)  # a loss that explodes is named in the legend: its curve would leave the others no room
    right.set_ylabel("mean squared error (1: the mean is all it knows)", fontsize=14)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=12)
        axes.tick_params(labelsize=12)
    return figure


def main() -> int:
    """Trains all, prints a line for each, draws them; exit code 1 if a diagnosis is not the expected one."""
    parser = argparse.ArgumentParser(description="Networks that do not train, and why.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("why_it_does_not_train.png"))
    parser.add_argument("--flow", type=Path, help="draws the gradient flow of the first network, layer by layer")
    args = parser.parse_args()
    results = [train(case, args.steps) for case in CASES]
    for result in results:
        growth = [layer.growth for layer in result.flow.layers if layer.growth]
        factor = f"{math.prod(growth) ** (1 / len(growth)):.2f}" if len(growth) == LAYERS - 1 else "–"
        sys.stdout.write(
            f"{result.case.name:15} factor per layer {factor:>5}   loss {result.losses[0]:9.3g} → "
            f"{result.losses[-1]:9.3g}   {', '.join(result.flow.diagnosis) or 'nothing found'}\n"
        )
        for text in result.flow.explanation.values():
            sys.stdout.write(f"{'':15} {text}\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(args.output)
    sys.stdout.write(f"figure: {args.output}\n")
    if args.flow:
        results[0].flow.plot().savefig(args.flow)
        sys.stdout.write(f"figure: {args.flow}\n")
    wrong = [result.case.name for result in results if result.flow.diagnosis != EXPECTED[result.case.name]]
    if wrong:
        sys.stderr.write(f"not the diagnosis that was built in: {', '.join(wrong)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
