"""Base class of our autograd Functions, and the question when kernels may run.

Private functions of torch are looked up here, each with a safe default, so that a torch that renames one makes us
slower, not wrong.
"""

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._device import DeviceContext

from torch_manualbp import _ops

_is_legacy_batched: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda t: True)
_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: True)
_any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
count_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_count_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_engine_executes: Callable[[Any], bool] = getattr(torch._C, "_will_engine_execute_node", lambda node: True)

global_hooks_exist: Callable[[], bool] = getattr(torch.nn.modules.module, "_has_any_global_hook", lambda: True)


_has_bfloat16_units: bool = any(
    getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
)


def torch_is_faster(input: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether plain torch computes this network sooner: bfloat16 products, where the CPU has instructions for them.

    Our kernels widen bfloat16 to float32 and so reach half the rate of those instructions, which oneDNN uses. Measured
    on Zen 4, eager's time / ours: 64–64–64 with 32 rows 1.6 (0.4 million multiply-adds), 784–128–64–32–64–128–784 with
    32 rows 1.4 (6 million), 300×5 with 32 rows 0.87 (12 million), 1024×3 with 32 rows 0.58, with 1 row 0.28.
    """
    if input.dtype is not torch.bfloat16 or not _has_bfloat16_units or not input.is_cpu:
        return False
    parameters = sum([weight.numel() for weight in weights])
    rows = input.numel() // max(input.shape[-1], 1) if input.dim() else 1
    return parameters >= 1 << 20 or rows * parameters >= 8 << 20


_OUTPUTS_LEFT_TO_TORCH = 1 << 17  # 0: none


def rows_left_to_torch(weight: Tensor, relu: bool) -> float:
    """Up to how many rows plain torch computes one linear layer, with its ReLU or without, that stands alone.

    There our Function, which is written in Python, costs more than torch's two nodes, until the pass over the data that
    is saved outweighs it. Measured on Zen 4, a training step, eager's time / ours: 4–64 with 64 rows 0.8, 1024 rows
    0.9, 4096 rows 1.3; 16–512 with 64 rows 0.9, 256 rows 1.0, 1024 rows 1.5; 64–64 with 256 rows 0.8, 1024 rows 1.0,
    4096 rows 1.4; where the product outweighs that pass, as in 256–256 with 1024 rows, 0.9 and less. (In float16 torch
    is never faster, and `torch_is_faster` knows bfloat16.)

    Without a ReLU there is nothing to fuse, but over very many rows torch's float32 sums lose digits: a gradient of 1–1
    was off by 1e-3 with 4 million rows. With 2^18 rows a step took eager 1.1 to 6.6 times our time (1–1, 8–8, 8–64,
    64–64, 128–16, 256–256); with a single output, as in 16–1, 0.8 times.
    """
    if not relu:
        single = weight.dim() == 2 and weight.shape[0] == 1 < weight.shape[1]
        return float("inf") if single or weight.dim() != 2 or weight.dtype is not torch.float32 else 1 << 18
    if not _OUTPUTS_LEFT_TO_TORCH or weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float64):
        return 0.0
    d_out, d_in = weight.shape
    return _OUTPUTS_LEFT_TO_TORCH / max(d_out, 1) if d_in <= 128 else float("inf")


PLAIN: frozenset[type] = frozenset({Tensor, Parameter})  # subclasses may give any op another meaning
PLAIN_OR_NONE: frozenset[type] = PLAIN | {type(None)}


def _of_torch(function: Any, module: ModuleType) -> Any:
    """The function, if it is torch's own and no replacement that was there before us; else something equal to none."""
    return function if getattr(function, "__globals__", None) is vars(module) else object()


# What "linear" and "relu" mean. DeepSpeed's ZeRO-3, FLOP counters and others put their own functions in these places.
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
    """Whether torch's functions and modules for linear and ReLU are its own, and no function mode changes them."""
    return (
        F.linear is _linear
        and F.relu is _relu
        and torch.relu is _torch_relu
        and nn.Linear.forward is _linear_forward
        and nn.ReLU.forward is _relu_forward
        and nn.Linear.__call__ is _module_call
        and nn.ReLU.__call__ is _module_call
        and nn.Module._call_impl is _call_impl
        and nn.Sequential.forward is _sequential_forward
        and nn.Sequential.__iter__ is _sequential_iter
        and not (count_function_modes() and _function_modes_matter())
    )


def undisturbed(input: Tensor) -> bool:
    """Whether a linear layer or a ReLU of plain tensors computes now what torch computes, and nothing looks on.

    Not where torch's functions or modules have been replaced; not under transforms that must see through the
    computation (torch.func, forward-mode AD, make_fx, torch.jit.trace) nor under a `TorchFunctionMode`; not under
    autocast, which chooses dtypes by op. Where the answer is no, plain torch is called, and sees all of it: a function
    mode even sees what is read of a tensor, so this is the first thing to ask.
    """
    return (
        layers_are_torchs()
        and not _transforms_active()
        and not (_count_dispatch_modes() and _is_recorded_by_make_fx(input))
        and getattr(forward_ad, "_current_level", 0) < 0
        and not _is_tracing()
        and not (_any_autocast() and torch.is_autocast_enabled("cpu" if input.is_cpu else "cuda"))
    )


def _function_modes_matter() -> bool:
    """Whether a mode other than ``torch.set_default_device`` (which concerns factories only) sees torch's functions."""
    modes = getattr(torch.overrides, "_get_current_function_mode_stack", lambda: [None])()
    return any(type(mode) is not DeviceContext for mode in modes)


def _is_recorded_by_make_fx(tensor: Tensor) -> bool:
    """Whether a graph of ops on plain tensors is made, in which ours would have no derivative.

    Other dispatch modes may see our ops; where torch.compile lowers a graph, tensors are not plain.
    """
    return type(tensor) in PLAIN and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def kernels_apply(input: Tensor, parameters: Sequence[Tensor | None] = ()) -> bool:
    """Whether our kernels compute this call; if not, the caller composes it from plain torch, which always works.

    Not on other devices, nor for sparse or nested tensors and tensor subclasses; not where `undisturbed` is False, nor
    in programs of torch.export. In a graph that torch.compile captures, `joins_graph` is the question.
    """
    return (
        not torch.compiler.is_compiling()
        and type(input) in PLAIN
        and undisturbed(input)
        and has_kernels(input)
        and input.layout is torch.strided
        and not input.is_nested
        and not input.is_quantized
        and PLAIN_OR_NONE.issuperset(map(type, parameters))
        and all(parameter is None or parameter.layout is torch.strided for parameter in parameters)
    )


def has_kernels(input: Tensor) -> bool:
    """Whether there are kernels for the device of a plain tensor."""
    return input.is_cpu or (input.is_cuda and _ops.has_cuda_kernels)


def joins_graph(input: Tensor, parameters: Sequence[Tensor | None] = ()) -> bool:
    """Whether a call that torch.compile captures becomes one op of the graph (`_graph`). Dynamo guards what this reads.

    bfloat16 is left to torch where the CPU has instructions for it: from how many rows on torch is faster would be a
    condition on the batch size, and so a recompilation.
    """
    return (
        torch.compiler.is_compiling()
        and not getattr(torch.compiler, "_is_exporting_flag", True)  # is_exporting() is True to Dynamo of torch 2.10
        and type(input) in PLAIN
        and not (_has_bfloat16_units and input.dtype is torch.bfloat16)
        and _is_ordinary(input, parameters)
        and all(parameter is None or type(parameter) in PLAIN for parameter in parameters)
    )


def kernels_apply_in_graph(input: Tensor, weights: Iterable[Tensor]) -> bool:
    """The same question where such a graph is lowered, with torch's stand-ins for tensors, or run as it is."""
    is_plain = type(input) in PLAIN or type(input).__module__.startswith("torch._subclasses.")
    return is_plain and input.is_cpu and not _transforms_active() and _is_ordinary(input, weights)


def _is_ordinary(input: Tensor, parameters: Iterable[Tensor | None]) -> bool:
    """Dense tensors, and no mode at work that gives the same call another meaning."""
    return (
        input.layout is torch.strided
        and not input.is_nested
        and getattr(forward_ad, "_current_level", 0) < 0
        and not torch.is_autocast_enabled("cpu" if input.is_cpu else "cuda")
        and all(parameter is None or parameter.layout is torch.strided for parameter in parameters)
    )


def backward_is_composed(grad_output: Tensor) -> bool:
    """Whether backward must be made of torch ops: gradients of gradients are wanted, or it is batched or recorded."""
    return (
        torch.is_grad_enabled()
        or _transforms_active()
        or _is_legacy_batched(grad_output)
        or (_count_dispatch_modes() > 0 and _is_recorded_by_make_fx(grad_output))
    )


def asked_for(ctx: Any, arguments: Sequence[Tensor | None], needs: Sequence[bool]) -> Sequence[bool]:
    """Which of the gradients that `needs` allows this backward pass will use.

    A node of several layers is asked for all of them even if ``backward(inputs=…)`` or ``autograd.grad`` wants one:
    the others would be computed and dropped.

    Args:
        ctx: of the node.
        arguments: the tensors, or None, that its forward got, in order.
        needs: which of them require a gradient.
    """
    edges = ctx.next_functions
    try:
        if all(map(_engine_executes, [node for node, _ in edges if node])):  # as usual: 1 µs for 8 parameters
            return needs
    except RuntimeError:
        pass
    nodes = iter(edges)
    return [
        argument is not None and (node := next(nodes)[0]) is not None and need and _executes(node)
        for argument, need in zip(arguments, needs, strict=True)
    ]


def _executes(node: Any) -> bool:
    try:
        return _engine_executes(node)
    except RuntimeError:  # torch does not say of a leaf that autograd.grad was asked for; of others it does
        return True


def refuse_capture(function: str) -> NoReturn:
    """Ends the capture of a Function by Dynamo, which would take its raw ops for their own derivatives: zeros."""
    raise NotImplementedError(f"torch.compile cannot capture {function}.apply: call linear_relu, mlp or mlp_loss")


class ManualFunction(torch.autograd.Function):
    """A Function that transforms see through, with `record`, which is `apply` without the bookkeeping for them.

    Under torch.func and forward-mode AD, `apply` computes the same from plain torch (`composed`), which has every
    derivative and batching rule. A Function of ours would need `setup_context`, which costs each call 13 µs more.

    `record` is for callers to whom `kernels_apply` has ruled transforms out. On a network of 8 layers it saves 3 µs a
    call (torch walks the arguments to unwrap dead functorch wrappers).
    """

    record: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls) -> None:
        """Looks up, once, the part of `apply` that is written in C++."""
        super().__init_subclass__()
        cls.record = super(torch.autograd.Function, cls).apply  # type: ignore[misc]

    @staticmethod
    def composed(*args: Any) -> Any:
        """What `apply` returns for these arguments, from differentiable torch ops."""
        raise NotImplementedError

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """The result, as one node of autograd's graph; under a transform, from plain torch."""
        if torch.compiler.is_dynamo_compiling():
            refuse_capture(cls.__name__)
        if _transforms_active() or getattr(forward_ad, "_current_level", 0) >= 0:
            return cls.composed(*args)
        return super().apply(*args)  # type: ignore[no-untyped-call]
