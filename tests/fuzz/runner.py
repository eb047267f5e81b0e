"""Runs the cases of a fuzzer, in a process that may crash, and reports how to repeat a failing one.

A fuzzer is a module with draw(seed) → case, check(case), which raises if the library is wrong, and simpler(case) →
simpler cases. The repr of a case is Python code that creates it.
"""

import faulthandler
import itertools
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from fuzz.differential import UndecidableError

CASE_SECONDS = 20.0  # a longer case is a hang, and counts as a crash; most cases take about 10 ms
SHRINK_SECONDS = 20.0  # to shrink a failing case
PATHS = [Path(__file__).parents[2], Path(__file__).parents[1]]  # of the library and the tests, for the child process


@dataclass
class Report:
    """The results of a run."""

    cases: int = 0
    undecidable: int = 0
    failures: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A summary in one line."""
        return (
            f"{self.cases:,} cases, {self.undecidable:,} of them undecidable: "
            f"{len(self.failures)} mismatches, {len(self.crashes)} crashes or hangs"
        )


def run(
    fuzzer: ModuleType, seeds: Iterator[int], seconds: float, watch: Callable[[int], None] = lambda seed: None
) -> Report:
    """Checks the cases of these seeds in this process, until the first failure, which it shrinks, or the time limit."""
    report, stop = Report(), time.monotonic() + seconds
    with _warnings_as_errors():
        for seed in seeds:
            if time.monotonic() > stop:
                break
            watch(seed)
            case = fuzzer.draw(seed)
            report.cases += 1
            problem = _problem(fuzzer, case)
            if problem is UndecidableError:
                report.undecidable += 1
            elif problem:
                small = shrink(fuzzer, case, time.monotonic() + SHRINK_SECONDS, lambda seed=seed: watch(seed))
                report.failures.append(_text(fuzzer, seed, small, str(_problem(fuzzer, small))))
                break
    return report


def shrink(fuzzer: ModuleType, case: Any, stop: float, watch: Callable[[], None]) -> Any:
    """The simplest failing case that single steps can reach."""
    while True:
        for candidate in fuzzer.simpler(case):
            if time.monotonic() > stop:
                return case
            watch()
            problem = _problem(fuzzer, candidate)
            if problem and problem is not UndecidableError:
                case = candidate
                break
        else:
            return case


def _problem(fuzzer: ModuleType, case: Any) -> Any:
    """None, UndecidableError, or a description of the error."""
    try:
        fuzzer.check(case)
    except UndecidableError:
        return UndecidableError
    except Exception as error:  # any other exception is also a finding
        return f"{type(error).__name__}: {error}"
    return None


@contextmanager
def _warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")  # drawn on purpose
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated", DeprecationWarning)  # torch's own, in jvp
        yield


def _text(fuzzer: ModuleType, seed: int, case: Any, problem: str) -> str:
    """Code that reproduces a failure when run in tests/."""
    return f"# seed {seed}: {problem}\nfrom {fuzzer.__name__} import *\ncheck({case!r})\n"


# --- in a child process -----------------------------------------------------------------------------------------------

_CHILD = """
import importlib, sys
from fuzz import runner
name, first, count, stop, case_seconds, mark = sys.argv[1:]
runner.child(importlib.import_module(name), int(first), int(count), float(stop), float(case_seconds), mark)
"""


def child(fuzzer: ModuleType, first: int, count: int, stop: float, case_seconds: float, mark: str) -> None:
    """Runs in the child process: writes the current seed to `mark`, and the report to standard output.

    A case that takes too long ends the process with a traceback, even while it computes outside Python.
    """
    getattr(fuzzer, "prepare", lambda: None)()
    with open(mark, "wb", buffering=0) as file:

        def watch(seed: int) -> None:
            os.pwrite(file.fileno(), b"%20d" % seed, 0)
            faulthandler.dump_traceback_later(case_seconds, exit=True)

        report = run(fuzzer, iter(range(first, first + count)), stop - time.monotonic(), watch)
        faulthandler.cancel_dump_traceback_later()
    print(report.cases, report.undecidable)
    print("".join(report.failures), end="")


def run_apart(
    fuzzer: str, first: int, count: int, seconds: float, mark: Path, case_seconds: float = CASE_SECONDS
) -> Report:
    """Does the same in a child process: after a failure, crash or hang, it continues with the remaining cases.

    Ten findings end the run.
    """
    total, stop, seed = Report(), time.monotonic() + seconds, first  # both processes share this clock
    module = sys.modules[fuzzer]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    while seed < first + count and time.monotonic() < stop and len(total.failures) + len(total.crashes) < 10:
        mark.unlink(missing_ok=True)
        arguments = [fuzzer, str(seed), str(first + count - seed), str(stop), str(case_seconds), str(mark)]
        patience = stop - time.monotonic() + SHRINK_SECONDS + 2 * case_seconds  # the child normally ends earlier
        try:
            done = subprocess.run(
                [sys.executable, "-c", _CHILD, *arguments], env=env, capture_output=True, text=True, timeout=patience
            )
            status, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as error:
            status, out, err = -1, "", str(error)
        if status == 0:
            counts, *text = out.splitlines(keepends=True)
            cases, undecidable = map(int, counts.split())
            total.cases += cases
            total.undecidable += undecidable
            if text:
                total.failures.append("".join(text))
                seed += cases
                continue
            break
        at = int(mark.read_bytes() or seed) if mark.exists() else seed
        total.cases += at - seed + 1
        said = "\n# ".join([f"exit status {status}", *err.splitlines()[-12:]])
        total.crashes.append(_text(module, at, module.draw(at), said))
        seed = at + 1
    return total


def seeds(first: int) -> Iterator[int]:
    """first, first + 1, …"""
    return itertools.count(first)
