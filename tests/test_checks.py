"""Argument errors found in Python name the argument, what was expected and what was passed."""

import pytest
import torch

from torch_manualbp._checks import ACTIVATION_MODES, check_activations, check_choice, check_layers, check_tensor

W = torch.ones(2, 3)


def test_tensors_pass():
    check_tensor("op", "input", W)
    check_tensor("op", "input", torch.nn.Parameter(W))
    check_tensor("op", "bias", W, optional=True)
    check_tensor("op", "bias", None, optional=True)


@pytest.mark.parametrize(
    ("value", "optional", "message"),
    [
        (None, False, "op: `x` must be a Tensor, got NoneType"),
        ([1.0], False, "op: `x` must be a Tensor, got list"),
        (1.0, True, "op: `x` must be a Tensor or None, got float"),
    ],
)
def test_what_is_not_a_tensor_is_a_type_error(value, optional, message):
    with pytest.raises(TypeError) as caught:
        check_tensor("op", "x", value, optional=optional)
    assert str(caught.value) == message


def test_layers_become_tuples_of_one_length():
    assert check_layers("op", [W, W], None) == ((W, W), (None, None))
    bias = torch.ones(2)
    assert check_layers("op", iter([W]), iter([bias])) == ((W,), (bias,))
    assert check_layers("op", (W, W), [None, bias]) == ((W, W), (None, bias))


@pytest.mark.parametrize(
    ("weights", "biases", "error", "message"),
    [
        ([], None, ValueError, "op: `weights` must hold at least one weight, got none"),
        ([], [], ValueError, "op: `weights` must hold at least one weight, got none"),
        ([W], [], ValueError, "op: `biases` must have one item per weight (1), got 0"),
        ([W, W], [None], ValueError, "op: `biases` must have one item per weight (2), got 1"),
        ([W], [None, None], ValueError, "op: `biases` must have one item per weight (1), got 2"),
        (W, None, TypeError, "op: `weights` must be a sequence of tensors, one per layer, got one Tensor"),
        ([W], W, TypeError, "op: `biases` must be a sequence of tensors, one per layer, got one Tensor"),
        ([W, 1], None, TypeError, "op: `weights[1]` must be a Tensor, got int"),
        ([None], None, TypeError, "op: `weights[0]` must be a Tensor, got NoneType"),
        ([W, W], [None, True], TypeError, "op: `biases[1]` must be a Tensor or None, got bool"),
    ],
)
def test_wrong_layers_are_named(weights, biases, error, message):
    with pytest.raises(error) as caught:
        check_layers("op", weights, biases)
    assert str(caught.value) == message


@pytest.mark.parametrize("mode", ACTIVATION_MODES)
def test_known_activation_modes_pass(mode):
    check_activations("op", mode)


@pytest.mark.parametrize("mode", ["", "Store", None, 1, True])
def test_unknown_activation_modes_are_a_value_error(mode):
    with pytest.raises(ValueError, match=r"^op: `activations` must be one of 'store', 'recompute', got ") as caught:
        check_activations("op", mode)
    assert str(caught.value).endswith(f"got {mode!r}")


def test_a_choice_is_one_of_those_named():
    check_choice("op", "x", "a", ("a", "b"))
    with pytest.raises(ValueError, match=r"^op: `x` must be one of 'a', 'b', got 'c'$"):
        check_choice("op", "x", "c", ("a", "b"))
