"""Re-ranking against few-line oracles, its labels, and what it refuses."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from helpers.retrieval_data import Oracle, Tokenizer, preprocess, write_captioned_scenes
from torch import Tensor

from msa_openclip.data.captioned import EvalDataError
from msa_openclip.data.readers import read_captions
from msa_openclip.evaluation import rerank as module
from msa_openclip.evaluation.eval_set import EvalSet
from msa_openclip.evaluation.evaluate import Evaluation, evaluate
from msa_openclip.evaluation.options import RERANKINGS, EvalOptions
from msa_openclip.evaluation.rank_counter import retrieval
from msa_openclip.evaluation.rerank import many_factors, query_bank_normalised, rerank, reverse_sorted
from msa_openclip.evaluation.scorer import Scorer
from msa_openclip.model.msaclip import MSACLIP


def scores(queries: int = 5, candidates: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(queries, candidates, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def order(row: Any) -> list[int]:
    return torch.as_tensor(row).argsort(descending=True).tolist()


def test_query_bank_norm_in_loops() -> None:
    own, bank = scores(), scores(11, seed=1)
    sharpness = 2 / bank.std().item()
    found = query_bank_normalised(own, bank)
    for q in range(5):
        for g in range(7):
            hub = math.log(sum(math.exp(sharpness * bank[k, g].item()) for k in range(11)))
            assert found[q, g].item() == pytest.approx(sharpness * own[q, g].item() - hub)


def test_a_hub_loses_its_place() -> None:
    own = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.1, 0.8], [0.9, 0.2, 0.2]])
    found = query_bank_normalised(own, own)
    assert order(own[0])[0] == order(own[1])[0] == 0
    assert [order(row)[0] for row in found] == [1, 2, 0]


def place(table: Tensor, q: int, g: int) -> int:
    """Where candidate g ranks query q."""
    return 1 + sum(table[other, g].item() > table[q, g].item() for other in range(len(table)))


@pytest.mark.parametrize("candidates", [3, 20])
def test_reverse_sorting_in_loops(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CANDIDATES", candidates)
    own = scores()
    found = reverse_sorted(own)
    for q in range(5):
        by_score = order(own[q])
        first, rest = by_score[:candidates], by_score[candidates:]
        first.sort(key=lambda g: (place(own, q, g), -own[q, g].item()))
        assert order(found[q]) == first + rest


@pytest.mark.parametrize("candidates", [3, 20])
def test_many_factors_in_loops(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CANDIDATES", candidates)
    own = scores(seed=3)
    found = many_factors(own)
    for q in range(5):
        by_score = order(own[q])
        first, rest = by_score[:candidates], by_score[candidates:]
        best, last = own[q, first[0]].item(), own[q, first[-1]].item()
        for rank, g in enumerate(first, 1):
            expected = (own[q, g].item() - last) / (best - last) + 1 / rank + 1 / place(own, q, g)
            assert found[q, g].item() == pytest.approx(expected)
        assert order(found[q])[candidates:] == rest


def test_equal_scores_share_their_mean_rank() -> None:
    assert module._ranks(torch.tensor([[0.5], [0.9], [0.5], [0.1]])).flatten().tolist() == [2.5, 1.0, 2.5, 4.0]


VISION = {"image_size": 24, "layers": 3, "width": 22, "head_width": 11, "patch_size": 12}
TEXT = {"context_length": 6, "vocab_size": 301, "width": 22, "heads": 2, "layers": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    path = write_captioned_scenes(tmp_path_factory.mktemp("scenes") / "source", count=11, captions=5)
    images = read_captions(str(path), str(path.parent / "images"))
    return EvalSet(images, "scenes", images[0].captions)


def rated(scorer: Scorer, data: EvalSet, methods: list[str], **more: Any) -> Evaluation:
    parts = scorer, preprocess, Tokenizer()
    return rerank(evaluate(scorer, data, *parts[1:]), *parts, methods, **more)


@pytest.mark.parametrize("form", ["logit", "gram", "gated"])
def test_rankings_are_added_by_names_that_say_what_they_are(form: str, data: EvalSet) -> None:
    torch.manual_seed(0)
    msa = {"image_scales": [{"stage": 1}, {"stage": 3}], "heads": 2, "score": {"form": form}}
    scorer = Scorer(MSACLIP(14, dict(VISION), dict(TEXT), msa).eval())
    found = rated(scorer, data, list(RERANKINGS), bank=data.images)
    names = [f"fused, {way} (transductive)" for way in ("galr", "sar", "qb-norm")] + [
        "fused, qb-norm (training queries)"
    ]
    for rankings in (found.per_caption, found.merged, *found.parts.values()):
        assert list(rankings)[-4:] == names
    # With the test queries themselves as bank both ways are one.
    summaries = found.summaries()
    assert summaries[names[2]] == summaries[names[3]]
    with torch.no_grad():
        matrix = scorer.scores(found.images, scorer.texts(Tokenizer()(list(data.texts))))[2].double()
    images = retrieval(query_bank_normalised(matrix, matrix), data.per_caption, tolerance=1e-5).summary()
    texts = retrieval(query_bank_normalised(matrix.T, matrix.T).T, data.per_caption, tolerance=1e-5).summary()
    expected = {key: (images if key.startswith("i2t") else texts)[key] for key in images if key != "mR"}
    assert {key: summaries[names[2]][key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize("method", ["galr", "sar", "qb-norm"])
def test_a_perfect_model_stays_perfect(method: str, data: EvalSet) -> None:
    found = rated(Scorer(Oracle()), data, [method]).summaries()
    assert found[f"global, {method} (transductive)"]["i2t_R@1"] == found["global"]["i2t_R@1"] == 100.0


def test_what_cannot_be_done_is_named(data: EvalSet) -> None:
    scorer = Scorer(Oracle())
    with pytest.raises(
        ValueError, match=re.escape("rerank: 'k-nn' is unknown; choose from galr, sar, qb-norm, qb-norm-bank.")
    ):
        rated(scorer, data, ["k-nn"])
    with pytest.raises(EvalDataError, match="qb-norm-bank needs training images with captions; name them by --bank"):
        rated(scorer, data, ["qb-norm-bank"])
    copies = EvalSet(data.images * 200, "many")
    with pytest.raises(
        ValueError, match="the scores of 2200 images and 200 captions take more than memory_mb 1; give more"
    ):
        module._Matrix(scorer, Tokenizer(), EvalOptions(memory_mb=1))(
            rated(scorer, copies, ["sar"]).images, [f"a scene number {n}" for n in range(200)]
        )
