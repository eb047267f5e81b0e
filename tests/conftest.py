"""Every test starts from the same random seed and with one thread, and so leaves no settings behind."""

import pytest
import torch
from hypothesis import settings

# The same examples in every run; how long one takes says nothing about it being right.
settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def _same_start():
    """Seed 0, one thread: on a machine that is busy, waiting threads take ten times as long as the work.

    test_threads.py shows that more threads change no bit of what the other tests check.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
