"""Arithmetic of the inspection tools: without a graph, in the widest dtype."""

import contextlib

import torch


def plain_arithmetic(device: str) -> contextlib.ExitStack:
    """A context, entered already: no graph is recorded, and autocast leaves dtypes alone.

    Only what is on is switched off: to enter torch's contexts costs 10 µs, and not every device has an autocast.
    """
    stack = contextlib.ExitStack()
    if torch.is_grad_enabled():
        stack.enter_context(torch.no_grad())
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def widest_dtype(device: torch.device) -> torch.dtype:
    """In which statistics are made: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
