"""The tree of subcommands: usage lines, help and refusals without heavy imports, allowed values, exit codes."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from open_clip_train.params import parse_args

from msa_openclip.commands import main as cli
from msa_openclip.evaluation.options import PRECISIONS
from msa_openclip.shards.arguments import add_command
from msa_openclip.shards.exit_codes import UsageError, run_command

ROOT = Path(__file__).parents[2]
SHARDS = ("build", "reshard", "verify", "info", "synthesize", "clip-benchmark")
TREE = [
    *("features", "eval", "classify", "best", "card", "embed", "index", "search", "explain", "demo", "convert"),
    *(f"shards {name}" for name in SHARDS),
]
EVAL = ["eval", "ViT-B-32=openai", "--shards", "x.tar"]


def test_usage_lines_print_what_users_type(capsys) -> None:
    commands = dict(cli.subcommands(cli.parser()))
    assert list(commands) == TREE
    for name, command in commands.items():
        assert cli.main([*name.split(), "--help"]) == 0
        printed = capsys.readouterr().out
        assert re.match(rf"usage: msa-openclip {name} \[-h\]", printed)
        assert re.search(rf"^  msa-openclip {name} ", printed, re.MULTILINE), "no example"
        for action in command._actions:
            assert action.help, f"{name}: {action.dest} has no help"


def test_unknown_commands_and_help(capsys) -> None:
    assert cli.main(["evaluate"]) == 2
    assert "invalid choice: 'evaluate' (choose from" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert cli.main(["shards"]) == 2
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"    {name.split()[0]} " in printed for name in TREE)


HEAVY = ("torch", "open_clip", "open_clip_train", "transformers", "timm", "numpy", "PIL", "pandas", "fsspec", "uvicorn")
ONLY_ARGUMENTS = f"""
import json, sys
from msa_openclip.commands.main import main
codes = [main(arguments) for arguments in json.loads(sys.argv[1])]
print(json.dumps([codes, sorted(name for name in {HEAVY} if name in sys.modules)]))
"""
WRONG = [
    ([*EVAL, "--batch-size", "0"], "argument --batch-size: '0' is not a whole number from 1 to 1000000"),
    ([*EVAL, "--batch-size", "1" + "0" * 30], "0' is not a whole number from 1 to 1000000"),
    ([*EVAL, "--memory-mb", "1" + "0" * 30], "argument --memory-mb: '1000"),
    ([*EVAL, "--bootstrap", "1"], "argument --bootstrap: '1' sample has no interval; write 0 for none, or 2 or more"),
    ([*EVAL, "--bootstrap", "1" + "0" * 30], "0' is not a whole number from 0 to 1000000"),
    (["eval", "m=w", "--shards", ""], "argument --shards: '' names nothing; give a file, folder or pattern"),
    (["eval", "m=w", "--captions", " "], "argument --captions: ' ' names nothing"),
    (["classify", "m=w", "--folder", ""], "argument --folder: '' names nothing"),
    ([*EVAL, "--workers", "-1"], "'-1' is not a whole number from 0 to 1024"),
    ([*EVAL, "--memory-mb", "much"], "'much' is not a whole number from 1 to 1000000000"),
    ([*EVAL, "--bootstrap", "-1"], "'-1' is not a whole number from 0 to 1000000"),
    ([*EVAL, "--precision", "nope"], "invalid choice: 'nope' (choose from '?fp32'?, "),
    ([*EVAL, "--device", "gpu"], "'gpu' is no device; write one of cpu, cuda, mps, xpu, or cuda:N"),
    ([*EVAL, "--device", "cuda:"], "'cuda:' is no device"),
    ([*EVAL, "--class-regex", "harbor"], "'harbor' has no group for the class; write e.g. '^([a-z]+)_'"),
    ([*EVAL, "--class-regex", "("], "'(' is no regular expression: "),
    ([*EVAL, "--captions", "x.json"], "argument --captions: not allowed with argument --shards"),
    (EVAL[:2], "one of the arguments --shards --captions is required"),
    (["eval", "m=w", "--captions", "c", "--split", "dev"], "invalid choice: 'dev'"),
    (["classify", "m=w"], "one of the arguments --folder --shards --captions is required"),
    (["classify", "m=w", "--folder", "f", "--templates", "a"], "template 'a' has no {} to put the class name in"),
    (["best", "run"], "one of the arguments --shards --captions is required"),
    (["card", "run"], "the following arguments are required: --eval"),
    (["index", "m=w", "i"], "one of the arguments --shards --folder --scenes --stac --windows is required"),
    (["index", "m=w", "i", "--folder", "f", "--segment-images", "-5"], "'-5' is not a whole number of at least 1"),
    (["search", "i"], "give either texts, or images with --like or --describe"),
    (["search", "i", "text", "--like", "x.jpg"], "give either texts, or images"),
    (["search", "i", "text", "-k", "0"], "argument -k: '0' is not a whole number of at least 1"),
    (["search", "i", "text", "--candidates", "0"], "'0' is not a whole number of at least 1"),
    (["search", "i", "text", "--bbox", "1,2,3"], "'1,2,3': expected WEST,SOUTH,EAST,NORTH"),
    (["search", "i", "text", "--bbox", "1,4,3,2"], "expected south <= north"),
    (["demo", "i", "--port", "70000"], "'70000' is not a whole number from 0 to 65535"),
    (["explain", "m=w", "x.jpg"], "the following arguments are required: TEXT"),
    (["convert", "a"], "the following arguments are required: DST"),
    (["shards", "build", "c", "o", "--workers", "0"], "argument --workers: '0' is not a whole number from 1 to 1024"),
    (["embed", "m", "o", "--workers", f"{10**30}"], f"argument --workers: '{10**30}' is not a whole number from 1 to"),
    (["shards", "build", "c", "o", "--quality", "0"], "error: quality: 0 is not within 1 to 100."),
    (["shards", "build", "c", "o", "--shards", "-1"], "error: shards: -1 must be positive."),
    (["shards", "reshard", "a", "o", "--layout", "x"], "invalid choice: 'x'"),
    (["shards", "verify"], "the following arguments are required: FOLDER"),
    (["shards", "info", "f", "--look-alikes", "65"], "'65' is not a whole number from 0 to 64"),
    (["shards", "synthesize", "o", "--train", "-1"], "'-1' is not a whole number of at least 0"),
    (["shards", "clip-benchmark", "f"], "the following arguments are required: OUT"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_arguments_are_refused_with_what_is_allowed(arguments: list[str], message: str, capsys) -> None:
    assert cli.main(arguments) == 2
    usage, _, error = capsys.readouterr().err.rpartition("\nmsa-openclip ")
    assert re.match(rf"usage: msa-openclip {arguments[0]} ", usage)
    pattern = re.escape(message).replace(re.escape("'?"), "'?")  # quotes around choices differ between Pythons
    assert re.search(pattern, error), error
    assert error.count("\n") == 1


def test_help_and_refusals_import_nothing_heavy() -> None:
    asked = [["--help"], ["nope"], *([*name.split(), "--help"] for name in TREE)]
    refused = [[*name.split(), "--nope"] for name in TREE] + [arguments for arguments, _ in WRONG]
    command = [sys.executable, "-c", ONLY_ARGUMENTS, json.dumps(asked + refused)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    codes, heavy = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 2, *(0 for _ in TREE), *(2 for _ in refused)]
    assert heavy == []


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (["msa_openclip", "shards"], "msa-openclip shards"),
        (["msa_openclip.shards"], "msa-openclip shards"),
        (["shards"], "python -m shards"),  # a clone that is not installed has no other
    ],
)
def test_shards_under_each_of_its_names(entry: list[str], name: str) -> None:
    command = [sys.executable, "-m", *entry, "build", "--help"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith(f"usage: {name} build [-h]")


@pytest.mark.parametrize("entry", [["msa_openclip", "shards"], ["msa_openclip.shards"]])
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path, entry: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    few = ["--train", "1", "--val", "0", "--test", "0", "--size-px", "32"]
    command = [sys.executable, "-m", *entry, "synthesize", str(tmp_path), *few]
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert done.returncode == 141
    assert "rror" not in done.stderr


def interrupt(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.pause()


def refuse(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("run", "code", "message"),
    [
        (lambda _: None, 0, ""),
        (lambda _: 1, 1, ""),
        (lambda _: refuse(ValueError("no such file.")), 1, "tool work: error: no such file.\n"),
        (lambda _: refuse(UsageError("a or b")), 2, "usage: tool work [-h]\ntool work: error: a or b\n"),
        (lambda _: interrupt(signal.SIGINT), 130, "interrupted; the same command goes on from here\n"),
        (lambda _: interrupt(signal.SIGTERM), 143, "interrupted; the same command goes on from here\n"),
    ],
)
def test_exit_codes(run, code: int, message: str, capsys) -> None:  # type: ignore[no-untyped-def]
    parser = argparse.ArgumentParser(prog="tool")
    add_command(parser.add_subparsers(), "work", run, help="work", description="Work.", resumes=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in the background
    try:
        assert run_command(parser, ["work"], refusals=(ValueError,)) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == message


def test_bugs_keep_their_traceback() -> None:
    parser = argparse.ArgumentParser(prog="tool")
    add_command(parser.add_subparsers(), "work", lambda _: refuse(KeyError("x")), help="work", description="Work.")
    with pytest.raises(KeyError):
        run_command(parser, ["work"], refusals=(ValueError,))


def test_precisions_are_those_of_the_trainer(capsys) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--precision", "nope"])
    assert set(re.findall(r"\w+", capsys.readouterr().err.rpartition("choose from")[2])) == set(PRECISIONS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_the_machine_lacks_is_refused(capsys) -> None:
    assert (
        cli.main(["explain", "ViT-B-32=untrained", str(ROOT / "docs/images/scenes.jpg"), "x", "--device", "cuda"]) == 1
    )
    assert "error: --device cuda: this machine has cpu" in capsys.readouterr().err
