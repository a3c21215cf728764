"""`msa-openclip classify`: zero-shot scene classification of a class folder or of shards with classes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..data.captioned import EvalDataError
from ..data.readers import read_class_folder
from ..evaluation.loading import load
from ..evaluation.zero_shot import TEMPLATES, classify
from ..reports.report import write_json
from . import options as eval_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Classify and report."""
    parsed = _parser().parse_args(arguments)
    if parsed.folder and (parsed.shards or parsed.captions):
        raise EvalDataError("give either --folder or --shards or --captions.")
    images = read_class_folder(parsed.folder) if parsed.folder else eval_options.read_images(parsed)[0]
    options = eval_options.running(parsed)
    templates = parsed.templates.split("|")
    rows = {}
    for spec in parsed.models:
        model = load(spec, parsed.device, parsed.precision)
        rows[spec] = classify(model, images, templates, batch_size=options.batch_size, workers=options.workers)
    classes = next(iter(rows.values())).classes
    print(f"{len(images)} images, {len(classes)} classes, {len(templates)} templates\n")
    width = max(map(len, rows))
    for spec, found in rows.items():
        for ranking in found.top1:
            if "_scale" not in ranking:
                top1, top5 = found.top1[ranking], found.top5[ranking]
                print(f"{spec:{width}}  {ranking:6}  top-1 {top1:6.2f}  top-5 {top5:6.2f}")
    if parsed.json:
        content = {
            spec: {"top1": found.top1, "top5": found.top5, "per_class": found.per_class} for spec, found in rows.items()
        }
        write_json(parsed.json, content)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="msa-openclip classify", description="Zero-shot scene classification.")
    eval_options.add_models(parser)
    parser.add_argument("--folder", help="folder of class folders of images")
    eval_options.add_data(parser)
    eval_options.add_running(parser)
    parser.add_argument("--templates", default="|".join(TEMPLATES), help="separated by '|' (default: %(default)s)")
    parser.add_argument("--json", help="write accuracies by ranking and class to this file")
    return parser
