"""The JAX peers of training_step.py and whole_step.py, in a process of their own whose threads do not disturb torch's.

    python benchmarks/jax_step.py network.npz gradients    # the loss and its gradients, on one batch
    python benchmarks/jax_step.py network.npz adam         # and Adam's update, batch after batch
    python benchmarks/jax_step.py network.npz scan         # the same, with all batches of an epoch in one call
    python benchmarks/jax_step.py network.npz gather_scan  # the same, with all rows gathered before the first step

It reads the arrays of a network from the file, compiles with `jax.jit`, and then prints one line for each line of its
standard input. A number n runs n steps and prints the seconds they took; "rate x" sets Adam's learning rate; a file
name saves the results there and prints the name: the gradients, or the parameters and both moments. Between requests it
blocks in a read.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch's defaults
wait: Any = jax.block_until_ready  # untyped


def mean_squared_error(parameters: list[tuple[Any, Any]], x: Any, target: Any) -> Any:
    """The loss of a ReLU network; `parameters` holds (weight (D_out, D_in), bias (D_out,)) for each layer."""
    h = x
    for k, (weight, bias) in enumerate(parameters):
        f = h @ weight.T + bias
        h = f if k == len(parameters) - 1 else jax.nn.relu(f)
    return jnp.mean((h - target) ** 2)


def adam_step(state: Any, rate: Any, x: Any, target: Any) -> tuple[Any, Any]:
    """A training step with Adam; `state` holds the parameters, both moments and the number of steps so far."""
    parameters, first, second, steps = state
    loss, gradients = jax.value_and_grad(mean_squared_error)(parameters, x, target)
    first = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, first, gradients)
    second = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, second, gradients)
    steps = steps + 1
    correction1 = -jnp.expm1(steps * math.log(BETA1))  # 1 - β1^steps
    correction2 = jnp.sqrt(-jnp.expm1(steps * math.log(BETA2)))
    parameters = jax.tree.map(
        lambda p, m, v: p - rate / correction1 * m / (jnp.sqrt(v) / correction2 + EPS), parameters, first, second
    )
    return (parameters, first, second, steps), loss


class Gradients:
    """The loss and its gradients, always of the same batch."""

    def __init__(self, parameters: list[tuple[Any, Any]], arrays: Mapping[str, Any]) -> None:
        self.arguments = parameters, jnp.asarray(arrays["x"]), jnp.asarray(arrays["target"])
        self.compiled = jax.jit(jax.value_and_grad(mean_squared_error))
        self.run(1)

    def run(self, steps: int) -> None:
        """Runs steps."""
        for _ in range(steps):
            self.last = wait(self.compiled(*self.arguments))

    def results(self) -> Any:
        """The gradients of the last step."""
        return self.last[1]


class Adam:
    """Training steps with Adam; the batches, `rows` (batches, B) of x (N, D_in) and target (N, D_out), take turns."""

    def __init__(self, parameters: list[tuple[Any, Any]], arrays: Mapping[str, Any]) -> None:
        zeros = [jax.tree.map(jnp.zeros_like, parameters) for _ in range(2)]
        self.state = (parameters, *zeros, jnp.zeros(()))
        self.rate = jnp.zeros(())
        self.prepare(jnp.asarray(arrays["x"]), jnp.asarray(arrays["target"]), jnp.asarray(arrays["rows"]))

    def prepare(self, x: Any, target: Any, rows: Any) -> None:
        """Gathers the batches, so that the steps have them at hand."""
        self.batches = itertools.cycle(wait([(x[batch], target[batch]) for batch in rows]))
        self.compiled = jax.jit(adam_step, donate_argnums=0)  # the update is in place

    def run(self, steps: int) -> None:
        """Runs steps; only the last is waited for, because JAX need not return to Python in between."""
        for _ in range(steps):
            self.state, _ = self.compiled(self.state, self.rate, *next(self.batches))
        wait(self.state)

    def results(self) -> Any:
        """The parameters and both moments."""
        return self.state[:3]


def gather(x: Any, target: Any, rows: Any) -> tuple[Any, Any]:
    """These rows of both; that they exist is not checked."""
    return jnp.take(x, rows, axis=0, mode="clip"), jnp.take(target, rows, axis=0, mode="clip")


class Scan(Adam):
    """The same steps by `jax.lax.scan`, which gathers the rows of each batch."""

    def prepare(self, x: Any, target: Any, rows: Any) -> None:
        """Compiles an epoch."""
        self.x, self.target, self.rows = x, target, rows
        self.compiled = jax.jit(self.epoch, donate_argnums=0)

    @staticmethod
    def epoch(state: Any, rate: Any, rows: Any, x: Any, target: Any) -> Any:
        """A step for each row of `rows` (batches, B)."""
        return jax.lax.scan(lambda state, batch: adam_step(state, rate, *gather(x, target, batch)), state, rows)

    def run(self, steps: int) -> None:
        """Runs epochs, and as many steps of another as remain."""
        epochs, rest = divmod(steps, len(self.rows))
        for rows in [self.rows] * epochs + [self.rows[:rest]] * (rest > 0):
            self.state, _ = wait(self.compiled(self.state, self.rate, rows, self.x, self.target))


class GatherScan(Scan):
    """The same steps after the rows of all batches have been gathered at once: faster for the smallest networks."""

    @staticmethod
    def epoch(state: Any, rate: Any, rows: Any, x: Any, target: Any) -> Any:
        """A step for each row of `rows` (batches, B)."""
        return jax.lax.scan(lambda state, batch: adam_step(state, rate, *batch), state, gather(x, target, rows))


KINDS: dict[str, Callable[..., Any]] = {
    "gradients": Gradients,
    "adam": Adam,
    "scan": Scan,
    "gather_scan": GatherScan,
}


def main() -> None:
    """Compiles, then answers requests."""
    file, kind = sys.argv[1:]
    arrays = np.load(file)
    layers = range(sum(name.startswith("weight") for name in arrays.files))
    training = KINDS[kind](
        [(jnp.asarray(arrays[f"weight{k}"]), jnp.asarray(arrays[f"bias{k}"])) for k in layers], arrays
    )
    print("ready", flush=True)
    for line in sys.stdin:
        request = line.strip()
        if request.isdigit():
            start = time.perf_counter()
            training.run(int(request))
            print(time.perf_counter() - start, flush=True)
        elif request.startswith("rate "):
            training.rate = jnp.asarray(float(request.split()[1]))
            print(request, flush=True)
        else:
            np.savez(request, *map(np.asarray, jax.tree.leaves(training.results())))
            print(request, flush=True)


if __name__ == "__main__":
    main()
