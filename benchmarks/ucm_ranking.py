"""What other rankings of the same trained models are worth on UCM-Captions: calibrated fusion, reverse retrieval.

    python benchmarks/ucm_ranking.py out/ucm --only clip default --out docs/results/ucm_ranking.json

Reads the runs that `ucm_accuracy.py run` left in out/ucm (their best checkpoints and its shards) and trains nothing.

- calibrated: the weight of the match scores in the fused score, chosen on val; 1 is what the model ranks by.
- reverse, train: a candidate loses what it scores against everything: the log-sum-exp of its scores with the queries of
  a bank, here all training captions (for images) and all training images (for captions), as QB-Norm does it; share
  chosen on val.
- reverse, test: the same with the other test queries as bank.  That is how papers re-rank by reverse retrieval, and no
  search can do it: a user's query comes alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from ucm_accuracy import mean_sd, rate

from msa_openclip.config import Ranking
from msa_openclip.data.readers import read_shards
from msa_openclip.distributed import Peers
from msa_openclip.evaluation.eval_set import EvalSet
from msa_openclip.evaluation.evaluate import TIE, encode_images
from msa_openclip.evaluation.loading import LoadedModel, load
from msa_openclip.evaluation.options import EvalOptions
from msa_openclip.evaluation.rank_counter import retrieval
from msa_openclip.model.mscmat import fused_scores
from msa_openclip.steps import shard_pattern

MATCH_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
REVERSE_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


class Encoded:
    """The images and distinct captions of one split, encoded by one model."""

    def __init__(self, model: LoadedModel, data: EvalSet) -> None:
        self.scorer, self.truth = model.scorer, data.per_caption
        self.images = encode_images(model.scorer, data, model.preprocess, EvalOptions(), Peers())
        self.texts = model.scorer.texts(model.tokenizer(list(data.texts)))


class Scores:
    """Cosines (I, C) and, with MSCMAT, match scores of the images of one split with the texts of another."""

    def __init__(self, images: Encoded, texts: Encoded) -> None:
        model, scorer = images.scorer.model, images.scorer
        found = dict(zip(scorer.rankings, scorer.scores(images.images, texts.texts), strict=True))
        self.cosine, self.match = found["global"], found["match"][None] if "match" in found else None
        self.logit_scale = model.logit_scale.exp().detach()
        self.ranking = model.msa_cfg.ranking if scorer.has_match else Ranking()

    def fused(self, match_weight: float) -> Tensor:
        """(I, C) fused scores with another weight of the match part."""
        ranking = replace(self.ranking, match_weight=match_weight)
        return fused_scores(self.cosine, self.match, self.logit_scale, ranking)


class Split:
    """Scores of val or test, with itself and with the banks."""

    def __init__(self, split: Encoded, train: Encoded) -> None:
        self.truth = split.truth
        self.own = Scores(split, split)
        self.bank_texts = Scores(split, train)
        self.bank_images = Scores(train, split)

    def recall(self, match_weight: float = 1.0, share: float = 0.0, bank: str = "train") -> float:
        """mR where each candidate loses `share` of what it scores with the bank."""
        own = self.own.fused(match_weight)
        banks = (self.own, self.own) if bank == "test" else (self.bank_texts, self.bank_images)
        with_texts, with_images = (scores.fused(match_weight) for scores in banks)
        for_texts = own - share * with_texts.logsumexp(dim=1, keepdim=True)  # candidates are images
        for_images = own - share * with_images.logsumexp(dim=0, keepdim=True)  # candidates are captions
        both = []
        for direction, matrix in (("i2t", for_images), ("t2i", for_texts)):
            found = retrieval(matrix, self.truth, tolerance=TIE * float(matrix.abs().max())).summary()
            both += [found[f"{direction}_R@{k}"] for k in (1, 5, 10)]
        return statistics.fmean(both)


def best(values: tuple[float, ...], recall: Callable[[float], float]) -> float:
    """The value with the highest recall, the first of equals."""
    return max(values, key=recall)


def row(folder: Path, found: dict[str, Any], splits: dict[str, EvalSet]) -> dict[str, Any]:
    """The rankings of the best checkpoint of a run, of which ucm_accuracy.py found what is in its row.json."""
    model = load(f"ucm-{found['variant']}={folder}/checkpoints/epoch_{found['epoch']}.pt")
    encoded = {name: Encoded(model, data) for name, data in splits.items()}
    val, test = (Split(encoded[name], encoded["train"]) for name in ("val", "test"))
    has_match = test.own.match is not None
    weight = best(MATCH_WEIGHTS, lambda value: val.recall(value)) if has_match else 1.0
    shares = {
        bank: best(REVERSE_SHARES, lambda value, bank=bank: val.recall(1.0, value, bank))  # type: ignore[misc]
        for bank in ("train", "test")
    }
    return {
        "variant": found["variant"], "seed": found["seed"], "lr": found["lr"], "epoch": found["epoch"],
        "match_weight": weight, "reverse_share": shares,
        "mR": {
            "as trained": test.recall(),
            **({"calibrated": test.recall(weight)} if has_match else {}),
            **{f"reverse, {bank}": test.recall(1.0, share, bank) for bank, share in shares.items()},
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the --out of ucm_accuracy.py")
    parser.add_argument("--only", nargs="+", default=["clip", "default"], help="variants (default: clip default)")
    parser.add_argument("--out", type=Path, help="JSON of what was found")
    options = parser.parse_args()

    import open_clip

    open_clip.add_model_config(options.study / "configs")
    chosen = json.loads((options.study / "results.json").read_text())["chosen_lr"]
    splits = {
        name: EvalSet(read_shards(shard_pattern(options.study / "shards", name)), name)
        for name in ("train", "val", "test")
    }
    rows = []
    for path in sorted(options.study.glob("logs/*/row.json")):
        found = json.loads(path.read_text())
        if found["variant"] in options.only and found["lr"] == rate(chosen, found["variant"]):
            rows.append(row(path.parent, found, splits))
            print(json.dumps(rows[-1]))
    for variant in options.only:
        runs = [found["mR"] for found in rows if found["variant"] == variant]
        for name in runs[0] if runs else ():
            print(f"{variant}, {name}: {mean_sd([run[name] for run in runs])}")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
