"""Registers our model configurations and the user's with open_clip, and finds a model's `msa_cfg` by its name."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

CONFIG_DIR_VARIABLE = "MSA_OPENCLIP_CONFIGS"
"""Environment variable: a directory of model configuration files of the user's own (several, as in PATH)."""

_log = logging.getLogger(__name__)


def register_configs(factory: ModuleType) -> None:
    known = set(factory._MODEL_CONFIGS)
    files = [path for path in config_files() if _is_usable(path, known)]
    factory._MODEL_CONFIG_PATHS.extend(files)
    factory._rescan_model_configs()
    pretrained = getattr(sys.modules.get("open_clip.pretrained"), "_PRETRAINED", None)
    for path in files:
        settings = factory._MODEL_CONFIGS[path.stem].get("msa_cfg")
        base = settings.get("base") if isinstance(settings, dict) else None
        if pretrained is not None and isinstance(base, str) and base in pretrained:
            pretrained.setdefault(path.stem, pretrained[base])  # a warm start accepts the tags of the same towers


def config_files() -> Iterator[Path]:
    """The configuration files of this package, then the user's own."""
    yield from sorted(_shipped_configs(Path(__file__).parents[1]).glob("*.json"))
    for directory in os.environ.get(CONFIG_DIR_VARIABLE, "").split(os.pathsep):
        if not directory:
            continue
        if not Path(directory).is_dir():
            _log.warning("%s: %s is not a directory; no model is registered from it.", CONFIG_DIR_VARIABLE, directory)
        yield from sorted(Path(directory).glob("*.json"))


def _shipped_configs(package: Path) -> Path:
    """Inside the installed package, or beside it in a development checkout."""
    installed = package / "model_configs"
    return installed if installed.is_dir() else package.parent / "model_configs"


def _is_usable(path: Path, known: set[str]) -> bool:
    """Whether open_clip can register the file; says why not, where open_clip would fail or pass it over in silence."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _log.warning("%s is not registered as a model: %s", path, error)
        return False
    if not isinstance(config, dict):
        _log.warning("%s is not registered as a model: it holds no object.", path)
        return False
    absent = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if absent:
        _log.warning("%s is not registered as a model: it lacks the key %r.", path, absent[0])
        return False
    if path.stem in known:
        _log.warning("%s is not registered as a model: the name %s is taken; rename the file.", path, path.stem)
        return False
    known.add(path.stem)
    return True


def model_config(model_name: str, cache_dir: str | None = None) -> dict[str, Any] | None:
    """The configuration of an open_clip model by name, `local-dir:` or `hf-hub:`; None where none can be read."""
    factory: Any = importlib.import_module("open_clip.factory")  # open_clip_train.data comes without it
    schema, identifier = factory.parse_model_name(model_name)
    try:
        if schema == "hf-hub" and cache_dir is not None:
            config = factory._get_hf_config(identifier, cache_dir=cache_dir)
            found = config.get("model_cfg", config)
        else:
            found = factory.get_model_config(model_name if schema else model_name.replace("/", "-"))
    except Exception:
        return None  # open_clip's own code meets the same failure next and reports it
    return found if isinstance(found, dict) else None


def msa_settings(model_name: str, cache_dir: str | None = None) -> Any:
    return (model_config(model_name, cache_dir) or {}).get("msa_cfg")
