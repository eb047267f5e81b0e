"""Autocast on the CPU: the network that torch computes from rounded tensors, in one call, with gradients in float32."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

import torch_manualbp as mbp
from helpers import (
    LARGE,
    assert_equal,
    calls_of,
    closed_mlp,
    integer_net,
    integers,
    normal_net,
    one_layer,
    oracle,
    plain_network,
    recomputing_mlp,
)
from torch_manualbp import _compute, _ops, _route
from torch_manualbp._route import AUTOCAST, TORCH, route
from torch_manualbp.autograd import AutocastFunction

HALVES = (torch.bfloat16, torch.float16)
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half the distance between 1 and the next number
SHAPES = {
    "small": (5, [9, 7, 3]),
    "one layer": (6, [4, 5]),
    "one number": (7, [1, 1]),
    "no rows": (0, [3, 4, 2]),
    "leading dimensions": ((2, 3), [4, 5, 1]),
    "a vector": ((), [6, 5, 4]),
    "no inputs": (4, [0, 3, 2]),
    **{name: LARGE[name] for name in ("tall", "short", "wide", "few rows")},
}


@pytest.fixture(params=HALVES, ids=["bfloat16", "float16"])
def dtype(request):
    return request.param


def autocast(dtype=torch.bfloat16, **options):
    return torch.autocast("cpu", dtype, **options)


def rounded(net, dtype):
    return net.map(lambda tensor: tensor.to(dtype))


def needs_of(net):
    return [True, *[True] * len(net.weights), *[bias is not None for bias in net.biases]]


def both_passes(net, grad, dtype, *, final_relu=False, store=True, needs=None):
    """The output, the activations and the gradients, by the ops."""
    output, hidden = _ops.mlp_autocast(*net, final_relu, store, None, [], dtype)
    saved = hidden if store else None, output if final_relu else None
    grads = _ops.mlp_autocast_backward(grad, *net, *saved, needs or needs_of(net), None, [])
    return output, hidden, grads


def step(model, input, dtype=torch.bfloat16, loss=F.mse_loss, seed=0):
    """The output, the loss, and the gradients of input and parameters, under autocast."""
    leaf = input.detach().clone().requires_grad_(input.is_floating_point())
    model.zero_grad()
    torch.manual_seed(seed)
    with autocast(dtype):
        output = model(leaf)
        value = loss(output, torch.ones_like(output, dtype=torch.float32))
    value.backward()
    return [output.detach(), value.detach(), leaf.grad, *(parameter.grad for parameter in model.parameters())]


def assert_rounding(got, want, dtype, units=8):
    """Equal shapes and dtypes, and numbers up to a few roundings of the largest."""
    for one, other in zip(got, want, strict=True):
        assert (None if one is None else (one.shape, one.dtype)) == (
            None if other is None else (other.shape, other.dtype)
        )
        if one is not None and one.numel():
            one, other = one.detach().double(), other.detach().double()
            scale = float(other.abs().max())
            assert float((one - other).abs().max()) <= units * UNIT[dtype] * scale + 1e-7


def twins(sizes=(9, 64, 33, 5), **options):
    plain = plain_network(list(sizes))
    return mbp.fuse(copy.deepcopy(plain), **options), plain


# --- the ops --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("biases", ["all", "mixed", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_ops_are_those_of_the_rounded_network(shape, biases, store, final_relu, dtype):
    leading, sizes = SHAPES[shape]
    net = normal_net(leading, sizes, torch.float32, biases)
    grad = torch.randn(*net.input.shape[:-1], sizes[-1]).to(dtype)
    output, hidden, grads = both_passes(net, grad, dtype, final_relu=final_relu, store=store)
    low = rounded(net, dtype)
    want, want_hidden = _ops.mlp(*low, final_relu, store)
    assert_equal([output, hidden], [want, want_hidden])
    saved = hidden if store else None, output if final_relu else None
    assert all(grad.dtype is torch.float32 for grad in grads)
    assert_equal([grad.to(dtype) for grad in grads], _ops.mlp_backward(grad, *low, *saved, needs_of(net)))


def test_numbers_are_rounded_as_torch_rounds_them(dtype):
    bits = torch.randint(-(2**31), 2**31, (100_003,), dtype=torch.int64).int()
    ties = torch.arange(-(2**15), 2**15).int() << 16 | 0x8000  # halfway between two numbers of bfloat16
    halves = (torch.randint(-(2**15), 2**15, (20_000,), dtype=torch.int64).int() << 13) + (112 << 23)
    specials = torch.tensor([0.0, float("inf"), -float("inf"), float("nan"), 65504.0, 65519.9, 65520.0, 2**-24, 2**-25])
    x = torch.cat([bits.view(torch.float32), ties.view(torch.float32), halves.view(torch.float32), specials])
    output, _ = _ops.mlp_autocast(x[:, None], [torch.ones(1, 1)], [None], False, False, None, [], dtype)
    assert_equal(output[:, 0], x.to(dtype))


def test_gradients_in_float32_are_the_sums_themselves(dtype):
    # In half precision these sums, up to 6000, would be rounded.
    net = integer_net(9000, [5, 6, 3], torch.float32)
    grad = integers(9000, 3, dtype=dtype, high=1).abs()
    output, _, grads = both_passes(net, grad, dtype)
    truth = oracle(net.map(torch.Tensor.double), grad.double())
    assert_equal([output.double(), *(grad.double() for grad in grads)], truth.values)
    assert any((grad != grad.to(dtype)).any() for grad in grads)


def test_layouts(dtype):
    base = normal_net((4, 6), [10, 8, 3], torch.float32)
    grad = torch.randn(4, 6, 3).to(dtype)
    want = both_passes(base, grad, dtype)
    layouts = {
        "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t,
        "every second": lambda t: torch.stack([t, t + 1], -1)[..., 0],
        "from an offset": lambda t: torch.cat([torch.zeros(3), t.flatten()])[3:].view(t.shape),
        "rows apart": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    }
    for name, change in layouts.items():
        got = both_passes(base.map(change), grad, dtype)
        for one, other in zip([got[0], got[1], *got[2]], [want[0], want[1], *want[2]], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)
    swapped = base.input.transpose(0, 1)  # leading dimensions that no single stride describes
    got = both_passes(base._replace(input=swapped.contiguous().transpose(0, 1)), grad, dtype)
    assert_equal(got[0], want[0])
    expanded = base._replace(input=base.input[:1, :1].expand(4, 6, 10))
    same = base._replace(input=expanded.input.contiguous())
    assert_equal(both_passes(expanded, grad, dtype)[2], both_passes(same, grad, dtype)[2])


def test_tensors_that_are_rounded_already(dtype):
    net = normal_net(6, [4, 5, 3], torch.float32)
    grad = torch.randn(6, 3).to(dtype)
    output, hidden, grads = both_passes(net, grad, dtype)
    some = net._replace(input=net.input.to(dtype), weights=[net.weights[0].to(dtype), net.weights[1]])
    got = both_passes(some, grad, dtype)
    assert_equal([got[0], got[1], *got[2][1:]], [output, hidden, *grads[1:]])
    assert_equal(got[2][0], grads[0].to(dtype))  # the gradient of the input has its dtype


def test_only_what_is_needed(dtype):
    net = normal_net(50, [4, 5, 3], torch.float32)
    grad = torch.randn(50, 3).to(dtype)
    _, _, every = both_passes(net, grad, dtype)
    for needs in itertools.product([False, True], repeat=5):
        for store in (True, False):
            _, _, grads = both_passes(net, grad, dtype, store=store, needs=list(needs))
            assert_equal(grads, [grad for grad, need in zip(every, needs, strict=True) if need])


@pytest.mark.parametrize("shape", ["tall", "short", "wide"])
def test_neither_threads_nor_other_rows_change_a_bit(shape, dtype):
    batch, sizes = LARGE[shape]
    net, grad = normal_net(batch, sizes, torch.float32), torch.randn(batch, sizes[-1]).to(dtype)
    torch.set_num_threads(1)
    alone = both_passes(net, grad, dtype)
    row = net._replace(input=net.input[7:8])
    assert_equal(both_passes(row, grad[7:8], dtype)[0], alone[0][7:8])
    for threads in (2, 3, 64):
        torch.set_num_threads(threads)
        got = both_passes(net, grad, dtype)
        assert_equal([got[0], got[1], *got[2]], [alone[0], alone[1], *alone[2]])


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", "cross_entropy"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("flat", [False, True])
def test_the_loss_is_that_of_the_rounded_output_in_float32(loss, reduction, flat):
    dtype = torch.bfloat16
    net = normal_net(300, [6, 16, 3], torch.float32)
    target = torch.randint(3, (300,)) if loss == "cross_entropy" else torch.rand(300, 3)
    spec = mbp._losses.loss_spec(loss, reduction, -100, 0.0)
    value, *grads = spec.under_autocast(dtype).run(net.input, target, net.weights, net.biases, needs_of(net), flat)
    output, hidden = _ops.mlp_autocast(*net, False, True, None, [], dtype)
    leaf = output.float().requires_grad_()
    want = spec.of(leaf, target)
    want.backward()
    assert value.dtype is torch.float32
    torch.testing.assert_close(value, want.detach())
    expected = _ops.mlp_autocast_backward(leaf.grad.to(dtype), *net, hidden, None, needs_of(net), None, [])
    for one, other in zip(grads, expected, strict=True):
        assert one.dtype is torch.float32
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3 * float(other.abs().max()))


def test_arguments_that_do_not_fit_are_named(dtype):
    net = normal_net(4, [3, 5, 2], torch.float32)
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    name = str(dtype).removeprefix("torch.")

    def op(changed):
        _ops.mlp_autocast(*changed, False, True, None, [], dtype)

    with pytest.raises(RuntimeError, match=rf"`weights\[1\]` must be float32 or {name}, got float64"):
        op(net._replace(weights=[net.weights[0], net.weights[1].double()]))
    with pytest.raises(RuntimeError, match=f"`input` must be float32 or {name}, got"):
        op(net._replace(input=net.input.to(other)))
    with pytest.raises(RuntimeError, match=r"`biases\[0\]` must be float32 or"):
        op(net._replace(biases=[net.biases[0].int(), None]))
    with pytest.raises(RuntimeError, match=r"`weights\[0\]` has 3 columns but `input` has 2 features"):
        op(net._replace(input=net.input[:, :2]))
    with pytest.raises(RuntimeError, match="`dtype` must be bfloat16 or float16"):
        _ops.mlp_autocast(*net, False, True, None, [], torch.float32)
    output, hidden = _ops.mlp_autocast(*net, False, True, None, [], dtype)
    with pytest.raises(RuntimeError, match=r"`grad_output` must have shape \(4, 2\), got \(4, 3\)"):
        _ops.mlp_autocast_backward(torch.ones(4, 3, dtype=dtype), *net, hidden, None, needs_of(net), None, [])
    with pytest.raises(RuntimeError, match="`hidden` must have"):
        _ops.mlp_autocast_backward(torch.ones_like(output), *net, hidden[1:], None, needs_of(net), None, [])
    with pytest.raises(RuntimeError, match="`hidden` must have"):
        _ops.mlp_autocast_backward(torch.ones_like(output), *net, hidden.float(), None, needs_of(net), None, [])
    with pytest.raises(RuntimeError, match="must be bfloat16 or float16, got float32"):
        _ops.mlp_autocast_backward(output.float(), *net, hidden, None, needs_of(net), None, [])


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["store", "recompute"])
@pytest.mark.parametrize("rows", [1, 64, 3000])
def test_a_step_is_plains_up_to_rounding(rows, activations, dtype):
    ours, plain = twins(activations=activations)
    input = torch.randn(rows, 9)
    assert calls_of(lambda x: step(ours, x, dtype), input) == ["mlp_autocast", "mlp_autocast_backward"]
    assert_rounding(step(ours, input, dtype), step(plain, input, dtype), dtype)


@pytest.mark.parametrize("function", [mbp.mlp, closed_mlp, recomputing_mlp, one_layer])
def test_functions(function, dtype):
    net = normal_net(40, [5, 7] if function is one_layer else [5, 16, 7], torch.float32).recorded()
    with autocast(dtype):
        assert route(net.input, net.weights) is AUTOCAST
        output = function(*net)
    assert output.dtype is dtype
    assert type(output.grad_fn).__name__ == "AutocastFunctionBackward"
    want, _ = _ops.mlp(*rounded(net.map(torch.Tensor.detach), dtype), function in (closed_mlp, one_layer), False)
    assert_equal(output.detach(), want)
    output.float().sum().backward()
    assert all(leaf.grad.dtype is torch.float32 for leaf in net.leaves())


def test_gradients_are_nearer_to_the_truth_than_those_of_plain(dtype):
    plain = plain_network([16] + [64] * 8 + [4])
    ours, truth = mbp.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    input = torch.randn(512, 16)
    leaf = input.double()
    F.mse_loss(truth(leaf), torch.ones(512, 4).double()).backward()

    def error(model):
        # the loss is scaled as by GradScaler, so that float16 does not underflow
        steps = step(model, input, dtype, lambda f, y: F.mse_loss(f.float(), y) * 1024)
        errors = [
            float((grad.double() / 1024 - p.grad).norm() / p.grad.norm())
            for grad, p in zip(steps[3:], truth.parameters(), strict=True)
        ]
        return sum(errors) / len(errors)

    assert error(ours) < 1.05 * error(plain)


def test_nested_regions_and_those_that_are_switched_off(dtype):
    ours, plain = twins()
    input = torch.randn(70, 9)
    for model in (ours, plain):
        with autocast(dtype):
            assert model(input).dtype is dtype
            with autocast(enabled=False):
                assert model(input).dtype is torch.float32
            with autocast(dtype, cache_enabled=False):
                assert model(input).dtype is dtype
    with autocast(dtype), autocast(enabled=False):
        assert calls_of(ours, input) == ["mlp"]
    with autocast(torch.float16), autocast(torch.bfloat16):  # plain takes the weights that it has rounded to float16
        assert ours(input).dtype is torch.bfloat16


def test_modes_without_gradients(dtype):
    ours, plain = twins()
    input = torch.randn(70, 9)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), autocast(dtype):
            got, want = ours(input), plain(input)
        assert got.is_inference() == want.is_inference()
        assert not got.requires_grad
        assert_rounding([got], [want], dtype)
    with autocast(dtype), torch.inference_mode():
        made = torch.randn(70, 9)
        assert_rounding([ours(made)], [plain(made)], dtype)


def test_inputs_and_parameters_of_every_dtype(dtype):
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    for of_input, of_model in itertools.product((torch.float32, dtype, other, torch.float64), repeat=2):
        ours, plain = twins()
        ours.to(of_model), plain.to(of_model)
        outcomes = []
        for model in (ours, plain):
            try:
                outcomes.append(step(model, torch.linspace(-1, 1, 630).view(70, 9).to(of_input), dtype))
            except RuntimeError as error:
                outcomes.append(type(error))
        if isinstance(outcomes[1], list):
            assert_rounding(*outcomes, dtype=torch.bfloat16)
        else:
            assert outcomes[0] is outcomes[1]
    with autocast(dtype):
        assert route(torch.ones(2, 9), [torch.ones(3, 9).double()]) is TORCH
        assert route(torch.ones(2, 9).double()) is TORCH


def test_frozen_layers_keep_nothing(dtype):
    ours, plain = twins([8, 64, 64, 64, 3])
    input = torch.randn(200, 8)
    for model in (ours, plain):
        model[0].requires_grad_(False), model[2].requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), autocast(dtype):
        output = ours(input)
    assert max(tensor.numel() for tensor in saved if tensor.dtype is dtype) == 200 * 64
    output.float().sum().backward()
    assert ours[0].weight.grad is None
    assert_rounding(step(ours, input, dtype)[3:], step(plain, input, dtype)[3:], dtype)


def test_activations_take_half_of_their_memory(dtype):
    ours, _ = twins([8, 64, 64, 3])
    input, sizes = torch.randn(500, 8), []
    for enabled in (False, True):
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)  # noqa: B023
        with hooks, autocast(dtype, enabled=enabled):
            ours(input)
        sizes.append(sum(tensor.nbytes for tensor in saved if tensor.numel() == 500 * 128))
    assert sizes == [500 * 128 * 4, 500 * 128 * 2]


def test_dropout_draws_the_masks_of_plain(dtype):
    plain = nn.Sequential(
        nn.Linear(9, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3)
    )
    for activations in ("store", "recompute"):
        ours = mbp.fuse(copy.deepcopy(plain), activations=activations)
        input = torch.randn(300, 9)
        assert calls_of(lambda x: step(ours, x, dtype), input)[0] == "mlp_autocast"  # noqa: B023
        assert_rounding(step(ours, input, dtype), step(plain, input, dtype), dtype)
    ours.eval(), plain.eval()
    assert_rounding(step(ours, input, dtype), step(plain, input, dtype), dtype)


def test_segments_change_no_bit(dtype, monkeypatch):
    monkeypatch.setattr(_compute, "_UNCUT", 0)
    plain = plain_network([8, 64, 64, 64, 3])
    whole, cut = mbp.fuse(copy.deepcopy(plain)), mbp.fuse(copy.deepcopy(plain), segment_bytes=1)
    input = torch.randn(200, 8)
    assert calls_of(lambda x: step(cut, x, dtype), input).count("mlp_autocast") == 4
    assert_equal(step(cut, input, dtype), step(whole, input, dtype))


def test_the_graph_is_freed(dtype):
    ours, _ = twins()
    input = torch.randn(30, 9, requires_grad=True)
    with autocast(dtype):
        output = ours(input)
    watched = [weakref.ref(input), weakref.ref(output), weakref.ref(output.grad_fn)]
    gc.disable()
    del input, output
    gc.enable()
    assert [each() for each in watched] == [None] * 3


# --- between forward and backward -----------------------------------------------------------------------------------


def outputs_before(change, dtype, activations="store"):
    """Gradients of both twins, whose weights or buffers `change` modifies between forward and backward."""
    grads = []
    for model in twins(activations=activations):
        input = torch.randn(70, 9, generator=torch.Generator().manual_seed(1))
        with autocast(dtype):
            output = model(input)
        with torch.no_grad():
            change(model, input)
        output.float().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    return grads


def test_what_backward_does_not_need_may_be_modified(dtype):
    torch.manual_seed(0)
    assert_rounding(*outputs_before(lambda model, _: model[2].bias.add_(1), dtype), dtype)
    assert_rounding(*outputs_before(lambda model, _: model[0].weight.add_(1), dtype), dtype)


@pytest.mark.parametrize("activations", ["store", "recompute"])
def test_exchanged_storage(activations, dtype):
    torch.manual_seed(0)

    def exchange(model, _):
        model[2].weight.data = torch.zeros_like(model[2].weight)

    assert_rounding(*outputs_before(exchange, dtype, activations), dtype)


def test_what_backward_needs_must_not_be_modified(dtype):
    for change in (lambda model, _: model[2].weight.add_(1), lambda _, input: input.add_(1)):
        ours, _ = twins()
        input = torch.randn(70, 9)
        with autocast(dtype):
            output = ours(input)
        with torch.no_grad():
            change(ours, input)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.float().sum().backward()


# --- gradients of gradients, and other derivatives -------------------------------------------------------------------


def penalty(model, input, dtype):
    leaf = input.clone().requires_grad_()
    model.zero_grad()
    with autocast(dtype):
        output = model(leaf).float()
    (slope,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
    slope.square().sum().backward()
    return [slope.detach(), *(parameter.grad for parameter in model.parameters()), leaf.grad]


@pytest.mark.parametrize("activations", ["store", "recompute"])
def test_gradient_penalty(activations, dtype):
    ours, plain = twins([5, 16, 16, 1], activations=activations)
    input = torch.randn(30, 5)
    assert_rounding(penalty(ours, input, dtype), penalty(plain, input, dtype), dtype, units=16)


def test_gradient_of_a_gradient_after_a_change_in_place(dtype):
    ours, _ = twins()
    leaf = torch.randn(30, 9, requires_grad=True)
    with autocast(dtype):
        output = ours(leaf).float()
    with torch.no_grad():
        ours[2].bias.add_(1)
    with pytest.raises(RuntimeError, match="gradient of a gradient under autocast"):
        torch.autograd.grad(output.sum(), leaf, create_graph=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batched_gradients(dtype):
    ours, plain = twins([5, 16, 3])
    results = []
    for model in (ours, plain):
        leaf = torch.randn(6, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with autocast(dtype):
            output = model(leaf).float()
        results.append(torch.autograd.grad(output, leaf, torch.eye(18).view(18, 6, 3), is_grads_batched=True))
    assert_rounding(*results, dtype)


def test_the_function_under_transforms_is_the_composition(dtype):
    net = normal_net(6, [4, 8, 3], torch.float32)
    options = dtype, False, True, 2
    parameters = [*net.weights, *net.biases]
    (slopes,) = torch.func.jacrev(lambda x: AutocastFunction.apply(x, options, *parameters).float().sum(0), (0,))(
        net.input
    )
    want = torch.func.jacrev(lambda x: AutocastFunction.composed(x, options, *parameters).float().sum(0))(net.input)
    assert_rounding([slopes], [want], dtype)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_transforms_are_left_to_torch(dtype):
    ours, plain = twins([5, 16, 3])
    input = torch.randn(6, 5)
    with autocast(dtype):
        got = torch.func.vmap(ours)(input), torch.func.jvp(ours, (input,), (input,))
        want = torch.func.vmap(plain)(input), torch.func.jvp(plain, (input,), (input,))
        assert route(torch.ones(2)) is AUTOCAST
    assert_rounding([got[0], *got[1]], [want[0], *want[1]], dtype)


def test_composed_gradients_are_right():
    # In float64 and with float64 for the dtype of autocast, the composition is exact enough for finite differences.
    net = normal_net(3, [4, 5, 2]).recorded()
    function = AutocastFunction.composed
    assert gradcheck(lambda *args: function(args[0], (torch.float64, False, True, 2), *args[1:]), net.leaves())


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", "cross_entropy"])
@pytest.mark.parametrize("way", ["loss", "loss_backward", "mlp_loss"])
def test_losses(way, loss, dtype):
    model = mbp.MLP([9, 64, 33, 5])
    plain = plain_network([9, 64, 33, 5])
    plain.load_state_dict(model.state_dict())
    input, target = torch.randn(70, 9), torch.randint(5, (70,)) if loss == "cross_entropy" else torch.rand(70, 5)
    weights, biases = [list(plain.parameters())[k::2] for k in (0, 1)]

    def ours():
        if way == "mlp_loss":
            return mbp.mlp_loss(input, target, weights, biases, loss=loss)
        return getattr(model, way)(input, target, loss)

    def theirs():
        return mbp._losses.LOSSES[loss].by_torch("mean", -100, 0.0)(plain(input), target)

    results = []
    for function, net in ((ours, plain if way == "mlp_loss" else model), (theirs, plain)):
        net.zero_grad()
        with autocast(dtype):
            value = function()
        if value.requires_grad:
            value.backward()
        results.append([value.detach(), *(parameter.grad.clone() for parameter in net.parameters())])
    assert results[0][0].dtype is torch.float32
    assert_rounding(*results, dtype)
    with autocast(dtype):
        names = calls_of(ours)
    assert names[0] == ("mlp_autocast_loss" if dtype is torch.bfloat16 else "mlp_autocast")


@pytest.mark.parametrize("target_dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_targets_of_other_dtypes_are_left_to_torch(target_dtype):
    model = mbp.MLP([9, 64, 5])
    plain = plain_network([9, 64, 5])
    plain.load_state_dict(model.state_dict())
    input, target = torch.randn(70, 9), torch.ones(70, 5, dtype=target_dtype)
    with autocast():
        got, want = model.loss(input, target), F.mse_loss(plain(input), target)
    assert got.dtype is want.dtype
    torch.testing.assert_close(got, want, rtol=2**-6, atol=0)


def test_a_second_backward_pass_and_a_gradient_of_the_gradient_of_a_loss():
    model = mbp.MLP([5, 16, 1])
    plain = plain_network([5, 16, 1])
    plain.load_state_dict(model.state_dict())
    target, results = torch.rand(30, 1), []
    for loss in (lambda x: model.loss(x, target), lambda x: F.mse_loss(plain(x), target)):
        leaf = torch.randn(30, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with autocast():
            value = loss(leaf)
        (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(value, leaf, retain_graph=True)
        (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
        (third,) = torch.autograd.grad(slope.square().sum(), leaf)
        results.append([first, second, slope.detach(), third])
    assert_rounding(*results, torch.bfloat16, units=16)


def test_the_scale_of_grad_scaler_reaches_float16():
    # Gradients of the output of 2^-30: zero in float16 unless they are scaled before the backward pass.
    model, scaler = mbp.MLP([4, 8, 2]), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    input, target = torch.randn(8, 4), torch.randn(8, 2)
    with autocast(torch.float16):
        value = model.loss(input, target) * 2**-20
    scaler.scale(value).backward()
    assert all((parameter.grad != 0).any() for parameter in model.parameters())


def test_training_steps(dtype):
    losses = []
    for make, train in ((mbp.MLP, mbp.train_step), (plain_network, None)):
        torch.manual_seed(0)
        model = make([6, 32, 1])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        optimizer = mbp.fuse(optimizer) if train else optimizer
        input = torch.randn(128, 6)
        target = input.square().sum(1, keepdim=True)
        for _ in range(100):
            with autocast(dtype):
                value = train(model, input, target, optimizer) if train else F.mse_loss(model(input), target)
            if not train:
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
        losses.append(float(value.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[0] < 3


# --- who computes ---------------------------------------------------------------------------------------------------


def test_few_rows_without_gradients_are_left_to_torch_which_keeps_rounded_weights():
    ours, plain = twins([64, 600, 200, 3])
    input = torch.randn(2, 64)
    with autocast(), torch.no_grad():
        assert calls_of(ours, input) == []
        assert_equal(ours(input), plain(input))
        assert calls_of(ours, torch.randn(4, 64)) == ["mlp_autocast"]
    with autocast():
        assert calls_of(ours, input) == ["mlp_autocast"]


def test_bfloat16_is_left_to_torch_where_it_has_instructions_for_it(monkeypatch):
    monkeypatch.setattr(_route, "_has_bfloat16_units", True)
    ours, plain = twins([64, 1024, 1024, 8])
    large, small = torch.randn(64, 64), torch.randn(4, 9)
    with autocast():
        assert calls_of(ours, large) == []
        assert_equal(ours(large), plain(large))
        assert calls_of(twins()[0], small) == ["mlp_autocast"]
    with autocast(torch.float16):
        assert calls_of(ours, large) == ["mlp_autocast"]


# --- hand-written forwards and captured graphs -----------------------------------------------------------------------


class Written(nn.Module):
    def __init__(self, inside=None):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(9, 64), nn.Linear(64, 64), nn.Linear(64, 3)
        self.dropout, self.inside = 0.0, inside

    def forward(self, x):
        enabled = self.inside is not None or torch.is_autocast_enabled("cpu")
        with autocast(self.inside or torch.bfloat16, enabled=enabled):
            h = F.dropout(F.relu(self.a(x)), self.dropout, self.training)
            return self.c(torch.relu(self.b(h)))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_forward_that_is_written_by_hand(where, p):
    plain = Written(torch.float16 if where == "inside" else None)
    plain.dropout = p
    ours = mbp.fuse(copy.deepcopy(plain))
    dtype = torch.float16 if where == "inside" else torch.bfloat16
    input = torch.randn(500, 9)
    for _ in range(3):
        assert_rounding(step(ours, input, torch.bfloat16), step(plain, input, torch.bfloat16), dtype)
    assert calls_of(lambda x: step(ours, x), input) == ["mlp_autocast", "mlp_autocast_backward"]
    assert mbp.fusion_report(ours, input).chains[0].route == ("autocast" if where == "inside" else "kernels")


class Changing(nn.Module):
    """A forward that may enter or leave autocast where the first call did not."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(9, 64), nn.Linear(64, 64), nn.Linear(64, 3)
        self.states = [None, None, None]

    def forward(self, x):
        for layer, state in zip((self.a, self.b, self.c), self.states, strict=True):
            with autocast(state or torch.bfloat16, enabled=state is not None):
                x = layer(x.float() if state is None else x)
                if layer is not self.c:
                    x = torch.relu(x)
        return x


def test_a_forward_that_changes_autocast_between_its_layers():
    plain = Changing()
    ours = mbp.fuse(copy.deepcopy(plain))
    input = torch.randn(500, 9)
    for states in ([None] * 3, [torch.bfloat16] * 3, [None, None, torch.bfloat16], [torch.bfloat16, None, None]):
        for model in (ours, plain):
            model.states = states
        for _ in range(2):
            got, want = ours(input), plain(input)
            assert got.dtype is want.dtype
            assert_rounding([got], [want], torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_captured_graph(where, dtype):
    torch.compiler.reset()
    model, plain = mbp.MLP([9, 64, 3]), plain_network([9, 64, 3])
    plain.load_state_dict(model.state_dict())
    input = torch.randn(70, 9)

    def inside(x):
        with autocast(dtype):
            return model(x)

    compiled = torch.compile(inside if where == "inside" else model, backend="aot_eager", fullgraph=True)

    def run(function):
        model.zero_grad()
        plain.zero_grad()
        with autocast(dtype, enabled=where == "outside" or function is plain):
            output = function(input)
        output.float().sum().backward()
        owner = plain if function is plain else model
        return [output.detach(), *(parameter.grad for parameter in owner.parameters())]

    assert_rounding(run(compiled), run(plain), dtype)
    if where == "outside":
        assert compiled(input).dtype is torch.float32
    torch.compiler.reset()


# --- mixed precision in whole steps ----------------------------------------------------------------------------------


def state_of(model, optimizer):
    """The parameters and the state of the optimizer."""
    of_optimizer = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    return [*(parameter.detach().clone() for parameter in model.parameters()), *of_optimizer]


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", "cross_entropy"])
@pytest.mark.parametrize("bias", [True, False])
def test_steps_in_bfloat16_are_the_composition(bias, loss, max_grad_norm):
    results = []
    for by_kernels in (True, False):
        torch.manual_seed(0)
        model = mbp.MLP([6, 40, 33, 4], bias=bias)
        model[0].weight.requires_grad_(loss != "mse")
        optimizer = mbp.fuse(torch.optim.Adam(model.parameters(), lr=1e-2))
        losses = []
        for rows in (70, 70, 13):
            input = torch.randn(rows, 6)
            target = torch.randint(4, (rows,)) if loss == "cross_entropy" else torch.rand(rows, 4)
            if by_kernels:
                options = {"max_grad_norm": max_grad_norm, "dtype": torch.bfloat16}
                losses.append(mbp.train_step(model, input, target, optimizer, loss, **options))
            else:
                optimizer.zero_grad()
                with autocast():
                    losses.append(model.loss_backward(input, target, loss))
                if max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
                optimizer.step()
        results.append([*losses, *state_of(model, optimizer)])
        assert all(each.dtype is torch.float32 for each in results[-1])
    assert_equal(*results)


def test_steps_in_bfloat16_are_one_call(monkeypatch):
    model, plain = mbp.MLP([6, 40, 4]), plain_network([6, 40, 4])
    input, target = torch.randn(70, 6), torch.rand(70, 4)
    optimizer = mbp.fuse(torch.optim.SGD(model.parameters(), lr=0.1))
    results, train = [], _ops.train
    monkeypatch.setattr(_ops, "train", lambda *args: results.append(train(*args)) or results[-1])
    for _ in range(2):
        model.train_step(input, target, optimizer, dtype=torch.bfloat16)
    assert len(results) == 2
    assert None not in results
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    assert mbp.train_step(plain, input, target, other, dtype=torch.bfloat16).dtype is torch.float32
    assert plain[0].weight.grad is None


def test_kinds_of_steps_alternate():
    # What is kept of an optimizer for steps in bfloat16 does not serve steps in float32, and the other way round.
    results = []
    for alternating in (True, False):
        torch.manual_seed(0)
        model = mbp.MLP([6, 40, 4])
        optimizer = mbp.fuse(torch.optim.Adam(model.parameters(), lr=1e-2))
        input, target = torch.randn(70, 6), torch.rand(70, 4)
        for dtype in (None, torch.bfloat16, None, torch.bfloat16):
            if alternating:
                model.train_step(input, target, optimizer, dtype=dtype)
                continue
            optimizer.zero_grad()
            with autocast(enabled=dtype is not None):
                model.loss_backward(input, target)
            optimizer.step()
        results.append(state_of(model, optimizer))
    assert_equal(*results)


def test_fit_in_bfloat16():
    input = torch.rand(500, 2)
    target = (input[:, :1] * input[:, 1:]).float()
    results = []
    for by_kernels in (True, False):
        torch.manual_seed(0)
        model = mbp.MLP([2, 32, 1])
        optimizer = mbp.fuse(torch.optim.Adam(model.parameters(), lr=1e-2))
        generator = torch.Generator().manual_seed(1)
        if by_kernels:
            options = {"epochs": 3, "batch_size": 64, "generator": generator, "dtype": torch.bfloat16}
            history = mbp.fit(model, input, target, optimizer, **options)
            losses = history.step_losses
        else:
            losses = []
            for _ in range(3):
                for rows in torch.randperm(500, generator=generator).split(64):
                    losses.append(
                        mbp.train_step(model, input[rows], target[rows], optimizer, dtype=torch.bfloat16).double()
                    )
            losses = torch.stack(losses)
        results.append([losses, *state_of(model, optimizer)])
    assert_equal(*results)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))  # any module
    history = mbp.fit(model, input, target, torch.optim.Adam(model.parameters()), dtype=torch.bfloat16)
    assert len(history.loss) == 1
    assert model[0].weight.dtype is torch.float32


def test_dtypes_of_steps_are_checked():
    model = mbp.MLP([2, 3, 1])
    arguments = model, torch.ones(4, 2), torch.ones(4, 1), torch.optim.SGD(model.parameters())
    for function, name in ((mbp.train_step, "train_step"), (mbp.fit, "fit"), (mbp.MLP.train_step, "MLP.train_step")):
        with pytest.raises(ValueError, match=f"{name}: `dtype` must be torch.bfloat16 or None, got torch.float16"):
            function(*arguments, dtype=torch.float16)
        with pytest.raises(TypeError, match=f"{name}: `dtype` must be torch.bfloat16 or None, got str"):
            function(*arguments, dtype="bfloat16")
    double = mbp.MLP([2, 3, 1]).double()  # autocast leaves float64 as it is
    optimizer = torch.optim.SGD(double.parameters())
    value = mbp.train_step(
        double, torch.ones(4, 2).double(), torch.ones(4, 1).double(), optimizer, dtype=torch.bfloat16
    )
    assert value.dtype is torch.float64
