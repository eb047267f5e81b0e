"""The memory modes give the same numbers, and keep exactly the documented tensors."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import torch_manualbp as mbp
from helpers import DTYPES, LARGE


def both(batch, sizes, dtype=torch.float32, **options):
    store = mbp.MLP(sizes, dtype=dtype, **options)
    recompute = mbp.MLP(sizes, dtype=dtype, activations="recompute", **options)
    recompute.load_state_dict(store.state_dict())
    return store, recompute, torch.randn(batch, sizes[0]).to(dtype).requires_grad_()


def results(model, input, grad_output):
    output = model(input)
    return [output.detach(), *torch.autograd.grad(output, [input, *model.parameters()], grad_output)]


def saved_bytes(model, input):
    """Bytes that the graph keeps in addition to the input and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (input, *model.parameters())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE)
def test_recompute_equals_store_bit_for_bit(case, dtype):
    batch, sizes = LARGE[case]
    store, recompute, input = both(batch, sizes, dtype)
    grad_output = torch.randn(batch, sizes[-1]).to(dtype)
    for a, b in zip(results(store, input, grad_output), results(recompute, input, grad_output), strict=True):
        assert torch.equal(a, b)


def test_wide_layers_go_block_by_block_where_nothing_is_stored():
    store, recompute, input = both(9000, [16, 1024, 1024, 4], torch.float32)
    output = store(input)
    assert torch.equal(recompute(input), output)
    with torch.no_grad():
        assert torch.equal(store(input), output)
        assert torch.equal(store(input[:17]), output[:17])


@pytest.mark.parametrize("sizes", [[3, 2], [3, 5, 2], [3, 1, 4, 2]])
def test_recompute_passes_gradcheck_and_gradgradcheck(sizes):
    _, model, input = both(4, sizes, torch.float64)
    model.double()
    parameters = [p.detach().requires_grad_() for p in model.parameters()]

    def network(x, *parameters):
        return mbp.mlp(x, parameters[::2], parameters[1::2], activations="recompute")

    assert gradcheck(network, (input, *parameters))
    assert gradgradcheck(network, (input, *parameters))


def test_fused_runs_that_end_in_a_relu_recompute_too():
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU()).double()
    fused = mbp.fuse(copy.deepcopy(plain), activations="recompute")
    input = torch.randn(6, 4, dtype=torch.float64)
    for model in (plain, fused):
        model(input).square().sum().backward()
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


def test_store_keeps_every_activation_and_recompute_none():
    store, recompute, input = both(1000, [8, 64, 64, 3])
    assert saved_bytes(store, input) == 1000 * (64 + 64) * 4
    assert saved_bytes(recompute, input) == 0


def test_without_grad_mode_no_activation_is_kept():
    store, _, input = both(1000, [8, 64, 64, 3])
    with torch.no_grad():
        assert saved_bytes(store, input) == 0
        assert torch.equal(store(input), store(input.detach()))


@pytest.mark.parametrize(
    "function", [lambda m: mbp.MLP([2, 2], activations=m), lambda m: mbp.fuse(nn.ReLU(), activations=m)]
)
def test_an_unknown_mode_is_an_error(function):
    with pytest.raises(ValueError, match="`activations` must be one of 'store', 'recompute', got 'forget'"):
        function("forget")
