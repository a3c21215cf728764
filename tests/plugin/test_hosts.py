"""The seam: whichever line of open_clip is installed trains MSA models by its adapter, an unknown one is refused."""

from __future__ import annotations

import importlib
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from helpers import stream_data, tiny
from helpers.host import DEFAULTS, HAS_TASKS, loss_of
from torch import nn

from msa_openclip import MSALoss
from msa_openclip.model.cached import CachedImages, CachedTexts, Source
from msa_openclip.model.labelled import LabelledTexts, from_dicts
from msa_openclip.plugin.host import has, note_lacking, takes, uses
from msa_openclip.plugin.installed import installed
from msa_openclip.plugin.trainer import extend_train_data
from msa_openclip.training.shares import ShardDataError

Run = Callable[..., subprocess.CompletedProcess[str]]

only_4 = pytest.mark.skipif(not HAS_TASKS, reason="open_clip 4.x is not installed")
pytestmark = pytest.mark.usefixtures("tiny_configs")

ARGS = {**DEFAULTS, "rank": 0, "world_size": 1, "accum_freq": 1, "distributed": False}


def test_the_adapter_is_that_of_the_installed_line() -> None:
    assert type(installed()).__module__ == f"msa_openclip.plugin.host_{4 if HAS_TASKS else 3}"
    assert installed() is installed()


def test_needs_are_told_by_name() -> None:
    module: Any = ModuleType("somewhere")
    exec(
        "kept = 1\ndef build(args, model): return kept + helper(args)\nclass Task:\n    def run(self): self.loss()",
        vars(module),
    )
    met = (has("kept"), takes("build", "args"), uses("build", "helper"), uses("Task.run", "loss"))
    unmet = (
        has("gone"),
        takes("build", "loss_type"),
        takes("gone", "args"),
        uses("build", "loss"),
        uses("Task.stop", "x"),
    )
    assert note_lacking(module, met + unmet) == [
        "gone", "build(loss_type)", "gone(args)", "build that uses loss", "Task.stop that uses x",
    ]  # fmt: skip
    assert note_lacking(module, met) == []  # what is lacking refuses all training: none of this may stay


REFUSED = """
import open_clip, open_clip_train.train
from argparse import Namespace
open_clip_train.train.evaluate = lambda: None
import msa_openclip
args = Namespace(model="MSA-tiny-ViT", rank=0, world_size=1, accum_freq=1)
try:
    if hasattr(open_clip, "create_task"):
        open_clip.create_task(args, open_clip.create_model("MSA-tiny-ViT"))
    else:
        open_clip.create_loss(args)
except RuntimeError as error:
    print(error)
"""


def test_a_trainer_that_we_do_not_know_is_refused_before_training(run_python: Run) -> None:
    done = run_python(REFUSED, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "lacks evaluate(data, epoch, args, tokenizer), evaluate that uses zero_shot_eval" in done.stdout
    assert done.stdout.endswith("which msa_openclip extends; MSA models need open_clip_torch>=3.3,<5.\n")


@pytest.mark.parametrize("flag", ["distill", "siglip"])
def test_other_models_meet_their_own_losses(flag: str) -> None:
    assert type(loss_of(Namespace(model="tiny-ViT", loss_dist_impl=None))).__module__ == "open_clip.loss"
    if not HAS_TASKS:
        assert type(loss_of(Namespace(model="tiny-ViT", loss_dist_impl=None, **{flag: True}))).__name__ != "ClipLoss"


# ---- 4.x


def task_of(name: str, **changes: Any) -> Any:
    args = Namespace(model=name, **{**ARGS, **changes})
    return open_clip.create_task(args, open_clip.create_model(name, output_dict=True)), args


@only_4
def test_the_task_is_the_hosts_own_with_our_loss() -> None:
    task, _ = task_of("MSA-tiny-ViT")
    assert type(task) is open_clip.CLIPTask
    assert isinstance(task.loss, MSALoss)
    batch = {"image": tiny.images(task.trainable_module), "text": tiny.texts()}
    losses, report = task.train()(batch)
    assert set(losses) == {"contrastive_loss", "fused_loss", "loss"}
    assert losses["loss"] == losses["contrastive_loss"] + losses["fused_loss"]
    assert set(report) == {"logit_scale"}


@only_4
def test_the_models_own_path_through_evaluation_is_the_one_that_open_clip_takes() -> None:
    """4.x calls what lies behind `encode_image`; without ours, its features would lack the scales."""
    model = open_clip.create_model("MSA-tiny-ViT", output_dict=True).eval()
    nn.init.normal_(model.fusion.project[0].weight)
    images = tiny.images(model)
    assert torch.equal(model(images, tiny.texts())["image_features"], model.encode_image(images, normalize=True))


@only_4
def test_averaged_weights_are_evaluated() -> None:
    task, args = task_of("MSA-tiny-ViT")
    task.setup_ema(decay=0.5)
    with torch.no_grad():
        task.trainable_module.logit_scale.add_(1)
    assert installed().whole_model(task, args) is task.trainable_module_ema.module
    state = task.state_dict()
    assert set(state["state_dict_ema"]) == set(open_clip.create_model("MSA-tiny-ViT").state_dict())


@only_4
def test_ranks_without_data_of_their_own_evaluate_samples_of_all_dates(tmp_path: Path) -> None:
    """With --fsdp; a rank that fails there leaves the first one waiting for it."""
    tiny.write_config(tmp_path, "MSA-tiny-three", tiny.config(msa={"dates": 3}))
    open_clip.add_model_config(tmp_path)
    task, _ = task_of("MSA-tiny-three")
    batch = task.create_dummy_batch(batch_size=2)
    assert batch["image"].shape == (2, 3, 3, 32, 32)
    assert task.eval()(batch)["image_features"].shape == (2, tiny.EMBED_DIM)


@only_4
def test_the_second_trainer_is_refused() -> None:
    legacy = importlib.import_module("open_clip_train.legacy_train")
    with pytest.raises(RuntimeError, match=r"legacy_main does not train MSA models; use open_clip_train\.main"):
        legacy.train_one_epoch(open_clip.create_model("MSA-tiny-ViT"), {}, None, 0, None, None, None, None, None)


@only_4
def test_micro_batches_of_texts_of_many_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="--accum-freq 2: MSA-tiny-ViT reads texts as long as each batch has them"):
        task_of("MSA-tiny-ViT", accum_freq=2, variable_text=True)


@only_4
def test_cached_outputs_of_towers_move_to_the_device_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without memory, where a tensor left behind would end the step."""
    monkeypatch.setattr("msa_openclip.model.msaclip.check_towers", lambda *_: None)
    task, args = task_of("MSA-tiny-ViT")
    model = task.trainable_module
    feature, pooled = model.image_scales(model.visual, tiny.images(model, 3))
    text_feature, tokens = model.text(tiny.texts(3))
    ids, mask = tiny.texts(3), torch.ones(3, tokens.shape[1], dtype=torch.bool)
    images = CachedImages(feature, tuple(pooled), Source("folder", "{}"))
    batch = installed().batches(args, None)(images, CachedTexts(ids, text_feature, tokens, mask))
    moved = task.prepare_batch(batch, torch.device("meta"), torch.bfloat16)
    assert task.batch_size(moved) == 3
    images, texts = from_dicts(moved["image"], moved["text"])
    floats = (images.feature, *images.pooled, texts.feature, texts.tokens)
    assert {tensor.dtype for tensor in floats} == {torch.bfloat16}
    assert (texts.ids.dtype, texts.mask.dtype) == (torch.int64, torch.bool)
    output = model.to(device="meta", dtype=torch.bfloat16).train()(**moved)
    assert {value.device.type for value in output.values()} == {"meta"}


@only_4
def test_scene_classes_move_to_the_device_with_the_texts() -> None:
    task, args = task_of("MSA-tiny-ViT")
    images, texts = tiny.images(task.trainable_module, 3), tiny.texts(3)
    batch = installed().batches(args, None)(images, LabelledTexts(texts, torch.tensor([4, 5, 4])))
    moved = task.prepare_batch(batch, torch.device("meta"), torch.float32)
    assert task.batch_size(moved) == 3
    _, labelled = from_dicts(moved["image"], moved["text"])
    assert isinstance(labelled, LabelledTexts)
    assert {labelled.texts.device.type, labelled.classes.device.type} == {"meta"}


class Tokens:
    """A tokenizer with a reserved id for padding."""

    context_length, pad_token_id = 7, 99


@only_4
def test_texts_are_cut_to_the_longest_of_a_batch() -> None:
    args = Namespace(variable_text=True, text_pad_multiple=2)
    texts = torch.tensor([[1, 2, 3, 99, 99, 99, 99], [1, 99, 99, 99, 99, 99, 99]])
    batch = installed().batches(args, Tokens())(torch.zeros(2, 3, 4, 4), texts)
    assert batch["text"].tolist() == [[1, 2, 3, 99], [1, 99, 99, 99]]
    assert torch.equal(batch["text_valid"], batch["text"] != 99)
    labelled = LabelledTexts(texts, torch.tensor([4, 5]))
    batch = installed().batches(args, Tokens())(torch.zeros(2, 3, 4, 4), labelled)
    assert batch["text"]["texts"].tolist() == [[1, 2, 3, 99], [1, 99, 99, 99]]
    assert batch["text"]["classes"].tolist() == [4, 5]


@only_4
def test_texts_of_like_length_go_together() -> None:
    settings = {"bucket_pool": 8, "bucket_chunk": 2, "bucket_prefetch_pools": 0, "seed": 0}
    args = Namespace(variable_text=True, length_bucketing=True, **settings)
    samples = [{"text": torch.tensor([1] * n + [99] * (7 - n))} for n in (5, 1, 3, 7, 2, 6, 4, 1)]
    found = [int((sample["text"] != 99).sum()) for sample in installed().reorder(args, Tokens(), 0)(samples)]  # type: ignore[misc]
    assert sorted(map(sorted, zip(found[::2], found[1::2], strict=True))) == [[1, 1], [2, 3], [4, 5], [6, 7]]
    assert installed().reorder(Namespace(variable_text=False, length_bucketing=True), Tokens(), 0) is None


@only_4
@pytest.mark.parametrize(
    ("settings", "config", "option"),
    [
        ({}, None, None),
        ({"json_text_key": "caption"}, None, "--json-text-key"),
        ({"image_key": "tif"}, None, "--image-key"),
        ({}, SimpleNamespace(), "--use-naflex"),
    ],
)
def test_the_hosts_pipeline_reads_what_it_alone_can(settings: dict[str, Any], config: Any, option: str | None) -> None:
    assert installed().reads_itself(Namespace(**settings), config) == option


@only_4
def test_the_hosts_pipeline_is_not_given_several_captions_for_one(tmp_path: Path) -> None:
    from open_clip_train.data import get_wds_dataset

    args = stream_data.arguments(stream_data.write_shards(tmp_path, [3]), image_key="png")
    with pytest.raises(
        ShardDataError, match=r"the first has 5\), and with --image-key open_clip reads the shards itself"
    ):
        get_wds_dataset(args, stream_data.image_number, is_train=True, tokenizer=stream_data.caption_numbers)


@only_4
def test_what_4_2_1_also_gives_to_its_pipeline_is_passed_on(tmp_path: Path) -> None:
    """Facts about the model (`model_traits`), without which its own loaders refuse to read; ours reads without."""

    def get_wds_dataset(  # type: ignore[no-untyped-def]
        args, preprocess_img, is_train, epoch=0, floor=False, tokenizer=None, naflex_data_config=None, model_traits=None
    ):
        return model_traits, naflex_data_config

    data = ModuleType("open_clip_train.data")
    vars(data).update(vars(importlib.import_module("open_clip_train.data")), get_wds_dataset=get_wds_dataset)
    extend_train_data(data)
    config, traits = SimpleNamespace(), SimpleNamespace()
    of_pairs = stream_data.arguments(stream_data.write_shards(tmp_path, [8], captions=1))
    of_pairs.val_data = None

    def read(config: Any, **changes: Any) -> Any:
        args = Namespace(**{**vars(of_pairs), **changes})
        named = {"tokenizer": stream_data.caption_numbers, "naflex_data_config": config, "model_traits": traits}
        return data.get_wds_dataset(args, stream_data.image_number, is_train=True, epoch=0, **named)

    assert read(None, model="ViT-B-32") == (traits, None)
    assert read(config) == (traits, config)
    assert read(None, image_key="png") == (traits, None)
    assert next(iter(read(None).dataloader))["image"].shape == (4, 1)


@only_4
def test_a_modern_text_tower() -> None:
    """Its tokens come by its configuration alone, and it may read texts as long as each batch has them."""
    text = {"context_length": 9, "vocab_size": 60, "width": 16, "heads": 2, "layers": 1}
    text |= {"text_arch": "modern", "variable_text": True, "pool_type": "eos", "eos_id": 59, "pad_id": 0}
    model = open_clip.create_model("MSA-tiny-ViT", text_cfg=text).train()
    ids = torch.tensor([[5, 6, 59, 0, 0], [7, 59, 0, 0, 0]])
    cut, whole = (model(tiny.images(model, 2), row) for row in (ids[:, :3], ids))
    torch.testing.assert_close(cut["text_features"], whole["text_features"])
    torch.testing.assert_close(MSALoss(model.msa_cfg)(**cut), MSALoss(model.msa_cfg)(**whole))
