"""How a call is computed, once `_route` has said by whom: `layers` for a network, `loss` for a network with its loss.

Arguments are tensors; shapes and dtypes are checked by whatever computes.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from torch_manualbp import _graph, _ops, _transforms, reference
from torch_manualbp._checks import Activations, check_layers, check_tensor, name_call
from torch_manualbp._losses import LossSpec
from torch_manualbp._route import (
    AUTOCAST,
    FUNC,
    GRAPH,
    KERNELS,
    TORCH,
    loss_is_ours_under_autocast,
    route,
    target_is_ours,
    torch_may_be_faster,
)
from torch_manualbp.autograd import AutocastFunction, LinearReLUFunction, MLPFunction, MLPLossFunction

# Told of each network that our kernels compute, while `fusion_report` runs a model.
recorder: Callable[[str, Tensor, Sequence[Tensor], bool], None] | None = None


def memory_is_short(error: RuntimeError) -> bool:
    """Whether torch's allocator raised this error.

    Then plain torch, which takes about as much, is not tried: what a call returns must not depend on how much is free.
    """
    message = str(error).lower()  # torch has no class for it on the CPU
    return any(words in message for words in ("allocate memory", "not enough memory", "out of memory"))


def layers(
    way: str,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    final_relu: bool,
    store: bool,
    masks: "Masks | None" = None,
    cuts: Sequence[int] = (),
) -> Tensor:
    """f_{K−1}, or h_K = a[f_{K−1}] if `final_relu`; `store` keeps the hidden activations for the backward pass.

    masks: for `KERNELS` on the CPU and `AUTOCAST`, of the dropout after the layers, if there is any.
    cuts: of `segments`; for `KERNELS` and `AUTOCAST` with `store`.
    """
    if recorder is not None and way is not TORCH:
        recorder(way, input, weights, final_relu)
    if way is KERNELS:
        if torch.is_grad_enabled() and (first := _first_that_learns(input, weights, biases)) < len(weights):
            if first > 0:  # below it there is nothing to learn, so that no activation is needed again
                below = masks.arguments(0, first) if masks else ()
                op = _ops.mlp_dropout if below else _ops.mlp
                input, _ = op(input, weights[:first], biases[:first], True, False, *below)
            for cut in cuts if store else ():
                if first < cut:
                    drawn = masks.arguments(first, cut) if masks else ()
                    parameters = *weights[first:cut], *biases[first:cut]
                    input = MLPFunction.record(input, True, True, cut - first, *parameters, *drawn)[0]
                    first = cut
            drawn = masks.arguments(first, None) if masks else ()
            if first > 0:
                weights, biases = weights[first:], biases[first:]
            recorded: Tensor = MLPFunction.record(input, final_relu, store, len(weights), *weights, *biases, *drawn)[0]
            return recorded
        drawn = masks.arguments(0, None) if masks else ()
        op = _ops.mlp_dropout if drawn else _ops.mlp
        output: Tensor = op(input, weights, biases, final_relu, False, *drawn)[0]
        return output
    if way is AUTOCAST:
        return _under_autocast(input, weights, biases, final_relu, store, masks, cuts)
    if way is GRAPH:
        if torch.is_autocast_enabled("cpu"):  # the casts are part of the graph
            dtype = torch.get_autocast_dtype("cpu")
            if dtype is torch.bfloat16 and torch_may_be_faster(weights):
                return reference.mlp_forward(input, weights, biases, final_relu)[0]
            input, weights = input.to(dtype), [weight.to(dtype) for weight in weights]
            biases = [None if bias is None else bias.to(dtype) for bias in biases]
        captured: Tensor = _graph.layers(input, weights, biases, final_relu, store)
        return captured
    if way is FUNC:
        return _transforms.layers(input, weights, biases, final_relu, store)
    return reference.mlp_forward(input, weights, biases, final_relu)[0]


def _under_autocast(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    final_relu: bool,
    store: bool,
    masks: "Masks | None",
    cuts: Sequence[int],
) -> Tensor:
    dtype, last = torch.get_autocast_dtype("cpu"), len(weights)
    learns = _first_that_learns(input, weights, biases) if torch.is_grad_enabled() else last
    first = 0
    for end in (learns, *(cuts if store else ()), last):  # nothing is kept of the layers below `learns`
        if end <= first:
            continue
        drawn = masks.arguments(first, end) if masks else ()
        relu, omega, beta = final_relu or end < last, weights[first:end], biases[first:end]
        if first >= learns:
            input = AutocastFunction.record(input, (dtype, relu, store, end - first), *omega, *beta, *drawn)
        else:
            kept, scales = drawn or (None, ())
            input, _ = _ops.mlp_autocast(input, omega, beta, relu, False, kept, scales, dtype)
        first = end
    return input


SEGMENT_BYTES = 25 << 20  # as much as DistributedDataParallel sends at once
_UNCUT = 1 << 20  # a network of more numbers is computed layer by layer (plan.h), so that a cut does not change a bit


def segments(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], segment_bytes: int = SEGMENT_BYTES
) -> tuple[int, ...]:
    """Where a large network is cut into several nodes of autograd: before which layers a segment begins.

    A node hands over the gradients of all its parameters at once. With a node per segment, those of the upper layers
    are sent to other processes, or used and freed, while those of the lower ones are being computed.

    Args:
        weights: Ω_k.
        biases: β_k.
        segment_bytes: the least size of the parameters of a segment.
    """
    cuts: list[int] = []
    numbers = size = 0
    for k in reversed(range(len(weights))):  # the backward pass begins at the last layer
        for parameter in (weights[k], biases[k]):
            if parameter is not None:
                numbers += parameter.numel()
                size += parameter.numel() * parameter.element_size()
        if size >= segment_bytes and numbers > _UNCUT:
            cuts.append(k)
            numbers = size = 0
    return tuple(reversed(cuts[:-1]))  # what is left below the lowest cut, perhaps nothing, belongs to its segment


def linear_relu(
    way: str, input: Tensor, weight: Tensor, bias: Tensor | None, called: torch.nn.Module | None = None
) -> Tensor:
    """`layers` of one layer with its ReLU: the same numbers, without a list of anything.

    called: the module whose class errors name. (Without one, they name the function.)
    """
    try:
        if way is not KERNELS:
            return layers(way, input, (weight,), (bias,), True, True)
        if torch.is_grad_enabled() and (
            weight.requires_grad or input.requires_grad or (bias is not None and bias.requires_grad)
        ):
            output: Tensor = LinearReLUFunction.record(input, weight, bias)
        else:
            output = _ops.linear_relu(input, weight, bias)
    except RuntimeError as error:
        name_call(error, "linear_relu" if called is None else type(called).__name__)
        raise
    return output


def loss(
    way: str,
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    spec: LossSpec,
) -> Tensor:
    """The loss of the network's output; `KERNELS`, `AUTOCAST` and `GRAPH` make its gradients at once."""
    if way is GRAPH and not torch.is_autocast_enabled("cpu"):
        options = (spec.name, spec.reduction, spec.ignore_index, spec.label_smoothing)
        captured: Tensor = _graph.loss(input, target, weights, biases, *options)
        return captured
    if way is AUTOCAST:
        dtype = torch.get_autocast_dtype("cpu")
        if target_is_ours(input, target, spec, way=way) and loss_is_ours_under_autocast(input, weights, biases, dtype):
            way, spec = KERNELS, spec.under_autocast(dtype)
    if way is not KERNELS:
        return spec.of(layers(way, input, weights, biases, False, True), target)
    if torch.is_grad_enabled() and _first_that_learns(input, weights, biases) < len(weights):
        value: Tensor = MLPLossFunction.record(input, target, spec, len(weights), *weights, *biases)
        return value
    return spec.run(input, target, weights, biases, [False] * (1 + 2 * len(weights)))[0]


def run_layers(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    final_relu: bool = False,
    activations: Activations = "store",
) -> Tensor:
    """`mlp`, with a ReLU after the last layer too if `final_relu`: what the backend puts into a graph."""
    check_tensor("mlp", "input", input)
    weights, biases = check_layers("mlp", weights, biases)
    store = activations == "store"
    return layers(route(input, (*weights, *biases), store), input, weights, biases, final_relu, store)


class Masks(NamedTuple):
    """The masks of the dropout in a network: of each layer which numbers are kept, flat, and 1/(1−p); or None and 0."""

    kept: list[Tensor | None]
    scales: list[float]

    def arguments(self, first: int, last: int | None) -> tuple[Tensor, list[float]] | tuple[()]:
        """`kept` and `scales` for the op `mlp_dropout`, of layers [first, last), if there is dropout."""
        kept = [mask for mask in self.kept[first:last] if mask is not None]
        return (torch.cat(kept), self.scales[first:last]) if kept else ()


def draw(p: float, input: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The mask of the dropout after this layer, and its scale. dtype: of its output.

    Where torch's dropout draws a mask of numbers and divides it by 1−p, this draws the same mask as bools: one byte per
    element. As in torch, nothing is drawn for an empty input.
    """
    mask = input.new_empty(math.prod(input.shape[:-1]) * weight.shape[0], dtype=torch.bool)
    return (mask.bernoulli_(1 - p) if mask.numel() else mask), _scale(p, dtype)


def draw_all(dropout: Sequence[float], input: Tensor, weights: Sequence[Tensor], way: str) -> Masks:
    """The masks for the probability p of the dropout after each layer, 0 where there is none.

    They are drawn from torch's generator, layer by layer, as its modules would draw them.
    """
    dtype = torch.get_autocast_dtype("cpu") if way is AUTOCAST else input.dtype
    drawn = [draw(p, input, weight, dtype) if p else (None, 0.0) for p, weight in zip(dropout, weights, strict=True)]
    return Masks([mask for mask, _ in drawn], [scale for _, scale in drawn])


@lru_cache(256)
def _scale(p: float, dtype: torch.dtype) -> float:
    """1/(1−p), as torch's dropout rounds it."""
    return float(torch.ones((), dtype=dtype, device="cpu").div_(1 - p))


def _first_that_learns(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> int:
    """The lowest layer that needs a gradient, of its parameters or its input; the number of layers if none does."""
    if input.requires_grad:
        return 0
    for k, weight in enumerate(weights):
        if weight.requires_grad or ((bias := biases[k]) is not None and bias.requires_grad):
            return k
    return len(weights)
