"""``python -m torch_manualbp.info``: what a bug report needs."""

import os
import platform
import sys
from pathlib import Path

import torch

import torch_manualbp
from torch_manualbp import _ops
from torch_manualbp.inspection.memory import _readable


def info() -> dict[str, str]:
    """Versions, machine, instruction set in use, threads, and what was compiled in."""
    return {
        "torch_manualbp": torch_manualbp.__version__,
        "torch": torch.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "instruction set": f"{_ops.isa()} (torch: {torch.backends.cpu.get_cpu_capability()})",
        "MANUALBP_ISA": os.environ.get("MANUALBP_ISA", "not set"),
        "threads": str(torch.get_num_threads()),
        "memory kept": _readable(_ops.cache_size()),
        "extension": _ops.BINARY.name,
        "CUDA kernels": _cuda_kernels(),
        "torch CUDA": torch.version.cuda or "none",
    }


def _cuda_kernels() -> str:
    if _ops.has_cuda_kernels:
        return _ops.CUDA_BINARY.name
    return "compiled, but this torch has no CUDA" if _ops.CUDA_BINARY.exists() else "not compiled"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Prints the table."""
    for name, value in info().items():
        sys.stdout.write(f"{name + ':':18} {value}\n")


if __name__ == "__main__":
    main()
