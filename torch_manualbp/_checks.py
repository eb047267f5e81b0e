"""Checks of arguments in Python. Each error names the argument, what is expected and what was passed.

The ops check shapes and dtypes themselves (csrc/checks.h), where it costs nothing.
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ACTIVATION_MODES = ("store", "recompute")
REDUCTIONS = ("mean", "sum")

Activations = Literal["store", "recompute"]
Reduction = Literal["mean", "sum"]
LossName = Literal["mse", "cross_entropy", "bce_with_logits"]


def name_call(error: Exception, call: str) -> None:
    """Lets the message of an error begin with what the user called, instead of the function or op that raised it."""
    name, colon, message = str(error).partition(": ")
    if colon and name in ("linear_relu", "mlp", "mlp_dropout", "mlp_loss", "flow_forward"):
        error.args = (f"{call}: {message}",)


def check_tensor(op: str, name: str, value: Any, *, optional: bool = False) -> None:
    """Raises TypeError unless `value` is a tensor (or None, if optional)."""
    if not (isinstance(value, Tensor) or (optional and value is None)):
        expected = "a Tensor or None" if optional else "a Tensor"
        raise TypeError(f"{op}: `{name}` must be {expected}, got {type(value).__name__}")


def check_layers(
    op: str, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """The weights and biases as tuples of equal length; biases=None becomes one None per weight."""
    if isinstance(weights, Tensor) or isinstance(biases, Tensor):
        name = "weights" if isinstance(weights, Tensor) else "biases"
        raise TypeError(f"{op}: `{name}` must be a sequence of tensors, one per layer, got one Tensor")
    weights = tuple(weights)
    biases = (None,) * len(weights) if biases is None else tuple(biases)
    if not weights:
        raise ValueError(f"{op}: `weights` must hold at least one weight, got none")
    if len(biases) != len(weights):
        raise ValueError(f"{op}: `biases` must have one item per weight ({len(weights)}), got {len(biases)}")
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if not isinstance(weight, Tensor):
            check_tensor(op, f"weights[{k}]", weight)
        if not (bias is None or isinstance(bias, Tensor)):
            check_tensor(op, f"biases[{k}]", bias, optional=True)
    return weights, biases


def check_choice(op: str, name: str, value: str, choices: Collection[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: `{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_activations(op: str, activations: str) -> None:
    """Raises ValueError unless `activations` names a memory mode."""
    check_choice(op, "activations", activations, ACTIVATION_MODES)


def check_module(op: str, model: Any) -> None:
    """Raises TypeError unless `model` is an ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: `model` must be an nn.Module, got {type(model).__name__}")


def check_optimizer(op: str, optimizer: Any) -> None:
    """Raises TypeError unless `optimizer` is one of torch's, or has their ``step`` and ``param_groups``."""
    if isinstance(optimizer, Optimizer):
        return
    if (
        isinstance(optimizer, type)
        or not callable(getattr(optimizer, "step", None))
        or not isinstance(getattr(optimizer, "param_groups", None), Sequence)
    ):
        kind = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        got = f"the class {kind}" if isinstance(optimizer, type) else kind
        raise TypeError(f"{op}: `optimizer` must be a torch.optim.Optimizer, or wrap one, got {got}")


def check_compute_dtype(op: str, dtype: Any) -> None:
    """Raises an error unless steps can be computed in this dtype: bfloat16, or None, that of the parameters."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}: `dtype` must be torch.bfloat16 or None, got {type(dtype).__name__}")
    if dtype not in (None, torch.bfloat16):
        raise ValueError(
            f"{op}: `dtype` must be torch.bfloat16 or None, got {dtype}; float16 needs a GradScaler and its own loop"
        )


def check_max_grad_norm(op: str, value: Any) -> None:
    """Raises unless `value` is None or a positive number."""
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{op}: `max_grad_norm` must be a number or None, got {type(value).__name__}")
    if not value > 0:  # true of NaN, too
        raise ValueError(f"{op}: `max_grad_norm` must be positive, got {value}")
