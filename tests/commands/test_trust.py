"""What commands print and serve of other people's texts: letters, nothing that acts."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny

from msa_openclip.demo.app import KnownHosts
from msa_openclip.evaluation.run_parameters import RunError
from msa_openclip.explain.figure import literal
from msa_openclip.reports.run_selection import best_epoch
from msa_openclip.shards.output import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07 a plane", r"\x1b[2J\x1b]0;title\x07 a plane"),
        ("a\nb\rc\u2028d", r"a\nb\rc\u2028d"),
        ("\u202eevil\u2069", r"\u202eevil\u2069"),
        ("\x9b31m\ud800", r"\x9b31m\ud800"),
        ("Häfen, 港, 👩\u200d🌾 $5", "Häfen, 港, 👩\u200d🌾 $5"),
    ],
)
def test_nothing_of_a_caption_acts_on_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("text", [r"$\frac{", "$a$ and $b$", r"\$x$", "\ud800", "100 $"])
def test_a_figure_shows_any_text(text: str) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is missing (extra `plot`)")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn = figure.Figure()
    axis = drawn.subplots()
    axis.plot([1, 2], label=literal(text))
    axis.set_yticks([1], [literal(text)])
    axis.legend()
    drawn.suptitle(literal(text))
    FigureCanvasAgg(drawn).draw()


def results(run: Path, *lines: str) -> str:
    (run / "checkpoints").mkdir(parents=True)
    (run / "params.txt").write_text("model: tiny-ViT\n")
    (run / "checkpoints" / "results.jsonl").write_text("\n".join(lines))
    for epoch in range(1, 4):
        (run / "checkpoints" / f"epoch_{epoch}.pt").write_bytes(b"x")
    return str(run)


def test_nan_is_never_the_best(tmp_path: Path) -> None:
    rows = ['{"epoch": 1, "m": NaN}', '{"epoch": 2, "m": 3}', '{"epoch": 3, "m": -Infinity}']
    assert best_epoch(results(tmp_path / "a", *rows), "m").epoch == 2
    assert best_epoch(results(tmp_path / "b", *reversed(rows)), "m").epoch == 2
    assert best_epoch(results(tmp_path / "c", *rows, '{"epoch": 3, "m": Infinity}'), "m").epoch == 2
    with pytest.raises(RunError, match="'m' is not finite in any epoch"):
        best_epoch(results(tmp_path / "d", rows[0]), "m")


ODD_RESULTS = [
    "{",
    "[1]",
    "3",
    "[" * 100_000,
    '{"epoch": [1], "m": 1}',
    '{"epoch": "2", "m": 1}',
    '{"epoch": 1, "m": null}',
    '{"epoch": 1, "m": "9"}',
    '{"epoch": 1, "m": ' + "9" * 400 + "}",
    '{"epoch": 1, "m": true}',
]


@pytest.mark.parametrize("line", ODD_RESULTS, ids=range(len(ODD_RESULTS)))
def test_odd_results_are_named(line: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"results\.jsonl"):
        best_epoch(results(tmp_path / "a", line), "m")


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost:7860", True),
        ("127.0.0.1:7860", True),
        ("[::1]:7860", True),
        ("192.168.0.7", True),
        ("demo.example", True),
        ("evil.example:7860", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
    ],
)
def test_the_demo_answers_for_this_machine_alone(host: str, known: bool) -> None:
    sent: list[dict[str, Any]] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send({"status": 200})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    guard = KnownHosts(app, {"localhost", "demo.example"})
    asyncio.run(guard({"type": "http", "path": "/", "headers": [(b"host", host.encode())]}, None, send))
    assert sent[0]["status"] == (200 if known else 421)


def test_no_configuration_file_stops_or_blocks_an_import(tmp_path: Path) -> None:
    """A pipe, a device, a folder, nesting without end; and letters that the locale does not know."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "large.json").write_text(" " * (1 << 21))
    content = {**tiny.config(msa={}), "note": "Häfen"}
    (tmp_path / "good.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    code = "import open_clip; print([n for n in ('good', 'MSA-ViT-B', 'pipe', 'deep') if n in open_clip.list_models()])"
    for encoding in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        environment = {**os.environ, "MSA_OPENCLIP_CONFIGS": str(tmp_path), **encoding}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.stdout == "['good', 'MSA-ViT-B']\n", done.stderr
        for name in ("pipe", "device", "folder", "loop", "deep", "large"):
            assert f"{name}.json is not registered as a model" in done.stderr
