"""A large network is several nodes of autograd: only the order in which gradients arrive differs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_manualbp as mbp
from helpers import DTYPES, assert_equal, calls_of
from torch_manualbp._compute import SEGMENT_BYTES, segments

WIDTH = 1050  # a layer has more than 2²⁰ numbers
WHOLE = 1 << 40


def cuts(sizes, segment_bytes, dtype=torch.float32, bias=True):
    model = mbp.MLP(sizes, dtype=dtype, bias=bias, device="meta")
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    return segments([layer.weight for layer in linear], [layer.bias for layer in linear], segment_bytes)


def test_segments_are_whole_layers_of_at_least_this_size():
    layer = 2000 * 2001 * 4  # bytes
    sizes = [2000] * 7
    assert cuts(sizes, 1) == (1, 2, 3, 4, 5)
    assert cuts(sizes, layer) == (1, 2, 3, 4, 5)
    assert cuts(sizes, layer + 1) == (2, 4)
    assert cuts(sizes, 2 * layer + 1) == (3,)
    assert cuts(sizes, 3 * layer + 1) == ()
    assert cuts([2000] * 6, 2 * layer) == (3,)  # the lowest layer alone would be too small
    assert cuts(sizes, layer, torch.float64) == (1, 2, 3, 4, 5)
    assert cuts(sizes, layer, torch.bfloat16) == (2, 4)
    assert cuts(sizes, layer, bias=False) == (2, 4)
    assert cuts([2000, 2000], 1) == ()
    assert cuts([1, 2000, 2000, 2000, 1], 1) == (2,)


def test_segments_are_so_large_that_the_batch_is_cut_alike():
    assert cuts([1000] * 5, 1) == (2,)  # a layer has 2²⁰ numbers or fewer
    assert cuts([64] * 200, 1) == ()


@pytest.mark.parametrize("sizes", [[17, 256, 256, 1], [784, 512, 512, 10], [479, 1024, 1024, 1]])
def test_by_default_usual_networks_are_one_node(sizes):
    assert cuts(sizes, SEGMENT_BYTES) == ()


def deep(dtype=torch.float32, dropout=0.0, closed=False):
    torch.manual_seed(0)
    layers = []
    for _ in range(3):
        layers += [nn.Linear(WIDTH, WIDTH, dtype=dtype), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*(layers if closed or dropout else layers[:-1]))


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def results(model, x, frozen=(), training=True):
    """The output, and all gradients, of two passes: the first is observed where the forward is hand-written."""
    model.train(training)
    for k in frozen:
        model[k].requires_grad_(False)
    for _ in range(2):
        torch.manual_seed(1)
        model.zero_grad()
        x = x.detach().requires_grad_(not frozen)
        output = model(x)
        output.square().sum().backward()
    return [output.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def assert_same_bits(make, x, *arguments, nodes=3):
    whole, cut = (mbp.fuse(make(), segment_bytes=size) for size in (WHOLE, 1))
    expected = results(whole, x, *arguments)
    got = results(cut, x, *arguments)
    for one, other in zip(expected, got, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_equal(one, other)
    assert (node_count(whole(x)), node_count(cut(x))) == (1, nodes)


def node_count(output):
    """The number of our nodes in the graph of `output`."""
    found, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [following for following, _ in node.next_functions]
    return sum(node.name() == "MLPFunctionBackward" for node in found)


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_have_the_bits_of_the_whole(dtype, rows):
    assert_same_bits(lambda: deep(dtype), torch.randn(rows, WIDTH, dtype=dtype))


@pytest.mark.parametrize(
    "make",
    [lambda: deep(closed=True), lambda: deep(dropout=0.3), lambda: mbp.MLP([WIDTH] * 4), Written],
    ids=["a ReLU at the end", "dropout", "MLP", "a forward of its own"],
)
def test_segments_of_every_kind_of_network_have_the_bits_of_the_whole(make):
    torch.manual_seed(0)
    model = make()
    assert_same_bits(lambda: copy.deepcopy(model), torch.randn(6, WIDTH))


@pytest.mark.parametrize(("frozen", "nodes"), [([0], 2), ([0, 2], 1), ([2], 3), ([4], 3)])
def test_segments_keep_nothing_for_frozen_layers_at_the_bottom(frozen, nodes):
    assert_same_bits(deep, torch.randn(4, WIDTH), frozen, nodes=nodes)


def test_without_gradients_and_when_recomputing_the_whole_is_one_call():
    model, x = mbp.fuse(deep(), segment_bytes=1), torch.randn(4, WIDTH)
    with torch.no_grad():
        assert calls_of(model, x) == ["mlp"]
    assert calls_of(model, x) == ["mlp"] * 3
    assert node_count(mbp.fuse(deep(), segment_bytes=1, activations="recompute")(x)) == 1


def test_gradients_of_upper_segments_arrive_before_lower_ones_are_computed():
    model, events = mbp.fuse(deep(), segment_bytes=1), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))
    output = model(torch.randn(4, WIDTH))
    node = output.grad_fn
    for layer in (4, 2, 0):
        node.register_prehook(lambda _, layer=layer: events.append(f"backward of {layer}"))
        node = node.next_functions[0][0]  # of the input
    output.sum().backward()
    for k, (node, *leaves) in zip((4, 2, 0), (events[:3], events[3:6], events[6:]), strict=True):
        assert (node, set(leaves)) == (f"backward of {k}", {f"{k}.weight", f"{k}.bias"})


def test_gradients_of_gradients_cross_segments():
    torch.manual_seed(0)
    model, x = deep(), torch.randn(3, WIDTH, requires_grad=True)
    found = []
    for network in (nn.Sequential(*model), mbp.fuse(copy.deepcopy(model), segment_bytes=1)):
        (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), network[2].weight)[0])
    torch.testing.assert_close(*found)


def test_fuse_again_changes_the_segments_of_any_model_and_a_copy_keeps_them():
    x = torch.randn(2, WIDTH)
    for model in (deep(), mbp.MLP([WIDTH] * 4), Written()):
        mbp.fuse(model)(x)
        assert node_count(model(x)) == 1  # 13 MB
        mbp.fuse(model, segment_bytes=1)(x)
        assert node_count(model(x)) == 3
        twin = copy.deepcopy(model)
        twin(x)
        assert node_count(twin(x)) == 3
    assert node_count(mbp.fuse(deep(), segment_bytes=1)[:4](x)) == 2


@pytest.mark.parametrize("wrong", [0, -1, 2.5, None, "25 MiB", True])
def test_a_size_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=r"fuse: `segment_bytes` must be a positive int, got "):
        mbp.fuse(deep(), segment_bytes=wrong)
