"""Computes every intermediate quantity and every derivative of the lecture's toy network in four ways.

They are computed by hand in plain numbers (`lecture.ToyNetwork`), by the kernels that train (`trace`), by autograd on
one expression, and by finite differences.

    python examples/toy_network.py --output toy_network.png
"""

import argparse
import sys
from pathlib import Path

import torch

import torch_manualbp as mbp
from torch_manualbp.lecture import ToyBackward, ToyForward, ToyNetwork

TOY = ToyNetwork(beta=(0.4, -0.3, 0.2, 1.0), omega=(1.5, 0.8, 1.2, -0.7))
X, Y = 0.9, 0.5
STEP = 1e-6


def by_autograd() -> list[float]:
    """∂ℓ/∂ω_k, then ∂ℓ/∂β_k, from PyTorch's own linear, ReLU and autograd on the nested expression."""
    omega, beta = (torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in (TOY.omega, TOY.beta))
    h = torch.tensor(X, dtype=torch.float64)
    for k in range(4):
        f = beta[k] + omega[k] * h
        h = torch.relu(f)
    return [d.item() for grad in torch.autograd.grad((f - Y) ** 2, (omega, beta)) for d in grad]


def by_finite_differences() -> list[float]:
    """(ℓ(p + ε) − ℓ(p − ε)) / 2ε for each parameter p."""
    parameters = [*TOY.omega, *TOY.beta]

    def loss(j: int, change: float) -> float:
        moved = [p + change * (i == j) for i, p in enumerate(parameters)]
        return (ToyNetwork(omega=moved[:4], beta=moved[4:])(X) - Y) ** 2

    return [(loss(j, STEP) - loss(j, -STEP)) / (2 * STEP) for j in range(8)]


def lines(forward: ToyForward, backward: ToyBackward) -> list[str]:
    """The two passes, in the order in which they are computed."""
    out = ["forward pass"]
    out += [f"  {name.replace('loss', 'ℓ'):2} = {value:9.6f}" for name, value in forward._asdict().items()]
    out += ["backward pass, in reverse order"]
    out += [f"  ∂ℓ/∂{name[4:]} = {getattr(backward, name):9.6f}" for name in backward._fields[:7]]
    out += ["parameters"]
    for symbol, grads in (("ω", backward.dl_domega), ("β", backward.dl_dbeta)):
        out += [f"  ∂ℓ/∂{symbol}{k} = {grad:9.6f}" for k, grad in enumerate(grads)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="The toy network's forward and backward pass, by hand.")
    parser.add_argument("--output", type=Path, default=Path("toy_network.png"), help="figure (default: %(default)s)")
    args = parser.parse_args()
    forward = TOY.forward(X, Y)
    backward = TOY.backward(forward)
    x, y = torch.tensor([[X]], dtype=torch.float64), torch.tensor([[Y]], dtype=torch.float64)
    trace = mbp.trace(TOY.mlp(), x, y)
    by_hand = [*backward.dl_domega, *backward.dl_dbeta]
    by_kernels = [grad.item() for grad in (*trace.dl_domega, *(d for d in trace.dl_dbeta if d is not None))]
    out = lines(forward, backward)
    out.append(f"∂ℓ/∂f0 = {' · '.join(TOY.local_partials(forward))}")
    for name, other in (
        ("the kernels that train (mbp.trace)", by_kernels),
        ("autograd", by_autograd()),
        ("finite differences", by_finite_differences()),
    ):
        apart = max(abs(a - b) for a, b in zip(by_hand, other, strict=True))
        out.append(f"equal to {name}: largest difference {apart:.1e}")
    sys.stdout.write("\n".join(out) + "\n")
    try:
        figure = trace.plot()
    except ImportError:
        sys.stdout.write("no figure: it needs matplotlib: pip install '.[demo]'\n")
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)
    sys.stdout.write(f"figure: {args.output}\n")


if __name__ == "__main__":
    main()
