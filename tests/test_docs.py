"""The code in README.md and in docs/ runs, page by page, and prints the output shown below it."""

import ast
import contextlib
import doctest
import inspect
import io
import itertools
import operator
import re
from pathlib import Path
from types import FunctionType

import pytest
import torch

import torch_manualbp as mbp
from torch_manualbp import autograd, compile_backend, demo, info, lecture, reference

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Internals of the compiler backend, and what `python -m` calls; neither is meant for users.
UNLISTED = {compile_backend: {"Chain", "Layer", "OPTIONS", "find_chains"}, info: {"main"}}
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

# A block of Python, and the block of text right after it with its output, if it prints.
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n*^```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def name(page):
    return str(page.relative_to(ROOT))


def run(block, page, namespace):
    """The output of a block. Tracebacks name the page and the line in it."""
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


def slide_map():
    """The rows of the table from slides to pages, code and figures: five cells each."""
    lines = (DOCS / "lecture" / "index.md").read_text().split("| slides |")[1].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"\s\|\s", line.strip("| "))] for line in lines if line.startswith("|")]


def test_each_slide_has_a_page_code_and_a_figure():
    slides = []
    for row in slide_map():
        assert len(row) == 5
        assert all(row)
        numbers, _, page, code, figure = row
        for part in numbers.split(", "):
            first, last = map(int, (part if "–" in part else f"{part}–{part}").split("–"))
            slides += range(first, last + 1)
        file, anchor = re.search(r"\]\(([^)#]*)#([^)]+)\)", page).groups()  # mkdocs --strict checks the anchor
        assert (DOCS / "lecture" / (file or "index.md")).exists()
        assert anchor
        for path in re.findall(r"\]\((\S+)\)", figure) or [None]:
            assert figure == "printed" or (DOCS / "lecture" / path).exists()
        for name in re.findall(r"`([\w.]+)", code):
            owner = {"Trace": mbp.inspection.trace, "ToyNetwork": lecture}.get(name.split(".")[0], mbp)
            name = name.removeprefix("torch_manualbp.")
            assert name == "activations" or operator.attrgetter(name)(owner) is not None
    assert sorted(slides) == list(range(1, 63))


def constants(module):
    """The upper-case constants of a module, and whether each has a docstring."""
    found, body = {}, ast.parse(inspect.getsource(module)).body
    for statement, following in itertools.pairwise([*body, ast.Pass()]):
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            explained = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(target, ast.Name) and target.id.isupper() and not target.id.startswith("_"):
                found[target.id] = explained
    return found


def public_names(module):
    """The public names of a module, and whether each has a docstring."""
    return constants(module) | {
        name: bool(value.__doc__)
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, (type, FunctionType)) and value.__module__ == module.__name__
    }


def described():
    """The names that `docs/reference/` includes by mkdocstrings."""
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    return set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))


def test_the_reference_has_every_public_name():
    assert {f"torch_manualbp.{name}" for name in mbp.__all__ if name != "__version__"} <= described()


@pytest.mark.parametrize(
    "module", [autograd, lecture, reference, info, demo, compile_backend], ids=lambda module: module.__name__
)
def test_the_reference_has_every_public_name_of(module):
    names = {name: text for name, text in public_names(module).items() if name not in UNLISTED.get(module, set())}
    assert names
    if module.__name__ in described():  # for a whole module, mkdocstrings shows everything that has a docstring
        assert [name for name, text in names.items() if not text] == []
    else:
        assert {f"{module.__name__}.{name}" for name in names} <= described()


def test_what_the_inspections_return_is_in_the_reference():
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    model = mbp.MLP([3, 5, 2])
    flow, plan = mbp.gradient_flow(model, x, y), mbp.memory(model, 4)
    for result in (mbp.trace(model, x, y), flow, flow.layers[0], plan, plan.store):
        assert f"{type(result).__module__}.{type(result).__name__}" in described()


def test_every_figure_is_shown_and_exists():
    shown = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+\.png)\)", page.read_text())
    }
    assert shown == set((DOCS / "figures").glob("*.png"))
