"""What stands at each place of a caption source, held to what is expected there; every reader takes its values here.

What does not fit raises KeyError or TypeError with the place, `images[3].sentences[0].raw`; `formats.read` adds the
file, the format it was read as, and what to do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from ..records import ShardError, clean_caption
from ..storage import json_text

T = TypeVar("T")
MISSING = ("nan", "NaN", "None", "null", "NULL", "<NA>")
"""What careless programs write into a table where a caption is missing."""


def member(row: Any, name: str, kind: type[T], where: str) -> T:
    """`row[name]` of a JSON object; it has to be there.

    Raises:
        KeyError: the object lacks it.
        TypeError: `row` is no object, or the value of another type.
    """
    typed(row, dict, where)
    if name not in row:
        raise KeyError(f"{where} has no {name!r}".strip())
    return typed(row[name], kind, f"{where}.{name}".lstrip("."))


def typed(value: Any, kind: type[T], where: str) -> T:
    """`value`, if it is of a type.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{where}: {_shown(value)} where {_NAMES[kind]} is expected")
    return value


def label(value: Any, where: str) -> str | None:
    """A name, class or split; numbers stand for themselves, and None for what is missing.

    Raises:
        TypeError: a list, an object, or bytes.
    """
    if is_missing(value) or value == "":
        return None
    if isinstance(value, (str, int, float)):
        return str(value)
    raise TypeError(f"{where}: {_shown(value)} where text is expected")


def captions(value: Any, where: str) -> list[str]:
    """One caption, or several in a list or a JSON list; a missing one among several is blank, so that it is counted.

    Raises:
        TypeError: something else than text.
    """
    if is_missing(value):
        return []
    if isinstance(value, str):
        found = _json_list(value)
        if found is None:
            return [value]
        value = found
    listed = list(value) if isinstance(value, tuple) else typed(value, list, where)
    return ["" if is_missing(text) else typed(text, str, f"{where}[{index}]") for index, text in enumerate(listed)]


def dates(value: Any, where: str) -> list[str | None]:
    """ISO dates, null where one is not known.

    Raises:
        TypeError: something else, or an earlier date after a later one.
    """
    found = [label(date, f"{where}[{index}]") for index, date in enumerate(typed(value, list, where))]
    for index, date in enumerate(found):
        if date is not None and not _ISO_DATE.match(date):
            raise TypeError(f"{where}[{index}]: {_shown(date)} where an ISO date, 2020-06-30 or 2020, is expected")
    known = [date for date in found if date is not None]
    if known != sorted(known):
        raise TypeError(f"{where}: {', '.join(known)} where images and their dates are expected in order of date")
    return found


_ISO_DATE = re.compile(r"\d{4}(-\d\d(-\d\d.*)?)?$")


def usable_caption(text: str) -> str:
    """A caption with its white space collapsed; empty where it says nothing, so that it is passed over everywhere.

    That is so of blank ones, of those that stand for a missing one, and of half characters, which no file can hold.
    """
    caption = clean_caption(text)
    return "" if caption in MISSING or not encodable(caption) else caption


def is_missing(value: Any) -> bool:
    """True for null and NaN, which Parquet and JSON have where nothing is."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def decoded(data: bytes, url: str) -> str:
    """UTF-8 text.

    Raises:
        ShardError: it is not; the message names the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(url, data.count(b"\n", 0, error.start) + 1) from error


def not_utf8(url: str, line: int) -> ShardError:
    """The error for a line in another encoding."""
    return ShardError(f"{url}: line {line} is not UTF-8; convert the file: iconv -f latin1 -t utf-8.")


def encodable(*texts: str | None) -> bool:
    """False where a text has lone surrogates, of JSON escapes or file names that are not UTF-8: no file can hold it."""
    try:
        for text in texts:
            (text or "").encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_list(text: str) -> list[Any] | None:
    """A cell such as ["a lake", null]; None for all other text, also for a list of anything else, [1, 2] say."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        content = json_text.parse(text, "")
    except json_text.JsonError:
        return None
    listed = isinstance(content, list) and all(isinstance(part, str) or is_missing(part) for part in content)
    return content if listed else None


_NAMES: Mapping[type, str] = {str: "text", int: "a number", list: "a list", dict: "an object"}


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]} …"
