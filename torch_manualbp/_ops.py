"""Loads the compiled part, which registers ``torch.ops.manualbp.*``, and registers the shapes of its results.

The ops are private, because they have no derivative of their own: `torch_manualbp.autograd` adds it.
"""

import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

BINARY = Path(__file__).with_name("_C.abi3.so")
CUDA_BINARY = BINARY.with_name("_C_cuda.abi3.so")


def _is_truncated(binary: Path) -> bool:
    """Whether an ELF file ends before its section table: mapping it would kill the process, not raise."""
    header = binary.read_bytes()[:64]
    if header[:4] != b"\x7fELF":
        return False
    if len(header) < 64:
        return True
    offset, entry_size, entries = struct.unpack_from("<Q10xHH", header, 40)
    return binary.stat().st_size < int(offset + entry_size * entries)


def _load(binary: Path) -> None:
    cure = (
        "Build it where this torch is installed: `pip install --no-build-isolation .` from a checkout, "
        "or `pip install --force-reinstall --no-deps --no-cache-dir torch_manualbp`. It needs a C++17 compiler."
    )
    if not binary.exists():
        raise ImportError(f"torch_manualbp: the compiled extension {binary.name} is missing. {cure}")
    if _is_truncated(binary):
        raise ImportError(f"torch_manualbp: the compiled extension {binary.name} is incomplete. {cure}")
    try:
        torch.ops.load_library(str(binary))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"torch_manualbp: the compiled extension {binary.name} cannot be loaded by torch {torch.__version__} "
            f"(it needs torch >= 2.10): {error}. {cure}"
        ) from error


_load(BINARY)
# A CPU-only torch lacks the libraries that the CUDA kernels need.
has_cuda_kernels = CUDA_BINARY.exists() and torch.version.cuda is not None
if has_cuda_kernels:
    _load(CUDA_BINARY)

linear_relu = torch.ops.manualbp.linear_relu.default
linear_relu_backward = torch.ops.manualbp.linear_relu_backward.default
mlp = torch.ops.manualbp.mlp.default
mlp_backward = torch.ops.manualbp.mlp_backward.default
mlp_dropout = torch.ops.manualbp.mlp_dropout.default
mlp_dropout_backward = torch.ops.manualbp.mlp_dropout_backward.default
mlp_autocast = torch.ops.manualbp.mlp_autocast.default
mlp_autocast_backward = torch.ops.manualbp.mlp_autocast_backward.default
mlp_autocast_loss = torch.ops.manualbp.mlp_autocast_loss.default
mlp_stacked = torch.ops.manualbp.mlp_stacked.default
mlp_stacked_backward = torch.ops.manualbp.mlp_stacked_backward.default
mlp_backward_store = torch.ops.manualbp.mlp_backward_store.default
mlp_backward_further = torch.ops.manualbp.mlp_backward_further.default
mlp_double_backward = torch.ops.manualbp.mlp_double_backward.default
mlp_loss = torch.ops.manualbp.mlp_loss.default
flow_forward = torch.ops.manualbp.flow_forward.default
flow_backward = torch.ops.manualbp.flow_backward.default
flow_update = torch.ops.manualbp.flow_update.default
update = torch.ops.manualbp.update.default
keep = torch.ops.manualbp.keep.default
release = torch.ops.manualbp.release.default
train = getattr(torch.ops.manualbp.train.default, "_op", torch.ops.manualbp.train.default)  # a frame of Python less
plan = torch.ops.manualbp.plan.default
empty_cache = torch.ops.manualbp.empty_cache.default
cache_size = torch.ops.manualbp.cache_size.default
isa = torch.ops.manualbp.isa.default

# These ops have no derivative. Without a fallthrough for Autograd, torch would attach a node to every result that warns
# of this, which takes 2 µs per call.
_library = torch.library.Library("manualbp", "IMPL")  # type: ignore[no-untyped-call]
for _name in (
    "linear_relu", "linear_relu_backward", "mlp", "mlp_backward", "mlp_dropout", "mlp_dropout_backward",
    "mlp_autocast", "mlp_autocast_backward", "mlp_autocast_loss", "mlp_stacked", "mlp_stacked_backward",
    "mlp_backward_store", "mlp_backward_further", "mlp_double_backward", "mlp_loss", "flow_forward", "flow_backward",
    "flow_update", "update", "keep", "train",
):  # fmt: skip
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]


def _negated(name: str) -> Callable[..., Any]:
    """The op for tensors with the negative bit (`x.conj().imag`): torch's own fallback misses the list of biases."""
    op = getattr(torch.ops.manualbp, name).default

    def kernel(*args: Any) -> Any:
        return op(*torch.utils._pytree.tree_map_only(Tensor, torch.resolve_neg, args))

    return kernel


for _name in (
    "mlp", "mlp_backward", "mlp_dropout", "mlp_dropout_backward", "mlp_autocast", "mlp_autocast_backward",
    "mlp_autocast_loss", "mlp_stacked", "mlp_stacked_backward",
    "mlp_backward_store", "mlp_backward_further", "mlp_double_backward", "mlp_loss", "flow_forward", "flow_backward",
):  # fmt: skip
    _library.impl(_name, _negated(_name), "Negative")  # type: ignore[no-untyped-call]

# Torch's own step reads such gradients. Its fallbacks would copy parameters, and the op would update the copies.
for _key in ("Negative", "Conjugate", "ZeroTensor"):
    _library.impl("update", lambda *args: False, _key)  # type: ignore[no-untyped-call]


def split_hidden(hidden: Tensor, shape: torch.Size, weights: Sequence[Tensor]) -> list[Tensor]:
    """h_1 … h_{K−1}, each (…, D_k), as views of `hidden`, the flat result of the op `mlp`; `shape` is that of h_0."""
    leading = shape[:-1]
    widths = [weight.shape[0] for weight in weights[:-1]]
    pieces = torch.split(hidden, [math.prod(leading) * width for width in widths]) if widths else ()
    return [piece.view(*leading, width) for piece, width in zip(pieces, widths, strict=True)]


def masks_of(
    dropout: Sequence[Any], shape: torch.Size, weights: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor | None]:
    """m_k (…, D_{k+1}) in {0, c_k} of the dropout after each layer, None where there is none; empty: nowhere.

    dropout: `kept` and `scales` as for the op `mlp_dropout`, or nothing; shape: that of h_0.
    """
    if not dropout:
        return []
    kept, scales = dropout
    masks, start = list[Tensor | None](), 0
    for weight, scale in zip(weights, scales, strict=True):
        mask_shape = (*shape[:-1], weight.shape[0] if scale else 0)
        end = start + math.prod(mask_shape)
        masks.append(kept[start:end].view(mask_shape).to(dtype) * scale if scale else None)
        start = end
    return masks


_F = TypeVar("_F", bound=Callable[..., Any])


def _fake(name: str) -> Callable[[_F], _F]:
    """Registers what an op returns for tensors without data: shapes and dtypes only."""
    return cast(Callable[[_F], _F], torch.library.register_fake(f"manualbp::{name}"))


def _check_devices(op: str, **tensors: Tensor | Sequence[Tensor | None] | None) -> None:
    """Raises an error that names an argument on another device than the first.

    An op is called for a device without kernels only if its arguments are on several devices.
    """
    first: tuple[str, torch.device] | None = None
    for name, value in tensors.items():
        items = [(name, value)] if isinstance(value, Tensor) else [
            (f"{name}[{k}]", item) for k, item in enumerate(value or ())
        ]  # fmt: skip
        for label, tensor in items:
            if tensor is None:
                continue
            if first is None:
                first = (label, tensor.device)
            elif tensor.device != first[1]:
                raise RuntimeError(
                    f"{op}: `{label}` must be on the device of `{first[0]}` ({first[1]}), got {tensor.device}"
                )


@_fake("linear_relu")
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_devices("linear_relu", input=input, weight=weight, bias=bias)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@_fake("linear_relu_backward")
def _(grad_output: Tensor, input: Tensor, weight: Tensor, output: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    _check_devices("linear_relu_backward", grad_output=grad_output, input=input, weight=weight, output=output)
    shapes = (input.shape, weight.shape, weight.shape[:1])
    return [input.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need]


@_fake("mlp")
@_fake("mlp_dropout")
def _(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    final_relu: bool,
    store: bool,
    kept: Tensor | None = None,
    scales: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    _check_devices("mlp", input=input, weights=weights, biases=biases, kept=kept)
    batch = math.prod(input.shape[:-1])  # torch.Size.numel would fix the batch size of a graph that is being compiled
    hidden = batch * sum(weight.shape[0] for weight in weights[:-1]) if store else 0
    return input.new_empty((*input.shape[:-1], weights[-1].shape[0])), input.new_empty((hidden,))


@_fake("mlp_backward")
@_fake("mlp_dropout_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    hidden: Tensor | None,
    output: Tensor | None,
    needs: Sequence[bool],
    kept: Tensor | None = None,
    scales: Sequence[float] | None = None,
) -> list[Tensor]:
    made = {"hidden": hidden, "output": output, "kept": kept}
    _check_devices("mlp_backward", grad_output=grad_output, input=input, weights=weights, biases=biases, **made)
    return _needed_like(input, weights, needs)


@_fake("mlp_autocast")
def _(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    final_relu: bool,
    store: bool,
    kept: Tensor | None,
    scales: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _check_devices("mlp_autocast", input=input, weights=weights, biases=biases, kept=kept)
    hidden = math.prod(input.shape[:-1]) * sum(weight.shape[0] for weight in weights[:-1]) if store else 0
    output = input.new_empty((*input.shape[:-1], weights[-1].shape[0]), dtype=dtype)
    return output, input.new_empty((hidden,), dtype=dtype)


@_fake("mlp_autocast_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    hidden: Tensor | None,
    output: Tensor | None,
    needs: Sequence[bool],
    kept: Tensor | None,
    scales: Sequence[float],
) -> list[Tensor]:
    made = {"hidden": hidden, "output": output, "kept": kept}
    op = "mlp_autocast_backward"
    _check_devices(op, grad_output=grad_output, input=input, weights=weights, biases=biases, **made)
    return _mixed_like(input, weights, needs)


@_fake("mlp_autocast_loss")
def _(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    loss: str,
    mean: bool,
    ignore_index: int,
    label_smoothing: float,
    needs: Sequence[bool],
    flat: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    _check_devices("mlp_autocast_loss", input=input, target=target, weights=weights, biases=biases)
    return [input.new_empty((), dtype=torch.float32), *_mixed_like(input, weights, needs)]


def _mixed_like(input: Tensor, weights: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    wide = input.new_empty((), dtype=torch.float32).expand(input.shape)
    return [*_needed_like(input, (), needs[:1]), *_needed_like(wide, weights, [False, *needs[1:]])]


@_fake("mlp_stacked")
def _(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], final_relu: bool, store: bool
) -> list[Tensor]:
    _check_devices("mlp_stacked", input=input, weights=weights, biases=biases)
    output = input.new_empty((*input.shape[:-1], weights[-1].shape[-2]))
    leading = input.shape[:-1] if weights[0].dim() == 3 else (1, *input.shape[:-1])
    rows, widths = math.prod(leading[1:]), [weight.shape[-2] for weight in weights[:-1]] if store else []
    pieces = torch.split(input.new_empty((leading[0], rows * sum(widths))), [rows * width for width in widths], 1)
    return [output, *(piece.view(*input.shape[:-1], width) for piece, width in zip(pieces, widths, strict=False))]


@_fake("mlp_stacked_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    hidden: Sequence[Tensor],
    output: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    made = {"hidden": hidden, "output": output}
    _check_devices("mlp_stacked_backward", grad_output=grad_output, input=input, weights=weights, biases=biases, **made)
    shapes = (input.shape, *(weight.shape for weight in weights), *(weight.shape[:-1] for weight in weights))
    return [input.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need]


@_fake("mlp_backward_store")
def _(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    hidden: Tensor,
    output: Tensor | None,
    needs: Sequence[bool],
    scales: Sequence[float] = (),
) -> list[Tensor]:
    made = {"hidden": hidden, "output": output}
    _check_devices("mlp_backward_store", grad_output=grad_output, input=input, weights=weights, **made)
    return [hidden.new_empty(hidden.shape), *_needed_like(input, weights, needs)]


@_fake("mlp_backward_further")
def _(
    grad_output: Tensor,
    grad_hidden: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    hidden: Tensor,
    output: Tensor | None,
    needs: Sequence[bool],
    scales: Sequence[float] = (),
) -> list[Tensor]:
    made = {"grad_hidden": grad_hidden, "hidden": hidden, "output": output}
    _check_devices("mlp_backward_further", grad_output=grad_output, input=input, weights=weights, **made)
    return _needed_like(input, weights, needs)


@_fake("mlp_double_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    hidden: Tensor,
    output: Tensor | None,
    df: Tensor,
    grad_dinput: Tensor | None,
    grad_dweights: Sequence[Tensor | None],
    grad_dbiases: Sequence[Tensor | None],
    needs: Sequence[bool],
    scales: Sequence[float] = (),
) -> list[Tensor]:
    _check_devices(
        "mlp_double_backward", grad_output=grad_output, input=input, weights=weights, hidden=hidden, output=output,
        df=df, grad_dinput=grad_dinput, grad_dweights=grad_dweights, grad_dbiases=grad_dbiases,
    )  # fmt: skip
    like = (grad_output, input, hidden, *weights)
    return [input.new_empty(tensor.shape) for tensor, need in zip(like, needs, strict=True) if need]


@_fake("mlp_loss")
def _(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    loss: str,
    mean: bool,
    ignore_index: int,
    label_smoothing: float,
    needs: Sequence[bool],
    flat: bool,
) -> list[Tensor]:
    _check_devices("mlp_loss", input=input, target=target, weights=weights, biases=biases)
    return [input.new_empty(()), *_needed_like(input, weights, needs)]


def _needed_like(input: Tensor, weights: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    shapes = (input.shape, *(weight.shape for weight in weights), *(weight.shape[:1] for weight in weights))
    return [input.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need]


def _reject_mixed_devices(op: str) -> Callable[..., Any]:
    def kernel(input: Tensor, weights: Any, biases: Any, *rest: Any) -> Any:
        names = ("weight", "bias") if op == "linear_relu" else ("weights", "biases")
        _check_devices(op, input=input, **dict(zip(names, (weights, biases), strict=True)))
        raise RuntimeError(f"{op}: no kernel for tensors on {input.device}")  # unreachable by `_route`

    return kernel


for _op in () if has_cuda_kernels else ("linear_relu", "mlp"):
    torch.library.impl(f"manualbp::{_op}", "CUDA")(_reject_mixed_devices(_op))
