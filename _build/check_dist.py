"""Checks that a source archive and a wheel contain what git tracks and no more: `python _build/check_dist.py dist`.

`.ci/release-check` runs it in the checkout that they were built from. It checks neither the metadata (`twine check`)
nor whether the wheel works.
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

WHEEL_LIMIT = 2_000_000  # bytes
BINARY, OPTIONAL = "torch_manualbp/_C.abi3.so", {"torch_manualbp/_C_cuda.abi3.so"}
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}


def differences(archive: Path, found: set[str], wanted: set[str], optional: Iterable[str] = ()) -> Iterator[str]:
    """Yields one line per missing or unexpected file."""
    yield from (f"{archive.name} lacks {name}" for name in sorted(wanted - found))
    yield from (f"{archive.name} should not hold {name}" for name in sorted(found - wanted - set(optional)))


def sdist_problems(archive: Path, tracked: set[str]) -> Iterator[str]:
    """It must contain all tracked files, so that it can be built, tested and linted, and what setuptools writes."""
    with tarfile.open(archive) as tar:
        names = {name for member in tar if member.isfile() for name in [member.name.partition("/")[2]]}
    written = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("torch_manualbp.egg-info/")}
    yield from differences(archive, names, tracked, written)


def wheel_problems(archive: Path, tracked: set[str], version: str) -> Iterator[str]:
    """It must contain only the tracked package, the binary, and the metadata with the licence, and be small."""
    with zipfile.ZipFile(archive) as wheel:
        names = set(wheel.namelist())
    package = {name for name in tracked if name.startswith("torch_manualbp/")}
    metadata = {f"torch_manualbp-{version}.dist-info/{name}" for name in METADATA}
    yield from differences(archive, names, package | metadata | {BINARY}, OPTIONAL)
    if "-cp310-abi3-" not in archive.name:
        yield f"{archive.name} is not tagged cp310-abi3"
    if archive.stat().st_size >= WHEEL_LIMIT:
        yield f"{archive.name} has {archive.stat().st_size:,} bytes, the limit is {WHEEL_LIMIT:,}"


def problems(dist: Path, tracked: set[str], version: str) -> Iterator[str]:
    """Yields one line per problem of the archives in the folder `dist`."""
    sdists, wheels = sorted(dist.glob("*.tar.gz")), sorted(dist.glob("*.whl"))
    if [sdist.name for sdist in sdists] != [f"torch_manualbp-{version}.tar.gz"]:
        yield f"{dist} should hold torch_manualbp-{version}.tar.gz and no other, found {[sdist.name for sdist in sdists]}"
    if len(wheels) != 1 or not wheels[0].name.startswith(f"torch_manualbp-{version}-"):
        yield f"{dist} should hold one wheel, of version {version}, found {[wheel.name for wheel in wheels]}"
    for sdist in sdists:
        yield from sdist_problems(sdist, tracked)
    for wheel in wheels:
        yield from wheel_problems(wheel, tracked, version)


def main() -> None:
    """Prints the problems, and exits with 1 if there are any."""
    tracked = set(subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines())
    found = re.search(r'^__version__ = "(.+)"$', Path("torch_manualbp", "__init__.py").read_text(), re.MULTILINE)
    if not tracked or not found:
        sys.exit("check_dist.py: run it at the root of a git checkout of torch_manualbp")
    dist = Path(sys.argv[1])
    wrong = list(problems(dist, tracked, found[1]))
    for path in sorted(dist.iterdir()):
        sys.stdout.write(f"    {path.stat().st_size:>9,}  {path.name}\n")
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
