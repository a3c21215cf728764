"""What decides a model's outputs beside its weights: its configuration, and the tokens of its tokenizer.

Equal weights under another configuration are another model: other pooling, another order of norms, another activation.
What is made of a model and kept (indexes, caches of features) notes these, and is compared with the model by them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

# Of the configuration: where weights come from, what acts in training alone, and what is told elsewhere (the size of
# images by the preprocessing, the length of texts and the tokenizer by its tokens, projections by their weights).
_NO_MATTER = {
    "vision_cfg": ("image_size", "patch_dropout", "output_tokens", "timm_model_pretrained", "timm_drop",
                   "timm_drop_path", "timm_proj", "timm_proj_bias"),
    "text_cfg": ("context_length", "output_tokens", "hf_model_pretrained", "hf_model_name", "hf_proj_type",
                 "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"),
}  # fmt: skip
_NO_MATTER_TO_TRANSFORMERS = ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")

_SENTENCES = ("Two planes, near a RUNWAY.", "café &amp; a sea-side_road  № 7", "a", "")
"""What tokenizers differ in: case, punctuation, accents, entities, spaces, how texts begin, end and are filled up."""


def architecture(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says beyond open_clip's defaults, without what changes no output; as plain data.

    Args:
        model: built from it.
        config: as `open_clip.get_model_config` gives it, or with the dataclasses that towers are built from.
    """
    found: dict[str, Any] = {"quick_gelu": any(type(module).__name__ == "QuickGELU" for module in model.modules())}
    for part, defaults in (("vision_cfg", CLIPVisionCfg()), ("text_cfg", CLIPTextCfg())):
        usual = {**dataclasses.asdict(defaults), **dict.fromkeys(_NO_MATTER[part])}
        given = config.get(part) or {}
        given = dataclasses.asdict(given) if dataclasses.is_dataclass(given) else given  # type: ignore[arg-type]
        found[part] = {
            name: value
            for name, value in given.items()
            if name not in _NO_MATTER[part] and _plain(value) != _plain(usual.get(name))
        }
    hugging_face: Any = getattr(getattr(model, "text", None), "config", None)
    if hasattr(hugging_face, "to_diff_dict"):
        found["text_model"] = {
            name: value
            for name, value in hugging_face.to_diff_dict().items()
            if not name.startswith("_") and name not in _NO_MATTER_TO_TRANSFORMERS
        }
    return dict(_plain(found))


def token_mark(tokenizer: Callable[[list[str]], Tensor]) -> str:
    """A hash of the token ids of some sentences: tokenizers of one class differ by vocabulary and options."""
    return hashlib.sha256(json.dumps(tokenizer(list(_SENTENCES)).tolist()).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """As it comes back from a file of JSON."""
    return json.loads(json.dumps(value, default=str))
