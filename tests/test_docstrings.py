"""The examples in docstrings run and print the output shown; everything public is documented."""

import doctest
import importlib
import inspect

import pytest
import torch

import torch_manualbp as mbp
from torch_manualbp import (
    _layers,
    compile_backend,
    conversion,
    functional,
    lecture,
    modules,
    per_sample,
    reference,
    training,
)
from torch_manualbp.inspection import monitor

# The names of these modules are also names of functions.
INSPECTION = [
    importlib.import_module(f"torch_manualbp.inspection.{name}") for name in ("trace", "gradient_flow", "memory")
]
MODULES = (
    *(functional, modules, conversion, compile_backend, reference, per_sample, training, lecture, _layers, monitor),
    *INSPECTION,
)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples_print_what_they_say(module):
    done = doctest.testmod(module, extraglobs={"torch": torch})
    assert done.attempted > 0
    assert done.failed == 0


@pytest.mark.parametrize("name", [name for name in mbp.__all__ if not name.startswith("__")])
def test_everything_public_tells_its_arguments_errors_and_an_example(name):
    thing = getattr(mbp, name)
    text = inspect.getdoc(thing)
    if inspect.signature(thing).parameters:
        assert "Args:" in text
        assert "Raises:" in text
    assert "Example:" in text


def test_all_names_exist_once():
    assert all(hasattr(mbp, name) for name in mbp.__all__)
    assert len(set(mbp.__all__)) == len(mbp.__all__)
