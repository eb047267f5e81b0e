"""Shared by all tests: shapes, dtypes, networks, the oracle, and the two comparisons with it.

The oracle is float64 autograd on plain torch ops, with each layer's result rounded to the dtype under test, as storing
it does. Two kinds of data allow tight comparisons with it:

  integers   Small integers make every sum exact in every dtype, so results must equal the oracle's bit for bit, also
             for ReLU at exact zeros. Tests that ask which numbers were combined use them.
  normals    Real numbers differ by rounding. The error is measured against the sums of absolute values of the terms,
             because an element that cancels to almost nothing keeps their error. A pre-activation within rounding of
             zero may fall on either side of the ReLU and change gradients by whole units. The oracle therefore accepts
             the set of active units, and checks that wherever it differs from its own, rounding explains it.
"""

import contextlib
import copy
import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torch_manualbp as mbp
from torch_manualbp import _ops
from torch_manualbp._compute import run_layers

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Sizes around the edges of the register tiles, and ordinary ones.
BATCHES = (0, 1, 5)
WIDTHS = (1, 2, 7, 8, 9, 16, 17, 64, 100)

# Large enough for several threads, slices of the batch, and every block border of the matrix product (at most 256
# columns, depth 384), for each way to split the work: by rows of the batch through all layers, and layer by layer.
LARGE = {
    "tall": (3000, [33, 100, 64, 7]),
    "slices of several chunks": (80_000, [2, 5, 1]),
    "short": (250, [30, 100, 90, 20]),
    "odd": (1021, [9, 17, 5]),
    "wide": (700, [300, 520, 10]),
    "many parameters": (200, [1100, 1000, 3]),
    "few rows": (3, [1100, 700, 2]),
}

# The instruction-set levels of this architecture, one per file; a machine may support only some of them.
_ARCHITECTURE = platform.machine().replace("arm64", "aarch64")
LEVELS = sorted(
    path.stem
    for path in (Path(__file__).parents[1] / "csrc" / "cpu" / "kernels").glob("*.cpp")
    if path.stem == "default" or f"defined(__{_ARCHITECTURE}__)" in path.read_text()
)

# The largest allowed error, as a fraction of the largest sum of absolute values in the tensor.
TOLERANCE = {
    torch.float64: 2**-48,  # 32 unit roundoffs (2^-53): sums of up to 3000 terms, up to 5 layers
    torch.float32: 2**-19,  # also 32 unit roundoffs (2^-24)
    torch.bfloat16: 2**-8,  # sums are accumulated in float32, so only the last place of a stored number can differ
    torch.float16: 2**-11,  # the same
}


class Net(NamedTuple):
    """A network and its input, or anything with this structure, such as gradients or layouts."""

    input: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]

    def leaves(self):
        return [self.input, *self.weights, *(bias for bias in self.biases if bias is not None)]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Net":
        biases = [None if bias is None else change(bias) for bias in self.biases]
        return Net(change(self.input), [change(weight) for weight in self.weights], biases)

    def names(self):
        weights = [f"weights[{k}]" for k in range(len(self.weights))]
        return ["input", *weights, *(f"biases[{k}]" for k, bias in enumerate(self.biases) if bias is not None)]

    def recorded(self):
        """The same tensors, strides included, as leaves that require grad."""
        return self.map(lambda tensor: tensor.detach().requires_grad_())


def integers(*shape, dtype=torch.float64, high=2):
    """Random integers from -high to high."""
    return torch.randint(-high, high + 1, shape).to(dtype)


def integer_net(leading, sizes, dtype=torch.float64, biases="all"):
    """Small integers. Weights are -1, 0 or 1 with about 4 nonzeros per row, so that five layers stay small."""
    weights = [
        integers(d_out, d_in, dtype=dtype, high=1) * (torch.rand(d_out, d_in) * d_in < 6)
        for d_in, d_out in itertools.pairwise(sizes)
    ]
    return Net(
        integers(*_leading(leading), sizes[0], dtype=dtype),
        weights,
        _biases(biases, sizes[1:], lambda d: integers(d, dtype=dtype)),
    )


def normal_net(leading, sizes, dtype=torch.float64, biases="all"):
    """Normal numbers; the weights are scaled so that activations keep their size through the layers."""
    weights = [torch.randn(d_out, d_in) * (2 / max(d_in, 1)) ** 0.5 for d_in, d_out in itertools.pairwise(sizes)]
    input = torch.randn(*_leading(leading), sizes[0])
    net = Net(input, weights, _biases(biases, sizes[1:], lambda d: torch.randn(d) / 2))
    return net.map(lambda tensor: tensor.to(dtype))


def smooth_net(leading, sizes, biases="all", final_relu=False):
    """A float64 network without pre-activations near 0, so that finite differences never cross a ReLU's kink."""
    for _ in range(100):
        net = normal_net(leading, sizes, biases=biases).map(lambda tensor: tensor + torch.randn_like(tensor) / 8)
        h, near = net.input, []
        for weight, bias in zip(net.weights, net.biases, strict=True):
            f = F.linear(h, weight, bias)
            h = torch.relu(f)
            near.append(bool((f.abs() < 1e-4).any()))
        if not any(near if final_relu else near[:-1]):
            return net
    raise AssertionError(f"no smooth network of sizes {sizes} in 100 draws")


def lay_out(tensor, order, steps, offset, expanded):
    """Equal values in a new layout: dimensions in `order` from the innermost, elements `steps` apart, from `offset` on.

    An `expanded` dimension repeats its first element, with stride 0.
    """
    shape = tensor.shape
    for d, wanted in enumerate(expanded):
        if wanted and shape[d]:
            tensor = tensor.narrow(d, 0, 1).expand_as(tensor)
    strides, step = [0] * len(shape), 1
    for d in order:
        strides[d] = 0 if expanded[d] else steps[d] * step
        step *= 1 if expanded[d] else steps[d] * max(shape[d], 1)
    view = torch.zeros(offset + step, dtype=tensor.dtype).as_strided(shape, strides, offset)
    if tensor.numel():  # expanded dimensions are written once
        narrow = tuple(slice(0, 1) if wanted else slice(None) for wanted in expanded)
        view[narrow] = tensor[narrow]
    return view


def _leading(leading):
    return (leading,) if isinstance(leading, int) else tuple(leading)


def _biases(which, widths, make):
    present = {"all": lambda k: True, "none": lambda k: False, "mixed": lambda k: k % 2 == 1}[which]
    return [make(width) if present(k) else None for k, width in enumerate(widths)]


# --- functions and networks under test ------------------------------------------------------------------------------


def one_layer(input, weights, biases):
    """`linear_relu` with the signature of `mlp`."""
    (weight,), (bias,) = weights, biases
    return mbp.linear_relu(input, weight, bias)


def closed_mlp(input, weights, biases):
    """`mlp` with a ReLU after the last layer too, as an `nn.Sequential` that ends in a ReLU calls it."""
    return run_layers(input, weights, biases, final_relu=True)


def recomputing_mlp(input, weights, biases=None):
    """`mlp` without stored activations."""
    return mbp.mlp(input, weights, biases, activations="recompute")


def plain_mlp(input, weights, biases=None, *, final_relu=False):
    """The same network in plain torch."""
    h = input
    for k, weight in enumerate(weights):
        f = F.linear(h, weight, None if biases is None else biases[k])
        h = torch.relu(f) if k < len(weights) - 1 or final_relu else f
    return h


def plain_network(sizes, bias=True, dtype=None):
    """The nn.Sequential that MLP(sizes) stands for."""
    layers = []
    for d_in, d_out in itertools.pairwise(sizes):
        layers += [nn.Linear(d_in, d_out, bias=bias, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class PlainLinearReLU(nn.Linear):
    """`LinearReLU` in plain torch."""

    def forward(self, input):
        return torch.relu(super().forward(input))


def plain_twin(model):
    """A plain torch copy of a LinearReLU, or of a Sequential that contains some, with the same parameter names."""
    model = copy.deepcopy(model)
    if not isinstance(model, mbp.LinearReLU):
        return nn.Sequential(*(plain_twin(child) if isinstance(child, mbp.LinearReLU) else child for child in model))
    twin = PlainLinearReLU(model.in_features, model.out_features, model.bias is not None, dtype=model.weight.dtype)
    twin.load_state_dict(model.state_dict())
    return twin


def twins(sizes, bias=True, dtype=None, seed=0):
    """An MLP and its plain twin, each made from the same seed."""
    made = []
    for network in (mbp.MLP, plain_network):
        torch.manual_seed(seed)
        made.append(network(sizes, bias=bias, dtype=dtype))
    return made


def training_step(model, input, target=None):
    """The output and each parameter's gradient or None; clears the gradients. Dropout uses the same seed each time."""
    torch.manual_seed(7)
    model.zero_grad()
    output = model(input)
    (output.pow(2).sum() if target is None else F.mse_loss(output, target)).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return [output.detach(), *gradients]


def on_leaves(function, net):
    """function(input, weights, biases) as a function of a flat list of the tensors that exist, and these as leaves."""
    layers, present = len(net.weights), [bias is not None for bias in net.biases]

    def flat(input, *parameters):
        biases = iter(parameters[layers:])
        return function(input, parameters[:layers], [next(biases) if there else None for there in present])

    return flat, net.recorded().leaves()


def results(function, net, grad_output):
    """The output of function(*net), and the gradient of each leaf for this grad_output."""
    leaves = net.recorded()
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves.leaves(), grad_output)]


def units(net, final_relu=False):
    """The units that are active in our forward pass (NaN is: its gradient passes), one boolean tensor per ReLU."""
    output, hidden = _ops.mlp(*net, final_relu, True)
    leading = net.input.shape[:-1]
    widths = [weight.shape[0] for weight in net.weights[:-1]]
    pieces = hidden.split([leading.numel() * width for width in widths]) if widths else ()
    on = [~(piece.view(*leading, width) <= 0) for piece, width in zip(pieces, widths, strict=True)]
    return [*on, ~(output <= 0)] if final_relu else on


# --- the oracle and the comparisons ---------------------------------------------------------------------------------


class Truth(NamedTuple):
    """The oracle's output and gradient of each leaf, with the sums of absolute values behind each."""

    names: list[str]
    values: list[Tensor]
    sums: list[Tensor]


def oracle(net, grad_output, *, final_relu=False, on=None):
    """Float64 autograd on plain torch ops, with each layer rounded to the dtype of `net`; `on` comes from `units`."""
    dtype, layers = net.input.dtype, len(net.weights)
    leaves = net.recorded()
    input, weights, biases = leaves.map(lambda tensor: tensor.double())
    h, f = [input], []
    for k in range(layers):
        f.append(F.linear(h[k], weights[k], biases[k]).to(dtype).double())
        if k == layers - 1 and not final_relu:
            h.append(f[k])
        elif on is None:
            h.append(F.relu(f[k]))
        else:
            h.append(f[k].where(on[k], 0))
            _check_units(f[k], on[k], _sum(h[k], weights[k], biases[k]) * TOLERANCE[dtype])
    output = h[-1].to(dtype)
    grads = torch.autograd.grad(output, [*leaves.leaves(), *f], grad_output)
    grads, df = grads[:-layers], grads[-layers:]
    sums = [_sum(h[-2], weights[-1], biases[-1]), _sum(df[0], weights[0].t())]
    sums += [_sum(_rows(df[k]).t(), _rows(h[k]).t()) for k in range(layers)]
    sums += [_rows(df[k]).abs().sum(0) for k in range(layers) if biases[k] is not None]
    names = ["output", *(f"gradient of {name}" for name in net.names())]
    return Truth(names, [output.detach(), *grads], sums)


def _sum(a, b, bias=None):
    """|a| |b|ᵀ + |bias|."""
    return F.linear(a.abs(), b.abs(), None if bias is None else bias.abs()).detach()


def _rows(tensor):
    return tensor.detach().reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _check_units(f, on, rounding):
    wrong = ((f > 0) != on) & (f.abs() > rounding)
    assert not wrong.any(), f"{int(wrong.sum())} units contradict a pre-activation that is not near 0"


def assert_equal(got, want):
    """Equal shape, dtype and bits, except the sign of zero and the payload of NaN."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def assert_close(got, want):
    """Equal within float64 rounding; None equals None."""
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def assert_exact(got, truth):
    """Results on integers equal the oracle's; requires that every sum is exact in float32."""
    for name, one, want, total in zip(truth.names, got, truth.values, truth.sums, strict=True):
        assert total.numel() == 0 or total.max() < 2**24, f"{name}: sums too large to be exact in float32"
        torch.testing.assert_close(one, want, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def assert_near(got, truth):
    """Results on real numbers are within TOLERANCE of the oracle's."""
    for name, one, want, total in zip(truth.names, got, truth.values, truth.sums, strict=True):
        assert (one.dtype, one.shape) == (want.dtype, want.shape), name
        if want.numel():
            error, allowed = (one.double() - want.double()).abs().max(), TOLERANCE[one.dtype] * total.max()
            assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"


# --- in another process ---------------------------------------------------------------------------------------------


def python(code, *arguments, **variables):
    """The arguments for Popen of a new Python process that can import this library and these tests."""
    paths = os.pathsep.join([str(Path(mbp.__file__).parent.parent), str(Path(__file__).parent)])
    return {"args": [sys.executable, "-c", code, *arguments], "env": {**os.environ, "PYTHONPATH": paths, **variables}}


def run_python(code, *arguments, **variables):
    """Runs code in a new Python process with these environment variables; returns its output and exit status."""
    return subprocess.run(**python(code, *arguments, **variables), capture_output=True, text=True, check=False)


# --- which ops ran --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded_calls():
    """Yields a list to which each call of one of our ops appends (name, args): "mlp", "linear_relu_backward", …"""
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "manualbp":
                calls.append((op._opname, args))
            return op(*args, **(kwargs or {}))

    with Recorder():
        yield calls


def calls_of(function, *args):
    """The names of our ops that function(*args) runs, in order."""
    with recorded_calls() as calls:
        function(*args)
    return [name for name, _ in calls]
