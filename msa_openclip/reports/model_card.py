"""Writes the model card for the Hugging Face hub from a run's folder and the report of its test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..evaluation.run_parameters import MODEL_OPTIONS, RunError, read_parameters
from ..evaluation.scorer import main_ranking
from ..plugin.configs import model_config
from ..shards import manifest
from ..shards.pages.render import render
from ..shards.records import ShardError
from .report import COLUMNS, TEMPLATES, TIES
from .run_selection import BestEpoch, best_epoch

OPEN = "TO FILL IN"
"""Stands where only the author knows."""

_SHOWN = (
    "pretrained", "pretrained_image", "epochs", "batch_size", "accum_freq", "world_size", "lr", "lr_scheduler",
    "warmup", "wd", "beta1", "beta2", "precision", "seed", "aug_cfg", "lock_image", "lock_text", *MODEL_OPTIONS,
)  # fmt: skip
"""Parameters of open_clip_train.main that a reader needs to repeat the training."""


@dataclass(frozen=True, kw_only=True)
class TestedRun:
    """A training run, its best epoch, and the report of the test of that epoch."""

    best: BestEpoch
    parameters: Mapping[str, Any]
    config: Mapping[str, Any]
    splits: Mapping[str, Mapping[str, Any]]
    """Of the manifest beside the training shards; empty where there is none."""
    holdout: Sequence[str]
    report: Mapping[str, Any]
    """What `msa-openclip eval --json` or `best --json` wrote."""
    tested: Mapping[str, Any]
    """The entry of `best` in the report."""


def gather(run: str, report: str, metric: str) -> TestedRun:
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
    tested = [entry for file, entry in entries.items() if Path(file).resolve() == Path(best.checkpoint).resolve()]
    if not tested:
        raise RunError(
            f"{report}: tests {', '.join(entries) or 'nothing'}, but the run's best epoch on val is {best.checkpoint}; "
            f"test that: msa-openclip best {run} --shards PATTERN --json {report}"
        )
    built = _manifest(str(parameters.get("train_data", "")))
    return TestedRun(
        best=best,
        parameters=parameters,
        config=model_config(best.model) or {},
        splits=built.get("splits", {}),
        holdout=built.get("options", {}).get("read", {}).get("holdout", ()),
        report=content,
        tested=tested[0],
    )


def _manifest(pattern: str) -> dict[str, Any]:
    try:
        return dict(manifest.read(pattern.rpartition("/")[0]))
    except (ShardError, OSError):  # other people's shards, or moved ones
        return {}


def card(run: TestedRun, *, title: str, repository: str, license: str | None) -> str:
    """The text of README.md: metadata that the hub reads, as YAML, and Markdown below it.

    Example:
        text = card(gather("logs/NAME", "test.json", METRIC), title="Planes", repository="me/planes", license="mit")
    """
    return render(
        "model_card.md",
        TEMPLATES,
        metadata=_metadata(run, title, license).to_yaml(),
        title=title,
        repository=repository,
        license=license,
        run=run,
        runs=len(run.report.get("chosen", ())),
        parameters=_shown_parameters(run.parameters),
        msa_cfg=json.dumps({"msa_cfg": run.config["msa_cfg"]}) if "msa_cfg" in run.config else None,
        columns=COLUMNS,
        ties=TIES[run.tested["ties"]],
        open=OPEN,
    )


def _metadata(run: TestedRun, title: str, license: str | None) -> ModelCardData:
    """What the hub searches and shows, with the recalls of the main ranking as evaluation results."""
    ranking = main_ranking(run.tested["metrics"])
    metrics = run.tested["metrics"][ranking]
    results = [
        EvalResult(
            task_type="image-text-retrieval",
            task_name="Image-text retrieval",
            dataset_type="unknown",  # required; the hub's name for a data set that it does not hold
            dataset_name=f"{OPEN} (the test set)",
            dataset_split="test",
            metric_type="mean_recall" if name == "mR" else f"recall_at_{name.partition('@')[2]}",
            metric_name=f"{name.replace('_', ' ')} ({ranking}, %)",
            metric_value=round(metrics[name], 2),
        )
        for name in COLUMNS
    ]
    return ModelCardData(
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        license=license,
        tags=["clip", "remote-sensing", "image-text-retrieval", "msa"],
        model_name=title,
        eval_results=results,
    )


def _shown_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that matter and were set, without the folders of the author's machine."""
    shown = {name: parameters[name] for name in _SHOWN if str(parameters.get(name)) not in ("None", "False", "")}
    if "pretrained" in shown:
        shown["pretrained"] = Path(shown["pretrained"]).name
    return shown
