"""NaN, infinities, zeros, and numbers at the ends of the range give the same results as in torch."""

import itertools

import pytest
import torch

import torch_manualbp as mbp
from helpers import DTYPES, Net, assert_equal, closed_mlp, integer_net, integers, one_layer, oracle, results

pytestmark = pytest.mark.cuda

NAN, INF = float("nan"), float("inf")
WHERE = ("input", "weights", "biases", "grad_output")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(("function", "sizes"), [(one_layer, [5, 7]), (mbp.mlp, [5, 7, 4]), (closed_mlp, [5, 7, 4])])
def test_special_values_spread_as_in_torch(function, sizes, value, where, dtype):
    for batch in (6, 300):  # 300 rows are split into slices
        net, grad = integer_net(batch, sizes, dtype), integers(batch, sizes[-1], dtype=dtype)
        targets = {"input": net.input, "weights": net.weights[-1].t(), "biases": net.biases[0], "grad_output": grad}
        targets[where][2] = value
        assert_equal(results(function, net, grad), oracle(net, grad, final_relu=function is not mbp.mlp).values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_special_values_multiplies_as_in_torch(dtype):
    values = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -2.0], dtype=dtype)
    for input, weight in itertools.product(values, repeat=2):
        net = Net(input.view(1, 1), [weight.view(1, 1)], [values[5:6]])
        for grad in values:
            want = oracle(net, grad.view(1, 1), final_relu=True).values
            assert_equal(results(one_layer, net, grad.view(1, 1)), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [1, 13, 70])
@pytest.mark.parametrize("outputs", [1, 20])
def test_the_sign_of_an_output_that_is_zero_does_not_depend_on_its_batch(outputs, terms, dtype):
    tiny = torch.finfo(dtype).tiny
    for x, omega in ((0.0, -1.0), (tiny, -tiny)):  # gives +0, where sums start, or a product that rounds to -0
        input, weight = torch.full((100, terms), x, dtype=dtype), torch.full((outputs, terms), omega, dtype=dtype)
        batch = mbp.mlp(input, [weight])
        for rows in (1, 2, 4, 20):
            assert torch.equal(torch.signbit(mbp.mlp(input[:rows], [weight])), torch.signbit(batch[:rows]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 16, 33])
def test_a_special_row_leaves_the_other_rows_alone(width, dtype):
    net = integer_net(20, [5, width, 3], dtype)
    clean = mbp.mlp(*net)
    rest = torch.arange(20) != 7
    for value in (NAN, INF, -INF):
        net.input[7] = value
        assert_equal(mbp.mlp(*net)[rest], clean[rest])


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_of_nan_is_nan_and_its_gradient_passes(dtype):
    input = torch.tensor([[NAN], [1.0], [-1.0]], dtype=dtype).requires_grad_()
    weight = torch.ones(1, 1, dtype=dtype).requires_grad_()
    output = mbp.linear_relu(input, weight)
    assert_equal(output.detach(), torch.tensor([[NAN], [1.0], [0.0]], dtype=dtype))
    output.backward(torch.tensor([[5.0], [6.0], [7.0]], dtype=dtype))
    assert_equal(input.grad, torch.tensor([[5.0], [6.0], [0.0]], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_an_output_of_exactly_zero_blocks_the_gradient(zero, dtype):
    # Zeros arise as a product with a zero and as terms that cancel.
    input = torch.tensor([[zero, zero], [1.0, -1.0], [1.0, 1.0]], dtype=dtype).requires_grad_()
    weight = torch.ones(1, 2, dtype=dtype).requires_grad_()
    bias = torch.tensor([zero], dtype=dtype).requires_grad_()
    output = mbp.linear_relu(input, weight, bias)
    assert_equal(output.detach(), torch.tensor([[0.0], [0.0], [2.0]], dtype=dtype))
    output.backward(torch.full((3, 1), 3.0, dtype=dtype))
    assert_equal(input.grad, torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 3.0]], dtype=dtype))
    assert_equal(bias.grad, torch.tensor([3.0], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_blocked_gradient_is_zero_whatever_it_was(value, dtype):
    net = integer_net(4, [3, 5], dtype)
    net.biases[0].fill_(-100)  # no unit is active
    got = results(one_layer, net, torch.full((4, 5), value, dtype=dtype))
    assert_equal(got, [torch.zeros_like(tensor) for tensor in got])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_values_overflow_to_infinity_and_go_on(dtype):
    largest = torch.finfo(dtype).max
    input = torch.tensor([[largest, largest], [largest, 0.0], [-largest, -largest]], dtype=dtype)
    net = Net(input, [torch.ones(2, 2, dtype=dtype), torch.ones(1, 2, dtype=dtype)], [None, None])
    assert_equal(mbp.mlp(*net), torch.tensor([[INF], [INF], [0.0]], dtype=dtype))
    assert_equal(mbp.linear_relu(input, net.weights[0][:1]), torch.tensor([[INF], [largest], [0.0]], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_at_the_ends_of_the_range_are_exact(dtype):
    # Products of powers of two far from 1 return to range, which detects hidden scaling and fast-math.
    big = 2.0 ** (1000 if dtype is torch.float64 else 14 if dtype is torch.float16 else 120)
    net = integer_net(9, [6, 5, 4], dtype)
    weights, biases = net.weights, net.biases
    net = net._replace(weights=[weights[0] * big, weights[1] / big], biases=[biases[0] * big, biases[1]])
    if dtype is torch.float16:  # the maximum is 65504, so keep the first layer small
        net = net._replace(input=net.input.sign() / 8, biases=[None, net.biases[1]])
    grad = integers(9, 4, dtype=dtype)
    truth = oracle(net, grad)
    assert all(want.isfinite().all() for want in truth.values)
    assert_equal(results(mbp.mlp, net, grad), truth.values)
