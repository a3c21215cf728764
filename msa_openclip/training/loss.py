"""MSALoss: global, match and consistency terms (docs/method.md, section 1.5), of one process or all ranks.

Shapes: R rows and C columns of a block of scores (one of them images, the other texts), S scales, B samples a rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import Loss as LossCfg
from ..config import MSACfg, Ranking
from ..model.mscmat import IMAGE_SIDE_KEYS, TEXT_SIDE_KEYS, fused_scores, match_scores
from ..pair_scores.formula import ImageSide, TextSide
from .gather import Gather, scale_gradient


class ScoreBlock(NamedTuple):
    """Scores of queries (rows) against candidates (columns), and which of these are right."""

    cosine: Tensor
    """(R, C) cosines of the global features."""
    match: Tensor | None
    """(S, R, C) match scores."""
    positive: Tensor
    """(R, C) True where the column is a right answer to the row."""
    pair: Tensor
    """(R,) the column that each row was paired with."""


def contrastive_term(block: ScoreBlock, logit_scale: Tensor) -> Tensor:
    """InfoNCE of one direction: cross-entropy over the rows of the scaled cosines, averaged."""
    return positives_cross_entropy(logit_scale * block.cosine, block.positive)


def fused_term(block: ScoreBlock, logit_scale: Tensor, ranking: Ranking) -> Tensor:
    """InfoNCE of one direction on the fused scores, by which retrieval ranks; cosine and match learn to add up."""
    return positives_cross_entropy(fused_scores(block.cosine, block.match, logit_scale, ranking), block.positive)


def triplet_term(block: ScoreBlock, margin: float) -> Tensor:
    """Hinge on the hardest in-batch negative of each row, summed over rows (docs/method.md, section 1.5)."""
    own = block.cosine.gather(1, block.pair[:, None]).squeeze(1)
    hardest = block.cosine.masked_fill(block.positive, -torch.inf).max(dim=1).values
    return (margin - own + hardest).clamp(min=0).sum()


def match_term(match: Tensor, positive: Tensor) -> Tensor:
    """Cross-entropy over the rows of every scale's scores, averaged over rows, summed over scales ("MSCMA")."""
    return positives_cross_entropy(match, positive) * match.shape[0]


def consistency_term(match: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of each row's distribution over columns, averaged over rows, summed over students.

    The deepest scale teaches the others and gets no gradient.
    """
    log_share = (match / temperature).log_softmax(dim=-1)
    teacher = log_share[-1].detach()
    return (teacher.exp() * (teacher - log_share[:-1])).sum(dim=(0, -1)).mean()


def released_consistency_term(match: Tensor, temperature: float) -> Tensor:
    """The paper's "CSMMC" as its released code computes it: KL(student || teacher), averaged over all R x C entries.

    `match` has texts as rows: the distributions are over images.
    """
    log_share = (match / temperature).log_softmax(dim=-1)
    student, teacher = log_share[:-1], log_share[-1].detach()
    return (student.exp() * (student - teacher)).sum(dim=0).mean()


def positives_cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    """Mean cross-entropy of the rows of (..., R, C) logits with the uniform distribution over (R, C) positives."""
    target = positive / positive.sum(dim=-1, keepdim=True)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return -(target * logits.log_softmax(dim=-1, dtype=wide)).sum(dim=-1).mean()


class MSALoss(nn.Module):
    """The weighted terms of `msa_cfg.loss`, from the dict that `MSACLIP` returns in training.

    It has no parameters: what it reads is batch-first and can be gathered across ranks and concatenated over the
    micro-batches of `--accum-freq`. Gradients, averaged over ranks as DistributedDataParallel does it, equal those of
    one process with the whole batch, except with `local_loss` alone, which drops gradients of the global features as
    open_clip's ClipLoss does.

    Args:
        msa_cfg: the model's configuration.
        local_loss: each rank computes only its own rows and columns.
        gather_with_grad: gradients flow through the gather.
        rank: of this process.
        world_size: number of ranks.
        accum_freq: micro-batches an optimizer step; each calls this loss once.
        ragged_texts: token ids may be longer on one rank than on another.
    """

    def __init__(
        self,
        msa_cfg: MSACfg,
        *,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        accum_freq: int = 1,
        ragged_texts: bool = False,
    ) -> None:
        super().__init__()
        self.msa_cfg = msa_cfg
        self.local_loss = local_loss and world_size > 1
        self.gather_with_grad = gather_with_grad
        self.rank = rank
        self.world_size = world_size
        self.gather = Gather(rank=rank, world_size=world_size, local_loss=self.local_loss, with_grad=gather_with_grad)
        self.accum_freq = accum_freq
        self.ragged_texts = ragged_texts

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        text_ids: Tensor | None = None,
        output_dict: bool = False,
        **sides: Tensor,
    ) -> dict[str, Tensor] | Tensor:
        """The weighted terms under `*_loss` keys, or their sum.

        Args:
            image_features: (B, E) normalised.
            text_features: (B, E) normalised.
            logit_scale: factor of the cosines in the contrastive term.
            logit_bias: taken and not used: no row's cross-entropy changes with it.
            text_ids: (B, L) token ids, to find identical captions.
            output_dict: return the dict.
            **sides: the folded sides, under the keys `match_image_*` and `match_text_*` of `MSACLIP.forward`.
        """
        # Every micro-batch's backward adds the whole gradient of the scale (its features' gradients are added once).
        logit_scale = scale_gradient(logit_scale, 1 / self.accum_freq)
        images, texts = self._sides(sides)
        per_image, per_text = self._blocks(image_features, text_features, images, texts, text_ids)
        terms = self._terms(per_image, per_text, logit_scale)
        return terms if output_dict else torch.stack(list(terms.values())).sum()

    def _sides(self, sides: dict[str, Tensor]) -> tuple[ImageSide | None, TextSide | None]:
        if not self.msa_cfg.uses_mscmat:
            return None, None
        missing = [key for key in IMAGE_SIDE_KEYS + TEXT_SIDE_KEYS if key not in sides]
        if missing:
            raise ValueError(f"{missing[0]} is missing; pass on all that MSACLIP returns in training.")
        return ImageSide(*(sides[key] for key in IMAGE_SIDE_KEYS)), TextSide(*(sides[key] for key in TEXT_SIDE_KEYS))

    def _terms(self, per_image: ScoreBlock, per_text: ScoreBlock, logit_scale: Tensor) -> dict[str, Tensor]:
        cfg = self.msa_cfg.loss
        # DistributedDataParallel wants a gradient of every parameter, if only of zeros: a term of weight 0 is left out
        # where another one has its parameters.
        terms = self._global(per_image, per_text, logit_scale)
        if cfg.fused_weight:
            ranking, weight = self.msa_cfg.ranking, cfg.fused_match_weight
            ranking = ranking if weight is None else replace(ranking, match_weight=weight)
            both = fused_term(per_image, logit_scale, ranking) + fused_term(per_text, logit_scale, ranking)
            terms["fused_loss"] = cfg.fused_weight * both / 2
        if self.msa_cfg.uses_mscmat and (cfg.match_weight or not cfg.fused_weight):
            terms["match_loss"] = cfg.match_weight * _match(cfg, per_image, per_text)
        if cfg.consistency_weight:
            terms["consistency_loss"] = cfg.consistency_weight * _consistency(cfg, per_image, per_text)
        return terms

    def _global(self, per_image: ScoreBlock, per_text: ScoreBlock, logit_scale: Tensor) -> dict[str, Tensor]:
        cfg = self.msa_cfg.loss
        if cfg.global_term == "infonce":
            both = contrastive_term(per_image, logit_scale) + contrastive_term(per_text, logit_scale)
            return {"contrastive_loss": cfg.global_weight * both / 2}
        both = triplet_term(per_image, cfg.margin) + triplet_term(per_text, cfg.margin)
        # A sum over the batch: where ranks hold parts of it, their mean must still be the whole sum.
        return {"triplet_loss": cfg.global_weight * both * (self.world_size if self.local_loss else 1)}

    def _blocks(
        self,
        image_features: Tensor,
        text_features: Tensor,
        images: ImageSide | None,
        texts: TextSide | None,
        text_ids: Tensor | None,
    ) -> tuple[ScoreBlock, ScoreBlock]:
        """Scores of images against texts and of texts against images, this rank's rows or all of them."""
        all_image_features = self.gather.features(image_features)
        all_text_features = self.gather.features(text_features)
        own = torch.arange(len(all_text_features), device=all_text_features.device)
        if self.local_loss:
            own = own[self.rank * len(image_features) : (self.rank + 1) * len(image_features)]
        else:
            image_features, text_features = all_image_features, all_text_features
        positive = self._positive(own, len(all_text_features), text_ids)  # in both directions: it is symmetric
        match_per_image, match_per_text = self._match_scores(images, texts)
        return (
            ScoreBlock(self._cosine(image_features, all_text_features), match_per_image, positive, own),
            ScoreBlock(self._cosine(text_features, all_image_features), match_per_text, positive, own),
        )

    def _cosine(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(R, E) and (C, E) -> (R, C), as ClipLoss does it; float32 for the triplet term, a sum of small margins."""
        if self.msa_cfg.loss.global_term == "infonce":
            return rows @ columns.T
        wide = torch.promote_types(rows.dtype, torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            return rows.to(wide) @ columns.to(wide).T

    def _match_scores(
        self, images: ImageSide | None, texts: TextSide | None
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Match scores of images against texts and of texts against images, this rank's rows or all of them.

        A text is twenty times an image, so texts stay where they are: all images come to them, and scores go on.
        """
        if images is None or texts is None:
            return None, None
        all_images = ImageSide(*map(self.gather.exactly, images))
        columns = match_scores(all_images, texts, self.msa_cfg.score)  # (S, all images, own texts)
        if self.local_loss:
            return self.gather.own_rows(columns), columns.transpose(1, 2)
        scores = self.gather.exactly(columns.permute(2, 0, 1)).permute(1, 2, 0)  # (S, all images, all texts)
        return scores, scores.transpose(1, 2)

    def _positive(self, own: Tensor, count: int, text_ids: Tensor | None) -> Tensor:
        """(R, C) right answers to the rows `own` among `count` pairs: the own one and, if that counts, its copies."""
        group = torch.arange(count, device=own.device)
        if text_ids is not None and self.msa_cfg.loss.identical_captions:
            if self.ragged_texts:
                text_ids = self.gather.to_one_length(text_ids)
            group = torch.unique(self.gather.features(text_ids), dim=0, return_inverse=True)[1]
        return group[own, None] == group[None, :]


def _match(cfg: LossCfg, per_image: ScoreBlock, per_text: ScoreBlock) -> Tensor:
    assert per_image.match is not None
    assert per_text.match is not None
    from_images = match_term(per_image.match, per_image.positive)
    if cfg.match_directions == "image_to_text":
        return from_images
    return (from_images + match_term(per_text.match, per_text.positive)) / 2


def _consistency(cfg: LossCfg, per_image: ScoreBlock, per_text: ScoreBlock) -> Tensor:
    assert per_image.match is not None
    assert per_text.match is not None
    temperature = cfg.consistency_temperature
    if cfg.consistency == "released":
        return released_consistency_term(per_text.match, temperature)
    return (consistency_term(per_image.match, temperature) + consistency_term(per_text.match, temperature)) / 2
