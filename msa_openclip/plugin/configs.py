"""Registers our model configurations and the user's with open_clip, and finds a model's `msa_cfg` by its name."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..data.small_files import LARGEST_CONFIG, FileProblem, read_json

CONFIG_DIR_VARIABLE = "MSA_OPENCLIP_CONFIGS"
"""Environment variable: a directory of model configuration files of the user's own (several, as in PATH)."""

_log = logging.getLogger(__name__)


def register_configs(factory: ModuleType) -> None:
    """Make open_clip know the models of all usable files, and the pretrained tags of their bases.

    open_clip gets their content, not their paths: it would open them in the locale's encoding, whatever they are.
    """
    for path in config_files():
        config = _usable(path, factory._MODEL_CONFIGS)
        if config is None:
            continue
        factory._MODEL_CONFIGS[path.stem] = config
        settings = config.get("msa_cfg")
        base = settings.get("base") if isinstance(settings, dict) else None
        pretrained = getattr(sys.modules.get("open_clip.pretrained"), "_PRETRAINED", None)
        if pretrained is not None and isinstance(base, str) and base in pretrained:
            pretrained.setdefault(path.stem, pretrained[base])  # a warm start accepts the tags of the same towers
    factory._rescan_model_configs()  # puts the names in open_clip's order


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


def _usable(path: Path, known: Collection[str]) -> dict[str, Any] | None:
    """The configuration in a file, if open_clip can use it; else the log says why not."""
    try:
        config = read_json(path, LARGEST_CONFIG)
        if not isinstance(config, dict):
            raise FileProblem(f"{path}: it holds no object.")
        absent = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
        if absent:
            raise FileProblem(f"{path}: it lacks the key {absent[0]!r}.")
        if path.stem in known:
            raise FileProblem(f"{path}: the name {path.stem} is taken; rename the file.")
    except (OSError, FileProblem) as error:
        _log.warning("%s is not registered as a model: %s", path, str(error).removeprefix(f"{path}: "))
        return None
    return config


def model_config(model_name: str, cache_dir: str | None = None) -> dict[str, Any] | None:
    """The configuration of an open_clip model by name, `local-dir:` or `hf-hub:`; None where none can be read."""
    factory: Any = importlib.import_module("open_clip.factory")  # open_clip_train.data comes without it
    schema, identifier = factory.parse_model_name(model_name)
    try:
        if schema == "hf-hub" and cache_dir is not None:
            config = factory._get_hf_config(identifier, cache_dir=cache_dir)
            found = config.get("model_cfg", config)
        elif schema == "local-dir":  # open_clip would wait for ever for a pipe of this name
            config = read_json(Path(identifier) / "open_clip_config.json", LARGEST_CONFIG)
            found = config.get("model_cfg", config)
        else:
            found = factory.get_model_config(model_name if schema else model_name.replace("/", "-"))
    except Exception:
        return None  # open_clip's own code meets the same failure next and reports it
    return found if isinstance(found, dict) else None


def msa_settings(model_name: str, cache_dir: str | None = None) -> Any:
    return (model_config(model_name, cache_dir) or {}).get("msa_cfg")
