"""The report that a build leaves beside its shards: report.json and report.html, in place of earlier ones only."""

from __future__ import annotations

from .. import manifest
from ..records import ShardError
from ..storage import json_text, store
from . import report, report_page

JSON, HTML = manifest.REPORTS


def require_ours(folder: str) -> None:
    """Refuse a folder in which files of others have the names of the report.

    Raises:
        ShardError: they do; call this before the build, so that nobody waits for shards to learn it.
    """
    for name, is_ours in ((JSON, _is_json), (HTML, _is_html)):
        url = store.join(folder, name)
        if store.exists(url) and not is_ours(url):
            raise ShardError(
                f"{url}: is no report of shards, and --report would overwrite it. It is left alone: move it, choose"
                " another folder, or leave out --report."
            )


def write(folder: str) -> None:
    """Describe the shards of a folder in two files beside them."""
    made = report.report([folder])
    store.write_text(store.join(folder, JSON), made.json())
    store.write_text(store.join(folder, HTML), report_page.page(made))


def _is_json(url: str) -> bool:
    try:
        content = json_text.parse(store.read_bytes(url), url)
    except ShardError:
        return False
    return isinstance(content, dict) and {"folders", "splits", "same_images"} <= content.keys()


def _is_html(url: str) -> bool:
    return f"<title>{report_page.TITLE}".encode() in store.read_bytes(url)
