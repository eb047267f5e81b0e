"""Figures of gradient flow: of one measurement, and of a history. matplotlib is imported when one is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from torch_manualbp.inspection.gradient_flow import GradientFlow

MOST_NAMED = 8  # layers in the legend of a history; more share a colour bar
WIDTH, HEIGHT = 13.33, 5.6


def plot_flow(flow: "GradientFlow") -> "Figure":
    """Three panels over the layers: sizes, growth factors beside theory, shares of units."""
    from torch_manualbp.inspection._figure import BACKWARD, FORWARD, GRAY, YELLOW, slide_figure

    layers, k = flow.layers, list(range(len(flow.layers)))
    with slide_figure(WIDTH, HEIGHT) as figure:
        sizes, growth, shares = figure.subplots(1, 3, width_ratios=(1, 1.25, 1))
        _line(sizes, k, [layer.f for layer in layers], color=FORWARD, label="$f_k$")
        _line(sizes, k, [layer.dl_df for layer in layers], color=BACKWARD, label=r"$\partial\ell/\partial f_k$")
        sizes.set_title("Root mean square")
        for color, name, measured in (
            (BACKWARD, r"$\partial\ell/\partial f$, backward", "growth"),
            (FORWARD, "$f$, forward", "forward_growth"),
        ):
            _line(growth, k, [getattr(layer, measured) for layer in layers], color=color, label=name)
        # The two theories are equal where the widths are: one is a wide band, and the other a dashed line on it.
        for color, width, predicted, style in (
            (BACKWARD, "D_{k+1}", "growth_theory", {"linewidth": 9, "alpha": 0.3, "zorder": 1.2}),
            (
                FORWARD,
                "D_k",
                "forward_theory",
                {"linewidth": 3.5, "alpha": 0.6, "linestyle": (0, (2, 1)), "zorder": 1.3},
            ),
        ):
            name = rf"$\sqrt{{{width}\,\mathrm{{Var}}[\Omega_k]/2}}$"
            _line(growth, k, [getattr(layer, predicted) for layer in layers], color=color, label=name, **style)
        growth.axhline(1, color=GRAY, linewidth=1.5)
        growth.set_title("Growth factor (pale: theory)")
        with_relu = [i for i in k if layers[i].dead is not None]
        dead, on = ([100 * (getattr(layers[i], name) or 0.0) for i in with_relu] for name in ("dead", "always_on"))
        shares.bar(with_relu, dead, color="black", label="dead")
        shares.bar(with_relu, on, bottom=dead, color=YELLOW, label="always on")
        shares.set_ylim(0, 100)
        shares.set_xlim(-0.6, len(k) - 0.4)
        shares.grid(visible=False, axis="x")
        shares.set_ylabel("% of the units")
        shares.set_title("Units that never switch")
        for axes in (sizes, growth):
            _logarithmic(axes)
        for axes in (sizes, growth, shares):
            axes.set_xticks(range(0, len(k), -(-len(k) // 8)))
            axes.set_xlabel("layer $k$")
            # Below the panels, where no curve is.
            axes.legend(
                loc="upper center",
                bbox_to_anchor=(0.5, -0.17),
                frameon=False,
                ncols=2,
                columnspacing=1,
                handlelength=1.7,
            )
        figure.suptitle(_title(flow, "" if flow.step is None else f" at step {flow.step}"))
    return figure


def plot_history(history: Sequence["GradientFlow"]) -> "Figure":
    """Three panels over the steps of training, a line for each layer; the network may have changed on the way."""
    from torch_manualbp.inspection._figure import slide_figure

    with slide_figure(WIDTH, HEIGHT) as figure:
        import matplotlib as mpl
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.ticker import MaxNLocator

        panels = figure.subplots(1, 3)
        steps, depth = [flow.step for flow in history], max(len(flow.layers) for flow in history)
        colors = mpl.colormaps["viridis"]
        for k in range(depth):
            style = {"color": colors(0.9 * k / max(depth - 1, 1)), "label": f"layer {k}", "marker": "o"}
            layers = [flow.layers[k] if k < len(flow.layers) else None for flow in history]
            dl_df, dead, update_ratio = (
                [getattr(layer, name, None) for layer in layers] for name in ("dl_df", "dead", "update_ratio")
            )
            _line(panels[0], steps, dl_df, **style)
            if any(share is not None for share in dead):
                _line(panels[1], steps, [None if share is None else 100 * share for share in dead], **style)
            _line(panels[2], steps, update_ratio, **style)
        panels[0].set_title(r"Root mean square of $\partial L/\partial f_k$")
        panels[1].set_title("Dead units")
        panels[1].set_ylabel("% of the units")
        panels[1].set_ylim(-3, 103)
        panels[2].set_title(r"Update $\|\Delta\Omega_k\| / \|\Omega_k\|$")
        for axes in (panels[0], panels[2]):
            _logarithmic(axes)
        for axes in panels:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.set_xlabel("step")
        if depth <= MOST_NAMED:
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=depth)
        else:
            scale = ScalarMappable(Normalize(0, (depth - 1) / 0.9), colors)
            bar = figure.colorbar(scale, ax=list(panels), label="layer $k$", boundaries=range(depth + 1))
            bar.set_ticks(range(0, depth, -(-depth // 10)))
        figure.suptitle(_title(history[-1], f" from step {steps[0]} to {steps[-1]}"))
    return figure


def _title(flow: "GradientFlow", when: str) -> str:
    return f"Gradient flow{when}: {', '.join(flow.diagnosis) or 'nothing found'}"


def _line(axes: Any, x: Sequence[Any], y: Sequence[float | None], **style: Any) -> None:
    """A line through the points that have a value, with dots if there is no other style."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    if "linewidth" not in style:
        style |= {"marker": "o", "markersize": 5, "linewidth": 2}
    axes.plot(*zip(*points, strict=True) if points else ([], []), **style)


def _logarithmic(axes: Any) -> None:
    """A logarithmic scale, if positive values differ by more than a factor of 10."""
    values = [float(y) for line in axes.lines for y in line.get_ydata()]
    positive = [value for value in values if 0 < value < float("inf")]
    if positive and max(positive) > 10 * min(positive):
        axes.set_yscale("log")
