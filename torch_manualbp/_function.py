"""The base class of our autograd Functions, and what their backward passes ask of torch's engine."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_manualbp._route import transforms_active

# With a safe default, as in `_route`.
_engine_executes: Callable[[Any], bool] = getattr(torch._C, "_will_engine_execute_node", lambda node: True)


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

    `record` is for callers to whom `route` has ruled transforms out. On a network of 8 layers it saves 3 µs a
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
        if transforms_active() or getattr(forward_ad, "_current_level", 0) >= 0:
            return cls.composed(*args)
        return super().apply(*args)  # type: ignore[no-untyped-call]
