"""`layers_of` finds the layers of a model and their names, and rejects children with unknown computations."""

import re

import pytest
import torch
from torch import nn

import torch_manualbp as mbp
from helpers import run_python
from torch_manualbp._layers import layers_of, runs_of


def test_layers_have_the_names_of_the_parameters():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 2, bias=False))
    layers = layers_of(model)
    named = dict(model.named_parameters())
    assert [layer.name for layer in layers] == ["0.0", "1"]
    assert all(named[layer.parameter_name("weight")] is layer.weight for layer in layers)
    assert named[layers[0].parameter_name("bias")] is layers[0].bias
    (alone,) = layers_of(mbp.LinearReLU(3, 4))
    assert (alone.parameter_name("weight"), alone.relu) == ("weight", True)


def test_a_run_ends_after_the_first_layer_without_a_relu():
    model = nn.Sequential(
        *(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)),
        *(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU()),
    )
    runs = [[layer.name for layer in run] for run in runs_of(layers_of(model))]
    assert runs == [["0", "2"], ["3", "5"]]


@pytest.mark.parametrize(
    ("child", "text"),
    [
        (nn.Flatten(), r"child '1' \(Flatten\) is not supported"),
        (nn.Identity(), r"child '1' \(Identity\)"),
        (nn.Dropout(0.1).eval(), r"child '1' \(Dropout\)"),
        (nn.Sequential(nn.Tanh()), r"child '1.0' \(Tanh\)"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), r"child '1' \(ParametrizedLinear\)"),
    ],
    ids=str,
)
def test_other_children_are_refused_by_name(child, text):
    with pytest.raises(TypeError, match=f"layers_of: {text}"):
        layers_of(nn.Sequential(nn.Linear(3, 3), child))


class LayerDrop(nn.Sequential):
    """Skips children at random."""

    def __iter__(self):
        return (child for child in self._modules.values() if torch.rand(()) < 0.9)


class Reversed(nn.Sequential):
    def __iter__(self):
        return reversed(self._modules.values())


class Doubled(nn.Sequential):
    def forward(self, input):
        return 2 * super().forward(input)


class Called(nn.Sequential):
    def __call__(self, input):
        return 2 * super().__call__(input)


class CalledWithin(nn.Sequential):
    def _call_impl(self, input):
        return 2 * super()._call_impl(input)


class Looked(nn.Sequential):
    def __getattr__(self, name):
        return super().__getattr__(name)


class Watched(nn.Sequential):
    def __getattribute__(self, name):
        return super().__getattribute__(name)


class Named(nn.Sequential):
    """Does not change the computation."""

    def __len__(self):
        return 1

    def describe(self):
        return "a head"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("kind", "attribute"),
    [
        (LayerDrop, "__iter__"),
        (Reversed, "__iter__"),
        (Doubled, "forward"),
        (Called, "__call__"),
        (CalledWithin, "_call_impl"),
        (Looked, "__getattr__"),
        (Watched, "__getattribute__"),
    ],
)
def test_a_sequential_that_computes_in_its_own_way_is_refused_by_name(kind, attribute, fused, nested):
    model = kind(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model = mbp.fuse(model) if fused else model
    named = re.escape(f"({type(model).__name__}) is not supported: its `{attribute}`")
    model = nn.Sequential(model) if nested else model
    for function in (mbp.trace, mbp.gradient_flow, mbp.per_sample_gradients, mbp.clipped_gradients):
        arguments = [1.0] if function is mbp.clipped_gradients else []
        with pytest.raises(TypeError, match=f"{function.__name__}: .*{named}"):
            function(model, torch.randn(4, 3), torch.randn(4, 3), *arguments)


@pytest.mark.parametrize("fused", [False, True])
def test_a_sequential_that_does_not_change_the_computation_is_traced(fused):
    model, x, y = Named(nn.Linear(3, 3), nn.ReLU()), torch.randn(4, 3), torch.randn(4, 3)
    t = mbp.trace(mbp.fuse(model) if fused else model, x, y)
    torch.testing.assert_close(t.output, model(x).detach())


@pytest.mark.parametrize(
    ("owner", "attribute", "name"),
    [
        (nn.Linear, "forward", r"child '0' \(Linear\)"),
        (nn.ReLU, "forward", r"child '1' \(ReLU\)"),
        (mbp.LinearReLU, "forward", r"child '2' \(LinearReLU\)"),
        (nn.Sequential, "forward", r"`model` \(Sequential\)"),
        (nn.Sequential, "__iter__", r"`model` \(Sequential\)"),
        (nn.Module, "__call__", r"`model` \(Sequential\)"),
        (nn.Module, "_call_impl", r"`model` \(Sequential\)"),
        (nn.Module, "__getattr__", r"`model` \(Sequential\)"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_layers_whose_class_was_changed_are_refused(owner, attribute, name, monkeypatch):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), mbp.LinearReLU(3, 3))
    original = getattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, lambda self, *args: original(self, *args))
    with pytest.raises(TypeError, match=f"layers_of: {name} is not supported: its `{attribute}` was replaced"):
        layers_of(model)
    monkeypatch.undo()
    assert len(layers_of(model)) == 2


def test_a_module_with_a_call_of_its_own_is_refused():
    for attribute in ("forward", "_call_impl"):
        layer = nn.Linear(3, 3)
        setattr(layer, attribute, torch.tanh)
        with pytest.raises(TypeError, match=f"child '0' .* its `{attribute}` was replaced"):
            layers_of(nn.Sequential(layer))


@pytest.mark.slow
def test_what_was_replaced_before_the_import_is_refused_too():
    code = """
from torch import nn
forward = nn.Linear.forward
nn.Linear.forward = lambda self, input: 3 * forward(self, input)
from torch_manualbp._layers import layers_of
try:
    layers_of(nn.Linear(3, 3))
except TypeError as error:
    print(error)
"""
    assert "its `forward` was replaced" in run_python(code).stdout


def test_models_whose_numbers_would_not_be_theirs_are_refused():
    watched, patched, own = nn.Linear(3, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3))
    watched.register_forward_hook(lambda module, args, output: output * 2)
    patched.forward = torch.tanh
    own.forward = lambda x: x
    computed = nn.Linear(3, 3)
    del computed.weight
    computed.weight = torch.ones(3, 3)
    for model, text in (
        (nn.Sequential(watched), r"child '0' \(Linear\) has hooks"),
        (nn.Sequential(nn.Linear(3, 3), patched), r"child '1' \(ReLU\) is not supported"),
        (own, r"`model` \(Sequential\) is not supported"),
        (nn.Sequential(computed), r"child '0' \(Linear\) does not compute with plain parameters"),
        (3, "`model` must be an nn.Module, got int"),
    ):
        with pytest.raises(TypeError, match=f"layers_of: {text}"):
            layers_of(model)
    shared = nn.Linear(3, 3)
    for model, text in (
        (nn.Sequential(shared, nn.ReLU(), shared), r"child '2' \(Linear\) shares a parameter with child '0'"),
        (nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), r"child '0' \(ReLU\) comes before the first linear layer"),
        (nn.Sequential(), "has no linear layer"),
    ):
        with pytest.raises(ValueError, match=f"layers_of: .*{text}"):
            layers_of(model)
