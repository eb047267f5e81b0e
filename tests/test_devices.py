"""On a device without kernels of this library, every function and module is the plain torch composition.

There are two such devices: meta, which computes only shapes, and "pretend", which this test adds to torch. It computes
on the CPU, but reports that its tensors are on another device.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_manualbp as mbp
from helpers import DTYPES, Net, calls_of, normal_net

# --- meta -----------------------------------------------------------------------------------------------------------


def on_meta(net):
    return net.map(lambda tensor: tensor.to("meta").requires_grad_())


FUNCTIONS = {
    "linear_relu": (lambda net: mbp.linear_relu(net.input, net.weights[0], net.biases[0]), [4, 3]),
    "mlp": (lambda net: mbp.mlp(*net), [4, 6, 5, 3]),
    "recomputing mlp": (lambda net: mbp.mlp(*net, activations="recompute"), [4, 6, 5, 3]),
    "mlp_loss": (lambda net: mbp.mlp_loss(net.input, torch.empty(7, 3, dtype=net.input.dtype, device="meta"), *net[1:]), [4, 6, 3]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_meta_tensors_have_shapes_and_gradients_of_the_right_shape(name, dtype):
    function, sizes = FUNCTIONS[name]
    net = on_meta(normal_net(7, sizes, dtype))
    assert calls_of(function, net) == []
    output = function(net)
    assert (output.device.type, output.dtype) == ("meta", dtype)
    assert output.shape == (() if name == "mlp_loss" else (7, 3))
    output.sum().backward()
    for leaf in net.leaves():
        assert (leaf.grad.shape, leaf.grad.device.type, leaf.grad.dtype) == (leaf.shape, "meta", dtype)


def test_modules_on_meta_learn_shapes_only():
    model = mbp.MLP([4, 6, 3], device="meta")
    input, target = torch.empty(7, 4, device="meta"), torch.empty(7, 3, device="meta")
    for step in (lambda: model.loss(input, target).backward(), lambda: model.loss_backward(input, target)):
        model.zero_grad()
        assert calls_of(step) == []
        assert all(parameter.grad.device.type == "meta" for parameter in model.parameters())


def test_per_sample_gradients_on_meta_are_shapes():
    model, input, target = (
        mbp.MLP([4, 6, 3], device="meta"),
        torch.empty(7, 4, device="meta"),
        torch.empty(7, 3, device="meta"),
    )
    assert mbp.per_sample_gradient_norms(model, input, target).shape == (7,)
    each, clipped = mbp.per_sample_gradients(model, input, target), mbp.clipped_gradients(model, input, target, 1.0)
    for name, parameter in model.named_parameters():
        assert each[name].shape == (7, *parameter.shape)
        assert clipped[name].shape == parameter.shape


def test_an_input_on_another_device_than_the_weights_raises_as_torch_does():
    model = mbp.MLP([4, 6, 3])
    for function in (nn.Sequential(*model), model, mbp.LinearReLU(4, 3)):
        with pytest.raises(RuntimeError, match="Tensor on device cpu is not on the expected device meta"):
            function(torch.empty(2, 4, device="meta"))


# --- an unknown device ----------------------------------------------------------------------------------------------

PRETEND = """
    import torch
    from torch.utils._pytree import tree_map
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("pretend")
    computed = []
    memory = {}  # maps a storage of the device to a CPU tensor with its numbers

    def wrap(value):
        if not isinstance(value, torch.Tensor):
            return value
        tensor = torch._C._acc.create_empty_tensor(value.shape, value.dtype)
        memory[tensor.untyped_storage()._cdata] = value.contiguous()  # `tensor` reports contiguous strides
        return tensor

    def on_cpu(tensor):
        return memory[tensor.untyped_storage()._cdata]

    def unwrap(value):
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return on_cpu(value) if isinstance(value, torch.Tensor) and value.device.type == "pretend" else value

    def compute(op, *args, **kwargs):
        computed.append(str(op))
        if op is torch.ops.aten._copy_from.default:  # (source, target), one of which may be on the CPU
            source, target = map(unwrap, args[:2])
            target.copy_(source)
            return args[1]
        given = {id(unwrap(arg)): arg for arg in args if isinstance(arg, torch.Tensor)}
        results = op(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        # An in-place op returns its argument.
        return tree_map(lambda result: given[id(result)] if id(result) in given else wrap(result), results)

    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(compute, "PrivateUse1")
    # Torch's implementation would resize its output, which this device cannot do.
    for name in ("abs", "mse_loss"):
        op = getattr(torch.ops.aten, name).default
        aten.impl(name, lambda *args, op=op: compute(op, *args), "PrivateUse1")
"""

CHECK = """
    import itertools
    import math
    import torch.nn.functional as F
    from torch import nn
    import torch_manualbp as mbp

    def there(tensor):
        return wrap(tensor.detach().clone()).requires_grad_(tensor.requires_grad)

    def assert_same(got, want):
        assert got.device.type == "pretend", got.device
        torch.testing.assert_close(on_cpu(got), want, rtol=1e-12, atol=1e-14)

    torch.manual_seed(0)
    sizes, dtype = [4, 6, 5, 3], torch.float64
    weights = [torch.randn(o, i, dtype=dtype, requires_grad=True) for i, o in itertools.pairwise(sizes)]
    biases = [torch.randn(o, dtype=dtype, requires_grad=True) for o in sizes[1:]]
    input, target = torch.randn(7, 4, dtype=dtype, requires_grad=True), torch.randn(7, 3, dtype=dtype)
    leaves = [input, *weights, *biases]

    functions = {
        "mlp": lambda x, t, w, b: mbp.mlp(x, w, b),
        "recomputing mlp": lambda x, t, w, b: mbp.mlp(x, w, b, activations="recompute"),
        "mlp_loss": lambda x, t, w, b: mbp.mlp_loss(x, t, w, b),
        "linear_relu": lambda x, t, w, b: mbp.linear_relu(x, w[0], b[0]),
    }
    for name, function in functions.items():
        want = function(input, target, weights, biases)
        wanted = torch.autograd.grad(want.sum(), leaves, allow_unused=True)
        moved = [there(leaf) for leaf in leaves]
        got = function(moved[0], there(target), moved[1:4], moved[4:])
        assert_same(got, want)
        for one, other in zip(torch.autograd.grad(got.sum(), moved, allow_unused=True), wanted, strict=True):
            assert (one is None) == (other is None), name
            if one is not None:
                assert_same(one, other)

    def move(model):
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(there(parameter.detach()))
        return model

    def assert_same_gradients(moved, model):
        for one, other in zip(moved.parameters(), model.parameters(), strict=True):
            assert_same(one.grad, other.grad)

    for make in (
        lambda: mbp.MLP(sizes, dtype=dtype),
        lambda: mbp.fuse(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Tanh(), nn.Linear(6, 3)).double()),
        lambda: nn.Sequential(mbp.LinearReLU(4, 3, dtype=dtype)),
    ):
        torch.manual_seed(1)
        model = make()
        torch.manual_seed(1)
        moved = move(make())
        for net, x, t in ((model, input.detach(), target), (moved, there(input.detach()), there(target))):
            F.mse_loss(net(x), t).backward()
        assert_same_gradients(moved, model)
        if isinstance(model, mbp.MLP):
            for way in ("loss", "loss_backward"):
                for net, x, t in ((model, input.detach(), target), (moved, there(input.detach()), there(target))):
                    net.zero_grad()
                    loss = getattr(net, way)(x, t)
                    if way == "loss":
                        loss.backward()
                assert_same_gradients(moved, model)

    def assert_all_the_same(got, want):
        assert got.keys() == want.keys()
        for name in want:
            assert_same(got[name], want[name])

    torch.manual_seed(2)
    model = mbp.MLP(sizes, dtype=dtype)
    torch.manual_seed(2)
    moved = move(mbp.MLP(sizes, dtype=dtype))
    here, away = (input.detach(), target), (there(input.detach()), there(target))
    assert_all_the_same(mbp.per_sample_gradients(moved, *away), mbp.per_sample_gradients(model, *here))
    assert_all_the_same(mbp.clipped_gradients(moved, *away, 0.5), mbp.clipped_gradients(model, *here, 0.5))
    assert_same(mbp.per_sample_gradient_norms(moved, *away), mbp.per_sample_gradient_norms(model, *here))
    traces = mbp.trace(moved, *away), mbp.trace(model, *here)
    for one, other in zip(*([*t.f, *t.dl_df, *t.dl_domega] for t in traces), strict=True):
        assert_same(one, other)
    traces[0].verify()

    flows = [[], []]
    for net, (x, t), measured in ((moved, away, flows[0]), (model, here, flows[1])):
        measured.append(mbp.gradient_flow(net, x, t))
        with mbp.GradientFlowMonitor(net) as monitor:
            F.mse_loss(net(x), t).backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.sub_(parameter.grad)
        measured += monitor.history
    for one, other in zip(*flows, strict=True):
        for got, want in zip(one.layers, other.layers, strict=True):
            for name, value in vars(want).items():
                same = math.isclose(getattr(got, name), value) if isinstance(value, float) else getattr(got, name) == value
                assert same, (name, got, want)
    assert all(layer.update_ratio > 0 for layer in flows[0][1].layers)

    assert any("mm" in op for op in computed), computed
    assert not any("manualbp" in op for op in computed), computed
    print("the same")
"""


@pytest.mark.slow
def test_a_device_that_is_unknown_to_the_library():
    setup = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(setup, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot have a device that is written in Python")
    # This needs a new process, because a device cannot be unregistered.
    program = textwrap.dedent(PRETEND) + textwrap.dedent(CHECK)
    root = Path(mbp.__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", program], cwd=root, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "the same\n"), result.stderr


# --- CUDA -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_cuda_nothing_of_it_is_touched():
    program = """
        import torch, torch_manualbp as mbp
        mbp.MLP([3, 4, 2]).loss_backward(torch.ones(5, 3), torch.ones(5, 2))
        assert not torch.cuda.is_initialized()
        assert not torch.cuda.is_available()
    """
    env = {"CUDA_VISIBLE_DEVICES": "", "PATH": "", "PYTHONPATH": str(Path(mbp.__file__).parent.parent)}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    result = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
def test_cuda_is_the_plain_composition(autocast):
    net = normal_net(7, [4, 6, 3], torch.float32).map(lambda tensor: tensor.cuda())
    steps = []
    for function in (mbp.mlp, lambda x, w, b: F.linear(F.relu(F.linear(x, w[0], b[0])), w[1], b[1])):
        leaves = Net(*net).recorded()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            output = function(*leaves)
        output.float().pow(2).sum().backward()
        steps.append([output.detach(), *(leaf.grad for leaf in leaves.leaves())])
    torch.testing.assert_close(*steps)
