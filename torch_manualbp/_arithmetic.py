"""The arithmetic of what is computed beside training: no graph, no autocast, and wide enough sums."""

import contextlib

import torch


def plain_arithmetic(device: str) -> contextlib.ExitStack:
    """An entered context in which no graph is recorded and autocast does not change dtypes.

    It disables only what is enabled: entering torch's contexts costs 10 µs, and not every device has an autocast.
    """
    stack = contextlib.ExitStack()
    if torch.is_grad_enabled():
        stack.enter_context(torch.no_grad())
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def widest_dtype(device: torch.device) -> torch.dtype:
    """The dtype for statistics: float64 if the device supports it."""
    return torch.float32 if device.type == "mps" else torch.float64
