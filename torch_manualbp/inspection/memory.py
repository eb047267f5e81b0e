"""How much memory a training step of a network takes in each mode, before it is run: `memory`; `empty_cache`.

"Memory hungry – must store all the intermediate quantities", says the lecture of backpropagation. This counts them: the
tensors that PyTorch allocates and frees in the plain network, the results of our ops, and their workspace, which the op
`plan` computes by the rules that they allocate it by (csrc/cpu/plan.h).
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from torch_manualbp import _ops
from torch_manualbp._layers import Layer, layers_of
from torch_manualbp._route import torch_is_faster
from torch_manualbp.inspection._table import Table

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
    cached: int = field(default=0, compare=False)
    """Bytes that earlier steps had left for later ones when this was counted; `empty_cache` frees them."""

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        modes: list[tuple[str, ModeMemory]] = [(name, getattr(self, name)) for name in MODES]
        rows = [(name, _readable(mode.kept), _readable(mode.peak)) for name, mode in modes]
        parameters = _readable(self.parameters)
        title = f"Memory of a training step with {self.batch:,} rows, beside {parameters} of parameters"
        cached = [f"kept from earlier steps: {_readable(self.cached)} (empty_cache)"] if self.cached else []
        return Table(title, ("", "kept for backward", "peak of a step"), rows, "<>>", cached)


def memory(model: nn.Module, batch: int) -> MemoryPlan:
    """Counts the memory of a training step in each mode: how many activations are kept, and what the peak will be.

    A step is forward, ``F.mse_loss`` and backward, with no gradient of the input and none left from the step before, on
    the CPU with the number of threads that torch has now. Beside the input, the target and the parameters it holds

    - in the plain network: every h_k (B, D_k) that the lecture's backward pass needs, and ∂ℓ/∂f_k on the way back
    - in our modes: the h_k if they are stored, and a workspace for the block of rows that is being computed

    The stored h_k stay in memory for the next step (`empty_cache`). So the peak is what torch allocates in a first
    step; in the steps after it torch allocates less, and the process holds the same.

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
        RuntimeError: The network is larger than any memory.

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
    _, backward = _workspace(layers, batch, stored=False, recomputed=len(layers))
    input = torch.empty((), dtype=layers[0].weight.dtype).expand(batch, layers[0].weight.shape[1])
    return MemoryPlan(
        batch=batch,
        parameters=sum(p.numel() for layer in layers for p in (layer.weight, layer.bias) if p is not None) * itemsize,
        eager=eager,
        store=eager if torch_is_faster(input, [layer.weight for layer in layers]) else store,
        recompute=recompute,
        loss=ModeMemory(0, backward + _gradients(layers)),
        cached=_ops.cache_size(),
    )


def empty_cache() -> None:
    """Frees the memory that our ops keep on the CPU for the next training step.

    Memory that is new to a process is slow: each page of it costs a page fault. So the activations that a network has
    stored for backward are not freed, if they take 4 MiB or more, but kept for the next step. Outputs and gradients are
    in torch's own memory, as everywhere.

    What is kept and what is in use are together at most 1.25 times what was needed at one time: other sizes take the
    place of earlier ones. What has not been used for ten seconds is freed when a network is called, and all is freed by
    a fork and by a call that runs out of memory. Where Linux has huge pages, it takes the memory back when it runs
    short.

    Call this after training, or before something else needs the memory; the next step then touches new pages. With
    torch 2.10, which does not tell when a tensor is freed, nothing is kept.

    Example:
        >>> import torch
        >>> from torch_manualbp import MLP, memory
        >>> model = MLP([8, 64, 64, 1])
        >>> model(torch.randn(16_384, 8)).sum().backward()  # stores h_1 and h_2, 8 MiB
        >>> empty_cache()
        >>> memory(model, batch=1).cached
        0
    """
    _ops.empty_cache()


def _ours(layers: Sequence[Layer], batch: int, stored: bool) -> ModeMemory:
    """Our network and a loss outside of it: `store`, or `recompute`. Frozen layers in front are one call, ahead."""
    itemsize = layers[0].weight.element_size()
    frozen = next((k for k, layer in enumerate(layers) if _learns(layer.weight) or _learns(layer.bias)), len(layers))
    output = batch * layers[-1].weight.shape[0] * itemsize
    temporaries = _loss_temporaries(itemsize) * output
    handed_on = batch * layers[frozen - 1].weight.shape[0] * itemsize if frozen else 0
    ahead = handed_on + _workspace(layers[:frozen], batch, stored=False, recomputed=0)[0] if frozen else 0
    if frozen == len(layers):
        return ModeMemory(output, max(ahead, output + temporaries))
    layers = layers[frozen:]
    forward, backward = _workspace(layers, batch, stored, recomputed=0 if stored else len(layers) - 1)
    hidden = batch * sum(layer.weight.shape[0] for layer in layers[:-1]) * itemsize if stored else 0
    kept = hidden + output + (handed_on if not stored or _learns(layers[0].weight) else 0)
    # A loss outside of the network makes temporaries (B, D_K), then the gradient of the output.
    after = kept + max(temporaries, output + backward + _gradients(layers))
    return ModeMemory(kept, max(ahead, handed_on + hidden + output + forward, after))


def _workspace(layers: Sequence[Layer], batch: int, stored: bool, recomputed: int) -> tuple[int, int]:
    """Bytes that our forward and our backward pass allocate beside their results; the input needs no gradient.

    `stored`: whether the forward pass stores the h_k. `recomputed`: how many layers the backward pass computes again.
    """
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    widths = [weights[0].shape[1], *(weight.shape[0] for weight in weights)]
    needs = [False, *map(_learns, weights), *map(_learns, biases)]
    *_, forward, backward = _ops.plan(
        batch, widths, weights[0].element_size(), torch.get_num_threads(), needs, stored, recomputed
    )
    return forward, backward


def _gradients(layers: Sequence[Layer]) -> int:
    """Bytes of the gradients of all parameters that learn."""
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]
    return sum(p.numel() * p.element_size() for p in parameters)


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
            make(batch * width)  # h_{k+1}; then f_k is freed
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
    """How many temporaries like the output ``F.mse_loss`` makes: differences, squares; twice in half precision."""
    return 2 if itemsize >= 4 else 4


def _readable(size: int) -> str:
    if size < 1024:
        return f"{size} bytes"
    power = 1 if size < 1024**2 else 2 if size < 1024**3 else 3
    return f"{size / 1024**power:,.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"
