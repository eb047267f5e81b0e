"""The CUDA kernels, run on the CPU by emulation: against a float64 oracle, for stray accesses, and for data races.

Each program in tests/csrc tests one kernel (its first lines say how). It is built twice: with AddressSanitizer and
UBSan, where threads take turns in several orders, and with ThreadSanitizer, which reports conflicting accesses that no
barrier orders. What such tests are worth is shown on kernels broken on purpose.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from emulation import ROOT, compiled

PROGRAMS = ("test_bias_relu", "test_relu_backward", "test_loss")
SANITIZERS = {
    "memory": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "races": ("-O1", "-fsanitize=thread"),
}


def run(source: Path, sanitizer: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Builds and runs a program; skips where the sanitizer does not work."""
    flags = SANITIZERS[sanitizer]
    if not works(sanitizer):
        pytest.skip(f"{' '.join(flags)} does not work here")
    program = compiled(source, *flags, root=root)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], capture_output=True, text=True, env=environment)


def works(sanitizer: str) -> bool:
    """Whether a program that does nothing can be built and run with it."""
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "nothing.cpp"
    if not source.exists():
        source.write_text("int main() { return 0; }\n")
    program = folder / f"nothing-{sanitizer}"
    command = [os.environ.get("CXX", "c++"), *SANITIZERS[sanitizer], str(source), "-o", str(program)]
    try:
        return program.exists() or not subprocess.run(command, capture_output=True).returncode
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_kernel(program: str, sanitizer: str) -> None:
    result = run(ROOT / "tests" / "csrc" / f"{program}.cpp", sanitizer)
    assert re.fullmatch(r"\d+ cases passed\n", result.stdout), result.stdout + result.stderr[-4000:]
    assert result.returncode == 0, result.stderr[-4000:]


# kernel file, program, sanitizer, what is there, what it is replaced with, what must be reported
BROKEN = {
    "no barrier between the steps of a sum: wrong in some order of the threads": (
        "relu_backward.cuh", "test_relu_backward", "memory", "    __syncthreads();\n", "", "FAILED: relu_backward",
    ),
    "no barrier between the steps of a sum: a data race": (
        "relu_backward.cuh", "test_relu_backward", "races", "    __syncthreads();\n", "", "data race",
    ),
    "one row too many": (
        "relu_backward.cuh", "test_relu_backward", "memory", "row < last; row +=", "row <= last; row +=",
        "heap-buffer-overflow",
    ),
    "vectors from an address that is not aligned": (
        "bias_relu.cuh", "test_bias_relu", "memory", "misaligned == 0 ? 0", "misaligned != 7 ? 0", "misaligned address",
    ),
    "ReLU that loses NaN": (
        "device.cuh", "test_bias_relu", "memory", "return x < A(0) ? A(0) : x;", "return x > A(0) ? x : A(0);",
        "expected nan",
    ),
    "a gradient that passes where the activation is zero": (
        "relu_backward.cuh", "test_relu_backward", "memory", "<= A(0)", "< A(0)", "FAILED: relu_backward",
    ),
    "a barrier that half of the block skips": (
        "device.cuh", "test_loss", "memory", "    __syncthreads();\n    if (t < half)", "    if (t < half) __syncthreads();\n    if (t < half)",
        "only a part of the block reached a barrier",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def broken_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """All broken kernels, built and run side by side."""

    def result(case: tuple[int, tuple[str, ...]]) -> subprocess.CompletedProcess[str]:
        number, (file, program, sanitizer, there, instead, _) = case
        root = tmp_path_factory.getbasetemp() / f"broken{number}"
        for folder in ("csrc", "tests/csrc"):
            shutil.copytree(ROOT / folder, root / folder)
        kernel = root / "csrc" / "cuda" / "kernels" / file
        text = kernel.read_text()
        assert text.count(there) >= 1, f"{file} no longer contains {there!r}"
        kernel.write_text(text.replace(there, instead, 1))
        return run(root / "tests" / "csrc" / f"{program}.cpp", sanitizer, root)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(BROKEN, pool.map(result, enumerate(BROKEN.values())), strict=True))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernel_is_caught(name: str, broken_results: dict[str, subprocess.CompletedProcess[str]]) -> None:
    result = broken_results[name]
    assert result.returncode != 0
    assert BROKEN[name][-1] in result.stdout + result.stderr, result.stdout + result.stderr[-4000:]
