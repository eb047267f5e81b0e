"""The lecture's forward and backward pass of a ReLU network, in plain torch: the specification of this library.

Notation. Layer k = 0 … K−1 has the weight Ω_k (D_{k+1}, D_k) and the bias β_k (D_{k+1}) or None. A batch is a matrix
whose rows are the examples, so that the lecture's β + Ω h reads h Ωᵀ + β here:

    forward                           backward, in reverse order
    h_0     = input                   ∂ℓ/∂f_{K−1} = grad_output
    f_k     = β_k + Ω_k h_k           ∂ℓ/∂β_k     = ∂ℓ/∂f_k         (summed over the batch)
    h_{k+1} = a[f_k] = max(0, f_k)    ∂ℓ/∂Ω_k     = ∂ℓ/∂f_k h_kᵀ    (summed over the batch)
    output  = f_{K−1}                 ∂ℓ/∂f_{k−1} = I[f_{k−1} > 0] ⊙ (Ω_kᵀ ∂ℓ/∂f_k)

With dropout after a ReLU, h_{k+1} = m_k ⊙ a[f_k], where each element of m_k is 0 with probability p, else c = 1/(1−p).
Then ∂ℓ/∂f_{k−1} = m_{k−1} ⊙ I[f_{k−1} > 0] ⊙ (Ω_kᵀ ∂ℓ/∂f_k). No mask is needed for it: h_k = m_{k−1} ⊙ a[f_{k−1}] is
above 0 exactly where m_{k−1} = c and f_{k−1} > 0, so that m_{k−1} ⊙ I[f_{k−1} > 0] = c I[h_k > 0].

The backward pass of the backward pass (`mlp_double_backward`) starts from the gradients of a scalar M by the results
of the backward pass, v by ∂ℓ/∂h_0, V_k by ∂ℓ/∂Ω_k and u_k by ∂ℓ/∂β_k. With c_k for the gradient of M by ∂ℓ/∂h_k and a_k
for that by ∂ℓ/∂f_k, it is a forward pass in which a mask takes the place of the activation:

    k = 0 … K−1                            c_0     = v
    a_k     = c_k Ω_kᵀ + h_k V_kᵀ + u_k    ∂M/∂Ω_k = (∂ℓ/∂f_k)ᵀ c_k  (summed over the batch)
    c_{k+1} = I[h_{k+1} > 0] ⊙ a_k         ∂M/∂h_k = ∂ℓ/∂f_k V_k
                                           ∂M/∂(∂ℓ/∂f_{K−1}) = a_{K−1}

All of it is differentiable, so that autograd derives higher orders. It has three uses: it is the tests' oracle, it runs
on devices without kernels, and derivatives beyond those that have kernels are composed of it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Gradients(NamedTuple):
    """∂ℓ/∂h_0, and ∂ℓ/∂Ω_k, ∂ℓ/∂β_k for each layer k; None if `needs` excludes it."""

    dinput: Tensor | None
    dweights: list[Tensor | None]
    dbiases: list[Tensor | None]


def mlp_forward(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    final_relu: bool = False,
    masks: Sequence[Tensor | None] = (),
) -> tuple[Tensor, list[Tensor]]:
    """The forward pass: the output, and h_0 … h_{K−1}, the input of each layer.

    masks: m_k of the dropout after each layer, None where there is none; empty: nowhere.

    Example:
        >>> x, omega = torch.ones(2, 3), [torch.ones(4, 3), torch.ones(1, 4)]
        >>> output, h = mlp_forward(x, omega, [None, None])
        >>> [tuple(h_k.shape) for h_k in h], tuple(output.shape)
        ([(2, 3), (2, 4)], (2, 1))
    """
    h = [input]
    for k, (omega, beta) in enumerate(zip(weights, biases, strict=True)):
        f = F.linear(h[k], omega, beta)
        h.append(F.relu(f) if k < len(weights) - 1 or final_relu else f)
        if masks and (m := masks[k]) is not None:
            h[-1] = h[-1] * m
    return h.pop(), h


def relu_mask(h: Tensor, dh: Tensor) -> Tensor:
    """I[h > 0] ⊙ dh, with torch's rule: the gradient passes unless h <= 0, so it passes where h is NaN, not at 0."""
    masked: Tensor = torch.ops.aten.threshold_backward(dh, h, 0)
    return masked


def mlp_backward(
    grad_output: Tensor,
    h: Sequence[Tensor],
    weights: Sequence[Tensor],
    output: Tensor | None = None,
    grad_h: Sequence[Tensor] | None = None,
    needs: Sequence[bool] | None = None,
    scales: Sequence[float] = (),
) -> Gradients:
    """The backward pass, from h_0 … h_{K−1} of the forward pass.

    Args:
        grad_output: ∂ℓ/∂output (…, D_K).
        h: h_k (…, D_k), the input of each layer.
        weights: Ω_k (D_{k+1}, D_k).
        output: the output, if a ReLU follows the last layer too; else None.
        grad_h: further gradients of h_1 … h_{K−1}, which are added (double backward has some).
        needs: which gradients are needed, as [input, *weights, *biases]; None: all.
        scales: c of the dropout after each layer, 0 where there is none; empty: nowhere.

    Example:
        >>> x, omega = torch.ones(1, 1), [torch.tensor([[2.0]]), torch.tensor([[3.0]])]
        >>> output, h = mlp_forward(x, omega, [None, None])
        >>> mlp_backward(torch.ones(1, 1), h, omega).dinput  # ω_1 ω_0
        tensor([[6.]])
    """
    layers, batch = len(weights), math.prod(grad_output.shape[:-1])
    need_input, *need = [True] * (1 + 2 * layers) if needs is None else needs
    need_weights, need_biases = need[:layers], need[layers:]
    dweights: list[Tensor | None] = [None] * layers
    dbiases: list[Tensor | None] = [None] * layers
    df = grad_output if output is None else _scaled(relu_mask(output, grad_output), scales, layers - 1)
    for k in reversed(range(layers)):
        if need_weights[k] or need_biases[k]:
            rows = df.reshape(batch, df.shape[-1])
            if need_biases[k]:
                dbiases[k] = rows.sum(0)
            if need_weights[k]:
                dweights[k] = rows.t() @ h[k].reshape(batch, h[k].shape[-1])
        if not (need_input or any(need_weights[:k]) or any(need_biases[:k])):
            return Gradients(None, dweights, dbiases)
        dh = df @ weights[k]
        if k > 0:
            if grad_h is not None:
                dh = dh + grad_h[k - 1]
            df = _scaled(relu_mask(h[k], dh), scales, k - 1)
    return Gradients(dh if need_input else None, dweights, dbiases)


class SecondGradients(NamedTuple):
    """∂M/∂grad_output, and ∂M/∂h_k, ∂M/∂Ω_k for each layer k; None where no gradient of M arrives."""

    dgrad_output: Tensor | None
    dh: list[Tensor | None]
    dweights: list[Tensor | None]


def mlp_double_backward(
    grad_output: Tensor,
    h: Sequence[Tensor],
    weights: Sequence[Tensor],
    output: Tensor | None,
    cotangents: Gradients,
    scales: Sequence[float] = (),
) -> SecondGradients:
    """The backward pass of `mlp_backward`. Masks are constant: ∂M/∂h_k is what reaches h_k through ∂ℓ/∂Ω_k alone.

    Args:
        grad_output: ∂ℓ/∂output, as for `mlp_backward`.
        h: h_k, likewise.
        weights: Ω_k, likewise.
        output: the output, if a ReLU follows the last layer too; else None.
        cotangents: the gradients of M by the results of `mlp_backward`, v, V_k and u_k; None: zero.
        scales: c of the dropout after each layer, as for `mlp_backward`.

    Example:
        >>> x, omega = torch.ones(1, 1), [torch.tensor([[2.0]]), torch.tensor([[3.0]])]
        >>> _, h = mlp_forward(x, omega, [None, None])
        >>> # M = ∂ℓ/∂h_0 = ω_1 ω_0, so that ∂M/∂ω_0 = ω_1 and ∂M/∂ω_1 = ω_0
        >>> of_slope = Gradients(torch.ones(1, 1), [None, None], [None, None])
        >>> mlp_double_backward(torch.ones(1, 1), h, omega, None, of_slope).dweights
        [tensor([[3.]]), tensor([[2.]])]
    """
    layers = len(weights)
    df = [grad_output if output is None else _scaled(relu_mask(output, grad_output), scales, layers - 1)]
    for k in range(layers - 1, 0, -1):
        df.insert(0, _scaled(relu_mask(h[k], df[0] @ weights[k]), scales, k - 1))
    a, c = None, cotangents.dinput
    dh: list[Tensor | None] = [None] * layers
    dweights: list[Tensor | None] = [None] * layers
    for k, (omega, v, u) in enumerate(zip(weights, cotangents.dweights, cotangents.dbiases, strict=True)):
        terms = []
        if c is not None:
            dweights[k] = _rows(df[k]).t() @ _rows(c)
            terms.append(c @ omega.t())
        if v is not None:
            dh[k] = df[k] @ v
            terms.append(h[k] @ v.t())
        if u is not None:
            terms.append(u.expand_as(df[k]))
        a = sum(terms[1:], terms[0]) if terms else None
        mask = output if k == layers - 1 else h[k + 1]
        c = a if a is None or mask is None else _scaled(relu_mask(mask, a), scales, k)
    return SecondGradients(c, dh, dweights)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _scaled(df: Tensor, scales: Sequence[float], k: int) -> Tensor:
    return df * scales[k] if scales and scales[k] else df
