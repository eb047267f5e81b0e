"""What hand-written backpropagation must not do in silence: fill in gradients behind a data-parallel wrapper's back.

The wrappers themselves are torch's, and need nothing from us as long as gradients come from autograd.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

is_initialized: Callable[[], bool] = getattr(torch.distributed, "is_initialized", lambda: False)

_frozen_at_import = gc.get_freeze_count()


def refuse_data_parallel(op: str, module: nn.Module) -> None:
    """Raises RuntimeError if a wrapper of torch combines the gradients of `module` between processes.

    Such a wrapper learns in its own forward that gradients will come, and from autograd that they are there: `op` goes
    through neither. FSDP of this very module is fine: its hooks on the module send `op` through forward and autograd.
    """
    wrapper = None
    if getattr(module, "_is_fsdp_managed_module", False):
        from torch.distributed.fsdp import FSDPModule  # takes long to import, and is imported already

        wrapper = None if isinstance(module, FSDPModule) else "FSDP"
    elif any(_ddp_listens(parameter) for parameter in module.parameters() if parameter.requires_grad):
        wrapper = "DistributedDataParallel"
    if wrapper is not None:
        raise RuntimeError(
            f"{op}: {wrapper} combines the gradients of this network between processes, but only those that autograd "
            f"computes after a forward pass of the wrapper, and {op} makes neither. Call the wrapper, and `backward()` "
            "on the loss; for the fused loss, wrap a module whose forward returns `mlp.loss(input, target)`"
        )


def _ddp_listens(parameter: Tensor) -> bool:
    """Whether a DistributedDataParallel waits for the gradient of `parameter`.

    It waits by a hook on the parameter's accumulator node, and Python cannot see the hook. But torch drops that node
    with every note on it unless somebody holds it: a note that stays means this hook, or a graph that is still alive
    (the question takes 7 µs). Which of the two, only a search for the wrapper can tell (50 ms). It does not see objects
    that `gc.freeze` hides, so that after one the answer is yes.
    """
    note = "torch_manualbp"
    _notes(parameter)[note] = True
    if note not in _notes(parameter):
        return False
    return gc.get_freeze_count() > _frozen_at_import or any(
        parameter is other
        for wrapper in gc.get_objects()
        if issubclass(type(wrapper), DistributedDataParallel)
        for other in wrapper.parameters()
    )


def _notes(parameter: Tensor) -> dict[str, Any]:
    """What anybody noted on the node that accumulates into `parameter`."""
    with torch.inference_mode(False):  # in that mode there are no nodes
        notes: Any = get_gradient_edge(parameter).node.metadata  # a property, which its stub calls a method
    return notes  # type: ignore[no-any-return]
