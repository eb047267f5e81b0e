"""`fuse` and `unfuse`: switch every ``nn.Sequential`` of a model to fused computation, and back.

Only the class of a Sequential changes, to a subclass of itself with a fused forward; its children, parameters, hooks
and state_dict keys are untouched.
"""

import copyreg
import functools
from typing import Any, TypeVar, cast

from torch import nn

from torch_manualbp._checks import check_activations
from torch_manualbp.modules import FusedForward

_M = TypeVar("_M", bound=nn.Module)


def fuse(module: _M, *, activations: str = "store") -> _M:
    """Computes every run of Linear / ReLU in the Sequentials of `module` fused from now on; in place.

    Parameters stay the same objects, state_dict keys and hooks stay as they are. Left alone are Sequentials with a
    forward of their own; layers with hooks or parametrizations, and subclasses of ``nn.Linear``, run as plain modules.

    Args:
        module: any model.
        activations: "store" keeps every h_k for the backward pass; "recompute" keeps the input of each run only. An
            `MLP` in the model is fused already, and keeps its own setting.

    Returns:
        `module` itself. Its type changes if it is a Sequential, to a subclass of its type.

    Raises:
        TypeError: `module` is not an ``nn.Module``.
        ValueError: unknown `activations`.

    Example:
        >>> model = fuse(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
        >>> type(unfuse(model)) is nn.Sequential
        True
    """
    _check_module("fuse", module)
    check_activations("fuse", activations)
    for child in module.modules():
        if isinstance(child, nn.Sequential) and _has_sequential_forward(child):
            child.__class__ = _fused_class(cast(Any, type(child)))
        if isinstance(child, _Fused):
            child.__dict__["_manualbp_activations"] = activations
    return module


def unfuse(module: _M) -> _M:
    """The inverse of `fuse`: every Sequential that it changed gets its own class back; in place.

    An `MLP` stays an `MLP`: it was not made by `fuse`. ``nn.Sequential(*model)`` gives the plain network of one.

    Args:
        module: any model.

    Returns:
        `module` itself.

    Raises:
        TypeError: `module` is not an ``nn.Module``.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> type(unfuse(fuse(model))) is nn.Sequential
        True
    """
    _check_module("unfuse", module)
    for child in module.modules():
        if isinstance(child, _Fused):
            child.__class__ = child._original_class  # type: ignore[assignment]
            for name in ("_manualbp_activations", "_manualbp_plan", "_manualbp_watchers"):
                child.__dict__.pop(name, None)
    return module


def _check_module(op: str, module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{op}: `module` must be an nn.Module, got {type(module).__name__}")


def _has_sequential_forward(module: nn.Sequential) -> bool:
    return type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__


class _Fused(FusedForward):
    """What `fuse` mixes into a class. Such classes are made at run time, so pickling names the original class."""

    _original_class: type[nn.Sequential]

    def __getitem__(self, idx: Any) -> Any:
        """A child, or for a slice a Sequential of the same kind, as fused as this one."""
        item = super().__getitem__(idx)
        if isinstance(idx, slice):
            item.__dict__["_manualbp_activations"] = self._manualbp_activations
        return item

    def __reduce_ex__(self, protocol: Any) -> Any:
        rebuild, args, *state = cast(
            tuple[Any, ...], super().__reduce_ex__(max(protocol, 2))
        )  # before 2 it names the class
        if rebuild is not copyreg.__newobj__:  # type: ignore[attr-defined]  # absent from the stubs
            return (rebuild, args, *state)
        return (_new, (self._original_class,), *state)


@functools.cache
def _fused_class(original: Any) -> Any:
    """Return the subclass of `original` (a subclass of ``nn.Sequential``) whose forward is fused."""
    body = {"__module__": original.__module__, "__doc__": original.__doc__, "_original_class": original}
    return type(f"Fused{original.__name__}", (_Fused, original), body)


def _new(original: Any) -> Any:
    """Make an empty instance of the fused form of `original`, for copy and pickle."""
    fused = _fused_class(original)
    return fused.__new__(fused)
