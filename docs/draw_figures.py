"""Draws docs/figures/*.png, all of them (`make figures`), or says which are stale (`make figures ARGS=--check`).

Figures of the lecture are drawn by the examples, which compute what they show. Figures of measurements are drawn by the
benchmarks and examples from docs/figures/data/*.json, which they wrote with `--json`: a time cannot be measured twice,
and rounding, which differs between machines, decides which actions a network learns.

A figure is stale if the code draws something else now. Bytes and pixels do not tell that: they change with the versions
of matplotlib and FreeType, and with the machine's rounding. So each PNG has in its metadata what was drawn: texts,
colours, and where in its axes each line, bar and image is. That is compared, with a tolerance for rounding. There is no
date or version in the metadata, so two runs write the same bytes.
"""

import argparse
import contextlib
import importlib
import io
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, FigureBase
from matplotlib.text import Text
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
MOST_POINTS = 40  # of a line or an image; more do not say more about whether it has moved
TOLERANCE = 0.02  # of the width and height of the axes; of the range of colours
SMALL = ("three_layers", "cart_pole", "distributed_training")  # shown in the gallery only, less than 60 KB each
SMALL_DPI, COLOURS = 80, 64
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def by_example(name: str, *options: str, output: str | None = None) -> Callable[[], dict[str, Figure]]:
    """A function that runs an example and returns the figures that it would save, by file name (`output`.png)."""

    def run() -> dict[str, Figure]:
        drawn = {}

        def keep(figure: Figure, path: object) -> None:
            drawn[Path(str(path)).name] = figure

        script = str(ROOT / "examples" / f"{name}.py")
        with (
            mock.patch.object(Figure, "savefig", keep),
            mock.patch.object(sys, "argv", [script, "--output", str(FIGURES / f"{output or name}.png"), *options]),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.suppress(SystemExit),  # of code 0, or the figure is missing
        ):
            runpy.run_path(script, run_name="__main__")
        return drawn

    return run


def by_record(folder: str, name: str) -> Callable[[], dict[str, Figure]]:
    """A function that draws what a script of this folder has measured."""

    def run() -> dict[str, Figure]:
        with mock.patch.object(sys, "path", [str(ROOT / folder), *sys.path]):
            draw = importlib.import_module(name).draw
        return {f"{name}.png": draw(json.loads((FIGURES / "data" / f"{name}.json").read_text()))}

    return run


SOURCES: dict[str, Callable[[], dict[str, Figure]]] = {
    **{
        name: by_example(name)
        for name in (
            "least_squares",
            "toy_network",
            "matrix_calculus",
            "relu",
            "deep_network",
            "initialisation",
            "train_digits",
        )
    },
    "why_it_does_not_train": by_example("why_it_does_not_train", "--flow", "gradient_flow.png"),
    "three_layers": by_example("lecture_figures", output="three_layers"),
    **{
        name: by_record("benchmarks", name)
        for name in ("numerical_error", "scaling", "balance", "peak_memory", "memory_growth")
    },
    **{name: by_record("examples", name) for name in ("cart_pole", "distributed_training")},
}  # what draws one figure, or two


def content(figure: Figure) -> dict[str, Any]:
    """What a figure shows, for JSON: what does not depend on fonts, ticks and layout."""
    figure.draw_without_rendering()  # settles the limits of the axes
    return {
        "inches": [float(inches) for inches in figure.get_size_inches()],
        "texts": list(_texts(figure)),
        "axes": [_axes(axes) for axes in figure.axes],
    }


def _texts(parent: FigureBase) -> Iterator[list[Any]]:
    """Texts outside of axes."""
    for child in parent.get_children():
        if isinstance(child, Text) and child.get_text():
            yield _text(child)
    for legend in parent.legends:
        yield from map(_text, legend.get_texts())
    for part in parent.subfigs:
        yield from _texts(part)


def _text(text: Text) -> list[Any]:
    return [text.get_text(), text.get_fontsize(), to_hex(text.get_color())]


def _axes(axes: Any) -> dict[str, Any]:
    place = axes.transData - axes.transAxes

    def points(xy: Any) -> list[list[float | None]]:
        xy = np.ma.filled(np.ma.asarray(xy, float), np.nan)
        chosen = xy[np.linspace(0, len(xy) - 1, min(len(xy), MOST_POINTS)).astype(int)] if len(xy) else xy
        with np.errstate(all="ignore"):
            # Outside of the axes it does not matter where a point is.
            return [[_rounded(value) for value in point] for point in place.transform(chosen).clip(-0.1, 1.1)]

    texts = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
    if legend := axes.get_legend():
        texts += legend.get_texts()
    return {
        "scales": [axes.get_xscale(), axes.get_yscale()],
        "ticks": [label.get_fontsize() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()[:1]],
        "texts": [_text(text) for text in texts if text.get_text()],
        "lines": [
            [to_hex(line.get_color()), line.get_linewidth(), line.get_linestyle(), *points(line.get_xydata())]
            for line in axes.lines
            if line.get_transform() == axes.transData
        ],
        "patches": [
            [to_hex(patch.get_facecolor()), to_hex(patch.get_edgecolor()), *points(_outline(patch))]
            for patch in axes.patches
        ],
        "images": [
            [image.get_cmap().name, *map(_rounded, _sampled(image.norm(image.get_array())))] for image in axes.images
        ],
    }


def _outline(patch: Any) -> Any:
    return patch.get_patch_transform().transform(patch.get_path().vertices)


def _sampled(values: Any) -> Any:
    flat = np.ma.filled(np.ma.asarray(values, float), np.nan).ravel()
    return flat[np.linspace(0, len(flat) - 1, min(len(flat), 5 * MOST_POINTS)).astype(int)]


def _rounded(value: float) -> float | None:
    return round(float(value), 3) if np.isfinite(value) else None


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, with its content in the metadata."""
    shown = json.dumps(content(figure))
    if path.stem not in SMALL:
        figure.savefig(path, metadata={"Software": None, "Content": shown})
        return
    buffer, text = io.BytesIO(), PngInfo()
    figure.savefig(buffer, dpi=SMALL_DPI)
    text.add_text("Content", shown, zip=True)
    with Image.open(buffer) as picture:
        method, dither = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE  # thin lines keep their colours
        few = picture.convert("RGB").quantize(COLOURS, method, kmeans=3, dither=dither)
    few.save(path, pnginfo=text, dpi=(SMALL_DPI, SMALL_DPI), optimize=True)


def recorded(path: Path) -> dict[str, Any]:
    """The content of a PNG; empty if there is none."""
    if not path.exists():
        return {}
    with Image.open(path) as picture:
        found: dict[str, Any] = json.loads(picture.info.get("Content", "{}"))
    return found


def difference(was: Any, now: Any, where: str = "") -> str | None:
    """The first difference between two contents; None if they are equal but for rounding."""
    if isinstance(was, dict) and isinstance(now, dict) and was.keys() == now.keys():
        pairs = [(was[key], now[key], f"{where} {key}") for key in was]
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = [(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(was, now, strict=True))]
    elif _equal(was, now):
        return None
    else:
        return f"{where.strip()}: {was!r:.60} is drawn, {now!r:.60} would be"
    return next(filter(None, (difference(*pair) for pair in pairs)), None)


def _equal(was: Any, now: Any) -> bool:
    if isinstance(was, str) and isinstance(now, str):
        # The words are equal, and each number is, to two digits.
        numbers = zip(map(float, NUMBER.findall(was)), map(float, NUMBER.findall(now)), strict=False)
        return NUMBER.sub("#", was) == NUMBER.sub("#", now) and all(abs(a - b) <= 0.05 * a for a, b in numbers)
    if isinstance(was, float | int) and isinstance(now, float | int):
        return abs(was - now) <= TOLERANCE
    return bool(was == now)


def stale(name: str) -> list[str]:
    """Draws the figures of a source, and says which of the PNGs show something else, and where."""
    found = []
    for file, figure in SOURCES[name]().items():
        if change := difference(recorded(FIGURES / file), json.loads(json.dumps(content(figure)))):
            found.append(f"docs/figures/{file} is stale ({change}): make figures")
    return found


def main() -> int:
    """Draws, or checks."""
    parser = argparse.ArgumentParser(description="Draws the figures of the documentation.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SOURCES)}; default: all")
    parser.add_argument("--check", action="store_true", help="draw nothing, say which are stale")
    options = parser.parse_args()
    found = []
    for name in options.names or SOURCES:
        if options.check:
            found += stale(name)
            continue
        for file, figure in SOURCES[name]().items():
            save(figure, FIGURES / file)
            print(f"docs/figures/{file}", flush=True)
    print("\n".join(found) if found else "none is stale" if options.check else "drawn")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
