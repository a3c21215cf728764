"""`create_model` of open_clip and what makes its loss, extended for models whose configuration has `msa_cfg`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from .configs import config_files, msa_settings, register_configs
from .host import unsupported
from .installed import installed, lacks
from .patching import replace, with_global


def extend_factory(factory: ModuleType) -> None:
    missing = lacks(factory)
    if missing:
        _refuse_msa_models(factory, missing)
        return
    register_configs(factory)
    replace(factory, "create_model", _msa_create_model(factory))
    installed().extend_loss(factory)


def _msa_create_model(factory: ModuleType) -> Callable[..., Any]:
    original: FunctionType = factory.create_model

    @functools.wraps(original)
    def create_model(model_name: str, *args: Any, **kwargs: Any) -> Any:
        if msa_settings(model_name, kwargs.get("cache_dir")) is None and "msa_cfg" not in kwargs:
            return original(model_name, *args, **kwargs)
        from ..model.msaclip import MSACLIP

        kwargs["force_custom_text"] = True
        model = with_global(original, "CustomTextCLIP", MSACLIP)(model_name, *args, **kwargs)
        model.convert_with_linear()
        return model

    return create_model


def _refuse_msa_models(factory: ModuleType, missing: list[str]) -> None:
    """Register nothing; whoever asks for one of our models is told why there is none."""
    original = getattr(factory, "create_model", None)
    if original is None:
        raise RuntimeError(unsupported(missing))

    @functools.wraps(original)
    def create_model(model_name: str, *args: Any, **kwargs: Any) -> Any:
        if model_name in {path.stem for path in config_files()}:
            raise RuntimeError(unsupported(missing))
        return original(model_name, *args, **kwargs)

    replace(factory, "create_model", create_model)
