"""Torch's SGD, Adam and AdamW with a ``step()`` that updates all parameters in one call of our op.

``fuse(optimizer)`` in `conversion` changes the class of an optimizer to one of these. Parameter groups, state, hooks,
schedulers and checkpoints are those of torch. Only ``step`` is replaced, and what it cannot do, torch's own step does.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

from torch_manualbp import _ops
from torch_manualbp._route import PLAIN, TORCH, route_step, step_is_observed

_O = TypeVar("_O", bound=Optimizer)


class Arguments(NamedTuple):
    """What our ops need of an optimizer beside parameters and gradients, in their order (csrc/cpu/update.h)."""

    rule: str
    states: list[Tensor]
    options: list[float]
    groups: list[int]
    fresh: list[bool]


def arguments_of(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Arguments | None:
    """What an op needs for a step of `optimizer` that updates `parameters`; None if ``optimizer.step()`` must run.

    It must run if the optimizer is not fused, has hooks, or has another ``step`` than the one of its class (a scheduler
    may have wrapped that), if a parameter is in none of its groups, and where torch's own step must. Missing state is
    created, as ``step`` does. After the op, call `finish`.

    Args:
        optimizer: any optimizer.
        parameters: leaf tensors, in any order.
    """
    if not steps_by_kernels(optimizer):
        return None
    assert isinstance(optimizer, _FusedStep)
    group_of = {id(each): k for k, group in enumerate(optimizer.param_groups) for each in group["params"]}
    groups = [group_of.get(id(parameter), -1) for parameter in parameters]
    return None if -1 in groups else _arguments(optimizer, parameters, groups)


def steps_by_kernels(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step()`` is ours, has not been replaced, and no hook, mode or profiler observes its calls."""
    return (
        isinstance(optimizer, _FusedStep)
        and ("step" not in optimizer.__dict__ or _is_scheduled(optimizer))
        and route_step(optimizer, optimizer._plain) is not TORCH
        and not step_is_observed(optimizer)
    )


def finish(optimizer: Optimizer, parameters: list[Tensor], arguments: Arguments) -> None:
    """What remains after an op has updated `parameters`: version counters, new momentum buffers, the scheduler's flag.

    Args:
        optimizer: as for `arguments_of`.
        parameters: as for `arguments_of`.
        arguments: what `arguments_of` returned.
    """
    increment_version(parameters + arguments.states)
    if True in arguments.fresh:
        having = _with_momentum(parameters, arguments.options, arguments.groups)
        for parameter, buffer in zip(having, arguments.states, strict=True):
            optimizer.state[parameter]["momentum_buffer"] = buffer
    if "step" in optimizer.__dict__:
        optimizer._opt_called = True  # type: ignore[attr-defined]


def _update(optimizer: "_FusedStep") -> bool:
    """Updates all parameters that have a gradient; False, and no change, if torch's own step must."""
    parameters: list[Tensor] = []
    gradients: list[Tensor] = []
    groups: list[int] = []
    for k, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None:
                parameters.append(parameter)
                gradients.append(gradient)
                groups.append(k)
    if not parameters:
        return True
    if not (parameters[0].is_cpu and PLAIN.issuperset(map(type, gradients))):
        return False
    arguments = _arguments(optimizer, parameters, groups)
    if arguments is None or not _ops.update(parameters, gradients, *arguments):
        return False
    finish(optimizer, parameters, arguments)
    return True


_NUMBERS = frozenset({float, int, bool})


def _arguments(optimizer: "_FusedStep", parameters: Sequence[Tensor], groups: list[int]) -> Arguments | None:
    options: list[float] = []
    for group in optimizer.param_groups:
        if group["differentiable"] or group.get("capturable"):
            return None
        options += optimizer._options(group)
    if not _NUMBERS.issuperset(map(type, options)) and not all(isinstance(each, float | int) for each in options):
        return None  # tensors, or numpy's scalars other than float64
    arguments = optimizer._collect(parameters, options, groups)
    if arguments is None:
        return None
    states = arguments.states
    # Torch does not let inference tensors be written outside of inference mode. The states of a parameter are made
    # together, so that the first ones tell.
    is_plain = (
        PLAIN.issuperset(map(type, parameters))
        and PLAIN.issuperset(map(type, states))
        and not any(map(Tensor.is_inference, parameters))
        and not any(map(Tensor.is_inference, states[: len(parameters)]))
    )
    return arguments if is_plain else None


def _states_of(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The state of each parameter; empty if there is none yet."""
    states = optimizer.state
    if len(states) == len(parameters) and all(map(is_, states, parameters)):
        return list(states.values())  # in this order: no hashing, which takes 0.1 µs for each tensor
    return [states[parameter] for parameter in parameters]


class _FusedStep(Optimizer):
    """The mix-in of `fuse`."""

    _plain: ClassVar[type[Optimizer]]  # torch's class
    _plain_step: ClassVar[Callable[..., Any]]  # its step, without hooks and without the decorator that sets grad mode
    _extra: ClassVar[int]  # which option says whether there is a momentum buffer, or max_exp_avg_sq

    @staticmethod
    def _options(group: dict[str, Any]) -> tuple[float, ...]:
        """The options of a parameter group in the order of the op."""
        raise NotImplementedError

    def _collect(self, parameters: Sequence[Tensor], options: list[float], groups: list[int]) -> Arguments | None:
        raise NotImplementedError

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Performs a single optimization step: that of torch's class, in one call of our op where `fuse` says so.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What `closure` returns, or None.
        """
        if route_step(self, self._plain) is TORCH:
            return super().step(closure)
        if step_is_observed(self):
            return self._observed_step(closure)
        if closure is not None:
            return self._step(closure)
        return None if _update(self) else super().step()  # one call less in the usual case

    step.hooked = True  # type: ignore[attr-defined]  # torch then does not add a hooks' wrapper, which takes 10 µs a call

    def _patch_step_function(self) -> None:
        """What torch calls for a new or loaded optimizer. Torch's class gets its wrapper for hooks as well."""
        super()._patch_step_function()
        plain: Any = self._plain
        if not getattr(plain.step, "hooked", False):
            plain.step = Optimizer.profile_hook_step(plain.step)
            plain.step.hooked = True

    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not _update(self):
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                type(self)._plain_step(self)
        return loss

    _observed_step = Optimizer.profile_hook_step(_step)  # runs the hooks, and has a name in the profiler


class FusedSGD(_FusedStep, SGD):
    """``torch.optim.SGD`` after `fuse`."""

    _plain = SGD
    _plain_step = staticmethod(inspect.unwrap(SGD.step))
    _extra = 1

    @staticmethod
    def _options(group: dict[str, Any]) -> tuple[float, ...]:
        return (
            *(group["lr"], group["momentum"], group["dampening"], group["weight_decay"]),
            *(group["nesterov"], group["maximize"]),
        )

    def _collect(self, parameters: Sequence[Tensor], options: list[float], groups: list[int]) -> Arguments:
        if not any(options[1::6]):  # momentum
            return Arguments("sgd", [], options, groups, [])
        having = _with_momentum(parameters, options, groups)
        buffers: list[Any] = [state.get("momentum_buffer") for state in _states_of(self, having)]
        fresh = [buffer is None for buffer in buffers]
        if True in fresh:
            pairs = zip(buffers, having, strict=True)
            buffers = [torch.empty_like(parameter) if buffer is None else buffer for buffer, parameter in pairs]
        return Arguments("sgd", buffers, options, groups, fresh)


def _with_momentum(parameters: Sequence[Tensor], options: list[float], groups: list[int]) -> list[Tensor]:
    return [parameter for parameter, k in zip(parameters, groups, strict=True) if options[6 * k + 1]]


class _AdamStep(_FusedStep):
    _extra = 6

    @staticmethod
    def _options(group: dict[str, Any]) -> tuple[float, ...]:
        return (
            *(group["lr"], *group["betas"], group["eps"], group["weight_decay"]),
            *(group["decoupled_weight_decay"], group["amsgrad"], group["maximize"]),
        )

    def _collect(self, parameters: Sequence[Tensor], options: list[float], groups: list[int]) -> Arguments | None:
        states = _states_of(self, parameters)
        if not all(states):
            for state, parameter, k in zip(states, parameters, groups, strict=True):
                if not state and not _begin_adam(state, parameter, self.param_groups[k]):
                    return None
        tensors = [state["exp_avg"] for state in states]
        tensors += [state["exp_avg_sq"] for state in states]
        tensors += [state["step"] for state in states]
        if any(options[6::8]):  # amsgrad
            tensors += [state["max_exp_avg_sq"] for state, k in zip(states, groups, strict=True) if options[8 * k + 6]]
        return Arguments("adam", tensors, options, groups, [])


def _begin_adam(state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> bool:
    """Creates the state of a parameter as ``Adam._init_group`` does; False if torch must, or raises an error there."""
    gradient = parameter.grad
    if not (parameter.is_cpu and parameter.is_floating_point() and (gradient is None or not gradient.is_sparse)):
        return False
    is_double = torch.get_default_dtype() is torch.float64 and not group["fused"]
    state["step"] = torch.tensor(0.0, dtype=torch.float64 if is_double else torch.float32, device="cpu")
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]:
        state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return True


class FusedAdam(_AdamStep, Adam):
    """``torch.optim.Adam`` after `fuse`."""

    _plain = Adam
    _plain_step = staticmethod(inspect.unwrap(Adam.step))


class FusedAdamW(_AdamStep, AdamW):
    """``torch.optim.AdamW`` after `fuse`."""

    _plain = AdamW
    _plain_step = staticmethod(inspect.unwrap(AdamW.step))


_FUSED: dict[type, type[_FusedStep]] = {kind._plain: kind for kind in (FusedSGD, FusedAdam, FusedAdamW)}


def fuse_optimizer(optimizer: _O) -> _O:
    """`fuse` for an optimizer."""
    return _exchanged(optimizer, _FUSED.get(type(optimizer)))


def unfuse_optimizer(optimizer: _O) -> _O:
    """`unfuse` for an optimizer."""
    kind: Any = type(optimizer)
    return _exchanged(optimizer, kind._plain if kind in _FUSED.values() else None)


def _exchanged(optimizer: _O, kind: type[Optimizer] | None) -> _O:
    """The optimizer with this class, unless there is none for it, or somebody else has replaced its step."""
    scheduled = "step" in optimizer.__dict__
    if kind is None or (scheduled and not _is_scheduled(optimizer)):
        return optimizer
    optimizer.__dict__.pop("_manualbp_kept", None)  # what `_steps` keeps for a fused one
    optimizer.__class__ = kind  # type: ignore[assignment]
    if scheduled:
        optimizer.step = _scheduled_step(optimizer)  # type: ignore[method-assign]
    return optimizer


def _is_scheduled(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step`` is what a scheduler (or `_scheduled_step`) has put around the step of its class."""
    step: Any = optimizer.__dict__["step"]
    made_in = getattr(step, "__globals__", None)
    return (
        (made_in is vars(lr_scheduler) or made_in is globals())
        and getattr(step, "_wrapped_by_lr_sched", False)
        and step.__wrapped__ is type(optimizer).step
    )


def _scheduled_step(optimizer: Optimizer) -> Callable[..., Any]:
    """What an ``LRScheduler`` puts in the place of ``optimizer.step``, in order to know that it was called."""
    reference, function = weakref.ref(optimizer), type(optimizer).step

    @functools.wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        optimizer: Any = reference()
        optimizer._opt_called = True
        return function(optimizer, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return step
