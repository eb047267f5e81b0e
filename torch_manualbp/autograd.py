"""The autograd Functions: forward and hand-written backward of each op, together.

First-order gradients come from our kernels. Where gradients of gradients are wanted (`create_graph=True`), or backward
itself is batched (`is_grads_batched=True`), backward composes the lecture's equations from differentiable torch ops
(`reference.mlp_backward`), on the activations that forward saved: they are outputs of the same node, so that the graph
goes on through them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_manualbp import _ops, reference
from torch_manualbp._function import ManualFunction, backward_is_composed, refuse_capture
from torch_manualbp._losses import LossSpec


class LinearReLUFunction(ManualFunction):
    """relu(input weightᵀ + bias), as `apply(input, weight, bias)`.

    forward   h' = a[β + Ω h]
    backward  ∂ℓ/∂f = I[h' > 0] ⊙ ∂ℓ/∂h';   ∂ℓ/∂h = Ωᵀ ∂ℓ/∂f;   ∂ℓ/∂Ω = ∂ℓ/∂f hᵀ;   ∂ℓ/∂β = ∂ℓ/∂f
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The kernel; saves h (input), Ω (weight) and h' (output)."""
        if torch.compiler.is_dynamo_compiling():
            refuse_capture("LinearReLUFunction")
        output: Tensor = _ops.linear_relu(input, weight, bias)
        ctx.save_for_backward(input, weight, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that are needed, in one call."""
        input, weight, output = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if backward_is_composed(grad_output):
            grads = reference.mlp_backward(grad_output, [input], [weight], output)
            return _only(needs, [grads.dinput, *grads.dweights, *grads.dbiases])
        return _spread(needs, _ops.linear_relu_backward(grad_output, input, weight, output, needs))

    @staticmethod
    def composed(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer in plain torch."""
        return reference.mlp_forward(input, [weight], [bias], final_relu=True)[0]


class MLPFunction(ManualFunction):
    """A whole network as one node: `apply(input, final_relu, store, K, *weights, *biases)` → (output, hidden).

    If `store`, `hidden` holds h_1 … h_{K−1}, flat. It is an output so that a gradient of the gradient can reach the
    activations that backward reads; nothing else uses it. If not, it is empty, and backward computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, final_relu: bool, store: bool, layers: int, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All layers in one call; saves the input, the weights, and the activations or the biases."""
        if torch.compiler.is_dynamo_compiling():
            refuse_capture("MLPFunction")
        weights, biases = parameters[:layers], parameters[layers:]
        output, hidden = _ops.mlp(input, weights, biases, final_relu, store)
        ctx.set_materialize_grads(False)
        ctx.layers, ctx.store = layers, store
        kept = (hidden,) if store else biases
        ctx.save_for_backward(input, output if final_relu else None, *weights, *kept)
        return output, hidden

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        """All layers in reverse, in one call; stops below the lowest layer that has something to learn."""
        input, output, *saved = ctx.saved_tensors
        weights, kept = saved[: ctx.layers], saved[ctx.layers :]
        hidden, biases = (kept[0], ()) if ctx.store else (None, kept)
        needs = _of_tensors(ctx.needs_input_grad)
        if grad_output is None:  # only `hidden` was used: by the gradient of a gradient that is constant in the output
            if grad_hidden is None:
                return (None,) * len(ctx.needs_input_grad)
            grad_output = input.new_zeros((*input.shape[:-1], weights[-1].shape[0]))
        if grad_hidden is not None or backward_is_composed(grad_output):
            if hidden is None:
                _, h = reference.mlp_forward(input, weights, biases, output is not None)
            else:
                h = [input, *_split(hidden, input, weights)]
            grad_h = None if grad_hidden is None else _split(grad_hidden, input, weights)
            grads = reference.mlp_backward(grad_output, h, weights, output, grad_h)
            spread = _only(needs, [grads.dinput, *grads.dweights, *grads.dbiases])
        else:
            spread = _spread(needs, _ops.mlp_backward(grad_output, input, weights, biases, hidden, output, needs))
        return spread[0], None, None, None, *spread[1:]

    @staticmethod
    def composed(
        input: Tensor, final_relu: bool, store: bool, layers: int, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The network in plain torch."""
        output, h = reference.mlp_forward(input, parameters[:layers], parameters[layers:], final_relu)
        hidden = [h_k.flatten() for h_k in h[1:]] if store else []
        return output, torch.cat(hidden) if hidden else input.new_empty((0,))


class MLPLossFunction(ManualFunction):
    """Network and loss as one node, as `apply(input, target, loss, K, *weights, *biases)`, `loss` being a `LossSpec`.

    The gradients are ready when forward returns: backward multiplies them by the gradient that arrives, ∂L/∂ℓ.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, loss: LossSpec, layers: int, *parameters: Tensor) -> Tensor:
        """Forward, loss and backward in one pass over blocks of rows; keeps the gradients only."""
        if torch.compiler.is_dynamo_compiling():
            refuse_capture("MLPLossFunction")
        weights, biases = parameters[:layers], parameters[layers:]
        ctx.layers, ctx.loss, ctx.needs = layers, loss, _of_tensors(ctx.needs_input_grad)
        value, *ctx.grads = loss.run(input, target, weights, biases, ctx.needs)
        ctx.save_for_backward(input, target, *parameters)
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that forward computed, times ∂L/∂ℓ. They are given away: a second pass computes its own."""
        input, target, *parameters = ctx.saved_tensors
        if backward_is_composed(grad_output):
            grads = _loss_gradients(ctx.loss, input, target, parameters, ctx.needs, grad_output)
        else:
            grads = vars(ctx).pop("grads", None)  # in one step: another thread may walk the same graph
            if grads is None:
                weights, biases = parameters[: ctx.layers], parameters[ctx.layers :]
                _, *grads = ctx.loss.run(input, target, weights, biases, ctx.needs)
            if grad_output.is_cuda:  # to look at the number would wait for the device
                torch._foreach_mul_(grads, grad_output)
            elif (scale := grad_output.item()) != 1.0:  # the usual one costs a pass over all gradients
                torch._foreach_mul_(grads, scale)
        spread = _spread(ctx.needs, grads)
        return spread[0], None, None, None, *spread[1:]

    @staticmethod
    def composed(input: Tensor, target: Tensor, loss: LossSpec, layers: int, *parameters: Tensor) -> Tensor:
        """Network and loss in plain torch."""
        output, _ = reference.mlp_forward(input, parameters[:layers], parameters[layers:])
        return loss.of(output, target)


def _loss_gradients(
    loss: LossSpec,
    input: Tensor,
    target: Tensor,
    parameters: Sequence[Tensor],
    needs: Sequence[bool],
    grad_output: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of a loss from differentiable torch ops: what a gradient of the gradient goes through."""
    layers = len(parameters) // 2
    with torch.enable_grad():
        # Each argument under a name of its own: of a tensor that is two arguments, each gets its share, not the sum.
        input, *parameters = (None if tensor is None else tensor.view_as(tensor) for tensor in (input, *parameters))
        output, _ = reference.mlp_forward(input, parameters[:layers], parameters[layers:])
        wanted = [tensor for tensor, need in zip((input, *parameters), needs, strict=True) if need]
        return torch.autograd.grad(loss.of(output, target), wanted, grad_output, create_graph=True)


def _of_tensors(needs_input_grad: tuple[bool, ...]) -> list[bool]:
    """Of the arguments (input, three that are no tensors or have no gradient, *parameters): input and parameters."""
    needs = list(needs_input_grad)
    del needs[1:4]
    return needs


def _split(hidden: Tensor, input: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """h_1 … h_{K−1}, each (…, D_k), as views of `hidden`."""
    leading = input.shape[:-1]
    widths = [weight.shape[0] for weight in weights[:-1]]
    pieces = torch.split(hidden, [math.prod(leading) * width for width in widths]) if widths else ()
    return [piece.view(*leading, width) for piece, width in zip(pieces, widths, strict=True)]


def _only(needs: Sequence[bool], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for need, grad in zip(needs, grads, strict=True))


def _spread(needs: Sequence[bool], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients that an op returned, each put where its argument stands."""
    remaining = iter(grads)
    return tuple(next(remaining) if need else None for need in needs)
