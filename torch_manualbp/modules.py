"""The modules: an `nn.Linear` with its ReLU, an `nn.Sequential` that is one network, and how runs are found.

Parameters, initialisation, state_dict keys, indexing and hooks are those of `nn.Linear` and `nn.Sequential`; only the
way in which forward computes is ours.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import is_
from typing import Any, ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torch_manualbp import _distributed
from torch_manualbp._checks import check_activations
from torch_manualbp._function import (
    PLAIN,
    PLAIN_OR_NONE,
    count_function_modes,
    global_hooks_exist,
    has_kernels,
    joins_graph,
    rows_left_to_torch,
    undisturbed,
)
from torch_manualbp._losses import LossSpec, loss_spec
from torch_manualbp.functional import compute_layers, compute_loss, layers_in_graph, linear_relu, target_is_plain


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
        weight, bias = self.weight, self.bias
        if torch.compiler.is_compiling() or type(input) not in PLAIN or undisturbed(input):
            return linear_relu(input, weight, bias)
        return nn.ReLU.forward(_RELU, super().forward(input))


_RELU = nn.ReLU()

_Parameters = tuple[list[Tensor], list[Tensor | None]]


class _Run:
    """A run of layers that one call computes: linear, ReLU, linear, …; `relu` says whether a ReLU closes it."""

    __slots__ = ("first", "last", "left_to_torch", "modules", "relu", "size")

    def __init__(self, first: int) -> None:
        self.first = self.last = first  # its linear layers are those from `first` to before `last` of the network
        self.size = 0
        self.left_to_torch: list[Tensor | None] = []  # parameters that our op refused and torch took
        self.modules: list[nn.Module] = []
        self.relu = False

    def add(self, module: nn.Module) -> None:
        """Appends a Linear, ReLU or LinearReLU."""
        self.modules.append(module)
        self.size += type(module) is not nn.ReLU
        self.last = self.first + self.size
        self.relu = type(module) is not nn.Linear

    def __call__(self, input: Any, weights: list[Tensor], biases: list[Tensor | None], network: "FusedForward") -> Any:
        """The run's output; the parameters are the network's, or the run's own. `undisturbed` holds."""
        if len(weights) != self.size:
            weights, biases = weights[self.first : self.last], biases[self.first : self.last]
        if self.size == 1 and rows_of(input) < rows_left_to_torch(weights[0], self.relu):
            output = F.linear(input, weights[0], biases[0])
            return torch.relu(output) if self.relu else output
        if self.left_to_torch and all(map(is_, self.left_to_torch, (*weights, *biases))):
            return self._one_by_one(input)
        try:
            return compute_layers(input, weights, biases, self.relu, network._manualbp_activations == "store")
        except RuntimeError as error:  # of a bias that broadcasts, say
            output = _instead(error, self._one_by_one, input)
            self.left_to_torch = [*weights, *biases]
            return output

    def capture(self, input: Any, store: bool) -> Any:
        """The same in a graph that torch.compile captures."""
        linears = [module for module in self.modules if type(module) is not nn.ReLU]
        weights = [cast(Tensor, module._parameters["weight"]) for module in linears]
        biases = [module._parameters["bias"] for module in linears]
        fuses = self.relu or len(linears) > 1
        if fuses and isinstance(input, Tensor) and joins_graph(input, (*weights, *biases)):
            return layers_in_graph(input, weights, biases, self.relu, store)
        return self._one_by_one(input)

    def _one_by_one(self, input: Any) -> Any:
        for module in self.modules:
            input = module(input)
        return input


def _instead(error: RuntimeError, plain: Callable[..., Any], *args: Any) -> Any:
    """What plain torch computes where our op raised `error`; that error, which names the argument, if torch cannot."""
    try:
        return plain(*args)
    except Exception:
        raise error from None


def _steps_of(children: list[nn.Module], kinds: list[type | None]) -> list[_Run | nn.Module]:
    """The children as runs, and what is called as a module."""
    steps: list[_Run | nn.Module] = []
    run: _Run | None = None
    linears = 0
    for child, kind in zip(children, kinds, strict=True):
        if kind is None or (run is None and kind is nn.ReLU):
            run = None
            steps.append(child)
            continue
        if run is None or not (run.relu or kind is nn.ReLU):  # linear after linear: a run of its own
            steps.append(run := _Run(linears))
        run.add(child)
        linears = run.last
    return steps


_INFINITE = float("inf")
_FULL = (torch.float32, torch.float64)


def _numbers_left_to_torch(step: _Run | nn.Module) -> float:
    """Up to how many numbers in the input it gains nothing to compute this step by our ops."""
    if not isinstance(step, _Run):
        return _INFINITE
    if step.size > 1:
        return 0.0
    weight = cast(Tensor, step.modules[0]._parameters["weight"])
    rows = rows_left_to_torch(weight, step.relu)
    if rows == _INFINITE and not step.relu:
        return _INFINITE
    return min(rows * weight.shape[-1], 2.0**62)


class _Plan:
    """How a FusedForward computes its children: runs, and what is called as a module. Kept while nothing has changed.

    `parameters` finds out: that no hook was registered on anything (torch counts them), that the children are the same
    objects of the same classes with as many attributes (one named "forward" would take the place of the class's), and
    that their parameters are plain tensors. So the usual call looks at each child once.
    """

    __slots__ = ("children", "left_to_torch", "stamp", "steps")

    def __init__(self, modules: dict[str, Any]) -> None:
        children = list(modules.values())
        kinds = [_fusable_kind(child) for child in children]
        self.steps = _steps_of(children, kinds)
        self.left_to_torch = min(map(_numbers_left_to_torch, self.steps), default=0.0)
        self.stamp = _hooks_so_far()
        if any(type(child) in _FUSABLE and not kind for child, kind in zip(children, kinds, strict=True)):
            self.stamp, self.left_to_torch = None, 0.0  # hooks may go without a trace: each call looks at them again
        # Of each child: itself, its class; and if it is in a run, its attributes and their number.
        self.children = [
            (child, type(child), child.__dict__ if kind else None, len(child.__dict__) if kind else 0)
            for child, kind in zip(children, kinds, strict=True)
        ]

    def is_left_to_torch(self, input: Any, modules: dict[str, Any]) -> bool:
        """Whether nothing is gained on so small an input."""
        if len(modules) != len(self.children) or type(input) not in PLAIN:
            return False
        for module, (child, kind, _, _) in zip(modules.values(), self.children):  # noqa: B905
            if module is not child or type(module) is not kind:
                return False
        if self.left_to_torch == _INFINITE:
            return True
        if count_function_modes():  # they would see the questions
            return False
        return input.numel() < self.left_to_torch and input.dtype in _FULL

    def parameters(self, modules: dict[str, Any]) -> _Parameters | None:
        """All weights and all biases of the runs; None if the plan no longer fits the modules."""
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
            if kind is not nn.ReLU:
                parameters = own["_parameters"]
                weights.append(weight := parameters.get("weight"))
                biases.append(bias := parameters.get("bias"))
                if type(weight) not in PLAIN or type(bias) not in PLAIN_OR_NONE:
                    return None
        return weights, biases

    def __reduce__(self) -> Any:  # a copied or unpickled module makes its own
        return (no_plan, ())


def rows_of(input: Tensor) -> int:
    """The number of examples in an input (…, D)."""
    return input.numel() // max(input.shape[-1], 1) if input.dim() else 1


def no_plan() -> None:
    """What a copied or unpickled module has in the place of a plan."""


_counts_hooks = isinstance(getattr(RemovableHandle, "next_id", None), int)


def _hooks_so_far() -> Any:
    """How many hooks were registered on anything; if torch no longer counts them, something that equals nothing."""
    return RemovableHandle.next_id if _counts_hooks else object()


_FUSABLE = frozenset({nn.Linear, nn.ReLU, LinearReLU})


def _fusable_kind(child: nn.Module) -> type | None:
    """nn.Linear, LinearReLU or nn.ReLU if a child is exactly that and nobody can tell whether it was called."""
    kind, own = type(child), child.__dict__
    if kind not in _FUSABLE or (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
    ):
        return None
    if kind is nn.ReLU:
        return kind
    weight, bias = (own["_parameters"].get(name, _MISSING) for name in ("weight", "bias"))
    plain = type(weight) in PLAIN and type(bias) in PLAIN_OR_NONE and weight.layout is torch.strided
    return kind if plain else None  # computed from something else


_MISSING = object()


def _iterates_as_usual(kind: type) -> bool:
    """Whether ``for module in self``, in the forward of an ``nn.Sequential``, goes through its children in order."""
    return (
        kind.__iter__ is nn.Sequential.__iter__  # type: ignore[attr-defined]
        and cast(Any, kind).__getattribute__ is object.__getattribute__
        and not any("_modules" in vars(base) for base in kind.__mro__)
    )


def _unwatched(weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor] | None:
    """The trainable parameters, if writing to ``.grad`` is indistinguishable from autograd; otherwise None.

    Not if autograd looks for NaN (anomaly mode), if a hook waits for a gradient, or if the gradient has a dtype or a
    place of its own. A hook on the node that accumulates into a parameter cannot be seen, but the node: it holds the
    parameter, and something else holds the node (the hook's owner, or a graph that is still alive).
    """
    if torch.is_anomaly_enabled():
        return None
    learners = []
    for parameter in (*weights, *biases):
        if parameter is None or not parameter.requires_grad:
            continue
        if (
            parameter._backward_hooks
            or parameter._post_accumulate_grad_hooks
            or not parameter.is_leaf
            or _use_count(parameter) > 1
            or getattr(parameter, "grad_dtype", parameter.dtype) is not parameter.dtype
        ):
            return None
        if (grad := parameter.grad) is not None and not (
            type(grad) in PLAIN
            and grad.layout is torch.strided
            and grad.dtype is parameter.dtype
            and grad.shape == parameter.shape
            and not grad.is_inference()
        ):
            return None
        learners.append(parameter)
    return learners if len(set(map(id, learners))) == len(learners) else None  # a shared layer learns twice


def _accumulate(parameters: list[Tensor], grads: list[Tensor]) -> None:
    """Adds to ``.grad`` as torch's engine does: in place, and a fresh gradient lies as its parameter does.

    `_unwatched` has seen to it that nothing fails half-way.
    """
    with _ADDING, torch.no_grad():
        sums, terms = [], []
        for parameter, grad in zip(parameters, grads, strict=True):
            if parameter.grad is None:
                parameter.grad = grad if parameter.is_contiguous() else _laid_out_as(parameter, grad)
            else:
                sums.append(parameter.grad)
                terms.append(grad)
        if sums:
            torch._foreach_add_(sums, terms)


def _laid_out_as(parameter: Tensor, grad: Tensor) -> Tensor:
    """The same numbers with the strides of the parameter; contiguous if those overlap or leave gaps."""
    return torch.empty_like(parameter, memory_format=torch.preserve_format, requires_grad=False).copy_(grad)


# Two threads that add to the same gradients take turns, as in torch's engine.
_ADDING = threading.RLock()
# How many C++ objects hold a tensor: 1, its Python object. If torch no longer says, always too many.
_use_count: Callable[[Tensor], int] = getattr(Tensor, "_use_count", lambda tensor: 2)


class _Watcher(Protocol):
    """What `FusedForward` tells of its passes."""

    def watch(self, model: nn.Module) -> None:
        """The model has become another kind: listen to it as it is now."""

    def after_forward(self, input: Tensor, output: Tensor) -> None:
        """The network has computed its output."""

    def after_loss(self, input: Tensor, target: Tensor, spec: LossSpec) -> None:
        """It has computed a loss and its gradients at once."""


class FusedForward(nn.Sequential):
    """An ``nn.Sequential`` that computes each run of Linear, ReLU, Linear, … among its children in one call.

    A child joins a run only while nobody can tell the difference: it is exactly an ``nn.Linear``, ``nn.ReLU`` or
    `LinearReLU`, its weight is a plain parameter, and no hook of any kind watches it. Whatever else it is (a subclass,
    a parametrized layer, a layer with hooks), it is called as a module. This is decided at each call, so that hooks
    may come and go.
    """

    # Names that no subclass of nn.Sequential has for something else: any may be fused.
    _manualbp_activations = "store"

    def forward(self, input: Tensor) -> Tensor:
        """The children in turn, run by run."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            for module in self:
                input = module(input)
            return input
        if torch.compiler.is_compiling():
            return self._capture(input)
        own = self.__dict__
        plan = own.get("_manualbp_plan")
        if plan is not None and plan.left_to_torch and plan.is_left_to_torch(input, own["_modules"]):
            output = input
            for module in own["_modules"].values():
                output = module(output)
        else:
            planned = self._planned(input)
            if planned is None:
                output = cast(Tensor, super().forward(input))  # type: ignore[no-untyped-call]
            else:
                output = input
                steps, weights, biases = planned
                for step in steps:
                    output = step(output, weights, biases, self) if isinstance(step, _Run) else step(output)
        if "_manualbp_watchers" in own:
            for watcher in own["_manualbp_watchers"]:
                watcher.after_forward(input, output)
        return output

    def _watch(self, watcher: "_Watcher") -> Callable[[], None]:
        """Tells `watcher` of each pass, until the function that is returned is called.

        As a hook would, but it costs no more than its own call, and sees passes that make no output.
        """
        watchers = self.__dict__.setdefault("_manualbp_watchers", [])
        watchers.append(watcher)
        return lambda: watchers.remove(watcher)

    def _capture(self, input: Tensor) -> Tensor:
        """Forward as Dynamo traces it: the plan is made anew, for it is the graph that is kept."""
        children = list(self)
        if global_hooks_exist():
            return cast(Tensor, super().forward(input))  # type: ignore[no-untyped-call]
        store = self._manualbp_activations == "store"
        for step in _steps_of(children, [_fusable_kind(child) for child in children]):
            input = step.capture(input, store) if isinstance(step, _Run) else step(input)
        return input

    def _planned(self, input: Any) -> tuple[list[_Run | nn.Module], list[Tensor], list[Tensor | None]] | None:
        """What computes the children, and their parameters; None: they are called in turn, as by ``nn.Sequential``."""
        if not (type(input) in PLAIN and undisturbed(input) and has_kernels(input)):
            return None
        modules = self.__dict__["_modules"]
        plan: _Plan | None = self.__dict__.get("_manualbp_plan")
        if plan is None or plan.stamp != _hooks_so_far() or (parameters := plan.parameters(modules)) is None:
            if global_hooks_exist() or not _iterates_as_usual(type(self)):
                return None
            self.__dict__["_manualbp_plan"] = plan = _Plan(modules)
            if (parameters := plan.parameters(modules)) is None:  # another thread changes them
                return None
        return plan.steps, *parameters


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
        ``nn.Sequential(nn.Linear(D_0, D_1), nn.ReLU(), …, nn.Linear(D_{K-1}, D_K))``, with the same initialisation, the
        same state_dict keys and the same repr.

    Raises:
        ValueError: fewer than two sizes, a negative one, or an unknown `activations`.
        TypeError: a size is not an int.
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
        *,
        bias: bool = True,
        activations: str = "store",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activations("MLP", activations)
        sizes = list(sizes)
        if len(sizes) < 2:
            raise ValueError(f"MLP: `sizes` must hold at least an input and an output width, got {sizes}")
        for size in sizes:
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"MLP: `sizes` must hold ints, got {size!r}")
            if size < 0:
                raise ValueError(f"MLP: `sizes` must not be negative, got {size}")
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(sizes):
            layers += [nn.Linear(d_in, d_out, bias=bias, device=device, dtype=dtype), nn.ReLU()]
        super().__init__(*layers[:-1])
        self.activations = activations

    @property
    def activations(self) -> str:
        """The memory mode, "store" or "recompute"; may be set at any time."""
        return self._manualbp_activations

    @activations.setter
    def activations(self, value: str) -> None:
        check_activations("MLP", value)
        self.__dict__["_manualbp_activations"] = value

    def loss(
        self,
        input: Tensor,
        target: Tensor,
        loss: str = "mse",
        reduction: str = "mean",
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The loss of this network's output, and its gradients, in one pass over the batch: see `mlp_loss`.

        Example:
            >>> model = MLP([4, 8, 3])
            >>> model.loss(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), "cross_entropy").backward()
            >>> model[0].weight.grad.shape
            torch.Size([8, 4])
        """
        spec = loss_spec(loss, reduction, ignore_index, label_smoothing)
        if (parameters := self._whole(input)) is None or not target_is_plain(input, target, spec):
            return spec.of(self(input), target)
        try:
            value = compute_loss(input, target, *parameters, spec)
        except RuntimeError as error:
            return cast(Tensor, _instead(error, self._loss_by_torch, input, target, spec))
        if torch.is_grad_enabled():
            self._tell(input, target, spec)
        return value

    def loss_backward(
        self,
        input: Tensor,
        target: Tensor,
        loss: str = "mse",
        reduction: str = "mean",
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Backpropagation by hand: adds the gradients to ``.grad`` of the parameters and returns the detached loss.

        Equal to ``self.loss(…).backward()`` bit for bit, without an autograd graph: on a small network the engine's
        work for each parameter is most of a step. Fresh gradients lie in one buffer. Where somebody listens to the
        graph (hooks on a parameter, an input that requires a gradient), it goes through the graph after all.

        Raises:
            RuntimeError: a wrapper such as DistributedDataParallel combines the gradients between processes. It must be
                called itself; for the fused loss, wrap a module whose forward returns ``mlp.loss(input, target)``.

        Example:
            >>> model = MLP([4, 8, 1])
            >>> value = model.loss_backward(torch.randn(5, 4), torch.randn(5, 1))
            >>> value.requires_grad, model[2].bias.grad.shape
            (False, torch.Size([1]))
        """
        if torch.is_inference_mode_enabled():  # what it would leave in .grad, no later step could add to
            with torch.inference_mode(False):
                return self.loss_backward(
                    input, target, loss, reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
                )
        spec = loss_spec(loss, reduction, ignore_index, label_smoothing)
        if _distributed.is_initialized():
            _distributed.refuse_data_parallel("MLP.loss_backward", self)
        parameters = self._whole(input)
        learners = None
        if parameters is not None and not input.requires_grad and target_is_plain(input, target, spec):
            learners = _unwatched(*parameters)
        if parameters is None or not learners:
            return self._backward_by_autograd(input, target, spec)
        weights, biases = parameters
        needs = [False, *[p is not None and p.requires_grad for p in (*weights, *biases)]]
        try:
            value, *grads = spec.run(input, target, weights, biases, needs, flat=True)
        except RuntimeError as error:
            return cast(Tensor, _instead(error, self._backward_by_autograd, input, target, spec))
        self._tell(input, target, spec)
        _accumulate(learners, grads)
        return value

    def _loss_by_torch(self, input: Tensor, target: Tensor, spec: LossSpec) -> Tensor:
        output = self(input)
        if spec.name != "cross_entropy" and target.shape != output.shape:  # torch would broadcast
            raise ValueError
        return spec.of(output, target)

    def _backward_by_autograd(self, input: Tensor, target: Tensor, spec: LossSpec) -> Tensor:
        options: Any = {"ignore_index": spec.ignore_index, "label_smoothing": spec.label_smoothing}
        with torch.enable_grad():
            value = self.loss(input, target, spec.name, spec.reduction, **options)
        with _ADDING:
            learners = [parameter for parameter in self.parameters() if parameter.requires_grad]
            before = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in learners]
            try:
                value.backward()  # type: ignore[no-untyped-call]
            except BaseException:  # a hook that raises, say: some parameters have their gradients by then
                for parameter, grad, numbers in before:
                    parameter.grad = grad
                    if grad is not None and numbers is not None:
                        grad.detach().copy_(numbers)
                raise
        return value.detach()

    def _whole(self, input: Any) -> _Parameters | None:
        """The parameters of the network as one run of layers, if that is what it (still) is and the kernels apply."""
        if torch.compiler.is_compiling() or self._is_observed():
            return None
        if type(self).forward is not FusedForward.forward or "forward" in self.__dict__:
            return None
        if (planned := self._planned(input)) is None:
            return None
        steps, weights, biases = planned
        run = steps[0] if len(steps) == 1 else None
        return (weights, biases) if isinstance(run, _Run) and not run.relu else None

    def _is_observed(self) -> bool:
        own = self.__dict__
        return bool(
            own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        )

    def _tell(self, input: Tensor, target: Tensor, spec: LossSpec) -> None:
        for watcher in self.__dict__.get("_manualbp_watchers", ()):
            watcher.after_loss(input, target, spec)

    def __getitem__(self, idx: Any) -> Any:
        """A child, or for a slice an ``nn.Sequential`` of the children in it."""
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)

    def _get_name(self) -> str:
        return "Sequential"
