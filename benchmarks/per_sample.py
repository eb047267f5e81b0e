"""How fast are per-sample gradients? Compares this library with torch.func, Opacus and an ordinary training step.

    python benchmarks/per_sample.py --json build/per_sample.json

Peers, rounds and checks work as in training_step.py: all peers alternate in one process, and the median of the rounds'
ratios is reported. The loss is mean squared error, and there is no optimiser. Every peer's result is checked first: the
mean of the per-sample gradients, and the clipped sum with an infinite bound, must equal the gradient of the batch, and
the norms must be those of the per-sample gradients. Opacus is left out if it is not installed (pip install opacus).

tests/test_per_sample.py bounds the memory that the norms need.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import torch_manualbp as mbp
from training_step import Builder, Step, Timing, Workload, as_mlp, drop_in, eager, measure

MNIST, RL256 = [784, 512, 512, 10], [17, 256, 256, 1]


def means_of(run: Callable[[], Mapping[str, Tensor]]) -> Step:
    """A step that computes per-sample gradients; their mean over the batch is checked."""
    return Step(run, lambda: [gradient.mean(0) for gradient in run().values()])


def ours(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
    """`per_sample_gradients`."""
    return means_of(partial(mbp.per_sample_gradients, as_mlp(model), x, target))


def by_vmap(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
    """``torch.func.vmap(torch.func.grad(loss))``, as in PyTorch's tutorial."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        output = functional_call(model, parameters, (x.unsqueeze(0),))
        return F.mse_loss(output, target.unsqueeze(0))

    return means_of(partial(vmap(grad(loss), in_dims=(None, 0, 0)), parameters, x, target))


def opacus(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
    """Opacus wraps the model; its backward pass stores ``.grad_sample``."""
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(model)
    parameters = list(model.parameters())

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
        F.mse_loss(wrapped(x), target).backward()  # type: ignore[no-untyped-call]

    return Step(run, lambda: [parameter.grad_sample.mean(0) for parameter in parameters])  # type: ignore[attr-defined]


def norms(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
    """`per_sample_gradient_norms`."""
    mlp = as_mlp(model)

    def checked() -> list[Tensor]:
        rows = slice(0, 64)
        gradients = mbp.per_sample_gradients(mlp, x[rows], target[rows])
        expected = torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1).norm(dim=1)
        actual = mbp.per_sample_gradient_norms(mlp, x[rows], target[rows])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)  # float32, up to 670 thousand squares
        return eager_gradients(model, x, target)

    return Step(partial(mbp.per_sample_gradient_norms, mlp, x, target), checked)


def clipped(model: nn.Sequential, x: Tensor, target: Tensor) -> Step:
    """`clipped_gradients`."""
    mlp = as_mlp(model)

    def checked() -> list[Tensor]:
        return [total / len(x) for total in mbp.clipped_gradients(mlp, x, target, float("inf")).values()]

    return Step(partial(mbp.clipped_gradients, mlp, x, target, 1.0), checked)


def eager_gradients(model: nn.Sequential, x: Tensor, target: Tensor) -> list[Tensor]:
    """The gradients of an ordinary step."""
    step = eager(model, x, target)
    step.run()
    return step.gradients()


STEPS: dict[str, Builder] = {"eager": eager, "mbp.MLP": drop_in}  # ordinary training steps, for comparison
NORMS: dict[str, Builder] = {**STEPS, "norms": norms, "clipped sum": clipped}
GRADIENTS: dict[str, Builder] = {
    "eager": eager,
    "per_sample_gradients": ours,
    "vmap(grad)": by_vmap,
    **({"Opacus": opacus} if importlib.util.find_spec("opacus") else {}),
}

TABLES: list[tuple[Workload, dict[str, Builder], str]] = [
    (Workload("mnist", MNIST, 512), GRADIENTS, "per_sample_gradients"),
    (Workload("rl256", RL256, 512), GRADIENTS, "per_sample_gradients"),
    (Workload("mnist", MNIST, 4096), NORMS, "norms"),
    (Workload("rl256", RL256, 4096), NORMS, "norms"),
]


def ratio(timing: Timing, reference: Timing) -> float:
    """This peer's time / the reference's, the median over the rounds."""
    return statistics.median(own / other for own, other in zip(timing.seconds, reference.seconds, strict=True))


def main() -> None:
    """Measures and prints a table per workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rows", type=int, help="rows of every batch (default: 512, and 4096 for the norms)")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    options = parser.parse_args()
    report: list[dict[str, Any]] = []
    for workload, builders, reference in TABLES:
        load = Workload(workload.name, workload.sizes, options.rows or workload.batch)
        timings = measure(load, list(builders), options.rounds, builders)
        sys.stdout.write(f"\n{load.name} {load.sizes}, {load.batch} rows: time, and as a multiple of {reference}\n\n")
        sys.stdout.write(f"| {'':20} | {'ms':>9} | {'times':>6} |\n|{'-' * 22}|{'-' * 11}|{'-' * 8}|\n")
        for peer, timing in timings.items():
            if timing.error:
                sys.stdout.write(f"| {peer:20} | {timing.error}\n")
                continue
            times = ratio(timing, timings[reference])
            sys.stdout.write(f"| {peer:20} | {timing.median_seconds * 1e3:9.3f} | {times:6.2f} |\n")
            report.append(
                {"workload": load.name, "rows": load.batch, "peer": peer, "times": times, "seconds": timing.seconds}
            )
        sys.stdout.flush()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
