"""Images -> what an index keeps of them, at the rate of the image tower: it never waits for pixels, and runs as fast as
the processor lets it.

Shapes: n images, k of them readable, S scales, D width of MSCMAT, E embed_dim.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data.captioned import EvalDataError
from .scorer import Scorer

_TEXT_PARTS = ("text", "transformer", "token_embedding", "ln_final")  # of MSA's models, and of plain CLIP
_BATCHES_AHEAD = 2

T = TypeVar("T")


class Encoded(NamedTuple):
    """Vectors of those images that could be read, and why the others could not."""

    features: NDArray[np.float16] | None
    """(k, E) normalised global features; None if k is 0."""
    projected: NDArray[np.float16] | None
    """(k, S, D) MSCMAT's vectors m; None without MSCMAT, too."""
    problems: list[str | None]
    """(n) what is wrong with an image; None where nothing is."""


def fastest_precision(device: torch.device) -> str:
    """`bf16` where the hardware computes in it (AVX512-BF16, AMX, CUDA from compute capability 8), else `fp32`."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    cpu: Any = torch.cpu
    has_bf16 = getattr(cpu, "_is_avx512_bf16_supported", cpu._is_amx_tile_supported)  # torch 2.5 tells of AMX alone
    return "bf16" if device.type == "cpu" and has_bf16() else "fp32"


def image_scorer(scorer: Scorer, precision: str) -> Scorer:
    """A scorer of images alone, in the form in which their tower runs fastest.

    Weights in bfloat16 rather than autocast: under it PyTorch leaves the fast path of a ViT's attention, and a ViT-B-32
    encodes fewer images a second than in float32 instead of four times as many.  Convolutions take channels last.

    Args:
        scorer: of the whole model; it stays as it is, down to the values of its weights.
        precision: `fp32` is the precision that the scorer has, `bf16` casts a copy of the image part.
    """
    if precision != "bf16":
        _channels_last(scorer.model)
        return scorer
    view = copy.copy(scorer.model)
    view._modules = {
        name: module if name in _TEXT_PARTS else copy.deepcopy(module).to(torch.bfloat16)
        for name, module in scorer.model._modules.items()
    }
    _channels_last(view)
    return Scorer(view, "pure_bf16")


def _channels_last(model: Any) -> None:
    """Lay out the weights of a convolutional image tower so that its convolutions run without reordering pixels."""
    visual = getattr(model, "visual", None)
    if visual is not None and sum(isinstance(module, nn.Conv2d) for module in visual.modules()) > 1:
        visual.to(memory_format=torch.channels_last)


class ImageEncoder:
    """Encodes images batch by batch, while threads decode those that come next.

    Args:
        scorer: of images, see `image_scorer`.
        batch_size: images that the tower takes at once.
        readers: threads that read and decode.
    Raises:
        ValueError: a number is less than 1.
    """

    def __init__(self, scorer: Scorer, *, batch_size: int = 32, readers: int = 1) -> None:
        for name, value in (("batch_size", batch_size), ("readers", readers)):
            if value < 1:
                raise ValueError(f"{name}: {value} must be at least 1.")
        self._scorer, self._batch_size, self._readers = scorer, batch_size, readers

    def __call__(self, items: Sequence[T], pixels: Callable[[T], Tensor]) -> Encoded:
        """Vectors of items, in their order.

        Args:
            items: n of whatever `pixels` takes.
            pixels: of one item, (3, h, w); raises EvalDataError where the item is to be passed over.
        Raises:
            ValueError: vectors that float16 cannot hold.
        """
        features, projected, problems = [], [], list[str | None]()
        for batch in self._read(items, pixels):
            problems += [str(found) if isinstance(found, EvalDataError) else None for found in batch]
            readable = [found for found in batch if isinstance(found, Tensor)]
            if not readable:
                continue
            feature, vectors = self._scorer.project(torch.stack(readable))
            features.append(_half(feature))
            if vectors is not None:
                projected.append(_half(vectors))
        return Encoded(
            np.concatenate(features) if features else None, np.concatenate(projected) if projected else None, problems
        )

    def _read(self, items: Iterable[T], pixels: Callable[[T], Tensor]) -> Iterator[list[Tensor | EvalDataError]]:
        """Pixels of each batch of items; what `pixels` says of those that are to be passed over."""

        def read(item: T) -> Tensor | EvalDataError:
            try:
                return pixels(item)
            except EvalDataError as error:
                return error

        left, size = iter(items), self._batch_size
        waiting: deque[Future[Tensor | EvalDataError]] = deque()
        pool = ThreadPoolExecutor(self._readers)
        try:
            while True:
                ahead = (1 + _BATCHES_AHEAD) * size - len(waiting)
                waiting += [pool.submit(read, item) for item in itertools.islice(left, ahead)]
                if not waiting:
                    return
                yield [waiting.popleft().result() for _ in range(min(size, len(waiting)))]
        finally:
            pool.shutdown(cancel_futures=True)


def _half(values: Tensor) -> NDArray[np.float16]:
    half = values.cpu().half()
    if not torch.isfinite(half).all():
        raise ValueError("vectors that float16 cannot hold; check the model's weights and precision.")
    result: NDArray[np.float16] = half.numpy()
    return result
