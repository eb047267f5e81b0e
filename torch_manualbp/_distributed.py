"""An error where `MLP.loss_backward` would bypass a data-parallel wrapper, which combines gradients between processes.

As long as gradients come from autograd, torch's wrappers work with this library as with any other module.
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

    Such a wrapper prepares for gradients in its own forward, and is notified of them by autograd: `op` uses neither.
    FSDP of this very module is allowed: because of its hooks on the module, `op` goes through forward and autograd.
    """
    wrapper = None
    if getattr(module, "_is_fsdp_managed_module", False):
        from torch.distributed.fsdp import FSDPModule  # takes long to import, and is imported already

        wrapper = None if isinstance(module, FSDPModule) else "FSDP"
    elif any(_has_ddp_hook(parameter) for parameter in module.parameters() if parameter.requires_grad):
        wrapper = "DistributedDataParallel"
    if wrapper is not None:
        raise RuntimeError(
            f"{op}: {wrapper} combines the gradients of this network between processes, but only those that autograd "
            f"computes after a forward pass of the wrapper, and {op} makes neither. Call the wrapper, and `backward()` "
            "on the loss; for the fused loss, wrap a module whose forward returns `mlp.loss(input, target)`"
        )


def _has_ddp_hook(parameter: Tensor) -> bool:
    """Whether a DistributedDataParallel has a hook on the gradient of `parameter`.

    DDP keeps the AccumulateGrad node of the parameter alive by a C++ hook that Python cannot inspect. Without such a
    reference, torch destroys the node and its metadata at once. So we write a marker into the metadata: if it is still
    there on the next access (7 µs), either DDP or a live graph holds the node. A search of the garbage collector for
    the wrapper tells which (50 ms). It misses objects that `gc.freeze` hides, so that after a freeze the answer is yes.
    """
    marker = "torch_manualbp"
    _metadata(parameter)[marker] = True
    if marker not in _metadata(parameter):
        return False
    return gc.get_freeze_count() > _frozen_at_import or any(
        parameter is other
        for wrapper in gc.get_objects()
        if issubclass(type(wrapper), DistributedDataParallel)
        for other in wrapper.parameters()
    )


def _metadata(parameter: Tensor) -> dict[str, Any]:
    """The metadata of the node that accumulates into `parameter`."""
    with torch.inference_mode(False):  # in that mode there are no nodes
        metadata: Any = get_gradient_edge(parameter).node.metadata  # a property; its stub declares a method
    return metadata  # type: ignore[no-any-return]
