"""Figures of gradient flow: of one measurement, and of a history. matplotlib is imported when one is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch_manualbp.inspection.trace_plot import BACKWARD, FORWARD, LABEL, TICK, TITLE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from torch_manualbp.inspection.gradient_flow import GradientFlow

DEAD, ON = "#333333", "#f2a93b"
MOST_NAMED = 8  # layers in the legend of a history; more share a colour bar


def plot_flow(flow: "GradientFlow") -> "Figure":
    """Three panels over the layers: sizes, growth factors beside theory, shares of units."""
    figure = new_figure(15, 5.4)
    sizes, growth, shares = figure.subplots(1, 3)
    layers, k = flow.layers, list(range(len(flow.layers)))
    _line(sizes, k, [layer.f for layer in layers], FORWARD, "$f_k$")
    _line(sizes, k, [layer.dl_df for layer in layers], BACKWARD, r"$\partial\ell/\partial f_k$")
    sizes.set_title("Size (root mean square)")
    for color, name, width, measured, predicted in (
        (BACKWARD, r"$\partial\ell/\partial f$, backward", "D_{k+1}", "growth", "growth_theory"),
        (FORWARD, "$f$, forward", "D_k", "forward_growth", "forward_theory"),
    ):
        _line(growth, k, [getattr(layer, measured) for layer in layers], color, name)
        _line(
            growth,
            k,
            [getattr(layer, predicted) for layer in layers],
            color,
            rf"$\sqrt{{{width}\,\mathrm{{Var}}[\Omega_k]/2}}$",
            "--",
        )
    growth.axhline(1, color="gray", linewidth=1)
    growth.set_title("Growth factor of each layer")
    with_relu = [i for i in k if layers[i].dead is not None]
    dead, on = ([100 * (getattr(layers[i], name) or 0.0) for i in with_relu] for name in ("dead", "always_on"))
    shares.bar(with_relu, dead, color=DEAD, label="dead")
    shares.bar(with_relu, on, bottom=dead, color=ON, label="always on")
    shares.set_ylim(0, 100)
    shares.set_xlim(-0.6, len(k) - 0.4)
    shares.set_ylabel("% of the units")
    shares.set_title("Units that ReLU never switches")
    for axes in (sizes, growth):
        _logarithmic(axes)
    for axes in (sizes, growth, shares):
        _whole_ticks(axes)
        axes.set_xlabel("layer $k$")
        axes.legend(fontsize=TICK)
    _finish(figure, flow.diagnosis, "" if flow.step is None else f" at step {flow.step}")
    return figure


def plot_history(history: Sequence["GradientFlow"]) -> "Figure":
    """Three panels over the steps of training, a line for each layer; the network may have changed on the way."""
    figure = new_figure(15, 5.4)
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    panels = figure.subplots(1, 3)
    steps, depth = [flow.step for flow in history], max(len(flow.layers) for flow in history)
    colors = mpl.colormaps["viridis"]
    for k in range(depth):
        color = colors(0.9 * k / max(depth - 1, 1))
        layers = [flow.layers[k] if k < len(flow.layers) else None for flow in history]
        dl_df, dead, update_ratio = (
            [getattr(layer, name, None) for layer in layers] for name in ("dl_df", "dead", "update_ratio")
        )
        _line(panels[0], steps, dl_df, color, f"layer {k}")
        if any(share is not None for share in dead):
            _line(panels[1], steps, [None if share is None else 100 * share for share in dead], color, f"layer {k}")
        _line(panels[2], steps, update_ratio, color, f"layer {k}")
    panels[0].set_title(r"Size of $\partial L/\partial f_k$")
    panels[1].set_title("Dead units")
    panels[1].set_ylabel("% of the units")
    panels[1].set_ylim(-3, 103)
    panels[2].set_title(r"Update $\|\Delta\Omega_k\| / \|\Omega_k\|$")
    for axes in (panels[0], panels[2]):
        _logarithmic(axes)
    for axes in panels:
        _whole_ticks(axes)
        axes.set_xlabel("step")
    if depth <= MOST_NAMED:
        panels[0].legend(fontsize=TICK)
    else:
        scale = ScalarMappable(Normalize(0, (depth - 1) / 0.9), colors)
        bar = figure.colorbar(scale, ax=list(panels), label="layer $k$", boundaries=range(depth + 1))
        bar.set_ticks(range(0, depth, -(-depth // 10)))
    _finish(figure, history[-1].diagnosis, f" from step {steps[0]} to {steps[-1]}")
    return figure


def _line(axes: Any, x: Sequence[Any], y: Sequence[float | None], color: Any, label: str, style: str = "-") -> None:
    """A line through the points that have a value."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    marker = "o" if style == "-" else ""
    axes.plot(
        *zip(*points, strict=True) if points else ([], []), style, marker=marker, markersize=3, color=color, label=label
    )


def _logarithmic(axes: Any) -> None:
    """A logarithmic scale, if positive values differ by more than a factor of 10."""
    values = [float(y) for line in axes.lines for y in line.get_ydata()]
    positive = [value for value in values if 0 < value < float("inf")]
    if positive and max(positive) > 10 * min(positive):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _whole_ticks(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _finish(figure: "Figure", diagnosis: Sequence[str], when: str) -> None:
    figure.suptitle(f"Gradient flow{when}: {', '.join(diagnosis) or 'nothing found'}", fontsize=TITLE)
    for axes in figure.axes:
        axes.tick_params(labelsize=TICK)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_fontsize(LABEL)
