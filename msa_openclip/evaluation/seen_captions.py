"""Which captions of an evaluation stand in the training set: a model may know those by heart.

Captions count as the same when they are so after `clean_caption` (white space) and case folding, word by word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..data.captioned import EvalDataError
from ..shards.options import ReadOptions
from ..shards.readers import formats
from ..shards.records import Rejection, folded_caption

SEEN, UNSEEN = "seen captions", "unseen captions"


def seen_parts(texts: Sequence[str], train_captions: Iterable[str]) -> dict[str, Tensor]:
    """Distinct captions in two parts, (C,) True where they belong to it; a part without captions is left out.

    Example:
        >>> seen_parts(["A lake", "two planes"], ["a  lake"])
        {'seen captions': tensor([ True, False]), 'unseen captions': tensor([False,  True])}
    """
    known = set(map(folded_caption, train_captions))
    seen = torch.tensor([folded_caption(text) in known for text in texts])
    return {name: part for name, part in ((SEEN, seen), (UNSEEN, ~seen)) if part.any()}


def read_train_captions(source: str, kind: str = "auto") -> list[str]:
    """Captions of the train split of shards or of a caption file; of sources without splits all of them.

    Raises:
        EvalDataError: there are none.
        ShardError: the source cannot be read.
    """
    options, captions, splits = ReadOptions(kind=kind), list[str](), set[str]()
    for entry in formats.read(source, options):
        if isinstance(entry, Rejection):
            continue
        split = options.renames.get(entry.split or "", entry.split)
        splits.add(str(split))
        if split in (None, "train"):
            captions += entry.captions
    if not captions:
        raise EvalDataError(f"{source}: no captions of a split train; it has {', '.join(sorted(splits)) or 'nothing'}.")
    return captions
