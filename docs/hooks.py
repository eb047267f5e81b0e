"""Hooks of mkdocs. Pages can include files of the repository, which avoids duplicates; formulas get subscripts.

`<!-- include: SECURITY.md -->` inserts the text of that file. Formulas are plain Unicode, in pages as in comments and
docstrings, so no renderer is needed; only subscripts such as `h_{k+1}` are typeset.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {  # maps links in those files to pages of the site
    "docs": ".",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "design/contributing.md",
    "SECURITY.md": "security.md",
    "csrc/README.md": "design/csrc.md",
}

# Matches code, headings (names of attributes) and tags, which stay unchanged, or a letter, "_" and its subscript.
_SUBSCRIPT = re.compile(
    r"<(?P<whole>code|pre|h\d)\b.*?</(?P=whole)>|<[^>]+>"
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


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page, without what surrounds it."""
    return _SUBSCRIPT.sub(_subscript, html)


def _subscript(match: re.Match[str]) -> str:
    if match["letter"] is None:
        return match[0]
    return f"{match['letter']}<sub>{match['braced'] or match['word']}</sub>"
