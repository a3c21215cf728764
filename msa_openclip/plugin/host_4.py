"""open_clip 4.x: the trainer moves a task about, which holds model and loss (`create_task`), and batches are dicts."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import Peers, failing_together, unwrapped
from .host import Batches, Need, Reorder, has, note_lacking, require_known_host, takes, uses
from .patching import replace

_OWN_KEYS = {"json_text_key": None, "text_key": "txt", "image_key": "jpg;png;jpeg;webp"}
"""Options by which the host finds captions and images in shards of other layouts than ours, with their defaults."""


class OpenClip4:
    needs: Mapping[str, tuple[Need, ...]] = {
        "open_clip.factory": (takes("create_task", "args", "model"),),
        "open_clip_train.data": (takes("get_wds_dataset", "naflex_data_config"), has("get_text_pad_id")),
        "open_clip_train.train": (uses("evaluate", "zero_shot_eval_all"),),
        "open_clip.task": (
            takes("CLIPTask", "model", "loss"),
            uses("CLIPTask.training_forward", "trainable_module", "loss"),
            uses("CLIPTask.state_dict", "trainable_module"),
            uses("CLIPTask.get_trainable_module", "trainable_module_ema"),
        ),
    }
    zero_shot_eval = "zero_shot_eval_all"

    def __init__(self) -> None:
        self._skeletons: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        """Models without weights, by the task that will shard theirs over ranks."""

    def extend_loss(self, factory: ModuleType) -> None:
        """Give the host's own task for an MSA model, which `create_task` builds as for every CLIP model, MSALoss."""
        original = factory.create_task

        @functools.wraps(original)
        def create_task(args: Any, model: nn.Module, *positional: Any, **named: Any) -> Any:
            cfg = getattr(unwrapped(model), "msa_cfg", None)
            if cfg is None:
                return original(args, model, *positional, **named)
            from .losses import msa_loss

            note_lacking(importlib.import_module("open_clip.task"), self.needs["open_clip.task"])
            require_known_host()
            loss = msa_loss(cfg, args)
            _refuse_ragged_accumulation(args)
            task = original(args, model, *positional, **named)
            task.loss = loss
            if cfg.dates > 1:
                task.create_dummy_batch = _of_dates(task.create_dummy_batch, cfg.dates)
            if getattr(args, "fsdp", False):
                self._skeletons[task] = _without_weights(unwrapped(model))
            return task

        replace(factory, "create_task", create_task)

    def model_of(self, trained: Any) -> Any:
        return unwrapped(getattr(unwrapped(trained), "trainable_module", trained))

    def whole_model(self, trained: Any, args: Any) -> Any:
        """The averaged weights where the task keeps them, as the host evaluates; else those in training."""
        task = unwrapped(trained)
        if not hasattr(task, "trainable_module"):
            return task
        if task not in self._skeletons or task.has_ema or not args.distributed:
            return task.get_trainable_module(use_ema=True)
        return _gathered(task, self._skeletons[task], args)

    def batches(self, args: Any, tokenizer: Any) -> Batches:
        """Dicts, of dicts and tensors alone, which the host moves to the device; texts are cut to the longest one of
        the batch where the text tower takes it so."""
        from ..model.labelled import LabelledTexts, to_dicts

        def batch(images: Any, texts: Any) -> dict[str, Any]:
            images, texts = to_dicts(images, texts)
            return {"image": images, "text": texts}

        if not getattr(args, "variable_text", False):
            return batch
        from open_clip_train.data import collate_variable_text_dicts, get_text_pad_id

        pad = get_text_pad_id(tokenizer)
        limits = {"text_pad_multiple": args.text_pad_multiple, "text_pad_cap": tokenizer.context_length}

        def cut_batch(images: Any, texts: Any) -> dict[str, Any]:
            labelled = isinstance(texts, LabelledTexts)
            ids = texts.texts if labelled else texts
            if not isinstance(ids, Tensor):  # cached ones are of one length
                return batch(images, texts)
            cut = collate_variable_text_dicts([{"text": row[row != pad]} for row in ids], pad_id=pad, **limits)
            return {**cut, **batch(images, LabelledTexts(cut["text"], texts.classes) if labelled else cut["text"])}

        return cut_batch

    def reorder(self, args: Any, tokenizer: Any, epoch: Any) -> Reorder | None:
        """Texts of like length together (--length-bucketing), by the host's own stage."""
        if not (getattr(args, "variable_text", False) and getattr(args, "length_bucketing", False)):
            return None
        from open_clip_train.data import LengthBucketer, get_text_pad_id

        bucketer: Reorder = LengthBucketer(
            length_fns=[_TextLength(get_text_pad_id(tokenizer))],
            pool=args.bucket_pool,
            chunk=args.bucket_chunk,
            seed=args.seed,
            epoch=epoch,
            prefetch_pools=getattr(args, "bucket_prefetch_pools", 0),
        )
        return bucketer

    def reads_itself(self, args: Any, naflex_data_config: Any) -> str | None:
        if naflex_data_config is not None:
            return "--use-naflex"
        for name, default in _OWN_KEYS.items():
            if getattr(args, name, default) not in (default, None):
                return f"--{name.replace('_', '-')}"
        return None


class _TextLength:
    """Number of tokens of a sample that are no padding; a class, since samples are read in other processes."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, sample: Mapping[str, Any]) -> int:
        return int((sample["text"] != self.pad).sum())


def _refuse_ragged_accumulation(args: Any) -> None:
    if getattr(args, "variable_text", False) and args.accum_freq > 1:
        raise ValueError(
            f"--accum-freq {args.accum_freq}: {args.model} reads texts as long as each batch has them "
            "(text_cfg.variable_text), and open_clip joins the micro-batches' tensors, which must be of one length. "
            "Leave out --accum-freq, or set variable_text to false."
        )


def _of_dates(create_dummy_batch: Callable[..., dict[str, Any]], dates: int) -> Callable[..., dict[str, Any]]:
    """What ranks run on in validation while the first one has a batch of its own (--fsdp), as samples of some dates."""

    @functools.wraps(create_dummy_batch)
    def samples(*args: Any, **named: Any) -> dict[str, Any]:
        batch = create_dummy_batch(*args, **named)
        return {**batch, "image": torch.stack([batch["image"]] * dates, dim=1)}

    return samples


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters take no memory."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty)


def _gathered(task: Any, skeleton: nn.Module, args: Any) -> nn.Module:
    """A model with the weights that `task` keeps in shards (FSDP2), whole on every rank.

    An evaluation shares its images among ranks unevenly, and a sharded model would have all ranks wait for each other
    in every block.
    """
    state = task.state_dict()["state_dict"]  # whole on the first rank, which alone saves checkpoints; empty elsewhere
    weights = {}
    with failing_together(Peers(args.rank, args.world_size)):  # before any rank waits for what another broadcasts
        for name, like in skeleton.state_dict().items():
            weight = torch.empty(like.shape, dtype=like.dtype, device=args.device)
            weights[name] = weight.copy_(state[name].reshape(like.shape)) if args.rank == 0 else weight
    for weight in weights.values():
        dist.broadcast(weight, src=0)
    model = copy.deepcopy(skeleton)
    model.load_state_dict(weights, assign=True)
    return model.to(args.device)
