"""The fuzzers find nothing in the library in a few hundred cases, and they find deliberate bugs.

`make fuzz` runs them longer, from other seeds.
"""

import dataclasses
import importlib
import signal
import time

import pytest
import torch

from fuzz import arguments, cases, differential, forwards, runner, training, transforms
from fuzz.cases import Case, Layout
from torch_manualbp import _chains, _ops, _transforms
from torch_manualbp._losses import LossSpec

pytestmark = pytest.mark.slow

NO_LIMIT = float("inf")  # of seconds: how many cases are checked must not depend on the machine
CI_SECONDS = 72.0  # of the differential fuzzer in `make fuzz`


def test_random_calls_equal_autograd():
    report = runner.run(differential, iter(range(300)), NO_LIMIT)
    assert report.failures == []
    assert report.cases == 300
    assert report.undecidable < report.cases / 10


def test_random_training_runs_have_the_bits_of_their_steps():
    report = runner.run(training, iter(range(120)), NO_LIMIT)
    assert report.failures == []
    assert report.cases == 120
    assert report.undecidable < report.cases / 6


def test_random_forwards_compute_what_the_plain_model_does():
    report = runner.run(forwards, iter(range(120)), NO_LIMIT)
    assert report.failures == []
    assert report.cases == 120


def test_random_nestings_of_transforms_compute_what_those_of_plain_torch_do():
    report = runner.run(transforms, iter(range(120)), NO_LIMIT)
    assert report.failures == []
    assert report.cases == 120
    assert report.undecidable < report.cases / 10


def test_random_arguments_never_crash(tmp_path):
    report = runner.run_apart("fuzz.arguments", 0, 300, 600.0, tmp_path / "seed")
    assert report.failures + report.crashes == []
    assert report.cases == 300


# --- deliberate bugs --------------------------------------------------------------------------------------------------


def pass_at_exact_zero(monkeypatch):
    """The mask of a hidden layer lets the gradient pass where f is exactly 0."""
    right = _ops.mlp_backward

    def wrong(grad, input, weights, biases, hidden, output, needs):
        if hidden is not None and len(weights) > 1 and input.numel():
            width = weights[0].shape[0]
            f = torch.nn.functional.linear(input.double(), weights[0].double()).reshape(-1, width)
            first = hidden[: f.numel()].view_as(f)
            hidden = torch.cat([torch.where((f == 0) & (first == 0), 1e-7, first).flatten(), hidden[f.numel() :]])
        return right(grad, input, weights, biases, hidden, output, needs)

    monkeypatch.setattr(_ops, "mlp_backward", wrong)


def lose_a_column_of_the_tail(monkeypatch):
    """The last column of a layer's output lacks the last term of its sum if the width is one more than a tile's."""
    right = _ops.linear_relu

    def wrong(input, weight, bias):
        if weight.shape[0] % 16 == 1 and weight.shape[1] > 1:
            weight = weight.clone()
            weight[-1, -1] = 0
        return right(input, weight, bias)

    monkeypatch.setattr(_ops, "linear_relu", wrong)


def lose_a_row_of_the_batch(monkeypatch):
    """The last gradient of the one-pass loss lacks the last row if the batch is not a multiple of 16."""
    right = _ops.mlp_loss

    def wrong(input, target, *rest):
        results = right(input, target, *rest)
        if input.dim() == 2 and len(input) % 16 == 1 and len(results) > 1:
            results[-1] = results[-1] - right(input[-1:], target[-1:], *rest)[-1] / (len(input) if rest[3] else 1)
        return results

    monkeypatch.setattr(_ops, "mlp_loss", wrong)


def blur_float32(monkeypatch):
    """The output is rounded to bfloat16 before it is returned."""
    right = _ops.mlp
    monkeypatch.setattr(_ops, "mlp", lambda *args: (right(*args)[0].bfloat16().to(args[0].dtype), right(*args)[1]))


@pytest.mark.parametrize(
    "put_in", [pass_at_exact_zero, lose_a_column_of_the_tail, lose_a_row_of_the_batch, blur_float32]
)
def test_a_bug_is_found_made_small_and_printed_as_code_that_fails(put_in, monkeypatch):
    put_in(monkeypatch)
    report = runner.run(differential, runner.seeds(0), CI_SECONDS)
    (text,) = report.failures
    code = [line for line in text.splitlines() if not line.startswith("#")]
    names = {}
    with pytest.raises(AssertionError, match=r"elements differ|units of layer"):
        exec("\n".join(code), names)
    monkeypatch.undo()
    exec("\n".join(code), names)  # which passes without the bug


def forget_a_relu(monkeypatch):
    """A pending ReLU that something else needs becomes the pre-activation."""
    right = _chains.Chain.value
    monkeypatch.setattr(_chains.Chain, "value", lambda self, step: right(self, step & ~3))


def hand_out_one_tensor_twice(monkeypatch):
    """What outlives a forward is used again by the next call."""
    monkeypatch.setattr(_chains, "_ONLY_OURS", 100)


def lose_the_masks(monkeypatch):
    """Dropout draws its mask, which is not applied."""
    monkeypatch.setattr(_chains.Chain, "_masks", lambda self, step, count: ())


@pytest.mark.parametrize("put_in", [forget_a_relu, hand_out_one_tensor_twice, lose_the_masks])
def test_a_bug_in_chains_is_found(put_in, monkeypatch):
    put_in(monkeypatch)

    def check_all():
        for seed in range(1000):
            forwards.check(forwards.draw(seed))

    with pytest.raises(AssertionError, match=r"call |left the model"):
        check_all()


def lose_a_network(monkeypatch):
    """The gradients of a weight are those of the first network, for all of them."""
    right = _ops.mlp_stacked_backward

    def wrong(*args):
        return [
            grad[:1].expand_as(grad) if grad.dim() == 3 and args[2][0].dim() == 3 else grad for grad in right(*args)
        ]

    monkeypatch.setattr(_ops, "mlp_stacked_backward", wrong)


def keep_ended_transforms(monkeypatch):
    """A node is connected to the graphs of transforms that have ended."""
    monkeypatch.setattr(_transforms, "_alive", lambda tensors: list(tensors))


def forget_second_derivatives(monkeypatch):
    """Gradients of gradients do not see that activations depend on parameters."""
    right = _transforms._composed

    def wrong(call, tensors):
        output, h = right(call, tensors)
        return output, [h[0], *(one.detach() for one in h[1:])]

    monkeypatch.setattr(_transforms, "_composed", wrong)


@pytest.mark.parametrize("put_in", [lose_a_network, keep_ended_transforms, forget_second_derivatives])
def test_a_bug_under_transforms_is_found(put_in, monkeypatch):
    put_in(monkeypatch)
    report = runner.run(transforms, iter(range(2000)), CI_SECONDS)
    (text,) = report.failures
    assert "Warning" not in text
    assert "from fuzz.transforms import *\ncheck(Case(" in text


def test_a_crash_and_a_hang_are_found_with_their_cases_and_the_rest_follows(tmp_path, monkeypatch):
    # In place of two ops: a process that kills itself, and an endless loop outside Python code.
    fake = """
import itertools, os
from fuzz.arguments import *
from fuzz import arguments
def check(case):
    if case.op == "mlp_loss":
        os.abort()
    if case.op == "mlp":
        sum(itertools.repeat(0))
    arguments.check(case)
"""
    (tmp_path / "failing.py").write_text(fake)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(runner, "PATHS", [*runner.PATHS, tmp_path])
    import failing

    ops = [failing.draw(seed).op for seed in range(100)]
    first = next(seed for seed in range(100) if {"mlp_loss", "mlp"} == set(ops[seed : seed + 2]))
    last = next(seed for seed in range(first + 2, 100) if ops[seed] in ("mlp_loss", "mlp"))
    report = runner.run_apart("failing", first, last - first, 60, tmp_path / "seed", case_seconds=3)
    assert report.cases == last - first
    assert len(report.crashes) == 2
    for seed, text in enumerate(report.crashes, first):
        crashed = ops[seed] == "mlp_loss"
        assert text.startswith(f"# seed {seed}: exit status {-signal.SIGABRT if crashed else 1}\n")
        assert ("Timeout (0:00:03)!" in text) is not crashed
        assert f"check(Case(op='{ops[seed]}'" in text


def test_the_time_box_ends_the_run_between_two_cases_and_the_hang_of_one(tmp_path, monkeypatch):
    fake = """
import itertools
from fuzz.arguments import *
def check(case):
    sum(itertools.repeat(0))
"""
    (tmp_path / "hanging.py").write_text(fake)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(runner, "PATHS", [*runner.PATHS, tmp_path])
    importlib.import_module("hanging")
    start = time.monotonic()
    report = runner.run_apart("hanging", 0, 1000, 1.0, tmp_path / "seed", case_seconds=1)
    assert report.cases in (0, 1)
    assert time.monotonic() - start < 30


# --- the fuzzer itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuzzer", [differential, arguments, forwards, transforms])
def test_a_seed_gives_the_same_case_and_its_text_gives_it_again(fuzzer):
    names = {**vars(cases), **vars(fuzzer), "torch": torch}
    for seed in range(300):
        case = fuzzer.draw(seed)
        assert case == fuzzer.draw(seed)
        again = eval(repr(case), names)
        assert repr(again) == repr(case)


def test_everything_is_drawn():
    drawn = [differential.draw(seed) for seed in range(3000)]
    assert {case.entry for case in drawn} == set(cases.ENTRIES)
    assert {case.dtype for case in drawn} == set(cases.DTYPES)
    assert {case.threads for case in drawn} == {1, 2, 3, 4}
    assert {str(value) for case in drawn for _, _, value in case.specials} == {"nan", "inf", "-inf", "0.0", "-0.0"}
    assert {case.exponent for case in drawn} == {0, *(power for powers in cases.EXPONENTS.values() for power in powers)}
    assert {len(case.sizes) for case in drawn} == {2, 3, 4, 5, 6, 7}
    assert {len(case.leading) for case in drawn} == {0, 1, 2, 3}
    assert any(0 in case.leading for case in drawn)
    assert any(0 in case.sizes for case in drawn)
    assert max(case.rows for case in drawn) > 2000
    for flag in ("prior", "biases", "needs", "layouts"):
        assert {bool(getattr(case, flag)) for case in drawn} == {False, True}


def test_every_transform_is_drawn_in_every_place():
    drawn = [transforms.draw(seed) for seed in range(2000)]
    for place in range(4):
        assert {case.steps[place] for case in drawn if len(case.steps) > place} == set(transforms.STEPS)
    assert {case.entry for case in drawn} == set(transforms.ENTRIES)
    assert {len(case.sizes) for case in drawn} == {2, 3, 4, 5}
    assert {len(case.leading) for case in drawn} == {0, 1, 2}


def test_tensors_are_what_the_case_says():
    layout = Layout((0, 1), (2, 1), 3, (False, False))
    special = ("biases[1]", 0.5, float("inf"))
    case = Case(
        leading=(4,), sizes=(3, 5, 2), biases=(1,), exponent=10, specials=(special,), layouts=(("input", layout),)
    )
    (input, weights, biases), end = cases.make(case)
    assert (input.shape, input.stride(), input.storage_offset()) == ((4, 3), (2, 8), 3)
    assert [weight.shape for weight in weights] == [(5, 3), (2, 5)]
    assert biases[0] is None
    assert biases[1][1] == float("inf")
    assert set((input / 1024).flatten().tolist()) <= {-2, -1, 0, 1, 2}
    assert end.shape == (4, 2)
    plain = cases.make(dataclasses.replace(case, exponent=0))
    cases.assert_same(plain.net.input * 1024, input, "powers of two")
    loss = dataclasses.replace(case, entry="loss", exponent=0, spec=LossSpec("cross_entropy"))
    assert cases.make(loss).end.shape == (4,)
