"""`GradientFlowMonitor`: `gradient_flow` every few steps of a training loop, without changing what it computes.

A fused network reports its forward passes to the monitor; a plain network gets one forward hook. To measure a pass, the
monitor repeats the forward pass on some of the rows with the network as it is right after that pass, and hooks the
output's autograd node; when training's ∂L/∂output arrives there, it computes the backward pass from it. So it works for
a fused network, which calls no layers, keeps no part of the graph, and lets the model change between forward and
backward. `MLP.loss` and `MLP.loss_backward` have no output to hook; they report input, target and loss.

Not here: the passes and the diagnosis (gradient_flow.py), figures (flow_plot.py).
"""

import contextlib
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from torch_manualbp._arithmetic import plain_arithmetic
from torch_manualbp._layers import Layer, layers_of
from torch_manualbp._losses import LossSpec
from torch_manualbp._route import PLAIN, is_legacy_batched, is_tracing, layers_are_torchs, transforms_active
from torch_manualbp.inspection._table import Table, printable
from torch_manualbp.inspection.gradient_flow import (
    ForwardPass,
    GradientFlow,
    Passes,
    describe,
    outline,
    run_backward,
    run_forward,
    weight_changes,
)
from torch_manualbp.modules import FusedForward

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from typing_extensions import Self

# Contexts that hide the monitor's computation from modes and from subclasses of Tensor.
_no_functions = getattr(torch._C, "DisableTorchFunction", contextlib.nullcontext)
_no_dispatch = getattr(torch._C, "_DisableTorchDispatch", contextlib.nullcontext)


class GradientFlowMonitor:
    """Measures the gradient flow of a network while it trains: ``with GradientFlowMonitor(model) as monitor: …``.

    The first forward pass that records gradients and every `every`-th one after it are measured in their backward pass.
    Each measurement is a `GradientFlow` in ``history``. Its ``step`` counts forward passes from 1. Its ``update_ratio``
    is the relative size ‖ΔΩ_k‖ / ‖Ω_k‖ of the parameter step that followed: the distance of the weights, changed by
    whatever means, from the measured ones when the next forward pass finds them changed. ∂ℓ/∂f_k is the gradient of the
    loss that the training loop computes: a mean over the batch scales all of them by 1/B, which changes no ratio.

    The measured network is the one that the forward pass used: layers and weights may be replaced while the monitor is
    active, also by ``torch.func.functional_call``. If the network has become one that cannot be described, the forward
    pass that was to be measured raises the constructor's error.

    Training computes the same numbers bit for bit with and without a monitor, which changes no parameter, gradient or
    random number and keeps no part of the graph. Only ordinary training steps are measured: none under
    ``torch.compile``, ``torch.func`` or forward-mode AD, with tensors without data, or with batched backward passes.

    Args:
        model: `MLP`, `LinearReLU`, or an ``nn.Sequential`` of Linear and ReLU layers, fused or not; it may be a part of
            a larger model (``GradientFlowMonitor(model.head)``).
        every: the number of forward passes from one measurement to the next.
        rows: the most rows of a batch to measure, evenly spaced. More rows cost more time and make it more certain
            that a unit is dead. Measuring costs about as much as training on this many rows, and at least 0.2 ms.

    Raises:
        TypeError: `model` has other modules than Linear and ReLU layers; the message names the first one.
        ValueError: `every` or `rows` is not positive, or layers share a parameter.
        RuntimeError: a monitor is entered while it is active.

    Example:
        >>> from torch_manualbp import MLP
        >>> model = MLP([8, 32, 32, 1])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with GradientFlowMonitor(model, every=2) as monitor:
        ...     for _ in range(5):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(64, 8)).square().mean().backward()
        ...         optimizer.step()
        >>> [flow.step for flow in monitor.history], monitor.diagnosis
        ([1, 3, 5], [])
    """

    def __init__(self, model: nn.Module, every: int = 100, *, rows: int = 64) -> None:
        for name, value in (("every", every), ("rows", rows)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"GradientFlowMonitor: `{name}` must be a positive int, got {value!r}")
        layers_of(model, "GradientFlowMonitor")
        self._history: list[_Record] = []
        self._model, self._every, self._rows = model, every, rows
        self._steps, self._next = 0, 1
        self._pending: _Record | None = None  # the last measurement, until a step has changed the weights
        # The last measurement's tensors, to be reused: mapping fresh pages took as long as both passes.
        self._memory: Passes | None = None
        self._writers: list[tuple[Any, str]] = []
        self._watcher: _Watcher | None = None

    def __enter__(self) -> "Self":
        if self._watcher is not None:
            raise RuntimeError("GradientFlowMonitor: it is active already; use one monitor per `with`")
        layers_of(self._model, "GradientFlowMonitor")
        self._watcher = _Watcher(self)
        self._watcher.watch(self._model)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._watcher is not None:
            self._watcher.release()
        self._watcher = None
        if self._pending is not None:
            with _no_functions(), _no_dispatch():
                self._see_update(None)
        self._memory = None

    @property
    def history(self) -> list[GradientFlow]:
        """The measurements, oldest first."""
        return [record.flow for record in self._history]

    @property
    def diagnosis(self) -> list[str]:
        """The `GradientFlow.diagnosis` of the last measurement; empty before the first one."""
        return self._history[-1].flow.diagnosis if self._history else []

    def write_to(self, writer: Any, prefix: str = "gradient_flow") -> "Self":
        """Sends each measurement to a TensorBoard ``SummaryWriter``, or any object that has its ``add_scalar``.

        The tags are ``prefix/quantity/layer`` for ``f``, ``dl_df``, ``dead``, ``always_on`` and ``update_ratio``, and
        ``prefix/gradient_ratio``.

        Returns:
            The monitor itself, so that it can follow the constructor.
        """
        self._writers.append((writer, prefix))
        return self

    def plot(self) -> "Figure":
        """Sizes of ∂ℓ/∂f_k, shares of dead units and sizes of the updates, each layer over the steps.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: nothing has been measured yet.
        """
        from torch_manualbp.inspection.flow_plot import plot_history

        if not self._history:
            raise ValueError("GradientFlowMonitor: nothing has been measured yet, so there is nothing to plot")
        return plot_history(self.history)

    def __str__(self) -> str:
        return printable("\n".join([self._summary(), *map(" ".join, self._changes())]))

    def _repr_html_(self) -> str:
        return Table(self._summary(), (), list(self._changes()), "<<").html()

    def _summary(self) -> str:
        return f"GradientFlowMonitor: {self._steps} steps seen, {len(self._history)} measured"

    def _changes(self) -> Iterator[tuple[str, str]]:
        """The steps at which the diagnosis changes, and the new one."""
        before: list[str] | None = None
        for flow in self.history:
            if flow.diagnosis != before:
                findings = "; ".join(f"{word}: {text}" for word, text in flow.explanation.items())
                yield f"from step {flow.step}:", findings or "nothing found"
                before = flow.diagnosis

    # ------------------------------------------------------------------------------------- called by the watcher

    def _count(self) -> bool:
        """Counts a step. Returns whether `_see` must be called for it."""
        self._steps += 1
        return self._pending is not None or self._steps >= self._next

    def _see(self, input: Tensor) -> "_Seen | None":
        """Completes the last measurement if the weights have changed; returns this pass if it is to be measured."""
        self._see_update(self._model)
        if self._steps < self._next or (layers := self._network()) is None:
            return None
        self._next = self._steps + self._every
        if (stride := -(-input.shape[:-1].numel() // self._rows)) == 0:
            return None
        dtype = layers[0].weight.dtype
        dtype = torch.float32 if dtype is torch.float16 or dtype is torch.bfloat16 else dtype
        rows = _sample(input, stride).to(dtype, copy=True)  # the caller may refill the memory of the input
        memory, self._memory = self._memory, None  # another pass may begin before this one is measured
        return _Seen(self._steps, layers, run_forward(layers, rows, memory), stride)

    def _network(self) -> list[Layer] | None:
        """The layers with their current parameters; None if a transform has replaced those by objects of its own."""
        try:
            return layers_of(self._model, "GradientFlowMonitor")
        except TypeError:
            if all(type(p) in PLAIN or isinstance(p, nn.Parameter) for p in self._model.parameters()):
                raise
            return None

    def _measure(self, seen: "_Seen", output_gradient: Tensor) -> None:
        self._see_update(None)
        self._memory = passes = run_backward(seen.forward, output_gradient)
        self._pending = _Record(seen, passes)
        self._history.append(self._pending)

    def _see_update(self, model: nn.Module | None) -> None:
        """Completes the last measurement by the step that followed it, if the weights have changed.

        model: the model in its forward pass; None to complete the measurement in any case.
        """
        if (record := self._pending) is None:
            return
        found = record.find_update() or (model is not None and record.find_update(model))
        if not found and model is not None:
            return
        record.forget_weights()
        self._pending = None
        for writer, prefix in self._writers:
            _write(record.flow, writer, prefix)


def _loss_gradient(seen: "_Seen", target: Tensor, spec: LossSpec) -> Tensor:
    """∂L/∂output of the rows of `seen`."""
    targets = target.reshape(-1)[:: seen.stride] if spec.loss.of_classes else _sample(target, seen.stride)
    scale = 1 / max(spec.terms(target), 1) if spec.reduction == "mean" else 1.0
    with plain_arithmetic(target.device.type):
        return spec.output_gradient(seen.forward.output, targets).mul_(scale)


def _sample(tensor: Tensor, stride: int) -> Tensor:
    """Every `stride`-th row of (…, D)."""
    matrix = tensor.detach()
    if matrix.dim() != 2:
        matrix = matrix.flatten(0, -2) if matrix.dim() > 1 else matrix.unsqueeze(0)
    return matrix if stride == 1 else matrix[::stride]


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether this tensor belongs to an ordinary training step: no transform, capture or batched backward pass."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_meta)
        and not (transforms_active() or is_legacy_batched(tensor))
        and getattr(forward_ad, "_current_level", 0) < 0
        and not is_tracing()
        and layers_are_torchs()
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


class _Seen(NamedTuple):
    """A forward pass that is to be measured."""

    step: int
    layers: list[Layer]
    """The layers, with the parameters that it used."""
    forward: ForwardPass
    """The same pass, repeated for every `stride`-th row."""
    stride: int


class _Awaited:
    """A hook on the autograd node of the output, which measures when the first gradient arrives."""

    __slots__ = ("_monitor", "_number", "_seen")

    def __init__(self, monitor: GradientFlowMonitor, seen: _Seen, number: int) -> None:
        self._monitor, self._number = monitor, number
        self._seen: _Seen | None = seen

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Runs before the node's backward pass. A second pass through the same graph is not another step."""
        seen, gradient = self._seen, gradients[self._number]
        if seen is not None and gradient is not None and _is_ordinary(gradient):
            self._seen = None
            with _no_functions(), _no_dispatch():
                self._monitor._measure(seen, _sample(gradient, seen.stride))


class _Record:
    """One measurement, kept as tensors until `flow` is read: converting them at once would delay training."""

    def __init__(self, seen: _Seen, passes: Passes) -> None:
        self._step, self._rows, self._sums = seen.step, len(seen.forward.rows), passes.sums
        self._outlines = [outline(layer) for layer in seen.layers]
        self._before: Tensor | None = passes.weights
        # Of a computed weight keep the detached copy: the weight itself would keep the graph that computed it.
        self._weights = [
            layer.weight if layer.weight.is_leaf else kept
            for layer, kept in zip(seen.layers, seen.forward.weights, strict=True)
        ]
        self._version = _version(self._weights)
        self._owners: list[dict[str, Any]] | None = None  # the `_parameters` of the modules with the weights
        self._update: Tensor | None = None  # ‖ΔΩ_k‖ (K,)
        self._kept = [False] * len(self._weights)  # whether there was a weight to compare with
        self._flow: GradientFlow | None = None

    def find_update(self, model: nn.Module | None = None) -> bool:
        """Whether the weights have changed since they were measured. If so, measures the change.

        model: compares the weights that the model has now, which may be other tensors; None: the measured tensors.
        """
        weights: list[Any] = self._weights if model is None else self._weights_of(model)
        if (before := self._before) is None or (model is not None and all(map(operator.is_, weights, self._weights))):
            return False
        kept = [
            type(weight) in PLAIN and weight.shape == (each.d_out, each.d_in) and weight.device == before.device
            for weight, each in zip(weights, self._outlines, strict=True)
        ]
        if not all(kept):  # a weight that cannot be compared counts as unchanged
            pieces = torch.split(before, [each.d_out * each.d_in for each in self._outlines])
            weights = [
                weight if there else old.view(each.d_out, each.d_in)
                for weight, there, old, each in zip(weights, kept, pieces, self._outlines, strict=True)
            ]
        changes = weight_changes(weights, before)
        # A write that changed no number is a step as well, one that rounding has cancelled.
        written = model is None and _version(self._weights) != self._version
        if not (written or changes.any()):
            return False
        self._update, self._kept, self._flow = changes, kept, None
        return True

    def _weights_of(self, model: nn.Module) -> list[Any]:
        """What the model has in the places of the measured weights."""
        if self._owners is None:
            modules = dict(model.named_modules())
            self._owners = [getattr(modules.get(each.name), "_parameters", {}) for each in self._outlines]
        return [owner.get("weight") for owner in self._owners]

    def forget_weights(self) -> None:
        """Releases the copy of the weights and the parameters."""
        self._before, self._weights, self._owners = None, [], None

    @property
    def flow(self) -> GradientFlow:
        """The measurement as a `GradientFlow`."""
        if self._flow is None:
            ratios: list[float | None] = [None] * len(self._outlines)
            if self._update is not None:
                sizes = (self._update.to(self._sums.dtype) / self._sums[6].sqrt()).tolist()
                ratios = [size if there else None for size, there in zip(sizes, self._kept, strict=True)]
            self._flow = GradientFlow(describe(self._outlines, self._rows, self._sums, ratios), self._step)
        return self._flow


def _version(weights: Sequence[Tensor]) -> int:
    """A number that grows when a weight is changed in place; torch does not count changes through ``.data``."""
    return sum([0 if weight.is_inference() else weight._version for weight in weights])


def _write(flow: GradientFlow, writer: Any, prefix: str) -> None:
    writer.add_scalar(f"{prefix}/gradient_ratio", flow.gradient_ratio, flow.step)
    for layer in flow.layers:
        for quantity in ("f", "dl_df", "dead", "always_on", "update_ratio"):
            if (value := getattr(layer, quantity)) is not None:
                writer.add_scalar(f"{prefix}/{quantity}/{layer.name or 'model'}", value, flow.step)


class _Watcher:
    """Receives a model's reports for a monitor. The watcher of a copied or unpickled model has no monitor."""

    def __init__(self, monitor: GradientFlowMonitor | None = None) -> None:
        self._monitor: Callable[[], GradientFlowMonitor | None] = weakref.ref(monitor) if monitor else _nothing
        self.release: Callable[[], None] = _nothing

    def watch(self, model: nn.Module) -> None:
        """Receives the reports of a model until `release`; `unfuse` calls it for the plain model that it makes."""
        if isinstance(model, FusedForward):
            self.release = model._watch(self)
        else:  # run before other hooks, which may change the output
            self.release = model.register_forward_hook(self.hook, with_kwargs=True, prepend=True).remove

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward hook of a plain model."""
        if not torch.compiler.is_compiling():
            self.after_forward(args[0] if args else kwargs["input"], output)

    def after_forward(self, input: Tensor, output: Any) -> None:
        """Called after a forward pass: hooks its output if its backward pass is to be measured."""
        monitor = self._monitor()
        if monitor is None or not (isinstance(output, Tensor) and output.requires_grad) or transforms_active():
            return
        if monitor._count() and _is_ordinary(output):
            with _no_functions(), _no_dispatch():
                if (seen := monitor._see(input)) is not None:
                    cast(Any, output.grad_fn).register_prehook(_Awaited(monitor, seen, output.output_nr))

    def after_loss(self, input: Tensor, target: Tensor, spec: LossSpec) -> None:
        """Called after a pass that computed loss and gradients in one call."""
        monitor = self._monitor()
        if monitor is not None and monitor._count() and _is_ordinary(input):
            with _no_functions(), _no_dispatch():
                if (seen := monitor._see(input)) is not None:
                    monitor._measure(seen, _loss_gradient(seen, target, spec))

    def __reduce__(self) -> Any:
        return (_Watcher, ())


def _nothing() -> None:
    return None
