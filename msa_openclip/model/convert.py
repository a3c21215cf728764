"""State dicts trained with the paper authors' released code -> state dicts of MSA-ResNet50-BERT.

The released modules name their parameters inside each part as below; what stands before (the names of the parts, a
`module.` of DistributedDataParallel) varies, so each part is found by keys that only it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..shards.records import ShardError
from ..shards.storage import store

SCALES = (1, 2, 3, 4)
RESNET = ("conv1.", "bn1.", *(f"layer{s}." for s in SCALES))
BERT = ("embeddings.", "encoder.")

_WEIGHT_AND_BIAS = ("weight", "bias")
_ATTENTION = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
_GATED_MAP = {"fc": "embed", "att": "gate", "fc2": "out"}  # A, G, B of docs/method.md, section 1.2
_LOGIT_SCALE = math.log(1 / 0.07)  # open_clip's initial value: the paper's losses know no such scale


class ConversionError(ValueError):
    """A state dict is not one of the released code; the message names what is missing or left over."""


def convert_released_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `MSA-ResNet50-BERT` (or a model of that kind) from one of the released code.

    Left behind is what no score depends on: `ln_post`, BERT's pooler and position ids, ResNet's classifier.

    Raises:
        ConversionError: a part is missing, found twice or incomplete, or something is left over.
    """
    state = dict(state_dict)
    cross = _find(state, "cross-attention module", ["cross_attn1.in_proj_weight"])
    resnet = _find(state, "ResNet", ["layer1.0.conv1.weight"])
    bert = _find(state, "BERT", ["embeddings.word_embeddings.weight"])
    gated_map = _find(state, "gated map of the image tower", ["att.weight"])
    scale_maps = _find(state, "fc1 to fc4 of the image tower", [f"fc{s}.weight" for s in SCALES], besides=cross)

    names = {f"{cross}{released}": f"mscmat.{ours}" for released, ours in _cross_attention_names().items()}
    for s in SCALES:
        names |= {f"{scale_maps}fc{s}.{kind}": f"fusion.project.{s - 1}.{kind}" for kind in _WEIGHT_AND_BIAS}
    for released, ours in _GATED_MAP.items():
        names |= {f"{gated_map}{released}.{kind}": f"fusion.{ours}.{kind}" for kind in _WEIGHT_AND_BIAS}
    names |= _tree(state, resnet, RESNET, "visual.trunk.")
    dropped = {key for key in state if key.startswith((f"{cross}ln_post.", f"{bert}pooler."))}
    dropped |= {f"{bert}embeddings.position_ids"} | {f"{resnet}fc.{kind}" for kind in _WEIGHT_AND_BIAS} - set(names)
    names |= {key: ours for key, ours in _tree(state, bert, BERT, "text.transformer.").items() if key not in dropped}

    _refuse("is missing", (key for key in names if key not in state))
    _refuse("is left over: it belongs to no part of the released model", state.keys() - names.keys() - dropped)
    converted = {ours: state[released] for released, ours in names.items()}
    return {**converted, "logit_scale": torch.tensor(_LOGIT_SCALE)}


def _cross_attention_names() -> dict[str, str]:
    """Parameters of the released cross-attention module -> those of `MSCMAT`."""
    # The released names say the opposite of what they do: ln_pre_t is applied to images, ln_pre_i to texts.
    names = {f"ln_pre_t.{kind}": f"ln_image.{kind}" for kind in _WEIGHT_AND_BIAS}
    names |= {f"ln_pre_i.{kind}": f"ln_text.{kind}" for kind in _WEIGHT_AND_BIAS}
    for s in SCALES:
        names |= {f"fc{s}.{kind}": f"scales.{s - 1}.project.{kind}" for kind in _WEIGHT_AND_BIAS}
        names |= {f"cross_attn{s}.{name}": f"scales.{s - 1}.attention.{name}" for name in _ATTENTION}
        names |= {f"match_fc{s}.{kind}": f"scales.{s - 1}.match.{kind}" for kind in _WEIGHT_AND_BIAS}
    return names


def _find(state: Mapping[str, Tensor], part: str, anchors: Sequence[str], besides: str | None = None) -> str:
    """What stands before the names of a part: the one prefix with which all of its anchor keys exist."""
    first = anchors[0]
    prefixes = {key.removesuffix(first) for key in state if key == first or key.endswith(f".{first}")}
    found = sorted(
        prefix for prefix in prefixes if prefix != besides and all(f"{prefix}{name}" in state for name in anchors)
    )
    if not found:
        raise ConversionError(f"the {part} is missing: no key ends in {' with '.join(anchors)}.")
    if len(found) > 1:
        raise ConversionError(f"the {part} is there {len(found)} times, below {', '.join(map(repr, found))}; keep one.")
    return found[0]


def _tree(state: Mapping[str, Tensor], prefix: str, branches: Sequence[str], target: str) -> dict[str, str]:
    """Every key below one of a part's branches -> its name below `target`; each branch must bear something."""
    _refuse(
        "is missing",
        (f"{prefix}{branch}*" for branch in branches if not any(key.startswith(f"{prefix}{branch}") for key in state)),
    )
    below = tuple(f"{prefix}{branch}" for branch in branches)
    return {key: target + key.removeprefix(prefix) for key in state if key.startswith(below)}


def _refuse(complaint: str, keys: Iterable[str]) -> None:
    named = sorted(keys)
    if named:
        more = f" (and {len(named) - 1} more: {', '.join(named[1:6])})" if named[1:] else ""
        raise ConversionError(f"{named[0]} {complaint}{more}.")


def convert_checkpoint(source: Path, target: Path) -> int:
    """`convert_released_state_dict` from file to file, .pt or .safetensors; returns the number of tensors written.

    Raises:
        ConversionError: the source is no checkpoint of the released code, or would be replaced.
    """
    if target.exists() and source.samefile(target):
        raise ConversionError(f"{target}: is the checkpoint that is to be converted; give the result another name.")
    converted = convert_released_state_dict(_read(source))
    if target.suffix == ".safetensors":
        from safetensors.torch import save

        store.write_bytes(str(target), save({key: value.contiguous() for key, value in converted.items()}))
    else:
        with store.atomic_write(str(target)) as file:
            torch.save(converted, file)
    return len(converted)


def _read(source: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, which may have it under a key of its own."""
    try:
        with store.open_regular(str(source)) as file:
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (ShardError, FileNotFoundError, IsADirectoryError, PermissionError):
        raise  # they name the file
    except Exception as error:  # torch and pickle raise nearly everything for one broken file or another
        raise ConversionError(
            f"{source}: no checkpoint that can be read as weights alone ({type(error).__name__}). Give the file "
            "that the released code has saved."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(x, Tensor) for x in content.values()):
        raise ConversionError(f"{source} holds no state dict, also not under 'state_dict' or 'model'.")
    return dict(content)
