"""All spellings of ReLU in torch: functions, methods of Tensor, in place or not, and a clamp at 0 from below."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Whether each works in place. Graphs name methods of tensors, calls hand over the methods themselves.
_RELUS: dict[Any, bool] = {F.relu: False, torch.relu: False, F.relu_: True, torch.relu_: True}
_CLAMPS: dict[Any, bool] = {
    **{torch.clamp: False, torch.clamp_min: False, torch.clip: False},
    **{torch.clamp_: True, torch.clamp_min_: True, torch.clip_: True},
}
for _name in ("relu", "relu_"):
    _RELUS[_name] = _RELUS[getattr(Tensor, _name)] = _name.endswith("_")
for _name in ("clamp", "clamp_min", "clip", "clamp_", "clamp_min_", "clip_"):
    _CLAMPS[_name] = _CLAMPS[getattr(Tensor, _name)] = _name.endswith("_")


def relu_in_place(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool | None:
    """Whether this ReLU works in place; None if the call is no ReLU of its first argument.

    Args:
        function: what is called, or the name of a method.
        args: its arguments, of which the first is the tensor.
        kwargs: its keyword arguments.
    """
    if function in _RELUS:
        return _RELUS[function] or bool(kwargs.get("inplace", args[1] if len(args) > 1 else False))
    if function in _CLAMPS:
        least = kwargs.get("min", args[1] if len(args) > 1 else None)
        most = kwargs.get("max", args[2] if len(args) > 2 else None)
        is_zero = isinstance(least, int | float) and not isinstance(least, bool) and least == 0
        return _CLAMPS[function] if is_zero and most is None and "out" not in kwargs else None
    return None
