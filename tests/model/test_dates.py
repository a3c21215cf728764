"""Models of several dates: the fusion against plain loops, what it leaves alone, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from helpers import tiny
from helpers.retrieval_data import randomise
from open_clip.factory import load_checkpoint
from torch import Tensor

from msa_openclip.config import MSACfg
from msa_openclip.evaluation.loading import ModelError, load
from msa_openclip.model.cached import FeatureError, describe_towers
from msa_openclip.model.dates import DateFusion, PairFusion, SeriesFusion
from msa_openclip.model.mscmat import IMAGE_SIDE_KEYS


def build(tmp_path: Path, dates: int, kind: str = "ViT", **msa: Any) -> Any:
    """A tiny model of some dates whose every parameter has weight."""
    name = f"MSA-{kind}-{dates}-{len(list(tmp_path.iterdir()))}"
    tiny.write_config(tmp_path, name, tiny.config(kind, msa={"dates": dates, **msa}))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    return randomise(open_clip.create_model(name))


def samples(model: Any, dates: int, count: int = 3) -> Tensor:
    """(I, dates, 3, h, w)."""
    flat = tiny.images(model, count * dates)
    return flat.reshape(count, dates, *flat.shape[1:])


def norm(z: Tensor) -> Tensor:
    return (z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt()


def test_a_pair_is_the_mean_and_a_network_of_both_and_their_difference() -> None:
    fusion = randomise(PairFusion(7)).double()
    z = torch.randn(3, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for sample, got in zip(z, fusion(z), strict=True):
        first, second = norm(sample[0]), norm(sample[1])
        hidden = fusion.first.weight @ torch.cat([first, second, second - first]) + fusion.first.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        expected = (sample[0] + sample[1]) / 2 + fusion.last.weight @ hidden + fusion.last.bias
        torch.testing.assert_close(got, expected)


def test_a_series_is_the_mean_and_an_attention_that_knows_the_dates() -> None:
    channels, dates, heads = 10, 5, 2
    fusion = randomise(SeriesFusion(channels, dates)).double()
    assert fusion.heads == heads
    fusion.requires_grad_(False)
    z = torch.randn(3, dates, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for sample, got in zip(z, fusion(z), strict=True):
        placed = [norm(sample[t]) + fusion.positions[t] for t in range(dates)]
        read = []
        for h in range(heads):
            part = slice(5 * h, 5 * h + 5)
            logits = [float(fusion.query[part] @ (fusion.key.weight[part] @ x)) / math.sqrt(5) for x in placed]
            weights = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
            values = [fusion.value.weight[part] @ x + fusion.value.bias[part] for x in placed]
            read.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        expected = sample.mean(dim=0) + fusion.out.weight @ torch.cat(read) + fusion.out.bias
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dates", [2, 3])
def test_a_new_fusion_gives_the_mean_so_that_tower_weights_start_as_they_are(dates: int) -> None:
    fusion = DateFusion([5, 7], 11, dates)
    feature, pooled = torch.randn(4 * dates, 11), [torch.randn(4 * dates, count) for count in (5, 7)]
    fused, scales = fusion(feature, pooled)
    for before, after in zip((feature, *pooled), (fused, *scales), strict=True):
        torch.testing.assert_close(after, before.reshape(4, dates, -1).mean(dim=1))


@pytest.mark.parametrize("kind", ["ViT", "RN"])
@pytest.mark.parametrize("dates", [2, 3])
def test_a_sample_gives_one_vector_a_scale_and_the_order_of_dates_matters(
    tmp_path: Path, kind: str, dates: int
) -> None:
    model = build(tmp_path, dates, kind)
    images = samples(model, dates)
    with torch.no_grad():
        feature, side = model.image_side(images)
        assert feature.shape == (3, tiny.EMBED_DIM)
        assert side.query.shape[:2] == (3, len(tiny.SCALES[kind]))
        torch.testing.assert_close(model.encode_image(images, normalize=True), feature)
        turned, _ = model.image_side(images.flip(1))
        assert (turned - feature).abs().max() > 1e-4
        alone, _ = model.image_side(images[1:2])
        torch.testing.assert_close(alone, feature[1:2], rtol=1e-4, atol=1e-5)
        logits, _ = model.get_logits(images, tiny.texts())
        assert logits.shape == (3, 5)


@pytest.mark.parametrize("msa", [{}, {"preset": "paper", "heads": 4}, {"fusion": "tower"},
                                 {"loss": {"fused_weight": 0.0}, "fusion": "tower"}])  # fmt: skip
@pytest.mark.parametrize("dates", [2, 3])
def test_every_parameter_that_can_learn_learns(tmp_path: Path, dates: int, msa: dict[str, Any]) -> None:
    model = build(tmp_path, dates, **msa).train()
    output = model(samples(model, dates, 5), tiny.texts())
    keys = ("image_features", "text_features", "logit_scale", *(IMAGE_SIDE_KEYS if model.mscmat else ()))
    total = sum((output[key].float() ** 2).sum() + output[key].sum() for key in keys)
    total = total + sum(value.sum() for key, value in output.items() if key.startswith("match_text"))
    total.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert any(name.startswith("date_fusion.") for name, p in model.named_parameters() if p.requires_grad)


def test_one_date_is_the_model_that_it_was(tmp_path: Path) -> None:
    one, plain = build(tmp_path, 1), open_clip.create_model("MSA-ViT-1-0")
    assert not any(key.startswith("date_fusion") for key in one.state_dict())
    assert one.date_fusion is None
    plain.load_state_dict(one.state_dict())
    images = tiny.images(one)
    with torch.no_grad():
        assert plain.eval().encode_image(images).shape == (5, tiny.EMBED_DIM)


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (3, 3, 3, 32, 32), (2, 3, 32, 32)])
def test_images_of_other_dates_are_refused_by_name(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model = build(tmp_path, 2)
    with pytest.raises(ValueError, match=r"msa_cfg.dates: this model takes samples \(I, 2, 3, h, w\).*got images"):
        model.encode_image(torch.zeros(shape))
    with pytest.raises(ValueError, match="got dict"):
        model.encode_image({"patches": torch.zeros(1, 2, 3)})


@pytest.mark.parametrize("dates", [0, -1, 65, 2.5, True])
def test_numbers_of_dates_are_checked(dates: Any) -> None:
    with pytest.raises(ValueError, match=r"msa_cfg\.dates: got"):
        MSACfg.from_dict({"image_scales": [{"stage": 1}], "dates": dates})


def test_weights_of_one_date_start_a_model_of_two_and_are_no_model_of_two(tmp_path: Path) -> None:
    one, two = build(tmp_path, 1), build(tmp_path, 2)
    before = {key: value.clone() for key, value in two.state_dict().items()}
    two.load_state_dict(one.state_dict())
    for key, value in two.state_dict().items():
        assert value.equal(before[key] if key.startswith("date_fusion.") else one.state_dict()[key]), key
    with pytest.raises(RuntimeError, match="date_fusion"):
        one.load_state_dict(two.state_dict())
    torch.save({"state_dict": one.state_dict()}, tmp_path / "one.pt")
    with pytest.raises(ModelError, match="fusion of 2 dates would be random"):
        load(f"MSA-ViT-2-1={tmp_path}/one.pt")
    torch.save({"state_dict": two.state_dict()}, tmp_path / "two.pt")
    assert load(f"MSA-ViT-2-1={tmp_path}/two.pt").scorer.dates == 2


def test_plain_clip_weights_start_a_model_of_two(tmp_path: Path, tiny_configs: Path) -> None:
    plain, two = open_clip.create_model("tiny-ViT"), build(tmp_path, 2)
    before = two.date_fusion.feature.first.weight.clone()
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    load_checkpoint(two, str(tmp_path / "plain.pt"))
    assert two.date_fusion.feature.first.weight.equal(before)


def test_features_of_one_date_are_no_training_data(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"msa_cfg\.dates: features are cached of one image"):
        describe_towers(build(tmp_path, 2))


@pytest.mark.parametrize("dates", [2, 3])
def test_low_precision(tmp_path: Path, dates: int) -> None:
    build(tmp_path, dates)
    model = open_clip.create_model(f"MSA-ViT-{dates}-0", precision="bf16").eval()
    with torch.no_grad():
        feature, side = model.image_side(samples(model, dates).bfloat16())
    assert feature.isfinite().all()
    assert side.query.isfinite().all()
