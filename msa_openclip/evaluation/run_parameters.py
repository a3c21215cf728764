"""The parameters of a finished training run, from the params.txt that open_clip_train.main leaves in LOGS/NAME."""

from __future__ import annotations

import ast
import os
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
        checkpoint: a file; only one that lies in RUN/checkpoints tells its run, from whichever folder it is named and
            through links.
        model: name of the model that is to be built; parameters of a run of another model are none of its business.
    """
    run = _run_of(checkpoint)
    if run is None:
        return {}
    parameters = read_parameters(run)
    if parameters["model"] != model:
        return {}
    return {name: parameters[name] for name in MODEL_OPTIONS if parameters.get(name) not in (None, False)}


def _run_of(checkpoint: str) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None if it lies in none."""
    named = Path(checkpoint)
    places = [named]
    if os.path.isfile(checkpoint):  # what is no file is a tag of open_clip's, whatever folder this is called from
        # The run that wrote it comes before the one that has a link to it; a run may keep its files elsewhere, too.
        places = [named.resolve(), named.absolute()]
    runs = (place.parent.parent for place in places if place.parent.name == "checkpoints")
    return next((run for run in runs if (run / "params.txt").exists()), None)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    # TypeError of a list as the key of a dictionary, the last two of what is nested too deeply.
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text
