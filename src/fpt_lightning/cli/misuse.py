"""What the command line cannot take, said in a line: which option, its value, and what may stand there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import Any

_KEY = re.compile(r'Parser key "(.+?)"')
_CLASS = re.compile(r"Problem with given class_path '(.+?)':\n")
_UNKNOWN = re.compile(r"(?:(?:Option|does not accept option) '|unrecognized arguments: (?:.*?--)?)([\w.]+)")
_NO_CLASS = re.compile(r"Expected a dot import path string: (.+)")
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_TYPES = re.compile(r"Subtypes: \[(.+)\]|Expected an? (.+?)\. Got value")
_VALUE = re.compile(r"(?:Given|Got) value: (?:NestedArg\(key='.+?', val=(.+)\)|(.+))$", re.M)


def in_words(message: str, options: Iterable[str] = ()) -> str:
    """What jsonargparse says in many lines of types, for people.

    Args:
        message: of its ``ArgumentError``.
        options: that the command has, for the nearest to one that there is not.
    """
    place = ".".join(key for key in _KEY.findall(message) if key != "config")
    of_class = [path for path in _CLASS.findall(message) if "." in path]
    inner = _innermost(message)
    if unknown := _UNKNOWN.search(inner):
        name = f"{place}.{unknown[1]}" if of_class else unknown[1]
        known = [f"{place}.{each}" for each in _arguments(of_class[-1])] if of_class else options
        return f"there is no option {name}{_nearest(name, known)}"
    if no_class := _NO_CLASS.search(inner):
        return f"{place} is {no_class[1]}, which is no class that is known{_nearest(no_class[1], _subclasses(message))}"
    if "is abstract" in inner:
        return f"{place} has options but no class: give --config FILE, or --{place} with the name of a class."
    if required := _REQUIRED.search(inner):
        command, _, name = required[1].split(", ")[0].partition(".")
        if name in ("model", "data"):
            return f"{command} needs a configuration: give --config FILE, such as examples/quickstart.yaml."
        return f"{place + ' needs' if place else 'needed:'} {required[1]}."
    values, types = _VALUE.findall(inner), _TYPES.findall(inner)
    if place and values and types:
        return f"{place} is {''.join(values[-1])}: give {_type_names(''.join(max(types)))}."  # of all types, if said
    return " ".join(_KEY.sub(place, message).lstrip(": ").split())


def _innermost(message: str) -> str:
    """What is said of the option itself, not of the alternatives to the class that it belongs to."""
    *_, inner = _CLASS.split(message)
    lines = inner.splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    end = next((i for i, line in enumerate(lines) if len(line) - len(line.lstrip()) < indent), len(lines))
    return "\n".join(lines[:end])


def _type_names(types: str) -> str:
    """``int, list[float]`` of ``<class 'int'>, list[float], <class 'NoneType'>``."""
    plain = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types)
    choices = re.sub(r"typing\.Literal\[(.+?)\]", r"\1", plain)
    return re.sub(r"(, )?\bNoneType\b", "", choices)


def _nearest(name: str, known: Iterable[str]) -> str:
    found = get_close_matches(name, [each.lstrip("-") for each in known], 1, 0.7)
    return f": did you mean {found[0]}?" if found else "."


def _arguments(path: str) -> list[str]:
    """Of a class that is named by its import path, those of its bases included."""
    names = [name for base in _found(path).__mro__ for name in signature(base.__init__).parameters]
    return [name for name in dict.fromkeys(names) if name not in ("self", "args", "kwargs")]


def _subclasses(message: str) -> list[str]:
    """Names of the classes that may stand where none was found."""
    base = re.search(r"Subtypes: \[.*?<class '((?:\w+\.)+\w+)'>", message)
    pending, names = [] if base is None else [_found(base[1])], list[str]()
    while pending:
        each = pending.pop()
        names.append(each.__name__)
        pending += each.__subclasses__()
    return names


def _found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
