"""The only file that touches open_clip's names: configs, tags, model class, loss, hub, transforms, data, validation.

A model whose configuration has the key `msa_cfg` is ours; for every other model open_clip's own functions run.
`autoload` calls `extend` with each watched module right after it has executed, so this file imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

SUPPORTED_OPEN_CLIP = ">=3.3.0,<4"
CONFIG_DIR_VARIABLE = "MSA_OPENCLIP_CONFIGS"
"""Environment variable: a directory of model configuration files of the user's own (several, as in PATH)."""
LOADER_VARIABLE = "MSA_OPENCLIP_LOADER"
"""Environment variable: `msa` (default) reads shards by our loader for MSA models, `all` for every model."""

_EXTENDED = "_msa_openclip_extended"
_FACTORY_NAMES = (
    "CustomTextCLIP",
    "_MODEL_CONFIGS",
    "_MODEL_CONFIG_PATHS",
    "_rescan_model_configs",
    "create_loss",
    "create_model",
    "get_model_config",
    "parse_model_name",
)

_log = logging.getLogger(__name__)


def extend(module: ModuleType) -> None:
    """Extend one of the modules in `autoload.WATCHED`; calling it again does nothing."""
    if not hasattr(module, _EXTENDED):
        setattr(module, _EXTENDED, True)
        _EXTENSIONS[module.__name__](module)


def _extend_factory(factory: ModuleType) -> None:
    missing = [name for name in _FACTORY_NAMES if not hasattr(factory, name)]
    if missing:
        _refuse_msa_models(factory, missing)
        return
    _register_configs(factory)
    _replace(factory, "create_model", _msa_create_model(factory))
    _replace(factory, "create_loss", _msa_create_loss(factory))


def _replace(module: ModuleType, name: str, replacement: Callable[..., Any]) -> None:
    """Replace a function in its module and wherever it has been imported from there already."""
    original = getattr(module, name)
    setattr(module, name, replacement)
    for other_name, other in list(sys.modules.items()):
        if other_name.startswith("open_clip") and vars(other).get(name) is original:
            setattr(other, name, replacement)


# ---- configurations and pretrained tags


def _register_configs(factory: ModuleType) -> None:
    known = set(factory._MODEL_CONFIGS)
    files = [path for path in _config_files() if _is_usable(path, known)]
    factory._MODEL_CONFIG_PATHS.extend(files)
    factory._rescan_model_configs()
    pretrained = getattr(sys.modules.get("open_clip.pretrained"), "_PRETRAINED", None)
    for path in files:
        settings = factory._MODEL_CONFIGS[path.stem].get("msa_cfg")
        base = settings.get("base") if isinstance(settings, dict) else None
        if pretrained is not None and isinstance(base, str) and base in pretrained:
            pretrained.setdefault(path.stem, pretrained[base])  # a warm start accepts the tags of the same towers


def _config_files() -> Iterator[Path]:
    """The configuration files of this package, then the user's own."""
    package = sys.modules[__package__ or "msa_openclip"]
    yield from sorted(_shipped_configs(Path(inspect.getfile(package)).parent).glob("*.json"))
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


def _msa_cfg(model_name: str, cache_dir: str | None = None) -> Any:
    return (model_config(model_name, cache_dir) or {}).get("msa_cfg")


# ---- model and loss


def _msa_create_model(factory: ModuleType) -> Callable[..., Any]:
    original: FunctionType = factory.create_model

    @functools.wraps(original)
    def create_model(model_name: str, *args: Any, **kwargs: Any) -> Any:
        if _msa_cfg(model_name, kwargs.get("cache_dir")) is None and "msa_cfg" not in kwargs:
            return original(model_name, *args, **kwargs)
        from .model import MSACLIP

        if "CustomTextCLIP" not in original.__code__.co_names:
            raise RuntimeError(_unsupported(["a create_model that builds CustomTextCLIP"]))
        kwargs["force_custom_text"] = True
        return with_global(original, "CustomTextCLIP", MSACLIP)(model_name, *args, **kwargs)

    return create_model


def with_global(function: FunctionType, name: str, value: object) -> Callable[..., Any]:
    """`function` reading `value` as its global `name`; nobody else sees the change."""
    code, defaults, closure = function.__code__, function.__defaults__, function.__closure__
    copy = FunctionType(code, {**function.__globals__, name: value}, function.__name__, defaults, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _msa_create_loss(factory: ModuleType) -> Callable[..., Any]:
    original = factory.create_loss

    @functools.wraps(original)
    def create_loss(args: Any) -> Any:
        settings = _msa_cfg(getattr(args, "model", ""), getattr(args, "cache_dir", None))
        if settings is None:
            return original(args)
        from .config import MSACfg
        from .loss import MSALoss

        for flag in ("distill", "siglip", "horovod"):
            if getattr(args, flag, False):
                raise ValueError(f"{args.model} brings its own loss, which --{flag} would replace; leave out --{flag}.")
        return MSALoss(
            MSACfg.from_dict(settings),
            local_loss=args.local_loss,
            gather_with_grad=args.gather_with_grad,
            rank=args.rank,
            world_size=args.world_size,
            accum_freq=args.accum_freq,
        )

    return create_loss


def _refuse_msa_models(factory: ModuleType, missing: list[str]) -> None:
    """Register nothing; whoever asks for one of our models is told why there is none."""
    original = getattr(factory, "create_model", None)
    if original is None:
        raise RuntimeError(_unsupported(missing))

    @functools.wraps(original)
    def create_model(model_name: str, *args: Any, **kwargs: Any) -> Any:
        if model_name in {path.stem for path in _config_files()}:
            raise RuntimeError(_unsupported(missing))
        return original(model_name, *args, **kwargs)

    _replace(factory, "create_model", create_model)


def _unsupported(missing: list[str]) -> str:
    version = getattr(sys.modules.get("open_clip.version"), "__version__", "unknown")
    return (
        f"open_clip {version} lacks {', '.join(missing)}, which msa_openclip extends; "
        f"MSA models need open_clip_torch{SUPPORTED_OPEN_CLIP}."
    )


# ---- saving as a Hugging Face hub folder


def _extend_push_to_hf_hub(module: ModuleType) -> None:
    for name in ("save_for_hf", "push_to_hf_hub"):
        if hasattr(module, name):
            _replace(module, name, _keeping_tokenizer(getattr(module, name), module.HFTokenizer))


def _keeping_tokenizer(original: Callable[..., Any], hf_tokenizer: type) -> Callable[..., Any]:
    """`save_for_hf` or `push_to_hf_hub` for MSA models with open_clip's own BPE tokenizer.

    open_clip 3.3 saves no such tokenizer: `push_to_hf_hub` puts one from the hub in its place, `save_for_hf` fails. It
    needs no files: a configuration without `hf_tokenizer_name` makes `get_tokenizer` build it again.
    """

    class BPETokenizer(hf_tokenizer):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def save_pretrained(self, dest: Any) -> None:
            pass

    signature = inspect.signature(original)

    @functools.wraps(original)
    def save(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        model, tokenizer = call.arguments["model"], call.arguments.get("tokenizer")
        if hasattr(model, "msa_cfg"):
            call.arguments["model_config"] = _as_built(call.arguments["model_config"], model, tokenizer)
            if tokenizer is None or not hasattr(tokenizer, "save_pretrained"):
                call.arguments["tokenizer"] = BPETokenizer()
        return original(*call.args, **call.kwargs)

    return save


def _as_built(config: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
    """`config` with the geometry and activation that the model was built with (`--force-*` change them).

    `msa_cfg` is written out: a later version with other defaults must not read it as another model.
    """
    text_cfg, vision_cfg = dict(config["text_cfg"]), dict(config["vision_cfg"])
    # Towers of Hugging Face do not know how long the texts are.
    length = getattr(model.text if hasattr(model.text, "token_embedding") else tokenizer, "context_length", None)
    if length is not None:
        text_cfg["context_length"] = length
    size = model.visual.image_size
    vision_cfg["image_size"] = size[0] if isinstance(size, (tuple, list)) and len(set(size)) == 1 else size
    quick_gelu = any(type(module).__name__ == "QuickGELU" for module in model.modules())
    msa_cfg = dataclasses.asdict(model.msa_cfg)
    built = {"custom_text": True, "text_cfg": text_cfg, "vision_cfg": vision_cfg, "msa_cfg": msa_cfg}
    return {**config, **built, **({"quick_gelu": True} if quick_gelu else {})}


# ---- augmentation


def _extend_transform(transform: ModuleType) -> None:
    """Let every model's `aug_cfg` have the key `dihedral`, which open_clip would refuse as unknown."""
    original = getattr(transform, "image_transform", None)
    if original is None:
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def image_transform(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        aug_cfg = call.arguments.get("aug_cfg")
        if not isinstance(aug_cfg, Mapping) or "dihedral" not in aug_cfg:
            return original(*args, **kwargs)
        from torchvision.transforms import Compose  # type: ignore[import-untyped]

        from .augmentation import RandomDihedral, split_aug_cfg

        wanted, call.arguments["aug_cfg"] = split_aug_cfg(aug_cfg)
        made = original(*call.args, **call.kwargs)
        return Compose([RandomDihedral(), made]) if wanted and call.arguments["is_train"] else made

    _replace(transform, "image_transform", image_transform)


# ---- validation while training


def _extend_train(train: ModuleType) -> None:
    """Let open_clip's `evaluate` report retrieval metrics for MSA models; open_clip_train.main imports it from here."""
    original: FunctionType = train.evaluate

    @functools.wraps(original)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        from .train_evaluation import evaluate_with_retrieval

        return evaluate_with_retrieval(original, *args, **kwargs)

    _replace(train, "evaluate", evaluate)


# ---- training data


def _extend_train_data(data: ModuleType) -> None:
    """Let MSA models read shards by our loader; `get_dataset_fn` looks open_clip's own up under this name.

    With LOADER_VARIABLE=all other models read by it too, so that two models can be compared on the same batches.
    """
    original = data.get_wds_dataset

    @functools.wraps(original)
    def get_wds_dataset(args: Any, *positional: Any, **named: Any) -> Any:
        wanted = os.environ.get(LOADER_VARIABLE, "msa")
        if wanted not in ("msa", "all"):
            raise ValueError(f"{LOADER_VARIABLE}: {wanted!r} is unknown; choose msa or all.")
        if wanted == "msa" and _msa_cfg(getattr(args, "model", ""), getattr(args, "cache_dir", None)) is None:
            return original(args, *positional, **named)
        from . import data as shard_data

        return shard_data.get_wds_dataset(args, *positional, **named)

    _replace(data, "get_wds_dataset", get_wds_dataset)


_EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {
    "open_clip.factory": _extend_factory,
    "open_clip.push_to_hf_hub": _extend_push_to_hf_hub,
    "open_clip.transform": _extend_transform,
    "open_clip_train.data": _extend_train_data,
    "open_clip_train.train": _extend_train,
}
