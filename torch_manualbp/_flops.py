"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for our ops: the matrix products, as it counts eager's.

A product of (B, D_in) with (D_in, D_out) is 2·B·D_in·D_out. Forward has one per layer, f_k = β_k + Ω_k h_k; backward
has ∂ℓ/∂Ω_k where it is asked for, and ∂ℓ/∂h_k where something below is. Its own backward pass leaves out the products
with zeros that eager makes.

Torch's counter imports Triton, if that is installed, which takes 0.2 s. So the formulas are registered only when the
program imports the counter.
"""

import importlib.util
import math
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch_manualbp import _ops

_COUNTER = "torch.utils.flop_counter"

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


def _linear_relu(input: _Shape, weight: _Shape, *rest: Any, **kwargs: Any) -> int:
    return sum(_layers(input, [weight]))


def _linear_relu_backward(
    grad_output: _Shape, input: _Shape, weight: _Shape, output: _Shape, needs: Sequence[bool], **kwargs: Any
) -> int:
    return _backward(input, [weight], needs)


def _mlp(input: _Shape, weights: Sequence[_Shape], *rest: Any, **kwargs: Any) -> int:
    return sum(_layers(input, weights))


def _mlp_backward(
    grad_output: _Shape,
    input: _Shape,
    weights: Sequence[_Shape],
    biases: Sequence[_Shape | None],
    hidden: _Shape | None,
    output: _Shape | None,
    needs: Sequence[bool],
    *dropout: Any,
    **kwargs: Any,
) -> int:
    recomputed = sum(_layers(input, weights)[:-1]) if hidden is None else 0  # h_1 … h_{K−1}
    return recomputed + _backward(input, weights, needs)


def _mlp_stacked(input: _Shape, weights: Sequence[_Shape], *rest: Any, **kwargs: Any) -> int:
    return sum(_layers(*_of_rows(input, weights)))


def _mlp_stacked_backward(
    grad_output: _Shape,
    input: _Shape,
    weights: Sequence[_Shape],
    biases: Sequence[_Shape | None],
    hidden: Sequence[_Shape],
    output: _Shape | None,
    needs: Sequence[bool],
    **kwargs: Any,
) -> int:
    input, weights = _of_rows(input, weights)
    recomputed = 0 if hidden else sum(_layers(input, weights)[:-1])
    return recomputed + _backward(input, weights, needs)


def _of_rows(input: _Shape, weights: Sequence[_Shape]) -> tuple[_Shape, Sequence[_Shape]]:
    """The rows of all stacked networks, and the weights of one: each row is multiplied by those of its network."""
    return input, [weight[-2:] for weight in weights]


def _mlp_backward_store(
    grad_output: _Shape,
    input: _Shape,
    weights: Sequence[_Shape],
    hidden: _Shape,
    output: _Shape | None,
    needs: Sequence[bool],
    *scales: Any,
    **kwargs: Any,
) -> int:
    return _backward(input, weights, needs)


def _mlp_backward_further(grad_output: _Shape, grad_hidden: _Shape, *rest: Any, **kwargs: Any) -> int:
    return _mlp_backward_store(grad_output, *rest, **kwargs)


def _mlp_double_backward(grad_output: _Shape, input: _Shape, weights: Sequence[_Shape], *rest: Any, **kw: Any) -> int:
    _, _, _, by_input, by_weights, by_biases, needs = rest[:7]
    last = max([k for k in range(len(weights)) if needs[3 + k]], default=0)  # a_k is needed below it
    count, reached = 0, by_input is not None
    for k, flops in enumerate(_layers(input, weights)):
        direct = by_weights[k] is not None
        count += flops * (reached and needs[3 + k])  # ∂M/∂Ω_k
        count += flops * (direct and needs[2 if k else 1])  # ∂M/∂h_k
        count += flops * (reached + direct) * bool(needs[0] or k < last)  # c_k Ω_kᵀ + h_k V_kᵀ
        reached = reached or direct or by_biases[k] is not None
    return count


def _mlp_loss(input: _Shape, target: _Shape, weights: Sequence[_Shape], *rest: Any, **kwargs: Any) -> int:
    needs = rest[-2]
    return sum(_layers(input, weights)) + _backward(input, weights, needs)


def _mlp_autocast_loss(*arguments: Any, **kwargs: Any) -> int:
    *as_of_mlp_loss, _ = arguments
    return _mlp_loss(*as_of_mlp_loss, **kwargs)


_FORMULAS = {
    _ops.linear_relu: _linear_relu,
    _ops.linear_relu_backward: _linear_relu_backward,
    _ops.mlp: _mlp,
    _ops.mlp_backward: _mlp_backward,
    _ops.mlp_dropout: _mlp,
    _ops.mlp_dropout_backward: _mlp_backward,
    _ops.mlp_autocast: _mlp,
    _ops.mlp_autocast_backward: _mlp_backward,
    _ops.mlp_autocast_loss: _mlp_autocast_loss,
    _ops.mlp_stacked: _mlp_stacked,
    _ops.mlp_stacked_backward: _mlp_stacked_backward,
    _ops.mlp_backward_store: _mlp_backward_store,
    _ops.mlp_backward_further: _mlp_backward_further,
    _ops.mlp_double_backward: _mlp_double_backward,
    _ops.mlp_loss: _mlp_loss,
}


def _register(counter: Any) -> None:
    for op, formula in _FORMULAS.items():
        counter.register_flop_formula(op.overloadpacket)(formula)


class _WhenImported(MetaPathFinder):
    """Finds the counter by the other finders, and registers the formulas once its module has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of the counter; None for every other module."""
        if name != _COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # so that the other finders are asked
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_needed() -> None:
    """Registers the formulas with torch's counter, at once if it has been imported, otherwise when it is."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
