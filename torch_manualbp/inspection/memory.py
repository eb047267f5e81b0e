"""How much memory a training step of a network takes in each mode, before it is run: `memory`.

"Memory hungry – must store all the intermediate quantities", says the lecture of backpropagation. This counts them: the
tensors that PyTorch allocates and frees in the plain network, and what our ops allocate (csrc/cpu/mlp.cpp, mlp_loss.cpp
and network.h, whose rules for cutting a batch into blocks are repeated in `_Cut`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from torch_manualbp.inspection._layers import Layer, layers_of

_PANEL = 16  # columns that are packed together
_BLOCK_COLS, _BLOCK_DEPTH = 256, 384 + 16  # of the part of a matrix that a thread packs, and a strip of the other

MODES = ("eager", "store", "recompute", "loss")


@dataclass(frozen=True)
class ModeMemory:
    """Bytes that a training step allocates in one mode, beside input, target and parameters."""

    kept: int
    """Held from the forward to the backward pass, and growing with the batch: the output and every stored h_k."""
    peak: int
    """Most that there is at one time: what is kept, ∂ℓ/∂f_k, gradients of parameters, and the workspace of our ops."""


@dataclass(frozen=True)
class MemoryPlan:
    """What `memory` counted: ``plan.eager``, ``plan.store``, ``plan.recompute`` and ``plan.loss``."""

    batch: int
    """Rows of the input."""
    parameters: int
    """Bytes of the parameters; their gradients take as much and are part of every ``peak``."""
    eager: ModeMemory
    """An ``nn.Sequential`` of the layers and a loss of its output."""
    store: ModeMemory
    """`MLP`, or `fuse`, and a loss of its output."""
    recompute: ModeMemory
    """The same with ``activations="recompute"``."""
    loss: ModeMemory
    """`MLP.loss`: network and loss in one pass."""

    def __str__(self) -> str:
        rows = [("", "kept for backward", "peak of a step")]
        for name in MODES:
            mode: ModeMemory = getattr(self, name)
            rows.append((name, _readable(mode.kept), _readable(mode.peak)))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows]
        parameters = _readable(self.parameters)
        title = f"Memory of a training step with {self.batch:,} rows, beside {parameters} of parameters"
        return "\n".join([title, *lines])


def memory(model: nn.Module, batch: int) -> MemoryPlan:
    """Counts the memory of a training step in each mode: how many activations are kept, and what the peak will be.

    A step is forward, ``F.mse_loss`` and backward, with no gradient of the input and none left from the step before, on
    the CPU with the number of threads that torch has now. Beside the input, the target and the parameters it holds

    - in the plain network: every h_k (B, D_k) that the lecture's backward pass needs, and ∂ℓ/∂f_k on the way back
    - in our modes: the h_k if they are stored, and a workspace for the block of rows that is being computed

    Not counted are an optimizer's state and the libraries' own buffers (BLAS). For a few rows, whose weights our ops
    may leave unpacked, the count is an upper bound.

    Args:
        model: `MLP`, `LinearReLU`, or an ``nn.Sequential`` of Linear and ReLU layers, fused or not; all four modes are
            counted whichever it is.
        batch: B, the number of rows.

    Returns:
        A `MemoryPlan`, to be printed. Checked against measured peaks: see tests/test_memory.py for how closely.

    Raises:
        TypeError: `model` has other modules, or `batch` is no int.
        ValueError: `batch` is negative, or layers share a parameter.

    Example:
        >>> from torch_manualbp import MLP
        >>> plan = memory(MLP([32, 64, 64, 16]), batch=100_000)
        >>> plan.store.kept == 100_000 * (64 + 64 + 16) * 4  # h_1, h_2 and the output, float32
        True
        >>> plan.loss.peak < plan.recompute.peak < plan.store.peak < plan.eager.peak
        True
    """
    layers = layers_of(model, "memory")
    if not isinstance(batch, int) or isinstance(batch, bool):
        raise TypeError(f"memory: `batch` must be an int, got {type(batch).__name__}")
    if batch < 0:
        raise ValueError(f"memory: `batch` must not be negative, got {batch}")
    itemsize = layers[0].weight.element_size()
    cut = _Cut(batch, layers)
    output = batch * layers[-1].weight.shape[0] * itemsize
    hidden = batch * cut.hidden * itemsize
    gradients = sum(p.numel() for layer in layers for p in (layer.weight, layer.bias) if p is not None) * itemsize
    # A loss outside of the network makes two temporaries (B, D_K), then the gradient of the output.
    outside = output + max(2 * output, output + cut.backward(0) + gradients)
    again = output + max(2 * output, output + cut.backward(len(layers) - 1) + gradients)
    return MemoryPlan(
        batch=batch,
        parameters=gradients,
        eager=_eager(layers, batch, itemsize),
        store=ModeMemory(hidden + output, hidden + max(output + cut.forward(kept=True), outside)),
        recompute=ModeMemory(output, max(output + cut.forward(kept=False), again)),
        loss=ModeMemory(0, cut.backward(len(layers)) + gradients),
    )


def _eager(layers: Sequence[Layer], batch: int, itemsize: int) -> ModeMemory:
    """Plays a step of the plain network: each tensor that PyTorch makes, and when it lets go of it."""
    widths = [layer.weight.shape[0] for layer in layers]
    now = peak = 0

    def make(numbers: int) -> int:
        nonlocal now, peak
        now += numbers
        peak = max(peak, now)
        return numbers

    kept = 0
    for width, layer in zip(widths, layers, strict=True):
        f = make(batch * width)
        if layer.relu:
            make(batch * width)  # h_{k+1}; nobody needs f_k any more
            now -= f
        kept = now
    output = batch * widths[-1]
    make(2 * output)  # mse_loss: temporaries, of which one stays until its backward
    now -= output
    df = make(output)
    now -= output  # the output itself lives as long as the loss
    for k in reversed(range(len(layers))):
        weight, bias, relu = layers[k].weight, layers[k].bias, layers[k].relu
        if relu:  # ∂ℓ/∂f_k beside ∂ℓ/∂h_{k+1}; then this and h_{k+1} go
            make(df)
            now -= df + (batch * widths[k] if k < len(layers) - 1 else 0)
        dh = make(batch * weight.shape[1]) if k > 0 else 0
        make(weight.numel() + (0 if bias is None else bias.numel()))
        if k > 0 and not layers[k - 1].relu:
            now -= batch * widths[k - 1]
        now -= df
        df = dh
    return ModeMemory(kept * itemsize, peak * itemsize)


class _Cut:
    """How our ops cut a batch, and what they allocate for it: the counterpart of `Network` in csrc/cpu/network.h."""

    def __init__(self, batch: int, layers: Sequence[Layer]) -> None:
        self.batch = batch
        self.itemsize = layers[0].weight.element_size()
        self.wide_itemsize = max(self.itemsize, 4)  # sums of halves are made in float32
        self.threads = torch.get_num_threads()
        widths = [layers[0].weight.shape[1], *(layer.weight.shape[0] for layer in layers)]
        self.widest, self.top = max(widths), widths[-1]
        self.hidden, self.widest_hidden = sum(widths[1:-1]), max(widths[1:-1], default=0)
        self.parameters = sum(layer.weight.numel() for layer in layers) + sum(widths[1:])
        self.slice_rows = self._slice_rows()
        self.tall = self.slice_rows < batch
        work = (batch + 8) * self.parameters
        self.short = (
            not self.tall
            and (batch > 16 or work < 2 << 20)
            and work <= (8 << 20) * len(layers)
            and self.parameters <= 1 << 20
            and batch * (self.hidden + self.top) <= 4 << 20
        )
        # Weights packed for the forward pass, and for the backward pass, which needs no gradient of the input.
        forward = sum(d_in * _up(d_out, _PANEL) for d_in, d_out in pairwise(widths))
        backward = sum(d_out * _up(d_in, _PANEL) for d_in, d_out in pairwise(widths[1:]))
        packs = (self.tall or self.short) * self.wide_itemsize
        self.packed, self.packed_backward = forward * packs, backward * packs
        # Each thread's own: a block of a matrix that is being multiplied.
        self.team = self.threads * min(_up(self.widest, _PANEL), _BLOCK_COLS) * _BLOCK_DEPTH * self.wide_itemsize

    def _slice_rows(self) -> int:
        size = max(self.parameters, 1) * self.wide_itemsize
        slices = min(32, (16 << 20) // size, self.batch // (64 if size <= 384 << 10 else 512))
        return self.batch if slices < 4 else _up(-(-self.batch // slices), 16)

    def forward(self, kept: bool) -> int:
        """Workspace of the forward pass: packed weights and, if h_k are not kept, two buffers a thread."""
        if kept:
            return self.team + self.packed
        if not (self.tall or self.short):
            rows = min(self.batch, self._long_rows(2 * self.widest_hidden))
            return self.team + 2 * rows * self.widest_hidden * self.itemsize
        rows = min(self._block_rows(2 * self.widest), max(_up(-(-self.batch // self.threads), 16), 16))
        return self.team + self.packed + 2 * rows * self.widest_hidden * self.itemsize * self.threads

    def backward(self, again: int) -> int:
        """Workspace of the backward pass if the first `again` layers are computed again."""
        fixed = self.team + self.packed_backward + (self.packed if again else 0)
        if self.short:  # ∂ℓ/∂f_k of all layers, and what is computed again
            numbers = self.batch * (self.hidden + self.top + (self.hidden if again else 0))
            return fixed + numbers * self.itemsize
        touched = 2 * self.widest + (self.hidden if again else 0)
        if self.tall:
            rows = min(self.slice_rows, self._block_rows(touched))
        else:
            rows = self._long_rows(touched) if again else self.batch
        each = rows * (2 * max(self.widest_hidden, self.top) + (self.hidden if again else 0)) * self.itemsize
        if not self.tall:
            return fixed + each
        slices = -(-self.batch // self.slice_rows)
        sums = slices * self.parameters * self.wide_itemsize
        return fixed + sums + each * self.threads

    def _long_rows(self, width: int) -> int:
        """The same for rows that go layer by layer over all threads: up to 32 MiB, blocks alike."""
        most = max((32 << 20) // self.itemsize // max(width, 1), 128)
        blocks = max(-(-self.batch // most), 1)
        return max(_up(-(-self.batch // blocks), 128), 128)

    def _block_rows(self, width: int) -> int:
        """Rows of a block of which a thread touches `width` features again and again: half of a 1 MiB cache."""
        return min(max(128 * 1024 // max(width, 1) // 128, 1), 4) * 128


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _readable(size: int) -> str:
    if size < 1024:
        return f"{size} bytes"
    power = 1 if size < 1024**2 else 2 if size < 1024**3 else 3
    return f"{size / 1024**power:,.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"
