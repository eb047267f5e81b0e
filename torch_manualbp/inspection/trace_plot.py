"""The figure of a `Trace`: a diagram (_network_plot.py), heat maps or bars. matplotlib is imported when it is drawn."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_manualbp._checks import check_choice
from torch_manualbp.inspection import _network_plot, _table

if TYPE_CHECKING:
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from torch_manualbp.inspection.trace import Trace

KINDS = ("network", "maps", "bars")
MOST_PANELS = 10  # f_0, h_1, f_1, …: more heat maps than these side by side cannot be read
MOST_ROWS = 32  # examples in a heat map
CELL = 0.6, 0.26  # inches that a number needs in a cell
WIDTH, HEIGHT = 13.33, 7.2


def draw_trace(trace: "Trace", kind: str | None, example: int) -> "Figure":
    """Both passes, the forward pass above."""
    if kind is not None:
        check_choice("plot", "kind", kind, KINDS)
    if not -len(trace.output) <= example < len(trace.output):
        raise IndexError(f"plot: there is no example {example} in a batch of {len(trace.output)}")
    inner = 2 * len(trace.f) - 1 + trace.layers[-1].relu
    if kind is None and len(trace.output) == 1 and _network_plot.has_numbers(trace):
        kind = "network"
    elif kind is None:
        units = max(f.shape[1] for f in trace.f)
        kind = "maps" if len(trace.output) * units > 1 and inner <= MOST_PANELS else "bars"
    if kind == "network":
        if reason := _network_plot.why_not(trace):
            raise ValueError(f"plot: this network is too large for kind='network': {reason}")
        return _network_plot.draw_network(trace, example % len(trace.output))
    if kind == "maps":
        if inner > MOST_PANELS:
            raise ValueError(f"plot: kind='maps' would need {inner} panels, and there is room for {MOST_PANELS}")
        return _maps(trace)
    return _bars(trace)


def _columns(trace: "Trace") -> list[tuple[str, Tensor, Tensor]]:
    """f_0, h_1, f_1, …, f_{K−1}: each with its name, its value and its gradient."""
    columns = []
    for k in range(len(trace.f)):
        columns.append((f"f_{{{k}}}", trace.f[k], trace.dl_df[k]))
        if k + 1 < len(trace.h):
            columns.append((f"h_{{{k + 1}}}", trace.h[k + 1], trace.dl_dh[k + 1]))
    return [(name, value.double().cpu(), gradient.double().cpu()) for name, value, gradient in columns]


def _maps(trace: "Trace") -> "Figure":
    """Rows are examples, columns units; white is zero, so that the units that ReLU switched off are seen."""
    from torch_manualbp.inspection._figure import BACKWARD, FORWARD, SIGNED, slide_figure

    columns, rows = _columns(trace), min(len(trace.output), MOST_ROWS)
    ell = r"\ell_i" if trace.losses is not None else "L"
    widest = max(value.shape[1] for _, value, _ in columns)
    cell = (WIDTH - 2.4) / len(columns) / max(widest, 1) - 0.2 / max(widest, 1), (HEIGHT / 2 - 1.2) / max(rows, 1)
    numbered = cell[0] >= CELL[0] and cell[1] >= CELL[1]
    with slide_figure(WIDTH, HEIGHT) as figure:
        figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.16)
        passes = figure.subfigures(2, 1, squeeze=False)[:, 0]
        for line, (part, title, color) in enumerate(
            zip(passes, ("Forward pass →", "← Backward pass"), (FORWARD, BACKWARD), strict=True)
        ):
            panels = part.subplots(1, len(columns), sharey=True, squeeze=False)[0]
            numbers = [both[line][:rows] for _, *both in columns]
            norm, ticks = _signed_norm(numbers)
            for axes, (name, *_), values in zip(panels, columns, numbers, strict=True):
                image = axes.imshow(values.numpy(), cmap=SIGNED, norm=norm, aspect="auto", interpolation="nearest")
                axes.set_title(f"${name}$" if line == 0 else rf"$\partial {ell}/\partial {name}$")
                axes.set_xticks(_ends(values.shape[1]))
                axes.set_yticks(_ends(rows))
                axes.tick_params(left=axes is panels[0])
                axes.spines[:].set_visible(True)
                axes.grid(visible=False)
                if numbered:
                    _write_numbers(axes, values, norm)
            panels[0].set_ylabel(r"example $i$")
            panels[0].set_xlabel("unit")
            part.suptitle(title, x=0.02, ha="left", color=color)
            bar = part.colorbar(image, ax=list(panels), aspect=12, pad=0.01)
            bar.set_ticks(list(ticks), labels=list(ticks.values()))
            bar.minorticks_off()
        if rows < len(trace.output):
            passes[0].text(0.98, 0.98, f"the first {rows} of {len(trace.output)} examples", ha="right", va="top")
    return figure


def _ends(count: int) -> list[int]:
    """The first and the last of some rows or columns; all of a few."""
    return list(range(count)) if count <= 4 else [0, count - 1]


def _signed_norm(values: Sequence[Tensor]) -> tuple["Normalize", dict[float, str]]:
    """Colours for signed numbers, white at zero, with ticks; logarithmic if most numbers are far below the largest."""
    from matplotlib.colors import AsinhNorm, Normalize

    flat = torch.cat([value.flatten() for value in values])
    sizes = flat[flat.isfinite() & (flat != 0)].abs()
    largest, median = (sizes.max().item(), sizes.median().item()) if len(sizes) else (1.0, 1.0)
    power = math.floor(math.log10(largest))
    if median > largest / 20:
        ticks = [next(10.0**power * part for part in (5, 2, 1) if 10.0**power * part <= largest)]
        norm = Normalize(-largest, largest)
    else:
        linear = max(median, 1e-5 * largest)
        middle = round((math.log10(linear) + power) / 2)
        ticks = [10.0**power, 10.0 ** min(middle, power - 1)]
        norm = AsinhNorm(linear, -largest, largest)
    names = {tick: _power(tick) for tick in ticks}
    return norm, {-tick: f"−{name}" for tick, name in names.items()} | {0.0: "0"} | names


def _power(value: float) -> str:
    return f"{value:g}" if 1e-3 < value < 1e4 else f"$10^{{{round(math.log10(value))}}}$"


def _write_numbers(axes: Any, values: Tensor, norm: "Normalize") -> None:
    for i, row in enumerate(values.tolist()):
        for unit, value in enumerate(row):
            dark = math.isfinite(value) and abs(float(norm(value)) - 0.5) > 0.33
            color = "white" if dark else "black"
            axes.text(unit, i, f"{value:.2g}".replace("-", "−"), ha="center", va="center", color=color)


def _bars(trace: "Trace") -> "Figure":
    """The size of each quantity: its absolute value if it is one number, else the root of the mean square."""
    from matplotlib.patches import Patch

    from torch_manualbp.inspection._figure import BACKWARD, FORWARD, SKY, slide_figure

    columns, scalar = _columns(trace), _table.is_scalar(trace)
    ell = r"\ell_i" if trace.losses is not None and not scalar else r"\ell" if scalar else "L"
    with slide_figure(WIDTH, HEIGHT) as figure:
        top, bottom = figure.subplots(2, 1)
        colors = [FORWARD if name.startswith("f") else SKY for name, *_ in columns]
        _draw_bars(top, [value for _, value, _ in columns], colors, [f"${name}$" for name, *_ in columns], scalar)
        slopes = [rf"$\partial {ell}/\partial {name}$" for name, *_ in columns]
        _draw_bars(bottom, [gradient for *_, gradient in columns], [BACKWARD] * len(columns), slopes, scalar)
        for axes, title, color in ((top, "Forward pass →", FORWARD), (bottom, "← Backward pass", BACKWARD)):
            axes.set_ylabel("value" if scalar else "root mean square")
            axes.set_title(title, loc="left", color=color)
        handles = [Patch(color=color, label=label) for color, label in ((FORWARD, "$f_k$"), (SKY, "$h_k$"))]
        top.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
        figure.align_ylabels()
    return figure


def _draw_bars(axes: Any, values: list[Tensor], colors: list[str], names: list[str], scalar: bool) -> None:
    sizes = [value.item() if scalar else _root_mean_square(value) for value in values]
    bars = axes.bar(range(len(sizes)), sizes, color=colors)
    positive = [size for size in sizes if size > 0]
    if not scalar and positive and max(positive) > 30 * min(positive):
        axes.set_yscale("log")
    every = 1 if len(names) <= 14 else 2 * -(-len(names) // 28)  # even: f_k is named, h_k stands between
    axes.set_xticks(range(0, len(names), every), names[::every], fontsize=17 if every == 1 else 14)
    axes.grid(visible=False, axis="x")
    if len(sizes) <= 14:
        axes.bar_label(bars, [f"{size:.3g}" for size in sizes], padding=2)
        axes.margins(y=0.15)
    axes.axhline(0, color="black", linewidth=0.8)


def _root_mean_square(value: Tensor) -> float:
    return torch.nan_to_num(value.square().mean().sqrt()).item() if value.numel() else 0.0
