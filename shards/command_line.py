"""The command `shards`: build, reshard, verify, info, synthesize; flags and help come from the option dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args, get_origin, get_type_hints

from .building.build import build
from .checks.verify import verify
from .options import BuildOptions, ImageOptions, ReadOptions
from .records import ShardError
from .running.engines import ENGINES
from .storage import store


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 fine, 1 refused or failed with a message, 2 wrong usage.

    Ctrl-C and SIGTERM end it with 130 and 143.
    """
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        with _terminable():
            return int(parsed.run(parsed) or 0)
    except BrokenPipeError:
        raise  # of the output, for `until_unread`
    except (ShardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came, of a scheduler say."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as orderly as Ctrl-C does; only the main thread can see to that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m msa_openclip.shards", description="Remote sensing captions and images -> WebDataset shards."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_build(commands)
    _add_reshard(commands)
    _add_verify(commands)
    _add_info(commands)
    _add_clip_benchmark(commands)
    _add_synthesize(commands)
    return parser


def _add_build(commands: Any) -> None:
    command = commands.add_parser("build", help="captions + images -> shards", description=build.__doc__)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("captions", help="caption file or folder (path or fsspec URL)")
    command.add_argument("out", help="folder for the shards (path or fsspec URL)")
    command.add_argument("--images", help="folder of the images (default: the folder of the captions)")
    add_options(command, BuildOptions, "shards")
    add_options(command, ReadOptions, "reading the captions")
    add_options(command, ImageOptions, "images")
    _add_run_options(command)
    command.set_defaults(run=_build)


def _add_run_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("running")
    group.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="parallel jobs (default: %(default)s)")
    group.add_argument("--engine", choices=ENGINES, default="auto", help="what the jobs run on (default: %(default)s)")
    group.add_argument("--strict", action="store_true", help="fail at the first problem instead of rejecting the image")
    group.add_argument("--overwrite", action="store_true", help="replace another build in OUT")
    group.add_argument("--dry-run", action="store_true", help="plan and estimate, write nothing")
    group.add_argument("--report", action="store_true", help="write report.json and report.html beside the shards")
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def _build(parsed: argparse.Namespace) -> None:
    _run_build(parsed, ReadOptions(**_values(parsed, ReadOptions)))


def _run_build(parsed: argparse.Namespace, read: ReadOptions) -> None:
    image = ImageOptions(**_values(parsed, ImageOptions))
    options = BuildOptions(**_values(parsed, BuildOptions), read=read, image=image)
    summary = build(
        parsed.captions,
        parsed.out,
        images=parsed.images,
        options=options,
        workers=parsed.workers,
        engine=parsed.engine,
        strict=parsed.strict,
        overwrite=parsed.overwrite,
        dry_run=parsed.dry_run,
        progress=not parsed.quiet,
    )
    print(summary.text())
    if parsed.report and not parsed.dry_run:
        from .checks import report, report_page

        made = report.report([parsed.out])
        store.write_bytes(store.join(parsed.out, "report.json"), made.json().encode())
        store.write_bytes(store.join(parsed.out, "report.html"), report_page.page(made).encode())


def _add_reshard(commands: Any) -> None:
    command = commands.add_parser(
        "reshard", help="shards -> other shards: another number, layout, seed, or several as one"
    )
    command.add_argument(
        "sources", nargs="+", help="folders of shards or tar patterns; captions of pairs are put together"
    )
    command.add_argument("out", help="folder for the new shards")
    add_options(command, BuildOptions, "shards")
    add_options(command, ImageOptions, "images")
    _add_run_options(command)
    command.set_defaults(run=_reshard)


def _reshard(parsed: argparse.Namespace) -> None:
    parsed.captions, parsed.images = "::".join(parsed.sources), None
    _run_build(parsed, ReadOptions(kind="tar"))


def _add_verify(commands: Any) -> None:
    command = commands.add_parser("verify", help="read shards again and hold them to their manifest")
    command.add_argument("folder", help="folder of shards (path or fsspec URL)")
    command.add_argument("--decode", action="store_true", help="also decode every image")
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="(default: %(default)s)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_verify)


def _verify(parsed: argparse.Namespace) -> int:
    found = verify(parsed.folder, decode=parsed.decode, workers=parsed.workers, progress=not parsed.quiet)
    print(found.text())
    return 0 if found.ok else 1


def _add_info(commands: Any) -> None:
    command = commands.add_parser("info", help="what is in shards: counts, captions, duplicates; as text, JSON or HTML")
    command.add_argument("folders", nargs="+", help="folders of shards; of several also the images that they share")
    command.add_argument("--json", metavar="FILE", help="write the report as JSON")
    command.add_argument("--html", metavar="FILE", help="write the report as a page with plots and samples")
    command.add_argument("--tokenizer", metavar="MODEL", help="open_clip model whose tokenizer measures the captions")
    command.add_argument(
        "--look-alikes", type=int, nargs="?", const=2, metavar="BITS",
        help="find images whose perceptual hashes differ in at most BITS of 64 (default: 2; decodes every image)",
    )  # fmt: skip
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_info)


def _info(parsed: argparse.Namespace) -> None:
    from .checks import report, report_page

    made = report.report(
        parsed.folders, near_bits=parsed.look_alikes, tokenizer=parsed.tokenizer, progress=not parsed.quiet
    )
    print(report.text(made.content))
    if parsed.json:
        store.write_bytes(parsed.json, made.json().encode())
    if parsed.html:
        store.write_bytes(parsed.html, report_page.page(made).encode())


def _add_clip_benchmark(commands: Any) -> None:
    command = commands.add_parser(
        "clip-benchmark", help="show image shards to CLIP_benchmark under the names it expects"
    )
    command.add_argument("folder", help="folder of shards, layout image")
    command.add_argument("out", help="folder for links (or copies) of the shards")
    command.set_defaults(run=_clip_benchmark)


def _clip_benchmark(parsed: argparse.Namespace) -> None:
    from .clip_benchmark import link_for_clip_benchmark

    name = link_for_clip_benchmark(parsed.folder, parsed.out)
    print(f"clip_benchmark eval --dataset {name} --dataset_root {parsed.out} --task zeroshot_retrieval")


def _add_synthesize(commands: Any) -> None:
    command = commands.add_parser("synthesize", help="drawn aerial scenes with captions, to try things out")
    command.add_argument("out", help="local folder for captions.json and images/, or for the shards")
    for split, count in (("train", 2000), ("val", 200), ("test", 200)):
        command.add_argument(f"--{split}", type=int, default=count, help="number of scenes (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    command.add_argument("--size-px", type=int, default=96, help="side of the images (default: %(default)s)")
    command.add_argument("--shards", choices=("image", "pair"), help="write shards of this layout instead of files")
    command.set_defaults(run=_synthesize)


def _synthesize(parsed: argparse.Namespace) -> None:
    from .synthetic.scenes import synthesize

    counts = {"train": parsed.train, "val": parsed.val, "test": parsed.test}
    with tempfile.TemporaryDirectory() as scratch:
        folder = scratch if parsed.shards else parsed.out
        path = synthesize(folder, counts, seed=parsed.seed, size_px=parsed.size_px, progress=True)
        if parsed.shards:
            options = BuildOptions(layout=parsed.shards, seed=parsed.seed)
            print(build(path, parsed.out, options=options, progress=True).text())
        else:
            print(f"{path}: {sum(counts.values())} scenes; for shards: build {path} OUT")


def add_options(command: argparse.ArgumentParser, options: type, title: str) -> None:
    """A flag for each field of an option dataclass that has a help text."""
    group = command.add_argument_group(title)
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        if "help" not in field.metadata:
            continue
        flag = "--" + field.name.replace("_", "-")
        kind, default = hints[field.name], field.default
        help_text = field.metadata["help"].replace("%", "%%")
        if kind is bool:
            group.add_argument(flag, action="store_true", help=help_text)
            continue
        if get_origin(kind) is tuple:
            separator = field.metadata.get("separator", ",")
            group.add_argument(flag, type=_splitter(separator), default=default, metavar="LIST", help=help_text)
            continue
        if default not in (None, ""):
            help_text += " (default: %(default)s)"
        extra = {"choices": field.metadata["choices"]} if "choices" in field.metadata else {"metavar": _metavar(kind)}
        group.add_argument(flag, type=_scalar(kind), default=default, help=help_text, **extra)


def _values(parsed: argparse.Namespace, options: type) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(options) if "help" in field.metadata]
    return {name: getattr(parsed, name) for name in names}


def _scalar(kind: Any) -> Any:
    if get_origin(kind) is types.UnionType:
        kind = next(part for part in get_args(kind) if part is not type(None))
    return kind


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", str: "TEXT"}[_scalar(kind)]


def _splitter(separator: str) -> Any:
    return lambda text: tuple(part.strip() for part in text.split(separator) if part.strip())
