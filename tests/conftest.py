"""Every test starts from the same random seed, with one thread, and with our kernels for all dtypes.

`--device=cuda -m cuda` runs the numerical modules on a GPU; `--device=emulated -m cuda` runs them on the CPU through the
CUDA entries, with the CUDA kernels emulated (emulation.py).
"""

import pytest
import torch
from hypothesis import settings

from emulation import emulated_ops
from torch_manualbp import _ops, _route

# The same examples in every run; how long one takes says nothing about it being right.
settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
settings.load_profile("reproducible")


# Modules whose tests hold on every device: what torch makes without being told a device is on the one under test.
NUMERICAL = {"test_dtypes", "test_functional", "test_layouts", "test_losses", "test_properties", "test_special_values"}
# What holds of our own products, not of a library's, and errors that a device reports later, for the whole process.
CPU_ONLY = {
    "test_any_split_of_a_batch_gives_the_same_rows",
    "test_errors_name_the_argument",
    "test_the_number_of_threads_changes_no_bit",
}
# What torch's CPU library computes otherwise (numbers too small for bfloat16), and what looks at the names of the ops.
NOT_EMULATED = {
    "test_activations_are_kept_only_for_a_backward_pass",
    "test_each_pass_is_one_call",
    "test_every_finite_half_passes_through_the_identity",
    "test_every_half_passes_backward_as_a_gradient",
    "test_every_half_passes_through_a_weight_of_one",
    "test_linear_relu_errors_name_the_argument",
    "test_loss_backward_leaves_no_graph_and_adds_up",
    "test_mlp_errors_name_the_argument",
    "test_one_node_and_one_call",
    "test_stores_round_to_nearest_even",
}


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda", "emulated"), default="cpu", help="where the kernels run")


def pytest_configure(config):
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device=cuda: torch {torch.__version__} finds no GPU")
    if config.getoption("device") == "cuda" and not _ops.has_cuda_kernels:
        raise pytest.UsageError("--device=cuda: the CUDA kernels are not compiled in (docs/cuda.md)")


def pytest_collection_modifyitems(config, items):
    device = config.getoption("device")
    for item in items:
        name = getattr(item, "originalname", None)  # doctests have none
        if device != "cpu" and (name in CPU_ONLY or (device == "emulated" and name in NOT_EMULATED)):
            item.add_marker(pytest.mark.skip(reason=f"not for --device={device}"))
        elif device != "cpu" and item.module.__name__ in NUMERICAL:
            item.add_marker("cuda")


@pytest.fixture
def emulated(monkeypatch):
    """The CUDA entries and kernels, emulated, in the place of the CPU's."""
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
    """Seed 0, one thread: on a machine that is busy, waiting threads take ten times as long as the work.

    test_threads.py shows that more threads change no bit of what the other tests check. Large bfloat16 networks go to
    torch on some machines, and one small layer on its own does everywhere; test_function.py and test_modules.py test
    that, everything else tests the kernels.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    monkeypatch.setattr(_route, "_has_bfloat16_units", False)
    monkeypatch.setattr(_route, "_OUTPUTS_LEFT_TO_TORCH", 0)
