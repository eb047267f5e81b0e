"""Dropout between the layers of a fused Sequential: the numbers of the plain modules from the same seed, in one call."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.overrides import TorchFunctionMode

import torch_manualbp as mbp
from helpers import (
    DTYPES,
    LARGE,
    assert_close,
    assert_equal,
    calls_of,
    integers,
    normal_net,
    recorded_calls,
    smooth_net,
    training_step,
)
from torch_manualbp import _ops, reference
from torch_manualbp.autograd import MLPFunction

SIZES = [5, 16, 9, 7, 3]


def network(p=0.3, sizes=SIZES, *, bias=True, dtype=torch.float64, closed=False, inplace=False):
    """[Linear, ReLU, Dropout] repeated, and unless `closed` a Linear at the end."""
    layers = []
    for d_in, d_out in itertools.pairwise(sizes):
        layers += [nn.Linear(d_in, d_out, bias=bias, dtype=dtype), nn.ReLU(), nn.Dropout(p, inplace)]
    return nn.Sequential(*(layers if closed else layers[:-2]))


def pair(*args, activations="store", **options):
    """A fused network and its plain twin."""
    theirs = network(*args, **options)
    return mbp.fuse(copy.deepcopy(theirs), activations=activations), theirs


def step(model, input, threads=1):
    """Output, gradients of input and parameters, and the state of the generator after both passes; from one seed."""
    torch.set_num_threads(threads)
    torch.manual_seed(5)
    leaves = [input.detach().clone().requires_grad_(), *model.parameters()]
    output = model(leaves[0])
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves), torch.get_rng_state()]


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("activations", ["store", "recompute"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_a_step_is_that_of_the_modules(p, bias, activations, threads):
    for leading, closed in itertools.product([(0,), (1,), (37,), (2, 3), (2, 0), ()], [False, True]):
        ours, theirs = pair(p, bias=bias, closed=closed, activations=activations)
        input = torch.randn(*leading, SIZES[0], dtype=torch.float64)
        assert_close(step(ours, input, threads), step(theirs, input, threads))
        assert calls_of(ours, input) == (["mlp_dropout" if p else "mlp"] if p < 1 else [])


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_scaled_by_two_give_the_same_bits_in_every_dtype(dtype):
    ours, theirs = pair(0.5, [4, 6, 5, 3], dtype=dtype, closed=True)
    with torch.no_grad():
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.copy_(other.copy_(integers(*one.shape, high=1)))
    input, grad, results = integers(5, 4, dtype=dtype, high=1), integers(5, 3, dtype=dtype, high=1), []
    for model in (ours, theirs):
        torch.manual_seed(1)
        output = model(input)
        results.append([output.detach(), *torch.autograd.grad(output, list(model.parameters()), grad)])
    assert_equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.1, 0.7])
def test_real_numbers_are_rounded_as_the_modules_round_them(p, dtype):
    ours, theirs = pair(p, [32, 64, 48, 16], dtype=dtype)
    input = torch.randn(200, 32).to(dtype)
    *got, state = step(ours, input)
    *want, their_state = step(theirs, input)
    assert_equal(state, their_state)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE)
def test_large_networks_in_every_mode_on_any_number_of_threads(case, dtype):
    batch, sizes = LARGE[case]
    ours, theirs = pair(0.4, sizes, dtype=dtype, closed=True)
    input = torch.randn(batch, sizes[0]).to(dtype)
    got = step(ours, input)
    mbp.fuse(ours, activations="recompute")
    for threads in (1, 2, 3):
        assert_equal(step(ours, input, threads), got)
    if dtype is torch.float64:
        torch.testing.assert_close(got, step(theirs, input), rtol=1e-9, atol=1e-9)


def test_a_row_does_not_depend_on_the_rest_of_the_batch():
    net = normal_net(700, [30, 64, 48, 7], torch.float32)
    widths, scales = [64, 48], [2.0, 1.25, 0.0]
    masks = [torch.rand(700, width) < 0.5 for width in widths]

    def rows(part):
        kept = torch.cat([mask[part].flatten() for mask in masks])
        return _ops.mlp_dropout(net.input[part], net.weights, net.biases, False, False, kept, scales)[0]

    together = rows(slice(None))
    for part in (slice(0, 1), slice(17, 40), slice(300, 700)):
        assert_equal(rows(part), together[part])


def test_what_is_dropped_and_what_is_not_finite():
    model = mbp.fuse(nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 4)))
    plain = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 4))
    plain.load_state_dict(model.state_dict())
    for value in (float("nan"), float("inf"), -float("inf"), 0.0):
        torch.manual_seed(2)
        got = model(torch.full((5, 1), value))
        torch.manual_seed(2)
        assert_equal(got.isfinite(), plain(torch.full((5, 1), value)).isfinite())


@pytest.mark.parametrize("activations", ["store", "recompute"])
def test_training_follows_the_trajectory_of_the_modules(activations):
    ours, theirs = pair(0.2, [6, 32, 32, 32, 4], dtype=torch.float32, activations=activations)
    input, target = torch.randn(64, 6), torch.randn(64, 4)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(11)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(100):
            optimizer.zero_grad()
            loss = F.mse_loss(model(input), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=0)


# --- when it is active ------------------------------------------------------------------------------------------------


def test_training_mode_and_p_are_read_at_each_call():
    ours, theirs = pair()
    input = torch.randn(6, 5, dtype=torch.float64)

    def changed(change):
        for model in (ours, theirs):
            change(model)
        assert_close(step(ours, input), step(theirs, input))
        return calls_of(ours, input)

    assert changed(lambda model: model.eval()) == ["mlp"]
    assert changed(lambda model: model.train()) == ["mlp_dropout"]
    assert changed(lambda model: model[2].eval()) == ["mlp_dropout"]
    assert changed(lambda model: setattr(model[5], "p", 0.9)) == ["mlp_dropout"]
    assert changed(lambda model: setattr(model[5], "p", 1.0)) == []  # everything is dropped: nothing is drawn
    assert changed(lambda model: model.eval()) == ["mlp"]
    assert changed(lambda model: model.train()) == []
    assert changed(lambda model: setattr(model[5], "p", 0)) == ["mlp_dropout"]


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan"), "half"])
def test_a_p_that_torch_refuses_is_refused(p):
    ours, theirs = pair()
    ours[2].p = theirs[2].p = p
    input = torch.randn(6, 5, dtype=torch.float64)
    for training in (True, False):
        errors = []
        for model in (ours, theirs):
            try:
                model.train(training)(input)
            except Exception as error:
                errors.append((type(error), str(error)))
        assert len(errors) in (0, 2)
        assert errors[1:] == errors[:1]


def test_without_grad_mode_masks_are_drawn_all_the_same():
    ours, theirs = pair()
    input, got = torch.randn(6, 5, dtype=torch.float64), []
    for model in (ours, theirs):
        with torch.no_grad():
            torch.manual_seed(3)
            got.append(model(input))
    assert_close(*got)


def test_dropout_in_place():
    ours, theirs = pair(inplace=True)
    input, got = torch.randn(6, 5, dtype=torch.float64), []
    for model in (ours, theirs):
        with torch.no_grad():  # in place, torch's own ReLU has lost what its backward pass needs
            torch.manual_seed(3)
            got.append(model(input))
    assert_close(*got)
    _, apart = pair()
    apart.load_state_dict(ours.state_dict())
    assert_close(step(ours, input), step(apart, input))


def test_one_layer_with_dropout():
    theirs = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.4), nn.Tanh()).double()
    ours, input = mbp.fuse(copy.deepcopy(theirs)), torch.randn(6, 5, dtype=torch.float64)
    assert_close(step(ours, input), step(theirs, input))
    assert calls_of(ours, input) == ["mlp_dropout"]


@pytest.mark.parametrize("frozen", [1, 2, 4])
@pytest.mark.parametrize("activations", ["store", "recompute"])
def test_frozen_layers_below(activations, frozen):
    ours, theirs = pair(activations=activations)
    for model in (ours, theirs):
        for parameter in list(model.parameters())[: 2 * frozen]:
            parameter.requires_grad_(False)
    input = torch.randn(6, 5, dtype=torch.float64)
    assert_close(
        training_step(ours, input) if frozen < 4 else [ours.eval()(input)],
        training_step(theirs, input) if frozen < 4 else [theirs.eval()(input)],
    )


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("closed", [True, False])
def test_gradcheck_and_gradgradcheck_of_the_function(closed, store):
    net = smooth_net(3, [4, 5, 6, 2], biases="mixed", final_relu=closed)
    scales = [2.0, 0.0, 1.25 if closed else 0.0]
    kept = torch.rand(3 * 5 + (3 * 2 if closed else 0)) < 0.6

    def function(input, *parameters):
        biases = [None, parameters[3], None]
        return MLPFunction.apply(input, closed, store, 3, *parameters[:3], *biases, kept, scales)[0]

    leaves = net.recorded().leaves()
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("activations", ["store", "recompute"])
def test_gradients_of_gradients(activations):
    ours, theirs = pair(activations=activations, closed=True)
    input = torch.randn(6, 5, dtype=torch.float64)

    def penalty(model):
        torch.manual_seed(4)
        x = input.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x, *model.parameters()], allow_unused=True)

    got, want = penalty(ours), penalty(theirs)
    for one, other in zip(got, want, strict=True):
        assert_close(torch.zeros_like(other) if one is None else one, other)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # in torch's own forward AD
def test_transforms_see_the_modules():
    ours, theirs = pair()
    input = torch.randn(6, 5, dtype=torch.float64)

    def transformed(model):
        parameters = dict(model.named_parameters())

        def loss(parameters, x):
            return torch.func.functional_call(model, parameters, x).square().sum()

        results = []
        for call in (
            lambda: torch.func.grad(loss)(parameters, input),
            lambda: torch.vmap(torch.func.grad(loss), (None, 0), randomness="different")(parameters, input),
            lambda: torch.func.jvp(model, (input,), (torch.ones_like(input),)),
        ):
            torch.manual_seed(6)
            results.append(call())
        return results

    torch.testing.assert_close(transformed(ours), transformed(theirs), rtol=1e-11, atol=1e-12)


def test_the_function_under_transforms():
    net = normal_net(3, [4, 5, 2], torch.float64)
    scales, kept = [2.0, 0.0], torch.rand(3 * 5) < 0.6

    def loss(weight):
        arguments = net.input, False, True, 2, weight, net.weights[1], *net.biases, kept, scales
        return MLPFunction.apply(*arguments)[0].square().sum()

    weight = net.weights[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(weight), weight)
    assert_close(torch.func.grad(loss)(net.weights[0]), want)
    assert_close(torch.vmap(torch.func.grad(loss))(net.weights[0].expand(2, -1, -1)), want.expand(2, -1, -1))


@pytest.mark.parametrize("closed", [True, False])
def test_the_reference_with_masks_is_what_autograd_derives(closed):
    net = normal_net(6, SIZES, torch.float64).recorded()
    scales = [2.0, 0.0, 1.5, 3.0 if closed else 0.0]
    masks = [(torch.rand(6, d) < 0.5) * scale if scale else None for d, scale in zip(SIZES[1:], scales, strict=True)]
    output, h = reference.mlp_forward(*net, closed, masks)
    grad = torch.randn_like(output)
    want = torch.autograd.grad(output, net.leaves(), grad)
    got = reference.mlp_backward(grad, h, net.weights, output if closed else None, scales=scales)
    assert_close([got.dinput, *got.dweights, *got.dbiases], list(want))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_recompute_keeps_a_byte_per_mask_element_and_store_no_mask():
    ours, _ = pair(0.3, [8, 64, 64, 3], dtype=torch.float32)
    input, kept = torch.randn(1000, 8), {}
    for mode in ("store", "recompute"):
        mbp.fuse(ours, activations=mode)
        sizes = kept[mode] = {}

        def pack(tensor, sizes=sizes):
            if tensor.dim() == 1 and tensor.numel() >= 1000:
                sizes[tensor.dtype] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ours(input)
    assert kept == {"store": {torch.float32: 1000 * 128}, "recompute": {torch.bool: 1000 * 128}}


# --- what is called as a module ---------------------------------------------------------------------------------------


class Halved(nn.Dropout):
    """A Dropout with its own forward."""

    def forward(self, input):
        return super().forward(input) / 2


CHANGES = {
    "hook": lambda model: model[2].register_forward_hook(lambda module, args, output: output / 2),
    "backward hook": lambda model: model[2].register_full_backward_hook(lambda module, grads, _: (grads[0] / 2,)),
    "forward": lambda model: setattr(model[2], "forward", lambda input: input / 2),
    "subclass": lambda model: model.__setitem__(2, Halved(0.3)),
    "other dropout": lambda model: model.__setitem__(2, nn.AlphaDropout(0.3)),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_dropout_that_is_not_only_that_is_called(case):
    ours, theirs = pair()
    input = torch.randn(6, 5, dtype=torch.float64)
    assert calls_of(ours, input) == ["mlp_dropout"]
    for model in (ours, theirs):
        CHANGES[case](model)
    for _ in range(2):
        assert_close(step(ours, input), step(theirs, input))
        assert calls_of(ours, input) == ["mlp", "mlp_dropout"]


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (F, "dropout", lambda input, p=0.5, training=True, inplace=False: input / 2),
        (nn.Dropout, "forward", lambda self, input: input / 2),
        (nn.Dropout, "__call__", lambda self, input: input / 2),
        (nn.Identity, "forward", lambda self, input: input / 2),
        (nn.Identity, "__call__", lambda self, input: input / 2),
    ],
)
def test_what_somebody_has_replaced_in_torch_is_called(owner, name, other, monkeypatch):
    ours, theirs = pair()
    for model in (ours, theirs):
        model[5] = nn.Identity()
    input = torch.randn(6, 5, dtype=torch.float64)
    before = step(ours, input)
    monkeypatch.setattr(owner, name, other)
    assert_close(step(ours, input), step(theirs, input))
    assert not torch.equal(step(ours, input)[0], before[0])
    assert calls_of(ours, input) == []


def test_a_function_mode_sees_the_dropout():
    class Undropped(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return args[0] if function is F.dropout else function(*args, **(kwargs or {}))

    ours, theirs = pair()
    input = torch.randn(6, 5, dtype=torch.float64)
    with Undropped():
        got = ours(input)
    assert_close(got, theirs.eval()(input))


def test_autocast_and_subclasses_go_through_the_modules():
    ours, theirs = pair(dtype=torch.float32)
    input = torch.randn(6, 5)

    def cast(model):
        torch.manual_seed(8)
        with torch.autocast("cpu", torch.bfloat16):
            return model(input)

    assert_equal(cast(ours), cast(theirs))
    special = input.as_subclass(type("Special", (torch.Tensor,), {}))
    results = []
    for model in (ours, theirs):
        torch.manual_seed(8)
        results.append(model(special).as_subclass(torch.Tensor))
    assert_equal(*results)


def test_a_bias_that_broadcasts_draws_no_mask_twice():
    ours, theirs = pair()
    for model in (ours, theirs):
        model[3].bias = nn.Parameter(torch.ones(1, dtype=torch.float64))  # broadcasts
    input = torch.randn(6, 5, dtype=torch.float64)
    for _ in range(2):
        assert_close(step(ours, input), step(theirs, input))


# --- losses and steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_whole_step_drops_as_the_modules_do(training):
    ours, theirs = pair(dtype=torch.float32)
    input, target = torch.randn(20, 5), torch.randn(20, 3)
    for model in (ours, theirs):
        torch.manual_seed(9)
        model.train(training)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            mbp.train_step(model, input, target, optimizer)
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    assert calls_of(mbp.train_step, ours, input, target, optimizer)[0] == ("mlp_dropout" if training else "mlp_loss")


@pytest.mark.parametrize("function", [mbp.trace, mbp.per_sample_gradients, mbp.gradient_flow])
def test_functions_that_need_all_layers_refuse_by_name(function):
    ours, _ = pair(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"child '2' \(Dropout\) is not supported"):
        function(ours, torch.randn(6, 5), torch.randn(6, 3))


@pytest.mark.filterwarnings("ignore:.torch.jit.script(_method)?. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_model_drops_as_the_modules_do(training):
    ours, theirs = pair()
    for model in (ours, theirs):
        model[2] = nn.Sequential(model[2], nn.Identity())
        model.train(training)
    input = torch.randn(6, 5, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(mbp.fuse(ours), backend="aot_eager", fullgraph=True)
    want = step(ours, input)
    compiled(input)
    torch.manual_seed(5)
    assert_close(compiled(input).detach(), want[0])
    assert_close(step(ours, input), step(theirs, input))
    torch.compiler.reset()


# --- copies -----------------------------------------------------------------------------------------------------------


def test_copies_drop_on_their_own():
    ours, theirs = pair()
    input = torch.randn(6, 5, dtype=torch.float64)
    want = step(theirs, input)
    ours(input)  # makes the plan
    torch.save(ours, file := io.BytesIO())
    file.seek(0)
    for model in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert_close(step(model, input), want)
        model.eval()
        assert_close(step(ours, input), want)
        assert_close(step(model, input), step(copy.deepcopy(theirs).eval(), input))


def test_the_op_gets_one_flat_mask_of_bools():
    ours, _ = pair(0.25)
    ours[5].eval()
    with recorded_calls() as calls:
        ours(torch.randn(6, 5, dtype=torch.float64))
    ((name, (*_, kept, scales)),) = calls
    assert (name, kept.dtype, kept.shape) == ("mlp_dropout", torch.bool, (6 * (16 + 7),))
    assert scales == [1 / 0.75, 0.0, 1 / 0.75, 0.0]
