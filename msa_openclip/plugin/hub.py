"""Saving MSA models as Hugging Face hub folders: the tokenizer, and the configuration as the model was built."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .patching import replace


def extend_push_to_hf_hub(module: ModuleType) -> None:
    for name in ("save_for_hf", "push_to_hf_hub"):
        if hasattr(module, name):
            replace(module, name, _keeping_tokenizer(getattr(module, name), module.HFTokenizer))


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
