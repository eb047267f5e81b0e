"""Models whose forward is written by hand: the first call, which finds the chains of layers in it (`_chains`).

In the first call, all functions of torch that the forward calls are seen by a mode (`_Observer`). An output of a layer
joins a chain if its only use is a ReLU, whose only use is the next layer, while nothing may have been modified between
them, and if no code but torch's and the model's has had it in hands.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Final
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torch_manualbp import _compute
from torch_manualbp._chains import (
    Beginning,
    Layer,
    LinearSite,
    OtherLinearSite,
    Place,
    Plan,
    ReLUSite,
    Site,
    linear_arguments,
    place_of,
    tensors_in,
    this_thread,
    way_to_begin,
)
from torch_manualbp._relus import relu_in_place
from torch_manualbp._route import (
    TORCH,
    OwnFunctionMode,
    autocast_state,
    global_hooks_exist,
    is_tracing,
    layers_are_torchs,
    saved_tensor_hooks,
    transforms_active,
)
from torch_manualbp.modules import FusedForward, LinearReLU, has_hooks, hook_counter


class WrittenForward(nn.Module):
    """The mix-in of `fuse` for classes with a forward of their own."""

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__.pop(_PLAN, None)  # the plan's sites call the original's layers
        return replica


_PLAN: Final = "_manualbp_plan_of_calls"


def written_forward(original: Any) -> Callable[..., Any]:
    """The forward of a class that `fuse` derives from `original`: the original's, with chains computed in one call."""

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling() or this_thread.plan is not None:  # the plan of an outer model covers this one
            return original.forward(self, *args, **kwargs)
        plan: Plan | None = self.__dict__.get(_PLAN)
        if global_hooks_exist() or is_tracing():
            return original.forward(self, *args, **kwargs)
        if plan is None or (plan.stamp != hook_counter.next_id and not plan.is_valid(self)):
            return _first_call(self, original.forward, args, kwargs)
        if not plan.kinds:
            return original.forward(self, *args, **kwargs)
        here = this_thread
        here.plan = plan
        try:
            if plan.has_places:
                with Beginning(plan):
                    output = original.forward(self, *args, **kwargs)
            else:
                output = original.forward(self, *args, **kwargs)
            for chain in here.chains:
                chain.end()
        finally:
            here.plan = None
            here.chains.clear()
        return output

    return forward


class _Barrier(Site):
    """The call of a module that must be given ordinary tensors, for the first call: what is not torch's, has hooks."""

    __slots__ = ()


class _Seen:
    """A tensor that a layer or its ReLU has returned during the first call, and what it was used for."""

    __slots__ = ("before", "is_relu", "joins", "moment", "relu_site", "site", "tensor")

    def __init__(self, tensor: Tensor, site: Layer, is_relu: bool, moment: Any) -> None:
        self.tensor = ref(tensor)
        self.site = site
        self.is_relu = is_relu
        self.moment = moment
        self.joins: list[bool] = []  # of each use, whether it is the next step of a chain
        self.before: _Seen | None = None  # of a layer: the ReLU whose output it was given
        self.relu_site: Site | None = None  # of a ReLU: the module that computed it


class _Observer(OwnFunctionMode):
    """Sees all functions of torch that a forward calls, and what they are given."""

    def __init__(self, by_kernels: bool) -> None:
        super().__init__()
        self._by_kernels = by_kernels
        self._site: Site | None = None  # whose module is running
        self._places: dict[Any, Place] = {}
        self._seen: dict[int, _Seen] = {}  # by the id of the tensor
        self._all: list[_Seen] = []
        self._writes = 0  # calls of functions that may have modified a tensor

    def call(self, site: Site, module: Any, input: Any) -> Any:
        """What the module returns."""
        if isinstance(site, _Barrier):
            self._use(input)
            output = module._call_impl(input)
            self._use(output)
            return output
        outer, self._site = self._site, site
        try:
            output = module._call_impl(input)
        finally:
            self._site = outer
        return output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of the function."""
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(self._site or self._place(sys._getframe(1)), *linear_arguments(args, kwargs))
        seen = self._find(args[0]) if args else None
        if seen is not None and not seen.is_relu and relu_in_place(func, args, kwargs) is not None:
            if seen.moment == self._moment():
                seen.joins.append(True)
                output = func(*args, **kwargs)
                self._see(output, seen.site, True).relu_site = self._site
                return output
        elif seen is not None and seen.is_relu and func is F.dropout:
            output = func(*args, **kwargs)
            if output is not args[0]:  # otherwise it does nothing, or works in place
                seen.joins.append(seen.moment == self._moment())
                self._see(output, seen.site, True)
            elif kwargs.get("inplace"):
                seen.joins.append(False)
            return output
        self._use(args, kwargs)
        if _may_write(func, args, kwargs):
            self._writes += 1
        return func(*args, **kwargs)

    def _place(self, frame: FrameType) -> Place | None:
        """A place in the forward; None if it is torch that calls F.linear, as a layer with hooks does."""
        if frame.f_globals.get("__name__", "torch").partition(".")[0] == "torch":
            return None
        return self._places.setdefault(place_of(frame), Place())

    def _linear(self, site: Layer | None, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self._use(weight, bias)
        before = self._find(input)
        if before is not None:
            joins = before.is_relu and before.moment == self._moment()
            before.joins.append(joins)
            before = before if joins else None
        way = way_to_begin(input, weight, bias) if self._by_kernels else TORCH
        if way is TORCH:
            output = F.linear(input, weight, bias)
        else:
            output = _compute.layers(way, input, (weight,), (bias,), False, True)
        if site is not None:
            site.weight = torch.empty_like(weight, device="meta")
            self._see(output, site, False).before = before
        return output

    def _see(self, tensor: Tensor, site: Layer, is_relu: bool) -> _Seen:
        seen = self._seen[id(tensor)] = _Seen(tensor, site, is_relu, self._moment())
        self._all.append(seen)
        return seen

    def _find(self, tensor: Any) -> _Seen | None:
        seen = self._seen.get(id(tensor))
        return seen if seen is not None and seen.tensor() is tensor else None

    def _use(self, *values: Any) -> None:
        for tensor in tensors_in(*values):
            if (seen := self._find(tensor)) is not None:
                seen.joins.append(False)

    def _moment(self) -> Any:
        return (
            self._writes,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            autocast_state(),
            transforms_active(),
            saved_tensor_hooks(),
        )

    def fill(self, plan: Plan) -> None:
        """Adds the chains that were seen. What leaves the forward is found in the next call, at its end."""
        sites = {seen.site for seen in self._all}
        joins_relu, joins_next = (
            {site: all(seen.joins == [True] for seen in self._all if seen.site is site and seen.is_relu is is_relu)
             for site in sites}
            for is_relu in (False, True)
        )  # fmt: skip
        after: dict[Layer, set[Layer]] = {}
        for seen in self._all:
            if seen.before is not None:
                after.setdefault(seen.before.site, set()).add(seen.site)
        plan.places = self._places
        for first in sites:
            chain: list[Layer] = [first]
            relu = joins_relu[first]
            while relu and joins_next[chain[-1]] and len(following := after.get(chain[-1], set())) == 1:
                (site,) = following
                if site in chain:
                    break
                chain.append(site)
                relu = joins_relu[site]
            if relu or len(chain) > 1:
                plan.add(tuple(chain), relu)
        for kind in plan.kinds.values():
            plan.useful.update(kind.sites)
        plan.useful.update(seen.relu_site for seen in self._all if seen.is_relu and joins_relu[seen.site])


def _may_write(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function of torch may modify a tensor. In doubt, the answer is yes."""
    name = getattr(func, "__name__", "_")
    if name in ("__get__", "__set__", "__delete__"):
        return name != "__get__" or getattr(getattr(func, "__self__", None), "__name__", "data") == "data"
    if name.startswith("__"):
        return (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")) or name == "__setitem__"
    return name.endswith("_") or "out" in kwargs or any(value is True for value in (*args, *kwargs.values()))


def _first_call(model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The first call of a model: each layer is computed at once, and the model gets its plan."""
    if "_is_replica" in model.__dict__:
        for module in model.modules():
            remove(module)
    if "_is_replica" in model.__dict__ or transforms_active() or not layers_are_torchs():
        return forward(model, *args, **kwargs)
    here = this_thread
    installed = [module for module in model.modules() if module is not model and _install(module)]
    here.plan = plan = Plan(model)
    plan.observer = observer = _Observer(mentions_relu(model))
    try:
        with observer:
            output = forward(model, *args, **kwargs)
        observer.fill(plan)
        if plan.kinds or plan.hooked:
            model.__dict__[_PLAN] = plan
        elif (original := vars(type(model)).get("_original_class")) is not None:
            model.__class__ = original  # as before `fuse`: a class that does nothing would still take 1 µs a call
    finally:
        here.plan = plan.observer = None
        for module in installed:
            if module.__dict__["_compiled_call_impl"] not in plan.useful:
                del module.__dict__["_compiled_call_impl"]
    return output


def _install(module: nn.Module) -> bool:
    """Lets a `Site` call the module. False: one does already, or is not needed."""
    before = module.__dict__.get("_compiled_call_impl")
    kind = _site_of(module)
    if kind is None or (before is not None and (type(before) is kind or not isinstance(before, Site))):
        return False
    module.__dict__["_compiled_call_impl"] = kind(module)
    return True


def needs_first_call(model: nn.Module) -> bool:
    """Whether the next call makes a plan."""
    plan: Plan | None = model.__dict__.get(_PLAN)
    return plan is None or not plan.is_valid(model)


def remove(module: nn.Module) -> None:
    """Undoes what calls have added to a module; the next call is a first call."""
    module.__dict__.pop(_PLAN, None)
    if isinstance(module.__dict__.get("_compiled_call_impl"), Site):
        del module.__dict__["_compiled_call_impl"]


def _site_of(module: nn.Module) -> type[Site] | None:
    kind = type(module)
    if has_hooks(module) or "forward" in module.__dict__ or isinstance(module, FusedForward | LinearReLU):
        return _Barrier
    if kind is nn.Linear:
        return LinearSite
    if kind is nn.ReLU:
        return ReLUSite
    if isinstance(module, nn.Linear):
        return OtherLinearSite
    if isinstance(module, WrittenForward) or kind.__module__.partition(".")[0] == "torch":
        return None  # it calls functions of torch and modules, which are seen
    return _Barrier


_RELU_NAMES: Final = frozenset({"relu", "relu_", "clamp", "clamp_", "clamp_min", "clamp_min_", "clip", "clip_"})


def mentions_relu(model: nn.Module) -> bool:
    """Whether there is likely a ReLU. If so, the layers of the first call have the same bits as in the following."""
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if isinstance(module, nn.ReLU) or (
            isinstance(module, WrittenForward) and code is not None and not _RELU_NAMES.isdisjoint(code.co_names)
        ):
            return True
    return False
