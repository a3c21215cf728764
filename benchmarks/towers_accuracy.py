"""Through the towers: EfficientNet-Lite0 (its last groups learning) and MiniLM (frozen) on RSICD and UCM-Captions.

    python benchmarks/towers_accuracy.py run --rsicd RSICD --ucm UCM --image-weights LITE0.pth --text-weights MINILM \
        --out out/towers
    python benchmarks/towers_accuracy.py report out/towers/results.jsonl

RSICD and UCM are folders with dataset_NAME.json (Karpathy's format) and images/; LITE0.pth is a state dict of timm's
tf_efficientnet_lite0, MINILM a Hugging Face folder of all-MiniLM-L6-v2.

Every run is `python -m open_clip_train.main` from the same pretrained towers with the same augmentation, dropout,
batches and epochs.  `clip` is plain CLIP: the features of both towers and InfoNCE, nothing else.  It is written as an
`msa_cfg`, because `--lock-image-freeze-bn-stats` takes the activations out of this backbone in open_clip 3.3's own
model, which then learns nothing.  `clip-mlp` is the same with open_clip's MLP as image head.

A model passes through `--phases`: `heads` trains what stands above locked towers, on features of six augmented views;
`tuned` goes on from there through the towers; `direct` goes through the towers with heads that are still random.

No epoch is chosen: the last one counts.  Of several learning rates (`--lrs`) the report takes the best on val by the
first seed, for each model and set.  Models trained on RSICD are ranked on UCM too, which they have not seen; on UCM
the captions that stand in its train part are left out ("unseen").  Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import torch
from heads_report import Row, difference
from ucm_accuracy import mean_sd

from msa_openclip.evaluation.scorer import main_ranking
from msa_openclip.shards import manifest
from msa_openclip.steps import CLI, TRAIN, shard_pattern, typed

CONFIGS = Path(__file__).parent.parent / "model_configs"
MODEL = "MSA-EfficientNetLite0-MiniLM"
IMAGENET = ("--image-mean", "0.485", "0.456", "0.406", "--image-std", "0.229", "0.224", "0.225")
LOCKED_TEXT = ("--lock-text", "--lock-text-freeze-layer-norm")
LOCKS = {
    "heads": ("--lock-image", *LOCKED_TEXT),
    "tuned": ("--lock-image", "--lock-image-unlocked-groups", "3", "--lock-image-freeze-bn-stats", *LOCKED_TEXT),
}
LOCKS["direct"] = LOCKS["tuned"]
AUGMENTATION = ("--aug-cfg", "dihedral=True", "scale=(0.5,1.0)")
VIEWS = 6
HEADS = {"rsicd": {"epochs": 16, "batch_size": 256}, "ucm": {"epochs": 30, "batch_size": 128}}
"""Length of the phase `heads`, as in heads.md."""
RANKINGS = ("global", "match", "fused")
TOWER_ALONE: dict[str, Any] = {  # the scales stay: one set of features serves all variants
    "fusion": "tower",
    "fusion_hidden": None,
    "scale_inputs": {"norm": "none", "dropout": 0.0},
    "loss": {"fused_weight": 0.0, "match_weight": 0.0, "identical_captions": False},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {"msa_cfg": TOWER_ALONE},
    "clip-mlp": {"msa_cfg": TOWER_ALONE, "vision_cfg": {"timm_proj": "mlp"}},
    "shipped": {},
    "shipped-without-mscmat": {"msa_cfg": {"loss": {"fused_weight": 0.0, "match_weight": 0.0}}},
    # MSCMAT by the fused term alone, by the match term alone, with another form of its score
    "residual-match": {"msa_cfg": {"loss": {"match_weight": 0.0, "global_weight": 0.3}}},
    "match-term": {"msa_cfg": {"loss": {"fused_weight": 0.0}}},
    "gram": {
        "msa_cfg": {
            "width": 64,
            "score": {"form": "gram"},
            "loss": {"fused_match_weight": None, "fused_scaled": True, "match_weight": 0.0},
            "ranking": {"global_weight": 0.6, "match_weight": 0.4},
        }
    },
    "linear-scales": {  # what `msa_cfg` does when it names the scales alone
        "msa_cfg": {
            "image_scales": [{"stage": stage, "pool": "max" if stage < 4 else "avg"} for stage in (1, 2, 3, 4)],
            "scale_inputs": {"norm": "none", "dropout": 0.0},
            "fusion_hidden": None,
            "loss": {"global_weight": 0.3, "fused_match_weight": None, "match_weight": 0.0},
            "ranking": {"match_weight": 1.0},
        }
    },
}
"""Changes of the shipped configuration, object by object."""
PROTOCOLS = {
    "RSICD val": ("rsicd", "val"),
    "RSICD → UCM test": ("rsicd", "ucm_test"),
    "RSICD → UCM val": ("rsicd", "ucm_val"),
    "UCM test": ("ucm", "ucm_test"),
    "UCM test, unseen": ("ucm", "ucm_test_unseen"),
    "UCM val, unseen": ("ucm", "ucm_val_unseen"),
}
"""By name, the set trained on and the key of a row."""
PAIRS: list[tuple[Row, Row]] = [
    *(((name, "fused"), ("clip", "global")) for name in ("shipped", "linear-scales")),
    *(((name, "global"), ("clip", "global")) for name in ("clip-mlp", "shipped", "shipped-without-mscmat")),
    *(((name, "fused"), (name, "global")) for name in ("shipped", "linear-scales")),
    (("shipped", "fused"), ("clip-mlp", "global")),
    (("shipped", "fused"), ("linear-scales", "fused")),
    (("shipped", "fused"), ("shipped-without-mscmat", "global")),
]
"""Compared within each phase."""


class Study:
    """Shards, configurations, starting weights and runs below one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out.resolve()
        self.configs = self.out / "configs"
        self.results = self.out / "results.jsonl"

    def prepare(self) -> None:
        """Shards of both sets and a model configuration for each variant."""
        self.configs.mkdir(parents=True, exist_ok=True)
        for name in ("rsicd", "ucm"):
            folder, shards = Path(getattr(self.options, name)), self.out / name
            if not (shards / "manifest.json").exists():
                small = ("--resize-px", 150, "--resize-mode", "squash", "--shards", 4, "--quiet")
                source = folder / f"dataset_{name}.json"
                self.command(CLI, "shards", "build", source, shards, "--images", folder / "images", *small)
        for variant in self.options.only:
            self.configure(variant)

    def configure(self, variant: str) -> None:
        """Make lite0-VARIANT known to open_clip."""
        shipped = json.loads((CONFIGS / f"{MODEL}.json").read_text())
        shipped["vision_cfg"]["image_size"] = self.options.size
        for key in ("hf_model_name", "hf_tokenizer_name"):
            shipped["text_cfg"][key] = str(self.options.text_weights)
        config = merged(shipped, VARIANTS[variant])
        (self.configs / f"lite0-{variant}.json").write_text(json.dumps(config, indent=2))
        open_clip.add_model_config(self.configs)

    def start(self, variant: str, seed: int) -> Path:
        """A checkpoint of pretrained towers and new heads, drawn by the seed."""
        path = self.out / "starts" / f"{variant}-{seed}.pt"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            torch.manual_seed(seed)
            model: Any = open_clip.create_model(f"lite0-{variant}", pretrained_hf=True)
            # In order: names of published files differ, order and shapes do not; the classifier, their end, stays out.
            values = torch.load(self.options.image_weights, weights_only=True).values()
            model.visual.trunk.load_state_dict(dict(zip(model.visual.trunk.state_dict(), values, strict=False)))
            torch.save(model.state_dict(), path)
        return path

    def features(self, data: str) -> Path:
        """Outputs of the locked towers on a set's training images, the same for all variants."""
        folder, variant = self.out / "features" / data, next(iter(VARIANTS))
        if (folder / "sizes.json").exists():
            return folder
        self.configure(variant)
        self.command(
            CLI, "features", f"lite0-{variant}={self.start(variant, 0)}", folder, "--views", VIEWS, *AUGMENTATION,
            "--shards", shard_pattern(self.out / data, "train"), *IMAGENET, "--workers", 0,
        )  # fmt: skip
        return folder

    def row(self, phase: str, data: str, variant: str, lr: float, seed: int) -> Path:
        """Train and rank one model, unless that was done; returns its checkpoint."""
        about: dict[str, Any] = {
            "phase": phase, "size": self.options.size, "data": data, "variant": variant, "lr": lr, "seed": seed,
            "epochs": self.epochs(phase, data),
        }  # fmt: skip
        name = "-".join(map(str, about.values()))
        checkpoint = self.out / "logs" / name / "checkpoints" / "epoch_latest.pt"
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        known = any(about.items() <= json.loads(line).items() for line in lines)
        if known and (phase != "heads" or checkpoint.exists()):
            return checkpoint
        self.train(name, phase, data, variant, lr, seed)
        lines = checkpoint.with_name("results.jsonl").read_text().splitlines()
        row = about | {"val": validated(json.loads(lines[-1]))} | self.ranked(checkpoint, variant)
        with self.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if phase != "heads":  # from which the next phase starts
            checkpoint.unlink()
        return checkpoint

    def epochs(self, phase: str, data: str) -> int:
        """How long a phase is."""
        return HEADS[data]["epochs"] if phase == "heads" else int(self.options.epochs[data])

    def train(self, name: str, phase: str, data: str, variant: str, lr: float, seed: int) -> None:
        """One phase of one model."""
        on_features, epochs = phase == "heads", self.epochs(phase, data)
        shards = self.features(data) if on_features else self.out / data
        start = (
            self.row("heads", data, variant, self.options.heads_lr, seed)
            if phase == "tuned"
            else self.start(variant, seed)
        )
        batch = HEADS[data]["batch_size"] if on_features else 128
        samples = manifest.read(str(self.out / data))["splits"]["train"]["samples"]
        self.command(
            TRAIN, "--model", f"lite0-{variant}", "--pretrained", start, *IMAGENET, *LOCKS[phase],
            "--device", "cpu", "--precision", "fp32" if on_features else self.options.precision,
            "--dataset-type", "webdataset",
            "--train-data", shards / Path(shard_pattern(self.out / data, "train")).name,
            "--val-data", shard_pattern(self.out / data, "val"), *([] if on_features else AUGMENTATION),
            "--workers", 0 if on_features else 1, "--batch-size", batch, "--epochs", epochs, "--lr", lr, "--wd", 0.1,
            "--warmup", epochs * samples // batch // 10, "--seed", seed, "--save-most-recent", "--save-frequency", 0,
            "--val-frequency", epochs, "--log-every-n-steps", 20, "--logs", self.out / "logs", "--name", name,
        )  # fmt: skip

    def ranked(self, checkpoint: Path, variant: str) -> dict[str, dict[str, float]]:
        """mR on UCM's val and test parts: of all captions, and of those that do not stand in UCM's train part."""
        found = {}
        for split in ("val", "test"):
            answer = checkpoint.with_name(f"{split}.json")
            self.command(
                CLI, "eval", f"lite0-{variant}={checkpoint}", "--shards", shard_pattern(self.out / "ucm", split),
                "--workers", 0, "--train-captions", self.options.ucm / "dataset_ucm.json", "--json", answer,
            )  # fmt: skip
            (model,) = json.loads(answer.read_text())["models"]
            found[f"ucm_{split}"] = mean_recalls(model["metrics"])
            found[f"ucm_{split}_unseen"] = mean_recalls(model["metrics_by_part"]["unseen captions"])
        return found

    def command(self, module: str, *arguments: object) -> None:
        """Print and run `python -m module arguments`."""
        line = typed(module, *arguments)
        print(f"$ {line}", flush=True)
        environment = os.environ | {
            "MSA_OPENCLIP_CONFIGS": str(self.configs), "OMP_NUM_THREADS": str(self.options.threads),
        }  # fmt: skip
        with (self.out / "commands.log").open("a") as log:
            subprocess.run(
                [sys.executable, "-m", module, *map(str, arguments)],
                env=environment,
                check=True,
                stdout=log,
                stderr=log,
            )


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `config`, object by object."""
    result = dict(config)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def validated(metrics: dict[str, float]) -> dict[str, float]:
    """mR of each ranking in a line of results.jsonl."""
    named = {ranking: f"retrieval_{ranking}_mR" for ranking in RANKINGS}
    return {ranking: metrics[name] for ranking, name in named.items() if name in metrics}


def mean_recalls(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """mR of each ranking in what `eval --json` writes."""
    return {ranking: metrics[ranking]["mR"] for ranking in RANKINGS if ranking in metrics}


Recalls = dict[tuple[str, str], dict[str, dict[int, float]]]
"""mR by variant and ranking, protocol and seed."""


def read(rows: list[dict[str, Any]]) -> Recalls:
    """mR of the runs with the rate that val chose for their variant and set."""
    recalls: Recalls = {}
    for row in (row for row in rows if row["lr"] == chosen_rate(rows, row["data"], row["variant"])):
        for protocol, (data, key) in PROTOCOLS.items():
            for ranking, value in row[key].items() if row["data"] == data else ():
                recalls.setdefault((row["variant"], ranking), {}).setdefault(protocol, {})[row["seed"]] = value
    return recalls


def chosen_rate(rows: list[dict[str, Any]], data: str, variant: str) -> float:
    """The rate that is best on val with the first seed, by what the model ranks by."""
    own = [row for row in rows if (row["data"], row["variant"]) == (data, variant)]
    first = min(row["seed"] for row in own)
    best = max((row for row in own if row["seed"] == first), key=lambda row: row["val"][main_ranking(row["val"])])
    return float(best["lr"])


def report(path: Path) -> None:
    """Of each phase and size of images means over seeds, then differences by seed, as Markdown."""
    every = [json.loads(line) for line in path.read_text().splitlines()]
    head = "| " + " | ".join(PROTOCOLS) + " |\n" + "| --- " * (len(PROTOCOLS) + 1) + "|"
    for phase, size in sorted({(row["phase"], row["size"]) for row in every}):
        recalls = read([row for row in every if (row["phase"], row["size"]) == (phase, size)])
        print(f"\n{phase}, {size} px\n\n| variant, ranking {head}")
        for row, by_protocol in recalls.items():
            cells = [by_protocol.get(protocol, {}) for protocol in PROTOCOLS]
            shown = [f"{mean_sd(list(cell.values()))} ({len(cell)})" if cell else "" for cell in cells]
            print(f"| {', '.join(row)} | " + " | ".join(shown) + " |")
        print(f"\n| difference {head}")
        for one, other in PAIRS:
            if one in recalls and other in recalls:
                cells = [(recalls[one].get(p, {}), recalls[other].get(p, {})) for p in PROTOCOLS]
                shown = [difference(*pair) if pair[0].keys() & pair[1].keys() else "" for pair in cells]
                print(f"| {', '.join(one)} − {', '.join(other)} | " + " | ".join(shown) + " |")


def main() -> None:
    options = parse_arguments()
    if options.command == "report":
        report(options.results)
        return
    options.epochs = {"rsicd": options.rsicd_epochs, "ucm": options.ucm_epochs}
    study = Study(options)
    study.prepare()
    for data in options.data:
        for seed in options.seeds:
            for variant in options.only:
                for phase in options.phases:
                    for lr in [options.heads_lr] if phase == "heads" else options.lrs:
                        study.row(phase, data, variant, lr, seed)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and rank what is not there yet")
    for name in ("rsicd", "ucm", "image-weights", "text-weights", "out"):
        run.add_argument(f"--{name}", type=Path, required=True)
    run.add_argument("--data", nargs="+", default=["rsicd", "ucm"], choices=("rsicd", "ucm"))
    run.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    run.add_argument("--phases", nargs="+", choices=LOCKS, default=["heads", "tuned"], metavar="PHASE")
    run.add_argument("--lrs", type=float, nargs="+", default=[1e-3], help="of the phases through the towers")
    run.add_argument("--heads-lr", type=float, default=1e-3)
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--size", type=int, default=160, help="pixels")
    run.add_argument("--rsicd-epochs", type=int, default=4)
    run.add_argument("--ucm-epochs", type=int, default=8)
    run.add_argument("--precision", default="amp_bf16", help="fp32 where the processor has no bf16 units")
    run.add_argument("--threads", type=int, default=1)
    shown = commands.add_parser("report", help="tables of a results.jsonl")
    shown.add_argument("results", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
