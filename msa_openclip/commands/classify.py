"""`msa-openclip classify`: zero-shot scene classification of a class folder or of shards with classes."""

from __future__ import annotations

import argparse

from ..evaluation.options import TEMPLATES
from ..shards.arguments import Commands, add_command
from .options import add_data, add_models, add_running, templates


def add(commands: Commands) -> None:
    """Arguments and help."""
    example = "msa-openclip classify MSA-ViT-B=epoch_9.pt ViT-B-32=openai --folder UCMerced_LandUse/Images"
    text = "zero-shot scene classification, by the names of the classes in caption templates"
    command = add_command(commands, "classify", run, text, examples=[example])
    add_models(command)
    add_data(command, folder="folder of class folders of images")
    add_running(command)
    text = f"captions with {{}} for the class, separated by '|' (default: {'|'.join(TEMPLATES)})"
    command.add_argument("--templates", type=templates, default=TEMPLATES, metavar="LIST", help=text)
    command.add_argument("--json", metavar="FILE", help="write accuracies by ranking and class as data")


def run(parsed: argparse.Namespace) -> None:
    """Classify and report."""
    from ..data.readers import read_class_folder
    from ..evaluation.zero_shot import classify
    from ..reports.report import write_json
    from . import inputs

    images = read_class_folder(parsed.folder) if parsed.folder is not None else inputs.read_images(parsed)[0]
    results = {}
    for spec in parsed.models:
        model = inputs.load_model(spec, parsed)
        running = {"batch_size": parsed.batch_size, "workers": parsed.workers, "progress": parsed.progress}
        results[spec] = classify(model, images, parsed.templates, **running)
    classes = next(iter(results.values())).classes
    print(f"{len(images)} images, {len(classes)} classes, {len(parsed.templates)} templates\n")
    width = max(map(len, results))
    for spec, result in results.items():
        for ranking in result.top1:
            if "_scale" not in ranking:
                top1, top5 = result.top1[ranking], result.top5[ranking]
                print(f"{spec:{width}}  {ranking:6}  top-1 {top1:6.2f}  top-5 {top5:6.2f}")
    if parsed.json:
        content = {
            spec: {"top1": result.top1, "top5": result.top5, "per_class": result.per_class}
            for spec, result in results.items()
        }
        write_json(parsed.json, content)
