"""The losses that have a name. Outside the kernels, everything that depends on the loss is in the table `LOSSES`.

To add a loss, add an object to this table, and the loss itself to the kernels (csrc).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from torch_manualbp import _ops
from torch_manualbp._checks import REDUCTIONS, LossName, check_choice

# The loss of one example: a name in `LOSSES`, or a function of its output (D_K,) and its target.
Loss = LossName | Callable[[Tensor, Tensor], Tensor]

IGNORE_INDEX = -100  # torch's default


@dataclass(frozen=True, kw_only=True)
class NamedLoss:
    """A loss of outputs f (B, D) and targets y: a sum of terms, or their mean."""

    name: str
    """The value of the argument `loss`, of the public functions and of the op."""
    by_torch: Callable[[str, int, float], Callable[[Tensor, Tensor], Tensor]]
    """(reduction, ignore_index, label_smoothing) → a function (f, y) → the loss, by torch. Each call looks up torch's
    function, so that a replacement of it is used as well."""
    of_classes: bool = False
    """True: an example has one term, and its target is a class, y (B,), or probabilities of classes, y (B, D).
    False: each element of f has one term, and y has the shape of f."""
    gradient: Callable[[Tensor, Tensor, float], Tensor] | None = None
    """(f, y, scale) → ∂ℓ/∂f of the sum of all terms, times `scale`, if y has the dtype of f. None: use autograd."""
    broadcasts: bool = False
    """Whether torch accepts a target of another shape if it can be broadcast."""
    takes_integers: bool = False
    """Whether torch accepts a target of integers for floating-point outputs that are no classes."""
    cancels: bool
    """Whether the loss subtracts numbers as large as f that nearly cancel, as cross-entropies do: they subtract a term
    from a sum that this term dominates, and their gradients are p − 1. Squares subtract only y from f."""
    formula: str
    """The loss of an example as the lecture writes it, in terms of {f} and {y}; {sum} is Σ_d if D > 1."""
    gradient_formula: str
    """∂ℓ/∂f, in the same way."""

    def target_shape(self, target: Tensor, batch: int, outputs: int) -> tuple[int, ...]:
        """The shape that this target must have for outputs (batch, outputs)."""
        return (batch,) if self.of_classes and not target.is_floating_point() else (batch, outputs)

    def terms(self, target: Tensor, ignore_index: int) -> int:
        """The number of terms, by which a mean divides."""
        if not self.of_classes:
            return target.numel()
        return len(target) if target.is_floating_point() else int((target != ignore_index).sum())

    def per_example(self, output: Tensor, target: Tensor) -> Tensor:
        """The sum of each example's terms (B,)."""
        terms = self.by_torch("none", IGNORE_INDEX, 0.0)(output, target)
        return terms if self.of_classes else terms.sum(1)


LOSSES = {
    loss.name: loss
    for loss in (
        NamedLoss(
            name="mse",
            by_torch=lambda reduction, *_: lambda f, y: F.mse_loss(f, y, reduction=reduction),
            gradient=lambda f, y, scale: (f - y).mul_(2 * scale),
            broadcasts=True,
            takes_integers=True,
            cancels=False,
            formula="{sum}({f} − {y})²",
            gradient_formula="2({f} − {y})",
        ),
        NamedLoss(
            name="cross_entropy",
            by_torch=lambda reduction, ignore_index, label_smoothing: (
                lambda f, y: F.cross_entropy(
                    f, y, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
                )
            ),
            of_classes=True,
            cancels=True,
            formula="−log softmax[{f}]_y",
            gradient_formula="softmax[{f}] − onehot[{y}]",
        ),
        NamedLoss(
            name="bce_with_logits",
            by_torch=lambda reduction, *_: lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction=reduction),
            gradient=lambda f, y, scale: f.sigmoid().sub_(y).mul_(scale),
            cancels=True,
            formula="−log p({y} | sigmoid[{f}])",
            gradient_formula="sigmoid[{f}] − {y}",
        ),
    )
}


@dataclass(frozen=True)
class LossSpec:
    """A loss and its options, as in ``torch.nn.functional``."""

    name: str = "mse"
    reduction: str = "mean"
    ignore_index: int = IGNORE_INDEX
    label_smoothing: float = 0.0
    autocast: torch.dtype | None = None
    """The dtype in which autocast computes the network whose loss this is; None: without autocast."""
    loss: NamedLoss = field(init=False, repr=False, compare=False)
    of: Callable[[Tensor, Tensor], Tensor] = field(init=False, repr=False, compare=False)
    """(output, target) → the loss, by torch; no method, because that would add a frame."""

    def __post_init__(self) -> None:
        check_choice("mlp_loss", "loss", self.name, LOSSES)
        check_choice("mlp_loss", "reduction", self.reduction, REDUCTIONS)
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"mlp_loss: `label_smoothing` must be between 0 and 1, got {self.label_smoothing}")
        if self.label_smoothing and not LOSSES[self.name].of_classes:
            raise ValueError(
                f"mlp_loss: `label_smoothing` is for 'cross_entropy', got {self.label_smoothing} with {self.name!r}"
            )
        loss = LOSSES[self.name]
        object.__setattr__(self, "loss", loss)
        object.__setattr__(self, "of", loss.by_torch(self.reduction, self.ignore_index, self.label_smoothing))

    def under_autocast(self, dtype: torch.dtype) -> "LossSpec":
        """This loss of a network that autocast computes in `dtype`: `run` calls the op for it."""
        return _under_autocast(self, dtype)

    def output_gradient(self, output: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
        """∂ℓ/∂f, in the dtype of f, of the sum of all terms, times `scale`; f (B, D) is `output`.

        It does not depend on `reduction`. A target of another dtype is promoted as torch promotes it.
        """
        if target.is_floating_point():  # torch rounds some losses to a coarser target's dtype, but no gradient
            target = target.to(torch.promote_types(output.dtype, target.dtype))
        if self.loss.gradient is not None and target.dtype is output.dtype:
            return self.loss.gradient(output, target, scale)
        # Wider targets, integers, classes, probabilities, ignored or invalid classes: torch defines what they mean.
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            total = replace(self, reduction="sum").of(leaf, target)
            (gradient,) = torch.autograd.grad(total, leaf, total.new_full((), scale))
        return gradient

    def terms(self, target: Tensor) -> int:
        """The number that "mean" divides by."""
        return self.loss.terms(target, self.ignore_index)

    def run(
        self,
        input: Tensor,
        target: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        needs: Sequence[bool],
        flat: bool = False,
    ) -> list[Tensor]:
        """The op: the loss, then the gradients that are needed, as `needs` = [input, *weights, *biases] says.

        flat: the gradients are views of one buffer.
        """
        results: list[Tensor]
        is_mean = self.reduction == "mean"
        name, ignored, smoothing = self.name, self.ignore_index, self.label_smoothing
        try:
            if self.autocast is None:
                results = _ops.mlp_loss(input, target, weights, biases, name, is_mean, ignored, smoothing, needs, flat)
            else:
                results = _ops.mlp_autocast_loss(
                    input, target, weights, biases, name, is_mean, ignored, smoothing, needs, flat, self.autocast
                )
        except RuntimeError as error:
            if "out of bounds" in str(error):  # raise what F.cross_entropy raises
                raise IndexError(str(error)) from None
            raise
        return results


@functools.lru_cache(maxsize=256)
def _under_autocast(spec: LossSpec, dtype: torch.dtype) -> LossSpec:
    return replace(spec, autocast=dtype)


# One object per combination of options: checking them again at each step would cost 1 µs.
_cached_spec = functools.lru_cache(maxsize=256, typed=True)(LossSpec)


def loss_spec(name: str, reduction: str, ignore_index: int, label_smoothing: float) -> LossSpec:
    """The `LossSpec` of these options."""
    make = LossSpec if is_dynamo_compiling() else _cached_spec  # Dynamo traces no cache
    return make(name, reduction, ignore_index, label_smoothing)


def check_target(op: str, loss: Loss, target: Tensor, batch: int, outputs: int) -> None:
    """Raises ValueError unless `target` fits outputs (batch, outputs); torch would broadcast some that do not."""
    if callable(loss):
        if target.dim() == 0 or len(target) != batch:
            raise ValueError(f"{op}: `target` must have {batch} rows as `input` has, got shape {tuple(target.shape)}")
        return
    expected = LOSSES[loss].target_shape(target, batch, outputs)
    if target.shape != expected:
        raise ValueError(f"{op}: `target` must have shape {expected} for {loss!r}, got {tuple(target.shape)}")


def loss_of_example(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """ℓ_i as a function of one example's output and target, as `per_sample_gradients` describes it."""
    if callable(loss):
        return loss
    # With one term, sum and mean are equal, except that the sum is 0 and the mean NaN if the class is ignored.
    return LossSpec(loss, "sum" if LOSSES[loss].of_classes else "mean").of


def example_gradients(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """∂ℓ_i/∂output_i (B, D_K), one row per example, of the losses that `per_sample_gradients` describes."""
    if callable(loss):
        rows: Tensor = torch.func.vmap(torch.func.grad(loss))(output, target)
        return rows.clone(memory_format=torch.contiguous_format)  # it may be expanded, or memory that others use
    # ∂ℓ_i/∂output_i is row i of the gradient of Σ_i ℓ_i, as no other term depends on output_i.
    scale = 1.0 if LOSSES[loss].of_classes else 1 / max(output.shape[1], 1)  # ℓ_i is a mean over D_K terms
    return LossSpec(loss).output_gradient(output, target, scale)
