"""How alike the captions of a batch are, by their token ids: what negatives of the triplet terms are forgiven.

Shapes: C captions, L token ids, V distinct ids in them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def caption_similarity(text_ids: Tensor) -> Tensor:
    """(C, L) token ids -> (C, C) share of words that two captions have in common, |A and B| / |A or B|.

    Ids that every caption holds (start, end, padding) say nothing and do not count; captions without others are alike.
    """
    ids, words = text_ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    holds = torch.zeros(len(text_ids), len(ids), device=text_ids.device).scatter_(1, words, 1.0)  # (C, V)
    holds = holds[:, ~holds.all(dim=0)]
    shared, count = holds @ holds.T, holds.sum(dim=1)
    either = count[:, None] + count[None, :] - shared
    return torch.where(either > 0, shared / either.clamp(min=1), 1.0)
