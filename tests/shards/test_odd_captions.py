"""Caption sources with something wrong in them: each gives one line that names the file and the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.shards_data import picture, tar_members

from msa_openclip.shards import BuildOptions, build, verify
from msa_openclip.shards.command_line import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 0.jpg to 3.jpg."""
    (tmp_path / "in").mkdir()
    for number in range(4):
        picture(number).save(tmp_path / f"in/{number}.jpg")
    return tmp_path / "in"


def built(source: Path, **options: Any) -> tuple[dict[str, list[str]], list[dict[str, str]]]:
    """Captions by image id, and the rows of rejected.jsonl."""
    out = source.parent / "out"
    build(str(source), str(out), options=BuildOptions(shards=1, **options))
    rows = [json.loads(d) for p in out.glob("*.tar") for n, d in tar_members(p) if n.endswith(".json")]
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert verify(str(out), decode=True).ok
    return {row["image_id"]: row["captions"] for row in rows}, rejected


def refused(source: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What the command says, in one line that names the file, and without a traceback."""
    assert main(["build", str(source), str(source.parent / "out"), "--workers", "1", "--quiet", *flags]) == 1
    said = capsys.readouterr().err
    assert said.startswith("msa-openclip shards build: error: ")
    assert said.count("\n") == 1
    assert str(source) in said
    return said


# Tables.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,caption,caption\n0.jpg,a,b\n", "two columns are called 'caption'; rename one"),
        ("path\tcaption\tpath\n0.jpg\ta\t1.jpg\n", "two columns are called 'path'"),
        ('path,caption\n0.jpg,a\n1.jpg,"open\n2.jpg,b\n3.jpg,c\n', "line 3: unexpected end of data; is a quote stray"),
        ('path,caption\n0.jpg,a\n1.jpg,"open\n2.jpg,b\n3.jpg,c"\n', "line 3: a quoted field goes on over other rows"),
        ('path,caption\n0.jpg,"open\r\n1.jpg,b\r\n2.jpg,"c"\r\n', "line 2: "),
        ('caption,path\n"open,0.jpg\nb",1.jpg\n', "line 2: a quoted field goes on over other rows"),
        ('path\tcaption\n0\t"open\n1\tb\n2\tc"\n', "line 2: a quoted field goes on over other rows"),
        ('path,caption\n0.jpg,"a" lake\n', "line 2: ',' expected after '\"'; is a quote stray"),
        (f"path,caption\n0.jpg,a\n1.jpg,{'x' * 140_000}\n", "line 3: field larger than field limit"),
        ("path,caption\n0.jpg,a\n1.jpg,b,c\n", "line 3 has not as many fields"),
        (b"path,caption\n0.jpg,a\n1.jpg,caf\xe9\n", "line 3 is not UTF-8; convert the file"),
        ("", "no column looks like the image"),
        ("\n\n", "no column looks like the image"),
        ("path,caption\n", "names no images"),
    ],
)  # fmt: skip
def test_what_a_table_does_not_say_clearly(
    folder: Path, text: str | bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder / "list.csv"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused(source, capsys)


def test_missing_captions_of_a_table_are_no_captions(folder: Path) -> None:
    (folder / "list.csv").write_text(
        'path,caption\n0.jpg,"[null, ""a""]"\n0.jpg,nan\n0.jpg,None\n1.jpg,[null]\n1.jpg,b\n2.jpg,\n,c\n'
    )
    captions, rejected = built(folder / "list.csv")
    assert captions == {"0": ["a"], "1": ["b"]}
    assert [row["reason"] for row in rejected].count("blank caption") == 5
    assert {(row["file"], row["reason"]) for row in rejected} >= {("2.jpg", "no captions"), ("", "no image")}


def test_captions_may_have_quotes_lines_and_brackets(folder: Path) -> None:
    (folder / "list.csv").write_text(
        'path,caption\n0.jpg,"a ""round"" pond,\nand a tree, or two"\n1.jpg,a 5" pipe\n2.jpg,[sic] a lake\n3.jpg,[x]\n'
        '3.jpg,"[1, 2]"\n3.jpg,"[""a"", [""b""]]"\n3.jpg,"[null, ""c""]"\n'
    )
    captions, _ = built(folder / "list.csv")
    assert captions["0"] == ['a "round" pond, and a tree, or two']
    assert (captions["1"], captions["2"]) == (['a 5" pipe'], ["[sic] a lake"])
    assert captions["3"] == ["[x]", "[1, 2]", '["a", ["b"]]', "c"]


def test_missing_values_and_odd_types_in_parquet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow (extra parquet) is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    source = folder / "list.parquet"

    def write(**columns: Any) -> None:
        parquet.write_table(pyarrow.table(columns), source)

    names = ["0.jpg", None, "2.jpg", "3.jpg"]
    write(path=names, caption=["a", "b", None, "d"], split=["train", "train", "train", "val"])
    captions, rejected = built(source)
    assert captions == {"0": ["a"], "3": ["d"]}
    assert {row["reason"] for row in rejected} == {"no image", "no captions"}
    nan = float("nan")
    write(path=["0.jpg", "3.jpg"], caption=["a", "d"], caption_1=pyarrow.array([nan, 3.0]))
    assert "3.jpg: caption_1: 3.0 where a list is expected" in refused(source, capsys, "--overwrite")
    for odd, shown in (([b"a"], "b'a'"), ([{"x": 1}], "{'x': 1}"), ([1], "1")):
        write(path=["0.jpg"], caption=odd)
        assert f"0.jpg: caption: {shown} where a list is expected" in refused(source, capsys, "--overwrite")
    write(path=["0.jpg"], caption=[["a", None, "b"]])
    build(str(source), str(folder / "out2"))
    assert dict(tar_members(folder / "out2/train-000000.tar"))["0.txt"] == b"a\nb"
    two = pyarrow.table([["0.jpg"], ["a"], ["b"]], names=["path", "caption", "caption"])
    parquet.write_table(two, source)
    assert "two columns are called 'caption'" in refused(source, capsys, "--overwrite")
    source.write_bytes(source.read_bytes()[:-20])
    assert "read as table" in refused(source, capsys, "--overwrite")


def test_rows_of_an_image_that_disagree_on_its_split(folder: Path) -> None:
    (folder / "list.csv").write_text("path,caption,split\n0.jpg,a,train\n0.jpg,b,test\n1.jpg,c,train\n")
    captions, rejected = built(folder / "list.csv")
    assert captions == {"1": ["c"]}
    assert rejected == [{"file": "0.jpg", "reason": "several splits", "detail": "its rows say train, test"}]


# JSON.


def images(*rows: Any) -> dict[str, Any]:
    return {"images": list(rows)}


GOOD = {"filename": "0.jpg", "split": "train", "sentences": [{"raw": "a"}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (images(GOOD, None), "images[1]: null where an object is expected"),
        (images(GOOD, "0.jpg"), "images[1]: '0.jpg' where an object is expected"),
        (images(GOOD, {}), "images[1] has no 'filename'"),
        (images(GOOD | {"filename": None}), "images[0].filename: null where text is expected"),
        (images(GOOD | {"filename": 7}), "images[0].filename: 7 where text is expected"),
        (images(GOOD | {"filepath": ["a"]}), "images[0].filepath: ['a'] where text is expected"),
        (images(GOOD | {"split": {"a": 1}}), "images[0].split: {'a': 1} where text is expected"),
        (images(GOOD | {"sentences": "a lake"}), "images[0].sentences: 'a lake' where a list is expected"),
        (images(GOOD | {"sentences": [None]}), "images[0].sentences[0]: null where an object is expected"),
        (images(GOOD | {"sentences": ["a"]}), "images[0].sentences[0]: 'a' where an object is expected"),
        (images(GOOD | {"sentences": [{"raw": 3}]}), "images[0].sentences[0].raw: 3 where text is expected"),
        (images(GOOD | {"sentences": [{"raw": ["a"]}]}), "images[0].sentences[0].raw: ['a'] where text is expected"),
        (images(GOOD | {"sentences": [{"tokens": ["a"]}]}), "images[0].sentences[0] has no 'raw'"),
        ({"lake": [None]}, "lake[0]: null where an object is expected"),
        ({"lake": ["0.jpg"]}, "lake[0]: '0.jpg' where an object is expected"),
        ({"lake": [{"raw": "a"}]}, "lake[0] has no 'filename'"),
        ({"lake": [{"filename": "0.jpg"}]}, "lake[0] has no 'raw'"),
        ({"lake": [{"filename": "0.jpg", "raw": 3}]}, "lake[0].raw: 3 where text is expected"),
        ({"lake": [{"filename": 3, "raw": "a"}]}, "lake[0].filename: 3 where text is expected"),
    ],
)  # fmt: skip
def test_json_of_other_types_names_the_place(
    folder: Path, content: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder / "c.json"
    source.write_text(json.dumps(content))
    assert message in refused(source, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"images": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
        ('{"a": 1, "images": [{"filename": "0.jpg"', "not usable JSON"),
        ("", "not usable JSON"),
        (b"\xff\xfe{\x00", "not usable JSON"),
        ('{"images": [' + "9" * 10_000 + "]}", "not usable JSON"),
        ('{"lake": [], "lake": [{"filename": "0.jpg", "raw": "a"}]}', "has the key 'lake' twice"),
        ('{"images": [], "images": []}', "has the key 'images' twice"),
        ("<html>404</html>", "not usable JSON"),
    ],
)
def test_damaged_json(folder: Path, text: str | bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder / "c.json"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused(source, capsys)


def test_missing_captions_of_json_are_counted(folder: Path) -> None:
    rows = [{"raw": None}, {"raw": "a"}, {"raw": float("nan")}]
    (folder / "c.json").write_text(json.dumps(images(GOOD | {"sentences": rows[:2]}, {
        "filename": "1.jpg", "split": "train", "sentences": None})))  # fmt: skip
    captions, rejected = built(folder / "c.json")
    assert captions == {"0": ["a"]}
    assert [(row["file"], row["reason"]) for row in rejected] == [("0.jpg", "blank caption"), ("1.jpg", "no captions")]
    (folder / "nwpu.json").write_text(json.dumps({"lake": [{"filename": "0.jpg", "raw": "a", "raw_1": None}]}))
    build(str(folder / "nwpu.json"), str(folder / "out2"))
    assert "blank caption" in (folder / "out2/rejected.jsonl").read_text()


def test_half_characters_are_named_and_the_rest_is_built(folder: Path) -> None:
    (folder / "c.json").write_text(
        r'{"dataset": "x", "images": ['
        r'{"filename": "0.jpg", "split": "train", "sentences": [{"raw": "a \ud83d lake"}, {"raw": "a"}]},'
        r'{"filename": "1.jpg", "split": "train", "sentences": [{"raw": "smile \ud83d\ude00"}]},'
        r'{"filename": "\udc00.jpg", "split": "train", "sentences": [{"raw": "c"}]},'
        r'{"filename": "2.jpg", "split": "\udc00", "sentences": [{"raw": "c"}]},'
        r'{"filename": "3.jpg", "class": "\udc00", "split": "train", "sentences": [{"raw": "c"}]}]}'
    )
    captions, rejected = built(folder / "c.json")
    assert captions == {"0": ["a"], "1": ["smile \U0001f600"]}
    assert [row["reason"] for row in rejected] == ["caption not Unicode", "not UTF-8", "not UTF-8", "not UTF-8"]
    assert rejected[1]["file"] == "\udc00.jpg"


# Names and places.


@pytest.mark.parametrize("name", ["{other}/0.jpg", "../other/0.jpg", "sub/../../other/0.jpg", "file://{other}/0.jpg",
                                  "http://127.0.0.1:1/0.jpg", "memory://other/0.jpg"])  # fmt: skip
def test_captions_name_no_image_outside_its_folder(folder: Path, name: str) -> None:
    other = folder.parent / "other"
    other.mkdir()
    picture(9).save(other / "0.jpg")
    rows = [GOOD | {"filename": "1.jpg"}, GOOD | {"filename": name.format(other=other)}]
    (folder / "c.json").write_text(json.dumps(images(*rows)))
    captions, rejected = built(folder / "c.json")
    assert list(captions) == ["1"]
    assert rejected[0]["reason"] == "image outside"
    assert "--images a folder that holds it, or --outside" in rejected[0]["detail"]


def test_images_outside_are_read_where_that_is_allowed(folder: Path) -> None:
    absolute = folder / "2.jpg"
    (folder / "c.json").write_text(json.dumps(images(GOOD, GOOD | {"filename": str(absolute)})))
    captions, _ = built(folder / "c.json")  # within the folder, absolute or not
    assert len(captions) == 2
    (folder / "sub").mkdir()
    (folder / "sub/c.json").write_text(json.dumps(images(GOOD | {"filename": str(absolute)})))
    arguments = ["build", str(folder / "sub/c.json"), str(folder / "out2"), "--quiet", "--workers", "1"]
    assert main(arguments) == 1
    assert main([*arguments, "--outside"]) == 0
    assert main([*arguments[:2], str(folder / "out3"), *arguments[3:], "--images", "/"]) == 0


def test_file_names_that_are_not_utf8(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    root = bytes(tmp_path)
    for name in (b"lake/0.jpg", b"lake/caf\xe9.jpg", b"w\xf6ods/1.jpg"):
        path = root + b"/in/" + name
        Path(path.decode(errors="surrogateescape")).parent.mkdir(parents=True, exist_ok=True)
        picture(len(name)).save(path.decode(errors="surrogateescape"), "JPEG")
    assert main(["build", str(tmp_path / "in"), str(tmp_path / "out"), "--quiet", "--workers", "2"]) == 0
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert {row["file"] for row in rejected} == {"lake/caf\udce9.jpg", "w\udcf6ods/1.jpg"}
    assert {row["reason"] for row in rejected} == {"not UTF-8"}
    strange = tmp_path / "caf\udce9"
    assert main(["build", str(tmp_path / "in"), str(strange), "--quiet", "--workers", "1"]) == 0
    assert main(["verify", str(strange), "--quiet", "--workers", "1"]) == 0


@pytest.mark.parametrize("text", [b"a\r\nb\r\n", b"\xef\xbb\xbfa\nb\n"])
def test_precomp_with_other_line_ends(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "train_caps.txt").write_bytes(text)
    (tmp_path / "train_filename.txt").write_bytes(b"0.jpg\r\n1.jpg\r\n")
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.jpg")
    build(str(tmp_path), str(tmp_path / "out"), options=BuildOptions(shards=1))
    assert dict(tar_members(tmp_path / "out/train-000000.tar"))["0.txt"] == b"a"


def test_precomp_in_another_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train_caps.txt").write_bytes(b"a\nb\ncaf\xe9\n")
    (tmp_path / "train_filename.txt").write_bytes(b"0.jpg\n")
    assert "train_caps.txt: line 3 is not UTF-8" in refused(tmp_path, capsys)
