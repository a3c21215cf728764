"""Multi-scale alignment (MSA) for remote sensing image-text retrieval, as a plugin for open_clip.

Installed, it is active wherever torch is imported. `import msa_openclip` activates it where torch's entry points are
off (TORCH_DEVICE_BACKEND_AUTOLOAD=0). Public names are imported on first use:

    from msa_openclip import EvalSet, evaluate, load, read_captions
    model = load("MSA-ViT-B=epoch_10.pt")
    test = EvalSet(read_captions("dataset_rsitmd.json", "images", split="test"), "RSITMD test")
    print(evaluate(model.scorer, test, model.preprocess, model.tokenizer).summaries()["fused"]["mR"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .autoload import activate

if TYPE_CHECKING:
    from .config import MSACfg
    from .data.captioned import CaptionedImage
    from .data.readers import read_captions, read_class_folder, read_folder, read_shards
    from .embedding.embedder import Embedder
    from .embedding.job import embed
    from .embedding.partitions import partitions, write_vectors
    from .evaluation.eval_set import EvalSet
    from .evaluation.evaluate import evaluate
    from .evaluation.loading import load
    from .evaluation.options import EvalOptions
    from .evaluation.zero_shot import classify
    from .model.msaclip import MSACLIP
    from .pair_scores.formula import ImageSide, TextSide, match_logits
    from .search.build import build_index
    from .search.filters import SearchFilter
    from .search.index import ImageIndex
    from .search.searcher import Searcher
    from .training.loss import MSALoss

__version__ = "0.1.0"

_PUBLIC = {
    "CaptionedImage": "data.captioned",
    "Embedder": "embedding.embedder",
    "EvalOptions": "evaluation.options",
    "EvalSet": "evaluation.eval_set",
    "ImageIndex": "search.index",
    "ImageSide": "pair_scores.formula",
    "MSACLIP": "model.msaclip",
    "MSACfg": "config",
    "MSALoss": "training.loss",
    "SearchFilter": "search.filters",
    "Searcher": "search.searcher",
    "TextSide": "pair_scores.formula",
    "build_index": "search.build",
    "classify": "evaluation.zero_shot",
    "embed": "embedding.job",
    "evaluate": "evaluation.evaluate",
    "load": "evaluation.loading",
    "match_logits": "pair_scores.formula",
    "partitions": "embedding.partitions",
    "read_captions": "data.readers",
    "read_class_folder": "data.readers",
    "read_folder": "data.readers",
    "read_shards": "data.readers",
    "write_vectors": "embedding.partitions",
}
"""Name -> module below this package."""

__all__ = [
    "MSACLIP",
    "CaptionedImage",
    "Embedder",
    "EvalOptions",
    "EvalSet",
    "ImageIndex",
    "ImageSide",
    "MSACfg",
    "MSALoss",
    "SearchFilter",
    "Searcher",
    "TextSide",
    "activate",
    "build_index",
    "classify",
    "embed",
    "evaluate",
    "load",
    "match_logits",
    "partitions",
    "read_captions",
    "read_class_folder",
    "read_folder",
    "read_shards",
    "write_vectors",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


activate()
