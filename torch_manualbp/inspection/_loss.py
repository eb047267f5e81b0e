"""The loss of a trace: its value, its value per example, and ∂L/∂output, for our three losses and for any callable."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_manualbp._checks import LOSSES, REDUCTIONS, check_choice
from torch_manualbp._losses import LossSpec

LossFunction = str | Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class TracedLoss:
    """L = Σ_i ℓ_i: "mse", "cross_entropy", "bce_with_logits", or a callable(output, target).

    The named ones are those of ``torch.nn.functional`` with this reduction. A callable that returns one number per
    example, shape (B,), is reduced here; one that returns a scalar has reduced already.
    """

    function: LossFunction
    reduction: str

    def __post_init__(self) -> None:
        check_choice("trace", "reduction", self.reduction, REDUCTIONS)
        if isinstance(self.function, str):
            check_choice("trace", "loss", self.function, LOSSES)
        elif not callable(self.function):
            expected = f"one of {', '.join(map(repr, LOSSES))} or a callable(output, target)"
            raise TypeError(f"trace: `loss` must be {expected}, got {type(self.function).__name__}")

    @property
    def name(self) -> str:
        """What it is called in a heading."""
        if isinstance(self.function, str):
            return self.function
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def check_target(self, output: Tensor, target: Any) -> None:
        """Raises unless `target` fits a named loss; torch would broadcast some that do not."""
        if not isinstance(self.function, str):
            return
        if not isinstance(target, Tensor):
            raise TypeError(f"trace: `target` must be a Tensor, got {type(target).__name__}")
        classes = self.function == "cross_entropy" and not target.is_floating_point()
        expected = output.shape[:1] if classes else output.shape
        if target.shape != expected:
            raise ValueError(
                f"trace: `target` must have the shape {tuple(expected)} for {self.function!r} and an output of shape "
                f"{tuple(output.shape)}, got {tuple(target.shape)}"
            )

    def total(self, output: Tensor, target: Any) -> Tensor:
        """L, a scalar that autograd can differentiate."""
        if isinstance(self.function, str):
            return LossSpec(self.function, self.reduction).of(output, target)
        value = self._call(output, target)
        if value.dim() == 0:
            return value
        return value.sum() if self.reduction == "sum" else value.mean()

    def per_example(self, output: Tensor, target: Any, total: Tensor) -> Tensor | None:
        """ℓ_i, shape (B,), so that L = Σ_i ℓ_i; None if a callable's scalar is no sum or mean over the examples."""
        if isinstance(self.function, str):
            return self._named_per_example(output, target)
        value = self._call(output, target)
        if value.dim() == 1:
            return value if self.reduction == "sum" else value / len(output)
        if not (isinstance(target, Tensor) and target.dim() > 0 and len(target) == len(output) > 0):
            return total.reshape(1) if len(output) == 1 else None
        try:
            values = [self._call(output[i : i + 1], target[i : i + 1]) for i in range(len(output))]
        except Exception:  # whatever a callable raises that cannot judge an example alone
            return None
        losses = torch.stack(values).to(total.dtype)
        allowed = 64 * torch.finfo(total.dtype).eps * losses.double().abs().sum()
        for candidate in (losses, losses / len(losses)):  # it adds up the examples, or takes their mean
            if (candidate.double().sum() - total.double()).abs() <= allowed:
                return candidate
        return None

    def gradient(self, output: Tensor, target: Any) -> Tensor:
        """∂L/∂output, by autograd through the loss alone: where training, too, gets it from."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            total = self.total(leaf, target)
            if not total.requires_grad:
                raise ValueError("trace: `loss` returned a value that autograd cannot trace back to the output")
            (grad,) = torch.autograd.grad(total, leaf)
        return grad

    def terms(self, output: Tensor, target: Any) -> int:
        """The number that "mean" divides by."""
        if self.function == "cross_entropy":
            return len(output) if target.is_floating_point() else int((target != LossSpec().ignore_index).sum())
        return output.numel() if isinstance(self.function, str) else len(output)

    def cancellation(self, output: Tensor, target: Any) -> float:
        """How large, relative to the output, the numbers are that the loss subtracts: what it loses to rounding.

        Squares subtract only the target from the output. Cross-entropies subtract a term from a sum that it dominates,
        and so do their gradients (p − 1). What a callable does is unknown.
        """
        if self.function == "mse":
            return 0.0
        mean = isinstance(self.function, str) and self.reduction == "mean"
        return 1.0 / max(self.terms(output, target), 1) if mean else 1.0

    def _named_per_example(self, output: Tensor, target: Tensor) -> Tensor:
        if self.function == "mse":
            losses = F.mse_loss(output, target, reduction="none").sum(1)
        elif self.function == "bce_with_logits":
            losses = F.binary_cross_entropy_with_logits(output, target, reduction="none").sum(1)
        else:
            losses = F.cross_entropy(output, target, reduction="none")
        return losses if self.reduction == "sum" else losses / self.terms(output, target)

    def _call(self, output: Tensor, target: Any) -> Tensor:
        assert not isinstance(self.function, str)
        value = self.function(output, target)
        if not isinstance(value, Tensor):
            raise TypeError(f"trace: `loss` must return a Tensor, got {type(value).__name__}")
        if value.shape not in ((), (len(output),)):
            raise ValueError(
                f"trace: `loss` must return a scalar or one value per example, shape ({len(output)},), "
                f"got shape {tuple(value.shape)}"
            )
        return value
