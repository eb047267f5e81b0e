"""Tests the conversions in docs/howto/migrate.md on more networks, against the peers' arithmetic."""

import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import torch_manualbp as mbp

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "migrate.md"
OUTPUTS = {"None": lambda f: f, "ReLU": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh}


@pytest.fixture(scope="module")
def page():
    """The names that the page's code defines."""
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(block, names)
    return names


def assert_same_function(got, want, x):
    """Equal outputs, and equal gradients of the input."""
    results = []
    for function in (got, want):
        leaf = x.clone().requires_grad_()
        output = function(leaf)
        results.append((output, torch.autograd.grad(output, leaf, torch.ones_like(output))[0]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [[7, 5], [10, 33, 1], [4, 8, 8, 8, 3]], ids=str)
def test_from_apex(page, sizes, bias):
    weights = [torch.randn(d_out, d_in, dtype=torch.float64) for d_in, d_out in itertools.pairwise(sizes)]
    biases = [torch.randn(d_out, dtype=torch.float64) for d_out in sizes[1:]]
    checkpoint = {f"weight_{k}": weight for k, weight in enumerate(weights)}
    if bias:
        checkpoint |= {f"bias_{k}": value for k, value in enumerate(biases)}

    def apex(x):
        for k, weight in enumerate(weights):
            x = torch.relu(F.linear(x, weight, biases[k] if bias else None))
        return x

    model = page["from_apex"](checkpoint)
    assert_same_function(model, apex, torch.randn(20, sizes[0], dtype=torch.float64))
    mbp.unfuse(model)
    assert [type(child).__name__ for child in model] == ["Linear", "ReLU"] * len(weights)


def tcnn(params, x, n_output_dims, width, depth, activation):
    """Computes a `Network` of tiny-cuda-nn: pads the input with ones, uses row-major matrices, truncates outputs."""
    h, start = F.pad(x, (0, -x.shape[1] % 16), value=1.0), 0
    widths = [width] * depth + [n_output_dims + -n_output_dims % 16]
    for k, d_out in enumerate(widths):
        f = h @ params[start : start + d_out * h.shape[1]].view(d_out, h.shape[1]).T
        start += d_out * h.shape[1]
        h = torch.relu(f) if k < depth else OUTPUTS[activation](f)
    assert start == len(params)
    return h[:, :n_output_dims]


@pytest.mark.parametrize("activation", OUTPUTS)
@pytest.mark.parametrize(
    ("n_in", "n_out", "width", "depth"), [(3, 4, 64, 2), (16, 16, 16, 1), (17, 1, 32, 4), (5, 33, 48, 0)]
)
def test_from_tcnn(page, n_in, n_out, width, depth, activation):
    config = {"n_neurons": width, "n_hidden_layers": depth, "output_activation": activation}
    sizes = [-(-n_in // 16) * 16, *[width] * depth, -(-n_out // 16) * 16]
    params = torch.randn(sum(a * b for a, b in itertools.pairwise(sizes))) / 8
    model = page["from_tcnn"](params, n_in, n_out, config)
    assert_same_function(model, lambda x: tcnn(params, x, n_out, width, depth, activation), torch.rand(50, n_in))


def test_from_tcnn_refuses_what_it_cannot_convert(page):
    with pytest.raises(ValueError, match="must be ReLU, got SiLU"):
        page["from_tcnn"](torch.zeros(10), 3, 4, {"activation": "SiLU"})
    with pytest.raises(RuntimeError, match="split"):
        page["from_tcnn"](torch.zeros(10), 3, 4, {"n_neurons": 64, "n_hidden_layers": 2})
