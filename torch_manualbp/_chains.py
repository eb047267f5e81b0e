"""Fuses chains of linear layers and ReLUs in models whose forward is written by hand, without tracing them.

The first call of such a model is observed (`_Observer`, a ``TorchFunctionMode``): which layer's output goes to a ReLU
and nowhere else, and from there to another layer and nowhere else. The result is a `Plan`. In the following calls these
layers, and only these, answer with a `Pending` tensor, which remembers its input and parameters. The last layer of the
chain computes all of them in one call, and its output is an ordinary tensor.

    forward as written            h = F.relu(self.fc1(x));   y = self.fc2(h)
    the first call                fc1: its output goes to a ReLU only;  the ReLU's goes to fc2 only;  fc2: elsewhere
    the following calls           fc1 -> Pending(x, Ω_1, β_1);  relu -> the same, with a ReLU;  fc2 -> computes

Forwards are ordinary Python, and may do something else next time. So a `Pending` tensor that reaches any other function
of torch computes its value first, and becomes an ordinary tensor in place; the plan then leaves that layer alone. If
the input or a parameter has been modified meanwhile, this raises an error: the value would be another than plain's.

A layer is called through `Site`, which stands where ``nn.Module.compile`` puts a compiled call: classes, attributes,
hooks and state_dict stay as they are, and copies and pickles are without it.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from sys import getrefcount
from typing import Any, Final
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode

from torch_manualbp import _compute, modules
from torch_manualbp._gradients import use_count
from torch_manualbp._relus import relu_in_place
from torch_manualbp._route import (
    KERNELS,
    PLAIN,
    PLAIN_OR_NONE,
    any_autocast,
    are_plain,
    broadcasts,
    global_hooks_exist,
    is_quiet,
    is_tracing,
    layers_are_torchs,
    linear_is_called,
    relu_is_called,
    route,
    route_run,
    rows_left_to_torch,
    saved_tensor_hooks,
    transforms_active,
)
from torch_manualbp.modules import FusedForward, LinearReLU, has_hooks, hook_counter

_make_wrapper_subclass: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
_swap_tensors: Any = getattr(torch._C, "_swap_tensor_impl", None)
_is_grad_enabled = torch.is_grad_enabled
_is_inference_mode_enabled = torch.is_inference_mode_enabled
_is_inference: Any = Tensor.is_inference
_version: Any = Tensor._version.__get__  # type: ignore[attr-defined]


class _Thread(threading.local):
    """What this thread is doing: the plan of the model that runs, its chains, or the observer of its first call."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.chains: list[_Chain] = []
        self.site: Site | None = None  # a subclass of nn.Linear that is running
        self.observer: _Observer | None = None


_here = _Thread()


# --- pending tensors ------------------------------------------------------------------------------------------------


class Pending(Tensor):
    """A step of a chain that is not computed yet. Any function but the next step computes it."""

    _manualbp_chain: "_Chain"
    _manualbp_step: int  # 2k: the output of layer k of the chain; 2k + 1: its ReLU

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The next step, if `func` is what the chain expects; otherwise what it returns for ordinary tensors."""
        first = args[0] if args else None
        if type(first) is Pending:
            if func in _RELUS and not (kwargs and kwargs.get("inplace")):
                output = first._manualbp_chain.rectify(first)
            elif func is F.linear:
                _, weight, bias = _linear_arguments(args, kwargs or {})
                output = first._manualbp_chain.join(first, _here.site, weight, bias)
            elif (in_place := relu_in_place(func, args, kwargs or {})) is not None:
                output = first._manualbp_chain.rectify(first, in_place)
            else:
                output = None
            if output is not None:
                return output
        for tensor in _tensors_in(args, kwargs):
            settle(tensor)
        return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raises an error: C++ code has been given a tensor without data, and did not ask `__torch_function__`."""
        for tensor in _tensors_in(args, kwargs):
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
    """Computes a pending tensor, which becomes an ordinary one: the same object, with the value and its graph.

    The plan leaves out this step from now on.
    """
    if type(tensor) is not Pending:
        return
    chain, step = tensor._manualbp_chain, tensor._manualbp_step
    chain.cut(step)
    value = chain.value(step)
    if type(tensor) is not Pending:  # another thread was faster
        return
    with torch._C.DisableTorchFunctionSubclass():
        held = use_count(tensor)
    if held > 1:  # by C++ code, as ``apply`` of an autograd.Function holds its inputs: it would go on with the old one
        raise RuntimeError(_UNSEEN)
    _swap_tensors(tensor, value)
    tensor.__dict__.clear()
    tensor.__class__ = Tensor


class _Chain:
    """Layers with ReLUs between them, on their way to be computed in one call.

    The object and its pending tensors are used again by the next call, since making them takes as long as a layer.
    """

    __slots__ = (
        *("biases", "grad", "used", "input", "kind", "now", "plan", "renumber", "tokens", "version"),
        "weights",
    )

    kind: "_Kind"
    plan: "Plan"
    input: Any
    used: list[Tensor]  # input and parameters
    version: int  # the sum of their versions, which only grow
    weights: list[Tensor]
    biases: list[Tensor | None]
    grad: bool  # whether autograd recorded when the chain began
    now: int  # the step that was made last
    tokens: list[Pending]  # for each step but the last
    renumber: bool

    def __init__(self, steps: int) -> None:
        self.used, self.weights, self.biases, self.renumber = [], [], [], False
        self.tokens = []
        for step in range(steps - 1):
            self.tokens.append(token := _make_wrapper_subclass(Pending, (0,)))
            token._manualbp_chain, token._manualbp_step = self, step

    def begin(self, kind: "_Kind", plan: "Plan", input: Any, weight: Tensor, bias: Tensor | None) -> Pending:
        """The first layer."""
        self.kind, self.plan, self.input, self.version = kind, plan, input, 0
        if not _is_inference(input):  # inference tensors have no version
            self.used.append(input)
            self.version = _version(input)
        self._add(weight, bias)
        self.grad = _is_grad_enabled()
        self.now = 0
        return self.tokens[0]

    def _add(self, weight: Tensor, bias: Tensor | None) -> None:
        version = _version(weight)
        self.used.append(weight)
        if bias is not None:
            version += _version(bias)
            self.used.append(bias)
        self.version += version
        self.weights.append(weight)
        self.biases.append(bias)

    def join(self, token: Pending, site: "Site | None", weight: Any, bias: Any) -> Tensor | None:
        """The next layer, applied to `token`. None: it is not what is expected."""
        step = self.now
        if (
            token._manualbp_step != step
            or not step & 1
            or self.kind.sites[(step + 1) >> 1] is not site
            or _is_grad_enabled() is not self.grad
            or type(weight) not in PLAIN
            or type(bias) not in PLAIN_OR_NONE
        ):
            return None
        step += 1
        if step < len(self.tokens):
            self._add(weight, bias)
            self.now = step
            return self.tokens[step]
        if not is_quiet() or saved_tensor_hooks() is not None:
            return None
        self.check_versions()
        self._add(weight, bias)
        self.now = step
        return self._compute(self.weights, self.biases, False)

    def rectify(self, token: Pending, in_place: bool = False) -> Tensor | None:
        """The ReLU of `token`. None: it is not what is expected."""
        step = self.now
        if token._manualbp_step != step or step & 1 or _is_grad_enabled() is not self.grad:
            return None
        self.now = step = step + 1
        if in_place:
            token._manualbp_step = step
            self.renumber = True
            if step == len(self.tokens):
                settle(token)
            return token
        return self.tokens[step] if step < len(self.tokens) else self.value(step)

    def value(self, step: int) -> Tensor:
        """The result of a step that has been made."""
        self.check_versions()
        count, relu = (step >> 1) + 1, bool(step & 1)
        arguments = self.weights[:count], self.biases[:count], relu
        if _is_grad_enabled() is self.grad and is_quiet() and saved_tensor_hooks() is None:
            return self._compute(*arguments)
        with _as_at_first(self.grad):
            return self._compute(*arguments)

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

    def _compute(self, weights: list[Tensor], biases: list[Tensor | None], relu: bool) -> Tensor:
        input, store = self.input, self.plan.store
        way = KERNELS
        if len(weights) == 1 or input.dtype is torch.bfloat16:
            way = route_run(way, input, weights, relu, store)
        if way is KERNELS and not transforms_active():
            try:
                return _compute.layers(KERNELS, input, weights, biases, relu, store)
            except RuntimeError:  # torch computes more than we do, or raises its own error
                pass
        for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            input = F.linear(input, weight, bias)
            if relu or k < len(weights) - 1:
                input = torch.relu(input)
        return input

    def cut(self, step: int) -> None:
        """The result of this step is needed: from now on the chain ends here, and another may begin."""
        count = (step >> 1) + 1
        self.plan.add(self.kind.sites[:count], bool(step & 1))
        self.plan.add(self.kind.sites[count:], self.kind.relu)

    def end(self) -> None:
        """At the end of the forward: computes what outlives it. If nothing does, the object waits for the next call."""
        tokens, kind = self.tokens, self.kind
        is_free = max(map(getrefcount, tokens)) == _ONLY_OURS
        if not is_free:
            for token in tokens[: self.now + 1]:
                if getrefcount(token) > _ONLY_OURS + 2:  # the slice, the variable
                    settle(token)
        elif self.renumber:
            for step, token in enumerate(tokens):
                token._manualbp_step = step
        self.used.clear()
        self.weights.clear()
        self.biases.clear()
        del self.input, self.kind, self.plan
        if is_free:
            kind.spare.append(self)
        else:
            tokens.clear()


_ONLY_OURS: Final = max(map(getrefcount, [object()]))


@contextmanager
def _as_at_first(grad: bool) -> Iterator[None]:
    """The mode of autograd in which a chain began, without hooks on saved tensors."""
    hooks = []
    while (top := saved_tensor_hooks()) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        with torch.inference_mode(_is_inference_mode_enabled() and not grad), torch.set_grad_enabled(grad):
            yield
    finally:
        for top in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(*top)


# --- plans ----------------------------------------------------------------------------------------------------------


class _Kind:
    """A chain of a model: its layers, when it is computed in one call, and the objects for it that are not in use."""

    __slots__ = ("fits", "least", "relu", "rows", "sites", "spare")

    def __init__(self, sites: "tuple[Site | None, ...]", relu: bool) -> None:
        self.sites = sites
        self.relu = relu  # whether the last step is a ReLU
        self.spare: list[_Chain] = []
        self.fits: tuple[Any, ...] = (None,) * 4  # parameters of the first layer, dtype and width, checked before
        modules = [None if site is None else site.module() for site in sites]
        weights = [module.weight for module in modules if module is not None]
        hidden = sum(weight.shape[0] for weight in weights[: None if relu else -1]) or 1
        self.rows = rows_left_to_torch(weights[0], True) if len(sites) == 1 else 0.0
        # Numbers in the smallest input, without gradients and with. What a chain saves are passes over activations
        # and, with gradients, nodes of the graph; it costs 10 µs.
        width = weights[0].shape[1]
        self.least = max(self.rows, (1 << 15) / hidden) * width, max(self.rows, (1 << 12) / hidden) * width

    def begin(self, here: _Thread, plan: "Plan", input: Any, weight: Any, bias: Any) -> Pending | None:
        """The first layer, whose arguments are checked now, as plain torch does. None: torch must compute it."""
        if route(input) is not KERNELS or saved_tensor_hooks() is not None:
            return None
        found = weight, bias, input.dtype, input.shape[-1]
        if not all(map(is_, found, self.fits)):
            if not _fits(input, weight, bias):
                return None
            self.fits = found
        try:
            chain = self.spare.pop()
        except IndexError:
            chain = _Chain(2 * len(self.sites) - 1 + self.relu)
        here.chains.append(chain)
        return chain.begin(self, plan, input, weight, bias)


class Plan:
    """The chains of a model, by their first layer, as its calls have shown."""

    __slots__ = ("hooked", "kinds", "stamp", "store", "useful")

    def __init__(self, model: nn.Module) -> None:
        self.kinds: dict[Site, _Kind] = {}
        self.useful: set[Site | None] = set()  # modules that must be called by their sites
        self.store = model.__dict__.get("_manualbp_activations") != "recompute"
        self.hooked = _hooked(model)
        # Removing a hook leaves no trace: then every call looks.
        self.stamp: float = float("nan") if self.hooked else hook_counter.next_id

    def add(self, sites: "tuple[Site | None, ...]", relu: bool) -> None:
        """A chain of these layers; `relu`: a ReLU follows the last. It replaces any with the same first layer."""
        first = sites[0] if sites else None
        if first is not None:
            self.kinds.pop(first, None)
            if relu or len(sites) > 1:
                kind = _Kind(sites, relu)
                if kind.rows < float("inf"):
                    self.kinds[first] = kind

    def is_valid(self, model: nn.Module) -> bool:
        """Whether the same modules have hooks as when the plan was made: a hooked module must be called."""
        if self.stamp != hook_counter.next_id:
            if _hooked(model) != self.hooked:
                return False
            if not self.hooked:
                self.stamp = hook_counter.next_id
        return True

    def __reduce__(self) -> Any:  # a copied or unpickled model makes a plan of its own
        return (modules.no_plan, ())


def _may_begin(input: Any, weight: Any, bias: Any) -> bool:
    return route(input) is KERNELS and saved_tensor_hooks() is None and _fits(input, weight, bias)


def _fits(input: Tensor, weight: Any, bias: Any) -> bool:
    return (
        type(weight) in PLAIN
        and type(bias) in PLAIN_OR_NONE
        and are_plain((weight, bias))
        and input.dtype is weight.dtype
        and input.dim() > 0
        and weight.dim() == 2
        and input.shape[-1] == weight.shape[1]
        and not broadcasts(weight, bias)
        and not _is_inference(weight)
        and not (bias is not None and _is_inference(bias))
    )


def _hooked(model: nn.Module) -> frozenset[int]:
    """The modules in a model that have hooks. Its own run outside its forward."""
    return frozenset(id(module) for module in model.modules() if module is not model and has_hooks(module))


def written_forward(original: Any) -> Callable[..., Any]:
    """The forward of a class that `fuse` derives from `original`: the original's, with chains computed in one call."""

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling() or _here.plan is not None:  # the plan of an outer model covers this one
            return original.forward(self, *args, **kwargs)
        plan: Plan | None = self.__dict__.get("_manualbp_plan_of_calls")
        if global_hooks_exist() or is_tracing():
            return original.forward(self, *args, **kwargs)
        if plan is None or (plan.stamp != hook_counter.next_id and not plan.is_valid(self)):
            return _observe(self, original.forward, args, kwargs)
        if not plan.kinds:
            return original.forward(self, *args, **kwargs)
        here = _here
        here.plan = plan
        try:
            output = original.forward(self, *args, **kwargs)
            for chain in here.chains:
                chain.end()
        finally:
            here.plan = None
            here.chains.clear()
        return output

    return forward


# --- calls of modules -----------------------------------------------------------------------------------------------


class Site(modules.Site):
    """The call of a module in a fused model, in the place of ``nn.Module._compiled_call_impl``."""

    __slots__ = ("__weakref__", "module", "stamp")

    def __init__(self, module: nn.Module) -> None:
        self.module: ReferenceType[Any] = ref(module)  # no cycle: models must go when they are dropped
        self.stamp: float = hook_counter.next_id  # when it had no hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, computed or pending."""
        module = self.module()
        here = _here
        if here.plan is not None and not kwargs and len(args) == 1:
            if here.observer is not None:
                return here.observer.call(self, module, args[0])
            if (output := self._next(here, module, args[0])) is not None:
                return output
        return module._call_impl(*args, **kwargs)

    def _next(self, here: _Thread, module: Any, input: Any) -> Tensor | None:
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
        module = self.module()
        if kwargs or len(args) != 1 or type(module) is not nn.Linear:
            return module._call_impl(*args, **kwargs)
        (input,) = args
        here = _here
        plan = here.plan
        get = self.parameters.get
        weight, bias = get("weight"), get("bias")
        if plan is not None:
            if here.observer is not None:
                return here.observer.call(self, module, input)
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
        if self.stamp == hook_counter.next_id and weight is not None and linear_is_called(module):
            return F.linear(input, weight, bias)
        return self._call(module, input)


class ReLUSite(Site):
    """The call of a module that is exactly an ``nn.ReLU``."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the ReLU returns, computed or pending."""
        module = self.module()
        if kwargs or len(args) != 1 or type(module) is not nn.ReLU:
            return module._call_impl(*args, **kwargs)
        (input,) = args
        if type(input) is Pending and (output := input._manualbp_chain.rectify(input, module.inplace)) is not None:
            return output
        if _here.observer is not None:
            return _here.observer.call(self, module, input)
        if self.stamp == hook_counter.next_id and relu_is_called(module):
            return F.relu(input, module.inplace)
        return self._call(module, input)


class OtherLinearSite(Site):
    """The call of a subclass of ``nn.Linear``, such as one that masks its weight: its own forward calls F.linear."""

    __slots__ = ()

    def _next(self, here: _Thread, module: Any, input: Any) -> Tensor | None:
        outer, here.site = here.site, self
        try:
            if type(input) is Pending or self not in here.plan.kinds:
                return module._call_impl(input)
            with _Beginning(self, here.plan):
                return module._call_impl(input)
        finally:
            here.site = outer


class _Beginning(TorchFunctionMode):
    """Sees a subclass of nn.Linear call F.linear on an ordinary tensor: the first layer of a chain."""

    def __init__(self, site: Site, plan: Plan) -> None:
        super().__init__()
        self.site, self.plan = site, plan

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As `LinearSite`, for F.linear."""
        kwargs = kwargs or {}
        kind = self.plan.kinds.get(self.site) if func is F.linear else None
        if kind is not None:
            output = kind.begin(_here, self.plan, *_linear_arguments(args, kwargs))
            if output is not None:
                return output
        return func(*args, **kwargs)


def _linear_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    names = ("input", "weight", "bias")
    given: dict[str, Any] = {"input": None, "weight": None, "bias": None, **dict(zip(names, args, strict=False))}
    given |= kwargs
    return given["input"], given["weight"], given["bias"]


def _tensors_in(*values: Any) -> Iterator[Tensor]:
    """The tensors in arguments, also those in lists, tuples and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(*value)
        elif isinstance(value, dict):
            yield from _tensors_in(*value.values())


# --- the first call -------------------------------------------------------------------------------------------------


class _Barrier(Site):
    """The call of a module that must be given ordinary tensors, for the first call: what is not torch's, has hooks."""

    __slots__ = ()


class _Seen:
    """A tensor that a layer or its ReLU has returned during the first call, and what it was used for."""

    __slots__ = ("before", "is_relu", "joins", "moment", "relu_site", "site", "tensor")

    def __init__(self, tensor: Tensor, site: Site | None, is_relu: bool, moment: Any) -> None:
        self.tensor = ref(tensor)
        self.site = site
        self.is_relu = is_relu
        self.moment = moment
        self.joins: list[bool] = []  # of each use, whether it is the next step of a chain
        self.before: _Seen | None = None  # of a layer: the ReLU whose output it was given
        self.relu_site: Site | None = None  # of a ReLU: the module that computed it


class _Observer(TorchFunctionMode):
    """Sees all functions of torch that a forward calls, and what they are given."""

    def __init__(self, by_kernels: bool) -> None:
        super().__init__()
        self._by_kernels = by_kernels
        self._site: Site | None = None  # whose module is running
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
            return self._linear(*_linear_arguments(args, kwargs))
        if relu_in_place(func, args, kwargs) is not None:
            seen = self._find(args[0])
            if seen is not None and not seen.is_relu and seen.moment == self._moment():
                seen.joins.append(True)
                output = func(*args, **kwargs)
                after = self._see(output, seen.site, True)
                after.relu_site = self._site
                return output
        self._use(args, kwargs)
        if _may_write(func, args, kwargs):
            self._writes += 1
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self._use(weight, bias)
        before = self._find(input)
        if before is not None:
            joins = before.is_relu and before.moment == self._moment()
            before.joins.append(joins)
            before = before if joins else None
        if self._by_kernels and _may_begin(input, weight, bias):
            output = _compute.layers(KERNELS, input, (weight,), (bias,), False, True)
        else:
            output = F.linear(input, weight, bias)
        self._see(output, self._site, False).before = before
        return output

    def _see(self, tensor: Tensor, site: Site | None, is_relu: bool) -> _Seen:
        seen = self._seen[id(tensor)] = _Seen(tensor, site, is_relu, self._moment())
        self._all.append(seen)
        return seen

    def _find(self, tensor: Any) -> _Seen | None:
        seen = self._seen.get(id(tensor))
        return seen if seen is not None and seen.tensor() is tensor else None

    def _use(self, *values: Any) -> None:
        for tensor in _tensors_in(*values):
            if (seen := self._find(tensor)) is not None:
                seen.joins.append(False)

    def _moment(self) -> Any:
        return (
            self._writes,
            _is_grad_enabled(),
            _is_inference_mode_enabled(),
            any_autocast(),
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
        after: dict[Site | None, set[Site | None]] = {}
        for seen in self._all:
            if seen.before is not None:
                after.setdefault(seen.before.site, set()).add(seen.site)
        for first in sites - {None}:
            chain: list[Site | None] = [first]
            relu = joins_relu[first]
            while relu and joins_next[chain[-1]] and len(following := after.get(chain[-1], set())) == 1:
                (site,) = following
                if site in chain:
                    break
                chain.append(site)
                relu = site is not None and joins_relu[site]
            if relu or len(chain) > 1:
                plan.add(tuple(chain), relu)
        for kind in plan.kinds.values():
            plan.useful.update(kind.sites)
        plan.useful.update(seen.relu_site for seen in self._all if seen.is_relu and joins_relu[seen.site])
        plan.useful.discard(None)


def _may_write(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function of torch may modify a tensor. In doubt, the answer is yes."""
    name = getattr(func, "__name__", "_")
    if name in ("__get__", "__set__", "__delete__"):
        return name != "__get__" or getattr(getattr(func, "__self__", None), "__name__", "data") == "data"
    if name.startswith("__"):
        return (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")) or name == "__setitem__"
    return name.endswith("_") or "out" in kwargs or any(value is True for value in (*args, *kwargs.values()))


def _observe(model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The first call of a model: each layer is computed at once, and the model gets its plan."""
    if transforms_active() or not layers_are_torchs():
        return forward(model, *args, **kwargs)
    here = _here
    installed = [module for module in model.modules() if module is not model and _install(module)]
    here.plan = plan = Plan(model)
    here.observer = observer = _Observer(_mentions_relu(model))
    try:
        with observer:
            output = forward(model, *args, **kwargs)
        observer.fill(plan)
        if plan.kinds or plan.hooked:
            model.__dict__["_manualbp_plan_of_calls"] = plan
        elif (original := vars(type(model)).get("_original_class")) is not None:
            model.__class__ = original  # as before `fuse`: a class that does nothing would still take 1 µs a call
    finally:
        here.plan = here.observer = None
        for module in installed:
            if module.__dict__["_compiled_call_impl"] not in plan.useful:
                del module.__dict__["_compiled_call_impl"]
    return output


def _install(module: nn.Module) -> bool:
    """Lets a `Site` call the module. False: one does already, or is not needed."""
    before = module.__dict__.get("_compiled_call_impl")
    kind = _kind_of_site(module)
    if kind is None or (before is not None and (type(before) is kind or not isinstance(before, Site))):
        return False
    module.__dict__["_compiled_call_impl"] = kind(module)
    return True


def remove(module: nn.Module) -> None:
    """Undoes what calls have added to a module."""
    if isinstance(module.__dict__.get("_compiled_call_impl"), Site):
        del module.__dict__["_compiled_call_impl"]


def _kind_of_site(module: nn.Module) -> type[Site] | None:
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


class WrittenForward(nn.Module):
    """The mix-in of `fuse` for classes with a forward of their own."""


_RELU_NAMES: Final = frozenset({"relu", "relu_", "clamp", "clamp_", "clamp_min", "clamp_min_", "clip", "clip_"})


def _mentions_relu(model: nn.Module) -> bool:
    """Whether there is likely a ReLU. If so, the layers of the first call have the same bits as in the following."""
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if isinstance(module, nn.ReLU) or (
            isinstance(module, WrittenForward) and code is not None and not _RELU_NAMES.isdisjoint(code.co_names)
        ):
            return True
    return False
