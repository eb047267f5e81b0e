"""Reports in a notebook say what they print, and print on any terminal."""

import io
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import torch_manualbp as mbp
from helpers import python


def contrast_i(output, target):
    """A loss whose name ends like an index."""
    return (output - target).square().sum()


def make_reports():
    """Every report, of networks whose layers have names that need escaping in HTML, or are not ASCII."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 3), torch.randn(5, 2)

    def network():
        model = nn.Sequential()
        for name, layer in (("<b>&amp;", nn.Linear(3, 4)), ("größe_1", nn.ReLU()), ("f_1", nn.Linear(4, 2))):
            model.add_module(name, layer)
        return model

    model, fused, deep = network(), mbp.fuse(network()), mbp.MLP([64] * 11 + [1])
    with mbp.GradientFlowMonitor(fused, every=2) as monitor:
        history = mbp.fit(fused, x, y, torch.optim.SGD(fused.parameters(), lr=0.1), epochs=12, validation=(x, y))
    nn.init.constant_(deep[4].bias, -9)
    return {
        "trace": mbp.trace(model, x, y),
        "trace of classes": mbp.trace(model, x, torch.ones(5, dtype=torch.long), "cross_entropy", "mean"),
        "trace of a function": mbp.trace(model, x, y, contrast_i),
        "trace of numbers": mbp.trace(mbp.MLP([1, 1, 1]), x[:1, :1], y[:1, :1]),
        "trace without rows": mbp.trace(model, x[:0], y[:0]),
        "gradient flow": mbp.gradient_flow(model, x, y),
        "gradient flow with findings": mbp.gradient_flow(deep, torch.randn(9, 64), torch.randn(9, 1)),
        "gradient flow in training": monitor.history[1],
        "monitor": monitor,
        "monitor that has seen nothing": mbp.GradientFlowMonitor(fused),
        "memory": mbp.memory(model, 1000),
        "fusion": mbp.fusion_report(fused, x),
        "fusion of nothing": mbp.fusion_report(model, x),
        "fusion without layers": mbp.fusion_report(nn.ReLU(), x),
        "history": history,
        "history without epochs": mbp.History(1),
    }


@pytest.fixture(scope="module")
def reports():
    return make_reports()


def squeezed(text):
    """Without spaces, line breaks and the underscores that HTML shows as subscripts."""
    return re.sub(r"[\s_]", "", text)


def test_a_notebook_shows_what_is_printed(reports):
    for name, report in reports.items():
        tree = ElementTree.fromstring(report._repr_html_())  # raises unless it is well-formed
        assert squeezed("".join(tree.itertext())) == squeezed(str(report)), name


def test_the_rows_of_a_table_have_equal_length(reports):
    for name, report in reports.items():
        for table in ElementTree.fromstring(report._repr_html_()).iter("table"):
            assert len({sum(int(cell.get("colspan", 1)) for cell in row) for row in table.iter("tr")}) == 1, name


def test_a_notebook_keeps_the_colours_of_its_theme(reports):
    for name, report in reports.items():
        elements = list(ElementTree.fromstring(report._repr_html_()).iter())
        assert {element.get("style") for element in elements} <= {None, "text-align:left", "text-align:right"}, name
        assert {key for element in elements for key in element.attrib} <= {"style", "colspan"}, name


def rows(report):
    """The cells of each row, as HTML without the tags of the cells."""
    return [
        re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", report._repr_html_())
    ]


def test_only_indices_are_subscripts(reports):
    formulas = [row[:2] for row in rows(reports["trace"])]
    ell = "∂ℓ<sub>i</sub>"
    assert [f"{ell}/∂h<sub>1</sub>", f"= Ω<sub>1</sub>ᵀ {ell}/∂f<sub>1</sub>"] in formulas  # ᵀ is not one
    assert ["∂L/∂Ω<sub>1</sub>", f"= Σ<sub>i</sub> {ell}/∂f<sub>1</sub> h<sub>1</sub>ᵀ"] in formulas
    assert "= −log softmax[f<sub>1</sub>]<sub>y</sub> / 5" in [
        cell for row in rows(reports["trace of classes"]) for cell in row
    ]
    assert "∂contrast_i/∂f<sub>1</sub>" in reports["trace of a function"]._repr_html_()
    titles, *layers = rows(reports["gradient flow"])
    assert titles[2] == "D<sub>k</sub> → D<sub>k+1</sub>"
    assert [row[1] for row in layers] == ["&lt;b&gt;&amp;amp;", "f_1"]


def test_text_is_left_and_numbers_are_right(reports):
    html = reports["memory"]._repr_html_()
    assert '<td style="text-align:left">eager</td><td style="text-align:right">' in html


@pytest.fixture
def terminal(monkeypatch):
    """Replaces stdout by one of an encoding; returns what is printed, which must encode."""

    def printed(encoding, *values):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as context:
            context.setattr(sys, "stdout", stream)
            print(*values)
        stream.flush()
        return stream.buffer.getvalue().decode(encoding).rstrip("\n")

    return printed


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp437", "koi8-r"])
def test_reports_print_on_any_terminal(encoding, reports, terminal):
    for name, report in reports.items():
        text = terminal(encoding, report)
        assert len(text.splitlines()) == len(str(report).splitlines()), name
        terminal(encoding, [report])  # its repr


def test_symbols_become_ascii_where_the_terminal_lacks_them(reports, terminal):
    lines = [re.sub(" +", " ", line).strip() for line in terminal("ascii", reports["trace"]).splitlines()]
    assert lines[4].startswith("f_1 = beta_1 + Omega_1 h_1 5 x 2 ")
    assert lines[5].startswith("l_i = sum_d (f_1 - y_i)^2 / 10 5 ")
    assert any(line.startswith("dl_i/dh_1 = Omega_1^T dl_i/df_1 5 x 4 ") for line in lines)
    assert any(line.startswith("dl_i/df_0 = I[f_0 > 0] * dl_i/dh_1 5 x 4 ") for line in lines)
    assert "5 × 2" in terminal("latin-1", reports["trace"])  # has some of the symbols
    assert "omega_1 · h_1" in terminal("latin-1", reports["trace of numbers"])
    assert "(|.| is the root mean square" in terminal("ascii", reports["gradient flow"])
    assert "gr\\xf6\\xdfe_1" in terminal("ascii", mbp.fusion_report(mbp.fuse(named("größe_1")), torch.randn(5, 3)))


def named(name):
    """A network with one layer of that name."""
    model = nn.Sequential()
    model.add_module(name, nn.Linear(3, 4))
    model.add_module("relu", nn.ReLU())
    return model


def test_columns_are_aligned_in_ascii(reports, terminal):
    for name in ("trace", "trace of numbers"):
        lines = [line for line in terminal("ascii", reports[name]).splitlines() if line.startswith("  ")]
        assert len({line.index(" = ") for line in lines}) == 1, name


@pytest.mark.parametrize("encoding", ["utf-8", None])
def test_nothing_changes_where_every_symbol_can_be_shown(encoding, reports, monkeypatch):
    stream = io.StringIO() if encoding is None else io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)  # a StringIO has no encoding
    assert "∂ℓ_i/∂h_1 = Ω_1ᵀ ∂ℓ_i/∂f_1" in str(reports["trace"])


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_trace_prints_in_a_process_with_another_encoding(encoding):
    code = """if True:
        import torch, torch_manualbp as mbp
        trace = mbp.trace(mbp.MLP([2, 3, 1]), torch.ones(4, 2), torch.ones(4, 1))
        print(trace), print([trace])"""
    result = subprocess.run(**python(code, PYTHONIOENCODING=encoding), capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "dl_i/df_1" in result.stdout.decode(encoding)
    assert "[Trace(2-3-1, batch 4, " in result.stdout.decode(encoding)
