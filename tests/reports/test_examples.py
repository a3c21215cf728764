"""The captions to look at, and the page that explains them: chosen as by loops, parts that add up to scores."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from helpers.retrieval_data import Oracle, Tokenizer, preprocess, randomise, write_captioned_scenes
from PIL import Image

from msa_openclip.data.pixels import load_image
from msa_openclip.data.readers import read_captions
from msa_openclip.evaluation.eval_set import EvalSet
from msa_openclip.evaluation.evaluate import Evaluation, evaluate
from msa_openclip.evaluation.loading import LoadedModel, load
from msa_openclip.evaluation.scorer import Scorer
from msa_openclip.explain.explanation import explain
from msa_openclip.explain.figure import spotlight, view
from msa_openclip.reports.examples import Examples, find_examples
from msa_openclip.reports.explanation_table import explanation_table


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    path = write_captioned_scenes(tmp_path_factory.mktemp("scenes") / "source", count=17, captions=5)
    return EvalSet(read_captions(str(path), str(path.parent / "images")), "scenes")


@pytest.fixture(scope="module")
def model(tiny_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tmp_path_factory.mktemp("weights") / "msa.pt"
    torch.manual_seed(3)  # with these weights four images are found first
    torch.save(randomise(open_clip.create_model("MSA-tiny-ViT"), seed=3).state_dict(), path)
    loaded = load(f"MSA-tiny-ViT={path}")
    loaded.scorer.model.requires_grad_(False)
    return loaded


@pytest.fixture(scope="module")
def found(model: LoadedModel, data: EvalSet) -> Evaluation:
    return evaluate(model.scorer, data, model.preprocess, model.tokenizer)


@pytest.fixture(scope="module")
def examples(model: LoadedModel, found: Evaluation) -> Examples:
    return find_examples(model, found)


@pytest.fixture(scope="module")
def fused(model: LoadedModel, data: EvalSet) -> torch.Tensor:
    """(I, T) of every image and distinct caption, by the model's own function."""
    pixels = torch.stack([model.preprocess(load_image(image)) for image in data.images])
    return model.scorer.model.get_logits(pixels, model.tokenizer(list(data.texts)))[0]


def test_hardest_have_the_latest_right_images(examples: Examples, data: EvalSet, fused: torch.Tensor) -> None:
    worst = {}
    for number, image in enumerate(data.images):
        columns = [data.texts.index(caption) for caption in image.captions]
        worst[image.image_id] = max(int((fused[:, c] > fused[number, c]).sum()) + 1 for c in columns)
    expected = sorted(worst.values(), reverse=True)[:12]
    assert [example.rank for example in examples.hardest] == expected
    for example in examples.hardest:
        assert example.rank == worst[example.image.image_id]
        column = fused[:, data.texts.index(example.caption)]
        assert [image.image_id for image in example.found] == [
            data.images[number].image_id for number in column.argsort(descending=True)[:4]
        ]


def test_surest_win_by_the_widest_margins(examples: Examples, data: EvalSet, fused: torch.Tensor) -> None:
    margins: dict[str, list[float]] = {}
    for number, image in enumerate(data.images):
        for caption in image.captions:
            best = fused[:, data.texts.index(caption)].topk(2)
            if best.indices[0] == number:
                margins.setdefault(image.image_id, []).append(float(best.values[0] - best.values[1]))
    assert len(margins) == 4, "too few right answers to choose from"
    chosen = [example.image.image_id for example in examples.surest]
    firsts = {name: values[0] for name, values in margins.items()}  # one caption an image is tried, its first
    assert chosen == sorted(firsts, key=firsts.get, reverse=True)[:4]
    assert all(example.rank == 1 and example.found[0] is example.image for example in examples.surest)


def test_reasons_are_of_the_right_image_and_of_the_one_before_it(model: LoadedModel, examples: Examples) -> None:
    for example in (*examples.hardest, *examples.surest):
        shown = [example.image] if example.rank == 1 else [example.image, example.found[0]]
        assert [reason.image for reason in example.reasons] == shown
        for reason in example.reasons:
            again = explain(model, load_image(reason.image), example.caption)
            assert reason.explanation.fused == pytest.approx(again.fused)


def test_other_models_have_examples_without_reasons(data: EvalSet) -> None:
    oracle = LoadedModel("oracle", Scorer(Oracle()), preprocess, Tokenizer())
    found = find_examples(oracle, evaluate(oracle.scorer, data, preprocess, oracle.tokenizer))
    assert len(found.surest) == 4
    assert found.hardest[0].rank == (1 + 17) / 2  # the caption that two scenes share names none
    assert not any(example.reasons for example in (*found.hardest, *found.surest))


class Cells(HTMLParser):
    """The texts of a table's cells, by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1][-1] += data


def test_the_table_adds_up_in_every_column(model: LoadedModel, examples: Examples) -> None:
    reason = examples.hardest[0].reasons[0]
    table = Cells()
    table.feed(explanation_table(reason))
    head, *parts, score = table.rows
    scales = reason.explanation.scales
    assert head[1:] == [f"stage {scale.scale.stage}, {scale.scale.pool}" for scale in scales]
    assert [row[0] for row in parts] == [*(word.text for word in scales[0].words), "the sentence", "the image"]
    for column, scale in enumerate(scales, start=1):
        shown = [float(row[column]) for row in parts]
        assert sum(shown) == pytest.approx(float(score[column]), abs=0.0005 * (len(shown) + 1))
        assert float(score[column]) == pytest.approx(scale.logit, abs=0.0005)
        assert shown[0] == pytest.approx(scale.words[0].contribution, abs=0.0005)


def test_words_cannot_break_the_page(model: LoadedModel, examples: Examples) -> None:
    reason = examples.hardest[0].reasons[0]
    evil = explain(model, load_image(reason.image), "<script>alert(1)</script> & trees")
    html = explanation_table(reason._replace(explanation=evil))
    assert "<script" not in html
    assert "&lt;" in html


def test_the_spotlight_is_where_the_scale_looked() -> None:
    white, positions = Image.new("RGB", (50, 50), "white"), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    lit = np.asarray(spotlight(white, positions)).mean(axis=2)
    assert lit[5, -5] == 255
    assert lit[-5, 5] == lit[5, 5] == lit[-5, -5] == 51


def test_the_view_is_what_the_model_sees(model: LoadedModel) -> None:
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("blue", (32, 0, 64, 32))  # the middle third, which the crop keeps
    seen = view(model, wide)
    assert seen.size == (32, 32)
    assert seen.getpixel((16, 16)) == (0, 0, 255)
