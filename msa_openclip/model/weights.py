"""Fingerprints of weights: which model made what lies on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def digest(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """SHA-256 over weights by name, those of floating point in `dtype` where it is given.

    Of a model that is sharded over ranks each weight is gathered in turn, so that every rank has to call this.

    Example:
        >>> digest(model.state_dict()) == digest(same_model.state_dict())
        True
    """
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        value = _whole(value).detach().cpu().clone()  # what numpy has seen of a parameter could not be freed (FSDP2)
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        found.update(name.encode())
        found.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def current_weights(module: nn.Module) -> dict[str, Tensor]:
    """What `state_dict` holds, under the names of a module that was not compiled, and in the middle of a step too.

    `state_dict` of a sharded model (FSDP2) takes the gathered weights away from the forward pass that is running.
    """
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for prefix, child in module.named_modules(remove_duplicate=False):
        for name, buffer in child.named_buffers(recurse=False, remove_duplicate=False):
            if name not in child._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return {name.replace("_orig_mod.", ""): value for name, value in found.items()}


def _whole(weight: Any) -> Tensor:
    """A weight, gathered if it is one of a sharded model (DTensor)."""
    if hasattr(weight, "full_tensor"):
        weight = weight.to(weight.device_mesh.device_type).full_tensor()  # --fsdp-offload-cpu
    whole: Tensor = weight
    return whole
