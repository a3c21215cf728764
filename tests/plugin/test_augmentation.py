"""`--aug-cfg dihedral=True`: flips and quarter turns in the training transform of every model, and nothing else."""

from __future__ import annotations

import collections
import pickle
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip_train.params import parse_args
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from msa_openclip.plugin.augmentation import RandomDihedral

pytestmark = pytest.mark.filterwarnings("ignore:Unused augmentation cfg items")  # open_clip's, of some that it uses

Run = Callable[..., subprocess.CompletedProcess[str]]

PIXELS = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)  # (h, w, channels), no symmetry
TURNS = [np.rot90(side, turns) for side in (PIXELS, PIXELS[:, ::-1]) for turns in range(4)]
"""The 8 elements of the dihedral group by numpy, as the oracle."""


def picture() -> Image.Image:
    return Image.fromarray(PIXELS)


def which(image: Image.Image) -> int:
    """Number in TURNS."""
    (found,) = (i for i, turned in enumerate(TURNS) if np.array_equal(np.asarray(image), turned))
    return found


def test_each_of_the_eight_is_equally_likely() -> None:
    torch.manual_seed(0)
    counts = collections.Counter(which(RandomDihedral()(picture())) for _ in range(1600))
    assert set(counts) == set(range(8))
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def test_it_can_be_pickled_and_follows_the_seed() -> None:
    transform = pickle.loads(pickle.dumps(RandomDihedral()))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append([which(transform(picture())) for _ in range(20)])
    assert drawn[0] == drawn[1] != drawn[2]


class Turned(Dataset[int]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        return which(RandomDihedral()(picture()))


def test_workers_draw_differently() -> None:
    torch.manual_seed(0)
    drawn = [int(x) for x in DataLoader(Turned(), batch_size=None, num_workers=2)]
    assert drawn[0::2] != drawn[1::2]


# ---- in open_clip


def transforms(model: str, aug_cfg: dict[str, Any] | None) -> tuple[Any, Any]:
    _, train, val = open_clip.create_model_and_transforms(model, aug_cfg=aug_cfg)
    return train, val


def seeded(transform: Callable[[Image.Image], Tensor], image: Image.Image, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    random.seed(seed)  # of open_clip's colour jitter
    return transform(image)


@pytest.fixture(scope="module")
def square() -> Image.Image:
    """As large as the tiny models' input, so that a whole image is not interpolated."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("model", ["tiny-ViT", "MSA-tiny-ViT"])
@pytest.mark.parametrize("others", [{}, {"use_timm": True, "ratio": (1.0, 1.0), "re_prob": 0.0}])
def test_the_training_transform_turns_whole_images(
    model: str, others: dict[str, Any], tiny_configs: Path, square: Image.Image
) -> None:
    train, val = transforms(model, {"dihedral": True, "scale": (1.0, 1.0), **others})
    assert "RandomDihedral()" in repr(train)
    assert "RandomDihedral" not in repr(val)
    straight = val(square)
    group = [straight.rot90(turns, (1, 2)) for turns in range(4)]
    group += [x.flip(2) for x in group]
    seen = {
        next(i for i, x in enumerate(group) if torch.allclose(x, turned, atol=1e-5))
        for turned in (seeded(train, square, seed) for seed in range(60))
    }
    assert seen == set(range(8))


@pytest.mark.parametrize("model", ["tiny-ViT", "MSA-tiny-ViT"])
@pytest.mark.parametrize(
    "aug_cfg",
    [None, {}, {"scale": (0.5, 0.8)}, {"color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0.9}],
)
def test_nothing_changes_unless_asked_for(
    model: str, aug_cfg: dict[str, Any] | None, tiny_configs: Path, square: Image.Image
) -> None:
    for asked in (aug_cfg, {**(aug_cfg or {}), "dihedral": False}):
        train, val = transforms(model, asked)
        own = open_clip.transform.image_transform.__wrapped__(32, is_train=True, aug_cfg=aug_cfg)
        assert [type(step) for step in train.transforms] == [type(step) for step in own.transforms]
        assert seeded(train, square).equal(seeded(own, square))
        assert "RandomDihedral" not in repr(val)


def test_the_callers_dictionary_is_left_alone(tiny_configs: Path) -> None:
    asked = {"dihedral": True, "scale": (1.0, 1.0)}
    transforms("tiny-ViT", asked)
    assert asked == {"dihedral": True, "scale": (1.0, 1.0)}


def test_other_keys_act_behind_the_turn(tiny_configs: Path) -> None:
    train, _ = transforms("tiny-ViT", {"dihedral": True, "scale": (0.5, 0.6), "gray_scale_prob": 0.25})
    first, rest = train.transforms
    assert isinstance(first, RandomDihedral)
    assert rest.transforms[0].scale == (0.5, 0.6)
    assert "gray_scale" in repr(rest)


@pytest.mark.parametrize("value", ["yes", "true", 1, None, 0.5])
def test_a_wrong_value_is_refused_by_name(value: object, tiny_configs: Path) -> None:
    with pytest.raises(ValueError, match=r"aug_cfg\.dihedral: got .*, expected True or False"):
        transforms("tiny-ViT", {"dihedral": value})


def test_unknown_keys_are_still_open_clips_to_refuse(tiny_configs: Path) -> None:
    with pytest.raises(TypeError, match="hexagonal"):
        transforms("tiny-ViT", {"dihedral": True, "hexagonal": True})


def test_as_the_command_line_gives_it(tiny_configs: Path) -> None:
    parsed = parse_args(["--model", "tiny-ViT", "--aug-cfg", "dihedral=True", "scale=(1.0, 1.0)"])
    train, _ = transforms("tiny-ViT", parsed.aug_cfg)
    assert [type(step).__name__ for step in train.transforms] == ["RandomDihedral", "Compose"]


@pytest.mark.parametrize("order", ["import open_clip", "import open_clip, msa_openclip"])
def test_active_in_fresh_processes(order: str, run_python: Run) -> None:
    code = """
from open_clip.transform import image_transform, image_transform_v2, PreprocessCfg
for made in (image_transform(32, True, aug_cfg={"dihedral": True}),
             image_transform_v2(PreprocessCfg(32), is_train=True, aug_cfg={"dihedral": True}),
             open_clip.create_model_and_transforms("tiny-ViT", aug_cfg={"dihedral": True})[1]):
    print(type(made.transforms[0]).__name__)
print(type(image_transform_v2(PreprocessCfg(32), is_train=False, aug_cfg={"dihedral": True}).transforms[0]).__name__)
"""
    environment = {} if order == "import open_clip" else {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = run_python(order + code, **environment)
    assert done.stdout.split() == ["RandomDihedral"] * 3 + ["Resize"]
