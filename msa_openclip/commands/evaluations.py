"""What `eval` and `best` share: models evaluated one after the other, and the reports that are written of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from ..data.readers import read_shards
from ..evaluation.eval_set import EvalSet
from ..evaluation.evaluate import Evaluation, evaluate
from ..evaluation.loading import LoadedModel
from ..evaluation.metrics import Ties
from ..reports import report
from ..reports.examples import find_examples
from ..shards.storage import store
from .inputs import load_model, running


def evaluate_all(
    specs: Sequence[str], data: EvalSet, parsed: argparse.Namespace, *, ties: Ties = "expected"
) -> list[report.ModelResult]:
    """Load and evaluate each model as the options say; with examples, if a page is wanted."""
    options = running(parsed)
    results = []
    for spec in specs:
        model = load_model(spec, parsed)
        start = time.perf_counter()
        evaluation = evaluate(model.scorer, data, model.preprocess, model.tokenizer, options)
        evaluation = _reranked(evaluation, model, parsed)
        seconds = time.perf_counter() - start
        results.append(report.ModelResult.of(spec, evaluation, seconds, ties=ties, bootstrap=parsed.bootstrap))
        if parsed.html:
            results[-1].examples = find_examples(model, evaluation)
    return results


def _reranked(evaluation: Evaluation, model: LoadedModel, parsed: argparse.Namespace) -> Evaluation:
    """With the rankings of --rerank, where the subcommand has it."""
    methods = getattr(parsed, "rerank", [])
    if not methods:
        return evaluation
    from ..evaluation.rerank import rerank

    bank = read_shards(parsed.bank) if parsed.bank else []
    parts = model.scorer, model.preprocess, model.tokenizer
    return rerank(evaluation, *parts, methods, bank=bank, options=running(parsed))


def write(parsed: argparse.Namespace, data: EvalSet, results: Sequence[report.ModelResult], **more: Any) -> None:
    """Write the files that are asked for; `more` goes into the JSON."""
    if parsed.json:
        report.write_json(parsed.json, report.as_dict(data, results, _plain(parsed)) | more)
    if parsed.html:
        from ..reports.page import page

        store.write_text(parsed.html, page(data, results))


def _plain(parsed: argparse.Namespace) -> argparse.Namespace:
    """The options as JSON can hold them: --class-regex as it was written."""
    pattern = parsed.class_regex
    return argparse.Namespace(**vars(parsed) | {"class_regex": pattern and pattern.pattern})
