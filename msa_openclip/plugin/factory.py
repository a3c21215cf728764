"""`create_model` and `create_loss` of open_clip, extended for models whose configuration has `msa_cfg`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from .configs import config_files, msa_settings, register_configs
from .patching import replace, with_global

SUPPORTED_OPEN_CLIP = ">=3.3.0,<4"
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


def extend_factory(factory: ModuleType) -> None:
    missing = [name for name in _FACTORY_NAMES if not hasattr(factory, name)]
    if missing:
        _refuse_msa_models(factory, missing)
        return
    register_configs(factory)
    replace(factory, "create_model", _msa_create_model(factory))
    replace(factory, "create_loss", _msa_create_loss(factory))


def _msa_create_model(factory: ModuleType) -> Callable[..., Any]:
    original: FunctionType = factory.create_model

    @functools.wraps(original)
    def create_model(model_name: str, *args: Any, **kwargs: Any) -> Any:
        if msa_settings(model_name, kwargs.get("cache_dir")) is None and "msa_cfg" not in kwargs:
            return original(model_name, *args, **kwargs)
        from ..model.msaclip import MSACLIP

        if "CustomTextCLIP" not in original.__code__.co_names:
            raise RuntimeError(_unsupported(["a create_model that builds CustomTextCLIP"]))
        kwargs["force_custom_text"] = True
        return with_global(original, "CustomTextCLIP", MSACLIP)(model_name, *args, **kwargs)

    return create_model


def _msa_create_loss(factory: ModuleType) -> Callable[..., Any]:
    original = factory.create_loss

    @functools.wraps(original)
    def create_loss(args: Any) -> Any:
        settings = msa_settings(getattr(args, "model", ""), getattr(args, "cache_dir", None))
        if settings is None:
            return original(args)
        from ..config import MSACfg
        from ..training.loss import MSALoss

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
        if model_name in {path.stem for path in config_files()}:
            raise RuntimeError(_unsupported(missing))
        return original(model_name, *args, **kwargs)

    replace(factory, "create_model", create_model)


def _unsupported(missing: list[str]) -> str:
    version = getattr(sys.modules.get("open_clip.version"), "__version__", "unknown")
    return (
        f"open_clip {version} lacks {', '.join(missing)}, which msa_openclip extends; "
        f"MSA models need open_clip_torch{SUPPORTED_OPEN_CLIP}."
    )
