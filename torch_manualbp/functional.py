"""The public functions: they check their arguments, ask `_route` what computes the call, and use `_compute`.

All are differentiable and take any leading dimensions. Where our kernels do not apply, plain torch computes.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from torch_manualbp import _compute
from torch_manualbp._checks import Activations, LossName, Reduction, check_activations, check_layers, check_tensor
from torch_manualbp._losses import loss_spec
from torch_manualbp._route import GRAPH, KERNELS, TORCH, broadcasts, route, target_is_ours


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.relu(F.linear(input, weight, bias))``, fused: bias and ReLU are applied while the product is in registers.

    The lecture's layer, h' = a[β + Ω h], and its backward ∂ℓ/∂f = I[h' > 0] ⊙ ∂ℓ/∂h', ∂ℓ/∂h = Ωᵀ ∂ℓ/∂f,
    ∂ℓ/∂Ω = ∂ℓ/∂f hᵀ, ∂ℓ/∂β = ∂ℓ/∂f. Only gradients that are needed are computed.

    Args:
        input: h, shape (…, in_features); float64, float32, bfloat16 or float16. Any strides.
        weight: Ω, shape (out_features, in_features), of the same dtype. Any strides.
        bias: β, shape (out_features,), of the same dtype; or None.

    Returns:
        h', shape (…, out_features), of the same dtype. Half-precision sums are in float32, and rounded once.

    Raises:
        TypeError: an argument is not a tensor.
        RuntimeError: shapes, dtypes or devices do not fit (the class that ``F.linear`` raises).

    Example:
        >>> x = torch.tensor([[1.0, -2.0]])
        >>> linear_relu(x, torch.eye(2), torch.tensor([0.5, 0.5]))
        tensor([[1.5000, 0.0000]])
    """
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))):
        if has_torch_function((input, weight, bias)):  # a Proxy of torch.fx: the call becomes one node
            return handle_torch_function(linear_relu, (input, weight, bias), input, weight, bias)
        check_tensor("linear_relu", "input", input)
        check_tensor("linear_relu", "weight", weight)
        check_tensor("linear_relu", "bias", bias, optional=True)
    way = route(input, (weight, bias))
    if way is TORCH or broadcasts(weight, bias):
        return F.relu(F.linear(input, weight, bias))
    return _compute.linear_relu(way, input, weight, bias)


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    activations: Activations = "store",
) -> Tensor:
    """A ReLU network, linear → ReLU → … → linear, as one call and one autograd node.

    The lecture's forward pass f_k = β_k + Ω_k h_k, h_{k+1} = a[f_k], and its backward pass
    ∂ℓ/∂f_{k−1} = I[f_{k−1} > 0] ⊙ (Ω_kᵀ ∂ℓ/∂f_k). There is no ReLU after the last layer.

    Args:
        input: h_0, shape (…, D_0); float64, float32, bfloat16 or float16. Any strides.
        weights: Ω_k, shape (D_{k+1}, D_k), of the same dtype; at least one.
        biases: None, or a sequence with an item per weight: β_k, shape (D_{k+1},), or None.
        activations: "store" keeps every h_k for the backward pass. "recompute" keeps only the input, and recomputes h_k
            for one block of rows after another: activation memory does not grow with the batch.

    Returns:
        f_{K−1}, shape (…, D_K), of the same dtype.

    Raises:
        TypeError: an argument is not a tensor, or not a sequence of tensors.
        ValueError: no weights, a wrong number of biases, or an unknown `activations`.
        RuntimeError: shapes, dtypes or devices do not fit (the class that ``F.linear`` raises).

    Example:
        >>> omega = [torch.ones(3, 2), torch.ones(1, 3)]
        >>> mlp(torch.tensor([[1.0, 1.0]]), omega)
        tensor([[6.]])
    """
    check_activations("mlp", activations)
    try:
        check_tensor("mlp", "input", input)
        weights, biases = check_layers("mlp", weights, biases)
    except (TypeError, ValueError):
        if stand_ins := _stand_ins(input, weights, biases):
            return handle_torch_function(mlp, stand_ins, input, weights, biases, activations=activations)
        raise
    store = activations == "store"
    way = route(input, (*weights, *biases), store)
    return _compute.layers(way, input, weights, biases, False, store)


def mlp_loss(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    loss: LossName = "mse",
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of `mlp`, in one pass: forward, loss and backward of a block of rows while it is in the cache.

    The gradients are ready when this function returns; ``backward()`` only multiplies them by the incoming gradient. No
    activation outlives its block: activation memory does not grow with the batch. In float16 the gradients are rounded
    before ``GradScaler`` scales the loss, so that it cannot prevent their underflow: use `mlp` there. (Under autocast
    to float16 this is `mlp` and torch's loss.)

    Args:
        input: h_0, shape (…, D_0); float64, float32, bfloat16 or float16. Any strides.
        target: for "mse" and "bce_with_logits" shape (…, D_K) and the dtype of `input`; for "cross_entropy" class
            indices, int64, shape (B,) for an input (B, D_0), or () for (D_0,).
        weights: Ω_k, shape (D_{k+1}, D_k), of the same dtype; at least one.
        biases: None, or a sequence with an item per weight: β_k, shape (D_{k+1},), or None.
        loss: "mse", "cross_entropy" or "bce_with_logits", as in ``torch.nn.functional``.
        reduction: "mean" or "sum".
        ignore_index: target class that "cross_entropy" ignores.
        label_smoothing: between 0 and 1, for "cross_entropy".

    Returns:
        The loss, a scalar of the dtype of `input`; float32 under autocast.

    Raises:
        TypeError: an argument is not a tensor, or not a sequence of tensors.
        ValueError: unknown `loss` or `reduction`, no weights, or a wrong number of biases.
        IndexError: a class is out of bounds.
        RuntimeError: shapes, dtypes or devices do not fit.

    Example:
        >>> omega = [torch.ones(3, 2), torch.ones(1, 3)]
        >>> mlp_loss(torch.tensor([[1.0, 1.0]]), torch.tensor([[4.0]]), omega)  # (6 − 4)²
        tensor(4.)
    """
    spec = loss_spec(loss, reduction, ignore_index, label_smoothing)
    try:
        check_tensor("mlp_loss", "input", input)
        check_tensor("mlp_loss", "target", target)
        weights, biases = check_layers("mlp_loss", weights, biases)
    except (TypeError, ValueError):
        if stand_ins := _stand_ins(input, target, weights, biases):
            options: Any = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
            return handle_torch_function(
                mlp_loss, stand_ins, input, target, weights, biases, loss=loss, reduction=reduction, **options
            )
        raise
    way = route(input, (*weights, *biases), store=False)
    if way is KERNELS and not target_is_ours(input, target, spec):
        way = TORCH
    elif way is GRAPH and not target_is_ours(input, target, spec, weights):
        return spec.of(_compute.layers(GRAPH, input, weights, biases, False, True), target)
    return _compute.loss(way, input, target, weights, biases, spec)


def _stand_ins(*arguments: Any) -> list[Any]:
    """Arguments that are no tensors but handle calls of torch functions themselves, such as a Proxy of torch.fx."""
    items = [item for argument in arguments for item in (argument if type(argument) in (list, tuple) else [argument])]
    return [item for item in items if not isinstance(item, Tensor) and has_torch_function((item,))]
