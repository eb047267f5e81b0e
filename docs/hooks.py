"""Hooks of mkdocs. Pages take what the repository's own files say, so that it is written once; formulas get subscripts.

`<!-- include: README.md -->` stands for the whole file, `<!-- include: README.md#Limits -->` for its section "Limits".
Formulas are plain Unicode, in the pages as in comments and docstrings: no renderer is needed, and `h_{k+1}` is all that
is left to typeset.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

# Code, headings (names of attributes) and tags, which stay as they are; or a letter, "_", and what is below the line.
_SUBSCRIPT = re.compile(
    r"<(?P<whole>code|pre|h\d)\b.*?</(?P=whole)>|<[^>]+>"
    r"|(?<!\w)(?P<letter>[^\W\d_])_(?:\{(?P<braced>[^}]+)\}|(?P<word>[0-9A-Za-z]+))",
    re.DOTALL,
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    return re.sub(r"<!-- include: (\S+?)(?:#(.+))? -->", _included, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page, without what surrounds it."""
    return _SUBSCRIPT.sub(_subscript, html)


def _included(match: re.Match[str]) -> str:
    name, section = match.groups()
    text = (ROOT / name).read_text()
    if section:
        found = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        if found is None:
            raise ValueError(f"hooks.py: {name} has no section {section!r}")
        text = found[1]
    return text.replace("](docs/", "](")


def _subscript(match: re.Match[str]) -> str:
    if match["letter"] is None:
        return match[0]
    return f"{match['letter']}<sub>{match['braced'] or match['word']}</sub>"
