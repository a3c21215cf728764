"""An open_clip tower -> its global feature and what MSA takes from inside it: pooled scale vectors, or text tokens.

Towers are told apart by their attributes, not their classes, so that this file needs nothing of open_clip.
Shapes: I images, T texts, C_s channels of scale s, L positions of a map, N text tokens, E embed_dim.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ImageScale
from ..config import ScaleInputs as ScaleInputsCfg

Images: TypeAlias = Tensor | Mapping[str, Any]
"""Pixels (I, 3, h, w); or, for NaFlexVit, images of many sizes as open_clip's NaFlex batches have them: `patches`
(I, L, P), `patch_coord` (I, L, 2) and `patch_valid` (I, L), False where an image has fewer patches than the largest."""


class Stage(NamedTuple):
    """Where a stage is found in the tower's `forward_intermediates`, and its channels C_s."""

    position: int
    channels: int


def image_stages(visual: Any) -> dict[int, Stage]:
    """The stages of an image tower by number: stage s of a hierarchical backbone has stride 2^(s + 1); block of a ViT.

    Raises:
        ValueError: the tower has no intermediate features.
    """
    if hasattr(visual, "trunk"):
        return _timm_stages(visual.trunk)
    if hasattr(visual, "layer4"):  # ModifiedResNet; its features are stem, layer1 .. layer4
        return {s: Stage(s, getattr(visual, f"layer{s}")[-1].conv3.out_channels) for s in range(1, 5)}
    if getattr(visual, "attn_pool", None) is not None:
        raise ValueError(
            "vision_cfg.attentional_pool: the tower's last LayerNorm then follows the pooler, and none is left for the "
            "tokens of its blocks. Set it to false."
        )
    if hasattr(visual, "transformer"):
        width, blocks = visual.transformer.width, len(visual.transformer.resblocks)
        return {block: Stage(block - 1, width) for block in range(1, blocks + 1)}
    raise ValueError(f"image tower {type(visual).__name__} has no stages that msa_openclip knows how to read.")


def _timm_stages(trunk: Any) -> dict[int, Stage]:
    features = getattr(trunk, "feature_info", None)
    if not features or not hasattr(trunk, "forward_intermediates"):
        raise ValueError(f"timm model {type(trunk).__name__} has no forward_intermediates; choose another backbone.")
    features = [dict(info) for info in (features.info if hasattr(features, "info") else features)]
    reductions = [info["reduction"] for info in features]
    if len(set(reductions)) == 1:  # a plain ViT
        return {index + 1: Stage(index, info["num_chs"]) for index, info in enumerate(features)}
    numbers = [round(math.log2(reduction)) - 1 for reduction in reductions]
    return {
        number: Stage(index, info["num_chs"])
        for index, (number, info) in enumerate(zip(numbers, features, strict=True))
        if number >= 1  # the stem is no stage
    }


def _has_class_token(visual: Any) -> bool:
    tower = getattr(visual, "trunk", visual)
    if hasattr(tower, "embeds"):  # NaFlexVit
        tower = tower.embeds
    return hasattr(tower, "class_embedding") or getattr(tower, "cls_token", None) is not None


def backbone_name(visual: Any) -> str:
    """What error messages call the image tower."""
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        return str(getattr(trunk, "default_cfg", {}).get("architecture") or type(trunk).__name__)
    return type(visual).__name__


class LearnedPool(nn.Module):
    """Attention pooling of a map with one learned query: softmax over positions of x . a / sqrt(C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, 1, bias=False)
        nn.init.zeros_(self.query.weight)  # starts as the average

    def forward(self, positions: Tensor, valid: Tensor | None = None) -> Tensor:
        """(I, L, C) and which of them are valid (I, L) -> (I, C)."""
        logits: Tensor = self.query(positions) / math.sqrt(positions.shape[-1])
        if valid is not None:
            logits = logits.masked_fill(~valid[..., None], -torch.inf)
        return (logits.softmax(dim=1) * positions).sum(dim=1)


class Maps(NamedTuple):
    """What an image tower says of images."""

    feature: Tensor
    """(I, E) its own global feature."""
    maps: list[Tensor]
    """(I, L, C) of each distinct stage."""
    tokens: list[Tensor]
    """(I, C) class tokens of each, where a scale uses them."""
    valid: Tensor | None
    """(I, L) which positions belong to the image; None: all."""


class ImageScales(nn.Module):
    """Reads the pooled scale vectors z_1 .. z_S out of an image tower's forward pass (docs/method.md, section 1.1).

    The tower is passed at each call: it stays a child of the model alone, under open_clip's own name.

    Raises:
        ValueError: a scale names a stage that the backbone lacks, or the class token of one without.
    """

    def __init__(self, visual: nn.Module, scales: Sequence[ImageScale]) -> None:
        super().__init__()
        stages, name = image_stages(visual), backbone_name(visual)
        self.is_plain = len({stage.channels for stage in stages.values()}) == 1
        for position, scale in enumerate(scales):
            key = f"msa_cfg.image_scales[{position}]"
            if scale.stage not in stages:
                raise ValueError(
                    f"{key}: stage {scale.stage} does not exist; {name} has stages {min(stages)} to {max(stages)}. "
                    "Remove it or choose another backbone."
                )
            if scale.pool == "token" and not _has_class_token(visual):
                raise ValueError(f"{key}: pool 'token' needs a class token; {name} has none. Use max, avg or learned.")
        self.scales = tuple(scales)
        self.channels = [stages[scale.stage].channels * (1 + (scale.pool == "max_avg")) for scale in scales]
        self.indices = sorted({stages[scale.stage].position for scale in scales})
        self.slots = [self.indices.index(stages[scale.stage].position) for scale in scales]
        self.pools = nn.ModuleDict(
            {str(i): LearnedPool(self.channels[i]) for i, scale in enumerate(scales) if scale.pool == "learned"}
        )

    def forward(self, visual: nn.Module, image: Images) -> tuple[Tensor, list[Tensor]]:
        """Images (I, 3, h, w) -> the tower's own feature (I, E) and the S pooled vectors z_s (I, C_s)."""
        found = self.maps(visual, image)
        return found.feature, [self._pool(position, found) for position in range(len(self.scales))]

    def maps(self, visual: Any, image: Images) -> Maps:
        """The tower's own feature, its maps by distinct stage, and their class tokens, if used."""
        wants_token = any(scale.pool == "token" for scale in self.scales)
        if isinstance(image, Mapping):
            return self._naflex_maps(visual, image, wants_token)
        # ModifiedResNet of open_clip 3.3 stops before its head unless the last stage is among the indices, hence all.
        indices = None if hasattr(visual, "layer4") else self.indices
        output = visual.forward_intermediates(
            image,
            indices=indices,
            normalize_intermediates=True,
            output_fmt="NLC" if self.is_plain else "NCHW",  # patch dropout leaves no grid to put a ViT's tokens on
            output_extra_tokens=wants_token,
        )
        maps = output["image_intermediates"]
        if indices is None:
            maps = [maps[index] for index in self.indices]
        if not self.is_plain:
            maps = [x.flatten(2).transpose(1, 2) for x in maps]
        tokens = [x[:, 0] for x in output["image_intermediates_prefix"]] if wants_token else []
        return Maps(output["image_features"], maps, tokens, None)

    def _naflex_maps(self, visual: Any, patches: Mapping[str, Any], wants_token: bool) -> Maps:
        """Of images of many sizes: open_clip's own wrapper would pool the padding behind small ones too."""
        if type(getattr(visual, "trunk", None)).__name__ != "NaFlexVit":
            raise ValueError(
                f"{backbone_name(visual)} takes images of one size; NaFlex batches need a NaFlexVit tower."
            )
        trunk = visual.trunk
        output = trunk.forward_intermediates(
            patches,
            indices=self.indices,
            norm=True,
            output_fmt="NLC",
            return_prefix_tokens=wants_token,
            output_dict=True,  # patch dropout takes patches away, and this says which are left
        )
        valid = output["patch_valid"]
        feature = visual.head(trunk.forward_head(output["image_features"], patch_valid=valid))
        tokens = [x[:, 0] for x in output["image_intermediates_prefix"]] if wants_token else []
        return Maps(feature, output["image_intermediates"], tokens, valid)

    def _pool(self, position: int, found: Maps) -> Tensor:
        pool, slot = self.scales[position].pool, self.slots[position]
        if pool == "token":
            return found.tokens[slot]
        x, valid = found.maps[slot], found.valid
        if pool == "learned":
            pooled: Tensor = self.pools[str(position)](x, valid)
            return pooled
        if pool == "max_avg":
            return torch.cat([_masked_max(x, valid), _masked_mean(x, valid)], dim=1)
        return _masked_max(x, valid) if pool == "max" else _masked_mean(x, valid)


def _masked_max(x: Tensor, valid: Tensor | None) -> Tensor:
    """(I, L, C) -> (I, C), over valid positions (I, L); all of them where that is None."""
    return (x if valid is None else x.masked_fill(~valid[..., None], -torch.inf)).max(dim=1).values


def _masked_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """(I, L, C) -> (I, C), over valid positions (I, L); all of them where that is None."""
    return x.mean(dim=1) if valid is None else (x * valid[..., None]).sum(dim=1) / valid.sum(dim=1, keepdim=True)


def unused_parameters(scales: ImageScales, visual: nn.Module) -> list[nn.Parameter]:
    """Parameters of an image tower on which none of its pooled scale vectors depends, those of its head for example.

    Asked of a copy on the meta device, which has graphs but no numbers; `eval` keeps it from drawing random ones.
    """
    reader, copied = copy.deepcopy(scales).to("meta"), copy.deepcopy(visual).to("meta").eval().requires_grad_()
    height, width = image_size(visual)
    _, pooled = reader(copied, torch.empty(1, 3, height, width, device="meta"))
    gradients = torch.autograd.grad([z.sum() for z in pooled], list(copied.parameters()), allow_unused=True)
    return [own for own, gradient in zip(visual.parameters(), gradients, strict=True) if gradient is None]


def freeze_locked_norms(trunk: nn.Module) -> None:
    """Fix the statistics of a timm tower's batch norms, in place, in those parts whose parameters are frozen already.

    timm's own function keeps the activation and dropout that its norms carry.
    """
    from timm import layers

    freeze: Any = layers.freeze_batch_norm_2d  # type: ignore[attr-defined]
    for parent in list(trunk.modules()):
        for name, child in list(parent.named_children()):
            is_norm = isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm))
            if is_norm and not any(parameter.requires_grad for parameter in child.parameters()):
                parent.add_module(name, freeze(child))


def image_size(visual: Any) -> tuple[int, int]:
    """Height and width in pixels of the images that a tower expects."""
    size = visual.image_size
    return (size[0], size[1]) if isinstance(size, (tuple, list)) else (size, size)


class ChannelNorm(nn.BatchNorm1d):
    """Batch norm without learned parts, computed in float32 or better whatever the dtype of its statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.05, affine=False)

    def forward(self, input: Tensor) -> Tensor:
        """(I, C) -> (I, C), in training by the statistics of the batch."""
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        assert self.running_mean is not None
        assert self.running_var is not None
        if not self.training:
            mean, var = self.running_mean.to(wide.dtype), self.running_var.to(wide.dtype)
            return F.batch_norm(wide, mean, var, eps=self.eps).to(input.dtype)
        with torch.no_grad():
            found = torch.var_mean(wide, dim=0)
            for kept, of_batch in zip((self.running_var, self.running_mean), found, strict=True):
                kept.lerp_(of_batch.to(kept.dtype), 0.05)
        return F.batch_norm(wide, None, None, training=True, eps=self.eps).to(input.dtype)


class ScaleInputs(nn.Module):
    """What `msa_cfg.scale_inputs` does to pooled vectors before learned maps read them."""

    def __init__(self, channels: Sequence[int], cfg: ScaleInputsCfg) -> None:
        super().__init__()
        norms = {"none": lambda _: nn.Identity(), "batch": ChannelNorm, "layer": _plain_layer_norm}
        self.norms = nn.ModuleList(norms[cfg.norm](count) for count in channels)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """S of (I, C_s) -> S of (I, C_s)."""
        return [self.dropout(norm(z)) for norm, z in zip(self.norms, pooled, strict=True)]


def _plain_layer_norm(channels: int) -> nn.Module:
    return nn.LayerNorm(channels, elementwise_affine=False)


class TowerPlusScales(nn.Module):
    """The tower's own global feature plus sum_s F_s z_s, which starts at zero: a warm start changes nothing.

    Args:
        channels: C_s of each scale.
        embed_dim: E.
        hidden: width of an MLP over the tower's feature and all scales whose output is added too, from zero on.
        dropout: within the MLP.
    """

    def __init__(
        self, channels: Sequence[int], embed_dim: int, hidden: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(count, embed_dim) for count in channels)
        for parameter in self.project.parameters():
            nn.init.zeros_(parameter)
        if hidden is not None:
            self.norm = nn.LayerNorm(embed_dim)
            last = nn.Linear(hidden, embed_dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            first = nn.Linear(embed_dim + sum(channels), hidden)
            self.mlp = nn.Sequential(first, nn.GELU(), nn.Dropout(dropout), last)
        self.has_mlp = hidden is not None

    def forward(self, feature: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """(I, E) and S of (I, C_s) -> (I, E)."""
        fused = feature
        for linear, z in zip(self.project, pooled, strict=True):
            fused = fused + linear(z)
        if self.has_mlp:
            joined = torch.cat([self.norm(feature).to(pooled[0].dtype), *pooled], dim=1)
            fused = fused + self.mlp(joined)
        return fused


class GatedScales(nn.Module):
    """The paper's global image feature: f = sum_s F_s z_s, e = A f, B (e * sigmoid(G e)).

    docs/method.md, section 1.2.
    """

    def __init__(self, channels: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(count, embed_dim) for count in channels)
        self.embed = nn.Linear(embed_dim, embed_dim)  # A
        self.gate = nn.Linear(embed_dim, embed_dim)  # G
        self.out = nn.Linear(embed_dim, embed_dim)  # B

    def forward(self, feature: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """S of (I, C_s) -> (I, E); the tower's own feature is not used."""
        summed = sum(linear(z) for linear, z in zip(self.project, pooled, strict=True))
        embedded = self.embed(summed)
        result: Tensor = self.out(embedded * self.gate(embedded).sigmoid())
        return result


def text_token_width(text: Any) -> int:
    """Width of a text tower's last hidden states."""
    if hasattr(text, "token_embedding"):  # open_clip's own TextTransformer
        return int(text.width)
    return int(text.transformer.get_input_embeddings().weight.shape[1])  # transformers


def pad_id(text: Any) -> int:
    """The token id that a text tower takes for padding."""
    return int(text.pad_id if hasattr(text, "pad_id") else text.config.pad_token_id)


def token_mask(ids: Tensor, pad: int) -> Tensor:
    """Which of the token ids (T, N) are no padding: all from the first to the last that is not `pad`.

    Id 0 pads open_clip's own BPE and is also its token for "!", so only runs at the ends count as padding.
    """
    real = ids != pad
    return (real.cumsum(dim=1) > 0) & (real.flip(1).cumsum(dim=1).flip(1) > 0)
