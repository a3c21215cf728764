"""What `--lock-image --lock-text` freezes of an MSA model: its outputs, in batches that `MSACLIP.forward` takes.

open_clip locks CLIP's own towers as a whole; of timm's and Hugging Face's, 3.x locks the trunk alone and lets the
projection behind it learn, which 4.x locks too.  What is cached is the output of what both lock, and the model applies
the rest: the same features serve either line.
Shapes: B samples, C_s channels of scale s, P width of a locked part's output, L token ids, N attended tokens.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import architecture
from .towers import LearnedPool
from .weights import current_weights, digest

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FeatureError(ValueError):
    """Cached features do not fit the model, or cannot be made of it; the message names the remedy."""


@dataclass(frozen=True)
class Source:
    """Where cached features lie and which locked towers made them."""

    folder: str
    towers: str
    """JSON of `describe_towers`."""


@dataclass(frozen=True)
class CachedImages:
    """A batch of images as the locked image tower puts them out; moves like a tensor.

    Example:
        >>> model.train()(CachedImages(feature, pooled, source), CachedTexts(ids, feature, tokens, mask))
    """

    feature: Tensor
    """(B, P) before the tower's projection, if that learns."""
    pooled: tuple[Tensor, ...]
    """S pooled vectors z_s (B, C_s)."""
    source: Source

    def __len__(self) -> int:
        return len(self.feature)

    def to(self, *args: Any, **kwargs: Any) -> CachedImages:
        """As `Tensor.to`."""
        pooled = tuple(z.to(*args, **kwargs) for z in self.pooled)
        return replace(self, feature=self.feature.to(*args, **kwargs), pooled=pooled)


@dataclass(frozen=True)
class CachedTexts:
    """A batch of captions as the locked text tower puts them out; moves like a tensor."""

    ids: Tensor
    """(B, L) token ids."""
    feature: Tensor
    """(B, P) before the tower's projection, if that learns."""
    tokens: Tensor
    """(B, N, C) those last hidden states that MSCMAT attends to, then zeros."""
    mask: Tensor
    """(B, N) which are no zeros."""

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, *args: Any, **kwargs: Any) -> CachedTexts:
        """As `Tensor.to`; a dtype is for the features alone."""
        device = {key: value for key, value in kwargs.items() if key != "dtype"}
        place = [value for value in args if not isinstance(value, torch.dtype)]
        return CachedTexts(
            self.ids.to(*place, **device) if place or device else self.ids,
            self.feature.to(*args, **kwargs),
            self.tokens.to(*args, **kwargs),
            self.mask.to(*place, **device) if place or device else self.mask,
        )


def to_dicts(image: Any, text: Any) -> tuple[Any, Any]:
    """CachedImages and CachedTexts for a trainer that moves tensors and dicts alone; other inputs as they are."""
    if not isinstance(image, CachedImages):
        return image, text
    return {**vars(image), "pooled": dict(enumerate(image.pooled))}, dict(vars(text))


def from_dicts(image: Any, text: Any) -> tuple[Any, Any]:
    """The inverse of `to_dicts`."""
    if not (isinstance(image, Mapping) and "source" in image):
        return image, text
    return CachedImages(**{**image, "pooled": tuple(image["pooled"].values())}), CachedTexts(**text)


def learning_head(tower: nn.Module) -> nn.Module:
    """What is applied to cached outputs: open_clip 3.x leaves it to learn in a locked tower, 4.x locks it too."""
    name = _head_name(tower)
    return nn.Identity() if name is None else getattr(tower, name)


def locked_part(tower: nn.Module) -> nn.Module:
    """A tower without its `learning_head`: a view that shares all weights."""
    name, view = _head_name(tower), copy.copy(tower)
    view._modules = dict(tower._modules) if name is None else {**tower._modules, name: nn.Identity()}
    return view


def describe_towers(model: Any) -> dict[str, Any]:
    """Settings on which the outputs of a model's locked towers depend, and fingerprints of their weights by precision.

    Raises:
        FeatureError: a part that is not locked works on whole maps, of which there is no one vector to keep; or the
            model takes several dates.
    """
    _require_one_date(model)
    learned = any(isinstance(pool, LearnedPool) for pool in model.image_scales.pools.values())
    if learned or "pool" in dict(learning_head(model.visual).named_children()):
        what = "msa_cfg.image_scales: pool 'learned'" if learned else "vision_cfg.timm_pool: attention pooling"
        raise FeatureError(f"{what} learns on whole maps, which are not cached; use avg, max or token.")
    weights = _locked_weights(model)
    return _settings(model) | {"weights": {name: digest(weights, dtype) for name, dtype in _PRECISIONS.items()}}


def check_towers(model: Any, source: Source) -> None:
    """Raise FeatureError unless the cached features are those of the model's own towers."""
    _require_one_date(model)
    made_with = json.loads(source.towers)
    for key, value in _settings(model).items():
        if made_with[key] != value:
            raise FeatureError(
                f"{source.folder}: made with {key} {made_with[key]}, the model has {value}. Give the options that the "
                "features were made with, or make them again with `msa-openclip features`."
            )
    weights = _locked_weights(model)
    used = {value.dtype for value in weights.values()}
    precision = next((name for name in ("float16", "bfloat16") if _PRECISIONS[name] in used), "float32")
    if made_with["weights"][precision] != digest(weights, _PRECISIONS[precision]):
        raise FeatureError(
            f"{source.folder}: made by towers with other weights than this model's. Start from the same ones "
            "(--pretrained, --pretrained-image), or make the features again with `msa-openclip features`."
        )


def _require_one_date(model: Any) -> None:
    if model.msa_cfg.dates > 1:
        raise FeatureError(
            f"msa_cfg.dates: features are cached of one image a sample, the model takes {model.msa_cfg.dates}. Train "
            "on the images; --lock-image and --lock-text work there too."
        )


def _settings(model: Any) -> dict[str, Any]:
    settings = {
        "image_scales": [asdict(scale) for scale in model.msa_cfg.image_scales],
        "text_tokens": asdict(model.msa_cfg.text_tokens),
        "preprocess": model.visual.preprocess_cfg,
        "config": architecture(model, model.built_from),
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # lists for tuples, as they come back from a file
    return plain


def _locked_weights(model: Any) -> dict[str, Tensor]:
    """Weights of the locked parts; without counters, which frozen batch statistics lose."""
    weights = {
        f"{name}.{key}": value
        for name in ("visual", "text")
        for key, value in current_weights(locked_part(getattr(model, name))).items()
    }
    return {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}


def _head_name(tower: Any) -> str | None:
    """The child behind what every line's `lock` locks: of timm's and Hugging Face's towers, not of CLIP's own."""
    if hasattr(tower, "trunk"):
        return "head"
    return "proj" if isinstance(getattr(tower, "proj", None), nn.Module) else None
