"""Fingerprints of weights: which model made what lies on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """SHA-256 over weights by name, those of floating point in `dtype` where it is given.

    Example:
        >>> digest(model.state_dict()) == digest(same_model.state_dict())
        True
    """
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        value = value.detach().cpu()
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        found.update(name.encode())
        found.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
