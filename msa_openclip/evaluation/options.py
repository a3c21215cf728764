"""What can be asked of an evaluation; imports nothing heavy, for the command line."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16")
"""Of the towers, as open_clip_train.main has them; open_clip itself takes any other word for fp32."""
RERANKINGS = {
    "galr": "galr (transductive)",
    "sar": "sar (transductive)",
    "qb-norm": "qb-norm (transductive)",
    "qb-norm-bank": "qb-norm (training queries)",
}
"""Ways to re-rank, and what rankings are called by them; those that need all test queries at once say so."""
ENCODER_PRECISIONS = ("auto", "fp32", "bf16")
"""Of the image tower while an archive is encoded; auto is bf16 where the processor computes in it."""
TEMPLATES = ("a satellite photo of {}.", "an aerial image of {}.", "an overhead view of {}.")
"""Captions of a scene class in zero-shot classification; {} is its name."""

MOST_BATCH = 1_000_000
MOST_MEMORY_MB = 1_000_000_000
"""A petabyte; torch counts in 64 bits, and fails far beyond these without naming an option."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How an evaluation runs; nothing here changes its result beyond rounding."""

    batch_size: int = 64
    workers: int = 0
    """Processes that decode images."""
    memory_mb: int = 1024
    """Bound on what grows with the data: image sides (on disk beyond it), score tiles and their working memory.
    On top come the model, the encoding of one batch, and the global features."""
    progress: bool = False
    """Progress bars on stderr, of rank 0 in a distributed run."""

    def __post_init__(self) -> None:
        batch, memory = 1 <= self.batch_size <= MOST_BATCH, 1 <= self.memory_mb <= MOST_MEMORY_MB
        if not batch or self.workers < 0 or not memory:
            raise ValueError(
                f"batch_size {self.batch_size}, workers {self.workers}, memory_mb {self.memory_mb}: "
                "expected at least 1, 0 and 1, "
                f"and of the first at most {MOST_BATCH}, of the last {MOST_MEMORY_MB}."
            )

    @property
    def memory_bytes(self) -> int:
        """`memory_mb` in bytes."""
        return self.memory_mb << 20
