"""The page of an evaluation: tables, recall curves, classes, and captions with answers and reasons in one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import PurePath
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..data.captioned import CaptionedImage
from ..data.pixels import load_image
from ..evaluation.eval_set import EvalSet
from ..explain.explanation import ScaleExplanation
from ..explain.figure import spotlight
from ..shards.pages.plots import Line, colour, line_plot
from ..shards.pages.render import jpeg_url, render
from .report import COLUMNS, CURVE_CUTOFFS, TEMPLATES, TIES, ModelResult, describe

_THUMBNAIL_PX = 160
_TITLES = {"i2t": "image to text", "t2i": "text to image"}
_COLUMNS = ("R@1", "R@5", "R@10", "median_rank", "mean_rank")
"""Of each way."""
_DASHES = {"global": "2 2", "match": "6 3"}


class _Model(NamedTuple):
    """A model as the page shows it."""

    name: str
    colour: str
    result: ModelResult


def page(data: EvalSet, results: Sequence[ModelResult]) -> str:
    """A self-contained HTML page.

    Example:
        result = ModelResult.of(spec, evaluate(model.scorer, data, ...), seconds, ties="expected", bootstrap=1000)
        Path("page.html").write_text(page(data, [result]), encoding="utf-8")

    Raises:
        ShardError: matplotlib is not installed.
        EvalDataError: an image of an example cannot be read again.
    """
    names = short_names([result.spec for result in results])
    models = [_Model(name, colour(n), result) for n, (name, result) in enumerate(zip(names, results, strict=True))]
    lines = {way: _lines(models, way) for way in _TITLES}
    return render(
        "evaluation.html",
        TEMPLATES,
        title="Retrieval",
        description=describe(data),
        models=models,
        columns=_COLUMNS,
        ties=TIES[results[0].ties],
        has_intervals=any(result.intervals for result in results),
        best={
            (protocol, scales): _best(results, protocol, scales=scales)
            for protocol in ("metrics", "merged", *data.parts)
            for scales in (False, True)
        },
        caption_parts=list(data.parts),
        lines=lines["i2t"],
        plots=[(_TITLES[way], _plot(lines[way])) for way in lines],
        classes=sorted(set(chain.from_iterable(result.by_class for result in results))),
        image_url=_image_url,
        spotlight_url=_spotlight_url,
        parts_of=_parts,
    )


def short_names(specs: Sequence[str]) -> list[str]:
    """The shortest names that tell models apart: NAME, and as much of the end of each path as that takes.

    `epoch_9.pt` of a run counts as one with the run's name: `MSA-ViT-B seed0/epoch_9`.
    """
    split = [_name_and_path(spec) for spec in specs]
    names = [name for name, _ in split]
    for count in range(1, 1 + max(len(path) for _, path in split)):
        if len(set(names)) == len(set(specs)):
            break
        names = [" ".join([name, "/".join(path[-count:])]).strip() for name, path in split]
    return names


def _name_and_path(spec: str) -> tuple[str, list[str]]:
    """NAME and the parts of the path of `NAME=CHECKPOINT`; of a folder or repository its last part and those before."""
    name, _, checkpoint = spec.partition("=")
    if name.startswith(("hf-hub:", "local-dir:")):
        path = PurePath(spec.partition(":")[2])
        return path.name, list(path.parent.parts)
    path = PurePath(checkpoint)
    parts = [*path.parent.parts, path.stem if path.suffix == ".pt" else path.name]
    if len(parts) > 2 and parts[-2] == "checkpoints":  # LOGS/NAME/checkpoints/epoch_9 of open_clip_train.main
        parts[-3:] = [f"{parts[-3]}/{parts[-1]}"]
    return name, parts


def _best(results: Sequence[ModelResult], protocol: str, *, scales: bool) -> dict[str, float]:
    """The highest value of each recall in a table."""
    tables = (result.rankings(protocol).items() for result in results)
    rows = [metrics for ranking, metrics in chain.from_iterable(tables) if ("_scale" in ranking) == scales]
    return {name: max(metrics[name] for metrics in rows) for name in COLUMNS} if rows else {}


def _lines(models: Sequence[_Model], way: str) -> list[Line]:
    return [
        Line(f"{model.name}, {ranking}", model.colour, CURVE_CUTOFFS, curves[way], _DASHES.get(ranking, ""))
        for model in models
        for ranking, curves in model.result.curves.items()
    ]


def _plot(lines: Sequence[Line]) -> str:
    ticks = {"xticks": CURVE_CUTOFFS, "xticklabels": list(map(str, CURVE_CUTOFFS))}
    return line_plot(lines, xscale="log", **ticks, ylim=(0, 102), xlabel="k", ylabel="recall at k, %")


def _image_url(record: CaptionedImage) -> str:
    return jpeg_url(load_image(record), _THUMBNAIL_PX)


def _spotlight_url(view: Image.Image, positions: Tensor) -> str:
    return jpeg_url(spotlight(view, positions), _THUMBNAIL_PX)


def _parts(scales: Sequence[ScaleExplanation]) -> list[tuple[str, list[tuple[float, float]]]]:
    """The rows of an explanation: a text and, for each scale, its part of the score and that over the largest."""
    texts = [*(word.text for word in scales[0].words), "the sentence", "the image"]
    columns = [[*(word.contribution for word in scale.words), scale.sentence, scale.image] for scale in scales]
    largest = max(map(abs, chain.from_iterable(columns))) or 1.0
    rows = zip(*columns, strict=True)
    return [(text, [(part, abs(part) / largest) for part in row]) for text, row in zip(texts, rows, strict=True)]
