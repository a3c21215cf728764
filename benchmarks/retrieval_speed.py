"""Time of exhaustive ranking after the towers, and of building an index beside the tower alone.

    python benchmarks/retrieval_speed.py ranking --out docs/results/retrieval_ranking.json
    python benchmarks/retrieval_speed.py index --shards 'ucm/test-{000000..000003}.tar' \\
        --out docs/results/retrieval_index.json

`ranking` is everything after the towers for a test set of RSICD's size: fold, scores of every pair by every ranking,
ranks both ways in both protocols.  Weights are random, which does not change the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
from retrieval_common import write_result

from msa_openclip.data.captioned import CaptionedImage
from msa_openclip.data.pixels import batches, load_image
from msa_openclip.data.readers import read_shards
from msa_openclip.evaluation import evaluate as evaluation
from msa_openclip.evaluation.eval_set import EvalSet
from msa_openclip.evaluation.evaluate import evaluate
from msa_openclip.evaluation.loading import LoadedModel, load
from msa_openclip.evaluation.options import EvalOptions
from msa_openclip.evaluation.scorer import EncodedImages, EncodedTexts, Scorer
from msa_openclip.pair_scores.formula import TextSide
from msa_openclip.search.build import build_index
from msa_openclip.shards.records import Location

CAPTION_TOKENS = 16


class AfterTowers(Scorer):
    """Random vectors in the place of what the towers give."""

    def images(self, pixels: torch.Tensor) -> EncodedImages:
        mscmat = self.model.mscmat
        feature = F.normalize(torch.randn(len(pixels), self.model.text.output_dim), dim=-1)
        with torch.inference_mode():
            return self.fold(feature, torch.randn(len(pixels), self.scales, mscmat.ln_image.normalized_shape[0]))

    def texts(self, ids: torch.Tensor) -> EncodedTexts:
        mscmat = self.model.mscmat
        width = mscmat.ln_text.normalized_shape[0]
        feature = F.normalize(torch.randn(len(ids), self.model.text.output_dim), dim=-1)
        mask = torch.ones(len(ids), CAPTION_TOKENS, dtype=torch.bool)
        with torch.inference_mode():
            side = mscmat.fold_text(torch.randn(len(ids), CAPTION_TOKENS, width), mask, feature)
            return EncodedTexts(feature, TextSide(*side))


def ranking(model: LoadedModel, images: int, captions: int, rounds: int, memory_mb: int) -> dict[str, object]:
    """Seconds to rank `images` x `captions` both ways."""
    scorer, options = AfterTowers(model.scorer.model), EvalOptions(memory_mb=memory_mb)
    evaluation.batches = lambda images, preprocess, spans, workers: (torch.zeros(len(span), 1) for span in spans)

    def no_tokens(texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), 1)

    def run(data: EvalSet) -> tuple[float, float]:
        start, cpu_start = time.perf_counter(), time.process_time()
        evaluate(scorer, data, model.preprocess, no_tokens, options)
        return time.perf_counter() - start, time.process_time() - cpu_start

    run(synthetic(100, 200))  # warms up
    data = synthetic(images, captions)
    seconds, cpu_seconds = zip(*(run(data) for _ in range(rounds)), strict=True)
    return {
        "images": images,
        "captions": captions,
        "memory_mb": memory_mb,
        "rankings": len(scorer.rankings),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "median_s": statistics.median(seconds),
    }


def synthetic(images: int, captions: int) -> EvalSet:
    """Images nowhere, with captions that all differ."""
    numbers = range(captions // images)
    return EvalSet(
        [CaptionedImage(str(i), Location("nowhere"), tuple(f"{i} {n}" for n in numbers)) for i in range(images)],
        "synthetic",
    )


def building(model: LoadedModel, shards: str, batch_size: int, rounds: int) -> dict[str, object]:
    """Images a second of an index build from shards, and of the image tower alone on pixels that are there."""
    images = read_shards(shards)
    (pixels,) = batches(images, model.preprocess, [range(batch_size)])
    whole, alone = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            build_index(model, images, folder, batch_size=batch_size)
            whole.append(len(images) / (time.perf_counter() - start))
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(len(images) // batch_size):
                model.scorer.model.encode_image(pixels)
        alone.append(len(images) // batch_size * batch_size / (time.perf_counter() - start))
    return {
        "images": len(images),
        "size_px": load_image(images[0]).size,
        "batch_size": batch_size,
        "index_images_per_s": whole,
        "tower_images_per_s": alone,
        "share": statistics.median(whole) / statistics.median(alone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ranking", "index"))
    parser.add_argument("--model", default="MSA-ViT-B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=1093)
    parser.add_argument("--captions", type=int, default=5465)
    parser.add_argument("--memory-mb", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", help="what `index` indexes")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", required=True)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    model = load(f"{parsed.model}=untrained")
    if parsed.what == "ranking":
        row = ranking(model, parsed.images, parsed.captions, parsed.rounds, parsed.memory_mb)
    else:
        row = building(model, parsed.shards, parsed.batch_size, parsed.rounds)
    print(json.dumps(row))
    write_result(parsed.out, [row], model=parsed.model)


if __name__ == "__main__":
    main()
