"""Determinism: the number of threads, a second run and the rest of the batch change no bit."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torch_manualbp as mbp
from helpers import (
    DTYPES,
    LARGE,
    assert_equal,
    closed_mlp,
    integer_net,
    integers,
    normal_net,
    one_layer,
    oracle,
    recomputing_mlp,
    results,
)

SHAPES = {
    **LARGE,
    "one layer": (3000, [40, 50]),
    "small": (5, [9, 7, 3]),
    "one unit": (200, [130, 300, 1, 7]),  # shares of 6 + 1 rows: a product of one number has an order of its own
    "one more": (300, [129, 97, 193, 129]),
}


def forward_and_backward(shape, dtype, function=mbp.mlp):
    """One forward and backward pass on the same real numbers at each call."""
    torch.manual_seed(0)
    batch, sizes = SHAPES[shape]
    net, grad = normal_net(batch, sizes, dtype), torch.randn(batch, sizes[-1]).to(dtype)
    return results(one_layer if shape == "one layer" else function, net, grad)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [mbp.mlp, recomputing_mlp])
def test_the_number_of_threads_changes_no_bit(function, shape, dtype):
    torch.set_num_threads(1)
    alone = forward_and_backward(shape, dtype, function)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_equal(forward_and_backward(shape, dtype, function), alone)


@pytest.mark.slow
@pytest.mark.parametrize("shape", LARGE)
def test_more_threads_than_slices_change_no_bit(shape):
    torch.set_num_threads(1)
    alone = forward_and_backward(shape, torch.float32)
    for threads in (7, 64, 192):
        torch.set_num_threads(threads)
        assert_equal(forward_and_backward(shape, torch.float32), alone)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in LARGE), *(("tall", dtype) for dtype in DTYPES if dtype != torch.float32)],
)
def test_the_number_of_threads_changes_no_bit_of_a_loss(shape, dtype, loss):
    batch, sizes = LARGE[shape]
    model, input = mbp.MLP(sizes, dtype=dtype), torch.randn(batch, sizes[0]).to(dtype)
    target = torch.rand(batch, sizes[-1]).to(dtype)
    if loss == "cross_entropy":
        target = target.argmax(-1)

    def loss_and_gradients():
        model.zero_grad()
        value = model.loss_backward(input, target, loss)
        return [value, *(parameter.grad for parameter in model.parameters())]

    alone = loss_and_gradients()
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_equal(loss_and_gradients(), alone)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.integers(1, 2000),
    st.lists(st.integers(1, 200), min_size=2, max_size=4),
    st.sampled_from(DTYPES),
    st.integers(2, 6),
    st.integers(0, 2**31),
)
def test_more_threads_change_no_bit_of_any_call(batch, sizes, dtype, threads, seed):
    torch.manual_seed(seed)
    net, grad = normal_net(batch, sizes, dtype), torch.randn(batch, sizes[-1]).to(dtype)
    torch.set_num_threads(1)
    alone = results(closed_mlp, net, grad)
    torch.set_num_threads(threads)
    assert_equal(results(closed_mlp, net, grad), alone)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_second_run_changes_no_bit(shape, dtype):
    torch.set_num_threads(4)
    first = forward_and_backward(shape, dtype)
    for _ in range(3):
        assert_equal(forward_and_backward(shape, dtype), first)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[19, 33, 40, 5], [300, 520, 10], [3, 1], [8, 16]], ids=str)
def test_a_row_of_the_output_does_not_depend_on_its_batch(sizes, dtype, threads):
    torch.set_num_threads(threads)
    net = normal_net(600, sizes, dtype)
    for function in (mbp.mlp, closed_mlp):
        whole = function(*net)
        for rows in (slice(0, 1), slice(17, 18), slice(599, 600), slice(5, 12), slice(100, 164), slice(1, 400)):
            assert_equal(function(net.input[rows], *net[1:]), whole[rows])
        for few in (2, 3, 4, 5, 8, 16, 25):
            assert_equal(function(net.input[7 : 7 + few], *net[1:]), whole[7 : 7 + few])
        assert_equal(function(net.input[13], *net[1:]), whole[13])
        assert_equal(function(net.input[::3], *net[1:]), whole[::3])
        assert_equal(function(net.input.flip(0), *net[1:]), whole.flip(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_gradient_does_not_depend_on_the_rest_of_the_batch(dtype):
    net, grad = normal_net(600, [19, 33, 40, 5], dtype), torch.randn(600, 5).to(dtype)
    whole = results(mbp.mlp, net, grad)[1]
    for rows in (slice(0, 1), slice(5, 12), slice(100, 164), slice(1, 400)):
        assert_equal(results(mbp.mlp, net._replace(input=net.input[rows]), grad[rows])[1], whole[rows])


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_from_several_python_threads_at_once(threads):
    torch.set_num_threads(threads)
    cases = []
    for batch, sizes in ((3000, [33, 64, 7]), (40, [20, 30, 4]), (500, [100, 100]), (1, [50, 60, 5])) * 2:
        net, grad = integer_net(batch, sizes, torch.float32), integers(batch, sizes[-1]).float()
        cases.append((net, grad, oracle(net, grad).values))

    def run(case):
        net, grad, want = case
        for _ in range(3):
            assert_equal(results(mbp.mlp, net, grad), want)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, cases))


def test_one_module_called_from_several_python_threads_at_once():
    model = mbp.MLP([7, 9, 8, 3])
    inputs = [torch.randn(n, 7) for n in range(1, 9)]
    want = [model(input).detach() for input in inputs]

    def run(case):
        input, expected = case
        for _ in range(200):
            assert_equal(model(input).detach(), expected)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, zip(inputs, want, strict=True)))
