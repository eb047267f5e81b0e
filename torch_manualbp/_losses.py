"""The losses that `mlp_loss` fuses: their names and options, our op, and the torch function that each one equals."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_manualbp import _ops
from torch_manualbp._checks import LOSSES, REDUCTIONS, check_choice


@dataclass(frozen=True)
class LossSpec:
    """Which loss, reduced how."""

    name: str = "mse"
    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_choice("mlp_loss", "loss", self.name, LOSSES)
        check_choice("mlp_loss", "reduction", self.reduction, REDUCTIONS)
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"mlp_loss: `label_smoothing` must be between 0 and 1, got {self.label_smoothing}")

    def of(self, output: Tensor, target: Tensor) -> Tensor:
        """The same loss by torch."""
        if self.name == "mse":
            return F.mse_loss(output, target, reduction=self.reduction)
        if self.name == "bce_with_logits":
            return F.binary_cross_entropy_with_logits(output, target, reduction=self.reduction)
        return F.cross_entropy(
            output,
            target,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def output_gradient(self, output: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
        """∂ℓ/∂f, in the dtype of f, of `scale` times the loss summed over all terms; f (B, D) is the output.

        The sum of all terms whatever `reduction` says. A target of another dtype is promoted as torch promotes it.
        """
        if target.is_floating_point():  # torch rounds some losses to a coarser target's dtype, but no gradient
            target = target.to(torch.promote_types(output.dtype, target.dtype))
        if self.name == "mse" and target.dtype is output.dtype:
            return (output - target).mul_(2 * scale)
        if self.name == "bce_with_logits" and target.dtype is output.dtype:
            return output.sigmoid().sub_(target).mul_(scale)
        # Wider targets, integers, classes or probabilities, classes that are ignored or do not exist: torch knows.
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            total = replace(self, reduction="sum").of(leaf, target)
            (gradient,) = torch.autograd.grad(total, leaf, total.new_full((), scale))
        return gradient

    def run(
        self,
        input: Tensor,
        target: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        needs: Sequence[bool],
        flat: bool = False,
    ) -> list[Tensor]:
        """Our op: the loss, then the gradients that `needs` = [input, *weights, *biases] asks for.

        flat: the gradients are views of one buffer.
        """
        try:
            results: list[Tensor] = _ops.mlp_loss(
                input,
                target,
                weights,
                biases,
                self.name,
                self.reduction == "mean",
                self.ignore_index,
                self.label_smoothing,
                needs,
                flat,
            )
        except RuntimeError as error:
            if "out of bounds" in str(error):  # the class that F.cross_entropy raises
                raise IndexError(str(error)) from None
            raise
        return results


# One object per combination of options: checking them again at each step would cost 1 µs.
_cached_spec = functools.lru_cache(maxsize=256, typed=True)(LossSpec)


def loss_spec(name: str, reduction: str, ignore_index: int, label_smoothing: float) -> LossSpec:
    """The `LossSpec` of these options."""
    make = LossSpec if torch.compiler.is_compiling() else _cached_spec  # Dynamo traces no cache
    return make(name, reduction, ignore_index, label_smoothing)
