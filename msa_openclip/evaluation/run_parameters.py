"""The parameters of a finished training run, from the params.txt that open_clip_train.main leaves in LOGS/NAME."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from ..data.small_files import FileProblem, read_text

MODEL_OPTIONS = (
    "force_quick_gelu",
    "force_image_size",
    "force_context_length",
    "image_mean",
    "image_std",
    "image_interpolation",
    "image_resize_mode",
)
"""Parameters that change what a checkpoint computes, and that the checkpoint itself does not hold."""


class RunError(ValueError):
    """A run's folder does not hold what is needed; the message names the file and the remedy."""


def read_parameters(run: Path) -> dict[str, Any]:
    """All parameters of a run: numbers, lists, None and booleans as such, the rest as text.

    Args:
        run: folder that open_clip_train.main made, LOGS/NAME.
    Raises:
        RunError: there is no params.txt, or it names no model.
    """
    path = run / "params.txt"
    try:
        lines = read_text(path).splitlines() if path.exists() else []
    except FileProblem as error:
        raise RunError(str(error)) from error
    pairs = (line.partition(": ") for line in lines)
    parameters = {name: _value(text) for name, found, text in pairs if found}
    if not isinstance(parameters.get("model"), str):
        raise RunError(f"{path}: no line 'model: NAME'; this is no run of open_clip_train.main.")
    return parameters


def model_options(checkpoint: str, model: str) -> dict[str, Any]:
    """What `create_model_and_transforms` must be told to rebuild the model of a run's checkpoint as it was trained.

    open_clip's checkpoints hold weights alone: with `--force-quick-gelu` or `--image-mean` they were trained as another
    model than their name builds (https://github.com/mlfoundations/open_clip/issues/771).

    Args:
        checkpoint: a file; only one that lies in RUN/checkpoints tells its run.
        model: name of the model that is to be built; parameters of a run of another model are none of its business.
    """
    folder = Path(checkpoint).parent
    run = folder.parent
    if folder.name != "checkpoints" or not (run / "params.txt").exists():
        return {}
    parameters = read_parameters(run)
    if parameters["model"] != model:
        return {}
    return {name: parameters[name] for name in MODEL_OPTIONS if parameters.get(name) not in (None, False)}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # of what is nested too deeply, the last two
        return text
