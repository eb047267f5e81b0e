"""Goes through the cases of a fuzzer, in a process that may crash, and says how to run the one that fails.

A fuzzer is a module with draw(seed) → case, check(case), which raises where the library is wrong, and simpler(case) →
cases that have less of something. The repr of a case is Python that makes it.
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

CASE_SECONDS = 20.0  # what takes longer is a hang, and counts as a crash; most cases take about 10 ms
SHRINK_SECONDS = 20.0  # to make a failing case small
PATHS = [Path(__file__).parents[2], Path(__file__).parents[1]]  # of the library and the tests, for the other process


@dataclass
class Report:
    """What came out of a run."""

    cases: int = 0
    undecidable: int = 0
    failures: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.cases:,} cases, {self.undecidable:,} of them undecidable: "
            f"{len(self.failures)} mismatches, {len(self.crashes)} crashes or hangs"
        )


def run(
    fuzzer: ModuleType, seeds: Iterator[int], seconds: float, watch: Callable[[int], None] = lambda seed: None
) -> Report:
    """Checks the cases of these seeds in this process, until the first failure (made small) or the end of the time."""
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
    """The simplest case that still fails, as far as small steps lead."""
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
    """None, UndecidableError, or what is wrong, as text."""
    try:
        fuzzer.check(case)
    except UndecidableError:
        return UndecidableError
    except Exception as error:  # any other exception is a finding too
        return f"{type(error).__name__}: {error}"
    return None


@contextmanager
def _warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")  # so we drew them
        yield


def _text(fuzzer: ModuleType, seed: int, case: Any, problem: str) -> str:
    """A failure, as what to run in tests/ to see it again."""
    return f"# seed {seed}: {problem}\nfrom {fuzzer.__name__} import *\ncheck({case!r})\n"


# --- in a process of its own ------------------------------------------------------------------------------------------

_CHILD = """
import importlib, sys
from fuzz import runner
name, first, count, stop, case_seconds, mark = sys.argv[1:]
runner.child(importlib.import_module(name), int(first), int(count), float(stop), float(case_seconds), mark)
"""


def child(fuzzer: ModuleType, first: int, count: int, stop: float, case_seconds: float, mark: str) -> None:
    """What the other process runs: writes the seed that it is at into `mark`, and the report to its output.

    A case that takes too long ends the process with a traceback, even where it computes outside of Python.
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
    """The same in a process of its own: a crash or a hang is a finding, and the rest of the cases follow it.

    A failure does not end the run either, but ten do.
    """
    total, stop, seed = Report(), time.monotonic() + seconds, first  # both processes have this clock
    module = sys.modules[fuzzer]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    while seed < first + count and time.monotonic() < stop and len(total.failures) + len(total.crashes) < 10:
        mark.unlink(missing_ok=True)
        arguments = [fuzzer, str(seed), str(first + count - seed), str(stop), str(case_seconds), str(mark)]
        patience = stop - time.monotonic() + SHRINK_SECONDS + 2 * case_seconds  # it ends itself before
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
