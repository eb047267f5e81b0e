"""The chapters as notebooks: they run, print what the pages say, and can be opened anywhere."""

import base64
import doctest
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from helpers import python
from test_docs import BLOCK

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "docs" / "notebooks.py"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebooks = load(SCRIPT)
CHAPTERS = {page.stem: page for page in notebooks.CHAPTERS}


@pytest.fixture(scope="session")
def folder():
    """The notebooks that `make docs` puts into the site; made now if they are missing or older than something."""
    process = {**python(""), "args": [sys.executable, str(SCRIPT)]}
    result = subprocess.run(**process, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return notebooks.FOLDER


@pytest.fixture(params=CHAPTERS)
def chapter(request, folder):
    """A page, and its notebook after it has run."""
    return CHAPTERS[request.param], nbformat.read(folder / f"{request.param}.ipynb", as_version=4)


def page_of(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


def cells_of(tmp_path, text):
    """The cells of a page, after the first one."""
    notebook = notebooks.convert(page_of(tmp_path, text))
    nbformat.validate(notebook)
    return [(cell.cell_type, cell.source) for cell in notebook.cells[1:]]


# --- the chapters -----------------------------------------------------------------------------------------------------


def test_there_is_a_chapter_for_each_part_of_the_lecture():
    assert {"problem", "toy_network", "matrix_calculus", "backward_pass", "initialisation"} <= set(CHAPTERS)


@pytest.mark.slow
def test_notebooks_print_what_the_pages_say(chapter):
    page, notebook = chapter
    nbformat.validate(notebook)
    blocks = BLOCK.finditer(page.read_text())
    cells = [cell for cell in notebook.cells[1:] if cell.cell_type == "code" and cell.source != "# Your code"]
    assert len(cells) > 1
    for cell in cells:
        block = next(block for block in blocks if block["code"].strip("\n") == cell.source)  # skips folded solutions
        got = "".join(output.text for output in cell.outputs if output.output_type == "stream")
        assert doctest.OutputChecker().check_output(block["output"] or "", got, doctest.ELLIPSIS), got


@pytest.mark.slow
def test_all_cells_have_run_without_errors(chapter):
    _, notebook = chapter
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]


@pytest.mark.slow
def test_notebooks_need_no_other_file(chapter):
    page, notebook = chapter
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    figures = dict(re.findall(r"^\[([^\]]+\.png)\]: data:image/png;base64,(\S+)$", text, re.MULTILINE))
    assert set(re.findall(r"!\[[^\]]*\]\[([^\]]+)\]", text)) == set(figures)
    assert len(figures) == len(re.findall(r"^!\[", page.read_text(), re.MULTILINE))
    for name, data in figures.items():
        assert base64.b64decode(data) == (ROOT / "docs" / "figures" / name).read_bytes()
    assert not re.findall(r"\]\((?!https?:)[^)\s]*\.(?:md|png|ipynb|html)", text)
    assert "][torch_manualbp" not in text


@pytest.mark.slow
def test_notebooks_hold_nothing_of_the_machine_that_made_them(folder):
    for path in folder.glob("*.ipynb"):
        text = path.read_text()
        assert not [place for place in (str(ROOT), str(Path.home()) + "/", sys.prefix) if place in text]


def test_notebooks_are_made_again_only_if_something_has_changed(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path / "notebooks")
    monkeypatch.setattr(notebooks, "execute", runs.append)
    page = page_of(tmp_path, "# Title\n\n```python\nprint(1)\n```\n")
    path = notebooks.up_to_date(page)
    nbformat.validate(nbformat.read(path, as_version=4))
    notebooks.up_to_date(page)
    assert len(runs) == 1
    later = path.stat().st_mtime + 1
    os.utime(page, (later, later))
    assert notebooks.up_to_date(page) == path
    assert len(runs) == 2


# --- the conversion ---------------------------------------------------------------------------------------------------


def test_code_becomes_cells_without_the_output_of_the_page(tmp_path):
    text = "# Title\n\nText.\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\nMore.\n\n```sh\nls\n```\n"
    assert cells_of(tmp_path, text) == [
        ("markdown", "# Title\n\nText."),
        ("code", "print(1)"),
        ("markdown", "More.\n\n```sh\nls\n```"),
    ]


def test_links_become_text_or_addresses_of_the_site(tmp_path):
    text = (
        "See [a *page*](../measured.md#method), [`f`][torch_manualbp.fuse], [this](#title), [x](https://example.org)."
    )
    assert cells_of(tmp_path, text) == [("markdown", "See a *page*, `f`, this, [x](https://example.org).")]


def test_links_become_addresses_of_the_site():
    page = CHAPTERS["pros_and_cons"]
    text = "[Measured](../measured.md#method) [here](#title) [next](problem.md) [`f`][torch_manualbp.fuse]"
    assert notebooks._text(text, page, "https://example.org/docs/") == (
        "[Measured](https://example.org/docs/measured.html#method) "
        "[here](https://example.org/docs/lecture/pros_and_cons.html#title) "
        "[next](https://example.org/docs/lecture/problem.html) `f`"
    )


def test_subscripts_are_set_in_text_only(tmp_path):
    text = "If k < K, f_{k−1} > h_0 are `f_0`, $f_0$, $$\nh_{k+1}\n$$ or my_name.\n\n## f_k in a heading"
    assert cells_of(tmp_path, text)[0][1] == (
        "If k < K, f<sub>k−1</sub> > h<sub>0</sub> are `f_0`, $f_0$, $$\nh_{k+1}\n$$ or my_name.\n\n## f_k in a heading"
    )


EXERCISE = (
    "Compute it.\n\n{opening}Because $a_0$.\n\n```python\nprint(2)\n```\n\n```text\n2\n```\n\nSo.\n{closing}\nAfter.\n"
)


@pytest.mark.parametrize("form", ["details", "admonition"])
def test_solutions_are_folded_and_there_is_a_cell_to_try(form, tmp_path):
    if form == "details":
        text = EXERCISE.format(opening="<details markdown>\n<summary>Solution</summary>\n", closing="\n</details>\n")
    else:
        inside = EXERCISE.format(opening="", closing="").split("Compute it.\n\n")[1].split("\nAfter.")[0]
        indented = "\n".join(f"    {line}".rstrip() for line in inside.splitlines())
        text = f'Compute it.\n\n??? question "Solution"\n{indented}\n\nAfter.\n'
    folded = "Because $a_0$.\n\n```python\nprint(2)\n```\n\n```text\n2\n```\n\nSo."
    assert cells_of(tmp_path, text) == [
        ("markdown", "Compute it."),
        ("code", "# Your code"),
        ("markdown", f"<details>\n<summary>Solution</summary>\n\n{folded}\n\n</details>"),
        ("markdown", "After."),
    ]


def test_admonitions_become_quotations(tmp_path):
    text = '!!! note "Layout"\n    A row\n    each.\n\n    Really.\n\nAfter.'
    assert cells_of(tmp_path, text) == [("markdown", "> **Layout**\n>\n> A row\n> each.\n>\n> Really.\n\nAfter.")]


def test_the_first_cell_asks_for_the_package_where_it_is_missing(tmp_path, monkeypatch):
    set_up = notebooks.convert(page_of(tmp_path, "# Title")).cells[0].source
    namespace = {}
    code = set_up.replace("%pip", "pip = ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssertionError, match=r"upload torch_manualbp.*\.whl or \.tar\.gz"):
        exec(code.split("    pip = ")[0], namespace)
    (tmp_path / "torch_manualbp-0.1.0-cp310-abi3-linux_x86_64.whl").touch()
    exec(code.split("    pip = ")[0], namespace)
    assert namespace["archives"] == ["torch_manualbp-0.1.0-cp310-abi3-linux_x86_64.whl"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "error"), [("1 / 0", "ZeroDivisionError"), ("import warnings; warnings.warn('x')", "stderr")]
)
def test_a_cell_that_fails_or_warns_is_an_error(code, error, tmp_path):
    page = page_of(tmp_path, f"```python\n{code}\n```\n")
    script = f"""if True:
        import sys
        sys.path.insert(0, {str(SCRIPT.parent)!r})
        from pathlib import Path
        import notebooks
        notebooks.execute(notebooks.convert(Path({str(page)!r})))"""
    result = subprocess.run(**python(script), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert error in result.stderr


# --- the site ---------------------------------------------------------------------------------------------------------


class Page:
    """What mkdocs gives to the hook, of a page."""

    def __init__(self, path):
        self.file = type("File", (), {"abs_src_path": str(path), "src_uri": str(path.relative_to(ROOT / "docs"))})


def test_each_chapter_links_to_its_notebook():
    for name, path in CHAPTERS.items():
        title, blank, link, *_ = notebooks.on_page_markdown(path.read_text(), page=Page(path)).split("\n")
        assert (title[:2], blank) == ("# ", "")
        assert f"]({name}.ipynb)" in link
    other = ROOT / "docs" / "index.md"
    assert notebooks.on_page_markdown("# Title\n", page=Page(other)) == "# Title\n"
