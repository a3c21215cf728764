"""Models by one string, `NAME=CHECKPOINT`, with transform and tokenizer, ready to score; never with random weights.

This is the one place of the package that loads weights.  Whatever files it is pointed to, none of their code runs:
pickles are read as weights alone, and a configuration cannot allow a tokenizer or text tower to bring code of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import open_clip
import torch
from open_clip.factory import load_state_dict
from torch import nn

from ..data.checkpoint_files import is_whole
from ..data.foreign_code import ForeignCodeError, no_foreign_code, refuse_code
from ..data.pixels import Preprocess
from ..data.small_files import FileProblem, require_regular
from ..data.tokenizers import configuration, load_tokenizer
from ..model.msaclip import DATE_PREFIXES, MSA_PREFIXES, MSACLIP
from .run_parameters import model_options
from .scorer import Scorer, Tokenizer

UNTRAINED = "untrained"
"""Given as the checkpoint, asks for random weights, to see what chance looks like."""
PRECISIONS = ("fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16")
"""As open_clip_train.main has them; open_clip itself takes any other word for fp32."""
_ZIP = b"PK\x03\x04"  # how torch's files begin
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
    try:
        config = configuration(name)
        if not trust_remote_code:
            refuse_code(spec, config)
    except FileProblem as error:
        raise ModelError(f"{name}: {error}") from error
    except ForeignCodeError as error:
        raise ModelError(str(error)) from error
    if pretrained is not None and pretrained != UNTRAINED and os.path.exists(pretrained):
        _require_weights(spec, pretrained)
    as_trained = {**(model_options(pretrained, name) if pretrained else {}), **(options or {})}
    try:
        with no_foreign_code(allowed=trust_remote_code):
            model, _, preprocess = open_clip.create_model_and_transforms(
                name,
                pretrained=None if pretrained == UNTRAINED else pretrained,
                load_weights=pretrained != UNTRAINED,
                require_pretrained=pretrained != UNTRAINED and not towers_only,
                precision=precision,
                device=device,
                **as_trained,
            )
            length = as_trained.get("force_context_length")
            tokenizer = load_tokenizer(name, length, trust_remote_code=trust_remote_code, config=config)
            if isinstance(model, MSACLIP) and pretrained not in (None, UNTRAINED) and not towers_only:
                _require_trained_head(spec, str(pretrained), model)
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


# ---- weights


def _require_weights(spec: str, path: str) -> None:
    """Refuse what is no checkpoint at all, by its first bytes.

    Raises:
        ModelError: it is no regular file, is empty or cut short, or a page or pointer was saved in the place of one.
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
    if start.startswith(_ZIP) and not is_whole(path):
        raise ModelError(
            f"{spec}: cannot be loaded: {path} is cut short, or no checkpoint of torch. Copy it again, or take the "
            "checkpoint before it."
        )


def _require_trained_head(spec: str, pretrained: str, model: MSACLIP) -> None:
    """Refuse weights of a plain CLIP model, or of one date: they start a training well, but leave a part random."""
    keys = load_state_dict(pretrained) if os.path.isfile(pretrained) else {}
    if _lacks(keys, model, MSA_PREFIXES):
        raise ModelError(
            f"{spec}: these are weights of a plain CLIP model, MSA's own part would be random. "
            "Train it first (`--pretrained` of open_clip_train.main starts from them), or evaluate the plain model."
        )
    if _lacks(keys, model, DATE_PREFIXES):
        raise ModelError(
            f"{spec}: these are weights of a model of one date, the fusion of {model.msa_cfg.dates} dates would be "
            "random. Train it first; `--pretrained` of open_clip_train.main starts from them."
        )


def _lacks(keys: Iterable[str], model: nn.Module, prefixes: tuple[str, ...]) -> bool:
    """Whether the model has such parameters, and the checkpoint none of them."""
    return any(key.startswith(prefixes) for key in model.state_dict()) and not any(
        key.startswith(prefixes) for key in keys
    )


def _require_finite(spec: str, model: nn.Module) -> None:
    """Refuse weights that hold NaN or infinity: every score of such a model would be NaN, or wrong without a word."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(
                f"{spec}: {name} holds values that are not finite; the training that wrote them diverged, or the file "
                "is damaged. Take an earlier checkpoint."
            )
