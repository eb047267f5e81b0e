"""The modules: an `nn.Linear` with its ReLU, an `nn.Sequential` that is one network, and how runs are found.

Parameters, initialisation, state_dict keys, indexing and hooks are those of `nn.Linear` and `nn.Sequential`; only the
way in which forward computes is ours.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_manualbp._checks import check_activations
from torch_manualbp._function import global_hooks_exist, kernels_apply
from torch_manualbp._losses import LossSpec
from torch_manualbp.functional import linear_relu, run_layers, run_loss, target_is_plain


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
        return linear_relu(input, self.weight, self.bias)


class _Run:
    """A run of layers that one call computes: linear, ReLU, linear, …; `relu` says whether a ReLU closes it."""

    __slots__ = ("activations", "biases", "module", "relu", "weights")

    def __init__(self, activations: str) -> None:
        self.activations = activations
        self.weights: list[Tensor] = []
        self.biases: list[Tensor | None] = []
        self.relu = False

    def add(self, module: nn.Module) -> None:
        self.module = module
        self.weights.append(cast(Tensor, module._parameters["weight"]))
        self.biases.append(module._parameters["bias"])
        self.relu = type(module) is LinearReLU

    def __call__(self, input: Any) -> Any:
        if len(self.weights) == 1 and not self.relu:  # a lone linear layer: nothing to fuse
            return self.module(input)
        return run_layers(input, self.weights, self.biases, self.relu, self.activations)


def _unwatched(run: _Run) -> list[Tensor] | None:
    """The parameters that learn, if a gradient may be put into each without autograd: nobody would see a difference."""
    learners = []
    for parameter in (*run.weights, *run.biases):
        if parameter is None:
            continue
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks or not parameter.is_leaf:
            return None
        if parameter.layout is not torch.strided:
            return None
        if parameter.requires_grad:
            learners.append(parameter)
    return learners if len({id(p) for p in learners}) == len(learners) else None  # a shared layer learns twice


def _fusable_kind(module: nn.Module) -> type | None:
    """nn.Linear, LinearReLU or nn.ReLU if `module` is exactly that and nobody can tell whether it was called."""
    kind = type(module)
    if not (kind is nn.Linear or kind is nn.ReLU or kind is LinearReLU):
        return None
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
    ):
        return None
    if kind is not nn.ReLU and (own["_parameters"].get("weight") is None or "bias" not in own["_parameters"]):
        return None  # the weight is computed from something else
    return kind


class FusedForward(nn.Sequential):
    """An ``nn.Sequential`` that computes each run of Linear, ReLU, Linear, … among its children in one call.

    A child joins a run only while nobody can tell the difference: it is exactly an ``nn.Linear``, ``nn.ReLU`` or
    `LinearReLU`, its weight is a plain parameter, and no hook of any kind watches it. Whatever else it is (a subclass,
    a parametrized layer, a layer with hooks), it is called as a module. This is decided at each call, so that hooks
    may come and go.
    """

    activations: str

    def forward(self, input: Any) -> Any:
        """The children in turn, run by run."""
        if not (isinstance(input, Tensor) and kernels_apply(input)) or global_hooks_exist():
            return super().forward(input)  # type: ignore[no-untyped-call]
        for step in self._steps():
            input = step(input)
        return input

    def _steps(self) -> list[_Run | nn.Module]:
        steps: list[_Run | nn.Module] = []
        run: _Run | None = None
        for child in cast(Iterable[nn.Module], self._modules.values()):
            kind = _fusable_kind(child)
            if kind is nn.ReLU and run is not None:
                run.relu = True
            elif kind is nn.Linear or kind is LinearReLU:
                if run is None or not run.relu:  # linear after linear: a run of its own
                    steps.append(run := _Run(self.activations))
                run.add(child)
            else:
                run = None
                steps.append(child)
        return steps


class MLP(FusedForward):
    """A ReLU network, linear → ReLU → … → linear, computed in one call: an ``nn.Sequential`` with a fused forward.

    Args:
        sizes: D_0, D_1, …, D_K: the widths of the input, of each hidden layer, and of the output.
        bias: whether the layers learn an additive bias β_k.
        activations: "store" keeps every h_k for the backward pass; "recompute" keeps the input only.
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
        spec = LossSpec(loss, reduction, ignore_index, label_smoothing)
        if (run := self._whole_run(input)) is None:
            return spec.of(self(input), target)
        return run_loss(input, target, run.weights, run.biases, spec)

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

        Example:
            >>> model = MLP([4, 8, 1])
            >>> value = model.loss_backward(torch.randn(5, 4), torch.randn(5, 1))
            >>> value.requires_grad, model[2].bias.grad.shape
            (False, torch.Size([1]))
        """
        spec = LossSpec(loss, reduction, ignore_index, label_smoothing)
        run = self._whole_run(input)
        learners = None
        if run is not None and not input.requires_grad and target_is_plain(input, target, spec):
            learners = _unwatched(run)
        if run is None or learners is None:
            value = self.loss(
                input, target, loss, reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
            )
            value.backward()  # type: ignore[no-untyped-call]
            return value.detach()
        needs = [False, *(p is not None and p.requires_grad for p in (*run.weights, *run.biases))]
        with torch.no_grad():
            value, *grads = spec.run(input, target, run.weights, run.biases, needs, flat=True)
            for parameter, grad in zip(learners, grads, strict=True):
                if parameter.grad is None:
                    parameter.grad = grad
                else:
                    parameter.grad += grad
        return value

    def _whole_run(self, input: Any) -> _Run | None:
        """The network as one run of layers, if that is what it (still) is and the kernels apply."""
        if not (isinstance(input, Tensor) and kernels_apply(input)) or global_hooks_exist() or self._is_observed():
            return None
        steps = self._steps()
        run = steps[0] if len(steps) == 1 else None
        return run if isinstance(run, _Run) and not run.relu else None

    def _is_observed(self) -> bool:
        own = self.__dict__
        return bool(
            own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        )

    def __getitem__(self, idx: Any) -> Any:
        """A child, or for a slice an ``nn.Sequential`` of the children in it."""
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)

    def _get_name(self) -> str:
        return "Sequential"
