"""The rooms of the package: imports point one way, names for users are where the package says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import msa_openclip

PACKAGE = Path(msa_openclip.__file__).parent
ORDER = [
    "pair_scores",
    "model",
    "data",
    "evaluation",
    "training",
    "plugin",
    "search",
    "embedding",
    "databases",
    "explain",
    "demo",
    "reports",
    "commands",
]
"""From the ground up: a room imports from itself and from those before it."""


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Modules of the package that a file imports, also inside functions, as parts below the package."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            yield (*base, *(node.module.split(".") if node.module else [node.names[0].name]))


@pytest.mark.parametrize("room", ORDER)
def test_imports_point_one_way(room: str) -> None:
    files = list((PACKAGE / room).glob("*.py"))
    assert files
    allowed = {"config", "distributed", "shards", *ORDER[: ORDER.index(room) + 1]}
    wrong = [(path.name, ".".join(target)) for path in files for target in imports(path) if target[0] not in allowed]
    # Only the root knows its version.
    assert [pair for pair in wrong if pair[1] != "__version__"] == []


@pytest.mark.parametrize("room", ORDER)
def test_no_two_files_of_a_room_need_each_other(room: str) -> None:
    needs = {
        path.stem: {target[1] for target in imports(path) if target[0] == room and len(target) > 1}
        for path in (PACKAGE / room).glob("*.py")
    }
    while leaves := [name for name, needed in needs.items() if not needed & needs.keys()]:
        for name in leaves:
            del needs[name]
    assert needs == {}


def test_every_public_name_is_there() -> None:
    for name in msa_openclip.__all__:
        assert getattr(msa_openclip, name).__name__ == name
