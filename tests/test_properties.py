"""Random calls (hypothesis): for all sizes, dtypes, layouts and subsets of gradients, results equal the oracle's.

The numbers are small integers from a drawn seed, so equality is exact; hypothesis draws everything else.
"""

import itertools

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

import torch_manualbp as mbp
from helpers import (
    DTYPES,
    Net,
    assert_equal,
    assert_exact,
    closed_mlp,
    integers,
    lay_out,
    normal_net,
    oracle,
    plain_mlp,
    recomputing_mlp,
)
from torch_manualbp._losses import LossSpec

pytestmark = pytest.mark.cuda

SIZES = st.lists(st.one_of(st.integers(0, 20), st.integers(0, 140)), min_size=2, max_size=6)
LEADING = st.one_of(
    st.tuples(st.one_of(st.integers(0, 20), st.integers(0, 400))), st.lists(st.integers(0, 6), max_size=3).map(tuple)
)
SEEDS = st.integers(0, 2**31)


@st.composite
def strided(draw, shape):
    """A function that copies a tensor of this shape into a layout with drawn strides."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from((1, 1, 2, 3))) for _ in shape]
    offset = draw(st.integers(0, 3))
    expanded = [draw(st.integers(0, 5)) == 0 for _ in shape]

    return lambda tensor: lay_out(tensor, order, steps, offset, expanded)


@st.composite
def calls(draw):
    """A network with drawn layouts, the leaves to differentiate, the gradient of the output, and the function."""
    sizes, leading, dtype = draw(SIZES), draw(LEADING), draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(SEEDS))

    def tensor(*shape, sparse=False):
        values = integers(*shape, dtype=dtype, high=1 if sparse else 2)
        values = values * (torch.rand(shape) * shape[-1] < 6) if sparse else values
        return draw(strided(shape))(values)

    pairs = list(itertools.pairwise(sizes))
    net = Net(
        tensor(*leading, sizes[0]),
        [tensor(d_out, d_in, sparse=True) for d_in, d_out in pairs],
        [tensor(d_out) if draw(st.booleans()) else None for _, d_out in pairs],
    )
    needs = draw(st.lists(st.booleans(), min_size=len(net.leaves()), max_size=len(net.leaves())))
    return net, needs, tensor(*leading, sizes[-1]), draw(st.sampled_from((mbp.mlp, closed_mlp, recomputing_mlp)))


@pytest.mark.slow
@settings(max_examples=400)
@given(calls())
def test_any_call_equals_autograd(call):
    net, needs, grad, function = call
    truth = oracle(net, grad, final_relu=function is closed_mlp)
    # An expanded weight has no zeros, so its sums may become inexact in float32.
    assume(all(total.numel() == 0 or total.max() < 2**24 for total in truth.sums))
    leaves = net.recorded()
    for leaf, need in zip(leaves.leaves(), needs, strict=True):
        leaf.requires_grad_(need)
    output = function(*leaves)
    assert output.requires_grad == any(needs)
    asked = [leaf for leaf, need in zip(leaves.leaves(), needs, strict=True) if need]
    made = iter(torch.autograd.grad(output, asked, grad) if asked else ())
    got = [output.detach(), *(next(made) if need else want for need, want in zip(needs, truth.values[1:], strict=True))]
    assert_exact(got, truth)


@settings(max_examples=100)
@given(LEADING, st.integers(0, 140), st.integers(0, 140), st.sampled_from(DTYPES), st.booleans(), SEEDS)
@example((129,), 64, 64, torch.float32, True, 0)
def test_any_single_layer_equals_autograd(leading, d_in, d_out, dtype, bias, seed):
    torch.manual_seed(seed)
    weight = integers(d_out, d_in, dtype=dtype, high=1)
    net = Net(integers(*leading, d_in, dtype=dtype), [weight], [integers(d_out, dtype=dtype) if bias else None])
    grad = integers(*leading, d_out, dtype=dtype)
    leaves = net.recorded()
    output = mbp.linear_relu(leaves.input, leaves.weights[0], leaves.biases[0])
    got = [output.detach(), *torch.autograd.grad(output, leaves.leaves(), grad)]
    assert_exact(got, oracle(net, grad, final_relu=True))


@pytest.mark.cpu_only("a library's product may depend on the number of rows")
@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.lists(st.integers(0, 90), max_size=6), SEEDS)
def test_any_split_of_a_batch_gives_the_same_rows(sizes, pieces, seed):
    torch.manual_seed(seed)
    net = normal_net(sum(pieces), sizes, torch.float32)
    rows = [mbp.mlp(piece, *net[1:]) for piece in net.input.split(pieces)]
    assert_equal(torch.cat([torch.empty(0, sizes[-1]), *rows]), mbp.mlp(*net))


@settings(max_examples=50)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=5), st.integers(1, 9), SEEDS)
def test_the_gradient_of_any_gradient_equals_plain_torch(sizes, batch, seed):
    torch.manual_seed(seed)
    net = normal_net(batch, sizes)
    second = []
    for function in (mbp.mlp, plain_mlp):
        leaves = net.recorded()
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves.leaves(), create_graph=True)
        total = sum(gradient.pow(2).sum() for gradient in first)
        second.append(torch.autograd.grad(total, leaves.leaves(), allow_unused=True, materialize_grads=True))
    for got, want in zip(*second, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


@settings(max_examples=100)
@given(
    st.integers(1, 400),
    st.lists(st.integers(1, 60), min_size=2, max_size=5),
    st.sampled_from(("mse", "cross_entropy", "bce_with_logits")),
    st.sampled_from(("mean", "sum")),
    SEEDS,
)
def test_any_loss_and_its_gradients_equal_plain_torch(batch, sizes, loss, reduction, seed):
    torch.manual_seed(seed)
    net = normal_net(batch, sizes)
    target = torch.randint(sizes[-1], (batch,)) if loss == "cross_entropy" else torch.rand(batch, sizes[-1]).double()
    spec = LossSpec(loss, reduction)
    steps = []
    for value_of in (
        lambda net: mbp.mlp_loss(net.input, target, *net[1:], loss=loss, reduction=reduction),
        lambda net: spec.of(plain_mlp(*net), target),
    ):
        leaves = net.recorded()
        value = value_of(leaves)
        steps.append([value.detach(), *torch.autograd.grad(value, leaves.leaves())])
    for got, want in zip(*steps, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * max(float(want.abs().max()), 1e-3))


# --- fuse -----------------------------------------------------------------------------------------------------------

WIDTH = 5
LEAVES = st.sampled_from(
    [
        lambda: nn.Linear(WIDTH, WIDTH),
        lambda: nn.Linear(WIDTH, WIDTH, bias=False),
        nn.ReLU,
        nn.Tanh,
        nn.Identity,
        lambda: nn.Dropout(0.3),
        lambda: nn.LayerNorm(WIDTH),
        lambda: mbp.LinearReLU(WIDTH, WIDTH),
        lambda: mbp.MLP([WIDTH, 3, WIDTH]),
    ]
)
TREES = st.recursive(LEAVES, lambda tree: st.lists(tree, max_size=6), max_leaves=14)


def build(tree):
    return nn.Sequential(*map(build, tree)) if isinstance(tree, list) else tree()


@pytest.mark.parametrize("training", [True, False])
@settings(max_examples=60)
@given(tree=st.lists(TREES, max_size=6), frozen=st.sets(st.integers(0, 20), max_size=4), seed=SEEDS)
def test_fusing_any_tree_of_sequentials_changes_no_result(training, tree, frozen, seed):
    torch.manual_seed(seed)
    model = build(tree).double().train(training)
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(k not in frozen)
    input = torch.randn(4, WIDTH, dtype=torch.float64)

    def step():
        torch.manual_seed(seed)
        model.zero_grad()
        leaf = input.clone().requires_grad_()
        output = model(leaf * 1)
        output.sum().backward()
        return [output.detach(), leaf.grad, *(parameter.grad for parameter in model.parameters())]

    text, plain = repr(model), step()
    fused = (mbp.fuse(model), step())[1]
    for got, want in zip(fused, plain, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert repr(mbp.unfuse(model)) == text
    for got, want in zip(step(), plain, strict=True):
        assert_equal(got, want)
