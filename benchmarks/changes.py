"""Change pairs: a model of both dates against the same towers on the second date alone, and on pairs in wrong order.

    python benchmarks/changes.py --work out/changes --out docs/results/changes.json

Drawn places at two dates of which one plot of six changes its use, or none does; captions name the change and where it
is.  Both models are trained by open_clip_train.main on the same places, captions and steps, from random weights, and
tested by `msa-openclip eval` on places of another split; the model of pairs also on the same places with their dates
swapped, which is another change.  The last epoch is rated, nothing is chosen on test.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import open_clip
import torch
from machine import cpu_name

from msa_openclip import load, read_shards
from msa_openclip.data.pixels import image_pixels
from msa_openclip.shards.synthetic.changes import NOTHING
from msa_openclip.steps import CLI, TRAIN, run, shard_pattern

TOWERS: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2},
    "custom_text": True,
}
SCALES = [{"stage": 1, "pool": "avg"}, {"stage": 2, "pool": "avg"}]
MODELS = {"pairs": 2, "second-date": 1}
"""Name -> dates of a sample."""
TESTS = {"pairs": ("pairs", "swapped"), "second-date": ("second-date",)}
"""Which places each model is tested on."""
RECALLS = ("i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10", "mR")


def main() -> None:
    """Draw, train, test, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("out/changes"), help="folder for shards and runs (out/changes)"
    )
    parser.add_argument("--out", type=Path, help="write the result here")
    parser.add_argument("--places", type=int, default=3000, help="drawn for training (3000)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the places (12)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    draw(args.work, args.places)
    write_configs(args.work / "configs")
    rows = [row for seed in args.seeds for name in MODELS for row in train_and_test(args.work, name, args.epochs, seed)]
    for row in rows:
        print(row)
    if args.out:
        about = {
            "command": f"benchmarks/changes.py --places {args.places} --epochs {args.epochs} "
            f"--seeds {' '.join(map(str, args.seeds))}",
            "cpu": cpu_name(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        args.out.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")


def draw(work: Path, places: int) -> None:
    """Shards of the same places three times: as pairs, with the dates swapped, and of the second date alone."""
    if (work / "second-date" / "manifest.json").exists():
        return
    counts = ["--train", places, "--val", 0, "--test", 200]
    run(CLI, "shards", "synthesize", work / "drawn", *counts, "--dates", 2, "--size-px", 48, "--quiet")
    drawn = json.loads((work / "drawn/captions.json").read_text())
    for name in ("pairs", "swapped", "second-date"):
        path = work / "drawn" / f"{name}.json"
        path.write_text(json.dumps({**drawn, "images": [arranged(row, name) for row in drawn["images"]]}))
        run(CLI, "shards", "build", path, work / name, "--quiet")


def arranged(row: dict[str, Any], name: str) -> dict[str, Any]:
    """The row of a place in the caption file, with the images that `name` asks for."""
    files, rest = row["filenames"], {key: row[key] for key in ("split", "class", "sentences")}
    if name == "second-date":
        return {"filename": files[1], **rest}
    return {"filenames": files[::-1] if name == "swapped" else files, **rest}


def write_configs(folder: Path) -> None:
    """The models changes-1 and changes-2, known to open_clip here and in what is run: alike but for their dates."""
    folder.mkdir(exist_ok=True)
    for dates in MODELS.values():
        content = {**TOWERS, "msa_cfg": {"image_scales": SCALES, "heads": 4, "dates": dates}}
        (folder / f"changes-{dates}.json").write_text(json.dumps(content))
    os.environ["MSA_OPENCLIP_CONFIGS"] = str(folder)
    open_clip.add_model_config(folder)


def train_and_test(work: Path, name: str, epochs: int, seed: int) -> list[dict[str, Any]]:
    """A row for each set of places that the model is tested on."""
    model, folder = f"changes-{MODELS[name]}", f"{name}-{seed}"
    checkpoint = work / "logs" / folder / "checkpoints" / f"epoch_{epochs}.pt"
    if not checkpoint.exists():
        run(
            TRAIN, "--model", model, "--train-data", shard_pattern(work / name, "train"),
            "--dataset-type", "webdataset",
            "--batch-size", 64, "--workers", 0, "--lr", 3e-3, "--wd", 0.1, "--warmup", 20, "--epochs", epochs,
            "--save-frequency", epochs, "--aug-cfg", "scale=(1.0,1.0)", "--seed", seed, "--device", "cpu",
            "--precision", "fp32", "--log-every-n-steps", 1000, "--logs", work / "logs", "--name", folder,
        )  # fmt: skip
    rows = []
    for test in TESTS[name]:
        path = work / f"{folder}-{test}.json"
        run(CLI, "eval", f"{model}={checkpoint}", "--shards", shard_pattern(work / test, "test"), "--bootstrap", 0,
            "--workers", 0, "--json", path)  # fmt: skip
        rows.append({"model": name, "tested_on": test, "seed": seed, **recalls(path)})
    if MODELS[name] > 1:
        rows[0]["order_told"] = order_told(f"{model}={checkpoint}", work)
    return rows


def recalls(path: Path) -> dict[str, float]:
    """Of the fused ranking, in percent, and the median rank of the right place of a caption."""
    (result,) = json.loads(path.read_text())["models"]
    found = result["metrics"]["fused"]
    return {key: round(found[key], 2) for key in (*RECALLS, "t2i_median_rank")}


def order_told(spec: str, work: Path) -> float:
    """Percent of changes whose caption scores higher with its place than with that place swapped; by chance 50."""
    model, scores = load(spec), []
    for name in ("pairs", "swapped"):
        places = sorted(read_shards(shard_pattern(work / name, "test")), key=lambda place: place.image_id)
        places = [place for place in places if place.label != NOTHING]
        texts = model.scorer.texts(model.tokenizer([place.captions[0] for place in places]))
        images = model.scorer.images(torch.stack([image_pixels(place, model.preprocess) for place in places]))
        scores.append(model.scorer.scores(images, texts)[model.scorer.rankings.index("fused")].diagonal())
    return round(100 * (scores[0] > scores[1]).float().mean().item(), 1)


if __name__ == "__main__":
    main()
