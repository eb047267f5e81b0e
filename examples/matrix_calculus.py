"""The lecture's matrix calculus: the shape of a derivative, ∂f/∂h = Ωᵀ, ∂f/∂β = I, ∂a/∂b diagonal, and the chain rule.

python examples/matrix_calculus.py --output matrix_calculus.png
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import torch_manualbp.lecture as lec
from torch_manualbp.lecture import jacobian, weight_gradient


def draw(panels: dict[str, Tensor]) -> Figure:
    """Each matrix as a heat map with its numbers."""
    figure = Figure(figsize=(3.6 * len(panels), 5.0), layout="constrained", dpi=150)
    # Each panel's width is proportional to its columns, so that elements have the same size in all panels.
    widths = [matrix.shape[1] for matrix in panels.values()]
    for place, (axes, (title, matrix)) in enumerate(
        zip(figure.subplots(1, len(panels), width_ratios=widths), panels.items(), strict=True), 1
    ):
        largest = matrix.abs().max().item()
        axes.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-1.6 * largest, vmax=1.6 * largest)
        for row, column in itertools.product(*map(range, matrix.shape)):
            value = matrix[row, column].item()
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=16)
        axes.set_title(title, fontsize=20)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("element of the function" if place > 1 else "column", fontsize=15)
        axes.set_ylabel("element of the variable" if place > 1 else "row", fontsize=15)
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
    panels = {
        r"$\Omega$": omega,
        r"$\partial f/\partial h = \Omega^T$": df_dh,
        r"$\partial f/\partial\beta = I$": df_dbeta,
        r"$\partial a/\partial b$, a ReLU": da_db,
    }
    draw(panels).savefig(args.output)
    sys.stdout.write(f"figure: {args.output}\n")


if __name__ == "__main__":
    main()
