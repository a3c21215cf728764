"""Heads over frozen towers: what plain CLIP, the scales' global feature and MSCMAT are worth, in-domain and beyond.

    python benchmarks/heads_study.py CACHE out/heads.jsonl --seeds 0 1 2 --on rsicd ucm unseen --only clip-views

CACHE is what heads_cache.py wrote.  Appends one JSON line a run: setting, seed, mR by protocol and ranking, command.

Protocols, by what heads are trained on (mR in percent; every image with its captions; ties in expectation):

- rsicd: on RSICD's train -> (a) RSICD's val; (c) all images of UCM, in ten galleries of 210 images, averaged.
- ucm: on UCM's train -> (b) UCM's test and val without the captions that occur in UCM's train, which leave queries
  *and* gallery; images that lose all of theirs stay as distractors; (c) RSICD's val.
- unseen: on RSICD's train without five of 30 classes, drawn by seed -> (d) train and val images of these, one gallery.

Training: AdamW (1e-3, betas 0.9 and 0.98, weight decay 0.1 on matrices), a tenth of the steps linear warm-up, then
cosine; 256 images a batch (UCM: 128, and twice the epochs), one random view and caption of each; bfloat16 autocast.
No epoch is chosen: the last is rated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from heads_cache import HEAD, STAGES, TEXT, batches
from torch import Tensor, nn

from msa_openclip.config import Loss, Ranking, Score
from msa_openclip.config import ScaleInputs as ScaleInputsCfg
from msa_openclip.evaluation.evaluate import TIE
from msa_openclip.evaluation.metrics import GroundTruth
from msa_openclip.evaluation.rank_counter import retrieval
from msa_openclip.model.mscmat import MSCMAT, fused_scores, match_scores
from msa_openclip.model.towers import ScaleInputs, TowerPlusScales
from msa_openclip.pair_scores.formula import ImageSide, TextSide
from msa_openclip.training.loss import ScoreBlock, contrastive_term, fused_term

EMBED, WIDTH, HEADS, HIDDEN, RATE = 512, 256, 4, 1024, 1e-3
MATCH_WEIGHTS = {"fused": 1.0, "fused 0.5": 0.5, "fused 0.25": 0.25}
"""Rankings by fused scores: names and weights of the match scores in them."""
Rows = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One kind of heads and how they are trained."""

    dropout: float = 0.3
    """Of all pooled vectors that learned maps read, and within the MLP."""
    views: int = 6
    """Views of an image that are drawn from; 1: the plain one alone."""
    soft: float = 0.0
    """Temperature at which captions like the own one count as right, by cosine of MiniLM's means; 0: they do not."""
    norm: Literal["none", "layer", "batch"] = "none"
    """Of the pooled vectors, before dropout; without learned parts."""
    scales: bool = False
    """Global feature of the tower plus maps of the scales (fusion `both`), not of the tower alone."""
    pool: Literal["paper", "max_avg"] = "paper"
    """Of the scales: maximum of stages 1 to 3 and average of 4, or both of each."""
    mlp: Literal["none", "head", "tower"] = "none"
    """Residual MLP over the scales and: the (normalised) head vector, which the tower's projection then reads
    normalised too, or the tower's own output, with its projection reading the raw head vector."""
    match: tuple[int, ...] = ()
    """Queries of MSCMAT: stages 1 to 4; 5 is the head vector.  Empty: no MSCMAT."""
    attention: bool = True
    """False: the match score is bilinear in query and global text feature, w_s m_s . t + b_s."""
    epochs: int = 15


def scales(**changes: Any) -> Setting:
    """A global feature of tower and scales, scales normalised over the batch unless told otherwise."""
    return Setting(**{"scales": True, "norm": "batch", **changes})


SETTINGS: dict[str, Setting] = {
    # Plain CLIP.
    "clip": Setting(dropout=0.0, views=1),
    "clip-dropout": Setting(views=1),
    "clip-views": Setting(),
    "clip-soft-0.05": Setting(soft=0.05),
    "clip-soft-0.1": Setting(soft=0.1),
    "clip-norm": Setting(norm="batch"),
    "clip-mlp-head": Setting(norm="batch", mlp="head"),
    "clip-mlp": Setting(mlp="tower"),
    # The global feature of the scales.
    "scales": scales(norm="none"),
    "scales-layer-norm": scales(norm="layer"),
    "scales-norm": scales(),
    "scales-norm-10": scales(epochs=10),
    "scales-mlp-head-paper": scales(mlp="head"),
    "scales-mlp-head": scales(mlp="head", pool="max_avg"),
    "scales-mlp-layer-norm": scales(mlp="tower", pool="max_avg", norm="layer"),
    "scales-mlp": scales(mlp="tower", pool="max_avg"),
    # MSCMAT, trained jointly with a global feature of the scales.
    "match-scales": scales(norm="none", match=(1, 2, 3, 4), epochs=10),
    "match-head": scales(norm="none", match=(5,), epochs=10),
    "match-bilinear": scales(norm="none", match=(1, 2, 3, 4, 5), attention=False, epochs=10),
    "match-mlp-head": scales(mlp="head", pool="max_avg", match=(5,), epochs=12),
    "match-mlp": scales(mlp="tower", pool="max_avg", match=(5,)),
}


class Features:
    """The cache: pooled vectors of images, tokens of captions, and who belongs to whom."""

    def __init__(self, cache: Path) -> None:
        index, text = json.loads((cache / "index.json").read_text()), np.load(cache / "text.npz")
        names, splits, files, self.captions = zip(*index["images"], strict=True)
        self.split = np.array([f"{name}:{split}" for name, split in zip(names, splits, strict=True)])
        self.label = np.array([file.rsplit("_", 1)[0] for file in files])  # RSICD's classes
        self.pool = np.load(cache / "pool.npy", mmap_mode="r")
        self.mean, self.last, self.mask = (torch.from_numpy(text[key]) for key in ("mean", "last", "mask"))

    def rows(self, *splits: str) -> Rows:
        """Images of splits like `ucm:train`, in the order of splits and files."""
        return np.concatenate([np.flatnonzero(self.split == split) for split in splits])

    def pooled(self, rows: Rows, views: Rows | int, pool: str) -> list[Tensor]:
        """Vectors of the four stages (I, C_s) and of the head (I, 1280)."""
        vectors = torch.from_numpy(self.pool[views, rows]).float()
        maxima, averages, head = vectors[:, : 2 * sum(STAGES) + HEAD].split([sum(STAGES), sum(STAGES), HEAD], dim=1)
        high, mean = maxima.split(STAGES, dim=1), averages.split(STAGES, dim=1)
        if pool == "paper":
            return [*high[:3], mean[3], head]
        return [*(torch.cat(pair, dim=1) for pair in zip(high, mean, strict=True)), head]

    def tokens(self, captions: Rows) -> tuple[Tensor, Tensor]:
        """Last hidden states (T, N, 384) without the first token, and their mask (T, N)."""
        mask = self.mask[captions][:, 1:]
        length = max(1, int(mask.sum(dim=1).max()))
        return self.last[captions][:, 1 : length + 1].float(), mask[:, :length]


class Gallery(NamedTuple):
    """Images and distinct captions that are ranked against each other."""

    rows: Rows
    captions: Rows
    truth: GroundTruth


def gallery(features: Features, rows: Rows, without: frozenset[int] = frozenset()) -> Gallery:
    """The images `rows` and their captions but for those in `without`."""
    pairs = sorted((c, i) for i, row in enumerate(rows) for c in features.captions[row] if c not in without)
    captions, column = np.unique([caption for caption, _ in pairs], return_inverse=True)
    images = torch.tensor([image for _, image in pairs])
    return Gallery(rows, captions, GroundTruth.per_caption(images, column=torch.from_numpy(column), images=len(rows)))


def protocol(features: Features, on: str, seed: int) -> tuple[Rows, dict[str, list[Gallery]]]:
    """Training images and what is rated, by name; see the module's text."""
    train, val = features.rows("rsicd:train"), features.rows("rsicd:val")
    if on == "rsicd":
        ucm = np.random.default_rng(7).permutation(features.rows("ucm:train", "ucm:val", "ucm:test"))
        folds = [gallery(features, fold) for fold in batches(ucm, 210)]
        return train, {"a_rsicd_val": [gallery(features, val)], "c_ucm": folds}
    if on == "ucm":
        seen = frozenset(c for row in features.rows("ucm:train") for c in features.captions[row])
        own = {f"b_ucm_{s}": [gallery(features, features.rows(f"ucm:{s}"), seen)] for s in ("test", "val")}
        return features.rows("ucm:train"), {**own, "c_rsicd": [gallery(features, val)]}
    classes = np.unique(features.label[np.concatenate([train, val])])
    unseen = np.random.default_rng(100 + seed).choice(classes, 5, replace=False)
    held_out = np.isin(features.label, unseen)
    rated = np.concatenate([train[held_out[train]], val[held_out[val]]])
    return train[~held_out[train]], {"d_unseen": [gallery(features, rated)]}


class Heads(nn.Module):
    """What is learned over the frozen towers."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        channels = [*(count * (1 + (setting.pool == "max_avg")) for count in STAGES), HEAD]
        self.norm = ScaleInputs(channels, ScaleInputsCfg(norm=setting.norm))  # dropout: drawn for each use
        self.tower, self.text = nn.Linear(HEAD, EMBED, bias=False), nn.Linear(TEXT, EMBED, bias=False)
        scales = channels[:4] if setting.scales else []
        self.fusion = TowerPlusScales(scales, EMBED)
        if setting.mlp != "none":
            self.tower_norm = nn.LayerNorm(EMBED) if setting.mlp == "tower" else nn.Identity()
            first = nn.Linear((EMBED if setting.mlp == "tower" else HEAD) + sum(scales), HIDDEN)
            last = nn.Linear(HIDDEN, EMBED)
            nn.init.zeros_(last.weight)
            self.mlp = nn.Sequential(first, nn.GELU(), nn.Dropout(setting.dropout), last)
        if setting.match:
            self.mscmat = MSCMAT([channels[s - 1] for s in setting.match], TEXT, EMBED, WIDTH, HEADS, Score())
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def image(self, pooled: list[Tensor]) -> tuple[Tensor, ImageSide | None]:
        """Vectors of stages and head -> normalised global features (I, E) and MSCMAT's image side."""
        setting = self.setting
        normed = self.norm(pooled)
        *stages, head = (self._drop(vector) for vector in normed)
        stages = stages if setting.scales else []
        own = self.tower(self._drop(pooled[-1]) if setting.mlp == "tower" else head)
        feature = self.fusion(own, stages)
        if setting.mlp != "none":
            first = own if setting.mlp == "tower" else head
            feature = feature + self.mlp(torch.cat([self.tower_norm(first), *stages], dim=1))
        side = self.mscmat.fold_image([self._drop(normed[s - 1]) for s in setting.match]) if setting.match else None
        return F.normalize(feature.float(), dim=-1), side

    def texts(self, features: Features, captions: Rows) -> tuple[Tensor, TextSide | None]:
        """Captions -> normalised global features (T, E) and MSCMAT's text side."""
        feature = F.normalize(self.text(features.mean[captions]).float(), dim=-1)
        side = self.mscmat.fold_text(*features.tokens(captions), feature) if self.setting.match else None
        return feature, side

    def match(self, images: ImageSide | None, texts: TextSide | None) -> Tensor | None:
        """(S, I, T) match scores."""
        if images is None or texts is None:
            return None
        if self.setting.attention:
            return match_scores(images, texts, Score())
        return images.gate.transpose(0, 1).float() @ texts.feature.float().T + images.bias.float().T[..., None]

    def _drop(self, vector: Tensor) -> Tensor:
        return F.dropout(vector, self.setting.dropout, self.training)


def training_loss(features: Features, heads: Heads, rows: Rows, captions: Rows, views: Rows) -> Tensor:
    """The product's default loss: InfoNCE of the cosine, or 0.3 of it and InfoNCE of the fused score."""
    setting, weights = heads.setting, Loss()
    with torch.autocast("cpu", torch.bfloat16):
        image, image_side = heads.image(features.pooled(rows, views, setting.pool))
        text, text_side = heads.texts(features, captions)
    cosine, match = image @ text.T, heads.match(image_side, text_side)
    positive = (torch.from_numpy(captions)[:, None] == torch.from_numpy(captions)).float()  # also equal captions
    if setting.soft:
        meaning = F.normalize(features.mean[captions], dim=1)
        positive = positive.maximum(((meaning @ meaning.T - 1) / setting.soft).exp())
    scale, pair = heads.logit_scale.exp(), torch.arange(len(rows))
    across = None if match is None else match.mT
    blocks = [ScoreBlock(cosine, match, positive, pair), ScoreBlock(cosine.T, across, positive.T, pair)]
    loss = sum(contrastive_term(block, scale) for block in blocks) / 2
    if match is not None:
        fused = sum(fused_term(block, scale, Ranking()) for block in blocks) / 2
        loss = weights.global_weight * loss + weights.fused_weight * fused
    return loss


def train(features: Features, rows: Rows, setting: Setting, seed: int, on: str) -> Heads:
    """Heads after the last epoch."""
    torch.manual_seed(seed)
    rng, heads = np.random.default_rng(seed), Heads(setting)
    epochs, size = (2 * setting.epochs, 128) if on == "ucm" else (setting.epochs, 256)
    groups = [
        {"params": [p for p in heads.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in heads.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6, fused=True)
    steps = epochs * (len(rows) // size)
    warm = 0.1 * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / warm) if s < warm else (1 + math.cos(math.pi * (s - warm) / (steps - warm))) / 2,
    )
    for batch in batches(
        np.concatenate([rng.permutation(rows)[: steps // epochs * size] for _ in range(epochs)]), size
    ):
        views = rng.integers(setting.views, size=size)
        captions = np.array([rng.choice(features.captions[row]) for row in batch])
        loss = training_loss(features, heads, batch, captions, views)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        heads.logit_scale.data.clamp_(0, math.log(100))
    return heads.eval()


@torch.no_grad()
def rate(features: Features, heads: Heads, data: Gallery) -> dict[str, float]:
    """mR of each ranking of one gallery."""
    with torch.autocast("cpu", torch.bfloat16):
        images = [heads.image(features.pooled(rows, 0, heads.setting.pool)) for rows in batches(data.rows, 256)]
        texts = [heads.texts(features, captions) for captions in batches(data.captions, 256)]
    cosine = torch.cat([image for image, _ in images]) @ torch.cat([text for text, _ in texts]).T
    scores = {"global": cosine}
    if heads.setting.match:
        tiles = [[heads.match(side, other) for _, other in texts] for _, side in images]
        match = torch.cat([torch.cat([t for t in row if t is not None], dim=2) for row in tiles], dim=1)
        scores["match"] = match.mean(dim=0)
        for name, weight in MATCH_WEIGHTS.items():
            scores[name] = fused_scores(cosine, match, heads.logit_scale.exp(), Ranking(match_weight=weight))
    found = {name: retrieval(s, data.truth, tolerance=TIE * float(s.abs().max())) for name, s in scores.items()}
    return {name: ranks.summary()["mR"] for name, ranks in found.items()}


def main() -> None:
    """Train and rate what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, metavar="CACHE")
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--on", nargs="+", choices=("rsicd", "ucm", "unseen"), default=["rsicd"])
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    args = parser.parse_args()
    torch.set_num_threads(1)  # runs are then repeatable
    torch.set_flush_denormal(True)
    features = Features(args.cache)
    for name, on, seed in itertools.product(args.only, args.on, args.seeds):
        rows, rated = protocol(features, on, seed)
        heads = train(features, rows, SETTINGS[name], seed, on)
        recalls = {}
        for key, galleries in rated.items():
            by_gallery = [rate(features, heads, data) for data in galleries]
            recalls[key] = {way: round(statistics.fmean(r[way] for r in by_gallery), 3) for way in by_gallery[0]}
        line = {"setting": name, "on": on, "seed": seed, "mR": recalls, "command": " ".join(sys.argv)}
        with args.results.open("a") as file:
            print(json.dumps(line), file=file)
        print(name, on, seed, json.dumps(recalls), flush=True)


if __name__ == "__main__":
    main()
