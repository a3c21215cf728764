"""Which model built an index: a fingerprint of its weights, compared before the index is asked."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ..evaluation.loading import LoadedModel
from ..evaluation.scorer import Scorer
from .files import ImageIndexError, Manifest


def fingerprint(scorer: Scorer) -> str:
    """SHA-256 over all weights by name, so that an index is asked by the model that built it."""
    digest = hashlib.sha256()
    for name, value in sorted(scorer.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_model(root: Path, manifest: Manifest, model: LoadedModel) -> None:
    """Raise ImageIndexError unless the index was built with this model."""
    if manifest.fingerprint != fingerprint(model.scorer):
        raise ImageIndexError(
            f"{root}: built with other weights ({manifest.model}) than {model.spec}; scores of two models do not "
            "compare. Load that model, or build a new index."
        )
