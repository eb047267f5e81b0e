"""The lecture's network with three hidden layers as a diagram: both passes of one example.

The biases are 0 and the weights are He's, so that about half of the ReLUs are on.

    python examples/lecture_figures.py --output three_layers.png
"""

import argparse
import sys
from pathlib import Path

import torch

import torch_manualbp as mbp

WIDTHS = (2, 4, 4, 4, 1)
SEED = 7  # with it, two of the four units of each hidden layer are on


def traced() -> mbp.inspection.trace.Trace:
    """Both passes of one example."""
    torch.manual_seed(SEED)
    model = mbp.MLP(WIDTHS, dtype=torch.float64)
    for layer in model[::2]:
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        torch.nn.init.zeros_(layer.bias)
    x, y = torch.tensor([[0.6, -0.4]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64)
    return mbp.trace(model, x, y)


def main() -> None:
    parser = argparse.ArgumentParser(description="A network with three hidden layers as a diagram.")
    parser.add_argument("--output", type=Path, default=Path("three_layers.png"), help="figure (default: %(default)s)")
    args = parser.parse_args()
    trace = traced()
    sys.stdout.write(f"{trace}\n")
    try:
        figure = trace.plot(kind="network")
    except ImportError:
        sys.stdout.write("no figure: it needs matplotlib: pip install '.[demo]'\n")
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)
    sys.stdout.write(f"figure: {args.output}\n")


if __name__ == "__main__":
    main()
