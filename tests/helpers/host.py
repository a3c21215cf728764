"""What differs between the lines of open_clip, as far as tests have to know."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import open_clip
from torch import Tensor, nn

HAS_TASKS = hasattr(open_clip, "create_task")
"""open_clip 4.x, whose trainer moves a task about, and dicts."""
TOKENIZERS_BRING_CODE = not HAS_TASKS
"""Whether a tokenizer's folder may bring code at all; 4.x drops the switch, whoever sets it."""
LOCKS_PROJECTIONS = HAS_TASKS
"""Whether locking a tower of timm or Hugging Face also locks the projection behind it; 3.x lets that learn."""
MAKES_LOSS = "create_task" if HAS_TASKS else "create_loss"
"""The function of open_clip that decides which loss a model trains with."""
DEFAULTS = {"distill": False, "siglip": False, "horovod": False, "local_loss": False, "gather_with_grad": False}


def loss_of(args: Any) -> Any:
    """The loss that open_clip's trainer would use for `args.model`; it reads what a parser gives."""
    for name, value in {**DEFAULTS, "rank": 0, "world_size": 1, "accum_freq": 1}.items():
        if not hasattr(args, name):
            setattr(args, name, value)
    if HAS_TASKS:
        return open_clip.create_task(args, open_clip.create_model(args.model)).loss
    return open_clip.create_loss(args)


def traits() -> dict[str, Any]:
    """What the host's own pipeline has to be told of a plain CLIP model, from 4.2.1 on."""
    from open_clip_train.data import get_wds_dataset

    if "model_traits" not in inspect.signature(get_wds_dataset).parameters:
        return {}
    return {"model_traits": importlib.import_module("open_clip.model_traits").CLIP_TRAITS}


def trained(model: nn.Module) -> Any:
    """What the trainer gives to its `evaluate`."""
    return open_clip.CLIPTask(model, default_loss=False) if HAS_TASKS else model


def images_and_texts(batch: Any) -> tuple[Tensor, Tensor]:
    """What a batch of the trainer's data holds."""
    if isinstance(batch, Mapping):
        return batch["image"], batch["text"]
    images, texts = batch
    return images, texts


def make_batch(images: Tensor, texts: Tensor) -> Any:
    """The inverse."""
    return {"image": images, "text": texts} if HAS_TASKS else (images, texts)
