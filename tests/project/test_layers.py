"""The rooms of the package: imports run downwards only, and none in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fpt_lightning

PACKAGE = Path(fpt_lightning.__file__).parent
BASE = {"errors", "files", "progress"}
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "progress": set(),
    "data": BASE,
    "encoder": BASE,
    "datasets": BASE | {"data"},
    "evaluation": BASE | {"data"},
    "store": BASE | {"data", "encoder"},
    "datamodules": BASE | {"data", "encoder", "store"},
    "methods": BASE | {"data", "encoder", "store", "evaluation"},
    "audit": BASE | {"data", "encoder", "store", "evaluation", "datamodules"},
    "explanation": BASE | {"data", "encoder", "store", "evaluation", "datamodules", "methods"},
    "planning": BASE | {"data", "encoder", "store", "evaluation", "datamodules", "methods", "explanation"},
    "deployment": BASE | {"data", "encoder", "store", "evaluation", "datamodules", "methods", "explanation"},
}
"""What each room may import. The command line may import all of them, and is imported by none."""

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.stem in BELOW
}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fpt_lightning":
            module = node.module.partition(".")[2]
            found |= {
                f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("fpt_lightning")}
    return {name for name in found if name}


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_room_is_known() -> None:
    assert {room(name) for name in MODULES} == {*BELOW, "cli"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_downwards(module: str) -> None:
    own = room(module)
    allowed = {*BELOW, "cli"} if own == "cli" else BELOW[own] | {own}
    above = {name for name in IMPORTS[module] if room(name) not in allowed}
    assert not above, f"{module} imports {', '.join(sorted(above))}, which {own} may not"


def test_no_import_runs_in_a_circle() -> None:
    """Within a room too: modules without imports of others are taken away until none is left."""
    left = {name: set(imports) & set(MODULES) - {name} for name, imports in IMPORTS.items()}
    while free := {name for name, imports in left.items() if not imports & set(left)}:
        left = {name: imports for name, imports in left.items() if name not in free}
    assert not left


def test_rooms_say_what_they_are_for_and_hand_on_nothing_by_wildcard() -> None:
    for name in {*BELOW, "cli"} - BASE:
        tree = ast.parse((PACKAGE / name / "__init__.py").read_text())
        assert ast.get_docstring(tree), name
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"], name
