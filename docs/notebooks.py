"""The lecture's chapters as Jupyter notebooks, made from the pages: `make notebooks`, and a hook of mkdocs.

Text becomes cells of text, and each block of Python a cell that has been run, in place of the output that the page
quotes. A notebook can be opened anywhere: figures are part of it, and a link to a page becomes its text unless the site
has an address. Its first cell installs the package where it is missing.

As a hook it adds the notebooks to the site, and to each chapter a link. They are kept in build/notebooks, and made
again only if what they depend on has changed.
"""

import base64
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
CHAPTERS = [page for page in sorted((ROOT / "docs" / "lecture").glob("*.md")) if "```python" in page.read_text()]
FOLDER = ROOT / "build" / "notebooks"

SET_UP = """\
# This installs torch_manualbp where it is missing, as on Google Colab: first upload its wheel or source archive there.
import importlib.util
from glob import glob

if importlib.util.find_spec("torch_manualbp") is None:
    archives = glob("torch_manualbp-*.whl") + glob("torch_manualbp-*.tar.gz")
    assert archives, "upload torch_manualbp-….whl or .tar.gz into the folder of this notebook, and run this cell again"
    %pip install --quiet {archives[0]}

import torch

_ = torch.manual_seed(0)  # the numbers of the documentation"""

LINK = '*[This chapter as a Jupyter notebook]({name}){{ download="" }}, for Jupyter, VS Code or Google Colab.*'

# The parts of a page that do not become text as it is: a folded block, or code with its output.
_PART = re.compile(
    r"^(?P<folded><details.*?^</details>)$|^```python\n(?P<code>.*?)^```\n(?:\n*^```text\n.*?^```\n)?",
    re.MULTILINE | re.DOTALL,
)
_BLOCK = re.compile(
    r'^(?P<kind>!!!|\?\?\?\+?) +(?P<class>[\w-]+)(?: +"(?P<title>.*)")?\n(?P<body>(?:(?: {4}.*)?\n)+)', re.M
)
_IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<path>[^)\s]+\.png)\)")
_LINK = re.compile(
    r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])+)\]"
    r"(?:\((?P<target>(?!https?:)[^)\s]*(?:\.md|#)[^)\s]*)\)|\[(?P<name>torch_manualbp[\w.]*)\])"
)
_ATTRIBUTES = re.compile(r"(?<=\))\{[^}\n]*\}|(?<=\S) *\{ ?[#.:][^}\n]*\}$", re.MULTILINE)
# Subscripts, but not in code, formulas for TeX, headings (as on the site), addresses and tags.
_SUBSCRIPT = re.compile(
    r"```.*?```|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$|^#.*?$|\]\([^)]*\)|</?[A-Za-z][^>\n]*>"
    r"|(?<!\w)(?P<letter>[^\W\d_])_(?:\{(?P<braced>[^}]+)\}|(?P<word>[0-9A-Za-z]+))",
    re.MULTILINE | re.DOTALL,
)


def convert(page: Path, site_url: str | None = None) -> nbformat.NotebookNode:
    """The notebook of a page; its code has not been run."""
    cells = [new_code_cell(SET_UP)]
    for kind, source in _parts(_BLOCK.sub(_as_html, page.read_text())):
        if kind == "code":
            cells.append(new_code_cell(source.strip("\n")))
            continue
        if kind == "folded" and "```python" in source:  # an exercise with code: here is room for the reader's own
            cells.append(new_code_cell("# Your code"))
        cells.append(new_markdown_cell(_text(source, page, site_url)))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # not random: the same page gives the same file
    language = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": language, "colab": {"provenance": []}})


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs the cells in a new kernel, in an empty folder and without the user's configuration.

    Raises:
        CellExecutionError: a cell raises an exception.
        RuntimeError: a cell writes to stderr, which is a warning.
    """
    with tempfile.TemporaryDirectory() as folder:
        private = {"IPYTHONDIR": folder, "JUPYTER_RUNTIME_DIR": folder, "JUPYTER_CONFIG_DIR": folder}
        sockets = {"transport": "ipc", "ip": f"{folder}/kernel"}  # files: no port is open to other users
        client = NotebookClient(
            notebook,
            timeout=600,
            record_timing=False,
            resources={"metadata": {"path": folder}},
            config=Config(KernelManager=sockets),
        )
        client.execute(env={**os.environ, **private})
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(f"a cell writes to stderr:\n{cell.source}\n\n{output.text}")


def up_to_date(page: Path, site_url: str | None = None) -> Path:
    """The path of the notebook of a page, which is made if it is older than the page, the figures or the package."""
    path = FOLDER / f"{page.stem}.ipynb"
    package = [file for file in (ROOT / "torch_manualbp").rglob("*") if file.suffix in {".py", ".so"}]
    made_from = [page, Path(__file__), *(ROOT / "docs" / "figures").iterdir(), *package]
    if not path.exists() or path.stat().st_mtime < max(file.stat().st_mtime for file in made_from):
        notebook = convert(page, site_url)
        execute(notebook)
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
    return path


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """The page as pieces of text, folded blocks and code, in order."""
    end = 0
    for match in _PART.finditer(text):
        if before := text[end : match.start()].strip():
            yield "text", before
        kind = "code" if match["folded"] is None else "folded"
        yield kind, match[kind]
        end = match.end()
    if rest := text[end:].strip():
        yield "text", rest


def _as_html(match: re.Match[str]) -> str:
    """An admonition as a quotation; a block that folds as <details>."""
    title = match["title"] or match["class"].capitalize()
    body = re.sub(r"^ {4}", "", match["body"], flags=re.MULTILINE).strip("\n")
    if match["kind"] == "!!!":
        return "\n".join(f"> {line}".rstrip() for line in (f"**{title}**", "", *body.split("\n"))) + "\n\n"
    return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>\n\n"


def _text(source: str, page: Path, site_url: str | None) -> str:
    """The text of a cell. Figures come after it as data, in the way that Google Colab also reads."""
    figures: dict[str, str] = {}

    def image(match: re.Match[str]) -> str:
        path = (page.parent / match["path"]).resolve()
        figures[path.name] = base64.b64encode(path.read_bytes()).decode()
        return f"![{match['alt']}][{path.name}]"

    def link(match: re.Match[str]) -> str:
        if site_url is None or match["target"] is None:
            return match["text"]
        file, _, anchor = match["target"].partition("#")
        address = (page.parent / file).resolve().relative_to(ROOT / "docs") if file else page.relative_to(ROOT / "docs")
        return (
            f"[{match['text']}]({site_url.rstrip('/')}/{address.with_suffix('.html')}{'#' + anchor if anchor else ''})"
        )

    def subscript(match: re.Match[str]) -> str:
        return (
            match[0] if match["letter"] is None else f"{match['letter']}<sub>{match['braced'] or match['word']}</sub>"
        )

    text = re.sub(r'<(details|summary|div) markdown(?:="\w+")?', r"<\1", source)
    text = re.sub(r"(</summary>)\n(?!\n)", r"\1\n\n", text)  # text after it is Markdown again
    text = _SUBSCRIPT.sub(subscript, _LINK.sub(link, _IMAGE.sub(image, _ATTRIBUTES.sub("", text))))
    return "\n\n".join([text, *(f"[{name}]: data:image/png;base64,{data}" for name, data in figures.items())])


# --- hooks of mkdocs --------------------------------------------------------------------------------------------------


def on_files(files: Any, *, config: Any) -> Any:
    """Called by mkdocs with the files of the site: adds the notebooks."""
    from mkdocs.structure.files import File

    for page in CHAPTERS:
        path = up_to_date(page, config.site_url or None)
        files.append(File.generated(config, f"lecture/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page: adds the link to its notebook below the title."""
    path = Path(page.file.abs_src_path)
    if path not in CHAPTERS:
        return markdown
    title, rest = markdown.split("\n", 1)
    return f"{title}\n\n{LINK.format(name=f'{path.stem}.ipynb')}\n{rest}"


if __name__ == "__main__":
    for chapter in CHAPTERS:
        sys.stdout.write(f"    {up_to_date(chapter).relative_to(ROOT)}\n")
