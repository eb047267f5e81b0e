"""The JAX peer of training_step.py, in its own process so that XLA's threads do not compete with torch's.

It reads a network's arrays from the .npz file named by its argument, compiles a training step with `jax.jit`, and then
prints one line for each line of its standard input. A number n runs n steps and prints the seconds they took; a file
name saves the gradients of the last step there and prints the name. Between requests it blocks in a read.
"""

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def mean_squared_error(parameters: list[tuple[Any, Any]], x: Any, target: Any) -> Any:
    """The loss of a ReLU network; `parameters` holds (weight (D_out, D_in), bias (D_out,)) for each layer."""
    h = x
    for k, (weight, bias) in enumerate(parameters):
        f = h @ weight.T + bias
        h = f if k == len(parameters) - 1 else jax.nn.relu(f)
    return jnp.mean((h - target) ** 2)


def main() -> None:
    """Compiles the step, then answers requests."""
    arrays = np.load(sys.argv[1])
    layers = range((len(arrays.files) - 2) // 2)
    parameters = [(jnp.asarray(arrays[f"weight{k}"]), jnp.asarray(arrays[f"bias{k}"])) for k in layers]
    x, target = jnp.asarray(arrays["x"]), jnp.asarray(arrays["target"])
    step = jax.jit(jax.value_and_grad(mean_squared_error))
    wait: Any = jax.block_until_ready  # untyped
    result = wait(step(parameters, x, target))
    print("ready", flush=True)
    for line in sys.stdin:
        request = line.strip()
        if request.isdigit():
            start = time.perf_counter()
            for _ in range(int(request)):
                result = wait(step(parameters, x, target))
            print(time.perf_counter() - start, flush=True)
        else:
            np.savez(request, *(np.asarray(gradient) for layer in result[1] for gradient in layer))
            print(request, flush=True)


if __name__ == "__main__":
    main()
