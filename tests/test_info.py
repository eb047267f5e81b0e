"""`python -m torch_manualbp.info` prints correctly what a bug report needs."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_manualbp as mbp
from torch_manualbp import _ops, info


def test_info_tells_versions_machine_and_what_is_in_use():
    facts = info.info()
    assert facts["torch_manualbp"] == mbp.__version__
    assert facts["torch"] == torch.__version__
    assert "{}.{}.{}".format(*sys.version_info) in facts["python"]
    assert facts["instruction set"].split()[0] == _ops.isa()
    assert facts["extension"] == _ops.BINARY.name
    assert all(isinstance(value, str) and value for value in facts.values())


def test_info_follows_the_number_of_threads():
    torch.set_num_threads(3)
    assert info.info()["threads"] == "3"


def test_info_on_other_machines(monkeypatch, tmp_path):
    monkeypatch.setattr(_ops, "has_cuda_kernels", True)
    assert info.info()["CUDA kernels"] == _ops.CUDA_BINARY.name
    # On aarch64, /proc/cpuinfo names no model; other systems do not have this file.
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(info, "Path", lambda path: cpuinfo)
    assert info.info()["cpu"] == "aarch64"
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert info.info()["cpu"] == "aarch64"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU\n")
    assert info.info()["cpu"] == "Some CPU"


def test_main_prints_a_line_per_fact(capsys):
    info.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == list(info.info())
    assert lines[0].split() == ["torch_manualbp:", mbp.__version__]


@pytest.mark.slow
def test_module_runs_as_a_program_and_shows_the_forced_level():
    package = Path(mbp.__file__).parent.parent
    env = {**os.environ, "MANUALBP_ISA": "default", "PYTHONPATH": str(package)}
    command = [sys.executable, "-W", "error", "-m", "torch_manualbp.info"]
    out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    facts = {name: value.strip() for name, value in (line.split(":", 1) for line in out.splitlines())}
    assert facts["instruction set"].startswith("default ")
    assert facts["MANUALBP_ISA"] == "default"
    assert facts["torch"] == torch.__version__
