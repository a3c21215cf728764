"""open_clip's trainer, extended for MSA models: shards are read by our loader, validation reports retrieval metrics."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from .configs import msa_settings
from .patching import replace, with_global

_log = logging.getLogger(__name__)

LOADER_VARIABLE = "MSA_OPENCLIP_LOADER"
"""Environment variable: `msa` (default) reads shards by our loader for MSA models, `all` for every model."""


def extend_train(train: ModuleType) -> None:
    """Let open_clip's `evaluate` report retrieval metrics for MSA models; open_clip_train.main imports it from here."""
    original: FunctionType = train.evaluate

    @functools.wraps(original)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        return _evaluate_with_retrieval(original, *args, **kwargs)

    replace(train, "evaluate", evaluate)


def _evaluate_with_retrieval(
    original: FunctionType,
    model: Any,
    data: dict[str, Any],
    epoch: int,
    args: Any,
    tb_writer: Any = None,
    tokenizer: Any = None,
) -> Any:
    """open_clip's `evaluate` with our metrics in the same record; every rank has to call it, as open_clip does.

    While training nothing is raised: open_clip writes the epoch's checkpoint after it has validated.

    Args:
        original: open_clip_train.train.evaluate; its other arguments follow as they are.
    Raises:
        EvalDataError: the validation data cannot be read, and nothing is trained.
    """
    from ..training.validation import is_asked_for, metrics_or_none

    if not is_asked_for(model, data, epoch, args):
        return original(model, data, epoch, args, tb_writer=tb_writer, tokenizer=tokenizer)
    evaluate_and_report = _reporting(original, metrics_or_none(model, data, args, tokenizer))
    try:
        return evaluate_and_report(model, data, epoch, args, tb_writer=tb_writer, tokenizer=tokenizer)
    except Exception:
        if "train" not in data:
            raise
        _log.exception("Validation failed after epoch %s; training goes on.", epoch)
        return {}


def _reporting(original: FunctionType, metrics: dict[str, float]) -> Callable[..., Any]:
    """`original` whose zero-shot metrics, the first it puts into its record, are followed by ours."""
    zero_shot_eval = original.__globals__["zero_shot_eval"]

    def with_retrieval(*args: Any, **kwargs: Any) -> dict[str, float]:
        return {**zero_shot_eval(*args, **kwargs), **metrics}

    return with_global(original, "zero_shot_eval", with_retrieval)


def extend_params(params: ModuleType) -> None:
    """Let `--resume latest` of MSA models pass over checkpoints that a kill left half-written.

    open_clip_train.main looks for the latest file by its name only, and stops at one that it cannot load, every time.
    It looks right after it has parsed its arguments.
    """
    original = params.parse_args

    @functools.wraps(original)
    def parse_args(arguments: Any) -> Any:
        args = original(arguments)
        if args.resume == "latest" and args.name and msa_settings(args.model, args.cache_dir) is not None:
            from ..training.checkpoints import set_aside_half_written

            set_aside_half_written(os.path.join(args.logs, args.name, "checkpoints"))
        return args

    replace(params, "parse_args", parse_args)


def extend_train_data(data: ModuleType) -> None:
    """Let MSA models read shards by our loader; `get_dataset_fn` looks open_clip's own up under this name.

    With LOADER_VARIABLE=all other models read by it too, so that two models can be compared on the same batches.
    """
    original = data.get_wds_dataset
    signature = inspect.signature(original)

    @functools.wraps(original)
    def get_wds_dataset(args: Any, *positional: Any, **named: Any) -> Any:
        wanted = os.environ.get(LOADER_VARIABLE, "msa")
        if wanted not in ("msa", "all"):
            raise ValueError(f"{LOADER_VARIABLE}: {wanted!r} is unknown; choose msa or all.")
        is_msa = msa_settings(getattr(args, "model", ""), getattr(args, "cache_dir", None)) is not None
        if wanted == "msa" and not is_msa:
            return original(args, *positional, **named)
        from ..training import loader as shard_data

        found = shard_data.get_wds_dataset(args, *positional, **named)
        if args.train_data and not signature.bind(args, *positional, **named).arguments["is_train"]:
            from ..training.validation import prepare

            prepare(args, is_msa=is_msa)
        return found

    replace(data, "get_wds_dataset", get_wds_dataset)
