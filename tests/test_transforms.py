"""Transforms of our functions and modules: every mode of gradcheck, torch.func, ensembles; and PyTorch's own samples.

test_route.py compares each function under each transform with plain torch. This module tests whole models, Functions
applied directly, derivatives against finite differences in every mode, and the inputs of PyTorch's own tests.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import torch_manualbp as mbp
from helpers import (
    DTYPES,
    assert_close,
    closed_mlp,
    integer_net,
    on_leaves,
    one_layer,
    plain_mlp,
    plain_twin,
    recomputing_mlp,
    smooth_net,
)
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
