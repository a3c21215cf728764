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
from .negatives import caption_similarity
from .pair_weights import Contrast, Elimination, rows_cross_entropy, self_paced_loss


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
    margin: Tensor | float = 0.0
    """Of the triplet terms; (R, C) where it depends on the pair."""
    weight: Tensor | None = None
    """(R, C) factors of the triplets with each column as negative."""

    @property
    def own(self) -> Tensor:
        """(R,) the cosine of each row with its own column."""
        return self.cosine.gather(1, self.pair[:, None]).squeeze(1)


def contrastive_term(block: ScoreBlock, logit_scale: Tensor) -> Tensor:
    """InfoNCE of one direction: cross-entropy over the rows of the scaled cosines, averaged."""
    return positives_cross_entropy(logit_scale * block.cosine, block.positive)


def fused_term(block: ScoreBlock, logit_scale: Tensor, ranking: Ranking) -> Tensor:
    """InfoNCE of one direction on the fused scores, by which retrieval ranks; cosine and match learn to add up."""
    return positives_cross_entropy(fused_scores(block.cosine, block.match, logit_scale, ranking), block.positive)


def triplet_term(block: ScoreBlock) -> Tensor:
    """Hinge on the worst in-batch negative of each row, summed over rows (docs/method.md, section 1.5).

    With one margin for all pairs the worst negative is the hardest one.
    """
    violation = (block.margin - block.own[:, None] + block.cosine).masked_fill(block.positive, -torch.inf)
    worst, column = violation.max(dim=1)
    hinge = worst.clamp(min=0)
    if block.weight is not None:
        hinge = hinge * block.weight.gather(1, column[:, None]).squeeze(1)
    return hinge.sum()


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
    return rows_cross_entropy(logits, positive).mean()


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
        self.elimination = Elimination(msa_cfg.loss, accum_freq)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        text_ids: Tensor | None = None,
        classes: Tensor | None = None,
        output_dict: bool = False,
        **sides: Tensor,
    ) -> dict[str, Tensor] | Tensor:
        """The weighted terms under `*_loss` keys, or their sum.

        Args:
            image_features: (B, E) normalised.
            text_features: (B, E) normalised.
            logit_scale: factor of the cosines in the contrastive term.
            logit_bias: taken and not used: no row's cross-entropy changes with it.
            text_ids: (B, L) token ids, to find identical and similar captions.
            classes: (B,) numbers that are equal where scene classes are.
            output_dict: return the dict.
            **sides: the folded sides, under the keys `match_image_*` and `match_text_*` of `MSACLIP.forward`.
        """
        # Every micro-batch's backward adds the whole gradient of the scale (its features' gradients are added once).
        logit_scale = scale_gradient(logit_scale, 1 / self.accum_freq)
        images, texts = self._sides(sides)
        per_image, per_text = self._blocks(image_features, text_features, images, texts, text_ids, classes)
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
        if cfg.pair_weights == "equal":
            terms = self._global(per_image, per_text, logit_scale)
            if cfg.fused_weight:
                terms["fused_loss"] = self._fused(per_image, per_text, logit_scale)
        else:
            terms = self._weighted(per_image, per_text, logit_scale)
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
        return {"triplet_loss": cfg.global_weight * self._triplets(per_image, per_text)}

    def _triplets(self, per_image: ScoreBlock, per_text: ScoreBlock) -> Tensor:
        # A sum over the batch: where ranks hold parts of it, their mean must still be the whole sum.
        return (triplet_term(per_image) + triplet_term(per_text)) * (self.world_size if self.local_loss else 1)

    def _fused(self, per_image: ScoreBlock, per_text: ScoreBlock, logit_scale: Tensor) -> Tensor:
        cfg, ranking = self.msa_cfg.loss, self._trained_ranking()
        if cfg.fused_term == "triplet" or cfg.fused_scaled:
            per_image, per_text = (
                block._replace(cosine=fused_scores(block.cosine, block.match, logit_scale, ranking))
                for block in (per_image, per_text)
            )
        if cfg.fused_term == "triplet":
            return cfg.fused_weight * self._triplets(per_image, per_text)
        if cfg.fused_scaled:
            both = contrastive_term(per_image, logit_scale) + contrastive_term(per_text, logit_scale)
        else:
            both = fused_term(per_image, logit_scale, ranking) + fused_term(per_text, logit_scale, ranking)
        return cfg.fused_weight * both / 2

    def _trained_ranking(self) -> Ranking:
        ranking, weight = self.msa_cfg.ranking, self.msa_cfg.loss.fused_match_weight
        return ranking if weight is None else replace(ranking, match_weight=weight)

    def _weighted(self, per_image: ScoreBlock, per_text: ScoreBlock, logit_scale: Tensor) -> dict[str, Tensor]:
        """The InfoNCE terms with a weight of each pair, by its loss or its similarity."""
        cfg, ranking = self.msa_cfg.loss, self._trained_ranking()
        contrasts = {}
        if cfg.global_term == "infonce":
            cosines = logit_scale * per_image.cosine, logit_scale * per_text.cosine
            contrasts["contrastive_loss"] = Contrast(cfg.global_weight, *cosines)
        if cfg.fused_weight:
            factor = logit_scale if cfg.fused_scaled else 1.0
            fused = [
                factor * fused_scores(block.cosine, block.match, logit_scale, ranking)
                for block in (per_image, per_text)
            ]
            contrasts["fused_loss"] = Contrast(cfg.fused_weight, *fused)
        positive, pair = per_image.positive, per_image.pair
        if cfg.pair_weights == "self_paced":
            return {"paced_loss": self_paced_loss(list(contrasts.values()), positive, pair, logit_scale.detach(), cfg)}
        kept = self.elimination.weights(list(contrasts.values())[-1], pair, logit_scale.detach(), self.gather)
        return {key: contrast.weight * (contrast.rows(positive) * kept).mean() for key, contrast in contrasts.items()}

    def _blocks(
        self,
        image_features: Tensor,
        text_features: Tensor,
        images: ImageSide | None,
        texts: TextSide | None,
        text_ids: Tensor | None,
        classes: Tensor | None = None,
    ) -> tuple[ScoreBlock, ScoreBlock]:
        """Scores of images against texts and of texts against images, this rank's rows or all of them."""
        all_image_features = self.gather.features(image_features)
        all_text_features = self.gather.features(text_features)
        own = torch.arange(len(all_text_features), device=all_text_features.device)
        if self.local_loss:
            own = own[self.rank * len(image_features) : (self.rank + 1) * len(image_features)]
        else:
            image_features, text_features = all_image_features, all_text_features
        # Of pairs, and so the same in both directions.
        positive = self._positive(own, len(all_text_features), text_ids)
        of_pairs = positive, own, self._margin(own, text_ids), self._triplet_weights(own, classes)
        match_per_image, match_per_text = self._match_scores(images, texts)
        return (
            ScoreBlock(self._cosine(image_features, all_text_features), match_per_image, *of_pairs),
            ScoreBlock(self._cosine(text_features, all_image_features), match_per_text, *of_pairs),
        )

    def _margin(self, own: Tensor, text_ids: Tensor | None) -> Tensor | float:
        """The margin of triplets; (R, C) where similar captions have less of it."""
        cfg = self.msa_cfg.loss
        if not cfg.margin_relief:
            return cfg.margin
        if text_ids is None:
            raise ValueError("text_ids is missing; pass on all that MSACLIP returns in training.")
        return cfg.margin * (1 - cfg.margin_relief * caption_similarity(self._all_ids(text_ids))[own])

    def _triplet_weights(self, own: Tensor, classes: Tensor | None) -> Tensor | None:
        """(R, C) factors of triplets with negatives of the own class and of others; None: all alike."""
        cfg = self.msa_cfg.loss
        if not cfg.needs_classes:
            return None
        if classes is None:
            raise ValueError(
                f"msa_cfg.loss.same_class_weight is {cfg.same_class_weight}, and the batch has no classes: train on "
                'shards whose KEY.json has a "class" (`msa-openclip shards build` keeps it), or set it to 1.'
            )
        classes = self.gather.features(classes)
        same = classes[own, None] == classes[None, :]
        return torch.where(same, cfg.same_class_weight, 1.0)

    def _all_ids(self, text_ids: Tensor) -> Tensor:
        """Token ids of all ranks."""
        return self.gather.features(self.gather.to_one_length(text_ids) if self.ragged_texts else text_ids)

    def _cosine(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(R, E) and (C, E) -> (R, C), as ClipLoss does it; float32 for triplet terms, sums of small margins."""
        if self.msa_cfg.loss.global_term == self.msa_cfg.loss.fused_term == "infonce":
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
            group = torch.unique(self._all_ids(text_ids), dim=0, return_inverse=True)[1]
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
