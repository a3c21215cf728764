"""The demo: what its answers hold, what it refuses, and, in a real browser, that the map and the list work."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import open_clip
import pytest
import torch
from helpers.retrieval_data import randomise, scene, square, write_shards

from msa_openclip.data.readers import read_shards
from msa_openclip.demo import app as demo
from msa_openclip.demo.answers import Answers
from msa_openclip.evaluation.loading import load
from msa_openclip.search.build import build_index
from msa_openclip.search.index import ImageIndex
from msa_openclip.search.searcher import Searcher

HOSTILE = "<img src=x onerror=\"document.title='acted'\"><script>document.title='acted'</script>\x1b[2J\u202e"
WATER = {"harbor_0", "forest_1", "runway_2"}


@pytest.fixture(scope="module")
def searchers(tiny_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Searcher]:
    """Five scenes: `map`, the first three water in places on Earth, one of hostile name; `list`, without places."""
    folder = tmp_path_factory.mktemp("demo")
    torch.save(randomise(open_clip.create_model("MSA-tiny-ViT"), seed=3).state_dict(), folder / "msa.pt")
    model = load(f"MSA-tiny-ViT={folder / 'msa.pt'}")
    images = sorted(read_shards(write_shards(folder, count=5)), key=lambda image: image.image_id[-1])
    placed = [
        replace(image, label="water", metadata={"geo": {"footprint": square(10 + 2 * n, 50)}, "meta": {"date": "2020"}})
        for n, image in enumerate(images[:3])
    ]
    hostile = replace(images[3], image_id=HOSTILE, label=HOSTILE, captions=(HOSTILE,))
    build_index(model, [*placed, hostile, images[4]], str(folder / "map"))
    build_index(model, images, str(folder / "list"))
    return {name: Searcher(ImageIndex(str(folder / name), model)) for name in ("map", "list")}


@pytest.fixture(scope="module")
def answers(searchers: dict[str, Searcher]) -> Answers:
    return Answers(searchers["map"])


def png(index: int) -> bytes:
    out = io.BytesIO()
    scene(index).save(out, "PNG")
    return out.getvalue()


def names(found: list[dict[str, Any]]) -> set[str]:
    return {hit["id"] for hit in found}


def test_sentence_picture_tile_and_filters(answers: Answers) -> None:
    assert len(names(answers.search({"q": "harbor number 3"}, b""))) == 5
    assert names(answers.search({"q": "harbor", "classes": " water, ice "}, b"")) == WATER
    assert names(answers.search({"q": "harbor", "bbox": "9, 49, 13, 51"}, b"")) == {"harbor_0", "forest_1"}
    assert answers.search({"q": "harbor", "since": "2021"}, b"") == []
    assert answers.search({}, png(4))[0]["id"] == "forest_4"
    assert answers.search({"like": "2"}, b"")[0]["row"] == 2
    assert len(answers.search({"q": "harbor", "k": "2"}, b"")) == 2


def test_an_answer_holds_what_the_page_shows(answers: Answers) -> None:
    found = answers.search({"q": "harbor number 3"}, b"")
    first, hostile = (next(hit for hit in found if name in hit["id"]) for name in ("harbor_0", "onerror"))
    assert (first["class"], first["date"], first["place"]) == ("water", "2020", square(10, 50))
    assert len(first["match"]) == 2
    assert hostile["place"] is None
    assert r"\x1b[2J\u202e" in hostile["captions"][0]
    assert answers.tile(0).startswith(b"\xff\xd8")


def test_an_answer_can_be_sent_whatever_others_wrote(searchers: dict[str, Searcher], tmp_path: Path) -> None:
    """Outlines that are none, numbers that JSON lacks and lone surrogates, in what no column of an index holds."""
    index = searchers["map"].index
    outline = {"type": "Polygon", "coordinates": [[[float("nan"), "<script>"]]], "x": "\ud800"}
    about = {"geo": {"footprint": outline}, "meta": {"date": ["\ud800", float("nan")]}}
    images = [replace(index.images[row], image_id=f"x{row}", metadata=about) for row in range(2)]
    images[1] = replace(images[1], metadata={"geo": {}, "meta": "none"})
    build_index(index.model, images, str(tmp_path / "odd"))
    hits = Answers(Searcher(ImageIndex(str(tmp_path / "odd"), index.model))).search({"q": "harbor"}, b"")
    assert [hit["place"] for hit in hits] == [None, None]
    json.dumps(hits, ensure_ascii=False, allow_nan=False).encode()  # as Starlette does


@pytest.mark.parametrize(
    "picture",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><svg>&e;</svg>",
        b"%PDF-1.4",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 99,
        b"P6 60000 60000 255 x",
        b"BM" + b"\xff" * 99,
    ],
)
def test_pictures_that_are_none_or_too_large_are_refused(answers: Answers, picture: bytes) -> None:
    with pytest.raises(ValueError, match="The picture cannot be read"):
        answers.search({}, picture)


@pytest.mark.parametrize("bbox", ["nan,nan,nan,nan", "-inf,-inf,inf,inf", "1e400,0,1,1", "0,0,9" + "9" * 5000 + ",1"])
def test_boxes_that_are_none_are_refused(answers: Answers, bbox: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        answers.search({"q": "x", "bbox": bbox}, b"")


def test_any_number_of_answers_may_be_asked_for(answers: Answers) -> None:
    assert len(answers.search({"q": "x", "k": "9" * 4000}, b"")) == 5
    with pytest.raises(ValueError, match="is not a whole number"):
        answers.search({"q": "x", "k": "9" * 5000}, b"")


def test_what_the_index_holds(searchers: dict[str, Searcher], answers: Answers) -> None:
    about = answers.about()
    assert about["images"] == 5
    assert sorted(about["boxes"]) == [[10, 50, 11, 51], [12, 50, 13, 51], [14, 50, 15, 51]]
    assert "water" in about["classes"]
    assert {"class", "datetime"} <= set(about["columns"])
    assert Answers(searchers["list"]).about()["boxes"] == []


def test_the_parts_of_a_scale_sum_to_its_logit(answers: Answers) -> None:
    scales = answers.reasons("0", "harbor number 3")
    assert [word for word, _ in scales[0]["parts"]][:3] == ["harbor", "number", "3"]
    for scale in scales:
        assert sum(value for _, value in scale["parts"]) == pytest.approx(scale["logit"], abs=1e-4)
    assert answers.reasons("0", " ") == []


@pytest.mark.parametrize(
    ("asked", "picture", "message"),
    [
        ({"q": " "}, b"", "Type a sentence"),
        ({"q": "x", "bbox": "1,2,3"}, b"", "expected west, south, east, north"),
        ({"q": "x", "bbox": "0,0,0,nan"}, b"", "bbox"),
        ({"q": "x", "since": "soon"}, b"", "expected an ISO date"),
        ({"q": "x", "k": "many"}, b"", "'many' is not a whole number"),
        ({"q": "x", "k": "0"}, b"", "k: 0 must be at least 1"),
        ({"like": "5"}, b"", "row 5: the index has 5 images"),
        ({"like": "-1"}, b"", "row -1"),
        ({}, b"%!PS-Adobe-3.0 EPSF-3.0", "The picture cannot be read"),
        ({}, png(4)[:-20], "The picture cannot be read"),
    ],
)
def test_what_cannot_be_answered_is_named(
    answers: Answers, asked: dict[str, str], picture: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        answers.search(asked, picture)


def test_a_condition_sees_the_index_alone(answers: Answers) -> None:
    pytest.importorskip("duckdb", reason="duckdb is missing (extra `archive`)")
    assert names(answers.search({"q": "x", "where": "class = 'water'"}, b"")) == WATER
    with pytest.raises(ValueError, match="where"):
        answers.search({"q": "x", "where": "(select count(*) from read_text('/etc/passwd')) > 0"}, b"")


@pytest.mark.parametrize("name", ["uvicorn", "starlette.applications"])
def test_what_is_missing_is_named_with_its_remedy(
    searchers: dict[str, Searcher], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(demo.DemoError, match=rf"{name} is missing: pip install 'msa_openclip\[demo\]'"):
        demo.serve(searchers["map"], "127.0.0.1", 0)


def test_only_the_basemaps_host_is_added_to_the_policy() -> None:
    assert "img-src 'self' data: blob:;" in demo.policy("")
    assert "blob: https://*.tiles.example:8080;" in demo.policy("https://{s}.tiles.example:8080/{z}/{x}/{y}.png?key=1")
    for wrong in (
        "https://x.example/1.png",
        "file:///{z}/{x}/{y}",
        "https://a;script-src *{z}{x}{y}",
        "https://a b/{z}{x}{y}",
    ):
        with pytest.raises(demo.DemoError, match="expected a URL such as"):
            demo.policy(wrong)


def test_a_taken_port_is_named(searchers: dict[str, Searcher], address: str) -> None:
    port = int(re.findall(r":(\d+)/", address)[0])
    with pytest.raises(demo.DemoError, match=f"port {port}: .*--port"):
        demo.serve(searchers["map"], "127.0.0.1", port)


def served(index: str, configs: Path, *options: str) -> Iterator[str]:
    """The address of an index, served by `msa-openclip demo` in a process of its own."""
    pytest.importorskip("uvicorn", reason="uvicorn is missing (extra `demo`)")
    command = [sys.executable, "-m", "msa_openclip", "demo", index, "--port", "0", *options]
    environment = {**os.environ, "MSA_OPENCLIP_CONFIGS": str(configs)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first.startswith("http://127.0.0.1:"), "the demo ended at once"
            yield first.split()[0]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def address(searchers: dict[str, Searcher], tiny_configs: Path) -> Iterator[str]:
    yield from served(searchers["map"].index.folder, tiny_configs)


@pytest.fixture(scope="module")
def address_without_places(searchers: dict[str, Searcher], tiny_configs: Path) -> Iterator[str]:
    yield from served(searchers["list"].index.folder, tiny_configs)


def ask(url: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, str]:
    """Status, headers and text of an answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, body, named), timeout=60)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.headers, answer.read().decode("utf-8", "replace")


def test_over_http(address: str) -> None:
    status, headers, text = ask(f"{address}search?{urlencode({'q': 'harbor'})}", b"")
    assert (status, len(json.loads(text))) == (200, 5)
    assert headers["Cache-Control"] == "no-store"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "default-src 'none'; script-src 'self'; style-src 'self';" in headers["Content-Security-Policy"]
    assert ask(f"{address}search?q=x&since=soon", b"")[0] == 400
    assert ask(f"{address}search?q=x")[0] == 404  # a link of somebody else's starts no search
    assert ask(f"{address}tile/5")[0] == 400
    assert ask(f"{address}tile/..%2f..%2fetc%2fpasswd")[0] == 404
    assert ask(f"{address}..%2fapp.py")[0] == 404


def test_strangers_are_refused(address: str) -> None:
    assert ask(address, Host="evil.example")[0] == 421
    for site in ("cross-site", "same-site"):
        assert ask(f"{address}tile/0", sec_fetch_site=site)[0] == 403
        assert ask(f"{address}search?q=x", b"", sec_fetch_site=site)[0] == 403
        assert ask(address, sec_fetch_site=site)[0] == 200  # a shared link


def test_large_uploads_are_refused(address: str) -> None:
    status, _, text = ask(f"{address}search?", bytes(20_000_001))
    assert (status, json.loads(text)["error"]) == (413, "The picture is larger than 20 MB.")


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on the PATH")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A tab of a desktop; afterwards nothing may have been fetched elsewhere, blocked, thrown or run."""
    opened = browser.new_page(viewport={"width": 1300, "height": 900})
    opened.set_default_timeout(60_000)
    fetched, complaints = [], []
    opened.on("request", lambda request: fetched.append(request.url))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    yield opened
    assert opened.title() == "Search aerial images"
    opened.close()
    assert [url for url in fetched if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []
    assert complaints == []


def search(tab: Any, sentence: str) -> None:
    tab.get_by_label("Sentence").fill(sentence)
    tab.get_by_role("button", name="Search").click()


def status(tab: Any, text: str) -> None:
    tab.get_by_role("status").filter(has_text=text).wait_for()


def test_search_click_and_reasons(address: str, tab: Any) -> None:
    tab.goto(address)
    search(tab, "harbor number 3")
    status(tab, "5 answers")
    assert tab.locator("ol img").count() == 5
    assert tab.locator("#map path.leaflet-interactive[fill-opacity='0.05']").count() == 3  # outlines
    assert tab.locator("#map img.leaflet-image-layer").count() == 3
    tab.locator("ol button", has_text="water").first.click()
    tab.locator("#why figure").nth(1).wait_for()
    assert tab.locator("#why th").all_inner_texts()[:3] == ["harbor", "number", "3"]
    assert "water" in tab.locator("#why dl").inner_text()
    tab.get_by_role("button", name="Find tiles like this").click()
    tab.locator("#why").wait_for(state="hidden")
    status(tab, "5 answers")
    assert "like=" in tab.url
    tab.get_by_text("Filters").click()
    tab.get_by_label("Classes").fill("ice")
    search(tab, "harbor")
    status(tab, "Nothing found.")


def test_captions_of_others_are_text(address: str, tab: Any) -> None:
    tab.goto(address)
    search(tab, "harbor")
    status(tab, "5 answers")
    tab.locator("ol button", has_text="onerror").click()
    tab.locator("#why li", has_text="<script>document.title='acted'</script>").wait_for()
    assert tab.locator("script").count() == 2


def test_drawing_a_box_and_clicking_on_the_map(address: str, tab: Any) -> None:
    tab.goto(address)
    status(tab, "Type a sentence")
    search(tab, "harbor")
    status(tab, "5 answers")
    tab.get_by_role("button", name="Draw a box").click()
    tiles = tab.locator("#map img.leaflet-image-layer")
    first, second, _ = sorted((tiles.nth(n).bounding_box() for n in range(3)), key=lambda box: box["x"])
    tab.mouse.move(first["x"] - 5, first["y"] - 5)
    tab.mouse.down()
    tab.mouse.move(second["x"] + 3, second["y"] + second["height"] / 2, steps=4)
    tab.mouse.up()
    status(tab, "2 answers")
    tab.locator("#map path.leaflet-interactive[fill-opacity='0.05']").first.click(position={"x": 9, "y": 9})
    tab.locator("#why figure").first.wait_for()
    tab.get_by_role("button", name="No box").click()
    status(tab, "5 answers")


def test_an_address_restores_a_search(address: str, tab: Any, browser: Any) -> None:
    tab.goto(address)
    tab.get_by_text("Filters").click()
    tab.get_by_label("Box").fill("9, 49, 13, 51")
    tab.get_by_label("Since").fill("2019")
    search(tab, "harbor & <number> 3")
    status(tab, "2 answers")
    tab.locator("ol button").nth(1).click()
    tab.locator("#why figure").first.wait_for()
    tab.get_by_role("button", name="Zoom out").click()
    tab.wait_for_timeout(600)  # the zoom moves
    other = browser.new_page()
    other.goto(tab.url)
    other.locator("#why figure").first.wait_for()
    for seen in ("#status", "#why h2", "#why dl", ".leaflet-control-scale"):
        assert other.locator(seen).inner_text() == tab.locator(seen).inner_text()
    for field in ("q", "bbox", "since"):
        assert other.locator(f"[name={field}]").input_value() == tab.locator(f"[name={field}]").input_value()
    assert other.evaluate("location.hash") == tab.evaluate("location.hash")
    other.close()
    search(tab, "forest")
    tab.wait_for_function("location.hash.includes('q=forest')")
    tab.go_back()
    tab.wait_for_function("document.querySelector('[name=q]').value.startsWith('harbor &')")
    status(tab, "2 answers")


def test_by_keyboard_alone(address: str, tab: Any) -> None:
    tab.goto(address)
    status(tab, "Type a sentence")
    tab.keyboard.type("harbor")  # the field has the focus
    tab.keyboard.press("Enter")
    status(tab, "5 answers")
    for _ in range(20):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.closest('ol') !== null"):
            break
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    tab.locator("#why figure").first.wait_for()
    assert tab.evaluate("document.activeElement.id") == "name"
    tab.keyboard.press("Escape")
    tab.locator("#why").wait_for(state="hidden")
    assert tab.evaluate("document.activeElement.firstChild.getAttribute('src')") == tab.locator("ol img").nth(
        1
    ).get_attribute("src")
    tab.locator("#map").focus()
    before = tab.url
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("before => location.href !== before", arg=before)
    tab.get_by_role("button", name="Box = view").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_function("location.hash.includes('bbox=')")


def test_a_picture(address: str, tab: Any) -> None:
    tab.goto(address)
    status(tab, "Type a sentence")
    tab.get_by_label("or a picture").set_input_files({"name": "p.png", "mimeType": "image/png", "buffer": png(4)})
    tab.get_by_role("button", name="Search").click()
    status(tab, "5 answers")
    assert tab.locator("ol img").first.get_attribute("src") == "tile/4"
    tab.get_by_role("button", name="Remove the picture").click()
    assert tab.get_by_label("or a picture").input_value() == ""


def test_on_a_phone(address: str, tab: Any) -> None:
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.goto(address)
    search(tab, "harbor")
    status(tab, "5 answers")
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert tab.locator("#map").bounding_box()["width"] == 390
    tab.locator("ol button").first.click()
    tab.locator("#why figure").first.wait_for()
    assert tab.locator("#why").bounding_box() == {"x": 0, "y": 0, "width": 390, "height": 844}
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    tab.get_by_role("button", name="Close").click()
    tab.locator("#why").wait_for(state="hidden")


def test_without_places_it_is_the_list(address_without_places: str, tab: Any) -> None:
    tab.goto(address_without_places)
    search(tab, "harbor")
    status(tab, "5 answers")
    assert not tab.locator("#map").is_visible()
    assert not tab.get_by_role("button", name="Draw a box").is_visible()
    tab.locator("ol button").first.click()
    tab.locator("#why figure").first.wait_for()
