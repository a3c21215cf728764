"""Captions that stand in the training set, and the others, are told apart and rated apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.retrieval_data import Tokenizer, preprocess
from helpers.shards_data import karpathy, real_data

from msa_openclip.data.captioned import EvalDataError
from msa_openclip.data.readers import read_captions
from msa_openclip.evaluation.eval_set import EvalSet
from msa_openclip.evaluation.evaluate import evaluate
from msa_openclip.evaluation.scorer import Scorer
from msa_openclip.evaluation.seen_captions import read_train_captions, seen_parts
from msa_openclip.reports.report import captions_by_part, describe
from msa_openclip.shards import build


def test_case_and_white_space_make_no_new_caption() -> None:
    parts = seen_parts(["A  Lake .", "two planes", "Straße"], ["a lake .", "Two planes!", "STRASSE"])
    assert {name: part.tolist() for name, part in parts.items()} == {
        "seen captions": [True, False, True],
        "unseen captions": [False, True, False],
    }
    assert list(seen_parts(["a"], ["a"])) == ["seen captions"]
    assert list(seen_parts(["a"], [])) == ["unseen captions"]


def test_train_captions_come_from_files_and_shards(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 3, "val": 2, "test": 2}, captions=2)
    build(str(source), str(tmp_path / "out"), images=str(tmp_path / "in/images"))
    content = json.loads(source.read_text())
    train = sorted(s["raw"] for row in content["images"] if row["split"] == "train" for s in row["sentences"])
    assert sorted(read_train_captions(str(source))) == train
    shards = sorted(str(path) for path in (tmp_path / "out").glob("train-*.tar"))
    assert sorted(read_train_captions("::".join(shards))) == train
    tests = sorted(str(path) for path in (tmp_path / "out").glob("test-*.tar"))
    with pytest.raises(EvalDataError, match=r"test-.*: no captions of a split train; it has test\."):
        read_train_captions("::".join(tests))


def test_parts_are_rated_as_sets_of_their_own(tmp_path: Path) -> None:
    """An evaluation of the unseen captions alone, as a caption file without the seen ones gives it."""
    from evaluation.test_evaluate import msa_model

    source = karpathy(tmp_path / "in", {"test": 7}, captions=3)
    images = read_captions(str(source), str(tmp_path / "in/images"))
    train = [images[0].captions[1].upper(), *images[2].captions, "others"]
    data = EvalSet(images, "file", train)
    assert captions_by_part(data) == {"seen captions": 4, "unseen captions": 17}
    assert describe(data).endswith("7 images, 21 captions, 21 of them distinct, 4 seen captions, 17 unseen captions")
    scorer = Scorer(msa_model())
    evaluation = evaluate(scorer, data, preprocess, Tokenizer())
    seen = {text.casefold() for text in train}
    for name, stays in (("seen captions", True), ("unseen captions", False)):
        content = json.loads(source.read_text())
        for row in content["images"]:
            row["sentences"] = [s for s in row["sentences"] if (s["raw"].casefold() in seen) == stays]
        captions = [tuple(s["raw"] for s in row["sentences"]) for row in content["images"]]
        alone = EvalSet([_with(image, said) for image, said in zip(images, captions, strict=True)], name)
        expected = evaluate(scorer, alone, preprocess, Tokenizer())
        assert evaluation.parts[name].keys() == expected.per_caption.keys()
        for ranking, retrieval in evaluation.parts[name].items():
            assert retrieval.summary() == pytest.approx(expected.per_caption[ranking].summary()), ranking


def _with(image, captions: tuple[str, ...]):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    return replace(image, captions=captions)


def test_ucm_repeats_half_of_its_captions() -> None:
    folder = real_data("ucm")
    train = read_train_captions(str(folder / "dataset_ucm.json"))
    shares = {}
    for split in ("val", "test"):
        data = EvalSet(
            read_captions(str(folder / "dataset_ucm.json"), str(folder / "images"), split=split), split, train
        )
        shares[split] = captions_by_part(data)["seen captions"] / data.captions
    assert shares == pytest.approx({"val": 0.63, "test": 0.55}, abs=0.01)
    assert torch.stack(list(data.parts.values())).sum(0).unique().tolist() == [1]
