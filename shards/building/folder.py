"""The folder of a build: refuses what is not ours, notes every finished shard, and so lets a killed build go on."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from typing import Any, cast

from .. import manifest
from ..options import BuildOptions
from ..records import Rejection, ShardError
from ..storage import json_text, sources, store
from .plan import Plan
from .writer import ShardResult


class BuildFolder:
    """The target of one build, known by its fingerprint."""

    def __init__(self, url: str, options: BuildOptions, plan: Plan) -> None:
        self.url = url
        self._options = options
        self._plan = plan
        self._mark = manifest.fingerprint(options, plan.digest)
        self._state = store.join(url, manifest.STATE)
        if store.is_link(self._state):
            raise ShardError(f"{self._state}: a link, where the builder keeps its notes. Remove it.")

    def finished(self) -> dict[str, Any] | None:
        """The manifest, if this very build stands here finished.

        Raises:
            ShardError: another build stands here, or this one with a shard missing.
        """
        if not store.exists(store.join(self.url, "manifest.json")):
            return None
        content = manifest.read(self.url)
        if content["fingerprint"] != self._mark:
            raise ShardError(
                f"{self.url}: holds a build from other input, options or versions"
                f" ({self._difference(content['options'])}). Choose another folder or pass --overwrite."
            )
        for row in content["shards"]:
            url = store.join(self.url, row["file"])
            if not store.exists(url) or store.size(url) != row["size_bytes"]:
                raise ShardError(f"{url}: missing or of the wrong size, though the manifest lists it. Use --overwrite.")
        return content

    def open(self) -> dict[str, ShardResult]:
        """Make the folder ready; returns what an interrupted run of the same build has finished.

        Raises:
            ShardError: shards or an unfinished build of other origin are here.
        """
        store.make_folder(self._state)
        before = self._unfinished()
        if before is not None:
            if before["fingerprint"] == self._mark:
                return self._so_far()
            raise ShardError(
                f"{self.url}: holds an unfinished build from other input or options"
                f" ({self._difference(before['options'])}). Give it the same ones, or pass --overwrite to start again."
            )
        stray = [name for name in store.names(self.url) if self._is_shard(name) or name in manifest.FILES]
        if stray:
            raise ShardError(
                f"{self.url}: holds shards already, e.g. {stray[0]}. Choose another folder or pass --overwrite."
            )
        content = {"fingerprint": self._mark, "options": self._options.to_dict()}
        store.write_bytes(store.join(self._state, "state.json"), json.dumps(content).encode())
        return {}

    def note(self, result: ShardResult) -> None:
        """A shard is finished."""
        store.write_bytes(self._note(result.file), result.to_json())

    def close(self, done: dict[str, ShardResult]) -> dict[str, Any]:
        """Write manifest, sizes and rejections and forget the state; returns the manifest.

        Raises:
            ShardError: a shard came out empty.
        """
        results = [done[shard.file] for shard in self._plan.shards]
        rejections = self.rejections(done)
        empty = [result.file for result in results if not result.samples]
        if empty:
            manifest.write_rejections(self.url, rejections)
            raise ShardError(
                f"{store.join(self.url, empty[0])}: nothing is left in {len(empty)} of {len(results)} shards, e.g."
                f" {rejections[-1].file}: {rejections[-1].detail}; rejected.jsonl has the rest. Repair or remove those"
                " images, or ask for fewer shards (--shards), and pass --overwrite."
            )
        content = manifest.make(self._options, self._mark, results, rejections, self._plan.dates)
        manifest.write(self.url, content, rejections)
        self._forget()
        return content

    def disk_full(self, done: dict[str, ShardResult], detail: str) -> None:
        """Leave a row about the full disk, if there is still room for it."""
        with suppress(OSError):
            manifest.write_rejections(self.url, [*self.rejections(done), Rejection(self.url, "disk full", detail)])

    def remove_half_written(self) -> None:
        """Remove what killed workers left of this build's files; those that could clean up left nothing."""
        for folder in (self.url, self._state):
            for name in store.names(folder):
                target = store.target_of_temporary(name)
                if target and self._is_own(target):
                    store.remove(store.join(folder, name))

    def rejections(self, done: dict[str, ShardResult]) -> list[Rejection]:
        """All problems so far, in the order of the plan."""
        results = [done[shard.file] for shard in self._plan.shards if shard.file in done]
        return self._plan.rejections + [row for result in results for row in result.rejections]

    def clear(self) -> None:
        """Remove the shards and files of earlier builds, and nothing else that lies here.

        Raises:
            ShardError: something else stands where this build would write; nothing has been removed then.
        """
        names, earlier = store.names(self.url), self._of_earlier_builds()
        foreign = [name for name in names if (self._is_shard(name) or name in manifest.FILES) and name not in earlier]
        if foreign:
            raise ShardError(
                f"{store.join(self.url, foreign[0])}: stands where this build would write, and no build is known to "
                "have made it. It is left alone: move it, or choose another folder."
            )
        # The manifest goes last: until then it says, also after a kill, which shards are those of a build.
        for name in sorted(
            earlier.intersection(names), key=lambda name: (name in manifest.FILES, name == "manifest.json")
        ):
            store.remove(store.join(self.url, name))
        self.remove_half_written()
        self._forget(earlier)

    def _of_earlier_builds(self) -> set[str]:
        """Names of what builds have made here: what a manifest lists, and the shards of one that has not finished.

        A build begins in a folder without shards of its name, so those of its name that lie there before its end are
        its own; others, of the name that is asked for now, are not. Where its note is damaged, only the shards that
        it noted as finished are known to be its own.

        Raises:
            ShardError: manifest.json is somebody else's, or no JSON at all.
        """
        made: set[str] = set()
        unfinished = self._unfinished(damaged={})
        if unfinished:
            prefix = unfinished["options"]["name"]
            made.update(name for name in store.names(self.url) if manifest.is_shard_of(prefix, name))
        if unfinished is not None:
            notes = (name.removesuffix(".json") for name in store.names(self._state) if name.endswith(".json"))
            made.update(name for name in notes if manifest.is_shard(name))
            made.update(manifest.FILES)
        if store.exists(store.join(self.url, "manifest.json")):
            try:
                made.update(manifest.listed(self.url), manifest.FILES)
            except ShardError as error:
                raise ShardError(f"{error} It is left alone: move it, or choose another folder.") from error
        return made

    def _unfinished(self, damaged: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """What an unfinished build noted of itself; None if there is none.

        Raises:
            ShardError: the note is damaged, unless `damaged` is to stand for it.
        """
        url = store.join(self._state, "state.json")
        if not store.exists(url):
            return None
        try:
            content = json_text.parse(store.read_bytes(url), url)
            options = content.get("options") if isinstance(content, dict) and "fingerprint" in content else None
            if isinstance(options, dict) and isinstance(options.get("name"), str):
                return cast(dict[str, Any], content)
        except ShardError:
            pass
        if damaged is None:
            raise ShardError(f"{url}: damaged; pass --overwrite to start again.")
        return damaged

    def _so_far(self) -> dict[str, ShardResult]:
        """Shards that are finished, from images that are still what they were."""
        self.remove_half_written()
        there, noted = set(store.names(self.url)), set(store.names(self._state))
        found = {}
        versions = sources.Versions()
        for shard in self._plan.shards:
            if shard.file in there and f"{shard.file}.json" in noted:
                result = self._noted(shard.file)
                images = [place for sample in self._plan.samples(shard) for place in sample.record.images]
                if (
                    result is not None
                    and store.size(store.join(self.url, shard.file)) == result.size_bytes
                    and versions.of(images) == result.versions
                ):
                    found[shard.file] = result
        return found

    def _noted(self, file: str) -> ShardResult | None:
        """The note of a finished shard; None where it is damaged, so that the shard is written again."""
        try:
            return ShardResult.from_json(store.read_bytes(self._note(file)))
        except (ShardError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def _forget(self, earlier: Collection[str] = ()) -> None:
        """Remove the notes, those of the shards of `earlier` builds, too."""
        for name in store.names(self._state):
            shard = name.removesuffix(".json")
            if name == "state.json" or shard in earlier or self._is_shard(shard):
                store.remove(store.join(self._state, name))
        store.remove_empty_folder(self._state)

    def _note(self, file: str) -> str:
        return store.join(self._state, f"{file}.json")

    def _is_shard(self, name: str) -> bool:
        return manifest.is_shard_of(self._options.name, name)

    def _is_own(self, name: str) -> bool:
        return name in (*manifest.FILES, "state.json") or self._is_shard(name.removesuffix(".json"))

    def _difference(self, before: dict[str, Any]) -> str:
        now = json.loads(json.dumps(self._options.to_dict()))
        changed = [name for name, value in now.items() if before.get(name) != value]
        return f"changed: {', '.join(changed)}" if changed else "the input changed"
