"""The captions to look at, and the page that explains them: chosen as by loops, parts that add up to scores."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from helpers.pages import assert_stands_alone
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
from msa_openclip.reports.page import page, short_names
from msa_openclip.reports.report import ModelResult


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
def evaluation(model: LoadedModel, data: EvalSet) -> Evaluation:
    return evaluate(model.scorer, data, model.preprocess, model.tokenizer)


@pytest.fixture(scope="module")
def examples(model: LoadedModel, evaluation: Evaluation) -> Examples:
    return find_examples(model, evaluation)


@pytest.fixture(scope="module")
def result(model: LoadedModel, evaluation: Evaluation) -> ModelResult:
    return ModelResult.of(model.spec, evaluation, 1.0, ties="expected", bootstrap=10)


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
        assert [image.image_id for image in example.answers] == [
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
    assert all(example.rank == 1 and example.answers[0] is example.image for example in examples.surest)


def test_reasons_are_of_the_right_image_and_of_the_one_before_it(model: LoadedModel, examples: Examples) -> None:
    for example in (*examples.hardest, *examples.surest):
        shown = [example.image] if example.rank == 1 else [example.image, example.answers[0]]
        assert [reason.image for reason in example.reasons] == shown
        for reason in example.reasons:
            again = explain(model, load_image(reason.image), example.caption)
            assert reason.explanation.fused == pytest.approx(again.fused)


def test_other_models_have_examples_without_reasons(data: EvalSet) -> None:
    oracle = LoadedModel("oracle", Scorer(Oracle()), preprocess, Tokenizer())
    examples = find_examples(oracle, evaluate(oracle.scorer, data, preprocess, oracle.tokenizer))
    assert len(examples.surest) == 4
    assert examples.hardest[0].rank == (1 + 17) / 2  # the caption that two scenes share names none
    assert not any(example.reasons for example in (*examples.hardest, *examples.surest))


class Cells(HTMLParser):
    """The texts of the cells of the explanations of a page, by row."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = self.inside or ("class", "parts") in attributes
        if self.inside and tag == "tr":
            self.rows.append([])
        self.in_cell = self.inside and tag in ("td", "th", "img")
        if self.in_cell and tag != "img":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "table"
        self.in_cell = False

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.rows[-1][-1] += data


def test_the_table_adds_up_in_every_column(data: EvalSet, result: ModelResult, examples: Examples) -> None:
    reason = examples.hardest[0].reasons[0]
    example = replace(examples.hardest[0], reasons=(reason,))
    head, *parts, score = Cells(page(data, [replace(result, examples=Examples((example,), ()))])).rows
    scales = reason.explanation.scales
    assert head[1:] == [f"stage {scale.scale.stage}, {scale.scale.pool}" for scale in scales]
    assert [row[0] for row in parts] == [*(word.text for word in scales[0].words), "the sentence", "the image"]
    for column, scale in enumerate(scales, start=1):
        shown = [float(row[column]) for row in parts]
        assert sum(shown) == pytest.approx(float(score[column]), abs=0.0005 * (len(shown) + 1))
        assert float(score[column]) == pytest.approx(scale.logit, abs=0.0005)
        assert shown[0] == pytest.approx(scale.words[0].contribution, abs=0.0005)


def test_no_name_or_caption_can_break_the_page(
    model: LoadedModel, data: EvalSet, result: ModelResult, examples: Examples
) -> None:
    evil = "<script src='https://example.org'>$\\frac{</script> & trees"
    example = examples.hardest[0]
    reason = example.reasons[0]
    explanation = explain(model, load_image(reason.image), evil)
    image = replace(reason.image, image_id=evil)
    example = replace(
        example, caption=evil, image=image, reasons=(reason._replace(image=image, explanation=explanation),)
    )
    names = dict.fromkeys((evil, "$x$"), result.metrics["fused"])
    hostile = replace(result, spec=f"{evil}={evil}", by_class=names, examples=Examples((example,), (example,)))
    html = page(EvalSet(data.images, evil), [hostile, hostile])
    assert_stands_alone(html)
    assert html.count("&lt;script") > 10
    assert html.count("$x$") == 1


def test_scales_are_folded_away_and_wide_tables_scroll(data: EvalSet, result: ModelResult) -> None:
    html = page(data, [result])
    shown = re.sub(r"<details>.*?</details>", "", html, flags=re.DOTALL)
    assert "match scale1" in html
    assert "match scale1" not in shown
    assert html.count("<table") == html.count('<div class="scroll"><table') == 4
    assert '<meta name="viewport"' in html


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        (["MSA-ViT-B=logs/a/checkpoints/epoch_9.pt"], ["MSA-ViT-B"]),
        (["MSA-ViT-B=w.pt", "ViT-B-32=openai"], ["MSA-ViT-B", "ViT-B-32"]),
        (["A=x/logs/a/checkpoints/epoch_9.pt", "A=x/logs/b/checkpoints/epoch_9.pt"], ["A a/epoch_9", "A b/epoch_9"]),
        (["A=x/a/checkpoints/epoch_9.pt", "A=y/a/checkpoints/epoch_9.pt"], ["A x/a/epoch_9", "A y/a/epoch_9"]),
        (["A=/w/epoch_9.pt", "A=untrained", "B=1.5.bin"], ["A epoch_9", "A untrained", "B 1.5.bin"]),
        (["hf-hub:me/planes", "local-dir:/x/planes", "local-dir:/x/boats"], ["planes me", "planes x", "boats x"]),
        (["A=a.pt", "A=a.pt"], ["A", "A"]),
        (["A=a.pt", "A=a.bin"], ["A a", "A a.bin"]),
    ],
)
def test_short_names_tell_models_apart(specs: list[str], names: list[str]) -> None:
    assert short_names(specs) == names


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
