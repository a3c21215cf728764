"""Writes the model card for the Hugging Face hub from a run's folder and the report of its test."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..data.small_files import FileProblem, read_json
from ..evaluation.run_parameters import MODEL_OPTIONS, RunError, read_parameters
from ..evaluation.scorer import main_ranking
from ..plugin.configs import model_config
from ..shards import manifest
from ..shards.pages.render import render
from ..shards.records import ShardError
from .report import COLUMNS, TEMPLATES, TIES
from .run_selection import BestEpoch, best_epoch, is_number

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
        RunError: the run's best epoch by validation is not what the report tested, or the report lacks what the card
            says, or something of the run is missing.
    """
    best, parameters = best_epoch(run, metric), read_parameters(Path(run))
    try:
        content = read_json(report)
        entries = {entry["model"].partition("=")[2]: entry for entry in content["models"]}
    except FileProblem as error:
        raise RunError(str(error)) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{report}: not written by `msa-openclip best --json` or `eval --json` ({error!r}).") from error
    tested = [entry for file, entry in entries.items() if Path(file).resolve() == Path(best.checkpoint).resolve()]
    if not tested:
        raise RunError(
            f"{report}: tests {', '.join(entries) or 'nothing'}, but the run's best epoch on val is {best.checkpoint}; "
            f"test that: msa-openclip best {run} --shards PATTERN --json {report}"
        )
    lacking = next(_lacking(content, tested[0]), None)
    if lacking:
        raise RunError(
            f"{report}: {lacking} is missing or not as `msa-openclip best --json` or `eval --json` writes it; "
            "write the report again."
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


def _lacking(report: Mapping[str, Any], tested: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a report, and of its entry, that a card shows and that do not hold what it can show."""
    if not _has_numbers(report.get("data"), ("images", "captions", "distinct_captions")):
        yield "data"
    if not isinstance(report.get("versions", {}), Mapping):
        yield "versions"
    if not isinstance(tested.get("ties"), str) or tested["ties"] not in TIES:
        yield "ties"
    metrics = tested.get("metrics")
    if not isinstance(metrics, Mapping) or main_ranking(metrics) not in metrics:
        yield "metrics"
        return
    shown = [name for name in metrics if "_scale" not in name]
    yield from (f"metrics.{name}" for name in shown if not _has_numbers(metrics[name], COLUMNS))
    intervals = tested.get("intervals_95", {})
    if not isinstance(intervals, Mapping):
        yield "intervals_95"
        return
    yield from (f"intervals_95.{name}" for name in shown if name in intervals and not _has_pair(intervals[name]))
    if not isinstance(report.get("chosen", []), list):
        yield "chosen"
    elif len(report.get("chosen", [])) > 1:  # several seeds, summed up
        seeds = report.get("mean_sd")
        if not isinstance(seeds, Mapping):
            yield "mean_sd"
            return
        yield from (f"mean_sd.{name}" for name in seeds if "_scale" not in name and not _has_pair(seeds[name]))


def _has_numbers(values: object, keys: Iterable[str]) -> bool:
    """Whether a part of a report is an object that has numbers under these keys."""
    return isinstance(values, Mapping) and all(is_number(values.get(key)) for key in keys)


def _has_pair(values: object) -> bool:
    """Whether a part of a report is an object whose mR is two numbers."""
    pair = values.get("mR") if isinstance(values, Mapping) else None
    return isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair))


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
