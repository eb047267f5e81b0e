"""Strides never change a result. With integers, results are equal bit for bit."""

import pytest
import torch

import torch_manualbp as mbp
from helpers import (
    DTYPES,
    assert_equal,
    assert_exact,
    integer_net,
    integers,
    one_layer,
    oracle,
    recomputing_mlp,
    results,
)

pytestmark = pytest.mark.cuda

B, SIZES = 12, [10, 14, 6]


def scattered(shape, strides, dtype, offset=0):
    """A tensor of integers with this shape and any strides, including overlapping ones."""
    size = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True) if n > 0)
    return integers(max(size, 1), dtype=dtype, high=1).as_strided(shape, strides, offset)


# Each makes a matrix (rows, cols) of one layout.
MATRICES = {
    "contiguous": lambda m, n, dtype: integers(m, n, dtype=dtype, high=1),
    "transposed": lambda m, n, dtype: integers(n, m, dtype=dtype, high=1).t(),
    "rows expanded": lambda m, n, dtype: integers(1, n, dtype=dtype, high=1).expand(m, n),
    "columns expanded": lambda m, n, dtype: integers(m, 1, dtype=dtype, high=1).expand(m, n),
    "one number expanded": lambda m, n, dtype: torch.ones((), dtype=dtype).expand(m, n),
    "every second column": lambda m, n, dtype: integers(m, 2 * n, dtype=dtype, high=1)[:, ::2],
    "every third row": lambda m, n, dtype: integers(3 * m, n, dtype=dtype, high=1)[1::3],
    "columns of a wider matrix": lambda m, n, dtype: integers(m, n + 5, dtype=dtype, high=1)[:, 3 : 3 + n],
    "rows and columns sliced": lambda m, n, dtype: integers(2 * m, 3 * n, dtype=dtype, high=1)[::2, 1::3],
    "transposed slice": lambda m, n, dtype: integers(2 * n, m + 3, dtype=dtype, high=1)[::2, 2 : m + 2].t(),
    "overlapping rows": lambda m, n, dtype: scattered((m, n), (1, 1), dtype),
    "overlapping columns": lambda m, n, dtype: scattered((m, n), (2, 3), dtype, offset=5),
    "odd address": lambda m, n, dtype: integers(m * n + 1, dtype=dtype, high=1)[1:].view(m, n),
    "middle of three dimensions": lambda m, n, dtype: integers(m, 3, n, dtype=dtype, high=1)[:, 1],
}
VECTORS = {
    "contiguous": lambda n, dtype: integers(n, dtype=dtype),
    "expanded": lambda n, dtype: integers(1, dtype=dtype).expand(n),
    "every third": lambda n, dtype: integers(3 * n, dtype=dtype)[2::3],
    "a column": lambda n, dtype: integers(n, 4, dtype=dtype)[:, 1],
    "odd address": lambda n, dtype: integers(n + 1, dtype=dtype)[1:],
}


def check(net, grad, function=mbp.mlp):
    truth = oracle(net, grad, final_relu=function is one_layer)
    assert_exact(results(function, net, grad), truth)
    if function is mbp.mlp:
        assert_exact(results(recomputing_mlp, net, grad), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", MATRICES)
@pytest.mark.parametrize("batch", [1, 12, 200])
def test_input(batch, layout, dtype):
    net, grad = integer_net(batch, SIZES, dtype), integers(batch, SIZES[-1], dtype=dtype)
    check(net._replace(input=MATRICES[layout](batch, SIZES[0], dtype)), grad)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", MATRICES)
@pytest.mark.parametrize("batch", [1, 12, 200])
def test_weights(batch, layout, dtype):
    net, grad = integer_net(batch, SIZES, dtype), integers(batch, SIZES[-1], dtype=dtype)
    weights = [MATRICES[layout](*weight.shape, dtype) for weight in net.weights]
    check(net._replace(weights=weights), grad)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", MATRICES)
@pytest.mark.parametrize("function", [mbp.mlp, one_layer])
@pytest.mark.parametrize("batch", [1, 12, 200])
def test_grad_output(batch, function, layout, dtype):
    net = integer_net(batch, SIZES[:2] if function is one_layer else SIZES, dtype)
    check(net, MATRICES[layout](batch, len(net.weights[-1]), dtype), function)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", VECTORS)
def test_biases(layout, dtype):
    net, grad = integer_net(B, SIZES, dtype), integers(B, SIZES[-1], dtype=dtype)
    check(net._replace(biases=[VECTORS[layout](len(bias), dtype) for bias in net.biases]), grad)


@pytest.mark.parametrize("layout", MATRICES)
def test_linear_relu_with_everything_in_one_layout(layout):
    dtype, make = torch.float32, MATRICES[layout]
    net = integer_net(B, SIZES[:2], dtype)
    net = net._replace(input=make(B, 10, dtype), weights=[make(14, 10, dtype)], biases=[VECTORS["a column"](14, dtype)])
    check(net, make(B, 14, dtype), one_layer)


# Inputs of three and four dimensions: rows with a single stride are read in place, others are copied.
TENSORS = {
    "permuted leading": lambda dtype: integers(4, 3, 10, dtype=dtype).permute(1, 0, 2),
    "features first": lambda dtype: integers(10, 3, 4, dtype=dtype).permute(1, 2, 0),
    "features in the middle": lambda dtype: integers(3, 10, 4, dtype=dtype).transpose(1, 2),
    "outer expanded": lambda dtype: integers(1, 4, 10, dtype=dtype).expand(3, 4, 10),
    "inner expanded": lambda dtype: integers(3, 1, 10, dtype=dtype).expand(3, 4, 10),
    "outer sliced": lambda dtype: integers(6, 4, 10, dtype=dtype)[::2],
    "inner sliced": lambda dtype: integers(3, 8, 10, dtype=dtype)[:, ::2],
    "features sliced": lambda dtype: integers(3, 4, 30, dtype=dtype)[..., ::3],
    "windows": lambda dtype: scattered((3, 4, 10), (5, 2, 1), dtype),
    "dimension of one": lambda dtype: integers(12, 10, dtype=dtype)[::2].unsqueeze(1),
    "leading ones": lambda dtype: integers(5, 10, dtype=dtype)[None, None],
    "four dimensions": lambda dtype: integers(2, 3, 2, 10, dtype=dtype).permute(2, 0, 1, 3),
    "nothing in it": lambda dtype: integers(4, 0, 10, dtype=dtype).transpose(0, 1),
    "a column as 1-D": lambda dtype: integers(10, 4, dtype=dtype)[:, 2],
    "expanded 1-D": lambda dtype: integers(1, dtype=dtype).expand(10),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", TENSORS)
@pytest.mark.parametrize("function", [mbp.mlp, one_layer])
def test_inputs_of_any_dimensions(function, layout, dtype):
    input = TENSORS[layout](dtype)
    net = integer_net(1, SIZES[:2] if function is one_layer else SIZES, dtype)._replace(input=input)
    check(net, integers(*input.shape[:-1], len(net.weights[-1]), dtype=dtype), function)


@pytest.mark.parametrize("layout", TENSORS)
def test_grad_outputs_of_any_dimensions(layout):
    dtype = torch.float32
    grad = TENSORS[layout](dtype)
    check(integer_net(grad.shape[:-1], [7, 5, 10], dtype), grad)


def test_unfolded_windows_of_a_signal():
    signal = integers(50).float()
    net = integer_net(1, [8, 5, 2], torch.float32)._replace(input=signal.unfold(0, 8, 3))
    check(net, integers(15, 2).float())


@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_lazily_negated_tensors(name):
    # The imaginary part of a conjugate is a view with a pending negation.
    tensors = {"input": integers(B, 10), "weight": integers(14, 10, high=1), "bias": integers(14)}
    want = mbp.linear_relu(**{**tensors, name: -tensors[name]})
    lazy = torch.complex(torch.zeros_like(tensors[name]), tensors[name]).conj().imag
    assert lazy.is_neg()
    tensors[name] = lazy
    assert_equal(mbp.linear_relu(**tensors), want)
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in tensors.items()}
    grads = torch.autograd.grad(mbp.linear_relu(**leaves).sum(), list(leaves.values()))
    plain = {key: tensor.detach().resolve_neg().requires_grad_() for key, tensor in tensors.items()}
    assert_equal(grads, torch.autograd.grad(mbp.linear_relu(**plain).sum(), list(plain.values())))


def test_gradients_reach_the_base_of_a_view():
    base = integers(3 * B, 2 * 10).requires_grad_()
    net = integer_net(B, SIZES)
    got = torch.autograd.grad(mbp.mlp(base[::3, ::2], net.weights, net.biases).sum(), base)[0]
    want = torch.zeros_like(base)
    truth = oracle(net._replace(input=base.detach()[::3, ::2]), torch.ones(B, SIZES[-1]).double())
    want[::3, ::2] = truth.values[1]
    assert_equal(got, want)


def test_gradients_of_an_expanded_weight_are_summed():
    row = integers(1, 10).requires_grad_()
    input = integers(B, 10)
    (got,) = torch.autograd.grad(mbp.linear_relu(input, row.expand(14, 10)).sum(), row)
    (want,) = torch.autograd.grad(14 * torch.relu(input @ row.t()).sum(), row)
    assert_equal(got, want)


@pytest.mark.parametrize("layout", MATRICES)
def test_results_are_contiguous(layout):
    dtype, make = torch.float32, MATRICES[layout]
    net = integer_net(B, SIZES, dtype)._replace(input=make(B, SIZES[0], dtype))
    net = net._replace(weights=[make(*weight.shape, dtype) for weight in net.weights])
    got = results(mbp.mlp, net, make(B, SIZES[-1], dtype))
    assert all(tensor.is_contiguous() for tensor in got)


def test_channels_last_input():
    input = integers(2, 3, 4, 10).float().to(memory_format=torch.channels_last)
    check(integer_net(1, SIZES, torch.float32)._replace(input=input), integers(2, 3, 4, 6).float())
