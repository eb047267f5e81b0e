"""Gradients without autograd's graph: whether ``.grad`` may be written directly, and how it is written."""

import threading
from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor

from torch_manualbp._route import PLAIN

# Held while gradients are added, as torch's engine does: two threads may train one network.
ADDING = threading.RLock()
# The number of C++ references to a tensor: 1 is that of its Python object. Should torch no longer tell it: too many.
use_count: Callable[[Tensor], int] = getattr(Tensor, "_use_count", lambda tensor: 2)
# The dtype of a parameter's gradient. Before torch had the attribute, always that of the parameter.
grad_dtype: Callable[[Tensor], torch.dtype | None] = attrgetter(
    "grad_dtype" if hasattr(Tensor, "grad_dtype") else "dtype"
)


def unwatched(weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor] | None:
    """The trainable parameters, if writing to ``.grad`` is indistinguishable from autograd; otherwise None.

    It is not in anomaly mode, which looks for NaN, nor with a hook on a parameter, nor if ``.grad`` has another dtype,
    layout or class. A hook on the AccumulateGrad node of a parameter is invisible to Python, but the node itself is
    not: it holds a reference to the parameter, and it exists only while the owner of a hook, or a graph, holds it.
    """
    if torch.is_anomaly_enabled():
        return None
    learners = []
    for parameter in (*weights, *biases):
        if parameter is None or not parameter.requires_grad:
            continue
        if (
            parameter._backward_hooks
            or parameter._post_accumulate_grad_hooks
            or not parameter.is_leaf
            or use_count(parameter) > 1
            or grad_dtype(parameter) is not parameter.dtype
        ):
            return None
        if (grad := parameter.grad) is not None and not (
            type(grad) in PLAIN
            and grad.layout is torch.strided
            and grad.dtype is parameter.dtype
            and grad.shape == parameter.shape
            and not grad.is_inference()
        ):
            return None
        learners.append(parameter)
    return learners if len(set(map(id, learners))) == len(learners) else None  # a shared layer learns twice


def accumulate(parameters: list[Tensor], grads: list[Tensor]) -> None:
    """Adds to ``.grad`` as torch's engine does: in place; a fresh gradient has the strides of its parameter.

    `unwatched` has excluded everything that could fail for one of the parameters, after others were written.
    """
    with ADDING, torch.no_grad():
        sums, terms = [], []
        for parameter, grad in zip(parameters, grads, strict=True):
            if parameter.grad is None:
                parameter.grad = grad if parameter.is_contiguous() else _laid_out_as(parameter, grad)
            else:
                sums.append(parameter.grad)
                terms.append(grad)
        if sums:
            torch._foreach_add_(sums, terms)


def _laid_out_as(parameter: Tensor, grad: Tensor) -> Tensor:
    """The same numbers with the strides of the parameter; contiguous if those overlap or leave gaps."""
    return torch.empty_like(parameter, memory_format=torch.preserve_format, requires_grad=False).copy_(grad)
