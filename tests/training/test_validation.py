"""Validation while training: our metrics in open_clip's own record, for MSA models, on one process and on two."""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import open_clip_train.train
import pytest
import torch
import torch.distributed as dist
from helpers.host import HAS_TASKS, make_batch, trained
from helpers.processes import run_new_python, spawn_ranks
from helpers.retrieval_data import Oracle, Tokenizer, randomise, write_captioned_scenes, write_shards
from helpers.trapped_models import local_dir

from msa_openclip.data.captioned import EvalDataError
from msa_openclip.data.foreign_code import ForeignCodeError
from msa_openclip.data.readers import read_shards
from msa_openclip.distributed import PeerError, Peers, failing_together
from msa_openclip.evaluation.eval_set import EvalSet
from msa_openclip.evaluation.evaluate import evaluate
from msa_openclip.evaluation.scorer import Scorer
from msa_openclip.plugin.installed import installed
from msa_openclip.training import validation as train_evaluation

ON_CPU_RANKS = Path(__file__).parents[1] / "helpers" / "on_cpu_ranks.py"
Train = Callable[..., list[dict[str, float]]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Patterns of the same 7 scenes in both layouts."""
    folder = tmp_path_factory.mktemp("shards")
    return {layout: write_shards(folder / layout, layout) for layout in ("image", "pair")}


@pytest.fixture
def train(tiny_configs: Path, tmp_path: Path, shards: dict[str, str]) -> Train:
    """Run open_clip's own trainer as a user does; the lines of results.jsonl."""

    def run(model: str, val: str, *flags: str, ranks: int = 1, **environment: str) -> list[dict[str, float]]:
        launch = ["open_clip_train.main"] if ranks == 1 else ["torch.distributed.run", "--standalone"]
        launch += [f"--nproc_per_node={ranks}", str(ON_CPU_RANKS)] if ranks > 1 else []
        command = [
            *("-m", *launch, "--model", model, "--val-data", shards[val]),
            *("--batch-size", "4", "--workers", "1", "--device", "cpu", "--name", "run"),
            *("--dataset-type", "webdataset", "--val-num-samples", "7", "--precision", "fp32", *flags),
        ]
        environment = {**os.environ, "MSA_OPENCLIP_CONFIGS": str(tiny_configs), **environment}
        # Its log folder is ./logs; torchrun would take --logs for an option of its own.
        done = run_new_python(*command, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        lines = (tmp_path / "logs" / "run" / "checkpoints" / "results.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


def training(shards: dict[str, str]) -> tuple[str, ...]:
    return ("--train-data", shards["pair"], "--train-num-samples", "16", "--epochs", "2", "--warmup", "1")


def checkpoint_record(name: str, tmp_path: Path, pattern: str) -> dict[str, float]:
    """What the evaluator finds for the last checkpoint of the run."""
    path = str(tmp_path / "logs" / "run" / "checkpoints" / "epoch_2.pt")
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=path)
    data = EvalSet(read_shards(pattern), pattern)
    return train_evaluation.record(evaluate(Scorer(model.eval()), data, transform, open_clip.get_tokenizer(name)))


def test_training_reports_our_metrics_beside_open_clips(train: Train, shards: dict[str, str], tmp_path: Path) -> None:
    first, second = train("MSA-tiny-ViT", "pair", *training(shards))
    expected = checkpoint_record("MSA-tiny-ViT", tmp_path, shards["image"])  # pairs are put together again
    assert {key: second[key] for key in expected} == pytest.approx(expected, abs=1e-3)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert "image_to_text_R@1" in second
    assert "clip_val_loss" in second
    assert {f"retrieval_{name}_mR" for name in ("global", "match", "fused", "match_scale1", "fused_scale2")} < set(
        second
    )
    assert 0 <= second["retrieval_fused_t2i_R@1"] <= 100


@pytest.mark.parametrize(
    "flags",
    [(), pytest.param(("--fsdp",), marks=pytest.mark.skipif(not HAS_TASKS, reason="open_clip 4.x shards models"))],
)
def test_two_ranks_share_the_work_and_report_once(
    flags: tuple[str, ...], train: Train, shards: dict[str, str], tmp_path: Path
) -> None:
    """Also where the ranks have parts of the model: what is evaluated, and saved, is the whole one."""
    lines = train("MSA-tiny-ViT", "image", *training(shards), *flags, ranks=2)
    assert len(lines) == 2
    expected = checkpoint_record("MSA-tiny-ViT", tmp_path, shards["image"])
    assert {key: lines[1][key] for key in expected} == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("wanted", "reported"), [("msa", False), ("all", True)])
def test_other_models_only_if_asked(train: Train, wanted: str, reported: bool) -> None:
    (line,) = train("tiny-ViT", "image", "--save-most-recent", MSA_OPENCLIP_EVALUATE=wanted)
    assert "image_to_text_R@1" in line
    assert any(key.startswith("retrieval_") for key in line) == reported


def arguments(pattern: str, folder: Path, **settings: Any) -> SimpleNamespace:
    """What open_clip's parser would give."""
    return SimpleNamespace(
        **{
            "val_data": pattern,
            "dataset_type": "webdataset",
            "csv_img_key": "filepath",
            "csv_caption_key": "title",
            "csv_separator": "\t",
            "rank": 0,
            "world_size": 1,
            "distributed": False,
            "horovod": False,
            "precision": "fp32",
            "batch_size": 4,
            "workers": 0,
            "val_frequency": 1,
            "epochs": 4,
            "device": "cpu",
            "save_logs": True,
            "checkpoint_path": str(folder),
            "wandb": False,
            "local_rank": 0,
            "model": "tiny-ViT",
            **settings,
        }
    )


class Board:
    """Stands in for TensorBoard's writer."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value: float, epoch: int) -> None:
        self.scalars[name] = value


class NamedOracle(Oracle):
    """As open_clip's `evaluate` wants a model."""

    def __init__(self, *, constant: bool) -> None:
        super().__init__(constant=constant)
        self.visual = SimpleNamespace(preprocess_cfg={"size": 24, "mean": (0, 0, 0), "std": (1, 1, 1)})

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
        features = {"image_features": self.encode_image(image), "text_features": self.encode_text(text)}
        return features | {"logit_scale": torch.ones(())}


def validation(pattern: str) -> dict[str, Any]:
    """One batch, enough for open_clip's own part."""
    batch = make_batch(torch.full((1, 3, 24, 24), 20 / 255), Tokenizer()(["harbor number 0"]))
    loader = type("Loader", (list,), {"num_samples": 1})([batch])
    return {"val": SimpleNamespace(dataloader=loader)}


@pytest.mark.parametrize("constant", [False, True])
def test_the_log_says_100_for_a_perfect_model_and_chance_for_a_constant_one(
    constant: bool, shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSA_OPENCLIP_EVALUATE", "all")
    board = Board()
    returned = open_clip_train.train.evaluate(
        trained(NamedOracle(constant=constant)),
        validation(shards["pair"]),
        1,
        arguments(shards["pair"], tmp_path),
        tb_writer=board,
        tokenizer=Tokenizer(),
    )
    line = json.loads((tmp_path / "results.jsonl").read_text())
    chance = {k: 100 * (1 - math.comb(30, k) / math.comb(35, k)) for k in (1, 5, 10)}
    for k in (1, 5, 10):
        expected = chance[k] if constant else 100.0
        key = f"retrieval_global_i2t_R@{k}"
        assert line[key] == returned[key] == board.scalars[f"val/{key}"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "data"),
    [({"val_frequency": 3}, True), ({"val_frequency": 0}, True), ({"dataset_type": "synthetic"}, True), ({}, False)],
)
def test_not_when_open_clip_would_not_validate(
    settings: dict[str, Any], data: bool, shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSA_OPENCLIP_EVALUATE", "all")
    args = arguments(shards["pair"], tmp_path, **settings)
    loaders = validation(shards["pair"]) if data else {}
    found = open_clip_train.train.evaluate(trained(NamedOracle(constant=True)), loaders, 1, args, tokenizer=Tokenizer())
    assert not any(key.startswith("retrieval_") for key in found)


def test_csv(shards: dict[str, str], tmp_path: Path) -> None:
    source = Path(shards["image"]).parents[1] / "source" / "images"
    lines = [f"{source}/{name}\t{text}" for name, text in [("harbor_0.png", "one"), ("forest_1.png", "two")] * 2]
    table = tmp_path / "val.csv"
    table.write_text("\n".join(["filepath\ttitle", *lines]))
    args = arguments(str(table), tmp_path, dataset_type="auto")
    found = train_evaluation.retrieval_metrics(randomise(NamedOracle(constant=True)), args, Tokenizer())
    assert found["retrieval_global_t2i_R@1"] == pytest.approx(50)
    assert found["retrieval_global_merged_mR"] == pytest.approx((50 + 5 * 100) / 6 + 50 / 6 - 100 / 6)


def test_a_broken_image_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    captions = write_captioned_scenes(tmp_path, count=4)
    images = sorted((captions.parent / "images").iterdir())
    lines = [f"{path}\tcaption {number}" for number, path in enumerate(images)]
    whole, sound = tmp_path / "whole.csv", tmp_path / "sound.csv"
    whole.write_text("\n".join(["filepath\ttitle", *lines]))
    sound.write_text("\n".join(["filepath\ttitle", *lines[:2], *lines[3:]]))
    images[2].write_bytes(images[2].read_bytes()[:70])
    model, tokenizer = randomise(NamedOracle(constant=True)), Tokenizer()
    found, expected = (
        train_evaluation.retrieval_metrics(model, arguments(str(table), tmp_path, dataset_type="csv"), tokenizer)
        for table in (whole, sound)
    )
    assert found == expected
    assert f"{images[2]}: image {images[2]} cannot be read" in caplog.text
    sound.write_text("\n".join(["filepath\ttitle", lines[2]]))
    train_evaluation._validation_set.cache_clear()
    with pytest.raises(EvalDataError, match="no image can be read; the log names them"):
        train_evaluation.retrieval_metrics(model, arguments(str(sound), tmp_path, dataset_type="csv"), tokenizer)


def reading_rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        os.chdir(f"{folder}/{rank}")
        data = train_evaluation._validation_set("val.csv", True, "filepath", "title", "\t", Peers(rank, world_size))
        (Path(folder) / f"{rank}.json").write_text(json.dumps([image.captions[0] for image in data.images]))
    finally:
        dist.destroy_process_group()


def test_ranks_go_on_with_the_same_images_where_one_cannot_read_all(tmp_path: Path) -> None:
    for rank in range(2):
        source = write_captioned_scenes(tmp_path / str(rank), count=5)
        images = sorted((source.parent / "images").iterdir())
        lines = [f"images/{path.name}\tcaption {number}" for number, path in enumerate(images)]
        (source.parent / "val.csv").write_text("\n".join(["filepath\ttitle", *lines]))
    images[3].write_bytes(b"what rank 1 gets of an image that it tries")
    spawn_ranks(reading_rank, (2, str(tmp_path)), ranks=2)
    kept = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert kept == [[f"caption {number}" for number in (0, 1, 2, 4)]] * 2


def test_bad_setting_and_bad_shards_are_named(
    shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSA_OPENCLIP_EVALUATE", "yes")
    model, data = trained(NamedOracle(constant=True)), validation(shards["pair"])
    with pytest.raises(ValueError, match="MSA_OPENCLIP_EVALUATE: 'yes' is unknown; choose msa, all or off"):
        open_clip_train.train.evaluate(model, data, 1, arguments(shards["pair"], tmp_path), tokenizer=Tokenizer())
    monkeypatch.setenv("MSA_OPENCLIP_EVALUATE", "all")
    with pytest.raises(EvalDataError, match=r"nothing\.tar: FileNotFoundError. Check the name"):
        open_clip_train.train.evaluate(model, data, 1, arguments("nothing.tar", tmp_path), tokenizer=Tokenizer())


def no_whole_model(*_: Any) -> torch.nn.Module:
    raise ValueError("no memory for a whole model")


@pytest.mark.parametrize("trouble", ["shard", "json", "scores", "weights"])
def test_validation_costs_no_checkpoint(
    trouble: str,
    shards: dict[str, str],
    tiny_configs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While training what fails is logged and open_clip goes on to its checkpoint; without training it is raised."""
    model = open_clip.create_model("MSA-tiny-ViT")
    pattern = str(tmp_path / "val.tar")
    data = validation(shards["pair"])
    with tarfile.open(pattern, "w") as tar:
        for name, content in (("a.png", b"x"), ("a.txt", b"x"), ("a.json", b"[1]" if trouble == "json" else b"{}")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    if trouble == "scores":
        pattern = shards["pair"]
        torch.nn.init.constant_(model.visual.ln_post.weight, float("nan"))
    if trouble == "weights":
        monkeypatch.setattr(installed(), "whole_model", no_whole_model)
    args = arguments(pattern, tmp_path)
    args.model = "MSA-tiny-ViT"
    tokenizer = open_clip.get_tokenizer("MSA-tiny-ViT")
    with pytest.raises(ValueError, match=r"a\.json: expected an object|no image can be read|not finite|no memory"):
        open_clip_train.train.evaluate(model, data, 1, args, tokenizer=tokenizer)
    data["train"] = data["val"]
    monkeypatch.setattr(open_clip_train.train, "get_clip_metrics", lambda *_, **__: {})
    open_clip_train.train.evaluate(model, data, 1, args, tokenizer=tokenizer)
    assert "No retrieval metrics of this epoch; training goes on." in caplog.text


def test_a_plain_models_tokenizer_runs_no_code_of_its_folder(
    shards: dict[str, str], tmp_path: Path, tiny_bert: Path
) -> None:
    spec = local_dir(tmp_path / "model", tiny_bert, tmp_path / "trap", "tokenizer", plain=True, trust_remote_code=True)
    given = arguments(shards["pair"], tmp_path, model=spec)
    with pytest.raises(ForeignCodeError, match=r"text_cfg\.tokenizer_kwargs\.trust_remote_code"):
        train_evaluation.retrieval_metrics(NamedOracle(constant=True), given)
    assert not (tmp_path / "trap").exists()


def test_bad_validation_data_is_refused_before_training(shards: dict[str, str], tmp_path: Path) -> None:
    pattern = tmp_path / "val.tar"
    with tarfile.open(pattern, "w") as tar:
        for name, content in (("a.png", b"x"), ("a.txt", b"x"), ("a.json", b"[1]")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    command = ["-m", "open_clip_train.main", "--model", "MSA-ViT-Ti", "--val-data", str(pattern)]
    command += [*training(shards), "--batch-size", "4", "--workers", "0", "--device", "cpu", "--name", "run"]
    command += ["--dataset-type", "webdataset", "--val-num-samples", "7", "--precision", "fp32"]
    done = run_new_python(*command, cwd=tmp_path)
    assert done.returncode == 1
    assert "sample a: a.json: expected an object, got list." in done.stderr
    assert "Start epoch" not in done.stderr + done.stdout


def rank_without_memory(rank: int, world_size: int, folder: str) -> None:
    """The second rank cannot take the whole model; the first must not begin to share the images with it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    args = SimpleNamespace(rank=rank, world_size=world_size, distributed=True)
    whole_model = torch.nn.Identity if rank == 0 else no_whole_model
    Path(folder, str(rank)).write_text(str(train_evaluation.metrics_or_none(whole_model, {"train": None}, args)))
    dist.destroy_process_group()


def test_weights_that_one_rank_cannot_gather_cost_no_checkpoint(tmp_path: Path) -> None:
    spawn_ranks(rank_without_memory, (2, str(tmp_path)), ranks=2)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["{}", "{}"]


def failing_rank(rank: int, world_size: int, folder: str) -> None:
    """One rank cannot go on; the other must not wait for it."""
    file = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=world_size)
    try:
        with failing_together(Peers(rank, world_size)):
            if rank == 1:
                raise ValueError("no such image")
    except (ValueError, PeerError) as error:
        Path(folder, str(rank)).write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


def test_ranks_fail_together(tmp_path: Path) -> None:
    spawn_ranks(failing_rank, (2, str(tmp_path)), ranks=2)
    said = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert said == ["PeerError: rank 1: ValueError: no such image", "ValueError: no such image"]
