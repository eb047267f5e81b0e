"""The CUDA entries behind the public functions, on emulated kernels: every pass, dtype and way to split the work.

`pytest --device=emulated -m cuda` runs the whole numerical suite this way, which takes minutes; this module is the part
that every full run includes.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

import torch_manualbp as mbp
from emulation import emulated_ops, launches
from helpers import (
    DTYPES,
    assert_equal,
    assert_exact,
    assert_near,
    closed_mlp,
    integer_net,
    integers,
    normal_net,
    one_layer,
    oracle,
    plain_mlp,
    recomputing_mlp,
    results,
    units,
)
from torch_manualbp import _ops

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("emulated")]

NETS = {"one": [5, 7], "narrow": [9, 33, 16, 4], "wide": [20, 130, 3], "thin": [1, 1, 2], "empty": [3, 0, 2]}
FUNCTIONS = {"mlp": mbp.mlp, "closed": closed_mlp, "recompute": recomputing_mlp}


# The narrow kernels never compute the networks "wide" and "empty", nor float64; one case still requests them.
WAYS = [(dtype, "library") for dtype in DTYPES] + [(dtype, "narrow") for dtype in DTYPES if dtype != torch.float64]
CASES = [(sizes, *way) for sizes in NETS for way in WAYS if way[1] == "library" or sizes not in ("wide", "empty")]
CASES.append(("empty", torch.float32, "narrow"))


@pytest.fixture(params=["library", "narrow"])
def narrow(request, monkeypatch):
    """Whether to use the narrow kernels instead of those around the library's matrix products."""
    if request.param == "narrow":
        monkeypatch.setenv("MANUALBP_CUDA_NARROW", "1")
    return request.param == "narrow"


@pytest.fixture
def small_blocks(monkeypatch):
    """Sets blocks of 8 rows, so that gradients are added over blocks."""
    monkeypatch.setenv("MANUALBP_EMULATED_ROWS", "8")


@pytest.mark.parametrize("batch", [0, 1, 21])
@pytest.mark.parametrize(("sizes", "dtype", "narrow"), CASES, indirect=["narrow"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_integers_are_exact(function, sizes, batch, dtype, narrow):
    net, grad = integer_net(batch, NETS[sizes], dtype, "mixed"), integers(batch, NETS[sizes][-1], dtype=dtype)
    assert_exact(results(FUNCTIONS[function], net, grad), oracle(net, grad, final_relu=function == "closed"))


@pytest.mark.parametrize(("dtype", "narrow"), WAYS, indirect=["narrow"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_real_numbers_are_near(function, dtype, narrow):
    net, grad = normal_net(90, [9, 40, 17, 5], dtype), torch.randn(90, 5).to(dtype)
    closed = function == "closed"
    assert_near(
        results(FUNCTIONS[function], net, grad), oracle(net, grad, final_relu=closed, on=units(net, final_relu=closed))
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("dtype", "narrow"), [way for way in WAYS if way[0].itemsize > 2], indirect=["narrow"])
def test_gradients_are_added_over_blocks_of_rows(dtype, narrow):
    net, grad = integer_net(29, [5, 9, 8, 3], dtype), integers(29, 3, dtype=dtype)
    truth = oracle(net, grad)
    assert_exact(results(recomputing_mlp, net, grad), truth)
    leaves = net.recorded()
    mbp.mlp_loss(leaves.input, truth.values[0] - grad, *leaves[1:], reduction="sum").backward()
    assert_equal([leaf.grad for leaf in leaves.leaves()], [2 * value for value in truth.values[1:]])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_over_blocks_of_rows_are_near(dtype, narrow):
    net, grad = normal_net(90, [9, 17, 5], dtype), torch.randn(90, 5).to(dtype)
    assert_near(results(recomputing_mlp, net, grad), oracle(net, grad, on=units(net)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_relu(dtype):
    net, grad = integer_net((2, 3), [5, 7], dtype), integers(2, 3, 7, dtype=dtype)
    assert_exact(results(one_layer, net, grad), oracle(net, grad, final_relu=True))


@pytest.mark.parametrize("rows", [None, "small_blocks"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
def test_losses(loss, reduction, rows, narrow, request):
    if rows:
        request.getfixturevalue(rows)
    dtype = torch.float32 if narrow else torch.float64
    net = normal_net(30, [5, 11, 4], dtype)
    target = torch.randint(4, (30,)) if loss == "cross_entropy" else torch.rand(30, 4, dtype=dtype)
    options = {"ignore_index": 2, "label_smoothing": 0.2} if loss == "cross_entropy" else {}
    plain = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy, "bce_with_logits": F.binary_cross_entropy_with_logits}
    got, want = net.recorded(), net.recorded()
    ours = mbp.mlp_loss(got.input, target, *got[1:], loss=loss, reduction=reduction, **options)
    truth = plain[loss](plain_mlp(*want), target, reduction=reduction, **options)
    ours.backward()
    truth.backward()
    tolerance = 1e-5 if narrow else 1e-12
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)
    for a, b in zip(got.leaves(), want.leaves(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)


def test_loss_backward_in_grad_mode_fills_flat_gradients():
    model = mbp.MLP([4, 6, 3])
    twin = torch.nn.Sequential(*model)
    input, target = torch.randn(10, 4), torch.randint(3, (10,))
    model.loss_backward(input, target, "cross_entropy")
    got = [parameter.grad for parameter in model.parameters()]
    assert len({grad.untyped_storage().data_ptr() for grad in got}) == 1
    model.zero_grad()
    F.cross_entropy(twin(input), target).backward()
    torch.testing.assert_close(got, [parameter.grad for parameter in model.parameters()])


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "expanded": lambda t: t[:1].expand_as(t),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, dtype, narrow):
    net, grad = integer_net((2, 7), [5, 8, 4], dtype).map(LAYOUTS[layout]), integers(2, 7, 4, dtype=dtype)
    assert_exact(results(mbp.mlp, net, LAYOUTS[layout](grad)), oracle(net, LAYOUTS[layout](grad)))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)), ids=str)
def test_any_subset_of_gradients(needs, narrow):
    net, grad = integer_net(6, [4, 5, 3], torch.float32), integers(6, 3, dtype=torch.float32)
    full, subset = net.recorded(), net.recorded()
    for leaf, need in zip(subset.leaves(), needs, strict=True):
        leaf.requires_grad_(need)
    plain_mlp(*full).backward(grad)
    output = mbp.mlp(*subset)
    assert output.requires_grad is any(needs)
    if any(needs):
        output.backward(grad)
    for a, b, need in zip(subset.leaves(), full.leaves(), needs, strict=True):
        assert (a.grad is not None) is need
        if need:
            assert_equal(a.grad, b.grad)


def test_a_class_out_of_bounds_is_an_error():
    net = normal_net(3, [4, 3])
    with pytest.raises(IndexError, match="out of bounds"):
        mbp.mlp_loss(net.input, torch.tensor([0, 3, 1]), *net[1:], loss="cross_entropy")


def test_the_public_functions_reach_these_entries():
    assert _ops.mlp is emulated_ops()["mlp"]
    with pytest.raises(RuntimeError, match=r"mlp: `weights\[0\]` has 3 columns"):
        mbp.mlp(torch.ones(2, 4), [torch.ones(5, 3)])


@pytest.mark.parametrize(
    ("sizes", "dtype", "forward", "backward"),
    [
        ([5, 8, 4], torch.float32, ["narrow_forward"], ["narrow_backward", "narrow_biases"]),
        ([5, 128, 4], torch.bfloat16, ["narrow_forward"], ["narrow_backward", "narrow_biases"]),
        ([5, 129, 4], torch.float32, ["bias_relu"], ["relu_backward"] * 2),
        ([5, 8, 4], torch.float64, ["bias_relu"], ["relu_backward"] * 2),
    ],
    ids=str,
)
def test_which_kernels_run(sizes, dtype, forward, backward, narrow):
    net = integer_net(6, sizes, dtype).recorded()
    launches()
    output = mbp.mlp(*net)
    assert launches() == (forward if narrow else ["bias_relu"])
    output.backward(integers(6, 4, dtype=dtype))
    assert launches() == (backward if narrow else ["relu_backward"] * 2)


def test_without_gradients_of_biases_nothing_sums_them(narrow):
    net = integer_net(6, [5, 8, 4], torch.float32, "none").recorded()
    output = mbp.mlp(*net)
    launches()
    output.backward(integers(6, 4, dtype=torch.float32))
    assert launches() == (["narrow_backward"] if narrow else ["relu_backward"])


@pytest.mark.usefixtures("small_blocks")
def test_a_loss_goes_through_the_network_block_by_block(narrow):
    net = integer_net(20, [5, 6, 4], torch.float32)
    launches()
    mbp.mlp_loss(net.input, torch.zeros(20, 4), net.weights, net.biases)
    layers = ["narrow_forward"] if narrow else ["bias_relu"]
    assert launches() == [*[*layers, "loss"] * 3, "loss_total"]


def test_results_are_the_same_in_every_run(narrow):
    net, grad = normal_net(300, [8, 32, 4], torch.float32), torch.randn(300, 4)
    first = results(mbp.mlp, net, grad)
    assert all(map(torch.equal, first, results(mbp.mlp, net, grad)))
