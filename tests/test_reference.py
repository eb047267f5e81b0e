"""The lecture's equations in plain torch, which are the specification and the double backward, are correct."""

import pytest
import torch
from torch.autograd import gradcheck

import torch_manualbp as mbp
from helpers import (
    assert_equal,
    assert_exact,
    closed_mlp,
    integer_net,
    integers,
    oracle,
    plain_mlp,
    results,
)
from torch_manualbp import reference

NAN, INF = float("nan"), float("inf")
SIZES = ([3, 2], [4, 5, 2], [7, 1, 6, 3, 2], [3, 0, 2], [0, 3], [3, 0])
LEADING = ((6,), (), (2, 3), (0,), (2, 0, 3))


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_both_passes_equal_autograd(sizes, leading, final_relu):
    net = integer_net(leading, sizes, biases="mixed")
    grad = integers(*leading, sizes[-1])
    output, h = reference.mlp_forward(*net, final_relu)
    grads = reference.mlp_backward(grad, h, net.weights, output if final_relu else None)
    dbiases = [db for db, bias in zip(grads.dbiases, net.biases, strict=True) if bias is not None]
    assert_exact([output, grads.dinput, *grads.dweights, *dbiases], oracle(net, grad, final_relu=final_relu))


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_backward_pass_of_the_backward_pass_equals_autograd(sizes, leading, final_relu):
    net, grad, layers = integer_net(leading, sizes), integers(*leading, sizes[-1]), len(sizes) - 1
    output, h = reference.mlp_forward(*net, final_relu)
    output = output if final_relu else None
    leaves = [tensor.detach().requires_grad_() for tensor in (grad, *h, *net.weights)]
    first = reference.mlp_backward(leaves[0], leaves[1 : 1 + layers], leaves[1 + layers :], output)
    results = [first.dinput, *first.dweights, *first.dbiases]
    cotangents = [integers(*result.shape) for result in results]
    total = sum((result * each).sum() for result, each in zip(results, cotangents, strict=True))
    want = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    v, *rest = cotangents
    second = reference.mlp_double_backward(
        grad, h, net.weights, output, reference.Gradients(v, rest[:layers], rest[layers:])
    )
    for got, one in zip([second.dgrad_output, *second.dh, *second.dweights], want, strict=True):
        assert_equal(got, one)


def test_without_cotangents_there_are_no_gradients():
    net, grad = integer_net(5, [4, 3, 2]), integers(5, 2)
    _, h = reference.mlp_forward(*net)
    by_the_last_bias = reference.Gradients(None, [None, None], [None, integers(2)])
    second = reference.mlp_double_backward(grad, h, net.weights, None, by_the_last_bias)
    assert_equal(second.dgrad_output, by_the_last_bias.dbiases[1].expand(5, 2))
    assert second.dh == second.dweights == [None, None]


def test_forward_returns_the_input_of_each_layer():
    net = integer_net(6, [4, 5, 3, 2])
    output, h = reference.mlp_forward(*net)
    for k in range(3):
        assert_equal(h[k], plain_mlp(net.input, net.weights[:k], net.biases[:k], final_relu=True))
    assert_equal(output, plain_mlp(*net))


def test_bias_gradient_is_given_for_layers_without_bias_too():
    net, grad = integer_net(5, [4, 3, 2], biases="none"), integers(5, 2)
    _, h = reference.mlp_forward(*net)
    zeros = net._replace(biases=[torch.zeros(3).double(), torch.zeros(2).double()])
    assert_equal(reference.mlp_backward(grad, h, net.weights).dbiases, oracle(zeros, grad).values[-2:])


def test_mask_passes_unless_the_output_is_at_most_zero():
    h = torch.tensor([-INF, -1.0, -0.0, 0.0, 5e-324, 1.0, INF, NAN], dtype=torch.float64)
    grad = torch.arange(1.0, 9.0, dtype=torch.float64)
    assert_equal(reference.relu_mask(h, grad), torch.tensor([0, 0, 0, 0, 5, 6, 7, 8]).double())
    # A blocked gradient is always 0, where a product with the mask would give NaN.
    assert_equal(reference.relu_mask(torch.zeros(3), torch.tensor([NAN, INF, -INF])), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_mask_keeps_the_dtype(dtype):
    assert reference.relu_mask(torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype)).dtype == dtype


def test_gradient_that_reaches_hidden_activations_from_elsewhere_is_added():
    net = integer_net(5, [4, 6, 3, 2])
    grads = [integers(5, width) for width in (6, 3, 2)]
    leaves = net.recorded()
    output, h = reference.mlp_forward(*leaves)
    want = torch.autograd.grad([*h[1:], output], leaves.leaves(), grads)
    got = reference.mlp_backward(grads[-1], [tensor.detach() for tensor in h], net.weights, grad_h=grads[:-1])
    assert_equal([got.dinput, *got.dweights, *got.dbiases], list(want))


@pytest.mark.parametrize("final_relu", [False, True])
def test_backward_pass_is_differentiable(final_relu):
    def backward(grad_output, output, h0, h1, *weights):
        grads = reference.mlp_backward(grad_output, [h0, h1], weights, output if final_relu else None)
        return (grads.dinput, *grads.dweights, *grads.dbiases)

    shapes = [(3, 2), (3, 2), (3, 4), (3, 5), (5, 4), (2, 5)]
    assert gradcheck(backward, [torch.randn(shape).double().requires_grad_() for shape in shapes])


@pytest.mark.parametrize("final_relu", [False, True])
def test_kernels_compute_the_reference(final_relu):
    net, grad = integer_net(9, [6, 7, 5, 4]), integers(9, 4)
    output, h = reference.mlp_forward(*net, final_relu)
    grads = reference.mlp_backward(grad, h, net.weights, output if final_relu else None)
    got = results(closed_mlp if final_relu else mbp.mlp, net, grad)
    assert_equal(got, [output, grads.dinput, *grads.dweights, *grads.dbiases])
