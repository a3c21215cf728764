"""The field's retrieval metrics in open_clip's own validation, `open_clip_train.main ... --val-data`.

They go into the record that open_clip's `evaluate` writes to results.jsonl, TensorBoard and W&B, beside its own keys,
as `retrieval_RANKING_METRIC`: recalls and mR in percent, ranks from 1, ties in expectation; `_merged` is the protocol
with identical captions as one query.  All ranks share the work, so that none waits for another until it times out.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.distributed as dist
from open_clip import get_tokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import nn

from .eval_data import CaptionedImage, EvalDataError, EvalSet
from .eval_readers import read_csv, read_shards
from .evaluation import EvalOptions, Evaluation, Peers, evaluate
from .model import MSACLIP
from .pixels import load_image
from .scoring import Scorer

EVALUATE_VARIABLE = "MSA_OPENCLIP_EVALUATE"
"""Environment variable: `msa` (default) adds the metrics for MSA models, `all` for every model, `off` for none."""

_log = logging.getLogger(__name__)


def evaluate_with_retrieval(
    original: FunctionType,
    model: nn.Module,
    data: dict[str, Any],
    epoch: int,
    args: Any,
    tb_writer: Any = None,
    tokenizer: Any = None,
) -> Any:
    """open_clip's `evaluate` with our metrics in the same record; every rank has to call it, as open_clip does.

    Args:
        original: open_clip_train.train.evaluate; its other arguments follow as they are.
    Raises:
        EvalDataError: the validation data cannot be read.
    """
    if _is_asked_for(model, data, epoch, args):
        evaluate_and_report = _reporting(original, retrieval_metrics(model, args, tokenizer))
        return evaluate_and_report(model, data, epoch, args, tb_writer=tb_writer, tokenizer=tokenizer)
    return original(model, data, epoch, args, tb_writer=tb_writer, tokenizer=tokenizer)


def retrieval_metrics(model: nn.Module, args: Any, tokenizer: Any = None) -> dict[str, float]:
    """Metrics of `args.val_data` by key; all of them on every rank."""
    inner = _unwrap(model)
    inner.eval()
    transform = image_transform_v2(PreprocessCfg(**inner.visual.preprocess_cfg), is_train=False)
    peers = Peers(args.rank, args.world_size) if args.distributed and not args.horovod else Peers()
    keys = (args.val_data, _is_csv(args), args.csv_img_key, args.csv_caption_key, args.csv_separator)
    found = evaluate(
        Scorer(inner, args.precision),
        _validation_set(*keys, peers),
        transform,
        tokenizer or get_tokenizer(args.model),
        EvalOptions(batch_size=args.batch_size, workers=args.workers),
        peers,
    )
    return record(found)


def record(found: Evaluation) -> dict[str, float]:
    """The flat record of an evaluation: everything of the main rankings, mR of those with one scale alone."""
    metrics: dict[str, float] = {}
    for ranking, summary in found.summaries().items():
        short = {"mR": summary["mR"]} if "_scale" in ranking else summary
        metrics |= {f"retrieval_{ranking}_{name}": value for name, value in short.items()}
    for ranking, summary in found.summaries(merged=True).items():
        if "_scale" not in ranking:
            metrics[f"retrieval_{ranking}_merged_mR"] = summary["mR"]
    return metrics


def _is_asked_for(model: nn.Module, data: dict[str, Any], epoch: int, args: Any) -> bool:
    wanted = os.environ.get(EVALUATE_VARIABLE, "msa")
    if wanted not in ("msa", "all", "off"):
        raise ValueError(f"{EVALUATE_VARIABLE}: {wanted!r} is unknown; choose msa, all or off.")
    if wanted == "off" or (wanted == "msa" and not isinstance(_unwrap(model), MSACLIP)):
        return False
    # From here on as in open_clip's own evaluate; synthetic data and Horovod's other ranks have nothing to rank.
    due = args.val_frequency and (epoch % args.val_frequency == 0 or epoch == args.epochs)
    alone = args.horovod and args.rank != 0
    return bool("val" in data and due and args.dataset_type != "synthetic" and not alone)


def _reporting(original: FunctionType, metrics: dict[str, float]) -> Callable[..., Any]:
    """`original` whose zero-shot metrics, the first it puts into its record, are followed by ours."""
    zero_shot_eval = original.__globals__["zero_shot_eval"]

    def with_retrieval(*args: Any, **kwargs: Any) -> dict[str, float]:
        return {**zero_shot_eval(*args, **kwargs), **metrics}

    from .registration import with_global

    return with_global(original, "zero_shot_eval", with_retrieval)


def _unwrap(model: Any) -> Any:
    """The model inside DistributedDataParallel and torch.compile."""
    while inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None):
        model = inner
    return model


def _is_csv(args: Any) -> bool:
    return bool(args.dataset_type == "csv" or (args.dataset_type == "auto" and args.val_data.endswith(("csv", "tsv"))))


@functools.lru_cache(maxsize=1)
def _validation_set(
    val_data: str, is_csv: bool, image_key: str, caption_key: str, separator: str, peers: Peers
) -> EvalSet:
    """Read once, used after every epoch."""
    found = read_csv(val_data, image_key, caption_key, separator) if is_csv else read_shards(val_data)
    images = _readable(found, peers)
    if not images:
        raise EvalDataError(f"{val_data}: no image can be read; the log names them with their reasons.")
    data = EvalSet(images, val_data)
    _log.info(
        "Retrieval on %s: %d images, %d captions (%d distinct).",
        val_data,
        len(images),
        data.captions,
        len(data.texts),
    )
    return data


def _readable(images: list[CaptionedImage], peers: Peers) -> list[CaptionedImage]:
    """Those that decode; the log names the others: a run of hours must not end because of one broken image.

    One rank tries each image and tells the others, so that all go on with the same ones whatever a store did to one.
    """
    world = peers.world
    mine = [_read_error(image) for image in images[peers.rank :: world]]
    errors: list[Any] = [mine] * world
    if world > 1:
        dist.all_gather_object(errors, mine)
    readable = []
    for number, image in enumerate(images):
        error = errors[number % world][number // world]
        if error is None:
            readable.append(image)
        elif peers.rank == 0:
            _log.warning("Left out of the retrieval metrics: %s", error)
    return readable


def _read_error(image: CaptionedImage) -> str | None:
    """Why the image does not decode; None if it does."""
    try:
        load_image(image)
    except EvalDataError as error:
        return str(error)
    return None
