"""Runs a case and compares it with float64 autograd on the plain composition, with each layer rounded to the dtype.

Every element has an error bound, which is propagated through the layers together with the values:
  integers   Every sum is exact, so the bound is 0 (a case with larger sums is undecidable).
  normals    The bound is the rounding of each sum, propagated through the layers. The oracle takes the active units
             from the library, and checks that rounding explains each difference (a ReLU flip).
NaN and infinities must be where the oracle has them. In all cases, one thread gives the same bits as several, and a
second backward pass the same bits as the first. In half precision, a float32 network of the same numbers gives these
bits under autocast, once its gradients are rounded.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fuzz.cases import Case, Layout, LossSpec, Tensors, assert_same, call, draw, make
from helpers import units
from torch_manualbp import _route

__all__ = ["Case", "Layout", "LossSpec", "UndecidableError", "check", "draw", "simpler", "torch"]

# Rounding of a sum of up to 3000 terms and of storing it: 32 units of 2^-53 or 2^-24. Half precision is rounded once,
# but from sums in float32: ours and the oracle's may fall on either side of a tie.
ROUNDING = {torch.float64: 2**-48, torch.float32: 2**-19, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class UndecidableError(Exception):
    """The result depends on the order of summation, because sums are too large."""


def check(case: Case) -> None:
    """Raises AssertionError if a result is wrong, UndecidableError if that cannot be decided."""
    _route._has_bfloat16_units = False  # our kernels, on every machine and for every network
    _route._OUTPUTS_LEFT_TO_TORCH = 0
    torch.set_num_threads(1)
    tensors = make(case)
    got = call(case, *tensors)
    for item, one in zip(_truth(case), got, strict=True):
        if one is not None:
            _compare(item, one)
    if case.threads > 1:
        torch.set_num_threads(case.threads)
        again = call(case, *tensors)
        torch.set_num_threads(1)
        for one, other in zip(got, again, strict=True):
            if one is not None:
                assert_same(other, one, f"{case.threads} threads")
    if case.dtype in (torch.bfloat16, torch.float16) and case.needs and not case.has_loss and not case.prior:
        with torch.autocast("cpu", case.dtype):
            output, *grads = call(case, tensors.net.map(torch.Tensor.float), tensors.end)
        for one, other in zip(got, [output, *grads], strict=True):
            if one is not None and other is not None:
                assert other.dtype is (case.dtype if other is output else torch.float32)
                assert_same(other.to(case.dtype), one, "under autocast")


class _Item(NamedTuple):
    """The expected value of one result."""

    name: str
    want: Tensor
    bound: Tensor


def _compare(item: _Item, got: Tensor) -> None:
    name, want, bound = item
    assert (got.dtype, got.shape) == (want.dtype, want.shape), f"{name}: {got.dtype} {tuple(got.shape)}"
    error = (got.double() - want.double()).abs()
    fine = (got == want) | (got.isnan() & want.isnan()) | (want.isfinite() & (error <= bound))
    if not fine.all():
        at = tuple(int(i) for i in (~fine).nonzero()[0])
        raise AssertionError(
            f"{name}: {int((~fine).sum())} of {fine.numel()} elements differ; at {at} got {got[at].item()}, "
            f"want {want[at].item()} within {bound[at].item():.1e}"
        )


def _truth(case: Case) -> list[_Item]:
    """The expected value of every result of a case."""
    exact = case.data == "integers"
    tensors = make(replace(case, exponent=0))
    on = (
        None
        if exact
        else [unit.flatten(0, -2) if unit.dim() > 1 else unit[None] for unit in units(tensors.net, case.final_relu)]
    )
    items, largest = _Oracle(case, tensors, on).items()
    if largest * 2.0**case.exponent >= torch.finfo(case.dtype).max / 4 or (exact and largest >= 2**24):
        raise UndecidableError
    return [_Item(name, _delivered(case, name, want), bound) for name, want, bound in items]


def _delivered(case: Case, name: str, want: Tensor) -> Tensor:
    """The final result, after powers of two, the incoming gradient of a loss, and the prior content of .grad."""
    value = want.double()
    if name == "output" or "weights" in name:
        value = value * 2.0**case.exponent
    if name != "output":
        value = value * case.scale + (case.prior and name != "gradient of input")
    return value.to(case.dtype)


class _Oracle:
    """The plain composition in float64 on a matrix of rows, with error bounds."""

    def __init__(self, case: Case, tensors: Tensors, on: list[Tensor] | None) -> None:
        self.case, self.on, self.end = case, on, tensors.end
        self.layers = len(case.sizes) - 1
        self.rounding = 0.0 if on is None else ROUNDING[case.dtype]
        info = torch.finfo(case.dtype)
        self.smallest = 0.0 if on is None else info.smallest_normal * info.eps
        self.net = tensors.net.map(lambda tensor: tensor.detach().double().requires_grad_())
        self.largest = 0.0

    def items(self) -> tuple[list[_Item], float]:
        """Output or loss and all gradients, and the largest sum of absolute values behind any of them."""
        case, net = self.case, self.net
        h, f, h_error = self.forward()
        output = h[-1]
        if case.has_loss:
            value, df, value_error, df_error = self.loss(output, h_error[-1])
        else:
            value, value_error = output.detach().reshape(*case.leading, case.sizes[-1]), h_error[-1]
            df, df_error = self.end.double().reshape(output.shape), torch.zeros_like(h_error[-1])
        (*grads,) = torch.autograd.grad(output, [*net.leaves(), *f], df)
        grads, df = grads[: -self.layers], grads[-self.layers :]
        errors = self.backward([one.detach() for one in h], df, h_error, df_error)
        names = ["output", *(f"gradient of {name}" for name in net.names())]
        items = [_Item("output", value.to(case.dtype), value_error.reshape(value.shape))]
        for name, want, error in zip(names[1:], grads, errors, strict=True):
            error = error.reshape(want.shape) * abs(case.scale)
            error = error + self.rounding * (_size(want) * abs(case.scale) + case.prior)  # rounding in `_delivered`
            items.append(_Item(name, want.to(case.dtype), error))
        return items, self.largest

    def sum(self, total: Tensor) -> Tensor:
        """The rounding error of sums, given the sums of absolute values."""
        if total.numel():
            self.largest = max(self.largest, float(total.max()))
        return self.rounding * total + self.smallest

    def forward(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """f_k, h_k, and the error bounds of h_k."""
        case, net = self.case, self.net
        h, f = [net.input.reshape(case.rows, case.sizes[0])], []
        errors = [torch.zeros_like(h[0]).detach()]
        for k, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
            f.append(F.linear(h[k], weight, bias).to(case.dtype).double())
            total = F.linear(_size(h[k]), _size(weight), None if bias is None else _size(bias))
            error = F.linear(errors[k], _size(weight)) + self.sum(total)
            if k == self.layers - 1 and not case.final_relu:
                h.append(f[k])
            elif self.on is None:
                h.append(F.relu(f[k]))
            else:
                flipped = ((f[k] > 0) != self.on[k]) & (f[k].abs() > error)
                assert not flipped.any(), f"{int(flipped.sum())} units of layer {k} contradict their f"
                h.append(f[k].where(self.on[k], 0))
                error = error * self.on[k]
            errors.append(error)
        return h, f, errors

    def backward(self, h: list[Tensor], df: list[Tensor], h_error: list[Tensor], error: Tensor) -> list[Tensor]:
        """The error bounds of the gradients of input, weights and biases."""
        of_weights: list[Tensor] = [error] * self.layers
        of_biases: list[Tensor | None] = [None] * self.layers
        for k in reversed(range(self.layers)):
            if k < self.layers - 1 or self.case.final_relu:
                error = error * ~(h[k + 1] <= 0)
            size, weight = _size(df[k]), _size(self.net.weights[k])
            of_weights[k] = error.t() @ _size(h[k]) + (size + error).t() @ h_error[k] + self.sum(size.t() @ _size(h[k]))
            if self.net.biases[k] is not None:
                of_biases[k] = error.sum(0) + self.sum(size.sum(0))
            error = error @ weight + self.sum(size @ weight)
        return [error, *of_weights, *(bias for bias in of_biases if bias is not None)]

    def loss(self, output: Tensor, f_error: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, its gradient ∂ℓ/∂f, and the error bounds of both."""
        case, spec = self.case, self.case.spec
        is_class = spec.name == "cross_entropy"
        target = self.end.reshape(case.rows) if is_class else self.end.double().reshape(output.shape)
        leaf = output.detach().requires_grad_()
        value = spec.of(leaf, target)
        (df,) = torch.autograd.grad(value, leaf)
        f, u = _size(leaf), self.rounding
        terms = float((target != spec.ignore_index).sum()) if is_class else target.numel()
        scale = 1.0 / max(terms, 1) if spec.reduction == "mean" else 1.0
        if spec.name == "mse":
            size = f + _size(target)
            df_error, total = 2 * (f_error + u * size), size * size
            value_error = 2 * size * (f_error + u * size) + f_error**2
        elif spec.name == "bce_with_logits":
            y = 1 + _size(target)
            df_error, total = f_error + u * y, f * y + 1
            value_error = y * f_error + u * total
        else:
            worst = f_error.amax(1, keepdim=True) if f_error.numel() else f_error
            df_error, total = (2 * worst + 4 * u).expand_as(f), 2 * f + 4
            value_error = 2 * worst + u * total
        self.sum(total.sum() * scale)
        value_error = scale * value_error.sum() + u * _size(value) + self.smallest
        return value.detach(), df.to(case.dtype).double(), value_error, df_error * scale + self.smallest + u * _size(df)


def _size(tensor: Tensor) -> Tensor:
    """Absolute values, with 0 for NaN and infinities, which are compared separately."""
    return tensor.detach().abs().nan_to_num(0.0, 0.0, 0.0)


# --- shrinking a failing case -----------------------------------------------------------------------------------------


def simpler(case: Case) -> Iterator[Case]:
    """Yields simpler cases, the largest steps first."""
    if len(case.sizes) > 2 and case.entry != "linear_relu":
        for k in range(len(case.sizes)):
            yield replace(case, sizes=case.sizes[:k] + case.sizes[k + 1 :])
    if len(case.leading) != 1:
        yield replace(case, leading=(case.rows,))
    for k, width in enumerate(case.sizes):
        for less in _less(width):
            yield replace(case, sizes=(*case.sizes[:k], less, *case.sizes[k + 1 :]))
    for k, rows in enumerate(case.leading):
        for less in _less(rows):
            yield replace(case, leading=(*case.leading[:k], less, *case.leading[k + 1 :]))
    for name in ("layouts", "specials", "biases", "needs"):
        kept = getattr(case, name)
        if kept:
            yield replace(case, **{name: ()})
        for k in range(len(kept) if len(kept) > 1 else 0):
            yield replace(case, **{name: kept[:k] + kept[k + 1 :]})
    usual = Case(entry=case.entry, seed=case.seed)
    for name in ("threads", "dtype", "exponent", "scale", "prior", "spec"):
        if getattr(case, name) != getattr(usual, name):
            yield replace(case, **{name: getattr(usual, name)})


def _less(size: int) -> Iterator[int]:
    return (less for less, _ in itertools.groupby((1, size // 2, size - 1)) if 0 < less < size)
