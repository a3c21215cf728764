"""`msa-openclip convert`: a checkpoint of the paper authors' released code to one of MSA-ResNet50-BERT."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..shards.arguments import add_command

if TYPE_CHECKING:
    from ..shards.arguments import Commands


def add(commands: Commands) -> None:
    """Arguments and help."""
    command = add_command(
        commands,
        "convert",
        run,
        help="a checkpoint of the paper authors' released code to MSA-ResNet50-BERT",
        description="Convert a checkpoint of the paper authors' released code to one of MSA-ResNet50-BERT.",
        examples="  msa-openclip convert released.pth msa.pt\n",
    )
    command.add_argument(
        "source", type=Path, metavar="SRC", help="checkpoint of the released code, as torch.save wrote it"
    )
    command.add_argument("target", type=Path, metavar="DST", help="file to write: .pt, or .safetensors")


def run(parsed: argparse.Namespace) -> None:
    """Convert and say how to use the result."""
    from ..model.convert import convert_checkpoint

    tensors = convert_checkpoint(parsed.source, parsed.target)
    print(f"{tensors} tensors written to {parsed.target}; use them with --model MSA-ResNet50-BERT --pretrained.")
