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
from typing import Any

import torch.distributed as dist
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import nn

from ..data.captioned import CaptionedImage, EvalDataError
from ..data.pixels import load_image
from ..data.readers import read_csv, read_shards
from ..data.tokenizers import load_tokenizer
from ..distributed import Peers, failing_together, unwrapped
from ..evaluation.eval_set import EvalSet
from ..evaluation.evaluate import Evaluation, evaluate
from ..evaluation.options import EvalOptions
from ..evaluation.scorer import Scorer
from ..model.msaclip import MSACLIP
from ..shards.output import printable

EVALUATE_VARIABLE = "MSA_OPENCLIP_EVALUATE"
"""Environment variable: `msa` (default) adds the metrics for MSA models, `all` for every model, `off` for none."""

_log = logging.getLogger(__name__)


def prepare(args: Any, *, is_msa: bool) -> None:
    """Read the validation data before training begins: what is wrong with it is said now, not after an epoch.

    Raises:
        EvalDataError: the data cannot be read, or none of its images.
        ValueError: EVALUATE_VARIABLE is unknown.
    """
    if _is_wanted(is_msa=is_msa) and args.val_frequency and not (_horovod(args) and args.rank != 0):
        _data(args)


def metrics_or_none(
    whole_model: Callable[[], nn.Module], data: dict[str, Any], args: Any, tokenizer: Any = None
) -> dict[str, float]:
    """`retrieval_metrics`, or none of them and a line in the log: in training the checkpoint comes after validation.

    That goes for the model too, whose weights `whole_model` may have to gather from all ranks.
    """
    try:
        with failing_together(_peers(args)):
            model = whole_model()
        return retrieval_metrics(model, args, tokenizer)
    except Exception:
        if "train" not in data:
            raise
        _log.exception("No retrieval metrics of this epoch; training goes on.")
        return {}


def retrieval_metrics(model: nn.Module, args: Any, tokenizer: Any = None) -> dict[str, float]:
    """Metrics of `args.val_data` by key; all of them on every rank."""
    inner = unwrapped(model)
    inner.eval()
    transform = image_transform_v2(PreprocessCfg(**inner.visual.preprocess_cfg), is_train=False)
    evaluation = evaluate(
        Scorer(inner, args.precision),
        _data(args),
        transform,
        tokenizer or load_tokenizer(args.model),
        EvalOptions(batch_size=args.batch_size, workers=args.workers),
        _peers(args),
    )
    return record(evaluation)


def _peers(args: Any) -> Peers:
    return Peers(args.rank, args.world_size) if args.distributed and not _horovod(args) else Peers()


def _data(args: Any) -> EvalSet:
    keys = (args.val_data, _is_csv(args), args.csv_img_key, args.csv_caption_key, args.csv_separator)
    return _validation_set(*keys, _peers(args))


def record(evaluation: Evaluation) -> dict[str, float]:
    """The flat record of an evaluation: everything of the main rankings, mR of those with one scale alone."""
    metrics: dict[str, float] = {}
    for ranking, summary in evaluation.summaries().items():
        short = {"mR": summary["mR"]} if "_scale" in ranking else summary
        metrics |= {f"retrieval_{ranking}_{name}": value for name, value in short.items()}
    for ranking, summary in evaluation.summaries(merged=True).items():
        if "_scale" not in ranking:
            metrics[f"retrieval_{ranking}_merged_mR"] = summary["mR"]
    return metrics


def is_asked_for(model: nn.Module, data: dict[str, Any], epoch: int, args: Any) -> bool:
    """Whether this epoch's validation reports retrieval metrics of the model; the same answer on every rank."""
    if not _is_wanted(is_msa=isinstance(unwrapped(model), MSACLIP)):
        return False
    # From here on as in open_clip's own evaluate; synthetic data and Horovod's other ranks have nothing to rank.
    due = args.val_frequency and (epoch % args.val_frequency == 0 or epoch == args.epochs)
    alone = _horovod(args) and args.rank != 0
    return bool("val" in data and due and args.dataset_type != "synthetic" and not alone)


def _is_wanted(*, is_msa: bool) -> bool:
    wanted = os.environ.get(EVALUATE_VARIABLE, "msa")
    if wanted not in ("msa", "all", "off"):
        raise ValueError(f"{EVALUATE_VARIABLE}: {wanted!r} is unknown; choose msa, all or off.")
    return wanted == "all" or (wanted == "msa" and is_msa)


def _horovod(args: Any) -> bool:
    return bool(getattr(args, "horovod", False))  # not every open_clip has the option


def _is_csv(args: Any) -> bool:
    return bool(args.dataset_type == "csv" or (args.dataset_type == "auto" and args.val_data.endswith(("csv", "tsv"))))


@functools.lru_cache(maxsize=1)
def _validation_set(
    val_data: str, is_csv: bool, image_key: str, caption_key: str, separator: str, peers: Peers
) -> EvalSet:
    """Read once, used after every epoch."""
    with failing_together(peers):
        everything = read_csv(val_data, image_key, caption_key, separator) if is_csv else read_shards(val_data)
    images = _readable(everything, peers)
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
    world_size = peers.world_size
    mine = [_read_error(image) for image in images[peers.rank :: world_size]]
    errors: list[Any] = [mine] * world_size
    if world_size > 1:
        dist.all_gather_object(errors, mine)
    readable = []
    for number, image in enumerate(images):
        error = errors[number % world_size][number // world_size]
        if error is None:
            readable.append(image)
        elif peers.rank == 0:
            _log.warning("Left out of the retrieval metrics: %s", printable(error))
    return readable


def _read_error(image: CaptionedImage) -> str | None:
    """Why the image does not decode; None if it does."""
    try:
        load_image(image)
    except EvalDataError as error:
        return str(error)
    return None
