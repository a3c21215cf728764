"""Images of several dates: equal random draws for all of them, reading them from shards, side by side to look at."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.stream_data import image_bytes, tar_bytes
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps

from msa_openclip.data.captioned import EvalDataError
from msa_openclip.data.pixels import image_pixels, load_dates, load_image, preprocessed
from msa_openclip.data.readers import read_captions, read_shards
from msa_openclip.shards.synthetic.scenes import synthesize


def noise(number: int, size: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "aug_cfg",
    [
        {"scale": (0.3, 1.0), "dihedral": True},
        {"scale": (0.3, 1.0), "use_timm": True, "color_jitter": 0.4, "re_prob": 1.0, "re_count": 1},
    ],
)
def test_dates_are_augmented_alike_and_samples_are_not(aug_cfg: dict[str, object]) -> None:
    augment = image_transform_v2(PreprocessCfg(size=32, mean=(0, 0, 0), std=(1, 1, 1)), is_train=True, aug_cfg=aug_cfg)
    torch.manual_seed(0)
    random.seed(0)
    image = noise(1)
    first = preprocessed([image, image, image], augment)
    assert first.shape == (3, 3, 32, 32)
    assert first[1].equal(first[0])
    assert first[2].equal(first[0])
    second = preprocessed([image, image], augment)
    assert not second[0].equal(first[0])


def test_what_is_drawn_does_not_depend_on_the_number_of_dates() -> None:
    augment = image_transform_v2(PreprocessCfg(size=32), is_train=True, aug_cfg={"scale": (0.3, 1.0)})
    after = []
    for dates in (1, 2, 5):
        torch.manual_seed(3)
        preprocessed([noise(1)] * dates, augment)
        after.append(torch.rand(()))
    assert len(set(map(float, after))) == 1


def test_a_crop_is_of_the_same_place_at_both_dates() -> None:
    augment = image_transform_v2(
        PreprocessCfg(size=32, mean=(0, 0, 0), std=(1, 1, 1)), True, aug_cfg={"scale": (0.2, 0.6)}
    )
    image = noise(2)
    torch.manual_seed(1)
    before, after = preprocessed([image, ImageOps.invert(image)], augment)
    assert (before + after - 1).abs().max() < 0.03  # a negative stays one wherever it is cut out


def test_dates_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="40 x 40, 30 x 30"):
        preprocessed([noise(1), noise(2, 30)], lambda image: torch.zeros(1))


def write(path: Path, *groups: list[tuple[str, bytes]]) -> str:
    path.write_bytes(tar_bytes([member for group in groups for member in group]))
    return str(path)


def sample(key: str, numbers: list[int], metadata: bytes | None = None) -> list[tuple[str, bytes]]:
    dated = [(f"{key}.{date}.png", image_bytes(number)) for date, number in enumerate(numbers)]
    about = [(f"{key}.json", metadata)] if metadata else []
    return [*dated, (f"{key}.txt", b"something changed"), *about]


def test_shards_are_read_date_by_date_and_shown_side_by_side(tmp_path: Path) -> None:
    url = write(tmp_path / "a.tar", sample("k0", [1, 2], b'{"dates": ["2015", null]}'), sample("k1", [3, 4]))
    first, second = read_shards(url)
    assert [image.getpixel((0, 0))[2] for image in load_dates(second)] == [3, 4]
    assert first.metadata["dates"] == ["2015", None]
    assert first.content != second.content
    shown = load_image(first)
    assert shown.size == (2 + 4 + 2, 3)
    assert (shown.getpixel((0, 0))[2], shown.getpixel((7, 2))[2], shown.getpixel((3, 0))[2]) == (1, 2, 255)
    assert image_pixels(first, lambda image: torch.tensor([image.getpixel((0, 0))[2]])).tolist() == [[1], [2]]


@pytest.mark.parametrize(
    ("groups", "what"),
    [
        ([sample("k0", [1, 2]), sample("k1", [1, 2, 3])], "has 3 dates, sha256.* has 2; read sets of one number"),
        ([sample("k0", [1, 2], b'{"dates": ["2015", "2016", "2017"]}')], "sample k0: 2 images, its JSON says"),
        ([sample("k0", [1, 2], b'{"dates": "2015"}')], "dates is '2015', expected a list"),
        ([[("k0.1.png", image_bytes(1)), ("k0.txt", b"late")]], "it needs KEY.txt and one of"),
    ],
)
def test_samples_that_lack_a_date_are_refused(tmp_path: Path, groups: list[list[tuple[str, bytes]]], what: str) -> None:
    with pytest.raises(EvalDataError, match=what):
        read_shards(write(tmp_path / "a.tar", *groups))


def test_caption_files_name_pairs_too(tmp_path: Path) -> None:
    path = synthesize(str(tmp_path), {"test": 3}, dates=2, size_px=32)
    images = read_captions(path, str(tmp_path))
    assert [len(image.locations) for image in images] == [2, 2, 2]
    assert images[0].locations[1].url.endswith("test_000000_2001.jpg")
