"""Builds the one extension, torch_manualbp/_C.abi3.so: stable-ABI C++, no Python headers, no GPU needed.

Everything else about the package is in pyproject.toml.
"""

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup


def binary() -> dict[str, Any]:
    """The extension and how it is compiled, as arguments of setup()."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, is_ninja_available

    if torch.__version__ < (2, 10):
        sys.exit(f"torch_manualbp needs torch >= 2.10 to be built, found {torch.__version__}: pip install -U torch")

    # torch compiles with $CXX or c++; setuptools would link with whatever compiler this Python was built by.
    os.environ.setdefault("CXX", "c++")

    class Build(BuildExtension):
        def get_ext_filename(self, fullname: str) -> str:
            """One name everywhere: the binary never calls Python, so any build of Python may load it."""
            return str(Path(*fullname.split("."))) + ".abi3.so"

        def run(self) -> None:
            """A copy in the checkout too: there, Python imports the package from the current folder."""
            super().run()
            if not self.inplace:
                self.copy_extensions_to_source()

    extension = CppExtension(
        "torch_manualbp._C",
        [str(path) for path in sorted(Path("csrc").rglob("*.cpp"))],
        depends=["setup.py", *map(str, sorted(Path("csrc").rglob("*.h")))],  # for builds without ninja
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020A000000000000"),  # the oldest torch that the binary runs with: 2.10
            ("TORCH_STABLE_ONLY", None),  # headers outside the stable ABI become errors
        ],
        extra_compile_args=[
            *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden"),
            *("-Wall", "-Wextra", "-Wno-unused-parameter"),
        ],
        py_limited_api=True,  # do not link libtorch_python
    )
    # One wheel for CPython >= 3.10. There is no such tag for free-threaded Python: it gets a wheel of its own.
    free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=is_ninja_available())},
        "options": {} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


# A source archive is made without torch: MANIFEST.in says what goes into it.
setup(**({} if "sdist" in sys.argv else binary()))
