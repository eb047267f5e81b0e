"""The lecture's outlook: the chain rule multiplies local derivatives, so gradients explode or vanish with depth.

A layer of a random ReLU network multiplies the size of a gradient by √(D Var[Ω] / 2). The initial weights decide
whether that is more than 1 or less: the table and the figure compare what was measured with what this predicts.

    python examples/initialisation.py --output initialisation.png
"""

import argparse
import sys
from pathlib import Path

try:
    from matplotlib import style
    from matplotlib.figure import Figure
except ImportError as error:
    sys.exit(f"{error}: this example needs the extra `demo`: pip install '.[demo]'")

from torch_manualbp.lecture import INITIALISATIONS, Growth, gradient_growth, he_factor

WIDTH = 128
DEPTHS = (2, 5, 10, 20, 30, 40, 50)


@style.context("torch_manualbp.inspection.slides")
def draw(growths: dict[str, list[Growth]]) -> Figure:
    """The ratio of the first layer's gradient to the last one's, against depth; each curve has its name at its end."""
    figure = Figure(figsize=(13.33, 7))
    axes = figure.add_subplot()
    for name, growth in growths.items():
        (line,) = axes.plot(DEPTHS, [g.predicted for g in growth], linewidth=2)
        axes.plot(DEPTHS, [g.measured for g in growth], "o", color=line.get_color(), markersize=10)
        end = (DEPTHS[-1] + 1, growth[-1].predicted)
        axes.text(*end, name, color=line.get_color(), fontsize=16, va="center")
    axes.set_yscale("log")
    axes.set_xticks(DEPTHS)
    axes.set_xlim(0, DEPTHS[-1] + 1)
    axes.set_xlabel("layers $K$")
    axes.set_ylabel(r"$|\partial\ell/\partial f_0|\;/\;|\partial\ell/\partial f_{K-1}|$,  root mean squares")
    axes.set_title(
        rf"Gradients explode or vanish: a factor $\sqrt{{D\,\mathrm{{Var}}[\Omega]/2}}$ per layer, $D$ = {WIDTH}"
        "\n(dots: measured, lines: predicted)"
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="How gradients grow with depth, by initialisation.")
    parser.add_argument("--output", type=Path, default=Path("initialisation.png"), help="figure (default: %(default)s)")
    args = parser.parse_args()
    out = ["∂ℓ/∂f_0 over ∂ℓ/∂f_{K−1} after K layers: measured (predicted)", "", f"{'weights':26}{'factor':>8}"]
    out[-1] += "".join(f"{f'K = {depth}':>22}" for depth in DEPTHS if depth in (2, 10, 50))
    growths = {}
    for name, variance in INITIALISATIONS.items():
        growths[name] = [gradient_growth(depth, WIDTH, variance(WIDTH)) for depth in DEPTHS]
        cells = (
            f"{f'{g.measured:.2g} ({g.predicted:.2g})':>22}"
            for depth, g in zip(DEPTHS, growths[name], strict=True)
            if depth in (2, 10, 50)
        )
        out.append(f"{name:26}{he_factor(WIDTH, variance(WIDTH)):>8.3f}{''.join(cells)}")
    sys.stdout.write("\n".join(out) + "\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(growths).savefig(args.output)
    sys.stdout.write(f"figure: {args.output}\n")


if __name__ == "__main__":
    main()
