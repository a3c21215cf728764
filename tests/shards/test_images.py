"""Image handling: what passes untouched, what is transcoded and to which pixels, what is refused."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers.shards_data import picture, picture_bytes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from msa_openclip.shards import ImageOptions, ShardError
from msa_openclip.shards.imagery.prepare import decode, prepare
from msa_openclip.shards.records import ImageProblem


def encoded(image: Image.Image, format: str, **save: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **save)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("check", ["structure", "decode"])
@pytest.mark.parametrize(("format", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_common_formats_pass_untouched(format: str, suffix: str, mode: str, check: str) -> None:
    data = encoded(picture(1, (13, 7), mode), format)
    assert prepare(data, ImageOptions(check=check)) == (data, suffix, 13, 7)


@pytest.mark.parametrize(
    ("dtype", "nothing", "tag"),
    [
        (np.float32, np.finfo(np.float32).min, None),  # which many programs write without saying so
        (np.float32, np.finfo(np.float32).min, "-3.40282346638529e+38"),
        (np.float32, -9999, "-9999"),
        (np.int32, -9999, "-9999"),
        (np.uint16, 65535, "65535\0"),
        (np.uint16, 7, "-9999"),  # which no pixel can have
        (np.float32, np.nan, "nan"),
        (np.float32, np.inf, "not a number"),
    ],
)
def test_what_was_not_measured_does_not_stretch_the_rest(dtype: type, nothing: float, tag: str | None) -> None:
    values = np.arange(100, 112, dtype=dtype).reshape(3, 4)
    values[1, 2] = nothing
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    if tag is not None:
        tags[42113] = tag
        tags.tagtype[42113] = 2
    image = Image.fromarray(values)
    expected = np.round((np.arange(12).reshape(3, 4)) * 255 / 11)
    expected[1, 2] = 0
    shown = pixels(prepare(encoded(image, "TIFF", tiffinfo=tags), ImageOptions()).data)[:, :, 0]
    if nothing == 7:  # a measurement like the others
        assert shown[1, 2] == 0
        assert shown[0, 0] > 200
    else:
        np.testing.assert_array_equal(shown, expected)


def test_an_image_in_which_nothing_was_measured_is_refused() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[42113] = "-9999"
    data = encoded(Image.fromarray(np.full((3, 4), -9999, np.float32)), "TIFF", tiffinfo=tags)
    with pytest.raises(ImageProblem, match="every pixel is nodata"):
        prepare(data, ImageOptions())


def test_bytes_behind_the_end_of_a_jpeg_are_harmless() -> None:
    data = picture_bytes(1) + bytes(9000)
    assert prepare(data, ImageOptions()).data == data


@pytest.mark.parametrize(("format", "mode"), [("TIFF", "RGB"), ("TIFF", "L"), ("BMP", "RGB"), ("GIF", "P")])
def test_other_formats_become_png_without_loss(format: str, mode: str) -> None:
    image = picture(2, mode=mode)
    ready = prepare(encoded(image, format), ImageOptions())
    assert ready.suffix == "png"
    assert np.array_equal(pixels(ready.data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("format", "mode"),
    [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGBA"), ("WEBP", "RGB"), ("TIFF", "RGB"), ("TIFF", "F"),
     ("TIFF", "L"), ("GIF", "P"), ("BMP", "RGB")],
)  # fmt: skip
@pytest.mark.parametrize("orientation", [1, 6])
def test_pixels_are_those_that_a_shard_would_hold(format: str, mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    given = {} if format in ("GIF", "BMP") else {"exif": exif}
    data = encoded(picture(2, (13, 7)).convert(mode), format, **given)
    decoded = decode(data)
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), pixels(prepare(data, ImageOptions()).data))


def test_pixels_of_a_tiff_are_not_encoded_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(2), "TIFF")
    monkeypatch.setattr("msa_openclip.shards.imagery.prepare.encode", lambda *_: pytest.fail("encoded"))
    decode(data)


@pytest.mark.parametrize("mode", ["L", "RGB", "F"])
def test_a_tiff_whose_strips_do_not_cover_it_is_refused(mode: str) -> None:
    data = encoded(picture(2, (13, 7)).convert(mode), "TIFF")
    assert decode(data).size == (13, 7)
    height = struct.pack("<HHI", 257, 4, 1)
    assert data.count(height + struct.pack("<I", 7)) == 1
    taller = data.replace(height + struct.pack("<I", 7), height + struct.pack("<I", 700))
    for read in (decode, lambda given: prepare(given, ImageOptions())):
        with pytest.raises(ImageProblem, match="do not cover its 13 x 700 pixels"):
            read(taller)


def test_stated_quality_decides_the_size_of_transcoded_jpegs() -> None:
    data = encoded(picture(3, (64, 64)), "TIFF")
    sizes = [len(prepare(data, ImageOptions(encode="jpeg", quality=quality)).data) for quality in (30, 95)]
    assert sizes[0] < sizes[1] / 2
    assert prepare(data, ImageOptions(encode="webp")).suffix == "webp"


@pytest.mark.parametrize(("orientation", "turn"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)])
def test_exif_orientation_is_applied(orientation: int, turn: Image.Transpose) -> None:
    image = Image.fromarray(np.repeat(np.repeat(np.asarray(picture(4, (3, 2))), 16, 0), 16, 1))  # flat 16 px patches
    exif = Image.Exif()
    exif[0x0112] = orientation
    ready = prepare(encoded(image, "JPEG", quality=98, exif=exif), ImageOptions())
    expected = np.asarray(image.transpose(turn), dtype=int)
    assert (ready.width, ready.height) == (expected.shape[1], expected.shape[0])
    assert np.abs(pixels(ready.data) - expected).mean() < 6
    assert "exif" not in Image.open(io.BytesIO(ready.data)).info
    exif[0x0112] = 1
    upright = encoded(image, "JPEG", exif=exif)
    assert prepare(upright, ImageOptions()).data == upright


def test_sixteen_bits_are_stretched_not_clipped() -> None:
    ramp = (np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 10) + 1000
    for format in ("PNG", "TIFF"):
        ready = prepare(encoded(Image.fromarray(ramp), format), ImageOptions())
        expected = np.round((ramp - 1000) / (ramp.max() - 1000) * 255)
        assert np.abs(pixels(ready.data)[..., 0] - expected).max() <= 1


def test_cmyk_and_palette_are_seen_as_rgb() -> None:
    red = Image.new("RGB", (8, 8), (250, 10, 10))
    cmyk = prepare(encoded(red.convert("CMYK"), "JPEG"), ImageOptions())
    assert Image.open(io.BytesIO(cmyk.data)).mode == "RGB"
    assert np.abs(pixels(cmyk.data).mean(axis=(0, 1)) - (250, 10, 10)).max() < 12
    palette = encoded(red.convert("P"), "TIFF")
    assert np.abs(pixels(prepare(palette, ImageOptions()).data)[0, 0] - (250, 10, 10)).max() < 12


@given(
    width=st.integers(1, 90), height=st.integers(1, 90), target=st.integers(1, 60),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
)  # fmt: skip
def test_resize_keeps_its_promise(width: int, height: int, target: int, mode: str) -> None:
    data = encoded(Image.new("RGB", (width, height)), "PNG")
    ready = prepare(data, ImageOptions(resize_px=target, resize_mode=mode))
    assert Image.open(io.BytesIO(ready.data)).size == (ready.width, ready.height)
    if mode == "squash":
        assert (ready.width, ready.height) == (target, target)
        return
    side = min if mode == "shortest" else max
    assert side(ready.width, ready.height) == max(1, min(side(width, height), target))
    assert abs(ready.width * height - ready.height * width) <= max(width, height)  # within one pixel of the ratio
    if side(width, height) <= target:
        assert ready.data == data


def test_resized_images_keep_their_kind_of_coding() -> None:
    options = ImageOptions(resize_px=8)
    assert prepare(picture_bytes(1, "JPEG"), options).suffix == "jpg"
    assert prepare(picture_bytes(1, "PNG"), options).suffix == "png"


def test_too_many_pixels_are_refused_before_decoding() -> None:
    with pytest.raises(ImageProblem, match=r"24 x 24 pixels exceed max_pixels 500"):
        prepare(picture_bytes(1), ImageOptions(max_pixels=500))
    bomb = bytearray(encoded(Image.new("L", (8, 8)), "BMP"))
    bomb[18:26] = (30_000).to_bytes(4, "little") * 2  # 900 million pixels, says the header
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageProblem, match=r"cannot be decoded: Image size \(900000000 pixels\) exceeds limit"):
            prepare(bytes(bomb), ImageOptions())


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xe0", picture_bytes(1, "TIFF")[:60]])
def test_garbage_is_an_image_problem_whatever_it_is(data: bytes) -> None:
    with pytest.raises(ImageProblem):
        prepare(data, ImageOptions())


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@given(cut=st.integers(1, 1200), format=st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF"]))
def test_no_cut_file_gets_through(cut: int, format: str) -> None:
    data = picture_bytes(5, format)
    with pytest.raises(ImageProblem):
        prepare(data[: -min(cut, len(data))], ImageOptions())


def test_the_end_mark_of_an_embedded_thumbnail_is_not_taken_for_the_images_end() -> None:
    data, thumbnail = picture_bytes(5), picture_bytes(6, quality=10)
    segment = b"\xff\xe2" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    whole = data[:2] + segment + data[2:]
    assert prepare(whole, ImageOptions()).data == whole
    with pytest.raises(ImageProblem, match="cut short"):
        prepare(whole[:-300], ImageOptions())


def test_damage_inside_is_found_by_check_decode() -> None:
    data = bytearray(picture_bytes(6, "PNG"))
    data[len(data) // 2] ^= 255
    prepare(bytes(data), ImageOptions())
    with pytest.raises(ImageProblem, match="cannot be decoded"):
        prepare(bytes(data), ImageOptions(check="decode"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check": "all"}, "check: 'all' is unknown; choose one of structure, decode"),
        ({"quality": 0}, "quality: 0 is not within 1 to 100"),
        ({"max_pixels": 10**12}, "where Pillow stops"),
        ({"tile_px": 64}, r"these need geo"),
        ({"geo": True, "bands": ("1", "2")}, "names 2 bands; give 3 or 1"),
        ({"stretch": ("98", "2")}, "must rise within 0 to 100"),
    ],
)
def test_options_are_checked_when_made(options: dict[str, object], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        ImageOptions(**options)


@pytest.mark.filterwarnings("ignore::Warning")  # a raster without coordinates, here on purpose
def test_geotiffs_of_sixteen_bits_are_pointed_to_rasterio(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio", reason="rasterio (extra geo) is not installed")
    with rasterio.open(tmp_path / "x.tif", "w", driver="GTiff", width=8, height=8, count=4, dtype="uint16") as out:
        out.write(np.ones((4, 8, 8), dtype=np.uint16))
    with pytest.raises(ImageProblem, match=r"--geo"):
        prepare((tmp_path / "x.tif").read_bytes(), ImageOptions())
