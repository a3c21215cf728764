"""Build shards: read, plan, write each shard as a job of its own, and put down the manifest."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from .. import manifest
from ..imagery import geotiff
from ..options import BuildOptions
from ..readers import formats as readers
from ..readers import intake, tar_files
from ..records import SPLITS, Rejection, ShardError
from ..running import engines
from ..storage import store
from ..storage.locking import one_writer
from .folder import BuildFolder
from .plan import Plan
from .writer import DiskFull, ShardJob, ShardResult, write_shard


@dataclass(frozen=True)
class BuildSummary:
    """What a build did.  `splits` and `rejected` are those of the manifest; `advice` is worth showing to the user."""

    folder: str
    splits: dict[str, dict[str, Any]]
    rejected: dict[str, int]
    seconds: float
    resumed_shards: int = 0
    dry_run: bool = False
    advice: tuple[str, ...] = ()

    def text(self) -> str:
        """For people."""
        lines = ["Dry run, nothing was written; the build would be" if self.dry_run else f"Shards in {self.folder}:"]
        for split, row in self.splits.items():
            size = f"{'about ' if self.dry_run else ''}{row['size_bytes'] / 1e6:.1f} MB"
            lines.append(f"  {split:5} {row['samples']:>9,} samples, {row['shards']} shards, {size}: {row['pattern']}")
        lines += [f"  rejected, {reason}: {count:,}" for reason, count in self.rejected.items()]
        if self.rejected and not self.dry_run:
            lines.append(f"  each of them is named in {store.join(self.folder, 'rejected.jsonl')}")
        if self.resumed_shards:
            lines.append(f"  {self.resumed_shards} shards were there from an earlier run")
        if not self.dry_run:
            samples = sum(row["samples"] for row in self.splits.values())
            lines.append(f"  {self.seconds:.1f} s, {samples / max(self.seconds, 1e-9):,.0f} samples/s")
        return "\n".join(lines + [f"  note: {line}" for line in self.advice])


def build(
    captions: str,
    out: str,
    *,
    images: str | None = None,
    options: BuildOptions | None = None,
    workers: int = 1,
    engine: str = "auto",
    strict: bool = False,
    overwrite: bool = False,
    outside: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> BuildSummary:
    """Turn captions and images into shuffled WebDataset shards that open_clip reads.

    The shards depend on the input and `options` alone: workers, engine and interruptions change no byte.

    Args:
        captions: caption file or folder, or tars; the kinds are listed in `ReadOptions`.
        out: folder for the shards; like `captions` and `images` a path or an fsspec URL.
        images: folder that the image names are relative to (default: the folder of the captions).
        workers: processes (or threads, or Ray CPUs, as `engine` says).
        strict: raise at the first problem that would otherwise be a row in rejected.jsonl.
        overwrite: replace another build in `out` instead of refusing.
        outside: let the captions name images outside `images`, also by URLs.
        dry_run: read the captions, plan and estimate, but write nothing.
    Raises:
        ShardError: the source cannot be read, nothing is left to write, `out` holds another build.
        DiskFull: no room; the same call goes on later.
    """
    options = options or BuildOptions()
    started = time.monotonic()
    root = images if images is not None else captions if store.is_folder(captions) else store.parent(captions)
    kind, why = readers.kind_of(captions, options.read)
    _require_apart(captions, kind, out)
    entries = readers.read_as(kind, why, captions, options.read)
    found = intake.to_records(entries, root, options.read, options.seed, outside=outside)
    records = geotiff.tiled(found, options.image)
    with Plan(tqdm(records, desc="reading", unit=" images", disable=not progress, leave=False), options) as plan:
        if strict and plan.rejections:
            raise ShardError(_strict_message(plan.rejections))
        if not plan.shards:
            raise ShardError(_nothing_message(captions, root, plan.rejections))
        advice = _advice(plan, options)
        if dry_run:
            rejected = manifest.count_reasons(plan.rejections)
            return BuildSummary(out, _estimate(plan), rejected, time.monotonic() - started, 0, True, advice)
        folder = BuildFolder(out, options, plan)
        content, resumed = None if overwrite else folder.finished(), len(plan.shards)
        if content is not None:
            advice += _changed(plan, out)
        else:
            store.make_folder(out)
            with one_writer(out):
                if overwrite:
                    folder.clear()
                content = folder.finished()  # by another builder, in the meantime
                if content is None:
                    done = folder.open()
                    resumed = len(done)
                    jobs = _jobs(plan, out, options, done, strict=strict)
                    in_memory = any(url.startswith("memory://") for url in (captions, root, out))
                    results = engines.run(write_shard, jobs, engine, workers, in_memory=in_memory)
                    _collect(results, done, folder, plan, progress=progress)
                    content = folder.close(done)
    seconds = time.monotonic() - started
    return BuildSummary(out, content["splits"], content["rejected"], seconds, resumed, advice=advice)


def _jobs(
    plan: Plan, out: str, options: BuildOptions, done: dict[str, ShardResult], *, strict: bool
) -> Iterator[ShardJob]:
    for shard in plan.shards:
        if shard.file not in done:
            yield ShardJob(shard.file, shard.split, out, tuple(plan.samples(shard)), options.image, strict)


def _require_apart(captions: str, kind: str, out: str) -> None:
    """Refuse a source that the build would overwrite before or while it reads it.

    Shards are read until the last one is written, so the target must not be their folder, nor lie above or inside it.
    """
    if kind == "tar":
        inside = next((place for place in tar_files.places(captions) if store.overlap(place, out)), None)
    else:
        names = () if store.is_folder(captions) else (*manifest.FILES, *manifest.REPORTS)
        inside = next((captions for name in names if store.overlap(captions, store.join(out, name))), None)
    if inside is not None:
        raise ShardError(
            f"{out}: the target and the source {inside} are one, or one lies inside the other, and the source would"
            " be overwritten. Choose another folder for the shards."
        )


def _collect(
    results: Generator[ShardResult, None, None],
    done: dict[str, ShardResult],
    folder: BuildFolder,
    plan: Plan,
    *,
    progress: bool,
) -> None:
    """Take results as they come; each is noted down at once, so that a killed build can go on behind it."""
    total = sum(plan.size(split) for split in SPLITS)
    before = sum(result.samples + len(result.rejections) for result in done.values())
    with tqdm(total=total, initial=before, desc="writing", unit=" samples", disable=not progress) as bar:
        try:
            with closing(results):  # ends the jobs in flight, whatever was raised
                for result in results:
                    folder.note(result)
                    done[result.file] = result
                    bar.update(result.samples + len(result.rejections))
        except BaseException as error:
            with suppress(OSError):  # what was raised first says more
                folder.remove_half_written()
            if isinstance(error, DiskFull):
                folder.disk_full(done, str(error))
            raise


def _advice(plan: Plan, options: BuildOptions) -> tuple[str, ...]:
    lines = []
    train = [shard for shard in plan.shards if shard.split == "train"]
    if train and len(train) < options.readers:
        lines.append(
            f"{len(train)} training shards are fewer than {options.loader_workers} loader workers x {options.ranks}"
            f" ranks = {options.readers}; open_clip refuses that. Pass --shards {options.readers} here, or train with"
            f" --workers {len(train) // options.ranks}."
        )
    if options.layout == "image":
        lines.append("layout image is for MSA models and CLIP_benchmark; plain open_clip 3.3 wants --layout pair.")
    return tuple(lines)


def _changed(plan: Plan, out: str) -> tuple[str, ...]:
    """A note on images that were changed after the shards were finished."""
    finished_ns = store.changed_ns(store.join(out, "manifest.json"))
    changed = plan.images_newer_than(finished_ns) if finished_ns else []
    if not changed:
        return ()
    return (f"{len(changed)} image files were changed after this build, e.g. {changed[0]}; --overwrite builds anew.",)


def _estimate(plan: Plan) -> dict[str, dict[str, Any]]:
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        shards = [shard.file for shard in plan.shards if shard.split == split]
        if shards:
            splits[split] = {
                "shards": len(shards),
                "pattern": manifest.brace_pattern(shards),
                "samples": plan.size(split),
                "size_bytes": plan.estimated_bytes(split),
            }
    return splits


def _strict_message(rejections: list[Rejection]) -> str:
    first = "; ".join(f"{row.file}: {row.reason} ({row.detail})" for row in rejections[:3])
    return f"strict: {len(rejections)} problems, the first: {first}."


def _nothing_message(captions: str, root: str, rejections: list[Rejection]) -> str:
    if not rejections:
        return f"{captions}: names no images; nothing to build."
    reasons = ", ".join(f"{reason}: {count}" for reason, count in manifest.count_reasons(rejections).items())
    return (
        f"{captions}: nothing is left to build ({reasons}). The first: {rejections[0].file}: {rejections[0].detail}."
        f" Images are looked for below {root}; is --images right?"
    )
