"""The lowest versions that setup.py admits are those that .ci/floors.txt installs to be tested."""

from __future__ import annotations

import ast
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def test_floors_are_what_setup_admits() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (declared,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "INSTALL_REQUIRES"
    )
    lowest = {Requirement(text).name: floor(Requirement(text)) for text in declared}
    lines = (line.partition("#")[0].strip() for line in (ROOT / ".ci/floors.txt").read_text().splitlines())
    tested = {Requirement(line).name: Version(line.partition("==")[2]) for line in lines if line}
    assert tested.pop("torchvision")  # a requirement of open_clip_torch
    assert tested == lowest


def floor(requirement: Requirement) -> Version:
    """The version behind `>=`."""
    (lowest,) = (part.version for part in requirement.specifier if part.operator == ">=")
    return Version(lowest)
