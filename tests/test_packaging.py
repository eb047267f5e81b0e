"""The installed package: metadata, public names, and a binary that is independent of Python's and torch's versions.

These checks are cheap: they build and download nothing.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import torch_manualbp
from torch_manualbp import _ops

ROOT = Path(__file__).parents[1]
PUBLIC = {
    *("LinearReLU", "MLP", "__version__", "fuse", "linear_relu", "mlp", "mlp_loss", "safe_globals", "unfuse"),
    *("History", "empty_cache", "fit", "train_step"),
    *("GradientFlowMonitor", "fusion_report", "gradient_flow", "memory", "trace"),
    *("clipped_gradients", "per_sample_gradient_norms", "per_sample_gradients"),
}


BINARIES = [binary for binary in (_ops.BINARY, _ops.CUDA_BINARY) if binary.exists()]


def versioned_symbols(binary: Path) -> list[str]:
    """The symbols that the binary imports from other libraries, as name@version."""
    if sys.platform == "darwin" or not shutil.which("nm"):
        pytest.skip("nm of GNU binutils is not installed")
    command = ["nm", "--dynamic", "--undefined-only", str(binary)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in listing.splitlines()]


def undefined_symbols(binary: Path) -> list[str]:
    """Their names."""
    return [name.partition("@")[0] for name in versioned_symbols(binary)]


def load_file(path: Path) -> ModuleType:
    """Imports a module that is not in a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports _build/backend.py without lasting changes to sys.path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    return load_file(ROOT / "_build" / "backend.py")


def test_version_is_that_of_the_installed_distribution() -> None:
    try:
        version = importlib.metadata.version("torch_manualbp")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("torch_manualbp is imported from its source, not installed")
    assert version == torch_manualbp.__version__


def test_public_names() -> None:
    assert set(torch_manualbp.__all__) == PUBLIC
    assert all(hasattr(torch_manualbp, name) for name in PUBLIC)


def test_type_information_is_shipped() -> None:
    assert _ops.BINARY.with_name("py.typed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("binary", BINARIES, ids=lambda binary: binary.name)
def test_binary_uses_only_the_stable_interface_of_torch(binary: Path) -> None:
    # at::, c10::, torch:: as C++ symbols: functions, methods, virtual tables, type information
    assert [name for name in undefined_symbols(binary) if re.match(r"_ZT?[A-Z]?N?K?(2at|3c10|5torch)", name)] == []


@pytest.mark.parametrize("binary", BINARIES, ids=lambda binary: binary.name)
def test_binary_does_not_know_python(binary: Path) -> None:
    assert [name for name in undefined_symbols(binary) if re.match(r"_?Py[A-Z_]", name)] == []


def test_binary_runs_with_old_glibc() -> None:
    """With that for which PyTorch's wheels are built, 2.28, wherever it has been compiled (csrc/glibc.h)."""
    versions = [re.fullmatch(r"(\w+)@+GLIBC_(\d+)\.(\d+)[.\d]*", name) for name in versioned_symbols(_ops.BINARY)]
    newer = [match[0] for match in versions if match and (int(match[2]), int(match[3])) > (2, 28)]
    assert newer == []


def test_binary_is_small() -> None:
    assert _ops.BINARY.stat().st_size < 2.9e6  # uncompressed; the wheel compresses it


# Headers and functions that macOS lacks. `make macos` compiles everything for it.
ONLY_LINUX = re.compile(
    r"#include <(linux/.*|(malloc|features|elf|link|sched|sys/auxv|sys/sysinfo|sys/prctl|sys/syscall)\.h)>"
    r"|\b(madvise|MADV_\w+|mallopt|mallinfo2?|malloc_trim|memfd_create|sched_getaffinity|__libc_\w+|secure_getenv)\b"
)


def test_what_only_linux_has_is_used_only_there() -> None:
    found = []
    for path in sorted((ROOT / "csrc").rglob("*.[ch]*")):
        conditions: list[str] = []  # of the #if around the line
        for number, line in enumerate(path.read_text().splitlines(), 1):
            directive, _, condition = line.partition(" ")
            if directive in ("#if", "#ifdef", "#ifndef"):
                conditions.append(condition if directive != "#ifndef" else "")
            elif directive in ("#else", "#elif"):
                conditions[-1] = condition
            elif directive == "#endif":
                conditions.pop()
            elif ONLY_LINUX.search(line.partition("//")[0]) and not re.search("__linux__|__GLIBC__", str(conditions)):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.slow
def test_import_takes_nothing_beyond_torch_and_the_standard_library() -> None:
    code = "import sys, torch; before = set(sys.modules); import torch_manualbp; print(*set(sys.modules) - before)"
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(_ops.BINARY.parent.parent)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert {f"torch_manualbp.{name}" for name in ("autograd", "lecture", "modules")} <= loaded
    assert {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names <= {"torch_manualbp", "torch"}
    assert not [name for name in loaded if name.startswith(("torch._dynamo", "torch._inductor"))]  # these take seconds


def test_missing_binary_is_an_import_error_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"_C\.abi3\.so is missing.*pip install"):
        _ops._load(tmp_path / "_C.abi3.so")


@pytest.mark.parametrize("kept", ["nothing", "a part of its header", "1 %", "half", "99 %"])
def test_broken_binary_is_an_import_error_with_the_cure(tmp_path: Path, kept: str) -> None:
    # Truncated, as after an interrupted copy; the dynamic loader would kill the process.
    content = _ops.BINARY.read_bytes()
    size = len(content)
    sizes = {"nothing": 0, "a part of its header": 40, "1 %": size // 100, "half": size // 2, "99 %": size * 99 // 100}
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(content[: sizes[kept]])
    with pytest.raises(ImportError, match=r"(?s)_C\.abi3\.so.*pip install"):
        _ops._load(broken)


@pytest.mark.parametrize(
    "content",
    [b"not a shared object", bytes.fromhex("cffaedfe0c000001") + bytes(56)],
    ids=["text", "Mach-O"],
)
def test_foreign_binary_is_an_import_error_with_the_cure(tmp_path: Path, content: bytes) -> None:
    foreign = tmp_path / "_C.abi3.so"
    foreign.write_bytes(content)
    assert not _ops._is_truncated(foreign)  # this can be said of ELF files only; the dynamic loader judges the others
    with pytest.raises(ImportError, match=r"_C\.abi3\.so cannot be loaded.*pip install"):
        _ops._load(foreign)


@pytest.mark.slow
def test_cuda_binary_is_loaded_only_where_torch_has_cuda(tmp_path: Path) -> None:
    package = tmp_path / "torch_manualbp"
    shutil.copytree(_ops.BINARY.parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "_C_cuda.abi3.so").write_bytes(b"not a shared object")
    command = [sys.executable, "-m", "torch_manualbp.info"]
    result = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    if torch.version.cuda:
        assert re.search(r"ImportError: .*_C_cuda\.abi3\.so cannot be loaded.*pip install", result.stderr)
    else:
        assert "compiled, but this torch has no CUDA" in result.stdout


@pytest.mark.skipif(not _ops.has_cuda_kernels, reason="the CUDA kernels are not compiled in")
def test_cuda_binary_registers_every_op_that_trains() -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = ("linear_relu", "linear_relu_backward", "mlp", "mlp_backward", "mlp_loss")
    assert all(has_kernel(f"manualbp::{name}", "CUDA") for name in ops)


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="a toolkit may fit this torch")
@pytest.mark.parametrize(
    ("force", "message"),
    [("1", r"FORCE_CUDA=1, .* is built without CUDA"), ("yes", r"FORCE_CUDA must be 0 or 1, got 'yes'")],
)
def test_a_forced_cuda_build_that_cannot_be_says_why(force: str, message: str) -> None:
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "setup.py", "--version"]
    environment = {**os.environ, "FORCE_CUDA": force}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert re.search(message, result.stderr)


def test_a_build_on_windows_says_what_to_use() -> None:
    pytest.importorskip("setuptools", minversion="77")
    code = "import runpy, sys, setuptools; sys.platform = 'win32'; runpy.run_path('setup.py', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.rstrip().endswith("Use WSL")


def test_backend_is_content_with_the_installed_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools", minversion="77")
    backend = load_backend(monkeypatch)
    assert backend.get_requires_for_build_wheel() == []
    assert backend.get_requires_for_build_editable() == []


def test_backend_asks_for_torch_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools", minversion="77")
    backend = load_backend(monkeypatch)
    monkeypatch.setattr(backend, "distributions", lambda **_: [])
    assert backend.get_requires_for_build_wheel() == ["torch>=2.10"]
    assert backend.get_requires_for_build_sdist() == []  # a source archive needs no torch


@pytest.mark.slow
def test_a_source_archive_holds_all_that_is_needed_to_build_and_test(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", ".*cache", ".hypothesis", ".venv*", "build", "dist", ".git")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    folders = ("_build", ".ci", "benchmarks", "csrc", "docs", "examples", "tests", "torch_manualbp")
    wanted = {
        str(path.relative_to(source)) for name in folders for path in (source / name).rglob("*") if path.is_file()
    }
    assert "csrc/cpu/kernels/gemm-inl.h" in wanted
    assert wanted | {"setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE"} <= packed


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (["oldest", "2.13", "2.14", "newest"], ["2.10.0", "2.13.0", "2.14.1", "2.15.0"]),
        (["newest", "2.15", "2.15.0"], ["2.15.0"]),
        (["2.9", "2.1", "3"], []),  # too old, not a prefix of 2.10, not available
    ],
)
def test_matrix_chooses_releases(wanted: list[str], chosen: list[str]) -> None:
    available = ["2.15.0", "2.14.1", "2.14.0", "2.13.0+cpu", "2.13.0", "2.10.0", "2.9.1"]
    assert load_file(ROOT / ".ci" / "matrix.py").choose(available, wanted) == chosen


def test_matrix_says_why_a_step_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = load_file(ROOT / ".ci" / "matrix.py")
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    code = (
        "import sys; print('ERROR: no such release', file=sys.stderr); print('a notice', file=sys.stderr); sys.exit(1)"
    )
    with pytest.raises(matrix.StepError, match=r"^ERROR: no such release$"):
        matrix.run(sys.executable, "-c", code)
    assert matrix.run(sys.executable, "-c", "print('fine')") == "fine\n"


def test_matrix_does_not_take_an_earlier_report_for_that_of_a_run_that_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = load_file(ROOT / ".ci" / "matrix.py")
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(matrix, "binaries", lambda wheel: {})
    earlier = '<testsuites><testsuite tests="1" failures="0" errors="0" skipped="0"/></testsuites>'
    (tmp_path / "here.xml").write_text(earlier)

    def run(*command: object, log: Path | None = None) -> str:
        if any(str(part).startswith("--junitxml") for part in command):
            raise matrix.StepError("killed")
        return ""

    monkeypatch.setattr(matrix, "run", run)
    with pytest.raises(matrix.StepError, match="killed"):
        matrix.test(tmp_path / "python", tmp_path / "wheel.whl", "here")


def test_linters_have_the_same_versions_everywhere() -> None:
    pins = set(re.findall(r"(?:ruff|clang-format)==[\d.]+", (ROOT / "pyproject.toml").read_text()))
    assert set(re.findall(r"(?:ruff|clang-format)==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())) == pins
