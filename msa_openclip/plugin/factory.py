"""`create_model` of open_clip and what makes its loss, extended for models whose configuration has `msa_cfg`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from .configs import config_files, model_config, register_configs
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
    if hasattr(factory, "get_tokenizer"):
        replace(factory, "get_tokenizer", _msa_get_tokenizer(factory.get_tokenizer))
    installed().extend_loss(factory)


def _msa_create_model(factory: ModuleType) -> Callable[..., Any]:
    original: FunctionType = factory.create_model

    @functools.wraps(original)
    def create_model(model_name: str, *args: Any, **kwargs: Any) -> Any:
        config = model_config(model_name, kwargs.get("cache_dir")) or {}
        if config.get("msa_cfg") is None and "msa_cfg" not in kwargs:
            return original(model_name, *args, **kwargs)
        from ..data.foreign_code import is_trusted, no_foreign_code, refuse_code
        from ..model.msaclip import MSACLIP

        trusted = is_trusted()
        if not trusted:
            refuse_code(model_name, config)
        kwargs["force_custom_text"] = True
        with no_foreign_code(allowed=trusted, pickles=not kwargs.get("weights_only", True)):
            model = with_global(original, "CustomTextCLIP", MSACLIP)(model_name, *args, **kwargs)
        model.convert_with_linear()
        return model

    return create_model


def _msa_get_tokenizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """`get_tokenizer` that runs no code of an MSA model's folder or repository, unless the user says so."""

    @functools.wraps(original)
    def get_tokenizer(model_name: str = "", *args: Any, **kwargs: Any) -> Any:
        config = model_config(model_name, kwargs.get("cache_dir")) if model_name else None
        if not config or config.get("msa_cfg") is None:
            return original(model_name, *args, **kwargs)
        from ..data.foreign_code import is_trusted, no_foreign_code, refuse_code, tokenizer_options

        trusted = bool(kwargs.get("trust_remote_code", is_trusted()))
        if not trusted:
            refuse_code(model_name, config)
        with no_foreign_code(allowed=trusted):
            return original(model_name, *args, **{**tokenizer_options(config, trust=trusted), **kwargs})

    return get_tokenizer


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
