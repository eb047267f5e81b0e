"""Networks under torch.func: `vmap`, `grad`, `vjp`, `jacrev` and their nestings, computed by our kernels.

torch.func stacks *levels*: the innermost transform is the top of the stack, and a tensor may be wrapped at any level. A
call peels one level after the other, as torch's operators do:

  grad   A node at this level saves the call's tensors; the call goes on one level lower, with the wrapped values.
  vmap   Values have one more dimension, of size V. If the parameters are the same for all of them, it joins the rows of
         the input, which are independent of each other. If not, the call becomes one of V stacked networks.
  none   An op computes: `mlp_stacked`, for one network or for E of them. Beneath an autograd graph it is a node there.

Backward passes peel the levels of the stack at that time, which need not be those of the forward pass: jacrev calls the
backward pass of `vjp` under a vmap. There, gradients of parameters that all V values share differ between the values:
they are those of V stacked networks that share their memory. With one row each these are per-sample gradients, for
which `mlp_stacked_backward` has a pass of its own.

Gradients of gradients are composed of torch's operators (`_composed_gradients`), in which activations are recomputed,
since the saved ones are no part of a graph. So are all gradients if a transform that is not peeled here, such as jvp,
is on the stack when they are computed.

`torch.autograd.Function` can do the same by `setup_context` and `vmap`, but makes a class and several trees for each
level of each call.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_manualbp import _ops, reference
from torch_manualbp._function import asked_for
from torch_manualbp._route import PLAIN, FunctorchNode, func_applies, func_is_slower, functorch, is_legacy_batched

_VMAP = getattr(getattr(functorch, "TransformType", None), "Vmap", None)

_Tensors = Sequence[Any]  # input, weights, biases, each a tensor or None; what follows them is said where it is used


class _Call(NamedTuple):
    """What a call computes, besides its tensors.

    With `stacked`, tensors have a first dimension E: input (E, …, D_0), weights (E, D_{k+1}, D_k), biases (E, D_{k+1}).
    """

    layers: int
    final_relu: bool
    store: bool  # whether hidden activations are kept for the backward pass
    stacked: bool = False

    def split(self, tensors: _Tensors) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor | None]]:
        """Input, weights and biases."""
        return tensors[0], tensors[1 : 1 + self.layers], tensors[1 + self.layers : 1 + 2 * self.layers]

    def activations(self, tensors: _Tensors) -> tuple[list[Tensor], Tensor | None]:
        """What follows: h_1 … h_{K−1}, or nothing; and the output if a ReLU ends the network, else None."""
        *hidden, output = tensors[1 + 2 * self.layers :]
        return hidden, output


def layers(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], final_relu: bool, store: bool
) -> Tensor:
    """The output of a network, under transforms for which `route` has answered `FUNC`."""
    if func_is_slower(weights) or not _fits(input, weights, biases):
        return reference.mlp_forward(input, weights, biases, final_relu)[0]
    call = _Call(len(weights), final_relu, store)
    return _on_level(MLPUnderTransforms, call, (False,), (input, *weights, *biases))[0]


def _fits(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether shapes and dtypes are those of a network. If not, torch broadcasts, or raises its own error."""
    if input.dim() == 0:
        return False
    width, dtype = input.shape[-1], input.dtype
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dim() != 2 or weight.shape[1] != width or weight.dtype is not dtype or not weight.is_cpu:
            return False
        width = weight.shape[0]
        if bias is not None and not (bias.shape == (width,) and bias.dtype is dtype and bias.is_cpu):
            return False
    return True


# --- levels -----------------------------------------------------------------------------------------------------------


def _on_level(node: type["_Node"], call: _Call, needs: Sequence[bool], tensors: _Tensors) -> Sequence[Tensor]:
    """The results of `node` for these tensors: peels the top level of the stack, and records a node if one is needed.

    At each level, tensors lose the wrappers of transforms that have ended.
    """
    top = functorch.peek_interpreter_stack()
    if top is None:
        tensors = _alive(tensors)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return node.record(call, needs, None, False, *tensors)
        return node.compute(call, needs, tensors)
    level, is_alive = top.level(), functorch.unwrap_if_dead
    if top.key() == _VMAP:
        unwrap, values, dims = functorch._unwrap_batched, [], []
        for tensor in tensors:
            value, dim = (None, None) if tensor is None else unwrap(is_alive(tensor), level)
            values.append(value)
            dims.append(dim)
        size = functorch.CVmapInterpreterPtr(top).batchSize()
        saved = functorch.pop_dynamic_layer_stack()
        try:
            results, at = node.vmap(call, needs, size, values, dims)
        finally:
            functorch.push_dynamic_layer_stack(saved)
        return results if at is None else [functorch._add_batch_dim(result, at, level) for result in results]
    pointer, grad_mode = functorch.CGradInterpreterPtr(top), torch.is_grad_enabled()
    grad_mode_below = grad_mode and pointer.prevGradMode()
    if grad_mode:
        lift = pointer.lift
        tensors = [None if tensor is None else lift(is_alive(tensor)) for tensor in tensors]
        if any(tensor is not None and tensor.requires_grad for tensor in tensors):
            allowed = functorch.get_single_level_autograd_function_allowed()
            functorch.set_single_level_autograd_function_allowed(True)
            try:
                return node.record(call, needs, level, grad_mode_below, *tensors)
            finally:
                functorch.set_single_level_autograd_function_allowed(allowed)
    return _below(node, call, needs, level, grad_mode_below, _alive(tensors))


def _below(
    node: type["_Node"], call: _Call, needs: Sequence[bool], level: int | None, grad_mode: bool, tensors: _Tensors
) -> Sequence[Tensor]:
    """The results of `node` below the level of a gradient, wrapped for this level; `level` None: there are no more."""
    if level is None:
        return node.compute(call, needs, tensors)
    unwrap, wrap, outside = functorch._unwrap_for_grad, functorch._wrap_for_grad, torch.is_grad_enabled()
    values = [None if tensor is None else unwrap(tensor, level) for tensor in tensors]
    saved = functorch.pop_dynamic_layer_stack()
    try:
        torch._C._set_grad_enabled(grad_mode)
        results = _on_level(node, call, needs, values)
    finally:
        torch._C._set_grad_enabled(outside)
        functorch.push_dynamic_layer_stack(saved)
    return [wrap(result, level) for result in results]


def _alive(tensors: _Tensors) -> list[Any]:
    """The tensors, without the wrappers of transforms that have ended."""
    unwrap = functorch.unwrap_if_dead
    return [None if tensor is None else unwrap(tensor) for tensor in tensors]


def _front(tensor: Tensor | None, dim: int | None, size: int, at: int = 0) -> Tensor | None:
    """The tensor with the dimension of a vmap at position `at`; repeated, without a copy, if it has none."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(at)
        return tensor.expand(*tensor.shape[:at], size, *tensor.shape[at + 1 :])
    return tensor if dim == at else tensor.movedim(dim, at)


class _Node(FunctorchNode):
    """A node of a graph at one level, or of autograd's own graph: `record(call, needs, level, grad_mode, *tensors)`."""

    record: Callable[..., tuple[Tensor, ...]]
    _compiled_autograd_key = staticmethod(getattr(torch.autograd.Function, "_compiled_autograd_key", None) or id)

    def __init_subclass__(cls) -> None:
        """Looks up the C++ part of `apply`."""
        super().__init_subclass__()
        cls.record = super(FunctorchNode, cls).apply

    @staticmethod
    def compute(call: _Call, needs: Sequence[bool], tensors: _Tensors) -> list[Tensor]:
        """The results, when all levels have been peeled."""
        raise NotImplementedError

    @classmethod
    def vmap(
        cls, call: _Call, needs: Sequence[bool], size: int, tensors: _Tensors, dims: Sequence[int | None]
    ) -> tuple[Sequence[Tensor], int | None]:
        """The results for tensors of which some have a further dimension `dims` of this size; where results have it.

        If only rows differ, the dimension joins them. If the results differ for each network, they are stacked.
        """
        if all(dim is None for dim in dims):
            return _on_level(cls, call, needs, tensors), None
        if cls.joins_rows(call, needs, dims):
            at = int(call.stacked)
            of_networks = range(1, 1 + 2 * call.layers) if cls is MLPUnderTransforms else range(2, 2 + 2 * call.layers)
            moved = [
                tensor if i in of_networks else _front(tensor, dim, size, at)
                for i, (tensor, dim) in enumerate(zip(tensors, dims, strict=True))
            ]
            return _on_level(cls, call, needs, moved), at
        stacked = [_front(tensor, dim, size) for tensor, dim in zip(tensors, dims, strict=True)]
        if not call.stacked:
            return _on_level(cls, call._replace(stacked=True), needs, stacked), 0
        flat = [None if tensor is None else tensor.flatten(0, 1) for tensor in stacked]
        results = _on_level(cls, call, needs, flat)
        return [result.view(size, len(result) // size, *result.shape[1:]) for result in results], 0

    @staticmethod
    def joins_rows(call: _Call, needs: Sequence[bool], dims: Sequence[int | None]) -> bool:
        """Whether the dimension of a vmap can join the rows."""
        raise NotImplementedError


def _are_plain(tensors: _Tensors) -> bool:
    """Whether our ops can compute these tensors: what a wrapper held may be of any class and on any device."""
    return all(
        tensor is None or (type(tensor) in PLAIN and tensor.is_cpu and tensor.layout is torch.strided)
        for tensor in tensors
    )


# --- the forward pass -------------------------------------------------------------------------------------------------


class MLPUnderTransforms(_Node):
    """Input, weights, biases → the output and, if `needs` = [True], h_1 … h_{K−1}."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, needs: Sequence[bool], level: int | None, grad_mode: bool, *tensors: Any
    ) -> tuple[Tensor, ...]:
        """The results one level lower. Saves the arguments and the results."""
        output, *hidden = _below(MLPUnderTransforms, call, (call.store,), level, grad_mode, tensors)
        ctx.call, ctx.is_last = call, level is None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*hidden)
        ctx.save_for_backward(*tensors, *hidden, output if call.final_relu else None)
        return output, *(hidden if needs[0] else ())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """The gradients that are needed, at the levels of now."""
        given = len(ctx.needs_input_grad)
        if grad_output is None:
            return (None,) * given
        call, tensors = ctx.call, ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        if ctx.is_last:  # transforms ask only for what they use
            arguments, (input, weights, _) = tensors[: 1 + 2 * call.layers], call.split(tensors)
            needs = tuple(asked_for(ctx, arguments, needs, input.shape, weights))
        if not any(needs):
            return (None,) * given
        if is_legacy_batched(grad_output) or not func_applies():
            grads: Sequence[Tensor] = _composed_gradients(call, needs, _alive((grad_output, *tensors)))
        else:
            grads = _on_level(MLPGradients, call, needs, (grad_output, *tensors))
        remaining = iter(grads)
        return None, None, None, None, *(next(remaining) if need else None for need in needs)

    @staticmethod
    def compute(call: _Call, needs: Sequence[bool], tensors: _Tensors) -> list[Tensor]:
        """One call of the op."""
        input, weights, biases = call.split(tensors)
        if _are_plain(tensors):
            made: list[Tensor] = _ops.mlp_stacked(input, weights, biases, call.final_relu, needs[0])
            return made
        composed, h = _composed(call, tensors)
        return [composed, *(h[1:] if needs[0] else ())]

    @staticmethod
    def joins_rows(call: _Call, needs: Sequence[bool], dims: Sequence[int | None]) -> bool:
        """If all values have the same parameters."""
        return all(dim is None for dim in dims[1:])


# --- the backward pass ------------------------------------------------------------------------------------------------


class MLPGradients(_Node):
    """grad_output, and what `MLPUnderTransforms` saved → the gradients that `needs` asks for.

    needs: of input, weights and biases.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, needs: Sequence[bool], level: int | None, grad_mode: bool, *tensors: Any
    ) -> tuple[Tensor, ...]:
        """The gradients one level lower."""
        ctx.call = call, needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(_below(MLPGradients, call, needs, level, grad_mode, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the gradients: those of the composition."""
        call, needs = ctx.call
        given = len(ctx.needs_input_grad)
        tensors = _alive(ctx.saved_tensors)
        differentiable = 2 + 2 * call.layers
        wanted = [i for i in range(differentiable) if ctx.needs_input_grad[4 + i]]
        reached = [i for i, grad in enumerate(grads) if grad is not None]
        if not wanted or not reached:
            return (None,) * given

        def gradients(*those: Tensor) -> list[Tensor]:
            replaced = list(tensors)
            for i, tensor in zip(wanted, those, strict=True):
                replaced[i] = tensor
            made = _composed_gradients(call, needs, replaced)
            return [made[i] for i in reached]

        pull: Any = torch.func.vjp(gradients, *[tensors[i] for i in wanted])[1]
        found = dict(zip(wanted, pull([grads[i] for i in reached]), strict=True))
        return None, None, None, None, *(found.get(i) for i in range(given - 4))

    @staticmethod
    def compute(call: _Call, needs: Sequence[bool], tensors: _Tensors) -> list[Tensor]:
        """One call of the op."""
        if not _are_plain(tensors):
            return _composed_gradients(call, needs, tensors)
        input, weights, biases = call.split(tensors[1:])
        hidden, output = call.activations(tensors[1:])
        found: list[Tensor] = _ops.mlp_stacked_backward(tensors[0], input, weights, biases, hidden, output, needs)
        return found

    @staticmethod
    def joins_rows(call: _Call, needs: Sequence[bool], dims: Sequence[int | None]) -> bool:
        """If all values have the same parameters, of which no gradient is needed."""
        return not any(needs[1:]) and all(dim is None for dim in dims[2 : 2 + 2 * call.layers])


# --- the composition of torch's operators -----------------------------------------------------------------------------


def _composed(call: _Call, tensors: _Tensors) -> tuple[Tensor, list[Tensor]]:
    """The output, and h_0 … h_{K−1}: `reference.mlp_forward`, also of stacked networks."""
    h, weights, biases = call.split(tensors)
    inputs = []
    for k, (omega, beta) in enumerate(zip(weights, biases, strict=True)):
        inputs.append(h)
        f = _rows(call, h) @ omega.mT
        f = f if beta is None else f + beta.unsqueeze(-2)
        f = f.reshape(*h.shape[:-1], f.shape[-1])
        h = torch.relu(f) if k < call.layers - 1 or call.final_relu else f
    return h, inputs


def _composed_gradients(call: _Call, needs: Sequence[bool], tensors: _Tensors) -> list[Tensor]:
    """The gradients that `needs` asks for, differentiable with respect to grad_output, input, weights and biases."""
    grad_output, *rest = tensors
    _, weights, _ = call.split(rest)
    kept, output = call.activations(rest)
    made, h = _composed(call, rest)
    masks = kept or h[1:]  # of h_1 … h_{K−1}; if kept, the same units are off as in the forward pass
    need_input, need_weights, need_biases = needs[0], needs[1 : 1 + call.layers], needs[1 + call.layers :]
    dweights, dbiases = [], []
    df = reference.relu_mask(made if output is None else output, grad_output) if call.final_relu else grad_output
    for k in reversed(range(call.layers)):
        rows = _rows(call, df)
        if need_biases[k]:
            dbiases.append(rows.sum(-2))
        if need_weights[k]:
            dweights.append(rows.mT @ _rows(call, h[k]))
        if k > 0 or need_input:
            dh = (rows @ weights[k]).reshape(h[k].shape)
            df = dh if k == 0 else reference.relu_mask(masks[k - 1], dh)
    return [*([df] if need_input else ()), *reversed(dweights), *reversed(dbiases)]


def _rows(call: _Call, tensor: Tensor) -> Tensor:
    """(…, D) as (B, D); if stacked, (E, …, D) as (E, B, D)."""
    if tensor.dim() == 2 + call.stacked:
        return tensor
    leading = tensor.shape[: int(call.stacked)]
    return tensor.reshape(*leading, tensor.shape[int(call.stacked) : -1].numel(), tensor.shape[-1])
