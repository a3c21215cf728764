"""Tiny model configurations for open_clip's kinds of towers, each with and without `msa_cfg`, and tiny inputs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EMBED_DIM = 24
CONTEXT_LENGTH = 13
WORDS = ("a", "many", "some", "two", "white", "green", "planes", "trees", "are", "near")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)

VISION: dict[str, dict[str, Any]] = {
    "ViT": {"image_size": 32, "layers": 3, "width": 20, "head_width": 10, "patch_size": 8},
    "RN": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 6, "head_width": 48, "patch_size": None},
    "timm-RN": {
        "timm_model_name": "test_resnet.r160_in1k",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "none",
        "image_size": 64,
    },
    "timm-ViT": {
        "timm_model_name": "test_vit.r160_in1k",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 160,
    },
}
"""Image towers by kind; test_resnet and test_vit are timm's own tiny models."""

SCALES: dict[str, list[dict[str, Any]]] = {
    "ViT": [{"stage": 1, "pool": "max"}, {"stage": 3, "pool": "avg"}],
    "RN": [*({"stage": stage, "pool": "max"} for stage in (1, 2, 3)), {"stage": 4, "pool": "avg"}],
    "timm-RN": [*({"stage": stage, "pool": "max"} for stage in (1, 2, 3)), {"stage": 4, "pool": "avg"}],
    "timm-ViT": [{"stage": 2, "pool": "max"}, {"stage": 6, "pool": "avg"}],
}

TEXT: dict[str, Any] = {"context_length": CONTEXT_LENGTH, "vocab_size": 49408, "width": 14, "heads": 2, "layers": 2}


def bert_text(directory: Path) -> dict[str, Any]:
    """Text tower and tokenizer from the folder that `write_bert` filled."""
    return {
        "context_length": CONTEXT_LENGTH,
        "hf_model_name": str(directory),
        "hf_tokenizer_name": str(directory),
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "hf_proj_type": None,
    }


def config(
    vision: str = "ViT", *, text: dict[str, Any] | None = None, msa: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A model configuration; with `msa`, settings over the tiny defaults, it is one of ours."""
    result = {"embed_dim": EMBED_DIM, "vision_cfg": VISION[vision], "text_cfg": text or TEXT}
    if msa is not None:
        result |= {"custom_text": True, "msa_cfg": {"image_scales": SCALES[vision], "heads": 4, **msa}}
    return copy.deepcopy(result)


def write_config(directory: Path, name: str, content: dict[str, Any]) -> Path:
    """The file that makes open_clip know the model `name`."""
    path = directory / f"{name}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_bert(directory: Path) -> Path:
    """A random BERT of width EMBED_DIM with a word-level vocabulary, as Hugging Face saves them."""
    from transformers import BertConfig, BertModel, BertTokenizer

    directory.mkdir()
    sizes = {"hidden_size": EMBED_DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 31}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=37, **sizes)).save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    return directory


def images(model: Any, count: int = 5, seed: int = 0) -> Tensor:
    """Random images of the size that the model expects."""
    size = model.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def texts(count: int = 5, seed: int = 0, *, vocabulary: int = 49406, length: int = CONTEXT_LENGTH) -> Tensor:
    """Token ids as open_clip's BPE tokenizer makes them, of different lengths: start, words, end, padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(count, length, dtype=torch.long)
    for row in ids:
        words = int(torch.randint(1, length - 1, (), generator=generator))
        row[1 : words + 1] = torch.randint(1, vocabulary, (words,), generator=generator)
        row[0], row[words + 1] = vocabulary, vocabulary + 1
    return ids
