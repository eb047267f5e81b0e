"""Gradients of each example of a batch: all of them, only their norms, or their clipped sum, which DP-SGD uses.

The lecture's backward pass contains them. Example i has one row of h_k and one of ∂ℓ_i/∂f_k for each layer k, and

    ∂ℓ_i/∂β_k = ∂ℓ_i/∂f_k,      ∂ℓ_i/∂Ω_k = ∂ℓ_i/∂f_k h_kᵀ,      ‖∂ℓ_i/∂Ω_k‖² = ‖∂ℓ_i/∂f_k‖² ‖h_k‖²

since the norm of an outer product is the product of the norms. So norms need no weight gradient at all, and a weighted
sum of gradients Σ_i c_i ∂ℓ_i/∂Ω_k is one matrix product, (c ⊙ ∂ℓ/∂f_k)ᵀ h_k. Both process the batch in tiles of rows.

These equations assume torch's linear and ReLU. If torch's functions have been replaced, or under a `TorchFunctionMode`,
the gradient is computed from its definition instead, as vmap(grad(ℓ_i)) through the functions as they are now.

Not here: the layers of a model (_layers.py), the losses (_losses.py), and the rest of DP-SGD, noise and privacy
accounting.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_manualbp import _huge_pages, _ops
from torch_manualbp._arithmetic import plain_arithmetic, widest_dtype
from torch_manualbp._checks import check_choice, check_tensor, name_call
from torch_manualbp._layers import layers_of
from torch_manualbp._losses import LOSSES, Loss, check_target, example_gradients, loss_of_example
from torch_manualbp._ops import split_hidden
from torch_manualbp._route import KERNELS, route, undisturbed

# The most numbers that a tile of rows holds in memory: h_k and ∂ℓ/∂f_k of all layers. Norms of 784–512–512–10 with 4096
# rows took 62 ms with 2^18, 57 with 2^20, 48 with 2^21 (740 rows, 8 MiB of float32), 45 with 2^23; a training step 79.
_TILE_NUMBERS = 1 << 21


def per_sample_gradients(model: nn.Module, input: Tensor, target: Tensor, loss: Loss = "mse") -> dict[str, Tensor]:
    """The gradient of each example's own loss ℓ_i, for every parameter that requires one.

    ∂ℓ_i/∂β_k = ∂ℓ_i/∂f_k and ∂ℓ_i/∂Ω_k = ∂ℓ_i/∂f_k h_kᵀ: the lecture's backward pass, not summed over the batch. The
    result is that of ``torch.func.vmap(torch.func.grad(ℓ))``, without its transforms.

    ℓ_i is the loss of example i alone; it is never divided by the batch size:

    - "mse": ``F.mse_loss(output_i, target_i)``, the mean of (f − y)² over the D_K outputs of example i
    - "bce_with_logits": ``F.binary_cross_entropy_with_logits(output_i, target_i)``, the mean over its outputs
    - "cross_entropy": ``F.cross_entropy(output_i, target_i)``; 0, with a gradient of 0, if target_i is −100
    - a function ``(output_i (D_K,), target_i) → scalar``, which ``torch.func.vmap`` must be able to run

    So the mean over the batch is the gradient of the named loss of ``torch.nn.functional`` on the whole batch (for
    "cross_entropy", if no class is ignored). The lecture's ℓ_i = Σ_j (f_j − y_j)² is
    ``lambda output, target: F.mse_loss(output, target, reduction="sum")``.

    Args:
        model: `MLP`, `LinearReLU`, or an ``nn.Sequential`` of Linear and ReLU layers, fused or not.
        input: h_0 (B, D_0).
        target: (B, D_K), or (B,) class indices for "cross_entropy"; for a function, any tensor with B rows. The named
            losses promote a target of another dtype as those of ``torch.nn.functional`` do.
        loss: ℓ_i, see above.

    Returns:
        Parameter name (as in ``model.named_parameters()``) → (B, *parameter.shape), in the dtype of the parameter.
        Frozen parameters are left out.

    Raises:
        TypeError: `model` has other modules, or an argument is not a tensor.
        ValueError: unknown `loss`, shapes that do not fit, or layers that share a parameter.
        IndexError: a class is out of bounds.

    Example:
        >>> from torch_manualbp import MLP
        >>> x, classes = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> grads = per_sample_gradients(MLP([4, 8, 3]), x, classes, "cross_entropy")
        >>> {name: tuple(grad.shape) for name, grad in grads.items()}
        {'0.weight': (5, 8, 4), '0.bias': (5, 8), '2.weight': (5, 3, 8), '2.bias': (5, 3)}
    """
    net = _Network("per_sample_gradients", model, input, target, loss)
    found: dict[str, Tensor] = {}
    with plain_arithmetic(input.device.type):
        if not undisturbed(input):
            return net.by_definition(input, target)
        for learner, df, h in net.backward(input, target):
            if learner.weight:
                out = _huge_pages.empty((len(df), df.shape[1], h.shape[1]), like=df)
                found[learner.weight] = torch.mul(df.unsqueeze(2), h.unsqueeze(1), out=out)
            if learner.bias:
                found[learner.bias] = df
    return {name: found[name] for name in net.names}


def per_sample_gradient_norms(model: nn.Module, input: Tensor, target: Tensor, loss: Loss = "mse") -> Tensor:
    """The norm of each example's gradient, over all parameters that require one; the gradients are never formed.

    ‖g_i‖² = Σ_k ‖∂ℓ_i/∂f_k‖² (‖h_k‖² + 1): the norm of the lecture's outer product ∂ℓ_i/∂f_k h_kᵀ is the product of the
    two norms, and the bias adds the 1. This is less work than a training step, which also multiplies ∂ℓ/∂f_k by h_k.

    Memory besides the arguments: (B,) for the result, and the intermediate results of one tile of rows, at most 2²¹
    numbers or 64 rows (784–512–512–10 in float32: 740 rows, 8 MiB), regardless of B.

    Args:
        model: `MLP`, `LinearReLU`, or an ``nn.Sequential`` of Linear and ReLU layers, fused or not.
        input: h_0 (B, D_0).
        target: as in `per_sample_gradients`.
        loss: ℓ_i, as in `per_sample_gradients`.

    Returns:
        (B,), in the dtype of `input`; squares are summed in float64.

    Raises:
        TypeError: `model` has other modules, or an argument is not a tensor.
        ValueError: unknown `loss`, shapes that do not fit, or layers that share a parameter.
        IndexError: a class is out of bounds.

    Example:
        >>> from torch_manualbp import MLP
        >>> model, x, y = MLP([4, 8, 1]), torch.randn(5, 4), torch.randn(5, 1)
        >>> norms = per_sample_gradient_norms(model, x, y)
        >>> norms.shape, bool((norms > 0).all())
        (torch.Size([5]), True)
    """
    net = _Network("per_sample_gradient_norms", model, input, target, loss)
    norms = input.new_zeros(len(input))
    if not net.names:
        return norms
    with plain_arithmetic(input.device.type):
        equations_hold = undisturbed(input)
        for rows in net.tiles(len(input), equations_hold):
            if equations_hold:
                norms[rows] = _norms(list(net.backward(input[rows], target[rows])))
            else:
                norms[rows] = _norms_of(net.by_definition(input[rows], target[rows]))
    return norms


def clipped_gradients(
    model: nn.Module, input: Tensor, target: Tensor, max_norm: float, loss: Loss = "mse"
) -> dict[str, Tensor]:
    """The sum of the examples' gradients, each scaled down to a norm of at most `max_norm`.

    Σ_i c_i g_i with c_i = min(1, max_norm / ‖g_i‖) is the building block of differentially private SGD (Abadi et al.,
    2016), which adds noise to it and divides by the batch size. Each layer costs one matrix product,
    Σ_i c_i ∂ℓ_i/∂Ω_k = (c ⊙ ∂ℓ/∂f_k)ᵀ h_k, as in an ordinary training step. Memory: that of
    `per_sample_gradient_norms`, plus the result.

    Args:
        model: `MLP`, `LinearReLU`, or an ``nn.Sequential`` of Linear and ReLU layers, fused or not.
        input: h_0 (B, D_0).
        target: as in `per_sample_gradients`.
        max_norm: the largest norm of an example's gradient, over all parameters together; not negative.
        loss: ℓ_i, as in `per_sample_gradients`.

    Returns:
        Parameter name → the clipped sum, in the shape and dtype of the parameter. Frozen parameters are left out and do
        not count in the norm. In half precision, rounding may leave a clipped gradient slightly above `max_norm`. A NaN
        or infinite gradient makes the sum NaN: clipping does not hide it.

    Raises:
        TypeError: `model` has other modules, or an argument is not a tensor.
        ValueError: unknown `loss`, shapes that do not fit, layers that share a parameter, or a negative `max_norm`.
        IndexError: a class is out of bounds.

    Example:
        >>> from torch_manualbp import MLP
        >>> model, x, y = MLP([4, 8, 1]), torch.randn(5, 4), torch.randn(5, 1)
        >>> total = clipped_gradients(model, x, y, max_norm=0.1)
        >>> norm = torch.cat([grad.flatten() for grad in total.values()]).norm()
        >>> bool(norm <= 5 * 0.1 + 1e-6)
        True
    """
    if not max_norm >= 0:
        raise ValueError(f"clipped_gradients: `max_norm` must not be negative, got {max_norm}")
    net = _Network("clipped_gradients", model, input, target, loss)
    parameters = dict(model.named_parameters())
    total = {name: parameters[name].new_zeros(parameters[name].shape, dtype=_sum_dtype(input)) for name in net.names}
    if not net.names:
        return total
    with plain_arithmetic(input.device.type):
        equations_hold = undisturbed(input)
        for rows in net.tiles(len(input), equations_hold):
            if not equations_hold:
                each = net.by_definition(input[rows], target[rows])
                factor = _factors(_norms_of(each), max_norm)
                for name, grads in each.items():
                    total[name] += torch.tensordot(factor.to(total[name].dtype), grads.to(total[name].dtype), 1)
                continue
            passes = list(net.backward(input[rows], target[rows]))
            factor = _factors(_norms(passes), max_norm).to(input.dtype).unsqueeze(1)
            for learner, df, h in passes:
                df.mul_(factor)
                if learner.weight and df.dtype is total[learner.weight].dtype:
                    total[learner.weight].addmm_(df.t(), h)
                elif learner.weight:
                    total[learner.weight] += df.t() @ h
                if learner.bias:
                    total[learner.bias] += df.sum(0)
    return {name: grad.to(input.dtype) for name, grad in total.items()}


class _Learner(NamedTuple):
    """The names of a layer's parameters that require gradients; None if the parameter is missing or frozen."""

    weight: str | None
    bias: str | None


# The backward pass of one layer over some rows: its learner, ∂ℓ/∂f_k (rows, D_{k+1}), h_k (rows, D_k).
_Pass = tuple[_Learner, Tensor, Tensor]


class _Network:
    """The layers of a model and their learning parameters; checks the arguments of the functions above."""

    def __init__(self, op: str, model: nn.Module, input: Tensor, target: Tensor, loss: Loss) -> None:
        layers = layers_of(model, op)
        check_tensor(op, "input", input)
        check_tensor(op, "target", target)
        if not callable(loss):
            check_choice(op, "loss", loss, LOSSES)
        if input.dim() != 2:
            raise ValueError(f"{op}: `input` must have shape (B, D_0), one row per example, got {tuple(input.shape)}")
        self.op = op
        self.loss: Loss = loss
        self.weights = [layer.weight.detach() for layer in layers]
        self.biases = [None if layer.bias is None else layer.bias.detach() for layer in layers]
        self.relus = [layer.relu for layer in layers]
        self.learners = [
            _Learner(
                layer.parameter_name("weight") if layer.weight.requires_grad else None,
                layer.parameter_name("bias") if layer.bias is not None and layer.bias.requires_grad else None,
            )
            for layer in layers
        ]
        self.names = [name for learner in self.learners for name in learner if name]
        check_target(op, loss, target, len(input), self.weights[-1].shape[0])

    def tiles(self, batch: int, equations_hold: bool) -> Iterator[slice]:
        """Tiles of rows whose intermediate results hold about _TILE_NUMBERS numbers."""
        if equations_hold:
            width = sum(weight.shape[0] + weight.shape[1] for weight in self.weights)
            rows = max(_TILE_NUMBERS // max(width, 1), 64)
        else:
            rows = max(_TILE_NUMBERS // max(sum(weight.numel() for weight in self.weights), 1), 1)
        for first in range(0, batch, rows):
            yield slice(first, first + rows)

    def backward(self, input: Tensor, target: Tensor) -> Iterator[_Pass]:
        """Each layer's ∂ℓ/∂f_k and h_k, from the last layer down to the lowest one that learns."""
        learning = [k for k, learner in enumerate(self.learners) if any(learner)]
        if not learning:
            return
        h, output = self.forward(input)
        df = example_gradients(self.loss, output, target)
        if self.relus[-1]:
            df = _mask(df, output)
        for k in reversed(range(learning[0], len(self.weights))):
            yield self.learners[k], df, h[k]
            if k > learning[0]:
                df = df @ self.weights[k]
                if self.relus[k - 1]:
                    df = _mask(df, h[k])

    def by_definition(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """∂ℓ_i/∂β_k and ∂ℓ_i/∂Ω_k, by autograd through torch's functions as they are now."""
        learning = {
            name: parameter
            for learner, *parameters in zip(self.learners, self.weights, self.biases, strict=True)
            for name, parameter in zip(learner, parameters, strict=True)
            if name and parameter is not None
        }
        if not learning or len(input) == 0:  # vmap cannot map over no rows
            return {name: parameter.new_empty((0, *parameter.shape)) for name, parameter in learning.items()}
        loss_of_one = loss_of_example(self.loss)

        def loss(learning: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            for learner, omega, beta, relu in zip(self.learners, self.weights, self.biases, self.relus, strict=True):
                x = F.linear(x, learning.get(learner.weight or "", omega), learning.get(learner.bias or "", beta))
                x = F.relu(x) if relu else x
            return loss_of_one(x, y)

        found: dict[str, Tensor] = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(
            learning, input.detach(), target
        )
        return found

    def forward(self, input: Tensor) -> tuple[list[Tensor], Tensor]:
        """h_0 … h_{K−1}, and the output."""
        h = [input.detach()]
        if all(self.relus[:-1]) and route(input, self.weights) is KERNELS:
            try:
                output, hidden = _ops.mlp(h[0], self.weights, self.biases, self.relus[-1], True)
            except RuntimeError as error:
                name_call(error, self.op)
                raise
            return h + split_hidden(hidden, input.shape, self.weights), output
        for omega, beta, relu in zip(self.weights, self.biases, self.relus, strict=True):
            f = F.linear(h[-1], omega, beta)
            h.append(torch.relu(f) if relu else f)
        return h[:-1], h[-1]


def _mask(dh: Tensor, h: Tensor) -> Tensor:
    """I[h > 0] ⊙ dh, in place, to keep a tile small; where h is NaN the gradient passes, as in torch."""
    masked: Tensor = torch.ops.aten.threshold_backward.grad_input(dh, h, 0, grad_input=dh)
    return masked


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which many numbers of this tensor's dtype are summed."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def _norms(passes: Sequence[_Pass]) -> Tensor:
    """‖g_i‖ (rows,): the norm of the norms ‖∂ℓ_i/∂f_k‖ · √(‖h_k‖² + 1) of the layers."""
    norms, wide = [], widest_dtype(passes[0][1].device)  # squares of float32 numbers may underflow or overflow
    for learner, df, h in passes:
        norm = torch.linalg.vector_norm(df, dim=1, dtype=wide)
        if learner.weight:
            norm_of_h = torch.linalg.vector_norm(h, dim=1, dtype=wide)
            norm = norm * (torch.hypot(norm_of_h, torch.ones_like(norm_of_h)) if learner.bias else norm_of_h)
        if any(learner):
            norms.append(norm)
    norm_of_all: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return norm_of_all


def _norms_of(gradients: dict[str, Tensor]) -> Tensor:
    """‖g_i‖ (rows,) of gradients (rows, *shape) that have been formed."""
    wide = widest_dtype(next(iter(gradients.values())).device)
    norms = [torch.linalg.vector_norm(grads.flatten(1), dim=1, dtype=wide) for grads in gradients.values()]
    norm_of_all: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return norm_of_all


def _factors(norms: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / ‖g_i‖) (rows,)."""
    return torch.where(norms > max_norm, max_norm / norms, 1)
