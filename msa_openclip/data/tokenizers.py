"""Tokenizers of models by name, none of whose code runs unless the user says so.

Imports nothing of this package but leaves, so that `shards info`, too, loads its tokenizer here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip

from .foreign_code import is_trusted, no_foreign_code, refuse_code, tokenizer_options
from .small_files import LARGEST_CONFIG, FileProblem, read_json


def load_tokenizer(
    name: str,
    context_length: int | None = None,
    *,
    trust_remote_code: bool | None = None,
    config: Mapping[str, Any] | None = None,
) -> Any:
    """What `open_clip.get_tokenizer` gives for any model; code that comes along needs the user's word.

    Example:
        >>> load_tokenizer("ViT-B-32")(["a plane"]).shape
        torch.Size([1, 77])

    Args:
        name: of a model, or `hf-hub:ORG/REPO` or `local-dir:FOLDER`.
        context_length: of its token ids; None for the model's own.
        trust_remote_code: whether that code may run; None for what the user has said by TRUST_VARIABLE.
        config: what `configuration` said of the name, where it has been asked: a hub may be behind it.
    Raises:
        ForeignCodeError: the configuration switches code on that is not trusted.
        FileProblem: the configuration of a folder cannot be read.
    """
    trusted = is_trusted() if trust_remote_code is None else trust_remote_code
    config = configuration(name) if config is None else config
    if not trusted:
        refuse_code(name, config)
    with no_foreign_code(allowed=trusted):
        return open_clip.get_tokenizer(name, context_length=context_length, **tokenizer_options(config, trust=trusted))


def configuration(name: str) -> Mapping[str, Any]:
    """What open_clip will build a model from; empty where none can be read, which open_clip reports next.

    Raises:
        FileProblem: the file of a folder is a pipe, too large, or no JSON; the message names it.
    """
    try:
        if name.startswith("local-dir:"):
            config = read_json(Path(name.removeprefix("local-dir:")) / "open_clip_config.json", LARGEST_CONFIG)
            found = config.get("model_cfg", config)
        else:
            found = open_clip.factory.get_model_config(name if name.startswith("hf-hub:") else name.replace("/", "-"))
    except FileProblem:
        raise
    except Exception:
        return {}
    return found if isinstance(found, Mapping) else {}
