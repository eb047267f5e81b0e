"""`GradientFlowMonitor`: `gradient_flow` for a training loop, every so many steps, without changing what it computes.

It is told of the model's forward passes (by a fused network itself, by one hook on a plain one). When one is to be
measured, it takes the network that has just run as it is now, repeats its forward pass on a part of the rows, and asks
the output for the gradient that training sends back; from that it computes the backward pass. So a fused network, which
calls no layer, is seen like a plain one, nothing of the graph is kept, and the model may change between forward and
backward. `MLP.loss` and `MLP.loss_backward` have no output to ask; they tell what they have computed.

Left to others: the passes and the diagnosis (gradient_flow.py), figures (flow_plot.py).
"""

import contextlib
import operator
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from torch_manualbp._arithmetic import plain_arithmetic
from torch_manualbp._losses import LossSpec
from torch_manualbp._route import PLAIN, is_legacy_batched, is_tracing, layers_are_torchs, transforms_active
from torch_manualbp.inspection._layers import Layer, layers_of
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

# Contexts in which no mode and no subclass of Tensor sees what the monitor computes.
_no_functions = getattr(torch._C, "DisableTorchFunction", contextlib.nullcontext)
_no_dispatch = getattr(torch._C, "_DisableTorchDispatch", contextlib.nullcontext)


class GradientFlowMonitor:
    """Measures the gradient flow of a network while it trains: ``with GradientFlowMonitor(model) as monitor: …``.

    Every `every`-th forward pass that records gradients is measured when its backward pass arrives; the first one is,
    too. Each measurement is a `GradientFlow` in ``history``, with the ``step`` (forward passes counted from 1) and, as
    ``update_ratio``, the relative size ‖ΔΩ_k‖ / ‖Ω_k‖ of the parameter step that followed: how far the weights have
    moved, however that was done, when the next forward pass has others. ∂ℓ/∂f_k is here the gradient of the loss as the
    training loop wrote it: a mean over the batch makes all of them smaller by 1/B, no ratio changes.

    What is measured is the network that the forward pass computed. Layers and weights may be exchanged while the
    monitor is active, and ``torch.func.functional_call`` may lend it others. A network that can't be described any more
    is refused in the forward pass that was to be measured, with the error that the constructor raises.

    Training computes the same numbers bit for bit with and without it: no parameter, gradient or random number is
    touched, and no part of the graph is kept. What is no ordinary training step is not measured: runs under
    ``torch.compile``, ``torch.func`` or forward-mode AD, tensors without data, backward passes that are batched.

    Args:
        model: `MLP`, `LinearReLU`, or an ``nn.Sequential`` of Linear and ReLU layers, fused or not; it may be a part of
            a larger model (``GradientFlowMonitor(model.head)``).
        every: how many forward passes there are from one measurement to the next.
        rows: how many rows of the batch are measured at most, evenly spaced. More cost more time, and tell better
            whether a unit is dead. Measuring costs about as much as training on so many rows, and at least 0.2 ms.

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
        self._pending: _Record | None = None  # the last one, until a step has changed the weights
        # Of the last one, used again: to map fresh pages took as long as both passes.
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
        """Of the last measurement: see `GradientFlow.diagnosis`. Empty before the first one."""
        return self._history[-1].flow.diagnosis if self._history else []

    def write_to(self, writer: Any, prefix: str = "gradient_flow") -> "Self":
        """Sends each measurement to a TensorBoard ``SummaryWriter``, or anything that has its ``add_scalar``.

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
        lines = [f"GradientFlowMonitor: {self._steps} steps seen, {len(self._history)} measured"]
        before: list[str] | None = None
        for flow in self.history:  # a line where the diagnosis changes
            if flow.diagnosis != before:
                findings = "; ".join(f"{word}: {text}" for word, text in flow.explanation.items())
                lines.append(f"from step {flow.step}: {findings or 'nothing found'}")
                before = flow.diagnosis
        return "\n".join(lines)

    # ---------------------------------------------------------------------------------- what the watcher reports

    def _count(self) -> bool:
        """One more step: whether there is something to do, `_see`."""
        self._steps += 1
        return self._pending is not None or self._steps >= self._next

    def _see(self, input: Tensor) -> "_Seen | None":
        """Looks for the step that completes the last measurement, and returns what there is to measure of this pass."""
        self._see_update(self._model)
        if self._steps < self._next or (layers := self._network()) is None:
            return None
        self._next = self._steps + self._every
        if (stride := -(-input.shape[:-1].numel() // self._rows)) == 0:
            return None
        dtype = layers[0].weight.dtype
        dtype = torch.float32 if dtype is torch.float16 or dtype is torch.bfloat16 else dtype
        rows = _sample(input, stride).to(dtype, copy=True)  # the input's memory may be filled again
        memory, self._memory = self._memory, None  # another pass may come before this one is measured
        return _Seen(self._steps, layers, run_forward(layers, rows, memory), stride)

    def _network(self) -> list[Layer] | None:
        """The layers with the parameters that they have now; None if those are stand-ins that some transform uses."""
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
        """Completes the last measurement by the step that followed, once one has changed the weights.

        model: in its forward pass; None if there will be no other occasion.
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
    """∂L/∂output of the rows that were seen."""
    is_class = spec.name == "cross_entropy"
    targets = target.reshape(-1)[:: seen.stride] if is_class else _sample(target, seen.stride)
    terms = int((target != spec.ignore_index).sum()) if is_class else target.numel()
    scale = 1 / max(terms, 1) if spec.reduction == "mean" else 1.0
    with plain_arithmetic(target.device.type):
        return spec.output_gradient(seen.forward.output, targets).mul_(scale)


def _sample(tensor: Tensor, stride: int) -> Tensor:
    """Rows of (…, D), evenly spaced."""
    matrix = tensor.detach()
    if matrix.dim() != 2:
        matrix = matrix.flatten(0, -2) if matrix.dim() > 1 else matrix.unsqueeze(0)
    return matrix if stride == 1 else matrix[::stride]


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether this tensor belongs to a plain training step: to no transform, capture or batched backward pass."""
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
    """With the parameters that it used."""
    forward: ForwardPass
    """Of some of its rows, evenly spaced."""
    stride: int
    """From one of them to the next."""


class _Awaited:
    """A hook on the node that made the output: measures when the first gradient comes back."""

    __slots__ = ("_monitor", "_number", "_seen")

    def __init__(self, monitor: GradientFlowMonitor, seen: _Seen, number: int) -> None:
        self._monitor, self._number = monitor, number
        self._seen: _Seen | None = seen

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Before the node's backward pass. A second one through the same graph is no other step."""
        seen, gradient = self._seen, gradients[self._number]
        if seen is not None and gradient is not None and _is_ordinary(gradient):
            self._seen = None
            with _no_functions(), _no_dispatch():
                self._monitor._measure(seen, _sample(gradient, seen.stride))


class _Record:
    """One measurement: tensors at first, since to make a `GradientFlow` of them would delay training."""

    def __init__(self, seen: _Seen, passes: Passes) -> None:
        self._step, self._rows, self._sums = seen.step, len(seen.forward.rows), passes.sums
        self._outlines = [outline(layer) for layer in seen.layers]
        self._before: Tensor | None = passes.weights
        # Of a weight that was computed, not the graph that computed it.
        self._weights = [
            layer.weight if layer.weight.is_leaf else kept
            for layer, kept in zip(seen.layers, seen.forward.weights, strict=True)
        ]
        self._version = _version(self._weights)
        self._owners: list[dict[str, Any]] | None = None  # where the model keeps its weights
        self._update: Tensor | None = None  # ‖ΔΩ_k‖ (K,)
        self._kept = [False] * len(self._weights)  # whether there was a weight to compare with
        self._flow: GradientFlow | None = None

    def find_update(self, model: nn.Module | None = None) -> bool:
        """Whether a step was taken: the weights are not what they were when they were measured. Measures it, if so.

        model: looks at the weights that it has now, which may be other tensors.
        """
        weights: list[Any] = self._weights if model is None else self._weights_of(model)
        if (before := self._before) is None or (model is not None and all(map(operator.is_, weights, self._weights))):
            return False
        kept = [
            type(weight) in PLAIN and weight.shape == (each.d_out, each.d_in) and weight.device == before.device
            for weight, each in zip(weights, self._outlines, strict=True)
        ]
        if not all(kept):  # nothing to compare with, so no change
            pieces = torch.split(before, [each.d_out * each.d_in for each in self._outlines])
            weights = [
                weight if there else old.view(each.d_out, each.d_in)
                for weight, there, old, each in zip(weights, kept, pieces, self._outlines, strict=True)
            ]
        changes = weight_changes(weights, before)
        # A write that left every number as it was is a step, too: one that was lost to rounding.
        written = model is None and _version(self._weights) != self._version
        if not (written or changes.any()):
            return False
        self._update, self._kept, self._flow = changes, kept, None
        return True

    def _weights_of(self, model: nn.Module) -> list[Any]:
        """What stands where the weights stood."""
        if self._owners is None:
            modules = dict(model.named_modules())
            self._owners = [getattr(modules.get(each.name), "_parameters", {}) for each in self._outlines]
        return [owner.get("weight") for owner in self._owners]

    def forget_weights(self) -> None:
        """Gives back the memory of the copy, and the parameters."""
        self._before, self._weights, self._owners = None, [], None

    @property
    def flow(self) -> GradientFlow:
        """The measurement in its final form."""
        if self._flow is None:
            ratios: list[float | None] = [None] * len(self._outlines)
            if self._update is not None:
                sizes = (self._update.to(self._sums.dtype) / self._sums[6].sqrt()).tolist()
                ratios = [size if there else None for size, there in zip(sizes, self._kept, strict=True)]
            self._flow = GradientFlow(describe(self._outlines, self._rows, self._sums, ratios), self._step)
        return self._flow


def _version(weights: Sequence[Tensor]) -> int:
    """Grows when a weight is changed in place, as torch counts it: not through ``.data``."""
    return sum([0 if weight.is_inference() else weight._version for weight in weights])


def _write(flow: GradientFlow, writer: Any, prefix: str) -> None:
    writer.add_scalar(f"{prefix}/gradient_ratio", flow.gradient_ratio, flow.step)
    for layer in flow.layers:
        for quantity in ("f", "dl_df", "dead", "always_on", "update_ratio"):
            if (value := getattr(layer, quantity)) is not None:
                writer.add_scalar(f"{prefix}/{quantity}/{layer.name or 'model'}", value, flow.step)


class _Watcher:
    """What a model tells a monitor. A copied or unpickled model tells nobody."""

    def __init__(self, monitor: GradientFlowMonitor | None = None) -> None:
        self._monitor: Callable[[], GradientFlowMonitor | None] = weakref.ref(monitor) if monitor else _nobody
        self.release: Callable[[], None] = _nobody

    def watch(self, model: nn.Module) -> None:
        """Listens to a model, until `release`; again after `unfuse` has made it a plain one."""
        if isinstance(model, FusedForward):
            self.release = model._watch(self)
        else:  # before other hooks, which may change the output
            self.release = model.register_forward_hook(self.hook, with_kwargs=True, prepend=True).remove

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward hook of a plain model."""
        if not torch.compiler.is_compiling():
            self.after_forward(args[0] if args else kwargs["input"], output)

    def after_forward(self, input: Tensor, output: Any) -> None:
        """After a forward pass: whose backward pass is to be measured?"""
        monitor = self._monitor()
        if monitor is None or not (isinstance(output, Tensor) and output.requires_grad) or transforms_active():
            return
        if monitor._count() and _is_ordinary(output):
            with _no_functions(), _no_dispatch():
                if (seen := monitor._see(input)) is not None:
                    cast(Any, output.grad_fn).register_prehook(_Awaited(monitor, seen, output.output_nr))

    def after_loss(self, input: Tensor, target: Tensor, spec: LossSpec) -> None:
        """After a pass that computed loss and gradients at once."""
        monitor = self._monitor()
        if monitor is not None and monitor._count() and _is_ordinary(input):
            with _no_functions(), _no_dispatch():
                if (seen := monitor._see(input)) is not None:
                    monitor._measure(seen, _loss_gradient(seen, target, spec))

    def __reduce__(self) -> Any:
        return (_Watcher, ())


def _nobody() -> None:
    return None
