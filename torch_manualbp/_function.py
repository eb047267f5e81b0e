"""The base class of our autograd Functions, and what their backward passes ask of torch's engine."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from torch_manualbp._route import forward_mode, transforms_active

# With a safe default, as in `_route`.
_engine_executes: Callable[[Any], bool] = getattr(torch._C, "_will_engine_execute_node", lambda node: True)

SMALL = 1 << 19  # multiply-adds of the gradients of all weights: about 20 µs


def asked_for(
    ctx: Any,
    arguments: Sequence[Tensor | None],
    needs: Sequence[bool],
    shape: torch.Size,
    weights: Sequence[Tensor],
    first: int = 1,
) -> Sequence[bool]:
    """Which of the gradients that `needs` allows will be used by this backward pass.

    ``backward(inputs=…)`` and ``autograd.grad`` may use only some, but the `needs` of a node do not say so: the other
    gradients would be computed and dropped.

    Torch does not tell for a leaf that ``autograd.grad`` asks for: it raises an error, which takes 20 to 120 µs. In
    that time all gradients of a small network are computed, so all count as used. In a larger network, they do if the
    first parameter is such a leaf: then the pass must reach the lowest layer anyway.

    Args:
        ctx: of the node.
        arguments: the tensors (or None) that its forward was called with, in order.
        needs: which of them require a gradient.
        shape: (…, D), of the input or the output.
        weights: of the layers.
        first: where the parameters begin in `arguments`.
    """
    rows = math.prod(shape[:-1])
    is_number = type(rows) is int  # not if a graph is compiled for any number of rows
    if is_number and rows * sum([weight.numel() for weight in weights]) < SMALL:
        return needs
    edges = ctx.next_functions
    nodes = [node for node, _ in edges if node]
    executes, answers = list[bool](), map(_engine_executes, nodes)
    while len(executes) < len(nodes):
        try:
            executes.extend(answers)  # the usual case: 1 µs for 8 parameters
        except RuntimeError:
            before = sum(argument is not None for argument in arguments[:first])
            is_first = len(executes) == sum(node is not None for node, _ in edges[:before])
            executes.extend([True] * (len(nodes) - len(executes) if is_first else 1))
    if all(executes):
        return needs
    answer = iter(executes)
    edge = iter([node is not None and next(answer) for node, _ in edges])
    return [argument is not None and next(edge) and need for argument, need in zip(arguments, needs, strict=True)]


def refuse_capture(function: str) -> NoReturn:
    """Stops Dynamo from tracing a Function: it would differentiate the raw ops in it, which have no derivative: zeros.

    Both `apply` and every forward call this: Dynamo enters a Function by either, depending on the call.
    """
    raise NotImplementedError(f"torch.compile cannot capture {function}.apply: call linear_relu, mlp or mlp_loss")


class ManualFunction(torch.autograd.Function):
    """A Function that works under transforms, with `record`: an `apply` without the bookkeeping that they need.

    Under torch.func and forward-mode AD, `apply` computes the same from plain torch (`composed`), which has every
    derivative and batching rule. The alternative, `setup_context`, would cost every call 13 µs.

    `record` is for callers that have asked `route`, which excludes transforms. On a network of 8 layers it saves 3 µs a
    call (torch searches the arguments for dead functorch wrappers).
    """

    record: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls) -> None:
        """Looks up the C++ part of `apply` once."""
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
        if transforms_active() or forward_mode._current_level >= 0:
            return cls.composed(*args)
        return super().apply(*args)  # type: ignore[no-untyped-call]
