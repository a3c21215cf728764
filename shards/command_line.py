"""The command `msa-openclip shards`: build, reshard, verify, info, clip-benchmark, synthesize.

Flags and help of a build come from the option dataclasses.  What does the work is imported when a command runs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence

from .arguments import (
    MOST_WORKERS,
    Commands,
    add_choice,
    add_command,
    add_number,
    add_options,
    add_progress,
    option_values,
    whole_number,
)
from .exit_codes import run_command
from .options import BuildOptions, ImageOptions, ReadOptions
from .output import printable, printable_lines
from .running.engines import ENGINES

DESCRIPTION = "Captions and images of remote sensing -> WebDataset shards; checks, reports, drawn scenes."
# A clone that is not installed has no msa-openclip.
_PROG = "python -m shards" if __package__ == "shards" else "msa-openclip shards"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, see `exit_codes.run_command`."""
    parser = argparse.ArgumentParser(prog=_PROG, description=DESCRIPTION)
    add_commands(parser)
    return run_command(parser, arguments)


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands to the parser of `shards`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_build(commands)
    _add_reshard(commands)
    _add_verify(commands)
    _add_info(commands)
    _add_synthesize(commands)
    _add_clip_benchmark(commands)


def _add_build(commands: Commands) -> None:
    command = add_command(
        commands,
        "build",
        _build,
        "captions and images to shards",
        description="Turn captions and images into shuffled WebDataset shards that open_clip reads.\n\n"
        "The shards depend on the input and the options of the groups shards, reading and images alone:\n"
        "workers, engine and interruptions change no byte. Images that cannot be used are named in\n"
        "rejected.jsonl beside the shards.",
        examples=[
            "msa-openclip shards build dataset_rsitmd.json shards --images images",
            "msa-openclip shards build AID shards/aid --name aid --holdout val=0.1,test=0.1",
        ],
        resumes=True,
    )
    command.add_argument("captions", metavar="CAPTIONS", help="caption file or folder (path or fsspec URL)")
    command.add_argument("out", metavar="OUT", help="folder for the shards (path or fsspec URL)")
    command.add_argument("--images", metavar="FOLDER", help="of the images (default: the folder of the captions)")
    text = "let the captions name images outside --images, also by URL"
    command.add_argument("--outside", action="store_true", help=text)
    add_options(command, BuildOptions, "shards")
    add_options(command, ReadOptions, "reading the captions")
    add_options(command, ImageOptions, "images")
    _add_run_options(command)


def _add_run_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("running")
    _add_workers(group)
    add_choice(group, "--engine", "what the jobs run on", ENGINES)
    group.add_argument("--strict", action="store_true", help="fail at the first problem instead of rejecting the image")
    group.add_argument("--overwrite", action="store_true", help="replace another build in OUT")
    group.add_argument("--dry-run", action="store_true", help="plan and estimate, write nothing")
    group.add_argument("--report", action="store_true", help="write report.json and report.html beside the shards")
    add_progress(group)


def _add_workers(group: argparse._ActionsContainer) -> None:
    help_text = "parallel jobs (default: one for each CPU)"
    group.add_argument(
        "--workers", type=whole_number(1, MOST_WORKERS), default=os.cpu_count() or 1, metavar="N", help=help_text
    )


def _build(parsed: argparse.Namespace) -> None:
    _run_build(parsed, option_values(parsed, ReadOptions))


def _run_build(parsed: argparse.Namespace, read: ReadOptions) -> None:
    options = option_values(parsed, BuildOptions, read=read, image=option_values(parsed, ImageOptions))
    from .building.build import build

    wants_report = parsed.report and not parsed.dry_run
    if wants_report:
        from .checks import beside

        beside.require_ours(parsed.out)
    summary = build(
        parsed.captions,
        parsed.out,
        images=parsed.images,
        options=options,
        workers=parsed.workers,
        engine=parsed.engine,
        strict=parsed.strict,
        overwrite=parsed.overwrite,
        outside=parsed.outside,
        dry_run=parsed.dry_run,
        progress=parsed.progress,
    )
    print(printable_lines(summary.text()))
    if wants_report:
        beside.write(parsed.out)


def _add_reshard(commands: Commands) -> None:
    example = "msa-openclip shards reshard shards/ucm shards/ucm-pair --layout pair --shards 16"
    text = "shards to other shards: another number, layout, seed, or several as one"
    command = add_command(commands, "reshard", _reshard, text, examples=[example], resumes=True)
    text = "folder of shards or tar pattern; captions of pairs are put together"
    command.add_argument("sources", nargs="+", metavar="SOURCE", help=text)
    command.add_argument("out", metavar="OUT", help="folder for the new shards")
    add_options(command, BuildOptions, "shards")
    add_options(command, ImageOptions, "images")
    _add_run_options(command)


def _reshard(parsed: argparse.Namespace) -> None:
    parsed.captions, parsed.images, parsed.outside = "::".join(parsed.sources), None, False
    _run_build(parsed, ReadOptions(kind="tar"))


def _add_verify(commands: Commands) -> None:
    example = "msa-openclip shards verify shards/ucm --decode"
    text = "read shards again and compare them with their manifest; exit code 1 if they differ"
    command = add_command(commands, "verify", _verify, text, examples=[example])
    command.add_argument("folder", metavar="FOLDER", help="folder of shards (path or fsspec URL)")
    command.add_argument("--decode", action="store_true", help="also decode every image")
    _add_workers(command)
    add_progress(command)


def _verify(parsed: argparse.Namespace) -> int:
    from .checks.verify import verify

    verification = verify(parsed.folder, decode=parsed.decode, workers=parsed.workers, progress=parsed.progress)
    print(verification.text())
    return 0 if verification.ok else 1


def _add_info(commands: Commands) -> None:
    example = "msa-openclip shards info shards/ucm --tokenizer ViT-B-32 --look-alikes --html ucm.html"
    text = "what is in shards: counts, captions, duplicates; as text, JSON or HTML"
    command = add_command(commands, "info", _info, text, examples=[example])
    text = "folder of shards; of several also the images that they share"
    command.add_argument("folders", nargs="+", metavar="FOLDER", help=text)
    command.add_argument("--json", metavar="FILE", help="write the report as JSON")
    command.add_argument("--html", metavar="FILE", help="write the report as a page with plots and samples")
    command.add_argument("--tokenizer", metavar="MODEL", help="open_clip model whose tokenizer measures the captions")
    command.add_argument(
        "--look-alikes", type=whole_number(0, 64), nargs="?", const=2, metavar="BITS",
        help="find images whose perceptual hashes differ in at most BITS of 64 (default: 2; decodes every image)",
    )  # fmt: skip
    add_progress(command)


def _info(parsed: argparse.Namespace) -> None:
    from .checks import report, report_page
    from .storage import store

    made = report.report(
        parsed.folders, near_bits=parsed.look_alikes, tokenizer=parsed.tokenizer, progress=parsed.progress
    )
    print("\n".join(map(printable, report.text(made.content).splitlines())))
    if parsed.json:
        store.write_text(parsed.json, made.json())
    if parsed.html:
        store.write_text(parsed.html, report_page.page(made))


def _add_synthesize(commands: Commands) -> None:
    example = "msa-openclip shards synthesize shards --train 1600 --val 200 --test 200 --shards image"
    text = "drawn aerial scenes with captions, to try things out"
    command = add_command(commands, "synthesize", _synthesize, text, examples=[example])
    command.add_argument("out", metavar="OUT", help="local folder for captions.json and images/, or for the shards")
    for split, count in (("train", 2000), ("val", 200), ("test", 200)):
        add_number(command, f"--{split}", f"scenes of split {split}", default=count, least=0)
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the scenes (default: %(default)s)")
    add_number(command, "--size-px", "side of the images", default=96, least=32)
    text = "images of each place; with 2 and more one thing changes between two of them, or nothing does"
    add_number(command, "--dates", text, default=1)
    command.add_argument("--shards", choices=("image", "pair"), help="write shards of this layout instead of files")
    add_progress(command)


def _synthesize(parsed: argparse.Namespace) -> None:
    from .building.build import build
    from .synthetic.scenes import synthesize

    counts = {"train": parsed.train, "val": parsed.val, "test": parsed.test}
    with tempfile.TemporaryDirectory() as scratch:
        folder = scratch if parsed.shards else parsed.out
        drawing = {"seed": parsed.seed, "size_px": parsed.size_px, "dates": parsed.dates, "progress": parsed.progress}
        path = synthesize(folder, counts, **drawing)
        if parsed.shards:
            options = BuildOptions(layout=parsed.shards, seed=parsed.seed)
            print(printable_lines(build(path, parsed.out, options=options, progress=parsed.progress).text()))
        else:
            print(f"{path}: {sum(counts.values())} scenes; for shards: {_PROG} build {path} OUT")


def _add_clip_benchmark(commands: Commands) -> None:
    example = "msa-openclip shards clip-benchmark shards/ucm benchmark/ucm"
    text = "show image shards to CLIP_benchmark under the names it expects, and print its command"
    command = add_command(commands, "clip-benchmark", _clip_benchmark, text, examples=[example])
    command.add_argument("folder", metavar="FOLDER", help="folder of shards, layout image")
    command.add_argument("out", metavar="OUT", help="folder for links to (or copies of) the shards")


def _clip_benchmark(parsed: argparse.Namespace) -> None:
    from .clip_benchmark import link_for_clip_benchmark

    name = link_for_clip_benchmark(parsed.folder, parsed.out)
    print(f"clip_benchmark eval --dataset {name} --dataset_root {parsed.out} --task zeroshot_retrieval")
