"""The search page: what it shows, and, in a real browser, that typing and clicking show it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from helpers.retrieval_data import randomise, scene, write_shards
from PIL import Image

from msa_openclip.commands.demo_page import DemoError, chart, find, page, reasons, tiles
from msa_openclip.data.readers import read_shards
from msa_openclip.evaluation.loading import load
from msa_openclip.search.build import build_index
from msa_openclip.search.index import ImageIndex
from msa_openclip.search.searcher import Searcher


@pytest.fixture(scope="module")
def searcher(tiny_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    """Five scenes, the first three with a class and a place on Earth."""
    folder = tmp_path_factory.mktemp("demo")
    torch.save(randomise(open_clip.create_model("MSA-tiny-ViT"), seed=3).state_dict(), folder / "msa.pt")
    model = load(f"MSA-tiny-ViT={folder / 'msa.pt'}")
    images = read_shards(write_shards(folder, count=5))
    placed = [
        replace(image, label="water", metadata={"geo": {"bounds": [n, 0, n + 1, 1]}}) if n < 3 else image
        for n, image in enumerate(images)
    ]
    build_index(model, placed, str(folder / "index"))
    return Searcher(ImageIndex(str(folder / "index"), model))


def test_sentence_picture_and_classes(searcher: Searcher) -> None:
    assert len(find(searcher, "harbor number 3", None, "")) == 5
    assert len(find(searcher, "harbor", None, " water, ice ")) == 3
    assert find(searcher, " ", None, "") == []
    (first, *_) = find(searcher, "", scene(4), "")
    assert first.image.image_id == "forest_4"


def test_answers_show_picture_place_and_scales(searcher: Searcher) -> None:
    hits = find(searcher, "harbor number 3", None, "")
    shown = tiles(hits)
    assert [below for _, below in shown] == [
        f"{n}. {hit.score:.2f} ({hit.match[0]:.1f} {hit.match[1]:.1f})" for n, hit in enumerate(hits, start=1)
    ]
    assert isinstance(shown[0][0], Image.Image)


def test_reasons_and_map(searcher: Searcher) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing (extra `plot`)")
    hits = find(searcher, "harbor number 3", None, "")
    drawn, metadata = reasons(searcher, hits[0], "harbor number 3")
    assert [label.get_text() for label in drawn.axes[2].get_yticklabels()][:3] == ["harbor", "number", "3"]
    assert hits[0].image.image_id in metadata
    assert reasons(searcher, hits[0], "")[0] is None
    assert len(chart(hits).axes[0].patches) == 3
    assert chart([hit for hit in hits if hit.image.label is None]) is None


def test_without_gradio_the_remedy_is_named(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(DemoError, match=r"gradio is missing: pip install 'msa_openclip\[demo\]'"):
        page(searcher)


@pytest.fixture
def address(searcher: Searcher, tiny_configs: Path) -> Iterator[str]:
    """The page, served by `msa-openclip demo` in a process of its own."""
    pytest.importorskip("gradio", reason="gradio is missing (extra `demo`)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "msa_openclip", "demo", searcher.index.folder, "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "MSA_OPENCLIP_CONFIGS": str(tiny_configs)})
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(240):
            assert process.poll() is None, "the demo ended at once"
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def test_in_a_browser(address: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on the PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 1400})
        tab.goto(address)
        box = tab.get_by_label("Sentence")
        box.fill("harbor number 3")
        tab.get_by_role("button", name="Search").click()
        first = tab.locator(".gallery-item, .thumbnail-item").first
        first.wait_for(timeout=60_000)
        assert tab.locator(".gallery-item img, .thumbnail-item img").count() >= 5
        first.click()
        tab.get_by_text("cosine").wait_for(timeout=60_000)
        tab.screenshot(path=os.environ.get("MSA_DEMO_SCREENSHOT", str(tmp_path / "demo.png")))
        box.fill("harbor")
        tab.get_by_label("Classes (optional, with commas)").fill("ice")
        tab.get_by_role("button", name="Search").click()
        tab.get_by_text("Nothing found.").wait_for(timeout=60_000)
        browser.close()
