"""An extension of griffe, which reads the docstrings: it knows "Examples:" as a section, we write "Example:"."""

from typing import Any

import griffe


class Example(griffe.Extension):
    """Shows an "Example:" as the code that it is, with its output."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
