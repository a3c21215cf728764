"""Ranks and recalls against a brute force that tries every order of equal scores."""

from __future__ import annotations

import math
from itertools import permutations
from statistics import mean, median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_openclip.evaluation.metrics import GroundTruth, Ranks
from msa_openclip.evaluation.rank_counter import RankCounter, retrieval

Case = tuple[torch.Tensor, list[int], list[int]]


def brute_force(answers: list[list[float]], right: list[set[int]], k: int) -> tuple[float, float, float, list[float]]:
    """Expected and pessimistic hit rate and expected rank per query, by trying every order of the gallery."""
    hit, worst, ranks = [], [], []
    for scores, wanted in zip(answers, right, strict=True):
        places = []
        for order in permutations(range(len(scores))):
            ranked = sorted(order, key=lambda item: -scores[item])  # stable: equals stay in the tried order
            places.append(1 + min(ranked.index(item) for item in wanted))
        hit.append(mean(place <= k for place in places))
        worst.append(max(places))
        ranks.append(mean(places))
    return mean(hit), mean(place <= k for place in worst), mean(ranks), ranks


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few distinct scores (many ties), any number of captions per image, captions that share a column."""
    columns = draw(st.integers(1, 4))
    copies = [draw(st.integers(1, 2)) for _ in range(columns)]
    column = [c for c in range(columns) for _ in range(copies[c])][:5]
    images = draw(st.integers(1, 5))
    owner = [draw(st.integers(0, images - 1)) for _ in column]
    levels = st.sampled_from([-1.0, 0.0, 0.25, 2.0])
    scores = draw(
        st.lists(st.lists(levels, min_size=column[-1] + 1, max_size=column[-1] + 1), min_size=images, max_size=images)
    )
    return torch.tensor(scores), owner, column


def expected_both_ways(case: Case, k: int) -> dict[str, tuple[float, float, float, list[float]]]:
    """The field's protocol, spelled out over captions (copies included)."""
    scores, owner, column = case
    asked = sorted(set(owner))
    return {
        "i2t": brute_force(
            [[float(scores[i, c]) for c in column] for i in asked],
            [{t for t, o in enumerate(owner) if o == i} for i in asked],
            k,
        ),
        "t2i": brute_force([scores[:, c].tolist() for c in column], [{o} for o in owner], k),
    }


def merged_both_ways(case: Case, k: int) -> dict[str, tuple[float, float, float, list[float]]]:
    """The second protocol, spelled out over distinct captions."""
    scores, owner, column = case
    asked, distinct = sorted(set(owner)), sorted(set(column))
    pairs = set(zip(owner, column, strict=True))
    return {
        "i2t": brute_force(
            [[float(scores[i, c]) for c in distinct] for i in asked],
            [{n for n, c in enumerate(distinct) if (i, c) in pairs} for i in asked],
            k,
        ),
        "t2i": brute_force(
            [scores[:, c].tolist() for c in distinct], [{i for i, c in pairs if c == d} for d in distinct], k
        ),
    }


@pytest.mark.parametrize(
    ("build", "oracle"), [(GroundTruth.per_caption, expected_both_ways), (GroundTruth.merged, merged_both_ways)]
)
@settings(max_examples=60, deadline=None)
@given(case=cases(), k=st.integers(1, 6))
def test_brute_force(build, oracle, case: Case, k: int) -> None:
    scores, owner, column = case
    truth = build(torch.tensor(owner), column=torch.tensor(column), images=len(scores))
    found = retrieval(scores, truth)
    summary = found.summary(cutoffs=(k,))
    pessimistic = found.summary(ties="pessimistic", cutoffs=(k,))
    expected = oracle(case, k)
    for name, (hit, worst, rank, ranks) in expected.items():
        assert summary[f"{name}_R@{k}"] == pytest.approx(100 * hit)
        assert pessimistic[f"{name}_R@{k}"] == pytest.approx(100 * worst)
        assert summary[f"{name}_mean_rank"] == pytest.approx(rank)
        assert summary[f"{name}_median_rank"] == pytest.approx(median(ranks))
    assert summary["mR"] == pytest.approx(50 * (expected["i2t"][0] + expected["t2i"][0]))


@settings(max_examples=60, deadline=None)
@given(case=cases(), rows=st.integers(1, 5), columns=st.integers(1, 4), tolerance=st.sampled_from([0.0, 0.3]))
def test_tiles_equal_the_whole(case: Case, rows: int, columns: int, tolerance: float) -> None:
    scores, owner, column = case
    truth = GroundTruth.per_caption(torch.tensor(owner), column=torch.tensor(column), images=len(scores))
    counter = RankCounter(truth, scores[truth.pair_image, truth.pair_column], tolerance=tolerance)
    corners = [(r, c) for r in range(0, scores.shape[0], rows) for c in range(0, scores.shape[1], columns)]
    for row, start in reversed(corners):
        counter.add(scores[row : row + rows, start : start + columns], row, start)
    whole, tiled = retrieval(scores, truth, tolerance=tolerance), counter.result()
    for mine, theirs in ((tiled.image_to_text, whole.image_to_text), (tiled.text_to_image, whole.text_to_image)):
        for field in ("above", "tied", "right"):
            torch.testing.assert_close(getattr(mine, field), getattr(theirs, field), rtol=0, atol=0)


def test_perfect_scores_are_100_and_constant_ones_are_chance() -> None:
    images, captions = 13, 5
    owner = torch.arange(images).repeat_interleave(captions)
    truth = GroundTruth.per_caption(owner)
    perfect = torch.zeros(images, len(owner))
    perfect[owner, torch.arange(len(owner))] = 1.0
    summary = retrieval(perfect, truth).summary()
    assert summary["mR"] == 100.0
    assert summary["i2t_mean_rank"] == summary["t2i_median_rank"] == 1.0

    constant = retrieval(torch.zeros_like(perfect), truth)
    summary = constant.summary()
    total = images * captions
    for k in (1, 5, 10):
        assert summary[f"t2i_R@{k}"] == pytest.approx(100 * k / images)
        chance = 1 - math.comb(total - captions, k) / math.comb(total, k)
        assert summary[f"i2t_R@{k}"] == pytest.approx(100 * chance)
    assert summary["t2i_mean_rank"] == pytest.approx((images + 1) / 2)
    assert summary["i2t_mean_rank"] == pytest.approx((total + 1) / (captions + 1))
    assert constant.summary(ties="pessimistic")["mR"] == 0.0


def test_rounding_noise_below_the_tolerance_is_a_tie() -> None:
    owner = torch.arange(7)
    noise = torch.rand(7, 7, generator=torch.Generator().manual_seed(0)) * 1e-7
    truth = GroundTruth.per_caption(owner)
    assert retrieval(noise, truth, tolerance=1e-6).summary()["t2i_R@1"] == pytest.approx(100 / 7)
    assert retrieval(noise, truth).summary()["t2i_R@1"] != pytest.approx(100 / 7)


def test_merged_protocol_takes_any_image_of_a_shared_caption() -> None:
    # Captions 0 and 1 say the same; their images are 0 and 1.  The model prefers image 1.
    scores = torch.tensor([[0.5, 0.1], [0.9, 0.2], [0.1, 0.8]])
    owner, column = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])
    assert retrieval(scores, GroundTruth.per_caption(owner, column=column)).summary()["t2i_R@1"] == pytest.approx(
        200 / 3
    )
    assert retrieval(scores, GroundTruth.merged(owner, column=column)).summary()["t2i_R@1"] == 100.0


def test_images_without_captions_only_distract() -> None:
    truth = GroundTruth.per_caption(torch.tensor([0, 1]), images=3)
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.5], [0.3, 0.8]])
    summary = retrieval(scores, truth).summary()
    assert summary["i2t_R@1"] == 100.0
    assert summary["t2i_R@1"] == 50.0


def test_classes_split_the_queries_and_average_back() -> None:
    generator = torch.Generator().manual_seed(1)
    owner = torch.arange(11).repeat_interleave(3)
    found = retrieval(torch.rand(11, 33, generator=generator), GroundTruth.per_caption(owner))
    classes = torch.tensor([4, 4, 7, 4, 7, 4, 4, 4, 7, 4, 4])
    by_class = found.by_class(classes)
    whole = found.summary()
    for name in ("i2t_R@5", "t2i_R@10", "t2i_mean_rank", "mR"):
        assert (8 * by_class[4][name] + 3 * by_class[7][name]) / 11 == pytest.approx(whole[name])
    assert by_class[4]["i2t_R@1"] == pytest.approx(100 * float(found.image_to_text.hits(1)[classes == 4].mean()))


def test_bootstrap_covers_the_binomial_error_and_repeats() -> None:
    generator = torch.Generator().manual_seed(2)
    images = 400
    scores = torch.rand(images, images, generator=generator)
    found = torch.arange(images) % 2 == 0
    scores[found, found.nonzero().flatten()] = 2.0  # half of the images find their caption at once
    result = retrieval(scores, GroundTruth.per_caption(torch.arange(images)))
    interval = result.bootstrap(samples=500)
    low, high = interval["i2t_R@1"]
    sd = 100 * math.sqrt(0.25 / images)
    assert low == pytest.approx(50 - 1.96 * sd, abs=1.0)
    assert high == pytest.approx(50 + 1.96 * sd, abs=1.0)
    assert interval == result.bootstrap(samples=500)
    assert interval != result.bootstrap(samples=500, seed=1)
    # Both directions see the same draw: the interval of mR is no narrower than either.
    assert interval["mR"][1] - interval["mR"][0] > 0.9 * (interval["t2i_R@1"][1] - interval["t2i_R@1"][0])


def test_ranks_of_several_right_answers_with_ties() -> None:
    ranks = Ranks(above=torch.tensor([2]), tied=torch.tensor([3]), right=torch.tensor([2]))
    # Places 3 to 7 are equal, two of them right: C(5, 2) = 10 ways to place them.
    assert ranks.hits(2).item() == 0.0
    assert ranks.hits(3).item() == pytest.approx(4 / 10)
    assert ranks.hits(5).item() == pytest.approx(9 / 10)
    assert ranks.hits(6).item() == pytest.approx(1.0)
    assert ranks.hits(5, "pessimistic").item() == 0.0
    assert ranks.ranks("pessimistic").item() == 6.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GroundTruth.per_caption(torch.tensor([0, 3]), images=2), "holds 0 to 3; expected 0 to 1"),
        (lambda: GroundTruth.per_caption(torch.tensor([], dtype=torch.long)), "not empty"),
        (lambda: GroundTruth.merged(torch.tensor([0, 1]), column=torch.tensor([1, 0])), "must not decrease"),
        (lambda: retrieval(torch.zeros(2, 3), GroundTruth.per_caption(torch.tensor([0, 1]))), r"expected \(2, 2\)"),
        (lambda: retrieval(torch.full((2, 2), torch.nan), GroundTruth.per_caption(torch.tensor([0, 1]))), "NaN"),
        (lambda: RankCounter(GroundTruth.per_caption(torch.tensor([0, 1])), torch.zeros(3)), "expected 2 scores"),
        (
            lambda: retrieval(torch.zeros(1, 1), GroundTruth.per_caption(torch.tensor([0]))).bootstrap(level=1.0),
            r"level within \(0, 1\)",
        ),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_nan_in_one_tile_is_refused() -> None:
    counter = RankCounter(GroundTruth.per_caption(torch.tensor([0, 1])), torch.ones(2))
    with pytest.raises(ValueError, match="NaN"):
        counter.add(torch.tensor([[0.0, torch.nan]]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, 10))
def test_agrees_with_clip_benchmark_where_no_scores_tie(seed: int, k: int) -> None:
    clip_benchmark = pytest.importorskip(
        "clip_benchmark.metrics.zeroshot_retrieval", reason="clip_benchmark is missing"
    )
    generator = torch.Generator().manual_seed(seed)
    owner = torch.arange(11).repeat_interleave(5)
    scores = torch.rand(11, 55, generator=generator, dtype=torch.float64)
    positive = torch.zeros(55, 11, dtype=torch.bool)
    positive[torch.arange(55), owner] = True
    summary = retrieval(scores, GroundTruth.per_caption(owner)).summary(cutoffs=(k,))
    text_to_image = clip_benchmark.recall_at_k(scores.T, positive, k)
    image_to_text = clip_benchmark.recall_at_k(scores, positive.T, k) > 0
    assert summary[f"t2i_R@{k}"] == pytest.approx(100 * float((text_to_image > 0).double().mean()))
    assert summary[f"i2t_R@{k}"] == pytest.approx(100 * float(image_to_text.double().mean()))


@given(cases(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_part_of_the_captions_is_rated_as_if_there_were_no_others(case: Case, data: st.DataObject) -> None:
    scores, owner, column = case
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=scores.shape[1], max_size=scores.shape[1])))
    chosen = [(i, c) for i, c in zip(owner, column, strict=True) if keep[c]]
    for protocol in (GroundTruth.per_caption, GroundTruth.merged):
        truth = protocol(torch.tensor(owner), column=torch.tensor(column), images=len(scores))
        if not chosen:
            with pytest.raises(ValueError, match="keep: "):
                truth.only(keep)
            continue
        number = keep.cumsum(0) - 1
        alone = protocol(
            torch.tensor([i for i, _ in chosen]),
            column=torch.tensor([int(number[c]) for _, c in chosen]),
            images=len(scores),
        )
        assert retrieval(scores, truth.only(keep)).summary() == retrieval(scores[:, keep], alone).summary()
