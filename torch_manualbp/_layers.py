"""The layers of a model: the weight and bias of each, and whether a ReLU follows.

`layers_of` refuses, by name, everything that is not exactly a Linear, a ReLU or a Sequential of them: numbers computed
from its weights alone would not be the model's.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import Parameter

from torch_manualbp._checks import check_module
from torch_manualbp.modules import FusedForward, LinearReLU, has_hooks

_MISSING = object()


def _untouched(function: Any) -> Any:
    """The function, if it is torch's or ours; if it was replaced before this import, an object that equals no other."""
    home = getattr(function, "__globals__", {}).get("__name__", "torch")
    return function if home.partition(".")[0] in ("torch", "torch_manualbp") else object()


# The attributes that calling a module reads. If one of them is replaced, on the class or on the module, what the module
# computes is unknown: a LayerDrop is a Sequential whose `__iter__`, which `forward` uses, skips children.
_CALL = (
    *("__call__", "_wrapped_call_impl", "_call_impl", "__iter__", "_modules"),
    *("__getattr__", "__getattribute__", "forward"),
)
_KNOWN: dict[type[nn.Module], list[tuple[str, Any]]] = {
    kind: [(name, _untouched(getattr(kind, name, None))) for name in _CALL]
    for kind in (nn.Linear, nn.ReLU, LinearReLU, FusedForward, nn.Sequential)
}


class Layer(NamedTuple):
    """One layer k: f_k = β_k + Ω_k h_k, and h_{k+1} = a[f_k] if `relu`."""

    name: str
    """The module's name in ``model.named_modules()``: "0" or "head.2"; "" if it is the model itself."""
    weight: Tensor
    """Ω_k (D_{k+1}, D_k), the parameter itself."""
    bias: Tensor | None
    """β_k (D_{k+1},), the parameter itself, or None."""
    relu: bool
    """Whether a ReLU follows."""

    def parameter_name(self, kind: str) -> str:
        """The name of its "weight" or "bias" in ``model.named_parameters()``."""
        return f"{self.name}.{kind}" if self.name else kind


def layers_of(model: nn.Module, op: str = "layers_of") -> list[Layer]:
    """The layers of a network in the order in which they are computed.

    Args:
        model: an `MLP`, a `LinearReLU`, an ``nn.Linear``, or an ``nn.Sequential`` (fused or not, nested or not) whose
            children are such layers and ``nn.ReLU``. Hooks on `model` itself are ignored: they run outside the network.
        op: the caller's name, for error messages.

    Returns:
        A `Layer` (name, weight, bias, relu) for each linear layer; its tensors are the model's own parameters.

    Raises:
        TypeError: `model` is not a module, or holds a child whose computation is not known: another module, a layer
            that is parametrized or has hooks, or one for which ``forward``, or another attribute that a call reads, is
            not torch's, such as a Sequential with its own ``__iter__``.
        ValueError: there is no linear layer, a ReLU comes before the first one, or two layers share a parameter.

    Example:
        >>> from torch_manualbp import MLP
        >>> [(layer.name, tuple(layer.weight.shape), layer.relu) for layer in layers_of(MLP([4, 8, 1]))]
        [('0', (8, 4), True), ('2', (1, 8), False)]
    """
    check_module(op, model)
    layers: list[Layer] = []
    owners: dict[int, str] = {}
    for name, module in _leaves(op, model, "", set(), outermost=True):
        if type(module) is nn.ReLU:
            if not layers:
                raise ValueError(f"{op}: {_child(name, module)} comes before the first linear layer")
            layers[-1] = Layer(*layers[-1][:3], relu=True)
            continue
        weight, bias = _parameters(op, name, module)
        for parameter in (weight, bias):
            if parameter is not None and (other := owners.setdefault(id(parameter), name)) != name:
                raise ValueError(f"{op}: {_child(name, module)} shares a parameter with child {other!r}")
        layers.append(Layer(name, weight, bias, type(module) is LinearReLU))
    if not layers:
        raise ValueError(f"{op}: `model` ({type(model).__name__}) has no linear layer")
    return layers


def runs_of(layers: Sequence[Layer]) -> Iterator[Sequence[Layer]]:
    """The runs of layers that the op `mlp` computes in one call: a ReLU follows each layer of a run but the last."""
    first = 0
    for k, layer in enumerate(layers):
        if not layer.relu or k == len(layers) - 1:
            yield layers[first : k + 1]
            first = k + 1


def _leaves(
    op: str, module: nn.Module, name: str, checked: set[type], outermost: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """The Linear, LinearReLU and ReLU modules in `module` with their names, in the order in which they are computed.

    checked: the classes that `_check_class` has accepted.
    """
    if type(module) not in checked:
        _check_class(op, module, name)
        checked.add(type(module))
    for attribute in ("forward", "_call_impl", "_wrapped_call_impl"):  # Python reads the others from the class only
        if attribute in module.__dict__:
            raise _changed(op, module, name, attribute)
    if not outermost and has_hooks(module):
        raise TypeError(f"{op}: {_child(name, module)} has hooks, which may change what it computes: remove them first")
    if not isinstance(module, nn.Sequential):
        yield name, module
    else:
        for key, child in module._modules.items():
            if child is not None:
                yield from _leaves(op, child, f"{name}.{key}" if name else key, checked)


def _check_class(op: str, module: nn.Module, name: str) -> None:
    """Raises TypeError unless the class is supported and nothing that a call reads was replaced on it."""
    kind = type(module)
    if isinstance(module, nn.Sequential):
        kind = FusedForward if isinstance(module, FusedForward) else nn.Sequential
    if kind not in _KNOWN:
        raise TypeError(
            f"{op}: {_child(name, module)} is not supported: expected nn.Linear, nn.ReLU, LinearReLU or an "
            "nn.Sequential of them (apply other modules to the input, or to the output in the loss)"
        )
    for attribute, value in _KNOWN[kind]:
        if getattr(type(module), attribute, None) is not value:
            raise _changed(op, module, name, attribute)


def _changed(op: str, module: nn.Module, name: str, attribute: str) -> TypeError:
    return TypeError(
        f"{op}: {_child(name, module)} is not supported: its `{attribute}` was replaced or overridden, so what it "
        "computes is not known"
    )


def _parameters(op: str, name: str, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Ω and β, if they are the module's own parameters: the gradient of a computed weight is not the model's."""
    own = module._parameters
    weight, bias = own.get("weight", _MISSING), own.get("bias", _MISSING)
    if type(weight) not in (Parameter, Tensor) or not (bias is None or type(bias) in (Parameter, Tensor)):
        raise TypeError(f"{op}: {_child(name, module)} does not compute with plain parameters `weight` and `bias`")
    return cast(Tensor, weight), cast("Tensor | None", bias)


def _child(name: str, module: nn.Module) -> str:
    return f"child {name!r} ({type(module).__name__})" if name else f"`model` ({type(module).__name__})"
