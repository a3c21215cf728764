"""Where the models of indexes lie, by the word of the user: an index only says what its model was called.

Whoever builds an index, or asks one with `--model`, has said where its model is; that is kept by fingerprint in the
user's own folder ($XDG_STATE_HOME, ~/.local/state), so that `msa-openclip search INDEX` need not be told again.  What
stands in an index that came from elsewhere is shown, and nothing is loaded from there until the user repeats it.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

from ..data.small_files import FileProblem, read_json
from ..evaluation.loading import UNTRAINED, LoadedModel
from .files import ImageIndexError, read_manifest
from .fingerprint import fingerprint

_KEPT = 1000


def model_of(index: str, given: str | None) -> str:
    """What `loading.load` is to be given to ask an index.

    Args:
        index: folder of the index.
        given: what the user says, if anything.
    Raises:
        ImageIndexError: the user has said nothing, now or before.
    """
    if given:
        return given
    manifest = read_manifest(Path(index))
    known = _read().get(manifest.fingerprint)
    if known is None:
        raise ImageIndexError(
            f"{index}: it names {manifest.model!r} as its model, a place that you have not used for an index before. "
            f"If you trust whoever made the index and what lies there, add --model {shlex.quote(manifest.model)}; if "
            "you have the model elsewhere, give that place."
        )
    return known


def remember(model: LoadedModel) -> None:
    """Keep where a model was loaded from; without a word where the user has no folder, or none that can be written."""
    name, found, checkpoint = model.spec.partition("=")
    if checkpoint == UNTRAINED:
        return
    spec = f"{name}={os.path.abspath(checkpoint)}" if found and os.path.isfile(checkpoint) else model.spec
    if spec.startswith("local-dir:"):
        spec = "local-dir:" + os.path.abspath(spec.removeprefix("local-dir:"))
    mark, known = fingerprint(model.scorer), _read()
    path = _path()
    if known.pop(mark, None) == spec or path is None:
        return
    known[mark] = spec  # last, so that the oldest are forgotten first
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(dict([*known.items()][-_KEPT:]), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)


def _path() -> Path | None:
    """The file of the user's folder; None for a user without one, as containers run under any number."""
    state = os.environ.get("XDG_STATE_HOME")
    try:
        return (Path(state) if state else Path.home() / ".local" / "state") / "msa_openclip" / "models.json"
    except RuntimeError:  # neither HOME nor an entry among the users
        return None


def _read() -> dict[str, str]:
    path = _path()
    if path is None:
        return {}
    try:
        content = read_json(path)
    except (OSError, FileProblem):
        return {}
    return {str(mark): str(spec) for mark, spec in content.items()} if isinstance(content, dict) else {}
