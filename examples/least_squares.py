"""The lecture's first chapter: least squares on a line, its partial derivatives, gradient descent, and SGD.

python examples/least_squares.py --output least_squares.png
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_manualbp.lecture import LeastSquares, gradient_descent, sgd

try:
    from matplotlib import style
    from matplotlib.figure import Figure
except ImportError as error:
    sys.exit(f"{error}: this example needs the extra `demo`: pip install '.[demo]'")

ALPHA, STEPS, BATCH = 0.005, 120, 5


def points() -> LeastSquares:
    """30 noisy points around y = 1 + 2 x."""
    x = torch.linspace(-1, 2, 30, dtype=torch.float64)
    return LeastSquares(x, 1 + 2 * x + 0.4 * torch.randn(30, dtype=torch.float64))


@style.context("torch_manualbp.inspection.slides")
def draw(line: LeastSquares, paths: dict[str, list[Tensor]]) -> Figure:
    """The points with the fitted lines, and how the loss falls."""
    figure = Figure(figsize=(13.33, 6))
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    left.plot(line.x, line.y, "o", color="gray", label="points $(x_i, y_i)$")
    least = line.loss(line.minimum()).item()
    shapes: tuple[dict[str, Any], ...] = ({"linewidth": 5, "alpha": 0.5}, {"linestyle": "--"})
    for (name, path), shape in zip(paths.items(), shapes, strict=True):
        left.plot(line.x, path[-1][0] + path[-1][1] * line.x, label=name, **shape)
        right.plot([line.loss(phi).item() - least for phi in path], label=name, **shape)
    left.set_xlabel("$x$")
    left.set_ylabel("$y$")
    left.set_title(r"The line $\phi_0 + \phi_1 x$ after training")
    right.set_xlabel(f"step (gradient descent: 30 points each, SGD: {BATCH})")
    right.set_ylim(bottom=1e-8)
    right.set_ylabel(r"$L[\phi]$ above its minimum")
    right.set_yscale("log")
    right.set_title(rf"$\phi \leftarrow \phi - \alpha\,\partial L/\partial\phi$,  $\alpha$ = {ALPHA}")
    for axes in (left, right):
        axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Least squares, its partial derivatives, and gradient descent.")
    parser.add_argument("--output", type=Path, default=Path("least_squares.png"), help="figure (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    line, start = points(), torch.zeros(2, dtype=torch.float64)

    phi = start.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(line.loss(phi), phi)
    out = [
        "ℓ_i = (φ_0 + φ_1 x_i − y_i)²,  ∂ℓ_i/∂φ = [2 (φ_0 + φ_1 x_i − y_i), 2 x_i (φ_0 + φ_1 x_i − y_i)],  φ = (0, 0):",
        *(
            f"  i = {i}: x = {x:6.3f}  y = {y:6.3f}  ∂ℓ_i/∂φ_0 = {d0:7.3f}  ∂ℓ_i/∂φ_1 = {d1:7.3f}"
            for i, (x, y, (d0, d1)) in enumerate(zip(line.x, line.y, line.partials(start), strict=True))
            if i % 10 == 0
        ),
        "∂L/∂φ = Σ_i ∂ℓ_i/∂φ = [{:.3f}, {:.3f}]".format(*line.gradient(start)),
        f"largest difference to autograd: {(line.gradient(start) - by_autograd).abs().max():.1e}",
    ]
    batches = torch.cat([torch.randperm(30).view(-1, BATCH) for _ in range(STEPS * BATCH // 30)])
    paths = {
        "gradient descent": gradient_descent(start, line.gradient, ALPHA, STEPS),
        f"SGD, batches of {BATCH}": sgd(start, lambda phi, i: line.partials(phi)[i], batches, ALPHA),
    }
    for name, phi in (*((name, path[-1]) for name, path in paths.items()), ("closed form", line.minimum())):
        out.append(f"{name:20} φ_0 = {phi[0]:.4f}  φ_1 = {phi[1]:.4f}  L = {line.loss(phi):.4f}")
    sys.stdout.write("\n".join(out) + "\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(line, paths).savefig(args.output)
    sys.stdout.write(f"figure: {args.output}\n")


if __name__ == "__main__":
    main()
