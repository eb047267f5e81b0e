"""In-tree build backend: setuptools, which requires torch only if the environment has none.

The extension needs only torch's headers, and its stable ABI works with any torch >= 2.10, so the installed torch is
sufficient. A plain ``torch`` build requirement would make pip download another one, several gigabytes, into its
isolated build environment. If pip isolates the build, this backend makes the installed torch importable; if there is
none (a fresh environment of ``python -m build`` or ``uv``), it requires one.
"""

import re
import site
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

import setuptools
from setuptools.build_meta import *  # noqa: F403

if int(setuptools.__version__.split(".")[0]) < 77:  # without build isolation, nothing else checks this
    raise RuntimeError(
        f"torch_manualbp needs setuptools >= 77 to be built, found {setuptools.__version__}: "
        "`pip install -U setuptools`, or let pip isolate the build (without --no-build-isolation)"
    )

_HEADER = Path("torch", "include", "torch", "csrc", "stable", "library.h")


def _installed_torch() -> Path | None:
    """The site-packages folder with a torch >= 2.10 and its headers, in the environment that runs the build."""
    folders = [sysconfig.get_path("platlib"), *site.getsitepackages()]  # the latter for --system-site-packages
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's own packages
        folders.append(site.getusersitepackages())
    for folder in folders:
        for torch in distributions(name="torch", path=[folder]):
            release = re.match(r"(\d+)\.(\d+)", torch.version)
            if release and (int(release[1]), int(release[2])) >= (2, 10) and (Path(folder) / _HEADER).exists():
                return Path(folder)
    return None


def _build_requires(config_settings: dict[str, object] | None = None) -> list[str]:
    return [] if _installed_torch() else ["torch>=2.10"]


def get_requires_for_build_sdist(config_settings: dict[str, object] | None = None) -> list[str]:
    """No requirements: a source archive needs no torch."""
    return []


# These replace setuptools' hooks, which run setup.py, which imports torch before it can be required.
get_requires_for_build_wheel = _build_requires
get_requires_for_build_editable = _build_requires

# pip's isolated build hides site-packages. Add it last, so that the isolated environment's setuptools comes first.
_folder = _installed_torch()
if _folder and str(_folder) not in sys.path:
    sys.path.append(str(_folder))
