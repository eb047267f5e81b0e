"""`GradientFlowMonitor`: `gradient_flow` for a training loop, every so many steps, without changing what it computes.

It is told of the model's forward passes (by a fused network itself, by one hook on a plain one) and asks the output for
the gradient that training sends back. From the input, that gradient and the weights of this moment it computes both
passes again, on a part of the rows: so a fused network, which calls no layer, is seen like a plain one, and nothing of
the graph is kept. `MLP.loss` and `MLP.loss_backward` have no output to ask; they tell what they have computed.

Left to others: the passes and the diagnosis (gradient_flow.py), figures (flow_plot.py).
"""

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from torch_manualbp._function import plain_arithmetic
from torch_manualbp._losses import LossSpec
from torch_manualbp.inspection._layers import Layer, layers_of
from torch_manualbp.inspection.gradient_flow import GradientFlow, Passes, describe, run_passes, weight_changes
from torch_manualbp.modules import FusedForward

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from typing_extensions import Self


class GradientFlowMonitor:
    """Measures the gradient flow of a network while it trains: ``with GradientFlowMonitor(model) as monitor: …``.

    Every `every`-th forward pass that records gradients is measured when its backward pass arrives; the first one is,
    too. Each measurement is a `GradientFlow` in ``history``, with the ``step`` (forward passes counted from 1) and, as
    ``update_ratio``, the relative size ‖ΔΩ_k‖ / ‖Ω_k‖ of the parameter step that followed. ∂ℓ/∂f_k is here the gradient
    of the loss as the training loop wrote it: a mean over the batch makes all of them smaller by 1/B, no ratio changes.

    Training computes the same numbers bit for bit with and without it: no parameter, gradient or random number is
    touched, and no part of the graph is kept. Runs under ``torch.compile`` are not seen.

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
        self._layers = layers_of(model, "GradientFlowMonitor")
        self._history: list[_Record] = []
        self._model, self._every, self._rows = model, every, rows
        self._steps = 0
        self._pending: _Record | None = None  # the last one, until a step has changed the weights
        # Of the last one, used again: to map fresh pages took as long as both passes.
        self._memory: Passes | None = None
        self._memory_is_for: tuple[torch.dtype, int] | None = None
        self._writers: list[tuple[Any, str]] = []
        self._release: Callable[[], None] | None = None

    def __enter__(self) -> "Self":
        if self._release is not None:
            raise RuntimeError("GradientFlowMonitor: it is active already; use one monitor per `with`")
        self._layers = layers_of(self._model, "GradientFlowMonitor")
        watcher = _Watcher(self)
        if isinstance(self._model, FusedForward):
            self._release = self._model._watch(watcher)
        else:
            self._release = self._model.register_forward_hook(watcher.hook, with_kwargs=True).remove
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._release is not None:
            self._release()
        self._release = None
        self._see_update(last=True)
        self._memory = self._memory_is_for = None

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
        """One more step: whether it is to be measured."""
        if self._pending is not None:
            self._see_update()
        self._steps += 1
        return (self._steps - 1) % self._every == 0

    def _forward_done(self, input: Tensor, output: Tensor) -> None:
        stride = self._stride(input)
        awaited = _Awaited(self, self._steps, self._sample(input, stride), stride, output.output_nr)
        cast(Any, output.grad_fn).register_prehook(awaited)

    def _loss_done(self, input: Tensor, target: Tensor, spec: LossSpec) -> None:
        stride, is_class = self._stride(input), spec.name == "cross_entropy"
        targets = target.reshape(-1)[::stride] if is_class else self._sample(target, stride)
        terms = int((target != spec.ignore_index).sum()) if is_class else target.numel()
        scale = 1 / max(terms, 1) if spec.reduction == "mean" else 1.0
        self._measure(
            self._steps, self._sample(input, stride), lambda output: spec.output_gradient(output, targets).mul_(scale)
        )

    def _stride(self, input: Tensor) -> int:
        rows = input.shape[0] if input.dim() == 2 else input.shape[:-1].numel()
        return max(-(-rows // self._rows), 1)

    def _sample(self, tensor: Tensor, stride: int) -> Tensor:
        """Rows of (…, D), evenly spaced."""
        matrix = tensor.detach()
        if matrix.dim() != 2:
            matrix = matrix.flatten(0, -2) if matrix.dim() > 1 else matrix.unsqueeze(0)
        return matrix if stride == 1 else matrix[::stride]

    def _measure(self, step: int, rows: Tensor, output_gradient: Tensor | Callable[[Tensor], Tensor]) -> None:
        if rows.shape[0] == 0:
            return
        if self._pending is not None:
            self._see_update(last=True)
        dtype = self._layers[0].weight.dtype
        dtype = torch.float32 if dtype is torch.float16 or dtype is torch.bfloat16 else dtype
        memory = self._memory if self._memory_is_for == (dtype, rows.shape[0]) else None
        rows = rows if rows.dtype is dtype else rows.to(dtype)
        with plain_arithmetic(rows.device.type):
            passes = run_passes(self._layers, rows, output_gradient, memory)
        self._memory, self._memory_is_for = passes, (dtype, rows.shape[0])
        self._pending = _Record(step, self._layers, rows.shape[0], passes)
        self._history.append(self._pending)

    def _see_update(self, last: bool = False) -> None:
        """Completes the last measurement by the step that followed, once one has changed the weights."""
        if (record := self._pending) is None:
            return
        if record.weights_have_changed():
            record.measure_update()
        elif not last:
            return
        record.forget_weights()
        self._pending = None
        for writer, prefix in self._writers:
            _write(record.flow, writer, prefix)


class _Awaited:
    """A hook on the node that made the output: measures when the first gradient comes back."""

    __slots__ = ("_monitor", "_number", "_rows", "_step", "_stride")

    def __init__(self, monitor: GradientFlowMonitor, step: int, rows: Tensor, stride: int, number: int) -> None:
        self._monitor, self._step, self._stride, self._number = monitor, step, stride, number
        self._rows: Tensor | None = rows

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Before the node's backward pass. A second one through the same graph is no other step."""
        rows, gradient = self._rows, gradients[self._number]
        if rows is not None and gradient is not None:
            self._rows = None
            self._monitor._measure(self._step, rows, self._monitor._sample(gradient, self._stride))


class _Record:
    """One measurement: tensors at first, since to make a `GradientFlow` of them would delay training."""

    def __init__(self, step: int, layers: list[Layer], rows: int, passes: Passes) -> None:
        self._step, self._layers, self._rows, self._sums = step, layers, rows, passes.sums
        self._before: Tensor | None = passes.weights
        self._version = self._versions()
        self._update: Tensor | None = None  # ‖ΔΩ_k‖ (K,)
        self._flow: GradientFlow | None = None

    def _versions(self) -> int:  # torch counts changes in place
        return sum([layer.weight._version for layer in self._layers])

    def weights_have_changed(self) -> bool:
        """Since the measurement."""
        return self._versions() != self._version

    def measure_update(self) -> None:
        """‖ΔΩ_k‖ of the change."""
        assert self._before is not None
        self._update, self._flow = weight_changes(self._layers, self._before), None

    def forget_weights(self) -> None:
        """Gives back the memory of the copy."""
        self._before = None

    @property
    def flow(self) -> GradientFlow:
        """The measurement in its final form."""
        if self._flow is None:
            ratios: list[float | None] = [None] * len(self._layers)
            if self._update is not None:
                ratios = (self._update.to(self._sums.dtype) / self._sums[6].sqrt()).tolist()
            self._flow = GradientFlow(describe(self._layers, self._rows, self._sums, ratios), self._step)
        return self._flow


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

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward hook of a plain model."""
        if not torch.compiler.is_compiling():
            self.after_forward(args[0] if args else kwargs["input"], output)

    def after_forward(self, input: Tensor, output: Any) -> None:
        """After a forward pass: whose backward pass is to be measured?"""
        monitor = self._monitor()
        if monitor is not None and isinstance(output, Tensor) and output.requires_grad and monitor._count():
            monitor._forward_done(input, output)

    def after_loss(self, input: Tensor, target: Tensor, spec: LossSpec) -> None:
        """After a pass that computed loss and gradients at once."""
        if (monitor := self._monitor()) is not None and monitor._count():
            monitor._loss_done(input, target, spec)

    def __reduce__(self) -> Any:
        return (_Watcher, ())


def _nobody() -> None:
    return None
