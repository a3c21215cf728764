"""The pair stage: one suite for all its implementations, against float64 loops and the method as it is written."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from helpers.pair_oracle import Mscmat, naive_logits, random_sides
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msa_openclip.pair_scores import cpu_tiles as pair_tiles
from msa_openclip.pair_scores.cpu import tiled_attention
from msa_openclip.pair_scores.formula import (
    TILED_FROM,
    ImageSide,
    PairAttention,
    TextSide,
    eager_attention,
    logits_with,
    match_logits,
)

ON_GPU = torch.cuda.is_available()
# Set by conftest.py where there is no GPU: triton reads it once, when it is first imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

IMPLEMENTATIONS: dict[str, PairAttention] = {"eager": eager_attention, "tiled": tiled_attention}
if HAS_TRITON and INTERPRETED:
    pair_scores_triton = importlib.import_module("msa_openclip.pair_scores.triton_kernels")
    IMPLEMENTATIONS["triton"] = pair_scores_triton.triton_attention
    # Small programs: several of them even here, and quicker to interpret.
    small = pair_scores_triton.Launch(images=16, columns=32, warps=4, stages=1)
    pair_scores_triton.LAUNCHES.update({2: small, 4: small})
FLOAT64 = ("eager", "tiled")
"""Implementations that take float64; the others are held to a float32 tolerance."""

Side = TypeVar("Side", ImageSide, TextSide)
Logits = Callable[[ImageSide, TextSide], Tensor]


@pytest.fixture(params=IMPLEMENTATIONS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def logits(name: str) -> Logits:
    return lambda images, texts: logits_with(IMPLEMENTATIONS[name], images, texts)


@pytest.fixture
def dtype(name: str) -> torch.dtype:
    return torch.float64 if name in FLOAT64 else torch.float32


def cast(side: Side, dtype: torch.dtype) -> Side:
    return type(side)(*(field.to(dtype) if field.is_floating_point() else field for field in side))


def leaves(*sides: ImageSide | TextSide) -> list[Tensor]:
    return [field for side in sides for field in side if field.is_floating_point()]


def gradients(logits: Logits, images: ImageSide, texts: TextSide, upstream: Tensor) -> list[Tensor]:
    """Gradients of every float field, in order, on fresh leaves."""
    images = ImageSide(*(field.detach().clone().requires_grad_() for field in images))
    texts = TextSide(*(field.detach().clone().requires_grad_() for field in texts[:3]), texts.mask)
    result = logits(images, texts)
    inputs = leaves(images, texts)
    return list(torch.autograd.grad(result, inputs, upstream.to(result), allow_unused=True, materialize_grads=True))


def assert_matches_oracle(logits: Logits, images: ImageSide, texts: TextSide) -> None:
    """Values and all gradients, to the rounding of the sides' dtype."""
    exact_images, exact_texts = cast(images, torch.float64), cast(texts, torch.float64)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if images.query.dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    expected = naive_logits(exact_images, exact_texts)
    torch.testing.assert_close(logits(images, texts).double(), expected, **tolerance)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    exact = gradients(naive_logits, exact_images, exact_texts, upstream)
    for found, wanted in zip(gradients(logits, images, texts, upstream), exact, strict=True):
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(found.double() / scale, wanted / scale, **tolerance)


def test_folding_changes_neither_scores_nor_gradients() -> None:
    """The fold of docs/method.md, section 2 against section 1 computed pair by pair, one text all masked."""
    torch.manual_seed(3)
    channels, n_images, n_texts, tokens, width = [5, 13], 3, 5, 7, 22
    maps = Mscmat.random(widths=channels, heads=2, width=width)
    pooled = [torch.randn(n_images, size, dtype=torch.float64, requires_grad=True) for size in channels]
    words = torch.randn(n_texts, tokens, width, dtype=torch.float64, requires_grad=True)
    feature = torch.randn(n_texts, width, dtype=torch.float64, requires_grad=True)
    mask = random_sides()[1].mask.clone()
    mask[2] = False
    written = maps.pairwise(pooled, words, feature, mask)
    folded = match_logits(*maps.fold(pooled, words, feature, mask))
    torch.testing.assert_close(folded, written, rtol=1e-12, atol=1e-12)
    inputs = [*pooled, words, feature, *maps.parameters()]
    upstream = torch.randn_like(written)
    wanted = torch.autograd.grad(written, inputs, upstream, retain_graph=True)
    for found, exact in zip(torch.autograd.grad(folded, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-10)
    everything = torch.ones_like(mask)
    torch.testing.assert_close(
        maps.released(pooled, words, feature), maps.pairwise(pooled, words, feature, everything), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"images": 1},
        {"texts": 1},
        {"images": 1, "texts": 1, "scales": 1, "tokens": 1, "heads": 1, "width": 1},
        {"tokens": 1},
        {"images": 37, "texts": 11, "scales": 2, "tokens": 5, "heads": 3, "width": 7},
        {"images": 2, "texts": 19, "scales": 1, "tokens": 31, "heads": 2, "width": 17},
    ],
    ids=lambda shape: ",".join(f"{key}={size}" for key, size in shape.items()) or "primes",
)
def test_values_and_gradients_are_those_of_the_loops(logits: Logits, dtype: torch.dtype, shape: dict[str, int]) -> None:
    assert_matches_oracle(logits, *random_sides(dtype=dtype, **shape))


def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles small enough that every text and every few images have their own, the last ones uneven."""
    monkeypatch.setattr(pair_tiles, "TILE_ROWS", 9)
    monkeypatch.setattr(pair_tiles, "MOST_ROWS", 9)
    monkeypatch.setattr(pair_tiles, "TILE_LOGITS", 160)
    assert_matches_oracle(
        lambda i, t: logits_with(tiled_attention, i, t),
        *random_sides(images=37, texts=11, tokens=13, dtype=torch.float64),
    )


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_and_any_mask(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(IMPLEMENTATIONS)))
    size = st.integers(1, 3 if name == "triton" else 6)  # whose interpreter is slow
    sizes = {key: data.draw(size, label=key) for key in ("images", "texts", "scales", "tokens", "heads")}
    images, texts = random_sides(
        **sizes,
        width=data.draw(st.integers(1, 9), label="width"),
        dtype=torch.float64 if name in FLOAT64 else torch.float32,
        seed=data.draw(st.integers(0, 99)),
        logit_size=data.draw(st.sampled_from([0.0, 1.0, 9.0])),
    )
    count = sizes["texts"] * sizes["tokens"]
    mask = data.draw(st.lists(st.booleans(), min_size=count, max_size=count), label="mask")
    texts = texts._replace(mask=torch.tensor(mask).view(texts.mask.shape))
    assert_matches_oracle(lambda i, t: logits_with(IMPLEMENTATIONS[name], i, t), images, texts)


def test_one_token_left_is_read_as_it_is(logits: Logits) -> None:
    images, texts = random_sides()
    mask = torch.zeros_like(texts.mask)
    mask[:, 4] = True
    found = logits(images, texts._replace(mask=mask))
    value = torch.einsum("ishd,tshd->sit", images.readout, texts.value[:, :, 4])
    value = value + torch.einsum("isc,tc->sit", images.gate, texts.feature) + images.bias.T[:, :, None]
    torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def test_a_text_of_padding_alone_attends_to_nothing(logits: Logits) -> None:
    images, texts = random_sides()
    mask = texts.mask.clone()
    mask[3] = False
    texts = texts._replace(mask=mask)
    rest = torch.einsum("isc,c->si", images.gate, texts.feature[3]) + images.bias.T
    torch.testing.assert_close(logits(images, texts)[:, :, 3], rest)
    for gradient in gradients(logits, images, texts, torch.ones(2, 3, 5)):
        assert gradient.isfinite().all()
    nothing = texts._replace(mask=torch.zeros_like(mask))
    _, _, _, _, key, value, _ = gradients(logits, images, nothing, torch.ones(2, 3, 5))
    assert key.count_nonzero() == value.count_nonzero() == 0


@pytest.mark.parametrize("size", [60.0, 1e4, 1e18])
def test_large_logits_do_not_overflow(logits: Logits, size: float) -> None:
    """Beyond float32's exp by far; the softmax is then one-hot and the score is what that token reads."""
    images, texts = random_sides(logit_size=size)
    found = logits(images, texts)
    expected = naive_logits(cast(images, torch.float64), cast(texts, torch.float64))
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert all(gradient.isfinite().all() for gradient in gradients(logits, images, texts, torch.ones(2, 3, 5)))


def test_strongly_negative_logits_do_not_vanish(logits: Logits) -> None:
    """All of a text's logits near -1e4: the softmax sees their differences, not their size."""
    images, texts = random_sides(width=16)
    images = images._replace(query=torch.full_like(images.query, 2.0))
    texts = texts._replace(key=texts.key.round() / 16 - 312.5)
    found = logits(images, texts)
    expected = naive_logits(cast(images, torch.float64), cast(texts, torch.float64))
    torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=5e-3)


def test_no_gradient_comes_from_no_gradient(logits: Logits) -> None:
    images, texts = random_sides()
    for gradient in gradients(logits, images, texts, torch.zeros(2, 3, 5)):
        assert gradient.count_nonzero() == 0


def test_inputs_need_not_be_contiguous(logits: Logits, dtype: torch.dtype) -> None:
    images, texts = random_sides(dtype=dtype)

    def strided(field: Tensor) -> Tensor:
        """Same values, dimensions laid out backwards, every other element of twice the storage."""
        backwards = field.permute(*reversed(range(field.ndim)))
        spread = torch.stack([backwards, torch.zeros_like(backwards)], dim=-1)[..., 0]
        return spread.permute(*reversed(range(field.ndim)))

    spread_images, spread_texts = ImageSide(*map(strided, images)), TextSide(*map(strided, texts))
    assert not any(field.is_contiguous() for field in (*spread_images, *spread_texts))
    torch.testing.assert_close(logits(spread_images, spread_texts), logits(images, texts))
    inputs = [field.requires_grad_() for field in (spread_images.query, spread_texts.key)]
    upstream = torch.randn(5, 3, 2, dtype=dtype).permute(2, 1, 0)
    found = torch.autograd.grad(logits(spread_images, spread_texts), inputs, upstream)
    wanted = gradients(logits, images, texts, upstream)
    torch.testing.assert_close(found, (wanted[0], wanted[4]))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_formula_in_it(logits: Logits, half: torch.dtype) -> None:
    images, texts = random_sides(images=13, texts=17, tokens=11, heads=3, width=16, dtype=half, logit_size=3.0)
    assert logits(images, texts).dtype == torch.float32
    assert_as_exact_as_the_formula(logits, images, texts)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_with_and_without_its_own_instructions(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways on every processor, in tiles small enough that gradients are added up over several."""
    monkeypatch.setattr(pair_tiles, "multiplies_bfloat16", lambda: native)
    for constant, size in {"TILE_ROWS": 24, "MOST_ROWS": 24, "TILE_LOGITS": 400}.items():
        monkeypatch.setattr(pair_tiles, constant, size)
    images, texts = random_sides(
        images=37, texts=17, tokens=11, heads=3, width=16, dtype=torch.bfloat16, logit_size=3.0
    )
    tiles = pair_tiles.Tiles(images.query, images.readout, texts.key, texts.value, texts.mask)
    assert tiles.operands == (torch.bfloat16 if native else torch.float32)
    assert len(tiles.tiles) > 1
    assert len(tiles.blocks(0)) > 1
    assert_as_exact_as_the_formula(lambda i, t: logits_with(tiled_attention, i, t), images, texts)


def assert_as_exact_as_the_formula(logits: Logits, images: ImageSide, texts: TextSide) -> None:
    """Errors against float64 at most twice those of the eager form in the same precision."""
    exact = [cast(images, torch.float64), cast(texts, torch.float64)]
    upstream = torch.randn(2, len(images.query), len(texts.key), generator=torch.Generator().manual_seed(5))

    def errors(compute: Logits) -> list[float]:
        found = [compute(images, texts), *gradients(compute, images, texts, upstream)]
        wanted = [eager(*exact), *gradients(eager, *exact, upstream)]
        return [(a.double() - b).square().mean().sqrt().item() for a, b in zip(found, wanted, strict=True)]

    for mine, plain in zip(errors(logits), errors(eager), strict=True):
        assert mine <= 2 * plain


def eager(images: ImageSide, texts: TextSide) -> Tensor:
    return logits_with(eager_attention, images, texts)


def test_gradcheck(logits: Logits, name: str) -> None:
    if name not in FLOAT64:
        pytest.skip(f"{name} takes no float64; its gradients are held to the float64 loops above")
    images, texts = random_sides(images=2, texts=3, scales=1, tokens=5, heads=2, width=3, dtype=torch.float64)
    inputs = [field.requires_grad_() for field in leaves(images, texts)]

    def scores(*fields: Tensor) -> Tensor:
        return logits(ImageSide(*fields[:4]), TextSide(*fields[4:], texts.mask))

    assert torch.autograd.gradcheck(scores, inputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck's own copies
def test_the_operator_keeps_torch_rules(name: str) -> None:
    """Schema, fake kernel, autograd registration and tracing, as torch.library checks them."""
    if name == "eager":
        pytest.skip("eager is no operator of its own")
    images, texts = random_sides()
    sides = [field.requires_grad_() for field in (*images[:2], *texts[:2])]
    torch.library.opcheck(IMPLEMENTATIONS[name], (*sides, texts.mask))
    frozen = [sides[0], sides[1].detach(), sides[2].detach(), sides[3].detach()]
    torch.library.opcheck(IMPLEMENTATIONS[name], (*frozen, texts.mask))


def test_second_derivatives_are_refused_or_right(logits: Logits, name: str) -> None:
    images, texts = random_sides()
    query = images.query.requires_grad_()
    (first,) = torch.autograd.grad(logits(images, texts).square().sum(), query, create_graph=True)
    if name == "eager":
        assert torch.autograd.grad(first.sum(), query)[0].count_nonzero()
    else:
        with pytest.raises(NotImplementedError, match="eager_attention"):
            torch.autograd.grad(first.sum(), query)


def test_what_padding_holds_changes_nothing(logits: Logits) -> None:
    images, texts = random_sides()
    hidden = ~texts.mask[:, None, :, None, None]
    filled = texts._replace(
        key=texts.key.masked_fill(hidden, 3e4),
        value=texts.value.masked_fill(hidden, -3e4),
    )
    torch.testing.assert_close(logits(images, filled), logits(images, texts))
    upstream = torch.randn(2, 3, 5)
    found, wanted = (gradients(logits, images, side, upstream) for side in (filled, texts))
    torch.testing.assert_close(found, wanted)
    assert found[4].masked_select(hidden).count_nonzero() == 0


def test_more_padding_changes_nothing(logits: Logits) -> None:
    images, texts = random_sides()
    longer = TextSide(
        *(torch.nn.functional.pad(field, (0, 0, 0, 0, 0, 4)) for field in texts[:2]),
        texts.feature,
        torch.nn.functional.pad(texts.mask, (0, 4)),
    )
    torch.testing.assert_close(logits(images, longer), logits(images, texts))


def test_order_of_images_texts_and_tokens(logits: Logits) -> None:
    images, texts = random_sides(images=7, texts=11)
    whole = logits(images, texts)
    rows, columns, tokens = torch.randperm(7), torch.randperm(11), torch.randperm(7)
    shuffled = TextSide(*(field[columns] for field in texts))
    shuffled = shuffled._replace(
        key=shuffled.key[:, :, tokens], value=shuffled.value[:, :, tokens], mask=shuffled.mask[:, tokens]
    )
    found = logits(ImageSide(*(field[rows] for field in images)), shuffled)
    torch.testing.assert_close(found, whole[:, rows][:, :, columns])


def test_parts_equal_the_whole(logits: Logits) -> None:
    images, texts = random_sides(images=23, texts=29)
    tiles = [
        torch.cat([logits(ImageSide(*(f[i : i + 7] for f in images)), TextSide(*(f[t : t + 5] for f in texts)))
                   for t in range(0, 29, 5)], dim=2)
        for i in range(0, 23, 7)
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(tiles, dim=1), logits(images, texts))


def test_repeated_runs_are_identical(logits: Logits) -> None:
    images, texts = random_sides(images=23, texts=29)
    upstream = torch.randn(2, 23, 29)
    first, second = (gradients(logits, images, texts, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_what_is_asked_for_is_differentiated(logits: Logits) -> None:
    """A frozen text side, as in image tuning: no gradient for it, the same ones for the image side."""
    images, texts = random_sides()
    upstream = torch.randn(2, 3, 5)
    wanted = gradients(logits, images, texts, upstream)
    query = images.query.clone().requires_grad_()
    (found,) = torch.autograd.grad(logits(images._replace(query=query), texts), [query], upstream)
    torch.testing.assert_close(found, wanted[0])
    value = texts.value.clone().requires_grad_()
    (found,) = torch.autograd.grad(logits(images, texts._replace(value=value)), [value], upstream)
    torch.testing.assert_close(found, wanted[5])


def test_autocast_leaves_the_pair_stage_alone(logits: Logits) -> None:
    images, texts = random_sides()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(images, texts), logits(images, texts).float())
        assert logits(images, texts).dtype == torch.float32


def test_compiles_into_one_graph(logits: Logits) -> None:
    images, texts = random_sides()
    compiled = torch.compile(logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, texts), logits(images, texts))
    upstream = torch.randn(2, 3, 5)
    found, wanted = gradients(compiled, images, texts, upstream), gradients(logits, images, texts, upstream)
    torch.testing.assert_close(found, wanted)


def test_large_problems_take_the_tiled_way_and_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = random_sides(images=37, texts=41, tokens=11, scales=2, heads=4, width=5)
    assert len(images.query) * texts.key[..., 0].numel() >= TILED_FROM
    expected = logits_with(eager_attention, images, texts)
    monkeypatch.setattr("msa_openclip.pair_scores.formula.eager_attention", None)
    torch.testing.assert_close(match_logits(images, texts), expected)
    compiled = torch.compile(match_logits, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(images, texts), expected)


STEP_AT_SIZE = """
import re
from pathlib import Path
import torch
from msa_openclip.pair_scores.cpu import tiled_attention

def resident(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def step(images, texts):
    sides = [torch.randn(images, 1, 12, 8), torch.randn(images, 1, 12, 8)]
    sides += [torch.randn(texts, 1, 30, 12, 8), torch.randn(texts, 1, 30, 12, 8)]
    sides = [side.requires_grad_() for side in sides]
    mask, upstream = torch.ones(texts, 30, dtype=torch.bool), torch.randn(1, images, texts)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    torch.autograd.grad(tiled_attention(*sides, mask), sides, upstream)
    return resident("VmHWM") - before

step(16, 16)
print(step(320, 320))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_training_memory_does_not_hold_the_pairs() -> None:
    """Peak resident memory of a step; the eager form keeps at least three blocks of I x T x H x N, this a tenth."""
    block_bytes = 320 * 320 * 12 * 30 * 4
    run = subprocess.run([sys.executable, "-c", STEP_AT_SIZE], check=True, capture_output=True, text=True)
    assert int(run.stdout) < 3 * block_bytes / 10


@pytest.mark.parametrize("empty", ["images", "texts"])
def test_no_images_or_no_texts(logits: Logits, empty: str) -> None:
    images, texts = random_sides()
    images = ImageSide(*(field[:0] for field in images)) if empty == "images" else images
    texts = TextSide(*(field[:0] for field in texts)) if empty == "texts" else texts
    expected = (2, len(images.query), len(texts.key))
    assert logits(images, texts).shape == expected
    for gradient, leaf in zip(
        gradients(logits, images, texts, torch.zeros(expected)), leaves(images, texts), strict=True
    ):
        assert gradient.shape == leaf.shape
        assert gradient.count_nonzero() == 0


def test_mixed_precision_of_the_sides_is_that_of_the_wider(logits: Logits) -> None:
    images, texts = random_sides()
    half = cast(texts, torch.bfloat16)
    torch.testing.assert_close(logits(images, half), logits(images, cast(half, torch.float32)))
    assert logits(images, half).dtype == torch.float32


@pytest.mark.parametrize("other", [{"scales": 3}, {"heads": 3}, {"width": 5}])
def test_sides_of_different_models_are_refused(other: dict[str, int]) -> None:
    images, texts = random_sides()[0], random_sides(**other)[1]
    with pytest.raises(ValueError, match="Fold both sides with the same model"):
        match_logits(images, texts)


def test_the_softmax_is_one_over_real_tokens() -> None:
    """A hand-computed value, so that the oracle itself is held to something."""
    one = torch.ones(1, 1, 1, 1)
    images = ImageSide(one, 2 * one, torch.tensor([[[3.0]]]), torch.tensor([[0.25]]))
    key = torch.tensor([0.0, math.log(3.0), 50.0]).view(1, 1, 3, 1, 1)
    value = torch.tensor([4.0, 8.0, 1e6]).view(1, 1, 3, 1, 1)
    texts = TextSide(key, value, torch.tensor([[0.5]]), torch.tensor([[True, True, False]]))
    expected = 2 * (4 * 0.25 + 8 * 0.75) + 3 * 0.5 + 0.25
    assert match_logits(images, texts).item() == pytest.approx(expected)
    assert naive_logits(images, texts).item() == pytest.approx(expected)


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_the_triton_kernels_on_a_gpu(precision: torch.dtype) -> None:
    """Compiled, at full program size; the interpreter runs the rest of the suite."""
    images, texts = random_sides(images=131, texts=67, tokens=30, heads=3, width=64, dtype=precision)
    upstream = torch.randn(2, 131, 67)
    wanted_sides = cast(images, torch.float64), cast(texts, torch.float64)
    wanted = [eager(*wanted_sides), *gradients(eager, *wanted_sides, upstream)]

    def on_gpu(image_side: ImageSide, text_side: TextSide) -> Tensor:
        there = ImageSide(*(f.cuda() for f in image_side)), TextSide(*(f.cuda() for f in text_side))
        return match_logits(*there).cpu()

    found = [on_gpu(images, texts), *gradients(on_gpu, images, texts, upstream)]
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[precision]
    for mine, exact in zip(found, wanted, strict=True):
        assert (mine.double() - exact).abs().max() <= tolerance * exact.abs().max()
