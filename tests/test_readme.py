"""README: at most 120 lines, every command in it runs, at small size on generated files, and so does its Python."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import published_files
from helpers.markdown import python_blocks, shell_lines

from msa_openclip.commands import main as cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

SMALL = {
    "make demo": 'make demo ARGS="--scenes 64 --epochs 1"',
    "make test": "make test ARGS=tests/test_floors.py",
    "pip install": "python -m pip install --no-deps --no-build-isolation --target site",
    "MSA-ViT-B": "MSA-tiny-ViT",
    "--pretrained laion2b_s34b_b79k": "--device cpu --precision fp32 --force-image-size 32",
    "--batch-size 128": "--batch-size 8",
    "--warmup 200": "--warmup 1",
    "--epochs 20": "--epochs 1",
    "--workers 4": "--workers 1",
    "epoch_20.pt": "epoch_1.pt",
    "train-{000000..000003}.tar": "train-{000000..000002}.tar",
    "val-{000000..000003}.tar": "val-000000.tar",
    "test-{000000..000003}.tar": "test-000000.tar",
}
"""What makes the README's commands small, as it reads there -> as the test runs it."""
SMALL_PYTHON = {"epoch_10.pt": "epoch_1.pt", "test-{000000..000003}.tar": "test-{000000..000001}.tar"}
"""Likewise for its Python, after the small demo."""


def small(text: str, replacements: dict[str, str]) -> str:
    for readme, test in replacements.items():
        text = text.replace(readme, test)
    return text


def commands(first_word: str) -> list[str]:
    """The README's commands that begin with a word, in their order."""
    return [line for line in shell_lines(README) if line.split()[0] == first_word]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout to work in, whose .venv is this Python with everything installed."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".venv", "out", "logs", "build") and entry.suffix != ".egg-info":
            (folder / entry.name).symlink_to(entry)
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("python", "python3"):
        (binaries / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        (binaries / name).chmod(0o755)
    for stamp in (".demo", ".installed", ".docs"):
        (binaries / stamp).touch()
    return folder


@pytest.fixture(scope="module")
def environment(checkout: Path, tiny_configs: Path) -> dict[str, str]:
    """Of the commands; without what pytest and make tell their own children."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MAKE", "MFLAGS"))
    }
    path = f"{checkout}/.venv/bin{os.pathsep}{os.environ['PATH']}"
    return {**inherited, "PATH": path, "PYTHONPATH": str(ROOT), "MSA_OPENCLIP_CONFIGS": str(tiny_configs)}


@pytest.fixture(scope="module")
def demo(checkout: Path, environment: dict[str, str]) -> Path:
    """The checkout after `make demo`."""
    shell(small("make demo", SMALL), checkout, environment)
    return checkout


def shell(command: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a command as a shell does; what it printed."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_it_is_short_and_every_command_is_of_a_kind_that_is_run_here() -> None:
    assert len(README.splitlines()) <= 120
    assert {line.split()[0] for line in shell_lines(README)} == {"make", "pip", "msa-openclip", "python"}
    stale = [text for text in SMALL if text not in README] + [text for text in SMALL_PYTHON if text not in README]
    assert stale == []
    assert [line for line in commands("make") if line.split()[1] not in ("demo", "test")] == []


def test_make_demo_leaves_plot_and_page(demo: Path) -> None:
    assert (demo / "out/demo/training.png").stat().st_size > 10_000
    assert "<img" in (demo / "out/demo/retrieval.html").read_text(encoding="utf-8")


def test_make_test_runs_tests(checkout: Path, environment: dict[str, str]) -> None:
    assert "1 passed" in shell(small("make test", SMALL), checkout, environment)


@pytest.mark.parametrize("command", commands("pip"))
def test_install(command: str, checkout: Path, environment: dict[str, str]) -> None:
    printed = shell(f"{small(command, SMALL)} --upgrade", checkout, environment)
    assert "does not provide the extra" not in printed
    assert (checkout / "site" / "msa_openclip" / "shards").is_dir()


def test_python_after_the_demo(demo: Path, environment: dict[str, str]) -> None:
    (block,) = python_blocks(README)
    script = demo / "example.py"
    script.write_text(small(block, SMALL_PYTHON), encoding="utf-8")
    first, *hits = shell("python example.py", demo, environment).splitlines()[-4:]
    assert re.fullmatch(r"mean recall \d+\.\d+", first)
    assert len(hits) == 3


def test_commands_from_captions_to_search(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one folder and in their order, each building on those before it."""
    published_files.write("rsitmd", tmp_path / "data")
    folder = tmp_path / "data"
    shutil.copy(next((folder / "images").iterdir()), folder / "tile.jpg")  # a TIFF: Pillow looks at the bytes
    monkeypatch.chdir(folder)
    lines = [line for line in shell_lines(README) if line.startswith(("msa-openclip", "python"))]
    assert [line.split()[1] for line in lines[:4]] == ["shards", "-m", "best", "eval"]
    for line in lines:
        command = small(line, SMALL)
        if command.startswith("python"):
            shell(command, folder, environment)
        else:  # in this process, which has torch imported already
            assert cli.main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    assert "<img" in (folder / "page.html").read_text(encoding="utf-8")
    assert (folder / "why.png").stat().st_size > 10_000
