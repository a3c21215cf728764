"""A checkpoint is rebuilt as its run built it: params.txt tells what the weights do not."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU

from msa_openclip.evaluation.loading import load
from msa_openclip.evaluation.run_parameters import RunError, model_options, read_parameters

PARAMS = """aug_cfg: {'dihedral': True, 'scale': (1.0, 1.0)}
batch_size: 64
force_context_length: None
force_image_size: 48
force_quick_gelu: True
image_interpolation: bilinear
image_mean: [0.5, 0.25, 0.125]
image_resize_mode: None
image_std: [0.2, 0.3, 0.4]
lr: 0.0005
model: tiny-ViT
name: a: b
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with params.txt and a checkpoint of tiny-ViT at 48 pixels."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "params.txt").write_text(PARAMS, encoding="utf-8")
    return tmp_path


def test_parameters_are_values(run: Path) -> None:
    found = read_parameters(run)
    assert found["aug_cfg"] == {"dihedral": True, "scale": (1.0, 1.0)}
    assert (found["lr"], found["batch_size"], found["image_resize_mode"]) == (0.0005, 64, None)
    assert found["image_mean"] == [0.5, 0.25, 0.125]
    assert found["name"] == "a: b"


def test_options_of_the_model_alone_and_only_those_given(run: Path) -> None:
    assert model_options(str(run / "checkpoints" / "epoch_1.pt"), "tiny-ViT") == {
        "force_quick_gelu": True,
        "force_image_size": 48,
        "image_mean": [0.5, 0.25, 0.125],
        "image_std": [0.2, 0.3, 0.4],
        "image_interpolation": "bilinear",
    }


@pytest.mark.parametrize("where", ["checkpoints", "elsewhere", "archive"])
def test_a_checkpoint_is_known_from_any_folder_and_through_links(
    where: str, run: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = run / "checkpoints" / "epoch_1.pt"
    checkpoint.touch()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(checkpoint.parent if where == "checkpoints" else elsewhere)
    if where == "elsewhere":  # a link to the file
        Path("epoch_1.pt").symlink_to(checkpoint)
    if where == "archive":  # the run has a link to where its files are kept
        (elsewhere / "epoch_1.pt").touch()
        checkpoint.unlink()
        checkpoint.symlink_to(elsewhere / "epoch_1.pt")
        monkeypatch.chdir(checkpoint.parent)
    assert model_options("epoch_1.pt", "tiny-ViT")["force_image_size"] == 48


def test_a_tag_is_no_file_of_the_folder_that_it_is_given_in(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints")
    assert model_options("openai", "tiny-ViT") == {}


@pytest.mark.parametrize("text", ["{[]: 1}", "{{}}"])
def test_what_python_cannot_build_is_text(text: str, run: Path) -> None:
    with (run / "params.txt").open("a", encoding="utf-8") as file:
        file.write(f"odd: {text}\n")
    assert read_parameters(run)["odd"] == text


@pytest.mark.parametrize("place", ["openai", "epoch_1.pt", "checkpoints/epoch_1.pt", "/checkpoints/epoch_1.pt"])
def test_a_file_that_lies_in_no_run_has_none(place: str) -> None:
    assert model_options(place, "tiny-ViT") == {}


def test_a_run_of_another_model_has_none(run: Path) -> None:
    assert model_options(str(run / "checkpoints" / "epoch_1.pt"), "MSA-tiny-ViT") == {}


def test_a_checkpoint_loads_as_the_run_built_it(run: Path, tiny_configs: Path, tmp_path: Path) -> None:
    as_trained = open_clip.create_model("tiny-ViT", force_quick_gelu=True, force_image_size=48)
    checkpoint = run / "checkpoints" / "epoch_1.pt"
    torch.save({"state_dict": as_trained.state_dict()}, checkpoint)
    loaded = load(f"tiny-ViT={checkpoint}")
    assert any(isinstance(module, QuickGELU) for module in loaded.scorer.model.modules())
    steps = {type(step).__name__: step for step in loaded.preprocess.transforms}  # type: ignore[attr-defined]
    assert (steps["Normalize"].mean, steps["Normalize"].std) == ([0.5, 0.25, 0.125], [0.2, 0.3, 0.4])
    assert steps["Resize"].size == 48
    assert steps["Resize"].interpolation.value == "bilinear"


def test_the_tokenizer_is_as_long_as_the_run_made_it(run: Path, tiny_configs: Path) -> None:
    (run / "params.txt").write_text("model: tiny-ViT\nforce_context_length: 17\n")
    checkpoint = run / "checkpoints" / "epoch_1.pt"
    torch.save(open_clip.create_model("tiny-ViT", force_context_length=17).state_dict(), checkpoint)
    assert load(f"tiny-ViT={checkpoint}").tokenizer(["planes"]).shape == (1, 17)


def test_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"params\.txt: no line 'model: NAME'; this is no run of open_clip_train\.main"):
        read_parameters(tmp_path)
