"""The code in README.md and in docs/ runs, page by page, and prints the output shown below it; the course is complete."""

import ast
import contextlib
import doctest
import importlib.util
import inspect
import io
import itertools
import operator
import pydoc
import re
import warnings
from pathlib import Path
from types import FunctionType
from xml.etree import ElementTree

import pytest
import torch

import torch_manualbp as mbp
from torch_manualbp import autograd, compile_backend, demo, info, lecture, reference

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Internals of the compiler backend, and what `python -m` calls; neither is meant for users.
UNLISTED = {compile_backend: {"Chain", "Layer", "OPTIONS", "find_chains"}, info: {"main"}}
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

# A block of Python, and the block of text right after it with its output, if it prints. Before it, a comment can name
# the libraries that it needs besides those of the extra `test`: <!-- needs: skorch -->
BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>[^\n]+?) -->\n\n)?"
    r"^```python\n(?P<code>.*?)^```\n(?:\n*^```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
WIDTH = 88  # what fits beside the two lists in a window of 1280 pixels


def name(page):
    return str(page.relative_to(ROOT))


def run(block, page, namespace):
    """The output of a block. Tracebacks name the page and the line in it."""
    lines_before = block.string[: block.start("code")].count("\n")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * lines_before + block["code"], page, "exec"), namespace)
    return printed.getvalue()


def blocks(page):
    """The blocks of Python of a page, by the libraries that they need (None: no others)."""
    found = {}
    for block in BLOCK.finditer(page.read_text()):
        found.setdefault(block["needs"], []).append(block)
    assert sum(map(len, found.values())) == page.read_text().count("```python")
    return found


BLOCKS = [(page, needs) for page in PAGES for needs in blocks(page)]


@pytest.mark.parametrize(
    ("page", "needs"), BLOCKS, ids=[name(page) + (f"-{needs}" if needs else "") for page, needs in BLOCKS]
)
def test_code_runs_and_prints_what_the_page_says(page, needs, tmp_path, monkeypatch):
    if needs:
        warnings.simplefilter("ignore")  # those of other libraries; pytest restores the filters
        for library in needs.split(", "):
            pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)  # some save a figure
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    for block in blocks(page)[needs]:
        got, want = run(block, page, namespace), block["output"] or ""
        same = doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS)  # "..." stands for anything
        assert same, f"{name(page)} says\n{want}but this prints\n{got}"


def quoted(page):
    """The blocks of a page, whatever their language, and of the files that it includes."""
    text = page.read_text()
    for file in re.findall(r"<!-- include: (\S+) -->", text):
        text += (ROOT / file).read_text()
    return re.findall(r"^ *```.*?\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if quoted(page)], ids=name)
def test_no_block_of_a_page_is_cut_in_a_window_of_1280_pixels(page):
    lines = [line for block in quoted(page) for line in block.splitlines()]
    assert [line for line in lines if len(line) > WIDTH] == []


def test_every_example_is_in_the_gallery():
    gallery = (DOCS / "examples.md").read_text()
    commands = re.findall(r"examples/(\w+\.py)", "".join(quoted(DOCS / "examples.md")))
    assert sorted(commands) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))
    entries = gallery.split("\n## ")[1:]
    assert len(entries) == len(commands)
    for entry in entries:
        assert "](figures/" in entry
        assert "](lecture/" in entry or "](howto/" in entry  # where it is explained
        assert "extra `demo`" in entry or "nothing else" in entry


# --- the course -------------------------------------------------------------------------------------------------------


CHAPTERS = [page for page in sorted((DOCS / "lecture").glob("*.md")) if page.name != "index.md"]
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"^ *\$\$\n(?P<block>.*?)^ *\$\$$|\$(?P<inline>[^$]+)\$", re.MULTILINE | re.DOTALL)


def table(header):
    """The cells of the table of docs/lecture/index.md whose first line starts with `header`, row by row."""
    lines = (DOCS / "lecture" / "index.md").read_text().split(f"| {header} |")[1].splitlines()[2:]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [
        [cell.strip() for cell in re.split(r"(?<=\s)\|(?=\s)", line.removeprefix("|").removesuffix("|"))]
        for line in rows
    ]


def anchors(page):
    """The anchors of a page: its headings, as Markdown's extension `toc` makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_each_slide_has_a_page_code_and_a_figure():
    slides = []
    for row in table("slides"):
        assert len(row) == 5
        assert all(row)
        numbers, _, page, code, figure = row
        for part in numbers.split(", "):
            first, last = map(int, (part if "–" in part else f"{part}–{part}").split("–"))
            slides += range(first, last + 1)
        file, anchor = re.fullmatch(r"\[.+\]\(([^)#]*)#([^)]+)\)", page).groups()
        page = DOCS / "lecture" / (file or "index.md")
        assert anchor in anchors(page)
        if figure == "printed":
            assert "```text" in page.read_text()
        else:
            assert (DOCS / "lecture" / re.fullmatch(r"\[.+\]\((\S+\.png)\)", figure)[1]).exists()
        names = re.findall(r"`([\w.]+)", code)
        assert names
        for name in names:
            owner = {"Trace": mbp.inspection.trace, "ToyNetwork": lecture}.get(name.split(".")[0], mbp)
            name = name.removeprefix("torch_manualbp.")
            assert name == "activations" or operator.attrgetter(name)(owner) is not None  # an option of MLP
    assert sorted(slides) == list(range(1, 63))  # the lecture has 62 slides


def test_what_the_notation_names_exists_and_has_the_shape_that_it_says():
    B, widths, k = 5, [3, 4, 6, 2], 1
    model = mbp.MLP(widths)
    t = mbp.trace(model, torch.randn(B, widths[0]), torch.randn(B, widths[-1]))
    sizes = {"B": B, "D_0": widths[0], "D_k": widths[k], "D_{k+1}": widths[k + 1], "D_K": widths[-1]}
    compared = 0
    for row in table("symbol"):
        assert len(row) == 4
        assert all(row)
        symbol, _, shape, code = row
        assert re.fullmatch(r"\$[^$]+\$", symbol)
        if code in {"`*`", "`lr`"}:
            continue
        value = eval(code.strip("`"), {"t": t, "k": k, "model": model, "torch": torch, "z": t.f[k]})
        if shape == "a number" or shape.startswith("$"):
            named = [] if shape == "a number" else shape.strip("$").split(r" \times ")
            assert tuple(value.shape) == tuple(sizes[size] for size in named), row
            compared += 1
    assert compared == 14


@pytest.mark.parametrize("page", [*CHAPTERS, DOCS / "lecture" / "index.md"], ids=name)
def test_formulas_of_the_lecture_are_in_latex(page):
    text = CODE.sub("", page.read_text())
    for formula in FORMULA.finditer(text):
        if formula["inline"]:
            assert "\n" not in formula["inline"]  # GitHub and Jupyter want it on one line
        assert "|" not in formula[0]  # it would end the cell of a table; LaTeX has \Vert
    rest = FORMULA.sub("", text)
    assert "$" not in rest
    rest = re.sub(
        r"\]\([^)]*\)|\]\[[^\]]*\]|^!\[.*", "]", rest, flags=re.MULTILINE
    )  # targets of links, texts of figures
    assert re.findall(r"[∂ℓΣΩωβφαψθ⊙ᵀ²‖√−←]|(?<!\w)[A-Za-z]_\w", rest) == []


@pytest.mark.parametrize("page", CHAPTERS, ids=name)
def test_each_chapter_has_exercises_whose_answers_are_computed(page):
    exercises = page.read_text().split("\n## Exercises\n")[1]
    questions, answers = re.fullmatch(
        r"(.*)<details markdown=\"1\"><summary>Answers</summary>\n(.*)\n</details>\n*", exercises, re.DOTALL
    ).groups()
    _, *answers = re.split(r"^\*\*(\d)\.\*\* ", answers, flags=re.MULTILINE)
    numbers = re.findall(r"^(\d)\. ", questions, re.MULTILINE)
    assert len(numbers) >= 2
    assert answers[::2] == numbers
    for answer in answers[1::2]:
        assert BLOCK.search(answer)["output"]  # what it says is compared with what it prints by the first test


@pytest.fixture(scope="module")
def hooks():
    """docs/hooks.py. It needs the extra `docs`, without which the site cannot be built."""
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [*CHAPTERS, DOCS / "lecture" / "index.md"], ids=name)
def test_formulas_become_mathml(page, hooks):
    formulas = list(FORMULA.finditer(CODE.sub("", page.read_text())))
    assert formulas
    for formula in formulas:
        math = ElementTree.fromstring(hooks.mathml(formula["block"] or formula["inline"]))
        assert math.tag == "{http://www.w3.org/1998/Math/MathML}math"
        assert len("".join(math.itertext())) > 0
        tags = {element.tag.partition("}")[2] for element in math.iter()}
        assert ("mfrac" in tags) == ("frac{" in formula[0])
        assert ("mtable" in tags) == (r"\begin{" in formula[0])


def test_a_formula_is_typeset_as_in_latex(hooks):
    math = hooks.mathml(r"\partial\ell/\partial\Omega_k = \max(0, \omega_k)")
    assert '<mi mathvariant="normal">&#x02202;</mi>' in math  # upright, and without the space around an operator
    assert '<mi mathvariant="normal">&#x003A9;</mi>' in math
    assert "<mi>&#x003C9;</mi>" in math
    assert '<mo lspace="0" rspace="0">/</mo>' in math
    assert "<mi>max</mi>" in math


def test_what_belongs_together_stays_on_a_line(hooks):
    html = hooks.on_page_content("<p>12 % of 784–512×2–10, 3 rows on 2026-11-26, 38 / 40</p><pre>1 ms</pre>")
    assert html == (
        '<p>12&nbsp;% of <span class="together">784–512×2–10</span>, 3 rows on '
        '<span class="together">2026-11-26</span>, 38&nbsp;/&nbsp;40</p><pre>1 ms</pre>'
    )


def test_a_long_cell_of_a_table_is_marked(hooks):
    short, long = "<td>1.04×</td>", '<td style="text-align: left;">the layers of the policy, and the optimizer</td>'
    assert hooks.on_page_content(short) == short
    assert hooks.on_page_content(long) == long.replace("<td", "<td data-long")


def test_names_in_headings_may_break_after_a_dot(hooks):
    html = '<h2 id="a.b">class <span>a.b.Name</span> 1.5</h2><p>a.b</p>'
    assert hooks.on_page_content(html) == html.replace("a.b.Name", "a.<wbr>b.<wbr>Name")


@pytest.mark.parametrize("latex", [r"\unknown{x}", r"\begin{aligned} a &= b \end{aligned}", r"\notacommand"])
def test_a_formula_that_cannot_be_typeset_stops_the_site(latex, hooks):
    with pytest.raises(ValueError, match="cannot be typeset"):
        hooks.mathml(latex)


def test_code_keeps_its_dollars_and_formulas_their_place(hooks):
    markdown = pytest.importorskip("markdown")
    text = "In `a $x$ b` and ($h_k$), but $K$.\n\n```\n$f_k$\n```\n\n$$\nk < K\n$$\n\nh_{k+1}\n"
    extensions = {"pymdownx.superfences": {}, "pymdownx.arithmatex": {"generic": True}}
    html = markdown.markdown(text, extensions=list(extensions), extension_configs=extensions)
    html = hooks.on_page_content(html)
    assert "<code>a $x$ b</code>" in html
    assert "$f_k$" in html
    assert re.search(r'<span class="math"><math [^>]*display="inline">.*?</math>\)', html)
    assert re.search(r'<div class="math"><math [^>]*display="block">.*?</math></div>', html)
    assert html.count("<math") == 3
    assert "h<sub>k+1</sub>" in html


# --- the reference ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("path", sorted(described()))
def test_no_example_of_the_reference_is_cut_in_a_window_of_1280_pixels(path):
    shown = [pydoc.locate(path)]
    if inspect.ismodule(shown[0]) or inspect.isclass(shown[0]):
        names = public_names(shown[0]) if inspect.ismodule(shown[0]) else vars(shown[0])
        shown += [getattr(shown[0], name) for name in names if not name.startswith("_")]
    for thing in shown:
        for paragraph in re.split(r"\n *\n", inspect.getdoc(thing) or ""):
            title, *rest = paragraph.split("\n")
            code = rest if title == "Example:" else [title, *rest]
            if all(line.startswith("    ") for line in code):
                assert [line for line in code if len(line) > 4 + WIDTH] == []


def test_every_figure_is_shown_and_exists():
    shown = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+\.png)\)", page.read_text())
    }
    assert shown == set((DOCS / "figures").glob("*.png"))
