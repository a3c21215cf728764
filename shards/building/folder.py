"""The folder of a build: refuses what is not ours, notes every finished shard, and so lets a killed build go on."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from .. import manifest
from ..options import BuildOptions
from ..records import SPLITS, Rejection, ShardError
from ..storage import store
from .plan import Plan
from .writer import ShardResult

STATE = ".build"  # folder inside, for as long as the build is unfinished


class BuildFolder:
    """The target of one build, known by its fingerprint."""

    def __init__(self, url: str, options: BuildOptions, plan: Plan) -> None:
        self.url = url
        self._options = options
        self._plan = plan
        self._mark = manifest.fingerprint(options, plan.digest)
        self._state = store.join(url, STATE)

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
        state = store.join(self._state, "state.json")
        if store.exists(state):
            before = json.loads(store.read_bytes(state))
            if before["fingerprint"] == self._mark:
                return self._so_far()
            raise ShardError(
                f"{self.url}: holds an unfinished build from other input or options"
                f" ({self._difference(before['options'])}). Give it the same ones, or pass --overwrite to start again."
            )
        stray = [name for name in store.listing(self.url) if self._is_shard(name)]
        if stray:
            raise ShardError(
                f"{self.url}: holds shards already, e.g. {stray[0]}. Choose another folder or pass --overwrite."
            )
        content = {"fingerprint": self._mark, "options": self._options.to_dict()}
        store.write_bytes(state, json.dumps(content).encode())
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
        content = manifest.make(self._options, self._mark, results, rejections)
        manifest.write(self.url, content, rejections)
        store.remove_folder(self._state)
        return content

    def disk_full(self, done: dict[str, ShardResult], detail: str) -> None:
        """Leave a row about the full disk, if there is still room for it."""
        with suppress(OSError):
            manifest.write_rejections(self.url, [*self.rejections(done), Rejection(self.url, "disk full", detail)])

    def remove_half_written(self) -> None:
        """Remove what killed workers left; those that could clean up behind themselves left nothing."""
        for name in store.listing(self.url):
            if name.endswith(store.TEMPORARY):
                store.remove(store.join(self.url, name))

    def rejections(self, done: dict[str, ShardResult]) -> list[Rejection]:
        """All problems so far, in the order of the plan."""
        results = [done[shard.file] for shard in self._plan.shards if shard.file in done]
        return self._plan.rejections + [row for result in results for row in result.rejections]

    def clear(self) -> None:
        """Remove the shards and files of an earlier build."""
        for name in store.listing(self.url) if store.exists(self.url) else ():
            if name in manifest.FILES or self._is_shard(name):
                store.remove(store.join(self.url, name))
        store.remove_folder(self._state)

    def _so_far(self) -> dict[str, ShardResult]:
        self.remove_half_written()
        there = set(store.listing(self.url))
        found = {}
        for shard in self._plan.shards:
            if shard.file in there and f"{STATE}/{shard.file}.json" in there:
                result = ShardResult.from_json(store.read_bytes(self._note(shard.file)))
                if store.size(store.join(self.url, shard.file)) == result.size_bytes:
                    found[shard.file] = result
        return found

    def _note(self, file: str) -> str:
        return store.join(self._state, f"{file}.json")

    def _is_shard(self, name: str) -> bool:
        prefix = re.escape(f"{self._options.name}-") if self._options.name else ""
        return re.fullmatch(rf"{prefix}({'|'.join(SPLITS)})-\d{{6}}\.tar", name) is not None

    def _difference(self, before: dict[str, Any]) -> str:
        now = json.loads(json.dumps(self._options.to_dict()))
        changed = [name for name, value in now.items() if before.get(name) != value]
        return f"changed: {', '.join(changed)}" if changed else "the input changed"
