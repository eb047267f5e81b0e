"""How much memory a training step of a network takes in each mode, before it is run: `memory`.

"Memory hungry – must store all the intermediate quantities", says the lecture of backpropagation. This counts them: the
tensors that PyTorch allocates and frees in the plain network, and what our ops allocate (csrc/cpu/mlp.cpp, mlp_loss.cpp
and network.h, whose rules for cutting a batch into blocks are repeated in `_Cut`).
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from torch_manualbp import _ops
from torch_manualbp._layers import Layer, layers_of
from torch_manualbp._route import torch_is_faster

# Of csrc/cpu/kernels/gemm-inl.h, by instruction set: bytes of a vector, rows of a tile.
_LEVELS = {"default": (16, 6), "avx2": (32, 6), "avx512": (64, 12)}
_BLOCK_DEPTH, _BLOCK_BYTES = 384, 384 * 1024  # of the part of a matrix that a thread packs
_DIRECT_STRIDE = 512  # up to which a row of a weight is read where it lies
_UNIT_ROWS, _LONG_UNIT_ROWS = 96, 384  # in which the rows of a batch are summed

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
    """Bytes of the parameters. The gradients of those that learn take as much, and are part of every ``peak``."""
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

    Parameters that do not require a gradient get none. Of the layers in front of the first that learns, nothing is kept
    but what the last one hands on; if no parameter learns, the step ends with the loss.

    bfloat16 that is left to torch, where the CPU has instructions for it, is counted as the plain network. Not counted
    are an optimizer's state, the libraries' own buffers (BLAS, oneDNN), and half a byte for each row in `MLP.loss`.

    Args:
        model: `MLP`, `LinearReLU`, or an ``nn.Sequential`` of Linear and ReLU layers, fused or not; all four modes are
            counted whichever it is.
        batch: B, the number of rows.

    Returns:
        A `MemoryPlan`, to be printed. Its peaks are what torch allocates, to the byte (tests/test_memory.py).

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
    eager, store, recompute = _eager(layers, batch, itemsize), _ours(layers, batch, True), _ours(layers, batch, False)
    whole = _Cut(batch, layers)
    input = torch.empty((), dtype=layers[0].weight.dtype).expand(batch, layers[0].weight.shape[1])
    return MemoryPlan(
        batch=batch,
        parameters=sum(p.numel() for layer in layers for p in (layer.weight, layer.bias) if p is not None) * itemsize,
        eager=eager,
        store=eager if torch_is_faster(input, [layer.weight for layer in layers]) else store,
        recompute=recompute,
        loss=ModeMemory(0, whole.backward(len(layers)) + whole.gradients * itemsize),
    )


def _ours(layers: Sequence[Layer], batch: int, stored: bool) -> ModeMemory:
    """Our network and a loss outside of it: `store`, or `recompute`. Frozen layers in front are one call, ahead."""
    itemsize = layers[0].weight.element_size()
    frozen = next((k for k, layer in enumerate(layers) if _learns(layer.weight) or _learns(layer.bias)), len(layers))
    output = batch * layers[-1].weight.shape[0] * itemsize
    temporaries = _loss_temporaries(itemsize) * output
    handed_on = batch * layers[frozen - 1].weight.shape[0] * itemsize if frozen else 0
    ahead = handed_on + _Cut(batch, layers[:frozen]).forward(kept=False) if frozen else 0
    if frozen == len(layers):
        return ModeMemory(output, max(ahead, output + temporaries))
    layers = layers[frozen:]
    cut = _Cut(batch, layers)
    again = 0 if stored else len(layers) - 1
    hidden = batch * cut.hidden * itemsize if stored else 0
    kept = hidden + output + (handed_on if not stored or _learns(layers[0].weight) else 0)
    forward = handed_on + hidden + output + cut.forward(kept=stored)
    # A loss outside of the network makes temporaries (B, D_K), then the gradient of the output.
    backward = kept + max(temporaries, output + cut.backward(again) + cut.gradients * itemsize)
    return ModeMemory(kept, max(ahead, forward, backward))


def _learns(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _eager(layers: Sequence[Layer], batch: int, itemsize: int) -> ModeMemory:
    """Plays a step of the plain network: each tensor that PyTorch makes, and when it lets go of it."""
    widths = [layer.weight.shape[0] for layer in layers]
    now = peak = 0

    def make(numbers: int) -> int:
        nonlocal now, peak
        now += numbers
        peak = max(peak, now)
        return numbers

    # Whether f_k has a gradient; whether h_k is kept by the ReLU that made it, and by the layer that it enters.
    graph = list(accumulate((_learns(layer.weight) or _learns(layer.bias) for layer in layers), operator.or_))
    by_relu = [False, *(layer.relu and has for layer, has in zip(layers[:-1], graph, strict=False))]
    by_layer = [k > 0 and _learns(layer.weight) for k, layer in enumerate(layers)]
    for k, (width, layer) in enumerate(zip(widths, layers, strict=True)):
        f = make(batch * width)
        if k > 0 and not (by_relu[k] or by_layer[k]):
            now -= batch * widths[k - 1]
        if layer.relu:
            make(batch * width)  # h_{k+1}; nobody needs f_k any more
            now -= f
    kept = now
    output = batch * widths[-1]
    temporaries = make(_loss_temporaries(itemsize) * output)  # of which one stays as long as the loss
    now -= temporaries - output
    df = make(output) if graph[-1] else 0
    now -= 0 if layers[-1].relu else output  # the output, unless a ReLU keeps that too
    for k in reversed(range(len(layers))):
        weight, bias, relu = layers[k].weight, layers[k].bias, layers[k].relu
        if not graph[k]:
            break
        if relu:  # ∂ℓ/∂f_k beside ∂ℓ/∂h_{k+1}; then this and h_{k+1} go
            make(df)
            now -= df + batch * widths[k]
        dh = make(batch * weight.shape[1]) if k > 0 and graph[k - 1] else 0
        make(sum(p.numel() for p in (weight, bias) if p is not None and p.requires_grad))
        if by_layer[k] and not by_relu[k]:
            now -= batch * widths[k - 1]
        now -= df
        df = dh
    return ModeMemory(kept * itemsize, peak * itemsize)


def _loss_temporaries(itemsize: int) -> int:
    """How many tensors like the output ``F.mse_loss`` makes: differences and squares; of halves, also in float32."""
    return 2 if itemsize >= 4 else 4


class _Cut:
    """How our ops cut a batch, and what they allocate for it: the counterpart of `Network` in csrc/cpu/network.h."""

    def __init__(self, batch: int, layers: Sequence[Layer]) -> None:
        self.batch = batch
        self.threads = torch.get_num_threads()
        self.itemsize = layers[0].weight.element_size()
        self.wide_itemsize = max(self.itemsize, 4)  # sums of halves are made in float32
        vector_bytes, self.tile_rows = _LEVELS[_ops.isa()]
        self.panel = 2 * vector_bytes // self.wide_itemsize  # columns that are packed together
        self.widths = [layers[0].weight.shape[1], *(layer.weight.shape[0] for layer in layers)]
        self.widest, self.top = max(self.widths), self.widths[-1]
        self.hidden, self.widest_hidden = sum(self.widths[1:-1]), max(self.widths[1:-1], default=0)
        self.parameters = sum((d_in + 1) * d_out for d_in, d_out in pairwise(self.widths))
        learns = [(_learns(layer.weight), _learns(layer.bias)) for layer in layers]
        self.lowest = next((k for k, some in enumerate(learns) if any(some)), len(layers))  # where backward ends
        sizes = [
            (d_in * d_out * omega, d_out * beta)
            for (d_in, d_out), (omega, beta) in zip(pairwise(self.widths), learns, strict=True)
        ]
        self.weight_gradients = sum(omega for omega, _ in sizes)
        self.bias_gradients = sum(beta for _, beta in sizes)
        self.gradients = self.weight_gradients + self.bias_gradients
        self.widest_dbeta = max(beta for _, beta in sizes)
        self.work = (batch + 8) * self.parameters
        self.slice_rows = self._slice_rows()
        self.tall = self.slice_rows < batch
        self.short = (
            not self.tall
            and (batch > 16 or self.work < 2 << 20)
            and self.work <= (8 << 20) * len(layers)
            and self.parameters <= 1 << 20
            and batch * (self.hidden + self.top) <= 4 << 20
        )

    def forward(self, kept: bool) -> int:
        """Workspace of the forward pass: packed weights and, if h_k are not kept, two buffers a thread."""
        fixed = self._team(self.widest) + self._packed_transposed()
        if kept:
            return fixed
        if not (self.tall or self.short):
            rows = min(self.batch, self._long_rows(2 * self.widest_hidden))
            return fixed + 2 * rows * self.widest_hidden * self.itemsize
        rows = min(self._block_rows(2 * self.widest), self._share_rows())
        return fixed + 2 * rows * self.widest_hidden * self.itemsize * self.threads

    def backward(self, again: int) -> int:
        """Workspace of the backward pass if the first `again` layers are computed again."""
        packed = self._packed() + self._packed_transposed(again)
        if self.short:  # ∂ℓ/∂f_k of all layers, and what is computed again
            numbers = self.batch * (self.hidden + self.top + (self.hidden if again else 0))
            return self._team(self.batch) + packed + self._sums(1) + numbers * self.itemsize
        touched = 2 * self.widest + (self.hidden if again else 0)
        if self.tall:
            rows = min(self.slice_rows, self._block_rows(touched))
        else:
            rows = min(self.batch, self._long_rows(touched if again else 1))
        fixed = self._team(rows) + packed
        each = rows * (2 * max(self.widest_hidden, self.top) + (self.hidden if again else 0)) * self.itemsize
        if self.tall:
            slices = -(-self.batch // self.slice_rows)
            return fixed + self._sums(slices, self.slice_rows > 24 * _UNIT_ROWS) + each * self.threads
        units = -(-rows // _UNIT_ROWS)
        dbeta = 8 * (1 + units) * self.widest_dbeta if units > 1 else 0
        return fixed + self._sums(1, self.batch > self._long_rows(1)) + each + dbeta

    def _team(self, depth: int) -> int:
        """Each thread's own: a block of a matrix, a strip of the other, and their like (`Workspace`)."""
        depth = min(max(self.widest, depth), _BLOCK_DEPTH)
        cols = min(_BLOCK_BYTES // (_BLOCK_DEPTH * self.wide_itemsize), _up(self.widest, self.panel))
        chunk = 16 * self.tile_rows * cols if self.itemsize < self.wide_itemsize else 0
        numbers = (depth + 1) * cols + self.tile_rows * (self.panel + depth) + chunk
        return self.threads * _up(numbers * self.wide_itemsize, 64)

    def _packed_transposed(self, layers: int | None = None) -> int:
        """The weights of the first layers, all unless said, packed for the forward pass."""
        first = list(pairwise(self.widths))[:layers]
        sizes = [d_in * _up(d_out, self.panel) for d_in, d_out in first if d_out > 1]
        return sum(sizes) * self.wide_itemsize if self._packs() else 0

    def _packed(self) -> int:
        """Weights packed for the backward pass, which needs no gradient of the input."""
        sizes = [
            d_out * _up(d_in, self.panel)
            for d_in, d_out in pairwise(self.widths[self.lowest + 1 :])
            if d_in > 1 and not self._reads_in_place(d_in)
        ]
        return sum(sizes) * self.wide_itemsize if self._packs() else 0

    def _packs(self) -> bool:
        """Whether weights are packed once for all rows."""
        share = self._share_rows()
        shared = self.threads > 1 and self.work >= 2 << 20
        return self.tall or (self.short and not (share <= 32 and (shared or self.batch <= share)))

    def _reads_in_place(self, d_in: int) -> bool:
        few = self.batch <= 2 * self.tile_rows
        near, whole = d_in <= _DIRECT_STRIDE, d_in % self.panel == 0
        return self.short and self.itemsize == self.wide_itemsize and (few or (near and whole))

    def _sums(self, slices: int, chunks: bool = False) -> int:
        """Where gradients are summed: those of biases in double, as those of weights from chunk to chunk of a slice."""
        direct = slices == 1 and self.itemsize == self.wide_itemsize
        totals = 8 * min(self.threads, slices) * self.weight_gradients if chunks else 0
        sums = 0 if direct else slices * self.weight_gradients * self.wide_itemsize
        return 8 * slices * self.bias_gradients + sums + totals

    def _share_rows(self) -> int:
        """Rows that a thread takes through all layers."""
        step = 48 if self.batch >= 4 * 48 * self.threads else 16
        return max(_up(-(-self.batch // self.threads), step), step)

    def _slice_rows(self) -> int:
        size = max(self.parameters, 1) * self.wide_itemsize
        slices = min(32, (16 << 20) // size, self.batch // (64 if size <= 384 << 10 else 512))
        return self.batch if slices < 4 else _up(-(-self.batch // slices), 16)

    def _long_rows(self, width: int) -> int:
        """Rows of a block that goes layer by layer over all threads: up to 32 MiB, blocks alike."""
        most = min(max((32 << 20) // self.itemsize // max(width, 1), _LONG_UNIT_ROWS), 16 * _LONG_UNIT_ROWS)
        blocks = max(-(-self.batch // most), 1)
        return max(_up(-(-self.batch // blocks), _LONG_UNIT_ROWS), _LONG_UNIT_ROWS)

    def _block_rows(self, width: int) -> int:
        """Rows of a block of which a thread touches `width` features again and again: half of a 1 MiB cache."""
        return min(max(128 * 1024 // max(width, 1) // _UNIT_ROWS, 1), 6) * _UNIT_ROWS


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _readable(size: int) -> str:
    if size < 1024:
        return f"{size} bytes"
    power = 1 if size < 1024**2 else 2 if size < 1024**3 else 3
    return f"{size / 1024**power:,.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"
