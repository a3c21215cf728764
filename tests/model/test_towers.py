"""Towers: stages and pooled vectors against hooks on the backbones themselves, fusions, pools, masks of text tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st
from open_clip.model import _build_vision_tower
from torch import Tensor, nn

from msa_openclip.config import ImageScale
from msa_openclip.config import ScaleInputs as ScaleInputsCfg
from msa_openclip.model.towers import (
    ChannelNorm,
    GatedScales,
    ImageScales,
    LearnedPool,
    ScaleInputs,
    Stage,
    TowerPlusScales,
    image_stages,
    token_mask,
    unused_parameters,
)


def timm_tower(name: str, image_size: int = 224, pool: str = "avg", proj: str = "linear") -> Any:
    cfg = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": image_size}
    return _build_vision_tower(tiny.EMBED_DIM, cfg)


def tower(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    visual = _build_vision_tower(tiny.EMBED_DIM, {**tiny.VISION[kind], **changes})
    for parameter in visual.parameters():  # some start at zero, or at one, and would hide a mistake
        nn.init.normal_(parameter, std=0.3)
    return visual.eval()


# ---- stages


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", {1: Stage(1, 64), 2: Stage(2, 128), 3: Stage(3, 256), 4: Stage(4, 512)}),
        ("resnet50", {1: Stage(1, 256), 2: Stage(2, 512), 3: Stage(3, 1024), 4: Stage(4, 2048)}),
        ("swin_tiny_patch4_window7_224", {1: Stage(0, 96), 2: Stage(1, 192), 3: Stage(2, 384), 4: Stage(3, 768)}),
        ("convnext_tiny", {1: Stage(0, 96), 2: Stage(1, 192), 3: Stage(2, 384), 4: Stage(3, 768)}),
        ("vit_tiny_patch16_224", {block: Stage(block - 1, 192) for block in range(1, 13)}),
    ],
)
def test_stages_of_timm_backbones(name: str, stages: dict[int, Stage]) -> None:
    assert image_stages(timm_tower(name)) == stages


def test_stages_of_open_clips_own_towers() -> None:
    assert image_stages(tower("ViT")) == {1: Stage(0, 20), 2: Stage(1, 20), 3: Stage(2, 20)}
    assert image_stages(tower("RN")) == {1: Stage(1, 24), 2: Stage(2, 48), 3: Stage(3, 96), 4: Stage(4, 192)}


def test_a_tower_without_stages_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"image tower Linear has no stages"):
        image_stages(nn.Linear(2, 2))
    visual = tower("timm-RN")
    visual.trunk.feature_info = None
    with pytest.raises(ValueError, match=r"timm model ResNet has no forward_intermediates; choose another backbone"):
        image_stages(visual)


@pytest.mark.parametrize(
    ("kind", "scale", "message"),
    [
        ("ViT", {"stage": 4}, "msa_cfg.image_scales[0]: stage 4 does not exist; VisionTransformer has stages 1 to 3."),
        ("RN", {"stage": 5}, "msa_cfg.image_scales[0]: stage 5 does not exist; ModifiedResNet has stages 1 to 4."),
        ("timm-RN", {"stage": 5}, "msa_cfg.image_scales[0]: stage 5 does not exist; test_resnet has stages 1 to 4."),
        ("RN", {"stage": 4, "pool": "token"}, "pool 'token' needs a class token; ModifiedResNet has none."),
        ("timm-RN", {"stage": 4, "pool": "token"}, "pool 'token' needs a class token; test_resnet has none."),
    ],
)
def test_what_a_backbone_lacks_is_refused_by_key_and_name(kind: str, scale: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        ImageScales(tower(kind), [ImageScale(**scale)])
    assert message in str(refusal.value)


def test_attentional_pooling_is_refused_by_name() -> None:
    """Its final LayerNorm is of the pooler's width, so the intermediate tokens cannot be normalised with it."""
    visual = tower("ViT", attentional_pool=True, attn_pooler_heads=4)
    with pytest.raises(ValueError, match=r"vision_cfg\.attentional_pool.*Set it to false"):
        ImageScales(visual, [ImageScale(stage=1)])


# ---- pooled vectors


def as_tokens(output: Tensor) -> Tensor:
    """A map (I, C, h, w) as positions (I, L, C)."""
    return output.flatten(2).transpose(1, 2)


READERS: dict[str, Callable[[Any, int], tuple[nn.Module, Callable[[Tensor], Tensor]]]] = {
    "ViT": lambda visual, stage: (visual.transformer.resblocks[stage - 1], visual.ln_post),
    "RN": lambda visual, stage: (getattr(visual, f"layer{stage}"), as_tokens),
    "timm-RN": lambda visual, stage: (getattr(visual.trunk, f"layer{stage}"), as_tokens),
    "timm-ViT": lambda visual, stage: (visual.trunk.blocks[stage - 1], visual.trunk.norm),
}
"""By kind: the module whose output is a stage, and what makes it positions (I, L, C), after a class token in a ViT."""

STAGES = {"ViT": (1, 2, 3), "RN": (1, 2, 3, 4), "timm-RN": (1, 2, 3, 4), "timm-ViT": (1, 5, 6)}


def hooked(kind: str, visual: Any, image: Tensor, stages: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The tower's own forward pass, and each stage's positions caught by a forward hook on the way."""
    caught: dict[int, Tensor] = {}

    def catch(stage: int) -> Any:
        return lambda module, arguments, output: caught.__setitem__(stage, output)

    handles = [READERS[kind](visual, stage)[0].register_forward_hook(catch(stage)) for stage in stages]
    feature = visual(image)
    for handle in handles:
        handle.remove()
    return feature, [READERS[kind](visual, stage)[1](caught[stage]) for stage in stages]


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_pooled_vectors_are_those_of_the_towers_own_forward(kind: str, training: bool) -> None:
    """And the tower's own feature comes out bit for bit as without MSA."""
    visual = tower(kind).train(training)
    image = tiny.images(type("Model", (), {"visual": visual}))
    stages = STAGES[kind]
    scales = [ImageScale(stage=stage, pool=pool) for stage in stages for pool in ("max", "avg")]
    if "ViT" in kind:
        scales += [ImageScale(stage=stage, pool="token") for stage in stages]
    feature, pooled = ImageScales(visual, scales)(visual, image)
    own_feature, positions = hooked(kind, visual, image, stages)
    prefix = 1 if "ViT" in kind else 0
    expected = [
        pool
        for x in positions
        for pool in (torch.stack([row[prefix:].amax(0) for row in x]), torch.stack([row[prefix:].mean(0) for row in x]))
    ]
    if "ViT" in kind:
        expected += [x[:, 0] for x in positions]
    assert torch.equal(feature, own_feature)
    torch.testing.assert_close(pooled, expected)
    assert len({tuple(z[0].tolist()) for z in pooled}) == len(scales)  # every scale and pool says something else


@pytest.mark.parametrize("pool", ["", "avg"])
def test_swins_maps_are_read_with_channels_last(pool: str) -> None:
    torch.manual_seed(0)
    visual = timm_tower("test_byobnet.r160_in1k", 64) if pool else timm_tower("swin_tiny_patch4_window7_224", pool="")
    image = torch.randn(2, 3, *visual.image_size)
    caught: list[Tensor] = []
    layer = visual.trunk.stages[1] if pool else visual.trunk.layers[1]
    layer.register_forward_hook(lambda module, arguments, output: caught.append(output))
    visual.eval()
    (stage,) = (number for number, found in image_stages(visual).items() if found.position == (2 if pool else 1))
    _, (z,) = ImageScales(visual, [ImageScale(stage=stage, pool="max")])(visual, image)
    torch.testing.assert_close(z, caught[0].amax((2, 3) if pool else (1, 2)))


def test_stages_may_be_given_twice_and_out_of_the_towers_count() -> None:
    visual = tower("RN")
    image = tiny.images(type("Model", (), {"visual": visual}))
    scales = [ImageScale(stage=2, pool="avg"), ImageScale(stage=2, pool="max"), ImageScale(stage=3, pool="max")]
    reader = ImageScales(visual, scales)
    feature, pooled = reader(visual, image)
    assert torch.equal(feature, visual(image))
    assert [z.shape[1] for z in pooled] == reader.channels == [48, 48, 96]
    torch.testing.assert_close(pooled[1], hooked("RN", visual, image, [2])[1][0].amax(1))


@pytest.mark.parametrize("kind", ["ViT", "timm-ViT"])
def test_patch_dropout_leaves_scales_of_the_kept_patches(kind: str) -> None:
    visual = tower(kind, patch_dropout=0.5).train()
    image = tiny.images(type("Model", (), {"visual": visual}))
    reader = ImageScales(
        visual, [ImageScale(stage=1), ImageScale(stage=2, pool="max"), ImageScale(stage=2, pool="token")]
    )
    torch.manual_seed(1)
    feature, pooled = reader(visual, image)
    torch.manual_seed(1)
    own_feature, (first, second) = hooked(kind, visual, image, [1, 2])
    patches = first.shape[1] - 1
    assert 1 < patches < 80
    assert torch.equal(feature, own_feature)
    torch.testing.assert_close(pooled, [first[:, 1:].mean(1), second[:, 1:].amax(1), second[:, 0]])


def test_learned_pool_is_attention_with_one_query() -> None:
    pool = LearnedPool(5).double()
    positions = torch.randn(3, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(pool(positions), positions.mean(1))  # as it starts
    nn.init.normal_(pool.query.weight)
    query = pool.query.weight.expand(3, 1, 5)
    torch.testing.assert_close(pool(positions), F.scaled_dot_product_attention(query, positions, positions)[:, 0])


def test_learned_pools_belong_to_their_scales() -> None:
    visual = tower("RN")
    image = tiny.images(type("Model", (), {"visual": visual}))
    scales = [ImageScale(stage=1, pool="max"), ImageScale(stage=2, pool="learned"), ImageScale(stage=2, pool="learned")]
    reader = ImageScales(visual, scales)
    assert sorted(dict(reader.named_parameters())) == ["pools.1.query.weight", "pools.2.query.weight"]
    nn.init.normal_(reader.get_parameter("pools.2.query.weight"))
    _, (_, average, weighted) = reader(visual, image)
    positions = hooked("RN", visual, image, [2])[1][0]
    torch.testing.assert_close(average, positions.mean(1))
    torch.testing.assert_close(weighted, reader.pools["2"](positions))
    assert not torch.allclose(average, weighted)


# ---- what pooled vectors do not depend on


def weights(parent: str, *modules: str) -> set[str]:
    return {f"{parent}.{module}.{kind}" for module in modules for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("build", "unused"),
    [
        (lambda: tower("ViT"), {"proj"}),
        (lambda: tower("RN"), {"attnpool.positional_embedding", *weights("attnpool", *(f"{x}_proj" for x in "qkvc"))}),
        (lambda: tower("timm-RN"), set()),
        (lambda: tower("timm-ViT"), {"head.proj.weight"}),
        (lambda: timm_tower("test_convnext.r160_in1k", 64), {*weights("trunk.head", "norm"), "head.proj.weight"}),
        (lambda: timm_tower("test_vit.r160_in1k", 160, proj="none"), weights("trunk", "fc_norm")),
    ],
    ids=["ViT", "RN", "timm-RN", "timm-ViT", "timm-ConvNeXt", "timm-ViT-none"],
)
def test_unused_parameters_are_the_head_of_the_tower(build: Callable[[], Any], unused: set[str]) -> None:
    visual = build().train()
    reader = ImageScales(visual, [ImageScale(stage=1, pool="max"), ImageScale(stage=max(image_stages(visual)))])
    before = {name: value.clone() for name, value in visual.state_dict().items()}
    found = {*map(id, unused_parameters(reader, visual))}
    assert {name for name, parameter in visual.named_parameters() if id(parameter) in found} == unused
    assert all(module.training for module in visual.modules())
    assert all(torch.equal(value, before[name]) for name, value in visual.state_dict().items())  # nor statistics


def test_asking_for_unused_parameters_draws_no_random_numbers() -> None:
    """Two runs with one seed stay the same run, whatever the fusion."""
    visual = tower("ViT", patch_dropout=0.5).train()
    state = torch.get_rng_state()
    assert unused_parameters(ImageScales(visual, [ImageScale(stage=3)]), visual)
    assert torch.equal(torch.get_rng_state(), state)


def test_stages_above_the_scales_are_unused() -> None:
    visual = tower("ViT")
    found = {*map(id, unused_parameters(ImageScales(visual, [ImageScale(stage=1)]), visual))}
    named = {name.split(".")[2] for name, x in visual.named_parameters() if id(x) in found and "resblocks" in name}
    assert named == {"1", "2"}


# ---- fusion


def test_tower_plus_scales_adds_each_scales_projection_and_starts_at_zero() -> None:
    fusion = TowerPlusScales([3, 5], 7).double()
    feature, pooled = torch.randn(2, 7).double(), [torch.randn(2, 3).double(), torch.randn(2, 5).double()]
    assert torch.equal(fusion(feature, pooled), feature)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter)
    first, second = fusion.project
    expected = feature + pooled[0] @ first.weight.T + first.bias + pooled[1] @ second.weight.T + second.bias
    torch.testing.assert_close(fusion(feature, pooled), expected)


def test_gated_scales_are_the_papers_global_feature() -> None:
    fusion = GatedScales([3, 5], 7).double()
    pooled = [torch.randn(2, 3).double(), torch.randn(2, 5).double()]
    state = fusion.state_dict()

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    e = linear("embed", linear("project.0", pooled[0]) + linear("project.1", pooled[1]))
    expected = linear("out", e / (1 + torch.exp(-linear("gate", e))))
    torch.testing.assert_close(fusion(torch.full((2, 7), torch.nan), pooled), expected)


def test_a_residual_mlp_reads_the_tower_and_all_scales_and_starts_at_zero() -> None:
    fusion = TowerPlusScales([3, 5], 7, hidden=11, dropout=0.5).double().eval()
    feature, pooled = torch.randn(2, 7).double(), [torch.randn(2, 3).double(), torch.randn(2, 5).double()]
    assert torch.equal(fusion(feature, pooled), feature)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter)
    state = fusion.state_dict()
    linear = TowerPlusScales([3, 5], 7).double()
    linear.load_state_dict({key: value for key, value in state.items() if key.startswith("project.")})
    normed = (feature - feature.mean(1, keepdim=True)) / (feature.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    joined = torch.cat([normed * state["norm.weight"] + state["norm.bias"], *pooled], dim=1)
    hidden = F.gelu(joined @ state["mlp.0.weight"].T + state["mlp.0.bias"])
    expected = linear(feature, pooled) + hidden @ state["mlp.3.weight"].T + state["mlp.3.bias"]
    torch.testing.assert_close(fusion(feature, pooled), expected)


# ---- inputs of the learned maps


def test_maximum_and_average_stand_side_by_side() -> None:
    visual, image = tower("timm-RN"), torch.randn(2, 3, 64, 64)
    pools = [ImageScales(visual, [ImageScale(stage=3, pool=pool)]) for pool in ("max", "avg", "max_avg")]  # type: ignore[arg-type]
    (maximum,), (average,), (both,) = (reader(visual, image)[1] for reader in pools)
    assert both.equal(torch.cat([maximum, average], dim=1))
    assert pools[2].channels == [both.shape[1]] == [2 * maximum.shape[1]]


def test_channel_norm_is_batch_norm_without_learned_parts() -> None:
    ours, theirs = ChannelNorm(5).double(), nn.BatchNorm1d(5, momentum=0.05, affine=False).double()
    for _ in range(3):
        x = 30 * torch.randn(7, 5, dtype=torch.float64) + 11
        torch.testing.assert_close(ours(x), theirs(x))
    for name, value in theirs.state_dict().items():
        if name != "num_batches_tracked":
            torch.testing.assert_close(ours.state_dict()[name], value)
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_channel_norm_in_low_precision_errs_by_rounding_alone(dtype: torch.dtype) -> None:
    norm, x = ChannelNorm(5), (30 * torch.randn(7, 5) + 11).to(dtype)
    expected = nn.BatchNorm1d(5, affine=False).double()(x.double())
    for ours in (norm, norm.to(dtype)):
        torch.testing.assert_close(ours(x), expected.to(dtype))
    assert norm.eval()(x).dtype == dtype


def test_scale_inputs_normalise_and_drop_in_training() -> None:
    pooled = [100 * torch.rand(400, 3) + 5, torch.rand(400, 5) / 100]
    inputs = ScaleInputs([3, 5], ScaleInputsCfg(norm="layer", dropout=0.25))
    for z, found in zip(pooled, inputs.eval()(pooled), strict=True):
        torch.testing.assert_close(found, F.layer_norm(z, z.shape[1:]))
    dropped = torch.cat(inputs.train()(pooled), dim=1)
    assert 0.2 < (dropped == 0).float().mean() < 0.3
    plain = ScaleInputs([3, 5], ScaleInputsCfg()).train()
    assert all(found.equal(z) for z, found in zip(pooled, plain(pooled), strict=True))
    assert not plain.state_dict()


# ---- tokens


@given(
    rows=st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=5), pad=st.integers(0, 2)
)
def test_only_runs_of_padding_at_the_ends_are_masked(rows: list[list[int]], pad: int) -> None:
    expected = []
    for row in rows:
        real = [position for position, token in enumerate(row) if token != pad]
        expected.append([bool(real) and real[0] <= position <= real[-1] for position in range(7)])
    assert token_mask(torch.tensor(rows), pad).tolist() == expected


def test_an_exclamation_mark_is_no_padding() -> None:
    """open_clip's BPE has "!" inside a word as token 0, which is its padding too."""
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    ids = tokenizer(["planes !(near) trees", "planes near trees"])
    assert ids[0, 2] == 0
    assert token_mask(ids, 0).sum(dim=1).tolist() == [8, 5]


class NaFlexTower(nn.Module):
    """A NaFlexVit as open_clip wraps it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        naflexvit = pytest.importorskip("timm.models.naflexvit", reason="this timm has no NaFlexVit")
        grid = {"patch_size": 4, "pos_embed_grid_size": (2, 3), "embed_dim": 22, "depth": 3, "num_heads": 2}
        self.trunk = naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(**grid, **settings), num_classes=0)
        self.head = nn.Identity()


def patches_of(image: Tensor, padding: int) -> dict[str, Tensor]:
    """An image (I, 3, 8, 12) as a NaFlex batch of 2 x 3 patches of 4 pixels, with `padding` that is not of it."""
    cut = image.reshape(-1, 3, 2, 4, 3, 4).permute(0, 2, 4, 3, 5, 1).reshape(len(image), 6, -1)
    coordinates = torch.cartesian_prod(torch.arange(2), torch.arange(3)).expand(len(image), -1, -1)
    valid = torch.arange(6 + padding).expand(len(image), -1) < 6
    return {
        "patches": nn.functional.pad(cut, (0, 0, 0, padding), value=9.0),
        "patch_coord": nn.functional.pad(coordinates, (0, 0, 0, padding)),
        "patch_valid": valid,
    }


@pytest.mark.parametrize("token", [False, True], ids=["no token", "class token"])
def test_naflex_batches_pool_valid_patches_only(token: bool) -> None:
    """What lies behind an image's own patches changes nothing, and whole images give what their pixels give."""
    torch.manual_seed(0)
    tower = NaFlexTower(class_token=token, global_pool="avg", reg_tokens=0).eval()
    pools = ["max", "avg", "learned", *(["token"] if token else [])]
    scales = ImageScales(tower, [ImageScale(stage=min(n, 3), pool=pool) for n, pool in enumerate(pools, 1)])  # type: ignore[arg-type]
    nn.init.normal_(scales.pools["2"].query.weight)
    image = torch.randn(5, 3, 8, 12)
    found = tower.trunk.forward_intermediates(
        image, norm=True, output_fmt="NLC", output_dict=True, return_prefix_tokens=True
    )
    feature = tower.trunk.forward_head(found["image_features"])
    maps = [found["image_intermediates"][index] for index in (0, 1, 2)]
    with torch.no_grad():
        for padding in (0, 2):
            own, pooled = scales(tower, patches_of(image, padding))
            torch.testing.assert_close(own, feature)
            torch.testing.assert_close(pooled[0], maps[0].max(dim=1).values)
            torch.testing.assert_close(pooled[1], maps[1].mean(dim=1))
            torch.testing.assert_close(pooled[2], scales.pools["2"](maps[2]))
            if token:
                torch.testing.assert_close(pooled[3], found["image_intermediates_prefix"][2][:, 0])


def test_towers_for_images_of_one_size_refuse_naflex_batches() -> None:
    visual = tower("ViT")
    scales = ImageScales(visual, [ImageScale(stage=1)])
    with pytest.raises(ValueError, match="VisionTransformer takes images of one size; NaFlex batches need a NaFlexVit"):
        scales(visual, {"patches": torch.zeros(1, 1, 48)})
