"""Converted checkpoints score as the released code does, naively (docs/method.md, section 1), on synthetic weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from helpers import tiny
from torch import Tensor, nn
from transformers import AutoModel

from msa_openclip.commands import main as cli
from msa_openclip.model.convert import ConversionError, convert_released_state_dict

D, H = tiny.EMBED_DIM, 4
CHANNELS = (64, 128, 256, 512)
IMAGES, TEXTS = 3, 5


class CrossAttention(nn.Module):
    """Parameters of the released module, by its names; ln_pre_t is for images, ln_pre_i for texts."""

    def __init__(self) -> None:
        super().__init__()
        for s, channels in enumerate(CHANNELS, start=1):
            setattr(self, f"fc{s}", nn.Linear(channels, D))
            setattr(self, f"cross_attn{s}", nn.MultiheadAttention(D, H, batch_first=True))
            setattr(self, f"match_fc{s}", nn.Linear(D, 1))
        self.ln_pre_t, self.ln_pre_i, self.ln_post = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, pooled: list[Tensor], tokens: Tensor, feature: Tensor) -> Tensor:
        """docs/method.md, section 1.4: (S, I, T)."""
        scores = torch.zeros(len(pooled), IMAGES, TEXTS)
        for s, z in enumerate(pooled, start=1):
            project, attend = getattr(self, f"fc{s}"), getattr(self, f"cross_attn{s}")
            for i in range(IMAGES):
                m = project(z[i])
                for j in range(TEXTS):
                    y = self.ln_pre_i(tokens[j])[None]
                    a = attend(self.ln_pre_t(m)[None, None], y, y)[0][0, 0]
                    scores[s - 1, i, j] = getattr(self, f"match_fc{s}")((a + feature[j]) * m).sigmoid()
        return scores


class GatedMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.att, self.fc2 = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, f: Tensor) -> Tensor:
        e = self.fc(f)
        return self.fc2(e * self.att(e).sigmoid())


class ImageTower(nn.Module):
    """ResNet of torchvision (18 for 50: smaller), maps pooled, F_s and gated map (docs/method.md, section 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = torchvision.models.resnet18()
        for s, channels in enumerate(CHANNELS, start=1):
            setattr(self, f"fc{s}", nn.Linear(channels, D))
        self.gated = GatedMap()

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        net = self.resnet
        x = net.maxpool(net.relu(net.bn1(net.conv1(image))))
        pooled = []
        for s, layer in enumerate((net.layer1, net.layer2, net.layer3, net.layer4), start=1):
            x = layer(x)
            pooled.append(x.amax((2, 3)) if s < 4 else x.mean((2, 3)))
        summed = sum(getattr(self, f"fc{s}")(z) for s, z in enumerate(pooled, start=1))
        return F.normalize(self.gated(summed), dim=-1), pooled


class Released(nn.Module):
    def __init__(self, bert: Path) -> None:
        super().__init__()
        self.img, self.cross = ImageTower(), CrossAttention()
        self.txt = nn.ModuleDict({"bert": AutoModel.from_pretrained(bert)})

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Global features of images and texts, match scores (S, I, T)."""
        image_feature, pooled = self.img(image)
        hidden = self.txt["bert"](input_ids=text, attention_mask=(text != 0).long()).last_hidden_state
        text_feature = F.normalize(hidden[:, 0], dim=-1)
        return image_feature, text_feature, self.cross(pooled, hidden[:, 1:], text_feature)


@pytest.fixture(scope="module")
def released(tiny_bert: Path) -> Released:
    torch.manual_seed(0)
    model = Released(tiny_bert)
    for name, parameter in model.named_parameters():
        if "resnet" not in name:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture
def state(released: Released) -> dict[str, Tensor]:
    return {**released.state_dict(), "txt.bert.embeddings.position_ids": torch.arange(37)[None]}


@pytest.fixture(scope="module")
def name(tiny_configs: Path, tiny_bert: Path) -> str:
    """A model of the kind of MSA-ResNet50-BERT, with a smaller ResNet and a smaller BERT."""
    config = tiny.config("timm-RN", text=tiny.bert_text(tiny_bert), msa={"preset": "paper", "heads": H})
    config["vision_cfg"] |= {"timm_model_name": "resnet18"}
    open_clip.add_model_config(tiny.write_config(tiny_configs, "MSA-tiny-released", config))
    return "MSA-tiny-released"


def assert_scores_as(released: Released, model: Any) -> None:
    images, texts = tiny.images(model, IMAGES), tiny.texts(TEXTS, vocabulary=len(tiny.VOCABULARY) - 2)
    with torch.no_grad():
        image_feature, text_feature, scores = released(images, texts)
        our_image_feature, image_side = model.image_side(images)
        our_text_feature, text_side = model.text_side(texts)
        ours = model.match_scores(image_side, text_side)
    torch.testing.assert_close(our_image_feature, image_feature, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(our_text_feature, text_feature, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, scores, rtol=1e-4, atol=1e-5)
    assert scores.std(dim=(1, 2)).min() > 1e-3


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key,
        lambda key: f"module.{key}",
        lambda key: (
            key.removeprefix("cross.").replace("txt.bert.", "text_encoder.model.").replace("img.resnet.", "cnn.")
        ),
        lambda key: key.replace("img.resnet.", "img."),
    ],
    ids=["as is", "module", "other prefixes", "backbone in the tower"],
)
def test_converted_weights_load_strictly_and_score_alike(
    rename: Callable[[str], str], released: Released, state: dict[str, Tensor], name: str
) -> None:
    model = open_clip.create_model(name).eval()
    model.load_state_dict(convert_released_state_dict({rename(key): value for key, value in state.items()}))
    assert_scores_as(released, model)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"epoch": 3, "model": state}], ids=["bare", "wrapped"]
)
def test_the_command_writes_what_create_model_loads(
    wrap: Callable[[Any], Any], suffix: str, released: Released, state: dict[str, Tensor], name: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, target = tmp_path / "released.pth", tmp_path / f"converted{suffix}"
    torch.save(wrap(state), source)
    assert cli.main(["convert", str(source), str(target)]) == 0
    assert f"tensors written to {target}" in capsys.readouterr().out
    assert_scores_as(released, open_clip.create_model(name, pretrained=str(target)).eval())
    if suffix == ".safetensors":
        assert not [key for key in safetensors.torch.load_file(target) if "ln_post" in key or "pooler" in key]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("cross.", "the cross-attention module is missing: no key ends in cross_attn1.in_proj_weight."),
        ("img.resnet.", "the ResNet is missing: no key ends in layer1.0.conv1.weight."),
        ("txt.", "the BERT is missing: no key ends in embeddings.word_embeddings.weight."),
        ("img.gated.", "the gated map of the image tower is missing: no key ends in att.weight."),
        ("img.fc3.weight", "the fc1 to fc4 of the image tower is missing: no key ends in fc1.weight with fc2.weight"),
        ("img.fc3.bias", "img.fc3.bias is missing."),
        ("img.gated.fc2.bias", "img.gated.fc2.bias is missing."),
        ("img.resnet.layer3.", "img.resnet.layer3.* is missing."),
        ("txt.bert.encoder.", "txt.bert.encoder.* is missing."),
        ("cross.ln_pre_t.", "cross.ln_pre_t.bias is missing (and 1 more: cross.ln_pre_t.weight)."),
    ],
)
def test_what_is_missing_is_named(part: str, message: str, state: dict[str, Tensor]) -> None:
    with pytest.raises(ConversionError, match=f"^{re.escape(message)}"):
        convert_released_state_dict({key: value for key, value in state.items() if not key.startswith(part)})


def test_what_is_left_over_is_named(state: dict[str, Tensor]) -> None:
    message = (
        "cross.temperature is left over: it belongs to no part of the released model (and 1 more: img.head.weight)."
    )
    with pytest.raises(ConversionError, match=f"^{re.escape(message)}$"):
        convert_released_state_dict({**state, "cross.temperature": torch.ones(1), "img.head.weight": torch.ones(1)})


def test_a_part_that_is_there_twice_is_refused(state: dict[str, Tensor]) -> None:
    twice = {**state, **{f"teacher.{key}": value for key, value in state.items() if key.startswith("cross.")}}
    with pytest.raises(
        ConversionError, match=r"^the cross-attention module is there 2 times, below 'cross\.', 'teacher"
    ):
        convert_released_state_dict(twice)


def test_the_command_refuses_what_is_no_state_dict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"epoch": 3}, tmp_path / "odd.pth")
    assert cli.main(["convert", str(tmp_path / "odd.pth"), str(tmp_path / "out.pt")]) == 1
    assert f"{tmp_path / 'odd.pth'} holds no state dict" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04cut", b"[" * 100])
def test_what_is_no_checkpoint_is_named_on_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    assert cli.main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "out.pt")]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/x.pth: no checkpoint that can be read as weights alone" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.pt").exists()


def test_a_pipe_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "x.pth")
    assert cli.main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "out.pt")]) == 1
    assert "x.pth" in capsys.readouterr().err
