"""Zero-shot scene classification: class names in templates as texts, by every ranking of a model.

Global scores use the mean text feature of a class, as CLIP does; match scores are averaged over the templates, and the
two fused by the model's own rule.  Shapes: I images, C classes, K templates, R rankings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..data.captioned import CaptionedImage, EvalDataError
from ..data.pixels import batch_spans, batches
from ..shards.records import class_words
from .evaluate import TIE
from .loading import LoadedModel
from .options import TEMPLATES
from .scorer import EncodedTexts


@dataclass(frozen=True)
class ZeroShot:
    """How often the right class comes first; all in percent, ties counted in expectation."""

    classes: tuple[str, ...]
    top1: dict[str, float]
    """By ranking: mean over images."""
    top5: dict[str, float]
    per_class: dict[str, dict[str, float]]
    """By ranking and class: top-1 of the images of that class."""


def classify(
    model: LoadedModel,
    images: Sequence[CaptionedImage],
    templates: Sequence[str] = TEMPLATES,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> ZeroShot:
    """Classify labelled images by the names of their classes.

    Args:
        model: any model.
        images: images with labels; captions are not looked at.
        templates: captions with {} in the place of the class, once or more; other braces are text.
        progress: a bar on stderr.
    Raises:
        EvalDataError: an image has no label or is of other dates than the model takes, there is only one class, or
            a template has no {}.
    """
    model.scorer.require_dates(images)
    classes = _checked_classes(images, templates)
    number = {name: index for index, name in enumerate(classes)}
    target = torch.tensor([number[str(image.label)] for image in images])
    # No `format`: other braces of a template are text.
    texts = [template.replace("{}", class_words(name)) for name in classes for template in templates]
    encoded = model.scorer.texts(model.tokenizer(texts))
    spans = batch_spans(len(images), batch_size)
    scores = []
    with tqdm(total=len(images), desc="classifying", unit=" images", leave=False, disable=not progress) as bar:
        for pixels in batches(images, model.preprocess, spans, workers):
            scores.append(_class_scores(model, pixels, encoded, len(templates)))
            bar.update(len(pixels))
    names = model.scorer.rankings
    return _accuracies(names, torch.cat(scores, dim=1), target, classes)


def _class_scores(model: LoadedModel, pixels: Tensor, texts: EncodedTexts, templates: int) -> Tensor:
    """(R, I, C) scores of a batch."""
    scorer = model.scorer
    images = scorer.images(pixels)
    by_text = scorer.scores(images, texts)  # (R, I, C K)
    by_text = by_text.reshape(*by_text.shape[:2], -1, templates)
    feature = texts.feature.reshape(-1, templates, texts.feature.shape[1])  # (C, K, E)
    with torch.inference_mode():
        cosine = images.feature @ F.normalize(feature.mean(dim=1), dim=-1).T
        rows = {name: by_text[index].mean(dim=-1) for index, name in enumerate(scorer.rankings)}
        rows["global"] = cosine
        for name in scorer.rankings:
            if name.startswith("fused"):
                match = rows[name.replace("fused", "match")]
                rows[name] = scorer.model.rank_scores(cosine, match[None]).float()
        return torch.stack(list(rows.values())).cpu()


def _accuracies(names: Sequence[str], scores: Tensor, target: Tensor, classes: tuple[str, ...]) -> ZeroShot:
    right = scores.gather(2, target.expand(len(names), -1)[..., None])
    tolerance = TIE * scores.abs().amax(dim=(1, 2), keepdim=True)
    above = (scores > right + tolerance).sum(dim=-1)
    equal = (scores >= right - tolerance).sum(dim=-1) - above  # the right one included

    def within(k: int) -> Tensor:
        return 100 * ((k - above).double() / equal).clamp(0, 1)

    first = within(1)
    return ZeroShot(
        classes,
        dict(zip(names, first.mean(dim=1).tolist(), strict=True)),
        dict(zip(names, within(5).mean(dim=1).tolist(), strict=True)),
        {
            name: {label: float(row[target == index].mean()) for index, label in enumerate(classes)}
            for name, row in zip(names, first, strict=True)
        },
    )


def _checked_classes(images: Sequence[CaptionedImage], templates: Sequence[str]) -> tuple[str, ...]:
    unlabelled = [image.image_id for image in images if image.label is None]
    if unlabelled:
        raise EvalDataError(f"{unlabelled[0]}: no class ({len(unlabelled)} such images); shards keep it in their JSON.")
    classes = tuple(sorted({str(image.label) for image in images}))
    if len(classes) < 2:
        raise EvalDataError(f"{len(classes)} class; classification needs two or more.")
    without = [template for template in templates if "{}" not in template]
    if without or not templates:
        raise EvalDataError(f"template {without[0] if without else ''!r} has no {{}} to put the class name in.")
    return classes
