"""The figures of this package: a style for slides, and a `Figure` that shows itself in a notebook.

Only this module imports matplotlib at its top, so import it in a function that draws.
"""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("torch_manualbp: figures need matplotlib: `pip install matplotlib`") from error

STYLE = "torch_manualbp.inspection.slides"  # slides.mplstyle
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, GRAY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666",
)  # fmt: skip
FORWARD, BACKWARD = BLUE, ORANGE  # f_k and h_k; gradients
SIGNED = "RdBu_r"  # colours of signed numbers: blue below zero, white at zero, red above
SMALLEST_FONT = 14

# Backends with windows of their own. In a notebook the figure shows itself, and would be shown twice.
WINDOWS = ("gtk3agg", "gtk3cairo", "gtk4agg", "gtk4cairo", "macosx", "qt5agg", "qtagg", "qtcairo", "tkagg", "tkcairo",
           "wxagg", "wxcairo")  # fmt: skip


class SlideFigure(Figure):
    """A figure that a notebook shows with or without ``%matplotlib inline``."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The picture, with the size in pixels at which to show it: half its own, which stays sharp on any screen."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        width, height = (int(inches * self.dpi / 2) for inches in self.get_size_inches())
        return buffer.getvalue(), {"width": width, "height": height}


@contextmanager
def slide_figure(width: float, height: float) -> Iterator[SlideFigure]:
    """An empty figure, in inches, to be drawn on in our style inside of ``with``.

    pyplot learns of it only if the program has imported pyplot and has windows, so that ``plt.show()`` opens one for
    it. Elsewhere it is an object like any other, which is freed with its last reference.
    """
    from matplotlib import style

    with style.context(STYLE, after_reset=True):  # whatever style the program has set
        pyplot: Any = sys.modules.get("matplotlib.pyplot")
        if pyplot is not None and mpl.get_backend().lower() in WINDOWS:
            figure = pyplot.figure(FigureClass=SlideFigure, figsize=(width, height), dpi=100)
            assert isinstance(figure, SlideFigure)
        else:
            figure = SlideFigure(figsize=(width, height))
        yield figure
