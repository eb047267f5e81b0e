"""The layout of `hidden`, the flat tensor in which the op `mlp` returns h_1 … h_{K−1}, one after the other."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def split_hidden(hidden: Tensor, shape: torch.Size, weights: Sequence[Tensor]) -> list[Tensor]:
    """h_1 … h_{K−1}, each (…, D_k), as views of `hidden`; `shape` is that of h_0."""
    leading = shape[:-1]
    widths = [weight.shape[0] for weight in weights[:-1]]
    pieces = torch.split(hidden, [math.prod(leading) * width for width in widths]) if widths else ()
    return [piece.view(*leading, width) for piece, width in zip(pieces, widths, strict=True)]
