"""A small network as a diagram with its numbers: the forward pass of one example above, the backward pass below.

Coordinates are inches, so that circles are round and texts, whose size is absolute, have room.
"""

from dataclasses import dataclass
from math import hypot, isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from torch_manualbp.inspection.trace import Trace

MOST_UNITS = 8  # of a layer; more circles, one above the other, are too small
MOST_NUMBERED = 4  # units of a layer up to which circles have room for numbers
MOST_WEIGHED = 3  # units of both layers up to which the lines between them have room for numbers
MOST_COLUMNS = 9  # of circles: four layers with ReLUs between them

WIDTH, MARGIN, HEAD = 13.33, 0.75, 1.0  # of a slide, at its sides, and above the circles of a pass
LOSS_RADIUS = 0.33  # at least, so that a number fits
POSITIVE, NEGATIVE, OFF = "#B2182B", "#2166AC", "#8C8C8C"  # the ends of the colour map of signed numbers; grey
Point = tuple[float, float]


@dataclass
class _Column:
    """Units, and the lines that enter them from the column before."""

    name: str
    values: Tensor
    gradients: Tensor
    layer: int | None = None  # k of f_k; None of h_k, whose units have one line each, a ReLU
    weights: Tensor | None = None  # Ω_k
    slopes: Tensor | None = None  # ∂ℓ/∂Ω_k of this example
    biases: Tensor | None = None  # β_k


def why_not(trace: "Trace") -> str | None:
    """Why a network is too large for a diagram; None if it is not."""
    widths = [trace.h[0].shape[1], *(f.shape[1] for f in trace.f)]
    columns = 2 + len(trace.f) + sum(layer.relu for layer in trace.layers)
    if max(widths) > MOST_UNITS or min(widths) == 0:
        return f"its layers have {min(widths)} to {max(widths)} units, and there is room for {MOST_UNITS}"
    if columns > MOST_COLUMNS:
        return f"its {len(trace.f)} layers need {columns} columns of circles, and there is room for {MOST_COLUMNS}"
    return None


def has_numbers(trace: "Trace") -> bool:
    """Whether a diagram shows the number of each unit."""
    return why_not(trace) is None and max(h.shape[1] for h in (trace.h[0], *trace.f)) <= MOST_NUMBERED


def draw_network(trace: "Trace", example: int) -> "Figure":
    """Both passes of one example."""
    from torch_manualbp.inspection._figure import BACKWARD, FORWARD, slide_figure

    columns = _columns(trace, example)
    units = max(len(column.values) for column in columns)
    lane = 1.25 if units == 1 else 2.5
    height = 2 * (HEAD + lane) + 0.5
    with slide_figure(WIDTH, height) as figure:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height))
        axes.set_axis_off()
        diagram = _Diagram(axes, columns, units, lane)
        which = f"   (example {example} of {len(trace.output)})" if len(trace.output) > 1 else ""
        axes.text(0.3, height - 0.45, rf"Forward pass $\longrightarrow${which}", fontsize=19, color=FORWARD)
        diagram.forward(height - HEAD - lane / 2, *_loss(trace, example))
        ell, half = "L" if trace.losses is None else r"\ell", height - HEAD - lane
        title = rf"Backward pass $\longleftarrow$   $\partial {ell}/\partial\beta_k = \partial {ell}/\partial f_k$"
        axes.text(0.3, half - 0.45, title, fontsize=19, color=BACKWARD)
        diagram.backward(half - HEAD - lane / 2, ell)
        diagram.legend(figure)
    return figure


def _columns(trace: "Trace", example: int) -> list[_Column]:
    """x, f_0, h_1, f_1, …; there is no h_{k+1} if no ReLU follows f_k."""

    def row(value: Tensor) -> Tensor:
        return value[example].double().cpu()

    columns = [_Column("x", row(trace.h[0]), row(trace.dl_dh[0]))]
    for k, layer in enumerate(trace.layers):
        f = _Column(f"f_{{{k}}}", row(trace.f[k]), row(trace.dl_df[k]), k)
        f.weights, f.slopes = layer.weight.double().cpu(), torch.outer(f.gradients, row(trace.h[k]))
        f.biases = None if layer.bias is None else layer.bias.double().cpu()
        columns.append(f)
        if layer.relu:
            columns.append(_Column(f"h_{{{k + 1}}}", row(trace.h[k + 1]), row(trace.dl_dh[k + 1])))
    return columns


def _loss(trace: "Trace", example: int) -> tuple[str, float, str]:
    """Symbol and value of the example's loss, of the batch's if there is no other; and the target if it is a number."""
    target = trace.target[example] if isinstance(trace.target, Tensor) and trace.target.dim() else None
    number = rf"$y$ = {_number(float(target))}" if target is not None and target.numel() == 1 else ""
    if trace.losses is None:
        return "L", trace.loss.item(), number
    return r"\ell", trace.losses[example].item(), number


class _Diagram:
    """Where everything is, and how it is drawn."""

    def __init__(self, axes: Any, columns: list[_Column], units: int, lane: float) -> None:
        self.axes, self.columns = axes, columns
        self.spacing = lane / units
        self.radius = min(0.4 if units == 1 else 0.31, 0.48 * self.spacing)
        self.numbered = units <= MOST_NUMBERED
        self.scalar, self.digits = units == 1, 3 if units == 1 else 2
        # Lines with a weight are longer than those of a ReLU and of the loss.
        steps = [(1.8 if units == 1 else 2.0) if column.weights is not None else 1.0 for column in columns[1:]] + [1.0]
        pitch = (WIDTH - 2 * MARGIN) / sum(steps)
        self.x = [MARGIN + pitch * sum(steps[:i]) for i in range(len(steps) + 1)]
        self.middle = 0.0

    def forward(self, middle: float, symbol: str, loss: float, target: str) -> None:
        """Values and weights, and the loss at the end."""
        self.middle = middle
        self._circles([column.values for column in self.columns], [f"${column.name}$" for column in self.columns])
        largest = _largest([column.weights for column in self.columns if column.weights is not None])
        for i, column in enumerate(self.columns[1:], 1):
            sources, ends = self.columns[i - 1], range(len(column.values))
            if column.weights is not None:
                self._weights(i, column.weights, r"\omega" if self.scalar else r"\Omega", sources.values != 0, largest)
                self._biases(i, column)
            else:
                for unit in ends:
                    self._line(i - 1, unit, i, unit, on=column.values[unit].item() != 0)
        last = len(self.columns) - 1
        for unit in range(len(self.columns[-1].values)):
            self._line(last, unit, last + 1, None)
        self._circle(last + 1, None, _number(loss), "white")
        self._header(last + 1, f"${symbol}$")
        if target:
            self.axes.text(self.x[-1], middle - self._radius(None) - 0.02, target, ha="center", va="top", fontsize=14)

    def backward(self, middle: float, symbol: str) -> None:
        """Gradients of the units and of the weights."""
        self.middle = middle
        slope = rf"\partial {symbol}/\partial "
        names = [f"${slope}{column.name}$" for column in self.columns]
        self._circles([column.gradients for column in self.columns], names)
        largest = _largest([column.slopes for column in self.columns if column.slopes is not None])
        for i, column in enumerate(self.columns[1:], 1):
            if column.slopes is not None:
                name = slope + (r"\omega" if self.scalar else r"\Omega")
                self._weights(i, column.slopes, name, column.gradients != 0, largest, backward=True)
            else:
                for unit, value in enumerate(column.values):
                    self._line(i, unit, i - 1, unit, on=value.item() != 0)
        last = len(self.columns) - 1
        for unit in range(len(self.columns[-1].values)):
            self._line(last + 1, None, last, unit)
        self._circle(last + 1, None, f"${symbol}$", "white")

    def legend(self, figure: "Figure") -> None:
        """What colours and lines mean."""
        from matplotlib.lines import Line2D

        lines = [
            Line2D([], [], color=POSITIVE, linewidth=5, label="positive"),
            Line2D([], [], color=NEGATIVE, linewidth=5, label="negative"),
            Line2D([], [], color="black", linewidth=2, label="ReLU on: slope 1"),
            Line2D([], [], color=OFF, linewidth=2, linestyle=":", label="ReLU off: slope 0"),
        ]
        figure.legend(handles=lines, loc="lower center", ncols=4, frameon=False, borderaxespad=0.3)

    def _circles(self, values: list[Tensor], names: list[str]) -> None:
        from matplotlib import colormaps

        colors, largest = colormaps["RdBu_r"], _largest(values)
        reach = 2.2 * largest if self.numbered else largest  # numbers are black, so they need light colours
        if not self.numbered:
            top = self._top() + 0.52
            self.axes.text(WIDTH - 0.3, top, f"darkest circle: ±{_number(largest)}", ha="right", fontsize=14)
        for i, (of_units, name) in enumerate(zip(values, names, strict=True)):
            for unit, value in enumerate(of_units.tolist()):
                color = colors(0.5 + 0.5 * value / reach) if isfinite(value) else "white"
                self._circle(i, unit, _number(value, self.digits) if self.numbered else "", color)
            self._header(i, name)

    def _weights(
        self, i: int, weights: Tensor, name: str, live: Tensor, largest: float, backward: bool = False
    ) -> None:
        """The lines that enter column i, coloured by sign, wide where the number is large, pale where 0 passes."""
        numbered = max(weights.shape) <= MOST_WEIGHED
        for j, row in enumerate(weights.tolist()):
            for m, value in enumerate(row):
                on = bool(live[j if backward else m]) and value != 0
                color = OFF if value == 0 else POSITIVE if value > 0 else NEGATIVE
                width = 1 + (4 if numbered else 2) * min(abs(value) / largest, 1) if isfinite(value) else 1
                ends = (i, j, i - 1, m) if backward else (i - 1, m, i, j)
                self._line(*ends, color=color, width=width, alpha=1 if on else 0.3, head=numbered)
                if numbered:
                    self._weight(i, m, j, len(row), value, color)
        title = f"${name}_{{{self.columns[i].layer}}}$"
        if self.scalar:
            middle = (self.x[i - 1] + self.x[i]) / 2
            self.axes.text(middle, self.middle + 0.12, title, ha="center", va="bottom", fontsize=15)
        elif self.x[i] - self.x[i - 1] > 2:  # else there is no room
            self.axes.text((self.x[i - 1] + self.x[i]) / 2, self._top(), title, ha="center", va="bottom", fontsize=15)

    def _weight(self, i: int, m: int, j: int, sources: int, value: float, color: str) -> None:
        """The number of a line, where those of the other lines leave room: nearer to the end, the more lines end."""
        if self.scalar:
            middle = (self.x[i - 1] + self.x[i]) / 2
            self.axes.text(middle, self.middle - 0.12, _number(value), ha="center", va="top", fontsize=14, color=color)
            return
        part = sources / (sources + 1)
        (x0, y0), (x1, y1) = self._center(i - 1, m), self._center(i, j)
        place = (x0 + part * (x1 - x0), y0 + part * (y1 - y0))
        box = {"boxstyle": "round,pad=0.08", "facecolor": "white", "edgecolor": "none"}
        self.axes.text(
            *place, _number(value, self.digits), ha="center", va="center", fontsize=14, color=color, bbox=box
        )

    def _biases(self, i: int, column: _Column) -> None:
        if column.biases is None or self.spacing < 2 * self.radius + 0.2:
            return
        for unit, bias in enumerate(column.biases.tolist()):
            x, y = self._center(i, unit)
            name = rf"$\beta_{{{column.layer}}}$ = " if self.scalar else r"$\beta$ "
            y -= self.radius + 0.02
            x, align = (x, "center") if self.scalar else (x - 0.12, "left")  # on the left, lines end
            text = f"{name}{_number(bias, self.digits)}"
            self.axes.text(x, y, text, ha=align, va="top", fontsize=14, color="#404040")

    def _circle(self, i: int, unit: int | None, text: str, color: Any) -> None:
        from matplotlib.patches import Circle

        center, radius = self._center(i, unit), self._radius(unit)
        self.axes.add_patch(Circle(center, radius, facecolor=color, edgecolor="black", linewidth=1.5, zorder=3))
        self.axes.text(*center, text, ha="center", va="center", fontsize=14, zorder=4)

    def _header(self, i: int, name: str) -> None:
        self.axes.text(self.x[i], self._top(), name, ha="center", va="bottom", fontsize=17)

    def _top(self) -> float:
        """Where names are written."""
        rows = max(len(column.values) for column in self.columns)
        return self.middle + max(self.spacing * (rows - 1) / 2 + self.radius, self._radius(None)) + 0.08

    def _line(
        self, i: int, unit: int | None, end: int, end_unit: int | None,
        color: str = "black", width: float = 2, alpha: float = 1, on: bool = True, head: bool = True,
    ) -> None:  # fmt: skip
        """An arrow from the edge of one circle to the edge of another."""
        from matplotlib.patches import FancyArrowPatch

        (x0, y0), (x1, y1) = self._center(i, unit), self._center(end, end_unit)
        length = hypot(x1 - x0, y1 - y0)
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        start, stop = self._radius(unit), self._radius(end_unit)
        self.axes.add_patch(
            FancyArrowPatch(
                (x0 + start * dx, y0 + start * dy), (x1 - stop * dx, y1 - stop * dy),
                arrowstyle="-|>" if head else "-", mutation_scale=10 + 2 * width, shrinkA=0,
                shrinkB=0, color=color if on else OFF, linewidth=width, linestyle="-" if on else ":", alpha=alpha,
            )
        )  # fmt: skip

    def _radius(self, unit: int | None) -> float:
        return max(LOSS_RADIUS, self.radius) if unit is None else self.radius

    def _center(self, i: int, unit: int | None) -> Point:
        """Of a unit of column i, the first one at the top; of the loss if there is no unit."""
        if unit is None:
            return self.x[i], self.middle
        return self.x[i], self.middle + self.spacing * ((len(self.columns[i].values) - 1) / 2 - unit)


def _largest(values: list[Tensor]) -> float:
    """The largest absolute value, of the finite ones; 1 if there is none."""
    flat = torch.cat([value.flatten() for value in values])
    finite = flat[flat.isfinite()].abs()
    return finite.max().item() if len(finite) and finite.any() else 1.0


def _number(value: float, digits: int = 3) -> str:
    """As many digits as a circle has room for."""
    if abs(value) < 0.1:
        digits -= 1
    text = f"{value:.0e}".replace("e-0", "e-") if 0 < abs(value) < 0.01 else f"{value + 0.0:.{digits}g}"
    return text.replace("-", "−")
