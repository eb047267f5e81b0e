"""Checks of a CUDA build without a GPU: its registered ops, its instructions, and autocast for CUDA tensors.

`.ci/cuda` runs them from such a build. Tensors are fake ones (FakeTensorMode).
"""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_manualbp as mbp
from emulation import OPS
from torch_manualbp import _ops
from torch_manualbp._route import _casts_in_graph, is_under_autocast

needs_build = pytest.mark.skipif(not _ops.has_cuda_kernels, reason="the CUDA kernels are not compiled in")


@pytest.fixture
def autocast_to_bfloat16() -> Iterator[None]:
    """Like `torch.autocast("cuda", torch.bfloat16)`, which does nothing without a GPU."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)
    torch.clear_autocast_cache()


@needs_build
@pytest.mark.parametrize("op", OPS)
def test_every_op_that_trains_has_a_kernel_for_cuda(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"manualbp::{op}", "CUDA")


def test_kernels_do_not_apply_under_autocast_for_cuda(autocast_to_bfloat16: None) -> None:
    with FakeTensorMode():
        input = torch.empty(2, 3, device="cuda")
        assert is_under_autocast(input)
        assert not _casts_in_graph(input, ())
    assert not is_under_autocast(torch.empty(2, 3))  # the autocast state of the CPU is separate


def test_autocast_for_the_cpu_means_nothing_to_cuda_tensors() -> None:
    with torch.autocast("cpu", torch.bfloat16), FakeTensorMode():
        input = torch.empty(2, 3, device="cuda")
        assert not is_under_autocast(input)
        assert _casts_in_graph(input, ())


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch cannot record a graph of CUDA tensors")
def test_autocast_chooses_dtypes_as_for_plain_torch(autocast_to_bfloat16: None) -> None:
    with FakeTensorMode():
        model = mbp.MLP([3, 5, 4], device="cuda")
        input, target = torch.empty(6, 3, device="cuda"), torch.empty(6, 4, device="cuda")
        plain = F.linear(F.relu(F.linear(input, model[0].weight)), model[2].weight)
        weights = [model[0].weight, model[2].weight]
        assert plain.dtype is torch.bfloat16
        assert model(input).dtype is plain.dtype
        assert mbp.mlp(input, weights).dtype is plain.dtype
        assert mbp.linear_relu(input, weights[0]).dtype is plain.dtype
        assert mbp.mlp_loss(input, target, weights).dtype is F.mse_loss(plain, target).dtype is torch.float32


def instructions(gpu: str) -> dict[str, str]:
    """The machine code in the binary for this GPU, by kernel name. Skips the test without a disassembler."""
    triton = importlib.util.find_spec("triton")
    of_triton = [
        Path(folder, "backends", "nvidia", "bin") for folder in (triton and triton.submodule_search_locations) or ()
    ]
    program = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(map(str, of_triton)))
    if not program:
        pytest.skip("there is no cuobjdump")
    command = [program, "-sass", "-arch", gpu, str(_ops.CUDA_BINARY)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *kernels = re.split(r"Function : (\S+)", code)
    return dict(zip(kernels[::2], kernels[1::2], strict=True))


@needs_build
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_the_machine_code_is_what_it_should_be(gpu: str) -> None:
    """Half precision uses tensor cores, vector loads take 16 bytes, and no register is spilled to local memory."""
    kernels = instructions(gpu)
    assert len(kernels) >= 40
    assert not [name for name, code in kernels.items() if re.search(r"\b(LDL|STL)\b", code)]
    for name, code in kernels.items():
        if "narrow_forward" in name or "narrow_backward" in name:
            half = "bfloat16" in name or "float16" in name
            assert ("HMMA.16816.F32" in code) is half
            assert ("HMMA.16816.F32.BF16" in code) is ("bfloat16" in name)
        if re.search(r"bias_relu|relu_backward_kernel\w*Li[248]E|narrow_(for|back)ward", name):
            assert "LDG.E.128" in code
            assert "STG.E.128" in code
