"""The figures: they show themselves in a notebook, leave pyplot alone, are readable on a slide, and are up to date."""

import gc
import importlib.util
import io
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch

import torch_manualbp as mbp

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("draw_figures", ROOT / "docs" / "draw_figures.py")
draw_figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw_figures)

PNGS = sorted((ROOT / "docs" / "figures").glob("*.png"))


def toy_trace():
    return mbp.trace(mbp.MLP([2, 3, 1]), torch.randn(1, 2), torch.randn(1, 1))


KINDS = ("network", "maps", "bars", "flow", "history", "monitor")


def plots():
    x, y, model = torch.randn(8, 2), torch.randn(8, 1), mbp.MLP([2, 3, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history = mbp.fit(model, x, y, optimizer, epochs=2)
    with mbp.GradientFlowMonitor(model, every=1) as monitor:
        model.train_step(x, y, optimizer)
    return {
        "network": toy_trace().plot,
        "maps": mbp.trace(model, x, y).plot,
        "bars": lambda: mbp.trace(model, x, y).plot("bars"),
        "flow": mbp.gradient_flow(model, x, y).plot,
        "history": history.plot,
        "monitor": monitor.plot,
    }


@pytest.mark.parametrize("name", KINDS)
def test_a_figure_shows_itself_in_a_notebook(name):
    IPython = pytest.importorskip("IPython.core.formatters")
    data, metadata = IPython.DisplayFormatter().format(plots()[name]())
    picture = Image.open(io.BytesIO(data["image/png"]))
    assert picture.size == pytest.approx([2 * metadata["image/png"][side] for side in ("width", "height")], abs=2)
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)  # readable on a dark page


def test_a_figure_has_a_picture_without_ipython_too():
    png, size = toy_trace().plot()._repr_png_()
    assert png.startswith(b"\x89PNG")
    assert size["width"] == 999  # of 13.33 inches


def test_figures_are_not_left_in_pyplot():
    from matplotlib import pyplot

    assert plots().keys() == set(KINDS)
    for plot in plots().values():
        figure = plot()
        assert pyplot.get_fignums() == []
        alive = weakref.ref(figure)
        del figure
        gc.collect()
        assert alive() is None


def test_pyplot_shows_a_figure_where_there_are_windows(monkeypatch):
    import matplotlib as mpl
    from matplotlib import pyplot

    monkeypatch.setattr(mpl, "get_backend", lambda: "QtAgg")
    figure = toy_trace().plot()
    try:
        assert [pyplot.figure(number) for number in pyplot.get_fignums()] == [figure]
    finally:
        pyplot.close("all")
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot")  # the program does not use it
    assert not hasattr(toy_trace().plot(), "number")
    assert pyplot.get_fignums() == []


def test_the_style_of_the_program_does_not_change_ours_nor_ours_that_of_the_program():
    import matplotlib as mpl
    from matplotlib import style

    before = dict(mpl.rcParams)
    with style.context("dark_background"):
        figure = toy_trace().plot()
        assert figure.get_facecolor() == (1, 1, 1, 1)
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("name", KINDS)
def test_texts_can_be_read_on_a_slide(name):
    figure = plots()[name]()
    assert figure.get_figwidth() <= 13.34
    assert figure.get_figheight() <= 7.51
    sizes = set(font_sizes(draw_figures.content(figure)))
    assert min(sizes) >= 14


def font_sizes(content):
    yield from (text[1] for text in content["texts"])
    for axes in content["axes"]:
        yield from (text[1] for text in axes["texts"])
        yield from axes["ticks"]


@pytest.mark.parametrize("path", PNGS, ids=lambda path: path.stem)
def test_a_figure_of_the_documentation_can_be_read_on_a_slide(path):
    content = draw_figures.recorded(path)
    width, height = content["inches"]
    assert width <= 13.34
    assert height <= 7.51
    assert min(font_sizes(content)) >= 14
    with Image.open(path) as picture:
        assert picture.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
        assert picture.info.keys() == {"Content", "dpi"}  # neither date nor version: two runs write the same bytes


@pytest.mark.parametrize("name", draw_figures.SMALL)
def test_a_figure_of_the_gallery_alone_is_small(name):
    assert (ROOT / "docs" / "figures" / f"{name}.png").stat().st_size < 60_000


@pytest.mark.slow
@pytest.mark.parametrize("name", draw_figures.SOURCES)
def test_no_figure_is_stale(name):
    assert draw_figures.stale(name) == []


def test_every_figure_has_a_source():
    assert {path.stem for path in PNGS} == {*draw_figures.SOURCES, "gradient_flow"}


@pytest.mark.parametrize("name", ["peak_memory", "three_layers"])  # the second with fewer colours
def test_drawing_twice_gives_the_same_bytes(name, tmp_path):
    for run in ("first", "second"):
        (figure,) = draw_figures.SOURCES[name]().values()
        (tmp_path / run).mkdir()
        draw_figures.save(figure, tmp_path / run / f"{name}.png")
    first, second = (tmp_path / run / f"{name}.png" for run in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def drawn(change=None):
    """The content of a figure that something may have changed."""
    figure = Figure()
    axes = figure.add_subplot()
    parts = {
        "line": axes.plot([0, 1, 2], [0, 1, 2], color="red")[0],
        "bar": axes.bar([0], [1])[0],
        "image": axes.imshow([[0.0, 1.0]], extent=(0, 1, 0, 1)),
        "title": axes.set_title("loss 0.512"),
        "text": figure.text(0, 0, "a text"),
    }
    axes.set(xlim=(0, 3), ylim=(0, 3))
    if change:
        change(parts)
    return json.loads(json.dumps(draw_figures.content(figure)))


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts["line"].set_ydata([0, 1, 2.3]),
        lambda parts: parts["line"].set_ydata([0, 1, float("nan")]),
        lambda parts: parts["line"].set_color("blue"),
        lambda parts: parts["line"].set_linestyle(":"),
        lambda parts: parts["line"].remove(),
        lambda parts: parts["bar"].set_height(1.2),
        lambda parts: parts["bar"].set_facecolor("black"),
        lambda parts: parts["image"].set_data([[0.0, 0.5]]),
        lambda parts: parts["image"].set_cmap("gray"),
        lambda parts: parts["title"].set_text("loss 0.712"),
        lambda parts: parts["title"].set_text("lost 0.512"),
        lambda parts: parts["text"].set_fontsize(20),
        lambda parts: parts["line"].axes.set_yscale("symlog"),
    ],
)
def test_a_change_is_seen(change):
    assert draw_figures.difference(drawn(), drawn(change))


def test_rounding_is_not_a_change():
    assert draw_figures.difference(drawn(), drawn()) is None
    assert draw_figures.difference(drawn(), drawn(lambda parts: parts["line"].set_ydata([0, 1.001, 2]))) is None
    assert draw_figures.difference(drawn(), drawn(lambda parts: parts["title"].set_text("loss 0.513"))) is None


def test_a_stale_figure_is_named(monkeypatch, tmp_path, capsys):
    figure = Figure()
    axes = figure.add_subplot()
    monkeypatch.setattr(draw_figures, "FIGURES", tmp_path)
    monkeypatch.setattr(draw_figures, "SOURCES", {"one": lambda: {"one.png": figure}})
    monkeypatch.setattr(sys, "argv", ["draw_figures.py", "--check"])
    assert draw_figures.main() == 1  # there is none
    monkeypatch.setattr(sys, "argv", ["draw_figures.py"])
    assert draw_figures.main() == 0
    monkeypatch.setattr(sys, "argv", ["draw_figures.py", "--check"])
    assert draw_figures.main() == 0
    axes.set_title("another")
    capsys.readouterr()
    assert draw_figures.main() == 1
    assert capsys.readouterr().out.startswith("docs/figures/one.png is stale (axes[0] texts: ")
