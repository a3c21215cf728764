"""MSACLIP: open_clip's dual encoder with multi-scale image features and MSCMAT (docs/method.md, section 1).

Shapes: I images, T texts, S scales, C_s channels of scale s, N text tokens, E embed_dim.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from open_clip import CustomTextCLIP
from torch import Tensor, nn

from ..config import MSACfg
from ..pair_scores.formula import ImageSide, TextSide
from .cached import CachedImages, CachedTexts, Source, check_towers, learning_head
from .dates import DateFusion, flat_dates
from .fusions import DecoupledScales, WeighedScales
from .labelled import LabelledTexts, from_dicts
from .mscmat import IMAGE_SIDE_KEYS, TEXT_SIDE_KEYS, fused_scores, match_scores
from .similarities import PairScore, build_pair_score
from .towers import (
    GatedScales,
    Images,
    ImageScales,
    ScaleInputs,
    TowerPlusScales,
    freeze_locked_norms,
    pad_id,
    text_token_width,
    token_mask,
    unused_parameters,
)

_log = logging.getLogger(__name__)

# What state dicts of OpenAI's own archives hold beside parameters.
_ARCHIVE_KEYS = ("input_resolution", "context_length", "vocab_size")


class MSACLIP(CustomTextCLIP):  # type: ignore[misc]
    """A CLIP model with pooled image vectors at several scales, and MSCMAT to score pairs at each of them.

    Built by `open_clip.create_model` for every model configuration with the key `msa_cfg`.

    Args:
        embed_dim: E.
        vision_cfg: image tower, as for every open_clip model.
        text_cfg: text tower, likewise.
        msa_cfg: `MSACfg`, or the JSON object that it is parsed from.
        **clip_kwargs: passed on to open_clip's own class (quick_gelu, cast_dtype, ...).
    Raises:
        ValueError: `msa_cfg` is wrong, or does not fit the towers.
    """

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: Any,
        text_cfg: Any,
        msa_cfg: MSACfg | Mapping[str, Any],
        **clip_kwargs: Any,
    ) -> None:
        cfg = msa_cfg if isinstance(msa_cfg, MSACfg) else MSACfg.from_dict(msa_cfg)
        super().__init__(embed_dim, vision_cfg, _with_tokens(text_cfg), **clip_kwargs)
        self._features_of: Source | None = None
        self.msa_cfg = cfg
        self.built_from = {"vision_cfg": vision_cfg, "text_cfg": text_cfg}
        self.image_scales = ImageScales(self.visual, cfg.image_scales)
        self.date_fusion: DateFusion | None = None
        if cfg.dates > 1:
            own_width = None if cfg.fusion in SCALES_ALONE else embed_dim
            self.date_fusion = DateFusion(self.image_scales.channels, own_width, cfg.dates)
        self.scale_inputs = ScaleInputs(self.image_scales.channels, cfg.scale_inputs)
        self.fusion = _build_fusion(cfg, self.image_scales.channels, embed_dim)
        self.mscmat: PairScore | None = None
        if cfg.uses_mscmat:
            channels, token_width = self.image_scales.channels, text_token_width(self.text)
            self.mscmat = build_pair_score(cfg, channels, token_width, embed_dim)
        self._check_towers(embed_dim)
        self._freeze_unused()

    def encode_image(self, image: Images, normalize: bool = False) -> Tensor:
        """Images (I, 3, h, w), with `msa_cfg.dates` above 1 samples (I, dates, 3, h, w) -> global features (I, E)."""
        return self._encode_image(image, normalize)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (T, L) -> global features (T, E)."""
        return self._encode_text(text, normalize)

    # open_clip's own `forward` calls these (4.x) or the public ones (3.x), which a sharded model may not enter twice.

    def _encode_image(self, image: Images, normalize: bool = False) -> Tensor:
        if self.fusion is None and self.date_fusion is None:
            feature: Tensor = self.visual(image)
        else:
            feature, _ = self._encode_scales(image)
        return F.normalize(feature, dim=-1) if normalize else feature

    def _encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        feature: Tensor = self.text(text)[0]
        return F.normalize(feature, dim=-1) if normalize else feature

    def image_side(self, image: Images) -> tuple[Tensor, ImageSide]:
        """Images (I, 3, h, w) -> normalised global features (I, E) and the image side of the pair stage."""
        feature, pooled = self._encode_scales(image)
        return F.normalize(feature, dim=-1), self.fold_image(pooled)

    def text_side(self, text: Tensor) -> tuple[Tensor, TextSide]:
        """Token ids (T, L) -> normalised global features (T, E) and the text side of the pair stage."""
        mscmat = self._require_mscmat()
        feature, tokens, mask = self._encode_tokens(text)
        feature = F.normalize(feature, dim=-1)
        return feature, mscmat.fold_text(tokens, mask, feature)

    def pooled_scales(self, image: Images) -> tuple[Tensor, Sequence[Tensor]]:
        """Images (I, 3, h, w) -> normalised global features (I, E) and S pooled vectors z_s (I, C_s)."""
        feature, pooled = self._encode_scales(image)
        return F.normalize(feature, dim=-1), pooled

    def fold_image(self, pooled: Sequence[Tensor]) -> ImageSide:
        """S pooled vectors z_s (I, C_s), as an index keeps them -> the image side of the pair stage."""
        return self._require_mscmat().fold_image(pooled)

    def match_scores(self, images: ImageSide, texts: TextSide) -> Tensor:
        """Match scores (S, I, T) of every image with every text at every scale, in the form of `msa_cfg.score`."""
        return match_scores(images, texts, self.msa_cfg.score)

    def rank_scores(self, cosine: Tensor, match: Tensor | None) -> Tensor:
        """Cosines (I, T) and match scores (S, I, T) -> the fused scores (I, T) of `msa_cfg.ranking`."""
        return fused_scores(cosine, match, self.logit_scale.exp(), self.msa_cfg.ranking)

    def get_logits(self, image: Images, text: Tensor) -> tuple[Tensor, Tensor]:
        """Fused scores of images (I, 3, h, w) and token ids (T, L): (I, T) and its transpose."""
        if self.mscmat is None:
            image_features, text_features = self._encode_image(image, True), self._encode_text(text, True)
            match = None
        else:
            image_features, images = self.image_side(image)
            text_features, texts = self.text_side(text)
            match = self.match_scores(images, texts)
        logits = self.rank_scores(image_features @ text_features.T, match)
        return logits, logits.T

    def forward(
        self, image: Images | CachedImages | None = None, text: Tensor | CachedTexts | LabelledTexts | None = None
    ) -> Any:
        """In training with both inputs a flat dict of batch-first tensors; else what open_clip's own model returns.

        Cached outputs of the locked towers take the place of pixels and token ids in training; the towers are not run.

        The dict holds `image_features` (B, E), `text_features` (B, E), `logit_scale`, and, as the configured losses
        need them, `text_ids` (B, L), `classes` (B,) and the folded sides under IMAGE_SIDE_KEYS and TEXT_SIDE_KEYS.
        """
        if not self.training or image is None or text is None:
            return super().forward(image, text)
        image, text = from_dicts(image, text)
        classes = None
        if isinstance(text, LabelledTexts):
            classes, text = text.classes, text.texts
        if isinstance(image, CachedImages) and isinstance(text, CachedTexts):
            self._require_own_features(image.source)
            text = text.to(dtype=image.feature.dtype)  # the trainer casts images alone
        image_feature, pooled = self._encode_scales(image)
        text_feature, tokens, mask = self._encode_tokens(text)
        text_feature = F.normalize(text_feature, dim=-1)
        output = {
            "image_features": F.normalize(image_feature, dim=-1),
            "text_features": text_feature,
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            output["logit_bias"] = self.logit_bias
        if self.mscmat is not None:
            output.update(zip(IMAGE_SIDE_KEYS, self.mscmat.fold_image(pooled), strict=True))
            output.update(zip(TEXT_SIDE_KEYS, self.mscmat.fold_text(tokens, mask, text_feature), strict=True))
        if self.msa_cfg.loss.needs_text_ids:
            output["text_ids"] = self._comparable_ids(text)
        if classes is not None:
            output["classes"] = classes
        return output

    def _comparable_ids(self, text: Tensor | CachedTexts) -> Tensor:
        """Token ids (T, L) that are equal where captions are, also those of other ranks."""
        if isinstance(text, CachedTexts):
            return text.ids
        # Where batches differ in length, so does the padding behind one caption.
        ragged = getattr(self.text, "variable_text", False)
        return text.masked_fill(~token_mask(text, pad_id(self.text)), -1) if ragged else text

    def convert_with_linear(self) -> None:
        """Bring what open_clip's conversion to low precision passes over to the precision of the layers around it."""
        for head in self.mscmat.heads if self.mscmat is not None else ():
            head.convert_with_linear()

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """As open_clip's own; what no loss reaches stays frozen in the groups that it leaves unlocked.

        Where timm's norms carry their activation, open_clip 3.3 would freeze them without it, which destroys the
        features.
        """
        trunk = getattr(self.visual, "trunk", None)
        super().lock_image_tower(unlocked_groups, freeze_bn_stats and trunk is None)
        if freeze_bn_stats and trunk is not None:
            freeze_locked_norms(trunk)
        self._freeze_unused()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint of this model, or warm-start its towers from one of a plain CLIP model.

        A model of several dates starts from a checkpoint of one date likewise.

        Raises:
            RuntimeError: the checkpoint fits neither; the message names what is missing, as open_clip's would.
        """
        own = {key: value for key, value in self.state_dict().items() if key.startswith(MSA_PREFIXES)}
        state_dict = _with_vectors_of_one(state_dict, own)
        kept, of_what, what = _not_of(state_dict, own)
        if kept:
            state_dict = {**kept, **{key: value for key, value in state_dict.items() if key not in _ARCHIVE_KEYS}}
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if kept:
            _log.info("Warm start: towers loaded from a %s checkpoint, the %s keeps its initial values.", of_what, what)
        return result

    def attended_tokens(self, ids: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What MSCMAT attends to of the last hidden states of token ids (T, L): (T, N, C) and the mask (T, N)."""
        mask = token_mask(ids, pad_id(self.text))
        if self.msa_cfg.text_tokens.padding:
            mask = mask.new_ones(mask.shape)
        if tokens.shape[1] < mask.shape[1]:  # the pooler of some Hugging Face towers keeps [CLS] to itself
            mask = mask[:, 1:]
        elif not self.msa_cfg.text_tokens.first:
            tokens, mask = tokens[:, 1:], mask[:, 1:]
        return tokens, mask

    def _encode_scales(self, image: Images | CachedImages) -> tuple[Tensor, Sequence[Tensor]]:
        """Global features before normalisation (I, E) and pooled vectors z_s."""
        pooled: Sequence[Tensor]
        if isinstance(image, CachedImages):
            feature, pooled = learning_head(self.visual)(image.feature), image.pooled
        elif self.date_fusion is None:
            feature, pooled = self.image_scales(self.visual, image)
        else:
            images = flat_dates(image, self.date_fusion.dates)
            feature, pooled = self.date_fusion(*self.image_scales(self.visual, images))
        pooled = self.scale_inputs(pooled)
        if self.fusion is not None:
            feature = self.fusion(feature, pooled)
        return feature, pooled

    def _encode_tokens(self, text: Tensor | CachedTexts) -> tuple[Tensor, Tensor, Tensor]:
        """Global features before normalisation (T, E), last hidden states (T, N, C) and the mask (T, N) on them."""
        if isinstance(text, CachedTexts):
            return learning_head(self.text)(text.feature), text.tokens, text.mask
        feature, tokens = self.text(text)
        return feature, *self.attended_tokens(text, tokens)

    def _require_own_features(self, source: Source) -> None:
        """Compare weights once for each cache: they are locked."""
        if source != self._features_of:
            check_towers(self, source)
            self._features_of = source

    def _require_mscmat(self) -> PairScore:
        if self.mscmat is None:
            raise ValueError(
                "this model was configured without fused, match and consistency terms and has no MSCMAT; "
                "give msa_cfg.loss.fused_weight a value above 0 to have match scores."
            )
        return self.mscmat

    def _check_towers(self, embed_dim: int) -> None:
        fusion, trunk = self.msa_cfg.fusion, getattr(self.visual, "trunk", None)
        unprojected = trunk is not None and not trunk.num_classes and len(self.visual.head) == 0
        if trunk is not None and unprojected and fusion not in SCALES_ALONE and trunk.num_features != embed_dim:
            raise ValueError(
                f"vision_cfg.timm_proj: 'none' leaves the image tower {trunk.num_features} features where embed_dim is "
                f"{embed_dim}. Use 'linear', or msa_cfg.fusion 'scales' instead of {fusion!r}."
            )
        if self.msa_cfg.text_tokens.first and type(getattr(self.text, "pooler", None)).__name__ == "ClsPooler":
            raise ValueError(
                "msa_cfg.text_tokens.first: text_cfg.hf_pooler_type 'cls_pooler' keeps the first token to itself; "
                "use 'cls_last_hidden_state_pooler', or set first to false."
            )

    def _freeze_unused(self) -> None:
        """Freeze what no loss reaches: a parameter without a gradient would stop DistributedDataParallel."""
        if not self.msa_cfg.trains_logit_scale:
            self.logit_scale.requires_grad_(False)
        if self.msa_cfg.fusion in SCALES_ALONE:
            for parameter in unused_parameters(self.image_scales, self.visual):
                parameter.requires_grad_(False)
        if self.fusion is None and self.mscmat is None:
            self.image_scales.requires_grad_(False)
            if self.date_fusion is not None:
                self.date_fusion.scales.requires_grad_(False)


SCALES_ALONE = ("scales", "decoupled")
"""Fusions that leave out the tower's own feature."""
DATE_PREFIXES = ("date_fusion.",)
"""Of the parameters that a model of one date lacks."""
MSA_PREFIXES = ("image_scales.", "scale_inputs.", "fusion.", "mscmat.", *DATE_PREFIXES)
"""Of the parameters that a plain CLIP model lacks."""


def _not_of(state_dict: Mapping[str, Any], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, str]:
    """Those of our `own` parameters that a checkpoint of a smaller model lacks; of which model it is, what they are."""
    for prefixes, of_what, what in (
        (MSA_PREFIXES, "plain CLIP", "MSA head"),
        (DATE_PREFIXES, "one-date", "fusion over dates"),
    ):
        if not any(key.startswith(prefixes) for key in state_dict):
            kept = {key: value for key, value in own.items() if key.startswith(prefixes)}
            return kept, of_what, what
    return {}, "", ""


def _build_fusion(cfg: MSACfg, channels: Sequence[int], embed_dim: int) -> nn.Module | None:
    if cfg.fusion == "both":
        return TowerPlusScales(channels, embed_dim, cfg.fusion_hidden, cfg.scale_inputs.dropout)
    if cfg.fusion == "scales":
        return GatedScales(channels, embed_dim)
    if cfg.fusion == "decoupled":
        return DecoupledScales(channels, embed_dim)
    if cfg.fusion == "dynamic":
        return WeighedScales(channels, embed_dim)
    return None


def _with_tokens(text_cfg: Any) -> Any:
    """`text_cfg` of a tower that also returns the last hidden states of its tokens."""
    if isinstance(text_cfg, Mapping):
        return {**text_cfg, "output_tokens": True}
    return dataclasses.replace(text_cfg, output_tokens=True)


def _with_vectors_of_one(state_dict: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
    """`state_dict` whose scalars are vectors of one where the model has such: open_clip 4 squeezes what it gathers
    from sharded models."""
    flat = {
        key for key, value in own.items() if value.shape == (1,) and getattr(state_dict.get(key), "shape", None) == ()
    }
    return {key: value.reshape(1) if key in flat else value for key, value in state_dict.items()}
