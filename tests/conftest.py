"""Every test starts with the same random seed, one thread, and our kernels for all dtypes.

The modules marked `cuda` apply to every device: tensors created without a device are on the device under test.
`--device=cuda -m cuda` runs them on a GPU; `--device=emulated -m cuda` runs them on the CPU, through the CUDA entries
with emulated kernels (emulation.py).
"""

import sys

import pytest
import torch
from hypothesis import settings

from emulation import emulated_ops
from torch_manualbp import _ops, _route

# Run the same examples every time, and without deadlines, because the time of an example is irrelevant.
settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
settings.load_profile("reproducible")


# Maps a device to the markers of tests that cannot run on it (described in pyproject.toml).
EXCLUDED = {"cpu": (), "cuda": ("cpu_only",), "emulated": ("cpu_only", "not_emulated")}


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda", "emulated"), default="cpu", help="where the kernels run")


def pytest_configure(config):
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device=cuda: torch {torch.__version__} finds no GPU")
    if config.getoption("device") == "cuda" and not _ops.has_cuda_kernels:
        raise pytest.UsageError("--device=cuda: the CUDA kernels are not compiled in (docs/cuda.md)")


def pytest_collection_modifyitems(config, items):
    items.sort(key=_is_in_fast_module)  # slow modules first, so that no process waits for one at the end
    device = config.getoption("device")
    for item in items:
        for marker in filter(None, map(item.get_closest_marker, EXCLUDED[device])):
            (reason,) = marker.args
            item.add_marker(pytest.mark.skip(reason=f"not with --device={device}: {reason}"))


def _is_in_fast_module(item):
    return all(mark.name != "slow" for mark in item.getparent(pytest.Module).own_markers)


@pytest.fixture
def no_matplotlib(monkeypatch):
    """As if matplotlib were not installed."""
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch_manualbp.inspection._figure", raising=False)


@pytest.fixture
def emulated(monkeypatch):
    """Replaces the CPU ops with the CUDA entries on emulated kernels."""
    for name, op in emulated_ops().items():
        monkeypatch.setattr(_ops, name, op)


@pytest.fixture(autouse=True)
def _device_under_test(request):
    device = request.config.getoption("device")
    if device == "emulated" and request.node.get_closest_marker("cuda"):
        request.getfixturevalue("emulated")
    if device != "cuda" or not request.node.get_closest_marker("cuda"):
        yield
        return
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    """Sets seed 0 and one thread: on a busy machine, waiting at barriers takes ten times as long as the work.

    test_threads.py shows that the number of threads changes no bit of what the other tests check. Torch computes large
    bfloat16 networks on some machines, and single small layers on all; test_route.py and test_modules.py test this,
    and all other modules test the kernels.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    monkeypatch.setattr(_route, "_has_bfloat16_units", False)
    monkeypatch.setattr(_route, "_kernels_have_bfloat16_units", False)
    monkeypatch.setattr(_route, "_OUTPUTS_LEFT_TO_TORCH", 0)
