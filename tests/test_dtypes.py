"""All dtypes, against float64; half precision is summed in float32 and rounded once, when stored."""

import pytest
import torch

import torch_manualbp as mbp
from helpers import (
    DTYPES,
    LARGE,
    assert_equal,
    assert_exact,
    assert_near,
    closed_mlp,
    integer_net,
    integers,
    normal_net,
    one_layer,
    oracle,
    recomputing_mlp,
    results,
    units,
)

pytestmark = pytest.mark.cuda
not_emulated = pytest.mark.not_emulated("torch's product on the CPU treats numbers too small for bfloat16 differently")

HALVES = (torch.bfloat16, torch.float16)
SHAPES = {**LARGE, "deep": (64, [64, 100, 64, 100, 64, 17]), "narrow": (5, [9, 7, 1, 8, 2]), "one": (1, [1, 1])}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [mbp.mlp, closed_mlp, recomputing_mlp])
def test_error_against_float64_is_within_rounding(function, shape, dtype):
    batch, sizes = SHAPES[shape]
    net, grad = normal_net(batch, sizes, dtype), torch.randn(batch, sizes[-1]).to(dtype)
    final_relu = function is closed_mlp
    assert_near(results(function, net, grad), oracle(net, grad, final_relu=final_relu, on=units(net, final_relu)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LARGE)
def test_large_networks_on_integers_are_exact(shape, dtype):
    batch, sizes = LARGE[shape]
    net, grad = integer_net(batch, sizes, dtype), integers(batch, sizes[-1], dtype=dtype)
    truth = oracle(net, grad)
    assert_exact(results(mbp.mlp, net, grad), truth)
    assert_exact(results(recomputing_mlp, net, grad), truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_single_layer_on_integers_is_exact(dtype):
    net, grad = integer_net(2000, [33, 45], dtype), integers(2000, 45, dtype=dtype)
    assert_exact(results(one_layer, net, grad), oracle(net, grad, final_relu=True))


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_summed_in_float32(dtype):
    # A sum of ones in half precision would stop growing at 2^8 (bfloat16) or 2^11 (float16).
    count = torch.tensor(3000.0).to(dtype)
    ones = torch.ones(3000, 3000, dtype=dtype)[:3]
    assert_equal(mbp.linear_relu(ones, ones), count.expand(3, 3))  # over features
    weight = torch.ones(1, 2, dtype=dtype).requires_grad_()
    bias = torch.zeros(1, dtype=dtype).requires_grad_()
    mbp.linear_relu(ones[:2].t(), weight, bias).sum().backward()  # over the batch
    assert_equal(weight.grad, count.expand(1, 2))
    assert_equal(bias.grad, count.expand(1))
    input = ones[:1, :2].clone().requires_grad_()
    mbp.linear_relu(input, ones[:2].t()).sum().backward()  # over outputs
    assert_equal(input.grad, count.expand(1, 2))


# --- every half-precision number, bit by bit ------------------------------------------------------------------------


def every_half(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same_bits(got, want):
    """Equal bits, except the payload of NaN and the sign of zero (a sum that starts at +0 has no -0)."""
    assert_equal(got.isnan(), want.isnan())
    there = ~want.isnan()
    assert_equal((got[there] + 0.0).view(torch.int16), (want[there] + 0.0).view(torch.int16))


@not_emulated
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [1, 2, 16, 17, 40])
def test_every_half_passes_through_a_weight_of_one(dtype, width):
    values = every_half(dtype)
    want = torch.relu(values)[:, None].expand(-1, width)
    assert_same_bits(mbp.linear_relu(values[:, None], torch.ones(width, 1, dtype=dtype)), want)


@not_emulated
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [2, 16, 17, 64])
def test_every_finite_half_passes_through_the_identity(dtype, width):
    values = every_half(dtype)
    values = values[values.isfinite()]
    input = values[: values.numel() // width * width].view(-1, width)
    eye = torch.eye(width, dtype=dtype)
    assert_same_bits(mbp.linear_relu(input, eye), torch.relu(input))
    assert_same_bits(mbp.linear_relu(input.t(), torch.eye(64, len(input), dtype=dtype)), torch.relu(input.t())[:, :64])
    assert_same_bits(mbp.mlp(input, [eye, eye, eye]), torch.relu(input))


@not_emulated
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_passes_backward_as_a_gradient(dtype):
    grads = every_half(dtype)[:, None]
    one = torch.ones(1, 1, dtype=dtype)
    input = torch.ones_like(grads).requires_grad_()
    (got,) = torch.autograd.grad(mbp.linear_relu(input, one), input, grads)
    assert_same_bits(got, grads)
    bias = torch.ones(1, grads.numel(), dtype=dtype)[0].requires_grad_()  # in a batch of one, each sum is one gradient
    weight = torch.zeros(grads.numel(), 1, dtype=dtype).requires_grad_()
    got = torch.autograd.grad(mbp.linear_relu(one, weight, bias), [weight, bias], grads.t())
    assert_same_bits(got[0], grads)
    assert_same_bits(got[1], grads[:, 0])


@not_emulated
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_stores_round_to_nearest_even(dtype, fraction):
    # value + fraction of an ulp is exact in float32, then rounded. 0.5 is a tie, in both directions.
    values = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()][:-1]
    unit = (values.view(torch.int16) + 1).view(dtype) - values
    exact = values.double() + fraction * unit.double()
    assert_equal(exact.float().double(), exact)
    weight = torch.tensor([[1.0, fraction]], dtype=dtype)
    got = mbp.linear_relu(torch.stack([values, unit], 1), weight)[:, 0]
    assert_same_bits(got, exact.float().to(dtype))
    grad_weight = torch.stack([values, unit])[:, :, None]  # the same sum as a weight gradient over a batch of two
    layer = torch.ones(values.numel(), 1, dtype=dtype).requires_grad_()
    inputs = weight.t().contiguous()
    (got,) = torch.autograd.grad(mbp.linear_relu(inputs, layer), layer, grad_weight[:, :, 0])
    assert_same_bits(got[:, 0], exact.float().to(dtype))


@pytest.mark.parametrize(
    ("dtype", "largest", "half_unit"),
    [(torch.float16, 65504.0, 16.0), (torch.bfloat16, torch.finfo(torch.bfloat16).max, 2.0**119)],
    ids=["float16", "bfloat16"],
)
def test_halves_overflow_to_infinity_only_when_rounding_says_so(dtype, largest, half_unit):
    # Sums below the largest number plus half an ulp round down to it; larger ones become infinite.
    input = torch.tensor([[largest, half_unit], [largest, half_unit * (1 - 2**-7)], [largest, 0.0], [largest, largest]])
    weight = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    got = mbp.mlp(input.to(dtype), [weight.to(dtype)])[:, 0]
    assert_equal(got, torch.tensor([torch.inf, largest, largest, torch.inf]).to(dtype))
    assert_equal(mbp.mlp(input.to(dtype), [weight.to(dtype)])[:, 1], -got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_are_kept(dtype):
    # The smallest number of each dtype is kept, forward and as a gradient, and counts as positive.
    smallest = torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype) * torch.finfo(dtype).eps
    assert smallest > 0
    input = torch.stack([smallest, 3 * smallest, -smallest])[:, None].requires_grad_()
    one = torch.ones(1, 1, dtype=dtype)
    output = mbp.linear_relu(input, one)
    assert_equal(output.detach(), torch.relu(input.detach()))
    (grad,) = torch.autograd.grad(output, input, smallest.expand(3, 1))
    assert_equal(grad[:, 0], torch.stack([smallest, smallest, 0 * smallest]))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_positive_sum_that_rounds_to_zero_is_off(dtype):
    # As in torch, relu uses the stored number: values too small for float16 are 0, and 0 blocks.
    smallest = torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype) * torch.finfo(dtype).eps
    input = smallest.view(1, 1).clone().requires_grad_()
    output = mbp.linear_relu(input, torch.full((1, 1), 0.25, dtype=dtype))
    assert_equal(output.detach(), torch.zeros(1, 1, dtype=dtype))
    output.sum().backward()
    assert_equal(input.grad, torch.zeros(1, 1, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_have_the_dtype_of_the_arguments(dtype):
    net = normal_net(3, [4, 5, 2], dtype)
    assert {tensor.dtype for tensor in results(mbp.mlp, net, torch.ones(3, 2, dtype=dtype))} == {dtype}
