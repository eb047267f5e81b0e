"""The metadata of a release is consistent, its archives are complete, and SECURITY.md is true.

`make release-check` tries the release itself, which takes minutes; nothing is built or downloaded here.
"""

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

import torch_manualbp
from helpers import run_python

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("check_dist", ROOT / "_build" / "check_dist.py")
check_dist = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_dist)

SEMANTIC = r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)((a|b|rc|\.dev)\d+)?"  # with pre-releases as in PEP 440


def test_version_is_semantic_and_written_once():
    version = torch_manualbp.__version__
    assert re.fullmatch(SEMANTIC, version)
    assert 'version = { attr = "torch_manualbp.__version__" }' in (ROOT / "pyproject.toml").read_text()
    for name in ("pyproject.toml", "setup.py", "_build/backend.py", "mkdocs.yml", "Makefile"):
        assert not re.search(rf"(?<![\w.=]){re.escape(version)}(?![\w.])", (ROOT / name).read_text()), name


def test_newest_section_of_the_changelog_is_of_this_version():
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [section for section in sections if section != "Unreleased"]
    assert released[0] == torch_manualbp.__version__
    assert sections[0] in ("Unreleased", released[0])
    numbers = [tuple(map(int, re.match(r"(\d+)\.(\d+)\.(\d+)", section).groups())) for section in released]
    assert numbers == sorted(set(numbers), reverse=True)


def test_citation_is_valid_and_of_this_version():
    # Parses the subset of Citation File Format 1.2.0 in this file: top-level keys, and lists of one-line items.
    text = (ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r"^([a-z-]+):(?: (.+))?$", text, re.MULTILINE))
    allowed = {"cff-version", "message", "type", "title", "abstract", "authors", "version", "license", "keywords"}
    assert set(fields) == allowed, "each key at the start of a line is one that the format has"
    assert all(re.match(r"[a-z-]+:|  (- )?\S", line) for line in text.splitlines())
    assert fields["cff-version"] == "1.2.0"
    assert fields["type"] == "software"
    assert fields["title"] == "torch_manualbp"
    assert fields["version"] == torch_manualbp.__version__
    assert f'license = "{fields["license"]}"' in (ROOT / "pyproject.toml").read_text()
    assert "\nauthors:\n  - name: The torch_manualbp contributors\n" in text
    keywords = re.findall(r"^  - (.+)$", text.partition("\nkeywords:\n")[2], re.MULTILINE)
    assert len(keywords) == len(set(keywords)) > 0


def test_tools_that_check_a_release_are_pinned():
    checked = {"lint", "docs", "notebooks", "release"}
    extras = dict(re.findall(r"^(\w+) = \[(.+)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    extras = {extra: tools for extra, tools in extras.items() if extra in checked}
    assert set(extras) == checked
    for extra, tools in extras.items():
        for tool in re.findall(r'"(.+?)"', tools):
            assert re.fullmatch(r"[\w-]+==[\d.]+", tool), f"{extra}: {tool}"


# --- the archives -------------------------------------------------------------------------------------------------

TRACKED = {"pyproject.toml", "csrc/ops.cpp", "tests/helpers.py", "torch_manualbp/__init__.py"}
SDIST = {*TRACKED, "PKG-INFO", "setup.cfg", "torch_manualbp.egg-info/SOURCES.txt"}
WHEEL = {"torch_manualbp/__init__.py", check_dist.BINARY} | {
    f"torch_manualbp-1.2.3.dist-info/{name}" for name in check_dist.METADATA
}
TAG = "cp310-abi3-linux_x86_64"


def write(folder, sdist=SDIST, wheel=WHEEL, tag=TAG, content=b""):
    with tarfile.open(folder / "torch_manualbp-1.2.3.tar.gz", "w:gz") as tar:
        for name in sorted(sdist):
            tar.addfile(tarfile.TarInfo(f"torch_manualbp-1.2.3/{name}"), io.BytesIO())
    with zipfile.ZipFile(folder / f"torch_manualbp-1.2.3-{tag}.whl", "w") as archive:
        for name in sorted(wheel):
            archive.writestr(name, content)
    return list(check_dist.problems(folder, TRACKED, "1.2.3"))


def test_complete_archives_pass(tmp_path):
    assert write(tmp_path) == []
    assert write(tmp_path, wheel=WHEEL | {"torch_manualbp/_C_cuda.abi3.so"}) == []


@pytest.mark.parametrize(
    ("archives", "message"),
    [
        ({"sdist": SDIST - {"csrc/ops.cpp"}}, "lacks csrc/ops.cpp"),
        ({"sdist": SDIST | {"torch_manualbp/_C.abi3.so"}}, "should not hold torch_manualbp/_C.abi3.so"),
        ({"wheel": WHEEL - {check_dist.BINARY}}, "lacks torch_manualbp/_C.abi3.so"),
        ({"wheel": WHEEL - {"torch_manualbp/__init__.py"}}, "lacks torch_manualbp/__init__.py"),
        ({"wheel": WHEEL - {"torch_manualbp-1.2.3.dist-info/licenses/LICENSE"}}, "lacks .*licenses/LICENSE"),
        ({"wheel": WHEEL | {"tests/helpers.py"}}, "should not hold tests/helpers.py"),
        ({"tag": "cp311-cp311-linux_x86_64"}, "is not tagged cp310-abi3"),
        ({"content": bytes(300_000)}, "the limit is 2,000,000"),
    ],
)
def test_a_fault_of_an_archive_is_named(tmp_path, archives, message):
    (problem,) = write(tmp_path, **archives)
    assert re.search(message, problem)


def test_archives_of_another_version_are_refused(tmp_path):
    write(tmp_path)
    found = list(check_dist.problems(tmp_path, TRACKED, "1.2.4"))
    assert re.search(r"should hold torch_manualbp-1\.2\.4\.tar\.gz and no other", found[0])
    assert re.search(r"should hold one wheel, of version 1\.2\.4", found[1])


# --- what stops a release before anything is built ----------------------------------------------------------------

INIT = '__version__ = "1.2.3"\n'
NOTES = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3]\n\n- all\n\n## [1.2.2]\n"


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.invalid"]
    subprocess.run(["git", *identity, "-C", folder, *arguments], check=True, capture_output=True)


def release_check(tmp_path, init=INIT, notes=NOTES, change=None, tag=None):
    """The output of `.ci/release-check` in a repository with only these two files, so that nothing can be built."""
    (tmp_path / "torch_manualbp").mkdir()
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "release-check").write_text((ROOT / ".ci" / "release-check").read_text())
    (tmp_path / "torch_manualbp" / "__init__.py").write_text(init)
    (tmp_path / "CHANGELOG.md").write_text(notes)
    git(tmp_path, "init", "-q")
    if tag:
        git(tmp_path, "commit", "-q", "--allow-empty", "-m", "Earlier")
        git(tmp_path, "tag", tag)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "All")
    if change:
        (tmp_path / "new").write_text(change)
    command = ["bash", tmp_path / ".ci" / "release-check"]
    environment = {name: value for name, value in os.environ.items() if name != "REHEARSAL"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ({"change": "x"}, "there are uncommitted changes"),
        ({"init": INIT.replace("1.2.3", "1.2.4")}, r"__version__ is 1\.2\.4, but the newest section .* is \[1\.2\.3\]"),
        ({"init": INIT.replace("1.2.3", "1.2.2")}, r"__version__ is 1\.2\.2, but the newest section .* is \[1\.2\.3\]"),
        (
            {"notes": NOTES.replace("## [1.2.3]", "- new\n\n## [1.2.3]")},
            r"CHANGELOG.md has entries under \[Unreleased\]",
        ),
        ({"tag": "v1.2.3"}, r"the tag v1\.2\.3 is on another commit"),
    ],
)
def test_release_check_refuses_what_cannot_be_a_release(tmp_path, repository, message):
    result = release_check(tmp_path, **repository)
    assert result.returncode == 1
    assert re.search(message, result.stderr)
    assert "cloned to" not in result.stdout


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_release_check_goes_on_where_nothing_is_against_it(tmp_path):
    result = release_check(tmp_path, tag="v1.2.2")
    assert "cloned to" in result.stdout
    assert result.returncode != 0  # because nothing can be built


# --- SECURITY.md --------------------------------------------------------------------------------------------------

WATCHED = """
import json, sys, torch
events = []
def hook(event, args):
    if event == "open" and isinstance(args[0], str):
        write = isinstance(args[1], str) and set(args[1]) & set("wax+")
        event = "written: " + args[0] if write else "read: " + args[0]
    events.append(event)
sys.addaudithook(hook)
import torch_manualbp as mbp
model, x, y = mbp.fuse(mbp.MLP([4, 8, 3])), torch.randn(5, 4), torch.randint(3, (5,))
torch.nn.functional.cross_entropy(model(x), y).backward()
model.loss_backward(x, y, "cross_entropy")
mbp.trace(model, x, y, "cross_entropy").verify()
mbp.gradient_flow(model, x, y, "cross_entropy")
mbp.clipped_gradients(model, x, y, 1.0, "cross_entropy")
mbp.memory(model, 10)
print(json.dumps(sorted(set(events))))
"""


def test_a_training_step_reaches_no_network_no_process_no_pickle_and_writes_no_file():
    # Python reports these events to an audit hook (PEP 578): https://docs.python.org/3/library/audit_events.html
    result = run_python(WATCHED, PYTHONDONTWRITEBYTECODE="1")
    assert result.returncode == 0, result.stderr
    events = set(json.loads(result.stdout))
    assert "import" in events  # the hook works
    assert any(event.startswith("read: ") for event in events)
    kinds = ("socket", "urllib", "http", "ftplib", "subprocess", "os.system", "os.exec", "os.posix_spawn", "os.fork")
    for event in events:
        assert not event.startswith((*kinds, "pickle", "marshal.dump", "written: ")), event
    assert not any(event in {"os.remove", "os.rename", "os.mkdir", "shutil.copyfile"} for event in events)


def test_security_policy_names_every_variable_that_the_library_reads():
    sources = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("torch_manualbp/**/*.py")]
    text = "".join(path.read_text() for path in sources)
    read = set(re.findall(r'(?:getenv\(|environ\.get\(|environ\[)"(\w+)"', text))
    policy = (ROOT / "SECURITY.md").read_text()
    assert read
    assert read == set(re.findall(r"MANUALBP_\w+", policy))


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_targets_of_make_install_the_extras_that_they_need(tmp_path):
    rules = re.findall(r"^[\w-]+:(?!=)(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = {name for rule in rules for name in re.findall(r"\$\(VENV\)/\.(\w+)", rule)} - {"ready"}
    extras |= set(re.findall(r"^make \.venv/\.(\w+)", (ROOT / ".ci" / "release-check").read_text(), re.MULTILINE))
    assert {"lint", "audit", "release"} <= extras
    command = ["make", "-n", f"VENV={tmp_path}", *(f"{tmp_path}/.{name}" for name in sorted(extras))]
    plan = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert set(re.findall(r"installing the extra '(\w+)'", plan)) == extras
