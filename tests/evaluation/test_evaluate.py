"""The evaluator against whole score matrices, under every budget, and shared among processes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import open_clip
import pytest
import torch
import torch.distributed as dist
from helpers.processes import spawn_ranks
from helpers.retrieval_data import Oracle, Tokenizer, preprocess, randomise, write_captioned_scenes, write_shards

from msa_openclip.data.pixels import load_image
from msa_openclip.data.readers import read_captions, read_shards
from msa_openclip.distributed import Peers
from msa_openclip.evaluation import evaluate as evaluation
from msa_openclip.evaluation.eval_set import EvalSet
from msa_openclip.evaluation.evaluate import evaluate
from msa_openclip.evaluation.options import EvalOptions
from msa_openclip.evaluation.rank_counter import retrieval
from msa_openclip.evaluation.scorer import Scorer
from msa_openclip.model.msaclip import MSACLIP

VISION = {"image_size": 24, "layers": 3, "width": 22, "head_width": 11, "patch_size": 12}
TEXT = {"context_length": 6, "vocab_size": 301, "width": 22, "heads": 2, "layers": 2}
MSA = {"image_scales": [{"stage": 1, "pool": "max"}, {"stage": 3}], "heads": 2, "width": 26}


def msa_model(**settings: object) -> MSACLIP:
    torch.manual_seed(0)
    return randomise(MSACLIP(14, dict(VISION), dict(TEXT), {**MSA, **settings}))


def plain_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return randomise(open_clip.CLIP(14, dict(VISION), dict(TEXT)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    path = write_captioned_scenes(tmp_path_factory.mktemp("scenes") / "source", count=11, captions=5)
    return EvalSet(read_captions(str(path), str(path.parent / "images")), "scenes")


def whole_scores(model: torch.nn.Module, data: EvalSet) -> dict[str, torch.Tensor]:
    """Every score at once, by the model's own functions."""
    pixels = torch.stack([preprocess(load_image(image)) for image in data.images])
    ids = Tokenizer()(list(data.texts))
    with torch.no_grad():
        cosine = model.encode_image(pixels, normalize=True) @ model.encode_text(ids, normalize=True).T
        if not isinstance(model, MSACLIP):
            return {"global": cosine}
        match = model.match_scores(model.image_side(pixels)[1], model.text_side(ids)[1])
        fused = model.get_logits(pixels, ids)[0]
        scales = range(len(match))
        alone = {f"match_scale{s + 1}": match[s] for s in scales}
        alone |= {f"fused_scale{s + 1}": model.rank_scores(cosine, match[s : s + 1]) for s in scales}
    return {"global": cosine, "match": match.mean(0), "fused": fused, **alone}


@pytest.mark.parametrize("build", [msa_model, plain_model])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_equals_the_whole_score_matrix(build, batch_size: int, data: EvalSet) -> None:
    model = build()
    found = evaluate(Scorer(model), data, preprocess, Tokenizer(), EvalOptions(batch_size=batch_size))
    expected = whole_scores(model, data)
    assert list(found.per_caption) == list(found.merged) == list(expected)
    for name, scores in expected.items():
        tolerance = evaluation.TIE * float(scores.abs().max())
        for mine, truth in ((found.per_caption, data.per_caption), (found.merged, data.merged)):
            assert mine[name].summary() == pytest.approx(retrieval(scores, truth, tolerance=tolerance).summary())
    if build is msa_model:  # the rankings differ, or nothing would have been compared
        assert len({str(found.per_caption[name].summary()) for name in ("global", "match", "fused")}) == 3


@pytest.mark.parametrize("memory_bytes", [1, 700, 9_000, 30_000])
def test_the_budget_bounds_memory_and_changes_nothing(
    memory_bytes: int, data: EvalSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = msa_model()
    expected = evaluate(Scorer(model), data, preprocess, Tokenizer(), EvalOptions(batch_size=4)).summaries()
    monkeypatch.setattr(EvalOptions, "memory_bytes", memory_bytes)
    kept_bytes, largest, on_disk = [0], [0], []
    original_tiles, original_allocate = evaluation._CaptionBlocks._tiles, evaluation._allocate

    def tiles(blocks, texts, rows, start):
        for tile in original_tiles(blocks, texts, rows, start):
            pairs = tile.scores.shape[1] * tile.scores.shape[2]
            working = pairs * blocks.scorer.bytes_per_pair(texts)
            one_image = tile.scores.shape[2] * blocks.scorer.bytes_per_pair(texts)
            assert working <= max(memory_bytes // 4, one_image)
            largest[0] = max(largest[0], tile.scores.shape[1])
            kept_bytes[0] = sum(4 * t.scores.numel() for kept in blocks.kept.values() for t in kept)
            assert kept_bytes[0] <= memory_bytes // 4
            yield tile

    def allocate(fields, rows, memory):
        banks = original_allocate(fields, rows, memory)
        on_disk.append(sum(bank.nbytes for bank in banks) > memory)
        return banks

    monkeypatch.setattr(evaluation._CaptionBlocks, "_tiles", tiles)
    monkeypatch.setattr(evaluation, "_allocate", allocate)
    found = evaluate(Scorer(model), data, preprocess, Tokenizer(), EvalOptions(batch_size=4)).summaries()
    assert found == expected
    assert on_disk == [memory_bytes < 30_000]
    if memory_bytes == 1:
        assert largest == [1]


@pytest.mark.parametrize("layout", ["image", "pair"])
def test_a_perfect_model_scores_100_and_a_constant_one_chance(layout: str, tmp_path: Path) -> None:
    data = EvalSet(read_shards(write_shards(tmp_path, layout)), "shards")
    perfect = evaluate(Scorer(Oracle()), data, preprocess, Tokenizer()).summaries()["global"]
    assert perfect["i2t_R@1"] == 100.0
    # The caption that scenes 0 and 1 share names no scene, so that all 7 are equal; every other query is answered.
    assert perfect["t2i_R@1"] == pytest.approx(100 * (33 + 2 / 7) / 35)
    constant = evaluate(Scorer(Oracle(constant=True)), data, preprocess, Tokenizer()).summaries()["global"]
    for k in (1, 5, 10):
        assert constant[f"t2i_R@{k}"] == pytest.approx(100 * min(k / 7, 1))
        assert constant[f"i2t_R@{k}"] == pytest.approx(100 * (1 - math.comb(30, k) / math.comb(35, k)))


def test_agrees_with_clip_benchmark(data: EvalSet) -> None:
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason="clip_benchmark is missing")
    model = plain_model()
    # Only captions that occur once: it resolves ties by position.
    unique = EvalSet(
        [image.__class__(image.image_id, image.location, image.captions[3:]) for image in data.images], "u"
    )
    found = evaluate(Scorer(model), unique, preprocess, Tokenizer()).summaries()["global"]
    loader = [
        (torch.stack([preprocess(load_image(image)) for image in unique.images]), [i.captions for i in unique.images])
    ]
    expected = theirs.evaluate(model, loader, Tokenizer(), "cpu", amp=False, recall_k_list=[1, 5, 10])
    for k in (1, 5, 10):
        assert found[f"t2i_R@{k}"] == pytest.approx(100 * expected[f"image_retrieval_recall@{k}"], abs=1e-4)
        assert found[f"i2t_R@{k}"] == pytest.approx(100 * expected[f"text_retrieval_recall@{k}"], abs=1e-4)


def test_without_match_losses_only_the_global_ranking_is_left(data: EvalSet) -> None:
    model = msa_model(loss={"fused_weight": 0, "match_weight": 0, "consistency_weight": 0})
    assert list(evaluate(Scorer(model), data, preprocess, Tokenizer()).per_caption) == ["global"]


def test_low_precision_encodes_low_and_scores_in_float32(data: EvalSet) -> None:
    model = msa_model()
    full = evaluate(Scorer(model), data, preprocess, Tokenizer())
    scorer = Scorer(model, precision="amp_bf16")
    encoded = scorer.texts(Tokenizer()(list(data.texts)))
    assert encoded.feature.dtype == encoded.side.key.dtype == torch.float32
    low = evaluate(scorer, data, preprocess, Tokenizer())
    assert low.per_caption["fused"].summary()["mR"] == pytest.approx(full.per_caption["fused"].summary()["mR"], abs=20)


def test_nan_is_refused(data: EvalSet) -> None:
    model = plain_model()
    torch.nn.init.constant_(model.text_projection, torch.nan)
    with pytest.raises(ValueError, match="scores hold NaN"):
        evaluate(Scorer(model), data, preprocess, Tokenizer())


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="batch_size 0, workers 0, memory_mb 64: expected at least 1, 0 and 1"):
        EvalOptions(batch_size=0, memory_mb=64)


def _one_of_several(rank: int, world_size: int, folder: str, results: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{results}/meet", rank=rank, world_size=world_size)
    try:
        data = EvalSet(read_captions(f"{folder}/captions.json", f"{folder}/images"), "scenes")
        found = evaluate(
            Scorer(msa_model()), data, preprocess, Tokenizer(), EvalOptions(batch_size=4), Peers(rank, world_size)
        )
        torch.save(found.summaries(merged=True) | {"plain": found.summaries()}, f"{results}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_ranks_share_the_work_and_agree(data: EvalSet, tmp_path: Path) -> None:
    world_size = 3  # and 2 batches of images, so that one rank has none of its own
    folder = Path(data.images[0].location.url).parents[1]
    spawn_ranks(_one_of_several, (world_size, str(folder), str(tmp_path)), ranks=world_size)
    alone = evaluate(Scorer(msa_model()), data, preprocess, Tokenizer(), EvalOptions(batch_size=6))
    expected = alone.summaries(merged=True) | {"plain": alone.summaries()}
    for rank in range(world_size):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == expected
