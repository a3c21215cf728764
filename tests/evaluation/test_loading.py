"""Loading models: none of their code runs, and what cannot be loaded is named on one line."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from helpers import tiny
from helpers.host import TOKENIZERS_BRING_CODE
from helpers.retrieval_data import randomise
from helpers.trapped_models import local_dir
from PIL import Image

from msa_openclip.commands import main as cli
from msa_openclip.evaluation.loading import ModelError, load


@pytest.mark.parametrize("part", ["tokenizer", "tower"])
@pytest.mark.parametrize("switch", [{"trust_remote_code": True}, {}])
def test_no_code_of_a_folder_runs(
    part: str, tmp_path: Path, tiny_bert: Path, switch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by its configuration's word nor by what standard input happens to hold."""
    spec = local_dir(tmp_path / "model", tiny_bert, tmp_path / "trap", part, **switch)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError, match="trust_remote_code") if switch else suppress(ModelError):
        load(spec)
    assert not (tmp_path / "trap").exists()


def test_the_users_word_lets_code_run(tmp_path: Path, tiny_bert: Path) -> None:
    """Which shows that the folder of the test above is a trap, where open_clip itself lets tokenizers run code."""
    spec = local_dir(tmp_path / "model", tiny_bert, tmp_path / "trap", "tokenizer", trust_remote_code=True)
    load(spec, trust_remote_code=True)
    assert (tmp_path / "trap").exists() == TOKENIZERS_BRING_CODE


@pytest.mark.parametrize("schema", ["local-dir", "hf-hub"])
@pytest.mark.parametrize("part", ["tokenizer", "tower"])
@pytest.mark.parametrize("switch", [{"trust_remote_code": True}, {}])
def test_no_code_runs_in_training(
    schema: str, part: str, switch: dict[str, Any], tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip_train.main builds model and tokenizer by these two, under whichever name of the model."""
    from open_clip_train import main

    name = local_dir(tmp_path / "model", tiny_bert, tmp_path / "trap", part, **switch)
    if schema == "hf-hub":
        content = json.loads((tmp_path / "model/open_clip_config.json").read_text())
        if part == "tokenizer":
            content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(tmp_path / "model")
        monkeypatch.setattr(open_clip.factory, "_get_hf_config", lambda *_, **__: json.loads(json.dumps(content)))
        weights = str(tmp_path / "model/open_clip_pytorch_model.bin")
        monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", lambda *_, **__: weights)
        name = "hf-hub:somebody/model"
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for build in (main.create_model_and_transforms, main.get_tokenizer):
        with pytest.raises(ValueError, match=rf"{name}: .*TRUST_REMOTE_CODE=1") if switch else suppress(Exception):
            build(name)
        assert not (tmp_path / "trap").exists()
    if switch and part == "tokenizer":
        monkeypatch.setenv("MSA_OPENCLIP_TRUST_REMOTE_CODE", "1")
        main.get_tokenizer(name)
        assert (tmp_path / "trap").exists() == TOKENIZERS_BRING_CODE  # it is one


def test_the_flag_of_the_command_line_is_the_users_word(tmp_path: Path, tiny_bert: Path, capsys) -> None:
    spec = local_dir(tmp_path / "model", tiny_bert, tmp_path / "trap", "tokenizer", trust_remote_code=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "tile.png")
    command = ["explain", spec, str(tmp_path / "tile.png"), "a plane"]
    assert cli.main(command) == 1
    assert "allow it yourself if you trust whoever made the model: --trust-remote-code" in capsys.readouterr().err
    assert not (tmp_path / "trap").exists()
    assert cli.main([*command, "--trust-remote-code"]) in (0, None)
    assert (tmp_path / "trap").exists() == TOKENIZERS_BRING_CODE


class Trap:
    """A pickle that calls mkdir, or raises TypeError first, after which open_clip falls back to an unsafe load."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_pickle_runs(tmp_path: Path, tiny_configs: Path) -> None:
    file = tmp_path / "trap.pt"
    torch.save({"state_dict": Trap(tmp_path / "ran")}, file)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(f"tiny-ViT={file}")
    file.write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(f"tiny-ViT={file}")
    assert not (tmp_path / "ran").exists()


def test_no_load_falls_back_to_pickles(tmp_path: Path, tiny_configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.5 would, whose default is to run them, when open_clip tries again after a TypeError."""
    original, calls = torch.load, []

    def failing(*arguments: Any, **named: Any) -> Any:
        calls.append(os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD"))
        if "weights_only" in named:
            raise TypeError("a crafted pickle")
        return original(*arguments, **named)

    file = tmp_path / "trap.pt"
    torch.save({"state_dict": Trap(tmp_path / "ran")}, file)
    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(f"tiny-ViT={file}")
    assert calls  # 4.x does not try again
    assert set(calls) == {"1"}
    assert not (tmp_path / "ran").exists()


def weights(name: str = "tiny-ViT") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = randomise(open_clip.create_model(name)).state_dict()
    return found


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty.pt": (lambda path: path.write_bytes(b""), "is empty; copy or download it again"),
    "page.pt": (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "is a web page, not a checkpoint"),
    "lfs.pt": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
    "noise.pt": (lambda path: path.write_bytes(os.urandom(4096)), "cannot be loaded"),
    "cut.pt": (
        lambda path: (torch.save(weights(), path), path.write_bytes(path.read_bytes()[:-999])),
        "cannot be loaded: .* is cut short, or no checkpoint of torch. Copy it again",
    ),
    "other.pt": (lambda path: torch.save(weights("tiny-RN"), path), "cannot be loaded: .*state_dict"),
    "nothing.pt": (lambda path: torch.save({}, path), "cannot be loaded"),
    "list.pt": (lambda path: torch.save([1, 2], path), "cannot be loaded"),
    "texts.pt": (lambda path: torch.save({"state_dict": {"logit_scale": "x"}}, path), "cannot be loaded"),
    "cut.safetensors": (lambda path: path.write_bytes(b"\xff" * 64), "cannot be loaded"),
    "short.safetensors": (lambda path: path.write_bytes(b"\x02"), "cannot be loaded"),
    "array.npz": (lambda path: path.write_bytes(b"PK\x03\x04"), "cannot be loaded"),
    "pipe.pt": (os.mkfifo, "not a regular file"),
    "folder.pt": (os.mkdir, "not a regular file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_checkpoint_is_named_on_one_line(name: str, tmp_path: Path, tiny_configs: Path) -> None:
    make, message = BROKEN[name]
    make(tmp_path / name)
    with pytest.raises(ModelError, match=message) as caught:
        load(f"tiny-ViT={tmp_path / name}")
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path, tiny_configs: Path) -> None:
    content = weights()
    content["visual.ln_post.weight"][3] = value
    torch.save(content, tmp_path / "diverged.pt")
    with pytest.raises(ModelError, match=r"diverged\.pt: visual\.ln_post\.weight holds values that are not finite"):
        load(f"tiny-ViT={tmp_path / 'diverged.pt'}")


def test_precision_and_folders_without_weights(tmp_path: Path, tiny_configs: Path) -> None:
    with pytest.raises(ModelError, match="precision 'nope' is unknown; choose one of fp32, amp"):
        load("tiny-ViT=untrained", precision="nope")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny.config()}))
    with pytest.raises(ModelError, match=r"cannot be loaded: .*weights"):
        load(f"local-dir:{tmp_path}")  # open_clip would go on with random ones
    (tmp_path / "open_clip_config.json").unlink()
    os.mkfifo(tmp_path / "open_clip_config.json")
    with pytest.raises(ModelError, match=r"open_clip_config\.json: not a regular file \(a folder, pipe or device\)"):
        load(f"local-dir:{tmp_path}")
    with pytest.raises((OSError, ValueError)):
        open_clip.create_model(f"local-dir:{tmp_path}")  # with the plugin as without it: no waiting for the pipe


def test_a_pipe_in_the_place_of_a_runs_parameters_is_named(tmp_path: Path, tiny_configs: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save(weights(), tmp_path / "checkpoints/epoch_1.pt")
    os.mkfifo(tmp_path / "params.txt")
    with pytest.raises(ValueError, match=r"params\.txt: not a regular file"):
        load(f"tiny-ViT={tmp_path / 'checkpoints/epoch_1.pt'}")


def test_numbers_of_no_use_in_a_model_are_named(tmp_path: Path, tiny_configs: Path) -> None:
    for msa, message in (
        ({"width": 10**12}, r"msa_cfg\.width: got 1000000000000, expected at most 65536"),
        ({"width": 10**12 + 1, "heads": 7}, r"msa_cfg\.width: got 1000000000001"),
        ({"score": {"temperature": 10**400}}, r"msa_cfg\.score\.temperature: got 10+ \.\.\., expected a finite number"),
        ({"loss": {"fused_weight": 1e300}}, r"msa_cfg\.loss\.fused_weight: got 1e\+300"),
    ):
        content = {"model_cfg": tiny.config(msa=msa), "preprocess_cfg": {}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
        with pytest.raises(ModelError, match=message):
            load(f"local-dir:{tmp_path}")
