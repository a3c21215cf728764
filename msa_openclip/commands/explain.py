"""`msa-openclip explain`: the words and places behind the score of an image and a text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from ..data.captioned import CaptionedImage
from ..data.pixels import load_image
from ..evaluation.loading import load
from ..explain.explanation import Explanation, explain
from ..explain.figure import figure, view
from ..reports.report import write_json
from ..shards.records import Location
from . import options as eval_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Explain and print."""
    parsed = _parser().parse_args(arguments)
    picture = load_image(CaptionedImage(parsed.image, Location(parsed.image), ()))
    model = load(parsed.model, parsed.device)
    found = explain(model, picture, parsed.text)
    print(_text(found))
    if parsed.figure:
        figure(found, view(model, picture)).savefig(parsed.figure, dpi=120)
    if parsed.json:
        content = asdict(found)
        for scale in content["scales"]:
            scale["positions"] = scale["positions"].tolist()
        write_json(parsed.json, content)
    return 0


def _text(found: Explanation) -> str:
    lines = [f"{found.text}: cosine {found.cosine:.4f}, fused {found.fused:.4f}"]
    for scale in found.scales:
        lines.append(f"stage {scale.scale.stage}, {scale.scale.pool}: logit {scale.logit:.4f}")
        lines += [f"  {word.contribution:+9.4f}  {100 * word.weight:5.1f} %  {word.text}" for word in scale.words]
        lines += [f"  {scale.sentence:+9.4f}           the sentence", f"  {scale.image:+9.4f}           the image"]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msa-openclip explain",
        description="Per scale: each word's exact share of the score, and where in the image the scale looked.",
    )
    parser.add_argument("model", metavar="MODEL", help="an MSA model, NAME=CHECKPOINT")
    parser.add_argument("image", metavar="IMAGE", help="image file")
    parser.add_argument("text", metavar="TEXT", help="what it is to be compared with")
    parser.add_argument("--figure", metavar="FILE", help="draw it (.png, .svg, .pdf; needs matplotlib)")
    parser.add_argument("--json", metavar="FILE", help="write it as data")
    eval_options.add_device(parser)
    return parser
