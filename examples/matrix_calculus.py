"""The lecture's matrix calculus: the shape of a derivative, ∂f/∂h = Ωᵀ, ∂f/∂β = I, ∂a/∂b diagonal, and the chain rule.

python examples/matrix_calculus.py --output matrix_calculus.png
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

import torch_manualbp.lecture as lec
from torch_manualbp.lecture import jacobian, weight_gradient

try:
    from matplotlib import style
    from matplotlib.figure import Figure
except ImportError as error:
    sys.exit(f"{error}: this example needs the extra `demo`: pip install '.[demo]'")


@style.context("torch_manualbp.inspection.slides")
def draw(panels: list[tuple[str, Tensor, str, str]]) -> Figure:
    """Each matrix as a heat map with its numbers, and the names of its rows and columns."""
    largest = max(matrix.abs().max().item() for _, matrix, *_ in panels)
    figure = Figure(figsize=(13.33, 5.2))
    # Each panel's width is proportional to its columns, so that elements have the same size in all panels.
    widths = [matrix.shape[1] for _, matrix, *_ in panels]
    for axes, (title, matrix, rows, columns) in zip(
        figure.subplots(1, len(panels), width_ratios=widths), panels, strict=True
    ):
        image = axes.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-1.6 * largest, vmax=1.6 * largest)
        for row, column in itertools.product(*map(range, matrix.shape)):
            number = f"{matrix[row, column].item():.2g}".replace("-", "−")
            axes.text(column, row, number, ha="center", va="center", fontsize=16)
        axes.set_title(title, fontsize=20, pad=30)
        axes.set_yticks(range(matrix.shape[0]), [f"${rows}_{{{i + 1}}}$" for i in range(matrix.shape[0])], fontsize=17)
        axes.set_xticks(
            range(matrix.shape[1]), [f"${columns}_{{{i + 1}}}$" for i in range(matrix.shape[1])], fontsize=17
        )
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.grid(visible=False)
        axes.spines[:].set_visible(True)
    bar = figure.colorbar(image, ax=figure.axes, orientation="horizontal", aspect=45, pad=0.06)
    bar.ax.set_xlim(-largest, largest)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Derivatives with respect to vectors and matrices.")
    parser.add_argument(
        "--output", type=Path, default=Path("matrix_calculus.png"), help="figure (default: %(default)s)"
    )
    args = parser.parse_args()
    torch.manual_seed(6)
    omega, beta, h = torch.randn(3, 4), torch.randn(3), torch.randn(4)
    f = beta + omega @ h

    def layer(h: Tensor) -> Tensor:
        return beta + omega @ h

    def loss(f: Tensor) -> Tensor:
        return torch.relu(f).square().sum()

    df_dh, df_dbeta = jacobian(layer, h), jacobian(lambda b: b + omega @ h, beta)
    da_db, dl_df, dl_da = lec.relu_jacobian(f), jacobian(loss, f), 2 * torch.relu(f)
    dl_domega = jacobian(lambda o: loss(beta + o @ h), omega)
    theta, psi, phi, x = torch.randn(3, 2), torch.randn(3, 4), torch.randn(4), torch.randn(100)
    apart = (lec.written_out(x, theta, psi, phi) - lec.written_out_mlp(theta, psi, phi)(x[:, None])[:, 0]).abs().max()
    out = [
        f"scalar function of a vector a {tuple(f.shape)}: ∂f/∂a {tuple(dl_df.shape)}",
        f"scalar function of a matrix A {tuple(omega.shape)}: ∂f/∂A {tuple(dl_domega.shape)}",
        f"vector f {tuple(f.shape)} of a vector h {tuple(h.shape)}: ∂f/∂h {tuple(df_dh.shape)}, rows are variables",
        f"∂f/∂h = Ωᵀ: {torch.equal(df_dh, omega.T)}",
        f"∂f/∂β = I: {torch.equal(df_dbeta, torch.eye(3))}",
        f"∂a/∂b is diagonal, ∂a/∂b ∂ℓ/∂a = I[b > 0] ⊙ ∂ℓ/∂a: {torch.equal(da_db @ dl_da, lec.relu_backward(f, dl_da))}",
        f"∂ℓ/∂h = ∂f/∂h ∂ℓ/∂f: {torch.allclose(lec.chain_rule(loss, layer, h), jacobian(lambda h: loss(layer(h)), h))}",
        f"∂ℓ/∂Ω = ∂ℓ/∂f hᵀ: {torch.allclose(dl_domega, weight_gradient(dl_df, h))}",
        "twice the activation, twice the effect of a weight: "
        f"{torch.equal(weight_gradient(dl_df, 2 * h), 2 * weight_gradient(dl_df, h))}",
        f"two hidden layers of three units, written out as one equation, and as a network: {apart:.0e} apart",
    ]
    sys.stdout.write("\n".join(out) + "\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    panels = [
        (r"$\Omega$", omega, "f", "h"),
        (r"$\partial f/\partial h = \Omega^T$", df_dh, "h", "f"),
        (r"$\partial f/\partial\beta = I$", df_dbeta, r"\beta", "f"),
        (r"$\partial a/\partial b$, ReLU", da_db, "b", "a"),
    ]
    draw(panels).savefig(args.output)
    sys.stdout.write(f"figure: {args.output}\n")


if __name__ == "__main__":
    main()
