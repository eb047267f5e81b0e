"""What computes a call: our kernels, one op of a captured graph, or plain torch. No other module decides it.

`route` answers, and the functions of `_compute` act on the answer. A new way to compute (on another device, say) is one
more answer here and one more branch there.

Private functions of torch are looked up here, each with a safe default: a torch that renames one makes us slower, not
wrong.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from torch_manualbp import _ops
from torch_manualbp._losses import LossSpec

KERNELS: Final = "kernels"  # one call of our ops, and one node of autograd's graph (several if it is large)
AUTOCAST: Final = "autocast"  # the same, in the dtype of autocast
GRAPH: Final = "graph"  # one op of the graph that torch.compile captures (`_graph`)
FUNC: Final = "func"  # our ops under torch.func, level by level (`_transforms`)
TORCH: Final = "torch"  # torch's own functions, one after another, which always works

is_legacy_batched: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda t: True)
transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: True)
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
saved_tensor_hooks: Callable[[], Any] = functools.partial(
    getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignored: True), False
)
_count_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
global_hooks_exist: Callable[[], bool] = getattr(torch.nn.modules.module, "_has_any_global_hook", lambda: True)
_count_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
forward_mode: Any = forward_ad if hasattr(forward_ad, "_current_level") else SimpleNamespace(_current_level=0)

PLAIN: frozenset[type] = frozenset({Tensor, Parameter})  # subclasses may give any op another meaning
PLAIN_OR_NONE: frozenset[type] = PLAIN | {type(None)}

# `route` takes about 1 µs, and names in the namespace of torch cost 25 ns each: it is too large for the interpreter's
# cache. A tensor is quantized if its dtype is.
_torch: dict[str, Any] = vars(torch)
_BFLOAT16: Final = torch.bfloat16
_FLOAT32: Final = torch.float32
_STRIDED: Final = torch.strided
_QUANTIZED = {getattr(torch, name, None) for name in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")}


def route(input: Any, parameters: Sequence[Tensor | None] = (), store: bool = True) -> str:
    """What computes linear layers with ReLUs between them: `KERNELS`, `AUTOCAST`, `GRAPH`, `FUNC` or `TORCH`.

    The answer is `TORCH` for one of these reasons, which are checked in this order:

    1. torch.compile captures the call for torch.export, whose programs must run without this library; or it captures
       one with a bfloat16 input on a CPU with instructions for bfloat16, unless our kernels use these and the weights
       are small. (This is reason 7 without its number of rows, `torch_may_be_faster`: Dynamo guards all that this
       function reads, and a condition on the batch size would cause recompilations.)
    2. The input is an instance of a subclass of Tensor, which may give any op another meaning.
    3. Torch's functions or modules for linear and ReLU have been replaced, or a ``TorchFunctionMode`` sees their calls.
       (A run with a Dropout or an Identity in it also asks `transparent_are_torchs`.)
       Such a mode sees even the attributes that are read, so that this is checked before anything else of the input.
    4. A transform must see through the computation (forward-mode AD, make_fx, torch.jit.trace, any of torch.func's but
       vmap and reverse-mode AD).
    5. There are no kernels for the device of the input, or the input is sparse, nested or quantized.
    6. A parameter is an instance of a subclass, or sparse.
    7. Plain torch is faster (`torch_is_faster`). This does not count if activations must not be stored.
    8. Autocast is enabled for a GPU or under torch.func, or a tensor has neither float32 nor the dtype that autocast
       computes in.

    Without such a reason, a call that torch.compile captures is for the `GRAPH`, an eager call under vmap or the
    reverse-mode AD of torch.func is for `FUNC`, one under autocast for `AUTOCAST`, and any other for our `KERNELS`.

    A fused Sequential asks once, about its input. Its plan has checked the parameters, and each run checks reason 7,
    or what reason 1 has of it (`route_run`).

    Args:
        input: of the first layer, or whatever the caller was given.
        parameters: weights and biases; a missing bias is None.
        store: whether hidden activations are kept for the backward pass.
    """
    if is_dynamo_compiling():
        return GRAPH if _joins_graph(input, parameters) else TORCH
    if not (
        type(input) in PLAIN
        and _unobserved(input)
        and (input.is_cpu or (input.is_cuda and _ops.has_cuda_kernels))
        and input.layout is _STRIDED
        and not input.is_nested
        and (dtype := input.dtype) not in _QUANTIZED
        and (not parameters or are_plain(parameters))
    ):
        return FUNC if transforms_active() and _is_for_func(input, parameters, store) else TORCH
    if any_autocast() and is_under_autocast(input):
        return _route_under_autocast(input, parameters, store)
    return TORCH if dtype is _BFLOAT16 and store and torch_is_faster(input, parameters) else KERNELS


def is_under_autocast(input: Any) -> bool:
    """Whether autocast is enabled for the device of this tensor."""
    return torch.is_autocast_enabled("cpu" if input.is_cpu else "cuda")


def _route_under_autocast(input: Tensor, parameters: Sequence[Tensor | None], store: bool) -> str:
    """`AUTOCAST`, or `TORCH` for reason 7 or 8."""
    dtype = torch.get_autocast_dtype("cpu")
    if not input.is_cpu or not casts_all((input, *parameters), dtype):
        return TORCH
    return TORCH if store and _torch_is_faster_under_autocast(input, parameters, dtype) else AUTOCAST


def _torch_is_faster_under_autocast(input: Tensor, parameters: Sequence[Tensor | None], dtype: torch.dtype) -> bool:
    """Reason 7 under autocast: bfloat16 products as in `torch_is_faster`, or few rows without gradients.

    Torch keeps the rounded weights while a region of autocast lasts; our op rounds them at each call. Measured with
    AVX2, two threads, several calls in one region, eager's time / ours in bfloat16: 10–400–400–3 with 1 row 0.75, 2
    rows 0.86, 4 rows 1.24; 256–1024–1024–10 0.48, 0.81, 1.36; 4–64–64–2 with 1 row 1.45.
    """
    if not torch.is_grad_enabled() and rows_of(input) < 4 and _numbers_of(parameters) >= 1 << 16:
        return True
    return torch_is_faster(input, parameters, dtype)


def casts_all(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether autocast makes these tensors one dtype: it casts float32, and leaves float64 as it is."""
    return all(tensor is None or tensor.dtype is _FLOAT32 or tensor.dtype is dtype for tensor in tensors)


def are_plain(parameters: Iterable[Tensor | None]) -> bool:
    """Not reason 6: all parameters are dense tensors of torch's own classes, or None."""
    for parameter in parameters:  # a generator expression would take twice as long
        if type(parameter) not in PLAIN_OR_NONE or (parameter is not None and parameter.layout is not _STRIDED):
            return False
    return True


# What "linear" and "relu" mean. DeepSpeed's ZeRO-3, FLOP counters and others replace these functions.
def _of_torch(function: Any, module: ModuleType) -> Any:
    """The function, if it is torch's own and not a replacement that was there before us; else something unique."""
    return function if getattr(function, "__globals__", None) is vars(module) else object()


_linear: Any = torch._C._nn.linear
_relu: Any = _of_torch(F.relu, F)
_torch_relu: Any = torch._C._VariableFunctions.relu
_linear_forward: Any = _of_torch(nn.Linear.forward, nn.modules.linear)
_relu_forward: Any = _of_torch(nn.ReLU.forward, nn.modules.activation)
_module_call: Any = _of_torch(nn.Module.__call__, nn.modules.module)
_call_impl: Any = _of_torch(nn.Module._call_impl, nn.modules.module)
_sequential_forward: Any = _of_torch(nn.Sequential.forward, nn.modules.container)
_sequential_iter: Any = _of_torch(nn.Sequential.__iter__, nn.modules.container)


def layers_are_torchs() -> bool:
    """Not reason 3: linear layers and ReLUs are torch's own, and no function mode sees their calls."""
    return (
        F.linear is _linear
        and F.relu is _relu
        and _torch["relu"] is _torch_relu
        and nn.Linear.forward is _linear_forward
        and nn.ReLU.forward is _relu_forward
        and nn.Linear.__call__ is _module_call
        and nn.ReLU.__call__ is _module_call
        and nn.Module._call_impl is _call_impl
        and nn.Sequential.forward is _sequential_forward
        and nn.Sequential.__iter__ is _sequential_iter
        and not (_count_function_modes() and _function_modes_matter())
    )


def linear_is_called(module: nn.Module) -> bool:
    """Whether the call of an ``nn.Linear`` without hooks is a call of F.linear and nothing else."""
    return nn.Linear.forward is _linear_forward and "forward" not in module.__dict__ and not is_tracing()


def relu_is_called(module: nn.Module) -> bool:
    """Whether the call of an ``nn.ReLU`` without hooks is a call of F.relu and nothing else."""
    return nn.ReLU.forward is _relu_forward and "forward" not in module.__dict__ and not is_tracing()


_dropout: Any = _of_torch(F.dropout, F)
_dropout_forward: Any = _of_torch(nn.Dropout.forward, nn.modules.dropout)
_identity_forward: Any = _of_torch(nn.Identity.forward, nn.modules.linear)


def transparent_are_torchs() -> bool:
    """Reason 3 does not hold for Dropout and Identity, too, which only few networks have."""
    return (
        F.dropout is _dropout
        and nn.Dropout.forward is _dropout_forward
        and nn.Identity.forward is _identity_forward
        and nn.Dropout.__call__ is _module_call
        and nn.Identity.__call__ is _module_call
    )


def _function_modes_matter() -> bool:
    """Whether a mode sees torch's functions, other than ``torch.set_default_device`` and those of `_chains`."""
    modes = getattr(torch.overrides, "_get_current_function_mode_stack", lambda: [None])()
    return not all(isinstance(mode, DeviceContext | OwnFunctionMode) for mode in modes)


class OwnFunctionMode(TorchFunctionMode):
    """A mode that changes nothing of what our ops compute."""


def undisturbed(input: Tensor) -> bool:
    """Neither reason 3 nor 4 nor autocast: the layers compute what they say, in the dtype of their arguments."""
    return _unobserved(input) and not (any_autocast() and is_under_autocast(input))


def _unobserved(input: Tensor) -> bool:
    """Neither reason 3 nor 4: linear and ReLU of plain tensors mean what torch means, and nothing observes them."""
    return (
        layers_are_torchs()
        and not transforms_active()
        and not (_count_dispatch_modes() and _is_recorded_by_make_fx(input))
        and forward_mode._current_level < 0
        and not is_tracing()
    )


def autocast_state() -> Any:
    """None without autocast; the dtype in which it computes on the CPU; anything else if it is enabled elsewhere."""
    if not any_autocast():
        return None
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else "elsewhere"


def is_quiet(state: Any = None) -> bool:
    """Whether nothing that could be entered between two layers of a forward sees or changes what layers compute.

    state: what `autocast_state` was at the first of the layers.
    """
    return not (
        autocast_state() is not state
        or transforms_active()
        or (_count_dispatch_modes() and _make_fx_records())
        or (_count_function_modes() and _function_modes_matter())
        or forward_mode._current_level >= 0
        or is_tracing()
    )


# --- torch.func -------------------------------------------------------------------------------------------------------

functorch: Any = torch._C._functorch
_PEELING = (
    "peek_interpreter_stack", "get_interpreter_stack", "pop_dynamic_layer_stack", "push_dynamic_layer_stack",
    "unwrap_if_dead", "_unwrap_batched", "_add_batch_dim", "_unwrap_for_grad", "_wrap_for_grad", "CVmapInterpreterPtr",
    "CGradInterpreterPtr", "TransformType", "get_single_level_autograd_function_allowed",
    "set_single_level_autograd_function_allowed",
)  # fmt: skip
FunctorchNode: Any = getattr(torch.autograd.function, "_SingleLevelFunction", torch.autograd.Function)
_can_peel: bool = FunctorchNode is not torch.autograd.Function and all(hasattr(functorch, name) for name in _PEELING)
_peeled = {getattr(getattr(functorch, "TransformType", None), name, None) for name in ("Vmap", "Grad")}
_KERNEL_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def func_applies() -> bool:
    """Whether `_transforms` can peel all active transforms of torch.func, if any, and no other transform is active."""
    if (
        not _can_peel
        or forward_mode._current_level >= 0
        or is_tracing()
        or (_count_dispatch_modes() and _make_fx_records())
    ):
        return False
    return all(interpreter.key() in _peeled for interpreter in functorch.get_interpreter_stack() or ())


def _is_for_func(input: Any, parameters: Sequence[Tensor | None], store: bool) -> bool:
    """Under a transform, whether none of the reasons for torch holds but the transform."""
    return (
        type(input) in PLAIN
        and layers_are_torchs()
        and func_applies()
        and input.is_cpu
        and input.layout is _STRIDED
        and not input.is_nested
        and input.dtype in _KERNEL_DTYPES
        and not (any_autocast() and torch.is_autocast_enabled("cpu"))
        and are_plain(parameters)
        and not (store and input.dtype is _BFLOAT16 and torch_may_be_faster(parameters))
    )


def func_is_slower(weights: Sequence[Tensor]) -> bool:
    """Reason 7 under torch.func: a single layer has nothing that one node instead of two would save.

    Measured with AVX2, one thread, eager's time / ours, under grad and under vmap(grad) of 5 networks: 4–8–1 with 1 row
    0.98, 0.97; 64–256–10 with 256 rows 1.04, 1.19; 4–8–8–1 with 1 row 1.04, 1.11; 4–8–8–8–8–1 with 1 row 1.18, 1.21. A
    single layer under grad: 64–64 with 64 rows 0.88, 256–256 with 1024 rows 0.79.
    """
    return len(weights) == 1


def _is_recorded_by_make_fx(tensor: Tensor) -> bool:
    """Whether make_fx records ops of plain tensors, a graph in which our op would have no derivative.

    Other dispatch modes may see our ops. (While torch.compile lowers a graph, tensors are not plain.)
    """
    return type(tensor) in PLAIN and _make_fx_records()


def _make_fx_records() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def _joins_graph(input: Any, parameters: Sequence[Tensor | None]) -> bool:
    return (
        not getattr(torch.compiler, "_is_exporting_flag", True)  # is_exporting() is True to Dynamo of torch 2.10
        and type(input) in PLAIN
        and _is_ordinary(input, parameters)
        and _casts_in_graph(input, parameters)
        and are_plain(parameters)
    )


def _casts_in_graph(input: Tensor, parameters: Sequence[Tensor | None]) -> bool:
    """Neither reason 8 nor what reason 1 says of bfloat16."""
    dtype = input.dtype
    if torch.is_autocast_enabled("cpu" if input.is_cpu else "cuda"):
        dtype = torch.get_autocast_dtype("cpu")
        if not input.is_cpu or not casts_all((input, *parameters), dtype):
            return False
    return not (dtype is torch.bfloat16 and torch_may_be_faster(parameters))


def _is_ordinary(input: Tensor, parameters: Iterable[Tensor | None]) -> bool:
    """Reasons 4 to 6, as far as they can be asked in a graph."""
    return (
        input.layout is torch.strided
        and not input.is_nested
        and forward_mode._current_level < 0
        and all(parameter is None or parameter.layout is torch.strided for parameter in parameters)
    )


def route_in_graph(input: Tensor, weights: Sequence[Tensor]) -> str:
    """What computes the op of a captured graph, once it is lowered, on torch's stand-ins for tensors, or run as it is.

    Where every product has a dimension of 1, inductor makes one loop of the network, and wins (`_graph`).
    """
    is_plain = type(input) in PLAIN or type(input).__module__.startswith("torch._subclasses.")
    return (
        KERNELS
        if is_plain
        and input.is_cpu
        and not transforms_active()
        and _is_ordinary(input, weights)
        and not all(1 in weight.shape for weight in weights)
        else TORCH
    )


def may_join_graph(value: Any, dtype: torch.dtype) -> bool:
    """Whether a layer of a captured graph may be ours if this is its input, weight or bias, and `dtype` its output's.

    Under autocast, a layer of float32 tensors has an output in half precision.
    """
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and value.dtype in _KERNEL_DTYPES
        and (value.dtype is dtype or (value.dtype is _FLOAT32 and not (_has_bfloat16_units and dtype is _BFLOAT16)))
    )


def backward_is_composed(grad_output: Tensor) -> bool:
    """Whether backward must consist of torch ops: for gradients of gradients, or because it is batched or recorded."""
    return (
        torch.is_grad_enabled()
        or transforms_active()
        or is_legacy_batched(grad_output)
        or (_count_dispatch_modes() > 0 and _is_recorded_by_make_fx(grad_output))
    )


def backward_is_a_node(grad_output: Tensor) -> bool:
    """Whether a backward pass that `backward_is_composed` is still our kernels', as a node with a backward of its own.

    It is if gradients of gradients are the only reason. There are no kernels for these on a GPU.
    """
    return grad_output.is_cpu and not (
        transforms_active()
        or forward_mode._current_level >= 0
        or is_legacy_batched(grad_output)
        or (_count_dispatch_modes() > 0 and _is_recorded_by_make_fx(grad_output))
    )


def backward_adds(grad_hidden: Tensor) -> bool:
    """Whether the kernels of a backward pass add gradients of the activations: on the CPU, in float64 and float32."""
    return grad_hidden.is_cpu and grad_hidden.dtype in (torch.float64, torch.float32)


_has_amx: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
_has_bfloat16_units: bool = _has_amx or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def _is_level_of_pairs() -> bool:
    try:
        return bool(_ops.isa() == "avx512_bf16")
    except RuntimeError:  # MANUALBP_ISA names no level of this machine: the first call of a kernel says so
        return False


# The level is chosen by the first call that asks for it, which is this one only on a CPU with the instructions.
_kernels_have_bfloat16_units: bool = _has_bfloat16_units and not _has_amx and _is_level_of_pairs()

_LARGE: Final = 1 << 20  # numbers of the weights


def _numbers_of(parameters: Iterable[Tensor | None]) -> int:
    return sum([each.numel() for each in parameters if each is not None and each.dim() == 2])


def torch_is_faster(input: Tensor, parameters: Sequence[Tensor | None], dtype: torch.dtype | None = None) -> bool:
    """Reason 7, of a whole network: bfloat16 products, where the CPU has instructions for them.

    dtype: in which autocast computes; None: that of the input.

    Unless our kernels use these instructions (level avx512_bf16), they widen bfloat16 to float32 and so reach half the
    rate of oneDNN, which does. Measured on Zen 4, eager's time / ours: 64–64–64 with 32 rows 1.6 (0.4 million
    multiply-adds), 784–128–64–32–64–128–784 with 32 rows 1.4 (6 million), 300×5 with 32 rows 0.87 (12 million), 1024×3
    with 32 rows 0.58, with 1 row 0.28. With AMX, which only oneDNN uses, this rule holds at any level.

    At the level avx512_bf16, few rows of large weights are left to torch: packing a weight costs as much as multiplying
    some rows by it. This rule has not been measured. It follows from a trial of the register tile alone, on one core of
    Zen 5: 510 to 538 GFLOP/s, and 266 to 274 with float32's multiply-adds; oneDNN reached 837 GFLOP/s on two cores.
    No whole network has been timed at this level.
    """
    if (dtype or input.dtype) is not torch.bfloat16 or not _has_bfloat16_units or not input.is_cpu:
        return False
    numbers = _numbers_of(parameters)
    if _kernels_have_bfloat16_units:
        return numbers >= _LARGE and rows_of(input) < 32
    return numbers >= _LARGE or rows_of(input) * numbers >= 8 << 20


def torch_may_be_faster(parameters: Iterable[Tensor | None]) -> bool:
    """Whether `torch_is_faster` for some number of rows of a bfloat16 input."""
    return _has_bfloat16_units and not (_kernels_have_bfloat16_units and _numbers_of(parameters) < _LARGE)


_OUTPUTS_LEFT_TO_TORCH = 1 << 17  # 0: none


def rows_left_to_torch(weight: Tensor, relu: bool) -> float:
    """Reason 7, of one linear layer that stands alone in a fused Sequential: up to how many rows torch computes it.

    For few rows our Function, which is written in Python, costs more than torch's two nodes; for many, the pass over
    the data that fusing saves outweighs this. Measured on Zen 4, a training step, eager's time / ours: 4–64 with 64
    rows 0.8, 1024 rows 0.9, 4096 rows 1.3; 16–512 with 64 rows 0.9, 256 rows 1.0, 1024 rows 1.5; 64–64 with 256 rows
    0.8, 1024 rows 1.0, 4096 rows 1.4; where the product outweighs that pass, as in 256–256 with 1024 rows, 0.9 and
    less. (In float16 torch is never faster, and `torch_is_faster` knows bfloat16.)

    Without a ReLU there is nothing to fuse, but over very many rows torch's float32 sums lose digits: a gradient of 1–1
    was off by 1e-3 with 4 million rows. With 2^18 rows a step took eager 1.1 to 6.6 times our time (1–1, 8–8, 8–64,
    64–64, 128–16, 256–256); with a single output, as in 16–1, 0.8 times, so that such layers always go to torch.
    """
    if not relu:
        single = weight.dim() == 2 and weight.shape[0] == 1 < weight.shape[1]
        return float("inf") if single or weight.dim() != 2 or weight.dtype is not torch.float32 else 1 << 18
    if not _OUTPUTS_LEFT_TO_TORCH or weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float64):
        return 0.0
    d_out, d_in = weight.shape
    return _OUTPUTS_LEFT_TO_TORCH / max(d_out, 1) if d_in <= 128 else float("inf")


def route_run(
    way: str, input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], relu: bool, store: bool
) -> str:
    """Reasons 7 and 8 for a run of layers in a fused Sequential, for which `route` has answered `way`."""
    if way is GRAPH:
        is_faster = len(weights) == 1 and not relu
        is_faster = is_faster or (input.dtype is torch.bfloat16 and torch_may_be_faster(weights))
    elif way is FUNC:
        is_faster = func_is_slower(weights)
        is_faster = is_faster or (store and input.dtype is torch.bfloat16 and torch_may_be_faster(weights))
    elif way is AUTOCAST:
        return _route_under_autocast(input, (*weights, *biases), store)
    elif input.dtype is torch.bfloat16:
        is_faster = store and torch_is_faster(input, weights)
    else:
        is_faster = False
    if way is KERNELS and len(weights) == 1:
        is_faster = is_faster or rows_of(input) < rows_left_to_torch(weights[0], relu)
    return TORCH if is_faster else way


def rows_of(input: Tensor) -> int:
    """The number of examples in an input (…, D)."""
    return input.numel() // max(input.shape[-1], 1) if input.dim() else 1


def broadcasts(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether F.linear takes this weight without rows, or this bias, by broadcasting: rare, left to torch."""
    return weight.dim() == 1 or (
        bias is not None and weight.dim() > 0 and (bias.dim() != 1 or (bias.shape[0] == 1 and weight.shape[0] != 1))
    )


_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def eager_way_of_loss(input: Any) -> str:
    """What may compute a network and its loss in one call, if anything: `KERNELS` or `AUTOCAST`."""
    return AUTOCAST if any_autocast() and isinstance(input, Tensor) and is_under_autocast(input) else KERNELS


def loss_is_ours_under_autocast(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype
) -> bool:
    """Whether our op computes a network with its loss: then all gradients of parameters are float32.

    Not in float16, in which ``GradScaler`` must scale the loss before its gradients are computed.
    """
    return (
        dtype is _BFLOAT16
        and all(parameter is None or parameter.dtype is _FLOAT32 for parameter in (*weights, *biases))
        and casts_all((input,), dtype)
        and not torch_is_faster(input, weights, dtype)
    )


def target_is_ours(
    input: Tensor, target: Tensor, spec: LossSpec, weights: Sequence[Tensor] | None = None, way: str = KERNELS
) -> bool:
    """Whether our op takes this target, or rejects it with an error of the class that torch raises.

    Torch takes more: class probabilities, bytes, images, dtypes to promote, shapes to broadcast, subclasses, targets
    that require a gradient. Without `weights`, the shape is not checked. Under autocast, the loss is float32.
    """
    if type(target) is not Tensor or target.layout is not torch.strided or target.requires_grad:
        return False
    if spec.loss.of_classes:
        classes = not target.is_floating_point() and target.dtype is not torch.uint8
        return classes and input.dim() <= 2 and target.shape == input.shape[:-1]
    if way is AUTOCAST and target.dtype is not _FLOAT32:
        return False
    # Otherwise torch promotes, or refuses with an error that depends on its version.
    if target.dtype is not input.dtype and way is not AUTOCAST:
        return target.dtype in _INTEGERS and not spec.loss.takes_integers
    if weights is None:
        return True
    *leading, _ = input.shape or (0,)  # unpacked: half the time of slices
    outputs, *_ = weights[-1].shape or (0,)
    shape, wanted = target.shape, (*leading, outputs)
    if shape == wanted:
        return True
    fits = all(a == b or 1 in (a, b) for a, b in zip(shape[::-1], wanted[::-1], strict=False))
    return spec.loss.broadcasts and not fits


# --- steps of an optimizer ------------------------------------------------------------------------------------------

_profiler_enabled: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: True)
_optimizer_module = vars(sys.modules[torch.optim.Optimizer.__module__])  # torch.optim does not give it away
_step_pre_hooks: Any = _optimizer_module.get("_global_optimizer_pre_hooks", True)
_step_post_hooks: Any = _optimizer_module.get("_global_optimizer_post_hooks", True)


def route_step(optimizer: torch.optim.Optimizer, plain: type[Any]) -> str:
    """What computes the step of a fused optimizer whose class in torch is `plain`: `KERNELS` or `TORCH`.

    The answer is `TORCH` if torch.compile captures the step, if somebody has replaced that of torch's class, where a
    mode, a transform or a tracer must see each operation, and if ``GradScaler`` has left its scale to the optimizer.
    (`optimizers` looks at the options and tensors, and the op at dtypes and layouts.)
    """
    if (
        is_dynamo_compiling()
        or getattr(plain.step, "__globals__", None) is not _optimizer_module
        or _count_dispatch_modes()
        or (_count_function_modes() and _function_modes_matter())
        or transforms_active()
        or getattr(forward_ad, "_current_level", 0) >= 0
        or is_tracing()
        or "found_inf" in optimizer.__dict__
        or "grad_scale" in optimizer.__dict__
    ):
        return TORCH
    return KERNELS


def step_is_observed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step has hooks, its own or those of all optimizers, or is to be seen in a profile."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _step_pre_hooks
        or _step_post_hooks
        or _profiler_enabled()
    )
