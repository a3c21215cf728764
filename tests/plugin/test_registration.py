"""Installed means active, in real processes; every other model of open_clip behaves byte for byte as without us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
from helpers import processes, tiny
from helpers.host import HAS_TASKS, MAKES_LOSS, loss_of

Run = Callable[..., subprocess.CompletedProcess[str]]

OFF = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
"""Environment in which torch loads no entry point: as if the plugin were not installed."""

ASK = """
import sys
import open_clip, torch
torch.manual_seed(0)
model = open_clip.create_model(sys.argv[1])
print(type(model).__module__, type(model).__name__, open_clip.get_tokenizer(sys.argv[1])("planes").shape[1])
print(sys.argv[1] in open_clip.list_models(), "MSA-ViT-B" in open_clip.list_models())
"""
FOUND = "msa_openclip.model.msaclip MSACLIP 13\nTrue True\n"


# ---- active


def test_active_after_a_plain_import_of_open_clip(run_python: Run) -> None:
    done = run_python(ASK, "MSA-tiny-ViT")
    assert done.stdout == FOUND
    assert "msa_openclip" not in done.stderr  # nothing to warn of


@pytest.mark.parametrize("order", ["import msa_openclip, open_clip", "import open_clip, msa_openclip"])
def test_active_by_an_import_where_torch_loads_no_entry_points(order: str, run_python: Run) -> None:
    assert run_python(order + ASK, "MSA-tiny-ViT", **OFF).stdout == FOUND


def test_names_imported_before_us_are_ours_too(run_python: Run) -> None:
    code = """
import open_clip, msa_openclip
for create_model in (open_clip.create_model, open_clip.factory.create_model):
    print(type(create_model("MSA-tiny-ViT")).__name__)
"""
    assert run_python(code, **OFF).stdout == "MSACLIP\nMSACLIP\n"


def test_off_where_torch_loads_no_entry_points(run_python: Run) -> None:
    code = "import open_clip; print([name for name in open_clip.list_models() if 'MSA' in name])"
    assert run_python(code, **OFF).stdout == "[]\n"


WORKERS = """
import open_clip
from torch.utils.data import DataLoader, Dataset

class Models(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        import open_clip
        return type(open_clip.create_model("MSA-tiny-ViT")).__name__

if __name__ == "__main__":
    loader = DataLoader(Models(), num_workers=2, batch_size=None, multiprocessing_context="spawn")
    print(sorted(loader))
"""


def test_active_in_spawned_workers(tiny_configs: Path, tmp_path: Path) -> None:
    (tmp_path / "workers.py").write_text(WORKERS, encoding="utf-8")
    env = {**os.environ, "MSA_OPENCLIP_CONFIGS": str(tiny_configs)}
    done = processes.run_new_python(tmp_path / "workers.py", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['MSACLIP', 'MSACLIP']\n"


def test_activating_again_changes_nothing(run_python: Run) -> None:
    code = """
import sys
import open_clip, msa_openclip
from msa_openclip import autoload
loss = "create_task" if hasattr(open_clip, "create_task") else "create_loss"
before = (open_clip.create_model, getattr(open_clip, loss), list(sys.meta_path), open_clip.list_models())
for _ in range(3):
    autoload.activate()
    autoload.extend(open_clip.factory)
assert before == (open_clip.create_model, getattr(open_clip, loss), list(sys.meta_path), open_clip.list_models())
assert not hasattr(open_clip.create_model.__wrapped__, "__wrapped__")
assert sum(type(finder).__module__ == "msa_openclip.autoload" for finder in sys.meta_path) == 1
paths = [str(path) for path in open_clip.factory._MODEL_CONFIG_PATHS]
assert len(paths) == len(set(paths)), paths
"""
    run_python(code)


def test_importing_torch_imports_two_small_modules_more() -> None:
    """Nothing of open_clip, no module of torch, and of ours the package and its autoload alone."""
    code = "import sys, torch; print('\\n'.join(sorted(sys.modules)))"
    with_us, without = (
        {*subprocess.check_output([sys.executable, "-c", code], env={**os.environ, **off}, text=True).split()}
        for off in ({}, OFF)
    )
    ours = {name for name in with_us - without if name.startswith(("open_clip", "msa_openclip", "torch", "timm"))}
    assert ours == {"msa_openclip", "msa_openclip.autoload"}
    assert len(with_us - without) <= 30  # importlib.metadata, with which torch looks for entry points, and its own


def test_importing_open_clip_imports_no_part_of_the_model(run_python: Run) -> None:
    code = "import sys, open_clip; print('\\n'.join(sorted(sys.modules)))"
    names = run_python(code).stdout.split()
    ours = {name for name in names if name.startswith("msa_openclip")}
    plugin = {
        f"msa_openclip.plugin.{name}"
        for name in (
            "configs",
            "factory",
            "host",
            "hub",
            "installed",
            "patching",
            "registration",
            "trainer",
            "transforms",
        )
    }
    adapter = "msa_openclip.plugin.host_4" if HAS_TASKS else "msa_openclip.plugin.host_3"  # and not the other
    assert ours == {
        "msa_openclip",
        "msa_openclip.autoload",
        "msa_openclip.data",
        "msa_openclip.data.small_files",
        "msa_openclip.distributed",
        "msa_openclip.plugin",
        adapter,
        *plugin,
    }


# ---- configurations of the user's own


def write(directory: Path, name: str, content: Any) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


BROKEN: dict[str, tuple[Any, str]] = {
    "half": ('{"embed_dim": 3', "Expecting ',' delimiter"),
    "list": ([1], "it holds no object."),
    "number": (7, "it holds no object."),
    "poor": ({"embed_dim": 3, "text_cfg": {}}, "it lacks the key 'vision_cfg'."),
    "ViT-B-32": (tiny.config(msa={}), "the name ViT-B-32 is taken; rename the file."),
    "MSA-ViT-Ti": (tiny.config(msa={}), "the name MSA-ViT-Ti is taken; rename the file."),
}


def test_what_cannot_be_registered_is_warned_about_by_name_and_stops_nothing(run_python: Run, tmp_path: Path) -> None:
    broken, good, missing = tmp_path / "broken", tmp_path / "good", tmp_path / "missing"
    for name, (content, _) in BROKEN.items():
        write(broken, name, content)
    (broken / "latin.json").write_bytes(b'{"embed_dim": "\xe9"}')
    write(good, "MSA-odd", {**tiny.config(), "msa_cfg": ["no object"]})
    write(good, "MSA-based", tiny.config(msa={"base": ["no", "name"]}))
    write(good, "MSA-tiny-ViT", tiny.config(msa={}))
    directories = os.pathsep.join(map(str, (broken, missing, good)))
    done = run_python(ASK, "MSA-tiny-ViT", MSA_OPENCLIP_CONFIGS=directories)
    assert done.stdout == FOUND
    for name, (_, reason) in BROKEN.items():
        (line,) = [line for line in done.stderr.splitlines() if str(broken / f"{name}.json") in line]
        assert line.startswith(f"{broken / name}.json is not registered as a model: ")
        assert reason in line
    assert f"{broken / 'latin'}.json is not registered as a model: 'utf-8' codec can't decode" in done.stderr
    assert f"MSA_OPENCLIP_CONFIGS: {missing} is not a directory; no model is registered from it." in done.stderr


def test_a_wrong_msa_cfg_is_refused_when_its_model_is_asked_for(run_python: Run, tmp_path: Path) -> None:
    write(tmp_path, "MSA-odd", {**tiny.config(), "msa_cfg": ["no object"]})
    code = """
import open_clip
try:
    open_clip.create_model("MSA-odd")
except ValueError as error:
    print(error)
"""
    done = run_python(code, MSA_OPENCLIP_CONFIGS=str(tmp_path))
    assert done.stdout == "msa_cfg: expected an object, got ['no object'].\n"


def test_pretrained_tags_of_the_base_warm_start(run_python: Run, tmp_path: Path) -> None:
    """Known under our name, downloaded as the base's, loaded into the towers."""
    write(tmp_path, "MSA-mine", tiny.config(msa={"base": "ViT-B-32"}))
    write(tmp_path, "MSA-other", tiny.config(msa={"base": "no-such-model"}))
    write(tmp_path, "mine", tiny.config())
    code = """
import sys
import open_clip, torch
import open_clip.factory as factory
tags = open_clip.list_pretrained_tags_by_model("MSA-mine")
assert "laion2b_s34b_b79k" in tags and tags == open_clip.list_pretrained_tags_by_model("ViT-B-32")
assert ("MSA-mine", "openai") in open_clip.list_pretrained()
assert open_clip.list_pretrained_tags_by_model("MSA-other") == []
base = open_clip.create_model("mine")
torch.save(base.state_dict(), sys.argv[1])
asked = []
factory.download_pretrained = lambda cfg, cache_dir=None: asked.append(cfg) or sys.argv[1]
model, _, preprocess = open_clip.create_model_and_transforms("MSA-mine", pretrained="laion2b_s34b_b79k")
assert asked == [open_clip.pretrained.get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k")]
image = torch.randn(2, 3, 32, 32)
assert torch.equal(model.encode_image(image), base.encode_image(image))
print(type(model).__name__)
"""
    assert run_python(code, str(tmp_path / "base.pt"), MSA_OPENCLIP_CONFIGS=str(tmp_path)).stdout == "MSACLIP\n"


# ---- everybody else


STOCK = """
import hashlib, sys
from argparse import Namespace
import open_clip, torch
import open_clip.factory, open_clip.model
open_clip.add_model_config(sys.argv[1])

def digest(tensors):
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(str(tensor.shape).encode() + tensor.detach().float().numpy().tobytes())
    return content.hexdigest()

images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
texts = torch.randint(1, 49000, (3, 13), generator=torch.Generator().manual_seed(0))
for name in ("stock-clip", "stock-custom", "stock-coca", "stock-bias", "stock-quick"):
    for options in ({}, {"force_custom_text": True}, {"precision": "bf16"}, {"init_logit_bias": -5.0}):
        if "coca" in name and ("init_logit_bias" in options or "precision" in options):
            continue  # open_clip's CoCa takes neither
        torch.manual_seed(0)
        model = open_clip.create_model(name, output_dict=True, **options).eval()
        if "coca" in name:  # open_clip leaves this one to whatever the memory held
            torch.nn.init.ones_(model.text_decoder.text_projection)
        print(name, options, type(model), list(model.state_dict()), digest(model.state_dict().values()))
        output = model(images.to(model.visual.conv1.weight.dtype), texts)
        print(sorted(output), digest([value for _, value in sorted(output.items()) if torch.is_tensor(value)]))
    print(open_clip.get_tokenizer(name)(["planes near trees"]).tolist())
    model, train, val = open_clip.create_model_and_transforms(name)
    print(train, val)
print(open_clip.factory.CustomTextCLIP is open_clip.CustomTextCLIP, open_clip.CustomTextCLIP.__module__)
flags = dict(local_loss=False, gather_with_grad=False, rank=0, world_size=1, horovod=False, distill=False, siglip=False)
flags |= dict(coca_caption_loss_weight=2.0, coca_contrastive_loss_weight=1.0, loss_dist_impl=None)
def loss_of(args):
    if not hasattr(open_clip, "create_task"):
        return open_clip.create_loss(args)
    model = open_clip.create_model(args.model)
    return open_clip.create_task(args, model, dist_model=model).loss

for name in ("stock-clip", "stock-coca", "no-such-model"):
    for changes in ({}, {"siglip": True}, {"distill": True}):
        try:
            loss = loss_of(Namespace(model=name, **{**flags, **changes}))
            print(name, changes, type(loss), sorted(vars(loss).items(), key=str))
        except Exception as error:
            print(name, changes, type(error), str(error).split("Available")[0])
for wrong in ("no-such-model", "local-dir:", "local-dir:nowhere", "hf-hub:"):
    try:
        open_clip.create_model(wrong)
    except Exception as error:
        print(wrong, type(error), str(error).split("Available")[0])
print([name for name in open_clip.list_models() if not name.startswith("MSA-")])
print([pair for pair in open_clip.list_pretrained() if not pair[0].startswith("MSA-")])
"""


@pytest.fixture(scope="module")
def stock_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stock")
    plain = tiny.config("ViT")
    coca_tower = {**plain["text_cfg"], "embed_cls": True, "output_tokens": True, "width": 24, "heads": 4}
    coca = {
        "embed_dim": tiny.EMBED_DIM,
        "vision_cfg": {**plain["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        "text_cfg": coca_tower,
        "multimodal_cfg": {"context_length": 13, "vocab_size": 49408, "width": 24, "heads": 4, "layers": 1},
        "custom_text": True,
    }
    write(directory, "stock-clip", plain)
    write(directory, "stock-custom", {**plain, "custom_text": True})
    write(directory, "stock-quick", {**plain, "quick_gelu": True})
    write(directory, "stock-coca", coca)
    bias = {"init_logit_bias": -10, "custom_text": True, "text_cfg": {**plain["text_cfg"], "no_causal_mask": True}}
    write(directory, "stock-bias", {**plain, **bias})
    return directory


def test_other_models_are_byte_for_byte_as_without_us(stock_configs: Path, run_python: Run) -> None:
    """Classes, initial weights, outputs, tokenizers, transforms, losses and errors of several kinds of models."""
    none = {"MSA_OPENCLIP_CONFIGS": ""}
    with_us, without = (run_python(STOCK, str(stock_configs), **env, **none).stdout for env in ({}, OFF))
    assert with_us == without
    assert "open_clip.coca_model.CoCa" in with_us
    for loss in ("ClipLoss", "CoCaLoss", "SigLipLoss", "DistillClipLoss"):
        assert f"open_clip.loss.{loss}" in with_us
    assert "RuntimeError" in with_us


@pytest.mark.parametrize(
    ("lacking", "named"),
    [
        (MAKES_LOSS, "create_task(args, model)" if HAS_TASKS else "create_loss(args)"),
        ("CustomTextCLIP", "CustomTextCLIP"),
        ("parse_model_name", "parse_model_name"),
    ],
)
def test_what_open_clip_lacks_is_named_when_one_of_our_models_is_asked_for(
    lacking: str, named: str, stock_configs: Path, run_python: Run
) -> None:
    """And the other models go on working."""
    code = f"""
import sys
import open_clip
kept = vars(open_clip.factory).pop("{lacking}")
import msa_openclip
for name in ("MSA-ViT-B", "MSA-tiny-ViT"):
    try:
        open_clip.create_model(name)
    except RuntimeError as error:
        print(error)
open_clip.factory.{lacking} = kept  # what open_clip itself would have under another name
open_clip.add_model_config(sys.argv[1])
print(type(open_clip.create_model("stock-clip")).__name__, "MSA-ViT-B" in open_clip.list_models())
"""
    done = run_python(code, str(stock_configs), **OFF)
    needed = "which msa_openclip extends; MSA models need open_clip_torch>=3.3,<5."
    assert [line.split(" ", 2)[2] for line in done.stdout.splitlines()[:2]] == [f"lacks {named}, {needed}"] * 2
    assert done.stdout.splitlines()[2] == "CLIP False"


def test_an_open_clip_that_cannot_be_extended_at_all_still_works(run_python: Run) -> None:
    code = """
import open_clip
del open_clip.factory.create_model
import msa_openclip
print(len(open_clip.list_models()) > 100)
"""
    done = run_python(code, **OFF)
    assert done.stdout == "True\n"
    assert "msa_openclip could not extend open_clip.factory; MSA models are off." in done.stderr
    assert "lacks create_model that uses CustomTextCLIP, which msa_openclip extends" in done.stderr


# ---- our loss


@pytest.mark.usefixtures("tiny_configs")
@pytest.mark.parametrize("flag", ["distill", "siglip", "horovod"])
def test_flags_that_would_replace_our_loss_are_refused(flag: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^MSA-tiny-ViT brings its own loss, which --{flag} would replace; leave out"
    ):
        loss_of(Namespace(model="MSA-tiny-ViT", **{flag: True}))


@pytest.mark.usefixtures("tiny_configs")
def test_the_loss_is_that_of_the_model_with_the_trainers_flags() -> None:
    flags = {"local_loss": True, "gather_with_grad": True, "rank": 1, "world_size": 2, "accum_freq": 3}
    loss = loss_of(Namespace(model="MSA-tiny-RN", **flags))
    assert loss.msa_cfg == open_clip.create_model("MSA-tiny-RN").msa_cfg
    assert {name: getattr(loss, name) for name in flags} == flags
