"""docs/numerics.md is correct: it lists the tolerances of these tests, and sums over units are made as it describes.

test_threads.py tests that threads, runs and batches change no bit; test_benchmarks.py compares errors with eager's.
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
@pytest.mark.parametrize("terms", [1, 13, 17, 64, 65, 100, 1000])  # 128 or 384 terms are added before memory is written
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


# Tall batches, in blocks of one and of several units of rows; full and partial vectors of columns; and wide layers.
EQUAL_ROWS = {
    "2-4-1": ([2, 4, 1], 1 << 22),
    "2-4-1, a part of a unit over": ([2, 4, 1], (1 << 21) + 77),
    "1-1": ([1, 1], 1 << 22),
    "1-1-1": ([1, 1, 1], 1 << 21),
    "multiples of a vector": ([8, 64, 32, 3], 1 << 19),
    "parts of a vector": ([5, 48, 33, 2], 1 << 18),
    "blocks of one unit": ([2, 300, 5], 1 << 18),
    "wide": ([1, 1100, 1000, 1], 13_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["store", "recompute", "loss", "fuse"])
@pytest.mark.parametrize("case", EQUAL_ROWS)
def test_a_sum_over_equal_rows_errs_by_less_than_a_millionth(case, way):
    """The sum of n equal terms is n times one, exact in float64; adding them one by one loses one to four digits."""
    sizes, rows = EQUAL_ROWS[case]
    plain = nn.Sequential(*mbp.MLP(sizes), *[nn.ReLU()] * (way == "fuse"))
    nn.init.constant_(plain[2 * len(sizes) - 4].bias, 2)  # so that the units of a final ReLU are active
    exact = copy.deepcopy(plain).double()
    x, y = torch.rand(1, sizes[0]) + 0.5, torch.rand(1, sizes[-1]) + 3
    F.mse_loss(exact(x.double()), y.double()).backward()
    mode = "recompute" if way == "recompute" else "store"
    model = mbp.fuse(plain) if way == "fuse" else mbp.MLP(sizes, activations=mode)
    model.load_state_dict(exact.state_dict())
    input, target = x.expand(rows, -1).contiguous(), y.expand(rows, -1).contiguous()
    # Take the mean in float64, so that the gradient of each row is correctly rounded.
    loss = model.loss(input, target) if way == "loss" else F.mse_loss(model(input).double(), target.double())
    loss.backward()
    assert abs(loss.item() / F.mse_loss(exact(x.double()), y.double()).item() - 1) < 1e-6
    for got, want in zip(model.parameters(), exact.parameters(), strict=True):
        scale = want.grad.abs().max()
        assert ((got.grad - want.grad).abs().max() <= 1e-6 * scale).item()


def test_a_gradient_over_random_rows_keeps_its_digits_where_terms_cancel():
    rows = 1 << 22
    x, g = torch.randn(rows, 1), torch.randn(rows, 1)
    model = mbp.MLP([1, 1])
    model(x).backward(g)
    for got, terms in ((model[0].weight.grad, g.double() * x.double()), (model[0].bias.grad, g.double())):
        assert abs(got.item() - terms.sum().item()) < 1e-7 * terms.abs().sum().item() ** 0.5 * rows**0.25


def documented_product(a, b):
    """A B as in the table "The order of summation": parts of 64 terms, added in order."""
    total = torch.zeros(len(a), b.shape[1])
    for part in torch.arange(a.shape[1]).split(64):
        sum = torch.zeros_like(total)
        for k in part:
            # In float64 the product of two floats is exact, so this rounds once, as a fused multiply-add does.
            sum = (a[:, k, None].double() * b[k].double() + sum.double()).float()
        total += sum
    return total
