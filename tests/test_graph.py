"""Graphs of torch.compile and torch.export: which ops they contain, when these are plain torch, and the numbers."""

import itertools
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import torch_manualbp as mbp
from helpers import assert_close, assert_equal, integer_net, integers, normal_net, plain_mlp, smooth_net
from torch_manualbp import _graph, _route

# At the first use of forward-mode AD, torch loads decompositions that are scripted.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script(_method)?. is deprecated:DeprecationWarning")

MODELS = {
    "LinearReLU": lambda: mbp.LinearReLU(4, 3),
    "MLP": lambda: mbp.MLP([4, 6, 5, 3]),
    "MLP recompute": lambda: mbp.MLP([4, 6, 3], activations="recompute"),
    "fused": lambda: mbp.fuse(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Tanh(), nn.Linear(6, 3), nn.ReLU())),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=MODELS)
def model(request):
    """A float64 model whose parameters are small integers, so that every implementation gives equal results."""
    model = MODELS[request.param]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(integers(*parameter.shape))
    return model


def gradients(function, model, input):
    """The output and the gradients of its square."""
    model.zero_grad()
    output = function(input)
    output.pow(2).sum().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def ops_run(function, *args):
    """The names of our ops that function(*args) runs, in order, by the profiler; a dispatch mode stops Dynamo."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args)
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [event.name.removeprefix("manualbp::") for event in events if event.name.startswith("manualbp::")]


def ops_in(graph_module):
    return [str(node.target) for node in graph_module.graph.nodes if "manualbp" in str(node.target)]


# --- one op, one graph ----------------------------------------------------------------------------------------------


def test_a_model_is_one_graph_with_our_ops_in_it(model):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    input = integers(5, 4)
    for input in (integers(5, 4), integers(5, 4)):
        assert_equal(gradients(compiled, model, input), gradients(model, model, input))
    assert counter.frame_count == 1
    assert set(ops_in(counter.graphs[0])) == {str(_graph.layers)}
    assert len(ops_in(counter.graphs[0])) == (2 if "Tanh" in repr(model) else 1)


def test_forward_and_backward_are_one_call_each(model):
    compiled, input = torch.compile(model, backend="aot_eager", fullgraph=True), integers(5, 4)
    gradients(compiled, model, input)
    runs = 2 if "Tanh" in repr(model) else 1
    op = "mlp" if isinstance(model, mbp.MLP) else "linear_relu"
    assert ops_run(gradients, compiled, model, input) == [op] * runs + [f"{op}_backward"] * runs


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_no_recompilation_per_batch_size(model, dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch in (5, 6, 9, 33, 130, 2):
        input = integers(batch, 4)
        assert_equal(gradients(compiled, model, input), gradients(model, model, input))
    assert counter.frame_count == (1 if dynamic else 2)  # torch first compiles with the batch size as a constant


@pytest.mark.slow
@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3), (2, 0, 3)], ids=str)
def test_any_leading_dimensions(model, leading):
    compiled, input = torch.compile(model, backend="aot_eager", fullgraph=True), integers(*leading, 4)
    assert_equal(gradients(compiled, model, input), gradients(model, model, input))


@pytest.mark.slow
def test_each_subset_of_parameters_may_be_frozen():
    model, input = mbp.MLP([4, 5, 3]), torch.randn(5, 4)
    for subset in itertools.product([False, True], repeat=4):
        for parameter, need in zip(model.parameters(), subset, strict=True):
            parameter.requires_grad_(need)
        if any(subset):
            torch.compiler.reset()
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(gradients(compiled, model, input), gradients(model, model, input))
            assert [p.grad is not None for p in model.parameters()] == list(subset)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_is_recorded(model, mode):
    compiled, input = torch.compile(model, backend="aot_eager", fullgraph=True), integers(5, 4)
    with mode():
        assert_equal(compiled(input), model(input))
        assert not any("backward" in name for name in ops_run(compiled, input))
    assert_equal(gradients(compiled, model, input), gradients(model, model, input))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
def test_losses_of_a_model(loss):
    model, input = mbp.MLP([4, 6, 3]).double(), torch.randn(5, 4).double()
    target = torch.randint(3, (5,)) if loss == "cross_entropy" else torch.rand(5, 3).double()

    def compute(input):
        return model.loss(input, target, loss)

    compiled = torch.compile(compute, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, model, input), gradients(compute, model, input))
    assert "mlp_loss" in ops_run(compiled, input)
    assert not {"mlp", "mlp_backward"} & set(ops_run(lambda: compiled(input).backward()))
    with torch.no_grad():
        assert_equal(compiled(input), compute(input))


@pytest.mark.parametrize("change", [Tensor.float, Tensor.requires_grad_])
def test_a_target_that_is_not_for_our_loss_is_left_to_torch(change):
    model, input, target = mbp.MLP([4, 6, 3]).double(), torch.randn(5, 4).double(), change(torch.rand(5, 3).double())

    def compute(input):
        return model.loss(input, target)

    compiled = torch.compile(compute, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, model, input), gradients(compute, model, input))
    assert "mlp_loss" not in ops_run(compiled, input)


def test_a_network_of_tensors_is_ours_whatever_the_target():
    net, target = smooth_net(5, [4, 6, 3]), torch.rand(5, 3).double().softmax(1)

    def compute(input):
        return mbp.mlp_loss(input, target, net.weights, net.biases, loss="cross_entropy")

    compiled = torch.compile(compute, backend="aot_eager", fullgraph=True)
    assert_close(compiled(net.input), compute(net.input))
    assert "mlp" in ops_run(compiled, net.input)


def test_functions_of_tensors():
    net, gradient = integer_net(5, [4, 6, 3]).recorded(), integers(5, 3)

    def step(input, weights, biases, target):
        hidden = mbp.linear_relu(input, weights[0], biases[0])
        return mbp.mlp(hidden, weights[1:], biases[1:]) + mbp.mlp_loss(input, target, weights, biases, reduction="sum")

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for got, want in zip(
        *(torch.autograd.grad(f(*net, gradient).sum(), net.leaves()) for f in (compiled, step)), strict=True
    ):
        assert_equal(got, want)


@pytest.mark.slow  # Inductor compiles C++
def test_inductor():
    model, input = mbp.MLP([4, 6, 3]), torch.randn(5, 4)
    compiled = torch.compile(lambda input: F.softmax(model(input), -1), fullgraph=True)
    want = gradients(lambda input: F.softmax(model(input), -1), model, input)
    torch.testing.assert_close(gradients(compiled, model, input), want)
    assert ops_run(gradients, compiled, model, input) == ["mlp", "mlp_backward"]


def test_checkpointing_inside_compile():
    model, input = mbp.MLP([4, 6, 3]).double(), torch.randn(5, 4).double()
    compiled = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, model, input), gradients(model, model, input))


@pytest.mark.parametrize("change", ["hook", "subclass", "parametrized"])
def test_layers_that_are_watched_are_called_as_modules(change):
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    layers = [nn.Linear(4, 6), nn.ReLU(), Doubled(6, 6) if change == "subclass" else nn.Linear(6, 6), nn.ReLU()]
    plain = nn.Sequential(*layers).double()
    if change == "hook":
        layers[2].register_forward_hook(lambda module, args, output: output + 1)
    elif change == "parametrized":
        nn.utils.parametrizations.weight_norm(layers[2])
    input = torch.randn(5, 4).double()
    want = gradients(plain, plain, input)
    compiled = torch.compile(mbp.fuse(plain), backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, plain, input), want)


# --- derivatives inside a graph -------------------------------------------------------------------------------------

TRANSFORMS = {
    "grad": lambda f: grad(lambda *net: f(*net).pow(2).sum(), (0, 1, 2)),
    "vmap": lambda f: vmap(lambda input, *parameters: f(input, *parameters), (0, None, None)),
    "vmap over weights": lambda f: vmap(f, (None, 0, None)),
    "vmap of grad": lambda f: vmap(grad(lambda *net: f(*net).pow(2).sum(), 1), (0, None, None)),
    "jvp": lambda f: lambda *net: jvp(lambda input: f(input, *net[1:]), (net[0],), (net[0].cos(),)),
    "hessian": lambda f: hessian(lambda *net: f(*net).pow(2).sum()),
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside_compile(name, backend):
    net = smooth_net(5, [4, 6, 3])
    if name == "vmap over weights":
        net = net._replace(weights=[torch.stack([weight, -weight]) for weight in net.weights])
    compiled = torch.compile(lambda *net: TRANSFORMS[name](mbp.mlp)(*net), backend=backend, fullgraph=True)
    assert_close(compiled(*net), TRANSFORMS[name](plain_mlp)(*net))


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "hessian"])
def test_the_op_itself_under_transforms(name):
    # Runs what a graph that contains transforms runs when it is interpreted.
    net = smooth_net(5, [4, 6, 3])
    if name == "vmap over weights":
        net = net._replace(weights=[torch.stack([weight, -weight]) for weight in net.weights])

    def op(input, weights, biases):
        return _graph.layers(input, weights, biases, False, True)

    assert_close(TRANSFORMS[name](op)(*net), TRANSFORMS[name](plain_mlp)(*net))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_dual_tensors_that_come_after_compilation(backend):
    # With frozen weights, a graph of raw ops would return no tangent, without an error.
    model = mbp.MLP([4, 6, 3]).double().requires_grad_(False)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    input, tangent = torch.randn(2, 5, 4).double()
    assert_close(compiled(input), model(input))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(input, tangent)
        try:
            got = forward_ad.unpack_dual(compiled(dual))
        except torch._dynamo.exc.Unsupported:  # since torch 2.14, which rejects all dual tensors
            return
        want = forward_ad.unpack_dual(nn.Sequential(*model)(dual))
        assert_close(got.primal, want.primal)
        assert_close(got.tangent, want.tangent)


def test_double_backward_is_right_or_refused():
    model, input = mbp.MLP([4, 6, 3]).double(), torch.randn(5, 4).double().requires_grad_()

    def penalty(function):
        (slope,) = torch.autograd.grad(function(input).pow(2).sum(), input, create_graph=True)
        return torch.autograd.grad(slope.pow(2).sum(), list(model.parameters()))

    assert_close(penalty(torch.compile(model, backend="eager")), penalty(model))
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        penalty(torch.compile(model, backend="aot_eager"))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_the_casts_of_autocast_are_part_of_the_graph(where):
    model, input = mbp.MLP([4, 6, 3]), torch.randn(5, 4)

    def forward(input):
        with torch.autocast("cpu", torch.bfloat16):
            return model(input)

    compiled = torch.compile(forward if where == "inside" else model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "outside"):
        output = compiled(input)
        assert "mlp" in ops_run(compiled, input)
    assert_equal(output, forward(input))
    if where == "outside":
        assert_equal(compiled(input), model(input))  # and again without
        assert ops_run(compiled, input) != []


@pytest.mark.parametrize("has_units", [False, True])
def test_bfloat16_is_left_to_torch_where_it_has_instructions_for_it(has_units, monkeypatch):
    monkeypatch.setattr(_route, "_has_bfloat16_units", has_units)
    model, input = mbp.MLP([4, 6, 3]).bfloat16(), torch.randn(5, 4).bfloat16()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), model(input))
    assert (ops_run(compiled, input) == []) == has_units


@pytest.mark.parametrize("kind", [mbp.MLP, "fused"], ids=["MLP", "fused"])
@pytest.mark.parametrize(("width", "is_ours"), [(6, True), (1024, False)])
def test_kernels_with_these_instructions_leave_large_weights_to_torch(kind, width, is_ours, monkeypatch):
    monkeypatch.setattr(_route, "_has_bfloat16_units", True)
    monkeypatch.setattr(_route, "_kernels_have_bfloat16_units", True)
    if kind == "fused":
        model = mbp.fuse(nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width)))
    else:
        model = mbp.MLP([4, width, width])
    model, input = model.bfloat16(), torch.randn(40, 4).bfloat16()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), model(input))
    assert (ops_run(compiled, input) != []) == is_ours


@pytest.mark.parametrize(("sizes", "is_ours"), [([1, 1, 1], False), ([4, 1, 3], False), ([4, 2, 1], True)], ids=str)
def test_networks_without_a_matrix_product_are_left_to_the_compiler(sizes, is_ours):
    model, input = mbp.MLP(sizes).double(), torch.randn(5, sizes[0]).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, model, input), gradients(model, model, input))
    assert (ops_run(compiled, input) != []) == is_ours


def test_other_devices_get_plain_torch():
    model = mbp.MLP([4, 6, 3], device="meta")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert compiled(torch.ones(5, 4, device="meta")).shape == (5, 3)
    assert ops_run(compiled, torch.ones(5, 4, device="meta")) == []


def test_the_op_names_the_version_so_that_no_other_version_finds_what_was_compiled():
    assert str(_graph.layers) == f"manualbp.layers.v{mbp.__version__.replace('.', '_')}"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from opcheck in torch 2.14
@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_opcheck_of_layers(layers, final_relu):
    net = normal_net(5, [4, 6, 3][: layers + 1]).recorded()
    opcheck(_graph.layers, (*net, final_relu, True))


# --- export ---------------------------------------------------------------------------------------------------------


def test_export_with_any_batch_size_needs_no_library(model):
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (integers(5, 4),), dynamic_shapes=((batch, None),))
    assert ops_in(program) == []
    for rows in (2, 7, 100):
        input = integers(rows, 4)
        assert_equal(program.module()(input), model(input))


@pytest.mark.slow  # Inductor compiles C++
@pytest.mark.skipif(not shutil.which("g++"), reason="packaging compiles C++")
def test_package_compiled_ahead_of_time(tmp_path):
    model, input = mbp.MLP([4, 6, 3]).requires_grad_(False), torch.randn(5, 4)
    program = torch.export.export(model, (input,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own warnings
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(loaded(input), model(input))


# --- profiler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_the_profiler_shows_our_ops_by_name(model, compiled):
    function, input = torch.compile(model, backend="aot_eager") if compiled else model, integers(5, 4)
    gradients(function, model, input)
    op = "mlp" if isinstance(model, mbp.MLP) or ("Tanh" in repr(model) and not compiled) else "linear_relu"
    assert {op, f"{op}_backward"} == set(ops_run(gradients, function, model, input))
    if not compiled:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            gradients(function, model, input)
        node = {"linear_relu": "LinearReLUFunction", "mlp": "MLPFunction"}[op]
        assert any(event.name.endswith(f"{node}Backward") for event in profile.events())
