"""JSON that others wrote, parsed so that whatever is wrong with it becomes one line that names the file."""

from __future__ import annotations

import json
from typing import Any

from ..records import ShardError


class JsonError(ShardError):
    """Not JSON, or nothing that can be taken at its word; the message names the file."""


def parse(data: bytes | str, where: str) -> Any:
    """The content of a JSON text.

    Raises:
        JsonError: it is damaged, nested too deep, or an object has a key twice, of which json would drop the first.
    """
    try:
        return json.loads(data, object_pairs_hook=_without_doubles)
    except RecursionError as error:
        raise JsonError(f"{where}: not usable JSON (nested too deep).") from error
    except ValueError as error:
        raise JsonError(f"{where}: not usable JSON ({error}).") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found
