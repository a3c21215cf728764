"""Shards of features: training on them equals training through the locked towers, in real processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import open_clip
import pytest
import torch
import torch.distributed as dist
from helpers import tiny
from helpers.host import HAS_TASKS, LOCKS_PROJECTIONS
from helpers.processes import run_new_python
from packaging.version import parse as parse_version
from safetensors.torch import load
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from msa_openclip.commands.main import main as cli
from msa_openclip.evaluation.loading import load as load_model
from msa_openclip.model.cached import CachedImages, CachedTexts, FeatureError, Source, check_towers, describe_towers
from msa_openclip.model.labelled import to_dicts
from msa_openclip.shards.command_line import main as shards
from msa_openclip.shards.storage.locking import BeingWritten, one_writer
from msa_openclip.shards.storage.tars import read_member, samples
from msa_openclip.training.feature_options import FeatureOptions
from msa_openclip.training.feature_writer import write_features
from msa_openclip.training.features import read_header

SCENES, VAL = 50, 6
LOCKED = ("--lock-image", "--lock-text", "--lock-text-freeze-layer-norm")
HELPERS = Path(__file__).parents[1] / "helpers"
PATTERN = "train-{000000..000003}.tar"
PROJECTIONS = ("visual.head.", "text.proj.")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_configs: Path) -> Path:
    """Configurations: CLIP's own towers; towers of timm and Hugging Face, whose projections learn, without dropout."""
    folder = tmp_path_factory.mktemp("models")
    bert = tiny.write_bert(folder / "bert")
    content = json.loads((bert / "config.json").read_text())
    content |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (bert / "config.json").write_text(json.dumps(content))
    text = tiny.bert_text(bert) | {"hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    configs = {
        "features-ViT": tiny.config("ViT", msa={}),
        "features-tower": tiny.config("ViT", msa={"fusion": "tower"}),
        "features-timm": tiny.config("timm-RN", text=text, msa={}),
        "features-paper": tiny.config("ViT", msa={"preset": "paper", "heads": 4}),
    }
    configs["features-timm"]["vision_cfg"] |= {"timm_proj": "linear", "image_size": 32}
    (folder / "configs").mkdir()
    for name, content in configs.items():
        tiny.write_config(folder / "configs", name, content)
    open_clip.add_model_config(folder / "configs")
    for name in configs:
        torch.manual_seed(3)
        torch.save(open_clip.create_model(name).state_dict(), folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of scenes of the size that the models take, so that nothing is resized or cropped."""
    folder = tmp_path_factory.mktemp("scenes")
    counts = ["--train", str(SCENES), "--val", str(VAL), "--test", "0", "--size-px", "32"]
    assert shards(["synthesize", str(folder), *counts, "--shards", "image"]) in (0, None)
    return folder


@pytest.fixture(scope="module")
def cached(models: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The features of a model, made by the command line, each kind once."""
    made: dict[tuple[str, ...], Path] = {}

    def make(name: str, *options: str) -> Path:
        if (name, *options) not in made:
            out = made[(name, *options)] = tmp_path_factory.mktemp("features")
            assert (
                cli(["features", f"{name}={models}/{name}.pt", str(out), "--shards", f"{scenes}/{PATTERN}", *options])
                == 0
            )
        return made[(name, *options)]

    return make


class Trained:
    """What a finished run leaves."""

    def __init__(self, folder: Path) -> None:
        self.losses = [float(line) for line in (folder / "losses").read_text().splitlines()]
        self.log = (folder / "run" / "out.log").read_text()
        (checkpoint,) = (folder / "run" / "checkpoints").glob("epoch_2.pt")
        self.weights = torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def train(models: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """open_clip_train.main on some shards with locked towers; returns what went wrong where `fails` is set."""

    def run(name: str, data: Path, *arguments: str, ranks: int = 1, fails: bool = False):  # type: ignore[no-untyped-def]
        folder = tmp_path_factory.mktemp("run")
        command = [
            str(HELPERS / "spy_on_losses.py"), str(folder / "losses"),
            "--model", name, "--pretrained", str(models / f"{name}.pt"), *LOCKED, "--train-data", f"{data}/{PATTERN}",
            "--batch-size", "10", "--lr", "3e-3", "--warmup", "2", "--epochs", "2", "--logs", str(folder), "--name",
            "run", "--device", "cpu", "--precision", "fp32", "--workers", "0", "--aug-cfg", "scale=(1.0,1.0)",
            *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "MSA_OPENCLIP_CONFIGS": str(models / "configs")}
        done = run_new_python(*command, env=environment, ranks=ranks)
        assert bool(done.returncode) == fails, done.stdout + done.stderr
        return done.stderr if fails else Trained(folder)

    return run


@pytest.mark.parametrize("name", ["features-ViT", "features-timm"])
def test_losses_equal_those_through_the_locked_towers(train, models, scenes, cached, name: str) -> None:  # type: ignore[no-untyped-def]
    through = train(name, scenes, *(["--lock-image-freeze-bn-stats"] if name == "features-timm" else []))
    of_features = train(name, cached(name, "--dtype", "float32"))
    assert len(through.losses) == 2 * SCENES // 10
    assert of_features.losses == pytest.approx(through.losses, abs=1e-5)
    assert of_features.losses[-1] < of_features.losses[0]
    # An ordinary checkpoint: all weights, the locked ones as they were, the others as through the towers.
    start = torch.load(models / f"{name}.pt", weights_only=True)
    assert set(of_features.weights) == set(start)
    learning = ("image_scales.", "fusion.", "mscmat.", "logit_scale", *([] if LOCKS_PROJECTIONS else PROJECTIONS))
    for key, value in of_features.weights.items():
        if not key.startswith(learning):
            assert value.equal(start[key]), key
        elif key in through.weights:
            torch.testing.assert_close(value, through.weights[key], atol=1e-3, rtol=1e-3)
            moves = not key.endswith(("in_proj_bias", "match.bias"))  # no score depends on the bias of the keys
            assert not moves or not value.equal(start[key]), key


@pytest.fixture(scope="module")
def plain(train, cached) -> Trained:  # type: ignore[no-untyped-def]
    """A run without further options."""
    trained: Trained = train("features-ViT", cached("features-ViT"))
    return trained


@pytest.mark.parametrize(
    "arguments",
    [
        ("--accum-freq", "2", "--batch-size", "5"),
        ("--precision", "amp_bf16"),
        ("--precision", "bf16"),
        ("--torchcompile",),
        ("--workers", "2"),
    ],
    ids=lambda arguments: "-".join(arguments).strip("-"),
)
def test_options_of_open_clip(train, cached, plain, arguments) -> None:  # type: ignore[no-untyped-def]
    run = train("features-ViT", cached("features-ViT"), *arguments)
    low = "bf16" in arguments[-1]
    pair = 2 if "--accum-freq" in arguments else 1  # each step computes its loss once for each micro-batch
    if "--workers" not in arguments:  # other readers, other batches
        assert run.losses[0::pair] == pytest.approx(plain.losses, rel=0.05 if low else 1e-3)
    assert run.losses[-1] < run.losses[0]


RANKS = ("--batch-size", "5", "--local-loss", "--gather-with-grad")


@pytest.fixture(scope="module")
def two_ranks(train, cached) -> Trained:  # type: ignore[no-untyped-def]
    """Two processes that share each batch."""
    trained: Trained = train("features-ViT", cached("features-ViT", "--dtype", "float32"), *RANKS, ranks=2)
    return trained


def test_two_ranks(train, scenes, two_ranks) -> None:  # type: ignore[no-untyped-def]
    through = train("features-ViT", scenes, *RANKS, ranks=2)
    assert "total 2" in two_ranks.log
    assert len(two_ranks.losses) == 2 * SCENES // 10
    assert two_ranks.losses == pytest.approx(through.losses, abs=1e-5)


@pytest.mark.skipif(not HAS_TASKS, reason="open_clip 4.x shards models")
def test_two_ranks_that_share_the_model(train, cached, two_ranks) -> None:  # type: ignore[no-untyped-def]
    sharded = train("features-ViT", cached("features-ViT", "--dtype", "float32"), *RANKS, "--fsdp", ranks=2)
    assert "FSDP2: sharding" in sharded.log
    assert sharded.losses == pytest.approx(two_ranks.losses, abs=1e-5)


def test_validation_goes_through_the_towers(train, cached, scenes) -> None:  # type: ignore[no-untyped-def]
    run = train("features-ViT", cached("features-ViT"), "--val-data", f"{scenes}/val-000000.tar")
    assert f"{VAL} images" in run.log
    assert "retrieval_fused_mR" in run.log


def test_fusion_tower_leaves_vectors_of_old_indexes_valid(train, models, cached) -> None:  # type: ignore[no-untyped-def]
    before = load_model(f"features-tower={models}/features-tower.pt").scorer.model
    run = train("features-tower", cached("features-tower"))
    after = open_clip.create_model("features-tower").eval()
    after.load_state_dict(run.weights)
    images, texts = tiny.images(before), tiny.texts()
    with torch.no_grad():
        assert after.encode_image(images).equal(before.encode_image(images))
        assert after.encode_text(texts).equal(before.encode_text(texts))
        assert not after.get_logits(images, texts)[0].equal(before.get_logits(images, texts)[0])


# ---- refusals


@pytest.mark.parametrize("lacking", LOCKED)
def test_towers_that_would_learn_are_refused(lacking: str, models: Path, cached, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from open_clip_train.params import parse_args

    from msa_openclip.training.loader import get_wds_dataset

    flags = [flag for flag in LOCKED if flag != lacking]
    args = parse_args(["--train-data", f"{cached('features-ViT')}/{PATTERN}", *flags])
    with pytest.raises(FeatureError, match=f"features of locked towers, which cannot learn; add {lacking}\\."):
        get_wds_dataset(args, None, True)  # type: ignore[arg-type]
    args = parse_args(
        ["--train-data", f"{cached('features-ViT')}/{PATTERN}", *LOCKED, "--lock-image-unlocked-groups", "1"]
    )
    with pytest.raises(FeatureError, match="leave out --lock-image-unlocked-groups"):
        get_wds_dataset(args, None, True)  # type: ignore[arg-type]


def test_features_of_other_weights_are_refused(train, models, cached) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(4)
    other = open_clip.create_model("features-ViT").state_dict()
    torch.save(other, models / "features-other.pt")
    errors = train(
        "features-ViT", cached("features-ViT"), "--pretrained", str(models / "features-other.pt"), fails=True
    )
    assert "made by towers with other weights than this model's. Start from the same ones (--pretrained" in errors


def test_shards_of_features_do_not_validate(train, cached) -> None:  # type: ignore[no-untyped-def]
    folder = cached("features-ViT")
    errors = train("features-ViT", folder, "--val-data", f"{folder}/{PATTERN}", fails=True)
    assert "features serve training; give --val-data the shards of images to rank" in errors


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_other_towers_are_told_apart_in_every_precision(precision: torch.dtype, models: Path) -> None:
    made_by = load_model(f"features-timm={models}/features-timm.pt").scorer.model
    source = Source("folder", json.dumps(describe_towers(made_by)))
    same = open_clip.create_model("features-timm", pretrained=str(models / "features-timm.pt"), weights_only=True)
    with torch.no_grad():
        same.visual.head.proj.weight.add_(1.0)  # it learns
        same.text.proj.weight.add_(1.0)
    check_towers(same.to(precision), source)
    with torch.no_grad():
        next(same.text.transformer.parameters()).view(-1)[0] += 1
    with pytest.raises(FeatureError, match="towers with other weights"):
        check_towers(same, source)
    other = open_clip.create_model("features-timm", force_image_size=48)
    with pytest.raises(FeatureError, match=r"folder: made with preprocess .*'size': .*32.*, the model has .*48"):
        check_towers(other, source)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(
    parse_version(torch.__version__) < parse_version("2.7"),
    reason="fully_shard with ignored parameters needs torch 2.7",
)
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_towers_of_a_sharded_model_are_told_apart(
    precision: torch.dtype | None, models: Path, one_rank: DeviceMesh
) -> None:
    """In the middle of a step, with some weights gathered, in its precision, others not, and blocks compiled."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = open_clip.create_model("features-ViT", pretrained=str(models / "features-ViT.pt"), weights_only=True)
    made_with = describe_towers(model)
    source = Source("folder", json.dumps(made_with))
    other = Source("other", json.dumps({**made_with, "weights": dict.fromkeys(made_with["weights"], "other")}))
    with torch.no_grad():
        ids = tiny.texts(3)
        feature, pooled = model.image_scales(model.visual, tiny.images(model, 3))
        text_feature, tokens = model.text(ids)
    policy = MixedPrecisionPolicy(param_dtype=precision)
    for tower in (model.visual, model.text):
        blocks = tower.transformer.resblocks
        for number, block in enumerate(blocks):
            blocks[number] = fully_shard(torch.compile(block, backend="eager"), mesh=one_rank, mp_policy=policy)
    fully_shard(model, mesh=one_rank, mp_policy=policy, ignored_params={model.logit_scale})  # it takes no scalars
    texts = CachedTexts(ids, text_feature, tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))
    image, text = to_dicts(CachedImages(feature, tuple(pooled), source), texts)
    assert torch.isfinite(model.train()(image, text)["image_features"]).all()
    with pytest.raises(FeatureError, match="other: made by towers with other weights"):
        model({**image, "source": other}, text)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"quick_gelu": True}, "quick_gelu"),
        ({"vision_cfg": {**tiny.VISION["ViT"], "pool_type": "avg"}}, "pool_type"),
        ({"text_cfg": {**tiny.TEXT, "final_ln_after_pool": True}}, "final_ln_after_pool"),
    ],
)
def test_equal_weights_under_another_configuration_are_refused(changes: dict, key: str, models: Path) -> None:
    source = Source("folder", json.dumps(describe_towers(open_clip.create_model("features-ViT"))))
    other = open_clip.create_model("features-ViT", **changes)
    with pytest.raises(FeatureError, match=f"folder: made with config .*, the model has .*{key}"):
        check_towers(other, source)


def test_features_of_another_tokenizer_do_not_train(models: Path, cached) -> None:  # type: ignore[no-untyped-def]
    from open_clip_train.params import parse_args

    from msa_openclip.training.loader import get_wds_dataset

    args = parse_args(["--train-data", f"{cached('features-ViT')}/{PATTERN}", *LOCKED])
    args.rank, args.world_size = 0, 1
    tokenizer = open_clip.SimpleTokenizer(context_length=tiny.CONTEXT_LENGTH, clean="canonicalize")
    with pytest.raises(FeatureError, match=r"made with another tokenizer than the run's, or other options"):
        get_wds_dataset(args, None, True, tokenizer=tokenizer)  # type: ignore[arg-type]


def test_pools_that_learn_are_refused(tiny_configs: Path) -> None:
    scales = [{"stage": 1, "pool": "max"}, {"stage": 3, "pool": "learned"}]
    model = open_clip.create_model("MSA-tiny-ViT", msa_cfg={"image_scales": scales, "heads": 4})
    with pytest.raises(FeatureError, match="pool 'learned' learns on whole maps"):
        describe_towers(model)


def test_plain_models_are_refused(tiny_configs: Path, scenes: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert cli(["features", "tiny-ViT=untrained", str(tmp_path), "--shards", f"{scenes}/{PATTERN}"]) == 1
    assert "features are of MSA models" in capsys.readouterr().err


# ---- what is written


def contents(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every sample of a folder of features by its key."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            for key, members in samples(file):
                (member,) = (member for member in members if member.extension == "features")
                found[key] = load(read_member(file, member))
    return found


def test_features_are_the_outputs_of_the_towers(models: Path, scenes: Path, cached) -> None:  # type: ignore[no-untyped-def]
    """What the model computes from them is what it computes from pixels and token ids."""
    from open_clip_train.params import parse_args

    from msa_openclip.training.loader import get_wds_dataset

    for name in ("features-timm", "features-paper"):
        loaded = load_model(f"{name}={models}/{name}.pt")
        model, batches = loaded.scorer.model.train(), []
        model.visual.eval()  # batch statistics
        for data in (scenes, cached(name, "--dtype", "float32")):
            args = parse_args(["--train-data", f"{data}/{PATTERN}", "--batch-size", "7", "--workers", "0", *LOCKED])
            args.rank, args.world_size = 0, 1
            info = get_wds_dataset(args, loaded.preprocess, True, tokenizer=loaded.tokenizer)
            batches.append(next(iter(info.dataloader)))
        assert isinstance(batches[1][0], CachedImages)
        assert isinstance(batches[1][1], CachedTexts)
        assert batches[1][1].ids.equal(batches[0][1])
        outputs = [model(*batch) for batch in batches]
        for key in outputs[0]:
            if not key.startswith("match_text_"):  # of these as many as the longest caption has
                torch.testing.assert_close(outputs[1][key], outputs[0][key], atol=1e-5, rtol=1e-5, msg=key)


def test_half_precision_is_the_default_and_half_the_size(models: Path, cached) -> None:  # type: ignore[no-untyped-def]
    single, half = (cached("features-ViT", *options) for options in (("--dtype", "float32"), ()))
    for key, fields in contents(single).items():
        other = contents(half)[key]
        assert other["images"].dtype == torch.float16
        for name in ("images", "features", "tokens"):
            torch.testing.assert_close(other[name].float(), fields[name], atol=1e-2, rtol=1e-2)


def test_views_are_augmented_and_drawn_by_epoch(models: Path, scenes: Path, cached) -> None:  # type: ignore[no-untyped-def]
    three = cached("features-ViT", "--views", "3", "--aug-cfg", "dihedral=True", "scale=(0.5,1.0)")
    found = contents(three)
    assert len(found) == SCENES
    assert all(len(fields["images"]) == 3 for fields in found.values())
    assert sum(bool((fields["images"][0] != fields["images"][1]).any()) for fields in found.values()) > 40
    from open_clip_train.params import parse_args

    from msa_openclip.training.loader import get_wds_dataset

    args = parse_args(["--train-data", f"{three}/{PATTERN}", "--batch-size", "10", "--workers", "0", *LOCKED])
    args.rank, args.world_size = 0, 1
    data = get_wds_dataset(args, None, True)  # type: ignore[arg-type]
    epochs = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        epochs.append(torch.cat([images.feature for images, _ in data.dataloader]))
    assert epochs[0].equal(epochs[2])
    stored = torch.cat([fields["images"][:, : epochs[0].shape[1]] for fields in found.values()]).float()
    assert all((stored == row).all(dim=1).any() for row in epochs[1])
    seen = {int(view) % 3 for row in epochs[0] for view in (stored == row).all(dim=1).nonzero()[:1]}
    assert seen == {0, 1, 2}


def test_the_same_command_finds_its_augmented_features_finished(models: Path, scenes: Path, cached, capsys) -> None:  # type: ignore[no-untyped-def]
    """What was written as JSON has lists where the command line has tuples."""
    options = ["--views", "3", "--aug-cfg", "dihedral=True", "scale=(0.5,1.0)"]
    three = cached("features-ViT", *options)
    before = {path.name: path.stat().st_mtime_ns for path in three.glob("*.tar")}
    given = ["features", f"features-ViT={models}/features-ViT.pt", str(three), "--shards", f"{scenes}/{PATTERN}"]
    assert cli([*given, *options]) == 0, capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in three.glob("*.tar")} == before
    assert cli([*given, *options[:-1], "scale=(0.6,1.0)"]) != 0
    assert "holds features made with aug_cfg: {'dihedral': True, 'scale': [0.5, 1.0]}" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_and_ends_byte_for_byte_the_same(
    models: Path, scenes: Path, cached, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    whole = cached("features-ViT")
    model = load_model(f"features-ViT={models}/features-ViT.pt")
    urls = [str(path) for path in sorted(scenes.glob("train-*.tar"))]
    assert len(urls) == 4
    broken = [*urls[:2], str(tmp_path / "train-000002.tar"), urls[3]]  # is not there yet
    with pytest.raises(OSError, match="train-000002"):
        write_features(model, broken, str(tmp_path / "out"), FeatureOptions())
    header = read_header(str(tmp_path / "out"))
    assert header is not None
    assert list(header.shards) == ["train-000000.tar", "train-000001.tar"]
    assert not list((tmp_path / "out").glob(".*"))
    shutil.copy(urls[2], tmp_path / "train-000002.tar")
    before = (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns
    assert write_features(model, broken, str(tmp_path / "out"), FeatureOptions()) == 2
    assert write_features(model, broken, str(tmp_path / "out"), FeatureOptions()) == 0
    assert (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns == before
    for path in whole.glob("*.tar"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "out/sizes.json").read_text()) == json.loads((whole / "sizes.json").read_text())


def test_shards_that_were_replaced_are_written_again(models: Path, scenes: Path, tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    model = load_model(f"features-ViT={models}/features-ViT.pt")
    urls, out = [str(tmp_path / f"train-00000{number}.tar") for number in (0, 1)], tmp_path / "out"
    for number, url in enumerate(urls):
        shutil.copy(scenes / f"train-00000{number}.tar", url)
    assert write_features(model, urls, str(out), FeatureOptions()) == 2
    before = os.stat(urls[1])
    shutil.copy(scenes / "train-000002.tar", urls[1])
    os.truncate(urls[1], before.st_size)  # zeros behind the end of a tar mean nothing
    os.utime(urls[1], ns=(before.st_atime_ns, before.st_mtime_ns))  # as copies with their times have it
    assert write_features(model, urls, str(out), FeatureOptions()) == 1
    assert "train-000001.tar: made of a shard that has been replaced since" in caplog.text
    write_features(model, [str(scenes / "train-000002.tar")], str(tmp_path / "fresh"), FeatureOptions())
    assert (out / "train-000001.tar").read_bytes() == (tmp_path / "fresh/train-000002.tar").read_bytes()
    (out / "train-000000.tar").unlink()
    assert write_features(model, urls, str(out), FeatureOptions()) == 1


def copied(scenes: Path, folder: Path) -> dict[str, bytes]:
    """Two shards of scenes in a folder of their own, with sizes.json; returns what is in each file."""
    folder.mkdir()
    for name in ("train-000000.tar", "train-000001.tar", "sizes.json"):
        shutil.copy(scenes / name, folder)
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("target", ["images", "linked", "."])
def test_features_do_not_overwrite_the_shards_that_they_are_made_of(
    target: str, models: Path, scenes: Path, tmp_path: Path
) -> None:
    before = copied(scenes, tmp_path / "images")
    (tmp_path / "linked").symlink_to("images")
    model = load_model(f"features-ViT={models}/features-ViT.pt")
    urls = [str(tmp_path / "images" / f"train-00000{number}.tar") for number in (0, 1)]
    with pytest.raises(FeatureError, match=r"the target and the source .*train-000000\.tar are one, or one"):
        write_features(model, urls, str(tmp_path / target), FeatureOptions())
    assert files(tmp_path / "images") == before


def test_features_do_not_overwrite_other_shards_or_what_lies_beside_them(
    models: Path, scenes: Path, tmp_path: Path
) -> None:
    model = load_model(f"features-ViT={models}/features-ViT.pt")
    urls = [str(scenes / "train-000000.tar")]
    before = copied(scenes, tmp_path / "other")
    for name in ("sizes.json", "train-000000.tar"):
        with pytest.raises(FeatureError, match=rf"other: has {name} but no features\.json, so what lies there is not"):
            write_features(model, urls, str(tmp_path / "other"), FeatureOptions())
        assert files(tmp_path / "other") == before
        (tmp_path / "other" / name).unlink()
        del before[name]
    assert write_features(model, urls, str(tmp_path / "other"), FeatureOptions()) == 1  # beside a shard of another name
    assert (tmp_path / "other/train-000001.tar").read_bytes() == before["train-000001.tar"]


def test_commands_that_read_shards_have_no_place(models: Path, scenes: Path, tmp_path: Path) -> None:
    model = load_model(f"features-ViT={models}/features-ViT.pt")
    command = f"pipe:cat {scenes}/train-000000.tar # as of s3://bucket/train-000000.tar"
    assert write_features(model, [command], str(tmp_path / "out"), FeatureOptions()) == 1


def test_one_process_writes_features_at_a_time(models: Path, scenes: Path, tmp_path: Path) -> None:
    model = load_model(f"features-ViT={models}/features-ViT.pt")
    with one_writer(str(tmp_path)), pytest.raises(BeingWritten, match="is writing here"):
        write_features(model, [str(scenes / "train-000000.tar")], str(tmp_path), FeatureOptions())


def test_unfinished_features_do_not_train(models: Path, cached, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from open_clip_train.params import parse_args

    from msa_openclip.training.loader import get_wds_dataset

    shutil.copytree(cached("features-ViT"), tmp_path / "part")
    header = json.loads((tmp_path / "part/features.json").read_text())
    del header["shards"]["train-000003.tar"]
    (tmp_path / "part/features.json").write_text(json.dumps(header))
    args = parse_args(["--train-data", f"{tmp_path}/part/{PATTERN}", *LOCKED])
    with pytest.raises(FeatureError, match=r"train-000003\.tar: not finished; give the command"):
        get_wds_dataset(args, None, True)  # type: ignore[arg-type]
    (tmp_path / "part/features.json").write_text("{")
    with pytest.raises(FeatureError, match=r"features\.json: damaged"):
        get_wds_dataset(args, None, True)  # type: ignore[arg-type]


def test_a_folder_of_other_features_is_not_mixed_with(models: Path, scenes: Path, cached, capsys) -> None:  # type: ignore[no-untyped-def]
    folder = cached("features-ViT")
    wanted = ["features", f"features-ViT={models}/features-ViT.pt", str(folder), "--shards", f"{scenes}/{PATTERN}"]
    assert cli([*wanted, "--dtype", "float32"]) == 1
    assert "holds features made with dtype: float16, now float32" in capsys.readouterr().err
    wanted[1] = "features-ViT=untrained"
    assert cli(wanted) == 1
    assert "holds features made with towers: other weights or settings" in capsys.readouterr().err
