"""Indexes as GeoParquet, out and in, the index as a STAC item, and indexes of the format before."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.retrieval_data import randomise, square, write_shards

from msa_openclip.commands import main as cli
from msa_openclip.data.captioned import CaptionedImage
from msa_openclip.data.readers import read_shards
from msa_openclip.evaluation.loading import LoadedModel, load
from msa_openclip.search.build import build_index
from msa_openclip.search.checksums import checksums
from msa_openclip.search.exchange import export_index, import_partitions
from msa_openclip.search.files import ImageIndexError, read_manifest, sealed
from msa_openclip.search.index import ImageIndex
from msa_openclip.search.searcher import Searcher
from msa_openclip.search.verify import verify_index

QUERY = ["harbor number 3"]


@pytest.fixture(scope="module")
def model(tiny_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tmp_path_factory.mktemp("weights") / "msa.pt"
    torch.save(randomise(open_clip.create_model("MSA-tiny-ViT"), seed=3).state_dict(), path)
    return load(f"MSA-tiny-ViT={path}")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[CaptionedImage]:
    """Seven scenes, the first six with a place on Earth, not in the order of a Hilbert curve."""
    found = read_shards(write_shards(tmp_path_factory.mktemp("scenes"), "image", count=7))
    about = [{"geo": {"footprint": square(x, 0)}, "meta": {"date": f"201{x}-06-30", "cloud": x}} for x in range(6)]
    return [replace(image, metadata=known) for image, known in zip(found, [*about, {}], strict=True)]


@pytest.fixture(scope="module")
def built(model: LoadedModel, images: list[CaptionedImage], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("index") / "built")
    build_index(model, images, folder, segment_images=4)
    return folder


@pytest.fixture
def parts(built: str, tmp_path: Path) -> Path:
    """An export, to be damaged."""
    assert export_index(built, str(tmp_path / "parts")) == 7
    return tmp_path / "parts"


def answers(folder: str, model: LoadedModel) -> list[tuple[float, str]]:
    (hits,) = Searcher(ImageIndex(folder, model)).by_text(QUERY, k=7)
    return [(hit.score, hit.image.image_id) for hit in hits]


def rewritten(path: Path, change: Any = None, **product: Any) -> None:
    """The same file with other columns, or another product in its metadata."""
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    metadata[b"msa_openclip"] = json.dumps(json.loads(metadata[b"msa_openclip"]) | product).encode()
    table = change(table) if change else table
    pq.write_table(table.replace_schema_metadata(metadata), path)


# ---- out and in


def test_what_goes_out_comes_in_again(built: str, parts: Path, model: LoadedModel, tmp_path: Path) -> None:
    new = str(tmp_path / "new")
    assert import_partitions(new, [str(parts)]) == (7, 0)
    assert answers(new, model) == answers(built, model)
    assert verify_index(new).problems == []
    assert import_partitions(new, [str(parts / "*.parquet")]) == (0, 7)  # nothing twice
    table = pq.read_table(parts)
    assert table.schema.field("global").type == pa.list_(pa.float16(), model.scorer.model.text.output_dim)
    assert len(table) == 7


def test_geopandas_and_duckdb_open_index_and_export(built: str, parts: Path) -> None:
    geopandas = pytest.importorskip("geopandas", reason="geopandas is not installed")
    duckdb = pytest.importorskip("duckdb", reason="duckdb (extra archive) is not installed")
    for pattern in (f"{built}/*/tiles.parquet", f"{parts}/*.parquet"):
        asked = (
            f"select count(*) from read_parquet('{pattern}', union_by_name=true) where bbox.xmin < 2.5 and cloud > 0"
        )
        assert duckdb.sql(asked).fetchall() == [(2,)]
    frames = [geopandas.read_parquet(path) for path in parts.glob("*.parquet")]
    assert sum(len(frame.geometry.dropna()) for frame in frames) == 6
    asked = f'select sum(list_inner_product("global", "global")) from \'{parts}/*.parquet\''
    ((norm,),) = duckdb.sql(asked).fetchall()
    assert norm == pytest.approx(7, abs=1e-2)


def test_vectors_of_others_are_taken(model: LoadedModel, parts: Path, built: str, tmp_path: Path) -> None:
    """32-bit numbers, columns of their own, and no more than what must be there."""
    for path in parts.glob("*.parquet"):
        table = pq.read_table(path)
        slim = table.select(["id", "source"]).append_column("weather", pa.array(["fine"] * len(table)))
        for name in ("global", "match"):
            wide = table[name].combine_chunks()
            values = pa.array(np.asarray(wide.flatten()).astype(np.float32))
            slim = slim.append_column(name, pa.FixedSizeListArray.from_arrays(values, wide.type.list_size))
        rewritten(path, lambda _, slim=slim: slim)
    import_partitions(str(tmp_path / "new"), [str(parts)])
    assert answers(str(tmp_path / "new"), model) == answers(built, model)
    (hits,) = Searcher(ImageIndex(str(tmp_path / "new"), model)).by_text(QUERY, k=1)
    assert hits[0].image.metadata == {"meta": {"weather": "fine"}}


def test_what_is_not_of_this_model_is_refused_by_name(built: str, parts: Path, tmp_path: Path) -> None:
    first, second = sorted(parts.glob("*.parquet"))
    whole = second.read_bytes()
    for change, message in [
        (
            {"fingerprint": "0" * 64, "model": "MSA-x=y.pt"},
            r"its vectors are of other weights \(MSA-x=y\.pt, 000000000000\)",
        ),
        ({"settings": {"precision": "bf16"}}, r"of the weights of the index, but with another precision \(bf16, "),
        ({"match_shape": [1, 2]}, r"vectors of \d+ and \(1, 2\) numbers, in the first file"),
        ({"embed_dim": "x"}, "no key `msa_openclip` that tells model and shapes"),
    ]:
        rewritten(second, **change)
        with pytest.raises(ImageIndexError, match=rf"{second.name}: .*{message}|{second.name}: .*{message}"):
            import_partitions(str(tmp_path / "new"), [str(first), str(second)])
        second.write_bytes(whole)
        assert not (tmp_path / "new/index.json").exists()
    rewritten(second, lambda table: table.drop_columns(["match"]))
    with pytest.raises(ImageIndexError, match=rf"{second.name}: no column `match`; expected \d+ numbers a row"):
        import_partitions(str(tmp_path / "new"), [str(parts)])
    with pytest.raises(ImageIndexError, match=r"none: no Parquet file is there"):
        import_partitions(str(tmp_path / "new"), [str(tmp_path / "none")])


def test_a_half_written_partition_is_named_and_nothing_is_lost(
    built: str, parts: Path, model: LoadedModel, tmp_path: Path
) -> None:
    second = sorted(parts.glob("*.parquet"))[1]
    whole = second.read_bytes()
    (parts / f".{second.name}.0a1b2c3d.tmp").write_bytes(whole[:1000])  # not named as a partition
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ImageIndexError, match=rf"{second.name}: no whole Parquet file .*was its writer killed\? Write it"
    ):
        import_partitions(str(tmp_path / "new"), [str(parts)])
    second.write_bytes(whole)
    assert import_partitions(str(tmp_path / "new"), [str(parts)]) == (7, 0)
    assert answers(str(tmp_path / "new"), model) == answers(built, model)


def test_an_interrupted_import_goes_on(
    parts: Path, model: LoadedModel, built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msa_openclip.search import exchange

    original, written = exchange.write_segment, []

    def failing(root: Path, name: str, *others: Any) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(name)
        original(root, name, *others)

    monkeypatch.setattr(exchange, "write_segment", failing)
    with pytest.raises(KeyboardInterrupt):
        import_partitions(str(tmp_path / "new"), [str(parts)])
    monkeypatch.setattr(exchange, "write_segment", lambda *a: written.append(a[1]) or original(*a))
    assert import_partitions(str(tmp_path / "new"), [str(parts)]) == (7, 0)
    assert len(set(written)) == len(written) == 2
    assert answers(str(tmp_path / "new"), model) == answers(built, model)


def test_rows_that_come_twice_are_counted_and_taken_once(parts: Path, model: LoadedModel, tmp_path: Path) -> None:
    first = sorted(parts.glob("*.parquet"))[0]
    rewritten(first, lambda table: pa.concat_tables([table, table]))
    done = import_partitions(str(tmp_path / "new"), [str(parts)])
    assert done.added == 7
    assert done.known == len(pq.read_table(first)) // 2
    assert len(ImageIndex(str(tmp_path / "new"), model)) == 7


def test_rows_without_content_are_told_by_their_places(parts: Path, model: LoadedModel, tmp_path: Path) -> None:
    first = sorted(parts.glob("*.parquet"))[0]

    def namesakes(table: pa.Table) -> pa.Table:
        two = table.slice(0, 2)
        for name, values in (("id", ["x", "x"]), ("content", [None, None]), ("source", ["a.png", "b.png"])):
            two = two.set_column(two.column_names.index(name), name, pa.array(values, pa.string()))
        return two

    rewritten(first, namesakes)
    assert import_partitions(str(tmp_path / "new"), [str(first)]) == (2, 0)
    assert import_partitions(str(tmp_path / "new"), [str(first)]) == (0, 2)


def test_commands(built: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts, new = str(tmp_path / "parts"), str(tmp_path / "new")
    assert cli.main(["index", "export", built, parts]) == 0
    assert capsys.readouterr().out == f"{parts}: 7 images as GeoParquet, with their vectors\n"
    assert cli.main(["index", "import", new, f"{parts}/*.parquet"]) == 0
    assert capsys.readouterr().out == f"{new}: 7 images added, 0 were there already\n"
    large = str(tmp_path / "large")
    assert cli.main(["index", "import", large, f"{parts}/*.parquet", "--segment-images", "2"]) == 0
    assert max(segment.images for segment in read_manifest(Path(large)).segments) == 2
    capsys.readouterr()
    for bad, message in [
        (["export", built], "export takes an index and a folder"),
        (["import", new], "import takes an index and Parquet files"),
        (["convert", built], "convert takes the old index"),
        (["verify", built, "x"], "verify takes one index"),
        (["MSA-x=y", new, "x"], "'x': only verify, export, import, convert take more"),
    ]:
        assert cli.main(["index", *bad]) == 2
        assert message in capsys.readouterr().err


def test_a_search_by_place_and_expression_as_geojson(
    built: str, model: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("duckdb", reason="duckdb (extra archive) is not installed")
    area, out = tmp_path / "area.geojson", tmp_path / "found.geojson"
    area.write_text(json.dumps(square(0.5, 0.25, 3)))
    command = ["search", built, "harbor", "--model", model.spec, "-k", "7", "--polygon", str(area), "--until", "2012"]
    assert cli.main([*command, "--where", "cloud >= 1", "--format", "geojson", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["features"]
    assert {feature["properties"]["cloud"] for feature in found} == {1, 2}
    assert "left out: 1 of 7 images, of which no place on Earth is known" in capsys.readouterr().err
    assert cli.main([*command, "--where", "clouds >= 1"]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert "The columns are id, source, content" in error[-1]
    assert len(error) == 2 + ("no date is known" in error[1])
    assert cli.main(["search", built, "harbor", "--model", model.spec, "--polygon", "none.geojson"]) == 2
    assert "--polygon none.geojson: no such file, and no WKT" in capsys.readouterr().err
    assert cli.main(["search", built, "--describe", "x.png", "--format", "stac"]) == 2
    assert "--describe finds captions, of which --format stac has none" in capsys.readouterr().err
    assert cli.main([*command, "--bbox", "4,0,5,1", "--format", "stac"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] == []


# ---- the STAC item


def test_the_item_is_stac(built: str, model: LoadedModel, images: list[CaptionedImage], tmp_path: Path) -> None:
    pystac = pytest.importorskip("pystac", reason="pystac (extra stac) is not installed")
    item = pystac.Item.from_file(f"{built}/item.json")
    item.validate()
    assert item.bbox == [0, 0, 6, 1]
    assert item.properties["start_datetime"] == "2010-06-30T00:00:00Z"
    assert item.properties["end_datetime"] == "2015-06-30T00:00:00Z"
    assert item.properties["emb:dimensions"] == model.scorer.model.text.output_dim
    assert item.properties["images"] == 7
    assert all((Path(built) / asset.href).exists() for asset in item.assets.values())
    build_index(model, images[-1:], str(tmp_path / "nowhere"))
    pystac.Item.from_file(str(tmp_path / "nowhere/item.json")).validate()


# ---- the format before


def write_old(folder: Path, model: LoadedModel, built: str, records: bytes | None = None) -> None:
    """An index of format 3 with the images and vectors of another, or with other lines."""
    opened, manifest = ImageIndex(built, model), read_manifest(Path(built))
    segments, row = [], 0
    for segment in manifest.segments:
        (folder / segment.name).mkdir(parents=True)
        found = opened.images[row : row + segment.images]
        rows = [
            {
                "image_id": image.image_id,
                "content": image.content,
                "place": asdict(image.location),
                "captions": list(image.captions),
                "label": image.label,
                "about": dict(image.metadata),
            }
            for image in found
        ]
        lines = "".join(json.dumps(record) + "\n" for record in rows)
        (folder / segment.name / "records.jsonl").write_bytes(lines.encode() if records is None else records)
        (folder / segment.name / "rejected.jsonl").write_text(lines.splitlines()[0][:-1] + ', "why": "cut"}\n')
        np.save(folder / segment.name / "facts.npy", np.zeros(segment.images))
        for name in ("features.npy", "projected.npy"):
            shutil.copy(Path(built) / segment.name / name, folder / segment.name / name)
        files = {path.name: checksums(path) for path in sorted((folder / segment.name).iterdir())}
        text = json.dumps({"images": segment.images, "files": files}) + "\n"
        (folder / segment.name / "segment.json").write_text(text)
        segments.append(asdict(segment) | {"checksum": hashlib.sha256(text.encode()).hexdigest()})
        row += segment.images
    content = asdict(manifest) | {"format": 3, "segments": segments}
    (folder / "index.json").write_text(json.dumps(sealed(content)))


def test_an_index_of_the_format_before_is_converted(
    built: str, model: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", str(tmp_path / "new")
    write_old(old, model, built)
    with pytest.raises(ImageIndexError, match=f"expected 4. Convert it with `msa-openclip index convert {old} NEW`"):
        ImageIndex(str(old), model)
    assert cli.main(["index", "convert", str(old), new]) == 0
    assert capsys.readouterr().out == f"{new}: 7 images; {old} may be deleted\n"
    assert answers(new, model) == answers(built, model)
    assert [image.metadata for image in ImageIndex(new, model).images] == [
        image.metadata for image in ImageIndex(built, model).images
    ]
    verified = verify_index(new)
    assert (verified.problems, verified.rejected) == ([], 2)
    assert cli.main(["index", "convert", str(old), new]) == 1
    assert "there is an index already" in capsys.readouterr().err
    assert cli.main(["index", "convert", built, str(tmp_path / "x")]) == 1
    assert "an index of format 4, expected 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", [b'\xfb"image_id": "x"}\n', b"null\n", b'{"image_id": 3}\n', b"[" * 100_000 + b"\n", b""]
)
def test_forged_records_of_the_format_before_are_named(
    line: bytes, built: str, model: LoadedModel, tmp_path: Path
) -> None:
    from msa_openclip.search.convert import convert_index

    old = tmp_path / "old"
    write_old(old, model, built, records=line * 4)
    with pytest.raises(ImageIndexError, match=f"{old}/[0-9a-f]+: damaged"):
        convert_index(str(old), str(tmp_path / "new"))


def test_a_damaged_index_of_the_format_before_is_named(built: str, model: LoadedModel, tmp_path: Path) -> None:
    from msa_openclip.search.convert import convert_index

    write_old(tmp_path / "old", model, built)
    path = next((tmp_path / "old").rglob("projected.npy"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ImageIndexError, match=r"damaged .*projected\.npy"):
        convert_index(str(tmp_path / "old"), str(tmp_path / "new"))
    assert not (tmp_path / "new/index.json").exists()
