"""recipes/: each published set from its files to shards and commands, and one whole run in real processes."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import open_clip
import pytest
import torch
from helpers import published_files, tiny
from helpers.processes import run_new_python
from helpers.shards_data import tar_members
from open_clip_train.params import parse_args

from msa_openclip.commands import main as cli
from msa_openclip.evaluation.run_parameters import read_parameters
from msa_openclip.reports.run_plot import read_curves
from msa_openclip.shards import manifest
from msa_openclip.steps import CLI, StepError, run

RECIPES = Path(__file__).parents[1] / "recipes"
SETS = ("rsitmd", "rsicd", "ucm", "sydney", "nwpu")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """recipes/run.py as a module."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("run")


@pytest.fixture
def commands(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What the recipe would run; shards are built in this process, everything else is only noted."""
    noted: list[tuple[str, list[str]]] = []

    def note(module: str, *arguments: object) -> None:
        words = [str(argument) for argument in arguments]
        noted.append((module, words))
        if words[0] == "shards" and cli.main([*words, "--workers", "1", "--quiet"]):
            raise StepError(words)

    monkeypatch.setattr(recipe, "run", note)
    monkeypatch.setattr(recipe, "plot_run", lambda *_: None)
    return noted


@pytest.mark.parametrize("name", SETS)
def test_published_files_become_shards_and_commands(name, recipe, commands, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    data, out = published_files.write(name, tmp_path / "data"), tmp_path / "out"
    recipe.main([name, "--data", str(data), "--start", "scratch", "--out", str(out), "--batch-size", "8"])
    splits = manifest.read(str(out / "shards"))["splits"]
    images = {split: row["images"] for split, row in splits.items()}
    if name == "rsitmd":  # one image has no captions, some are held out for val, none of them from test
        assert images.pop("val") + images.pop("train") == 29
        assert images == {"test": 7}
    else:
        assert images == published_files.COUNTS
    assert all(row["captions"] == 5 * row["images"] for row in splits.values())
    suffixes = {Path(name).suffix for path in (out / "shards").glob("*.tar") for name, _ in tar_members(path)}
    assert suffixes == {".json", ".txt", ".jpg" if name in ("rsicd", "nwpu") else ".png"}

    (_, _), (train, words), (_, test) = commands
    assert train == "open_clip_train.main"
    parsed = parse_args(words)
    assert parsed.aug_cfg == {"dihedral": True, "scale": (1.0, 1.0)}
    assert parsed.warmup == 30 * (splits["train"]["samples"] // 8) // 10
    assert (parsed.model, parsed.pretrained) == ("MSA-ViT-Ti", "")
    for pattern, split in ((parsed.train_data, "train"), (parsed.val_data, "val"), (test[3], "test")):
        assert pattern == f"{out}/shards/{splits[split]['pattern']}"
        assert f"{name}-{split}-" in pattern
    assert test[:2] == ["best", f"{out}/logs/scratch-MSA-ViT-Ti-seed0"]
    published = recipe.SETS[name].counts
    assert f"note: test: 7 images, published are {published['test']:,}" in capsys.readouterr().out


def test_the_number_of_published_images_is_no_news(recipe: ModuleType) -> None:
    sizes = {"train": {"images": 3862}, "val": {"images": 429}, "test": {"images": 452}}
    assert recipe.differences(recipe.SETS["rsitmd"], sizes) == []
    sizes["test"]["images"] = 451
    assert recipe.differences(recipe.SETS["rsitmd"], sizes) == ["test: 451 images, published are 452"]


@pytest.mark.parametrize("start", ["scratch", "imagenet", "imagenet-lite", "frozen", "clip", "remoteclip", "georsclip"])
def test_every_start_is_a_command_that_open_clip_takes(start, recipe, commands, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = published_files.write("ucm", tmp_path / "data")
    weights = ["--weights", "weights.pt"] if recipe.STARTS[start].file else []
    recipe.main(["ucm", "--data", str(data), "--start", start, *weights, "--out", str(tmp_path / "out")])
    *before, parsed = [parse_args(words) for module, words in commands if module == "open_clip_train.main"]
    assert parsed.model in open_clip.list_models()
    assert "msa_cfg" in open_clip.get_model_config(parsed.model)
    if start == "clip":
        assert parsed.pretrained in open_clip.list_pretrained_tags_by_model(parsed.model)
    assert parsed.force_quick_gelu == (start in ("remoteclip", "georsclip"))
    assert parsed.pretrained_image == (start in ("imagenet", "frozen"))
    means = {"imagenet": [0.485, 0.456, 0.406], "imagenet-lite": [0.5, 0.5, 0.5], "frozen": [0.5, 0.5, 0.5]}
    assert parsed.image_mean == means.get(start)
    assert parsed.lock_text == parsed.lock_text_freeze_layer_norm == (start in ("imagenet-lite", "frozen"))
    assert ("features" in str(parsed.train_data)) == (start == "frozen")
    assert len(list(range(0, parsed.epochs, parsed.save_frequency))) <= 10
    assert len(before) == (start == "imagenet-lite")
    for heads in before:  # on features, from the weights that the towers start from; the towers go on from its end
        assert "features" in heads.train_data
        assert heads.pretrained_image
        assert heads.image_mean == parsed.image_mean
        assert not heads.lock_image_unlocked_groups
        assert parsed.lock_image_unlocked_groups == 3
        assert parsed.pretrained == f"{heads.logs}/{heads.name}/checkpoints/epoch_{heads.epochs}.pt"
        assert (heads.batch_size, heads.seed) == (24, parsed.seed)


def test_a_tag_brings_its_activation_and_what_follows_the_dashes_wins(recipe, commands, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = published_files.write("ucm", tmp_path / "data")
    given = ["ucm", "--data", str(data), "--weights", "openai", "--lr", "2e-5", "--out", str(tmp_path / "out")]
    recipe.main([*given, "--seeds", "3", "5", "--", "--wd", "0.3", "--accum-freq", "2"])
    runs = [parse_args(words) for module, words in commands if module == "open_clip_train.main"]
    assert [run.seed for run in runs] == [3, 5]
    assert all(run.pretrained == "openai" and run.force_quick_gelu for run in runs)
    assert {(run.lr, run.wd, run.accum_freq) for run in runs} == {(2e-5, 0.3, 2)}
    assert len({run.name for run in runs}) == 2
    assert commands[-1][1][1:3] == [f"{tmp_path}/out/logs/{run.name}" for run in runs]


def test_files_that_are_missing_are_named(recipe: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "readme.txt").touch()
    with pytest.raises(
        ValueError, match=r"no dataset_nwpu\.json \(readme\.txt\)\. Get the set from https://github\.com/"
    ):
        recipe.main(["nwpu", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"no dataset_rsicd\.json \(no such folder\)"):
        recipe.main(["rsicd", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])


def test_weights_without_a_tag_must_be_given(recipe: ModuleType, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit):
        recipe.main(["ucm", "--start", "remoteclip", "--out", str(tmp_path)])
    assert "--start remoteclip needs --weights FILE: RemoteCLIP-ViT-B-32.pt" in capsys.readouterr().err


# ---- one whole run


@pytest.fixture(scope="module")
def finished(tiny_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str, Path]:
    """A recipe that has run from RSITMD's files to test recalls: its arguments, what it printed, its folder."""
    folder = tmp_path_factory.mktemp("recipe")
    data, out, weights = published_files.write("rsitmd", folder / "data"), folder / "out", folder / "plain.pt"
    torch.save(open_clip.create_model("tiny-ViT", force_quick_gelu=True).state_dict(), weights)
    # Mean and deviation as far from CLIP's as it takes to be noticed when an evaluation forgets them.
    told = ["--image-mean", "0", "0", "0", "--image-std", "3", "2", "1", "--workers", "0"]
    given = ["rsitmd", "--data", str(data), "--start", "georsclip", "--weights", str(weights), "--out", str(out)]
    given += ["--model", "MSA-tiny-ViT", "--epochs", "2", "--batch-size", "8", "--lr", "1e-2", "--device", "cpu"]
    given += ["--", *told]
    environment = {**os.environ, "MSA_OPENCLIP_CONFIGS": str(tiny_configs), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RECIPES / "run.py"), *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return given, done.stdout, out


def test_a_recipe_runs_from_files_to_test_recalls(finished: tuple[list[str], str, Path]) -> None:
    _, printed, out = finished
    shown = re.findall(r"^\$ (.*)$", printed, flags=re.MULTILINE)
    assert [line.split()[0:3] for line in shown] == [
        ["msa-openclip", "shards", "build"],
        ["python", "-m", "open_clip_train.main"],
        ["msa-openclip", "best", f"{out}/logs/georsclip-MSA-tiny-ViT-seed0"],
    ]
    found = json.loads((out / "georsclip-MSA-tiny-ViT.json").read_text())
    assert found["data"]["images"] == 7
    assert set(found["mean_sd"]) >= {"global", "match", "fused"}
    assert found["models"][0]["intervals_95"]["fused"]
    assert "<img" in (out / "georsclip-MSA-tiny-ViT.html").read_text()
    assert (out / "logs" / "georsclip-MSA-tiny-ViT-seed0.png").stat().st_size > 10_000


def test_a_checkpoint_scores_on_val_what_its_run_wrote_down(finished: tuple[list[str], str, Path], tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Not so if mean, deviation or QuickGELU, which the checkpoint does not hold, were forgotten."""
    out = finished[2]
    run = out / "logs" / "georsclip-MSA-tiny-ViT-seed0"
    pattern = read_parameters(run)["val_data"]
    recorded = [json.loads(line) for line in (run / "checkpoints" / "results.jsonl").read_text().splitlines()]
    for row in recorded:
        spec = f"MSA-tiny-ViT={run}/checkpoints/epoch_{row['epoch']}.pt"
        report = tmp_path / "val.json"
        assert cli.main(["eval", spec, "--shards", pattern, "--bootstrap", "0", "--json", str(report)]) == 0
        (model,) = json.loads(report.read_text())["models"]
        for ranking in ("global", "match", "fused"):
            for metric in ("mR", "i2t_mean_rank", "t2i_mean_rank"):
                written = row[f"retrieval_{ranking}_{metric}"]
                assert model["metrics"][ranking][metric] == pytest.approx(written, abs=1e-4), (ranking, metric)


def test_what_is_trained_is_not_trained_again(finished, recipe, commands, capsys) -> None:  # type: ignore[no-untyped-def]
    given, _, out = finished
    before = {path.name: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    recipe.main(given)
    assert [words[0] for _, words in commands] == ["shards", "best"]
    assert "georsclip-MSA-tiny-ViT-seed0 is trained." in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}


def test_a_run_whose_last_checkpoint_is_half_written_is_trained_on(finished, recipe, commands) -> None:  # type: ignore[no-untyped-def]
    given, _, out = finished
    last = out / "logs/georsclip-MSA-tiny-ViT-seed0/checkpoints/epoch_2.pt"
    data = last.read_bytes()
    last.write_bytes(data[:1000])
    try:
        recipe.main(given)
    finally:
        last.write_bytes(data)
    trained = next(words for module, words in commands if module == "open_clip_train.main")
    assert trained[trained.index("--resume") + 1] == "latest"


def run_step(module: str, *arguments: object) -> None:
    """What `run` of the recipes does, in processes that start in a moment."""
    done = run_new_python("-m", module, *arguments)
    if done.returncode:
        raise StepError(done.stdout + done.stderr)


@pytest.mark.parametrize("start", ["frozen", "imagenet-lite"])
def test_starts_for_a_laptop_run_from_files_to_test_recalls(start, recipe, tiny_bert, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """With towers of their kind, tiny and random: timm's with activations in its norms, Hugging Face's."""
    text = tiny.bert_text(tiny_bert) | {"hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    config = tiny.config("timm-RN", text=text, msa={})
    config["vision_cfg"] |= {"timm_model_name": "test_efficientnet.r160_in1k", "timm_proj": "linear"}
    (tmp_path / "configs").mkdir()
    open_clip.add_model_config(tiny.write_config(tmp_path / "configs", f"tiny-{start}", config))
    model, weights = open_clip.create_model(f"tiny-{start}"), tmp_path / "weights.pt"
    torch.save(model.state_dict(), weights)
    data, out = published_files.write("ucm", tmp_path / "data"), tmp_path / "out"
    given = ["ucm", "--data", str(data), "--out", str(out), "--start", start, "--model", f"tiny-{start}"]
    given += ["--weights", str(weights), "--epochs", "2", "--batch-size", "8", "--device", "cpu", "--workers", "0"]
    monkeypatch.setenv("MSA_OPENCLIP_CONFIGS", str(tmp_path / "configs"))
    monkeypatch.setattr(recipe, "run", run_step)
    recipe.main(given)
    heads = out / "logs" / f"frozen-tiny-{start}-seed0" / "checkpoints"
    assert heads.exists() == (start == "imagenet-lite" or start == "frozen")
    assert (out / "features" / f"frozen-tiny-{start}").exists()
    assert set(json.loads((out / f"{start}-tiny-{start}.json").read_text())["mean_sd"]) >= {"global", "match", "fused"}
    checkpoints = out / "logs" / f"{start}-tiny-{start}-seed0" / "checkpoints"
    trained = torch.load(checkpoints / "epoch_2.pt", weights_only=True)["state_dict"]
    weights_before = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    changed = {key for key, value in weights_before.items() if not value.equal(trained[key])}  # frozen norms count none
    assert {key.split(".")[0] for key in changed} >= {"mscmat", "fusion", "logit_scale"}
    assert bool([key for key in changed if key.startswith("visual.trunk.")]) == (start == "imagenet-lite")
    assert not [key for key in changed if key.startswith(("text.transformer.", "visual.trunk.bn1"))]


LOG = """INFO | Train Epoch: 0 [ 8/16 (50%)] LR: 0.1 Contrastive_loss: 4.0 (4.0) Match_loss: 2e-1 (0.2) Loss: 9.0 (9.0)
INFO | Train Epoch: 1 [16/16 (100%)] LR: 0.1 Contrastive_loss: 3.0 (3.5) Match_loss: 0.1 (0.2) Loss: 8.0 (9.0)
INFO | Eval Epoch: 1 clip_val_loss: 3.3 (3.3)
INFO | Train Epoch: 1 [ 8/16 (50%)] LR: 0.1 Contrastive_loss: 2.5 (2.5) Match_loss: 0.3 (0.3) Loss: 9.0 (9.0)
INFO | Train Epoch: 1 [16/16 (100%)] LR: 0.1 Contrastive_loss: 2.0 (2.2) Match_loss: 0.4 (0.3) Loss: 8.0 (9.0)
"""


def test_curves_of_a_resumed_run_go_forwards(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "out.log").write_text(LOG)
    rows = [(1, 10.0), (2, 20.0), (2, 21.0)]
    lines = [json.dumps({"epoch": epoch, "retrieval_fused_mR": value}) for epoch, value in rows]
    (tmp_path / "checkpoints" / "results.jsonl").write_text("\n".join(lines))
    losses, recalls = read_curves(tmp_path)
    assert {name: list(points.items()) for name, points in losses.items()} == {
        "contrastive_loss": [(0.5, 4.0), (1.5, 2.5), (2.0, 2.0)],
        "match_loss": [(0.5, 0.2), (1.5, 0.3), (2.0, 0.4)],
    }
    assert recalls == {"fused": {1: 10.0, 2: 21.0}}


def test_a_failing_command_ends_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"ended with code 1: msa-openclip shards verify .*nowhere"):
        run(CLI, "shards", "verify", tmp_path / "nowhere")
