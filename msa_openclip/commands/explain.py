"""`msa-openclip explain`: the words and places behind the score of an image and a text."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..shards.arguments import Commands, add_command
from ..shards.exit_codes import UsageError
from ..shards.output import printable
from .options import MODEL, add_device

if TYPE_CHECKING:
    from ..explain.explanation import Explanation


def add(commands: Commands) -> None:
    """Arguments and help."""
    command = add_command(
        commands,
        "explain",
        run,
        "words and places behind the score of an image and a text",
        description="Per scale: each word's exact share of the score, and where in the image the scale looked.",
        examples=[
            "msa-openclip explain MSA-ViT-B=epoch_9.pt tile.jpg 'planes beside a terminal' --figure why.png",
            "msa-openclip explain MSA-Pairs=epoch_9.pt 2015.jpg 2020.jpg 'the forest became houses'",
        ],
    )
    command.add_argument("model", metavar="MODEL", help=f"an MSA model: {MODEL}")
    command.add_argument(
        "images", metavar="IMAGE", nargs="+", help="image file; of a model of several dates one of each"
    )
    command.add_argument("text", metavar="TEXT", help="what it is to be compared with")
    command.add_argument("--figure", metavar="FILE", help="draw it (.png, .svg, .pdf; needs matplotlib)")
    command.add_argument("--json", metavar="FILE", help="write it as data")
    add_device(command)


def run(parsed: argparse.Namespace) -> None:
    """Explain and print."""
    from ..data.captioned import CaptionedImage
    from ..data.pixels import load_image
    from ..explain.explanation import explain
    from ..explain.figure import figure, save_figure, view
    from ..reports.report import write_json
    from ..shards.records import Location
    from .inputs import load_model

    pictures = [load_image(CaptionedImage(path, Location(path), ())) for path in parsed.images]
    model = load_model(parsed.model, parsed)
    if len(pictures) != model.scorer.dates:
        raise UsageError(f"{len(pictures)} images, the model takes {model.scorer.dates} (msa_cfg.dates)")
    explanation = explain(model, pictures, parsed.text)
    print(_text(explanation))
    if parsed.figure:
        save_figure(figure(explanation, view(model, pictures)), parsed.figure)
    if parsed.json:
        content = asdict(explanation)
        for scale in content["scales"]:
            scale["positions"] = scale["positions"].tolist()
        write_json(parsed.json, content)


def _text(explanation: Explanation) -> str:
    lines = [f"{printable(explanation.text)}: cosine {explanation.cosine:.4f}, fused {explanation.fused:.4f}"]
    for scale in explanation.scales:
        lines.append(f"stage {scale.scale.stage}, {scale.scale.pool}: logit {scale.logit:.4f}")
        lines += [
            f"  {word.contribution:+9.4f}  {100 * word.weight:5.1f} %  {printable(word.text)}" for word in scale.words
        ]
        lines += [f"  {scale.sentence:+9.4f}           the sentence", f"  {scale.image:+9.4f}           the image"]
    return "\n".join(lines)
