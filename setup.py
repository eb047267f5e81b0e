"""Builds the one extension, torch_manualbp/_C.abi3.so: stable-ABI C++, no Python headers, no GPU needed.

Everything else about the package is in pyproject.toml.
"""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

sources = [str(path) for path in sorted(Path("csrc").rglob("*.cpp"))]

extension = CppExtension(
    "torch_manualbp._C",
    sources,
    define_macros=[
        ("TORCH_TARGET_VERSION", "0x020A000000000000"),  # the oldest torch that the binary runs with: 2.10
        ("TORCH_STABLE_ONLY", None),  # headers outside the stable ABI become errors
        ("Py_LIMITED_API", "0x030A0000"),
    ],
    extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    py_limited_api=True,
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
