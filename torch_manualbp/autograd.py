"""The autograd Functions: for each op its forward and its hand-written backward, side by side.

First-order gradients come from our kernels. For gradients of gradients (`create_graph=True`), backward is a node of its
own (`MLPBackwardFunction`), whose backward pass has kernels, too. Its arguments are the activations that forward saved,
which are outputs of the same node, so that they are part of the graph. On a GPU, where backward itself is batched
(`is_grads_batched=True`), and for derivatives of higher order, the same equations are composed from differentiable
torch ops (`reference.mlp_backward`, `reference.mlp_double_backward`).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from torch_manualbp import _ops, reference
from torch_manualbp._function import ManualFunction, asked_for, refuse_capture
from torch_manualbp._losses import LossSpec
from torch_manualbp._ops import masks_of, split_hidden
from torch_manualbp._route import backward_adds, backward_is_a_node, backward_is_composed


class LinearReLUFunction(ManualFunction):
    """relu(input weightᵀ + bias), as `apply(input, weight, bias)`.

        forward   h' = a[β + Ω h]
        backward  ∂ℓ/∂f = I[h' > 0] ⊙ ∂ℓ/∂h';   ∂ℓ/∂h = Ωᵀ ∂ℓ/∂f;   ∂ℓ/∂Ω = ∂ℓ/∂f hᵀ
                  ∂ℓ/∂β = ∂ℓ/∂f

    Backward computes those gradients that are needed.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The kernel. Saves h (input), Ω (weight) and h' (output), each only if backward will read it."""
        if torch.compiler.is_dynamo_compiling():
            refuse_capture("LinearReLUFunction")
        output: Tensor = _ops.linear_relu(input, weight, bias)
        need_input, need_weight, _ = ctx.needs_input_grad
        ctx.arguments = (input.shape, weight, bias)
        ctx.weight = used = weight.detach()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            _as_used(input, need_input) if need_weight else None, used if need_input else None, output
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """All gradients that are needed, in one call."""
        if grad_output is None:  # a gradient of a gradient that reaches only the parameters
            return None, None, None
        input, weight, output = ctx.saved_tensors
        shape, *parameters = ctx.arguments
        needs = asked_for(ctx, (output, *parameters), ctx.needs_input_grad, shape, [ctx.weight])
        if backward_is_composed(grad_output):
            if backward_is_a_node(grad_output):
                saved = (input, output.new_empty((0,)), output)
                return MLPBackwardFunction.of(grad_output, saved, needs, (), [ctx.weight], [weight], parameters)
            (weight,) = _connected(parameters[:1], [weight])
            grads = reference.mlp_backward(grad_output, [input], [weight], output, needs=needs)
            return grads.dinput, grads.dweights[0], grads.dbiases[0]
        input = _stand_in(output, shape) if input is None else input
        return _spread(needs, _ops.linear_relu_backward(grad_output, input, ctx.weight, output, needs))

    @staticmethod
    def composed(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer in plain torch."""
        return reference.mlp_forward(input, [weight], [bias], final_relu=True)[0]


class MLPFunction(ManualFunction):
    """A whole network as one node: `apply(input, final_relu, store, K, *weights, *biases)` → (output, hidden).

    With `store`, `hidden` holds h_1 … h_{K−1} in one flat tensor. It is an output only so that gradients of gradients
    can flow through the activations that backward reads. Without `store` it is empty, and backward recomputes them.

    Two more arguments, `kept` and `scales`, are the dropout after the ReLUs, as for the op `mlp_dropout`:

        forward   h_{k+1} = m_k ⊙ a[f_k], each element of m_k being 0 or c_k
        backward  ∂ℓ/∂f_k = c_k I[h_{k+1} > 0] ⊙ ∂ℓ/∂h_{k+1}

    So only recomputation needs the masks (`reference`).
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, final_relu: bool, store: bool, layers: int, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        """All layers in one call. Saves only what backward will read.

        Without `store` these are all arguments. With it: the input if Ω_0 learns, Ω_k if something below layer k does,
        the activations, and the output if it is that of a ReLU.
        """
        if torch.compiler.is_dynamo_compiling():
            refuse_capture("MLPFunction")
        parameters, dropout = rest[: 2 * layers], rest[2 * layers :]
        weights, biases = parameters[:layers], parameters[layers:]
        op = _ops.mlp_dropout if dropout else _ops.mlp
        output, hidden = op(input, weights, biases, final_relu, store, *dropout)
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad
        # Backward must multiply by the weights that forward used, and `weight.data = …` may replace their memory in
        # between, unnoticed by autograd. An alias keeps that memory, as does the view that torch's own linear saves.
        # (0.3 µs each.)
        used = [weight.detach() for weight in weights]
        ctx.call = (store, input.shape, used, parameters, *dropout[1:])
        result = output if final_relu else None
        if not store:
            biases_used = [None if bias is None else bias.detach() for bias in biases]
            ctx.save_for_backward(_as_used(input, needs[0]), result, *used, *biases_used, *dropout[:1])
            return output, hidden
        first = 0  # backward multiplies by the weights of this layer and those above
        while first < layers and not (needs[0] or (first > 0 and (needs[3 + first] or needs[3 + layers + first]))):
            first += 1
        h_0 = _as_used(input, needs[0]) if needs[4] else None
        ctx.save_for_backward(h_0, result, hidden, *[None] * first, *used[first:])
        return output, hidden

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        """All layers in reverse, in one call, down to the lowest layer whose gradient is needed."""
        if grad_output is None and grad_hidden is None:  # a gradient of a gradient that reaches only the parameters
            return (None,) * len(ctx.needs_input_grad)
        store, shape, weights, parameters, *scales = ctx.call
        layers = len(weights)
        input, output, *read = ctx.saved_tensors
        hidden, biases = (read.pop(0), ()) if store else (None, read[layers : 2 * layers])
        allowed = _of_tensors(ctx.needs_input_grad)[: 1 + 2 * layers]
        needs = asked_for(ctx, (weights[0], *parameters), allowed, shape, weights)
        dropout = (None if store else read[-1], *scales) if scales else ()
        if grad_output is None:  # a gradient of a gradient that reaches `hidden` but not the last layer
            needs = [need and i not in (layers, 2 * layers) for i, need in enumerate(needs)]
        if not any(needs):
            return (None,) * len(ctx.needs_input_grad)
        is_composed = backward_is_composed(cast(Tensor, grad_hidden if grad_output is None else grad_output))
        if grad_hidden is not None and not is_composed and not grad_hidden.any():
            grad_hidden = None  # zeros from the mask I[h > 0]: torch would multiply them through all layers
        if grad_output is None and grad_hidden is None:
            shapes = (shape, *(None if p is None else p.shape for p in (*weights, *parameters[layers:])))
            zeros = [weights[0].new_zeros(size) if need else None for size, need in zip(shapes, needs, strict=True)]
            return zeros[0], None, None, None, *zeros[1:], *[None] * len(dropout)
        if is_composed and grad_output is not None and grad_hidden is None and backward_is_a_node(grad_output):
            if hidden is None:  # a node that stores them
                used = [*read[:layers], *biases]
                hidden = MLPFunction.record(
                    input, output is not None, True, layers, *_connected(parameters, used), *dropout
                )[1]
            saved, (dropped,) = (input, hidden, output), scales or ((),)
            spread = MLPBackwardFunction.of(grad_output, saved, needs, dropped, weights, read[:layers], parameters)
            return spread[0], None, None, None, *spread[1:], *[None] * len(dropout)
        if grad_output is None:
            grad_output = weights[0].new_zeros((*shape[:-1], weights[-1].shape[0]))
        if grad_hidden is not None and not is_composed and backward_adds(grad_hidden):
            h_0 = _stand_in(weights[0], shape) if input is None else input
            arguments = (grad_output, grad_hidden.contiguous(), h_0, weights, hidden, output, needs, *scales)
            spread = _spread(needs, _ops.mlp_backward_further(*arguments))
            return spread[0], None, None, None, *spread[1:], *[None] * len(dropout)
        if grad_hidden is not None or is_composed:
            in_graph = _connected(parameters[:layers], read[:layers])
            if hidden is None:
                masks = masks_of(dropout, shape, weights, input.dtype)
                _, h = reference.mlp_forward(
                    input, in_graph, _connected(parameters[layers:], biases), output is not None, masks
                )
            else:
                h = [input, *split_hidden(hidden, shape, weights)]
            grad_h = None if grad_hidden is None else split_hidden(grad_hidden, shape, weights)
            grads = reference.mlp_backward(grad_output, h, in_graph, output, grad_h, needs, *scales)
            return grads.dinput, None, None, None, *grads.dweights, *grads.dbiases, *[None] * len(dropout)
        input = _stand_in(weights[0], shape) if input is None else input
        op = _ops.mlp_dropout_backward if dropout else _ops.mlp_backward
        spread = _spread(needs, op(grad_output, input, weights, biases, hidden, output, needs, *dropout))
        return spread[0], None, None, None, *spread[1:], *[None] * len(dropout)

    @staticmethod
    def composed(input: Tensor, final_relu: bool, store: bool, layers: int, *rest: Any) -> tuple[Tensor, Tensor]:
        """The network in plain torch."""
        parameters = rest[: 2 * layers]
        masks = masks_of(rest[2 * layers :], input.shape, parameters[:layers], input.dtype)
        output, h = reference.mlp_forward(input, parameters[:layers], parameters[layers:], final_relu, masks)
        hidden = [h_k.flatten() for h_k in h[1:]] if store else []
        return output, torch.cat(hidden) if hidden else input.new_empty((0,))


class AutocastFunction(ManualFunction):
    """A float32 network under autocast as one node: `apply(input, options, *weights, *biases)` → output.

    The equations are those of `MLPFunction`, and so are the arguments; `options` = (dtype, final_relu, store, K). Input
    and parameters are rounded to `dtype`, in which activations and output are stored. The gradients of the parameters
    are the float32 sums; torch, whose linear layers return them in `dtype`, rounds them.

    Gradients of gradients are composed from torch's ops.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, options: tuple[torch.dtype, bool, bool, int], *rest: Any) -> Tensor:
        """All layers in one call. Saves what `MLPFunction` saves, but h_0 in its own dtype."""
        if torch.compiler.is_dynamo_compiling():
            refuse_capture("AutocastFunction")
        dtype, final_relu, store, layers = options
        parameters, dropout = rest[: 2 * layers], rest[2 * layers :]
        weights, biases = parameters[:layers], parameters[layers:]
        kept, scales = dropout or (None, ())
        output: Tensor
        output, hidden = _ops.mlp_autocast(input, weights, biases, final_relu, store, kept, scales, dtype)
        ctx.set_materialize_grads(False)
        used = [None if parameter is None else parameter.detach() for parameter in parameters]
        versions = [input._version, *[None if parameter is None else parameter._version for parameter in parameters]]
        ctx.call = options, (input, *parameters), used, versions, kept, scales
        need_input, _, *need = ctx.needs_input_grad[: 2 + 2 * layers]
        saved = list[Tensor | None](used)
        if store:  # no bias, and of the weights only those that gradients are multiplied by on their way down
            first = 0
            while first < layers and not (need_input or (first > 0 and (need[first - 1] or need[layers + first - 1]))):
                first += 1
            saved[:first] = [None] * first
            saved[layers:] = []
        h_0 = _as_used(input, need_input) if need[0] or not store else None
        ctx.save_for_backward(h_0, output if final_relu else None, hidden if store else None, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """All layers in reverse, in one call, down to the lowest layer whose gradient is needed."""
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        (_, _, store, layers), arguments, used, _, kept, scales = ctx.call
        input, output, hidden, *_ = ctx.saved_tensors
        shape, weights = arguments[0].shape, used[:layers]
        allowed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2 : 2 + 2 * layers]]
        needs = asked_for(ctx, (weights[0], *arguments[1:]), allowed, shape, weights)
        rest = [None] * (len(ctx.needs_input_grad) - 2 - 2 * layers)
        if backward_is_composed(grad_output):
            spread = AutocastFunction._composed_backward(ctx, grad_output, needs)
            return spread[0], None, *spread[1:], *rest
        if input is None:
            input = _stand_in(arguments[0].detach(), shape)
        biases = () if store else used[layers:]
        spread = _spread(
            needs,
            _ops.mlp_autocast_backward(grad_output, input, weights, biases, hidden, output, needs, kept, scales),
        )
        # Gradients of parameters that are not float32 are rounded, as by autograd.
        spread = tuple(
            grad if grad is None or grad.dtype is like.dtype else grad.to(like.dtype)
            for grad, like in zip(spread, arguments, strict=True)
        )
        return spread[0], None, *spread[1:], *rest

    @staticmethod
    def _composed_backward(ctx: Any, grad_output: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """The gradients [input, *weights, *biases], differentiable: those of torch's own ops, computed again."""
        options, arguments, used, versions, *dropout = ctx.call
        for tensor, version in zip((arguments[0], *used), versions, strict=True):
            if tensor is not None and tensor._version != version:
                raise RuntimeError(
                    "a gradient of a gradient under autocast needs all that the forward pass read, but one of its "
                    "tensors has been modified by an inplace operation"
                )
        with torch.enable_grad():
            in_graph = [arguments[0], *_connected(arguments[1:], used)]
            in_graph = [None if tensor is None else tensor.view_as(tensor) for tensor in in_graph]
            output = AutocastFunction.composed(in_graph[0], options, *in_graph[1:], *(dropout if dropout[1] else ()))
            wanted = [tensor for tensor, need in zip(in_graph, needs, strict=True) if need]
            grads = torch.autograd.grad(output, wanted, grad_output, create_graph=True, materialize_grads=True)
        return _spread(needs, grads)

    @staticmethod
    def composed(input: Tensor, options: tuple[torch.dtype, bool, bool, int], *rest: Any) -> Tensor:
        """The network in plain torch, with autocast's casts written out."""
        dtype, final_relu, _, layers = options
        parameters: list[Any] = [None if each is None else each.to(dtype) for each in rest[: 2 * layers]]
        masks = masks_of(rest[2 * layers :], input.shape, parameters[:layers], dtype)
        return reference.mlp_forward(input.to(dtype), parameters[:layers], parameters[layers:], final_relu, masks)[0]


class MLPBackwardFunction(ManualFunction):
    """The backward pass of a network as one node: `apply(…)` → the gradients that are needed. `of` makes the call.

    It is linear in ∂ℓ/∂output, and its masks are constant. Given the gradients of a scalar M by its results, v by
    ∂ℓ/∂h_0, V_k by ∂ℓ/∂Ω_k and u_k by ∂ℓ/∂β_k, its own backward pass computes c_k, that by ∂ℓ/∂h_k, and a_k, that by
    ∂ℓ/∂f_k. It looks like a forward pass, which starts at c_0 = v:

        forward   ∂ℓ/∂β_k = ∂ℓ/∂f_k;   ∂ℓ/∂Ω_k = ∂ℓ/∂f_k h_kᵀ
                  ∂ℓ/∂f_{k−1} = I[h_k > 0] ⊙ (Ω_kᵀ ∂ℓ/∂f_k)
        backward  a_k = Ω_k c_k + V_k h_k + u_k;   c_{k+1} = I[h_{k+1} > 0] ⊙ a_k
                  ∂M/∂Ω_k = ∂ℓ/∂f_k c_kᵀ;   ∂M/∂h_k = V_kᵀ ∂ℓ/∂f_k
                  ∂M/∂(∂ℓ/∂f_{K−1}) = a_{K−1}
    """

    @classmethod
    def of(
        cls,
        grad_output: Tensor,
        saved: tuple[Tensor | None, Tensor, Tensor | None],
        needs: Sequence[bool],
        scales: Sequence[float],
        weights: Sequence[Tensor],
        read: Sequence[Tensor | None],
        parameters: Sequence[Any],
    ) -> tuple[Tensor | None, ...]:
        """The gradients [input, *weights, *biases]; None where `needs` says so.

        Args:
            grad_output: ∂ℓ/∂output.
            saved: the input, the activations, and the output if it is that of a ReLU.
            needs: which gradients are needed.
            scales: of dropout, or nothing.
            weights: as forward used them.
            read: the same; None where they are not read.
            parameters: weights and biases, the arguments of forward.
        """
        reads = [weight is not None for weight in read]
        in_graph = (*_connected(parameters[: len(read)], read), *parameters[len(read) :])
        return _spread(needs, cls.record(needs, scales, weights, reads, grad_output, *saved, *in_graph))

    @staticmethod
    def forward(
        ctx: Any,
        needs: Sequence[bool],
        scales: Sequence[float],
        shapes: Sequence[Tensor],
        reads: Sequence[bool],
        grad_output: Tensor,
        input: Tensor | None,
        hidden: Tensor,
        output: Tensor | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """The kernels of an ordinary backward pass. Parameters that it does not read are arguments for their zeros."""
        ctx.call = needs, scales, shapes, parameters
        ctx.set_materialize_grads(False)
        weights = [weight if read else None for weight, read in zip(parameters, reads, strict=False)]
        h_0, omega = _complete(grad_output, input, weights, shapes)
        df, *grads = _ops.mlp_backward_store(grad_output, h_0, omega, hidden, output, needs, scales)
        ctx.save_for_backward(grad_output, input, hidden, output, df, *weights)
        ctx.mark_non_differentiable(*_constants(ctx.needs_input_grad[4:], _spread(needs, grads)))
        return tuple(grads)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients by ∂ℓ/∂output, the input, the activations and the weights, in one call."""
        needs, scales, shapes, parameters = ctx.call
        grad_output, input, hidden, output, df, *weights = ctx.saved_tensors
        layers, given = len(weights), [each for each in cotangents if each is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        v, *rest = _spread(needs, cotangents)
        by_weights, by_biases = rest[:layers], rest[layers:]
        arrives = [v is not None, *(by_weights[k] is not None or by_biases[k] is not None for k in range(layers))]
        lowest = arrives.index(True)  # the first c_k that is not zero
        arguments = (grad_output, input, hidden, output, *parameters)
        asked = asked_for(ctx, arguments, ctx.needs_input_grad[4:], grad_output.shape, shapes, 4)
        wanted = [
            asked[0],
            asked[1] and by_weights[0] is not None,
            asked[2] and any(each is not None for each in by_weights[1:]),
            *(asked[4 + k] and lowest <= k for k in range(layers)),
        ]
        h_0, omega = _complete(grad_output, input, weights, shapes)
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if any(map(backward_is_composed, given)):
            h = [h_0, *split_hidden(hidden, h_0.shape, omega)]
            second = reference.mlp_double_backward(
                grad_output, h, omega, output, reference.Gradients(v, by_weights, by_biases), scales
            )
            flat = [torch.zeros_like(h_k) if dh is None else dh for h_k, dh in zip(h[1:], second.dh[1:], strict=True)]
            dhidden = torch.cat([dh.reshape(-1) for dh in flat]) if wanted[2] else None
            found = (second.dgrad_output, second.dh[0], dhidden, *second.dweights)
        elif any(wanted):
            found = _spread(
                wanted,
                _ops.mlp_double_backward(
                    grad_output, h_0, omega, hidden, output, df, v, by_weights, by_biases, wanted, scales
                ),
            )
        # What only masks read has the gradient zero. Torch passes it on, as zeros, through all layers below the mask.
        # An input that was not saved gets its zeros from the node of the forward pass.
        dgrad_output, dinput, dhidden, *dweights = found
        doutput, dbiases = None, list[Tensor | None]([None] * layers)
        below = layers if output is not None else layers - 1 if max(lowest, 1) < layers else 0
        if below and input is None and output is not None and asked[3]:
            doutput = torch.zeros_like(output)
        elif below and input is None and dhidden is None and asked[2]:
            dhidden = torch.zeros_like(hidden)
        elif below and asked[1] and dinput is None:
            dinput = torch.zeros_like(h_0)
        for k in range(below):
            if asked[4 + k] and dweights[k] is None:
                dweights[k] = torch.zeros_like(shapes[k])
            if asked[4 + layers + k]:
                dbiases[k] = shapes[k].new_zeros(shapes[k].shape[:1])
        return None, None, None, None, dgrad_output, dinput, dhidden, doutput, *dweights, *dbiases


class MLPLossFunction(ManualFunction):
    """Network and loss as one node: `apply(input, target, loss, K, *weights, *biases)` with a `LossSpec`.

    Forward computes the gradients, too; backward multiplies them by the incoming gradient ∂L/∂ℓ.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, loss: LossSpec, layers: int, *parameters: Tensor) -> Tensor:
        """Forward, loss and backward in one pass over blocks of rows; keeps the gradients.

        The arguments are saved for a second backward pass and for gradients of gradients. The first backward pass reads
        none of them, so that they may have been modified in place.
        """
        if torch.compiler.is_dynamo_compiling():
            refuse_capture("MLPLossFunction")
        weights, biases = parameters[:layers], parameters[layers:]
        ctx.parameters, ctx.loss, ctx.needs = parameters, loss, _of_tensors(ctx.needs_input_grad)
        value, *ctx.grads = loss.run(input, target, weights, biases, ctx.needs)
        used = [None if parameter is None else parameter.detach() for parameter in parameters]
        ctx.save_for_backward(_as_used(input, ctx.needs[0]), target, *used)
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that forward computed, times ∂L/∂ℓ: handed over, not copied. A second pass recomputes them."""
        if backward_is_composed(grad_output):
            input, target, *used = ctx.saved_tensors
            parameters = _connected(ctx.parameters, used)
            grads = _loss_gradients(ctx.loss, input, target, parameters, ctx.needs, grad_output)
        else:
            grads = vars(ctx).pop("grads", None)  # atomic: another thread may run backward on the same graph
            if grads is None:
                input, target, *used = ctx.saved_tensors
                layers = len(used) // 2
                _, *grads = ctx.loss.run(input, target, used[:layers], used[layers:], ctx.needs)
            if grad_output.is_cuda:  # reading the value would synchronise with the device
                torch._foreach_mul_(grads, grad_output)
            elif type(grad_output) is not Tensor:  # a stand-in without a value: a graph is being lowered
                grads = tuple(grad * grad_output for grad in grads)
            elif (scale := grad_output.item()) != 1.0:  # usually 1.0: save a pass over all gradients
                torch._foreach_mul_(grads, scale)
        spread = _spread(ctx.needs, grads)
        return spread[0], None, None, None, *spread[1:]

    @staticmethod
    def composed(input: Tensor, target: Tensor, loss: LossSpec, layers: int, *parameters: Tensor) -> Tensor:
        """Network and loss in plain torch."""
        output, _ = reference.mlp_forward(input, parameters[:layers], parameters[layers:])
        return loss.of(output, target)


def _loss_gradients(
    loss: LossSpec,
    input: Tensor,
    target: Tensor,
    parameters: Sequence[Tensor],
    needs: Sequence[bool],
    grad_output: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of a loss, for gradients of gradients: those of the network's nodes and of torch's loss."""
    layers = len(parameters) // 2
    with torch.enable_grad():
        # Give each argument a view of its own, so that a tensor that was passed twice gets a gradient per position
        # instead of their sum at both.
        input, *parameters = (None if tensor is None else tensor.view_as(tensor) for tensor in (input, *parameters))
        if loss.autocast is not None:
            output = AutocastFunction.composed(input, (loss.autocast, False, True, layers), *parameters).float()
        else:
            network = MLPFunction.apply if backward_is_a_node(grad_output) else MLPFunction.composed
            output, _ = network(input, False, True, layers, *parameters)
        wanted = [tensor for tensor, need in zip((input, *parameters), needs, strict=True) if need]
        return torch.autograd.grad(loss.of(output, target), wanted, grad_output, create_graph=True)


class _Connect(torch.autograd.Function):
    """`apply(parameter, used)` → `used`, with a backward that passes gradients on to `parameter`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(parameter: Tensor, used: Tensor) -> Tensor:
        """An alias."""
        return used.view_as(used)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is needed."""

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """The gradient of an identity."""
        return grad_output, None


def _connected(parameters: Sequence[Any], used: Sequence[Any]) -> list[Any]:
    """The tensors that forward used, connected to the graph of the parameters, whose memory may have been replaced."""
    return [
        parameter if now is None or parameter is None or _is_same(parameter, now) else _Connect.apply(parameter, now)  # type: ignore[no-untyped-call]
        for parameter, now in zip(parameters, used, strict=True)
    ]


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same view of the same storage."""
    return (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() == b.storage_offset()
        and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    )


def _complete(
    grad_output: Tensor, input: Tensor | None, weights: Sequence[Tensor | None], shapes: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Input and weights; in place of those that are not read, tensors of their shapes."""
    if input is None:
        input = _stand_in(grad_output, torch.Size((*grad_output.shape[:-1], shapes[0].shape[1])))
    return input, [like if weight is None else weight for weight, like in zip(weights, shapes, strict=True)]


def _constants(needs: Sequence[bool], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients [input, *weights, *biases] of a backward pass that depend on no tensor that needs a gradient.

    needs: of [grad_output, input, hidden, output, *weights, *biases].
    """
    layers = (len(needs) - 4) // 2
    df_varies, constant = needs[0] or needs[3], []
    for k in reversed(range(layers)):
        constant += [] if df_varies else [grads[1 + layers + k]]
        constant += [] if df_varies or needs[2 if k else 1] else [grads[1 + k]]
        df_varies = df_varies or needs[4 + k] or (k > 0 and needs[2])
    constant += [] if df_varies else [grads[0]]
    return [grad for grad in constant if grad is not None]


def _as_used(input: Tensor, needs_gradient: bool) -> Tensor:
    """The tensor to save for an input: as torch's linear does, a matrix itself, and an alias of any other shape.

    They differ after ``input.data = …``. An input that needs a gradient is saved itself, since it is part of the graph.
    """
    return input if needs_gradient or input.dim() == 2 else input.detach()


def _stand_in(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of this shape without memory, for an input of which backward needs only the shape."""
    return like.new_zeros(()).expand(shape)


def _of_tensors(needs_input_grad: tuple[bool, ...]) -> list[bool]:
    """`needs_input_grad` of input and parameters, without the three arguments between them."""
    needs = list(needs_input_grad)
    del needs[1:4]
    return needs


def _spread(needs: Sequence[bool], grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients that an op returned, at the positions of their arguments; None elsewhere."""
    remaining = iter(grads)
    return tuple(next(remaining) if need else None for need in needs)
