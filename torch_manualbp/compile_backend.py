"""``torch.compile(model, backend="manualbp")``: fuses linear → ReLU → linear → … in models as they are written.

Dynamo captures the graph of torch calls, in whatever style the model was written. Here each chain of linear layers with
ReLUs between them is replaced by one call of this library. Parameters, state_dict and everything else stay as they are.
When such a call is executed, `_route` decides what computes it.

torch finds the backend by its entry point (pyproject.toml), so that importing torch_manualbp does not load Dynamo.
"""

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from torch_manualbp import _graph
from torch_manualbp._checks import check_activations
from torch_manualbp._compute import run_layers
from torch_manualbp._relus import relu_in_place
from torch_manualbp._route import may_join_graph
from torch_manualbp.functional import linear_relu
from torch_manualbp.inspection._table import printable

logger = logging.getLogger("torch_manualbp")

OPTIONS: Mapping[str, Any] = MappingProxyType({"verbose": False, "rest": "eager", "activations": "store"})


def manualbp(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """A backend for ``torch.compile``: computes every chain of linear and ReLU fused, and the rest as before.

    A chain is linear → ReLU, or longer: linear → ReLU → linear → …, with or without a ReLU at its end. It ends where a
    result is used by something else too. ReLU is ``relu`` in any spelling of torch's, in place or not, and a clamp at 0
    from below (whose gradient where a pre-activation is exactly 0 becomes that of ReLU: 0 instead of 1). A dropout that
    does nothing, in eval mode or with p = 0, does not end a chain.

    Args:
        graph_module: what Dynamo captured.
        example_inputs: its inputs.
        mode: as given to ``torch.compile``; passed on to the backend of the rest.
        options: as given to ``torch.compile``. "verbose": print what is fused (the logger "torch_manualbp" always
            reports it at level INFO). "rest": the backend that compiles the graph with our calls in it, "eager" by
            default, or "inductor". "activations": "store" or "recompute", as in `mlp`. All others are passed on to the
            backend of the rest: inductor uses them, torch's other backends log that they ignore them.

    Returns:
        The callable that Dynamo runs.

    Raises:
        ValueError: an unknown value of "activations".

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> compiled = torch.compile(model, backend=manualbp)  # or "manualbp", once installed
        >>> compiled(torch.ones(3, 4)).shape
        torch.Size([3, 1])
    """
    others = dict(options or {})
    verbose, rest, activations = (others.pop(name, default) for name, default in OPTIONS.items())
    check_activations("manualbp", activations)
    chains = find_chains(graph_module.graph)
    found = f"fused {len(chains)} chain(s):" if chains else "found nothing to fuse"
    report = "\n".join([f"torch_manualbp: {found}", *map(str, chains)])
    for chain in chains:
        _replace(graph_module.graph, chain, activations, eager=rest == "eager")
    graph_module.graph.lint()
    graph_module.recompile()
    logger.info(report)
    if verbose:
        print(report)
    compiled: Callable[..., Any] = _backend(rest, mode, others)(graph_module, list(example_inputs))
    return compiled


def _backend(name: Any, mode: str | None, options: dict[str, Any]) -> Any:
    """The backend that ``torch.compile(model, backend=name, mode=mode, options=options)`` calls."""
    if name == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, None)  # type: ignore[no-untyped-call]
    return torch._TorchCompileWrapper(name, mode, options, None)  # type: ignore[no-untyped-call]


@dataclass
class Layer:
    """A linear layer in the graph, and the ReLU that follows it, if it does."""

    linear: fx.Node
    relu: fx.Node | None
    identities: list[fx.Node] = field(default_factory=list)  # inactive dropouts between the ReLU and the next layer

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        """Input, weight and bias, read from the graph, in which chains before this one may have been replaced."""
        return _arguments(self.linear)

    @property
    def last(self) -> fx.Node:
        """The node whose value is the layer's output."""
        return self.relu or self.linear


@dataclass
class Chain:
    """Layers of which each but the last is followed by a ReLU and feeds the next one only."""

    layers: list[Layer] = field(default_factory=list)

    def __str__(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        shapes = [_value(layer.arguments[1]).shape for layer in self.layers]
        widths = [str(shapes[0][1]), *(str(shape[0]) for shape in shapes)]
        op = "linear_relu" if len(self.layers) == 1 else "mlp, ReLU at its end" if last.relu else "mlp"
        lines = [line.strip() for line in (first.linear.stack_trace or "").splitlines() if line.strip()]
        place = next((line for line in reversed(lines) if line.startswith("File ")), "")
        return printable(f"  {'–'.join(widths)} {op}" + (f"  ({place})" if place else ""))


def find_chains(graph: fx.Graph) -> list[Chain]:
    """All chains that begin with a linear layer and its ReLU, in the order of the graph."""
    position = {node: k for k, node in enumerate(graph.nodes)}
    segment, segments = 0, {}
    for node in graph.nodes:
        segment += _has_effects(node, position)  # no chain may reach across such a node
        segments[node] = segment
    chains: list[Chain] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if node in taken or (layer := _layer(node, position)) is None:
            continue
        chain, identities = Chain(), list[fx.Node]()
        while layer is not None and segments[layer.last] == segments[node]:
            if chain.layers:
                chain.layers[-1].identities = identities
            chain.layers.append(layer)
            if layer.relu is None:
                break
            following, identities = _only_user(layer)
            if following is None:
                break
            layer = _layer(following, position, layer, identities)
        if chain.layers and chain.layers[0].relu is not None:
            chains.append(chain)
            taken.update(layer.linear for layer in chain.layers)
    return chains


def _layer(
    node: fx.Node, position: Mapping[fx.Node, int], before: Layer | None = None, identities: Sequence[fx.Node] = ()
) -> Layer | None:
    """The layer whose linear part is `node`, if our kernels can compute it.

    before: the layer that feeds it; identities: what lies between the two.
    """
    if node.op != "call_function" or node.target is not F.linear:
        return None
    input, weight, bias = _arguments(node)
    nodes = [input, weight] if bias is None else [input, weight, bias]
    dtype = _value(node).dtype
    if not all(isinstance(value, fx.Node) and may_join_graph(_value(value), dtype) for value in nodes):
        return None
    omega, beta = _value(weight), None if bias is None else _value(bias)
    if omega.dim() != 2 or not (beta is None or (beta.dim() == 1 and beta.shape[0] == omega.shape[0])):
        return None
    if before is not None:
        hidden = (before.linear, before.relu, *identities)  # names of one tensor, after a ReLU in place
        if input not in hidden or weight in hidden or bias in hidden:
            return None
    return Layer(node, _relu_after(node, position))


def _arguments(linear: fx.Node) -> tuple[Any, Any, Any]:
    names = ("input", "weight", "bias")
    given: dict[str, Any] = {"bias": None, **dict(zip(names, linear.args, strict=False)), **linear.kwargs}
    return given["input"], given["weight"], given["bias"]


def _relu_after(linear: fx.Node, position: Mapping[fx.Node, int]) -> fx.Node | None:
    """The ReLU of this layer, if nothing else uses the pre-activation."""
    users = sorted(linear.users, key=lambda user: position[user])
    if not users or (in_place := _relu_in_place(users[0])) is None:
        return None
    return users[0] if len(users) == 1 or in_place else None  # later users of an in-place ReLU get its result


def _only_user(layer: Layer) -> tuple[fx.Node | None, list[fx.Node]]:
    """The only node that uses the layer's output, and the inactive dropouts that lie between."""
    users = {user for node in (layer.linear, layer.relu) if node is not None for user in node.users} - {layer.relu}
    identities: list[fx.Node] = []
    while len(users) == 1:
        user = users.pop()
        if user is None or not _is_inactive_dropout(user):
            return user, identities
        identities.append(user)
        users = set(user.users)
    return None, identities


def _is_inactive_dropout(node: fx.Node) -> bool:
    """Whether the node is a dropout that returns its input."""
    if node.op != "call_function" or node.target is not F.dropout or len(node.args) == 0:
        return False
    names = ("input", "p", "training")
    given: dict[str, Any] = {"p": 0.5, "training": True, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    p, training = given["p"], given["training"]
    return isinstance(p, int | float) and 0 <= p <= 1 and (training is False or p == 0)


def _relu_in_place(node: fx.Node) -> bool | None:
    """Whether this ReLU works in place; None if the node is no ReLU of its first argument."""
    return relu_in_place(node.target, node.args, node.kwargs) if node.op in ("call_function", "call_method") else None


def _value(node: fx.Node) -> Any:
    """The fake tensor, or whatever else, that Dynamo computed for this node."""
    return node.meta.get("example_value")


def _has_effects(node: fx.Node, position: Mapping[fx.Node, int]) -> bool:
    """Whether this node may do more than return a tensor: modify one, or enter a mode such as autocast.

    In doubt, the answer is yes.
    """
    if node.op in ("placeholder", "get_attr", "output") or _is_inactive_dropout(node):
        return False
    if _relu_in_place(node) and node.all_input_nodes[0].target is F.linear:
        return _relu_after(node.all_input_nodes[0], position) is not node  # if so, nothing has used the data before it
    if not isinstance(_value(node), Tensor | tuple | list | int | float | torch.SymInt | torch.SymFloat):
        return True
    target: Any = node.target
    if node.op == "call_method":
        return bool(target.endswith("_")) and not target.endswith("__")
    if node.op != "call_function" or isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    name, module = getattr(target, "__name__", "_"), getattr(target, "__module__", "") or ""
    if module == operator.add.__module__:
        return name.startswith("i") or name in ("setitem", "delitem")
    is_in_place = any(value is True for value in (*node.args, *node.kwargs.values()))  # or another flag; in doubt, yes
    return name.endswith("_") or "out" in node.kwargs or (module == F.__name__ and is_in_place)


def _replace(graph: fx.Graph, chain: Chain, activations: str, *, eager: bool) -> None:
    """Replaces the chain by one call, at its last node."""
    layers, last = chain.layers, chain.layers[-1]
    inputs, weights, biases = (list(column) for column in zip(*(layer.arguments for layer in layers), strict=True))
    closed = last.relu is not None

    def cast(node: fx.Node | None) -> fx.Node | None:
        """The value in the dtype of the output: another one under autocast, which does not see our op."""
        if node is None or _value(node).dtype is dtype:
            return node
        with graph.inserting_before(last.last):
            rounded = graph.call_method("to", (node, dtype))
        rounded.meta = {"example_value": _value(node).to(dtype)}
        return rounded

    dtype = _value(last.linear).dtype
    if not eager:
        inputs[0] = cast(inputs[0])
        weights, biases = list(map(cast, weights)), list(map(cast, biases))
    function: Any
    arguments: tuple[Any, ...]
    if not eager:
        function, arguments = _graph.layers, (weights, biases, closed, activations == "store")
    elif len(layers) == 1:
        function, arguments = linear_relu, (weights[0], biases[0])
    else:
        function, arguments = run_layers, (weights, biases, closed, activations)
    with graph.inserting_before(last.last):
        fused = graph.call_function(function, (inputs[0], *arguments))
    fused.meta = dict(last.last.meta)
    last.last.replace_all_uses_with(fused)
    for layer in reversed(layers):
        for identity in reversed(layer.identities):
            graph.erase_node(identity)
        if layer.relu is not None:
            layer.linear.replace_all_uses_with(fused, lambda user, relu=layer.relu: user is not relu)  # type: ignore[misc]
            graph.erase_node(layer.relu)
        graph.erase_node(layer.linear)
