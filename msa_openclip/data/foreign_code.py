"""Python code that comes with a model runs if the user says so, and never because a configuration does.

Hugging Face's tokenizers and text towers may bring code (`trust_remote_code`), pickles are code, and where nothing is
said transformers asks whoever sits at the terminal, or whatever standard input holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

try:  # not everybody has it; open_clip needs it for text towers and tokenizers of Hugging Face alone
    from transformers import dynamic_module_utils as _transformers
except ImportError:
    _transformers = None  # type: ignore[assignment]

TRUST_VARIABLE = "MSA_OPENCLIP_TRUST_REMOTE_CODE"
"""Environment variable: `1` lets code that comes with a model run, where there is no flag for that, as in training."""
_WEIGHTS_ONLY, _NOT_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's own
_said: ContextVar[bool | None] = ContextVar("trust_remote_code", default=None)


class ForeignCodeError(ValueError):
    """A model wants to run code of its own; the message names the key and how to allow it."""


def is_trusted() -> bool:
    """What the user has said: by `no_foreign_code` around this, else by TRUST_VARIABLE."""
    said = _said.get()
    return os.environ.get(TRUST_VARIABLE) == "1" if said is None else said


def refuse_code(model: str, config: Mapping[str, Any]) -> None:
    """Refuse a configuration that switches remote code on, at any depth of it.

    Raises:
        ForeignCodeError: it does.
    """
    key = _switch_on(config, "model_cfg")
    if key:
        raise ForeignCodeError(
            f"{model}: its configuration sets {key}, which would run Python code that comes with the model. Remove the "
            "key, or allow it yourself if you trust whoever made the model: --trust-remote-code, "
            f"load(..., trust_remote_code=True), or {TRUST_VARIABLE}=1 in training."
        )


def _switch_on(value: Any, key: str) -> str | None:
    """Where `trust_remote_code` is set to anything but false; None if nowhere."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            below = f"{key}.{name}"
            found = below if name == "trust_remote_code" and item else _switch_on(item, below)
            if found:
                return found
    if isinstance(value, list):
        return next(filter(None, (_switch_on(item, f"{key}[{place}]") for place, item in enumerate(value))), None)
    return None


def tokenizer_options(config: Mapping[str, Any], *, trust: bool) -> dict[str, Any]:
    """The answer that transformers would otherwise ask of whoever sits at the terminal, or of standard input."""
    text_cfg = config.get("text_cfg")
    from_hub = not config or (isinstance(text_cfg, Mapping) and "hf_tokenizer_name" in text_cfg)
    return {"trust_remote_code": trust} if from_hub else {}


@contextmanager
def no_foreign_code(*, allowed: bool, pickles: bool = False) -> Iterator[None]:
    """While a model is built: checkpoints are read as weights alone, and transformers cannot ask whether code may run.

    open_clip 3.3 falls back to a load without `weights_only` after a TypeError, which a crafted pickle can raise.

    Args:
        allowed: code in the model's folder or repository may run.
        pickles: so may what a checkpoint's pickle calls, where the caller asks for that.
    """
    names = () if pickles else (_WEIGHTS_ONLY, _NOT_WEIGHTS_ONLY)
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ.update(dict.fromkeys(names[:1], "1"))
    seconds = None if _transformers is None else _transformers.TIME_OUT_REMOTE_CODE
    if seconds is not None and not allowed:
        _transformers.TIME_OUT_REMOTE_CODE = 0  # it would read the answer from standard input
    said = _said.set(allowed)
    try:
        yield
    finally:
        _said.reset(said)
        if seconds is not None:
            _transformers.TIME_OUT_REMOTE_CODE = seconds
        for name in names[:1]:
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if value is not None})
