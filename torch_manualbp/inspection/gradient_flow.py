"""`gradient_flow`: why does this network not train? One call measures the signal and the gradient layer by layer.

The lecture ends by asking what happens when the chain rule's factors are multiplied and most of them are above 2, or
below 0.5. The theory of He et al. (2015) follows from the lecture's equations. Let the entries of Ω_k (D_{k+1}, D_k) be
independent with mean 0 and variance Var[Ω_k], the biases 0, and the distribution of f_{k−1} symmetric. Then

    f_k = β_k + Ω_k h_k,  h_k = a[f_{k−1}]        E[f_k²] = D_k Var[Ω_k] E[h_k²] = D_k Var[Ω_k] / 2 · E[f_{k−1}²]
    ∂ℓ/∂f_{k−1} = I[f_{k−1} > 0] ⊙ Ω_kᵀ ∂ℓ/∂f_k   E[(∂ℓ/∂f_{k−1})²] = D_{k+1} Var[Ω_k] / 2 · E[(∂ℓ/∂f_k)²]

because half of the f_{k−1} are positive. So in layer k the root mean square of f grows by √(D_k Var[Ω_k]/2) in the
forward pass, and that of ∂ℓ/∂f by √(D_{k+1} Var[Ω_k]/2) in the backward pass. Both factors are 1 in a network of
constant width whose weights have the variance 2/D; 30 layers with a factor of 0.5 leave 10⁻⁹.

Not here: training loops (monitor.py), figures (flow_plot.py), the model's layers (../_layers.py).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_manualbp import _ops, reference
from torch_manualbp._arithmetic import plain_arithmetic, widest_dtype
from torch_manualbp._checks import check_choice, check_tensor, name_call
from torch_manualbp._layers import Layer, layers_of
from torch_manualbp._losses import LOSSES, Loss, check_target, example_gradients
from torch_manualbp._route import layers_are_torchs
from torch_manualbp.inspection._table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Limits of the ratio of the first layer's gradient to the last layer's: beyond them, with one learning rate, one layer
# stands still or the other diverges. 30 layers of 256 units with He's variance stay within a factor of 10; PyTorch's
# own initialisation (a factor of 0.41 per layer) crosses the limit at 9 layers.
VANISHING = 1e-3
EXPLODING = 1e3


def dead_share_limit(units: int) -> float:
    """The share of dead units from which a layer is reported as dead: four standard deviations above one half.

    If all examples had the same h_k, as they nearly do deep in a random network, each unit of a healthy layer would be
    dead with probability ½.
    """
    return min(1.0, 0.5 + 2 / math.sqrt(max(units, 1)))


@dataclass(frozen=True)
class LayerFlow:
    """The measurements of layer k. "Size" is the root mean square over examples and units."""

    name: str
    """The module's name in ``model.named_modules()``."""
    d_in: int
    """D_k"""
    d_out: int
    """D_{k+1}"""
    f: float
    """Size of f_k = β_k + Ω_k h_k."""
    h: float
    """Size of h_k, the input of the layer."""
    dead: float | None
    """Share of units that ReLU blocks for every example (f_k ≤ 0), so they pass no gradient. None without a ReLU."""
    always_on: float | None
    """Share of units that ReLU passes for every example (f_k > 0), so they are linear. None without a ReLU."""
    dl_df: float
    """Size of ∂ℓ/∂f_k."""
    growth: float | None
    """Size of ∂ℓ/∂f_{k−1} / size of ∂ℓ/∂f_k, the growth of the gradient from layer k to layer k−1. None for k = 0."""
    growth_theory: float | None
    """√(D_{k+1} Var[Ω_k] / 2), the theoretical `growth`; without the ½ if no ReLU precedes the layer."""
    forward_growth: float | None
    """Size of f_k / size of f_{k−1}. None for k = 0."""
    forward_theory: float | None
    """√(D_k Var[Ω_k] / 2), the theoretical `forward_growth`; without the ½ if no ReLU precedes the layer."""
    update_ratio: float | None
    """From `gradient_flow`: ‖∂L/∂Ω_k‖ / ‖Ω_k‖ with L the mean of ℓ_i; times the learning rate it is the relative size
    of a step of plain SGD. From `GradientFlowMonitor`: ‖ΔΩ_k‖ / ‖Ω_k‖ of the step that was taken; None if no step was
    taken, or if the shape of the weight has changed."""


@dataclass(frozen=True)
class GradientFlow:
    """The layers of a network from the input to the output, as `gradient_flow` or a monitor measured them."""

    layers: tuple[LayerFlow, ...]
    step: int | None = None
    """The number of the forward pass in training, counted from 1, if a monitor measured it."""

    @property
    def gradient_ratio(self) -> float:
        """‖∂ℓ/∂f_0‖ / ‖∂ℓ/∂f_{K−1}‖: the part of the gradient that reaches the first layer.

        A ratio of norms, because the root mean square of a layer with few outputs is large: with He's variance 2/D_k
        this ratio stays near 1 for any widths. NaN if the gradient of the output is 0.
        """
        first, last = self.layers[0], self.layers[-1]
        top = last.dl_df * math.sqrt(last.d_out)
        return first.dl_df * math.sqrt(first.d_out) / top if top else math.nan

    @property
    def explanation(self) -> dict[str, str]:
        """Each finding of `diagnosis`, with a sentence that gives the numbers behind it."""
        return {**self._explain_gradient(), **self._explain_dead()}

    @property
    def diagnosis(self) -> list[str]:
        """The findings: any of "vanishing", "exploding" and "dead"; empty for a healthy network.

        - "vanishing": the gradient of the first layer is less than 10⁻³ of that of the last (`gradient_ratio`), and no
          layer is completely dead, which would explain it.
        - "exploding": it is more than 10³ times that of the last, or a measurement is NaN or infinite.
        - "dead": in some layer, at least ½ + 2/√D of the units are dead, 4 standard deviations above one half: 62.5 %
          of 256 units, 75 % of 64. If all examples are nearly equal, half of the units are dead by chance.
        """
        return list(self.explanation)

    def _explain_gradient(self) -> dict[str, str]:
        broken = [
            f"{quantity} of layer {k} ({layer.name or 'the model'})"
            for quantity in ("f", "dl_df")
            for k, layer in enumerate(self.layers)
            if not math.isfinite(getattr(layer, quantity))
        ]
        if broken:
            return {"exploding": f"NaN or Inf in {broken[0]}" + (f" and {len(broken) - 1} more" if broken[1:] else "")}
        ratio, steps = self.gradient_ratio, len(self.layers) - 1
        # A completely dead layer cuts off the gradient. One whose f underflowed to exactly 0 only looks dead.
        cut = any(layer.dead == 1 and layer.f > 0 for layer in self.layers)
        if not (ratio > EXPLODING or (ratio < VANISHING and not cut)):
            return {}
        text = f"the gradient of the first layer is {ratio:.1e} times that of the last"
        if ratio > 0:
            text += f", a factor of {ratio ** (1 / steps):.2g} per layer"
        predicted = [layer.growth_theory for layer in self.layers if layer.growth_theory]
        if predicted:
            # The theoretical ratio of norms: that of the root mean squares, times the root of the ratio of widths.
            norms = math.prod(predicted) * math.sqrt(self.layers[0].d_out / self.layers[-1].d_out)
            text += f"; theory predicts {norms ** (1 / steps):.2g} from the weights' variances, and 2/D would keep it"
        return {"exploding" if ratio > EXPLODING else "vanishing": text}

    def _explain_dead(self) -> dict[str, str]:
        found = [
            (k, layer)
            for k, layer in enumerate(self.layers)
            if layer.dead is not None and layer.d_out and layer.dead >= dead_share_limit(layer.d_out)
        ]
        if not found:
            return {}
        k, worst = max(found, key=lambda item: item[1].dead or 0.0)
        text = f"{worst.dead:.0%} of the units of layer {k} ({worst.name or 'the model'}) are off for every example"
        others = f", and too many in {len(found) - 1} more layers" if len(found) > 1 else ""
        return {"dead": text + others}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON or a table: step, diagnosis, explanation, gradient_ratio, layers."""
        return {
            "step": self.step,
            "diagnosis": self.diagnosis,
            "explanation": self.explanation,
            "gradient_ratio": self.gradient_ratio,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def plot(self) -> "Figure":
        """Sizes of f_k and ∂ℓ/∂f_k, growth factors beside theory, and shares of dead and always-on units, by layer.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from torch_manualbp.inspection.flow_plot import plot_flow

        return plot_flow(self)

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        header = (
            "k", "layer", "D_k → D_k+1", "|f_k|", "|h_k|", "dead", "always on", "|∂ℓ/∂f_k|", "growth", "theory",
            "forward", "theory", "update/weight",
        )  # fmt: skip
        rows = [
            (
                str(k), layer.name, f"{layer.d_in} → {layer.d_out}", _size(layer.f), _size(layer.h),
                _share(layer.dead), _share(layer.always_on), _size(layer.dl_df), _factor(layer.growth),
                _factor(layer.growth_theory), _factor(layer.forward_growth), _factor(layer.forward_theory),
                _size(layer.update_ratio),
            )
            for k, layer in enumerate(self.layers)
        ]  # fmt: skip
        title = "Gradient flow" + (f" at step {self.step}" if self.step is not None else "")
        findings = [f"{word}: {text}" for word, text in self.explanation.items()] or ["nothing found"]
        title += " (|·| is the root mean square over examples and units)"
        return Table(title, header, rows, ">" * len(header), findings)


def gradient_flow(model: nn.Module, input: Tensor, target: Tensor, loss: Loss = "mse") -> GradientFlow:
    """Measures how the signal f_k and the gradient ∂ℓ/∂f_k grow or shrink from layer to layer, and diagnoses problems.

    The growth factor of layer k is the root mean square of ∂ℓ/∂f_{k−1} divided by that of ∂ℓ/∂f_k, over all examples
    and units: one factor of the lecture's chain rule. As ∂ℓ/∂f_{k−1} = I[f_{k−1} > 0] ⊙ Ω_kᵀ ∂ℓ/∂f_k sums D_{k+1}
    terms and half of the f_{k−1} are positive, theory predicts √(D_{k+1} Var[Ω_k] / 2) (He et al., 2015). In the
    forward pass f_k sums D_k terms: the root mean square of f_k, divided by that of f_{k−1}, is √(D_k Var[Ω_k] / 2).
    The theory assumes that ∂ℓ/∂f_k is independent of Ω_k and f_{k−1}. This is false just below a loss whose gradient
    grows with the output ("mse" of large outputs): the last few layers measure up to 1.8 times the prediction.

    See `LayerFlow` for each number, and `GradientFlow.diagnosis` for the findings and their thresholds.

    The computation is in float64 whatever the dtype of the model, so that a network that overflows can be measured too.
    It sets no hooks, leaves every ``.grad`` alone, and draws no random numbers.

    Args:
        model: `MLP`, `LinearReLU`, or an ``nn.Sequential`` of Linear and ReLU layers, fused or not.
        input: h_0 (…, D_0). More examples make the shares of dead and always-on units more certain.
        target: (…, D_K), or (B,) class indices for "cross_entropy".
        loss: ℓ_i, as in `per_sample_gradients`: "mse", "cross_entropy", "bce_with_logits", or a function of one
            example's output and target.

    Returns:
        A `GradientFlow`, to be printed; ``.layers``, ``.diagnosis``, ``.explanation``, ``.plot()``, ``.to_dict()``.

    Raises:
        TypeError: `model` has other modules, an argument is not a tensor, or torch's linear or ReLU was replaced.
        ValueError: unknown `loss`, an `input` or `target` that does not fit, no examples, or layers that share a
            parameter.

    Example:
        >>> from torch_manualbp import MLP
        >>> _ = torch.manual_seed(0)
        >>> model = MLP([64] * 31)
        >>> r = gradient_flow(model, torch.randn(100, 64), torch.randn(100, 64))
        >>> r.diagnosis  # PyTorch's initialisation, 30 layers: √(D · Var[Ω]/2) = √(1/6)
        ['vanishing']
        >>> round(r.layers[1].growth_theory, 2)
        0.41
        >>> for layer in model[::2]:
        ...     _ = nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        >>> gradient_flow(model, torch.randn(100, 64), torch.randn(100, 64)).diagnosis
        []
    """
    layers = layers_of(model, "gradient_flow")
    if not layers_are_torchs():
        raise TypeError(
            "gradient_flow: torch's linear or ReLU is replaced, or a TorchFunctionMode may change it: "
            "these would not be the numbers of the network that runs"
        )
    check_tensor("gradient_flow", "input", input)
    check_tensor("gradient_flow", "target", target)
    if not callable(loss):
        check_choice("gradient_flow", "loss", loss, LOSSES)
    rows = as_rows("gradient_flow", input, layers)
    target = target.flatten(0, input.dim() - 2) if target.dim() >= input.dim() - 1 else target
    check_target("gradient_flow", loss, target, len(rows), layers[-1].weight.shape[0])
    if target.is_floating_point():
        target = target.to(widest_dtype(input.device))
    with plain_arithmetic(input.device.type):
        rows = rows.to(widest_dtype(input.device))
        try:
            forward = run_forward(layers, rows)
        except RuntimeError as error:
            name_call(error, "gradient_flow")
            raise
        passes = run_backward(forward, example_gradients(loss, forward.output, target))
        ratios = _gradient_ratios(passes, layers, rows)
        return GradientFlow(describe([outline(layer) for layer in layers], len(rows), passes.sums, ratios))


def as_rows(op: str, input: Tensor, layers: Sequence[Layer]) -> Tensor:
    """The examples of an input (…, D_0) as rows (B, D_0)."""
    d_in = layers[0].weight.shape[1]
    if input.dim() < 2 or input.shape[-1] != d_in or input.shape[:-1].numel() == 0:
        raise ValueError(f"{op}: `input` must have shape (…, {d_in}) and hold examples, got {tuple(input.shape)}")
    return input.detach().flatten(0, -2)


class ForwardPass(NamedTuple):
    """The forward pass over some rows: what the backward pass needs."""

    rows: Tensor
    weights: list[Tensor]
    """Ω_k in the dtype of `rows`, kept here because the model may be given other weights."""
    relus: list[bool]
    output: Tensor
    """(rows, D_K)"""
    f: Tensor
    """All f_k (rows, D_{k+1}), flat."""
    memory: tuple[Tensor, Tensor] | None
    """Buffers for all ∂ℓ/∂f_k and for copies of all Ω_k, which the kernels fill; None on devices other than CPUs."""


class Passes(NamedTuple):
    """Both passes over some rows, and sums over these rows."""

    sums: Tensor
    """(7, K), for each layer: sums of squares of f_k, h_k and ∂ℓ/∂f_k, numbers of dead and of always-on units, sum and
    sum of squares of Ω_k."""
    f: Tensor
    """All f_k (rows, D_{k+1}), flat."""
    df: Tensor
    """All ∂ℓ/∂f_k (rows, D_{k+1}), flat."""
    weights: Tensor
    """A copy of all Ω_k, flat."""


def run_forward(layers: Sequence[Layer], rows: Tensor, memory: Passes | None = None) -> ForwardPass:
    """Runs the forward pass in the dtype of `rows`.

    The kernels write into the tensors of `memory`, an earlier result, if their sizes fit.
    """
    dtype = rows.dtype
    weights = [_as(dtype, layer.weight.detach()) for layer in layers]
    biases = [None if layer.bias is None else _as(dtype, layer.bias) for layer in layers]
    relus = [layer.relu for layer in layers]
    if rows.device.type != "cpu":
        with plain_arithmetic(rows.device.type):
            return ForwardPass(rows, weights, relus, *_compose_forward(rows, weights, biases, relus), None)
    units, size = len(rows) * sum([omega.shape[0] for omega in weights]), sum([omega.numel() for omega in weights])
    if memory is None or (memory.f.dtype, len(memory.f), len(memory.weights)) != (dtype, units, size):
        f, df, copies = rows.new_empty(units), rows.new_empty(units), rows.new_empty(size)
    else:
        _, f, df, copies = memory
    output = _ops.flow_forward(rows, weights, biases, relus, f, df)  # `df` holds the h_k until the backward pass
    return ForwardPass(rows, weights, relus, output, f, (df, copies))


def run_backward(forward: ForwardPass, gradient: Tensor) -> Passes:
    """Runs the backward pass from ∂ℓ/∂output (rows, D_K), and computes the sums."""
    rows, weights, relus, _, f, memory = forward
    gradient = _as(rows.dtype, gradient)
    if memory is None:
        with plain_arithmetic(rows.device.type):
            return _compose_backward(rows, weights, relus, f, gradient)
    no_biases = [None] * len(weights)  # the backward pass reads none
    return Passes(_ops.flow_backward(gradient, rows, weights, no_biases, relus, f, True, *memory), f, *memory)


def _compose_forward(
    rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], relus: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """The output and all f_k in plain torch, on devices other than CPUs."""
    f, h = [], rows
    for omega, beta, relu in zip(weights, biases, relus, strict=True):
        f.append(F.linear(h, omega, beta))
        h = f[-1].relu() if relu else f[-1]
    return h, torch.cat([f_k.flatten() for f_k in f])


def _compose_backward(
    rows: Tensor, weights: Sequence[Tensor], relus: Sequence[bool], f_flat: Tensor, dh: Tensor
) -> Passes:
    """The backward pass and the sums in plain torch."""
    f = [f_k.view(len(rows), -1) for f_k in torch.split(f_flat, [len(rows) * omega.shape[0] for omega in weights])]
    h = [rows, *(f_k.relu() if relu else f_k for f_k, relu in zip(f, relus, strict=True))]
    df: list[Tensor] = []
    for omega, f_k, relu in zip(reversed(weights), reversed(f), reversed(relus), strict=True):
        df.insert(0, reference.relu_mask(f_k, dh) if relu else dh)
        dh = df[0] @ omega
    # Squares in float64: float32 would underflow or overflow. A unit with a NaN is neither always on nor dead.
    wide = widest_dtype(rows.device)
    sums = [
        torch.stack([
            *(tensor.to(wide).square().sum() for tensor in (f_k, h_k, df_k)),
            (f_k <= 0).all(0).sum().to(wide), (f_k > 0).all(0).sum().to(wide),
            omega.to(wide).sum(), omega.to(wide).square().sum(),
        ]) for f_k, h_k, df_k, omega in zip(f, h, df, weights, strict=False)
    ]  # fmt: skip
    return Passes(
        torch.stack(sums, 1), f_flat, *(torch.cat([each.flatten() for each in some]) for some in (df, weights))
    )


def weight_changes(weights: Sequence[Tensor], before: Tensor) -> Tensor:
    """‖ΔΩ_k‖ (K,): the change from `before`, the copy that `run_backward` made, to `weights`, of the same shapes."""
    weights = [_as(before.dtype, weight) for weight in weights]
    if before.device.type == "cpu":
        changes: Tensor = _ops.flow_update(weights, before)
        return changes
    pieces = torch.split(before, [omega.numel() for omega in weights])
    pairs = zip(weights, pieces, strict=True)
    return torch.stack([(omega.detach().flatten() - old).norm() for omega, old in pairs])


def _gradient_ratios(passes: Passes, layers: Sequence[Layer], rows: Tensor) -> list[float]:
    """‖∂L/∂Ω_k‖ / ‖Ω_k‖ with L the mean of ℓ_i."""
    sizes = [len(rows) * layer.weight.shape[0] for layer in layers]
    ratios, h = [], rows
    for f, df, layer in zip(torch.split(passes.f, sizes), torch.split(passes.df, sizes), layers, strict=True):
        gradient = df.view(len(rows), -1).t() @ h / len(rows)
        ratios.append(float(gradient.norm() / _as(h.dtype, layer.weight).norm()))
        h = f.view(len(rows), -1)
        h = h.relu() if layer.relu else h
    return ratios


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """The tensor in this dtype. The comparison is worth it: a `to` with nothing to do takes 1 µs."""
    return tensor if tensor.dtype is dtype else tensor.detach().to(dtype)


class Outline(NamedTuple):
    """A layer without its parameters."""

    name: str
    d_in: int
    d_out: int
    relu: bool


def outline(layer: Layer) -> Outline:
    """The `Outline` of a layer, for when its parameters may no longer exist."""
    d_out, d_in = layer.weight.shape
    return Outline(layer.name, d_in, d_out, layer.relu)


def describe(
    layers: Sequence[Outline], rows: int, sums: Tensor, ratios: Sequence[float | None]
) -> tuple[LayerFlow, ...]:
    """The `LayerFlow` of each layer, from the sums of `run_backward` over this many rows."""
    sums, widths = sums.cpu(), torch.tensor([(layer.d_out, layer.d_in) for layer in layers], device="cpu")
    sizes = sums[:3] / (rows * torch.stack([widths[:, 0], widths[:, 1], widths[:, 0]]))
    f, h, df = sizes.sqrt().tolist()
    dead, always_on = (sums[3:5] / widths[:, 0]).tolist()
    mean, mean_square = sums[5:7] / widths.prod(1)
    variances = (mean_square - mean.square()).clamp(min=0).tolist()
    found = []
    for k, (name, d_in, d_out, relu) in enumerate(layers):
        kept = 0.5 if k > 0 and layers[k - 1].relu else 1.0  # the share of f_{k−1} that ReLU passes in theory
        found.append(
            LayerFlow(
                name=name,
                d_in=d_in,
                d_out=d_out,
                f=f[k],
                h=h[k],
                dead=dead[k] if relu else None,
                always_on=always_on[k] if relu else None,
                dl_df=df[k],
                growth=_ratio(df[k - 1], df[k]) if k > 0 else None,
                growth_theory=math.sqrt(kept * d_out * variances[k]) if k > 0 else None,
                forward_growth=_ratio(f[k], f[k - 1]) if k > 0 else None,
                forward_theory=math.sqrt(kept * d_in * variances[k]) if k > 0 else None,
                update_ratio=ratios[k],
            )
        )
    return tuple(found)


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _size(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _factor(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
