"""Which model built an index: its weights, and everything else that decides what its vectors are.

Two models of equal weights still differ when one normalises its images by another mean, or was built with QuickGELU,
more attention heads or another precision.  All of it is compared before an index is asked or added to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..evaluation.loading import LoadedModel
from ..evaluation.scorer import Scorer
from ..model.architecture import architecture, token_mark
from ..model.weights import digest
from .files import ImageIndexError, Manifest

_SHAPES_NO_WEIGHT = ("num_heads", "n_head", "eps", "approximate", "stride", "padding", "patch_size", "window_size")
"""Attributes of modules that change what they compute, but no weight."""
_DEFAULT = "the default"  # what a configuration leaves out


def fingerprint(scorer: Scorer) -> str:
    """SHA-256 over all weights by name, so that an index answers only the model that built it."""
    return digest(scorer.model.state_dict())


def settings(model: LoadedModel) -> dict[str, Any]:
    """What the weights do not hold, as plain data: precision, preprocessing, architecture, configuration, tokenizer."""
    inner = model.scorer.model
    msa_cfg = dataclasses.asdict(inner.msa_cfg) if hasattr(inner, "msa_cfg") else {}
    found = {
        "precision": model.precision,
        "preprocessing": getattr(getattr(inner, "visual", None), "preprocess_cfg", None),
        "architecture": _module_kinds(inner),
        "config": architecture(inner, model.config),
        "msa_cfg": {name: value for name, value in msa_cfg.items() if name not in ("base", "loss")},
        "tokenizer": [type(model.tokenizer).__name__, getattr(model.tokenizer, "context_length", None)],
        "tokens": token_mark(model.tokenizer),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _module_kinds(model: nn.Module) -> str:
    """A hash of the kinds of all modules (QuickGELU is one), with what they compute by beside their weights."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        values = [getattr(module, attribute, None) for attribute in _SHAPES_NO_WEIGHT]
        plain = [value if isinstance(value, (int, float, str, tuple)) else None for value in values]
        digest.update(f"{name} {type(module).__name__} {plain}\n".encode())
    return digest.hexdigest()[:16]


def check_model(root: Path | str, manifest: Manifest, model: LoadedModel, *, appending: bool = False) -> None:
    """Raise ImageIndexError unless the index was built with this model.

    Vectors of two precisions are near enough to ask one with the other, but one index holds those of one alone.
    """
    theirs, mine = manifest.settings, settings(model)
    if manifest.fingerprint != fingerprint(model.scorer):
        built_in = theirs.get("precision", model.precision)
        if _rounds(built_in) != _rounds(model.precision):
            raise ImageIndexError(
                f"{root}: built in precision {built_in}, and {model.spec} is loaded in {model.precision}, which rounds "
                f"weights in another way. Load it with --precision {built_in}, or build a new index."
            )
        raise ImageIndexError(
            f"{root}: built with other weights ({manifest.model}) than {model.spec}; scores of two models do not "
            "compare. Load that model, or build a new index."
        )
    names = [name for name in theirs if appending or name != "precision"]
    different = [name for name in names if theirs[name] != mine.get(name)]
    if different:
        what = _first_difference(theirs, mine, different[0])
        raise ImageIndexError(
            f"{root}: built with the weights of {model.spec}, but another {what}. "
            "Load the model as it was loaded then, or build a new index."
        )
    unknown = [name for name in mine if name not in theirs]
    if appending and unknown:
        raise ImageIndexError(
            f"{root}: built by a version that did not note the {unknown[0]} of its model, so nothing is added to it. "
            "It can be asked; to add images, build a new index."
        )


def _rounds(precision: str) -> str:
    """What a precision of open_clip does to the weights; those of autocast keep them."""
    return precision if precision in ("bf16", "fp16", "pure_bf16", "pure_fp16") else "fp32"


def _first_difference(theirs: Mapping[str, Any], mine: Mapping[str, Any], name: str) -> str:
    """`preprocessing mean ([0.5, ...], now [0.48, ...])`: the innermost name that differs, with both values."""
    one, other = theirs.get(name, _DEFAULT), mine.get(name, _DEFAULT)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        inner = sorted(key for key in {*one, *other} if one.get(key, _DEFAULT) != other.get(key, _DEFAULT))[0]
        return f"{name} {_first_difference(one, other, inner)}"
    return f"{name} ({one}, now {other})"
