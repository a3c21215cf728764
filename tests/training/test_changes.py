"""Change pairs end to end, by the commands of docs/how-to/dates.md: changes are found, and swapped dates are others.

The thresholds are far from chance, and far below what trainings of this size reach: R@10 was 36 and 70 with two seeds,
the order right for 62 and 85 % of the changes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import open_clip
import pytest
from helpers.markdown import shell_lines
from helpers.processes import run_new_python

from msa_openclip.commands import main as cli
from msa_openclip.shards.synthetic.changes import NOTHING

PAGE = (Path(__file__).parents[2] / "docs/how-to/dates.md").read_text(encoding="utf-8")
EXAMPLE = PAGE[PAGE.index("## Try it") : PAGE.index("## Shards of your own")]
DRAW, _, TRAIN, EVAL, INDEX, *OTHERS, _ = shell_lines(EXAMPLE)  # without the export, and the benchmark at the end
PLACES = 200


def command(line: str, *more: object) -> None:
    """Run a line of the page as it stands, with what is to be added; subcommands of msa-openclip in this process."""
    words = [*shlex.split(line), *map(str, more)]
    if words[0] == "msa-openclip":
        assert cli.main(words[1:]) in (0, None)
        return
    environment = {**os.environ, "MSA_OPENCLIP_CONFIGS": "configs"}
    done = run_new_python(*words[1:], env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the page's example has run up to its training."""
    folder = tmp_path_factory.mktemp("changes")
    (config,) = re.findall(r"^```json\n(.*?)^```$", EXAMPLE, flags=re.MULTILINE | re.DOTALL)
    (folder / "configs").mkdir()
    (folder / "configs/changes.json").write_text(config, encoding="utf-8")
    open_clip.add_model_config(folder / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command(DRAW, "--quiet")
        command(TRAIN)
        swap(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_its_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def swap(folder: Path) -> None:
    """`swapped/shards`: the places of the test split with their dates in the wrong order."""
    command(f"msa-openclip shards synthesize swapped --train 0 --val 0 --test {PLACES} --dates 2 --size-px 48 --quiet")
    path = folder / "swapped/captions.json"
    drawn = json.loads(path.read_text())
    for row in drawn["images"]:
        row["filenames"].reverse()
        del row["dates"]  # they would tell
    path.write_text(json.dumps(drawn))
    command("msa-openclip shards build swapped/captions.json swapped/shards --shards 4 --quiet")


def rated(shards: str) -> dict[str, float]:
    """Metrics of the fused ranking."""
    command(EVAL.replace("'places/test", f"'{shards}/test"), "--bootstrap", 0, "--workers", 0, "--json", "rated.json")
    (result,) = json.loads(Path("rated.json").read_text())["models"]
    found: dict[str, float] = result["metrics"]["fused"]
    return found


def test_changes_are_found_and_swapped_dates_are_not() -> None:
    right, swapped = rated("places"), rated("swapped/shards")
    by_chance = 100 * 10 / PLACES
    assert right["t2i_R@10"] > 4 * by_chance
    for metric in ("t2i_R@10", "i2t_R@10"):
        assert right[metric] > 1.5 * swapped[metric]


def test_a_search_tells_a_change_from_its_reverse(capsys: pytest.CaptureFixture[str]) -> None:
    """With both orders of every place in one index: which of the two comes first."""
    both = "places/test-{000000..000003}.tar::swapped/shards/test-{000000..000003}.tar"
    command(INDEX.replace("places.index", "both.index"), "--shards", both, "--workers", 0)
    rows: list[dict[str, Any]] = json.loads(Path("swapped/captions.json").read_text())["images"]
    asked = {row["sentences"][0]["raw"]: row["filenames"] for row in rows if row["class"] != NOTHING}
    capsys.readouterr()
    command("msa-openclip search both.index", *asked, "--json", "-k", 2 * PLACES, "--candidates", 2 * PLACES)
    first = []
    for line in capsys.readouterr().out.splitlines():
        answer = json.loads(line)
        place = {name.rsplit(".", 1)[0] for name in asked[answer["query"]]}
        own = next(hit["image_id"] for hit in answer["hits"] if hit["image_id"] in place)
        first.append(own.endswith("_2000"))  # an id is the name of what stands for the first date
    assert len(first) > PLACES / 2
    assert sum(first) / len(first) > 0.55


def test_the_other_commands_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    command(INDEX, "--workers", 0)
    for line in OTHERS:
        command(line)
    said = capsys.readouterr().out
    assert "test_000" in said
    assert "a forest appeared in the upper left: cosine" in said
