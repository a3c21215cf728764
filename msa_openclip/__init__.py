"""Multi-scale alignment (MSA) for remote sensing image-text retrieval, as a plugin for open_clip.

Installed, it is active wherever torch is imported. `import msa_openclip` activates it where torch's entry points are
off (TORCH_DEVICE_BACKEND_AUTOLOAD=0). Public names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .autoload import activate

if TYPE_CHECKING:
    from .config import MSACfg
    from .model.msaclip import MSACLIP
    from .pair_scores.formula import ImageSide, TextSide, match_logits
    from .training.loss import MSALoss

__version__ = "0.1.0"

_PUBLIC = {
    "MSACfg": "config",
    "MSACLIP": "model.msaclip",
    "MSALoss": "training.loss",
    "ImageSide": "pair_scores.formula",
    "TextSide": "pair_scores.formula",
    "match_logits": "pair_scores.formula",
}

__all__ = ["MSACLIP", "ImageSide", "MSACfg", "MSALoss", "TextSide", "activate", "match_logits"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


activate()
