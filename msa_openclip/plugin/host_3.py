"""open_clip 3.x: the trainer asks `create_loss(args)` for the loss, and moves models and pairs of tensors about."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..distributed import unwrapped
from .configs import msa_settings
from .host import Batches, Need, Reorder, require_known_host, takes, uses
from .patching import replace


class OpenClip3:
    needs: Mapping[str, tuple[Need, ...]] = {
        "open_clip.factory": (takes("create_loss", "args"),),
        "open_clip_train.train": (uses("evaluate", "zero_shot_eval"), takes("train_one_epoch", "loss")),
    }
    zero_shot_eval = "zero_shot_eval"

    def extend_loss(self, factory: ModuleType) -> None:
        """Let `create_loss` return MSALoss where the trainer's model is ours."""
        original = factory.create_loss

        @functools.wraps(original)
        def create_loss(*arguments: Any, **named: Any) -> Any:
            args = arguments[0] if arguments else named.get("args")
            settings = msa_settings(getattr(args, "model", ""), getattr(args, "cache_dir", None))
            if settings is None:
                return original(*arguments, **named)
            from ..config import MSACfg
            from .losses import msa_loss

            require_known_host()
            return msa_loss(MSACfg.from_dict(settings), args)

        replace(factory, "create_loss", create_loss)

    def model_of(self, trained: Any) -> Any:
        return unwrapped(trained)

    def whole_model(self, trained: Any, args: Any) -> Any:
        return unwrapped(trained)

    def batches(self, args: Any, tokenizer: Any) -> Batches:
        return lambda images, texts: (images, texts)

    def reorder(self, args: Any, tokenizer: Any, epoch: Any) -> Reorder | None:
        return None

    def reads_itself(self, args: Any, naflex_data_config: Any) -> str | None:
        return None
