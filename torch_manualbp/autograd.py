"""The autograd Functions: forward and hand-written backward of each op, together.

First-order gradients come from our kernels. Where gradients of gradients are wanted (`create_graph=True`), or backward
itself is batched (`is_grads_batched=True`), backward composes the lecture's equations from differentiable torch ops
(`reference.mlp_backward`), on the activations that forward saved: they are outputs of the same node, so that the graph
goes on through them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_manualbp import _ops, reference
from torch_manualbp._function import ManualFunction, backward_is_composed


class LinearReLUFunction(ManualFunction):
    """relu(input weightᵀ + bias), as `apply(input, weight, bias)`.

    forward   h' = a[β + Ω h]
    backward  ∂ℓ/∂f = I[h' > 0] ⊙ ∂ℓ/∂h';   ∂ℓ/∂h = Ωᵀ ∂ℓ/∂f;   ∂ℓ/∂Ω = ∂ℓ/∂f hᵀ;   ∂ℓ/∂β = ∂ℓ/∂f
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The kernel; saves h (input), Ω (weight) and h' (output)."""
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


class MLPFunction(ManualFunction):
    """A whole network as one node: `apply(input, final_relu, K, *weights, *biases)` → (output, hidden).

    `hidden` holds h_1 … h_{K−1}, flat. It is an output so that a gradient of the gradient can reach the activations
    that backward reads; nothing else uses it.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, final_relu: bool, layers: int, *weights_and_biases: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All layers in one call; saves the input, the weights and the activations."""
        weights, biases = weights_and_biases[:layers], weights_and_biases[layers:]
        output, hidden = _ops.mlp(input, weights, biases, final_relu, True)
        ctx.set_materialize_grads(False)
        ctx.layers = layers
        ctx.save_for_backward(input, hidden, output if final_relu else None, *weights)
        return output, hidden

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        """All layers in reverse, in one call; stops below the lowest layer that has something to learn."""
        input, hidden, output, *weights = ctx.saved_tensors
        needs_input, _, _, *needs_parameters = ctx.needs_input_grad
        needs = [needs_input, *needs_parameters]
        if grad_output is None:  # only `hidden` was used: by the gradient of a gradient that is constant in the output
            if grad_hidden is None:
                return (None,) * len(ctx.needs_input_grad)
            grad_output = input.new_zeros((*input.shape[:-1], weights[-1].shape[0]))
        if grad_hidden is not None or backward_is_composed(grad_output):
            grads = reference.mlp_backward(
                grad_output,
                [input, *_split(hidden, input, weights)],
                weights,
                output,
                None if grad_hidden is None else _split(grad_hidden, input, weights),
            )
            spread = _only(needs, [grads.dinput, *grads.dweights, *grads.dbiases])
        else:
            spread = _spread(needs, _ops.mlp_backward(grad_output, input, weights, hidden, output, needs))
        return spread[0], None, None, *spread[1:]


def _split(hidden: Tensor, input: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """h_1 … h_{K−1}, each (…, D_k), as views of `hidden`."""
    leading = input.shape[:-1]
    widths = [weight.shape[0] for weight in weights[:-1]]
    pieces = torch.split(hidden, [leading.numel() * width for width in widths]) if widths else ()
    return [piece.view(*leading, width) for piece, width in zip(pieces, widths, strict=True)]


def _only(needs: Sequence[bool], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for need, grad in zip(needs, grads, strict=True))


def _spread(needs: Sequence[bool], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients that an op returned, each put where its argument stands."""
    remaining = iter(grads)
    return tuple(next(remaining) if need else None for need in needs)
