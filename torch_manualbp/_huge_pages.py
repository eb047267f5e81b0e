"""A large tensor whose memory may consist of huge pages: writing it for the first time then causes few page faults.

On Linux with ``transparent_hugepage`` at "madvise" or "always"; elsewhere the hint has no effect. Our ops do the same
for their own results (csrc/cpu/tensor.h); this is for results that torch computes.
"""

import ctypes
import sys
from collections.abc import Sequence

from torch import Tensor

_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of the dtype and on the device of `like`.

    512 outer products of 512 and 784 floats (822 MB) took 191 ms into ``torch.empty``, 55 ms into this.
    """
    tensor = like.new_empty(shape)
    if _madvise is not None and tensor.device.type == "cpu" and tensor.nbytes >= 2 * _PAGE and type(tensor) is Tensor:
        first = -(-tensor.data_ptr() // _PAGE) * _PAGE
        last = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
        _madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(_MADV_HUGEPAGE))
    return tensor
