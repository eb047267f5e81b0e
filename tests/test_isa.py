"""Each instruction-set level that this machine supports, forced in its own process, computes the same networks."""

import platform
import re

import pytest
import torch

import torch_manualbp as mbp
from helpers import (
    DTYPES,
    LARGE,
    LEVELS,
    TOLERANCE,
    assert_equal,
    assert_exact,
    assert_near,
    closed_mlp,
    integer_net,
    integers,
    normal_net,
    one_layer,
    oracle,
    results,
    run_python,
    units,
)
from torch_manualbp import _ops

pytestmark = pytest.mark.slow


def probe(path):
    """Runs, in a forced process, every check that depends on the level; saves results on real numbers."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for dtype in DTYPES:
        for width in (*range(1, 20), 31, 32, 33, 47, 48, 49, 64, 100, 257):
            batch = 5 + width if width % 2 else 300
            net, grad = integer_net(batch, [width, 34 - width % 34, width], dtype), integers(batch, width, dtype=dtype)
            assert_exact(results(closed_mlp, net, grad), oracle(net, grad, final_relu=True))
        wide, grad = integer_net(9, [400, 300], dtype), integers(9, 300, dtype=dtype)
        assert_exact(results(one_layer, wide, grad), oracle(wide, grad, final_relu=True))
        transposed = wide.map(lambda tensor: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor)
        assert_exact(results(one_layer, transposed, grad), oracle(wide, grad, final_relu=True))
        special = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [-1.0], [0.0]], dtype=dtype)
        assert_equal(mbp.linear_relu(special, torch.ones(40, 1, dtype=dtype)), torch.relu(special).expand(5, 40))
    for dtype in (torch.bfloat16, torch.float16):
        halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
        one = torch.ones(1, 1, dtype=dtype)
        assert_equal(mbp.mlp(halves, [one]), halves)
        assert_equal(mbp.mlp(one, [halves]), halves.t())
        bias = torch.zeros(len(halves), dtype=dtype, requires_grad=True)
        mbp.linear_relu(one, halves, bias).backward(halves.t())
        assert_equal(bias.grad[:, None], torch.where(halves <= 0, torch.zeros_like(halves), halves))
    torch.save({"isa": _ops.isa(), "values": near_float64()}, path)


def near_float64():
    """Results on real numbers, checked against float64: {(shape, dtype): (results, largest sums, active units)}."""
    found = {}
    for shape in ("tall", "wide", "few rows"):
        batch, sizes = LARGE[shape]
        for dtype in DTYPES:
            torch.manual_seed(1)
            net, grad = normal_net(batch, sizes, dtype), torch.randn(batch, sizes[-1]).to(dtype)
            on = units(net)
            truth, values = oracle(net, grad, on=on), results(mbp.mlp, net, grad)
            assert_near(values, truth)
            found[shape, dtype] = values, [total.max() for total in truth.sums], on
    return found


@pytest.fixture(scope="module")
def forced(tmp_path_factory):
    """The dictionaries that `probe` saved, by level, for each level that this machine supports."""
    saved = {}
    for level in LEVELS:
        path = tmp_path_factory.mktemp("isa") / level
        done = run_python("import sys, test_isa; test_isa.probe(sys.argv[1])", str(path), MANUALBP_ISA=level)
        if "this machine does not have these instructions" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        saved[level] = torch.load(path)
    return saved


def test_each_level_of_the_machine_passes_every_check(forced):
    assert "default" in forced  # every machine supports it
    assert {level: saved["isa"] for level, saved in forced.items()} == {level: level for level in forced}


def levels_of_the_build():
    """All levels of the binary, best first, as listed in the error about an unknown level."""
    done = run_python("from torch_manualbp import _ops; _ops.isa()", MANUALBP_ISA="sse9")
    listed = re.search(r"RuntimeError: MANUALBP_ISA=sse9 is not a level of this build \((.+)\)", done.stderr)
    return listed[1].split(", ")


def test_the_best_level_of_the_machine_is_chosen_unless_one_is_forced(forced):
    best = run_python("from torch_manualbp import _ops; print(_ops.isa())", MANUALBP_ISA="")
    assert best.stdout.strip() == next(level for level in levels_of_the_build() if level in forced)


def test_levels_agree_within_rounding(forced):
    # Each is within TOLERANCE of float64 (checked in its process), so two are within twice that of each other.
    # Gradients are compared only if the same units are active.
    for level, saved in forced.items():
        for key, (values, sums, on) in saved["values"].items():
            others, _, others_on = forced["default"]["values"][key]
            same_units = all(torch.equal(one, other) for one, other in zip(on, others_on, strict=True))
            for one, other, total in list(zip(values, others, sums, strict=True))[: None if same_units else 1]:
                assert (one.double() - other.double()).abs().max() <= 2 * TOLERANCE[key[1]] * total, (level, key)


def assert_same_bits(forced, levels, dtypes, biases):
    """These levels have equal results in these dtypes; the gradients of biases, which are last, only if `biases`."""
    for level in levels:
        for (shape, dtype), (values, *_) in forced[level]["values"].items():
            if dtype in dtypes:
                others = forced[levels[0]]["values"][shape, dtype][0]
                count = len(values) if biases else len(values) - len(LARGE[shape][1][1:])
                pairs = zip(values[:count], others[:count], strict=True)
                assert all(torch.equal(one, other) for one, other in pairs), (level, shape, dtype)


def test_half_precision_has_the_same_bits_on_each_level(forced):
    # A float holds the product of two such numbers exactly, so multiply-adds round once, fused or not, and all levels
    # sum in the same order, except that avx512_bf16 adds the numbers of a pair of bfloat16 in the other order.
    assert_same_bits(forced, list(forced), [torch.float16], biases=True)
    assert_same_bits(forced, [level for level in forced if level != "avx512_bf16"], [torch.bfloat16], biases=True)


def test_levels_with_fused_multiply_adds_have_the_same_bits(forced):
    # Except in gradients of biases, because register tiles of other heights sum them in other groups of rows.
    fused = [level for level in forced if level != "default" or platform.machine() != "x86_64"]
    assert_same_bits(forced, fused, [torch.float32, torch.float64], biases=False)


def test_an_unknown_level_is_an_error_that_names_every_file_of_kernels():
    assert sorted(levels_of_the_build()) == LEVELS
    if platform.machine() == "x86_64":
        assert LEVELS == ["avx2", "avx512", "avx512_bf16", "default"]


def test_a_refused_level_is_refused_again():
    code = """
import torch, torch_manualbp as m
for _ in range(2):
    try:
        m.linear_relu(torch.ones(1, 1), torch.ones(1, 1))
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""
    lines = run_python(code, MANUALBP_ISA="none").stdout.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1] != ""
