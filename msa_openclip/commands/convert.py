"""`msa-openclip convert`: a checkpoint of the paper authors' released code to one of MSA-ResNet50-BERT."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..shards.arguments import Commands, add_command


def add(commands: Commands) -> None:
    """Arguments and help."""
    example = "msa-openclip convert released.pth msa.pt"
    text = "a checkpoint of the paper authors' released code to one of MSA-ResNet50-BERT"
    command = add_command(commands, "convert", run, text, examples=[example])
    command.add_argument(
        "source", type=Path, metavar="SRC", help="checkpoint of the released code, as torch.save wrote it"
    )
    command.add_argument("target", type=Path, metavar="DST", help="file to write: .pt, or .safetensors")


def run(parsed: argparse.Namespace) -> None:
    """Convert and say how to use the result."""
    from ..model.convert import convert_checkpoint

    tensors = convert_checkpoint(parsed.source, parsed.target)
    print(f"{tensors} tensors written to {parsed.target}; use them with --model MSA-ResNet50-BERT --pretrained.")
