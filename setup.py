"""Builds torch_manualbp/_C.abi3.so and, if possible, _C_cuda.abi3.so: stable-ABI C++ without Python headers or a GPU.

CUDA kernels are compiled if a toolkit matches the installed torch. FORCE_CUDA=1 makes a mismatch an error, FORCE_CUDA=0
leaves the kernels out; TORCH_CUDA_ARCH_LIST selects the GPUs. All other package configuration is in pyproject.toml.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

MACROS = [
    ("TORCH_TARGET_VERSION", "0x020A000000000000"),  # the oldest torch that the binaries run with: 2.10
    ("TORCH_STABLE_ONLY", None),  # headers outside the stable ABI become errors
]
HERE = Path(__file__).resolve().parent
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"),
    f"-fmacro-prefix-map={HERE}=.",  # __FILE__ must not depend on where the binary is built
    *("-include", str(HERE / "csrc" / "glibc.h")),
]


def why_not_cuda() -> str | None:
    """Why the CUDA kernels cannot be compiled here; None if they can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    # torch takes the parent folder of nvcc for the toolkit, but nvcc may be a link or wrapper there, so ask nvcc.
    on_path = shutil.which("nvcc")
    if on_path and not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        plan = subprocess.run(
            [on_path, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True
        ).stderr
        if top := re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE):
            os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())
    from torch.utils.cpp_extension import CUDA_HOME  # read from the environment when first imported

    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if not CUDA_HOME or not nvcc.exists():
        return "there is no CUDA toolkit (set CUDA_HOME)"
    listing = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", listing)
    if not release or release[1] != torch.version.cuda.split(".")[0]:
        found = f"of CUDA {release[1]}" if release else "of an unknown version"
        return f"{nvcc} is {found}, but torch {torch.__version__} is built with CUDA {torch.version.cuda}"
    return None


def cuda_wanted() -> bool:
    """Whether to compile the CUDA kernels, given FORCE_CUDA and the installed software."""
    force = os.environ.get("FORCE_CUDA", "")
    if force not in ("", "0", "1"):
        sys.exit(f"FORCE_CUDA must be 0 or 1, got {force!r}")
    if force == "0":
        return False
    reason = why_not_cuda()
    if reason and force == "1":
        sys.exit(f"torch_manualbp: FORCE_CUDA=1, but the CUDA kernels cannot be compiled: {reason}")
    if reason:
        print(f"torch_manualbp: building for the CPU only: {reason}", file=sys.stderr)
    return reason is None


def cuda_extension() -> Any:
    """The CUDA kernels and their entries, in a separate shared object, because a CPU-only torch cannot load them."""
    from torch.utils.cpp_extension import CUDAExtension

    # A GPU runs code for its generation or, through PTX, an older one; the tensor-core code needs 8.0.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    folder = Path("csrc", "cuda")
    return CUDAExtension(
        "torch_manualbp._C_cuda",
        [str(path) for pattern in ("*.cpp", "*.cu") for path in sorted(folder.glob(pattern))],
        depends=["setup.py", *(str(path) for path in sorted(Path("csrc").rglob("*.[hc]*h")))],
        define_macros=[*MACROS, ("USE_CUDA", None)],  # with USE_CUDA, torch's headers declare streams and guards
        extra_compile_args={
            "cxx": CXX_FLAGS,
            "nvcc": ["-std=c++17", "-O3", "-Xcompiler=-fvisibility=hidden", "--ptxas-options=-v,-warn-spills"],
        },
        py_limited_api=True,
    )


def binary() -> dict[str, Any]:
    """The extensions and how they are compiled, as arguments of setup()."""
    if sys.platform == "win32":
        sys.exit("torch_manualbp cannot be built on Windows: it needs g++ or clang++ and POSIX headers. Use WSL")
    import torch

    if torch.__version__ < (2, 10):
        sys.exit(f"torch_manualbp needs torch >= 2.10 to be built, found {torch.__version__}: pip install -U torch")
    with_cuda = cuda_wanted()  # before torch looks for the toolkit
    from torch.utils.cpp_extension import BuildExtension, CppExtension, is_ninja_available

    # torch compiles with $CXX or c++; setuptools would link with the compiler that built this Python.
    os.environ.setdefault("CXX", "c++")

    class Build(BuildExtension):
        def get_ext_filename(self, fullname: str) -> str:
            """Returns one name for all platforms: the binary never calls Python, so any Python can load it."""
            return str(Path(*fullname.split("."))) + ".abi3.so"

        def run(self) -> None:
            """Also copies the binary to the checkout, from which Python imports the package when run there."""
            super().run()
            if not self.inplace:
                self.copy_extensions_to_source()

    extension = CppExtension(
        "torch_manualbp._C",
        [str(path) for path in sorted(Path("csrc").rglob("*.cpp")) if "cuda" not in path.parts],
        depends=["setup.py", *map(str, sorted(Path("csrc").rglob("*.h")))],  # for builds without ninja
        define_macros=MACROS,
        extra_compile_args=CXX_FLAGS,
        py_limited_api=True,  # do not link libtorch_python
    )
    # One wheel serves CPython >= 3.10. Free-threaded Python has no abi3 tag and needs a separate wheel.
    free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
    return {
        "ext_modules": [extension, *([cuda_extension()] if with_cuda else [])],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=is_ninja_available())},
        "options": {} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


# A source archive is made without torch; MANIFEST.in lists its contents.
setup(**({} if "sdist" in sys.argv else binary()))
