"""The pages of docs/: the commands and the Python in them fit the package."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from helpers.markdown import python_blocks, shell_lines
from open_clip_train.params import parse_args

import msa_openclip
from msa_openclip.commands.main import parser

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
CITATION = re.compile(r"docs/method\.md, sections? (\d(?:\.\d)?)(?: and (\d(?:\.\d)?))?")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_commands_are_understood(page: Path) -> None:
    for line in shell_lines(page.read_text(encoding="utf-8")):
        words = shlex.split(line.partition(" > ")[0]) if line.startswith(("msa-openclip ", "python ")) else []
        if words[:1] == ["msa-openclip"]:
            parser().parse_args(words[1:])
        elif words[1:3] == ["-m", "open_clip_train.main"]:
            parse_args(words[3:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_imported_names_are_public(page: Path) -> None:
    for block in python_blocks(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "msa_openclip":
                assert {alias.name for alias in node.names} <= set(msa_openclip.__all__)


def test_cited_sections_of_the_method_exist() -> None:
    method = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^##+ (\d(?:\.\d)?)\.? ", method, flags=re.MULTILINE))
    files = [path for folder in ("msa_openclip", "shards", "tests") for path in (ROOT / folder).rglob("*.py")]
    cited = {
        number
        for path in files
        for match in CITATION.finditer(path.read_text(encoding="utf-8"))
        for number in match.groups()
        if number
    }
    assert len(cited) > 5
    assert cited <= sections


def test_promised_tests_exist() -> None:
    """Every test and file of tests that the page of promises names."""
    page = (ROOT / "docs/promises.md").read_text(encoding="utf-8")
    files = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    defined = {name for text in files.values() for name in re.findall(r"^def (test_\w+)", text, flags=re.MULTILINE)}
    named = set(re.findall(r"`(?:tests/[\w/]+\.py::)?(test_\w+)`", page))
    assert len(named) > 60
    assert sorted(named - defined) == []
    assert sorted(set(re.findall(r"tests/[\w/]+\.py", page)) - files.keys()) == []
