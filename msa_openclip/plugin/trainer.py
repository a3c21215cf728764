"""open_clip's trainer, extended for MSA models: shards are read by our loader, validation reports retrieval metrics."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from ..distributed import unwrapped
from .configs import msa_settings
from .host import Host
from .installed import installed, lacks
from .patching import replace, with_global

_log = logging.getLogger(__name__)

LOADER_VARIABLE = "MSA_OPENCLIP_LOADER"
"""Environment variable: `msa` (default) reads shards by our loader for MSA models, `all` for every model."""


def extend_train(train: ModuleType) -> None:
    """Let open_clip's `evaluate` report retrieval metrics for MSA models; open_clip_train.main imports it from here.

    Its first argument, a model or what holds one, goes through the adapter; every rank has to call it, as open_clip
    does.  While training nothing is raised: open_clip writes the epoch's checkpoint after it has validated.
    """
    if lacks(train):
        return  # whoever wants to train one of our models is told
    original: FunctionType = train.evaluate
    signature = inspect.signature(original)

    @functools.wraps(original)
    def evaluate(trained: Any, *args: Any, **kwargs: Any) -> Any:
        from ..training.validation import is_asked_for, metrics_or_none

        given = signature.bind(trained, *args, **kwargs).arguments
        settings, data, host = given["args"], given["data"], installed()
        if not is_asked_for(host.model_of(trained), data, given["epoch"], settings):
            return original(trained, *args, **kwargs)
        whole_model = functools.partial(host.whole_model, trained, settings)
        metrics = metrics_or_none(whole_model, data, settings, given.get("tokenizer"))
        try:
            return _reporting(original, host, metrics)(trained, *args, **kwargs)
        except Exception:
            if "train" not in data:
                raise
            _log.exception("Validation failed after epoch %s; training goes on.", given["epoch"])
            return {}

    replace(train, "evaluate", evaluate)


def _reporting(original: FunctionType, host: Host, metrics: dict[str, float]) -> Callable[..., Any]:
    """`original` whose zero-shot metrics, the first it puts into its record, are followed by ours."""
    zero_shot_eval = original.__globals__[host.zero_shot_eval]

    def with_retrieval(*args: Any, **kwargs: Any) -> dict[str, float]:
        return {**zero_shot_eval(*args, **kwargs), **metrics}

    return with_global(original, host.zero_shot_eval, with_retrieval)


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
    if lacks(data):
        return
    original = data.get_wds_dataset
    signature = inspect.signature(original)

    @functools.wraps(original)
    def get_wds_dataset(args: Any, *positional: Any, **named: Any) -> Any:
        wanted = os.environ.get(LOADER_VARIABLE, "msa")
        if wanted not in ("msa", "all"):
            raise ValueError(f"{LOADER_VARIABLE}: {wanted!r} is unknown; choose msa or all.")
        msa_cfg = msa_settings(getattr(args, "model", ""), getattr(args, "cache_dir", None))
        is_msa = msa_cfg is not None
        if wanted == "msa" and not is_msa:
            return original(args, *positional, **named)
        from ..config import MSACfg
        from ..training import loader

        given, host = signature.bind(args, *positional, **named).arguments, installed()
        option = host.reads_itself(args, given.get("naflex_data_config"))
        cfg = MSACfg.from_dict(msa_cfg) if is_msa else None
        dates = cfg.dates if cfg else 1
        if option is not None:
            if dates > 1:
                raise ValueError(f"msa_cfg.dates: {dates}; with {option} open_clip itself reads one image a sample.")
            loader.require_one_caption_a_sample(args, given["is_train"], option)
            batches = original(args, *positional, **named)
        else:
            known, tokenizer = inspect.signature(loader.get_wds_dataset).parameters, given.get("tokenizer")
            batches = loader.get_wds_dataset(
                **{name: value for name, value in given.items() if name in known},
                batches=host.batches(args, tokenizer),
                reorder=functools.partial(host.reorder, args, tokenizer),
                classes=cfg is not None and cfg.loss.needs_classes,
                dates=dates,
            )
        if args.train_data and not given["is_train"]:
            from ..training.validation import prepare

            prepare(args, is_msa=is_msa)  # before an epoch is spent; after the loader has said what it cannot use
        return batches

    replace(data, "get_wds_dataset", get_wds_dataset)


def extend_legacy_train(legacy_train: ModuleType) -> None:
    """Refuse MSA models in the second trainer that open_clip 4.x keeps, which knows no loss but its own."""
    original = legacy_train.train_one_epoch

    @functools.wraps(original)
    def train_one_epoch(model: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(unwrapped(model), "msa_cfg"):
            raise RuntimeError("open_clip_train.legacy_main does not train MSA models; use open_clip_train.main.")
        return original(model, *args, **kwargs)

    replace(legacy_train, "train_one_epoch", train_one_epoch)
