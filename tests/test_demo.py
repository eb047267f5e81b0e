"""`python -m torch_manualbp.demo` prints what it measures, on any terminal."""

import re
import subprocess
import sys
import time

import pytest
import torch

from helpers import python
from torch_manualbp import demo


def printed(capsys):
    demo.demo(seconds=0)
    return capsys.readouterr().out


def test_it_shows_speed_a_trace_and_a_diagnosis(capsys, monkeypatch):
    monkeypatch.setattr(demo, "_NETWORKS", (([3, 8, 8, 1], 16), ([4, 2], 5)))
    state = torch.get_rng_state()
    text = printed(capsys)
    assert torch.equal(torch.get_rng_state(), state)
    ratio = r"\d+\.\d\d× \(\d+\.\d\d–\d+\.\d\d\)"
    assert re.search(rf"^3–8×2–1 +16 +\S+ ms +{ratio} +{ratio}$", text, re.MULTILINE)
    assert re.search(rf"^4–2 +5 +\S+ ms +{ratio} +{ratio}$", text, re.MULTILINE)
    assert f"{torch.get_num_threads()} thread(s)" in text
    assert float(re.search(r"Gradients differ from eager's by at most (\S+) of", text)[1]) < 1e-5
    assert "∂ℓ_i/∂f_1 = 2(f_1 − y_i)" in text
    assert float(re.search(r"at most (\S+) from float64 autograd", text)[1]) < 1e-5
    assert "as PyTorch initialises it: vanishing: the gradient of the first layer is" in text
    assert "kaiming_normal_: nothing found" in text


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_the_ratios_are_those_of_the_steps(slow, capsys, monkeypatch):
    # By a clock on which one of the steps takes 10 ms and the others 1 ms.
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def steps(sizes, batch):
        def step(seconds):
            now[0] += seconds
            return [torch.ones(1)]

        return [lambda k=k: step(0.01 if k == slow else 0.001) for k in range(3)]

    monkeypatch.setattr(demo, "_steps", steps)
    monkeypatch.setattr(demo, "_NETWORKS", (([4, 2], 5),))
    row = next(line for line in printed(capsys).splitlines() if line.startswith("4–2"))
    eager, fused, one_call = (float(number) for number in re.findall(r"([\d.]+)(?: ms|×)", row))
    times = [10 if k == slow else 1 for k in range(3)]
    assert [eager, fused, one_call] == pytest.approx([times[0], times[0] / times[1], times[0] / times[2]])


def test_each_way_is_timed_in_each_round_and_another_one_begins(monkeypatch):
    calls = []
    steps = [lambda k=k: calls.append(k) for k in range(3)]
    monkeypatch.setattr(demo, "_SAMPLE_SECONDS", 0.0)  # one call a sample
    rounds = demo._rounds(steps, 0)
    assert calls[9:] == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2, 1, 2, 0]  # after the first nine, which are not counted
    assert [len(samples) for samples in rounds] == [3] * 5


def test_the_three_ways_compute_the_same_gradients():
    torch.manual_seed(0)
    eager, fused, one_call = (step() for step in demo._steps([3, 8, 8, 1], 16))
    for other in (fused, one_call):
        torch.testing.assert_close(other, eager)


@pytest.mark.parametrize(("load", "said"), [(0.1, False), (3.21, True)])
def test_it_says_whether_the_machine_was_busy(load, said, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_NETWORKS", (([4, 2], 5),))
    monkeypatch.setattr(demo.os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert (f"load average {load:.1f}" in printed(capsys)) is said


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_it_runs_as_a_program_on_any_terminal(encoding):
    process = python("", PYTHONIOENCODING=encoding, OMP_NUM_THREADS="1")
    process["args"] = [sys.executable, "-W", "error", "-c", "from torch_manualbp.demo import demo; demo(0)"]
    result = subprocess.run(**process, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    text = result.stdout.decode(encoding)
    assert ("∂ℓ_i/∂f_1" if encoding == "utf-8" else "dl_i/df_1") in text
    assert re.search(r"^17.64.2.6 +64 ", text, re.MULTILINE)
