"""Training steps: forward, loss, backward and update, of any module and any optimizer.

A step is this composition, bit for bit, whatever computes it:

    zero_grad;  loss.backward();  clip_grad_norm_;  optimizer.step()

except that the ``.grad`` that the caller sees are neither read nor written. `training.py` makes epochs of steps.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from torch_manualbp._checks import check_max_grad_norm, check_optimizer, check_tensor
from torch_manualbp._losses import LossSpec
from torch_manualbp.modules import FusedForward, loss_backward

LossFunction = Callable[[Tensor, Tensor], Tensor]

_SECONDS = 0.02  # after which `run` returns, so that Python handles signals and shows progress


class Steps:
    """The training steps of one model with one optimizer.

    Args:
        model: any module.
        optimizer: a ``torch.optim.Optimizer``, or what wraps one.
        loss: a named loss, or a function (output, target) → the loss, a scalar.
        max_grad_norm: of ``clip_grad_norm_``, over the parameters of the model; None: gradients are not clipped.
        op: the public function that errors name.
    """

    __slots__ = ("_loss", "_max_grad_norm", "_model", "_op", "_optimizer")

    def __init__(
        self, model: nn.Module, optimizer: Any, loss: LossSpec | LossFunction, max_grad_norm: float | None, op: str
    ) -> None:
        check_optimizer(op, optimizer)
        check_max_grad_norm(op, max_grad_norm)
        self._model = model
        self._optimizer = optimizer
        self._loss = loss
        self._max_grad_norm = max_grad_norm
        self._op = op

    def one(self, input: Tensor, target: Tensor) -> Tensor:
        """One step on the whole batch. Returns the detached loss before the update."""
        if torch.is_inference_mode_enabled():  # the state of the optimizer must not become inference tensors
            with torch.inference_mode(False):
                return self.one(input, target)
        check_tensor(self._op, "input", input)
        check_tensor(self._op, "target", target)
        with self._own_gradients() as parameters:
            return self._compose(input, target, parameters)

    def run(
        self, input: Tensor, target: Tensor, order: Tensor | None, batch_size: int, losses: Tensor, first: int
    ) -> int:
        """Steps `first`, `first` + 1, … of an epoch of ``len(losses)`` steps.

        Step k takes the rows ``order[k * batch_size : (k + 1) * batch_size]`` (without an order, the rows of these
        numbers), of which the last step may have fewer. Its loss before the update becomes ``losses[k]``.

        Returns:
            The number of the next step, ``len(losses)`` at the end of the epoch. It may return early, after at least
            one step, but only at the end of a step.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self.run(input, target, order, batch_size, losses, first)
        until = perf_counter() + _SECONDS
        with self._own_gradients() as parameters:
            for k in range(first, len(losses)):
                rows = batch_of(input, order, batch_size, k), batch_of(target, order, batch_size, k)
                losses[k] = self._compose(*rows, parameters)
                if perf_counter() > until:
                    return k + 1
        return len(losses)

    @contextmanager
    def _own_gradients(self) -> Iterator[list[Tensor]]:
        """Sets every ``.grad`` aside, and puts it back at the end. Yields all parameters."""
        modules = [each for each in (self._model, self._loss) if isinstance(each, nn.Module)]
        found = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
        for group in self._optimizer.param_groups:
            found.update(dict.fromkeys(group["params"]))
        parameters: list[Tensor] = list(found)
        before = [parameter.grad for parameter in parameters]
        try:
            yield parameters
        finally:
            for parameter, grad in zip(parameters, before, strict=True):
                parameter.grad = grad

    def _compose(self, input: Tensor, target: Tensor, parameters: list[Tensor]) -> Tensor:
        """One step; at its end the ``.grad`` of the parameters are those of this step."""
        if not _needs_closure(self._optimizer):
            value = self._gradients(input, target, parameters)
            self._optimizer.step()
            return value
        values: list[Tensor] = []

        def closure() -> Tensor:
            values.append(self._gradients(input, target, parameters))
            return values[-1]

        self._optimizer.step(closure)
        return values[0]

    def _gradients(self, input: Tensor, target: Tensor, parameters: list[Tensor]) -> Tensor:
        """Makes ``.grad`` the clipped gradients of this batch. Returns the detached loss."""
        for parameter in parameters:
            parameter.grad = None
        model, loss = self._model, self._loss
        # An inference tensor cannot be saved for the backward pass, its copy can.
        input, target = (each.clone() if each.is_inference() else each for each in (input, target))
        if isinstance(model, FusedForward) and isinstance(loss, LossSpec):
            value = loss_backward(model, input, target, loss, self._op)
        else:
            with torch.enable_grad():
                value = loss.of(model(input), target) if isinstance(loss, LossSpec) else loss(model(input), target)
            if not isinstance(value, Tensor):
                raise TypeError(f"{self._op}: `loss` must return a Tensor, got {type(value).__name__}")
            value.backward()  # type: ignore[no-untyped-call]
            value = value.detach()
        if self._max_grad_norm is not None:
            # FSDP combines the norms of its shards in a method of this name.
            clip = getattr(model, "clip_grad_norm_", None)
            if callable(clip):
                clip(self._max_grad_norm)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), self._max_grad_norm)
        return value


def batch_of(rows: Tensor, order: Tensor | None, batch_size: int, k: int) -> Tensor:
    """The rows of step k."""
    first = k * batch_size
    if order is None:
        return rows[first : first + batch_size]
    indices = order[first : first + batch_size]
    # Where rows are contiguous, index_select takes less time; images with channels last remain so only by indexing.
    return rows.index_select(0, indices) if rows.dim() <= 2 or rows.is_contiguous() else rows[indices]


def _needs_closure(optimizer: Any) -> bool:
    """Whether ``optimizer.step`` must be given a closure, as that of ``LBFGS``."""
    step = getattr(type(optimizer), "step", None)
    return _closure_is_required(optimizer.step) if step is None else _closure_is_required_cached(step)


def _closure_is_required(step: Callable[..., Any]) -> bool:
    try:
        closure = inspect.signature(step).parameters.get("closure")
    except (TypeError, ValueError):  # a function without a signature in Python
        return False
    return closure is not None and closure.default is inspect.Parameter.empty


_closure_is_required_cached = functools.lru_cache(maxsize=64)(_closure_is_required)
