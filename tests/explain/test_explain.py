"""Explanations add up to the scores that search ranks by."""

from __future__ import annotations

import json
import math
from pathlib import Path

import open_clip
import pytest
import torch
from helpers.retrieval_data import randomise, scene
from PIL import Image

from msa_openclip.commands import main as cli
from msa_openclip.evaluation.loading import LoadedModel, load
from msa_openclip.explain.explanation import ExplainError, explain
from msa_openclip.explain.figure import figure

TEXT = "Many unparkable planes, near trees"


def loaded(name: str, folder: Path) -> LoadedModel:
    torch.save(randomise(open_clip.create_model(name), seed=5).state_dict(), folder / "weights.pt")
    model = load(f"{name}={folder / 'weights.pt'}")
    model.scorer.model.requires_grad_(False)
    return model


@pytest.fixture
def picture() -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    noise = (torch.rand(40, 40, 3, generator=generator) * 255).byte().numpy()
    return Image.fromarray(noise)


@pytest.mark.parametrize("name", ["MSA-tiny-ViT", "MSA-tiny-RN", "MSA-tiny-BERT"])
def test_parts_add_up_to_the_score(name: str, tiny_configs: Path, tmp_path: Path, picture: Image.Image) -> None:
    model = loaded(name, tmp_path)
    found = explain(model, picture, TEXT)
    msa = model.scorer.model
    pixels, ids = model.preprocess(picture)[None], model.tokenizer([TEXT])
    feature, images = msa.image_side(pixels)
    text_feature, texts = msa.text_side(ids)
    scores = msa.match_scores(images, texts)
    assert found.fused == pytest.approx(float(msa.rank_scores(feature @ text_feature.T, scores)), rel=1e-5)
    for number, scale in enumerate(found.scales):
        score = 1 / (1 + math.exp(-scale.logit)) if msa.msa_cfg.score.form == "sigmoid" else scale.logit
        assert score == pytest.approx(float(scores[number]), abs=1e-4)
        parts = sum(word.contribution for word in scale.words) + scale.sentence + scale.image
        assert parts == pytest.approx(scale.logit, abs=1e-4)
        assert sum(word.weight for word in scale.words) == pytest.approx(1.0, abs=1e-5)
        assert float(scale.positions.sum()) == pytest.approx(1.0, abs=1e-5)
    assert len({round(scale.logit, 3) for scale in found.scales}) > 1


def test_each_word_by_loops(tiny_configs: Path, tmp_path: Path, picture: Image.Image) -> None:
    model = loaded("MSA-tiny-ViT", tmp_path)
    found = explain(model, picture, TEXT)
    words = [word.text for word in found.scales[0].words]
    assert words == ["many", "unparkable", "planes", ",", "near", "trees", "[end]"]
    ids = model.tokenizer([TEXT])[0].tolist()
    tokens: list[list[int]] = []
    here: list[int] = []
    for place, piece in enumerate(model.tokenizer.decoder[i] for i in ids):
        here = [*here, place] if place else []
        if piece.endswith("</w>") or piece == "<end_of_text>":  # the tokens of a word end with this mark
            tokens, here = [*tokens, here], []
        if piece == "<end_of_text>":
            break
    _, images = model.scorer.model.image_side(model.preprocess(picture)[None])
    _, texts = model.scorer.model.text_side(model.tokenizer([TEXT]))
    for number, scale in enumerate(found.scales):
        for word, places in zip(scale.words, tokens, strict=True):
            weight = contribution = 0.0
            heads = images.query.shape[2]
            for head in range(heads):
                logits = [
                    float(images.query[0, number, head] @ texts.key[0, number, n, head])
                    for n in range(texts.key.shape[2])
                    if texts.mask[0, n]
                ]
                total = sum(map(math.exp, logits))
                for place in places:
                    share = math.exp(logits[place - 1]) / total  # the first position is not attended to
                    weight += share / heads
                    value = texts.value[0, number, place - 1, head]
                    contribution += share * float(images.readout[0, number, head] @ value)
            assert word.weight == pytest.approx(weight, abs=1e-5)
            assert word.contribution == pytest.approx(contribution, abs=1e-4)


def test_positions_are_those_that_won_the_max(tiny_configs: Path, tmp_path: Path) -> None:
    model = loaded("MSA-tiny-RN", tmp_path)
    picture = Image.new("RGB", (32, 32))
    found = explain(model, picture, TEXT)
    msa = model.scorer.model
    maps = msa.image_scales.maps(msa.visual, model.preprocess(picture)[None]).maps
    won = torch.zeros(maps[0].shape[1])
    for channel in range(maps[0].shape[2]):
        won[int(maps[0][0, :, channel].argmax())] += 1 / maps[0].shape[2]
    torch.testing.assert_close(found.scales[0].positions.flatten(), won)
    size = msa.visual.image_size
    assert [tuple(scale.positions.shape) for scale in found.scales] == [(size // s, size // s) for s in (4, 8, 16, 32)]


def test_what_cannot_be_explained_is_named(tiny_configs: Path, tmp_path: Path) -> None:
    with pytest.raises(ExplainError, match="tiny-ViT=untrained has no MSCMAT"):
        explain(load("tiny-ViT=untrained"), scene(1), TEXT)
    with pytest.raises(ExplainError, match="the text is blank"):
        explain(loaded("MSA-tiny-ViT", tmp_path), scene(1), " ")


def test_command_and_figure(tiny_configs: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing (extra `plot`)")
    model = loaded("MSA-tiny-ViT", tmp_path)
    scene(7).save(tmp_path / "a.png")
    options = ["--json", str(tmp_path / "a.json"), "--figure", str(tmp_path / "f.png")]
    assert cli.main(["explain", model.spec, str(tmp_path / "a.png"), TEXT, *options]) == 0
    printed = capsys.readouterr().out
    assert "planes" in printed
    content = json.loads((tmp_path / "a.json").read_text())
    assert len(content["scales"]) == 2
    assert Image.open(tmp_path / "f.png").width > 500
    drawn = figure(explain(model, scene(7), TEXT), scene(7))
    bars = drawn.axes[2].patches
    assert [round(bar.get_width(), 4) for bar in bars][:2] == [
        round(word["contribution"], 4) for word in content["scales"][0]["words"]
    ][:2]
