"""The method of one's own of docs/explanation/methods.md: its blocks, put where the page says, train as it says."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from helpers.markdown import python_blocks
from helpers.processes import run_new_python

from msa_openclip.config import Loss

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/explanation/methods.md").read_text(encoding="utf-8")
IN_NEW_PROCESS = """
import json, sys, torch
from msa_openclip import MSALoss
from msa_openclip.config import MSACfg

loss = {**json.loads(sys.argv[1])["loss"], "global_weight": 1, "fused_weight": 0}
cfg = MSACfg.from_dict({"image_scales": [{"stage": 1}], "loss": loss})
cosine = torch.tensor(json.loads(sys.argv[2]), dtype=torch.float64, requires_grad=True)
# Texts are unit vectors of an axis each, so that the rows of the images are the cosines.
loss = MSALoss(cfg)(cosine, torch.eye(3, dtype=torch.float64), torch.tensor(4.0), text_ids=torch.arange(3)[:, None])
loss.backward()
print(json.dumps([loss.item(), cosine.grad.tolist()]))
"""


def edited(path: Path, pattern: str, new: str) -> None:
    """Replace the one place of a file where a pattern is."""
    content, count = re.subn(pattern, lambda match: new, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert count == 1, (path, pattern)
    path.write_text(content, encoding="utf-8")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package into which the page's lines have been written."""
    folder = tmp_path_factory.mktemp("own")
    copy = shutil.copytree(ROOT / "msa_openclip", folder / "msa_openclip", ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("shards", "model_configs"):
        (copy / part).symlink_to(ROOT / part)
    setting, function, branch, _ = python_blocks(PAGE)
    edited(copy / "config.py", r"^    pair_weights: Literal.*\n", textwrap.indent(setting, "    "))
    weights, loss = copy / "training/pair_weights.py", copy / "training/loss.py"
    weights.write_text(f"{weights.read_text(encoding='utf-8')}\n\n{function}", encoding="utf-8")
    edited(loss, r"^from \.pair_weights import ", "from .pair_weights import focal_loss, ")
    before = '        if cfg.pair_weights == "self_paced":\n'
    edited(loss, re.escape(before), textwrap.indent(branch, "        ") + before)
    return folder


def test_it_is_as_short_as_the_page_says() -> None:
    assert sum(len(block.splitlines()) for block in python_blocks(PAGE)) <= 20
    assert "focal" not in str(Loss.__annotations__)


def test_its_loss_and_gradient_are_those_of_the_formula(package: Path) -> None:
    (row,) = re.findall(r'^METHODS\["focal"\] = (.*)$', PAGE, flags=re.MULTILINE)
    cosine = [[0.8, 0.1, 0.3], [0.2, 0.4, 0.6], [0.1, 0.5, 0.7]]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = run_new_python("-c", IN_NEW_PROCESS, row, json.dumps(cosine), env=environment, cwd=package)
    assert done.returncode == 0, done.stderr
    value, gradient = json.loads(done.stdout)
    expected, weight = 0.0, []
    for i in range(3):
        directions = cosine[i], [cosine[j][i] for j in range(3)]
        loss = sum(math.log(sum(math.exp(4 * (s - row[i])) for s in row)) for row in directions) / 2
        weight.append((1 - math.exp(-loss)) ** 2)
        expected += weight[-1] * loss / 3
    assert value == pytest.approx(expected)
    logits = 4 * torch.tensor(cosine, dtype=torch.float64)
    share = torch.tensor(weight, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    by_hand = (share[:, None] * (logits.softmax(1) - eye) + share * (logits.softmax(0) - eye)) * 4 / (2 * 3)
    torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64), by_hand)
