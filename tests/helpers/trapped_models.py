"""Folders of models that bring Python code along, which must not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch

from . import tiny

CODE = """
import pathlib
pathlib.Path({trap!r}).write_text("ran")
from transformers import BertConfig, BertModel, BertTokenizer
class Config(BertConfig): model_type = "trap"
class Model(BertModel): config_class = Config
class TrapTokenizer(BertTokenizer): pass
"""


def local_dir(folder: Path, bert: Path, trap: Path, part: str, *, plain: bool = False, **tokenizer_kwargs: Any) -> str:
    """A model folder with weights, whose `tokenizer` or text `tower` brings Python code that writes `trap`."""
    msa = None if plain else {"preset": "paper", "heads": 4}
    hub = folder if part == "tokenizer" else folder / "bert"  # open_clip looks for the tokenizer in the folder itself
    hub.mkdir(parents=True)
    for file in bert.iterdir():
        if part == "tower" or file.suffix != ".safetensors":  # which open_clip would take for the model's
            (hub / file.name).write_bytes(file.read_bytes())
    config = tiny.config("timm-RN", text=tiny.bert_text(bert), msa=msa)
    content = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.save(open_clip.create_model(f"local-dir:{folder}").state_dict(), folder / "open_clip_pytorch_model.bin")

    (hub / "trap.py").write_text(CODE.format(trap=str(trap)))
    name, classes = {
        "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": ["trap.TrapTokenizer", None]}),
        "tower": ("config.json", {"AutoConfig": "trap.Config", "AutoModel": "trap.Model"}),
    }[part]
    own = json.loads((hub / name).read_text()) | {"auto_map": classes, "tokenizer_class": "TrapTokenizer"}
    (hub / name).write_text(json.dumps(own | ({"model_type": "trap"} if part == "tower" else {})))
    config["text_cfg"] |= {"hf_tokenizer_name": "here"} if part == "tokenizer" else {"hf_model_name": str(hub)}
    if tokenizer_kwargs:
        config["text_cfg"]["tokenizer_kwargs"] = tokenizer_kwargs
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return f"local-dir:{folder}"
