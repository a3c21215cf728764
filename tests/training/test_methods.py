"""Other methods at our seams: pair weights, negatives, scores and fusions against their formulas in loops."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from msa_openclip import MSACLIP, MSALoss
from msa_openclip.config import PRESETS, Loss, MSACfg
from msa_openclip.model.fusions import DecoupledScales, WeighedScales
from msa_openclip.model.labelled import LabelledTexts, class_number
from msa_openclip.model.mscmat import IMAGE_SIDE_KEYS, TEXT_SIDE_KEYS
from msa_openclip.model.similarities import GatedScore, GramScore
from msa_openclip.pair_scores.similarities import gated_scores, gram_scores
from msa_openclip.training.gather import Gather
from msa_openclip.training.loss import ScoreBlock, triplet_term
from msa_openclip.training.negatives import caption_similarity
from msa_openclip.training.pair_weights import Contrast, Elimination, self_paced_loss

METHODS = sorted(set(PRESETS) - {"default", "paper"})


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def paced_by_hand(cosine: list[list[float]], scale: float, cfg: Loss) -> float:
    """RRSITR's loss of one score as docs/explanation/methods.md has it; the regulariser is integrated numerically."""

    def weigh(loss: float, threshold: float) -> float:
        best = math.cos(math.pi * loss / (2 * threshold))
        # f with f'(v) = -2b/pi arccos(v) and f(0) = 2b/pi: the objective's minimiser is `best`, its value 0 at loss 0.
        steps = 20_000
        area = sum(math.acos((k + 0.5) * best / steps) for k in range(steps)) * best / steps
        return best * loss + 2 * threshold / math.pi * (1 - area)

    size, total = len(cosine), 0.0
    clean, noisy = cfg.clean_below * scale, cfg.noisy_from * scale
    for i in range(size):
        directions = [cosine[i], [cosine[j][i] for j in range(size)]]
        loss = sum(math.log(sum(math.exp(scale * (s - row[i])) for s in row)) for row in directions) / 2
        if loss < clean:
            total += weigh(loss, clean) / size
        elif loss < noisy:
            total += 0.8 * weigh(loss, noisy) / size
        else:
            for row in directions:
                hardest = max(s for j, s in enumerate(row) if j != i)
                margin = 0.6 * (1 + max(0.0, hardest - row[i]))
                total += 0.9 * max(0.0, margin - row[i] + hardest) / (2 * size)
    return total


COSINE = torch.tensor(
    [[0.9, 0.1, 0.2, 0.0], [0.1, 0.5, 0.3, 0.55], [0.7, 0.2, 0.1, 0.3], [0.2, 0.6, 0.3, 0.35]], dtype=torch.float64
)
"""Two clean pairs, a wrong one and an ambiguous one."""


def paced(cosine: Tensor, scale: float = 10.0, cfg: Loss | None = None) -> Tensor:
    positive, pair = torch.eye(len(cosine), dtype=torch.bool), torch.arange(len(cosine))
    contrast = Contrast(1.0, scale * cosine, scale * cosine.T)
    return self_paced_loss([contrast], positive, pair, torch.tensor(scale), cfg or Loss())


def test_self_paced_loss_by_hand() -> None:
    by_hand = paced_by_hand(COSINE.tolist(), 10.0, Loss())
    assert paced(COSINE).item() == pytest.approx(by_hand, rel=1e-6)
    assert by_hand == pytest.approx(GOLDEN_PACED, rel=1e-6)


def test_self_paced_weights_are_the_derivative() -> None:
    """A pair's gradient is its InfoNCE gradient times the paper's weight."""
    cosine = COSINE.clone().requires_grad_()
    rows = Contrast(1.0, 10 * cosine, 10 * cosine.T).rows(torch.eye(4, dtype=torch.bool))
    loss = rows.detach()
    clean, noisy = 1.5, 4.0
    weight = torch.where(loss < clean, (math.pi * loss / (2 * clean)).cos(), 0.8 * (math.pi * loss / (2 * noisy)).cos())
    kinds = {int(value >= clean) + int(value >= noisy) for value in loss.tolist()}
    assert kinds == {0, 1, 2}
    known = loss < noisy
    (expected,) = torch.autograd.grad((weight * rows)[known].sum() / 4, cosine)
    (found,) = torch.autograd.grad(paced(cosine), cosine)
    only = torch.zeros(4, 4, dtype=torch.float64)
    for i in (~known).nonzero().flatten().tolist():  # the hinge of wrong pairs, averaged over both directions
        for row, transposed in ((COSINE, False), (COSINE.T, True)):
            hardest = max((j for j in range(4) if j != i), key=lambda j: row[i, j].item())
            for column, sign in ((hardest, 1), (i, -1)):
                only[(column, i) if transposed else (i, column)] += sign * 0.9 / 8
    torch.testing.assert_close(found, expected + only)


def test_thresholds_scale_with_the_logit_scale() -> None:
    """What is a wrong pair at one temperature is one at another, where the softmax is a maximum."""
    wrong = torch.tensor([[0.1, 0.9], [0.9, 0.1]], dtype=torch.float64)
    assert paced(wrong, 50.0).item() == pytest.approx(paced(wrong, 90.0).item())
    assert paced(wrong, 50.0).item() == pytest.approx(0.9 * (0.6 * 1.8 + 0.8))


def test_elimination_in_loops() -> None:
    cfg = Loss(pair_weights="eliminate", eliminated_share=0.25, eliminate_queue=6, eliminate_after=1)
    elimination, remembered = Elimination(cfg), list[float]()
    for step, own in enumerate(([0.5, 0.1, 0.9, 0.3], [0.2, 0.05, 0.6, 0.7], [0.65, 0.15, 0.22, 0.9])):
        logits = torch.diag(torch.tensor(own)) * 10
        found = elimination.weights(Contrast(1.0, logits, logits.T), torch.arange(4), torch.tensor(10.0), Gather())
        least = sorted(remembered)[int(0.25 * (len(remembered) - 1))] if step >= 1 else -1.0
        kept = [similarity >= least for similarity in own]
        assert found.tolist() == pytest.approx([4 / sum(kept) if keep else 0 for keep in kept])
        remembered = [*remembered, *own][-6:]
    assert not all(kept)


def test_elimination_remembers_a_step_of_micro_batches_once() -> None:
    elimination = Elimination(Loss(eliminate_after=0), accum_freq=2)
    logits = torch.eye(3)
    for count in (0, 3, 3, 6):
        elimination.weights(Contrast(1.0, logits, logits), torch.arange(3), torch.tensor(1.0), Gather())
        assert len(elimination.seen) == count


def test_caption_similarity_is_the_share_of_common_words() -> None:
    captions = [{1, 2, 3}, {2, 3, 4}, {7}, {1, 2, 3}, set()]
    ids = torch.tensor([[90, *sorted(words), 91, *[0] * (3 - len(words)), 0] for words in captions])
    found = caption_similarity(ids)
    for i, a in enumerate(captions):
        for j, b in enumerate(captions):
            expected = len(a & b) / len(a | b) if a | b else 1.0
            assert found[i, j].item() == pytest.approx(expected), (i, j)


def test_triplets_with_margins_and_weights_of_pairs_by_hand() -> None:
    cosine = torch.tensor([[0.5, 0.6, 0.55], [0.1, 0.8, 0.3], [0.2, 0.7, 0.6]])
    margin = torch.tensor([[0.0, 0.0, 0.2], [0.2, 0.0, 0.2], [0.2, 0.1, 0.0]])
    weight = torch.tensor([[1.0, 0.5, 1.0], [0.5, 1.0, 1.0], [1.0, 0.5, 1.0]])
    eye, pair = torch.eye(3, dtype=torch.bool), torch.arange(3)
    block = ScoreBlock(cosine, None, eye, pair, margin, weight)
    # Row 0: the third text, 0.2 - 0.5 + 0.55; row 1: none; row 2: the second, 0.1 - 0.6 + 0.7, of the same class.
    assert triplet_term(block).item() == pytest.approx(0.25 + 0 + 0.5 * 0.2, abs=1e-6)


def test_gram_score_is_the_frobenius_norm_of_all_cosines() -> None:
    torch.manual_seed(1)
    score = GramScore((3, 11), 13, 5).double()
    pooled, tokens = [seeded(2, 3), seeded(2, 11)], seeded(3, 7, 13, seed=1)
    mask = torch.arange(7) < torch.tensor([7, 2, 0])[:, None]
    found = gram_scores(score.fold_image(pooled), score.fold_text(tokens, mask, seeded(3, 4)))
    parts, words = score.project_image(pooled), score.project_token(tokens)
    for i in range(2):
        for t in range(2):
            cosines = [
                torch.cosine_similarity(words[t, n], parts[i, s], dim=0).item() ** 2
                for n in range(7) if mask[t, n] for s in range(2)
            ]  # fmt: skip
            assert found[0, i, t].item() == pytest.approx(math.sqrt(sum(cosines) / len(cosines)), rel=1e-9)
    assert (found[0, :, 2] < 1e-5).all()  # no token
    found.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in score.parameters() if p.grad is not None)


def test_gated_score_is_the_cosine_with_the_gated_text() -> None:
    torch.manual_seed(2)
    score = GatedScore((3, 11), 5, 5).double()
    pooled, feature = [seeded(2, 3), seeded(2, 11)], normalize(seeded(3, 5, seed=1), dim=-1)
    mask = torch.ones(3, 7, dtype=torch.bool)
    found = gated_scores(score.fold_image(pooled), score.fold_text(seeded(3, 7, 9), mask, feature))
    vector = score.project_image(pooled)[:, 0]
    gate = score.gate(vector).sigmoid()
    for i in range(2):
        for t in range(3):
            expected = torch.cosine_similarity(vector[i], gate[i] * feature[t], dim=0)
            assert found[0, i, t].item() == pytest.approx(expected.item(), rel=1e-9)


def test_decoupled_scales_in_loops() -> None:
    torch.manual_seed(3)
    fusion, pooled = DecoupledScales((3, 5, 7), 4).double(), [seeded(2, 3), seeded(2, 5), seeded(2, 7)]
    mapped = [linear(z) for linear, z in zip(fusion.project, pooled, strict=True)]
    there = [mapped[0]]
    there.append(mapped[1] * (1 - fusion.salience[0](there[0]).sigmoid()))
    there.append(mapped[2] * (1 - fusion.salience[1](there[1]).sigmoid()))
    back = [mapped[2]]
    back.append(mapped[1] * (1 - fusion.salience_back[0](back[0]).sigmoid()))
    back.append(mapped[0] * (1 - fusion.salience_back[1](back[1]).sigmoid()))
    torch.testing.assert_close(fusion(seeded(2, 4), pooled), torch.stack(there + back).sum(dim=0))


def test_weighed_scales_are_between_tower_and_scales() -> None:
    torch.manual_seed(4)
    fusion, pooled, feature = WeighedScales((3, 5), 4).double(), [seeded(2, 3), seeded(2, 5)], seeded(2, 4, seed=5)
    local = fusion.project[0](pooled[0]) + fusion.project[1](pooled[1])
    found = fusion(feature, pooled)
    for i in range(2):
        first, second = fusion.weigh(torch.cat([feature[i], local[i]])).exp()
        torch.testing.assert_close(found[i], (first * feature[i] + second * local[i]) / (first + second))


VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


def model(preset: str, **changes: Any) -> MSACLIP:
    torch.manual_seed(5)
    msa = {"preset": preset, "image_scales": [{"stage": 1}, {"stage": 2}], "heads": 2, **changes}
    return MSACLIP(32, VISION, TEXT, msa).double().train()


@pytest.mark.parametrize("preset", METHODS)
def test_every_parameter_that_learns_has_a_gradient(preset: str) -> None:
    clip = model(preset)
    ids = torch.randint(1, 60, (5, 8), generator=torch.Generator().manual_seed(1))
    output = clip(seeded(5, 3, 32, 32), LabelledTexts(ids, torch.tensor([1, 1, 2, 3, 3])))
    terms = MSALoss(clip.msa_cfg)(**output, output_dict=True)
    assert all(key.endswith("_loss") and torch.isfinite(term) for key, term in terms.items())
    sum(terms.values()).backward()
    for name, parameter in clip.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def test_the_default_weighs_all_pairs_alike() -> None:
    """`eliminate` before its first elimination is the default."""
    clip = model("default")
    output = clip(seeded(5, 3, 32, 32), torch.randint(1, 60, (5, 8)))
    waits = MSACfg.from_dict(
        {"image_scales": [{"stage": 1}, {"stage": 2}], "heads": 2, "loss": {"pair_weights": "eliminate"}}
    )
    one, other = (MSALoss(cfg)(**output, output_dict=True) for cfg in (clip.msa_cfg, waits))
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value)


def test_the_default_has_nothing_of_the_other_methods() -> None:
    """No module, output or term: what nobody asks for takes neither time nor memory."""
    clip = model("default")
    parts = {name.split(".")[0] for name in clip.state_dict()}
    assert parts == {"visual", "text", "fusion", "mscmat", "logit_scale"}
    output = clip(seeded(5, 3, 32, 32), torch.randint(1, 60, (5, 8)))
    own = {"image_features", "text_features", "logit_scale", "text_ids", *IMAGE_SIDE_KEYS, *TEXT_SIDE_KEYS}
    assert set(output) == own
    loss = MSALoss(clip.msa_cfg)
    assert set(loss(**output, output_dict=True)) == {"contrastive_loss", "fused_loss"}
    assert loss.elimination.seen.numel() == 0


def test_classes_that_are_missing_are_named() -> None:
    clip = model("ssjdn")
    output = clip(seeded(2, 3, 32, 32), torch.randint(1, 60, (2, 8)))
    with pytest.raises(ValueError, match=re.escape("same_class_weight is 0.5, and the batch has no classes: train on")):
        MSALoss(clip.msa_cfg)(**output)


def test_labelled_texts_move_without_changing_their_numbers() -> None:
    texts = LabelledTexts(torch.zeros(2, 3), torch.tensor([class_number("airport"), class_number("lake")]))
    moved = texts.to("cpu", dtype=torch.float16)
    assert len(moved) == 2
    assert moved.classes.equal(texts.classes)
    assert moved.texts.dtype == torch.float16
    assert class_number("airport") == -2326538386394097290  # on every machine and rank


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin_relief": 1.5}, "loss.margin_relief: got 1.5, expected 0 to 1."),
        ({"same_class_weight": -1}, "loss.same_class_weight: got -1.0, expected 0 or more."),
        ({"clean_below": 0}, "loss.clean_below: got 0.0, expected more than 0."),
        ({"noisy_from": 0.1}, "loss.noisy_from: got 0.1, expected loss.clean_below or more."),
        ({"eliminated_share": 2}, "loss.eliminated_share: got 2.0, expected 0 to 1."),
        ({"eliminate_queue": 0}, "loss.eliminate_queue: got 0, expected a positive number."),
        ({"eliminate_after": -1}, "loss.eliminate_after: got -1, expected 0 or more."),
        (
            {"pair_weights": "self_paced", "global_term": "triplet"},
            "loss.pair_weights: got 'self_paced', expected 'equal' where triplet or match terms train alone.",
        ),
        (
            {"pair_weights": "clean"},
            "loss.pair_weights: got 'clean', expected one of 'equal', 'self_paced', 'eliminate'.",
        ),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('msa_cfg.' + message)}"):
        MSACfg.from_dict({"image_scales": [{"stage": 1}], "loss": settings})


GOLDEN_PACED = 0.9350604457813261
"""Of `paced_by_hand`, which keeps both from changing together."""
