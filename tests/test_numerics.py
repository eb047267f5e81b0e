"""docs/numerics.md says what holds: its table of tolerances is the tests' own, and a sum over units is made as it says.

That threads, runs and batches change no bit is in test_threads.py; errors beside eager's are in test_benchmarks.py.
"""

from pathlib import Path

import pytest
import torch

import torch_manualbp as mbp
from helpers import DTYPES, TOLERANCE, assert_equal
from torch_manualbp import _ops
from torch_manualbp.inspection import _verify

PAGE = Path(__file__).parents[1] / "docs" / "numerics.md"


def power(text):
    base, exponent = text.split("^")
    return float(base) ** int(exponent)


def test_the_table_of_tolerances_is_that_of_the_tests():
    rows = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and isinstance(getattr(torch, cells[0], None), torch.dtype):
            rows[getattr(torch, cells[0])] = cells[1:]
    assert set(rows) == set(DTYPES)
    for dtype, (unit, sums, tolerance, units, verify) in rows.items():
        assert power(unit) == torch.finfo(dtype).eps / 2
        assert sums == ("float64" if dtype is torch.float64 else "float32")
        assert power(tolerance) == TOLERANCE[dtype] == int(units) * power(unit)
        assert float(verify) == _verify.TOLERANCE[dtype]


@pytest.mark.skipif(_ops.isa() == "default", reason="the portable level has no fused multiply-add instruction")
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 300])
@pytest.mark.parametrize("terms", [1, 13, 17, 64, 65, 100, 1000])  # 128 or 384 are added up before memory is written
def test_a_sum_over_the_units_is_made_in_ascending_order(terms, batch):
    x, weight, bias = torch.randn(batch, terms), torch.randn(33, terms), torch.randn(33)
    f = documented_product(x, weight.t()) + bias
    assert_equal(mbp.mlp(x, [weight], [bias]), f)
    assert_equal(mbp.linear_relu(x, weight, bias), torch.relu(f))


@pytest.mark.skipif(_ops.isa() == "default", reason="the portable level has no fused multiply-add instruction")
@pytest.mark.parametrize("units", [5, 100, 700])
def test_an_input_gradient_is_summed_in_ascending_order(units):
    x, weight, grad_output = torch.randn(20, 9, requires_grad=True), torch.randn(units, 9), torch.randn(20, units)
    (gradient,) = torch.autograd.grad(mbp.mlp(x, [weight]), x, grad_output)
    assert_equal(gradient, documented_product(grad_output, weight))


def documented_product(a, b):
    """A B as the table "The order of summation" says: parts of 64 terms, added up in turn."""
    total = torch.zeros(len(a), b.shape[1])
    for part in torch.arange(a.shape[1]).split(64):
        sum = torch.zeros_like(total)
        for k in part:
            # In float64 the product of two floats is exact, so this rounds once, as a fused multiply-add does.
            sum = (a[:, k, None].double() * b[k].double() + sum.double()).float()
        total += sum
    return total
