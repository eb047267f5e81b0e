"""ReLU and its derivative: a[z] = max(0, z), and I[z > 0].

python examples/relu.py --output relu.png
"""

import argparse
import sys
from pathlib import Path

try:
    from matplotlib import style
    from matplotlib.figure import Figure
except ImportError as error:
    sys.exit(f"{error}: this example needs the extra `demo`: pip install '.[demo]'")

import torch
from torch import Tensor


@style.context("torch_manualbp.inspection.slides")
def draw(z: Tensor, a: Tensor, derivative: Tensor) -> Figure:
    """a[z] on the left, its derivative on the right; a dot marks the value that is taken at z = 0."""
    figure = Figure(figsize=(13.33, 5))
    for i, (values, title) in enumerate(
        ((a, r"$a[z] = \mathrm{ReLU}[z] = \max(0, z)$"), (derivative, r"$\partial a/\partial z = I[z > 0]$"))
    ):
        axes = figure.add_subplot(1, 2, i + 1)
        for side in (z <= 0, z > 0):
            axes.plot(z[side], values[side], color="#0072B2", linewidth=4)
        axes.plot(0, values[z == 0], "o", color="#0072B2", markersize=12)
        axes.set_title(title)
        axes.set_xlabel("$z$")
        axes.set_ylim(-0.25, 2.25)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="ReLU and its derivative, as autograd computes it.")
    parser.add_argument("--output", type=Path, default=Path("relu.png"), help="figure (default: %(default)s)")
    args = parser.parse_args()
    z = torch.linspace(-2, 2, 401).round(decimals=2).requires_grad_()
    a = torch.relu(z)
    (derivative,) = torch.autograd.grad(a.sum(), z)
    for i in (100, 200, 300):
        sys.stdout.write(
            f"z = {z[i].item():4.1f}   a[z] = {a[i].item():3.1f}   derivative {derivative[i].item():.0f}\n"
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(z.detach(), a.detach(), derivative).savefig(args.output)
    sys.stdout.write(f"figure: {args.output}\n")


if __name__ == "__main__":
    main()
