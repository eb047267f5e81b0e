"""Builds the CUDA sources without a GPU: a C++ compiler turns them into programs and a library via cuda_emulation.h.

The results are cached in `build/emulation` until a source changes.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_manualbp import _ops

ROOT = Path(__file__).parents[1]
OPS = ("linear_relu", "linear_relu_backward", "mlp", "mlp_backward", "mlp_loss")
CXX = os.environ.get("CXX", "c++")
WARNINGS = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas")


def sources(root: Path = ROOT) -> list[Path]:
    """All sources of the programs and the library."""
    folders = (root / "csrc", root / "tests" / "csrc")
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def compiled(source: Path, *flags: str, root: Path = ROOT) -> Path:
    """`source` compiled with `flags`, or the cached result if nothing changed. Skips the test without a compiler."""
    if sys.platform == "darwin":
        pytest.skip("the emulation switches threads with ucontext.h, which macOS deprecates")
    if not shutil.which(CXX):
        pytest.skip(f"no C++ compiler: {CXX}")
    command = [CXX, "-std=c++17", "-g1", *WARNINGS, str(source), *flags]
    digest = hashlib.sha256(" ".join([CXX, *WARNINGS, *flags]).encode())
    for path in sources(root):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{source.stem}-{digest.hexdigest()[:16]}"
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}")
        built = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        made.rename(target)
    return target


@functools.cache
def _library() -> Path:
    folder = Path(torch.__file__).parent
    flags = ("-DTORCH_TARGET_VERSION=0x020A000000000000", "-DTORCH_STABLE_ONLY", f"-isystem{folder / 'include'}")
    links = (f"-L{folder / 'lib'}", "-ltorch", "-ltorch_cpu")
    return compiled(ROOT / "tests" / "csrc" / "emulated_ops.cpp", "-O1", "-shared", "-fPIC", *flags, *links)


@functools.cache
def emulated_ops() -> dict[str, torch._ops.OpOverload]:
    """The CUDA entries as ops on CPU tensors, by name."""
    definitions = torch.library.Library("manualbp_emulated", "FRAGMENT")
    for name in OPS:
        definitions.define(str(getattr(_ops, name)._schema).removeprefix("manualbp::"))
        definitions.impl(name, torch.library.fallthrough_kernel, "Autograd")
    _kept.append(definitions)
    torch.ops.load_library(str(_library()))
    return {name: getattr(torch.ops.manualbp_emulated, name).default for name in OPS}


def launches() -> list[str]:
    """The kernels that the emulated entries have launched since the last call of this function."""
    names = ctypes.CDLL(str(_library())).manualbp_emulated_launches
    names.restype = ctypes.c_char_p
    return names().decode().split()


_kept: list[torch.library.Library] = []  # a Library removes its definitions when it is destroyed
