"""The steps of a whole job (shards, training, choice, test): commands, printed as one types them, then run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from .shards import manifest

CLI = "msa_openclip"
TRAIN = "open_clip_train.main"


class StepError(RuntimeError):
    """A command of the job failed; it has said why itself."""


def typed(module: str, *arguments: object) -> str:
    """`python -m module arguments` as one types it in a shell."""
    name = "msa-openclip" if module == CLI else f"python -m {module}"
    return f"{name} {shlex.join(map(str, arguments))}"


def run(module: str, *arguments: object) -> None:
    """Print and run `python -m module arguments` on this Python.

    Raises:
        StepError: it ended with another code than 0.
    """
    line = typed(module, *arguments)
    print(f"\n$ {line}", flush=True)
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=False)
    if done.returncode:
        raise StepError(f"ended with code {done.returncode}: {line}")


def shard_pattern(shards: Path, split: str) -> str:
    """Brace pattern of a split's shards, from their manifest."""
    return f"{shards}/{manifest.read(str(shards))['splits'][split]['pattern']}"
