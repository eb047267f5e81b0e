"""The ops ``manualbp::layers`` and ``manualbp::loss`` of a graph that torch.compile captures.

They stand for a network, and for a network with its loss. Their overloads are named after the version of the library:
torch caches compiled code on disk by the names of the ops in the captured graph, and the code for these ops may differ
between versions.

The ops are composite, like ``aten::linear``, so that Dynamo does not trace into them. When the graph is lowered
(AOTAutograd) or run as it is, `_layers` and `_loss` make the choice of an eager call: our autograd Functions, whose
forward and backward become one op each in the lowered graph (the loss computes its gradients in forward), or plain
torch, which works under every transform. Programs of `torch.export` always contain plain torch, and so run without this
library.

Time of a training step with plain torch in the graph / with this op, both compiled by inductor (2 cores, AVX-512,
float32, names of benchmarks/workloads.json): tcnn64 1.8, deep 1.8, dlrm_bot 1.3, nerf 1.3, mnist 1.3, rl64 1.1, rl256
1.0; 4–16–16–2 with 65536 rows 2.9. Where every product has a dimension of 1, inductor compiles the network to a single
loop and is faster: toy 0.74, with 65536 rows 0.19. Such networks are left to it.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_manualbp import __version__, reference
from torch_manualbp._losses import loss_spec
from torch_manualbp._route import TORCH, route_in_graph
from torch_manualbp.autograd import LinearReLUFunction, MLPFunction, MLPLossFunction

_library = torch.library.Library("manualbp", "FRAGMENT")  # type: ignore[no-untyped-call]
_OVERLOAD = "v" + re.sub(r"\W", "_", __version__)


def _define(name: str, arguments: str, function: Callable[..., Tensor]) -> Any:
    """A composite op."""
    full = f"{name}.{_OVERLOAD}"
    _library.define(f"{full}({arguments}) -> Tensor")  # type: ignore[no-untyped-call]
    # For vmap, torch would look for a batching rule; the second key makes it decompose the op instead.
    for key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
        _library.impl(full, function, key)  # type: ignore[no-untyped-call]
    return getattr(getattr(torch.ops.manualbp, name), _OVERLOAD)


def _layers(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], final_relu: bool, store: bool
) -> Tensor:
    if route_in_graph(input, weights) is TORCH:
        output, _ = reference.mlp_forward(input, weights, biases, final_relu)
    elif final_relu and len(weights) == 1:
        output = LinearReLUFunction.apply(input, weights[0], biases[0])
    else:
        output, _ = MLPFunction.apply(input, final_relu, store, len(weights), *weights, *biases)
    return output


def _loss(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    name: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    spec = loss_spec(name, reduction, ignore_index, label_smoothing)
    if route_in_graph(input, weights) is TORCH:
        return spec.of(reference.mlp_forward(input, weights, biases)[0], target)
    arguments = (input, *weights, *biases)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments):
        value: Tensor = MLPLossFunction.apply(input, target, spec, len(weights), *weights, *biases)
        return value
    return spec.run(input, target, weights, biases, [False] * len(arguments))[0]


_NETWORK = "Tensor[] weights, Tensor?[] biases"
layers = _define("layers", f"Tensor input, {_NETWORK}, bool final_relu, bool store", _layers)
loss = _define(
    "loss",
    f"Tensor input, Tensor target, {_NETWORK}, str loss, str reduction, int ignore_index, float label_smoothing",
    _loss,
)
