"""The examples run as a user runs them, and print and draw what they document. Times are not checked.

All but the one that needs two processes run in this process, since a new one takes seconds to import torch.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

import torch_manualbp as mbp

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run_example(tmp_path, monkeypatch, capsys):
    """A function(name, *arguments) that runs an example in `tmp_path` as a script of its own."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        code = 0
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    return run


@pytest.fixture
def run_drawing(run_example, tmp_path):
    """A function(name) that runs an example; it must print nothing to stderr and draw build/figure.png."""

    def run(name):
        result = run_example(name, "--output", "build/figure.png")
        assert result.returncode == 0
        assert result.stderr == ""
        assert "figure: build/figure.png" in result.stdout
        assert (tmp_path / "build" / "figure.png").read_bytes().startswith(b"\x89PNG")
        return result

    return run


def numbers(line):
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e[+-]?\d+)?", line)]


def row(result, start):
    return numbers(next(line for line in result.stdout.splitlines() if line.startswith(start)))


def test_two_examples_run_without_matplotlib(run_example, no_matplotlib, tmp_path):
    for name in ("toy_network.py", "deep_network.py"):
        result = run_example(name)
        assert result.returncode == 0
        assert result.stderr == ""
        assert "finite differences" in result.stdout
        assert result.stdout.endswith("no figure: it needs matplotlib: pip install '.[demo]'\n")
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "name",
    [
        "least_squares",
        "matrix_calculus",
        "relu",
        "initialisation",
        "train_digits",
        "why_it_does_not_train",
        "cart_pole",
    ],
)
def test_the_other_examples_say_what_they_need_before_they_start(run_example, no_matplotlib, name):
    result = run_example(f"{name}.py")
    assert "this example needs the extra `demo`: pip install '.[demo]'" in result.returncode  # sys.exit prints it
    assert result.stdout == ""


def test_deep_network_says_that_it_needs_the_data(run_example, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install '.[demo]'" in run_example("deep_network.py").returncode


def test_train_digits_learns_what_the_plain_network_learns(run_example, tmp_path):
    result = run_example("train_digits.py", "--epochs", "5")
    assert result.returncode == 0
    assert result.stderr == ""  # no warning, and no progress bar outside a terminal
    accuracy, loss, _ = row(result, "torch_manualbp.MLP")
    assert accuracy >= 97
    assert [accuracy, loss] == pytest.approx(row(result, "nn.Sequential")[:2], rel=0.01)  # in case a ReLU flips
    assert row(result, "largest difference")[0] < 1e-2
    figure = (tmp_path / "train_digits.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 10_000


def test_train_digits_agrees_in_float64_and_fails_if_the_accuracy_is_too_low(run_example, tmp_path):
    result = run_example("train_digits.py", "--epochs", "1", "--dtype", "float64", "--output", "a/b.png")
    assert result.returncode == 1
    assert "below the required 97%" in result.stderr
    assert row(result, "torch_manualbp.MLP")[:2] == row(result, "nn.Sequential")[:2]
    assert row(result, "largest difference")[0] < 1e-13
    assert (tmp_path / "a" / "b.png").exists()


def test_least_squares_finds_the_minimum(run_drawing):
    result = run_drawing("least_squares.py")
    assert row(result, "largest difference to autograd")[0] < 1e-12
    assert row(result, "gradient descent") == row(result, "closed form")
    assert row(result, "SGD")[2] == pytest.approx(row(result, "closed form")[2], rel=0.01)


def test_toy_network_prints_the_lecture_and_agrees_four_ways(run_drawing):
    result = run_drawing("toy_network.py")
    names = [line.split("=")[0].strip() for line in result.stdout.splitlines() if line.startswith("  ")]
    forward = ["x", "y", "f0", "h1", "f1", "h2", "f2", "h3", "f3", "ℓ"]
    backward = [f"∂ℓ/∂{name}" for name in ("f3", "h3", "f2", "h2", "f1", "h1", "f0")]
    assert names == [*forward, *backward, *(f"∂ℓ/∂{symbol}{k}" for symbol in "ωβ" for k in range(4))]
    assert row(result, "equal to the kernels")[0] < 1e-14
    assert row(result, "equal to autograd")[0] < 1e-14
    assert row(result, "equal to finite differences")[0] < 1e-8


def test_matrix_calculus_holds(run_drawing):
    result = run_drawing("matrix_calculus.py")
    assert result.stdout.count("True") == 6
    assert "False" not in result.stdout
    assert "∂f/∂h (4, 3), rows are variables" in result.stdout


def test_deep_network_is_traced_and_verified(run_drawing):
    result = run_drawing("deep_network.py")
    before, after = row(result, "loss of this batch")
    assert after < before / 2
    assert row(result, "a step with the traced gradients")[0] < 1e-15
    autograd, finite = row(result, "largest difference to autograd")
    assert autograd < 1e-12
    assert finite < 1e-5


def test_relu_prints_the_values_and_the_slopes(run_drawing):
    result = run_drawing("relu.py")
    assert result.stdout.splitlines()[:3] == [
        "z = -1.0   a[z] = 0.0   derivative 0",
        "z =  0.0   a[z] = 0.0   derivative 0",
        "z =  1.0   a[z] = 1.0   derivative 1",
    ]


def test_initialisation_measures_what_is_predicted(run_drawing):
    result = run_drawing("initialisation.py")
    for name, factor in (("Var = 1/2D", 0.5), ("He", 1.0), ("Var = 8/D", 2.0)):
        line = next(line for line in result.stdout.splitlines() if line.startswith(name))
        assert float(line[26:34]) == pytest.approx(factor)
        measured, predicted = (float(text) for text in re.search(r"(\S+) \((\S+)\)$", line).groups())
        assert predicted == pytest.approx(factor**49, rel=0.05)
        assert 0.2 < measured / predicted < 5


def test_why_it_does_not_train_finds_what_was_built_in(run_example, tmp_path):
    result = run_example("why_it_does_not_train.py", "--steps", "150", "--flow", "flow.png")
    assert result.returncode == 0
    assert result.stderr == ""
    for start, word in (
        ("too small", "vanishing"),
        ("too large", "exploding"),
        ("biases too low", "dead"),
        ("He", "nothing"),
    ):
        assert word in next(line for line in result.stdout.splitlines() if line.startswith(start))
    assert row(result, "He")[-1] < 0.5 < row(result, "too small")[-1]  # only one of them trains
    for figure in ("why_it_does_not_train.png", "flow.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_cart_pole_learns_what_the_plain_loop_learns(run_example, tmp_path):
    result = run_example("cart_pole.py", "--plain", "--output", "build/cart_pole.png")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert row(result, "torch_manualbp")[0] > 450  # moves of at most 500
    assert row(result, "plain PyTorch")[0] > 450
    same = re.search(r"the first (\d+) of (\d+) episodes are the same", result.stdout)
    assert int(same[1]) >= 50  # more than half of them after the first training step
    assert int(same[2]) > 100
    assert (tmp_path / "build" / "cart_pole.png").read_bytes().startswith(b"\x89PNG")


def test_cart_pole_fails_if_the_pole_falls(run_example, tmp_path):
    result = run_example("cart_pole.py", "--moves", "130", "--json", "numbers.json")  # ten training steps
    assert result.returncode == 1
    assert "fewer than the required 400" in result.stderr
    assert "plain PyTorch" not in result.stdout
    assert (tmp_path / "cart_pole.png").exists()
    (loop,) = json.loads((tmp_path / "numbers.json").read_text())
    assert loop["moves"] == 130
    assert len(loop["episodes"]) > 8


def test_the_poles_obey_the_physics_of_cart_and_pole(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from cart_pole import LONGEST, CartPoles

    carts = CartPoles(3, np.random.default_rng(0))
    carts.states[:] = [[0, 0, 0, 0], [2.39, 1, 0, 0], [0, 0, 0.1, 0]]
    carts.age[:] = [0, 3, LONGEST - 1]
    observations, rewards, fell = carts.move(np.array([True, True, False]))
    assert fell.tolist() == [False, True, False]
    assert carts.age.tolist() == [1, 0, 0]  # the second pole fell, the third was up for long enough
    # 10 N on 1.1 kg: from rest, the cart accelerates by 0.05 kg m times the pole's angular acceleration more
    turn = -(10 / 1.1) / (0.5 * (4 / 3 - 0.1 / 1.1))
    velocity = 0.02 * (10 / 1.1 - 0.05 * turn / 1.1)
    np.testing.assert_allclose(observations[0] / carts.scale, [0, velocity, 0, 0.02 * turn], rtol=1e-6)
    np.testing.assert_allclose(rewards, [0, -1 - 0.01 * 2.41, 0], rtol=1e-12)
    assert (abs(carts.states[1:]) <= 0.05).all()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch is built without gloo")
def test_distributed_training_gives_the_gradients_of_one_process_in_every_way(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": str(Path(mbp.__file__).parent.parent)}
    pytest.importorskip("matplotlib")
    files = ["--output", "build/figure.png", "--json", "numbers.json"]
    command = [*launcher, EXAMPLES / "distributed_training.py", *files]
    result = subprocess.run(command, cwd=tmp_path, env=env, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for way in ("ddp ", "fsdp", "tp  ", "pp  "):
        first_loss, last_loss, difference = row(result, way)
        assert last_loss < first_loss / 2
        assert difference < 1e-13
    assert (tmp_path / "build" / "figure.png").read_bytes().startswith(b"\x89PNG")
    runs = json.loads((tmp_path / "numbers.json").read_text())
    assert [run["name"] for run in runs] == ["one process", "ddp", "fsdp", "tp", "pp"]
    assert {len(run["losses"]) for run in runs} == {50}


def test_distributed_training_says_how_it_is_started(run_example):
    result = run_example("distributed_training.py")
    assert result.returncode == 2
    assert "start it with: torchrun --nproc-per-node 2" in result.stderr
