"""A model card for the Hugging Face hub, filled in from a run's folder and the report of its test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.run_parameters import MODEL_OPTIONS, RunError, read_parameters
from ..plugin.configs import model_config
from ..shards import manifest
from ..shards.records import ShardError
from .report import COLUMNS
from .run_selection import BestEpoch, best_epoch

OPEN = "TO FILL IN"
"""Stands where only the author knows."""

_SHOWN = (
    "pretrained", "pretrained_image", "epochs", "batch_size", "accum_freq", "world_size", "lr", "lr_scheduler",
    "warmup", "wd", "beta1", "beta2", "precision", "seed", "aug_cfg", "lock_image", "lock_text", *MODEL_OPTIONS,
)  # fmt: skip
"""Parameters of open_clip_train.main that a reader needs to repeat the training."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """All that a card says."""

    best: BestEpoch
    parameters: Mapping[str, Any]
    config: Mapping[str, Any]
    splits: Mapping[str, Mapping[str, Any]]
    """Of the manifest beside the training shards; empty where there is none."""
    holdout: Sequence[str]
    report: Mapping[str, Any]
    """What `msa-openclip eval --json` or `best --json` wrote."""
    tested: Mapping[str, Any] = field(default_factory=dict)
    """The entry of `best` in the report."""


def gather(run: str, report: str, metric: str) -> CardFacts:
    """Read what a run's folder and a report hold.

    Args:
        run: LOGS/NAME of open_clip_train.main.
        report: JSON of `msa-openclip eval` or `best` on test data.
        metric: key of results.jsonl by which the epoch was chosen.
    Raises:
        RunError: the run's best epoch by validation is not what the report tested, or one of the files is missing.
    """
    best, parameters = best_epoch(run, metric), read_parameters(Path(run))
    try:
        content = json.loads(Path(report).read_text(encoding="utf-8"))
        entries = {entry["model"].partition("=")[2]: entry for entry in content["models"]}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(f"{report}: not written by `msa-openclip best --json` or `eval --json` ({error!r}).") from error
    found = [entry for file, entry in entries.items() if Path(file).resolve() == Path(best.checkpoint).resolve()]
    if not found:
        raise RunError(
            f"{report}: tests {', '.join(entries) or 'nothing'}, but the run's best epoch on val is {best.checkpoint}; "
            f"test that: msa-openclip best {run} --shards PATTERN --json {report}"
        )
    built = _manifest(str(parameters.get("train_data", "")))
    return CardFacts(
        best=best,
        parameters=parameters,
        config=model_config(best.model) or {},
        splits=built.get("splits", {}),
        holdout=built.get("options", {}).get("read", {}).get("holdout", ()),
        report=content,
        tested=found[0],
    )


def _manifest(pattern: str) -> dict[str, Any]:
    try:
        return dict(manifest.read(pattern.rpartition("/")[0]))
    except (ShardError, OSError):  # other people's shards, or moved ones
        return {}


def card(facts: CardFacts, *, title: str, repository: str, license: str | None) -> str:
    """The text of README.md, Markdown below the YAML that the hub reads."""
    parts = (
        _head(license),
        f"# {title}",
        _introduction(facts),
        "## Use\n\n" + _use(repository),
        "## Training\n\n" + _training(facts),
        "## Retrieval\n\n" + _retrieval(facts),
        "## Limits\n\n" + _limits(facts, license),
    )
    return "\n\n".join(parts) + "\n"


def _head(license: str | None) -> str:
    lines = ["library_name: open_clip", "pipeline_tag: zero-shot-image-classification"]
    lines += [f"license: {license}"] if license else []
    lines += ["tags:", *(f"- {tag}" for tag in ("clip", "remote-sensing", "image-text-retrieval", "msa"))]
    return "\n".join(["---", *lines, "---"])


def _introduction(facts: CardFacts) -> str:
    return (
        f"A `{facts.best.model}` model for finding satellite and aerial images by words, and words for images: a dual "
        "encoder of [open_clip](https://github.com/mlfoundations/open_clip) with multi-scale alignment "
        "([MSA](https://arxiv.org/abs/2405.18959)), which needs the plugin `msa_openclip`."
    )


def _use(repository: str) -> str:
    return f"""```python
import open_clip  # with msa_openclip installed; it registers itself

model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:{repository}")
tokenizer = open_clip.get_tokenizer("hf-hub:{repository}")
image_logits, text_logits = model.eval().get_logits(preprocess(image)[None], tokenizer(captions))  # fused scores
```"""


def _training(facts: CardFacts) -> str:
    parameters, best = facts.parameters, facts.best
    shown = {name: parameters[name] for name in _SHOWN if name in parameters}
    if shown.get("pretrained"):
        shown["pretrained"] = Path(shown["pretrained"]).name  # where it lay is nobody's business
    rows = [f"| {name} | `{value}` |" for name, value in shown.items() if str(value) not in ("None", "False", "")]
    lines = [f"Data: {OPEN} (name, source, licence).{_splits(facts)}", ""]
    lines += ["| parameter | |", "|---|---|", *rows, ""]
    lines.append(f"Epoch {best.epoch} of {parameters.get('epochs')}, chosen on val ({best.metric} {best.value:.2f}).")
    if "msa_cfg" in facts.config:
        lines += ["", "```json", json.dumps({"msa_cfg": facts.config["msa_cfg"]}), "```"]
    return "\n".join(lines)


def _splits(facts: CardFacts) -> str:
    if not facts.splits:
        return ""
    counts = ", ".join(f"{name} {row['images']:,}" for name, row in facts.splits.items())
    held_out = f", drawn by name from train: {', '.join(facts.holdout)}" if facts.holdout else ""
    return f" Images: {counts}{held_out}."


def _retrieval(facts: CardFacts) -> str:
    data, tested = facts.report["data"], facts.tested
    rows = ["| ranking | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " | 95 % of mR |"]
    rows.append("|---" * (len(COLUMNS) + 2) + "|")
    for ranking, metrics in tested["metrics"].items():
        if "_scale" not in ranking:
            low, high = tested.get("intervals_95", {}).get(ranking, {}).get("mR", (None, None))
            interval = f"{low:.2f} to {high:.2f}" if low is not None else ""
            rows.append(f"| {ranking} | " + " | ".join(f"{metrics[name]:.2f}" for name in COLUMNS) + f" | {interval} |")
    versions = ", ".join(f"{name} {version}" for name, version in facts.report.get("versions", {}).items())
    ties = {"expected": "in expectation over their orders", "pessimistic": "against the model"}[tested["ties"]]
    lines = [
        f"On {data['images']} test images with {data['captions']} captions, {data['distinct_captions']} different. "
        "Recall in percent; image to text: any of the image's captions in the first k; text to image: its image in the "
        f"first k, for every caption. Equal scores count {ties}. {versions}.",
        "",
        *rows,
    ]
    runs = len(facts.report.get("chosen", ()))
    if runs > 1:
        spreads = {name: row["mR"] for name, row in facts.report["mean_sd"].items() if "_scale" not in name}
        means = ", ".join(f"{name} {mean:.2f} ± {sd:.2f}" for name, (mean, sd) in spreads.items())
        lines += ["", f"One of {runs} runs, which differ in their seeds; their mR, mean ± sd: {means}."]
    return "\n".join(lines)


def _limits(facts: CardFacts, license: str | None) -> str:
    lines = [
        f"- The recalls above hold among {facts.report['data']['images']} images of the same source as the training "
        "images; among more images, or images of other sensors, places and resolutions, they are lower.",
        "- It knows the words of its training captions: English, short, about what is seen from above.",
        "- A score says how well image and text fit compared with others, not that what the text says is true.",
        f"- {OPEN}: what it was made for, and what it must not be used for.",
    ]
    if not license:
        lines.append(f"- {OPEN}: the licence, which the weights it started from and the training images may restrict.")
    return "\n".join(lines)
