"""The shipped model configurations: geometry of their bases; models of them that train, without their memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from msa_openclip.config import MSACfg
from msa_openclip.model.msaclip import MSACLIP

DIRECTORY = Path(__file__).parents[2] / "model_configs"
BASES = {"MSA-ViT-B": "ViT-B-32", "MSA-ViT-B-16": "ViT-B-16", "MSA-ViT-L-14": "ViT-L-14", "MSA-RN50": "RN50"}
BERT_MODELS = {
    **dict.fromkeys(("MSA-ResNet50-BERT", "MSA-ResNet18-BERT", "MSA-Swin-T-BERT"), "bert-base-uncased"),
    "MSA-EfficientNetLite0-MiniLM": "sentence-transformers/all-MiniLM-L6-v2",
}
"""Models with a text tower of Hugging Face's BERT kind, and which."""
SIZES: dict[str, dict[str, int]] = {
    "bert-base-uncased": {},
    "sentence-transformers/all-MiniLM-L6-v2": {
        "hidden_size": 384,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
}
"""Of the text towers, where they differ from Hugging Face's default configuration."""
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.json"))


def shipped(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configurations of the text towers by name, with one layer and few words."""
    from transformers import BertConfig

    directories = {name: tmp_path_factory.mktemp("bert") for name in SIZES}
    for name, directory in directories.items():
        BertConfig(num_hidden_layers=1, vocab_size=11, **SIZES[name]).save_pretrained(directory)
    return directories


def device_of(name: str) -> str:
    """Hugging Face's towers look at the values of masks, which the meta device has not."""
    return "cpu" if name in BERT_MODELS else "meta"


@pytest.fixture
def model(name: str, berts: dict[str, Path]) -> MSACLIP:
    """The shipped model, in its full geometry on the meta device, which has shapes and graphs but no memory."""
    settings = copy.deepcopy(shipped(name))
    assert settings.pop("custom_text") is True
    if name in BERT_MODELS:
        assert settings["text_cfg"]["hf_model_name"] == BERT_MODELS[name]
        settings["text_cfg"] |= {"hf_model_name": str(berts[BERT_MODELS[name]]), "hf_model_pretrained": False}
    with torch.device(device_of(name)):
        return MSACLIP(**settings)


def test_all_models_of_the_family_are_there() -> None:
    assert {*NAMES} == {*BASES, *BERT_MODELS, "MSA-ViT-Ti"}
    assert {*NAMES} <= {*open_clip.list_models()}


@pytest.mark.parametrize("name", NAMES)
def test_names_lead_open_clip_nowhere_else(name: str) -> None:
    """open_clip and its trainer choose losses, tokenizers and optimizer defaults by these parts of a name."""
    assert not [part for part in ("coca", "siglip", "genlip", "genlap") if part in name.lower()]
    assert ("ViT" in name) == ("patch_size" in shipped(name)["vision_cfg"] and "RN" not in name)


@pytest.mark.parametrize(("name", "base"), BASES.items())
def test_geometry_is_that_of_the_base(name: str, base: str) -> None:
    ours, theirs = shipped(name), open_clip.get_model_config(base)
    assert ours.pop("msa_cfg")["base"] == base
    assert ours.pop("custom_text") is True
    assert ours == theirs


@pytest.mark.parametrize(("name", "base"), BASES.items())
def test_pretrained_tags_are_those_of_the_base(name: str, base: str) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    assert tags
    assert tags == open_clip.list_pretrained_tags_by_model(base)


def test_the_papers_model_is_the_papers() -> None:
    config = shipped("MSA-ResNet50-BERT")
    assert MSACfg.from_dict(config["msa_cfg"]) == MSACfg.from_dict(
        {
            "preset": "paper",
            "width": 768,
            "heads": 12,
            "image_scales": [{"stage": s, "pool": "max"} for s in (1, 2, 3)] + [{"stage": 4, "pool": "avg"}],
        }
    )
    assert config["embed_dim"] == 768
    assert (config["vision_cfg"]["timm_model_name"], config["vision_cfg"]["timm_proj"]) == ("resnet50", "none")
    assert config["text_cfg"]["context_length"] == 31
    assert config["text_cfg"]["hf_pooler_type"] == "cls_last_hidden_state_pooler"
    assert config["text_cfg"]["hf_proj_type"] is None


CHANNELS = {
    "MSA-ViT-B": [768] * 4,
    "MSA-ViT-B-16": [768] * 4,
    "MSA-ViT-L-14": [1024] * 4,
    "MSA-RN50": [256, 512, 1024, 2048],
    "MSA-ResNet50-BERT": [256, 512, 1024, 2048],
    "MSA-ResNet18-BERT": [64, 128, 256, 512],
    "MSA-Swin-T-BERT": [96, 192, 384, 768],
    "MSA-EfficientNetLite0-MiniLM": [48, 80, 224, 640],
}


@pytest.mark.parametrize("name", NAMES)
def test_models_train_every_parameter(name: str, model: MSACLIP) -> None:
    config = shipped(name)
    if name in CHANNELS:
        assert model.image_scales.channels == CHANNELS[name]
    size, length = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
    with torch.device(device_of(name)):
        output = model(torch.ones(3, 3, size, size), torch.ones(3, length, dtype=torch.long))
    scales = len(config["msa_cfg"]["image_scales"])
    assert output["image_features"].shape == output["text_features"].shape == (3, config["embed_dim"])
    assert output["match_image_query"].shape[:2] == (3, scales)
    assert output["match_text_key"].shape[:3] == (3, scales, length - 1)
    floats: list[Tensor] = [value for value in output.values() if value.is_floating_point()]
    torch.stack([value.sum() for value in floats]).sum().backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BERT_MODELS])
def test_quick_gelu_reaches_both_towers(name: str) -> None:
    config = shipped(name)
    del config["custom_text"]
    with torch.device("meta"):
        model = MSACLIP(**config, quick_gelu=True)
    quick = {key.split(".")[0] for key, module in model.named_modules() if type(module).__name__ == "QuickGELU"}
    assert quick == ({"text"} if name == "MSA-RN50" else {"visual", "text"})
    assert not [key for key, module in model.named_modules() if isinstance(module, torch.nn.GELU)]
