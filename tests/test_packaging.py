"""What is installed: metadata, the public names, and a binary that depends on no version of Python or of torch's C++.

Cheap checks only: nothing is built and nothing is downloaded here.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import torch_manualbp
from torch_manualbp import _ops

ROOT = Path(__file__).parents[1]
PUBLIC = {
    *("LinearReLU", "MLP", "__version__", "fuse", "linear_relu", "mlp", "mlp_loss", "unfuse"),
    *("GradientFlowMonitor", "gradient_flow", "memory", "trace"),
    *("clipped_gradients", "per_sample_gradient_norms", "per_sample_gradients"),
}


BINARIES = [binary for binary in (_ops.BINARY, _ops.CUDA_BINARY) if binary.exists()]


def undefined_symbols(binary: Path) -> list[str]:
    """The names that the binary takes from other libraries."""
    if not shutil.which("nm"):
        pytest.skip("nm (binutils) is not installed")
    command = ["nm", "--dynamic", "--undefined-only", str(binary)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1].split("@")[0] for line in listing.splitlines()]


def load_backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """_build/backend.py, without lasting changes to sys.path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("backend", ROOT / "_build" / "backend.py")
    assert spec is not None
    assert spec.loader is not None
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    return backend


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


@pytest.mark.parametrize("binary", BINARIES, ids=lambda binary: binary.name)
def test_binary_uses_only_the_stable_interface_of_torch(binary: Path) -> None:
    # at::, c10::, torch:: as C++ symbols: functions, methods, virtual tables, type information
    assert [name for name in undefined_symbols(binary) if re.match(r"_ZT?[A-Z]?N?K?(2at|3c10|5torch)", name)] == []


@pytest.mark.parametrize("binary", BINARIES, ids=lambda binary: binary.name)
def test_binary_does_not_know_python(binary: Path) -> None:
    assert [name for name in undefined_symbols(binary) if re.match(r"_?Py[A-Z_]", name)] == []


def test_missing_binary_is_an_import_error_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"_C\.abi3\.so is missing.*pip install"):
        _ops._load(tmp_path / "_C.abi3.so")


@pytest.mark.parametrize("kept", [0.0, 3e-5, 0.01, 0.5, 0.99], ids="{:.3%} of it".format)
def test_broken_binary_is_an_import_error_with_the_cure(tmp_path: Path, kept: float) -> None:
    # The end is missing, as after an interrupted copy: left to the dynamic loader, that kills the process.
    content = _ops.BINARY.read_bytes()
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(content[: int(len(content) * kept)])
    assert kept != 3e-5 or 4 < broken.stat().st_size < 64  # a part of its header
    with pytest.raises(ImportError, match=r"(?s)_C\.abi3\.so.*pip install"):
        _ops._load(broken)


def test_foreign_binary_is_an_import_error_with_the_cure(tmp_path: Path) -> None:
    foreign = tmp_path / "_C.abi3.so"
    foreign.write_bytes(b"not a shared object")
    with pytest.raises(ImportError, match=r"_C\.abi3\.so cannot be loaded.*pip install"):
        _ops._load(foreign)


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
def test_cuda_binary_registers_every_op() -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = ("linear_relu", "linear_relu_backward", "mlp", "mlp_backward", "mlp_loss")
    assert all(has_kernel(f"manualbp::{name}", "CUDA") for name in ops)


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
    assert backend.get_requires_for_build_sdist() == []  # a source archive is made without


def test_linters_have_the_same_versions_everywhere() -> None:
    pins = set(re.findall(r"(?:ruff|clang-format)==[\d.]+", (ROOT / "pyproject.toml").read_text()))
    assert set(re.findall(r"(?:ruff|clang-format)==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())) == pins
