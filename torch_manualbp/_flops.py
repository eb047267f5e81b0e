"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for our ops: the matrix products, as it counts eager's.

A product of (B, D_in) with (D_in, D_out) is 2·B·D_in·D_out. Forward has one per layer, f_k = β_k + Ω_k h_k; backward
has ∂ℓ/∂Ω_k where it is asked for, and ∂ℓ/∂h_k where something below is.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from torch_manualbp import _ops

_Shape = Sequence[int]


def _layers(input: _Shape, weights: Sequence[_Shape]) -> list[int]:
    """2·B·D_in·D_out of each layer."""
    return [2 * math.prod(input[:-1]) * math.prod(weight) for weight in weights]


def _backward(input: _Shape, weights: Sequence[_Shape], needs: Sequence[bool]) -> int:
    """needs: of the input, of each weight, of each bias."""
    count, needed_below, layers = 0, bool(needs[0]), len(weights)
    for k, flops in enumerate(_layers(input, weights)):
        count += flops * (needs[1 + k] + needed_below)
        needed_below = needed_below or needs[1 + k] or needs[1 + layers + k]
    return count


@register_flop_formula(_ops.linear_relu.overloadpacket)
def _linear_relu(input: _Shape, weight: _Shape, *rest: Any, **kwargs: Any) -> int:
    return sum(_layers(input, [weight]))


@register_flop_formula(_ops.linear_relu_backward.overloadpacket)
def _linear_relu_backward(
    grad_output: _Shape, input: _Shape, weight: _Shape, output: _Shape, needs: Sequence[bool], **kwargs: Any
) -> int:
    return _backward(input, [weight], needs)


@register_flop_formula(_ops.mlp.overloadpacket)
def _mlp(input: _Shape, weights: Sequence[_Shape], *rest: Any, **kwargs: Any) -> int:
    return sum(_layers(input, weights))


@register_flop_formula(_ops.mlp_backward.overloadpacket)
def _mlp_backward(
    grad_output: _Shape,
    input: _Shape,
    weights: Sequence[_Shape],
    biases: Sequence[_Shape | None],
    hidden: _Shape | None,
    output: _Shape | None,
    needs: Sequence[bool],
    **kwargs: Any,
) -> int:
    again = sum(_layers(input, weights)[:-1]) if hidden is None else 0  # h_1 … h_{K−1} are computed again
    return again + _backward(input, weights, needs)


@register_flop_formula(_ops.mlp_loss.overloadpacket)
def _mlp_loss(input: _Shape, target: _Shape, weights: Sequence[_Shape], *rest: Any, **kwargs: Any) -> int:
    needs = rest[-2]
    return sum(_layers(input, weights)) + _backward(input, weights, needs)
