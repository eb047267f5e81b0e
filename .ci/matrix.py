"""Installs one wheel under many versions of CPython and torch, runs numerical tests, and writes a table.

    make matrix                                                    (downloads several GB for each torch)
    make matrix ARGS="--pythons python3.12 --torch 2.13 newest"

Interpreters are looked up on the path; combinations that cannot be found or installed are listed with the reason. Only
one environment exists at a time, in build/matrix, with the downloads for one torch: 12 GB. It neither builds the wheel
(`make wheel`) nor runs the whole test suite (`make test`).
"""

import argparse
import datetime
import hashlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "matrix"
OLDEST = (2, 10)  # TORCH_TARGET_VERSION in setup.py
PYTHONS = ["python3.10", "python3.11", "python3.12", "python3.13"]
# Results, torch.func, compile, export, state_dict and error classes depend on the versions of torch and Python.
NAMES = "compile_backend function functional graph info layouts losses modules ops properties special_values transforms"
TESTS = [ROOT / "tests" / f"test_{name}.py" for name in NAMES.split()]
NEEDED = ["expecttest", "hypothesis", "pytest"]


class StepError(Exception):
    """A command failed; the message gives the reason in one line."""


class Cell(NamedTuple):
    """The result for one Python and one torch."""

    python: str
    torch: str
    result: str
    passed: bool = False


def run(*command: object, log: Path | None = None) -> str:
    """Returns the output of a command; raises StepError with the line that gives the reason if it fails."""
    done = subprocess.run([str(part) for part in command], cwd=FOLDER, text=True, capture_output=True)
    if log:
        log.write_text(done.stdout + done.stderr)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(ERROR|\w*Error)\b", line)]
        raise StepError((errors or lines or ["it ended without a word"])[-1])
    return done.stdout


def release(version: str) -> tuple[int, ...]:
    """(2, 13, 0) for "2.13.0+cpu"."""
    return tuple(map(int, version.partition("+")[0].split(".")))


def choose(available: list[str], wanted: list[str]) -> list[str]:
    """The newest release of each wanted series ("2.13"), the "oldest" that the wheel supports, the "newest" of all."""
    releases = sorted({version.partition("+")[0] for version in available}, key=release)
    admitted = [version for version in releases if release(version) >= OLDEST]
    chosen = set()
    for want in wanted:
        series = [version for version in admitted if f"{version}.".startswith(f"{want}.")]
        chosen.update(admitted[:1] if want == "oldest" else admitted[-1:] if want == "newest" else series[-1:])
    return sorted(chosen, key=release)


def releases_for(python: str, flags: list[str]) -> list[str]:
    """The releases of torch that pip finds for a Python."""
    found = re.search(r"Available versions: (.+)", run(python, "-m", "pip", "index", "versions", "torch", *flags))
    return found[1].split(", ") if found else []


def binaries(wheel: Path) -> dict[str, bytes]:
    """The compiled files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.endswith(".so")}


def install(python: str, torch: str, wheel: Path, flags: list[str], extra: list[str]) -> Path:
    """Creates an environment, installs torch, then the wheel as a user does; returns the environment's Python."""
    shutil.rmtree(FOLDER / "env", ignore_errors=True)
    run(python, "-m", "venv", FOLDER / "env")
    program = FOLDER / "env" / "bin" / "python"
    pip = [program, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--cache-dir", FOLDER / "cache"]
    run(*pip, *flags, f"torch=={torch}")
    run(*pip, f"torch=={torch}", wheel, *NEEDED, *extra)
    return program


def test(program: Path, wheel: Path, label: str) -> tuple[str, bool]:
    """Runs `info` and the tests on the installed wheel; returns the counts, and whether all passed."""
    site = Path(run(program, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    for name, content in binaries(wheel).items():
        if (site / name).read_bytes() != content:
            raise StepError(f"the installed {name} is not the one of the wheel")
    run(program, "-W", "error", "-m", "torch_manualbp.info", log=FOLDER / f"{label}-info.txt")
    report = FOLDER / f"{label}.xml"
    report.unlink(missing_ok=True)  # from an earlier run
    # Use pytest's own program, since `python -m pytest` would import the package from the checkout.
    pytest = [program.with_name("pytest"), "-q", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    try:
        run(*pytest, "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS, log=FOLDER / f"{label}.txt")
    except StepError:
        if not report.exists():
            raise
    counts = ElementTree.parse(report).getroot()[0].attrib
    skipped, bad = int(counts["skipped"]), int(counts["failures"]) + int(counts["errors"])
    versions = "print(*(f'{name} {version(name)}' for name in ('torch', 'numpy')), sep=', ')"
    installed = run(program, "-c", f"from importlib.metadata import version; {versions}").strip()
    passed = int(counts["tests"]) - bad - skipped
    return f"{passed} passed, {bad} failed, {skipped} skipped ({installed})", passed > 0 and not bad


def digest(content: bytes) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def table(wheel: Path, cells: list[Cell]) -> str:
    """A Markdown table of everything that was tried."""
    files = {wheel.name: wheel.read_bytes(), **binaries(wheel)}
    return "\n".join([
        f"{datetime.date.today()}, {platform.machine()}, {' '.join(platform.libc_ver())}. One wheel, one binary:",
        "",
        *(f"- `{name}`: {len(content):,} bytes, sha256 `{digest(content)}`" for name, content in files.items()),
        "",
        "| CPython | torch | result |",
        "|---|---|---|",
        *(f"| {cell.python} | {cell.torch} | {cell.result} |" for cell in sorted(cells)),
        "",
    ])  # fmt: skip


def main() -> None:
    """Tries each wanted release of torch under each Python that has it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--pythons", nargs="+", default=PYTHONS)
    parser.add_argument("--torch", nargs="+", default=["oldest", "2.13", "2.14", "newest"])
    parser.add_argument("--extra", nargs="+", default=[], help="additional packages, such as 'numpy<2'")
    parser.add_argument("--torch-flags", default="", help="options of the pip command that installs torch")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "matrix.md")
    args = parser.parse_args()
    wheel, flags = args.wheel.resolve(), shlex.split(args.torch_flags)
    FOLDER.mkdir(parents=True, exist_ok=True)
    cells, plan = [], []
    for python in args.pythons:
        try:
            version = run(python, "-c", "import platform; print(platform.python_version())").strip()
            plan += [(torch, python, version) for torch in choose(releases_for(python, flags), args.torch)]
        except (OSError, StepError) as why:
            cells.append(Cell(python, "", f"not run: {why}"))
    before = None
    for torch, python, version in sorted(plan, key=lambda item: release(item[0])):  # stable: keeps the order of Pythons
        if torch != before:  # downloads for one torch are shared by all Pythons
            shutil.rmtree(FOLDER / "cache", ignore_errors=True)
            before = torch
        print(f"==> CPython {version}, torch {torch}: ", end="", flush=True)
        try:
            program = install(python, torch, wheel, flags, args.extra)
        except StepError as why:
            cells.append(Cell(version, torch, f"not installable: {why}"))
        else:
            try:
                cells.append(Cell(version, torch, *test(program, wheel, f"python-{version}-torch-{torch}")))
            except StepError as why:
                cells.append(Cell(version, torch, f"broken: {why}"))
        print(cells[-1].result, flush=True)
        args.output.write_text(table(wheel, cells))  # after each cell, so that an interruption loses none
    for name in ("env", "cache"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    sys.stdout.write(f"\n{table(wheel, cells)}")
    sys.exit(not all(cell.passed for cell in cells))


if __name__ == "__main__":
    main()
