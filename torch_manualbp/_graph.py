"""The op ``manualbp::layers``, which stands for a network in a graph that torch.compile captures.

Its overload is named after the version of the library: torch caches compiled code on disk by the names of the ops in
the captured graph, and the code for this op may differ between versions.

The op is composite, like ``aten::linear``, so that Dynamo does not trace into it. When the graph is lowered
(AOTAutograd) or run as it is, `_layers` makes the choice of an eager call: our autograd Functions, whose forward and
backward become one op each in the lowered graph, or plain torch, which works under every transform. Programs of
`torch.export` always contain plain torch, and so run without this library.

Time of a training step with plain torch in the graph / with this op, both compiled by inductor (2 cores, AVX-512,
float32, names of benchmarks/workloads.json): tcnn64 1.8, deep 1.8, dlrm_bot 1.3, nerf 1.3, mnist 1.3, rl64 1.1, rl256
1.0; 4–16–16–2 with 65536 rows 2.9. Where every product has a dimension of 1, inductor compiles the network to a single
loop and is faster: toy 0.74, with 65536 rows 0.19. Such networks are left to it.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_manualbp import __version__, reference
from torch_manualbp._route import TORCH, route_in_graph
from torch_manualbp.autograd import LinearReLUFunction, MLPFunction

_library = torch.library.Library("manualbp", "FRAGMENT")  # type: ignore[no-untyped-call]
_NAME = "layers.v" + re.sub(r"\W", "_", __version__)
_library.define(  # type: ignore[no-untyped-call]
    f"{_NAME}(Tensor input, Tensor[] weights, Tensor?[] biases, bool final_relu, bool store) -> Tensor"
)


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


# For vmap, torch would look for a batching rule; this makes it decompose the op instead.
for _key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
    _library.impl(_NAME, _layers, _key)  # type: ignore[no-untyped-call]

layers = getattr(torch.ops.manualbp.layers, _NAME.removeprefix("layers."))
