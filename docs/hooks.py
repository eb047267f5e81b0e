"""Hooks of mkdocs. Pages can include files of the repository, which avoids duplicates; formulas are typeset.

`<!-- include: SECURITY.md -->` inserts the text of that file.

The lecture's pages have formulas in LaTeX, `$…$` in a line and `$$…$$` on lines of their own, which GitHub and Jupyter
show too. Here they become MathML, which browsers display without JavaScript and without a network. Formulas of other
pages and of docstrings are plain Unicode, as in the code; of these, only subscripts such as `h_{k+1}` are typeset.
"""

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parent.parent
PAGES = {  # maps links in those files to pages of the site
    "docs": ".",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "design/contributing.md",
    "SECURITY.md": "security.md",
    "csrc/README.md": "design/csrc.md",
}

# A formula, as the extension pymdownx.arithmatex marks it. A mark of punctuation stays on its line.
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\[(\[](?P<latex>.*?)\\[)\]]\s*</(?P=tag)>(?P<mark>[.,:;?)]*)', re.DOTALL
)
# Where the converter differs from LaTeX: capital Greek letters and ∂ are upright letters there, and there is no space
# around a slash or a name such as max.
_AS_IN_LATEX = [
    (re.compile(r"<m[io]>(&#x0(?:03(?:9[1-9A-F]|A[0-9])|2202);)</m[io]>"), r'<mi mathvariant="normal">\1</mi>'),
    (re.compile(r"<mo>([a-z]{2,})</mo>"), r"<mi>\1</mi>"),
    (re.compile(r"<mo>&#x0002F;</mo>"), '<mo lspace="0" rspace="0">/</mo>'),
]

# Matches code, formulas and tags, which stay unchanged; or where a line must not break: at the space before a unit, at
# a slash between numbers, and within a date or widths such as 784–512×2–10.
_TOGETHER = re.compile(
    r"<(?P<whole>code|pre|math)\b.*?</(?P=whole)>|<[^>]+>"
    r"|(?<=\d)(?P<space> (?=(?:%|ms|µs|s|[KMG]iB|GFLOP/s)(?!\w))| / (?=\d))"
    r"|(?P<word>\d(?:[\d×,]*\d)?(?:–\d(?:[\d×,]*\d)?)+|\d{4}-\d\d-\d\d)",
    re.DOTALL,
)

# A heading, and a tag in it or a dot within a name, where a line of a phone may break.
_HEADING = re.compile(r"<h[1-4][ >].*?</h[1-4]>", re.DOTALL)
_DOT = re.compile(r"<[^>]+>|(?<=\w)(?P<dot>\.)(?=[A-Za-z_])")

# A cell of a table.
_CELL = re.compile(r"<td[^>]*>(?P<content>.*?)</td>", re.DOTALL)
_LONG = 30  # characters; a cell with more should not become a column of single words on a phone

# Matches code, formulas, headings (names of attributes) and tags, which stay unchanged; or a letter, "_" and its
# subscript.
_SUBSCRIPT = re.compile(
    r"<(?P<whole>code|pre|math|h\d)\b.*?</(?P=whole)>|<[^>]+>"
    r"|(?<!\w)(?P<letter>[^\W\d_])_(?:\{(?P<braced>[^}]+)\}|(?P<word>[0-9A-Za-z]+))",
    re.DOTALL,
)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    folder = posixpath.dirname(page.file.src_uri) or "."

    def include(match: re.Match[str]) -> str:
        text = (ROOT / match[1]).read_text()
        for name, target in PAGES.items():
            text = text.replace(f"]({name}", f"]({posixpath.relpath(target, folder)}")
        return text

    return re.sub(r"<!-- include: (\S+) -->", include, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page, without what surrounds it."""
    content = _TOGETHER.sub(_together, _SUBSCRIPT.sub(_subscript, _FORMULA.sub(_typeset, content)))
    content = _HEADING.sub(lambda heading: _DOT.sub(_break, heading[0]), content)
    return _CELL.sub(_cell, content)


def _break(match: re.Match[str]) -> str:
    return ".<wbr>" if match["dot"] else match[0]


def mathml(latex: str, display: str = "inline") -> str:
    """A formula as an element <math>.

    Raises:
        ValueError: the formula has a command or an environment that the converter does not know.
    """
    formula = convert(latex, display=display)
    for found, replacement in _AS_IN_LATEX:
        formula = found.sub(replacement, formula)
    if "\\" in formula or "<mi>&</mi>" in formula:  # it copies what it does not know
        raise ValueError(f"this formula cannot be typeset: {latex}")
    return formula


def _typeset(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    formula = mathml(html.unescape(match["latex"]).strip(), display)
    return f'<{match["tag"]} class="math">{formula}{match["mark"]}</{match["tag"]}>'


def _together(match: re.Match[str]) -> str:
    if match["space"]:
        return match["space"].replace(" ", "&nbsp;")
    return f'<span class="together">{match["word"]}</span>' if match["word"] else match[0]


def _cell(match: re.Match[str]) -> str:
    text = html.unescape(re.sub(r"<[^>]+>", "", match["content"])).strip()
    return match[0].replace("<td", "<td data-long", 1) if len(text) > _LONG else match[0]


def _subscript(match: re.Match[str]) -> str:
    if match["letter"] is None:
        return match[0]
    return f"{match['letter']}<sub>{match['braced'] or match['word']}</sub>"
