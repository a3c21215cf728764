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
import torch
from helpers import tiny
from helpers.processes import run_new_python
from PIL import Image

from msa_openclip.commands import main as cli
from msa_openclip.demo.app import KnownHosts
from msa_openclip.evaluation.run_parameters import RunError
from msa_openclip.explain.explanation import ExplainError
from msa_openclip.explain.figure import literal, save_figure
from msa_openclip.model import convert
from msa_openclip.reports.report import write_json
from msa_openclip.reports.run_selection import best_epoch
from msa_openclip.shards.output import printable
from msa_openclip.training.samples import Tally


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


def test_nothing_that_a_command_says_or_logs_acts_on_a_terminal(tmp_path: Path) -> None:
    """Summaries and warnings name files; those of a warning go through whatever logs it."""
    act = "\x1b[2J\x07"
    (tmp_path / "images").mkdir()
    for name in (f"{act}1.png", "2.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    rows = [{"filename": f"{act}1.png", "split": "train", "sentences": [{"raw": f"{act} a lake"}], "class": act}]
    (tmp_path / "c.json").write_text(json.dumps({"images": rows}))
    build = ["build", str(tmp_path / "c.json"), str(tmp_path / "out"), "--images", str(tmp_path / "images"),
             "--shards", "1", "--workers", "1", "--quiet"]  # fmt: skip
    code = (
        "import logging, sys; from msa_openclip.shards.command_line import main; main(sys.argv[1:]);"
        f"logging.getLogger('msa_openclip').warning('%s: is odd', {act!r})"
    )
    said = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, *build], capture_output=True, check=True, timeout=300)
        said.append(done.stdout + done.stderr)
        os.utime(tmp_path / "images" / f"{act}1.png", ns=(2**61, 2**61))
    assert rb"\x1b[2J\x071.png; --overwrite builds anew" in said[1]
    assert rb"\x1b[2J\x07: is odd" in said[1]
    assert b"\x1b" not in said[0] + said[1]
    tally = Tally()
    tally.note(f"a.tar: sample {act}", "no image", act)
    assert str(tally) == r"a.tar: sample \x1b[2J\x07: no image (\x1b[2J\x07)"


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


def test_reports_and_figures_are_written_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the writing, a kill or a full disk: what had the name before still has it, whole."""
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib is missing (extra `plot`)")
    drawn = figures.Figure()
    source = tmp_path / "released.pt"
    source.write_bytes(b"")
    monkeypatch.setattr(convert, "convert_released_state_dict", lambda state: state)
    monkeypatch.setattr(convert, "_read", lambda _: {"a": torch.zeros(3)})
    writers = {
        "r.json": lambda path: write_json(path, {"a": 1}),
        "f.png": lambda path: save_figure(drawn, path),
        "f.svg": lambda path: save_figure(drawn, path),
        "c.pt": lambda path: convert.convert_checkpoint(source, Path(path)),
        "c.safetensors": lambda path: convert.convert_checkpoint(source, Path(path)),
    }
    for name, write in writers.items():
        write(str(tmp_path / name))
        before = (tmp_path / name).read_bytes()
        assert before
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
            with pytest.raises(OSError, match="no space left"):
                write(str(tmp_path / name))
        assert (tmp_path / name).read_bytes() == before
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(ExplainError, match=r"f\.xyz: \.xyz is no format of figures; choose one of .*png"):
        save_figure(drawn, str(tmp_path / "f.xyz"))
    with pytest.raises(convert.ConversionError, match="is the checkpoint that is to be converted"):
        convert.convert_checkpoint(source, source)


def test_pipes_and_devices_are_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(str(tmp_path / "pipe"), {"a": 1})
    assert os.read(reader, 99) == b'{\n  "a": 1\n}\n'
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    command = "from msa_openclip.reports.report import write_json; write_json('{}', [1])"
    for name in ("/dev/stdout", "/proc/self/fd/1"):
        assert run_new_python("-c", command.format(name)).stdout == "[\n  1\n]\n"
        assert Path("/dev/stdout").is_symlink()


def test_a_half_written_best_epoch_is_named(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    folder = results(tmp_path / "a", '{"epoch": 2, "m": 3}')
    assert cli.main(["best", folder, "--metric", "m", "--shards", "no.tar"]) == 1
    assert f"{folder}/checkpoints/epoch_2.pt: cut short, and epoch 2 is the best" in capsys.readouterr().err


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
        done = run_new_python("-c", code, env=environment)
        assert done.stdout == "['good', 'MSA-ViT-B']\n", done.stderr
        for name in ("pipe", "device", "folder", "loop", "deep", "large"):
            assert f"{name}.json is not registered as a model" in done.stderr
