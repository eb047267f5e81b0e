"""Fuses chains of linear layers and ReLUs in models whose forward is written by hand, without tracing them.

The first call of such a model is observed (`_forwards`): which layer's output goes to a ReLU and nowhere else, and
from there to another layer and nowhere else. The result is a `Plan`. In the following calls these layers, and only
these, answer with a `Pending` tensor, which remembers its input and parameters. The last layer of the chain computes
all of them in one call, and its output is an ordinary tensor.

    forward as written            h = F.relu(self.fc1(x));   y = self.fc2(h)
    the first call                fc1: its output goes to a ReLU only;  the ReLU's goes to fc2 only;  fc2: elsewhere
    the following calls           fc1 -> Pending(x, Ω_1, β_1);  relu -> the same, with a ReLU;  fc2 -> computes

Forwards are ordinary Python, and may do something else next time. So a `Pending` tensor that reaches any other function
of torch computes its value first, and becomes an ordinary tensor in place; the plan then leaves that layer alone. If
the input or a parameter has been modified meanwhile, this raises an error: the value would be another than plain's.

A layer is called through `Site`, which stands where ``nn.Module.compile`` puts a compiled call: classes, attributes,
hooks and state_dict stay as they are, and copies and pickles are without it.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from sys import getrefcount
from types import CodeType, FrameType
from typing import Any, Final, cast
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_manualbp import _compute
from torch_manualbp._compute import SEGMENT_BYTES, Masks, segments
from torch_manualbp._gradients import use_count
from torch_manualbp._ops import masks_of
from torch_manualbp._relus import relu_in_place
from torch_manualbp._route import (
    AUTOCAST,
    KERNELS,
    PLAIN,
    PLAIN_OR_NONE,
    TORCH,
    OwnFunctionMode,
    are_plain,
    broadcasts,
    casts_all,
    global_hooks_exist,
    is_quiet,
    linear_is_called,
    relu_is_called,
    route,
    route_run,
    rows_left_to_torch,
    saved_tensor_hooks,
    transforms_active,
)
from torch_manualbp.modules import Transparent, has_hooks, hook_counter, no_plan
from torch_manualbp.reference import mlp_forward

_make_wrapper_subclass: Any = Tensor._make_wrapper_subclass
_is_grad_enabled = torch.is_grad_enabled
_is_inference_mode_enabled = torch.is_inference_mode_enabled
_is_inference: Any = Tensor.is_inference
_version: Any = Tensor._version.__get__  # type: ignore[attr-defined]


class _Thread(threading.local):
    """What this thread is doing: the plan of the model that runs, and its chains."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.chains: list[Chain] = []
        self.site: Site | None = None  # a subclass of nn.Linear that is running


this_thread = _Thread()


# --- pending tensors ------------------------------------------------------------------------------------------------


class Pending(Tensor):
    """A step of a chain that is not computed yet. Any function but the next step computes it."""

    _manualbp_chain: "Chain"
    _manualbp_step: int  # 4k: the output of layer k of the chain; 4k + 1: its ReLU; 4k + 2: dropout of it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The next step, if `func` is what the chain expects; otherwise what it returns for ordinary tensors."""
        first = args[0] if args else None
        if type(first) is Pending:
            if func in _RELUS and not (kwargs and kwargs.get("inplace")):
                output = first._manualbp_chain.rectify(first)
            elif func is F.linear:
                _, weight, bias = linear_arguments(args, kwargs or {})
                chain = first._manualbp_chain
                output = chain.join(first, layer_called(chain.plan, sys._getframe(1)), weight, bias)
            elif (in_place := relu_in_place(func, args, kwargs or {})) is not None:
                output = first._manualbp_chain.rectify(first, in_place)
            elif func is F.dropout:
                output = first._manualbp_chain.drop(first, *args[1:], **(kwargs or {}))
            else:
                output = None
            if output is not None:
                return output
        for tensor in tensors_in(args, kwargs):
            settle(tensor)
        return func(*args, **(kwargs or {}))

    def __setattr__(self, name: str, value: Any) -> None:
        """An attribute of the caller's stays with the tensor, which is therefore no longer one of ours."""
        if not name.startswith("_manualbp_") and name != "__class__":
            settle(self)
        super().__setattr__(name, value)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Raises an error: C++ code has been given a tensor without data, and did not ask `__torch_function__`."""
        for tensor in tensors_in(args, kwargs):
            if type(tensor) is Pending:
                tensor._manualbp_chain.cut(tensor._manualbp_step)
        raise RuntimeError(f"{_UNSEEN} ({func})")


_UNSEEN: Final = (
    "a fused model: the output of a linear layer was given to code that torch cannot see, such as an autograd.Function "
    "or a C++ extension, where earlier calls of the forward gave it to a ReLU only. Call the model again: this layer "
    "is now computed at once"
)
_RELUS: Final = frozenset({F.relu, torch.relu, Tensor.relu})


def settle(tensor: Any) -> None:
    """Computes a pending tensor, which becomes an ordinary one. From now on the plan has no chain across this step."""
    if type(tensor) is Pending:
        tensor._manualbp_chain.cut(tensor._manualbp_step)
        _become(tensor)


def _become(tensor: Pending) -> Tensor:
    """Turns a pending tensor into an ordinary one: the same object, with the value and its place in the graph."""
    value = tensor._manualbp_chain.value(tensor._manualbp_step)
    if type(tensor) is not Pending:  # another thread was faster
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        held = use_count(tensor)
    if held > 1:  # by C++ code, as ``apply`` of an autograd.Function holds its inputs: it would go on with the old one
        raise RuntimeError(_UNSEEN)
    torch._C._swap_tensor_impl(tensor, value)
    del tensor._manualbp_chain, tensor._manualbp_step
    tensor.__class__ = cast(Any, Tensor)
    return tensor


class Chain:
    """Layers with ReLUs between them, on their way to be computed in one call.

    The object and its pending tensors are used again by the next call, since making them takes as long as a layer.
    """

    __slots__ = (
        *("autocast", "biases", "dropped", "grad", "input", "kept", "kind", "now", "plan", "renumber", "scales"),
        *("tokens", "used", "version", "weights"),
    )

    kind: "Kind"
    plan: "Plan"
    input: Any
    used: list[Tensor]  # input and parameters
    version: int  # the sum of their versions, which only grow
    weights: list[Tensor]
    biases: list[Tensor | None]
    grad: bool  # whether autograd recorded when the chain began
    autocast: Any  # the dtype in which autocast computed then, or None
    now: int  # the step that was made last
    kept: list[Tensor | None]  # the masks of the dropout after the layers, as far as there is any
    scales: list[float]
    tokens: list[Pending]  # of each layer and each ReLU but the last
    dropped: dict[int, Pending]  # of the dropout after a layer
    renumber: bool

    def __init__(self, steps: int) -> None:
        self.used, self.weights, self.biases, self.kept, self.scales = [], [], [], [], []
        self.renumber = False
        self.tokens = [_token(self, (k >> 1 << 2) + (k & 1)) for k in range(steps - 1)]
        self.dropped = {}

    def begin(
        self, kind: "Kind", plan: "Plan", autocast: Any, input: Any, weight: Tensor, bias: Tensor | None
    ) -> Pending:
        """The first layer."""
        self.kind, self.plan, self.autocast, self.input, self.version = kind, plan, autocast, input, 0
        if not _is_inference(input):  # inference tensors have no version
            self.used.append(input)
            self.version = _version(input)
        self._add(weight, bias)
        self.grad = _is_grad_enabled()
        self.now = 0
        return self.tokens[0]

    def _add(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weights.append(weight)
        self.biases.append(bias)
        try:
            version = _version(weight) if bias is None else _version(weight) + _version(bias)
        except RuntimeError:  # computed in inference mode
            return
        self.version += version
        self.used.append(weight)
        if bias is not None:
            self.used.append(bias)

    def join(self, token: Pending, site: "Layer | None", weight: Any, bias: Any) -> Tensor | None:
        """The next layer, applied to `token`. None: it is not what is expected."""
        step, last = (self.now | 3) + 1, len(self.kind.sites) - 1
        if (
            token._manualbp_step != self.now
            or not self.now & 3
            or step >> 2 > last
            or self.kind.sites[step >> 2] is not site
            or _is_grad_enabled() is not self.grad
            or type(weight) not in PLAIN
            or type(bias) not in PLAIN_OR_NONE
        ):
            return None
        if step >> 2 < last or self.kind.relu:
            self._add(weight, bias)
            self.now = step
            return self.tokens[step >> 1]
        if not is_quiet(self.autocast) or saved_tensor_hooks() is not None:
            return None
        self.check_versions()
        self._add(weight, bias)
        self.now = step
        return self._compute(step)

    def rectify(self, token: Pending, in_place: bool = False) -> Tensor | None:
        """The ReLU of `token`. None: it is not what is expected."""
        if token._manualbp_step != self.now or self.now & 3 or _is_grad_enabled() is not self.grad:
            return None
        self.now = step = self.now + 1
        is_last = step >> 2 == len(self.kind.sites) - 1
        if in_place:
            token._manualbp_step = step
            self.renumber = True
            if is_last:
                self.tokens[step >> 1] = _token(self, step - 1)
                return _become(token)
            return token
        return self.value(step) if is_last else self.tokens[(step >> 1) + 1]

    def drop(self, token: Pending, p: float, training: bool, inplace: bool = False) -> Tensor | None:
        """Dropout of `token`, whose mask is drawn now. None: it is not what is expected."""
        if (
            token._manualbp_step != self.now
            or self.now & 3 != 1
            or type(p) not in (float, int)
            or not 0 <= p < 1
            or inplace
            or _is_grad_enabled() is not self.grad
            or not self.input.is_cpu
        ):
            return None
        if not training or p == 0:
            return token
        k = self.now >> 2
        self.kept += [None] * (k + 1 - len(self.kept))
        self.scales += [0.0] * (k + 1 - len(self.scales))
        self.kept[k], self.scales[k] = _compute.draw(p, self.input, self.weights[k], self.dtype())
        self.now += 1
        if (dropped := self.dropped.get(k)) is None:
            dropped = self.dropped[k] = _token(self, self.now)
        return dropped

    def value(self, step: int) -> Tensor:
        """The result of a step that has been made."""
        self.check_versions()
        if _is_grad_enabled() is self.grad and is_quiet(self.autocast) and saved_tensor_hooks() is None:
            return self._compute(step)
        with _as_at_first(self.grad, self.autocast):
            return self._compute(step)

    def dtype(self) -> torch.dtype:
        """Of all results."""
        return self.autocast or self.input.dtype  # type: ignore[no-any-return]

    def check_versions(self) -> None:
        """Raises an error if the input or a parameter is not what it was when the layers were called."""
        if sum(map(_version, self.used)) == self.version:
            return
        self.cut(0)
        raise RuntimeError(
            "a fused model: between the call of a linear layer and the use of its output, the forward has modified the "
            "layer's input or a parameter in place, which earlier calls did not. Call the model again: this layer is "
            "now computed at once"
        )

    def _compute(self, step: int) -> Tensor:
        input, weights, biases, relu = self.input, self.weights, self.biases, bool(step & 3)
        count = (step >> 2) + 1
        if count < len(weights):
            weights, biases = weights[:count], biases[:count]
        masks = self._masks(step, count) if self.kept else None
        way = KERNELS if self.autocast is None else AUTOCAST
        store, segment_bytes = self.plan.store, self.plan.segment_bytes
        cuts = segments(weights, biases, segment_bytes) if segment_bytes and count > 1 else ()
        if count == 1 or way is AUTOCAST or input.dtype is torch.bfloat16:
            way = route_run(way, input, weights, biases, relu, store)
        if way is not TORCH and not transforms_active():
            try:
                output: Tensor = _compute.layers(way, input, weights, biases, relu, store, masks, cuts)
                return output
            except RuntimeError as error:  # torch computes more than we do, or raises its own error
                if _compute.memory_is_short(error):
                    raise
        drawn = masks.arguments(0, None) if masks else ()
        return mlp_forward(input, weights, biases, relu, masks_of(drawn, input.shape, weights, self.dtype()))[0]

    def _masks(self, step: int, count: int) -> Masks | None:
        """The masks of the first `count` layers; of the last one only if the step is its dropout."""
        missing = count - len(self.kept)
        kept, scales = [*self.kept, *[None] * missing][:count], [*self.scales, *[0.0] * missing][:count]
        if step & 3 != 2:
            kept[-1], scales[-1] = None, 0.0
        return Masks(kept, scales) if any(scales) else None

    def cut(self, step: int) -> None:
        """The result of this step is needed: from now on the chain ends here, and another may begin."""
        count = (step >> 2) + 1
        self.plan.add(self.kind.sites[:count], bool(step & 3))
        self.plan.add(self.kind.sites[count:], self.kind.relu)

    def end(self) -> None:
        """At the end of the forward: computes what outlives it. If nothing does, the object waits for the next call."""
        kind = self.kind
        tokens = [*self.tokens, *self.dropped.values()] if self.dropped else self.tokens
        is_free = max(map(getrefcount, tokens)) <= _ONLY_OURS + bool(self.dropped)
        if not is_free:
            for token in list(tokens):
                if type(token) is Pending and getrefcount(token) > _ONLY_OURS + 2 + bool(self.dropped):
                    settle(token)  # it has outlived the forward
        elif self.renumber:
            for k, token in enumerate(self.tokens):
                token._manualbp_step = (k >> 1 << 2) + (k & 1)
        for items in (self.used, self.weights, self.biases, self.kept, self.scales):
            items.clear()
        del self.input, self.kind, self.plan
        if is_free:
            kind.spare.append(self)
        else:
            self.tokens.clear()
            self.dropped.clear()


_ONLY_OURS: Final = max(map(getrefcount, [object()]))


def _token(chain: Chain, step: int) -> Pending:
    token: Any = _make_wrapper_subclass(Pending, (0,))
    token._manualbp_chain, token._manualbp_step = chain, step
    return cast(Pending, token)


@contextmanager
def _as_at_first(grad: bool, autocast: torch.dtype | None) -> Iterator[None]:
    """The modes of autograd and autocast in which a chain began, without hooks on saved tensors."""
    hooks = []
    while (top := saved_tensor_hooks()) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        with (
            torch.inference_mode(_is_inference_mode_enabled() and not grad),
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", autocast, enabled=autocast is not None),
        ):
            yield
    finally:
        for top in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(*top)


# --- plans ----------------------------------------------------------------------------------------------------------


# The least number of hidden activations for which a chain takes less time than torch, without gradients and with. It
# saves passes over them and, with gradients, nodes of the graph, and costs 10 µs.
LEAST: list[int] = [1 << 15, 1 << 12]


class Kind:
    """A chain of a model: its layers, when it is computed in one call, and the objects for it that are not in use."""

    __slots__ = ("fits", "least", "relu", "rows", "sites", "spare")

    def __init__(self, sites: "tuple[Layer, ...]", relu: bool) -> None:
        self.sites = sites
        self.relu = relu  # whether the last step is a ReLU
        self.spare: list[Chain] = []
        self.fits: tuple[Any, ...] = (None,) * 3  # parameters of the first layer, what input they were found to fit
        weights = [site.weight for site in sites]
        hidden = sum(weight.shape[0] for weight in weights[: None if relu else -1]) or 1
        self.rows = rows_left_to_torch(weights[0], True) if len(sites) == 1 else 0.0
        width = weights[0].shape[1]
        self.least = [max(self.rows, least / hidden) * width for least in LEAST]  # numbers in the input

    def begin(self, here: _Thread, plan: "Plan", input: Any, weight: Any, bias: Any) -> Pending | None:
        """The first layer, whose arguments are checked now, as plain torch does. None: torch must compute it."""
        way = route(input)
        if (way is not KERNELS and way is not AUTOCAST) or saved_tensor_hooks() is not None:
            return None
        autocast = None if way is KERNELS else torch.get_autocast_dtype("cpu")
        fits, found = self.fits, (input.dtype, input.shape[-1:], autocast)
        if fits[0] is not weight or fits[1] is not bias or fits[2] != found:
            if not _fits(input, weight, bias, autocast):
                return None
            if type(weight) is nn.Parameter:  # a computed weight must not outlive the call
                self.fits = weight, bias, found
        try:
            chain = self.spare.pop()
        except IndexError:
            chain = Chain(2 * len(self.sites) - 1 + self.relu)
        here.chains.append(chain)
        return chain.begin(self, plan, autocast, input, weight, bias)

    def begin_large(self, plan: "Plan", input: Any, weight: Any, bias: Any) -> Pending | None:
        """`begin`, if the input is large enough."""
        if type(input) is Tensor and input.numel() >= self.least[_is_grad_enabled()]:
            return self.begin(this_thread, plan, input, weight, bias)
        return None


class Plan:
    """The chains of a model, by their first layer, as its calls have shown."""

    __slots__ = ("has_places", "hooked", "kinds", "observer", "places", "segment_bytes", "stamp", "store", "useful")

    def __init__(self, model: nn.Module) -> None:
        self.kinds: dict[Layer, Kind] = {}
        self.observer: Any = None  # of `_forwards`, during the first call
        self.places: dict[tuple[CodeType, int], Place] = {}  # of layers that are no modules
        self.has_places = False  # whether a chain begins with one
        self.useful: set[Any] = set()  # modules that must be called by their sites
        self.store = model.__dict__.get("_manualbp_activations") != "recompute"
        segment_bytes = model.__dict__.get("_manualbp_segment_bytes", SEGMENT_BYTES)
        size = sum(parameter.nbytes for parameter in model.parameters() if not is_lazy(parameter))
        self.segment_bytes = segment_bytes if size > 2 * segment_bytes else None  # None: no chain is large enough
        self.hooked = _hooked(model)
        # Removing a hook leaves no trace: then every call looks.
        self.stamp: float = float("nan") if self.hooked else hook_counter.next_id

    def add(self, sites: "tuple[Layer, ...]", relu: bool) -> None:
        """A chain of these layers; `relu`: a ReLU follows the last. It replaces any with the same first layer."""
        if sites:
            self.kinds.pop(sites[0], None)
            if relu or len(sites) > 1:
                kind = Kind(sites, relu)
                if kind.rows < float("inf"):
                    self.kinds[sites[0]] = kind
            self.has_places = any(type(site) is Place for site in self.kinds)

    def is_valid(self, model: nn.Module) -> bool:
        """Whether the same modules have hooks as when the plan was made: a hooked module must be called."""
        if self.stamp != hook_counter.next_id:
            if _hooked(model) != self.hooked:
                return False
            if not self.hooked:
                self.stamp = hook_counter.next_id
        return True

    def __reduce__(self) -> Any:  # a copied or unpickled model makes a plan of its own
        return (no_plan, ())


def way_to_begin(input: Any, weight: Any, bias: Any) -> str:
    """What computes a layer with which a chain may begin; `TORCH`: none may."""
    way = route(input)
    autocast = torch.get_autocast_dtype("cpu") if way is AUTOCAST else None
    may = way in (KERNELS, AUTOCAST) and saved_tensor_hooks() is None and _fits(input, weight, bias, autocast)
    return way if may else TORCH


def _fits(input: Tensor, weight: Any, bias: Any, autocast: torch.dtype | None) -> bool:
    return (
        type(weight) in PLAIN
        and type(bias) in PLAIN_OR_NONE
        and are_plain((weight, bias))
        and (input.dtype is weight.dtype if autocast is None else casts_all((input, weight, bias), autocast))
        and input.dim() > 0
        and weight.dim() == 2
        and input.shape[-1] == weight.shape[1]
        and not broadcasts(weight, bias)
    )


def _hooked(model: nn.Module) -> frozenset[int]:
    """The modules in a model that have hooks. Its own run outside its forward."""
    return frozenset(id(module) for module in model.modules() if module is not model and has_hooks(module))


# --- calls of modules -----------------------------------------------------------------------------------------------


class Site(Transparent):
    """The call of a module in a fused model, in the place of ``nn.Module._compiled_call_impl``."""

    __slots__ = ("__weakref__", "module", "stamp", "weight")

    def __init__(self, module: nn.Module) -> None:
        self.module: ReferenceType[Any] = ref(module)  # no cycle: models must go when they are dropped
        self.weight: Tensor  # its shape and dtype, without numbers
        self.stamp: float = hook_counter.next_id  # when it had no hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, computed or pending."""
        module: Any = self.module()
        here = this_thread
        if here.plan is not None and not kwargs and len(args) == 1:
            if here.plan.observer is not None:
                return here.plan.observer.call(self, module, args[0])
            if (output := self._next(here, module, args[0])) is not None:
                return output
        return module._call_impl(*args, **kwargs)

    def _next(self, here: _Thread, module: Any, input: Any) -> Any:
        """The next step of a chain; None: the module must be called."""
        return None

    def _call(self, module: Any, input: Any) -> Any:
        """Calls the module, and notes if it has no hooks."""
        if not has_hooks(module) and not global_hooks_exist():
            self.stamp = hook_counter.next_id
        return module._call_impl(input)


class LinearSite(Site):
    """The call of a layer that is exactly an ``nn.Linear``.

    It does not call the module if skipping that makes no difference: F.linear alone takes 1.5 µs less, which outweighs
    all that a plan costs.
    """

    __slots__ = ("parameters",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.parameters = module._parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns, computed or pending."""
        module: Any = self.module()
        if kwargs or len(args) != 1 or type(module) is not nn.Linear:
            return module._call_impl(*args, **kwargs)
        (input,) = args
        here = this_thread
        plan = here.plan
        get = self.parameters.get
        weight, bias = get("weight"), get("bias")
        if plan is not None:
            output = None
            if type(input) is Pending:
                output = input._manualbp_chain.join(input, self, weight, bias)
            elif (
                (kind := plan.kinds.get(self)) is not None
                and type(input) is Tensor
                and input.numel() >= kind.least[_is_grad_enabled()]
            ):
                output = kind.begin(here, plan, input, weight, bias)
            if output is not None:
                return output
            if plan.observer is not None:
                return plan.observer.call(self, module, input)
        if self.stamp == hook_counter.next_id and weight is not None and linear_is_called(module):
            return F.linear(input, weight, bias)
        return self._call(module, input)


class ReLUSite(Site):
    """The call of a module that is exactly an ``nn.ReLU``."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the ReLU returns, computed or pending."""
        module: Any = self.module()
        if kwargs or len(args) != 1 or type(module) is not nn.ReLU:
            return module._call_impl(*args, **kwargs)
        (input,) = args
        if type(input) is Pending and (output := input._manualbp_chain.rectify(input, module.inplace)) is not None:
            return output
        plan = this_thread.plan
        if plan is not None and plan.observer is not None:
            return plan.observer.call(self, module, input)
        if self.stamp == hook_counter.next_id and relu_is_called(module):
            return F.relu(input, module.inplace)
        return self._call(module, input)


class OtherLinearSite(Site):
    """The call of a subclass of ``nn.Linear``, such as one that masks its weight: its own forward calls F.linear."""

    __slots__ = ()

    def _next(self, here: _Thread, module: Any, input: Any) -> Any:
        plan = cast(Plan, here.plan)
        if type(input) is not Pending:
            kind = plan.kinds.get(self)
            if kind is None or type(input) is not Tensor or input.numel() < kind.least[_is_grad_enabled()]:
                return None
        outer, here.site = here.site, self
        try:
            if type(input) is Pending:
                return module._call_impl(input)
            with Beginning(plan):
                return module._call_impl(input)
        finally:
            here.site = outer


class Place:
    """A place in the code of a forward that calls F.linear itself."""

    __slots__ = ("weight",)

    def __init__(self) -> None:
        self.weight: Tensor  # its shape and dtype, without numbers


Layer = Site | Place


def place_of(frame: FrameType) -> tuple[CodeType, int]:
    """What a `Place` is known by."""
    return frame.f_code, frame.f_lasti


class Beginning(OwnFunctionMode):
    """Sees the first layer of a chain that is no plain nn.Linear: F.linear, called by a subclass or at a `Place`."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As `LinearSite`, for F.linear."""
        kwargs = kwargs or {}
        if func is F.linear and (layer := layer_called(self.plan, sys._getframe(1))) is not None:
            kind = self.plan.kinds.get(layer)
            output = None if kind is None else kind.begin_large(self.plan, *linear_arguments(args, kwargs))
            if output is not None:
                return output
        return func(*args, **kwargs)


def layer_called(plan: Plan, frame: FrameType) -> Layer | None:
    """The layer for which this frame calls F.linear."""
    return this_thread.site or plan.places.get(place_of(frame))


def linear_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    names = ("input", "weight", "bias")
    given: dict[str, Any] = {"input": None, "weight": None, "bias": None, **dict(zip(names, args, strict=False))}
    given |= kwargs
    return given["input"], given["weight"], given["bias"]


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """The tensors in arguments, also those in lists, tuples and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(*value)
        elif isinstance(value, dict):
            yield from tensors_in(*value.values())
