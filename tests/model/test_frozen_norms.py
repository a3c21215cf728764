"""`--lock-image-freeze-bn-stats` on timm towers, whose norms carry their activation."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from helpers import tiny
from torch import nn


@pytest.mark.filterwarnings("ignore:Importing from timm.models.helpers:FutureWarning")  # by open_clip
@pytest.mark.parametrize("unlocked", [0, 1])
def test_frozen_statistics_change_no_feature(unlocked: int, tiny_configs: Path) -> None:
    model = open_clip.create_model("MSA-tiny-BERT").eval()
    images = tiny.images(model)
    with torch.no_grad():
        expected, _ = model.pooled_scales(images)
    model.lock_image_tower(unlocked_groups=unlocked, freeze_bn_stats=True)
    with torch.no_grad():
        torch.testing.assert_close(model.pooled_scales(images)[0], expected)
    norms = [module for module in model.visual.trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    locked = [norm for norm in norms if not norm.weight.requires_grad]
    assert locked == []  # they are no batch norms any more
    assert bool(norms) == bool(unlocked)
    before = {name: value.clone() for name, value in model.visual.state_dict().items() if "running" in name}
    model.train()
    model.pooled_scales(images)
    kept = [name for name, value in before.items() if torch.equal(model.visual.state_dict()[name], value)]
    assert len(kept) == len(before) - 2 * len(norms)


def test_a_checkpoint_of_frozen_norms_loads(tiny_configs: Path, tmp_path: Path) -> None:
    model = open_clip.create_model("MSA-tiny-BERT").eval()
    model.lock_image_tower(freeze_bn_stats=True)
    torch.save(model.state_dict(), tmp_path / "frozen.pt")
    loaded = open_clip.create_model("MSA-tiny-BERT", pretrained=str(tmp_path / "frozen.pt")).eval()
    images = tiny.images(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded.pooled_scales(images)[0], model.pooled_scales(images)[0])
