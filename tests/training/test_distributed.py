"""Ranks and micro-batches: losses and gradients equal those of one process with the whole batch."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.processes import spawn_ranks
from helpers.traffic import counted, nbytes
from packaging.version import parse as parse_version
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from msa_openclip import MSACLIP, MSALoss
from msa_openclip.config import MSACfg
from msa_openclip.model.labelled import LabelledTexts
from msa_openclip.model.mscmat import IMAGE_SIDE_KEYS, TEXT_SIDE_KEYS, fused_scores
from msa_openclip.training.pair_weights import Contrast

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
SCALES = [{"stage": 1, "pool": "max"}, {"stage": 2, "pool": "avg"}]
ELIMINATES = {"eliminated_share": 0.5, "eliminate_after": 0}
MIXED = {"clean_below": 0.17, "noisy_from": 0.2}  # of this batch's pairs some are clean, some ambiguous, some wrong
PRESETS: dict[str, dict[str, Any]] = {
    "all terms": {"image_scales": SCALES, "heads": 2, "loss": {"match_weight": 0.25, "consistency_weight": 0.25}},
    "paper": {"preset": "paper", "image_scales": SCALES, "heads": 2},
    "match": {"image_scales": SCALES, "heads": 2, "loss": {"global_weight": 0, "fused_weight": 0, "match_weight": 1}},
    "rrsitr": {"preset": "rrsitr", "image_scales": SCALES, "heads": 2, "loss": MIXED},
    "ebaker": {"preset": "ebaker", "image_scales": SCALES, "heads": 2, "width": 8, "loss": ELIMINATES},
    "galr": {"preset": "galr", "image_scales": SCALES},
    "amfmn": {"preset": "amfmn", "image_scales": SCALES, "width": 8},
    "ssjdn": {"preset": "ssjdn", "image_scales": SCALES},
}
MODES = {
    "local": {"local_loss": True, "gather_with_grad": True},
    "gathered": {"local_loss": False, "gather_with_grad": True},
    "plain": {"local_loss": False, "gather_with_grad": False},
    "local alone": {"local_loss": True, "gather_with_grad": False},
}
ACCUM_FREQS = (1, 2)
BATCH = 12


def model_and_batch(preset: str) -> tuple[MSACLIP, Tensor, Tensor]:
    torch.manual_seed(5)
    model = MSACLIP(32, VISION, TEXT, PRESETS[preset]).double().train()
    images = torch.randn(BATCH, 3, 32, 32, dtype=torch.float64)
    texts = torch.randint(1, 60, (BATCH, 8))
    texts[:, 0] = 60
    texts[torch.arange(BATCH), torch.arange(BATCH) % 6 + 1] = 63  # end of text; what follows is padding
    for row, end in enumerate(texts.argmax(dim=1)):
        texts[row, end + 1 :] = 0
    texts[7] = texts[2]  # an identical caption on another rank
    return model, images, texts


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}  # type: ignore[misc]


def whole_batch(preset: str) -> tuple[float, dict[str, Tensor]]:
    model, images, texts = model_and_batch(preset)
    loss = loss_of(model)(**model(images, labelled(texts)))
    loss.backward()
    return loss.item(), gradients(model)


def loss_of(model: MSACLIP, **mode: Any) -> MSALoss:
    """The loss in the middle of a training: it remembers pairs, some of which were more alike than these."""
    loss = MSALoss(model.msa_cfg, **mode)
    loss.elimination.seen = torch.linspace(-0.2, 0.5, 9)
    return loss


def labelled(texts: Tensor) -> LabelledTexts:
    """Texts with scene classes, two captions of every class at least."""
    return LabelledTexts(texts, texts.argmax(dim=1))


def run_rank(rank: int, world_size: int, preset: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        for (name, mode), accum_freq in itertools.product(MODES.items(), ACCUM_FREQS):
            model, images, texts = model_and_batch(preset)
            wrapped = DistributedDataParallel(model)
            part = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
            loss = loss_of(model, **mode, rank=rank, world_size=world_size, accum_freq=accum_freq)
            losses = accumulate(wrapped, loss, images[part], texts[part])
            torch.save((losses, gradients(wrapped)), f"{folder}/{name}-{accum_freq}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("preset", "world_size"),
    [("all terms", 2), ("all terms", 3), ("paper", 2), ("paper", 3), ("match", 2)]
    + [(method, 2) for method in ("rrsitr", "ebaker", "galr", "amfmn", "ssjdn")],
)
def test_ranks_agree_with_one_process(preset: str, world_size: int, tmp_path: Path) -> None:
    """In every mode and with micro-batches; `local_loss` alone drops gradients of global features, but of no scores."""
    expected_loss, expected = whole_batch(preset)
    spawn_ranks(run_rank, (world_size, preset, str(tmp_path)), ranks=world_size)
    for mode, accum_freq in itertools.product(MODES, ACCUM_FREQS):
        ranks = [
            torch.load(tmp_path / f"{mode}-{accum_freq}-{rank}.pt", weights_only=True) for rank in range(world_size)
        ]
        losses = torch.tensor([losses for losses, _ in ranks], dtype=torch.float64)
        if mode.startswith("local"):
            losses = losses.mean(dim=0)
        torch.testing.assert_close(losses, torch.full_like(losses, expected_loss), rtol=1e-5, atol=0)
        if mode == "local alone" and preset != "match":
            continue
        for name, gradient in expected.items():
            torch.testing.assert_close(ranks[0][1][name], gradient, rtol=1e-5, atol=1e-9, msg=lambda m: f"{name}: {m}")  # noqa: B023


def sharded_rank(rank: int, world_size: int, folder: str) -> None:
    """One step with FSDP2: a group of parameters for each block of the towers and one for all else."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        model, images, texts = model_and_batch("all terms")
        mesh = init_device_mesh("cpu", (world_size,))
        for block in (*model.visual.transformer.resblocks, *model.text.transformer.resblocks):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})  # it takes no scalars
        part = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
        loss = MSALoss(model.msa_cfg, **MODES["local"], rank=rank, world_size=world_size)
        loss(**model(images[part], texts[part])).backward()
        found = {name: whole(gradient) for name, gradient in gradients(model).items()}
        dist.all_reduce(found["logit_scale"])
        found["logit_scale"] /= world_size
        torch.save(found, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # now and then a thread of torch's is still running when the interpreter ends, which aborts the process


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


@pytest.mark.skipif(
    parse_version(torch.__version__) < parse_version("2.7"),
    reason="fully_shard with ignored parameters needs torch 2.7",
)
def test_fully_sharded_models_agree_with_one_process(tmp_path: Path) -> None:
    _, expected = whole_batch("all terms")
    spawn_ranks(sharded_rank, (2, str(tmp_path)), ranks=2)
    torch.testing.assert_close(torch.load(tmp_path / "0.pt", weights_only=True), expected, rtol=1e-5, atol=1e-9)


def sending_rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        model, images, texts = model_and_batch("all terms")
        texts[:, (4, 6)[rank] :] = 0  # ranks may have texts of different lengths
        output = model(images[:2], texts[:2])
        loss = MSALoss(model.msa_cfg, local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
        with counted() as forwards:
            total = loss(**output)
        with counted() as backwards:
            total.backward()
        torch.save((output, forwards, backwards), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_texts_stay_on_their_rank(tmp_path: Path) -> None:
    spawn_ranks(sending_rank, (2, str(tmp_path)), ranks=2)
    for rank in range(2):
        output, forwards, backwards = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        features = nbytes(output["image_features"], output["text_features"])
        images = nbytes(*(output[key] for key in IMAGE_SIDE_KEYS))
        scores = 2 * 2 * 2 * 8  # of the other rank's two images with our two texts at two scales, float64
        assert forwards == {"all_gather": features + images + nbytes(output["text_ids"]), "all_to_all_single": scores}
        assert backwards == {"all_to_all_single": features + images + scores}
        assert sum(forwards.values()) < nbytes(*(output[key] for key in TEXT_SIDE_KEYS))


def ragged_rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        ids = torch.tensor([[[3, 4, 5], [6, 7, -1]], [[6, 7], [8, 9]]][rank])
        own = MSALoss(MSACfg.from_dict(PRESETS["all terms"]), rank=rank, world_size=world_size, ragged_texts=True)
        positive = own._positive(torch.arange(4), 4, ids)
        torch.save((own.gather.to_one_length(ids), positive), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_ranks_compare_captions_of_different_lengths(tmp_path: Path) -> None:
    """Where each batch is as long as its longest text: what is behind a shorter one makes no caption another."""
    spawn_ranks(ragged_rank, (2, str(tmp_path)), ranks=2)
    for rank in range(2):
        ids, positive = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert ids.shape == (2, 3)
        assert positive.tolist() == [[i == j or {i, j} == {1, 2} for j in range(4)] for i in range(4)]


def accumulate(model: torch.nn.Module, loss_function: MSALoss, images: Tensor, texts: Tensor) -> list[float]:
    """The loop of open_clip_train.train: features cached without gradient, then one backward a micro-batch."""
    chunks = zip(images.chunk(loss_function.accum_freq), texts.chunk(loss_function.accum_freq), strict=True)
    parts = [(pixels, labelled(ids)) for pixels, ids in chunks]
    with torch.no_grad():
        cached = [{k: v for k, v in model(*part).items() if k != "logit_scale"} for part in parts]
    losses = []
    for j, part in enumerate(parts):
        output = model(*part)
        logit_scale = output.pop("logit_scale")
        inputs = {
            key: torch.cat([output[key] if i == j else other[key] for i, other in enumerate(cached)]) for key in output
        }
        loss = loss_function(**inputs, logit_scale=logit_scale, output_dict=False)
        loss.backward()
        losses.append(loss.item())
    return losses


def test_the_batch_holds_pairs_of_every_kind() -> None:
    model, images, texts = model_and_batch("ebaker")
    loss, output = loss_of(model), model(images, texts)
    block, _ = loss._blocks(output["image_features"], output["text_features"], *loss._sides(output), output["text_ids"])
    scores = fused_scores(block.cosine, block.match, output["logit_scale"], model.msa_cfg.ranking)
    kept = scores.diag() >= loss.elimination.seen.median()
    assert 0 < int(kept.sum()) < BATCH
    model, images, texts = model_and_batch("rrsitr")
    loss, output = loss_of(model), model(images, texts)
    blocks = loss._blocks(output["image_features"], output["text_features"], *loss._sides(output), output["text_ids"])
    scale = output["logit_scale"]
    cosines = Contrast(1.0, scale * blocks[0].cosine, scale * blocks[1].cosine)
    fused = Contrast(1.0, *(fused_scores(b.cosine, b.match, scale, model.msa_cfg.ranking) for b in blocks))
    rows = (cosines.rows(blocks[0].positive) + fused.rows(blocks[0].positive)) / 2 / scale
    assert {int(row >= MIXED["clean_below"]) + int(row >= MIXED["noisy_from"]) for row in rows} == {0, 1, 2}


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("accum_freq", [2, 3])
def test_accumulation_agrees_with_the_whole_batch(preset: str, accum_freq: int) -> None:
    expected_loss, expected = whole_batch(preset)
    model, images, texts = model_and_batch(preset)
    losses = accumulate(model, loss_of(model, accum_freq=accum_freq), images, texts)
    assert losses == pytest.approx([expected_loss] * accum_freq, rel=1e-9)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-9, msg=lambda m: f"{name}: {m}")  # noqa: B023
