"""MSACLIP as an open_clip model: what it returns, what it trains, precisions, locks, compilation, forced geometry."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import open_clip.transformer
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny
from open_clip.model import get_input_dtype
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from torch import Tensor, nn

from msa_openclip.config import MSACfg
from msa_openclip.model.msaclip import MSACLIP
from msa_openclip.model.mscmat import IMAGE_SIDE_KEYS, TEXT_SIDE_KEYS
from msa_openclip.pair_scores.formula import ImageSide, TextSide
from msa_openclip.training.loss import MSALoss

BATCH = 5
KINDS = ("MSA-tiny-ViT", "MSA-tiny-RN", "MSA-tiny-BERT")

pytestmark = pytest.mark.usefixtures("tiny_configs")


def create(name: str = "MSA-tiny-ViT", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return open_clip.create_model(name, **options)


def build(
    vision: str = "ViT", *, image: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **msa: Any
) -> MSACLIP:
    """A model straight from its configuration, for the many that no file is written for."""
    torch.manual_seed(0)
    config = tiny.config(vision, text=text, msa=msa)
    config["vision_cfg"] |= image or {}
    del config["custom_text"]
    return MSACLIP(**config, output_dict=True)


def randomised(model: Any, seed: int = 0) -> Any:
    """Every parameter drawn at random, zeros and ones too; small enough that nothing saturates."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "logit_scale" not in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def batch(model: Any, count: int = BATCH) -> tuple[Tensor, Tensor]:
    vocabulary = 49406 if hasattr(model.text, "token_embedding") else len(tiny.VOCABULARY) - 2
    return tiny.images(model, count), tiny.texts(count, vocabulary=vocabulary)


def train_step(model: Any, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """The losses of a step, as open_clip_train asks for them, after their backward pass."""
    losses: Any = MSALoss(model.msa_cfg)(**model.train()(images, texts), output_dict=True)
    torch.stack(list(losses.values())).sum().backward()
    return dict(losses)


# ---- what it returns


@pytest.mark.parametrize("name", KINDS)
def test_training_returns_a_flat_dict_of_batch_first_tensors(name: str) -> None:
    model = create(name, output_dict=True).train()
    images, texts = batch(model)
    output = model(images, texts)
    expected = {"image_features", "text_features", "logit_scale", *IMAGE_SIDE_KEYS, *TEXT_SIDE_KEYS}
    if name != "MSA-tiny-BERT":  # the paper's losses know no identical captions
        expected.add("text_ids")
        assert torch.equal(output["text_ids"], texts)
    assert {*output} == expected
    assert output.pop("logit_scale").shape == ()
    assert {key: len(value) for key, value in output.items()} == dict.fromkeys(output, BATCH)
    for key in ("image_features", "text_features"):
        assert output[key].shape == (BATCH, tiny.EMBED_DIM)
        torch.testing.assert_close(output[key].norm(dim=-1), torch.ones(BATCH))


@pytest.mark.parametrize("name", ["MSA-tiny-ViT", "MSA-tiny-BERT"])
def test_what_training_returns_is_what_scoring_folds(name: str) -> None:
    model = randomised(create(name)).eval()
    images, texts = batch(model)
    image_feature, image_side = model.image_side(images)
    text_feature, text_side = model.text_side(texts)
    model.train()
    for module in model.visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    if name == "MSA-tiny-BERT":
        model.text.eval()  # dropout
    output = model(images, texts)
    torch.testing.assert_close([image_feature, text_feature], [output["image_features"], output["text_features"]])
    torch.testing.assert_close(tuple(image_side), tuple(output[key] for key in IMAGE_SIDE_KEYS))
    torch.testing.assert_close(tuple(text_side), tuple(output[key] for key in TEXT_SIDE_KEYS))


@pytest.mark.parametrize("name", KINDS)
def test_evaluation_returns_what_every_open_clip_model_returns(name: str) -> None:
    model = randomised(create(name)).eval()
    images, texts = batch(model)
    image_features, text_features, logit_scale = model(images, texts)
    torch.testing.assert_close(image_features, F.normalize(model.encode_image(images), dim=-1))
    torch.testing.assert_close(text_features, F.normalize(model.encode_text(texts), dim=-1))
    assert torch.equal(image_features, model.encode_image(images, normalize=True))
    assert torch.equal(text_features, model.encode_text(texts, normalize=True))
    assert torch.equal(logit_scale, model.logit_scale.exp())
    model.output_dict = True
    output = model(images, texts)
    assert {*output} == {"image_features", "text_features", "logit_scale"}
    assert torch.equal(output["image_features"], image_features)
    assert torch.equal(output["text_features"], text_features)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_either_input_alone(training: bool) -> None:
    model = create().train(training)
    images, texts = batch(model)
    both = model.eval()(images, texts)
    model.train(training)
    image_features, nothing, _ = model(image=images)
    assert nothing is None
    torch.testing.assert_close(image_features, both[0])
    nothing, text_features, _ = model(text=texts)
    assert nothing is None
    torch.testing.assert_close(text_features, both[1])
    model.output_dict = True
    assert {key for key, value in model(text=texts).items() if value is not None} == {"text_features", "logit_scale"}


def test_a_logit_bias_is_passed_on_as_open_clip_does() -> None:
    model = create(init_logit_bias=-10.0, output_dict=True)
    images, texts = batch(model)
    assert model.eval()(images, texts)["logit_bias"].item() == -10
    assert model.train()(images, texts)["logit_bias"].item() == -10


@pytest.mark.parametrize("vision", ["ViT", "RN"])
def test_a_warm_start_changes_nothing(vision: str, tmp_path: Path) -> None:
    """Bit for bit the base model's `encode_image` and `encode_text`, in evaluation and in training."""
    base = randomised(create(f"tiny-{vision}"))
    torch.save(base.state_dict(), tmp_path / "base.pt")
    model = create(f"MSA-tiny-{vision}", seed=1, pretrained=str(tmp_path / "base.pt"))
    images, texts = batch(model)
    for training in (False, True):
        base.train(training)
        model.train(training)
        assert torch.equal(model.encode_image(images), base.encode_image(images))
        assert torch.equal(model.encode_text(texts), base.encode_text(texts))
        assert torch.equal(model.logit_scale, base.logit_scale)


# ---- match scores


@pytest.mark.parametrize("name", KINDS)
def test_match_scores_are_those_of_each_pair_alone(name: str) -> None:
    model = randomised(create(name)).eval()
    images, texts = batch(model, 3)
    texts = torch.cat([texts, texts[:1].flip(0)])
    scores = model.match_scores(model.image_side(images)[1], model.text_side(texts)[1])
    assert scores.shape == (len(model.msa_cfg.image_scales), 3, 4)
    assert scores.std(dim=(1, 2)).min() > 1e-6
    for i in range(3):
        for t in range(4):
            alone = model.match_scores(model.image_side(images[i : i + 1])[1], model.text_side(texts[t : t + 1])[1])
            torch.testing.assert_close(alone[:, 0, 0], scores[:, i, t])
    if name == "MSA-tiny-BERT":
        assert ((scores > 0) & (scores < 1)).all()  # sigmoids


@pytest.mark.parametrize("padding", [False, True])
def test_padding_is_attended_to_where_configured(padding: bool, tiny_bert: Path) -> None:
    """A longer context adds padding and no words: the scores stay, unless the padding is attended to."""
    model = randomised(build(text=tiny.bert_text(tiny_bert), text_tokens={"padding": padding})).eval()
    images, texts = batch(model)
    side = model.image_side(images)[1]
    short, long = (model.match_scores(side, model.text_side(ids)[1]) for ids in (texts, F.pad(texts, (0, 4))))
    assert torch.allclose(short, long, atol=1e-5) != padding


@pytest.mark.parametrize("first", [False, True])
def test_the_first_token_is_attended_to_where_configured(first: bool) -> None:
    model = build(text_tokens={"first": first})
    texts = tiny.texts()
    mask = model.text_side(texts)[1].mask
    assert mask.sum(dim=1).tolist() == ((texts != 0).sum(dim=1) - int(not first)).tolist()


def test_get_logits_fuses_cosine_and_match_scores() -> None:
    model = randomised(build(ranking={"match_weight": 0.7})).eval()
    images, texts = batch(model, 3)
    per_image, per_text = model.get_logits(images, texts[:2])
    cosine = model.encode_image(images, normalize=True) @ model.encode_text(texts[:2], normalize=True).T
    match = model.match_scores(model.image_side(images)[1], model.text_side(texts[:2])[1])
    torch.testing.assert_close(per_image, model.logit_scale.exp() * cosine + 0.7 * match.mean(0))
    assert torch.equal(per_text, per_image.T)
    torch.testing.assert_close(model.rank_scores(cosine, None), model.logit_scale.exp() * cosine)
    fixed = build(ranking={"global_weight": 2.0})
    torch.testing.assert_close(fixed.rank_scores(cosine, match), 2 * cosine + match.mean(0))


def test_stored_scale_vectors_score_as_their_images() -> None:
    model = randomised(create()).eval()
    images, _ = batch(model)
    feature, side = model.image_side(images)
    stored_feature, pooled = model.pooled_scales(images)
    assert torch.equal(stored_feature, feature)
    torch.testing.assert_close(tuple(model.fold_image(pooled)), tuple(side))


def test_a_model_without_mscmat_says_so() -> None:
    model = build(loss={"fused_weight": 0, "match_weight": 0, "consistency_weight": 0}).eval()
    images, texts = batch(model)
    assert not [name for name, _ in model.named_parameters() if name.startswith("mscmat")]
    per_image, _ = model.get_logits(images, texts)
    image_features, text_features = model.encode_image(images, normalize=True), model.encode_text(texts, normalize=True)
    torch.testing.assert_close(per_image, model.logit_scale.exp() * image_features @ text_features.T)
    for score in (lambda: model.image_side(images), lambda: model.text_side(texts)):
        with pytest.raises(ValueError, match=r"has no MSCMAT; give msa_cfg\.loss\.fused_weight a value above 0"):
            score()


def test_zero_shot_classification_as_with_any_open_clip_model() -> None:
    model = randomised(create()).eval()
    tokenizer = open_clip.get_tokenizer("MSA-tiny-ViT")
    weights = build_zero_shot_classifier(model, tokenizer, ["planes", "trees", "a lake"], ["a photo of {}.", "{}"])
    for column, name in enumerate(("planes", "trees", "a lake")):
        features = model.encode_text(tokenizer([f"a photo of {name}.", name]), normalize=True)
        torch.testing.assert_close(weights[:, column], F.normalize(features.mean(0), dim=0))


# ---- what it trains


SCALES_WITH_ALL_POOLS = [
    {"stage": 1, "pool": "learned"},
    {"stage": 2, "pool": "max"},
    {"stage": 2, "pool": "token"},
    {"stage": 3, "pool": "avg"},
]
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"preset": "paper", "heads": 4},
    "tower": {"fusion": "tower"},
    "scales": {"fusion": "scales"},
    "shallow scales": {"fusion": "scales", "image_scales": [{"stage": 1}, {"stage": 2}]},
    "pools": {"image_scales": SCALES_WITH_ALL_POOLS},
    "pools, scales": {"image_scales": SCALES_WITH_ALL_POOLS, "fusion": "scales"},
    "pools, plain": {
        "image_scales": SCALES_WITH_ALL_POOLS,
        "fusion": "tower",
        "loss": {"fused_weight": 0, "match_weight": 0, "consistency_weight": 0},
    },
    "regularised": {
        "image_scales": [{"stage": 1, "pool": "max_avg"}, {"stage": 3, "pool": "max_avg"}],
        "scale_inputs": {"norm": "batch", "dropout": 0.3},
        "fusion_hidden": 31,
    },
    "layer norm": {"scale_inputs": {"norm": "layer"}, "fusion_hidden": 31},
    "one scale": {"image_scales": [{"stage": 3}]},
    "triplet": {"loss": {"global_term": "triplet"}},
    "triplet, fused at a fixed weight": {"loss": {"global_term": "triplet"}, "ranking": {"global_weight": 2.0}},
    "match": {"loss": {"match_weight": 0.25}},
    "consistency": {"loss": {"consistency_weight": 0.25}},
    "all terms": {"loss": {"match_weight": 0.25, "consistency_weight": 0.25}},
    "match alone": {"loss": {"global_weight": 0, "fused_weight": 0, "match_weight": 1}},
    "no global": {"loss": {"global_weight": 0}},
    "no mscmat": {"loss": {"fused_weight": 0, "match_weight": 0, "consistency_weight": 0}},
    "one direction": {"loss": {"match_weight": 1, "match_directions": "image_to_text", "consistency": "released"}},
    "sigmoid": {"score": {"form": "sigmoid", "gate": "plain", "temperature": None}},
    "width": {"width": 20, "heads": 5, "text_tokens": {"first": True, "padding": True}},
}
FROZEN = {
    "paper": {"logit_scale", "visual.proj"},
    "scales": {"visual.proj"},
    "pools, scales": {"visual.proj"},
    "pools, plain": {"image_scales.pools.0.query.weight"},
    "triplet, fused at a fixed weight": {"logit_scale"},
}


def parameters_without_gradient(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trainable_parameter_has_a_gradient(variant: str) -> None:
    """DistributedDataParallel stops at a parameter without one. And nothing is frozen that a loss could reach."""
    model = build(**VARIANTS[variant])
    losses = train_step(model, *batch(model))
    assert all(bool(value.isfinite()) for value in losses.values())
    assert parameters_without_gradient(model) == set()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if variant == "shallow scales":
        assert {name for name in frozen if "resblocks.2" not in name} == {"visual.proj"}
    else:
        assert frozen == FROZEN.get(variant, set())


@pytest.mark.parametrize("vision", ["RN", "timm-RN", "timm-ViT"])
@pytest.mark.parametrize("fusion", ["scales", "tower", "both"])
def test_every_image_tower_trains_in_every_fusion(vision: str, fusion: str) -> None:
    changes = {"timm_proj": "linear"} if vision == "timm-RN" and fusion != "scales" else None
    model = build(vision, image=changes, fusion=fusion)
    train_step(model, *batch(model))
    assert parameters_without_gradient(model) == set()
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"visual", "text", "logit_scale", "mscmat", *(["fusion"] if fusion != "tower" else [])}


def test_hugging_face_towers_train_every_parameter() -> None:
    model = create("MSA-tiny-BERT", output_dict=True)
    losses = train_step(model, *batch(model))
    assert {*losses} == {"triplet_loss", "match_loss", "consistency_loss"}
    assert parameters_without_gradient(model) == set()
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["logit_scale"]


def test_a_tower_without_projection_needs_the_fusion_that_ignores_it() -> None:
    with pytest.raises(ValueError, match=r"vision_cfg\.timm_proj: 'none' leaves the image tower 96 features where emb"):
        build("timm-RN", fusion="both")


def test_the_pooler_that_keeps_cls_to_itself(tiny_bert: Path) -> None:
    """open_clip's `cls_pooler` hands on the tokens without the first: the mask follows, and `first` is refused."""
    text = {**tiny.bert_text(tiny_bert), "hf_pooler_type": "cls_pooler"}
    model = build(text=text)
    texts = tiny.texts(vocabulary=len(tiny.VOCABULARY) - 2)
    side = model.text_side(texts)[1]
    assert side.key.shape[2] == side.mask.shape[1] == tiny.CONTEXT_LENGTH - 1
    assert side.mask.sum(dim=1).tolist() == ((texts != 0).sum(dim=1) - 1).tolist()
    with pytest.raises(ValueError, match=r"msa_cfg\.text_tokens\.first: text_cfg\.hf_pooler_type 'cls_pooler' keeps"):
        build(text=text, text_tokens={"first": True})


# ---- locks and checkpointing


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", KINDS)
def test_locking_the_image_tower_leaves_the_rest_to_train(name: str) -> None:
    model = create(name, output_dict=True)
    before = trainable(model)
    model.lock_image_tower(unlocked_groups=0, freeze_bn_stats=True)
    assert trainable(model) == {key for key in before if not key.startswith("visual.")}
    train_step(model, *batch(model))
    assert parameters_without_gradient(model) == set()


@pytest.mark.parametrize("variant", ["default", "paper"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_unlocked_groups_train_where_a_loss_reaches_them(variant: str, groups: int) -> None:
    model = build(**VARIANTS[variant])
    model.lock_image_tower(unlocked_groups=groups)
    train_step(model, *batch(model))
    assert parameters_without_gradient(model) == set()
    unlocked = {"proj"} if variant == "default" else set()
    unlocked |= {"ln_post", "resblocks.2"} if groups >= 2 else set()
    unlocked |= {"resblocks.1"} if groups >= 3 else set()
    names = [name for name in trainable(model) if name.startswith("visual.")]
    assert {part for part in ("proj", "ln_post", "resblocks.2", "resblocks.1", "resblocks.0", "conv1") if any(
        name.removeprefix("visual.").removeprefix("transformer.").startswith(part) for name in names
    )} == unlocked  # fmt: skip


@pytest.mark.parametrize(("name", "layers"), [("MSA-tiny-ViT", 0), ("MSA-tiny-ViT", 1), ("MSA-tiny-BERT", 0)])
def test_locking_the_text_tower_leaves_the_rest_to_train(name: str, layers: int) -> None:
    model = create(name, output_dict=True)
    before = trainable(model)
    model.lock_text_tower(unlocked_layers=layers, freeze_layer_norm=True)
    locked = before - trainable(model)
    assert locked
    assert all(key.startswith("text.") for key in locked)
    train_step(model, *batch(model))
    assert parameters_without_gradient(model) == set()


def test_grad_checkpointing_recomputes_and_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    recomputed = []
    original = open_clip.transformer.checkpoint
    monkeypatch.setattr(
        open_clip.transformer, "checkpoint", lambda *args, **kwargs: recomputed.append(1) or original(*args, **kwargs)
    )
    gradients = []
    for enable in (False, True):
        model = randomised(build())
        model.set_grad_checkpointing(enable)
        train_step(model, *batch(model))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert len(recomputed) == 3 + 2  # blocks of the image tower, layers of the text tower
    torch.testing.assert_close(gradients[1], gradients[0])


# ---- precision and compilation


PRECISIONS = ("fp32", "amp_bf16", "bf16", "pure_bf16")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", KINDS)
def test_precisions(name: str, precision: str) -> None:
    reference = randomised(create(name), seed=1).eval()
    images, texts = batch(reference)
    model = create(name, precision=precision, output_dict=True).eval()
    model.load_state_dict(reference.state_dict())
    inputs = images.to(get_input_dtype(precision) or torch.float32)
    expected = reference.get_logits(images, texts)[0]
    rounding = 0.0 if precision == "fp32" else 0.05 * float(expected.detach().abs().max())
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "amp_bf16" else contextlib.nullcontext()
    with autocast:
        logits = model.get_logits(inputs, texts)[0]
        torch.testing.assert_close(logits.float(), expected, rtol=0, atol=rounding + 1e-6)
        losses = train_step(model, inputs, texts)
    assert all(value.isfinite() for value in losses.values()), losses
    assert {value.dtype for key, value in losses.items() if key != "contrastive_loss"} == {torch.float32}
    assert parameters_without_gradient(model) == set()
    for key, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", KINDS)
def test_low_precision_converts_the_head_as_open_clip_does_the_towers(name: str) -> None:
    pure = create(name, precision="pure_bf16")
    assert {parameter.dtype for parameter in pure.parameters()} == {torch.bfloat16}
    mixed = dict(create(name, precision="bf16").named_parameters())
    wide = {key for key, parameter in mixed.items() if parameter.dtype == torch.float32}
    narrow = {*mixed} - wide
    assert {
        "mscmat.scales.0.attention.in_proj_weight",
        "mscmat.scales.0.match.weight",
        "fusion.project.0.bias",
    } < narrow
    if name != "MSA-tiny-BERT":  # open_clip converts models with a timm tower as a whole
        assert {"logit_scale", "mscmat.ln_image.weight", "mscmat.scales.0.logit_scale"} < wide


@pytest.mark.parametrize("name", ["MSA-tiny-ViT", "MSA-tiny-RN"])
def test_compilation_changes_no_number(name: str) -> None:
    torch._dynamo.reset()
    model = randomised(create(name, output_dict=True))
    images, texts = batch(model)
    expected = train_step(model, images, texts)
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(images, texts)
    losses: Any = MSALoss(model.msa_cfg)(**output, output_dict=True)
    torch.stack(list(losses.values())).sum().backward()
    torch.testing.assert_close(losses, expected)
    compiled = {key: parameter.grad for key, parameter in model.named_parameters()}
    torch.testing.assert_close(compiled, gradients, rtol=1e-4, atol=1e-5)


# ---- forced geometry


def test_forced_geometry_reaches_both_towers() -> None:
    model = create(force_context_length=9, force_image_size=48, output_dict=True)
    assert model.context_length == 9
    assert tuple(model.visual.image_size) == (48, 48)
    losses = train_step(model, torch.randn(BATCH, 3, 48, 48), tiny.texts(length=9))
    assert all(value.isfinite() for value in losses.values())
    assert parameters_without_gradient(model) == set()


def test_forced_geometry_takes_a_warm_start_of_another_size(tmp_path: Path) -> None:
    base = create("tiny-ViT")
    torch.save(base.state_dict(), tmp_path / "base.pt")
    options = {"pretrained": str(tmp_path / "base.pt"), "force_context_length": 9, "force_image_size": 48}
    model, twin = create("MSA-tiny-ViT", **options), create("tiny-ViT", **options)
    images, texts = tiny.images(model), tiny.texts(length=9)
    assert torch.equal(model.encode_image(images), twin.encode_image(images))
    assert torch.equal(model.encode_text(texts), twin.encode_text(texts))


def test_forced_quick_gelu_is_the_base_models_quick_gelu(tmp_path: Path) -> None:
    base = create("tiny-ViT", force_quick_gelu=True).eval()
    torch.save(base.state_dict(), tmp_path / "base.pt")
    quick, exact = (
        create("MSA-tiny-ViT", pretrained=str(tmp_path / "base.pt"), force_quick_gelu=flag).eval()
        for flag in (True, False)
    )
    images, texts = batch(quick)
    assert torch.equal(quick.encode_image(images), base.encode_image(images))
    assert torch.equal(quick.encode_text(texts), base.encode_text(texts))
    assert not torch.allclose(exact.encode_image(images), base.encode_image(images))


def test_a_wrong_configuration_is_refused_by_create_model() -> None:
    with pytest.raises(ValueError, match=r"^msa_cfg\.heads: width 24 is not divisible by 5 heads; allowed are 1, 2, 3"):
        create(msa_cfg={"image_scales": [{"stage": 1}], "heads": 5})
    with pytest.raises(ValueError, match=r"^msa_cfg\.image_scales\[0\]: stage 7 does not exist; VisionTransformer has"):
        create(msa_cfg={"image_scales": [{"stage": 7}]})


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_whole(copied: Callable[[Any], Any]) -> None:
    model = randomised(create()).eval()
    images, texts = batch(model)
    expected = model.get_logits(images, texts)[0].detach()
    other = copied(model)
    randomised(model, seed=1)
    assert torch.equal(other.get_logits(images, texts)[0], expected)


def test_settings_may_be_given_in_python() -> None:
    cfg = MSACfg.from_dict({"image_scales": [{"stage": 2, "pool": "max"}], "heads": 2})
    model = create("tiny-ViT", msa_cfg=cfg)
    assert isinstance(model, MSACLIP)
    assert model.msa_cfg is cfg
    assert isinstance(model.image_side(tiny.images(model))[1], ImageSide)
    assert isinstance(model.text_side(tiny.texts())[1], TextSide)
