"""Any open_clip model as a scorer of images against texts: by global features and, for MSA, by MSCMAT and both fused.

Shapes: I images, T texts, S scales, R rankings, E embed_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast
from torch import Tensor, nn

from ..data.captioned import CaptionedImage, EvalDataError
from ..model.cached import locked_part
from ..model.msaclip import MSACLIP
from ..model.towers import pad_id, token_mask
from ..pair_scores.formula import ImageSide, TextSide


def main_ranking(rankings: Collection[str]) -> str:
    """The ranking by which a model is compared: fused if it has one, else global."""
    return "fused" if "fused" in rankings else "global"


Tokenizer = Callable[[list[str]], Tensor]
"""Captions -> token ids (T, L)."""


class EncodedImages(NamedTuple):
    """What scoring needs of images, in float32."""

    feature: Tensor
    """(I, E) normalised global features."""
    side: ImageSide | None
    """The image side of the pair stage, where the model has one."""

    def fields(self) -> tuple[Tensor, ...]:
        """Every tensor, batch-first."""
        return (self.feature, *(self.side or ()))

    @classmethod
    def of(cls, fields: tuple[Tensor, ...]) -> EncodedImages:
        """The inverse of `fields`."""
        return cls(fields[0], ImageSide(*fields[1:]) if len(fields) > 1 else None)


class EncodedTexts(NamedTuple):
    """What scoring needs of texts, in float32."""

    feature: Tensor
    """(T, E) normalised global features."""
    side: TextSide | None
    """The text side of the pair stage, cut to the longest text, where the model has one."""


def without_padding(model: MSACLIP, ids: Tensor) -> tuple[MSACLIP, Tensor]:
    """Token ids (T, L) cut to the longest text, and the model to read them: a view that shares all weights.

    Captions take a quarter of CLIP's 77 positions.  What comes behind them changes nothing where attention is causal
    or leaves padding out; where it does not, the ids stay as they are.
    """
    text, cut = model.text, ids[:, : _longest(token_mask(ids, pad_id(model.text)))]
    if model.msa_cfg.text_tokens.padding:
        return model, ids
    if not hasattr(text, "attn_mask"):  # a Hugging Face tower, which masks padding
        return model, cut
    if text.attn_mask is None or text.cls_emb is not None or text.pool_type not in ("argmax", "eos"):
        return model, ids
    view, short, length = copy.copy(model), copy.copy(text), cut.shape[1]
    short._buffers = {**text._buffers, "attn_mask": text.attn_mask[:length, :length]}  # open_clip 3.3 does not cut it
    view._modules = {**model._modules, "text": short}
    return view, cut


def _longest(mask: Tensor) -> int:
    """Length of the longest text of a mask (T, N), at least 1."""
    attended = mask.any(dim=0).nonzero()
    return int(attended[-1]) + 1 if len(attended) else 1


def _normalised(feature: Tensor, what: str) -> Tensor:
    """Features (n, E) of length 1 in float32; `_finite`."""
    return _finite(F.normalize(feature.float(), dim=-1), what)


def _finite(feature: Tensor, what: str) -> Tensor:
    """Features in float32.

    Raises:
        ValueError: one holds NaN or infinity, of which every score would be NaN.
    """
    if not torch.isfinite(feature).all():
        raise ValueError(
            f"the features of {what} are not finite, so that scores hold NaN, which no ranking can order; check the "
            "model's weights and precision."
        )
    return feature.float()


class Scorer:
    """Encodes with one model and scores by each of its rankings.

    The rankings are `global` (cosine) and, with MSCMAT, `match` (mean of the scales), `fused` (the model's
    `rank_scores`), and both with one scale alone: `match_scale1`, ..., `fused_scale1`, ...  Encoding runs in the given
    precision, scoring in float32.

    Args:
        model: any open_clip model, on its device, in its precision (open_clip's `precision` of `create_model`).
        precision: as for open_clip_train, `fp32`, `amp`, `amp_bf16`, `bf16`, `pure_bf16`, ...
    """

    def __init__(self, model: nn.Module, precision: str = "fp32") -> None:
        self.model: Any = model
        self.device = next(model.parameters()).device
        self.input_dtype = get_input_dtype(precision)
        self._autocast = get_autocast(precision, device_type=self.device.type)
        self.dates = model.msa_cfg.dates if isinstance(model, MSACLIP) else 1
        self.has_match = isinstance(model, MSACLIP) and model.mscmat is not None
        self.scales = len(model.mscmat.scales) if isinstance(model, MSACLIP) and model.mscmat is not None else 0

    @property
    def match_shape(self) -> tuple[int, int]:
        """(S, D) of MSCMAT's vectors m; of models with it."""
        shape: tuple[int, int] = self.model.mscmat.projected_shape
        return shape

    @property
    def rankings(self) -> tuple[str, ...]:
        """Names of the R rankings, in the order of `scores`."""
        if not self.has_match:
            return ("global",)
        numbers = range(1, self.scales + 1)
        alone = (f"{name}_scale{number}" for name in ("match", "fused") for number in numbers)
        return ("global", "match", "fused", *alone)

    @property
    def main_ranking(self) -> str:
        """The ranking by which the model is compared."""
        return main_ranking(self.rankings)

    def images(self, pixels: Tensor) -> EncodedImages:
        """Encode preprocessed images (I, 3, h, w), or (I, dates, 3, h, w)."""
        pixels = self._ready(pixels)
        with torch.inference_mode(), self._cast():
            if self.has_match:
                feature, side = self.model.image_side(pixels)
                return EncodedImages(_finite(feature, "images"), ImageSide(*(field.float() for field in side)))
            return EncodedImages(_normalised(self.model.encode_image(pixels), "images"), None)

    def project(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """What an index keeps of images (I, 3, h, w): global features (I, E) and MSCMAT's vectors m (I, S, D)."""
        pixels = self._ready(pixels)
        with torch.inference_mode(), self._cast():
            if not self.has_match:
                return _normalised(self.model.encode_image(pixels), "images"), None
            feature, pooled = self.model.pooled_scales(pixels)
            # Again in float32: of a length of 1, bfloat16 keeps two digits.
            return _normalised(feature, "images"), self.model.mscmat.project_image(pooled).float()

    def locked_images(self, pixels: Tensor) -> list[Tensor]:
        """What the locked image tower puts out of images (I, 3, h, w): feature (I, P), S pooled vectors (I, C_s)."""
        with torch.inference_mode(), self._cast():
            pixels = pixels.to(self.device, self.input_dtype)
            feature, pooled = self.model.image_scales(locked_part(self.model.visual), pixels)
            return [part.float() for part in (feature, *pooled)]

    def locked_texts(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the locked text tower puts out of token ids (T, L): features (T, P), T runs (n, C) of tokens."""
        with torch.inference_mode(), self._cast():
            model, ids = without_padding(self.model, ids.to(self.device))
            feature, tokens = locked_part(model.text)(ids)
            runs = zip(*model.attended_tokens(ids, tokens), strict=True)
            return feature.float(), [run[mask].float() for run, mask in runs]

    def fold(self, feature: Tensor, projected: Tensor | None) -> EncodedImages:
        """Global features (I, E) and vectors m (I, S, D) of an index, ready to score."""
        if projected is None:
            return EncodedImages(feature, None)
        with torch.inference_mode(), self._cast():
            side = self.model.mscmat.fold_projected(projected.to(self.device, self.input_dtype))
            return EncodedImages(feature, ImageSide(*(field.float() for field in side)))

    def texts(self, ids: Tensor) -> EncodedTexts:
        """Encode token ids (T, L)."""
        ids = ids.to(self.device)
        with torch.inference_mode(), self._cast():
            if not self.has_match:
                return EncodedTexts(_normalised(self.model.encode_text(ids), "texts"), None)
            model, ids = without_padding(self.model, ids)
            feature, side = model.text_side(ids)
            length = _longest(side.mask)
            key, value = side.key[:, :, :length].float(), side.value[:, :, :length].float()
            return EncodedTexts(
                _finite(feature, "texts"), TextSide(key, value, side.feature.float(), side.mask[:, :length])
            )

    def scores(self, images: EncodedImages, texts: EncodedTexts) -> Tensor:
        """Scores of every image with every text by every ranking, (R, I, T) float32."""
        with torch.inference_mode():
            cosine = images.feature @ texts.feature.T
            if images.side is None or texts.side is None:
                return cosine[None]
            match = self.model.match_scores(images.side, texts.side).float()
            fused = [self.model.rank_scores(cosine, part).float() for part in (match, *match.split(1))]
            return torch.stack([cosine, match.mean(dim=0), fused[0], *match, *fused[1:]])

    def require_dates(self, images: Iterable[CaptionedImage]) -> None:
        """Refuse images of another number of dates than the model takes, before any is read.

        Raises:
            EvalDataError: there is one; the message names it.
        """
        for image in images:
            if (dates := len(image.locations)) != self.dates:
                raise EvalDataError(
                    f"{image.location.url}: image {image.image_id}: {_dates(dates)}, where the model takes "
                    f"{self.dates} (msa_cfg.dates). Choose data of as many dates as the model, or another model."
                )

    def bytes_per_pair(self, texts: EncodedTexts) -> int:
        """Working memory that `scores` and counting take per pair of an image and a text, from above."""
        rankings = len(self.rankings)
        attention = 0 if texts.side is None else texts.side.key.shape[2] * texts.side.key.shape[3]
        return 4 * (6 * attention + 4 * rankings) + 64

    def _ready(self, pixels: Tensor) -> Tensor:
        """Pixels on the device, in the precision of the model.

        Raises:
            EvalDataError: they are of another number of dates than the model takes.
        """
        dates = 1 if pixels.dim() == 4 else pixels.shape[1]
        if dates != self.dates:
            raise EvalDataError(f"samples of {_dates(dates)}, where the model takes {self.dates} (msa_cfg.dates).")
        return pixels.to(self.device, self.input_dtype)

    def _cast(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._autocast()
        return context


def _dates(count: int) -> str:
    return f"{count} date{'s' * (count > 1)}"
