"""Checkpoints: warm starts from plain CLIP in every form that open_clip reads, and folders that load back as saved."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from helpers import tiny
from helpers.host import loss_of
from PIL import Image
from torch import Tensor, nn

from msa_openclip.config import MSACfg

hub: Any = importlib.import_module("open_clip.push_to_hf_hub")  # in open_clip itself the name is a function

pytestmark = pytest.mark.usefixtures("tiny_configs")

HEAD = ("image_scales.", "fusion.", "mscmat.")


def create(name: str, seed: int, **options: Any) -> Any:
    """A model with random values everywhere, so that none of them loads by chance."""
    torch.manual_seed(seed)
    return open_clip.create_model(name, **options).eval()


def scrambled(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "logit_scale" not in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def outputs(model: Any) -> tuple[Tensor, ...]:
    """All that a model says of some images and texts: global features, and match scores where it has any."""
    model.eval()
    vocabulary = 49406 if hasattr(model.text, "token_embedding") else len(tiny.VOCABULARY) - 2
    length = model.text.context_length if hasattr(model.text, "token_embedding") else tiny.CONTEXT_LENGTH
    images, texts = tiny.images(model), tiny.texts(vocabulary=vocabulary, length=length)
    with torch.no_grad():
        features, scores = (model.encode_image(images), model.encode_text(texts)), model.get_logits(images, texts)[0]
    return (*features, scores)


def assert_same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# ---- warm start


def save_pt(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def save_openai(state: dict[str, Tensor], path: Path) -> Path:
    """Half precision and beside the weights what the archives of OpenAI hold."""
    half = {key: value.half() for key, value in state.items()}
    archive = {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(13),
        "vocab_size": torch.tensor(49408),
    }
    return save_pt({**archive, **half}, path)


def save_training(state: dict[str, Tensor], path: Path) -> Path:
    """As open_clip_train saves from several ranks."""
    return save_pt({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)  # type: ignore[dict-item]


def save_safetensors(state: dict[str, Tensor], path: Path) -> Path:
    safetensors.torch.save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


@pytest.mark.parametrize("save", [save_pt, save_openai, save_training, save_safetensors])
@pytest.mark.parametrize("vision", ["ViT", "RN"])
def test_warm_start_from_plain_clip(
    save: Callable[[dict[str, Tensor], Path], Path], vision: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = scrambled(create(f"tiny-{vision}", 0), 1)
    if save is save_openai:
        base.load_state_dict({key: value.half().float() for key, value in base.state_dict().items()})
    path = save(base.state_dict(), tmp_path / "base")
    fresh = create(f"MSA-tiny-{vision}", 2)
    with caplog.at_level(logging.INFO):
        model = create(f"MSA-tiny-{vision}", 2, pretrained=str(path))
    images, texts = tiny.images(model), tiny.texts()
    assert torch.equal(model.encode_image(images), base.encode_image(images))
    assert torch.equal(model.encode_text(texts), base.encode_text(texts))
    assert torch.equal(model.logit_scale, base.logit_scale)
    own = {key: value for key, value in model.state_dict().items() if key.startswith(HEAD)}
    assert own
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in own.items())
    (line,) = [record.message for record in caplog.records if record.name.startswith("msa_openclip")]
    assert line == "Warm start: towers loaded from a plain CLIP checkpoint, the MSA head keeps its initial values."


def test_an_own_checkpoint_is_no_warm_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = scrambled(create("MSA-tiny-ViT", 0), 1)
    path = save_pt(model.state_dict(), tmp_path / "own")
    with caplog.at_level(logging.INFO):
        loaded = create("MSA-tiny-ViT", 2, pretrained=str(path))
    assert_same(outputs(loaded), outputs(model))
    assert not [record for record in caplog.records if "Warm start" in record.message]


def test_vectors_of_one_may_have_been_squeezed(tmp_path: Path) -> None:
    """open_clip 4.x does so to what it gathers from a sharded model."""
    model = scrambled(create("MSA-tiny-ViT", 0), 1)
    state = {key: value.squeeze() if value.shape == (1,) else value for key, value in model.state_dict().items()}
    assert state["mscmat.scales.0.match.bias"].shape == ()
    loaded = create("MSA-tiny-ViT", 2, pretrained=str(save_pt(state, tmp_path / "squeezed")))
    assert_same(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda state: state.pop("visual.proj"), r'Missing key\(s\) in state_dict: "visual\.proj"'),
        (lambda state: state.update(stray=torch.zeros(1)), r'Unexpected key\(s\) in state_dict: "stray"'),
        (lambda state: state.update({"visual.proj": torch.zeros(3, 3)}), r"size mismatch for visual\.proj"),
    ],
    ids=["missing", "unexpected", "mismatch"],
)
@pytest.mark.parametrize("own", [False, True], ids=["base", "own"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    own: bool, spoil: Callable[[Any], Any], named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = dict(create("MSA-tiny-ViT" if own else "tiny-ViT", 0).state_dict())
    spoil(state)
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match=named):
        create("MSA-tiny-ViT", 1, pretrained=str(save_pt(state, tmp_path / "spoilt")))
    assert not [record for record in caplog.records if "Warm start" in record.message]


def test_a_head_with_a_part_missing_is_refused_by_name(tmp_path: Path) -> None:
    state = dict(create("MSA-tiny-ViT", 0).state_dict())
    del state["mscmat.scales.1.match.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "mscmat\.scales\.1\.match\.weight"'):
        create("MSA-tiny-ViT", 1, pretrained=str(save_pt(state, tmp_path / "part")))


def test_a_checkpoint_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    path = save_pt({"layer.weight": torch.zeros(2)}, tmp_path / "else")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "logit_scale", "visual\.'):
        create("MSA-tiny-ViT", 0, pretrained=str(path))


def test_a_model_without_a_head_takes_plain_clip_as_its_own(tmp_path: Path) -> None:
    base = create("tiny-ViT", 0)
    no_match = {"fused_weight": 0, "match_weight": 0, "consistency_weight": 0}
    plain = {"image_scales": [{"stage": 3}], "fusion": "tower", "loss": no_match}
    model = create("tiny-ViT", 1, msa_cfg=plain, pretrained=str(save_pt(base.state_dict(), tmp_path / "base")))
    assert torch.equal(model.encode_image(tiny.images(model)), base.encode_image(tiny.images(model)))


# ---- folders


@pytest.fixture
def pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where open_clip's uploads to the hub end up instead."""
    destination = tmp_path / "hub"

    def upload(*, folder_path: str, **_: Any) -> None:
        shutil.copytree(folder_path, destination)

    def no_readme(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    substitutes = {
        "upload_folder": upload,
        "create_repo": lambda *_, **__: "https://huggingface.co/someone/model",
        "repo_type_and_id_from_hf_id": lambda _: ("model", "someone", "model"),
        "list_repo_files": lambda *_: [],
        "hf_hub_url": lambda **_: "https://huggingface.co/someone/model/README.md",
        "get_hf_file_metadata": no_readme,
        "EntryNotFoundError": FileNotFoundError,
    }
    for name, substitute in substitutes.items():
        monkeypatch.setattr(hub, name, substitute, raising=False)  # open_clip 3.3 cannot import them from hub 1.x
    return destination


def save(model: Any, name: str, directory: Path, **options: Any) -> Path:
    hub.save_for_hf(model, open_clip.get_tokenizer(name), open_clip.get_model_config(name), str(directory), **options)
    return directory


def push(model: Any, name: str, directory: Path, **_: Any) -> Path:
    hub.push_to_hf_hub(model, open_clip.get_tokenizer(name), open_clip.get_model_config(name), "someone/model")
    return directory


CAPTIONS = ["many white planes are near some trees", "two green planes!"]


@pytest.mark.parametrize("way", [save, push])
@pytest.mark.parametrize("name", ["MSA-tiny-ViT", "MSA-tiny-RN", "MSA-tiny-BERT"])
def test_folders_load_back_as_saved(way: Callable[..., Path], name: str, pushed: Path) -> None:
    """Model, preprocessing and tokenizer: open_clip's own BPE too, which it would replace by one of the hub."""
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(name, image_mean=(0.1, 0.2, 0.3))
    folder = way(scrambled(model, 1), name, pushed)
    loaded, _, loaded_preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert type(loaded) is type(model)
    assert loaded.msa_cfg == model.msa_cfg
    assert_same(outputs(loaded), outputs(model))
    picture = Image.effect_noise((70, 50), 90).convert("RGB")
    assert torch.equal(loaded_preprocess(picture), preprocess(picture))
    tokenizer, loaded_tokenizer = open_clip.get_tokenizer(name), open_clip.get_tokenizer(f"local-dir:{folder}")
    assert type(loaded_tokenizer) is type(tokenizer)
    assert torch.equal(loaded_tokenizer(CAPTIONS), tokenizer(CAPTIONS))


@pytest.mark.parametrize("options", [{"safe_serialization": True}, {"safe_serialization": False}], ids=repr)
def test_either_file_format_loads_back(options: dict[str, Any], tmp_path: Path) -> None:
    model = scrambled(create("MSA-tiny-ViT", 0), 1)
    folder = save(model, "MSA-tiny-ViT", tmp_path / "folder", **options)
    assert len([*folder.glob("open_clip_*model*")]) == 1
    assert_same(outputs(create(f"local-dir:{folder}", 2)), outputs(model))


@pytest.mark.parametrize("way", [save, push])
def test_forced_geometry_is_saved(way: Callable[..., Path], pushed: Path) -> None:
    """Also where the tokenizer at hand was built for another length."""
    forced = {"force_context_length": 9, "force_image_size": 48, "force_quick_gelu": True}
    model = scrambled(create("MSA-tiny-ViT", 0, **forced), 1)
    folder = way(model, "MSA-tiny-ViT", pushed)
    loaded = create(f"local-dir:{folder}", 2)
    assert (loaded.context_length, tuple(loaded.visual.image_size)) == (9, (48, 48))
    assert_same(outputs(loaded), outputs(model))
    assert open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS).shape == (2, 9)
    assert open_clip.get_model_config("MSA-tiny-ViT") == tiny.config("ViT", msa={})  # the model's own is unchanged


def test_other_models_are_saved_as_ever(pushed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That `save_for_hf` takes no BPE tokenizer and `push_to_hf_hub` swaps it is for open_clip to change."""

    class HubTokenizer(hub.HFTokenizer):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            raise LookupError(f"tokenizer of {name}")

    monkeypatch.setattr(hub, "HFTokenizer", HubTokenizer)
    model = create("tiny-ViT", 0)
    with pytest.raises(AttributeError, match="save_pretrained"):
        save(model, "tiny-ViT", pushed)
    with pytest.raises(LookupError, match="tokenizer of openai/clip-vit-large-patch14"):
        push(model, "tiny-ViT", pushed)


def test_a_folder_does_not_depend_on_the_defaults_of_the_version_that_reads_it(tmp_path: Path) -> None:
    folder = save(create("MSA-tiny-ViT", 0), "MSA-tiny-ViT", tmp_path / "folder")
    saved = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]["msa_cfg"]
    assert set(saved) == {field.name for field in dataclasses.fields(MSACfg)}
    for part in ("text_tokens", "score", "loss", "ranking"):
        assert set(saved[part]) == {f.name for f in dataclasses.fields(getattr(MSACfg.from_dict(saved), part))}


def test_a_folder_trains_on_with_its_own_loss(tmp_path: Path) -> None:
    model = scrambled(create("MSA-tiny-BERT", 0), 1)
    folder = save(model, "MSA-tiny-BERT", tmp_path / "folder")
    assert loss_of(Namespace(model=f"local-dir:{folder}", cache_dir=None)).msa_cfg == model.msa_cfg


def test_pretrained_pushes_name_their_own_configuration(pushed: Path, tmp_path: Path) -> None:
    """open_clip's command for it: checkpoint in, folder out."""
    model = scrambled(create("MSA-tiny-ViT", 0), 1)
    checkpoint = save_pt(model.state_dict(), tmp_path / "model")
    hub.push_pretrained_to_hf_hub("MSA-tiny-ViT", str(checkpoint), "someone/model")
    saved = json.loads((pushed / "open_clip_config.json").read_text(encoding="utf-8"))
    assert MSACfg.from_dict(saved["model_cfg"]["msa_cfg"]) == model.msa_cfg
    assert_same(outputs(create(f"local-dir:{pushed}", 2)), outputs(model))
