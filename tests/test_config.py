"""`msa_cfg`: every complaint names the key, the value and what is allowed; presets; what JSON can say survives it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_openclip.config import PRESETS, Fusion, ImageScale, Loss, MSACfg, Pool, Ranking, ScaleInputs, Score, TextTokens

SCALES = [{"stage": 2, "pool": "max"}, {"stage": 3}]

weights = st.floats(0, 100)
positive = st.floats(0.01, 100)


@st.composite
def configurations(draw: st.DrawFn) -> MSACfg:
    stages = sorted(draw(st.lists(st.integers(1, 24), min_size=1, max_size=5)))
    heads = draw(st.integers(1, 16))
    return MSACfg(
        image_scales=tuple(ImageScale(stage=stage, pool=draw(st.sampled_from(get_args(Pool)))) for stage in stages),
        base=draw(st.none() | st.text()),
        width=draw(st.none() | st.integers(1, 64).map(lambda factor: factor * heads)),
        heads=heads,
        fusion=draw(st.sampled_from(get_args(Fusion))),
        fusion_hidden=draw(st.none() | st.integers(1, 64)),
        scale_inputs=draw(st.builds(ScaleInputs, dropout=st.floats(0, 1, exclude_max=True))),
        text_tokens=draw(st.builds(TextTokens)),
        score=draw(st.builds(Score, temperature=st.none() | positive)),
        loss=draw(
            st.builds(
                Loss,
                global_weight=positive,
                margin=weights,
                match_weight=weights,
                consistency_weight=weights,
                consistency_temperature=positive,
            )
        ),
        ranking=draw(st.builds(Ranking, global_weight=st.none() | weights, match_weight=weights)),
    )


@given(cfg=configurations(), preset=st.sampled_from(sorted(PRESETS)))
def test_what_json_says_in_full_is_what_is_built(cfg: MSACfg, preset: str) -> None:
    assert MSACfg.from_dict({**json.loads(json.dumps(dataclasses.asdict(cfg))), "preset": preset}) == cfg


def key_paths(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a parsed configuration, dotted as in messages, with its value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}.{key}", item
            yield from key_paths(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            yield f"{path}[{position}]", item
            yield from key_paths(item, f"{path}[{position}]")


def with_value(config: Any, path: str, value: Any) -> Any:
    """A copy of the JSON `config` with `value` at a dotted path."""
    copy = json.loads(json.dumps(config))
    *parents, last = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", path)]
    item = copy
    for parent in parents:
        item = item[parent]
    item[last] = value
    return copy


FULL = json.loads(
    json.dumps(dataclasses.asdict(MSACfg.from_dict({"image_scales": SCALES, "width": 64, "base": "RN50"})))
)


WEIGHTS = ("global_weight", "fused_weight", "match_weight", "consistency_weight")
PAIRS = ("margin_relief", "same_class_weight", "clean_below", "noisy_from", "eliminated_share")
FLOATS = (*WEIGHTS, *PAIRS, "margin", "consistency_temperature", "temperature")
ACCEPTED = {
    str: (".base",),
    float: tuple(path for path, _ in key_paths(FULL) if path.endswith(FLOATS)),
    bool: (".text_tokens.first", ".text_tokens.padding", ".loss.identical_captions", ".loss.fused_scaled"),
    type(None): (
        ".base",
        ".width",
        ".fusion_hidden",
        ".score.temperature",
        ".loss.fused_match_weight",
        ".ranking.global_weight",
    ),
}
WRONG = ["nonsense", 1.5, True, None, [], {"unheard": 1}, -3, math.nan, math.inf]


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        pytest.param(path, wrong, id=f"{path}={wrong}")
        for path, _ in key_paths(FULL)
        for wrong in WRONG
        if path not in ACCEPTED.get(type(wrong), ()) or wrong in (math.nan, math.inf)
    ],
)
def test_a_value_of_a_wrong_kind_is_refused_by_its_key(path: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'msa_cfg{path}')}") as refusal:
        MSACfg.from_dict(with_value(FULL, path, wrong))
    assert any(word in str(refusal.value) for word in (repr(wrong), "unheard: unknown key"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "msa_cfg.image_scales: missing; it has no default."),
        ({"image_scales": [{"pool": "max"}]}, "msa_cfg.image_scales[0].stage: missing; it has no default."),
        ({"image_scales": []}, "msa_cfg.image_scales: got '[]', expected at least one scale."),
        ({"image_scales": [{"stage": 0}]}, "msa_cfg.image_scales[0].stage: got 0, expected 1 or more."),
        (
            {"image_scales": [{"stage": 3}, {"stage": 2}]},
            "msa_cfg.image_scales: got [3, 2], expected stages ordered from shallow to deep.",
        ),
        (
            {"image_scales": [{"stage": 1}, {"stage": 2, "pool": "mean"}]},
            "msa_cfg.image_scales[1].pool: got 'mean', expected one of 'max', 'avg', 'max_avg', 'token', 'learned'.",
        ),
        (
            {"image_scales": [{"stage": 1, "depth": 2}]},
            "msa_cfg.image_scales[0].depth: unknown key; known are stage, pool.",
        ),
        ({"image_scales": SCALES, "loss": {"margins": 1}}, "msa_cfg.loss.margins: unknown key; known are global_term,"),
        ({"image_scales": SCALES, "head": 4}, "msa_cfg.head: unknown key; known are image_scales, base, width, heads,"),
        ({"image_scales": SCALES, "heads": "8"}, "msa_cfg.heads: got '8', expected int."),
        ({"image_scales": SCALES, "heads": True}, "msa_cfg.heads: got True, expected int."),
        ({"image_scales": SCALES, "heads": 0}, "msa_cfg.heads: got 0, expected a positive number."),
        ({"image_scales": SCALES, "width": -1}, "msa_cfg.width: got -1, expected a positive number or null."),
        (
            {"image_scales": SCALES, "width": 22, "heads": 8},
            "msa_cfg.heads: width 22 is not divisible by 8 heads; allowed are 1, 2, 11, 22.",
        ),
        (
            {"image_scales": SCALES, "score": {"temperature": 0}},
            "msa_cfg.score.temperature: got 0.0, expected a positive number or null.",
        ),
        ({"image_scales": SCALES, "loss": {"margin": -0.1}}, "msa_cfg.loss.margin: got -0.1, expected 0 or more."),
        (
            {"image_scales": SCALES, "loss": {"consistency_temperature": 0}},
            "msa_cfg.loss.consistency_temperature: got 0.0, expected more than 0.",
        ),
        (
            {"image_scales": SCALES, "loss": dict.fromkeys(WEIGHTS, 0)},
            "msa_cfg.loss: got 'all weights 0', expected at least one term with a weight.",
        ),
        (
            {"image_scales": SCALES, "fusion": "sum"},
            "msa_cfg.fusion: got 'sum', expected one of 'tower', 'scales', 'both', 'decoupled', 'dynamic'.",
        ),
        (
            {"image_scales": SCALES, "fusion_hidden": 0},
            "msa_cfg.fusion_hidden: got 0, expected a positive number or null.",
        ),
        (
            {"image_scales": SCALES, "scale_inputs": {"dropout": 1}},
            "msa_cfg.scale_inputs.dropout: got 1.0, expected at least 0 and less than 1.",
        ),
        (
            {"image_scales": SCALES, "loss": {"fused_match_weight": -1}},
            "msa_cfg.loss.fused_match_weight: got -1.0, expected 0 or more.",
        ),
        ({"image_scales": SCALES, "loss": 3}, "msa_cfg.loss: expected an object, got 3."),
        ({"image_scales": {"stage": 1}}, "msa_cfg.image_scales: expected a list, got {'stage': 1}."),
        (
            {"image_scales": SCALES, "preset": "papers"},
            "msa_cfg.preset: 'papers' is unknown; choose one of amfmn, default, ebaker, galr, paper, rrsitr, ssjdn.",
        ),
        ({"image_scales": SCALES, "preset": ["paper"]}, "msa_cfg.preset: ['paper'] is unknown; choose one of"),
    ],
)
def test_messages(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        MSACfg.from_dict(settings)


@pytest.mark.parametrize("config", [None, [], "paper", 3])
def test_anything_but_an_object_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match=r"^msa_cfg: expected an object, got "):
        MSACfg.from_dict(config)


def test_integers_are_numbers_and_lists_become_tuples() -> None:
    cfg = MSACfg.from_dict({"image_scales": SCALES, "loss": {"match_weight": 2}})
    assert cfg.loss.match_weight == 2.0
    assert isinstance(cfg.loss.match_weight, float)
    assert cfg.image_scales == (ImageScale(stage=2, pool="max"), ImageScale(stage=3, pool="avg"))


def test_the_paper_preset_is_the_released_method() -> None:
    cfg = MSACfg.from_dict({"preset": "paper", "image_scales": SCALES})
    assert cfg.text_tokens == TextTokens(first=False, padding=True)
    assert cfg.score == Score(form="sigmoid", gate="plain", temperature=None)
    assert (cfg.heads, cfg.fusion, cfg.fusion_hidden) == (12, "scales", None)
    assert cfg.scale_inputs == ScaleInputs(norm="none", dropout=0.0)
    assert (cfg.loss.global_term, cfg.loss.margin) == ("triplet", 0.5)
    assert (cfg.loss.global_weight, cfg.loss.match_weight, cfg.loss.consistency_weight) == (1.0, 15.0, 10.0)
    assert (cfg.loss.match_directions, cfg.loss.consistency) == ("image_to_text", "released")
    assert (cfg.loss.consistency_temperature, cfg.loss.identical_captions) == (2.0, False)


def test_settings_go_over_a_preset_key_by_key() -> None:
    paper = MSACfg.from_dict({"preset": "paper", "image_scales": SCALES})
    changed = MSACfg.from_dict({"preset": "paper", "image_scales": SCALES, "loss": {"margin": 0.2}, "heads": 4})
    assert changed == dataclasses.replace(paper, heads=4, loss=dataclasses.replace(paper.loss, margin=0.2))
    assert MSACfg.from_dict({"preset": "paper", "image_scales": SCALES}) == paper  # the preset itself is unchanged


@pytest.mark.parametrize("trained_by", [None, "fused_weight", "match_weight", "consistency_weight"])
def test_mscmat_is_used_where_a_term_trains_it(trained_by: str | None) -> None:
    none = {"fused_weight": 0, "match_weight": 0, "consistency_weight": 0}
    loss = none if trained_by is None else none | {trained_by: 0.5}
    assert MSACfg.from_dict({"image_scales": SCALES, "loss": loss}).uses_mscmat is (trained_by is not None)
