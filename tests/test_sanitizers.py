"""Kernels and passes under the compiler's sanitizers, on every level; make builds the drivers in tests/csrc/.

`make asan` and `make tsan` run more cases. The drivers run without torch, whose OpenMP threads synchronise in ways that
the thread sanitizer cannot see.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import LEVELS

pytestmark = [pytest.mark.slow, pytest.mark.sanitizers]

ROOT = Path(__file__).parents[1]
MODEL = "bf16_model"  # the code of avx512_bf16, with a model of its instruction on machines with AVX2
SANITIZERS = {"asan": "address,undefined", "tsan": "thread"}


@pytest.fixture(scope="module", params=SANITIZERS)
def driver(request, tmp_path_factory):
    """The name of a sanitizer, and a function(driver, argument, level=…) that runs a driver built with it."""
    compiler = os.environ.get("CXX", "g++").split()
    if not (shutil.which("make") and shutil.which(compiler[0]) and (ROOT / "Makefile").exists()):
        pytest.skip("no make, no compiler, or no Makefile here")
    trial = tmp_path_factory.mktemp("sanitizer") / "trial.cpp"
    trial.write_text("int main() {}\n")
    flags = [f"-fsanitize={SANITIZERS[request.param]}", str(trial), "-o", str(trial.with_suffix(""))]
    works = subprocess.run([*compiler, *flags], capture_output=True, check=False).returncode == 0
    if not works or subprocess.run([trial.with_suffix("")], capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler[0]} cannot build programs with -fsanitize={SANITIZERS[request.param]} that run here")
    programs = [f"build/{request.param}/{name}" for name in ("kernels", "network", "pool")]
    built = subprocess.run(["make", "-j2", "-C", ROOT, *programs], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr

    def run(name, *arguments, level="default"):
        env = {**os.environ, "MANUALBP_ISA": level}
        command = [ROOT / "build" / request.param / name, *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    return request.param, run


def test_kernels_touch_only_their_memory_and_share_none(driver):
    name, run = driver
    levels = []
    for level in (*LEVELS, MODEL):
        for what in ("60" if name == "asan" else "5", "threads"):
            done = run("kernels", what, level=level)
            if done.returncode == 77:  # this machine does not support the level
                continue
            assert done.returncode == 0, done.stdout + done.stderr
            assert done.stdout == f"{level}: {what} passed\n"
            levels.append(level)
    assert "default" in levels
    assert (MODEL in levels) == ("avx2" in levels)


def test_passes_on_threads_touch_only_their_memory_and_race_for_none(driver):
    name, run = driver
    cases = "2" if name == "asan" else "0"
    # At the default level, since the work is split equally at all levels, and at the one whose weights are packed in
    # another way.
    for level in ("default", MODEL):
        done = run("network", cases, "two", level=level)  # of the four dtypes
        if done.returncode == 77 and level == MODEL:
            continue
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == f"{level}: {cases} passed\n"


def test_blocks_of_the_pool_are_passed_between_threads_without_a_race(driver):
    name, run = driver
    rounds = "50" if name == "asan" else "5"
    done = run("pool", rounds)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"pool: {rounds} passed\n"


def test_a_deliberate_error_is_reported(driver):
    name, run = driver
    done = run("kernels", "overflow" if name == "asan" else "race")
    assert done.returncode != 0
    found = "ERROR: AddressSanitizer" if name == "asan" else "WARNING: ThreadSanitizer: data race"
    assert found in done.stderr
    assert "gemm-inl.h" in done.stderr
