"""The functions: differentiable, any leading dimensions, and the plain torch composition where kernels do not apply."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from torch_manualbp import _graph, _ops, reference
from torch_manualbp._checks import check_activations, check_layers, check_tensor
from torch_manualbp._function import joins_graph, kernels_apply, torch_is_faster
from torch_manualbp._losses import LossSpec, loss_spec
from torch_manualbp.autograd import LinearReLUFunction, MLPFunction, MLPLossFunction


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.relu(F.linear(input, weight, bias))``, fused: bias and ReLU are applied while the product is in registers.

    The lecture's layer, h' = a[β + Ω h], and its backward ∂ℓ/∂f = I[h' > 0] ⊙ ∂ℓ/∂h', ∂ℓ/∂h = Ωᵀ ∂ℓ/∂f,
    ∂ℓ/∂Ω = ∂ℓ/∂f hᵀ, ∂ℓ/∂β = ∂ℓ/∂f. Gradients that nobody asks for are not computed.

    Args:
        input: h, shape (…, in_features); float64, float32, bfloat16 or float16. Any strides.
        weight: Ω, shape (out_features, in_features), of the same dtype. Any strides.
        bias: β, shape (out_features,), of the same dtype; or None.

    Returns:
        h', shape (…, out_features), of the same dtype. Halves are summed in float32 and rounded once.

    Raises:
        TypeError: an argument is not a tensor.
        RuntimeError: shapes, dtypes or devices do not fit (the class that ``F.linear`` raises).

    Example:
        >>> x = torch.tensor([[1.0, -2.0]])
        >>> linear_relu(x, torch.eye(2), torch.tensor([0.5, 0.5]))
        tensor([[1.5000, 0.0000]])
    """
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))):
        if has_torch_function((input, weight, bias)):  # a Proxy of torch.fx: one call in its graph
            return handle_torch_function(linear_relu, (input, weight, bias), input, weight, bias)
        check_tensor("linear_relu", "input", input)
        check_tensor("linear_relu", "weight", weight)
        check_tensor("linear_relu", "bias", bias, optional=True)
    if kernels_apply(input, (weight, bias)) and not (broadcasts(weight, bias) or torch_is_faster(input, (weight,))):
        return compute_linear_relu(input, weight, bias)
    if joins_graph(input, (weight, bias)) and not broadcasts(weight, bias):
        return layers_in_graph(input, (weight,), (bias,), final_relu=True)
    return F.relu(F.linear(input, weight, bias))


def broadcasts(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether F.linear takes this weight without rows, or this bias, by broadcasting: rare, left to torch."""
    return weight.dim() == 1 or (
        bias is not None and weight.dim() > 0 and (bias.dim() != 1 or (bias.shape[0] == 1 and weight.shape[0] != 1))
    )


def compute_linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_relu` by our kernels on checked arguments."""
    if torch.is_grad_enabled() and (
        weight.requires_grad or input.requires_grad or (bias is not None and bias.requires_grad)
    ):
        output: Tensor = LinearReLUFunction.record(input, weight, bias)
    else:
        output = _ops.linear_relu(input, weight, bias)
    return output


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    activations: str = "store",
) -> Tensor:
    """A ReLU network, linear → ReLU → … → linear, as one call and one autograd node.

    The lecture's forward pass f_k = β_k + Ω_k h_k, h_{k+1} = a[f_k], and its backward pass
    ∂ℓ/∂f_{k−1} = I[f_{k−1} > 0] ⊙ (Ω_kᵀ ∂ℓ/∂f_k). There is no ReLU after the last layer.

    Args:
        input: h_0, shape (…, D_0); float64, float32, bfloat16 or float16. Any strides.
        weights: Ω_k, shape (D_{k+1}, D_k), of the same dtype; at least one.
        biases: None, or a sequence with an item per weight: β_k, shape (D_{k+1},), or None.
        activations: "store" keeps every h_k for the backward pass. "recompute" keeps the input only and computes h_k
            again, block of rows by block of rows: activation memory does not grow with the batch.

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
    return _layers(input, weights, biases, False, activations == "store")


def run_layers(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    final_relu: bool = False,
    activations: str = "store",
) -> Tensor:
    """`mlp`, with a ReLU after the last layer too if `final_relu`."""
    check_tensor("mlp", "input", input)
    weights, biases = check_layers("mlp", weights, biases)
    return _layers(input, weights, biases, final_relu, activations == "store")


def _layers(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], final_relu: bool, store: bool
) -> Tensor:
    if kernels_apply(input, (*weights, *biases)):
        return compute_layers(input, weights, biases, final_relu, store)
    if joins_graph(input, (*weights, *biases)):
        return layers_in_graph(input, weights, biases, final_relu, store)
    output, _ = reference.mlp_forward(input, weights, biases, final_relu)
    return output


def _stand_ins(*arguments: Any) -> list[Any]:
    """Objects that are no tensors but stand for some, as a Proxy of torch.fx does: they say what becomes of a call."""
    items = [item for argument in arguments for item in (argument if type(argument) in (list, tuple) else [argument])]
    return [item for item in items if not isinstance(item, Tensor) and has_torch_function((item,))]


def compute_layers(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], final_relu: bool, store: bool
) -> Tensor:
    """`mlp` by our kernels on checked arguments, with a ReLU after the last layer too if `final_relu`."""
    if store and torch_is_faster(input, weights):
        return reference.mlp_forward(input, weights, biases, final_relu)[0]
    if torch.is_grad_enabled():
        first = _first_that_learns(input, weights, biases)
        if first < len(weights):
            if first > 0:  # below it there is nothing to learn, so that no activation is needed again
                input, _ = _ops.mlp(input, weights[:first], biases[:first], True, False)
                weights, biases = weights[first:], biases[first:]
            output: Tensor = MLPFunction.record(input, final_relu, store, len(weights), *weights, *biases)[0]
            return output
    result: Tensor = _ops.mlp(input, weights, biases, final_relu, False)[0]
    return result


def _first_that_learns(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> int:
    """The lowest layer that needs a gradient, of its parameters or its input; the number of layers if none does."""
    if input.requires_grad:
        return 0
    for k, weight in enumerate(weights):
        if weight.requires_grad or ((bias := biases[k]) is not None and bias.requires_grad):
            return k
    return len(weights)


def layers_in_graph(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], final_relu: bool, store: bool = True
) -> Tensor:
    """`mlp` on checked arguments for which `joins_graph` holds: one op of the graph that is being captured."""
    output: Tensor = _graph.layers(input, weights, biases, final_relu, store)
    return output


def mlp_loss(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    loss: str = "mse",
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of `mlp`, in one pass: while a block of rows is in the cache, forward, loss and backward are done.

    The gradients are ready when this function returns; ``backward()`` only hands them out, times the gradient that
    arrives. No activation outlives its block: activation memory does not grow with the batch. In float16 they are
    rounded before a loss scale arrives, so that ``GradScaler`` cannot save them from underflow: use `mlp` there.

    Args:
        input: h_0, shape (…, D_0); float64, float32, bfloat16 or float16. Any strides.
        target: for "mse" and "bce_with_logits" shape (…, D_K) and the dtype of `input`; for "cross_entropy" class
            indices, int64, shape (B,) for an input (B, D_0), or () for (D_0,).
        weights: Ω_k, shape (D_{k+1}, D_k), of the same dtype; at least one.
        biases: None, or a sequence with an item per weight: β_k, shape (D_{k+1},), or None.
        loss: "mse", "cross_entropy" or "bce_with_logits", as in ``torch.nn.functional``.
        reduction: "mean" or "sum".
        ignore_index: class that counts for nothing in "cross_entropy".
        label_smoothing: between 0 and 1, for "cross_entropy".

    Returns:
        The loss, a scalar of the dtype of `input`.

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
    if not (kernels_apply(input, (*weights, *biases)) and target_is_plain(input, target, spec)):
        if joins_graph(input, (*weights, *biases)):
            return spec.of(layers_in_graph(input, weights, biases, final_relu=False), target)
        output, _ = reference.mlp_forward(input, weights, biases)
        return spec.of(output, target)
    return compute_loss(input, target, weights, biases, spec)


def compute_loss(
    input: Tensor, target: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], spec: LossSpec
) -> Tensor:
    """`mlp_loss` by our kernels on checked arguments."""
    if torch.is_grad_enabled() and _first_that_learns(input, weights, biases) < len(weights):
        value: Tensor = MLPLossFunction.record(input, target, spec, len(weights), *weights, *biases)
        return value
    return spec.run(input, target, weights, biases, [False] * (1 + 2 * len(weights)))[0]


_WHOLE_NUMBERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def target_is_plain(input: Tensor, target: Tensor, spec: LossSpec, weights: Sequence[Tensor] | None = None) -> bool:
    """Whether our op decides about this target, by computing, or by an error of the class that torch raises.

    Torch takes others, too: class probabilities, bytes, images, dtypes that are promoted, shapes that broadcast,
    subclasses, one with a gradient. Without `weights` its shape is not looked at.
    """
    if type(target) is not Tensor or target.layout is not torch.strided or target.requires_grad:
        return False
    if spec.name == "cross_entropy":
        classes = not target.is_floating_point() and target.dtype is not torch.uint8
        return classes and input.dim() <= 2 and target.shape == input.shape[:-1]
    if target.dtype is not input.dtype:  # torch promotes, or refuses with an error that depends on its version
        return spec.name == "bce_with_logits" and target.dtype in _WHOLE_NUMBERS
    if weights is None:
        return True
    *leading, _ = input.shape or (0,)  # unpacked: half the time of slices
    outputs, *_ = weights[-1].shape or (0,)
    shape, wanted = target.shape, (*leading, outputs)
    if shape == wanted:
        return True
    fits = all(a == b or 1 in (a, b) for a, b in zip(shape[::-1], wanted[::-1], strict=False))
    return spec.name == "mse" and not fits
