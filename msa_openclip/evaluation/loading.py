"""Models by one string, `NAME=CHECKPOINT`, with transform and tokenizer, ready to score; never with random weights.

This is the one place of the package that loads weights.  Whatever files it is pointed to, none of their code runs:
pickles are read as weights alone, and a configuration cannot allow a tokenizer or text tower to bring code of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import load_state_dict
from torch import nn

from ..data.pixels import Preprocess
from ..data.small_files import read_json, require_regular
from ..model.msaclip import MSA_PREFIXES, MSACLIP
from .run_parameters import model_options
from .scorer import Scorer, Tokenizer

try:  # not everybody has it; open_clip needs it for text towers and tokenizers of Hugging Face alone
    from transformers import dynamic_module_utils as _transformers
except ImportError:
    _transformers = None  # type: ignore[assignment]

UNTRAINED = "untrained"
"""Given as the checkpoint, asks for random weights, to see what chance looks like."""
PRECISIONS = ("fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16")
"""As open_clip_train.main has them; open_clip itself takes any other word for fp32."""
_WEIGHTS_ONLY, _NOT_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's own
_LONGEST_REASON = 300  # characters; torch lists every key of a checkpoint that does not fit


class ModelError(ValueError):
    """A model cannot be loaded as asked; the message names the remedy."""


@dataclass(frozen=True)
class LoadedModel:
    """A model and all it needs to be asked."""

    spec: str
    scorer: Scorer
    preprocess: Preprocess
    tokenizer: Tokenizer
    precision: str = "fp32"
    config: Mapping[str, Any] = field(default_factory=dict)
    """What it was built from, as `open_clip.get_model_config` gives it; with the options that `load` was given."""


def load(
    spec: str,
    device: str = "cpu",
    precision: str = "fp32",
    *,
    trust_remote_code: bool = False,
    towers_only: bool = False,
    options: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load an open_clip model; a checkpoint in its run's folder as the run built it (`--force-*`, `--image-*`).

    Args:
        spec: `NAME=FILE`, `NAME=TAG` (a pretrained tag of open_clip), `hf-hub:ORG/REPO` or `local-dir:FOLDER`.
        device: where to.
        precision: as for open_clip_train.
        trust_remote_code: let the model's tokenizer and text tower run the Python code that they bring along; no
            configuration can switch this on.
        towers_only: MSA's own part may be random, and NAME without weights stands for what towers alone start from
            (`pretrained_image` among the options, a text tower of the hub).
        options: for `create_model_and_transforms`, over those of the run.
    Raises:
        ModelError: the model or its weights do not exist or are damaged, an MSA model would be left with a random
            MSCMAT, or the model wants to run code that `trust_remote_code` does not allow.
    """
    name, pretrained = (spec, None) if towers_only and "=" not in spec else split_spec(spec)
    if precision not in PRECISIONS:
        raise ModelError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}.")
    config = _configuration(name)
    if not trust_remote_code:
        _refuse_code(spec, config)
    if pretrained is not None and pretrained != UNTRAINED and os.path.exists(pretrained):
        _require_weights(spec, pretrained)
    as_trained = {**(model_options(pretrained, name) if pretrained else {}), **(options or {})}
    try:
        with _no_foreign_code(allowed=trust_remote_code):
            model, _, preprocess = open_clip.create_model_and_transforms(
                name,
                pretrained=None if pretrained == UNTRAINED else pretrained,
                load_weights=pretrained != UNTRAINED,
                require_pretrained=pretrained != UNTRAINED and not towers_only,
                precision=precision,
                device=device,
                **as_trained,
            )
            tokenizer = open_clip.get_tokenizer(
                name,
                context_length=as_trained.get("force_context_length"),
                **_tokenizer_options(config, trust_remote_code),
            )
            if isinstance(model, MSACLIP) and pretrained not in (None, UNTRAINED) and not towers_only:
                _require_trained_head(spec, str(pretrained))
    except ModelError:
        raise
    except (
        Exception
    ) as error:  # for one broken file or another torch, safetensors and open_clip raise nearly everything
        raise ModelError(f"{spec}: cannot be loaded: {one_line(error)}") from error
    _require_finite(spec, model)
    built_from = model.built_from if isinstance(model, MSACLIP) else config
    return LoadedModel(spec, Scorer(model.eval(), precision), preprocess, tokenizer, precision, built_from)


def split_spec(spec: str) -> tuple[str, str | None]:
    """`NAME=CHECKPOINT` -> both; the schemas of open_clip bring their own weights.

    Raises:
        ModelError: neither weights nor schema.
    """
    name, found, pretrained = spec.partition("=")
    if name.startswith(("hf-hub:", "local-dir:")):
        return spec, None
    if not found or not pretrained:
        raise ModelError(
            f"{spec}: no weights; write {name}=FILE, {name}=TAG (one of open_clip.list_pretrained()), "
            f"or {name}={UNTRAINED} to see what random weights score."
        )
    return name, pretrained


def one_line(error: BaseException) -> str:
    """What an error says, on one line of bounded length."""
    text = " ".join(str(error).split()) or "no reason is given"
    return f"{type(error).__name__}: {text[:_LONGEST_REASON]}{' ...' if len(text) > _LONGEST_REASON else ''}"


# ---- code that comes with a model


def _configuration(name: str) -> Mapping[str, Any]:
    """What open_clip will build the model from; empty where none can be read, which open_clip reports next."""
    try:
        if name.startswith("local-dir:"):
            config = read_json(Path(name.removeprefix("local-dir:")) / "open_clip_config.json")
            found = config.get("model_cfg", config)
        else:
            found = open_clip.factory.get_model_config(name if name.startswith("hf-hub:") else name.replace("/", "-"))
    except Exception:
        return {}
    return found if isinstance(found, Mapping) else {}


def _refuse_code(spec: str, config: Mapping[str, Any]) -> None:
    """Refuse a configuration that switches remote code on, at any depth of it."""
    key = _switch_on(config, "model_cfg")
    if key:
        raise ModelError(
            f"{spec}: its configuration sets {key}, which would run Python code that comes with the model. Remove the "
            "key, or allow it yourself if you trust whoever made the model: load(..., trust_remote_code=True)."
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


def _tokenizer_options(config: Mapping[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    """The answer that transformers would otherwise ask of whoever sits at the terminal, or of standard input."""
    text_cfg = config.get("text_cfg")
    from_hub = not config or (isinstance(text_cfg, Mapping) and "hf_tokenizer_name" in text_cfg)
    return {"trust_remote_code": trust_remote_code} if from_hub else {}


@contextmanager
def _no_foreign_code(*, allowed: bool) -> Iterator[None]:
    """While a model is built: checkpoints are read as weights alone, and transformers cannot ask whether code may run.

    open_clip 3.3 falls back to a load without `weights_only` after a TypeError, which a crafted pickle can raise.
    """
    before = {name: os.environ.pop(name, None) for name in (_WEIGHTS_ONLY, _NOT_WEIGHTS_ONLY)}
    os.environ[_WEIGHTS_ONLY] = "1"
    seconds = None if _transformers is None else _transformers.TIME_OUT_REMOTE_CODE
    if seconds is not None and not allowed:
        _transformers.TIME_OUT_REMOTE_CODE = 0  # it would read the answer from standard input
    try:
        yield
    finally:
        if seconds is not None:
            _transformers.TIME_OUT_REMOTE_CODE = seconds
        del os.environ[_WEIGHTS_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


# ---- weights


def _require_weights(spec: str, path: str) -> None:
    """Refuse what is no checkpoint at all, by its first bytes.

    Raises:
        ModelError: it is no regular file, is empty, or is a page or pointer that was saved in the place of one.
    """
    try:
        size = require_regular(path).st_size
        with open(path, "rb") as file:
            start = file.read(64)
    except (OSError, ValueError) as error:
        raise ModelError(f"{spec}: {error}") from error
    if not size:
        raise ModelError(f"{spec}: {path} is empty; copy or download it again.")
    if start.lstrip()[:1] == b"<":
        raise ModelError(f"{spec}: {path} is a web page, not a checkpoint; download the file itself.")
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{spec}: {path} is a pointer of Git LFS, not the file itself; run `git lfs pull`.")


def _require_trained_head(spec: str, pretrained: str) -> None:
    """Refuse weights of a plain CLIP model: they start a training well, but leave MSCMAT random."""
    keys = load_state_dict(pretrained) if os.path.isfile(pretrained) else {}
    if not any(key.startswith(MSA_PREFIXES) for key in keys):
        raise ModelError(
            f"{spec}: these are weights of a plain CLIP model, MSA's own part would be random. "
            "Train it first (`--pretrained` of open_clip_train.main starts from them), or evaluate the plain model."
        )


def _require_finite(spec: str, model: nn.Module) -> None:
    """Refuse weights that hold NaN or infinity: every score of such a model would be NaN, or wrong without a word."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(
                f"{spec}: {name} holds values that are not finite; the training that wrote them diverged, or the file "
                "is damaged. Take an earlier checkpoint."
            )
