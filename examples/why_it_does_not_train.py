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
from typing import Any

import torch
from torch import Tensor, nn

import torch_manualbp as mbp
from torch_manualbp.inspection.gradient_flow import GradientFlow

try:
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator
except ImportError as error:
    sys.exit(f"{error}: this example needs the extra `demo`: pip install '.[demo]'")

WIDTH, LAYERS, ROWS = 64, 20, 256
LEARNING_RATE = 0.003  # in float64: with more, or in float32, rounding decides how the loss falls after 100 steps
EXPECTED = {"too small": ["vanishing"], "too large": ["exploding"], "biases too low": ["dead"], "He": []}


@dataclass
class Case:
    """An initialisation: the standard deviation relative to He's, and the bias of one layer in the middle."""

    name: str
    gain: float
    bias: float = 0.0

    def network(self) -> mbp.MLP:
        """The network before training."""
        model = mbp.MLP([WIDTH] * LAYERS + [1], dtype=torch.float64)
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
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    y = torch.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    return x, (y - y.mean()) / y.std()


def train(case: Case, steps: int) -> Result:
    """Plain SGD, always with the same learning rate."""
    torch.manual_seed(0)
    x, y = task()
    model = case.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    with mbp.GradientFlowMonitor(model, every=steps) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            losses.append(model.loss_backward(x, y).item())
            optimizer.step()
    return Result(case, monitor.history[0], losses)


@style.context("torch_manualbp.inspection.slides")
def draw(results: list[Result]) -> Figure:
    """Left: the gradient on its way back through the layers. Right: what training makes of it."""
    figure = Figure(figsize=(13.33, 7))
    left, right = figure.subplots(1, 2)
    colors = ("#0072B2", "#D55E00", "black", "#009E73")
    for result, color in zip(results, colors, strict=True):
        # Curves that lie on each other are told apart by their width.
        shape: dict[str, Any] = {"linewidth": 3}
        if result.flow.diagnosis == ["dead"]:
            shape["linestyle"] = (0, (2, 1.5))
        elif result.flow.diagnosis == ["vanishing"]:
            shape |= {"linewidth": 8, "alpha": 0.4}
        label = f"{result.case.name}: {', '.join(result.flow.diagnosis) or 'nothing found'}"
        left.plot(range(LAYERS), [layer.dl_df for layer in result.flow.layers], color=color, label=label, **shape)
        right.plot([loss if math.isfinite(loss) else math.nan for loss in result.losses], color=color, **shape)
        if result.flow.diagnosis == ["exploding"]:
            power = round(math.log10(result.losses[0]))
            gone = next(step for step, loss in enumerate(result.losses) if math.isnan(loss))
            text = rf"↑ {result.case.name}: $10^{{{power}}}$, NaN from step {gone}"
            right.text(0.02, 0.98, text, color=color, fontsize=15, va="top", transform=right.transAxes)
    left.set_yscale("symlog", linthresh=1e-10)  # has a place for 0, the gradient below dead units
    left.set_yticks([0, *(10.0**power for power in range(-9, 10, 3))])
    left.set_title("Gradient before the first step")
    left.set_xlabel("layer $k$ (the backward pass goes from right to left)")
    left.set_ylabel(r"root mean square of $\partial L/\partial f_k$")
    left.set_xticks(range(0, LAYERS, 3))
    figure.legend(loc="outside lower center", ncols=2)
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_locator(NullLocator())
    right.set_title("Training")
    right.set_xlabel("step")
    least = min(loss for result in results for loss in result.losses if math.isfinite(loss))
    right.set_ylim(min(0.1, least / 1.5), 3)  # the loss that explodes would leave the others no room
    right.set_ylabel("mean squared error (1: the mean is all it knows)")
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
