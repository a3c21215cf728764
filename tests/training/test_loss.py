"""The losses: golden numbers of the released implementation, the formulas in loops, positives, inputs."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msa_openclip.config import MSACfg, Ranking
from msa_openclip.model.mscmat import IMAGE_SIDE_KEYS, MSCMAT, TEXT_SIDE_KEYS, match_scores
from msa_openclip.training.loss import (
    MSALoss,
    ScoreBlock,
    consistency_term,
    contrastive_term,
    fused_term,
    match_term,
    positives_cross_entropy,
    released_consistency_term,
    triplet_term,
)

GOLDEN = Path(__file__).parents[1] / "golden"
PAPER = MSACfg.from_dict({"preset": "paper", "image_scales": [{"stage": s} for s in (1, 2, 3, 4)]})


def reference_case() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_case", GOLDEN / "reference_case.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_name(released: str) -> str:
    """The parameter of MSCMAT that a parameter of the released module is, by the meaning of their names."""
    part, _, rest = released.partition(".")
    if part in ("ln_pre_t", "ln_pre_i"):
        return f"{'ln_image' if part == 'ln_pre_t' else 'ln_text'}.{rest}"
    kind, scale = part[:-1], int(part[-1]) - 1
    return f"scales.{scale}.{ {'fc': 'project', 'cross_attn': 'attention', 'match_fc': 'match'}[kind] }.{rest}"


def training_output(mscmat: MSCMAT, inputs: dict[str, Any]) -> dict[str, Tensor]:
    mask = torch.ones(inputs["tokens"].shape[:2], dtype=torch.bool)
    return {
        "image_features": inputs["image_global"],
        "text_features": inputs["text_global"],
        "logit_scale": torch.tensor(1.0),
        **dict(zip(IMAGE_SIDE_KEYS, mscmat.fold_image(inputs["scales"]), strict=True)),
        **dict(zip(TEXT_SIDE_KEYS, mscmat.fold_text(inputs["tokens"], mask, inputs["text_global"]), strict=True)),
    }


@pytest.mark.parametrize(("seed", "batch"), [(7, 8), (11, 24)])
def test_paper_preset_reproduces_the_released_numbers(seed: int, batch: int) -> None:
    case = reference_case()
    golden = np.load(GOLDEN / f"case_seed{seed}_b{batch}.npz")
    mscmat = MSCMAT(case.CHANNELS, case.WIDTH, case.WIDTH, case.WIDTH, case.HEADS, PAPER.score)
    state = {name: torch.from_numpy(value) for name, value in case.weights(seed).items()}
    mscmat.load_state_dict({our_name(name): x for name, x in state.items() if not name.startswith("ln_post")})
    inputs = case.inputs(seed, batch)
    inputs = {name: torch.from_numpy(x) for name, x in inputs.items() if name != "scales"} | {
        "scales": [torch.from_numpy(z).requires_grad_() for z in inputs["scales"]]
    }
    inputs["tokens"].requires_grad_()

    output = training_output(mscmat, inputs)
    images = mscmat.fold_image(inputs["scales"])
    texts = mscmat.fold_text(inputs["tokens"], output["match_text_mask"], inputs["text_global"])
    torch.testing.assert_close(
        match_scores(images, texts, PAPER.score), torch.from_numpy(golden["scores"]), rtol=1e-4, atol=1e-6
    )

    losses = MSALoss(PAPER)(**output, output_dict=True)
    unweighted = {"triplet": 1.0, "match": 15.0, "consistency": 10.0}
    for term, weight in unweighted.items():
        assert losses[f"{term}_loss"].item() == pytest.approx(weight * golden[f"loss_{term}"].item(), rel=1e-4)
    total = sum(losses.values())
    assert total.item() == pytest.approx(golden["loss_total"].item(), rel=1e-4)

    total.backward()
    ours = dict(mscmat.named_parameters())
    # Key biases drop out of the softmax: their true gradient is zero and both sides hold rounding.
    compared = 0
    for name, norm in zip(golden["grad_names"], golden["grad_norms"], strict=True):
        if str(name).startswith("ln_post"):
            continue
        gradient = ours[our_name(str(name))].grad
        assert gradient is not None
        assert gradient.norm().item() == pytest.approx(float(norm), rel=1e-4, abs=1e-7), name
        compared += 1
    assert compared == len(ours)
    for z, norm in zip(inputs["scales"], golden["grad_scales"], strict=True):
        assert z.grad.norm().item() == pytest.approx(float(norm), rel=1e-4)
    assert inputs["tokens"].grad.norm().item() == pytest.approx(float(golden["grad_tokens"]), rel=1e-4)


def block(cosine: Tensor, positive: Tensor | None = None, match: Tensor | None = None, **more: Any) -> ScoreBlock:
    pair, own = torch.arange(len(cosine)), torch.eye(len(cosine), dtype=torch.bool)
    return ScoreBlock(cosine, match, own if positive is None else positive, pair, **more)


def test_contrastive_term_is_open_clips_loss() -> None:
    from open_clip import ClipLoss

    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(7, 5), dim=-1) for _ in range(2))
    cosine, scale = images @ texts.T, torch.tensor(13.0)
    ours = (contrastive_term(block(cosine), scale) + contrastive_term(block(cosine.T), scale)) / 2
    torch.testing.assert_close(ours, ClipLoss()(images, texts, scale))


def test_triplet_term_by_hand() -> None:
    cosine = torch.tensor([[0.9, 0.6, 0.1], [0.2, 0.1, 0.3], [0.0, 0.4, 0.9]])
    # rows: 0.5 - 0.9 + 0.6, 0.5 - 0.1 + 0.3, 0.5 - 0.9 + 0.4
    assert triplet_term(block(cosine, margin=0.5)).item() == pytest.approx(0.2 + 0.7 + 0.0, abs=1e-6)


def test_triplet_term_never_takes_an_identical_caption_for_a_negative() -> None:
    cosine = torch.tensor([[0.5, 0.9, 0.1], [0.9, 0.5, 0.2], [0.3, 0.4, 0.6]], requires_grad=True)
    positive = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    term = triplet_term(block(cosine, positive, margin=0.5))
    assert term.item() == pytest.approx((0.5 - 0.5 + 0.1) + (0.5 - 0.5 + 0.2) + (0.5 - 0.6 + 0.4), abs=1e-6)
    everything = triplet_term(block(cosine, torch.ones_like(positive), margin=0.5))
    everything.backward()
    assert everything.item() == 0
    assert cosine.grad is not None
    assert torch.isfinite(cosine.grad).all()


def test_match_term_in_loops() -> None:
    torch.manual_seed(1)
    match = torch.randn(3, 5, 5, dtype=torch.float64)
    expected = 0.0
    for scale in range(3):
        rows = [-(match[scale, i, i] - torch.logsumexp(match[scale, i], 0)).item() for i in range(5)]
        expected += sum(rows) / 5
    assert match_term(match, torch.eye(5, dtype=torch.bool)).item() == pytest.approx(expected)


@pytest.mark.parametrize("weight", [None, 3.0])
def test_fused_term_is_the_cross_entropy_of_what_retrieval_ranks_by(weight: float | None) -> None:
    torch.manual_seed(4)
    cosine, match = torch.randn(4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    positive = torch.eye(4, 6, dtype=torch.bool)
    positive[1, 5] = True
    expected = 0.0
    for r in range(4):
        row = [(weight or 7.0) * cosine[r, c].item() + 0.5 * match[:, r, c].sum().item() / 2 for c in range(6)]
        wanted = [1, 5] if r == 1 else [r]
        expected += sum(math.log(sum(map(math.exp, row))) - row[c] for c in wanted) / len(wanted) / 4
    ranking = Ranking(global_weight=weight, match_weight=0.5)
    found = fused_term(block(cosine, positive, match), torch.tensor(7.0), ranking)
    assert found.item() == pytest.approx(expected)


def test_fused_loss_alone_trains_both_parts() -> None:
    output = {key: x.detach().requires_grad_(x.is_floating_point()) for key, x in small_output().items()}
    alone = {"global_weight": 0, "fused_weight": 2, "match_weight": 0, "consistency_weight": 0}
    loss = MSALoss(MSACfg.from_dict(SMALL | {"loss": alone}))
    terms = loss(**output, output_dict=True)
    assert terms["fused_loss"].item() > 0
    assert sum(terms.values()).item() == terms["fused_loss"].item()
    terms["fused_loss"].backward()
    for key in ("image_features", "text_features", "logit_scale", "match_image_query", "match_text_value"):
        gradient = output[key].grad
        assert gradient is not None
        assert gradient.abs().sum() > 0, key


def test_positives_share_the_target() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    log_share = logits.log_softmax(-1)
    both = positives_cross_entropy(logits, torch.tensor([[True, True, False]]))
    assert both.item() == pytest.approx(-(log_share[0, 0] + log_share[0, 1]).item() / 2)


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def shares(row: Tensor, temperature: float) -> list[float]:
    exponentials = [math.exp(x / temperature) for x in row.tolist()]
    return [x / sum(exponentials) for x in exponentials]


def test_consistency_terms_in_loops() -> None:
    torch.manual_seed(2)
    match = torch.randn(3, 5, 7, dtype=torch.float64)
    rows = released = 0.0
    for r in range(5):
        teacher = shares(match[2, r], 2.0)
        for s in range(2):
            student = shares(match[s, r], 2.0)
            rows += kl(teacher, student) / 5
            released += kl(student, teacher) / (5 * 7)
    assert consistency_term(match, 2.0).item() == pytest.approx(rows)
    assert released_consistency_term(match, 2.0).item() == pytest.approx(released)


@pytest.mark.parametrize("term", [consistency_term, released_consistency_term])
def test_consistency_teaches_the_students_only(term: Any) -> None:
    match = torch.randn(3, 5, 7, requires_grad=True)
    term(match, 1.0).backward()
    assert match.grad is not None
    assert (match.grad[2] == 0).all()
    assert (match.grad[:2].abs().sum(dim=(1, 2)) > 0).all()
    same = match[2:].expand(3, 5, 7)
    assert term(same, 1.0).item() == pytest.approx(0, abs=1e-6)


ALL_TERMS = {"match_weight": 0.25, "consistency_weight": 0.25}
SMALL = {"image_scales": [{"stage": 1}, {"stage": 2}], "heads": 2, "loss": ALL_TERMS}


def small_output(batch: int = 5, seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    mscmat = MSCMAT((3, 11), 22, 22, 22, 2, MSACfg.from_dict(SMALL).score)
    image_global, text_global = torch.nn.functional.normalize(torch.randn(2, batch, 22), dim=-1)
    inputs = {
        "scales": [torch.randn(batch, 3), torch.randn(batch, 11)],
        "tokens": torch.randn(batch, 7, 22),
        "text_global": text_global,
        "image_global": image_global,
    }
    return training_output(mscmat, inputs)


def test_identical_captions_are_positives_by_token_ids() -> None:
    output = small_output()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3], [1, 2, 4], [4, 5, 6]])
    loss = MSALoss(MSACfg.from_dict(SMALL))
    per_image, per_text = loss._blocks(output["image_features"], output["text_features"], *loss._sides(output), ids)
    expected = torch.tensor([[a.equal(b) for b in ids] for a in ids])
    assert per_image.positive.equal(expected)
    assert per_text.positive.equal(expected)
    off = MSALoss(MSACfg.from_dict(SMALL | {"loss": ALL_TERMS | {"identical_captions": False}}))
    same = off(**output, text_ids=ids, output_dict=True)
    without = loss(**output, output_dict=True)
    assert {k: v.item() for k, v in same.items()} == {k: v.item() for k, v in without.items()}


def test_loss_is_the_sum_of_its_terms_and_every_key_ends_in_loss() -> None:
    output = small_output()
    loss = MSALoss(MSACfg.from_dict(SMALL))
    terms = loss(**output, output_dict=True)
    assert set(terms) == {"contrastive_loss", "fused_loss", "match_loss", "consistency_loss"}
    torch.testing.assert_close(loss(**output), sum(terms.values()))


def test_the_default_terms_are_the_global_and_the_fused_one() -> None:
    loss = MSALoss(MSACfg.from_dict(SMALL | {"loss": {}}))
    terms = loss(**small_output(), output_dict=True)
    assert set(terms) == {"contrastive_loss", "fused_loss"}
    both = MSALoss(MSACfg.from_dict(SMALL | {"loss": ALL_TERMS}))(**small_output(), output_dict=True)
    assert terms["fused_loss"].equal(both["fused_loss"])


def test_match_scores_may_weigh_more_in_training_than_in_the_ranking() -> None:
    def fused_loss(ranking: float, trained: float | None) -> float:
        settings = SMALL | {"ranking": {"match_weight": ranking}, "loss": {"fused_match_weight": trained}}
        return MSALoss(MSACfg.from_dict(settings))(**small_output(), output_dict=True)["fused_loss"].item()

    assert fused_loss(0.25, 2.0) == fused_loss(2.0, None) != fused_loss(0.25, None)


def test_permuting_the_batch_changes_nothing() -> None:
    output, order = small_output(), torch.tensor([3, 0, 4, 1, 2])
    permuted = {key: x[order] if x.ndim else x for key, x in output.items()}
    loss = MSALoss(MSACfg.from_dict(SMALL))
    for key, value in loss(**output, output_dict=True).items():
        torch.testing.assert_close(loss(**permuted, output_dict=True)[key], value)


def test_missing_sides_are_named() -> None:
    output = small_output()
    del output["match_text_key"]
    with pytest.raises(ValueError, match="match_text_key is missing; pass on all that MSACLIP returns in training"):
        MSALoss(MSACfg.from_dict(SMALL))(**output)


def test_a_model_without_mscmat_needs_no_sides() -> None:
    output = {key: x for key, x in small_output().items() if not key.startswith("match_")}
    cfg = MSACfg.from_dict(SMALL | {"loss": {"fused_weight": 0, "match_weight": 0, "consistency_weight": 0}})
    assert set(MSALoss(cfg)(**output, output_dict=True)) == {"contrastive_loss"}


def test_accumulation_divides_the_gradient_of_the_scale_alone() -> None:
    output = small_output()
    gradients = {}
    for accum_freq in (1, 4):
        scale = torch.tensor(10.0, requires_grad=True)
        features = output["image_features"].clone().requires_grad_()
        loss = MSALoss(MSACfg.from_dict(SMALL), accum_freq=accum_freq)
        value = loss(**{**output, "logit_scale": scale, "image_features": features})
        value.backward(retain_graph=True)
        gradients[accum_freq] = (value.item(), scale.grad, features.grad)
    assert gradients[1][0] == gradients[4][0]
    torch.testing.assert_close(gradients[4][1], gradients[1][1] / 4)
    torch.testing.assert_close(gradients[4][2], gradients[1][2])


def test_triplet_term_keeps_float32_under_autocast() -> None:
    output = small_output()
    cfg = MSACfg.from_dict(SMALL | {"preset": "paper", "loss": {}})
    exact = MSALoss(cfg)(**output, output_dict=True)["triplet_loss"]
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = MSALoss(cfg)(**output, output_dict=True)["triplet_loss"]
    assert under_autocast.dtype == torch.float32
    torch.testing.assert_close(under_autocast, exact)
