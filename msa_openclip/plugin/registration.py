"""Extends the modules of open_clip that `autoload` watches, each right after it has executed.

A model whose configuration has the key `msa_cfg` is ours; for every other model open_clip's own functions run. Nothing
heavy is imported here: `import open_clip` must not become slower.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from .factory import extend_factory
from .hub import extend_push_to_hf_hub
from .trainer import extend_legacy_train, extend_params, extend_train, extend_train_data
from .transforms import extend_transform

_EXTENDED = "_msa_openclip_extended"
_EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {
    "open_clip.factory": extend_factory,
    "open_clip.push_to_hf_hub": extend_push_to_hf_hub,
    "open_clip.transform": extend_transform,
    "open_clip_train.data": extend_train_data,
    "open_clip_train.legacy_train": extend_legacy_train,
    "open_clip_train.params": extend_params,
    "open_clip_train.train": extend_train,
}


def extend(module: ModuleType) -> None:
    """Extend one of the modules in `autoload.WATCHED`; calling it again does nothing."""
    if not hasattr(module, _EXTENDED):
        setattr(module, _EXTENDED, True)
        _EXTENSIONS[module.__name__](module)
