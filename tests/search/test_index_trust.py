"""What an index promises: one writer, one model, the images that it was built from, and files as they were written."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from helpers.processes import run_new_python
from helpers.retrieval_data import randomise, scene, write_shards
from PIL import Image

from msa_openclip.commands import main as cli
from msa_openclip.data.captioned import CaptionedImage
from msa_openclip.data.readers import read_folder, read_shards
from msa_openclip.distributed import Peers
from msa_openclip.evaluation.loading import LoadedModel, load
from msa_openclip.search import build as index
from msa_openclip.search.build import build_index
from msa_openclip.search.checksums import checksums
from msa_openclip.search.files import ImageIndexError, sealed
from msa_openclip.search.index import ImageIndex
from msa_openclip.search.known_models import model_of, remember
from msa_openclip.search.searcher import Searcher
from msa_openclip.search.verify import verify_index
from msa_openclip.shards.storage.locking import BeingWritten, one_writer


def checkpoint(folder: Path, seed: int = 3) -> str:
    path = folder / f"msa-{seed}.pt"
    torch.save(randomise(open_clip.create_model("MSA-tiny-ViT"), seed=seed).state_dict(), path)
    return f"MSA-tiny-ViT={path}"


@pytest.fixture(scope="module")
def spec(tiny_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def model(spec: str) -> LoadedModel:
    return load(spec)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[CaptionedImage]:
    return read_shards(write_shards(tmp_path_factory.mktemp("scenes"), "image", count=7))


@pytest.fixture(scope="module")
def whole(model: LoadedModel, images: list[CaptionedImage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "whole"
    build_index(model, images, str(folder), segment_images=4)
    return folder


@pytest.fixture
def built(whole: Path, tmp_path: Path) -> Path:
    """A copy of an index of seven images in two segments, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "built"))


def pictures(folder: Path, *numbers: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for place, number in enumerate(numbers, start=1):
        scene(number).save(folder / f"{place}.png")
    return str(folder)


def interrupted(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **named: Any) -> None:
    """A build that ends when all of its segments are written, and its manifest is not."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index, "wait_for_ranks", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_index(*arguments, **named)


# ---- one writer


def test_a_second_writer_is_refused_by_name(model: LoadedModel, images: list[CaptionedImage], tmp_path: Path) -> None:
    folder = str(tmp_path)
    with one_writer(folder), pytest.raises(BeingWritten, match=f"process {os.getpid()} on .* is writing here"):
        build_index(model, images, folder)
    assert build_index(model, images, folder) == 7


def test_two_equal_runs_at_once_lose_nothing(spec: str, tiny_configs: Path, tmp_path: Path) -> None:
    """Whoever comes second is refused, or finds all of it there; run again it adds its own images."""
    sets = [pictures(tmp_path / name, *numbers) for name, numbers in (("a", range(5)), ("b", range(50, 57)))]
    environment = {**os.environ, "MSA_OPENCLIP_CONFIGS": str(tiny_configs)}

    def command(images: str) -> list[str]:
        words = ["-m", "msa_openclip", "index", spec, str(tmp_path / "index"), "--folder", images]
        return [*words, "--segment-images", "1", "--batch-size", "1"]

    def start(images: str) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *command(images)], env=environment, **pipes)

    runs = [start(images) for images in (*sets, sets[1])]
    outputs = [run.communicate(timeout=300) for run in runs]
    for run, (_, complaint) in zip(runs, outputs, strict=True):
        assert run.returncode == 0 or "is writing here. Wait until it has ended" in complaint
        assert "Traceback" not in complaint
    assert 0 in [run.returncode for run in runs]
    for images in sets:
        again = run_new_python(*command(images), env=environment)
        assert again.returncode == 0, again.stderr
    assert len(ImageIndex(str(tmp_path / "index"), load(spec))) == 12


def test_a_segment_that_another_process_has_just_written_is_kept(
    model: LoadedModel, images: list[CaptionedImage], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "index"
    (folder).mkdir()
    monkeypatch.setattr(index, "is_written", lambda root, name: False)
    for segment in (path for path in whole.iterdir() if path.is_dir()):
        shutil.copytree(segment, folder / segment.name)
    monkeypatch.setattr("msa_openclip.search.ranks.is_written", lambda root, name: True)
    assert build_index(model, images, str(folder), segment_images=4) == 7
    assert not list(folder.glob(".*"))


def test_left_overs_of_killed_builds_go_and_nothing_else(
    model: LoadedModel, images: list[CaptionedImage], tmp_path: Path
) -> None:
    folder, other = tmp_path / "index", tmp_path / "other"
    for name in (".0123456789abcdef.77.tmp", ".mine.tmp", "notes.tmp"):
        (folder / name).mkdir(parents=True)
    other.mkdir()
    (folder / ".fedcba9876543210.78.tmp").symlink_to(other)
    for name in (".ivfpq-0123456789ab.faiss.01234567.tmp", ".mine.faiss.01234567.tmp"):
        (folder / name).touch()
    build_index(model, images, str(folder))
    assert not (folder / ".0123456789abcdef.77.tmp").exists()
    assert not (folder / ".ivfpq-0123456789ab.faiss.01234567.tmp").exists()
    assert (folder / ".mine.faiss.01234567.tmp").exists()
    assert (folder / ".mine.tmp").exists()
    assert (folder / "notes.tmp").exists()
    assert other.exists()


# ---- ranks


def test_a_missing_rank_is_named_within_the_patience(
    model: LoadedModel, images: list[CaptionedImage], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    monkeypatch.setattr("msa_openclip.search.ranks._REPORT_S", 0.2)
    start = time.monotonic()
    with pytest.raises(ImageIndexError, match=r"rank 1 of 2 has shown no sign of life for 1 s; run the command again"):
        build_index(model, images, str(tmp_path), segment_images=4, peers=Peers(0, 2), patience_s=1.0)
    assert time.monotonic() - start < 60
    assert "waiting for 1 segments of ranks 1." in caplog.text


def test_a_slow_rank_that_lives_is_waited_for(
    model: LoadedModel, images: list[CaptionedImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msa_openclip.search.ranks._BEAT_S", 0.1)
    original = index._encode_segment

    def slow(*arguments: Any) -> None:
        time.sleep(2.0 if threading.current_thread() is not threading.main_thread() else 0.0)
        original(*arguments)

    monkeypatch.setattr(index, "_encode_segment", slow)
    other = threading.Thread(
        target=build_index,
        args=(model, images, str(tmp_path)),
        kwargs={"segment_images": 4, "peers": Peers(1, 2)},
    )
    other.start()
    build_index(model, images, str(tmp_path), segment_images=4, peers=Peers(0, 2), patience_s=1.0)
    other.join()
    assert len(ImageIndex(str(tmp_path), model)) == 7
    assert not list(tmp_path.glob(".rank*"))


# ---- one model


def test_a_build_resumed_with_another_checkpoint_keeps_none_of_its_vectors(
    model: LoadedModel, images: list[CaptionedImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "x")
    interrupted(monkeypatch, model, images, folder)
    other = load(checkpoint(tmp_path, seed=8))
    build_index(other, images, folder)
    build_index(other, images, str(tmp_path / "y"))
    mine, expected = (next(ImageIndex(name, other).features())[1] for name in (folder, str(tmp_path / "y")))
    assert torch.equal(mine, expected)


def with_settings(spec: str, **settings: Any) -> LoadedModel:
    """The same weights, loaded with other settings of open_clip."""
    original = open_clip.create_model_and_transforms
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "create_model_and_transforms", lambda *a, **k: original(*a, **{**k, **settings}))
        return load(spec)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"image_mean": (0.5, 0.5, 0.5)}, "preprocessing mean"),
        ({"image_std": (0.5, 0.5, 0.5)}, "preprocessing std"),
        ({"image_interpolation": "bilinear"}, "preprocessing interpolation"),
        ({"force_quick_gelu": True}, "architecture"),
    ],
)
def test_other_settings_with_equal_weights_are_refused(
    settings: dict[str, Any], named: str, spec: str, images: list[CaptionedImage], built: Path
) -> None:
    other = with_settings(spec, **settings)
    for use in (lambda: ImageIndex(str(built), other), lambda: build_index(other, images, str(built))):
        with pytest.raises(ImageIndexError, match=f"built with the weights of .*, but another {named}"):
            use()


def renamed(base: str, folder: Path, changes: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of equal weights whose configuration differs in some keys; its specification."""
    config = open_clip.get_model_config(base)
    for part, values in changes.items():
        config[part] = {**config[part], **values}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "renamed", config)
    torch.manual_seed(3)
    torch.save(randomise(open_clip.create_model(base)).state_dict(), folder / "renamed.pt")
    return f"renamed={folder / 'renamed.pt'}"


@pytest.mark.parametrize("base", ["tiny-ViT", "MSA-tiny-ViT"])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vision_cfg": {"pool_type": "avg"}}, r"config vision_cfg pool_type \(the default, now avg\)"),
        ({"vision_cfg": {"final_ln_after_pool": True}}, r"config vision_cfg final_ln_after_pool \(the .*, now True\)"),
        ({"text_cfg": {"pool_type": "last"}}, r"config text_cfg pool_type \(the default, now last\)"),
        ({"text_cfg": {"final_ln_after_pool": True}}, "config text_cfg final_ln_after_pool"),
        ({"text_cfg": {"no_causal_mask": True}}, "config text_cfg no_causal_mask"),
        ({"text_cfg": {"tokenizer_kwargs": {"clean": "canonicalize"}}}, "tokens"),
    ],
)
def test_equal_weights_under_another_configuration_are_refused(
    changes: dict[str, dict[str, Any]],
    named: str,
    base: str,
    images: list[CaptionedImage],
    spec: str,
    tmp_path: Path,
    monkeypatch,
) -> None:
    folder = str(tmp_path / "index")
    build_index(load(renamed(base, tmp_path, {}, monkeypatch)), images[:3], folder)
    other = load(renamed(base, tmp_path, changes, monkeypatch))
    for use in (lambda: ImageIndex(folder, other), lambda: build_index(other, images, folder)):
        with pytest.raises(ImageIndexError, match=f"built with the weights of renamed=.*, but another {named}"):
            use()


@pytest.mark.parametrize("base", ["tiny-ViT", "MSA-tiny-ViT"])
def test_configurations_that_say_the_same_share_an_index(
    base: str, images: list[CaptionedImage], tiny_configs: Path, tmp_path: Path, monkeypatch
) -> None:
    folder = str(tmp_path / "index")
    build_index(load(renamed(base, tmp_path, {}, monkeypatch)), images[:3], folder)
    same = {"vision_cfg": {"pool_type": "tok", "timm_model_pretrained": True}, "text_cfg": {"pool_type": "argmax"}}
    assert build_index(load(renamed(base, tmp_path, same, monkeypatch)), images, folder) == 4


def test_an_index_with_fewer_settings_is_asked_but_not_added_to(
    model: LoadedModel, images: list[CaptionedImage], built: Path
) -> None:
    manifest = json.loads((built / "index.json").read_text())
    del manifest["settings"]["config"]
    (built / "index.json").write_text(json.dumps(sealed(manifest)))
    assert len(ImageIndex(str(built), model)) == 7
    with pytest.raises(ImageIndexError, match="a version that did not note the config of its model"):
        build_index(model, images, str(built))


def test_weights_of_another_precision_are_named_as_such(spec: str, images: list[CaptionedImage], built: Path) -> None:
    other = load(spec, precision="bf16")
    for use in (lambda: ImageIndex(str(built), other), lambda: build_index(other, images, str(built))):
        with pytest.raises(
            ImageIndexError, match=r"built in precision fp32, and .* is loaded in bf16.*--precision fp32"
        ):
            use()


def test_another_precision_may_ask_but_not_append(spec: str, images: list[CaptionedImage], built: Path) -> None:
    other = load(spec, precision="amp_bf16")
    assert len(Searcher(ImageIndex(str(built), other)).by_text(["harbor"], k=7)[0]) == 7
    with pytest.raises(ImageIndexError, match=r"another precision \(fp32, now amp_bf16\)"):
        build_index(other, images, str(built))


def test_an_index_loads_no_model_by_its_own_word(built: Path, spec: str, tmp_path: Path, capsys) -> None:
    """Its manifest names a folder with a model; what the user has loaded for an index before is found again."""
    assert model_of(str(built), None) == spec
    manifest = json.loads((built / "index.json").read_text())
    manifest |= {"model": f"local-dir:{built}/model", "fingerprint": "0" * 64}
    (built / "index.json").write_text(json.dumps(sealed(manifest)))  # whoever forges one computes that, too
    for command in (["search", str(built), "x"], ["demo", str(built)]):
        assert cli.main(command) == 1
        error = capsys.readouterr().err
        assert f"add --model local-dir:{built}/model" in error
        assert len(error.splitlines()) == 1
    assert cli.main(["search", str(built), "x", "--model", spec]) == 1
    assert "built with other weights" in capsys.readouterr().err


# ---- the images that it was built from


def test_who_has_no_home_knows_no_models(built: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container that runs under a number without a user of that number."""
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    remember(model)
    with pytest.raises(ImageIndexError, match="a place that you have not used for an index before"):
        model_of(str(built), None)


def test_images_of_two_sets_with_equal_names_are_both_there(model: LoadedModel, tmp_path: Path) -> None:
    first, second = (read_folder(pictures(tmp_path / name, number)) for name, number in (("a", 3), ("b", 140)))
    folder = str(tmp_path / "index")
    assert [build_index(model, images, folder) for images in (first, second, first, second)] == [1, 1, 0, 0]
    found = ImageIndex(folder, model)
    assert [image.location.url for image in found.images] == [str(tmp_path / name / "1.png") for name in "ab"]


def test_shards_of_two_sets_with_equal_ids_are_kept_apart(model: LoadedModel, tmp_path: Path) -> None:
    """In two folders or in one; and an image that is in both is one image with all its captions."""
    one, two = (write_shards(tmp_path / name, count=5, shards=1) for name in "ab")
    tars = {}
    for name, pattern, colour in (("a", one, 0), ("b", two, 200)):
        (tars[name],) = {image.location.url for image in read_shards(pattern)}
        if colour:
            rewrite(Path(tars[name]), colour)
    found = read_shards(f"{one}::{two}")
    assert len(found) == 10
    assert len({image.image_id for image in found}) == 5
    shutil.copy(tars["b"], Path(tars["a"]).parent / "other.tar")
    assert len(read_shards([tars["a"], str(Path(tars["a"]).parent / "other.tar")])) == 10
    same = read_shards([tars["a"], tars["a"]])
    assert [len(image.captions) for image in same] == [10] * 5
    assert build_index(model, read_shards(tars["a"]), str(tmp_path / "index")) == 5
    assert build_index(model, read_shards(tars["b"]), str(tmp_path / "index")) == 5


def rewrite(tar: Path, colour: int) -> None:
    """The same tar with other pictures."""
    import io
    import tarfile

    with tarfile.open(tar) as old:
        members = [(member, old.extractfile(member).read()) for member in old]
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as new:
        for number, (member, data) in enumerate(members):
            if member.name.endswith((".png", ".jpg", ".webp")):
                buffer = io.BytesIO()
                Image.fromarray(np.full((24, 24, 3), colour + number, dtype=np.uint8)).save(buffer, format="PNG")
                data, member.size = buffer.getvalue(), len(buffer.getvalue())
            new.addfile(member, io.BytesIO(data))


def test_images_replaced_before_a_resume_are_encoded_again(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = pictures(tmp_path / "a", 3, 40, 100), str(tmp_path / "x")
    interrupted(monkeypatch, model, read_folder(source), folder, segment_images=1)
    status = os.stat(f"{source}/2.png")
    scene(200).save(f"{source}/2.png")
    os.utime(f"{source}/2.png", ns=(status.st_atime_ns, status.st_mtime_ns))  # times tell nothing
    build_index(model, read_folder(source), folder, segment_images=1)
    build_index(model, read_folder(source), str(tmp_path / "y"), segment_images=1)
    mine, expected = (
        torch.cat([part for _, part in ImageIndex(name, model).features()]) for name in (folder, str(tmp_path / "y"))
    )
    assert torch.equal(mine, expected)


def test_images_that_have_changed_since_are_named(model: LoadedModel, tmp_path: Path) -> None:
    source, folder = pictures(tmp_path / "a", 3, 40), str(tmp_path / "x")
    build_index(model, read_folder(source), folder)
    scene(200).save(f"{source}/2.png")
    with pytest.raises(
        ImageIndexError, match=r"1 images are not what they were when they were indexed, first .*2\.png"
    ):
        build_index(model, read_folder(source), folder)


def test_images_that_cannot_be_read_are_left_out_named_and_tried_again_once_repaired(
    model: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, folder = pictures(tmp_path / "a", 3, 40, 100), str(tmp_path / "x")
    good = Path(source, "2.png").read_bytes()
    Path(source, "2.png").write_bytes(good[:60])
    Path(source, "4.jpg").write_bytes(b"")
    assert build_index(model, read_folder(source), folder, segment_images=2) == 2
    assert "Left out of the index" in caplog.text
    assert "2.png" in caplog.text
    assert "4.jpg" in caplog.text
    assert verify_index(folder).rejected == 2
    assert build_index(model, read_folder(source), folder, segment_images=2) == 0
    Path(source, "2.png").write_bytes(good)
    assert build_index(model, read_folder(source), folder, segment_images=2) == 1
    assert len(ImageIndex(folder, model)) == 3
    only_bad = tmp_path / "bad"
    only_bad.mkdir()
    (only_bad / "1.png").write_bytes(good[:60])
    assert build_index(model, read_folder(str(only_bad)), str(tmp_path / "none")) == 0
    assert Searcher(ImageIndex(str(tmp_path / "none"), model)).by_text(["x"]) == [[]]


def test_a_pipe_among_the_images_is_left_out(model: LoadedModel, tmp_path: Path) -> None:
    source = pictures(tmp_path / "a", 3)
    os.mkfifo(f"{source}/2.png")
    images = read_folder(source)
    assert build_index(model, images, str(tmp_path / "x")) == 1


@pytest.mark.parametrize("name", ["batch_size", "segment_images", "workers"])
def test_numbers_out_of_range(name: str, model: LoadedModel, images: list[CaptionedImage], tmp_path: Path) -> None:
    with pytest.raises(ImageIndexError, match=f"{name}: -5 must be at least"):
        build_index(model, images, str(tmp_path), **{name: -5})


# ---- files as they were written


def test_every_flipped_byte_is_found(built: Path, model: LoadedModel) -> None:
    """By `verify`, and by a search before it answers with what the byte is part of."""
    draw = random.Random(5)
    expected = Searcher(ImageIndex(str(built), model)).by_text(["harbor number 3"], k=7)
    for path in sorted(path for path in built.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for place in [*range(0, len(data), max(1, len(data) // 12)), len(data) - 1] if data else []:
            changed = bytearray(data)
            changed[place] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            problems = verify_index(str(built)).problems
            assert problems, (path.name, place)
            with suppress(ImageIndexError):  # of a part that no answer needs a search knows nothing
                found = Searcher(ImageIndex(str(built), model)).by_text(["harbor number 3"], k=7)
                assert found == expected, (path.name, place)
        path.write_bytes(data)
    assert verify_index(str(built)).problems == []


@pytest.mark.parametrize("name", ["features.npy", "projected.npy", "tiles.parquet", "segment.json", "index.json"])
@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"{", b"[" * 100_000, b"\xff" * 300, b"null", b"{}"])
def test_files_that_are_something_else_are_named(name: str, content: bytes, built: Path, model: LoadedModel) -> None:
    path = next(built.rglob(name))
    path.write_bytes(content)
    with pytest.raises(ImageIndexError, match=r"damaged|not found"):
        Searcher(ImageIndex(str(built), model)).by_text(["x"], k=7)
    assert verify_index(str(built)).problems


@pytest.mark.parametrize("name", ["features.npy", "tiles.parquet", "segment.json", "index.json"])
def test_a_pipe_in_an_index_is_refused(name: str, built: Path, model: LoadedModel) -> None:
    path = next(built.rglob(name))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ImageIndexError, match="regular file"):
        ImageIndex(str(built), model)
    assert verify_index(str(built)).problems


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../elsewhere"},
        {"name": "/etc"},
        {"images": -1},
        {"images": True},
        {"images": 10**30},
        {"checksum": None},
        {"more": 1},
    ],
)
def test_a_manifest_leads_nowhere_else(change: dict[str, Any], built: Path, model: LoadedModel) -> None:
    manifest = json.loads((built / "index.json").read_text())
    manifest["segments"][0] |= change
    (built / "index.json").write_text(json.dumps(sealed(manifest)))  # whoever forges one computes that, too
    with pytest.raises(ImageIndexError, match="damaged"):
        ImageIndex(str(built), model)


def forge_extent(built: Path, **bbox: Any) -> None:
    """Another `bbox` in a segment.json, or none, with checksums to match."""
    path = next(built.glob("*/segment.json"))
    content = {name: value for name, value in json.loads(path.read_text()).items() if name != "bbox"}
    path.write_text(json.dumps(content | bbox))
    manifest = json.loads((built / "index.json").read_text())
    (segment,) = [row for row in manifest["segments"] if row["name"] == path.parent.name]
    segment["checksum"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (built / "index.json").write_text(json.dumps(sealed(manifest)))


def test_an_index_of_an_earlier_version_does_not_say_where_its_segments_lie(built: Path, model: LoadedModel) -> None:
    forge_extent(built)
    assert verify_index(str(built)).problems == []
    assert len(Searcher(ImageIndex(str(built), model)).by_text(["x"], k=7)[0]) == 7


def test_a_segment_that_lies_elsewhere_than_its_images_is_found_by_verify(built: Path) -> None:
    forge_extent(built, bbox=[0, 0, 1, 1])
    (problem,) = verify_index(str(built)).problems
    assert "segment.json: bbox is not that of the images" in problem


@pytest.mark.parametrize("bbox", [[0, 0, 1], "west", {}, [0, 0, 1, None]])
def test_an_odd_place_of_a_segment_is_named(bbox: Any, built: Path, model: LoadedModel) -> None:
    forge_extent(built, bbox=bbox)
    with pytest.raises(ImageIndexError, match="damaged"):
        ImageIndex(str(built), model)


def test_verify_as_a_command(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["index", "verify", str(built)]) == 0
    assert capsys.readouterr().out == f"{built}: 7 images in 2 segments, 0 left out; every file is as it was written.\n"
    path = next(built.rglob("projected.npy"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert cli.main(["index", "verify", str(built)]) == 1
    assert "projected.npy" in capsys.readouterr().out


def test_a_kill_leaves_files_that_verify(spec: str, tiny_configs: Path, tmp_path: Path) -> None:
    """SIGKILL wherever it comes: what has its name is whole, and the same command makes the same index."""
    source = pictures(tmp_path / "a", *range(9))
    environment = {**os.environ, "MSA_OPENCLIP_CONFIGS": str(tiny_configs)}
    command = [sys.executable, "-m", "msa_openclip", "index", spec, str(tmp_path / "x"), "--folder", source]
    command += ["--segment-images", "1", "--batch-size", "1"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob("x/*/segment.json"))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run_new_python(*command[1:], env=environment)
    assert done.returncode == 0, done.stderr
    verified = verify_index(str(tmp_path / "x"))
    assert verified.problems == []
    assert verified.images == 9


def test_a_damaged_file_of_faiss_is_found_by_verify(
    tmp_path: Path, model: LoadedModel, images: list[CaptionedImage]
) -> None:
    folder = tmp_path / "index"
    build_index(model, images, str(folder))
    path = folder / "hnsw-0.faiss"
    path.write_bytes(b"graph" * 100)
    (folder / "hnsw-0.faiss.json").write_text(json.dumps(checksums(path)))
    assert verify_index(str(folder)).problems == []
    path.write_bytes(b"graph" * 99 + b"grapf")
    (problem,) = verify_index(str(folder)).problems
    assert problem.startswith(f"{path}: damaged")
