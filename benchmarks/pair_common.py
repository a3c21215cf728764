"""What the pair stage's benchmarks share: operands of full size, the work they stand for, timing, a run's record."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import cpu_name
from torch import Tensor

from msa_openclip.pair_scores.formula import ImageSide, TextSide

SCALES, HEADS, WIDTH, TOKENS = 4, 12, 64, 30
FLOPS_PER_PAIR = 4 * HEADS * WIDTH * TOKENS * SCALES
"""Forwards: two products of d numbers per token, head and scale; three times that with backwards."""


def random_sides(
    images: int,
    texts: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    ragged: bool = False,
    requires_grad: bool = False,
) -> tuple[ImageSide, TextSide]:
    """Operands of the paper's sizes; `ragged` texts have 5 to N tokens, 17.5 on average."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, dtype=dtype, device=device)
        return values.requires_grad_(requires_grad)

    lengths = torch.randint(5, TOKENS + 1, (texts,)) if ragged else torch.full((texts,), TOKENS)
    mask = torch.arange(TOKENS) < lengths[:, None]
    head, token = (images, SCALES, HEADS, WIDTH), (texts, SCALES, TOKENS, HEADS, WIDTH)
    image_side = ImageSide(draw(*head), draw(*head), draw(images, SCALES, HEADS * WIDTH), draw(images, SCALES))
    with torch.no_grad():
        image_side.query.mul_(WIDTH**-0.5)
    return image_side, TextSide(draw(*token), draw(*token), draw(texts, HEADS * WIDTH), mask.to(device))


def step(compute: Callable[[ImageSide, TextSide], Tensor], images: ImageSide, texts: TextSide, upstream: Tensor) -> Any:
    """Forwards and backwards; the gradients of every field."""
    return torch.autograd.grad(compute(images, texts), [*images, *texts[:3]], upstream)


def seconds(work: Callable[[], object], *, synchronize: Callable[[], object] = lambda: None) -> float:
    """Wall time of one call."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def medians(works: dict[str, Callable[[], object]], repeats: int, **timing: Any) -> dict[str, float]:
    """Median seconds of each, run in turns after one round that is not counted."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, **timing))
    return {name: statistics.median(runs) for name, runs in times.items()}


def record() -> dict[str, Any]:
    """Machine, versions, command and how busy the machine was when the run began."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
