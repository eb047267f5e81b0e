"""`fuse` and `unfuse`: switch a model, or an optimizer, to fused computation, and back.

Only the classes of Sequentials and of modules with a forward of their own change, to a subclass with a fused forward.
Children, parameters, hooks and state_dict keys stay as they are. So it is with an optimizer, whose step is fused
(`optimizers`). `safe_globals` lists the classes that a saved model of this kind refers to.
"""

import copyreg
import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, TypeVar, cast, overload

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.optim import Optimizer

from torch_manualbp._checks import Activations, check_activations
from torch_manualbp._compute import SEGMENT_BYTES
from torch_manualbp._forwards import WrittenForward, mentions_relu, written_forward
from torch_manualbp._forwards import remove as remove_site
from torch_manualbp.modules import MLP, FusedForward, LinearReLU, no_plan
from torch_manualbp.optimizers import fuse_optimizer, unfuse_optimizer

_M = TypeVar("_M", bound=nn.Module)
_O = TypeVar("_O", bound=Optimizer)


@overload
def fuse(module: _M, *, activations: Activations = "store", segment_bytes: int = ...) -> _M: ...
@overload
def fuse(module: _O) -> _O: ...
def fuse(module: Any, *, activations: Activations = "store", segment_bytes: int = SEGMENT_BYTES) -> Any:
    """Computes a model's runs of Linear / ReLU, or an optimizer's step, fused from now on; in place.

    In **a model**, the class of every Sequential and of every module with a forward of its own changes, to a subclass.
    Parameters stay the same objects, state_dict keys and hooks stay as they are, and so do the layers. (After adding
    layers, call `fuse` again.)

    A **Sequential** computes each run of Linear, ReLU, Linear, … in one call; Dropout after a ReLU, Identity and
    Sequentials inside it belong to the run. Layers with hooks or parametrizations, and subclasses of ``nn.Linear``, run
    as plain modules.

    A **forward of your own** is observed in its first call. From then on, layers whose output goes to a ReLU and from
    there to the next layer are computed in one call, if they are large enough to gain: linear layers and subclasses
    that call ``F.linear`` (masked ones, for example), ReLU in any spelling, ``F.dropout`` after it, across modules of
    the model. A clamp at 0 counts as a ReLU (its gradient where it is given exactly 0 becomes 0). If a later call does
    something else with such an output, it gets the value, and from then on the layer is computed at once. Between a
    layer and the use of its output, the forward must not begin to modify the layer's input or parameters: this raises
    an error, once, and is not noticed if it is done by ``.data`` or numpy. The first call of a model in which no chain
    is found gives it its class back. `fusion_report` shows the chains, and why a layer is in none.

    Classes that torch recognises by identity do not change, as ``torch.ao.nn.intrinsic.LinearReLU``.

    The ``step`` of **an optimizer** of the class ``torch.optim.SGD``, ``Adam`` or ``AdamW`` updates all parameters in
    one call, as torch's does: to the last bit with SGD, within rounding with Adam, and in float32 for half types. All
    options, parameter groups, state, checkpoints, hooks, closures and schedulers stay as they are. Torch's own step
    runs if parameters are not on the CPU (on CUDA, always), are complex or subclasses of Tensor; if a gradient is
    sparse, or its strides are not those of its parameter; if the learning rate or a beta is a tensor; with
    ``capturable`` or ``differentiable``; where ``torch.compile``, a transform of ``torch.func`` or a mode must see all
    operations; and if ``GradScaler`` leaves unscaling to the optimizer (``fused=True``). An optimizer of another class,
    or whose ``step`` somebody has replaced, does not change.

    Args:
        module: any model, or an optimizer.
        activations: of a model. "store" keeps every h_k for the backward pass; "recompute" keeps the input of each run
            only. An `MLP` in the model is fused already, and keeps its own setting.
        segment_bytes: of a model. A run whose parameters take at least twice as many bytes is several nodes of
            autograd instead of one, each of whole layers with at least this size, so that DistributedDataParallel
            sends the gradients of the upper layers while those of the lower ones are being computed. The results have
            the same bits. Smaller segments hand over gradients sooner; those of fewer than 2²⁰ numbers are not made.

    Returns:
        `module` itself. Its type may change to a subclass of its type.

    Raises:
        TypeError: `module` is neither an ``nn.Module`` nor an ``Optimizer``.
        ValueError: unknown `activations`; a `segment_bytes` that is not positive.

    Warns:
        UserWarning: there is no linear layer with a ReLU after it in the model; once for each model.

    Example:
        >>> model = fuse(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
        >>> optimizer = fuse(torch.optim.Adam(model.parameters()))
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> type(unfuse(optimizer)) is torch.optim.Adam, type(unfuse(model)) is nn.Sequential
        (True, True)
    """
    check_activations("fuse", activations)
    if type(segment_bytes) is not int or segment_bytes < 1:
        raise ValueError(f"fuse: `segment_bytes` must be a positive int, got {segment_bytes!r}")
    if isinstance(module, Optimizer):
        return fuse_optimizer(module)
    _check_module("fuse", module)
    fused: Callable[[type], type] = functools.cache(_fused_kind)  # modules that share a class go on sharing one
    for child in module.modules():
        if "forward" not in child.__dict__ and (_is_written(child) or (_is_sequential(child) and _has_run(child))):
            child.__class__ = fused(type(child))
        if isinstance(child, _Fused):
            child.__dict__["_manualbp_activations"] = activations
            remove_site(child)
        if isinstance(child, (_Fused, FusedForward)):  # an MLP too
            child.__dict__["_manualbp_segment_bytes"] = segment_bytes
            child.__dict__.pop("_manualbp_plan", None)
    _warn_if_nothing_can_fuse(module)
    return module


@overload
def unfuse(module: _M) -> _M: ...
@overload
def unfuse(module: _O) -> _O: ...
def unfuse(module: Any) -> Any:
    """The inverse of `fuse`: each Sequential that it changed, or the optimizer, gets its class back; in place.

    An `MLP` stays an `MLP`, since it was not made by `fuse`; ``nn.Sequential(*model)`` is its plain network. Whatever
    ``fully_shard``, ``replicate`` or ``parametrize`` have added to a class, before `fuse` or after it, is kept.

    Args:
        module: any model, or an optimizer.

    Returns:
        `module` itself.

    Raises:
        TypeError: `module` is neither an ``nn.Module`` nor an ``Optimizer``.
        RuntimeError: since `fuse`, the forward of a Sequential was replaced, or its class by one that is derived from
            the fused class. Nothing is changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> type(unfuse(fuse(model))) is nn.Sequential
        True
    """
    if isinstance(module, Optimizer):
        return unfuse_optimizer(module)
    _check_module("unfuse", module)
    unfused: Callable[[type], type] = functools.cache(_unfused_kind)
    changed = [(child, unfused(type(child))) for child in module.modules() if isinstance(child, _Fused)]
    for child, _ in changed:
        if "forward" in child.__dict__:
            raise RuntimeError(
                f"unfuse: the forward of a {type(child).__name__} was replaced after fuse, by something that may call "
                "the fused one: put it back (`del sequential.forward`) first"
            )
    for child in module.modules():
        remove_site(child)
    for child, kind in changed:
        child.__class__ = kind
        watchers = child.__dict__.get("_manualbp_watchers", ())
        for name in [name for name in child.__dict__ if name.startswith("_manualbp_")]:
            del child.__dict__[name]
        for watcher in watchers:
            watcher.watch(child)
    return module


def safe_globals(*classes: type) -> list[Any]:
    """The classes that ``torch.load(weights_only=True)`` needs for an `MLP`, a `LinearReLU` or a fused Sequential.

    Pass them to ``torch.serialization.safe_globals`` or ``add_safe_globals``. They are the classes of this library and
    ``nn.Sequential``, ``nn.Linear`` and ``nn.ReLU``. A state_dict needs none of them.

    Args:
        classes: other classes in the model that you trust, such as ``nn.Dropout``. The fused classes of
            those that `fuse` changes are allowed as well.

    Raises:
        TypeError: an item of `classes` is not a class.

    Example:
        >>> import io, torch
        >>> model = fuse(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
        >>> torch.save(model, file := io.BytesIO())
        >>> with torch.serialization.safe_globals(safe_globals()):
        ...     loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        >>> type(unfuse(loaded)) is nn.Sequential
        True
    """
    for kind in classes:
        if not isinstance(kind, type):
            raise TypeError(f"safe_globals: `classes` must be classes, got {kind!r}")
    kinds = {nn.Sequential, *classes}
    fused = [_fused_class(kind) for kind in kinds if _runs_children_in_turn(kind) or _may_be_written(kind)]
    return [nn.Sequential, nn.Linear, nn.ReLU, MLP, LinearReLU, _new, no_plan, *classes, *fused]


_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn_if_nothing_can_fuse(model: nn.Module) -> None:
    can = any(isinstance(child, FusedForward | LinearReLU) for child in model.modules()) or mentions_relu(model)
    if not can and model not in _warned:
        _warned.add(model)
        warnings.warn("fuse: found no linear layer with a ReLU after it (fusion_report tells more)", stacklevel=3)


def _check_module(op: str, module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{op}: `module` must be an nn.Module or an Optimizer, got {type(module).__name__}")


# All methods and attributes that a call of an nn.Sequential uses, down to the calls of its children.
_RUNNING = {
    name: getattr(nn.Sequential, name, None)
    for name in (
        *("__call__", "_wrapped_call_impl", "_call_impl", "_slow_forward"),
        *("forward", "__iter__", "_modules", "__getattribute__"),
    )
}


def _runs_children_in_turn(kind: type) -> bool:
    """Whether `kind` is ``nn.Sequential`` or a subclass that calls its children in the same way.

    Subclasses in torch itself are excluded, since torch recognises them by identity.
    """
    own = set(kind.__mro__) - set(nn.Sequential.__mro__)
    return (
        issubclass(kind, nn.Sequential)
        and all(getattr(kind, name, None) is value for name, value in _RUNNING.items())
        and not any(_is_of_torch(base) for base in own)
    )


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and _runs_children_in_turn(_written(type(module)))


def _is_written(module: nn.Module) -> bool:
    """Whether this is a module with a forward of its own, in which there are linear layers."""
    return (
        not isinstance(module, FusedForward | _Fused)
        and _may_be_written(_written(type(module)))
        and any(isinstance(child, nn.Linear) for child in module.modules())
    )


def _may_be_written(kind: type) -> bool:
    """Whether a class has a forward of its own. Classes of torch.ao, derived ones too, are known by identity."""
    return (
        issubclass(kind, nn.Module)
        and not issubclass(kind, nn.Linear | nn.ModuleList | nn.ModuleDict | torch.jit.ScriptModule | FusedForward)
        and not _is_of_torch(kind)
        and not any(base.__module__.startswith("torch.ao.") for base in kind.__mro__)
        and not (issubclass(kind, nn.Sequential) and _runs_children_in_turn(kind))
    )


def _has_run(sequential: nn.Sequential) -> bool:
    """Whether a ReLU follows a linear layer, with or without hooks and parametrizations, which may be removed later."""
    kinds = [kind for kind in _kinds(sequential) if kind is not nn.Identity]
    return LinearReLU in kinds or (nn.Linear, nn.ReLU) in pairwise(kinds)


def _kinds(sequential: nn.Module) -> Iterator[Any]:
    """The classes of the children, and in the place of a Sequential those of its children."""
    for child in sequential._modules.values():
        kind: Any = type_before_parametrizations(cast(Any, child))
        if kind in (nn.Sequential, _fused_class(nn.Sequential)):
            yield from _kinds(cast(nn.Module, child))
        else:
            yield getattr(kind, "cls_to_become", None) or kind  # what a lazy layer will become


def _is_of_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def _is_made_by_torch(kind: type) -> bool:
    """Whether torch made this class at run time around another, as ``fully_shard`` and ``parametrize`` do."""
    is_written = "." in kind.__qualname__ or getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind
    return _is_of_torch(kind) and not is_written


def _fused_kind(kind: type) -> type:
    """`kind` with a fused forward, if possible; FSDPSequential becomes what fully_shard makes of a fused class."""
    if issubclass(kind, _Fused):
        return kind
    written = _written(kind)
    return _exchanged(kind, written, _fused_class(written))


def _written(kind: type) -> type:
    """The class that torch has derived `kind` from at run time; usually `kind` itself."""
    while _is_made_by_torch(kind) and not issubclass(kind, _Fused):
        kind = next(base for base in kind.__bases__ if issubclass(base, nn.Module))
    return kind


def _unfused_kind(kind: type) -> type:
    """The inverse of `_fused_kind`, also if torch has since derived a class from the fused one."""
    fused = next(base for base in kind.__mro__ if "_original_class" in vars(base))
    return _exchanged(kind, fused, cast(Any, fused)._original_class)


def _exchanged(kind: type, base: type, other: type) -> type:
    """`other`, if `kind` is `base`; otherwise the class that torch made of `base`, made of `other` instead."""
    if kind is base:
        return other
    if not _is_made_by_torch(kind):
        raise RuntimeError(
            f"unfuse: the class {kind.__name__} is derived from {base.__name__}, which fuse made: give the module the "
            "class back that it had before"
        )
    bases = tuple(_exchanged(each, base, other) if issubclass(each, base) else each for each in kind.__bases__)
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__.removesuffix(base.__name__) + other.__name__, bases, body)


class _Fused(nn.Module):
    """The mix-in of `fuse`. Classes with it are made at run time, so that a pickle refers to the original class."""

    _original_class: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Skips the original's own hook for the classes that `fuse` makes: a registry need not contain them."""
        if "_original_class" not in vars(cls):
            super().__init_subclass__(**kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = cast(tuple[Any, ...], super().__reduce_ex__(max(protocol, 2)))  # before 2 it names the class
        if reduced[0] is copyreg.__newobj__ and "_original_class" in vars(type(self)):  # type: ignore[attr-defined]
            _, (_, *args), *state = reduced
            reduced = (_new, (self._original_class, *args), *state)
        return reduced


class _FusedSequential(_Fused, FusedForward):
    """A Sequential whose children are called in turn."""

    def __getitem__(self, idx: Any) -> Any:
        """A child, or for a slice a Sequential of the same kind, as fused as this one."""
        item = super().__getitem__(idx)
        if isinstance(idx, slice):
            item.__dict__["_manualbp_activations"] = self._manualbp_activations
            item.__dict__["_manualbp_segment_bytes"] = self._manualbp_segment_bytes
        return item


class _FusedWritten(_Fused, WrittenForward):
    """A module with a forward of its own."""


@functools.cache
def _fused_class(original: Any) -> Any:
    """The subclass of `original` with a fused forward."""
    body = {"__module__": original.__module__, "__doc__": original.__doc__, "_original_class": original}
    if issubclass(original, nn.Sequential) and _runs_children_in_turn(original):
        return type(original)(f"Fused{original.__name__}", (_FusedSequential, original), body)
    *scope, name = original.__qualname__.split(".")
    body |= {"__qualname__": ".".join((*scope, f"Fused{name}")), "forward": written_forward(original)}
    return type(original)(original.__name__, (_FusedWritten, original), body)


def _new(original: Any, *args: Any) -> Any:
    """An empty instance of the fused class of `original`, for copy and pickle."""
    fused = _fused_class(original)
    return fused.__new__(fused, *args)
