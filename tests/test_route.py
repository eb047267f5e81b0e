"""Which calls run kernels and which are composed from plain torch: transforms, autocast, compilation, tracing.

A raw op has no derivative, so a transform of one would silently give zeros. Each test therefore compares with plain
torch, and checks which implementation ran.
"""

import contextlib
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import torch_manualbp as mbp
from helpers import (
    Net,
    assert_close,
    assert_equal,
    assert_exact,
    calls_of,
    closed_mlp,
    integer_net,
    integers,
    one_layer,
    oracle,
    plain_mlp,
    recomputing_mlp,
    results,
    smooth_net,
)
from torch_manualbp import _route
from torch_manualbp._route import AUTOCAST, FUNC, KERNELS, TORCH, route
from torch_manualbp.autograd import LinearReLUFunction, MLPFunction

# At the first use of forward-mode AD, torch loads decompositions that are scripted.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

CASES = {
    "linear_relu": (one_layer, [4, 3]),
    "mlp": (mbp.mlp, [4, 6, 5, 3]),
    "closed_mlp": (closed_mlp, [4, 6, 5, 3]),
    "recomputing_mlp": (recomputing_mlp, [4, 6, 5, 3]),
}


@pytest.fixture(params=CASES)
def case(request):
    """Our function, its plain twin, and a network away from the kinks."""
    function, sizes = CASES[request.param]
    final_relu = function in (one_layer, closed_mlp)

    def plain(input, weights, biases):
        return plain_mlp(input, weights, biases, final_relu=final_relu)

    return function, plain, smooth_net(5, sizes, final_relu=True)


# --- route ----------------------------------------------------------------------------------------------------------


def test_kernels_apply_to_ordinary_cpu_tensors():
    assert route(torch.ones(2)) is KERNELS
    assert route(torch.ones(2, requires_grad=True)) is KERNELS
    with torch.no_grad():
        assert route(torch.ones(2)) is KERNELS


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("has_units", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(2, 8), (2048, 64)])
def test_large_bfloat16_networks_go_to_torch_where_it_has_instructions_for_them(
    store, has_units, dtype, rows, width, monkeypatch
):
    monkeypatch.setattr(_route, "_has_bfloat16_units", has_units)
    weights = [torch.ones(width, width, dtype=dtype, requires_grad=True) for _ in range(2)]
    input = torch.ones(rows, width, dtype=dtype)
    output = mbp.mlp(input, weights, activations="store" if store else "recompute")
    by_torch = has_units and dtype == torch.bfloat16 and rows == 2048 and store
    assert ("MLPFunction" in output.grad_fn.name()) is not by_torch
    assert_equal(output, plain_mlp(input, weights, [None, None]))


@pytest.fixture
def bfloat16_units(monkeypatch):
    """A CPU with instructions for bfloat16, which our kernels use."""
    monkeypatch.setattr(_route, "_has_bfloat16_units", True)
    monkeypatch.setattr(_route, "_kernels_have_bfloat16_units", True)


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 512), (2048, 64), (31, 1024), (32, 1024), (2048, 1024)])
def test_kernels_with_these_instructions_leave_few_rows_of_large_weights_to_torch(
    store, dtype, rows, width, bfloat16_units
):
    by_torch = dtype == torch.bfloat16 and store and (rows, width) == (31, 1024)
    input, weight = torch.empty(rows, width, dtype=dtype), torch.empty(width, width, dtype=dtype)
    assert route(input, (weight, None), store) is (TORCH if by_torch else KERNELS)


@pytest.mark.parametrize(("width", "way"), [(256, FUNC), (1024, TORCH)])
def test_under_vmap_they_leave_any_rows_of_large_weights_to_torch(width, way, bfloat16_units):
    input, weights = torch.empty(64, width, dtype=torch.bfloat16), [torch.empty(width, width, dtype=torch.bfloat16)] * 2
    with under_vmap():
        assert route(input, weights[:1]) is way
        assert route(input, weights[:1], store=False) is FUNC
        # A fused Sequential asks about its input, and then about each run.
        assert route(input) is FUNC
        assert _route.route_run(FUNC, input, weights, [None, None], True, True) is way
        assert _route.route_run(FUNC, input, weights, [None, None], True, False) is FUNC


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", RuntimeError], ids=str)
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_rule_for_bfloat16_depends_on_the_processor_and_on_the_level(isa, amx, bf16, monkeypatch):
    def level():
        assert amx or bf16, "an import must not choose the level where nothing depends on it"
        if isa is RuntimeError:
            raise RuntimeError("MANUALBP_ISA=none is not a level of this build")
        return isa

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(_route._ops, "isa", level)
    spec = importlib.util.spec_from_file_location("torch_manualbp._route_again", _route.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)
    spec.loader.exec_module(again)
    assert again._has_bfloat16_units == (amx or bf16)
    ours = bf16 and not amx and isa == "avx512_bf16"
    assert again._kernels_have_bfloat16_units == ours
    input, weight = torch.empty(2048, 64, dtype=torch.bfloat16), torch.empty(64, 64, dtype=torch.bfloat16)
    assert again.torch_is_faster(input, [weight]) == ((amx or bf16) and not ours)
    assert again.torch_may_be_faster([weight]) == ((amx or bf16) and not ours)


@contextlib.contextmanager
def under_vmap():
    # vmap does this around the call.
    with torch._functorch.vmap.vmap_increment_nesting(2, "error"):
        yield


def test_kernels_do_not_apply_in_forward_mode():
    with forward_ad.dual_level():
        assert route(torch.ones(2)) is TORCH
    assert route(torch.ones(2)) is KERNELS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_apply_under_autocast_for_the_cpu(dtype):
    with torch.autocast("cpu", dtype):
        assert route(torch.ones(2)) is AUTOCAST
        assert route(torch.ones(2, dtype=dtype), [torch.ones(3, 2), None]) is AUTOCAST
        assert route(torch.ones(2, dtype=torch.float64)) is TORCH
        assert route(torch.ones(2), [torch.ones(3, 2, dtype=torch.float64)]) is TORCH
        with forward_ad.dual_level():
            assert route(torch.ones(2)) is TORCH
        with torch.autocast("cpu", enabled=False):
            assert route(torch.ones(2)) is KERNELS
    assert route(torch.ones(2)) is KERNELS


@contextlib.contextmanager
def under_functionalize():
    # functionalize does this around the call.
    torch._C._functorch._func_increment_nesting(True)
    try:
        yield
    finally:
        torch._C._functorch._func_decrement_nesting()


def test_kernels_apply_level_by_level_under_vmap_and_nothing_else():
    with under_vmap():
        assert route(torch.ones(2)) is FUNC
        assert route(torch.ones(2), [torch.ones(2, 2)], store=False) is FUNC
        assert route(torch.ones(2, dtype=torch.int64)) is TORCH
        for context in (under_functionalize, forward_ad.dual_level, lambda: torch.autocast("cpu")):
            with context():
                assert route(torch.ones(2)) is TORCH
    with under_functionalize():
        assert route(torch.ones(2)) is TORCH


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_kernels_do_not_apply_on_other_devices_and_layouts():
    assert route(torch.ones(2, device="meta")) is TORCH
    assert route(torch.ones(2).to_sparse()) is TORCH
    assert route(torch.ones(2, 2).to_mkldnn()) is TORCH
    assert route(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])) is TORCH  # its layout is strided
    assert route(torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8)) is TORCH
    assert route(torch.ones(2), [torch.ones(2, 2), torch.ones(2, 2).to_sparse()]) is TORCH


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (torch._C, "_are_functorch_transforms_active"),
        (torch._C._functorch, "is_legacy_batchedtensor"),
        (forward_ad, "_current_level"),
        (nn.modules.module, "_has_any_global_hook"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_torch_that_renames_a_private_name_still_gives_right_results(monkeypatch, module, name):
    monkeypatch.delattr(module, name)
    spec = importlib.util.spec_from_file_location("torch_manualbp._route_of_another_torch", _route.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    fresh.KERNELS, fresh.TORCH, fresh.GRAPH = _route.KERNELS, _route.TORCH, _route.GRAPH
    for user, taken in (
        (mbp.functional, "route"),
        (mbp.modules, "route"),
        (mbp.modules, "global_hooks_exist"),
        (mbp.autograd, "backward_is_composed"),
    ):
        monkeypatch.setattr(user, taken, getattr(fresh, taken))
    net, gradient = integer_net(3, [4, 5, 2]), integers(3, 2)
    assert_exact(results(mbp.mlp, net, gradient), oracle(net, gradient))
    monkeypatch.undo()  # torch itself needs the name below
    model = mbp.MLP([4, 2]).double()
    assert_equal(model(net.input), model[0](net.input))


@pytest.mark.parametrize("name", [*_route._PEELING, "_SingleLevelFunction"])
def test_without_the_functions_that_peel_levels_torch_computes_under_transforms(monkeypatch, name):
    monkeypatch.delattr(torch.autograd.function if name == "_SingleLevelFunction" else torch._C._functorch, name)
    spec = importlib.util.spec_from_file_location("torch_manualbp._route_of_another_torch", _route.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    monkeypatch.undo()  # vmap itself needs some of them
    with under_vmap():
        assert fresh.route(torch.ones(2)) == TORCH
        assert route(torch.ones(2)) is FUNC


# --- torch.func and forward-mode AD ---------------------------------------------------------------------------------


def test_func_grad(case):
    function, plain, net = case

    def loss(function):
        return lambda *net: function(*net).pow(2).sum()

    assert_close(grad(loss(function), (0, 1, 2))(*net), grad(loss(plain), (0, 1, 2))(*net))


def test_func_vjp_and_jvp(case):
    function, plain, net = case
    tangents = tuple(net.map(torch.randn_like))
    output, pull = vjp(function, *net)
    plain_output, plain_pull = vjp(plain, *net)
    cotangent = torch.randn_like(output)
    assert_close(output, plain_output)
    assert_close(pull(cotangent), plain_pull(cotangent))
    assert_close(jvp(function, tuple(net), tangents), jvp(plain, tuple(net), tangents))


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
@pytest.mark.parametrize("argument", [0, 1, 2], ids=["input", "weights", "biases"])
def test_jacobians_and_hessians(case, transform, argument):
    function, plain, net = case
    if transform is hessian:
        function, plain = (lambda *net, f=f: f(*net).pow(2).sum() for f in (function, plain))
    assert_close(transform(function, argument)(*net), transform(plain, argument)(*net))


def test_vmap_over_inputs_weights_or_both(case):
    function, plain, net = case
    inputs = torch.randn(7, *net.input.shape).double()
    many = Net(inputs, *(torch.utils._pytree.tree_map(lambda t: torch.randn(7, *t.shape).double(), net[1:])))
    for in_dims in ((0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)):
        args = [many[k] if dim == 0 else net[k] for k, dim in enumerate(in_dims)]
        assert_close(vmap(function, in_dims)(*args), vmap(plain, in_dims)(*args))
    assert_close(vmap(function, (1, None, None), out_dims=1)(net.input[None], *net[1:]), plain(*net)[None])


def test_per_sample_gradients_by_vmap_of_grad():
    model = mbp.MLP([4, 6, 3]).double()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    input = torch.randn(5, 4).double()

    def loss(parameters, row):
        return functional_call(model, parameters, (row,)).pow(2).sum()

    per_sample = vmap(grad(loss), (None, 0))(parameters, input)
    for i in range(5):
        model.zero_grad()
        model(input[i]).pow(2).sum().backward()
        for name, parameter in model.named_parameters():
            assert_close(per_sample[name][i], parameter.grad)


def test_forward_mode_with_dual_tensors(case):
    function, plain, net = case
    tangent = torch.randn_like(net.input)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(net.input, tangent)
        got, want = (forward_ad.unpack_dual(f(dual, *net[1:])) for f in (function, plain))
        assert_close(got.primal, want.primal)
        assert_close(got.tangent, want.tangent)


def test_forward_mode_over_reverse_mode(case):
    function, plain, net = case

    def slope(function):
        return grad(lambda input: function(input, *net[1:]).pow(3).sum())

    tangent = torch.randn_like(net.input)
    assert_close(jvp(slope(function), (net.input,), (tangent,)), jvp(slope(plain), (net.input,), (tangent,)))


@pytest.mark.parametrize("vectorize", [False, True])
def test_autograd_functional_hessian(case, vectorize):
    function, plain, net = case

    def total(function):
        return lambda input: function(input, *net[1:]).pow(2).sum()

    got, want = (torch.autograd.functional.hessian(total(f), net.input, vectorize=vectorize) for f in (function, plain))
    assert_close(got, want)


def test_batched_grad_outputs(case):
    function, plain, net = case
    leaves = net.recorded()
    grads = torch.randn(4, 5, 3).double()
    got, want = (
        torch.autograd.grad(f(*leaves), leaves.leaves(), grads, is_grads_batched=True) for f in (function, plain)
    )
    assert_close(got, want)


def test_a_tensor_that_escaped_a_transform_is_an_ordinary_tensor(case):
    function, plain, net = case
    escaped = []
    grad(lambda input: escaped.append(input * 2) or input.sum())(net.input)
    vmap(lambda row: escaped.append(row * 2) or row)(net.input)
    assert_close(function(escaped[0].detach(), *net[1:]), plain(2 * net.input, *net[1:]))
    weights = net.recorded().weights
    assert_close(function(escaped[0].detach(), weights, net.biases), plain(2 * net.input, *net[1:]))


@pytest.mark.parametrize("function", [LinearReLUFunction, MLPFunction])
def test_apply_records_one_node(function):
    net = integer_net(3, [4, 2]).recorded()
    if function is LinearReLUFunction:
        output = function.apply(net.input, net.weights[0], net.biases[0])
    else:
        output, hidden = function.apply(net.input, True, True, 1, net.weights[0], net.biases[0])
        assert hidden.shape == (0,)
    assert_equal(output, F.relu(F.linear(net.input, net.weights[0], net.biases[0])))
    assert type(output.grad_fn).__name__ == f"{function.__name__}Backward"


# --- compilation, export, tracing -----------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_without_graph_breaks(case, backend):
    function, plain, net = case
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    steps = []
    for f in (compiled, plain):
        leaves = net.recorded()
        output = f(*leaves)
        output.pow(2).sum().backward()
        steps.append([output.detach(), *(leaf.grad for leaf in leaves.leaves())])
    assert_close(*steps)
    assert calls_of(function, *net)  # outside, afterwards, kernels run again


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("make", ["MLP", "fused", "LinearReLU"])
def test_compile_of_modules_without_graph_breaks(make):
    models = {
        "MLP": lambda: mbp.MLP([4, 6, 3]),
        "fused": lambda: mbp.fuse(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.0), nn.Linear(6, 3))),
        "LinearReLU": lambda: mbp.LinearReLU(4, 3),
    }
    model = models[make]().double()
    input = torch.randn(5, 4).double()
    want = model(input)
    want.sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(input)
    output.sum().backward()
    assert_close(output, want)
    assert_close([parameter.grad for parameter in model.parameters()], expected)


@pytest.mark.usefixtures("_fresh_compiler")
def test_jvp_inside_compile():
    net = smooth_net(3, [4, 5, 2])
    tangent = torch.randn_like(net.input)

    def directional(function):
        return lambda input: jvp(lambda x: function(x, *net[1:]), (input,), (tangent,))

    compiled = torch.compile(directional(mbp.mlp), backend="eager", fullgraph=True)
    assert_close(compiled(net.input), directional(plain_mlp)(net.input))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model, input = mbp.MLP([4, 6, 3]), torch.randn(5, 4)
    program = torch.export.export(model, (input,), strict=strict)
    torch.testing.assert_close(program.module()(input), model(input))
    assert not any("manualbp" in str(node.target) for node in program.graph.nodes)  # runs without this library


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")  # torch 2.14
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # branches on shapes become constant
@pytest.mark.parametrize("make", [lambda: mbp.MLP([4, 6, 3]), lambda: mbp.LinearReLU(4, 3)], ids=["MLP", "LinearReLU"])
def test_jit_trace_is_differentiable_and_needs_no_library(make):
    model, input = make(), torch.randn(5, 4)
    traced = torch.jit.trace(model, input)
    assert "manualbp::" not in str(traced.inlined_graph)
    output = traced(input)
    torch.testing.assert_close(output, model(input))
    output.sum().backward()
    got = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(input).sum().backward()
    torch.testing.assert_close(got, [parameter.grad for parameter in model.parameters()])


def test_fx_trace_shows_the_children():
    model, input = mbp.MLP([4, 6, 3]), torch.randn(5, 4)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(input), model(input))


def test_fake_tensors_have_the_shapes_of_real_ones(case):
    function, _, net = case
    with torch._subclasses.FakeTensorMode() as mode:
        leaves = net.map(mode.from_tensor).recorded()
        output = function(*leaves)
        output.sum().backward()
        assert output.shape == (5, 3)
        assert [leaf.grad.shape for leaf in leaves.leaves()] == [leaf.shape for leaf in net.leaves()]


class Tagged(torch.Tensor):
    """A minimal subclass, as users write them."""


def test_tensor_subclasses_keep_their_type(case):
    function, plain, net = case
    tagged = net.input.as_subclass(Tagged)
    got, want = function(tagged, *net[1:]), plain(tagged, *net[1:])
    assert type(got) is type(want) is Tagged
    assert_close(got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor))


class Wrapped(torch.Tensor):
    """A subclass that wraps another tensor, as quantised weights do."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        assert op.namespace == "aten"
        return op(*(arg.held if isinstance(arg, Wrapped) else arg for arg in args), **(kwargs or {}))


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_parameters_that_are_subclasses_go_to_torch(where):
    x, weight, bias = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3)
    w, b = (Wrapped(weight), bias) if where == "weight" else (weight, Wrapped(bias))
    want = F.linear(x, weight, bias)
    assert_close(mbp.linear_relu(x, w, b), want.relu())
    assert_close(mbp.mlp(x, [w], [b]), want)
    assert_close(mbp.mlp_loss(x, want + 1, [w], [b]), torch.tensor(1.0))


def test_deterministic_mode_and_default_device_change_nothing(case):
    function, plain, net = case
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device("meta"):  # affects only factory functions
            assert_close(function(*net), plain(*net))
    finally:
        torch.use_deterministic_algorithms(False)


def test_integers_through_the_composition_equal_the_kernels():
    net, tangent = integer_net(5, [4, 6, 3]), integers(5, 4)
    output, _ = jvp(lambda input: mbp.mlp(input, *net[1:]), (net.input,), (tangent,))
    assert_equal(output, mbp.mlp(*net))
