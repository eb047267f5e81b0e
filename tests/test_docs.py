"""The code in README.md and in docs/ runs, page by page, and prints what stands below it."""

import contextlib
import doctest
import io
import re
from pathlib import Path

import pytest
import torch

import torch_manualbp as mbp
from torch_manualbp import autograd

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

# A block of Python; its output, if it prints, is the block of text right after it.
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n*^```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def name(page):
    return str(page.relative_to(ROOT))


def run(block, page, namespace):
    """What a block prints. Tracebacks name the page and the line in it."""
    lines_before = block.string[: block.start("code")].count("\n")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * lines_before + block["code"], page, "exec"), namespace)
    return printed.getvalue()


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name)
def test_code_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some save a figure
    torch.manual_seed(0)
    blocks, namespace = list(BLOCK.finditer(page.read_text())), {"__name__": "__main__"}
    assert len(blocks) == page.read_text().count("```python")
    for block in blocks:
        got, want = run(block, page, namespace), block["output"] or ""
        same = doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS)  # "..." stands for anything
        assert same, f"{name(page)} says\n{want}but this prints\n{got}"


def test_the_reference_has_every_public_name():
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    described = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    public = {f"torch_manualbp.{name}" for name in mbp.__all__ if name != "__version__"}
    functions = {
        f"torch_manualbp.autograd.{name}"
        for name, value in vars(autograd).items()
        if name.endswith("Function") and value.__module__ == autograd.__name__
    }
    assert len(functions) == 3
    assert public | functions <= described


def test_every_figure_is_shown_and_exists():
    shown = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+\.png)\)", page.read_text())
    }
    assert shown == set((DOCS / "figures").glob("*.png"))
