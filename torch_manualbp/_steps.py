"""Training steps: forward, loss, backward and update, of any module and any optimizer.

A step is this composition, bit for bit, whatever computes it:

    zero_grad;  loss.backward();  clip_grad_norm_;  optimizer.step()

except that the ``.grad`` that the caller sees are neither read nor written. `training.py` makes epochs of steps.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from operator import attrgetter, is_, itemgetter
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from torch_manualbp import _distributed, _ops
from torch_manualbp._checks import (
    check_compute_dtype,
    check_max_grad_norm,
    check_optimizer,
    check_tensor,
    name_call,
)
from torch_manualbp._gradients import unwatched, use_count
from torch_manualbp._losses import LossSpec
from torch_manualbp._route import loss_is_ours_under_autocast, target_is_ours
from torch_manualbp.modules import FusedForward, hook_counter, loss_backward, no_plan, whole_network
from torch_manualbp.optimizers import Arguments, arguments_of, finish, steps_by_kernels

LossFunction = Callable[[Tensor, Tensor], Tensor]

_MOST = 1 << 16  # steps in one call of the op
_SECONDS = 0.02  # after which `run` returns, so that Python handles signals and shows progress


class Steps:
    """The training steps of one model with one optimizer.

    Args:
        model: any module.
        optimizer: a ``torch.optim.Optimizer``, or what wraps one.
        loss: a named loss, or a function (output, target) → the loss, a scalar.
        max_grad_norm: of ``clip_grad_norm_``, over the parameters of the model; None: gradients are not clipped.
        op: the public function that errors name.
        dtype: in which autocast computes the loss and its gradients; None: autocast stays as it is.
    """

    __slots__ = ("_dtype", "_loss", "_max_grad_norm", "_model", "_op", "_optimizer")

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        loss: LossSpec | LossFunction,
        max_grad_norm: float | None,
        op: str,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_optimizer(op, optimizer)
        check_max_grad_norm(op, max_grad_norm)
        check_compute_dtype(op, dtype)
        self._dtype = dtype
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
        if (loss := self._by_kernels(input, target, None, None, 1)) is not None:
            return loss
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
        if input.dim() == 2 and first < len(losses):
            done = first * batch_size
            most = min(len(losses) - first, _MOST)
            if order is None:
                values = self._by_kernels(input[done:], target[done:], None, batch_size, most)
            else:
                values = self._by_kernels(input, target, order[done:], batch_size, most)
            if values is not None:
                losses[first : first + len(values)] = values
                return first + len(values)
        until = perf_counter() + _SECONDS
        with self._own_gradients() as parameters:
            for k in range(first, len(losses)):
                batch = batch_of(input, order, batch_size, k), batch_of(target, order, batch_size, k)
                losses[k] = self._compose(*batch, parameters)
                if perf_counter() > until:
                    return k + 1
        return len(losses)

    def _by_kernels(
        self, input: Tensor, target: Tensor, order: Tensor | None, batch_size: int | None, steps: int
    ) -> Tensor | None:
        """Steps in one call of the op `train`, for about `_SECONDS`. Returns their losses; None: the composition must.

        It must wherever `loss_backward` builds a graph and ``optimizer.step()`` is torch's own, or somebody observes.

        Args:
            input: as for `run`.
            target: as for `run`.
            order: as for `run`.
            batch_size: as for `run`; None: a single step on all rows, whose loss has no dimension.
            steps: how many at most.
        """
        network, loss, optimizer = self._model, self._loss, self._optimizer
        if not (isinstance(network, FusedForward) and isinstance(loss, LossSpec)) or network.__dict__.get(
            "_manualbp_watchers"
        ):
            return None
        parameters = whole_network(network, input)
        if parameters is None or input.requires_grad or not input.is_cpu or not target_is_ours(input, target, loss):
            return None
        if (dtype := self._dtype) is not None:
            if input.dtype is not torch.float32 or not loss_is_ours_under_autocast(input, *parameters, dtype):
                return None
            loss = loss.under_autocast(dtype)
        if _distributed.is_initialized() or not steps_by_kernels(optimizer):
            return None
        kept: _Kept | None = optimizer.__dict__.get("_manualbp_kept")
        options = None if kept is None else kept.options_of(optimizer, *parameters, loss, input.dtype)
        if kept is None or options is None:
            if (kept := _Kept.of(optimizer, *parameters, loss)) is None:
                return None
            optimizer.__dict__["_manualbp_kept"] = kept
            options = kept.arguments.options
        others = None if options is kept.arguments.options else options
        limits = others, self._max_grad_norm, _SECONDS
        try:
            losses: Tensor | None = _ops.train(
                kept.handle, input, target, order, batch_size, steps, kept.parameters, *limits
            )
        except RuntimeError:  # nothing has been changed: the composition raises the error of torch, or computes
            return None
        if losses is not None:
            finish(optimizer, kept.learners, kept.arguments)
        return losses

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

    def _autocast(self, input: Tensor) -> AbstractContextManager[Any]:
        """In which the loss is computed."""
        return nullcontext() if self._dtype is None else torch.autocast(input.device.type, self._dtype)

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
            try:
                with self._autocast(input):
                    value = loss_backward(model, input, target, loss, self._op)
            except Exception as error:
                name_call(error, self._op)
                raise
        else:
            with torch.enable_grad(), self._autocast(input):
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


_END = object()
_group_parameters = itemgetter("params")
_values = dict.values
_requires_grad = attrgetter("requires_grad")
_flags = attrgetter("requires_grad", "is_leaf", "grad_dtype" if hasattr(Tensor, "grad_dtype") else "dtype")


class _Kept:
    """What the op needs of an optimizer for a network and its loss, kept between calls: collecting it takes 50 µs.

    It holds while nothing that was read has been exchanged: weights, parameter groups, state, and the options except
    their numbers. No hook has been registered since (`stamp`). These comparisons run without a line of Python per
    parameter. What was kept of tensors is not their memory, which the op looks up at each call.
    """

    __slots__ = (
        *("__weakref__", "arguments", "frozen", "group", "handle", "learners", "loss", "objects", "parameters"),
        *("stamp", "structure"),
    )

    arguments: Arguments
    group: list[Any] | None  # what it holds, if there is a single one
    handle: int  # of the op `keep`
    loss: LossSpec
    stamp: float
    parameters: list[Tensor]  # of the network, layer by layer
    learners: list[Tensor]
    frozen: list[Tensor]
    objects: list[Any]
    structure: list[Any]

    @staticmethod
    def of(optimizer: Any, weights: list[Tensor], biases: list[Tensor | None], loss: LossSpec) -> "_Kept | None":
        """None: the composition must compute the step, as a graph or torch's own ``step`` is needed."""
        kept = _Kept()
        kept.stamp, kept.loss = hook_counter.next_id, loss
        if not unwatched(weights, biases):
            return None
        in_turn = [each for layer in zip(weights, biases, strict=True) for each in layer]
        kept.parameters = [each for each in in_turn if each is not None]
        kept.learners = [each for each in kept.parameters if each.requires_grad]
        kept.frozen = [each for each in kept.parameters if not each.requires_grad]
        arguments = arguments_of(optimizer, kept.learners)
        if arguments is None:
            return None
        kept.arguments = arguments
        kept.objects = [*_objects(optimizer, weights, biases)]
        _, kept.structure = _read(optimizer)
        group, *more = optimizer.param_groups
        # The lists of parameters of several groups may change, and a list of betas. All else is exchanged as a whole.
        kept.group = None if more or type(group.get("betas", ())) is not tuple else [*group.values()]
        if True in arguments.fresh:  # momentum buffers that are part of the state only after this step
            kept.stamp = float("nan")
        needs = [each is not None and each.requires_grad for each in in_turn]
        options = loss.name, loss.reduction == "mean", loss.ignore_index, loss.label_smoothing
        try:
            kept.handle = _ops.keep([bias is not None for bias in biases], needs, *options, *arguments, loss.autocast)
        except RuntimeError:  # for example because a state is the negative view of something
            return None
        weakref.finalize(kept, _ops.release, kept.handle).atexit = False
        return kept

    def options_of(
        self, optimizer: Any, weights: list[Tensor], biases: list[Tensor | None], loss: LossSpec, dtype: torch.dtype
    ) -> list[float] | None:
        """The options of all groups, those of `arguments` if they are the same; None if this does not hold.

        dtype: of the input. The op rejects parameters of another, so that this must be that of gradients.
        """
        if (
            self.stamp != hook_counter.next_id
            or self.loss is not loss
            or not all(map(is_, _objects(optimizer, weights, biases), self.objects))
            or set(map(_flags, self.learners)) != {(True, True, dtype)}
            or max(map(use_count, self.learners)) > 1
            or any(map(_requires_grad, self.frozen))
            or torch.is_anomaly_enabled()
        ):
            return None
        if self.group is not None and all(map(is_, _values(optimizer.param_groups[0]), self.group)):
            return self.arguments.options
        options, structure = _read(optimizer)
        return options if structure == self.structure else None

    def __reduce__(self) -> Any:  # a copied optimizer keeps something of its own
        return (no_plan, ())


def _objects(optimizer: Any, weights: list[Tensor], biases: list[Tensor | None]) -> Iterator[Any]:
    """All that must be the same objects: the parameters of the network and of the groups, and the state."""
    groups, state = optimizer.param_groups, optimizer.state
    members = chain.from_iterable(map(_group_parameters, groups))
    return chain(weights, biases, members, state, chain.from_iterable(map(_values, state.values())), (_END,))


def _read(optimizer: Any) -> tuple[list[float], list[Any]]:
    """The options of all groups in the order of the op, and what must not change with them: all but the numbers."""
    options: list[Any] = []
    structure: list[Any] = []
    for group in optimizer.param_groups:
        own = optimizer._options(group)
        options += own
        structure += map(type, own)  # a tensor may equal a number
        structure += bool(own[optimizer._extra]), len(group["params"]), group["differentiable"], group.get("capturable")
    return options, structure


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
