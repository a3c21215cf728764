"""Activates the plugin in every process that imports torch: standard library only, and it never raises.

torch calls `activate` at the end of `import torch` (entry point of the group `torch.backends`, torch 2.5 and later;
TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns it off). It waits for the modules of open_clip that the plugin extends and hands
each to `registration` right after it has executed, before anybody can import names from it.
"""

from __future__ import annotations

import importlib.machinery
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

WATCHED = (
    "open_clip.factory",
    "open_clip.push_to_hf_hub",
    "open_clip.transform",
    "open_clip_train.data",
    "open_clip_train.legacy_train",
    "open_clip_train.params",
    "open_clip_train.train",
)
"""Modules that `registration` extends."""


class _ImportHook(MetaPathFinder):
    """Lets the other finders find a watched module, and extends it as soon as it has executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in WATCHED:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: importlib.machinery.ModuleSpec | None = find(fullname, path, target) if find is not None else None
            if spec is not None:
                _extend_after_execution(spec)
                return spec
        return None


def _extend_after_execution(spec: importlib.machinery.ModuleSpec) -> None:
    loader = spec.loader
    if loader is None:
        return
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        extend(module)

    # On the instance: the loader keeps its type, so that inspect and importlib.resources work as ever.
    loader.exec_module = exec_module  # type: ignore[method-assign]


def extend(module: ModuleType) -> None:
    """Extend a watched module; a failure is logged, open_clip itself goes on working."""
    try:
        from .plugin import registration

        registration.extend(module)
    except Exception:
        logging.getLogger(__name__).exception("msa_openclip could not extend %s; MSA models are off.", module.__name__)


def activate() -> None:
    """Install the import hook, and extend what has been imported already. Calling it again does nothing."""
    if not any(isinstance(finder, _ImportHook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportHook())
    for name in WATCHED:
        module = sys.modules.get(name)
        # A module in the middle of its own import is extended by the hook, not here.
        if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
            extend(module)
