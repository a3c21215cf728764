"""MSCMAT's folded maps against nn.MultiheadAttention run pair by pair, as docs/method.md, section 1.4 writes it."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from msa_openclip.config import Score
from msa_openclip.model.mscmat import MSCMAT, WideLayerNorm, match_scores
from msa_openclip.pair_scores.formula import match_logits

IMAGES, T, N, H, D = 3, 5, 7, 2, 22
CHANNELS = (13, 17)
GATES: tuple[Literal["normalised"], Literal["plain"]] = ("normalised", "plain")


def random_mscmat(score: Score, *, token_width: int = D, feature_width: int = D, seed: int = 0) -> MSCMAT:
    """Float64, every parameter drawn at random: nothing hides behind a zero or a one."""
    torch.manual_seed(seed)
    mscmat = MSCMAT(CHANNELS, token_width, feature_width, D, H, score).double()
    for name, parameter in mscmat.named_parameters():
        if "logit_scale" not in name:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))
    return mscmat


def random_inputs(token_width: int = D, feature_width: int = D, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    mask = torch.rand(T, N, generator=generator) < 0.6
    mask[0] = True
    mask[1] = False  # a text with nothing to attend to
    return {
        "pooled": [draw(IMAGES, channels) for channels in CHANNELS],
        "tokens": draw(T, N, token_width),
        "mask": mask,
        "feature": draw(T, feature_width),
    }


def folded(mscmat: MSCMAT, pooled: list[Tensor], tokens: Tensor, mask: Tensor, feature: Tensor) -> Tensor:
    return match_logits(mscmat.fold_image(pooled), mscmat.fold_text(tokens, mask, feature))


def pairwise(mscmat: MSCMAT, pooled: list[Tensor], tokens: Tensor, mask: Tensor, feature: Tensor) -> Tensor:
    """Logits (S, I, T), every pair by itself through the module's own nn.MultiheadAttention."""
    rows = []
    for head, z in zip(mscmat.heads, pooled, strict=True):
        for i in range(len(z)):
            m = head.project(z[i])
            for t in range(len(tokens)):
                attended = head.attention.out_proj.bias
                if mask[t].any():
                    y = mscmat.ln_text(mscmat.project_token(tokens[t, mask[t]]))[:, None]
                    attended = head.attention(mscmat.ln_image(m)[None, None], y, y)[0][0, 0]
                gate = mscmat.ln_image(m) if mscmat.score.gate == "normalised" else m
                sharpness = 1.0 if head.logit_scale is None else head.logit_scale.exp()
                product = (attended + mscmat.project_feature(feature[t])) * gate
                rows.append(sharpness * (head.match.weight[0] * product).sum() + head.match.bias)
    return torch.cat(rows).reshape(len(pooled), len(pooled[0]), len(tokens))


def gradients(logits: Tensor, upstream: Tensor, mscmat: MSCMAT, inputs: dict[str, Any]) -> dict[str, Tensor]:
    leaves = dict(mscmat.named_parameters()) | {f"z{s}": z for s, z in enumerate(inputs["pooled"])}
    leaves |= {"tokens": inputs["tokens"], "feature": inputs["feature"]}
    return dict(zip(leaves, torch.autograd.grad((logits * upstream).sum(), list(leaves.values())), strict=True))


@given(
    seed=st.integers(0, 10**6),
    gate=st.sampled_from(GATES),
    temperature=st.none() | st.floats(0.05, 2),
    token_width=st.sampled_from([D, 19]),
    feature_width=st.sampled_from([D, 23]),
)
@settings(max_examples=12, deadline=None)
def test_the_fold_is_attention_run_pair_by_pair(
    seed: int, gate: Any, temperature: float | None, token_width: int, feature_width: int
) -> None:
    """Values, and gradients of every learned map and every input."""
    mscmat = random_mscmat(
        Score(gate=gate, temperature=temperature), token_width=token_width, feature_width=feature_width, seed=seed
    )
    inputs = random_inputs(token_width, feature_width, seed)
    ours, theirs = folded(mscmat, **inputs), pairwise(mscmat, **inputs)
    assert ours.shape == (len(CHANNELS), IMAGES, T)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    upstream = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = gradients(theirs, upstream, mscmat, inputs)
    torch.testing.assert_close(gradients(ours, upstream, mscmat, inputs), expected, rtol=1e-8, atol=1e-8)
    # The key's bias alone moves no score: the softmax takes it out.
    assert all(value.abs().max() > 1e-9 for value in expected.values())


@pytest.mark.parametrize("gate", GATES)
def test_every_setting_changes_the_scores(gate: Literal["normalised", "plain"]) -> None:
    inputs = random_inputs()
    logits = folded(random_mscmat(Score(gate=gate, temperature=None)), **inputs)
    other = GATES[gate == "normalised"]
    assert not torch.allclose(logits, folded(random_mscmat(Score(gate=other, temperature=None)), **inputs))
    sharper = folded(random_mscmat(Score(gate=gate, temperature=0.5)), **inputs)
    bias = torch.stack([head.match.bias.detach() for head in random_mscmat(Score(gate=gate)).heads])[:, :, None]
    torch.testing.assert_close(sharper - bias, 2 * (logits - bias))


def test_a_learned_temperature_stops_at_clips_limit() -> None:
    mscmat, inputs = random_mscmat(Score(temperature=1.0)), random_inputs()

    def logits_at(scale: float) -> Tensor:
        for head in mscmat.heads:
            assert head.logit_scale is not None
            nn.init.constant_(head.logit_scale, scale)
        return folded(mscmat, **inputs)

    assert torch.equal(logits_at(math.log(100)), logits_at(7.0))
    assert not torch.allclose(logits_at(math.log(99)), logits_at(math.log(100)))


def test_scales_keep_to_themselves() -> None:
    """Changing one scale's vectors and maps changes its scores and no other's."""
    mscmat, inputs = random_mscmat(Score()), random_inputs()
    before = folded(mscmat, **inputs)
    with torch.no_grad():
        inputs["pooled"][1] += 1
        for parameter in mscmat.scales[1].parameters():
            parameter += 0.1
    after = folded(mscmat, **inputs)
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().min() > 1e-6


def test_scores_come_in_the_configured_form() -> None:
    mscmat, inputs = random_mscmat(Score()), random_inputs()
    images = mscmat.fold_image(inputs["pooled"])
    texts = mscmat.fold_text(inputs["tokens"], inputs["mask"], inputs["feature"])
    logits = match_logits(images, texts)
    assert torch.equal(match_scores(images, texts, Score(form="logit")), logits)
    torch.testing.assert_close(match_scores(images, texts, Score(form="sigmoid")), 1 / (1 + (-logits).exp()))


def test_projections_stand_only_where_widths_differ() -> None:
    names = dict(random_mscmat(Score()).named_parameters())
    assert not [name for name in names if name.startswith(("project_token", "project_feature"))]
    names = dict(random_mscmat(Score(), token_width=19, feature_width=23).named_parameters())
    assert names["project_token.weight"].shape == (D, 19)
    assert names["project_feature.weight"].shape == (D, 23)
    assert "project_feature.bias" not in names  # the normalised feature keeps its direction


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    message = "msa_cfg.heads: width 22 is not divisible by 4 heads; allowed are 1, 2, 11, 22."
    with pytest.raises(ValueError, match=re.escape(message)):
        MSCMAT(CHANNELS, D, D, D, 4, Score())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norm_is_wide_inside(dtype: torch.dtype) -> None:
    norm = WideLayerNorm(D)
    nn.init.normal_(norm.weight)
    x = (torch.randn(T, D) * 100 + 300).to(dtype)
    expected = nn.functional.layer_norm(x.double(), (D,), norm.weight.double(), norm.bias.double())
    result = norm(x)
    assert result.dtype == dtype
    assert (result - expected).abs().max() <= torch.finfo(dtype).eps / 2 * expected.abs().max()  # one rounding
    assert norm.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("gate", GATES)
def test_bfloat16_costs_no_more_than_in_the_plain_formula(gate: Literal["normalised", "plain"]) -> None:
    mscmat = random_mscmat(Score(gate=gate, temperature=0.5))
    inputs = random_inputs()
    exact = pairwise(mscmat, **inputs)
    low = {key: [x.bfloat16() for x in value] if key == "pooled" else value for key, value in inputs.items()}
    low |= {key: inputs[key].bfloat16() for key in ("tokens", "feature")}
    mscmat.bfloat16()
    plain = (pairwise(mscmat, **low) - exact).abs().mean()
    assert 0 < (folded(mscmat, **low) - exact).abs().mean() <= 2 * plain
