"""FlopCounterMode counts our ops like eager's matrix products, for each subset of gradients."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

import torch_manualbp as mbp
from helpers import Net, integer_net, one_layer, plain_mlp, recomputing_mlp, run_python

PRODUCT = 2 * 6  # 2·B, for (B, D_in) times (D_in, D_out)


def flops(function, *args):
    """The operations that torch counts in forward and backward, and the names of the counted ops."""
    with FlopCounterMode(display=False) as counter:
        output = function(*args)
        if output.requires_grad:
            output.sum().backward()
    return counter.get_total_flops(), {str(op) for op in counter.get_flop_counts()["Global"]}


def each_subset(net):
    """The network with each subset of its tensors requiring grad."""
    for subset in itertools.product([False, True], repeat=len(net.leaves())):
        recorded = net.recorded()
        for leaf, need in zip(recorded.leaves(), subset, strict=True):
            leaf.requires_grad_(need)
        yield recorded


@pytest.mark.parametrize("leading", [6, (2, 3)], ids=str)
def test_linear_relu_counts_as_eager(leading):
    for net in each_subset(integer_net(leading, [5, 3])):
        count, names = flops(one_layer, *net)
        assert count == flops(plain_mlp, *net)[0] > 0
        assert names <= {"manualbp.linear_relu", "manualbp.linear_relu_backward"}


@pytest.mark.parametrize("biases", ["all", "none", "mixed"])
def test_mlp_counts_as_eager(biases):
    for net in each_subset(integer_net(6, [5, 7, 4, 3], biases=biases)):
        count, names = flops(mbp.mlp, *net)
        assert count == flops(plain_mlp, *net)[0] > 0
        assert names <= {"manualbp.mlp", "manualbp.mlp_backward"}


@pytest.mark.parametrize("function", [mbp.mlp, recomputing_mlp])
def test_autocast_counts_as_without(function):
    for net in each_subset(integer_net(6, [5, 7, 4, 3], torch.float32)):
        count, _ = flops(function, *net)
        with torch.autocast("cpu", torch.bfloat16):
            assert flops(function, *net)[0] == count > 0
    target, net = torch.zeros(6, 3), integer_net(6, [5, 7, 4, 3], torch.float32).recorded()
    count, _ = flops(lambda: mbp.mlp_loss(net.input, target, net.weights, net.biases))
    with torch.autocast("cpu", torch.bfloat16):
        got, names = flops(lambda: mbp.mlp_loss(net.input, target, net.weights, net.biases))
    assert (got, names) == (count, {"manualbp.mlp_autocast_loss"})


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, 0), (0, 0, 0)], ids=str)
def test_stacked_networks_count_as_eager(in_dims):
    net = integer_net(6, [5, 7, 4, 3])
    args = [
        part if dim is None else torch.utils._pytree.tree_map(lambda t: torch.stack([t] * 4).requires_grad_(), part)
        for dim, part in zip(in_dims, net, strict=True)
    ]
    count, names = flops(vmap(mbp.mlp, in_dims), *args)
    assert count == flops(vmap(plain_mlp, in_dims), *args)[0] > 0
    assert names == {"manualbp.mlp_stacked", "manualbp.mlp_stacked_backward"}
    again, _ = flops(vmap(recomputing_mlp, in_dims), *args)
    assert again == count + PRODUCT * 4 * (5 * 7 + 7 * 4)


def test_mlp_loss_counts_as_eager():
    target = torch.ones(6, 3).double()
    for net in each_subset(integer_net(6, [5, 7, 4, 3])):
        count, names = flops(lambda *net: mbp.mlp_loss(net[0], target, *net[1:]), *net)
        assert count == flops(plain_mlp, *net)[0] > 0
        assert names == {"manualbp.mlp_loss"}


def test_recomputed_activations_are_counted_again():
    net = integer_net(6, [5, 7, 4, 3]).recorded()
    stored, _ = flops(mbp.mlp, *net)
    assert flops(recomputing_mlp, *net)[0] == stored + PRODUCT * (5 * 7 + 7 * 4)


def test_a_step_of_a_model():
    model, sizes = mbp.MLP([5, 7, 3]), PRODUCT * (5 * 7 + 7 * 3)
    count, _ = flops(model, torch.ones(6, 5))
    assert count == 3 * sizes - PRODUCT * 5 * 7  # the input needs no gradient
    assert flops(nn.Sequential(*model), torch.ones(6, 5))[0] == count


def test_networks_without_units_or_rows_count_nothing():
    net = integer_net(0, [5, 7, 3])
    assert flops(mbp.mlp, *net) == (0, {"manualbp.mlp"})
    assert flops(mbp.mlp, *Net(torch.ones(6, 5), [torch.ones(0, 5)], [None])) == (0, {"manualbp.mlp"})


@pytest.mark.slow
@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "torch_manualbp"])
def test_the_counter_may_be_imported_before_or_after(first):
    code = f"""
import importlib.util, sys, torch, {first}
finders = len(sys.meta_path)
import torch_manualbp
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} == "torch.utils.flop_counter")
importlib.util.find_spec("torch.utils.flop_counter")  # checks only that it exists
from torch.utils.flop_counter import FlopCounterMode
assert len(sys.meta_path) == finders - ({first!r} == "torch_manualbp")
with FlopCounterMode(display=False) as counter:
    torch_manualbp.MLP([5, 3])(torch.ones(2, 5))
assert counter.get_total_flops() == 2 * 2 * 5 * 3
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
