"""The lecture's forward and backward pass of a ReLU network, in plain torch: the specification of this library.

Notation. Layer k = 0 … K−1 has the weight Ω_k (D_{k+1}, D_k) and the bias β_k (D_{k+1}) or None. A batch is a matrix
whose rows are the examples, so that the lecture's β + Ω h reads h Ωᵀ + β here:

    forward                                 backward, in reverse order
    h_0     = input                         ∂ℓ/∂f_{K−1} = grad_output
    f_k     = β_k + Ω_k h_k                 ∂ℓ/∂β_k     = ∂ℓ/∂f_k                          (summed over the batch)
    h_{k+1} = a[f_k] = max(0, f_k)          ∂ℓ/∂Ω_k     = ∂ℓ/∂f_k h_kᵀ                     (summed over the batch)
    output  = f_{K−1}                       ∂ℓ/∂f_{k−1} = I[f_{k−1} > 0] ⊙ (Ω_kᵀ ∂ℓ/∂f_k)

Three uses: the tests' oracle, what runs on devices that have no kernels of ours, and double backward (every line is
differentiable, so the gradient of the gradient follows from it).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Gradients(NamedTuple):
    """∂ℓ/∂h_0, and ∂ℓ/∂Ω_k, ∂ℓ/∂β_k for each layer k."""

    dinput: Tensor
    dweights: list[Tensor]
    dbiases: list[Tensor]


def mlp_forward(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], final_relu: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The forward pass: the output, and h_0 … h_{K−1}, the input of each layer.

    Example:
        >>> x, omega = torch.ones(2, 3), [torch.ones(4, 3), torch.ones(1, 4)]
        >>> output, h = mlp_forward(x, omega, [None, None])
        >>> [tuple(h_k.shape) for h_k in h], tuple(output.shape)
        ([(2, 3), (2, 4)], (2, 1))
    """
    h = [input]
    for k, (omega, beta) in enumerate(zip(weights, biases, strict=True)):
        f = F.linear(h[k], omega, beta)
        h.append(torch.relu(f) if k < len(weights) - 1 or final_relu else f)
    return h.pop(), h


def relu_mask(h: Tensor, dh: Tensor) -> Tensor:
    """I[h > 0] ⊙ dh, with torch's rule at the edge: the gradient passes unless h <= 0, so NaN passes and 0 blocks."""
    return torch.where(h <= 0, torch.zeros((), dtype=dh.dtype, device=dh.device), dh)


def mlp_backward(
    grad_output: Tensor,
    h: Sequence[Tensor],
    weights: Sequence[Tensor],
    output: Tensor | None = None,
    grad_h: Sequence[Tensor] | None = None,
) -> Gradients:
    """The backward pass, from h_0 … h_{K−1} of the forward pass.

    Args:
        grad_output: ∂ℓ/∂output (…, D_K).
        h: h_k (…, D_k), the input of each layer.
        weights: Ω_k (D_{k+1}, D_k).
        output: the output, if a ReLU follows the last layer too; else None.
        grad_h: a gradient that reaches h_1 … h_{K−1} from elsewhere, to be added (double backward needs it).

    Example:
        >>> x, omega = torch.ones(1, 1), [torch.tensor([[2.0]]), torch.tensor([[3.0]])]
        >>> output, h = mlp_forward(x, omega, [None, None])
        >>> mlp_backward(torch.ones(1, 1), h, omega).dinput  # ω_1 ω_0
        tensor([[6.]])
    """
    layers, batch = len(weights), math.prod(grad_output.shape[:-1])
    dweights: list[Tensor] = []
    dbiases: list[Tensor] = []
    df = grad_output if output is None else relu_mask(output, grad_output)
    for k in reversed(range(layers)):
        rows, h_rows = df.reshape(batch, df.shape[-1]), h[k].reshape(batch, h[k].shape[-1])
        dbiases.insert(0, rows.sum(0))
        dweights.insert(0, rows.t() @ h_rows)
        dh = df @ weights[k]
        if k > 0:
            if grad_h is not None:
                dh = dh + grad_h[k - 1]
            df = relu_mask(h[k], dh)
    return Gradients(dh, dweights, dbiases)
