"""The benchmarks run, refuse to time wrong gradients, and write what they measured. No times are judged."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_manualbp as mbp

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def training_step(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import training_step

    monkeypatch.setattr(training_step, "SAMPLE_SECONDS", 1e-4)
    return training_step


def test_training_step_writes_table_and_samples(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(mbp.__file__).parent.parent)}
    arguments = [
        "--quick",
        "--workloads",
        "toy",
        "--threads",
        "1",
        "--json",
        "out/step.json",
        "--markdown",
        "out/step.md",
    ]
    command = [sys.executable, "-W", "error", BENCHMARKS / "training_step.py", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=env, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "step.md").read_text() == result.stdout
    rows = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert [row.split()[1] for row in rows[2:]] == ["toy", "geometric"]
    assert len({len(row) for row in rows}) == 1  # aligned

    measured = json.loads((tmp_path / "out" / "step.json").read_text())
    assert measured["fma_peak_gflops"] is None or all(rate > 0 for rate in measured["fma_peak_gflops"].values())
    assert {"machine", "instruction set", "software", "date", "command"} <= set(measured["header"])
    toy = measured["workloads"]["toy"]
    assert toy["sizes"] == [1, 1, 1, 1, 1]
    assert toy["flops"] == 22
    assert set(toy["peers"]) == {"eager", "mbp.MLP", "recompute", "MLP.loss", "loss_backward"}
    for peer in toy["peers"].values():
        assert len(peer["seconds"]) == 5
        assert peer["median_seconds"] == statistics.median(peer["seconds"]) > 0
        assert peer["repetitions"] >= 1
    pairs = zip(toy["peers"]["eager"]["seconds"], toy["peers"]["mbp.MLP"]["seconds"], strict=True)
    assert toy["peers"]["mbp.MLP"]["speedup"] == statistics.median(a / b for a, b in pairs)
    assert measured["geometric_mean"]["eager"] == pytest.approx(1)
    assert measured["geometric_mean"]["mbp.MLP"] == pytest.approx(toy["peers"]["mbp.MLP"]["speedup"])


def test_flops_by_hand(training_step):
    # f_0: 2·4·2·3 = 48, f_1: 2·4·3·1 = 24; the same for ∂ℓ/∂Ω_0 and ∂ℓ/∂Ω_1; ∂ℓ/∂h_1: 24
    assert training_step.Workload("", [2, 3, 1], 4).flops == 48 + 24 + 48 + 24 + 24


def test_workloads_are_those_of_the_file(training_step):
    assert [workload.name for workload in training_step.load_workloads()][:2] == ["toy", "rl64"]
    assert [workload.name for workload in training_step.load_workloads(["mnist", "toy"])] == ["mnist", "toy"]
    with pytest.raises(SystemExit, match="no workload is called 'tyo'; there are: toy, rl64"):
        training_step.load_workloads(["tyo"])


def test_no_example_is_near_a_relu_flip(training_step):
    model, x, _ = training_step.Workload("", [8, 256, 256, 1], 2000).build()
    assert len(x.unique(dim=0)) < len(x)  # some were, and were replaced
    h = x.double()
    for layer in model.double():
        if isinstance(layer, torch.nn.ReLU):
            assert float(h.detach().abs().min()) > 1e-6
        h = layer(h)


@pytest.mark.parametrize("wrong", [lambda grad: grad * 1.001, lambda grad: grad * float("nan")], ids=["scaled", "nan"])
def test_wrong_gradients_are_not_timed(training_step, monkeypatch, wrong):
    def broken(model, x, target):
        step = training_step.eager(model, x, target)

        def gradients():
            *others, last = step.gradients()
            return [*others, wrong(last)]

        return training_step.Step(step.run, gradients)

    monkeypatch.setitem(training_step.PEERS, "broken", broken)
    with pytest.raises(SystemExit, match=r"broken: the gradient of 2\.bias is off by"):
        training_step.measure(training_step.Workload("", [3, 4, 2], 5), ["eager", "broken"], rounds=1)


def test_a_peer_that_fails_is_reported_beside_the_others(training_step, monkeypatch):
    def failing(model, x, target):
        raise RuntimeError("no compiler")

    monkeypatch.setitem(training_step.PEERS, "failing", failing)
    workload = training_step.Workload("small", [3, 4, 2], 5)
    results = {"small": training_step.measure(workload, ["eager", "failing", "mbp.MLP"], rounds=2)}
    assert results["small"]["failing"].error == "RuntimeError: no compiler"
    assert len(results["small"]["mbp.MLP"].speedups) == 2
    row, mean = training_step.table(results, [workload], None).splitlines()[2:]
    assert [cell.strip() for cell in row.split("|")][3] == "failed"
    assert [cell.strip() for cell in mean.split("|")][3] == "–"


def test_peak_memory_of_the_one_pass_loss_is_below_eagers(tmp_path):
    figure = tmp_path / "memory.png"
    command = [sys.executable, BENCHMARKS / "peak_memory.py", "--batches", "1000", "60000", "--figure", figure]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [line.strip("|").split("|") for line in result.stdout.splitlines()]
    assert [cell.strip() for cell in rows[0]] == ["rows", "eager", "MLP, store", "MLP, recompute", "MLP.loss"]
    eager, store, recompute, one_pass = (float(cell) for cell in rows[-1][1:])
    stored = 60000 * 4 * 64 * 4 / 2**20  # h_1 ... h_4
    assert eager > store > stored > recompute > one_pass
    assert figure.stat().st_size > 0
