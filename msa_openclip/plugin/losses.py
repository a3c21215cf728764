"""MSALoss from the trainer's flags, for either line of open_clip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import MSACfg
    from ..training.loss import MSALoss

_REPLACING_FLAGS = ("distill", "siglip", "horovod")


def msa_loss(cfg: MSACfg, args: Any) -> MSALoss:
    """The loss of a model with this configuration.

    Raises:
        ValueError: a flag asks for another loss, or for a way to train that MSALoss does not know.
    """
    from ..training.loss import MSALoss

    for flag in _REPLACING_FLAGS:
        if getattr(args, flag, False):
            raise ValueError(f"{args.model} brings its own loss, which --{flag} would replace; leave out --{flag}.")
    return MSALoss(
        cfg,
        local_loss=args.local_loss,
        gather_with_grad=args.gather_with_grad,
        rank=args.rank,
        world_size=args.world_size,
        accum_freq=args.accum_freq,
        ragged_texts=bool(getattr(args, "variable_text", False)),
    )
