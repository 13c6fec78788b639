"""docs/api.md has every exported name, and its docstrings describe arguments that exist."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import megatron_patches
import pion_dist

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()
ENTRIES = [
    entry.rpartition(".")
    for entry in re.findall(r"^\.\. auto(?:class|function|data|exception):: (\S+)$", PAGE, re.M)
]
THINGS = {name: getattr(importlib.import_module(module), name) for module, _, name in ENTRIES}
WITH_ARGUMENTS = sorted(
    name
    for name, thing in THINGS.items()
    if re.search(r"^(Args|Attributes):$", inspect.getdoc(thing) or "", re.M)
)


def described(docstring: str, section: str) -> set[str]:
    """The names that a section describes; a line of two is ``a, b: ...``."""
    text = re.search(rf"^{section}:\n((?:    .*\n|\n)*)", docstring + "\n", re.M)
    lines = re.findall(r"^    (\w[\w, ]*):", text[1], re.M) if text else []
    return {name for line in lines for name in line.split(", ")}


@pytest.mark.parametrize("package", [pion_dist, megatron_patches])
def test_every_exported_name_is_there(package: Any) -> None:
    room = package.__name__
    names = {name for module, _, name in ENTRIES if f"{module}.".startswith(f"{room}.")}
    assert set(package.__all__) - {"__version__"} <= names


@pytest.mark.parametrize("name", WITH_ARGUMENTS)
def test_described_arguments_are_those_of_the_signature(name: str) -> None:
    thing = THINGS[name]
    section = "Attributes" if dataclasses.is_dataclass(thing) else "Args"
    assert described(inspect.getdoc(thing) or "", section) == set(
        inspect.signature(thing).parameters
    )
