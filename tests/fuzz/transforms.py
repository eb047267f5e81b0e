"""Draws nestings of torch.func's transforms over random networks, and compares with the same nesting of plain torch.

A function of (parameters, x) is transformed step by step, from the inside out. Each step makes a function of the same
arguments: a vmap adds a dimension to some of them, and `make` gives them all dimensions that the steps ask for.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import torch_manualbp as mbp
from fuzz.differential import UndecidableError
from helpers import closed_mlp, plain_mlp, plain_network, recomputing_mlp

__all__ = ["Case", "UndecidableError", "check", "draw", "simpler", "torch"]

Parameters = list[Tensor]  # weights, then biases
Function = Callable[[Parameters, Tensor], Any]

STEPS = (
    "vmap x", "vmap parameters", "vmap some", "vmap all", "grad x", "grad parameters", "grad all", "grad_and_value",
    "jacrev x", "jacrev parameters", "jacfwd x", "hessian x", "jvp", "vjp", "autograd",
)  # fmt: skip
ENTRIES = ("mlp", "closed", "recompute", "module")


@dataclass(frozen=True)
class Case:
    """A network and the transforms of it. Its repr is Python code that creates it."""

    seed: int = 0
    entry: str = "mlp"
    leading: tuple[int, ...] = (2,)  # of the input, before any vmap
    sizes: tuple[int, ...] = (2, 3, 2)
    biases: tuple[int, ...] = ()  # the layers that have a bias
    steps: tuple[str, ...] = ()  # from the inside out
    threads: int = 1


def draw(seed: int) -> Case:
    """The case of this seed."""
    rng = random.Random(seed)
    layers = rng.choice((1, 2, 2, 3, 4))
    steps = [rng.choice(STEPS) for _ in range(rng.choice((1, 2, 2, 3, 3, 4)))]
    while sum(step.startswith(("jac", "hessian")) for step in steps) > 2:  # each multiplies the size of the result
        steps[rng.randrange(len(steps))] = rng.choice(STEPS)
    return Case(
        seed=seed,
        entry=rng.choice(ENTRIES),
        leading=tuple(rng.randint(1, 3) for _ in range(rng.choice((0, 0, 1, 1, 2)))),
        sizes=tuple(rng.choice((1, 2, 3, 5)) for _ in range(layers + 1)),
        biases=tuple(k for k in range(layers) if rng.random() < 0.8),
        steps=tuple(steps),
        threads=rng.choice((1, 1, 2, 3)),
    )


def check(case: Case) -> None:
    """Raises AssertionError if the results differ from plain torch's, or with the number of threads."""
    torch.set_num_threads(1)
    try:
        want = _results(case, _plain(case))
    except (RuntimeError, NotImplementedError) as error:  # torch itself cannot
        raise UndecidableError from error
    got = _results(case, _ours(case))
    assert len(got) == len(want)
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=lambda text, i=i: f"result {i}: {text}")
    if case.threads > 1:
        torch.set_num_threads(case.threads)
        again = _results(case, _ours(case))
        torch.set_num_threads(1)
        for one, other in zip(again, got, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, msg=lambda text: f"{case.threads} threads: {text}")


def simpler(case: Case) -> Iterator[Case]:
    """Yields simpler cases."""
    for k in range(len(case.steps)):
        yield replace(case, steps=case.steps[:k] + case.steps[k + 1 :])
    for k in range(1, len(case.sizes) - 1):
        kept = tuple(j for j in case.biases if j < len(case.sizes) - 2)
        yield replace(case, sizes=case.sizes[:k] + case.sizes[k + 1 :], biases=kept)
    for k, width in enumerate(case.sizes):
        if width > 1:
            yield replace(case, sizes=(*case.sizes[:k], width - 1, *case.sizes[k + 1 :]))
    if case.leading:
        yield replace(case, leading=case.leading[1:])
    for k in range(len(case.biases)):
        yield replace(case, biases=case.biases[:k] + case.biases[k + 1 :])
    if case.threads > 1:
        yield replace(case, threads=1)


# --- the network ------------------------------------------------------------------------------------------------------


def _split(case: Case, parameters: Parameters) -> tuple[list[Tensor], list[Tensor | None]]:
    layers = len(case.sizes) - 1
    biases = iter(parameters[layers:])
    return parameters[:layers], [next(biases) if k in case.biases else None for k in range(layers)]


def _plain(case: Case) -> Function:
    return lambda parameters, x: plain_mlp(x, *_split(case, parameters), final_relu=case.entry == "closed")


def _ours(case: Case) -> Function:
    if case.entry == "module":
        return _module(case)
    function = {"mlp": mbp.mlp, "closed": closed_mlp, "recompute": recomputing_mlp}[case.entry]
    return lambda parameters, x: function(x, *_split(case, parameters))


def _module(case: Case) -> Function:
    model = plain_network(case.sizes, dtype=torch.float64)
    for k, layer in enumerate(list(model)[::2]):
        layer.bias = layer.bias if k in case.biases else None
    names = [f"{2 * k}.weight" for k in range(len(case.sizes) - 1)] + [f"{2 * k}.bias" for k in case.biases]
    fused = mbp.fuse(nn.Sequential(*model)) if len(case.sizes) > 2 else model
    return lambda parameters, x: functional_call(fused, dict(zip(names, parameters, strict=True)), (x,))


# --- the transforms ---------------------------------------------------------------------------------------------------


def _results(case: Case, function: Function) -> list[Tensor]:
    """All tensors of the result, on arguments with the dimensions that the steps ask for."""
    rng, made = random.Random(case.seed), torch.Generator().manual_seed(case.seed)
    pairs = list(itertools.pairwise(case.sizes))
    shapes = [[d_out, d_in] for d_in, d_out in pairs] + [[pairs[k][1]] for k in case.biases]
    shapes.append([*case.leading, case.sizes[0]])
    for step in case.steps:
        function = _transformed(step, function, shapes, rng)
    *parameters, x = [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]
    return [leaf for leaf in tree_leaves(function(parameters, x)) if isinstance(leaf, Tensor)]


def _transformed(step: str, function: Function, shapes: list[list[int]], rng: random.Random) -> Function:
    """The transformed function; a vmap also inserts its dimension into the shapes of parameters and x."""
    if step.startswith("vmap"):
        dims, size = [], rng.randint(1, 3)
        for i, shape in enumerate(shapes):
            mapped = {"x": i == len(shapes) - 1, "parameters": i < len(shapes) - 1, "all": True}
            chosen = mapped.get(step.removeprefix("vmap "), rng.random() < 0.5 or i == len(shapes) - 1)
            dims.append(rng.randint(0, len(shape)) if chosen else None)
            if dims[-1] is not None:
                shape.insert(dims[-1], size)
        return vmap(function, (dims[:-1], dims[-1]), chunk_size=rng.choice((None, None, 1)))
    simple = {
        "grad x": lambda: grad(_total(function), 1),
        "grad parameters": lambda: grad(_total(function), 0),
        "grad all": lambda: grad(_total(function), (0, 1)),
        "grad_and_value": lambda: grad_and_value(_total(function), 0),
        "jacrev x": lambda: jacrev(function, 1),
        "jacrev parameters": lambda: jacrev(function, 0),
        "jacfwd x": lambda: jacfwd(function, 1),
        "hessian x": lambda: hessian(_total(function), 1),
    }
    if step in simple:
        return simple[step]()
    return {"jvp": _jvp, "vjp": _vjp, "autograd": _autograd}[step](function)


def _total(function: Function) -> Function:
    """The sum of the squares of all results."""
    return lambda parameters, x: sum(leaf.pow(2).sum() for leaf in tree_leaves(function(parameters, x)))


def _jvp(function: Function) -> Function:
    return lambda parameters, x: jvp(function, (parameters, x), (tree_map(torch.cos, parameters), torch.sin(x)))


def _vjp(function: Function) -> Function:
    def pulled(parameters: Parameters, x: Tensor) -> Any:
        output, pull = vjp(function, parameters, x)
        return output, pull(tree_map(torch.cos, output))

    return pulled


def _autograd(function: Function) -> Function:
    """The gradients of ``backward`` around everything inside. It must be the outermost; elsewhere it changes nothing."""

    def differentiated(parameters: Parameters, x: Tensor) -> Any:
        leaves = [*parameters, x]
        if torch._C._are_functorch_transforms_active():
            return function(parameters, x)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        total = _total(function)(leaves[:-1], leaves[-1])
        if not isinstance(total, Tensor) or not total.requires_grad:
            return total
        first = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
        again = sum(one.pow(2).sum() for one in first)
        second = torch.autograd.grad(again, leaves, materialize_grads=True) if again.requires_grad else ()
        return [leaf.detach() for leaf in (total, *first, *second)]

    return differentiated
