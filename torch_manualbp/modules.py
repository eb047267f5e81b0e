"""The modules: an `nn.Linear` with its ReLU, an `nn.Sequential` that is one network, and how runs are found.

Parameters, initialisation, state_dict keys, indexing and hooks are those of `nn.Linear` and `nn.Sequential`; only the
way in which forward computes is ours.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_manualbp import _distributed
from torch_manualbp._checks import check_activations
from torch_manualbp._function import PLAIN, global_hooks_exist, joins_graph, kernels_apply
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
        return linear_relu(input, self.weight, self.bias)


_Parameters = tuple[list[Tensor], list[Tensor | None]]
_MISSING = object()


class _Run:
    """A run of layers that one call computes: linear, ReLU, linear, …; `relu` says whether a ReLU closes it."""

    __slots__ = ("modules", "owners", "relu")

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.owners: list[dict[str, Any]] = []  # where each linear layer keeps its parameters
        self.relu = False

    def add(self, module: nn.Module) -> None:
        """Appends a Linear, ReLU or LinearReLU."""
        self.modules.append(module)
        if type(module) is not nn.ReLU:
            self.owners.append(module._parameters)
        self.relu = type(module) is not nn.Linear

    def parameters(self, input: Any, in_graph: bool = False) -> _Parameters | None:
        """The weights and biases, which may be other objects than at the last call; None if kernels cannot compute."""
        if not (isinstance(input, Tensor) and (joins_graph if in_graph else kernels_apply)(input)):
            return None
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        for owner in self.owners:
            weight, bias = owner.get("weight"), owner.get("bias", _MISSING)
            if type(weight) not in PLAIN or not (bias is None or type(bias) in PLAIN):
                return None  # computed from something else
            if weight.layout is not torch.strided:  # type: ignore[union-attr]
                return None
            weights.append(cast(Tensor, weight))
            biases.append(cast(Any, bias))
        return weights, biases

    def __call__(self, input: Any, activations: str) -> Any:
        if (parameters := self.parameters(input)) is not None:
            weights, biases = parameters
            if not self.relu and len(weights) == 1:  # a lone linear layer: nothing to fuse
                return F.linear(input, weights[0], biases[0])
            return compute_layers(input, weights, biases, self.relu, activations == "store")
        return self._one_by_one(input)

    def capture(self, input: Any, activations: str) -> Any:
        """The same in a graph that torch.compile captures."""
        if (parameters := self.parameters(input, in_graph=True)) is not None and (self.relu or len(self.owners) > 1):
            return layers_in_graph(input, *parameters, self.relu, activations == "store")
        return self._one_by_one(input)

    def _one_by_one(self, input: Any) -> Any:
        for module in self.modules:
            input = module(input)
        return input


class _Plan:
    """How a FusedForward computes its children: runs, and what is called as a module. Kept from call to call."""

    __slots__ = ("children", "kinds", "steps")

    def __init__(self, children: list[nn.Module], kinds: list[type | None]) -> None:
        self.children, self.kinds = children, kinds
        self.steps: list[_Run | nn.Module] = []
        run: _Run | None = None
        for child, kind in zip(children, kinds, strict=True):
            if kind is None or (run is None and kind is nn.ReLU):
                run = None
                self.steps.append(child)
                continue
            if run is None or not (run.relu or kind is nn.ReLU):  # linear after linear: a run of its own
                self.steps.append(run := _Run())
            run.add(child)

    def __reduce__(self) -> Any:  # a copied or unpickled module makes its own
        return (type(None), ())


def _unwatched(weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor] | None:
    """The parameters that learn, if a gradient may be put into each without autograd: nobody would see a difference."""
    learners = []
    for parameter in (*weights, *biases):
        if parameter is None:
            continue
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks or not parameter.is_leaf:
            return None
        if parameter.requires_grad:
            learners.append(parameter)
    return learners if len(set(map(id, learners))) == len(learners) else None  # a shared layer learns twice


# Two threads that add to the same gradients take turns, as in torch's engine.
_ADDING = threading.RLock()

_FUSABLE = frozenset({nn.Linear, nn.ReLU, LinearReLU})


def _fusable_kinds(children: Iterable[nn.Module]) -> list[type | None]:
    """nn.Linear, LinearReLU or nn.ReLU where a child is exactly that and nobody can tell whether it was called."""
    kinds: list[type | None] = []
    for child in children:
        kind: type | None = type(child)
        if kind in _FUSABLE:
            own = child.__dict__
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
                or own.get("_compiled_call_impl") is not None
            ):
                kind = None
        else:
            kind = None
        kinds.append(kind)
    return kinds


class _Watcher(Protocol):
    """What `FusedForward` tells of its passes."""

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
        if global_hooks_exist():
            output = cast(Tensor, super().forward(input))  # type: ignore[no-untyped-call]
        else:
            output = input
            for step in self._steps():
                output = step(output, self._manualbp_activations) if isinstance(step, _Run) else step(output)
        for watcher in self.__dict__.get("_manualbp_watchers", ()):
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
        for step in _Plan(children, _fusable_kinds(children)).steps:
            input = step.capture(input, self._manualbp_activations) if isinstance(step, _Run) else step(input)
        return input

    def _steps(self) -> list[_Run | nn.Module]:
        own = self.__dict__
        children = list(cast(Iterable[nn.Module], own["_modules"].values()))
        kinds = _fusable_kinds(children)
        plan: _Plan | None = own.get("_manualbp_plan")
        if plan is None or plan.children != children or plan.kinds != kinds:
            own["_manualbp_plan"] = plan = _Plan(children, kinds)
        return plan.steps


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
        value = compute_loss(input, target, *parameters, spec)
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
        if parameters is None or learners is None:
            with torch.enable_grad():
                value = self.loss(
                    input, target, loss, reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
                )
            value.backward()  # type: ignore[no-untyped-call]
            return value.detach()
        weights, biases = parameters
        needs = [False, *[p is not None and p.requires_grad for p in (*weights, *biases)]]
        value, *grads = spec.run(input, target, weights, biases, needs, flat=True)
        self._tell(input, target, spec)
        with _ADDING:
            for parameter, grad in zip(learners, grads, strict=True):
                if parameter.grad is None:
                    parameter.grad = grad
                else:
                    with torch.no_grad():
                        parameter.grad += grad
        return value

    def _whole(self, input: Any) -> _Parameters | None:
        """The parameters of the network as one run of layers, if that is what it (still) is and the kernels apply."""
        if torch.compiler.is_compiling() or global_hooks_exist() or self._is_observed():
            return None
        if type(self).forward is not FusedForward.forward or "forward" in self.__dict__:
            return None
        steps = self._steps()
        run = steps[0] if len(steps) == 1 else None
        return run.parameters(input) if isinstance(run, _Run) and not run.relu else None

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
