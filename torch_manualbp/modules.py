"""The modules: `LinearReLU`, the `MLP`, and the fused ``nn.Sequential`` that both `MLP` and `fuse` build on.

Parameters, initialisation, state_dict keys, indexing and hooks are those of ``nn.Linear`` and ``nn.Sequential``. Only
the computation of the forward pass differs: it finds the runs of layers (`_Run`) that one call can compute.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from operator import index, is_
from typing import Any, ClassVar, Protocol, SupportsIndex, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from torch_manualbp import _compute, _distributed
from torch_manualbp._checks import Activations, LossName, Reduction, check_activations, name_call
from torch_manualbp._compute import SEGMENT_BYTES, segments
from torch_manualbp._gradients import ADDING, accumulate, unwatched
from torch_manualbp._losses import LossSpec, loss_spec
from torch_manualbp._route import (
    AUTOCAST,
    FUNC,
    GRAPH,
    KERNELS,
    PLAIN,
    PLAIN_OR_NONE,
    TORCH,
    are_plain,
    broadcasts,
    eager_way_of_loss,
    global_hooks_exist,
    is_tracing,
    layers_are_torchs,
    loss_is_ours_under_autocast,
    route,
    route_run,
    rows_left_to_torch,
    target_is_ours,
    transparent_are_torchs,
)
from torch_manualbp.functional import linear_relu


class LinearReLU(nn.Linear):
    """``nn.Linear`` followed by ReLU, as one op: h' = a[β + Ω h].

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether to learn an additive bias β.
        device: where the parameters are made.
        dtype: dtype of the parameters; the input must have it too.

    Shape:
        input (…, in_features) → output (…, out_features). ``weight`` is Ω (out_features, in_features), ``bias`` is β
        (out_features,): the same initialisation and the same state_dict as ``nn.Linear``.

    Raises:
        RuntimeError: in forward, if the input's shape, dtype or device does not fit.

    Example:
        >>> layer = LinearReLU(3, 2)
        >>> layer(torch.ones(5, 3)).shape
        torch.Size([5, 2])
        >>> bool((layer(torch.randn(5, 3)) >= 0).all())
        True
    """

    def forward(self, input: Tensor) -> Tensor:
        """relu(input weightᵀ + bias)."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return F.relu(F.linear(input, self.weight, self.bias))
        way = route(input)
        if way is TORCH and isinstance(input, Tensor):
            return nn.ReLU.forward(_RELU, super().forward(input))  # the forwards of these classes may be replacements
        weight, bias = self.weight, self.bias  # read once: a parametrization computes them, and may update its state
        if way is TORCH or input.dtype is torch.bfloat16 or not are_plain((weight, bias)) or broadcasts(weight, bias):
            return _linear_relu(self, input, weight, bias)
        return _compute.linear_relu(way, input, weight, bias, self)


_RELU = nn.ReLU()


def _linear_relu(layer: LinearReLU, *arguments: Any) -> Tensor:
    try:
        return linear_relu(*arguments)
    except Exception as error:
        name_call(error, type(layer).__name__)
        raise


_Parameters = tuple[list[Tensor], list[Tensor | None]]


class _Run:
    """Adjacent modules that one call computes: linear, ReLU, linear, …; `relu` is True if the last layer has a ReLU.

    Dropout may follow a ReLU: p and whether it is active are read at each call. An Identity may be anywhere in the run.
    """

    __slots__ = ("cuts", "dropouts", "first", "last", "modules", "refused", "relu", "size", "transparent")

    def __init__(self, first: int) -> None:
        self.first = self.last = first  # linear layers [first, last) of the network belong to this run
        self.size = 0
        self.cuts: tuple[int, ...] = ()  # of `segments`
        self.modules: list[nn.Module] = []
        self.refused: list[Tensor | None] = []  # parameters that torch broadcasts and our op does not take
        self.relu = False
        self.dropouts: list[tuple[int, nn.Dropout]] = []  # each after the ReLU of this layer of the run
        self.transparent = False  # whether there is a Dropout or an Identity

    def takes(self, kind: type) -> bool:
        """Whether the run goes on with a module of this kind."""
        if kind is nn.Dropout:
            return self.relu and not (self.dropouts and self.dropouts[-1][0] == self.size - 1)
        return self.relu or kind in (nn.ReLU, nn.Identity)

    def add(self, module: nn.Module, kind: type) -> None:
        """Appends a module that `takes` accepts, or the linear layer that the run begins with."""
        self.modules.append(module)
        if kind in _TRANSPARENT:
            self.transparent = True
            if kind is nn.Dropout:
                self.dropouts.append((self.size - 1, cast(nn.Dropout, module)))
            return
        self.size += kind is not nn.ReLU
        self.last = self.first + self.size
        self.relu = kind is not nn.Linear

    def dropout(self) -> Sequence[float] | None:
        """The p of the active dropout after each layer, 0 where there is none; empty: nowhere.

        None: the modules must be called, since one is replaced, drops everything, or will raise an error.
        """
        probabilities = [0.0] * self.size
        for k, module in self.dropouts:
            p = module.p
            if type(p) not in (float, int) or not (0 <= p < 1 or (p == 1 and not module.training)):
                return None
            if module.training:
                probabilities[k] = p
        if not transparent_are_torchs():
            return None
        return probabilities if any(probabilities) else ()

    def __call__(
        self, way: str, input: Any, weights: list[Tensor], biases: list[Tensor | None], network: "FusedForward"
    ) -> Any:
        """The output of the run.

        Args:
            way: what `route` answered for the network.
            input: of the run.
            weights: of the run, or of the whole network.
            biases: likewise.
            network: which the run belongs to.
        """
        if len(weights) != self.size:
            weights, biases = weights[self.first : self.last], biases[self.first : self.last]
        if type(input) not in PLAIN or (self.refused and all(map(is_, self.refused, (*weights, *biases)))):
            return self._one_by_one(input)
        store = network._manualbp_activations == "store"
        if way is not TORCH and (self.size == 1 or way is AUTOCAST or input.dtype is torch.bfloat16):
            way = route_run(way, input, weights, biases, self.relu, store)
        masks = None
        if self.transparent and (dropout := self.dropout()) != ():
            # Once masks are drawn, the modules would draw others: an op that may raise where torch does not is no use.
            if dropout is None or way in (TORCH, FUNC) or not input.is_cpu or any(map(broadcasts, weights, biases)):
                return self._one_by_one(input)
            masks = _compute.draw_all(dropout, input, weights, way)
        if way is TORCH and self.size == 1:
            output = F.linear(input, weights[0], biases[0])
            return torch.relu(output) if self.relu else output
        try:
            return _compute.layers(way, input, weights, biases, self.relu, store, masks, self.cuts)
        except RuntimeError as error:
            name_call(error, type(network).__name__)
            output = _instead(error, self._one_by_one, input)
            if any(map(broadcasts, weights, biases)):
                self.refused = [*weights, *biases]
            return output

    def _one_by_one(self, input: Any) -> Any:
        for module in self.modules:
            input = module(input)
        return input


def _instead(error: RuntimeError, plain: Callable[..., Any], *args: Any) -> Any:
    """The result of plain torch after our op raised `error`. If torch fails too, `error` is raised: it is clearer."""
    if _compute.memory_is_short(error):
        raise error
    try:
        return plain(*args)
    except Exception:
        raise error from None


def _steps_of(
    children: list[nn.Module], kinds: list[type | None]
) -> tuple[list[_Run | nn.Module], list[Tensor], list[Tensor | None]]:
    """The steps of the forward pass, each a run or a child that is called; the weights and biases of all runs."""
    steps: list[_Run | nn.Module] = []
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    run: _Run | None = None
    for child, kind in zip(children, kinds, strict=True):
        if kind is None or not (kind in _LINEAR or (run is not None and run.takes(kind))):
            run = None
            steps.append(child)
            continue
        if run is None or not run.takes(kind):  # a linear layer right after another starts a run
            steps.append(run := _Run(len(weights)))
        run.add(child, kind)
        if kind in _LINEAR:
            weights.append(cast(Tensor, child._parameters["weight"]))
            biases.append(child._parameters["bias"])
    return steps, weights, biases


_INFINITE = float("inf")
_FULL = (torch.float32, torch.float64)


def _numbers_left_to_torch(step: _Run | nn.Module) -> float:
    """With fewer numbers than this in the input, our op would be no faster than torch at this step."""
    if not isinstance(step, _Run):
        return _INFINITE
    if step.size > 1:
        return 0.0
    weight = cast(Tensor, step.modules[0]._parameters["weight"])
    rows = rows_left_to_torch(weight, step.relu)
    if rows == _INFINITE and not step.relu:
        return _INFINITE
    return min(rows * weight.shape[-1], 2.0**62)


_NAN = float("nan")  # unequal to everything, also to itself


class _Uncounted:
    next_id = _NAN


# Torch numbers the hooks that are registered on any module or tensor. Should it stop, every call makes a new plan.
hook_counter: Any = RemovableHandle if isinstance(getattr(RemovableHandle, "next_id", None), int) else _Uncounted


class _Plan:
    """How a FusedForward computes its children: the steps of its forward pass, kept between calls.

    The children of a Sequential among them take its place if it is open (`_is_open`).

    A plan is valid while no hook has been registered anywhere (`stamp`), the children are the same objects of the same
    classes with the same number of attributes (an attribute "forward" would replace the method of the class), and their
    parameters are plain tensors. `parameters` checks this in the pass over the children that collects the parameters.
    """

    __slots__ = ("children", "left_to_torch", "nested", "stamp", "steps")

    def __init__(self, modules: dict[str, Any], activations: str, segment_bytes: int) -> None:
        self.nested = any(_may_be_open(type(child)) for child in modules.values())
        children = [child for _, child in _flattened(modules, activations)]
        kinds = [_fusable_kind(child) for child in children]
        self.steps, weights, biases = _steps_of(children, kinds)
        for step in self.steps:
            if isinstance(step, _Run):
                step.cuts = segments(weights[step.first : step.last], biases[step.first : step.last], segment_bytes)
        self.left_to_torch = min(map(_numbers_left_to_torch, self.steps), default=0.0)
        self.stamp = hook_counter.next_id
        if any(type(child) in _FUSABLE and not kind for child, kind in zip(children, kinds, strict=True)):
            self.stamp, self.left_to_torch = _NAN, 0.0  # removing a hook leaves no trace: look at every call
        # Each child and its class; for children in a run also their attributes and the number of these.
        self.children = [
            (child, type(child), child.__dict__ if kind else None, len(child.__dict__) if kind else 0)
            for child, kind in zip(children, kinds, strict=True)
        ]

    def is_left_to_torch(self, input: Any) -> bool:
        """Whether our ops would be no faster at any step on an input of this size, and torch's may be called directly.

        Transforms and autocast see torch's functions as they see its modules. (Only torch.jit.trace records modules.)
        """
        return (
            type(input) in PLAIN
            and layers_are_torchs()
            and not is_tracing()
            and (self.left_to_torch == _INFINITE or (input.numel() < self.left_to_torch and input.dtype in _FULL))
        )

    def parameters(self, modules: dict[str, Any], activations: str) -> _Parameters | None:
        """The weights and biases of all runs; None if the plan is no longer valid."""
        if self.nested:
            modules = dict(_flattened(modules, activations))
        if len(modules) != len(self.children):
            return None
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        for module, (child, kind, own, size) in zip(modules.values(), self.children):  # noqa: B905
            if module is not child or type(module) is not kind:
                return None
            if own is None:  # called as a module
                continue
            if len(own) != size:
                return None
            if kind in _LINEAR:
                parameters = own["_parameters"]
                weights.append(weight := parameters.get("weight"))
                biases.append(bias := parameters.get("bias"))
                if type(weight) not in PLAIN or type(bias) not in PLAIN_OR_NONE:
                    return None
        return weights, biases

    def __reduce__(self) -> Any:  # a copied or unpickled module makes a plan of its own
        return (no_plan, ())


def no_plan() -> None:
    """None, the plan of a module that was copied or unpickled."""


_LINEAR = frozenset({nn.Linear, LinearReLU})
_TRANSPARENT = frozenset({nn.Dropout, nn.Identity})
_FUSABLE = _LINEAR | _TRANSPARENT | {nn.ReLU}


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of any kind."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


class Transparent:
    """The base of what stands in the place of a module's compiled call without changing what the call computes."""

    __slots__ = ()


def _fusable_kind(child: nn.Module) -> type | None:
    """The class of `child`, if it is one that joins runs and skipping the call of `child` makes no difference."""
    kind, own = type(child), child.__dict__
    if kind not in _FUSABLE or has_hooks(child) or "forward" in own:
        return None
    if (call := own.get("_compiled_call_impl")) is not None and not isinstance(call, Transparent):
        return None
    if kind not in _LINEAR:
        return kind
    weight, bias = (own["_parameters"].get(name, _MISSING) for name in ("weight", "bias"))
    plain = type(weight) in PLAIN and type(bias) in PLAIN_OR_NONE and weight.layout is torch.strided
    return kind if plain else None  # a parametrized weight, for example


_MISSING = object()


def _may_be_open(kind: type) -> bool:
    """Whether `kind` is exactly nn.Sequential, or what `fuse` makes of that class."""
    return kind is nn.Sequential or (
        vars(kind).get("_original_class") is nn.Sequential
        and cast(Any, kind).forward is FusedForward.forward
        and cast(Any, kind).__iter__ is nn.Sequential.__iter__
    )


def _is_open(child: nn.Module, activations: str) -> bool:
    """Whether `child` is a Sequential whose children may be computed in its place, in this memory mode."""
    own = child.__dict__
    return (
        _may_be_open(type(child))
        and not has_hooks(child)
        and "forward" not in own
        and "_manualbp_watchers" not in own
        and own.get("_compiled_call_impl") is None
        and (type(child) is nn.Sequential or own.get("_manualbp_activations", "store") == activations)
    )


def _flattened(modules: dict[str, Any], activations: str, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The children with their names, those of open Sequentials in the place of these."""
    leaves: list[tuple[str, nn.Module]] = []
    for name, child in modules.items():
        if _is_open(child, activations):
            leaves += _flattened(child._modules, activations, f"{prefix}{name}.")
        else:
            leaves.append((prefix + name, child))
    return leaves


def _iterates_as_usual(kind: type) -> bool:
    """Whether ``for module in self``, as ``nn.Sequential.forward`` has it, visits all children in order."""
    return (
        kind.__iter__ is nn.Sequential.__iter__  # type: ignore[attr-defined]
        and cast(Any, kind).__getattribute__ is object.__getattribute__
        and not any("_modules" in vars(base) for base in kind.__mro__)
    )


class _Watcher(Protocol):
    """An observer of a `FusedForward`: it is called after each pass."""

    def watch(self, model: nn.Module) -> None:
        """`unfuse` has changed the class of the model: observe it by hooks from now on."""

    def after_forward(self, input: Tensor, output: Tensor) -> None:
        """The network has computed its output."""

    def after_loss(self, input: Tensor, target: Tensor, spec: LossSpec) -> None:
        """The network has computed a loss together with its gradients."""


class FusedForward(nn.Sequential):
    """An ``nn.Sequential`` that computes each run of Linear, ReLU, Linear, … among its children in one call.

    A child joins a run only while skipping its call makes no difference: it is exactly an ``nn.Linear``, ``nn.ReLU`` or
    `LinearReLU`, an ``nn.Dropout`` after a ReLU, or an ``nn.Identity``, its parameters are plain tensors, and it has no
    hook of any kind. The children of a Sequential in a Sequential join runs as if they were the outer one's, unless it
    has hooks. Every other child (a subclass, a parametrized layer, a layer with hooks) is called as a module. This is
    decided at each call, so that hooks may be registered and removed at any time.

    Dropout draws from torch's generator what its modules would draw: the same seed gives the same masks.
    """

    # Attributes have this prefix because any subclass of nn.Sequential may be fused, with attributes of its own.
    _manualbp_activations = "store"
    _manualbp_segment_bytes = SEGMENT_BYTES

    def forward(self, input: Tensor) -> Tensor:
        """What ``nn.Sequential.forward`` returns, computed run by run."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            for module in self:
                input = module(input)
            return input
        planned = self._planned(input)
        output = input
        if planned is None:
            output = cast(Tensor, super().forward(input))  # type: ignore[no-untyped-call]
        else:
            way, steps, weights, biases = planned
            for step in steps:
                output = step(way, output, weights, biases, self) if isinstance(step, _Run) else step(output)
        own = self.__dict__
        if "_manualbp_watchers" in own:
            for watcher in own["_manualbp_watchers"]:
                watcher.after_forward(input, output)
        return output

    def extra_repr(self) -> str:
        """Which children one call computes at present: a hook or a parametrization keeps a layer out."""
        arguments = cast(dict[str, Any], self._modules), self._manualbp_activations
        names = [name for name, _ in _flattened(*arguments)]
        steps = _Plan(*arguments, self._manualbp_segment_bytes).steps
        calls, position = [], 0
        for step in steps:
            first, position = position, position + (len(step.modules) if isinstance(step, _Run) else 1)
            if isinstance(step, _Run) and (step.size > 1 or step.relu):
                calls.append(f"({names[first]}) to ({names[position - 1]})")
        line = f"in one call each: {', '.join(calls)}" if len(calls) > 1 else f"in one call: {''.join(calls)}"
        return "\n".join(filter(None, [super().extra_repr(), line if calls else ""]))

    def _watch(self, watcher: "_Watcher") -> Callable[[], None]:
        """Calls `watcher` after each pass until the returned function is called.

        Unlike a forward hook, it does not slow down the call of the module, and it also sees `MLP.loss_backward`.
        """
        watchers = self.__dict__.setdefault("_manualbp_watchers", [])
        watchers.append(watcher)
        return lambda: watchers.remove(watcher)

    def _planned(
        self, input: Any, may_leave: bool = True
    ) -> tuple[str, list[_Run | nn.Module], list[Tensor], list[Tensor | None]] | None:
        """What computes the runs, the steps, and the weights and biases of all runs. None: call the children in turn.

        While Dynamo traces, nothing is kept: the plan becomes part of the graph. Small inputs are left to torch if
        `may_leave`.
        """
        own = self.__dict__
        plan: _Plan | None = None if is_dynamo_compiling() else own.get("_manualbp_plan")
        if plan is not None and plan.left_to_torch and may_leave and plan.is_left_to_torch(input):
            way = TORCH
        elif (way := route(input)) is TORCH:
            return None
        if way is GRAPH:
            children = list(self)
            kinds = [None if type(child) in _TRANSPARENT else _fusable_kind(child) for child in children]
            return None if global_hooks_exist() else (GRAPH, *_steps_of(children, kinds))
        modules, mode = own["_modules"], self._manualbp_activations
        if plan is None or plan.stamp != hook_counter.next_id or (parameters := plan.parameters(modules, mode)) is None:
            if global_hooks_exist() or not _iterates_as_usual(type(self)):
                return None
            if way is TORCH and (way := route(input)) is TORCH:  # the plan that left it to torch is outdated
                return None
            own["_manualbp_plan"] = plan = _Plan(modules, mode, self._manualbp_segment_bytes)
            if (parameters := plan.parameters(modules, mode)) is None:  # another thread is changing them
                return None
        weights, biases = parameters
        return way, plan.steps, weights, biases


class MLP(FusedForward):
    """A ReLU network, linear → ReLU → … → linear, computed in one call: an ``nn.Sequential`` with a fused forward.

    Args:
        sizes: D_0, D_1, …, D_K: the widths of the input, of each hidden layer, and of the output.
        bias: whether the layers learn an additive bias β_k.
        activations: "store" keeps every h_k for the backward pass; "recompute" keeps the input only. The attribute of
            that name may be set at any time.
        device: where the parameters are made.
        dtype: dtype of the parameters; the input must have it too.

    Shape:
        input (…, D_0) → output (…, D_K). The children are those of
        ``nn.Sequential(nn.Linear(D_0, D_1), nn.ReLU(), …, nn.Linear(D_{K-1}, D_K))``, with the same initialisation and
        the same state_dict keys.

    Raises:
        ValueError: fewer than two sizes, a negative one, or an unknown `activations`.
        TypeError: `sizes` is not one list, or a size is not an int.
        RuntimeError: in forward, if the input's shape, dtype or device does not fit.

    Example:
        >>> model = MLP([4, 8, 1])
        >>> list(model.state_dict())
        ['0.weight', '0.bias', '2.weight', '2.bias']
        >>> model(torch.ones(3, 4)).shape
        torch.Size([3, 1])
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["activations"]

    def __init__(
        self,
        sizes: Sequence[int],
        *others: int,
        bias: bool = True,
        activations: Activations = "store",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activations("MLP", activations)
        if others or not isinstance(sizes, Iterable):
            given = ", ".join(map(repr, (sizes, *others)))
            raise TypeError(f"MLP: `sizes` must be one list of all widths, as in MLP([4, 8, 3]), got MLP({given})")
        sizes = list(sizes)
        for size in sizes:
            if not isinstance(size, SupportsIndex) or isinstance(size, (bool, Tensor)):
                raise TypeError(f"MLP: `sizes` must hold ints, got {size!r}")
            if index(size) < 0:
                raise ValueError(f"MLP: `sizes` must not be negative, got {size}")
        if len(sizes) < 2:
            raise ValueError(f"MLP: `sizes` must hold at least an input and an output width, got {sizes}")
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(map(index, sizes)):  # NumPy's, too
            layers += [nn.Linear(d_in, d_out, bias=bias, device=device, dtype=dtype), nn.ReLU()]
        super().__init__(*layers[:-1])
        self.activations = activations

    @property
    def activations(self) -> Activations:
        """The memory mode, "store" or "recompute"; may be set at any time."""
        return cast(Activations, self._manualbp_activations)

    @activations.setter
    def activations(self, value: Activations) -> None:
        check_activations("MLP", value)
        self.__dict__["_manualbp_activations"] = value

    def loss(
        self,
        input: Tensor,
        target: Tensor,
        loss: LossName = "mse",
        reduction: Reduction = "mean",
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The loss of this network's output, and its gradients, in one pass over the batch: see `mlp_loss`.

        Example:
            >>> model = MLP([4, 8, 3])
            >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
            >>> model.loss(x, y, "cross_entropy").backward()
            >>> model[0].weight.grad.shape
            torch.Size([8, 4])
        """
        try:
            return loss_of(self, input, target, loss_spec(loss, reduction, ignore_index, label_smoothing))
        except Exception as error:
            name_call(error, "MLP.loss")
            raise

    def loss_backward(
        self,
        input: Tensor,
        target: Tensor,
        loss: LossName = "mse",
        reduction: Reduction = "mean",
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Backpropagation by hand: adds the gradients to ``.grad`` of the parameters and returns the detached loss.

        Equal to ``self.loss(…).backward()`` bit for bit, without an autograd graph: on a small network the engine's
        work for each parameter is most of a step. Fresh gradients are views of one buffer. If something depends on the
        graph (a hook on a parameter, an input that requires a gradient), the graph is built after all.

        Raises:
            RuntimeError: the network is wrapped by DistributedDataParallel or the like, which combines the gradients of
                all processes. Call the wrapper; for the fused loss, wrap a module whose forward returns
                ``mlp.loss(input, target)``.

        Example:
            >>> model = MLP([4, 8, 1])
            >>> value = model.loss_backward(torch.randn(5, 4), torch.randn(5, 1))
            >>> value.requires_grad, model[2].bias.grad.shape
            (False, torch.Size([1]))
        """
        try:
            spec = loss_spec(loss, reduction, ignore_index, label_smoothing)
            return loss_backward(self, input, target, spec, "MLP.loss_backward")
        except Exception as error:
            name_call(error, "MLP.loss_backward")
            raise

    def train_step(
        self,
        input: Tensor,
        target: Tensor,
        optimizer: Any,
        loss: LossName = "mse",
        reduction: Reduction = "mean",
        *,
        max_grad_norm: float | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """One step of training, forward, loss, backward and update: see `torch_manualbp.train_step`.

        Example:
            >>> model = MLP([4, 8, 1])
            >>> optimizer = torch.optim.Adam(model.parameters())
            >>> value = model.train_step(torch.randn(5, 4), torch.randn(5, 1), optimizer)
            >>> value.requires_grad, model[0].weight.grad
            (False, None)
        """
        try:
            spec = loss_spec(loss, reduction, ignore_index, label_smoothing)
            return _steps.Steps(self, optimizer, spec, max_grad_norm, "MLP.train_step", dtype).one(input, target)
        except Exception as error:
            name_call(error, "MLP.train_step")
            raise

    def __getitem__(self, idx: Any) -> Any:
        """A child, or for a slice an ``nn.Sequential`` of the children in it."""
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)


# --- a fused network and its loss in one call: functions, as a method might replace one of the fused class's own ------


def whole_network(network: FusedForward, input: Any, way: str = KERNELS) -> _Parameters | None:
    """The parameters, if this is how the network is computed, and it is one run without a final ReLU or dropout."""
    own = network.__dict__
    if has_hooks(network):
        return None
    planned = network._planned(input, may_leave=False)
    if planned is None or planned[0] is not way:
        return None
    if way is AUTOCAST and not loss_is_ours_under_autocast(input, *planned[2:], torch.get_autocast_dtype("cpu")):
        return None
    if type(network).forward is not FusedForward.forward or "forward" in own:
        return None
    _, steps, weights, biases = planned
    run = steps[0] if len(steps) == 1 else None
    if not isinstance(run, _Run) or run.relu or (run.transparent and run.dropout() != ()):
        return None
    return weights, biases


def loss_of(network: FusedForward, input: Tensor, target: Tensor, spec: LossSpec) -> Tensor:
    """The loss of the network's output, and its gradients, in one pass over the batch if possible."""
    way = GRAPH if is_dynamo_compiling() else eager_way_of_loss(input)
    parameters = whole_network(network, input, way)
    # Our op raises errors of shape itself; in a graph that would be too late.
    if parameters is None or not target_is_ours(input, target, spec, parameters[0] if way is GRAPH else None, way):
        return spec.of(network(input), target)
    if way is GRAPH:
        return _compute.loss(GRAPH, input, target, *parameters, spec)
    try:
        value = _compute.loss(way, input, target, *parameters, spec)
    except RuntimeError as error:
        return cast(Tensor, _instead(error, _loss_by_torch, network, input, target, spec))
    if torch.is_grad_enabled():
        tell(network, input, target, spec)
    return value


def loss_backward(network: FusedForward, input: Tensor, target: Tensor, spec: LossSpec, op: str) -> Tensor:
    """Adds the gradients of the loss to ``.grad`` of the parameters, without a graph if that makes no difference.

    op: the public function that errors name.
    """
    if torch.is_inference_mode_enabled():  # .grad must not become an inference tensor: nothing can be added to one
        with torch.inference_mode(False):
            return loss_backward(network, input, target, spec, op)
    if _distributed.is_initialized():
        _distributed.refuse_data_parallel(op, network)
    way = eager_way_of_loss(input)
    parameters = whole_network(network, input, way)
    learners = None
    if parameters is not None and not input.requires_grad and target_is_ours(input, target, spec, way=way):
        learners = unwatched(*parameters)
    if parameters is None or not learners:
        return _backward_by_autograd(network, input, target, spec)
    weights, biases = parameters
    needs = [False, *[p is not None and p.requires_grad for p in (*weights, *biases)]]
    try:
        if way is AUTOCAST:
            spec = spec.under_autocast(torch.get_autocast_dtype("cpu"))
        value, *grads = spec.run(input, target, weights, biases, needs, flat=True)
    except RuntimeError as error:
        return cast(Tensor, _instead(error, _backward_by_autograd, network, input, target, spec))
    tell(network, input, target, spec)
    accumulate(learners, grads)
    return value


def tell(network: FusedForward, input: Tensor, target: Tensor, spec: LossSpec) -> None:
    """Reports a pass that computed the loss together with its gradients."""
    for watcher in network.__dict__.get("_manualbp_watchers", ()):
        watcher.after_loss(input, target, spec)


def _loss_by_torch(network: FusedForward, input: Tensor, target: Tensor, spec: LossSpec) -> Tensor:
    output = network(input)
    if not spec.loss.of_classes and target.shape != output.shape:  # torch would broadcast
        raise ValueError
    return spec.of(output, target)


def _backward_by_autograd(network: FusedForward, input: Tensor, target: Tensor, spec: LossSpec) -> Tensor:
    with torch.enable_grad():
        value = loss_of(network, input, target, spec)
    with ADDING:
        learners = [parameter for parameter in network.parameters() if parameter.requires_grad]
        before = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in learners]
        try:
            value.backward()  # type: ignore[no-untyped-call]
        except BaseException:  # from a hook, for example, after some parameters have received their gradients
            for parameter, grad, numbers in before:
                parameter.grad = grad
                if grad is not None and numbers is not None:
                    grad.detach().copy_(numbers)
            raise
    return value.detach()


from torch_manualbp import _steps  # noqa: E402 -- at the end, as it is built on this module
