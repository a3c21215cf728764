"""The command line: eval, best and classify on real files, with what they print, write and refuse."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from helpers import tiny
from helpers.pages import assert_stands_alone
from helpers.retrieval_data import randomise, scene, write_captioned_scenes, write_shards

from msa_openclip.commands import main as cli
from msa_openclip.data.captioned import EvalDataError
from msa_openclip.data.pixels import load_image
from msa_openclip.data.readers import read_captions, read_class_folder
from msa_openclip.evaluation.loading import ModelError, load
from msa_openclip.evaluation.scorer import EncodedTexts
from msa_openclip.evaluation.zero_shot import classify
from msa_openclip.reports.run_selection import RunError, best_epoch, mean_and_sd
from msa_openclip.shards.records import class_words


@pytest.fixture(scope="module")
def checkpoints(tiny_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights of the tiny models, random but everywhere in play, as `NAME=FILE`."""
    folder = tmp_path_factory.mktemp("weights")
    specs = {}
    for name in ("tiny-ViT", "MSA-tiny-ViT"):
        model = randomise(open_clip.create_model(name), seed=3)
        torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, folder / name)
        specs[name] = f"{name}={folder / name}"
    return specs


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards of both layouts and the caption file and images they are made of."""
    folder = tmp_path_factory.mktemp("scenes")
    write_shards(folder / "image", "image", count=11)
    write_shards(folder / "pair", "pair", count=11)
    return folder


def shards(source: Path, layout: str) -> str:
    return f"{source}/{layout}/{layout}/test-{{000000..000001}}.tar"


def caption_file(source: Path) -> list[str]:
    folder = source / "image" / "source"
    return ["--captions", str(folder / "captions.json"), "--images", str(folder / "images")]


def test_eval_says_the_same_of_shards_and_caption_file(checkpoints, source: Path, tmp_path: Path, capsys) -> None:
    inputs = (["--shards", shards(source, "image")], ["--shards", shards(source, "pair")], caption_file(source))
    found = []
    for number, given in enumerate(inputs):
        out = tmp_path / f"{number}.json"
        assert cli.main(["eval", *checkpoints.values(), *given, "--json", str(out), "--bootstrap", "20"]) == 0
        found.append(json.loads(out.read_text()))
    assert found[0]["data"]["images"] == 11
    assert found[0]["data"]["distinct_captions"] == 53
    for other in found[1:]:
        for mine, theirs in zip(other["models"], found[0]["models"], strict=True):
            assert mine["metrics"]["global"] == pytest.approx(theirs["metrics"]["global"], abs=0.1)
    plain, msa = found[0]["models"]
    assert list(plain["metrics"]) == ["global"]
    assert list(msa["metrics"])[:3] == ["global", "match", "fused"]
    low, high = msa["intervals_95"]["fused"]["mR"]
    assert low < msa["metrics"]["fused"]["mR"] < high
    printed = capsys.readouterr().out
    assert "11 images, 55 captions, 53 of them distinct" in printed
    assert f"{msa['metrics']['match']['mR']:.2f}" in printed
    assert "match_scale1" not in printed


def test_eval_rates_captions_of_the_training_set_apart(checkpoints, source: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("matplotlib", reason="matplotlib is missing (extra `plot`)")
    content = json.loads((source / "image" / "source" / "captions.json").read_text())
    train = tmp_path / "train.json"
    rows = [{**row, "split": "train"} for row in content["images"][:4]]
    train.write_text(json.dumps({**content, "images": rows}))
    page, out = tmp_path / "page.html", tmp_path / "out.json"
    reports = ["--json", str(out), "--html", str(page), "--bootstrap", "0"]
    assert (
        cli.main(["eval", checkpoints["MSA-tiny-ViT"], *caption_file(source), "--train-captions", str(train), *reports])
        == 0
    )
    found = json.loads(out.read_text())
    (model,) = found["models"]
    assert sum(found["data"]["captions_by_part"].values()) == 55
    assert set(model["metrics_by_part"]) == {"seen captions", "unseen captions"}
    for part, rankings in model["metrics_by_part"].items():
        assert set(rankings) == set(model["metrics"])
        assert f"{rankings['fused']['mR']:.2f}" in page.read_text().split(f"<h2>{part.capitalize()}</h2>")[1]
    assert re.search(r"fused, unseen captions +[0-9.]+", capsys.readouterr().out)


def test_eval_page_holds_plots_pictures_and_classes(checkpoints, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing (extra `plot`)")
    page, out = tmp_path / "page.html", tmp_path / "out.json"
    regex = ["--class-regex", "([a-z]+)_[0-9]+$", "--json", str(out), "--html", str(page), "--ties", "pessimistic"]
    assert cli.main(["eval", *checkpoints.values(), *caption_file(source), *regex]) == 0
    html = page.read_text()
    assert_stands_alone(html)
    assert html.count("data:image/svg+xml") == 2
    plain, msa = (html.split(f"captions for {name} ")[2] for name in checkpoints)
    plain = plain.split("<h2>")[0]
    assert plain.count('class="example"') == msa.count('class="example"') == 11  # each image's worst caption
    assert plain.count("data:image/jpeg") == 11 * 5  # its image and the first four answers
    assert plain.count("<details") == 0
    assert 11 < msa.count("<details") <= 2 * 11  # why that image, and why another came first
    assert msa.count("data:image/jpeg") == 11 * 5 + 2 * msa.count("<details")  # where each scale looked
    by_class = json.loads(out.read_text())["models"][1]["by_class"]
    assert set(by_class) == {"harbor", "forest", "runway"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "nothing.tar"], r"nothing\.tar: FileNotFoundError. Check the name"),
        (["FILES", "--split", "val"], "no image in split 'val'"),
        (["FILES", "--class-regex", "x(y)z"], "fits no image id; the first is 'harbor_0'"),
    ],
)
def test_eval_refuses_bad_data_by_name(checkpoints, source: Path, capsys, arguments, message: str) -> None:
    given = [part for item in arguments for part in (caption_file(source) if item == "FILES" else [item])]
    assert cli.main(["eval", checkpoints["tiny-ViT"], *given]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_models_without_weights_are_refused(checkpoints, tiny_configs: Path) -> None:
    with pytest.raises(ModelError, match=r"tiny-ViT: no weights; write tiny-ViT=FILE"):
        load("tiny-ViT")
    with pytest.raises(ModelError, match="no-such-model=x: cannot be loaded"):
        load("no-such-model=x")
    with pytest.raises(ModelError, match=r"tiny-ViT=gone\.pt: cannot be loaded"):
        load("tiny-ViT=gone.pt")
    plain = checkpoints["tiny-ViT"].partition("=")[2]
    with pytest.raises(ModelError, match="weights of a plain CLIP model, MSA's own part would be random"):
        load(f"MSA-tiny-ViT={plain}")
    assert load("tiny-ViT=untrained").scorer.rankings == ("global",)


def test_weights_of_a_model_without_parts_of_its_own_are_whole(tmp_path: Path) -> None:
    """The tower's feature alone, and no MSCMAT: what was trained is all there is."""
    alone = {"fusion": "tower", "loss": {"fused_weight": 0.0, "global_weight": 1.0}}
    tiny.write_config(tmp_path, "MSA-tiny-alone", tiny.config(msa=alone))
    open_clip.add_model_config(tmp_path)
    torch.save(open_clip.create_model("MSA-tiny-alone").state_dict(), tmp_path / "alone.pt")
    assert load(f"MSA-tiny-alone={tmp_path / 'alone.pt'}").scorer.rankings == ("global",)


def write_run(folder: Path, values: dict[int, float], weights: str) -> str:
    """What open_clip_train.main leaves behind."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "params.txt").write_text("logs: ./logs\nmodel: MSA-tiny-ViT\nname: run\n")
    lines = [json.dumps({"retrieval_fused_mR": value, "epoch": epoch}) for epoch, value in values.items()]
    (folder / "checkpoints" / "results.jsonl").write_text("\n".join(lines) + "\n")
    for epoch in values:
        (folder / "checkpoints" / f"epoch_{epoch}.pt").symlink_to(weights)
    return str(folder)


def test_best_takes_the_best_epoch_on_val_and_sums_up_seeds(checkpoints, source: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing (extra `plot`)")
    weights = checkpoints["MSA-tiny-ViT"].partition("=")[2]
    runs = [
        write_run(tmp_path / "a", {1: 10.0, 2: 31.5, 3: 31.5, 4: 30.0}, weights),
        write_run(tmp_path / "b", {1: 12.0, 2: 11.0}, weights),
    ]
    out, page = tmp_path / "best.json", tmp_path / "best.html"
    reports = ["--json", str(out), "--html", str(page), "--bootstrap", "20"]
    assert cli.main(["best", *runs, *caption_file(source), *reports]) == 0
    found = json.loads(out.read_text())
    low, high = found["models"][0]["intervals_95"]["fused"]["mR"]
    assert low < found["models"][0]["metrics"]["fused"]["mR"] < high
    assert page.read_text(encoding="utf-8").count("Hardest captions") == 2
    assert [row["epoch"] for row in found["chosen"]] == [2, 1]
    mean, sd = found["mean_sd"]["fused"]["mR"]
    assert mean == pytest.approx(found["models"][0]["metrics"]["fused"]["mR"])
    assert sd == 0.0
    assert "a: epoch 2, retrieval_fused_mR 31.50 on val" in capsys.readouterr().out


def test_runs_that_cannot_be_chosen_from_are_named(tmp_path: Path, checkpoints) -> None:
    weights = checkpoints["MSA-tiny-ViT"].partition("=")[2]
    run = write_run(tmp_path / "a", {1: 10.0, 2: 20.0}, weights)
    with pytest.raises(RunError, match="no epoch has 'mR'; known are epoch, retrieval_fused_mR"):
        best_epoch(run, "mR")
    (tmp_path / "a" / "checkpoints" / "epoch_2.pt").unlink()
    with pytest.raises(
        RunError, match=r"epoch_2\.pt: not found, and epoch 2 is the best; train with --save-frequency 1"
    ):
        best_epoch(run)
    with pytest.raises(RunError, match=r"results\.jsonl: not found"):
        best_epoch(str(tmp_path / "none"))
    (tmp_path / "a" / "checkpoints" / "epoch_2.pt").symlink_to(weights)
    (tmp_path / "a" / "params.txt").write_text("name: run\n")
    with pytest.raises(RunError, match=r"params\.txt: no line 'model: NAME'"):
        best_epoch(run)


def test_mean_and_sd() -> None:
    found = mean_and_sd([{"a": 1.0, "b": 0.0}, {"a": 2.0}, {"a": 6.0}])
    assert found == {"a": (3.0, pytest.approx(7**0.5))}
    assert mean_and_sd([{"a": 1.0}]) == {"a": (1.0, 0.0)}


@pytest.mark.parametrize("command", ["eval", "classify", "best", "index"])
def test_progress_bars_are_shown_on_stderr_when_asked_for(
    command: str, checkpoints, class_folder: Path, source: Path, tmp_path_factory, capsys
) -> None:
    spec, out = checkpoints["MSA-tiny-ViT"], tmp_path_factory.mktemp("out")
    arguments, said = {
        "eval": ([spec, *caption_file(source)], ["encoding images:", "scoring captions:", "counting ranks:"]),
        "classify": ([spec, "--folder", str(class_folder)], ["classifying:"]),
        "best": (
            [write_run(out / "run", {1: 1.0}, spec.partition("=")[2]), *caption_file(source)],
            ["encoding images:"],
        ),
        "index": ([spec, str(out / "index"), "--folder", str(class_folder)], ["indexing:"]),
    }[command]
    assert cli.main([command, *arguments]) == 0  # this is no terminal
    printed, errors = capsys.readouterr()
    assert errors == ""
    shutil.rmtree(out / "index", ignore_errors=True)
    assert cli.main([command, *arguments, "--progress", "--batch-size", "4"]) == 0
    again, errors = capsys.readouterr()
    assert [text for text in said if text not in errors] == []
    assert without_speed(again) == without_speed(printed)
    assert cli.main([command, *arguments, "--progress", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def without_speed(text: str) -> str:
    return re.sub(r"[0-9.]+ images/s", "", text)


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """Five pictures of two classes."""
    for name, numbers in (("SportsField", (1, 2, 3)), ("open_water", (60, 61))):
        (tmp_path / name).mkdir()
        for number in numbers:
            scene(number).save(tmp_path / name / f"{number}.png")
    return tmp_path


def test_classify_equals_a_loop_over_images_classes_and_templates(checkpoints, class_folder: Path) -> None:
    model = load(checkpoints["MSA-tiny-ViT"])
    images, templates = read_class_folder(str(class_folder)), ("a photo of {}.", "{} from above")
    found = classify(model, images, templates, batch_size=2)
    assert found.classes == ("SportsField", "open_water")
    hits = {"global": [], "match": [], "fused": []}
    model.scorer.model.requires_grad_(False)
    for image in images:
        pixels = model.preprocess(load_image(image))[None]
        rows = {"global": [], "match": [], "fused": []}
        for name in found.classes:
            texts = model.scorer.texts(model.tokenizer([t.format(class_words(name)) for t in templates]))
            encoded = model.scorer.images(pixels)
            by_text = dict(zip(model.scorer.rankings, model.scorer.scores(encoded, texts)[:, 0], strict=True))
            feature = texts.feature.mean(0)
            cosine = encoded.feature @ (feature / feature.norm())
            rows["global"].append(float(cosine))
            rows["match"].append(float(by_text["match"].mean()))
            rows["fused"].append(float(model.scorer.model.rank_scores(cosine, by_text["match"].mean().reshape(1, 1))))
        right = found.classes.index(image.label)
        for ranking, row in rows.items():
            hits[ranking].append(100.0 * (max(row) == row[right]))
    for ranking, values in hits.items():
        assert found.top1[ranking] == pytest.approx(sum(values) / len(values))
        assert found.per_class[ranking]["open_water"] == pytest.approx(sum(values[3:]) / 2)
        assert found.top5[ranking] == 100.0


def test_braces_of_templates_are_text(checkpoints, class_folder: Path) -> None:
    loaded, seen = load(checkpoints["tiny-ViT"]), []
    model = replace(loaded, tokenizer=lambda texts: seen.extend(texts) or loaded.tokenizer(texts))
    classify(model, read_class_folder(str(class_folder)), ("a {} of {size}", "{} {}", "a {} {"))
    assert seen[3:] == ["a open water of {size}", "open water open water", "a open water {"]


def test_classify_knows_nothing_from_constant_scores(checkpoints, class_folder: Path, monkeypatch) -> None:
    model = load(checkpoints["tiny-ViT"])
    constant = EncodedTexts(torch.ones(2, 24) / 24**0.5, None)
    monkeypatch.setattr(model.scorer, "texts", lambda ids: constant)
    found = classify(model, read_class_folder(str(class_folder)), ("{}",))
    assert found.top1 == {"global": 50.0}


def test_classify_command(checkpoints, class_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "zero.json"
    assert cli.main(["classify", *checkpoints.values(), "--folder", str(class_folder), "--json", str(out)]) == 0
    assert "5 images, 2 classes, 3 templates" in capsys.readouterr().out
    assert set(json.loads(out.read_text())) == set(checkpoints.values())
    assert cli.main(["classify", checkpoints["tiny-ViT"], "--folder", str(class_folder), "--templates", "a"]) == 2
    assert "template 'a' has no {}" in capsys.readouterr().err


def test_classify_refuses_images_without_class(checkpoints, tmp_path: Path) -> None:
    path = write_captioned_scenes(tmp_path / "source")
    with pytest.raises(EvalDataError, match=r"harbor_0: no class \(7 such images\)"):
        classify(load(checkpoints["tiny-ViT"]), read_captions(str(path), str(path.parent / "images")))


def test_class_names_become_words() -> None:
    assert (
        class_words("BaseballField")
        == class_words("baseball_field")
        == class_words("baseball-field")
        == "baseball field"
    )
