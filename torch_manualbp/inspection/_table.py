"""Reports as tables, in plain text for a terminal and in HTML for a notebook; and the rows of a trace's table.

A trace's table has both passes in the lecture's notation, line by line, in the order in which they are computed.

Where the terminal cannot show a symbol, ASCII takes its place: dl_i/df_k for ∂ℓ_i/∂f_k. ``__str__`` does not know the
stream that its result will be written to, so `printable` looks at ``sys.stdout``.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from torch_manualbp.inspection.trace import Trace

_ASCII = {  # in this order: a symbol is replaced if the terminal does not show it
    "|·|": "|.|", "∂": "d", "ℓ": "l", "Ω": "Omega", "ω": "omega", "β": "beta", "Σ": "sum", "ᵀ": "^T", "²": "^2",
    "⊙": "*", "·": "*", "×": "x", "−": "-", "–": "-", "→": "->", "…": "...",
}  # fmt: skip


def printable(text: str) -> str:
    """The text with symbols that ``sys.stdout`` can show: the same, or with ASCII in place of what it cannot."""
    encoding = getattr(sys.stdout, "encoding", None)  # None: a StringIO, for example, which takes everything
    if not encoding or _can_show(encoding, text):
        return text
    for symbol, replacement in _ASCII.items():
        if not _can_show(encoding, symbol):
            text = text.replace(symbol, replacement)
    return text.encode(encoding, "backslashreplace").decode(encoding)  # the user's names may have any letters


def _can_show(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


class Table(NamedTuple):
    """A report: lines, a table, and more lines."""

    before: str
    header: tuple[str, ...]
    """The titles of the columns, which may be formulas; empty for a table without."""
    rows: Sequence[tuple[str, ...]]
    align: str
    """"<" (left) or ">" (right) for each column."""
    after: Sequence[str] = ()

    def text(self) -> str:
        """The report for a terminal."""
        rows = [[printable(cell) for cell in row] for row in (self.header, *self.rows) if row]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, self.align, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*filter(None, [printable(self.before)]), *lines, *map(printable, self.after)])

    def html(self) -> str:
        """The same for a notebook, in the colours and the font of its theme."""
        header = [_html_cells([_subscripts(title) for title in self.header], self.align, "th")] if self.header else []
        rows = [_html_cells([escape(cell) for cell in row], self.align) for row in self.rows]
        return _html_report(self.before, header + rows, self.after)


def _html_report(before: str, rows: Sequence[str], after: Sequence[str] = ()) -> str:
    parts = [f"<p>{escape(before)}</p>"] if before else []
    parts += [f"<table><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"] if rows else []
    return f"<div>{''.join([*parts, *(f'<p>{escape(line)}</p>' for line in after)])}</div>"


def _html_cells(cells: Sequence[str], align: str, tag: str = "td") -> str:
    """The cells of a row, of texts that are HTML already. Notebooks align to the right unless told otherwise."""
    sides = ("left" if side == "<" else "right" for side in align)
    return "".join(f'<{tag} style="text-align:{side}">{cell}</{tag}>' for cell, side in zip(cells, sides, strict=True))


def _subscripts(formula: str) -> str:
    """A formula in HTML. Only an index is a subscript: neither ᵀ nor a part of a name, such as that of a function."""
    return re.sub(r"((?<!\w)[^\W\d_]|\])_(\d+|[idky](?:\+1)?)(?![0-9A-Za-z_])", r"\1<sub>\2</sub>", escape(formula))


class Row(NamedTuple):
    """One line: the name of a quantity, its formula, and its value."""

    name: str
    formula: str
    value: Tensor | None


def sections(trace: "Trace") -> Iterator[tuple[str, list[Row]]]:
    """The rows of the forward pass, the backward pass and the parameters' gradients, each with a heading."""
    K, scalar = len(trace.f), is_scalar(trace)
    omega, times, i = ("ω", " · ", "") if scalar else ("Ω", " ", "_i")
    forward = [Row("h_0", "x" + i, trace.h[0])]
    for k, layer in enumerate(trace.layers):
        product = f"{omega}_{k}{times}h_{k}"
        forward.append(Row(f"f_{k}", product if layer.bias is None else f"β_{k} + {product}", trace.f[k]))
        if k + 1 < len(trace.h):
            forward.append(Row(f"h_{k + 1}", f"a[f_{k}]" if layer.relu else f"f_{k}", trace.h[k + 1]))
    value, gradient = _loss_formulas(trace, _output_name(trace))
    forward.append(Row("ℓ" + i, value, trace.losses))
    if not scalar:
        forward.append(Row("L", "Σ_i ℓ_i" if trace.losses is not None else value, trace.loss))
    reduction = "" if scalar else f", {trace.traced_loss.reduction}"  # sum and mean of one number are the same
    yield f"Forward pass ({trace.traced_loss.name}{reduction})", forward

    ell = "∂ℓ" + i if trace.losses is not None else "∂L"
    backward = []
    if trace.layers[-1].relu:
        backward.append(Row(f"{ell}/∂h_{K}", gradient, trace.dl_dh[K]))
    for k, layer in reversed(list(enumerate(trace.layers))):
        mask = f"I[f_{k} > 0]{times if scalar else ' ⊙ '}" if layer.relu else ""
        formula = gradient if k == K - 1 and not layer.relu else f"{mask}{ell}/∂h_{k + 1}"
        backward.append(Row(f"{ell}/∂f_{k}", formula, trace.dl_df[k]))
        if k > 0:
            transposed = f"{omega}_{k}" if scalar else f"{omega}_{k}ᵀ"
            backward.append(Row(f"{ell}/∂h_{k}", f"{transposed}{times}{ell}/∂f_{k}", trace.dl_dh[k]))
    yield "Backward pass, in reverse order", backward

    total, each = ("∂ℓ", "") if scalar else ("∂L", "Σ_i " if trace.losses is not None else "")
    parameters = []
    for k in reversed(range(K)):
        if (dbeta := trace.dl_dbeta[k]) is not None:
            parameters.append(Row(f"{total}/∂β_{k}", f"{each}{ell}/∂f_{k}", dbeta))
        outer = f"{ell}/∂f_{k}{times}h_{k}" if scalar else f"{ell}/∂f_{k} h_{k}ᵀ"
        parameters.append(Row(f"{total}/∂{omega}_{k}", f"{each}{outer}", trace.dl_domega[k]))
    yield "Gradients of the parameters", parameters


def is_scalar(trace: "Trace") -> bool:
    """Whether every quantity is one number: the lecture's toy network."""
    return trace.h[0].shape == (1, 1) and all(f.shape == (1, 1) for f in trace.f)


def text(trace: "Trace") -> str:
    """The table for a terminal: values if every quantity is one number, else shapes, norms and shares of zeros."""
    parts = [
        (heading, [tuple(map(printable, _cells(row, is_scalar(trace)))) for row in rows])
        for heading, rows in sections(trace)
    ]
    widths = [max(len(cells[column]) for _, rows in parts for cells in rows) for column in range(5)]
    lines = []
    for heading, rows in parts:
        columns = "" if is_scalar(trace) else f"{'shape':<{widths[2]}}  {'norm':>{widths[3]}}  {'zeros':>{widths[4]}}"
        lines.append(f"{printable(heading):<{widths[0] + widths[1] + 6}}  {columns}".rstrip())
        for name, formula, *values in rows:
            left = f"  {name:<{widths[0]}} = {formula:<{widths[1]}}"
            if is_scalar(trace):
                lines.append(f"{left} = {values[1]:>{widths[3]}}".rstrip())
            else:
                shape, norm, zeros = values
                lines.append(f"{left}   {shape:<{widths[2]}}  {norm:>{widths[3]}}  {zeros:>{widths[4]}}".rstrip())
    return "\n".join(lines)


def html(trace: "Trace") -> str:
    """The same for a notebook."""
    scalar = is_scalar(trace)
    rows = []
    for heading, quantities in sections(trace):
        title = f'<th colspan="{3 if scalar else 2}" style="text-align:left">{escape(heading)}</th>'
        rows.append(title if scalar else title + _html_cells(["shape", "norm", "zeros"], "<>>", "th"))
        for quantity in quantities:
            name, formula, shape, norm, zeros = _cells(quantity, scalar)
            values = [f"= {norm}"] if scalar else [shape, norm, zeros]
            cells = [_subscripts(name), f"= {_subscripts(formula)}", *values]
            rows.append(_html_cells(cells, "<<>" if scalar else "<<<>>"))
    return _html_report("", rows)


def _cells(row: Row, scalar: bool) -> tuple[str, str, str, str, str]:
    """Name, formula, shape, norm (the value itself if `scalar`), share of zeros."""
    if row.value is None:
        return row.name, row.formula, "", "?", ""
    number = row.value.item() if scalar else row.value.double().norm().item()
    share = (row.value == 0).double().mean().item() if row.value.numel() else 0.0
    zeros = f"{share:.0%}" if share else ""
    shape = " × ".join(str(size) for size in row.value.shape)
    return row.name, row.formula, shape, f"{number:.6g}", zeros


def _output_name(trace: "Trace") -> str:
    return f"h_{len(trace.f)}" if trace.layers[-1].relu else f"f_{len(trace.f) - 1}"


def _loss_formulas(trace: "Trace", output: str) -> tuple[str, str]:
    """ℓ_i and ∂ℓ_i/∂output as text."""
    loss = trace.traced_loss
    names = {"f": output, "y": "y" if is_scalar(trace) else "y_i", "sum": "Σ_d " if trace.output.shape[1] != 1 else ""}
    if (spec := loss.spec) is None:
        return f"{loss.name}({output}, {names['y']})", f"∂{loss.name}/∂{output}"
    value, gradient = (text.format_map(names) for text in (spec.loss.formula, spec.loss.gradient_formula))
    count = spec.terms(trace.target) if loss.reduction == "mean" else 1
    if count == 1:
        return value, gradient
    gradient = gradient if gradient.startswith("2(") else f"({gradient})"  # a product needs no parentheses
    return f"{value} / {count}", f"{gradient} / {count}"
