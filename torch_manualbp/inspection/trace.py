"""`trace`: every quantity of the lecture's forward and backward pass of a network, from the kernels that train it.

Not here: the model's layers (../_layers.py), the loss (_loss.py), the comparison with autograd and finite differences
(_verify.py), tables (_table.py) and figures (trace_plot.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_manualbp import _ops, reference
from torch_manualbp._checks import Reduction, check_tensor, name_call
from torch_manualbp._layers import Layer, layers_of, runs_of
from torch_manualbp._ops import split_hidden
from torch_manualbp._route import KERNELS, route
from torch_manualbp.inspection import _table, _verify, trace_plot
from torch_manualbp.inspection._loss import LossFunction, TracedLoss

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """What a network's two passes compute, as `trace` returns it: a snapshot that later training does not change.

    K layers, B examples; layer k maps D_k to D_{k+1} features. Each tuple has the lecture's indices.

    Attributes:
        f: f_k = β_k + Ω_k h_k, shape (B, D_{k+1}), for k = 0 … K−1.
        h: h_0 (the input) and h_{k+1} = a[f_k], shape (B, D_k), for k = 0 … K−1; also h_K if the network ends with a
            ReLU. (h_{k+1} is f_k where two linear layers follow each other.)
        output: f_{K−1}, or h_K if the network ends with a ReLU; shape (B, D_K).
        target: the target.
        loss: L, a scalar.
        losses: ℓ_i, shape (B,), with Σ_i ℓ_i = L; None if a callable's scalar is no sum over the examples.
        dl_df: ∂L/∂f_k, shape (B, D_{k+1}). Row i is ∂ℓ_i/∂f_k, since f_k of example i reaches L through ℓ_i only.
        dl_dh: ∂L/∂h_k, with the rows ∂ℓ_i/∂h_k, shape (B, D_k), for each h_k; dl_dh[0] is the gradient of the input.
        dl_dbeta: ∂L/∂β_k, shape (D_{k+1},), summed over the batch; None where a layer has no bias.
        dl_domega: ∂L/∂Ω_k, shape (D_{k+1}, D_k), summed over the batch.
        layers: name, weight Ω_k, bias β_k and whether a ReLU follows, for each layer.
    """

    layers: tuple[Layer, ...]
    f: tuple[Tensor, ...]
    h: tuple[Tensor, ...]
    output: Tensor
    target: Any
    loss: Tensor
    losses: Tensor | None
    dl_df: tuple[Tensor, ...]
    dl_dh: tuple[Tensor, ...]
    dl_dbeta: tuple[Tensor | None, ...]
    dl_domega: tuple[Tensor, ...]
    traced_loss: TracedLoss

    def per_sample_dl_dbeta(self, k: int) -> Tensor:
        """∂ℓ_i/∂β_k = ∂ℓ_i/∂f_k, shape (B, D_{k+1}); their sum over i is ``dl_dbeta[k]``.

        Raises:
            ValueError: layer k has no bias.
            IndexError: there is no layer k.
        """
        if self.dl_dbeta[k] is None:
            raise ValueError(f"per_sample_dl_dbeta: layer {k} has no bias")
        return self.dl_df[k].clone()

    def per_sample_dl_domega(self, k: int) -> Tensor:
        """∂ℓ_i/∂Ω_k = ∂ℓ_i/∂f_k h_kᵀ, shape (B, D_{k+1}, D_k); their sum over i is ``dl_domega[k]``.

        Raises:
            IndexError: there is no layer k.
        """
        k = range(len(self.f))[k]  # h may have one item more than f: let −1 be the last layer in both
        return self.dl_df[k][:, :, None] * self.h[k][:, None, :]

    def verify(self, tolerance: float | None = None) -> _verify.Differences:
        """Compares every quantity with float64 autograd on plain torch ops and, in float64, with finite differences.

        A difference is relative to the largest sum of absolute values behind an element of the quantity, because an
        element whose terms nearly cancel keeps the rounding error of its terms. If a float32 pre-activation is within
        rounding of zero, autograd uses the trace's side of the ReLU. Finite differences are central, along one random
        direction per quantity, end to end through the loss. A quantity that cannot change without switching a ReLU,
        because a pre-activation is exactly zero, has no derivative to compare with; its difference is NaN.

        Args:
            tolerance: largest difference to autograd; default 1e-12 (float64), 1e-5 (float32), 0.01 (float16), 0.08
                (bfloat16). For finite differences it is 1e-5.

        Returns:
            A dict with the largest difference of each quantity, "f[0]", "dl_domega[2]", …; its ``float()`` is the
            largest of all, and it compares with numbers like that one. ``.finite_differences`` is a dict with the
            differences to finite differences.

        Raises:
            AssertionError: a difference is above the tolerance. The message names the quantities.

        Example:
            >>> from torch_manualbp import MLP
            >>> model = MLP([2, 3, 1], dtype=torch.float64)
            >>> x = torch.randn(4, 2, dtype=torch.float64)
            >>> y = torch.randn(4, 1, dtype=torch.float64)
            >>> trace(model, x, y).verify() <= 1e-12
            True
        """
        return _verify.verify(self, tolerance)

    def plot(self, kind: str | None = None, example: int = 0) -> "Figure":
        """Both passes as a figure, which a notebook shows, and ``savefig`` saves at the size of a slide.

        Args:
            kind: "network", a diagram with the values, weights and gradients of one example, for layers of at most 8
                units, with numbers up to 4; "maps", heat maps of every unit and example; "bars", the size of each
                quantity. By default the first that is readable: "network" for one example with numbers, else "maps",
                else "bars".
            example: the row of the batch that "network" shows.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: an unknown `kind`, or the network is too large for it.
            IndexError: there is no such example.
        """
        return trace_plot.draw_trace(self, kind, example)

    def to_dict(self) -> dict[str, Any]:
        """All quantities by name, as numbers in lists, for ``json.dumps``."""
        return {
            "layers": [
                {"name": layer.name, "weight": layer.weight.tolist(), "bias": _listed(layer.bias), "relu": layer.relu}
                for layer in self.layers
            ],
            "loss_function": self.traced_loss.name,
            "reduction": self.traced_loss.reduction,
            "target": _listed(self.target),
            "loss": self.loss.item(),
            **{
                name: _listed(getattr(self, name))
                for name in ("output", "losses", "f", "h", "dl_df", "dl_dh", "dl_dbeta", "dl_domega")
            },
        }

    def __str__(self) -> str:
        """The two passes as the lecture writes them."""
        return _table.text(self)

    def _repr_html_(self) -> str:
        return _table.html(self)

    def __repr__(self) -> str:
        groups = [(d, len(list(same))) for d, same in groupby([self.h[0].shape[1], *(f.shape[1] for f in self.f)])]
        widths = "–".join(f"{d}×{count}" if count > 1 else str(d) for d, count in groups)
        return _table.printable(
            f"Trace({widths}, batch {len(self.output)}, {str(self.output.dtype).removeprefix('torch.')}, "
            f"{self.traced_loss.name} = {self.loss.item():.6g})"
        )


def trace(
    model: nn.Module, input: Tensor, target: Any, loss: LossFunction = "mse", reduction: Reduction = "mean"
) -> Trace:
    """All intermediate quantities of one forward and one backward pass, computed by the kernels that train the model.

    The lecture's two passes: f_k = β_k + Ω_k h_k and h_{k+1} = a[f_k] up to the losses ℓ_i; then ∂ℓ_i/∂f_k and
    ∂ℓ_i/∂h_k = Ω_kᵀ ∂ℓ_i/∂f_k in reverse order; then ∂ℓ_i/∂β_k = ∂ℓ_i/∂f_k and ∂ℓ_i/∂Ω_k = ∂ℓ_i/∂f_k h_kᵀ. On a CPU
    they are the numbers of `MLP` in training, bit for bit. The model is not changed: no hooks, no ``.grad``.

    If the kernels do not train this network, for example because torch's functions have been replaced or under a
    `TorchFunctionMode`, the forward pass calls the functions as they are now, and autograd computes the gradients.

    L = Σ_i ℓ_i is the loss of the whole batch. With reduction "sum", which the lecture uses, ℓ_i = Σ_d (f_id − y_id)²
    for "mse"; with "mean", as elsewhere the default, each ℓ_i is divided by what ``torch.nn.functional`` divides by
    (B·D_K for "mse" and "bce_with_logits", the number of examples for "cross_entropy"). So L is torch's loss with this
    reduction, and Σ_i ℓ_i = L.

    Args:
        model: an `MLP`, a `LinearReLU`, an ``nn.Linear``, or an ``nn.Sequential`` (fused or not, nested or not) of
            these and ``nn.ReLU``.
        input: x, shape (B, D_0), or (D_0,) for one example; the dtype and device of the model.
        target: y. For "mse" and "bce_with_logits" it has the shape of the output; for "cross_entropy" it holds class
            indices (B,), or class probabilities (B, D_K). With an input (D_0,) it lacks the first dimension. For a
            callable, anything that it accepts.
        loss: "mse", "cross_entropy", "bce_with_logits", or a callable(output, target) that returns a value per
            example, shape (B,), or a scalar. A scalar is L, whatever `reduction` is; ``losses`` are then its values on
            each example alone if they add up to L, those values divided by B if L is their mean, and None otherwise.
            Gradients are always those of the callable on the whole batch.
        reduction: "mean" or "sum".

    Returns:
        A `Trace`, which describes its attributes, `verify` and `plot`. ``print`` shows it as a table.

    Raises:
        TypeError: `input` is not a tensor; `model` is not a module or holds a child that is not supported (the message
            names it); `loss` is neither a string nor a callable, or does not return a tensor.
        ValueError: an unknown `loss` or `reduction`; an input that does not have one or two dimensions; a target or a
            callable's value of the wrong shape; layers that share parameters.
        RuntimeError: shapes, dtypes or devices do not fit (the class that ``F.linear`` raises).

    Example:
        >>> from torch_manualbp import MLP
        >>> model = MLP([1, 1, 1])
        >>> for parameter, value in zip(model.parameters(), (2.0, 1.0, 3.0, -1.0)):
        ...     _ = nn.init.constant_(parameter, value)  # ω_0, β_0, ω_1, β_1
        >>> t = trace(model, torch.tensor([[0.5]]), torch.tensor([[4.0]]))
        >>> [t.f[0].item(), t.h[1].item(), t.f[1].item(), t.loss.item()]
        [2.0, 2.0, 5.0, 1.0]
        >>> [t.dl_df[1].item(), t.dl_dh[1].item()]  # 2(f_1 − y), …
        [2.0, 6.0]
        >>> [t.dl_df[0].item(), t.dl_domega[0].item()]
        [6.0, 3.0]
    """
    check_tensor("trace", "input", input)
    traced_loss = TracedLoss(loss, reduction)
    layers = layers_of(model, "trace")
    if input.dim() not in (1, 2):
        raise ValueError(f"trace: `input` must have shape (B, D_0) or (D_0,), got {tuple(input.shape)}")
    if input.dim() == 1:
        input, target = input[None], target[None] if isinstance(target, Tensor) else target
    with torch.inference_mode(False), torch.no_grad():
        layers = [
            layer._replace(weight=layer.weight.clone(), bias=None if layer.bias is None else layer.bias.clone())
            for layer in layers
        ]
        target = target.detach().clone() if isinstance(target, Tensor) else target
        x, weights = input.detach().clone(), [layer.weight for layer in layers]

        def output_gradient(output: Tensor) -> Tensor:
            traced_loss.check_target(output, target)
            return traced_loss.gradient(output, target)

        is_ours = route(x, weights) is KERNELS  # otherwise training runs on torch, too
        passes = (_by_kernels if is_ours else _by_autograd)(x, layers, output_gradient)
        output = passes.h[-1] if layers[-1].relu else passes.f[-1]
        total = traced_loss.total(output, target)
        losses = traced_loss.per_example(output, target, total)
    return Trace(
        layers=tuple(layers),
        output=output,
        target=target,
        loss=total,
        losses=losses,
        traced_loss=traced_loss,
        **{name: tuple(quantities) for name, quantities in passes._asdict().items()},
    )


class _Passes(NamedTuple):
    """Both passes, as in `Trace`."""

    f: list[Tensor]
    h: list[Tensor]
    dl_df: list[Tensor]
    dl_dh: list[Tensor]
    dl_dbeta: list[Tensor | None]
    dl_domega: list[Tensor]


def _by_autograd(input: Tensor, layers: Sequence[Layer], output_gradient: Callable[[Tensor], Tensor]) -> _Passes:
    """Both passes by torch: its functions as they are now, called as modules call them, and autograd."""
    h = [input.requires_grad_()]
    f: list[Tensor] = []
    omega = [layer.weight.detach().requires_grad_() for layer in layers]
    beta = [None if layer.bias is None else layer.bias.detach().requires_grad_() for layer in layers]
    with torch.enable_grad():
        for k, layer in enumerate(layers):
            f.append(F.linear(h[k], omega[k], beta[k]))
            h.append(F.relu(f[k]) if layer.relu else f[k])
    output = h[-1]
    h = h if layers[-1].relu else h[:-1]
    leaves = [*f, *h, *omega, *(b for b in beta if b is not None)]
    grads = iter(torch.autograd.grad(output, leaves, output_gradient(output.detach()), materialize_grads=True))
    df, dh, domega = ([next(grads) for _ in some] for some in (f, h, omega))
    dbeta = [None if b is None else next(grads) for b in beta]
    return _Passes([each.detach() for each in f], [each.detach() for each in h], df, dh, dbeta, domega)


def _by_kernels(input: Tensor, layers: Sequence[Layer], output_gradient: Callable[[Tensor], Tensor]) -> _Passes:
    """Both passes by the ops that train the network."""
    f, h = _forward(input, layers)
    dl_df, dl_dh = _backward(output_gradient(h[-1] if layers[-1].relu else f[-1]), h, layers)
    return _Passes(f, h, dl_df, dl_dh, *_parameter_gradients(dl_df, h, layers))


def _forward(input: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    """f_0 … f_{K−1}, and h_0 … h_{K−1} (and h_K if the network ends with a ReLU).

    Each run of layers is one call of the op that trains it, which stores h_k but not f_k. Each f_k comes from a call of
    the same op for that layer alone, which sums in the same order, so that h_{k+1} = a[f_k] holds bit for bit.
    """
    h: list[Tensor] = [input]
    f: list[Tensor] = []
    for run in runs_of(layers):
        first, weights, biases = len(f), [layer.weight for layer in run], [layer.bias for layer in run]
        output, inner = _run_forward(h[first], weights, biases, run[-1].relu)
        h += [*inner, output]
        for k, layer in enumerate(run, first):
            f.append(_run_forward(h[k], [layer.weight], [layer.bias], False)[0] if layer.relu else output)
    return f, h if layers[-1].relu else h[:-1]


def _run_forward(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], final_relu: bool
) -> tuple[Tensor, list[Tensor]]:
    """The output of a run, and its h_1 … h_{K−1}."""
    try:
        output, hidden = _ops.mlp(input, weights, biases, final_relu, True)
    except RuntimeError as error:
        name_call(error, "trace")
        raise
    return output, split_hidden(hidden, input.shape, weights)


def _backward(grad_output: Tensor, h: Sequence[Tensor], layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    """∂ℓ/∂f_k = I[f_k > 0] ⊙ ∂ℓ/∂h_{k+1} and ∂ℓ/∂h_k = Ω_kᵀ ∂ℓ/∂f_k, from the last layer to the first.

    The op that trains the network is called once per layer, which gives the same bits as one call for all layers.
    """
    dl_df: list[Tensor] = []
    dl_dh = [grad_output] if layers[-1].relu else []
    dh = grad_output
    for k, layer in reversed(list(enumerate(layers))):
        df = reference.relu_mask(h[k + 1], dh) if layer.relu else dh
        (dh,) = _ops.mlp_backward(df, h[k], [layer.weight], [], df.new_empty(0), None, [True, False, False])
        dl_df.insert(0, df)
        dl_dh.insert(0, dh)
    return dl_df, dl_dh


def _parameter_gradients(
    dl_df: Sequence[Tensor], h: Sequence[Tensor], layers: Sequence[Layer]
) -> tuple[list[Tensor | None], list[Tensor]]:
    """∂ℓ/∂β_k and ∂ℓ/∂Ω_k. One call per run of layers, as in training: how the op cuts the batch affects the bits."""
    dbeta: list[Tensor | None] = []
    domega: list[Tensor] = []
    for run in runs_of(layers):
        first, K = len(domega), len(run)
        inputs, df, weights = h[first : first + K], dl_df[first + K - 1], [layer.weight for layer in run]
        hidden = torch.cat([df.new_empty(0), *(h_k.reshape(-1) for h_k in inputs[1:])])
        grads = _ops.mlp_backward(df, inputs[0], weights, [], hidden, None, [False] + [True] * (2 * K))
        domega += grads[:K]
        dbeta += [None if layer.bias is None else db for layer, db in zip(run, grads[K:], strict=True)]
    return dbeta, domega


def _listed(value: Any) -> Any:
    """The value for JSON: tensors, also nested in tuples and lists, as lists; other objects as their ``repr``."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return value.tolist()
    return [_listed(item) for item in value] if isinstance(value, (tuple, list)) else repr(value)
