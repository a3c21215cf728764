"""`python -m open_clip_train.main`, as users run it: real processes on real tar shards of synthetic scenes."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from helpers import tiny
from helpers.host import HAS_TASKS
from helpers.processes import run_new_python

from msa_openclip.shards.command_line import main as shards

HELPERS = Path(__file__).parents[1] / "helpers"
MODEL = "MSA-tiny-ViT"
SCENES = 64

only_4 = pytest.mark.skipif(not HAS_TASKS, reason="open_clip 4.x is not installed")


@pytest.fixture(scope="module", params=["pair", "image"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def scene_shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shards of the same few scenes in both layouts."""
    folders = {}
    for name in ("pair", "image"):
        folders[name] = tmp_path_factory.mktemp(name)
        counts = ["--train", str(SCENES), "--val", "16", "--test", "0"]
        assert shards(["synthesize", str(folders[name]), *counts, "--size-px", "32", "--shards", name]) in (0, None)
    return folders


class Run:
    """A finished training run: its log, its checkpoints."""

    def __init__(self, logs: Path, name: str) -> None:
        self.folder = logs / name
        self.log = (self.folder / "out.log").read_text(encoding="utf-8")
        self.checkpoints = self.folder / "checkpoints"

    def losses(self, term: str = "Loss") -> list[float]:
        """What the log says of a term at each logged step."""
        return [float(x) for x in re.findall(rf" {term}: ([0-9.eE+-]+) \(", self.log)]


@pytest.fixture
def train(tmp_path: Path, tiny_configs: Path):  # type: ignore[no-untyped-def]
    """Run open_clip_train.main with some arguments; a failure of the process fails the test."""

    def run(
        data: Path,
        *arguments: str,
        name: str = "run",
        ranks: int = 1,
        model: str = MODEL,
        torchrun: bool = False,
        **env: str,
    ) -> Run:
        launcher = ["-m", "open_clip_train.main"] if ranks == 1 else [str(HELPERS / "on_cpu_ranks.py")]
        if torchrun:
            # "--": without it torchrun of Python 3.11 takes open_clip's --logs for an abbreviation of its own options.
            launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", "--", *launcher]
        command = [
            *launcher, "--model", model, "--dataset-type", "webdataset",
            "--train-data", f"{data}/train-{{000000..000003}}.tar", "--batch-size", "16", "--workers", "0",
            "--lr", "3e-3", "--warmup", "2", "--epochs", "4", "--logs", str(tmp_path), "--name", name,
            "--log-every-n-steps", "1", "--seed", "0", "--device", "cpu", "--precision", "fp32", *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "MSA_OPENCLIP_CONFIGS": str(tiny_configs), **env}
        done = run_new_python(*command, env=environment, ranks=1 if torchrun else ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        return Run(tmp_path, name)

    return run


def assert_learned(run: Run) -> None:
    losses = run.losses()
    assert len(losses) >= 4
    assert sum(losses[-3:]) / 3 < 0.9 * sum(losses[:3]) / 3


def test_training_lowers_every_term_and_its_checkpoint_reloads(train, scene_shards, layout) -> None:  # type: ignore[no-untyped-def]
    epochs = "2" if layout == "pair" else "10"
    run = train(scene_shards[layout], "--epochs", epochs, "--save-frequency", "1")
    assert_learned(run)
    for term in ("Contrastive_loss", "Fused_loss"):
        assert len(run.losses(term)) == len(run.losses())
        assert run.losses(term)[-1] < run.losses(term)[0]

    path = run.checkpoints / f"epoch_{epochs}.pt"
    model = open_clip.create_model(MODEL, pretrained=str(path)).eval()
    trained = torch.load(path, weights_only=True)["state_dict"]
    assert set(trained) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert value.equal(trained[name]), name
    again = open_clip.create_model(MODEL, pretrained=str(path)).eval()
    images, texts = tiny.images(model), tiny.texts()
    with torch.no_grad():
        assert model.get_logits(images, texts)[0].equal(again.get_logits(images, texts)[0])


def test_two_ranks(train, scene_shards, layout) -> None:  # type: ignore[no-untyped-def]
    run = train(
        scene_shards[layout], "--batch-size", "8", "--local-loss", "--gather-with-grad", "--epochs", "8",
        ranks=2, torchrun=layout == "pair",
    )  # fmt: skip
    assert "total 2" in run.log
    assert_learned(run)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--accum-freq", "2", "--batch-size", "8"),
        ("--precision", "bf16"),
        ("--precision", "amp_bf16"),
        ("--grad-checkpointing",),
        ("--lock-image",),
        ("--lock-text", "--lock-text-freeze-layer-norm"),
        ("--force-context-length", "24", "--force-image-size", "48", "--force-quick-gelu"),
    ],
    ids=lambda arguments: "-".join(arguments).strip("-").replace("---", "-"),
)
def test_options_of_open_clip(train, scene_shards, arguments) -> None:  # type: ignore[no-untyped-def]
    assert_learned(train(scene_shards["pair"], "--epochs", "2", *arguments))


def assert_saved_whole(run: Run, epoch: int) -> None:
    """Under the names and in the shapes of a model that was neither compiled nor sharded."""
    state = torch.load(run.checkpoints / f"epoch_{epoch}.pt", weights_only=True)["state_dict"]
    open_clip.create_model(MODEL).load_state_dict(state)


def test_compiled_training(train, scene_shards) -> None:  # type: ignore[no-untyped-def]
    run = train(scene_shards["pair"], "--torchcompile", "--epochs", "2")
    assert_learned(run)
    assert_saved_whole(run, 2)


# ---- what 4.x alone has


@only_4
@pytest.mark.parametrize("strategy", ["model", "step"])
def test_what_is_compiled(strategy: str, train, scene_shards) -> None:  # type: ignore[no-untyped-def]
    data = scene_shards["pair"]
    compiled = ("--torchcompile", "--torchcompile-strategy", strategy, "--torchcompile-backend", "aot_eager")
    run = train(data, "--epochs", "2", *compiled, "--val-data", f"{data}/val-000000.tar")
    assert_learned(run)
    assert_saved_whole(run, 2)
    assert len((run.checkpoints / "results.jsonl").read_text().splitlines()) == 2


@only_4
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--torchcompile", "--torchcompile-backend", "aot_eager"),
        ("--grad-checkpointing", "--precision", "amp_bf16"),
    ],
    ids=lambda arguments: arguments[0].strip("-") if arguments else "plain",
)
def test_sharded_training(arguments, train, scene_shards) -> None:  # type: ignore[no-untyped-def]
    data = scene_shards["pair"]
    options = ("--fsdp", "--local-loss", "--gather-with-grad", "--batch-size", "8", "--epochs", "2")
    run = train(data, *options, *arguments, "--val-data", f"{data}/val-000000.tar", ranks=2)
    assert "FSDP2: sharding 5 submodules" in run.log
    assert_learned(run)
    assert_saved_whole(run, 2)
    assert len((run.checkpoints / "results.jsonl").read_text().splitlines()) == 2


@only_4
def test_texts_as_long_as_each_batch_has_them(train, scene_shards, tiny_bert, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Cutting them changes no loss; put in order of their length they make other batches."""
    text = {"context_length": 13, "vocab_size": len(tiny.VOCABULARY), "width": 16, "heads": 2, "layers": 1, "pad_id": 0}
    text |= {"text_arch": "modern", "pool_type": "eos", "eos_id": 3, "hf_tokenizer_name": str(tiny_bert)}
    for name, variable in (("whole", False), ("cut", True)):
        content = tiny.config("ViT", text={**text, "variable_text": variable}, msa={})
        tiny.write_config(tmp_path, f"texts-{name}", content)
    run = partial(train, scene_shards["pair"], "--epochs", "1", MSA_OPENCLIP_CONFIGS=str(tmp_path))
    whole, cut = (run(model=f"texts-{name}", name=name) for name in ("whole", "cut"))
    assert cut.losses() == pytest.approx(whole.losses(), rel=1e-4)
    ordered = run("--length-bucketing", model="texts-cut", name="ordered")
    assert len(ordered.losses()) == len(cut.losses())
    assert ordered.losses()[0] != pytest.approx(cut.losses()[0], rel=1e-4)


# ---- runs that go on, start from others, or are refused


def test_resume_goes_on_where_it_stopped(train, scene_shards) -> None:  # type: ignore[no-untyped-def]
    data = scene_shards["pair"]
    first = train(data, "--epochs", "2", "--save-frequency", "1", "--skip-scheduler")
    steps = len(first.losses())
    second = train(data, "--epochs", "3", "--save-frequency", "1", "--skip-scheduler", "--resume", "latest")
    assert "resuming checkpoint" in second.log
    assert "(epoch 2)" in second.log
    assert "Start epoch 2" in second.log.split("resuming checkpoint")[1]
    assert "Start epoch 0" not in second.log.split("resuming checkpoint")[1]
    resumed = second.losses()[steps:]
    assert resumed
    assert resumed[0] < first.losses()[0]
    assert (second.checkpoints / "epoch_3.pt").is_file()


def test_resume_passes_over_a_checkpoint_that_a_kill_cut_off(train, scene_shards) -> None:  # type: ignore[no-untyped-def]
    data = scene_shards["pair"]
    first = train(data, "--epochs", "2", "--save-frequency", "1")
    last = first.checkpoints / "epoch_2.pt"
    last.write_bytes(last.read_bytes()[:100_000])
    second = train(data, "--epochs", "2", "--save-frequency", "1", "--resume", "latest")
    assert "epoch_1.pt' (epoch 1)" in second.log.split("resuming checkpoint")[-1]
    assert torch.load(last, weights_only=True)["epoch"] == 2


def test_warm_start_from_plain_clip(train, scene_shards, tiny_configs, tmp_path) -> None:  # type: ignore[no-untyped-def]
    plain = open_clip.create_model("tiny-ViT")
    path = tmp_path / "plain.pt"
    torch.save(plain.state_dict(), path)
    run = train(scene_shards["pair"], "--epochs", "1", "--pretrained", str(path))
    assert run.log.count("Warm start: towers loaded from a plain CLIP checkpoint") == 1


def test_the_papers_model_trains(train, scene_shards) -> None:  # type: ignore[no-untyped-def]
    run = train(scene_shards["pair"], "--epochs", "2", "--force-context-length", "13", model="MSA-tiny-BERT")
    for term in ("Triplet_loss", "Match_loss", "Consistency_loss"):
        assert run.losses(term)
    assert run.losses("Triplet_loss")[-1] < run.losses("Triplet_loss")[0]


def test_stock_models_keep_their_loss(train, scene_shards) -> None:  # type: ignore[no-untyped-def]
    run = train(scene_shards["pair"], "--epochs", "1", model="tiny-ViT")
    assert set(re.findall(r" (\w+_loss): [0-9.]+ \(", run.log)) == {"Contrastive_loss"}
    assert run.losses("Contrastive_loss") == run.losses()


def test_a_loss_that_would_replace_ours_is_refused(train, scene_shards) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AssertionError, match="MSA-tiny-ViT brings its own loss, which --siglip would replace"):
        train(scene_shards["pair"], "--siglip")


def test_results_of_validation_are_written(train, scene_shards) -> None:  # type: ignore[no-untyped-def]
    val = f"{scene_shards['pair']}/val-{{000000..000003}}.tar"
    run = train(scene_shards["pair"], "--epochs", "1", "--val-data", val)
    results = [json.loads(line) for line in (run.checkpoints / "results.jsonl").read_text().splitlines()]
    assert results[-1]["num_samples"] == 16 * 5
    assert results[-1]["epoch"] == 1
