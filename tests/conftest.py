"""Every test starts from the same random seed, with one thread, and with our kernels for all dtypes."""

import pytest
import torch
from hypothesis import settings

from torch_manualbp import _function

# The same examples in every run; how long one takes says nothing about it being right.
settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    """Seed 0, one thread: on a machine that is busy, waiting threads take ten times as long as the work.

    test_threads.py shows that more threads change no bit of what the other tests check. Large bfloat16 networks go to
    torch on some machines; test_function.py tests that, everything else tests the kernels.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    monkeypatch.setattr(_function, "_has_bfloat16_units", False)
