"""Figures of what the inspection tools found. matplotlib is imported only when one is drawn."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_manualbp.inspection import _table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from torch_manualbp.inspection.trace import Trace

TITLE, LABEL, TICK = 17, 14, 12  # font sizes that are read from the last row of a lecture hall
FORWARD, ACTIVE, BACKWARD = "#4c78a8", "#54a24b", "#e45756"  # f_k, h_k; gradients
MOST_PANELS = 10  # f_0, h_1, f_1, …: more heat maps than these side by side cannot be read
MOST_ROWS = 32  # examples in a heat map


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure that draws without a display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("torch_manualbp: figures need matplotlib: `pip install matplotlib`") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def draw_trace(trace: "Trace") -> "Figure":
    """Both passes, one above the other: a heat map per quantity if they fit, else a bar for its size."""
    inner = 2 * len(trace.f) - 1 + trace.layers[-1].relu
    if len(trace.output) * max(f.shape[1] for f in trace.f) > 1 and inner <= MOST_PANELS:
        return _heat_maps(trace)
    return _bars(trace)


def _columns(trace: "Trace") -> list[tuple[str, Tensor, Tensor]]:
    """f_0, h_1, f_1, …, f_{K−1}: each with its name, its value and its gradient."""
    columns = []
    for k in range(len(trace.f)):
        columns.append((f"f_{{{k}}}", trace.f[k], trace.dl_df[k]))
        if k + 1 < len(trace.h):
            columns.append((f"h_{{{k + 1}}}", trace.h[k + 1], trace.dl_dh[k + 1]))
    return [(name, value.double().cpu(), gradient.double().cpu()) for name, value, gradient in columns]


def _heat_maps(trace: "Trace") -> "Figure":
    """Rows are examples, columns units; white is zero, so that the units that ReLU switched off are seen."""
    columns, rows = _columns(trace), min(len(trace.output), MOST_ROWS)
    figure = new_figure(max(2.0 + 1.5 * len(columns), 9.0), 7.0)
    grid = figure.subplots(2, len(columns), squeeze=False)
    ell = r"\ell_i" if trace.losses is not None else "L"
    for line, (title, colors) in enumerate((("forward pass →", "RdBu_r"), ("← backward pass", "PiYG_r"))):
        for axes, (name, *both) in zip(grid[line], columns, strict=True):
            numbers = both[line][:rows]
            largest = _largest(numbers)
            axes.imshow(
                numbers.numpy(), cmap=colors, vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest"
            )
            axes.set_title(f"${name}$" if line == 0 else rf"$\partial {ell}/\partial {name}$", fontsize=LABEL + 2)
            axes.set_xticks([0, numbers.shape[1] - 1] if numbers.shape[1] > 1 else [0])
            axes.set_yticks([0, rows - 1] if axes is grid[line][0] and rows > 1 else [])
            axes.tick_params(labelsize=TICK)
            axes.set_xlabel(f"unit\nup to ±{largest:.2g}", fontsize=TICK)
        grid[line][0].set_ylabel(f"{title}\nexample $i$", fontsize=LABEL)
    part = "" if rows == len(trace.output) else f"the first {rows} of {len(trace.output)} examples; "
    figure.suptitle(
        f"Both passes, example by example\n({part}white is 0, full colour the number below)", fontsize=TITLE
    )
    return figure


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()].abs()
    return finite.max().item() if len(finite) and finite.any() else 1.0


def _bars(trace: "Trace") -> "Figure":
    """The size of each quantity: its absolute value if it is one number, else the root of the mean square."""
    columns, scalar = _columns(trace), _table.is_scalar(trace)
    figure = new_figure(min(max(8.0, 0.9 * len(columns)), 14.0), 7.0)
    top, bottom = figure.subplots(2, 1)
    colors = [FORWARD if name.startswith("f") else ACTIVE for name, _, _ in columns]
    ell = r"\ell_i" if trace.losses is not None and not scalar else r"\ell" if scalar else "L"
    names = [f"${name}$" for name, _, _ in columns]
    _draw_bars(top, [value for _, value, _ in columns], colors, names, scalar)
    slopes = [rf"$\partial {ell}/\partial {name}$" for name, _, _ in columns]
    _draw_bars(bottom, [gradient for _, _, gradient in columns], [BACKWARD] * len(columns), slopes, scalar)
    unit = "value" if scalar else "root mean square"
    top.set_ylabel(unit, fontsize=LABEL)
    bottom.set_ylabel(unit, fontsize=LABEL)
    top.set_title(r"Forward pass $\longrightarrow$  ($f_k$ blue, $h_k = a[f_{k-1}]$ green)", fontsize=TITLE)
    bottom.set_title(r"Backward pass $\longleftarrow$", fontsize=TITLE)
    figure.align_ylabels()
    return figure


def _draw_bars(axes: Any, values: list[Tensor], colors: list[str], names: list[str], scalar: bool) -> None:
    sizes = [value.item() if scalar else _root_mean_square(value) for value in values]
    bars = axes.bar(range(len(sizes)), sizes, color=colors)
    positive = [size for size in sizes if size > 0]
    if not scalar and positive and max(positive) > 30 * min(positive):
        axes.set_yscale("log")
    every = 1 if len(names) <= 16 else 2 * -(-len(names) // 32)  # even: f_k is named, h_k stands between
    axes.set_xticks(range(0, len(names), every), names[::every], fontsize=LABEL if every == 1 else TICK)
    axes.tick_params(axis="y", labelsize=TICK)
    if len(sizes) <= 16:
        axes.bar_label(bars, [f"{size:.3g}" for size in sizes], fontsize=TICK, padding=2)
        axes.margins(y=0.15)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _root_mean_square(value: Tensor) -> float:
    return torch.nan_to_num(value.square().mean().sqrt()).item() if value.numel() else 0.0
