"""Transforms of our functions and modules: every mode of gradcheck, torch.func, ensembles; and PyTorch's own samples.

test_route.py compares each function under each transform with plain torch. This module tests whole models, Functions
applied directly, derivatives against finite differences in every mode, and the inputs of PyTorch's own tests.
"""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

import torch_manualbp as mbp
from helpers import (
    DTYPES,
    assert_close,
    assert_equal,
    calls_of,
    closed_mlp,
    integer_net,
    on_leaves,
    one_layer,
    plain_mlp,
    plain_twin,
    recomputing_mlp,
    recorded_calls,
    smooth_net,
)
from torch_manualbp import _route
from torch_manualbp._losses import LossSpec
from torch_manualbp.autograd import LinearReLUFunction, MLPFunction, MLPLossFunction

# At the first use of forward-mode AD, torch loads decompositions that are scripted.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


# --- finite differences, in every mode of gradcheck -----------------------------------------------------------------

FUNCTIONS = {
    "linear_relu": (one_layer, [3, 2]),
    "mlp": (mbp.mlp, [3, 4, 2]),
    "closed_mlp": (closed_mlp, [3, 4, 2]),
    "recomputing_mlp": (recomputing_mlp, [3, 4, 2]),
}


@pytest.mark.parametrize("biases", ["all", "none", "mixed"])
@pytest.mark.parametrize("leading", [2, (), (2, 1, 2), 0], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_in_every_mode(name, leading, biases):
    function, sizes = FUNCTIONS[name]
    flat, leaves = on_leaves(function, smooth_net(leading, sizes, biases, final_relu=True))
    assert gradcheck(
        flat,
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=leading != () or biases == "all",  # F.linear itself fails for a vector without bias
        check_undefined_grad=True,
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradgradcheck_in_every_mode(name):
    function, sizes = FUNCTIONS[name]
    flat, leaves = on_leaves(function, smooth_net(2, sizes, final_relu=True))
    assert gradgradcheck(flat, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


# --- models ---------------------------------------------------------------------------------------------------------

MODELS = {
    "LinearReLU": lambda: mbp.LinearReLU(4, 3),
    "MLP": lambda: mbp.MLP([4, 6, 3]),
    "MLP recompute": lambda: mbp.MLP([4, 6, 3], activations="recompute"),
    "fused": lambda: mbp.fuse(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 3), nn.ReLU())),
}


@pytest.fixture(params=MODELS)
def pair(request):
    """A model and its plain twin, as functions of (parameters, input), with both arguments."""
    model = MODELS[request.param]().double()
    twin = plain_twin(model)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    functions = [lambda p, x, m=m: functional_call(m, p, (x,)) for m in (model, twin)]
    return *functions, parameters, torch.randn(5, 4).double()


def squares(function):
    return lambda *args: function(*args).pow(2).sum()


@pytest.mark.parametrize("argument", [0, 1], ids=["parameters", "input"])
@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, hessian], ids=lambda transform: transform.__name__)
def test_derivatives_of_models(pair, transform, argument):
    ours, plain, *args = pair
    if transform in (grad, hessian):
        ours, plain = squares(ours), squares(plain)
    assert_close(transform(ours, argument)(*args), transform(plain, argument)(*args))


def test_vjp_and_jvp_of_models(pair):
    ours, plain, parameters, input = pair
    tangents = ({name: torch.randn_like(p) for name, p in parameters.items()}, torch.randn_like(input))
    assert_close(jvp(ours, (parameters, input), tangents), jvp(plain, (parameters, input), tangents))
    (output, pull), (want, plain_pull) = vjp(ours, parameters, input), vjp(plain, parameters, input)
    assert_close(output, want)
    assert_close(pull(output), plain_pull(output))


def test_third_derivative_of_models(pair):
    ours, plain, parameters, input = pair

    def third(function):
        first = grad(lambda x: function(parameters, x).pow(3).sum())
        return grad(lambda x: grad(lambda y: first(y).pow(2).sum())(x).pow(2).sum())

    assert_close(third(ours)(input), third(plain)(input))


def test_per_sample_gradients_equal_a_loop(pair):
    ours, _, parameters, input = pair
    gradient = grad(squares(ours))
    together = vmap(gradient, (None, 0))(parameters, input)
    for i, row in enumerate(input):
        assert_close({name: value[i] for name, value in together.items()}, gradient(parameters, row))


@pytest.mark.parametrize("make", MODELS)
def test_an_ensemble_of_ten_equals_ten_models(make):
    models = [MODELS[make]().double() for _ in range(10)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    input = torch.randn(7, 4).double()

    def call(parameters, buffers, input):
        return functional_call(base, (parameters, buffers), (input,))

    assert_close(vmap(call, (0, 0, None))(parameters, buffers, input), torch.stack([model(input) for model in models]))
    inputs = torch.randn(10, 7, 4).double()
    got = vmap(grad(squares(call)))(parameters, buffers, inputs)
    for i, model in enumerate(models):
        model(inputs[i]).pow(2).sum().backward()
        assert_close({name: value[i] for name, value in got.items()}, {n: p.grad for n, p in model.named_parameters()})


# --- by our kernels -------------------------------------------------------------------------------------------------

FORWARD, BACKWARD = "mlp_stacked", "mlp_stacked_backward"
SIZES = [5, 16, 9, 3]


def ensemble(make, count=4):
    """Models, their parameters stacked, and a function of one model's parameters and its input."""
    models = [make() for _ in range(count)]
    parameters, _ = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    return models, parameters, lambda parameters, input: functional_call(base, parameters, (input,))


ENSEMBLES = {
    "MLP": lambda **options: mbp.MLP(SIZES, **options),
    "recompute": lambda **options: mbp.MLP(SIZES, activations="recompute", **options),
    "without biases": lambda **options: mbp.MLP(SIZES, bias=False, **options),
    "fused": lambda **options: mbp.fuse(nn.Sequential(*mbp.MLP(SIZES, **options), nn.ReLU())),
    "nested": lambda **options: mbp.fuse(nn.Sequential(nn.Sequential(*mbp.MLP(SIZES, **options)), nn.Identity())),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", ENSEMBLES)
def test_an_ensemble_has_the_bits_of_separate_models(make, dtype, threads, monkeypatch):
    monkeypatch.setattr(_route, "_has_bfloat16_units", False)
    torch.set_num_threads(threads)
    models, parameters, call = ensemble(lambda: ENSEMBLES[make](dtype=dtype))
    input, inputs = torch.randn(7, 5).to(dtype), torch.randn(4, 7, 5).to(dtype)
    for in_dims, x, of in (((0, None), input, lambda i: input), ((0, 0), inputs, lambda i: inputs[i])):

        def losses(parameters, x, in_dims=in_dims):
            return vmap(lambda p, x: call(p, x).float().pow(2).sum(), in_dims)(parameters, x)

        functional = {name: parameter.detach() for name, parameter in parameters.items()}
        outputs = vmap(call, in_dims)(parameters, x)
        by_func = vmap(grad(lambda p, x: call(p, x).float().pow(2).sum()), in_dims)(functional, x)
        outside = grad(lambda p, x: losses(p, x).sum())(functional, x)
        for parameter in parameters.values():
            parameter.grad = None
        losses(parameters, x).sum().backward()
        for i, model in enumerate(models):
            model.zero_grad()
            output = model(of(i))
            output.float().pow(2).sum().backward()
            assert_equal(outputs[i], output)
            for name, parameter in model.named_parameters():
                for gradients in (by_func[name], outside[name], parameters[name].grad):
                    assert_equal(gradients[i], parameter.grad)
    assert calls_of(lambda: vmap(call, (0, None))(functional, input)) == [FORWARD]
    assert calls_of(lambda: losses(parameters, x).sum().backward()) == [FORWARD, BACKWARD]
    step = vmap(grad(lambda p, x: call(p, x).sum()), in_dims)
    assert calls_of(step, functional, x) == [FORWARD, BACKWARD]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["store", "recompute"])
def test_a_batch_of_inputs_has_the_bits_of_one_batch(activations, dtype, monkeypatch):
    monkeypatch.setattr(_route, "_has_bfloat16_units", False)
    model = mbp.MLP(SIZES, activations=activations, dtype=dtype)
    input = torch.randn(6, 4, 5).to(dtype).requires_grad_()
    output = model(input)
    output.float().pow(2).sum().backward()
    for dim in (0, 1):
        assert_equal(vmap(model, dim, dim)(input), output)
    assert_equal(vmap(vmap(model))(input), output)
    assert_equal(vmap(vmap(model), 1, 1)(input), output)
    of_input = grad(lambda x: model(x).float().pow(2).sum())
    assert_equal(vmap(of_input)(input.detach()), input.grad)
    assert_equal(vmap(vmap(of_input))(input.detach()), input.grad)
    assert calls_of(vmap(vmap(of_input)), input.detach()) == [FORWARD, BACKWARD]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["store", "recompute"])
@pytest.mark.parametrize("rows", [(), (1,), (3,)], ids=str)
def test_per_sample_gradients_have_the_bits_of_a_loop(rows, activations, dtype, monkeypatch):
    monkeypatch.setattr(_route, "_has_bfloat16_units", False)
    model = mbp.MLP(SIZES, activations=activations, dtype=dtype)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    input = torch.randn(20, *rows, 5).to(dtype)

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).float().pow(2).sum()

    for chunk_size in (None, 7):
        per_sample = vmap(grad(loss), (None, 0), chunk_size=chunk_size)(parameters, input)
        for i, x in enumerate(input):
            model.zero_grad()
            model(x).float().pow(2).sum().backward()
            assert_equal({name: value[i] for name, value in per_sample.items()}, grad(loss)(parameters, x))
            assert_equal({name: value[i] for name, value in per_sample.items()}, gradients_of(model))
    assert calls_of(vmap(grad(loss), (None, 0)), parameters, input) == [FORWARD, BACKWARD]


def gradients_of(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_vmap_of_grad_gives_per_sample_gradients():
    model, x, y = mbp.MLP(SIZES).double(), torch.randn(50, 5).double(), torch.randn(50, 3).double()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, x, y):
        return F.mse_loss(functional_call(model, parameters, (x,)), y)

    by_func = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    assert_close(by_func, mbp.per_sample_gradients(model, x, y))


def test_frozen_parameters_and_inputs_cost_nothing():
    net = smooth_net(6, SIZES)

    def first(weight, x):
        return mbp.mlp(x, [weight, *net.weights[1:]], net.biases).pow(2).sum()

    def last(weight, x):
        return mbp.mlp(x, [*net.weights[:-1], weight], net.biases).pow(2).sum()

    for function, weight, k in ((first, net.weights[0], 0), (last, net.weights[-1], 2)):
        with recorded_calls() as calls:
            got = grad(function)(weight, net.input)
        leaf = weight.clone().requires_grad_()
        (want,) = torch.autograd.grad(function(leaf, net.input), leaf)
        assert_equal(got, want)
        needs = calls[-1][1][6]
        assert [i for i, need in enumerate(needs) if need] == [1 + k]


IN_DIMS = [
    (0, 0, 0), (None, 0, 0), (0, None, None), (1, None, None), (-1, 0, None), (None, None, 0), (None, [0, None, 2], None),
    (1, [None, 1, None], [0, None, 1]), (None, [2, 1, 0], [1, 1, 1]),
]  # fmt: skip


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_every_combination_of_dimensions(in_dims, final_relu):
    net = smooth_net(4, SIZES, final_relu=True)
    ours = closed_mlp if final_relu else mbp.mlp

    def plain(input, weights, biases):
        return plain_mlp(input, weights, biases, final_relu=final_relu)

    def widened(dims, tensor):
        if isinstance(tensor, list):
            return [widened(dims[k] if isinstance(dims, list) else dims, one) for k, one in enumerate(tensor)]
        if dims is None:
            return tensor
        return torch.stack([tensor + torch.randn_like(tensor) / 8 for _ in range(3)]).movedim(0, dims)

    args = [widened(dims, part) for dims, part in zip(in_dims, net, strict=True)]
    for f in (ours, grad(squares(ours), (0, 1, 2))):
        assert calls_of(vmap(f, in_dims), *args)[0] == FORWARD
    for transform in (lambda f: f, lambda f: grad(squares(f), (0, 1, 2)), lambda f: grad(squares(f), 1)):
        assert_close(vmap(transform(ours), in_dims)(*args), vmap(transform(plain), in_dims)(*args))
        if transform(len) is len:
            total = [grad(lambda *args, f=f: vmap(f, in_dims)(*args).pow(2).sum(), (0, 1, 2)) for f in (ours, plain)]
            assert_close(total[0](*args), total[1](*args))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch's own, in linearize
def test_other_uses_of_transforms(pair):
    ours, plain, parameters, input = pair
    assert_close(grad_and_value(squares(ours))(parameters, input), grad_and_value(squares(plain))(parameters, input))
    assert_close(functionalize(ours)(parameters, input), plain(parameters, input))
    assert_close(functionalize(grad(squares(ours)))(parameters, input), grad(squares(plain))(parameters, input))
    assert_close(grad(functionalize(squares(ours)))(parameters, input), grad(squares(plain))(parameters, input))
    tangent = torch.randn_like(input)
    (value, push), (want, plain_push) = (linearize(lambda x, f=f: f(parameters, x), input) for f in (ours, plain))
    assert_close((value, push(tangent)), (want, plain_push(tangent)))


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_randomness_makes_no_difference(randomness):
    models, parameters, call = ensemble(lambda: mbp.MLP(SIZES))
    input = torch.randn(6, 5)
    output = vmap(call, (0, None), randomness=randomness)(parameters, input)
    assert_equal(output, torch.stack([model(input) for model in models]))


def test_dropout_under_vmap_is_torchs():
    plain = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    fused, input = mbp.fuse(copy.deepcopy(plain)), torch.randn(4, 6, 5)
    for randomness in ("same", "different"):
        outputs = []
        for model in (fused, plain):
            torch.manual_seed(3)
            outputs.append(vmap(model, randomness=randomness)(input))
        torch.testing.assert_close(*outputs)
    with pytest.raises(RuntimeError, match="random"):
        vmap(fused)(input)
    plain.eval(), fused.eval()
    torch.testing.assert_close(vmap(fused)(input), vmap(plain)(input))
    assert calls_of(vmap(fused), input) == [FORWARD]


def test_hidden_activations_are_kept_only_for_gradients():
    model, input = mbp.MLP(SIZES), torch.randn(3, 6, 5)
    for function, store in ((vmap(model), True), (grad(lambda x: model(x).sum()), True)):
        with recorded_calls() as calls:
            function(input)
        assert calls[0][1][4] is store
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, recorded_calls() as calls:
            vmap(model)(input)
        assert calls[0][1][4] is False
    model.activations = "recompute"
    with recorded_calls() as calls:
        vmap(model)(input).sum().backward()
    assert [args[4] if name == FORWARD else len(args[4]) for name, args in calls] == [False, 0]


def test_no_grad_around_and_inside_of_grad():
    net = smooth_net(6, SIZES)

    def loss(function):
        return lambda x: function(x, *net[1:]).pow(2).sum()

    with torch.no_grad():
        assert_close(grad(loss(mbp.mlp))(net.input), grad(loss(plain_mlp))(net.input))
        twice = [grad(lambda x, f=f: grad(loss(f))(x).pow(2).sum())(net.input) for f in (mbp.mlp, plain_mlp)]
    assert_close(*twice)

    def partly(function):
        def total(x):
            with torch.no_grad():
                fixed = function(x, *net[1:])
            return (fixed * function(x, *net[1:])).sum()

        return grad(total)

    assert_close(partly(mbp.mlp)(net.input), partly(plain_mlp)(net.input))
    outer = net.input.clone().requires_grad_()
    with torch.no_grad():
        assert not grad(loss(mbp.mlp))(outer).requires_grad
    assert grad(loss(mbp.mlp))(outer).requires_grad


def test_tensors_of_other_transforms_that_have_ended():
    net = smooth_net(6, SIZES)
    escaped = []
    grad(lambda x: escaped.append(x * 2) or x.sum())(net.input)

    def loss(function):
        return lambda x: function(x + escaped[0], *net[1:]).pow(2).sum() + function(escaped[0], *net[1:]).sum()

    assert_close(grad(loss(mbp.mlp))(net.input), grad(loss(plain_mlp))(net.input))
    _, pull = vjp(mbp.mlp, *net)
    _, plain_pull = vjp(plain_mlp, *net)
    cotangents = torch.randn(3, 6, 3).double()
    assert_close(vmap(pull)(cotangents), vmap(plain_pull)(cotangents))
    assert_close(jvp(pull, (cotangents[0],), (cotangents[1],)), jvp(plain_pull, (cotangents[0],), (cotangents[1],)))
    assert_close(
        grad(lambda c: pull(c)[0].pow(3).sum())(cotangents[0]),
        grad(lambda c: plain_pull(c)[0].pow(3).sum())(cotangents[0]),
    )


def test_gradients_by_autograd_of_what_transforms_return():
    net = smooth_net(6, SIZES)
    leaves = [net.map(lambda tensor: tensor.clone().requires_grad_()) for _ in range(2)]
    found = []
    for function, (input, weights, biases) in zip((mbp.mlp, plain_mlp), leaves, strict=True):
        each = vmap(grad(lambda w, x, b=biases, f=function: f(x, w, b).pow(2).sum()), (None, 0))(weights, input)
        total = sum(one.pow(2).sum() for one in each)
        found.append(torch.autograd.grad(total, [input, *weights, *biases], create_graph=True, materialize_grads=True))
        found[-1] += torch.autograd.grad(sum(one.pow(2).sum() for one in found[-1]), [input, *weights])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_batched_gradients_of_an_ensemble():
    net = smooth_net(6, SIZES)
    found = []
    for function in (mbp.mlp, plain_mlp):
        weights = [torch.stack([weight, weight / 2]).requires_grad_() for weight in net.weights]
        output = vmap(lambda w, f=function: f(net.input, w, net.biases))(weights)
        torch.manual_seed(0)
        grads = torch.randn(4, *output.shape).double()
        found.append(torch.autograd.grad(output, weights, grads, is_grads_batched=True, retain_graph=True))
        found[-1] += torch.autograd.grad(output, weights[:1], grads[0])
    assert_close(*found)


def test_subclasses_below_a_transform_are_composed():
    class Tagged(torch.Tensor):
        pass

    net = smooth_net(6, SIZES)
    tagged = net.input.as_subclass(Tagged)
    assert_close(vmap(mbp.mlp, (0, None, None))(tagged, *net[1:]).as_subclass(torch.Tensor), plain_mlp(*net))


def test_shapes_that_broadcast_and_errors_are_torchs():
    net = smooth_net(6, [4, 5, 3])
    wide = [net.biases[0][:1], net.biases[1]]  # broadcasts
    assert_close(vmap(mbp.mlp, (0, None, None))(net.input, net.weights, wide), plain_mlp(net.input, net.weights, wide))
    for args in ((net.input[:, :3], *net[1:]), (net.input.float(), *net[1:])):
        with pytest.raises(RuntimeError) as plain:
            vmap(plain_mlp, (0, None, None))(*args)
        with pytest.raises(RuntimeError) as ours:
            vmap(mbp.mlp, (0, None, None))(*args)
        assert str(ours.value) == str(plain.value)


def test_threads_transform_models_of_their_own_at_once():
    models = [mbp.MLP(SIZES).double() for _ in range(3)]
    parameters, input = {name: p.detach() for name, p in models[0].named_parameters()}, torch.randn(6, 5).double()

    def work(model):
        function = vmap(grad(squares(lambda p, x: functional_call(model, p, (x,)))), (None, 0))
        return [function(parameters, input) for _ in range(20)]

    with ThreadPoolExecutor(3) as pool:
        first, *others = [found for each in pool.map(work, models) for found in each]
    for other in others:
        assert_equal(other, first)


def test_weights_that_change_between_the_passes_are_refused():
    net = smooth_net(6, SIZES)
    weights = [weight.clone().requires_grad_() for weight in net.weights]
    output = vmap(lambda x: mbp.mlp(x, weights, net.biases))(net.input)
    with torch.no_grad():
        weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# --- the Functions, applied directly --------------------------------------------------------------------------------


def _applied(name, final_relu=False):
    """`name`.apply as a function of (input, weight, bias) of one or two equal layers, and its plain twin."""
    target, spec = torch.ones(5, 4).double(), LossSpec()
    cases = {
        "LinearReLUFunction": (LinearReLUFunction.apply, lambda x, w, b: F.relu(F.linear(x, w, b))),
        "MLPFunction": (
            lambda x, w, b: MLPFunction.apply(x, final_relu, True, 2, w, w, b, b)[0],
            lambda x, w, b: plain_mlp(x, [w, w], [b, b], final_relu=final_relu),
        ),
        "MLPFunction's hidden": (
            lambda x, w, b: MLPFunction.apply(x, final_relu, True, 2, w, w, b, b)[1],
            lambda x, w, b: F.relu(F.linear(x, w, b)).flatten(),
        ),
        "MLPLossFunction": (
            lambda x, w, b: MLPLossFunction.apply(x, target[: x.shape[0]], spec, 2, w, w, b, b),
            lambda x, w, b: F.mse_loss(plain_mlp(x, [w, w], [b, b]), target[: x.shape[0]]),
        ),
    }
    return cases[name]


APPLIED = ["LinearReLUFunction", "MLPFunction", "MLPFunction's hidden", "MLPLossFunction"]


@pytest.mark.parametrize("name", APPLIED)
def test_functions_applied_under_transforms(name):
    ours, plain = _applied(name)
    net = smooth_net(5, [4, 4])
    args = (net.input, net.weights[0], net.biases[0])
    tangents = tuple(map(torch.randn_like, args))
    every = (0, 1, 2)
    assert_close(jvp(ours, args, tangents), jvp(plain, args, tangents))
    assert_close(grad(squares(ours), every)(*args), grad(squares(plain), every)(*args))
    assert_close(hessian(squares(ours))(*args), hessian(squares(plain))(*args))
    assert_close(jacrev(ours, every)(*args), jacrev(plain, every)(*args))
    batched = tuple(torch.randn(3, *arg.shape).double() for arg in args)
    assert_close(vmap(ours)(*batched), vmap(plain)(*batched))
    one_by_one = torch.stack([plain(args[0], weight, args[2]) for weight in batched[1]])
    assert_close(vmap(ours, (None, 0, None))(args[0], batched[1], args[2]), one_by_one)
    assert_close(vmap(grad(squares(ours), every))(*batched), vmap(grad(squares(plain), every))(*batched))


@pytest.mark.parametrize("name", APPLIED)
def test_functions_applied_to_dual_tensors(name):
    ours, _ = _applied(name)
    net = smooth_net(2, [4, 4])
    leaves = tuple(leaf.requires_grad_() for leaf in (net.input, net.weights[0], net.biases[0]))
    assert gradcheck(ours, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


def test_a_shared_layer_gets_its_gradient_once_in_a_graph_of_gradients():
    net = smooth_net(5, [4, 4])
    leaves = [leaf.requires_grad_() for leaf in (net.input, net.weights[0], net.biases[0])]

    def loss(x, w, b):
        return mbp.mlp_loss(x, torch.ones(5, 4).double(), [w, w], [b, b])

    once = torch.autograd.grad(loss(*leaves), leaves)
    assert_close(torch.autograd.grad(loss(*leaves), leaves, create_graph=True), once)
    assert gradgradcheck(loss, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLIED)
@pytest.mark.parametrize("transform", [None, "grad", "vmap"])
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # Dynamo does so to capture it
def test_functions_applied_inside_compile_are_right_or_refused(name, transform):
    # If their raw ops were captured, their derivative would be zero.
    functions = _applied(name)
    net = smooth_net(5, [4, 4])
    args = (net.input, net.weights[0], net.biases[0])
    if transform == "grad":
        functions = [grad(squares(f)) for f in functions]
    elif transform == "vmap":
        functions, args = [vmap(f) for f in functions], tuple(torch.stack([arg, -arg]) for arg in args)
    ours, plain = functions
    torch.compiler.reset()
    # Under grad, after a graph break, Dynamo raises at mse_loss, with torch 2.10 at any function written in Python.
    if transform != "grad" or (name != "MLPLossFunction" and torch.__version__ >= (2, 13)):
        assert_close(torch.compile(lambda *args: ours(*args), backend="eager")(*args), plain(*args))
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"torch\.compile cannot capture (LinearReLU|MLP|MLPLoss)Function\.apply: call"):
        torch.compile(lambda *args: ours(*args), backend="eager", fullgraph=True)(*args)


# --- PyTorch's own samples ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def op_infos():
    """PyTorch's descriptions of its ops by name, from a private module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("torch.testing._internal.common_methods_invocations", exc_type=ImportError)
    return {op.name: op for op in module.op_db if op.name in ("nn.functional.linear", "nn.functional.relu")}


def samples(op_infos, name, dtype, requires_grad=False):
    """(input, weight, bias) of each sample; samples of ReLU become a layer with the identity as weight."""
    found = []
    for sample in op_infos[name].sample_inputs("cpu", dtype, requires_grad=requires_grad):
        input, rest = sample.input, (*sample.args, *sample.kwargs.values())
        if name == "nn.functional.relu":
            if input.dim() == 0:
                continue  # has no features
            rest = (torch.eye(input.shape[-1], dtype=dtype),)
        found.append((input, *rest))
    assert found
    return found


NAMES = ["nn.functional.linear", "nn.functional.relu"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_samples_of_pytorch_give_what_pytorch_gives(op_infos, name, dtype):
    for args in samples(op_infos, name, dtype):
        torch.testing.assert_close(mbp.linear_relu(*args), F.relu(F.linear(*args)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_samples_of_pytorch_have_derivatives_of_every_kind(op_infos, name):
    for args in samples(op_infos, name, torch.float64, requires_grad=True):
        assert gradcheck(
            mbp.linear_relu,
            args,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=args[0].dim() > 1 or len(args) == 3,  # as in test_gradcheck_in_every_mode
            check_undefined_grad=True,
        )
        assert gradgradcheck(mbp.linear_relu, args, check_fwd_over_rev=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_samples_of_pytorch_in_batches(op_infos, name):
    for args in samples(op_infos, name, torch.float64):
        many = [torch.stack([arg, -arg, 2 * arg]) for arg in args]
        want = torch.stack([F.relu(F.linear(*one)) for one in zip(*many, strict=True)])
        assert_close(vmap(mbp.linear_relu)(*many), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_transform_leaves_the_result_as_it_is(dtype):
    # With integers, neither the composition that a transform gets nor the kernels round.
    net = integer_net(5, [4, 6, 3], dtype)
    with torch.no_grad():
        output, _ = vjp(lambda input: mbp.mlp(input, *net[1:]), net.input)
    torch.testing.assert_close(output, mbp.mlp(*net), rtol=0, atol=0)
