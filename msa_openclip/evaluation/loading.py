"""Models by one string, `NAME=CHECKPOINT`, with transform and tokenizer, ready to score; never with random weights."""

from __future__ import annotations

import os
from dataclasses import dataclass

import open_clip
from open_clip.factory import load_state_dict

from ..data.pixels import Preprocess
from ..model.msaclip import MSA_PREFIXES, MSACLIP
from .run_parameters import model_options
from .scorer import Scorer, Tokenizer

UNTRAINED = "untrained"
"""Given as the checkpoint, asks for random weights, to see what chance looks like."""


class ModelError(ValueError):
    """A model cannot be loaded as asked; the message names the remedy."""


@dataclass(frozen=True)
class LoadedModel:
    """A model and all it needs to be asked."""

    spec: str
    scorer: Scorer
    preprocess: Preprocess
    tokenizer: Tokenizer


def load(spec: str, device: str = "cpu", precision: str = "fp32") -> LoadedModel:
    """Load an open_clip model; a checkpoint in its run's folder as the run built it (`--force-*`, `--image-*`).

    Args:
        spec: `NAME=FILE`, `NAME=TAG` (a pretrained tag of open_clip), `hf-hub:ORG/REPO` or `local-dir:FOLDER`.
        device: where to.
        precision: as for open_clip_train.
    Raises:
        ModelError: the model or its weights do not exist, or an MSA model would be left with a random MSCMAT.
    """
    name, pretrained = split_spec(spec)
    as_trained = model_options(pretrained, name) if pretrained else {}
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name,
            pretrained=None if pretrained == UNTRAINED else pretrained,
            load_weights=pretrained != UNTRAINED,
            precision=precision,
            device=device,
            **as_trained,
        )
        tokenizer = open_clip.get_tokenizer(name, context_length=as_trained.get("force_context_length"))
    except (RuntimeError, OSError, KeyError) as error:
        raise ModelError(f"{spec}: cannot be loaded: {error}") from error
    if isinstance(model, MSACLIP) and pretrained not in (None, UNTRAINED):
        _require_trained_head(spec, str(pretrained))
    return LoadedModel(spec, Scorer(model.eval(), precision), preprocess, tokenizer)


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


def _require_trained_head(spec: str, pretrained: str) -> None:
    """Refuse weights of a plain CLIP model: they start a training well, but leave MSCMAT random."""
    keys = load_state_dict(pretrained) if os.path.isfile(pretrained) else {}
    if not any(key.startswith(MSA_PREFIXES) for key in keys):
        raise ModelError(
            f"{spec}: these are weights of a plain CLIP model, MSA's own part would be random. "
            "Train it first (`--pretrained` of open_clip_train.main starts from them), or evaluate the plain model."
        )
