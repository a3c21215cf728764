"""An explanation as a figure: the positions each scale pooled from, and the contribution of each word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from ..data.pixels import dates_of
from ..evaluation.loading import LoadedModel
from ..shards.output import printable
from ..shards.storage import store
from .explanation import ExplainError, Explanation

_DARK = 0.2


def literal(text: str) -> str:
    """Text as matplotlib shows it letter by letter: dollar signs would start a formula, and fail in most captions."""
    shown: str = printable(text)
    return shown.replace("$", r"\$")


def view(model: LoadedModel, picture: Image.Image | Sequence[Image.Image]) -> Image.Image:
    """The picture as the model sees it, scaled and cropped: what the positions of an explanation lie on.

    Of several dates side by side.
    """
    visual = model.scorer.model.visual
    mean, sd = (torch.tensor(values).reshape(-1, 1, 1) for values in (visual.image_mean, visual.image_std))
    seen = torch.cat([model.preprocess(one) * sd + mean for one in dates_of(picture)], dim=2)
    return Image.fromarray((255 * seen).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def spotlight(picture: Image.Image, positions: Tensor) -> Image.Image:
    """The picture, dark except where a scale looked.

    Args:
        picture: what `view` made of it.
        positions: (h, w) shares, of the explanation.
    """
    share = (255 * positions / positions.max()).round().byte().numpy()
    light = Image.fromarray(share).resize(picture.size, Image.Resampling.BILINEAR)
    return Image.composite(picture, ImageEnhance.Brightness(picture).enhance(_DARK), light)


def save_figure(drawn: Any, path: str) -> None:
    """Write a matplotlib figure in one step, in the format that the name of the file tells (PNG where it tells none).

    Raises:
        ExplainError: matplotlib knows no such format.
    """
    format = PurePath(path).suffix.removeprefix(".").lower() or "png"
    known = drawn.canvas.get_supported_filetypes()
    if format not in known:
        raise ExplainError(f"{path}: .{format} is no format of figures; choose one of {', '.join(sorted(known))}.")
    with store.atomic_write(path) as file:
        drawn.savefig(file, dpi=120, format=format)


def figure(explanation: Explanation, picture: Image.Image) -> Any:
    """A matplotlib figure: where each scale looked, and below it what each word gave.

    Args:
        explanation: of the picture and a text.
        picture: what `view` makes of it.
    Raises:
        ExplainError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExplainError("the figure needs matplotlib: pip install 'msa_openclip[plot]'.") from error
    count = len(explanation.scales)
    drawn = Figure(figsize=(3.2 * count, 6.4), layout="constrained")
    axes = drawn.subplots(2, count, squeeze=False)
    for (top, bottom), scale in zip(axes.T, explanation.scales, strict=True):
        top.imshow(spotlight(picture, scale.positions))
        top.set_title(f"stage {scale.scale.stage}, {scale.scale.pool}: {scale.logit:.2f}")
        top.set_axis_off()
        parts = scale.parts()
        places = list(range(len(parts)))
        colours = ["#2a7f62" if value > 0 else "#b5482f" for _, value in parts]
        bottom.barh(places, [value for _, value in parts], color=colours)
        bottom.set_yticks(places, [literal(text) for text, _ in parts])
        bottom.invert_yaxis()
        bottom.axvline(0, color="#444", linewidth=0.8)
        bottom.set_xlabel("part of the logit")
    drawn.suptitle(f"{literal(explanation.text)}\ncosine {explanation.cosine:.3f}, fused {explanation.fused:.2f}")
    return drawn
