"""The examples run as a user runs them, and print and draw what they promise. No times are judged."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import torch_manualbp as mbp

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name, folder, *arguments, launcher=("-W", "error")):
    env = {**os.environ, "PYTHONPATH": str(Path(mbp.__file__).parent.parent)}
    command = [sys.executable, *launcher, EXAMPLES / name, *arguments]
    return subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True)


def numbers(line):
    return [float(number) for number in re.findall(r"\d+\.\d+(?:e-?\d+)?", line)]


def row(result, start):
    return numbers(next(line for line in result.stdout.splitlines() if line.startswith(start)))


def test_train_digits_learns_what_the_plain_network_learns(tmp_path):
    result = run_example("train_digits.py", tmp_path, "--epochs", "5")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no warning, and no progress bar where nobody watches
    accuracy, loss, _ = row(result, "torch_manualbp.MLP")
    assert accuracy >= 97
    assert [accuracy, loss] == pytest.approx(row(result, "nn.Sequential")[:2], rel=0.01)  # should a ReLU flip
    assert row(result, "largest difference")[0] < 1e-2
    figure = (tmp_path / "train_digits.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 10_000


def test_train_digits_agrees_in_float64_and_fails_if_the_accuracy_is_too_low(tmp_path):
    result = run_example("train_digits.py", tmp_path, "--epochs", "1", "--dtype", "float64", "--output", "a/b.png")
    assert result.returncode == 1
    assert "below the required 97%" in result.stderr
    assert row(result, "torch_manualbp.MLP")[:2] == row(result, "nn.Sequential")[:2]
    assert row(result, "largest difference")[0] < 1e-13
    assert (tmp_path / "a" / "b.png").exists()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch is built without gloo")
def test_distributed_training_gives_the_gradients_of_one_process_in_every_way(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = run_example("distributed_training.py", tmp_path, launcher=launcher)
    assert result.returncode == 0, result.stderr
    for way in ("ddp ", "fsdp", "tp  ", "pp  "):
        first_loss, last_loss, difference = row(result, way)
        assert last_loss < first_loss / 2
        assert difference < 1e-13


def test_distributed_training_says_how_it_is_started(tmp_path):
    result = run_example("distributed_training.py", tmp_path, launcher=[])
    assert result.returncode == 2
    assert "start it with: torchrun --nproc-per-node 2" in result.stderr
