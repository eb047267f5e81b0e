"""The CUDA kernels, emulated on the CPU: checks results against float64, stray accesses, and data races.

Each program in tests/csrc tests one kernel, or how kernels are launched; its first lines describe it. It is built with
AddressSanitizer and UBSan, running the threads one at a time in several orders, and with ThreadSanitizer, which
reports conflicting accesses that no barrier orders. Deliberately broken kernels show that these tests find such errors.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from emulation import CXX, ROOT, compiled

pytestmark = [pytest.mark.slow, pytest.mark.sanitizers]

PROGRAMS = ("test_bias_relu", "test_relu_backward", "test_loss", "test_accumulate", "test_narrow", "test_launch")
SANITIZERS = {
    "memory": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "races": ("-fsanitize=thread",),
}


Result = subprocess.CompletedProcess[str]


def run(source: Path, sanitizer: str, optimise: str = "-O0", root: Path = ROOT) -> Result:
    """Builds and runs a program."""
    program = compiled(source, optimise, *SANITIZERS[sanitizer], root=root)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], capture_output=True, text=True, env=environment)


def works(sanitizer: str) -> bool:
    """Whether an empty program can be built and run with this sanitizer."""
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "nothing.cpp"
    if not shutil.which(CXX):
        return False
    if not source.exists():
        source.write_text("int main() { return 0; }\n")
    program = folder / f"nothing-{sanitizer}"
    command = [CXX, *SANITIZERS[sanitizer], str(source), "-o", str(program)]
    built = program.exists() or subprocess.run(command, capture_output=True).returncode == 0
    return built and subprocess.run([program], capture_output=True).returncode == 0


# kernel file, program, sanitizer, original text, replacement, what must be reported
BROKEN = {
    "no barrier between the steps of a sum: wrong in some order of the threads": (
        "relu_backward.cuh", "test_relu_backward", "memory", "    __syncthreads();\n", "", "FAILED: relu_backward",
    ),
    "no barrier between the steps of a sum: a data race": (
        "relu_backward.cuh", "test_relu_backward", "races", "    __syncthreads();\n", "", "data race",
    ),
    "one row too many": (
        "relu_backward.cuh", "test_relu_backward", "memory", "if (r >= last)", "if (r > last)", "heap-buffer-overflow",
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
    "no barrier before the tile is replaced: a data race": (
        "narrow.cuh", "test_narrow", "races", "padded(d_in), padded(d_out));\n      __syncthreads();", "padded(d_in), padded(d_out));",
        "data race",
    ),
    "the two parts of a fragment in each other's registers": (
        "narrow.cuh", "test_narrow", "memory", "{pair(w), pair(w + 8)}", "{pair(w + 8), pair(w)}", "FAILED: narrow",
    ),
    "numbers of a product in the wrong lanes": (
        "narrow.cuh", "test_narrow", "memory", "g + i / 2 * 8, j * 8 + 2 * t + i % 2", "g + i % 2 * 8, j * 8 + 2 * t + i / 2",
        "FAILED: narrow",
    ),
    "an emulated fragment that is not the documented one": (
        "mma.cuh", "test_narrow", "memory", "row / 8 + k / 8 * 2", "row / 8 * 2 + k / 8", "FAILED: mma",
    ),
    "padding that is not cleared": (
        "narrow.cuh", "test_narrow", "memory", "col < d_out ? narrow<T>(f) : T{}", "narrow<T>(f)", "FAILED: narrow",
    ),
    "a barrier that only half of the block reaches": (
        "device.cuh", "test_loss", "memory", "    __syncthreads();\n    if (t < half)", "    if (t < half) __syncthreads();\n    if (t < half)",
        "only a part of the block reached a barrier",
    ),
    "a shuffle that some lanes have left": (
        "loss.cuh", "test_loss", "memory", "largest = warp_max(largest);", "if (lane < p.cols) largest = warp_max(largest);",
        "only a part of the warp reached a warp exchange",
    ),
    "a size in 32 bits": (
        "bias_relu.cuh", "test_bias_relu", "memory", "const int64_t size =", "const int size =", "64-bit indices",
    ),
}  # fmt: skip


def run_broken(name: str, root: Path) -> Result:
    """Builds and runs a program on a copy of the sources with one deliberate error."""
    file, program, sanitizer, there, instead, _ = BROKEN[name]
    for folder in ("csrc", "tests/csrc"):
        shutil.copytree(ROOT / folder, root / folder)
    kernel = root / "csrc" / "cuda" / "kernels" / file
    text = kernel.read_text()
    assert there in text, f"{file} no longer contains {there!r}"
    kernel.write_text(text.replace(there, instead, 1))
    return run(root / "tests" / "csrc" / f"{program}.cpp", sanitizer, "-O0", root)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Future[Result]]]:
    """Builds and runs all programs in parallel; maps (program, sanitizer) or ("broken", name) to a future result."""
    usable = [sanitizer for sanitizer in SANITIZERS if works(sanitizer)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {
            (program, sanitizer): pool.submit(run, ROOT / "tests" / "csrc" / f"{program}.cpp", sanitizer)
            for program in PROGRAMS
            for sanitizer in usable
        }
        for number, (name, case) in enumerate(BROKEN.items()):
            if case[2] in usable:
                root = tmp_path_factory.getbasetemp() / f"broken{number}"
                futures["broken", name] = pool.submit(run_broken, name, root)
        yield futures


def result_of(results: dict[tuple[str, str], Future[Result]], *key: str) -> Result:
    """Waits for the result of a program; skips the test if its sanitizer does not work here."""
    if key not in results:
        pytest.skip("the compiler or its sanitizer does not work here")
    return results[key].result()


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_kernel(program: str, sanitizer: str, results: dict[tuple[str, str], Future[Result]]) -> None:
    result = result_of(results, program, sanitizer)
    assert re.fullmatch(r"\d+ cases passed\n", result.stdout), result.stdout + result.stderr[-4000:]
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernel_is_caught(name: str, results: dict[tuple[str, str], Future[Result]]) -> None:
    result = result_of(results, "broken", name)
    assert result.returncode != 0
    assert BROKEN[name][-1] in result.stdout + result.stderr, result.stdout + result.stderr[-4000:]
