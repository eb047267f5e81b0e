"""The kernels under the sanitizers of the compiler: tests/csrc/kernels.cpp, built by make, on every level.

Few cases here; `make asan` and `make tsan` run more.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = ("default", "avx2", "avx512")
SANITIZERS = {"asan": "address,undefined", "tsan": "thread"}


@pytest.fixture(scope="module", params=SANITIZERS)
def driver(request, tmp_path_factory):
    """The name of a sanitizer, and function(*arguments, level=…) that runs the driver built with it."""
    compiler = os.environ.get("CXX", "g++").split()
    if not (shutil.which("make") and shutil.which(compiler[0]) and (ROOT / "Makefile").exists()):
        pytest.skip("no make, no compiler, or no Makefile here")
    trial = tmp_path_factory.mktemp("sanitizer") / "trial.cpp"
    trial.write_text("int main() {}\n")
    flags = [f"-fsanitize={SANITIZERS[request.param]}", str(trial), "-o", str(trial.with_suffix(""))]
    works = subprocess.run([*compiler, *flags], capture_output=True, check=False).returncode == 0
    if not works or subprocess.run([trial.with_suffix("")], capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler[0]} cannot build programs with -fsanitize={SANITIZERS[request.param]} that run here")
    program = f"build/{request.param}/kernels"
    built = subprocess.run(["make", "-j2", "-C", ROOT, program], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr

    def run(*arguments, level=""):
        env = {**os.environ, "MANUALBP_ISA": level}
        return subprocess.run([ROOT / program, *arguments], env=env, capture_output=True, text=True, check=False)

    return request.param, run


def test_kernels_touch_only_their_memory_and_share_none(driver):
    name, run = driver
    levels = []
    for level in LEVELS:
        for what in ("60" if name == "asan" else "5", "threads"):
            done = run(what, level=level)
            if done.returncode == 77:  # this machine does not have it
                continue
            assert done.returncode == 0, done.stdout + done.stderr
            assert done.stdout == f"{level}: {what} passed\n"
            levels.append(level)
    assert "default" in levels


def test_a_deliberate_error_is_reported(driver):
    name, run = driver
    done = run("overflow" if name == "asan" else "race")
    assert done.returncode != 0
    found = "ERROR: AddressSanitizer" if name == "asan" else "WARNING: ThreadSanitizer: data race"
    assert found in done.stderr
    assert "gemm-inl.h" in done.stderr
