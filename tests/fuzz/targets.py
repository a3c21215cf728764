"""What is fuzzed: a function of bytes for each reader, which raises where a promise is broken, and inputs to try.

A reader may take a file or refuse it, by one of its own errors, whose message names the file.  It may raise nothing
else, run on, fill memory, or hand out what later steps cannot write down.
"""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from helpers import hostile_tars
from hypothesis import strategies as st
from PIL import Image

from msa_openclip.data.streams import StreamError
from msa_openclip.shards import ImageOptions, ReadOptions, ShardError, manifest
from msa_openclip.shards.building.plan import Sample
from msa_openclip.shards.building.samples import members
from msa_openclip.shards.imagery.prepare import EncodedImage, decode, open_image, prepare
from msa_openclip.shards.readers import formats, intake
from msa_openclip.shards.records import ImageProblem, Record
from msa_openclip.shards.storage import tars
from msa_openclip.training.samples import Tally, read_share
from msa_openclip.training.shares import ShardDataError, Share, shard_sizes

_PIXEL = EncodedImage(b"pixels", "png", 1, 1)


class Target(NamedTuple):
    """A reader: what it does with the bytes of a file in a folder of its own, and which bytes are worth trying."""

    run: Callable[[bytes, Path], None]
    inputs: st.SearchStrategy[bytes]


@contextmanager
def _refusals(*errors: type[Exception], naming: Path) -> Iterator[None]:
    """Errors by which a reader may refuse a file, if they name it."""
    try:
        yield
    except errors as error:
        if str(naming) not in str(error):
            raise AssertionError(f"the file is not named: {error}") from error


# Caption sources.


def _captions(name: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        path = folder / name
        path.write_bytes(data)
        for image in ("a.jpg", "b.jpg", "lake/c.png"):
            (folder / image).parent.mkdir(exist_ok=True)
            (folder / image).write_bytes(b"pixels")
        _build(str(path), folder)

    return run


def _precomp(data: bytes, folder: Path) -> None:
    captions, _, names = data.partition(b"\0")
    (folder / "train_caps.txt").write_bytes(captions)
    (folder / "train_filename.txt").write_bytes(names)
    (folder / "a.jpg").write_bytes(b"pixels")
    _build(str(folder), folder)


def _build(source: str, folder: Path) -> None:
    """Read a source and make all of a sample but its pixels."""
    found: list[Any] = []
    with _refusals(ShardError, naming=folder):
        entries = formats.read(source, ReadOptions())
        found += intake.to_records(entries, str(folder), ReadOptions(), seed=0)
    for record in found:
        if isinstance(record, Record):
            assert Record.from_line(record.to_line()) == record
            assert record.captions
            assert all(caption == " ".join(caption.split()) for caption in record.captions)
            assert all(place.url.startswith(str(folder) + "/") for place in record.images), record
            for name, content in members(Sample(record, None), [_PIXEL] * len(record.images), {}):
                tars.TarSink(io.BytesIO()).add(name, content)
        else:
            json.dumps(record.file + record.reason + record.detail)


# Tars.


def _tar(data: bytes, folder: Path) -> None:
    path = folder / "train-000000.tar"
    path.write_bytes(data)
    _build(str(path), folder)


def _training(data: bytes, folder: Path) -> None:
    path = folder / "train-000000.tar"
    path.write_bytes(data)
    tally = Tally()
    with _refusals(StreamError, ShardDataError, naming=folder):
        for sample in read_share(Share(str(path)), tally):
            assert sample["captions"]
            sample["__key__"].encode()
    str(tally).encode()


# Images.


def _image(data: bytes, _: Path) -> None:
    most = 1_000_000  # pixels; by default they are 179 million, which take seconds
    decoded = None
    with suppress(ImageProblem), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded = decode(data, ImageOptions(max_pixels=most))
    for changes in ({}, {"check": "decode"}, {"resize_px": 5}):
        options = ImageOptions(max_pixels=most, **changes)
        with suppress(ImageProblem), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of damaged EXIF data
            made = prepare(data, options)
            assert made.suffix in tars.IMAGE_MEMBERS
            if options.check == "decode":
                shown = open_image(made.data).convert("RGB")
                assert shown.size == (made.width, made.height)
                assert decoded is not None
                assert decoded.tobytes() == shown.tobytes()


# What lies beside shards.


def _beside(data: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(data)
    (folder / "sizes.json").write_bytes(data)
    with _refusals(ShardError, naming=folder):
        manifest.read(str(folder))
    with _refusals(ShardDataError, naming=folder):
        shard_sizes([f"{folder}/train-000000.tar"])


# Inputs.

_names = st.sampled_from(
    ["a.jpg", "b.jpg", "lake/c.png", "c", "../a.jpg", "/etc/passwd", "", ".", "a\0b", "\udc00.jpg"]
)
_odd = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), _names, st.just([]), st.just({}),
    st.sampled_from(["\ud800", "nan", "[null]", '["x"]', "a\nb", "\x1b[2J", "\0", "9" * 5000, "[" * 2000]),
)  # fmt: skip


def _or_odd(value: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly `value`: an input with several odd things in it is refused for the first."""
    return st.integers(0, 15).flatmap(lambda chance: _odd if chance == 7 else value)


_captions_text = st.sampled_from(
    ["a lake", "a pond .", "b", " ", "caf\xe9", "\ud83d\ude00", "\ud83d x", "nan", "a\nb", ""]
)
_images = st.sampled_from(["a.jpg", "b.jpg", "lake/c.png", "c.png", "a", "absent.jpg"]) | _names
_sentences = st.lists(_or_odd(st.fixed_dictionaries({"raw": _or_odd(_captions_text)})), max_size=3)
_texts_or_odd = {name: _or_odd(st.sampled_from(["train", "test", "val", "lake", ""])) for name in ("split", "class")}
_rows = _or_odd(
    st.fixed_dictionaries(
        {"filename": _or_odd(_images), "sentences": _or_odd(_sentences)},
        optional=_texts_or_odd | {"filepath": _or_odd(st.just("lake"))},
    )
)
_class_rows = _or_odd(
    st.fixed_dictionaries(
        {"filename": _or_odd(_images), "raw": _or_odd(_captions_text)},
        optional=_texts_or_odd | {"raw_1": _or_odd(_captions_text)},
    )
)
_json = st.one_of(
    st.fixed_dictionaries({"images": _or_odd(st.lists(_rows, max_size=4))}, optional={"dataset": _odd}),
    st.dictionaries(st.text(max_size=4), _or_odd(st.lists(_class_rows, max_size=3)), max_size=3),
    st.recursive(_odd, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner), max_leaves=6),
).map(lambda content: json.dumps(content).encode())
_sample_json = st.fixed_dictionaries(
    {},
    optional=_texts_or_odd
    | {name: _or_odd(_captions_text) for name in ("image_id", "sha256", "source", "caption", "meta")}
    | {"captions": _or_odd(st.lists(_or_odd(_captions_text))), "caption_index": _or_odd(st.integers(0, 3))},
).map(lambda content: json.dumps(content).encode())


def _damaged(data: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Mostly as it is, else cut, or with some bytes changed."""
    edits = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), max_size=3)

    def apply(drawn: tuple[bytes, int, list[tuple[float, bytes]], float]) -> bytes:
        content, chance, changes, end = drawn
        for where, new in changes if chance == 1 else ():
            at = int(where * len(content))
            content = content[:at] + new + content[at + len(new) :]
        return content[: int(end * len(content))] if chance == 2 else content

    return st.tuples(data, st.integers(0, 7), edits, st.floats(0, 1)).map(apply)


_cells = (
    _captions_text | st.text(max_size=6) | st.sampled_from(['"', '""', '"x', 'x"', "\n", "\r", "[null]", '["x"]', "\0"])
)


def _table(separator: str) -> st.SearchStrategy[bytes]:
    plain = st.sampled_from(["a lake", "b", "", "[null]", '"a ""b"" c"', '"a\nb"'])
    cells = st.integers(0, 9).flatmap(lambda chance: _cells if chance == 7 else plain)
    more = st.lists(st.sampled_from(["caption_1", "split", "class", "path", ""]), max_size=2)

    def rows(columns: list[str]) -> st.SearchStrategy[str]:
        row = st.tuples(_or_odd(_images).map(str), *(cells for _ in columns)).map(separator.join)
        header = separator.join(["path", *columns])
        return st.lists(row | _cells, max_size=5).map(lambda lines: "\n".join([header, *lines]))

    tables = more.flatmap(lambda names: rows(["caption", *names]))
    return tables.map(lambda text: text.encode("utf-8", "surrogatepass"))


_numbers = st.sampled_from([0, 1, 5, 512, 1024, -1, -512, -1024, -5000, 1 << 33, 60 << 30])
_kinds = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.XGLTYPE,
                          tarfile.GNUTYPE_LONGNAME, tarfile.LNKTYPE, tarfile.FIFOTYPE, b"Z", b"\0"])  # fmt: skip
_members = st.sampled_from(
    ["0.jpg", "0.txt", "0.json", "1.jpg", "1.txt", "1.json", "x/1.png", ".jpg", "a", "__m__/1.txt"]
)
_texts = st.one_of(st.just(b"a lake"), st.just(b"a lake\na pond"), st.binary(max_size=9), _sample_json, _json)
_pax = st.dictionaries(
    st.sampled_from(["size", "path", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.realsize", "GNU.sparse.major",
                     "GNU.sparse.minor", "mtime", "hdrcharset"]),
    st.sampled_from(["1", "0", "-1", "-512", "1e9", "x", "9" * 20, "BINARY", "1.jpg", "0,1,2"]),
    min_size=1, max_size=3,
).map(lambda fields: hostile_tars.pax(**fields))  # fmt: skip
_samples = st.tuples(st.sampled_from(["0", "1", "x/2", "\udce9"]), _captions_text, _sample_json).map(
    lambda found: b"".join(
        hostile_tars.member(f"{found[0]}.{kind}", data)
        for kind, data in (("jpg", b"pixels"), ("txt", found[1].encode("utf-8", "surrogatepass")), ("json", found[2]))
    )
)
_blocks = st.lists(
    st.one_of(
        _samples,
        st.builds(hostile_tars.member, _members, _texts),
        st.builds(hostile_tars.header, _members, _numbers, _kinds),
        _pax,
    ),
    max_size=6,
).map(lambda blocks: b"".join(blocks) + bytes(1024))


def _manifests() -> Iterator[bytes]:
    shard = {"file": "train-000000.tar", "split": "train", "samples": 1, "images": 1, "captions": 1, "size_bytes": 9,
             "sha256": "x", "sums": "01234567"}  # fmt: skip
    split = {"shards": 1, "pattern": "train-000000.tar", "samples": 1, "images": 1, "captions": 1, "size_bytes": 9}
    parts = {"format": 1, "fingerprint": "x", "layout": "image", "options": {}, "splits": {"train": split},
             "rejected": {}, "shards": [shard]}  # fmt: skip
    yield json.dumps(parts).encode()
    yield json.dumps({"train-000000.tar": 9}).encode()


def _pictures() -> Iterator[bytes]:
    """A small one of every kind that is read."""
    colour = Image.linear_gradient("L").resize((23, 17))
    kinds = [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("WEBP", "RGB"),
             ("TIFF", "RGB"), ("TIFF", "F"), ("TIFF", "I;16"), ("GIF", "P"), ("BMP", "RGB"), ("PPM", "RGB"),
             ("JPEG2000", "RGB")]  # fmt: skip
    for kind, mode in kinds:
        out = io.BytesIO()
        colour.convert("I").convert(mode).save(out, kind) if mode == "I;16" else colour.convert(mode).save(out, kind)
        yield out.getvalue()
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    colour.save(out, "JPEG", exif=exif)
    yield out.getvalue()


TARGETS = {
    "karpathy": Target(_captions("c.json"), _damaged(_json)),
    "csv": Target(_captions("c.csv"), _damaged(_table(","))),
    "tsv": Target(_captions("c.tsv"), _damaged(_table("\t"))),
    "precomp": Target(_precomp, _damaged(st.lists(_captions_text | _cells, max_size=6).map(
        lambda cells: "\n".join(cells).encode("utf-8", "surrogatepass") + b"\0a.jpg\n"))),
    "tar": Target(_tar, _damaged(_blocks)),
    "training": Target(_training, _damaged(_blocks)),
    "image": Target(_image, _damaged(_damaged(_damaged(st.sampled_from(list(_pictures())))))),
    "beside": Target(_beside, st.one_of(_json, _damaged(st.sampled_from(list(_manifests()))))),
}  # fmt: skip
