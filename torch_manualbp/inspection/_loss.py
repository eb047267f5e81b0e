"""The loss of a trace: its value, its value per example, and ∂L/∂output, for named losses and for any callable."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_manualbp._checks import REDUCTIONS, LossName, Reduction, check_choice, check_tensor
from torch_manualbp._losses import LOSSES, LossSpec, check_target

LossFunction = LossName | Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class TracedLoss:
    """L = Σ_i ℓ_i: a loss that has a name, or a callable(output, target).

    The named ones are those of ``torch.nn.functional`` with this reduction. A callable that returns one number per
    example, shape (B,), is reduced here; one that returns a scalar has already reduced.
    """

    function: LossFunction
    reduction: Reduction

    def __post_init__(self) -> None:
        check_choice("trace", "reduction", self.reduction, REDUCTIONS)
        if isinstance(self.function, str):
            check_choice("trace", "loss", self.function, LOSSES)
        elif not callable(self.function):
            expected = f"one of {', '.join(map(repr, LOSSES))} or a callable(output, target)"
            raise TypeError(f"trace: `loss` must be {expected}, got {type(self.function).__name__}")

    @property
    def spec(self) -> LossSpec | None:
        """The loss, if it has a name; None for a callable."""
        return LossSpec(self.function, self.reduction) if isinstance(self.function, str) else None

    @property
    def name(self) -> str:
        """The name for headings."""
        if isinstance(self.function, str):
            return self.function
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def check_target(self, output: Tensor, target: Any) -> None:
        """Raises unless `target` fits a named loss; a callable may take anything."""
        if isinstance(self.function, str):
            check_tensor("trace", "target", target)
            check_target("trace", self.function, target, *output.shape)

    def total(self, output: Tensor, target: Any) -> Tensor:
        """L, a scalar that autograd can differentiate."""
        if (spec := self.spec) is not None:
            return spec.of(output, target)
        value = self._call(output, target)
        if value.dim() == 0:
            return value
        return value.sum() if self.reduction == "sum" else value.mean()

    def per_example(self, output: Tensor, target: Any, total: Tensor) -> Tensor | None:
        """ℓ_i, shape (B,), so that L = Σ_i ℓ_i; None if a callable's scalar is no sum or mean over the examples."""
        if (spec := self.spec) is not None:
            losses = spec.loss.per_example(output, target)
            return losses if self.reduction == "sum" else losses / spec.terms(target)
        value = self._call(output, target)
        if value.dim() == 1:
            return value if self.reduction == "sum" else value / len(output)
        if not (isinstance(target, Tensor) and target.dim() > 0 and len(target) == len(output) > 0):
            return total.reshape(1) if len(output) == 1 else None
        try:
            values = [self._call(output[i : i + 1], target[i : i + 1]) for i in range(len(output))]
        except Exception:  # whatever a callable raises that cannot evaluate a single example
            return None
        losses = torch.stack(values).to(total.dtype)
        allowed = 64 * torch.finfo(total.dtype).eps * losses.double().abs().sum()
        for candidate in (losses, losses / len(losses)):  # L is the sum over the examples, or their mean
            if (candidate.double().sum() - total.double()).abs() <= allowed:
                return candidate
        return None

    def gradient(self, output: Tensor, target: Any) -> Tensor:
        """∂L/∂output, by autograd through the loss alone, which is how training obtains it."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            total = self.total(leaf, target)
            if not total.requires_grad:
                raise ValueError("trace: `loss` returned a value that autograd cannot trace back to the output")
            (grad,) = torch.autograd.grad(total, leaf)
        return grad

    def cancellation(self, target: Any) -> float:
        """The size, relative to the output, of the numbers that cancel in the loss; rounding them is an error of it.

        1 for a callable, of which nothing is known.
        """
        if (spec := self.spec) is None:
            return 1.0
        if not spec.loss.cancels:
            return 0.0
        return 1.0 / max(spec.terms(target), 1) if self.reduction == "mean" else 1.0

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
