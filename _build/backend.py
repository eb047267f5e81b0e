"""In-tree build backend: setuptools, asking for torch only when the environment has none.

The extension needs torch's headers and nothing else of it, and its stable ABI fits any torch >= 2.10. So the torch
that is already installed will do; a plain ``torch`` build requirement would make pip download another one, several
gigabytes, into its isolated build environment. Where pip isolates the build, this backend puts the installed torch
within reach; where there is none (a fresh environment of ``python -m build`` or ``uv``), it asks for one.
"""

import sys
import sysconfig
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403

_HEADER = Path("torch", "include", "torch", "csrc", "stable", "library.h")


def _installed_torch() -> Path | None:
    """The site-packages folder, of the environment that runs the build, that holds torch and its stable-ABI headers."""
    for folder in (sysconfig.get_path("platlib"), sysconfig.get_path("purelib")):
        if (Path(folder) / _HEADER).exists():
            return Path(folder)
    return None


def _build_requires(config_settings: dict[str, object] | None = None) -> list[str]:
    return [] if _installed_torch() else ["torch>=2.10"]


# Not setuptools' own hooks of these names: they run setup.py, which imports torch before it could be asked for.
get_requires_for_build_wheel = _build_requires
get_requires_for_build_editable = _build_requires
get_requires_for_build_sdist = _build_requires


# pip's isolated build hides site-packages. Last on the path: the isolated environment's setuptools comes first.
_folder = _installed_torch()
if _folder and str(_folder) not in sys.path:
    sys.path.append(str(_folder))
