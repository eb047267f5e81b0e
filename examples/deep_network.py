"""Traces both passes of a network on handwritten digits, before and after training; checks them and takes a step.

python examples/deep_network.py --output deep_network.png
"""

import argparse
import sys
from pathlib import Path

import torch

import torch_manualbp as mbp

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f"{error}: this example needs the extra `demo`: pip install '.[demo]'")

SIZES, BATCH, STEPS, ALPHA = (64, 32, 24, 16, 10), 24, 1500, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description="Traces a network on handwritten digits.")
    parser.add_argument("--output", type=Path, default=Path("deep_network.png"), help="figure (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = pixels.double() / 16
    x, y = images[:BATCH], labels[:BATCH]
    model = mbp.MLP(SIZES, dtype=torch.float64)

    # One step of SGD with the traced gradients, φ ← φ − α ∂L/∂φ, is the step of torch.optim.SGD.
    before = mbp.trace(model, x, y, "cross_entropy", "mean")
    optimizer = torch.optim.SGD(model.parameters(), lr=ALPHA)
    torch.nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    apart = max(
        (layer.weight - ALPHA * domega - model.get_parameter(layer.parameter_name("weight"))).abs().max().item()
        for layer, domega in zip(before.layers, before.dl_domega, strict=True)
    )

    for _ in range(STEPS):
        rows = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        model.loss_backward(images[rows], labels[rows], "cross_entropy", "mean")
        optimizer.step()
    trace = mbp.trace(model, x, y, "cross_entropy", "mean")
    hardest = int(trace.losses.argmax()) if trace.losses is not None else 0
    differences = trace.verify()
    norms = torch.cat([trace.per_sample_dl_domega(k).flatten(1) for k in range(len(trace.f))], dim=1).norm(dim=1)
    share = norms[hardest] / norms.mean()
    stored = sum(h.numel() * h.element_size() for h in trace.h)
    out = [
        str(trace),
        f"loss of this batch: {before.loss:.3f} before training, {trace.loss:.3f} after {STEPS} steps",
        f"a step with the traced gradients and one of torch.optim.SGD: {apart:.1e} apart",
        f"largest difference to autograd: {float(differences):.1e}, "
        f"to finite differences: {max(d for d in differences.finite_differences.values() if d == d):.1e}",
        f"example {hardest} has the largest loss, and {share:.1f} times the mean gradient norm of an example",
        f"memory hungry: the backward pass needs every h_k, {stored / 1024:.1f} KiB for {BATCH} examples",
    ]
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
