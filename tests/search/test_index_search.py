"""Index and search: exact against whole scores, resumable, appendable, and clear about everything that is wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from helpers.retrieval_data import randomise, scene, square, write_shards

from msa_openclip.commands import main as cli
from msa_openclip.data.captioned import CaptionedImage
from msa_openclip.data.pixels import load_image
from msa_openclip.data.readers import read_folder, read_shards
from msa_openclip.distributed import Peers
from msa_openclip.evaluation.loading import LoadedModel, load
from msa_openclip.search import build as index
from msa_openclip.search import files as index_files
from msa_openclip.search import searcher as search
from msa_openclip.search.build import build_index
from msa_openclip.search.files import ImageIndexError
from msa_openclip.search.index import ImageIndex
from msa_openclip.search.nearest import nearest
from msa_openclip.search.searcher import Searcher, SearchError, SearchFilter
from msa_openclip.shards.records import Location
from msa_openclip.shards.storage import store

QUERIES = ["harbor number 3", "a place that two scenes share", "many forests"]


@pytest.fixture(scope="module")
def checkpoint(tiny_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "msa.pt"
    torch.save(randomise(open_clip.create_model("MSA-tiny-ViT"), seed=3).state_dict(), path)
    return f"MSA-tiny-ViT={path}"


@pytest.fixture(scope="module")
def model(checkpoint: str) -> LoadedModel:
    loaded = load(checkpoint)
    loaded.scorer.model.requires_grad_(False)
    return loaded


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("scenes"), "image", count=11)


@pytest.fixture(scope="module")
def images(pattern: str) -> list[CaptionedImage]:
    """Eleven scenes, each with a class, a place on Earth and a date."""
    return [
        replace(
            image,
            label=("water", "land")[number % 2],
            metadata={"geo": {"footprint": square(number, 0)}, "meta": {"date": f"20{10 + number}-06-30"}},
        )
        for number, image in enumerate(read_shards(pattern))
    ]


@pytest.fixture(scope="module")
def built(model: LoadedModel, images: list[CaptionedImage], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("index") / "scenes")
    assert build_index(model, images, folder, batch_size=2, segment_images=4) == 11
    return folder


@pytest.fixture(scope="module")
def searcher(built: str, model: LoadedModel) -> Searcher:
    return Searcher(ImageIndex(built, model))


def whole_scores(model: LoadedModel, images: list[CaptionedImage], texts: list[str]) -> torch.Tensor:
    """(R, I, T) without any index, in full precision."""
    pixels = torch.stack([model.preprocess(load_image(image)) for image in images])
    return model.scorer.scores(model.scorer.images(pixels), model.scorer.texts(model.tokenizer(texts)))


def files(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_text_to_image_is_the_fused_ranking(
    searcher: Searcher, model: LoadedModel, images: list[CaptionedImage]
) -> None:
    expected = whole_scores(model, images, QUERIES)
    rankings = model.scorer.rankings
    for number, hits in enumerate(searcher.by_text(QUERIES, k=11)):
        assert {hit.image.image_id for hit in hits} == {image.image_id for image in images}
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        for hit in hits:
            row = expected[:, [image.image_id for image in images].index(hit.image.image_id), number]
            by_ranking = dict(zip(rankings, row.tolist(), strict=True))
            assert hit.cosine == pytest.approx(by_ranking["global"], abs=2e-3)
            assert hit.score == pytest.approx(by_ranking["fused"], abs=3e-2)
            assert hit.match == pytest.approx((by_ranking["match_scale1"], by_ranking["match_scale2"]), abs=3e-2)


def test_only_the_nearest_are_scored_by_mscmat(built: str, model: LoadedModel, images: list[CaptionedImage]) -> None:
    cosine = whole_scores(model, images, QUERIES)[0]
    found = Searcher(ImageIndex(built, model), candidates=3).by_text(QUERIES, k=2)
    for number, hits in enumerate(found):
        nearest_three = {images[i].image_id for i in cosine[:, number].topk(3).indices.tolist()}
        assert {hit.image.image_id for hit in hits} < nearest_three
        assert len(hits) == 2


def test_image_to_image_finds_itself_first(searcher: Searcher, images: list[CaptionedImage]) -> None:
    found = searcher.by_image([load_image(images[4]), load_image(images[9])], k=3)
    assert [hits[0].image.image_id for hits in found] == [images[4].image_id, images[9].image_id]
    assert found[0][0].cosine == pytest.approx(1.0, abs=2e-3)
    assert len(found[0]) == 3


def test_image_to_text_is_the_fused_ranking(
    searcher: Searcher, model: LoadedModel, images: list[CaptionedImage]
) -> None:
    picture = load_image(images[6])
    expected = whole_scores(model, [images[6]], QUERIES)[model.scorer.rankings.index("fused"), 0]
    (hits,) = searcher.texts_of([picture], texts=QUERIES)
    assert [hit.text for hit in hits] == [QUERIES[i] for i in expected.argsort(descending=True).tolist()]
    assert [hit.score for hit in hits] == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-3)
    (hits,) = searcher.texts_of([picture], k=4)
    captions = {text for image in images for text in image.captions}
    assert len(hits) == 4
    assert {hit.text for hit in hits} < captions


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (SearchFilter(classes=frozenset({"land"})), {1, 3, 5, 7, 9}),
        (SearchFilter(bbox=(2.5, 0.5, 4.5, 9)), {2, 3, 4}),
        (SearchFilter(bbox=(2.5, 1.5, 4.5, 9)), set()),
        (SearchFilter(since="2018-06-30"), {8, 9, 10}),
        (SearchFilter(since="2012-07", until="2014"), {3, 4}),
        (SearchFilter(until="2011-06-30"), {0, 1}),
        (SearchFilter(classes=frozenset({"land"}), since="2016", until="2019-06-30"), {7, 9}),
    ],
)
def test_filters(searcher: Searcher, images: list[CaptionedImage], where: SearchFilter, expected: set[int]) -> None:
    wanted = {images[number].image_id for number in expected}
    for found in (searcher.by_text(QUERIES[:1], 11, where), searcher.by_image([scene(3)], 11, where)):
        assert {hit.image.image_id for hit in found[0]} == wanted


def test_what_is_not_known_is_filtered_out(model: LoadedModel, images: list[CaptionedImage], tmp_path: Path) -> None:
    some = [
        replace(images[0], label=None, metadata={}),
        replace(images[1], metadata={"geo": {}, "meta": None}),
        images[3],
    ]
    build_index(model, some, str(tmp_path / "x"), segment_images=2)
    searcher = Searcher(ImageIndex(str(tmp_path / "x"), model))
    for where, expected in [
        (SearchFilter(classes=frozenset({"land"})), {1, 2}),
        (SearchFilter(bbox=(-180, -90, 180, 90)), {2}),
        (SearchFilter(since="0001"), {2}),
        (SearchFilter(until="9999"), {2}),
        (SearchFilter(), {0, 1, 2}),
    ]:
        (hits,) = searcher.by_text(QUERIES[:1], 11, where)
        assert {hit.image.image_id for hit in hits} == {some[number].image_id for number in expected}


def test_bytes_per_image(built: str, model: LoadedModel) -> None:
    scales, width = model.scorer.scales, model.scorer.model.mscmat.ln_image.normalized_shape[0]
    sizes = {path.stat().st_size for path in Path(built).rglob("projected.npy")}
    header = 128
    assert sizes == {header + n * 2 * scales * width for n in (4, 3)}
    assert len(list(Path(built).rglob("projected.npy"))) == 3


def test_interrupted_it_goes_on_where_it_stopped(
    model: LoadedModel, images: list[CaptionedImage], built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = index._half, []

    def failing(values, first):
        calls.append(first.image_id)
        if len(calls) == 6:  # in the second segment: features and vectors of two batches are one
            raise KeyboardInterrupt
        return original(values, first)

    monkeypatch.setattr(index, "_half", failing)
    with pytest.raises(KeyboardInterrupt):
        build_index(model, images, str(tmp_path / "x"), batch_size=2, segment_images=4)
    with pytest.raises(ImageIndexError, match=r"index\.json: not found; build the index"):
        ImageIndex(str(tmp_path / "x"), model)
    calls.clear()
    monkeypatch.setattr(index, "_half", lambda values, first: calls.append(first) or original(values, first))
    build_index(model, images, str(tmp_path / "x"), batch_size=2, segment_images=4)
    assert len(calls) == 2 * (2 + 2)  # features and vectors of the two segments that were not there
    assert files(str(tmp_path / "x")) == files(built)


def test_appended_images_are_found_and_known_ones_passed_over(
    model: LoadedModel, images: list[CaptionedImage], searcher: Searcher, tmp_path: Path
) -> None:
    folder = str(tmp_path / "x")
    assert build_index(model, images[:5], folder) == 5
    assert build_index(model, images, folder) == 6
    assert build_index(model, images, folder) == 0
    found = Searcher(ImageIndex(folder, model)).by_text(QUERIES, k=11)
    expected = searcher.by_text(QUERIES, k=11)
    for mine, theirs in zip(found, expected, strict=True):
        assert [hit.image.image_id for hit in mine] == [hit.image.image_id for hit in theirs]
        assert [hit.score for hit in mine] == pytest.approx([hit.score for hit in theirs], abs=1e-2)


def test_ranks_share_segments(model: LoadedModel, images: list[CaptionedImage], built: str, tmp_path: Path) -> None:
    settings = {"batch_size": 2, "segment_images": 4}
    folder = str(tmp_path / "x")
    with pytest.raises(ImageIndexError, match="1 segments of other ranks are missing"):
        build_index(model, images, folder, peers=Peers(0, 2), patience_s=0.0, **settings)
    build_index(model, images, folder, peers=Peers(1, 2), **settings)
    assert not (Path(folder) / "index.json").exists()
    build_index(model, images, folder, peers=Peers(0, 2), **settings)
    assert files(folder) == files(built)


def test_another_model_is_refused(built: str, model: LoadedModel, images: list[CaptionedImage]) -> None:
    other = load("MSA-tiny-ViT=untrained")
    for use in (lambda: ImageIndex(built, other), lambda: build_index(other, images, built)):
        with pytest.raises(ImageIndexError, match=r"built with other weights \(MSA-tiny-ViT=.*msa\.pt\) than MSA-tiny"):
            use()


def test_an_older_index_is_refused_with_the_remedy(
    model: LoadedModel, images: list[CaptionedImage], tmp_path: Path
) -> None:
    folder = str(tmp_path / "x")
    build_index(model, images[:3], folder)
    manifest = json.loads((tmp_path / "x/index.json").read_text())
    for older, remedy in [
        (1, r"Delete the folder and build the index again"),
        (3, rf"Convert it with `msa-openclip index convert {re.escape(folder)} NEW`"),
    ]:
        (tmp_path / "x/index.json").write_text(json.dumps(index_files.sealed(manifest | {"format": older})))
        message = f"{re.escape(folder)}: an index of format {older}, expected 4. {remedy}"
        for use in (lambda: ImageIndex(folder, model), lambda: build_index(model, images, folder)):
            with pytest.raises(ImageIndexError, match=message):
                use()


@pytest.mark.parametrize("file", ["features.npy", "projected.npy", "tiles.parquet", "index.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damage_is_named(file: str, how: str, model: LoadedModel, images: list[CaptionedImage], tmp_path: Path) -> None:
    folder = tmp_path / "x"
    build_index(model, images[:3], str(folder))
    (path,) = folder.rglob(file)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.unlink()
    with pytest.raises(ImageIndexError, match=r"damaged|not found; build the index"):
        ImageIndex(str(folder), model)


def test_one_image_no_image_and_too_many_answers(model: LoadedModel, images, tmp_path: Path) -> None:
    build_index(model, images[:1], str(tmp_path / "one"))
    one = Searcher(ImageIndex(str(tmp_path / "one"), model))
    assert [len(hits) for hits in one.by_text(QUERIES, k=50)] == [1, 1, 1]
    build_index(model, [], str(tmp_path / "none"))
    none = Searcher(ImageIndex(str(tmp_path / "none"), model))
    assert none.by_text(QUERIES) == [[], [], []]
    for kind in ("flat", "ivfpq", "hnsw"):  # FAISS learns nothing from so few
        assert Searcher(none.index, nearest=nearest(none.index, kind)).by_text(QUERIES) == [[], [], []]
        hits = Searcher(one.index, nearest=nearest(one.index, kind)).by_text(QUERIES)
        assert [[hit.row for hit in found] for found in hits] == [[0], [0], [0]]
    assert none.by_image([scene(1)]) == [[]]
    assert none.texts_of([scene(1)]) == [[]]
    assert one.by_text([]) == []


def test_bad_queries_are_named(searcher: Searcher) -> None:
    with pytest.raises(SearchError, match="query 1 is blank"):
        searcher.by_text(["harbor", "  "])
    with pytest.raises(SearchError, match="k: 0 must be at least 1"):
        searcher.by_text(["harbor"], k=0)
    with pytest.raises(SearchError, match="candidates: 0"):
        Searcher(searcher.index, candidates=0)
    with pytest.raises(SearchError, match=r"bbox 2,1,1,0: expected WEST,SOUTH,EAST,NORTH .* south <= north"):
        SearchFilter(bbox=(2, 1, 1, 0))
    with pytest.raises(SearchError, match="until '20200101T': expected an ISO date such as 2020"):
        SearchFilter(until="20200101T")
    with pytest.raises(ImageIndexError, match="nearest: 'x' is unknown; choose one of auto"):
        nearest(searcher.index, "x")


def test_twice_the_same_id_is_refused(model: LoadedModel, images, tmp_path: Path) -> None:
    with pytest.raises(ImageIndexError, match=r"image .* occurs twice among the 2 to add; leave one of them out"):
        build_index(model, [images[0], images[0]], str(tmp_path))


@pytest.mark.parametrize("kind", ["ivfpq", "hnsw"])
def test_faiss_candidates_ranked_exactly(kind: str, model: LoadedModel, tmp_path: Path, monkeypatch, caplog) -> None:
    pytest.importorskip("faiss", reason="faiss-cpu is missing (extra `search`)")
    count, width = 1200, 24
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(30, width, generator=generator), dim=-1)
    noise = 0.1 * torch.randn(count, width, generator=generator)
    vectors = torch.nn.functional.normalize(centres[torch.arange(count) % 30] + noise, dim=-1)
    parts = iter(vectors.split(64))
    monkeypatch.setattr(index, "batches", lambda images, preprocess, spans, workers: (None for _ in spans))
    monkeypatch.setattr(model.scorer, "project", lambda pixels: (part := next(parts), torch.zeros(len(part), 2, width)))
    some = [CaptionedImage(str(n), Location("nowhere"), ()) for n in range(count)]
    build_index(model, some, str(tmp_path / "x"), segment_images=count)
    opened = ImageIndex(str(tmp_path / "x"), model)
    queries = vectors[:50] + 0.02
    exact, _ = search.scan(opened, queries, 10)
    find = nearest(opened, kind)
    values, rows = find(queries, 10)
    assert ((values >= exact[:, -1:] - 1e-3).double().mean()) > 0.9
    recomputed = (opened.feature_rows(rows.flatten()).reshape(50, 10, width) * queries[:, None]).sum(-1)
    torch.testing.assert_close(values, recomputed, rtol=1e-4, atol=1e-4)
    (file,) = Path(opened.folder).glob(f"{kind}-*.faiss")
    before = file.stat().st_mtime_ns
    nearest(opened, kind)
    assert file.stat().st_mtime_ns == before  # built once
    with open(file, "r+b") as damaged:
        damaged.seek(1000)
        damaged.write(b"x")
    with pytest.raises(ImageIndexError, match=r"damaged .*1,000|damaged .*not what was written.*; delete it"):
        nearest(opened, kind)
    file.write_bytes(b"no index")
    with pytest.raises(ImageIndexError, match=r"damaged .*; delete it"):
        nearest(opened, kind)
    stale, mine = file.with_name(f"{kind}-0123456789ab.faiss"), file.with_name(f"{kind}-mine.faiss")
    for path in (stale, stale.with_suffix(".faiss.json"), mine):
        path.write_bytes(b"of fewer images")
    file.unlink()
    nearest(opened, kind)
    assert sorted(path.name for path in file.parent.glob("*.faiss*")) == [file.name, f"{file.name}.json", mine.name]
    file.unlink()
    monkeypatch.setattr(store, "rename", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    assert torch.equal(nearest(opened, kind)(queries, 10)[1], rows)  # not kept, and of the same answers
    assert "cannot be written (read-only), so it is built again each time" in caplog.text


def test_commands(checkpoint: str, pattern: str, tmp_path: Path, capsys) -> None:
    folder = str(tmp_path / "index")
    assert cli.main(["index", checkpoint, folder, "--shards", pattern, "--segment-images", "4"]) == 0
    assert "11 images, 11 of them new" in capsys.readouterr().out
    assert cli.main(["search", folder, "harbor number 3", "--json", "-k", "2"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["query"] == "harbor number 3"
    assert len(row["hits"]) == 2
    assert len(row["hits"][0]["match"]) == 2
    scene(3).save(tmp_path / "3.png")
    assert cli.main(["search", folder, "--like", str(tmp_path / "3.png"), "-k", "1"]) == 0
    assert "harbor_3: " in capsys.readouterr().out  # and what is said of it
    assert cli.main(["search", folder, "--describe", str(tmp_path / "3.png"), "-k", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert cli.main(["search", folder, "harbor", "--classes", "desert"]) == 0
    assert "nothing found" in capsys.readouterr().out
    for bad, message, code in [
        ([], "give either texts, or images", 2),
        ([" "], "query 0 is blank", 1),
        (["x", "--bbox", "1,2"], "expected WEST,SOUTH,EAST,NORTH", 2),
        (["x", "--model", "MSA-tiny-ViT=untrained"], "built with other weights", 1),
    ]:
        assert cli.main(["search", folder, *bad]) == code
        assert message in capsys.readouterr().err
    assert cli.main(["search", str(tmp_path / "none"), "x"]) == 1
    assert "index.json: not found" in capsys.readouterr().err


def test_a_folder_of_images(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number, name in enumerate(("a/1.tif", "2.jpg", "3.png")):
        scene(40 * number).save(tmp_path / name)
    build_index(model, read_folder(str(tmp_path)), str(tmp_path / "index"))
    (hits,) = Searcher(ImageIndex(str(tmp_path / "index"), model)).by_image([scene(0)], k=1)
    assert hits[0].image.image_id == "a/1.tif"
