"""`msa-openclip card`: what a run and its test say, said once more; and a folder for the hub made of both."""

from __future__ import annotations

import json
import os
from pathlib import Path

import open_clip
import pytest
import torch
from helpers.retrieval_data import randomise, scene, write_shards
from huggingface_hub import ModelCard

from msa_openclip.commands import main as cli
from msa_openclip.evaluation.loading import load
from msa_openclip.reports.model_card import OPEN, card, gather
from msa_openclip.reports.run_selection import METRIC, RunError

PARAMS = """aug_cfg: {{'dihedral': True, 'scale': (1.0, 1.0)}}
batch_size: 32
epochs: 4
force_quick_gelu: True
image_mean: [0.1, 0.2, 0.3]
image_std: None
lr: 3e-05
model: MSA-tiny-ViT
pretrained: /home/me/weights/RemoteCLIP-ViT-B-32.pt
seed: 0
train_data: {train}
"""
VALUES = {1: 10.0, 2: 31.256, 3: 30.0}


@pytest.fixture(scope="module")
def folder(tiny_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a/ and b/: two seeds' runs of the same weights; image/: shards; one.json, two.json: tests of one and of both."""
    root = tmp_path_factory.mktemp("card")
    test = write_shards(root, count=7)
    model = randomise(open_clip.create_model("MSA-tiny-ViT", force_quick_gelu=True), seed=3)
    for run in ("a", "b"):
        (root / run / "checkpoints").mkdir(parents=True)
        (root / run / "params.txt").write_text(PARAMS.format(train=test))
        lines = [json.dumps({METRIC: value, "epoch": epoch}) for epoch, value in VALUES.items()]
        (root / run / "checkpoints" / "results.jsonl").write_text("\n".join(lines))
        for epoch in VALUES:
            torch.save(model.state_dict(), root / run / "checkpoints" / f"epoch_{epoch}.pt")
    for runs, name in (("a", "one"), ("ab", "two")):
        reports = ["--json", str(root / f"{name}.json"), "--bootstrap", "20"]
        assert cli.main(["best", *(str(root / run) for run in runs), "--shards", test, *reports]) == 0
    return root


def text(folder: Path, report: str = "one.json", run: str = "a", title: str = "Planes") -> str:
    tested = gather(str(folder / run), str(folder / report), METRIC)
    return card(tested, title=title, repository="me/planes", license=None)


def test_the_card_says_what_was_trained_chosen_and_tested(folder: Path) -> None:
    found = text(folder)
    assert "# Planes\n" in found
    assert 'create_model_and_transforms("hf-hub:me/planes")' in found
    assert "Epoch 2 of 4, chosen on val (retrieval_fused_mR 31.26)." in found
    for row in ("lr | `3e-05`", "seed | `0`", "aug_cfg | `{'dihedral': True, 'scale': (1.0, 1.0)}`"):
        assert f"| {row} |" in found
    assert "| pretrained | `RemoteCLIP-ViT-B-32.pt` |" in found
    assert "| force_quick_gelu | `True` |" in found
    assert "| image_std |" not in found
    assert "/home" not in found
    assert "Images: test 7." in found
    assert '"heads": 4' in found
    assert "7 test images with 35 captions, 33 different" in found
    measured = json.loads((folder / "one.json").read_text())["models"][0]
    low, high = measured["intervals_95"]["fused"]["mR"]
    cells = [f"{measured['metrics']['fused'][name]:.2f}" for name in ("i2t_R@1", "i2t_R@5", "i2t_R@10")]
    assert f"| fused | {' | '.join(cells)} |" in found
    assert f" {measured['metrics']['fused']['mR']:.2f} | {low:.2f} to {high:.2f} |" in found
    assert "scale1" not in found
    assert "differ in their seeds" not in found


def test_several_seeds_are_summed_up(folder: Path) -> None:
    mean, sd = json.loads((folder / "two.json").read_text())["mean_sd"]["match"]["mR"]
    found = text(folder, "two.json", "b")
    assert "One of 2 runs, which differ in their seeds; their mR, mean ± sd: global " in found
    assert f", match {mean:.2f} ± {sd:.2f}, fused " in found


def test_what_only_the_author_knows_is_left_open_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["card", str(folder / "a"), "--eval", str(folder / "one.json"), "--repo", "me/planes"]
    assert cli.main(given) == 0
    out, err = capsys.readouterr()
    assert out == text(folder, title="planes")
    assert out.count(OPEN) == 4
    assert err.startswith("4 places are left to you:\nname: TO FILL IN (the test set)\nData: TO FILL IN")
    assert cli.main([*given, "--license", "mit"]) == 0
    out, err = capsys.readouterr()
    assert out.count(OPEN) == 3
    assert ModelCard(out).data.license == "mit"


def test_the_hub_reads_its_metadata(folder: Path) -> None:
    data = ModelCard(text(folder, title="Planes: a --- test")).data
    assert data.model_name == "Planes: a --- test"
    assert data.library_name == "open_clip"
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert "remote-sensing" in data.tags
    measured = json.loads((folder / "one.json").read_text())["models"][0]["metrics"]["fused"]
    results = {result.metric_name: result for result in data.eval_results}
    assert len(results) == 7
    assert results["t2i R@5 (fused, %)"].metric_value == round(measured["t2i_R@5"], 2)
    assert results["t2i R@5 (fused, %)"].metric_type == "recall_at_5"
    assert results["mR (fused, %)"].metric_value == round(measured["mR"], 2)
    assert {(result.task_type, result.dataset_split) for result in results.values()} == {
        ("image-text-retrieval", "test")
    }


def test_a_folder_for_the_hub_is_the_model_that_was_tested(folder: Path, tmp_path: Path) -> None:
    from open_clip.push_to_hf_hub import save_for_hf

    best = gather(str(folder / "a"), str(folder / "one.json"), METRIC).best
    tested = load(best.spec)
    config = open_clip.get_model_config(best.model)
    save_for_hf(tested.scorer.model, tested.tokenizer, config, str(tmp_path / "hub"), safe_serialization=True)
    assert not (tmp_path / "hub" / "README.md").exists()  # open_clip writes none here
    (tmp_path / "hub" / "README.md").write_text(text(folder))
    again = load(f"local-dir:{tmp_path / 'hub'}")
    images, captions = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), ["a", "two planes"]
    with torch.no_grad():
        scores = [x.scorer.model.get_logits(images, x.tokenizer(captions))[0] for x in (tested, again)]
    assert scores[0].equal(scores[1])
    assert tested.preprocess(scene(5)).equal(again.preprocess(scene(5)))
    assert "mean=[0.1, 0.2, 0.3]" in repr(again.preprocess)


def test_a_test_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"one\.json: tests .*a/checkpoints/epoch_2\.pt, but the run's best epoch"):
        text(folder, "one.json", "b")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(RunError, match=r"x\.json: not written by `msa-openclip best --json`"):
        gather(str(folder / "a"), str(tmp_path / "x.json"), METRIC)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("ties", "odd", "ties"),
        ("ties", [], "ties"),
        ("metrics", None, "metrics"),
        ("metrics", 1.0, "metrics"),
        ("metrics", {"other": {}}, "metrics"),
        ("metrics", {"fused": {"mR": 1.0}}, r"metrics\.fused"),
        ("intervals_95", {"fused": {"mR": [1.0]}}, r"intervals_95\.fused"),
        ("data", {"images": 3}, "data"),
        ("chosen", 3, "chosen"),
        ("mean_sd", {"fused": 1.0}, r"mean_sd\.fused"),
    ],
)
def test_a_report_that_lacks_what_the_card_says_is_refused_by_its_key(
    key: str, value: object, named: str, folder: Path, tmp_path: Path
) -> None:
    content = json.loads((folder / "two.json").read_text())
    place = content if key in content else content["models"][0]
    assert key in place
    place[key] = value
    if value is None:
        del place[key]
    (tmp_path / "odd.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=rf"odd\.json: {named} is missing or not as `msa-openclip best --json`"):
        text(folder, str(tmp_path / "odd.json"))


def test_a_pipe_or_endless_nesting_is_no_report(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    for name, reason in (("pipe", "not a regular file"), ("deep.json", "nested too deeply")):
        with pytest.raises(RunError, match=f"{name}: {reason}"):
            text(folder, str(tmp_path / name))


def test_shards_that_are_gone_leave_their_counts_out(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    moved.mkdir()
    (moved / "checkpoints").symlink_to(folder / "a" / "checkpoints")
    (moved / "params.txt").write_text(PARAMS.format(train="/gone/train-{000..003}.tar"))
    assert "(name, source, licence).\n" in text(folder, "one.json", str(moved))
