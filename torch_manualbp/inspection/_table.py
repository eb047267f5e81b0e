"""A trace as a table: both passes in the lecture's notation, line by line, in the order in which they are computed."""

import html as _html
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from torch_manualbp.inspection.trace import Trace


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
    yield f"Forward pass ({trace.traced_loss.name}, {trace.traced_loss.reduction})", forward

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
    parts = [(heading, [_cells(row, is_scalar(trace)) for row in rows]) for heading, rows in sections(trace)]
    widths = [max(len(cells[column]) for _, rows in parts for cells in rows) for column in range(5)]
    lines = []
    for heading, rows in parts:
        columns = "" if is_scalar(trace) else f"{'shape':<{widths[2]}}  {'norm':>{widths[3]}}  {'zeros':>{widths[4]}}"
        lines.append(f"{heading:<{widths[0] + widths[1] + 6}}  {columns}".rstrip())
        for name, formula, *values in rows:
            left = f"  {name:<{widths[0]}} = {formula:<{widths[1]}}"
            if is_scalar(trace):
                lines.append(f"{left} = {values[1]:>{widths[3]}}".rstrip())
            else:
                shape, norm, zeros = values
                lines.append(f"{left}   {shape:<{widths[2]}}  {norm:>{widths[3]}}  {zeros:>{widths[4]}}".rstrip())
    return "\n".join(lines)


def html(trace: "Trace") -> str:
    """The table for a notebook."""
    scalar = is_scalar(trace)
    body = []
    for heading, rows in sections(trace):
        columns = ("value",) if scalar else ("shape", "norm", "zeros")
        titles = "".join(f"<th>{title}</th>" for title in columns)
        body.append(f'<tr><th colspan="2" style="text-align:left">{_html.escape(heading)}</th>{titles}</tr>')
        for row in rows:
            name, formula, shape, norm, zeros = _cells(row, scalar)
            values = (norm,) if scalar else (shape, norm, zeros)
            cells = "".join(f"<td>{value}</td>" for value in values)
            left = 'style="text-align:left"'
            body.append(f"<tr><td {left}>{_subscripts(name)}</td><td {left}>= {_subscripts(formula)}</td>{cells}</tr>")
    return f"<table>{''.join(body)}</table>"


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


def _subscripts(formula: str) -> str:
    return re.sub(r"_(\w+)", r"<sub>\1</sub>", _html.escape(formula))
