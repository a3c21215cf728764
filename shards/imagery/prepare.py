"""Image bytes -> bytes that every shard reader decodes alike: 8 bit, upright, jpg, png or webp."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..options import ImageOptions
from ..records import ImageProblem

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2")
SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # what open_clip reads from shards
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000")
"""Decoded within Pillow; EPS, behind whatever name, it would hand to Ghostscript, a program.  JPEG includes MPO."""
_PLAIN_MODES = ("RGB", "L", "P", "RGBA", "LA", "1")  # convert("RGB") does the right thing; CMYK and 16 bit are ours
_DEFAULTS = ImageOptions()
_ORIENTATION = 0x0112
_GDAL_NODATA = 42113  # tag of TIFF
_NEVER_MEASURED = 1e38


class EncodedImage(NamedTuple):
    """Bytes to store, their extension, and the size in pixels."""

    data: bytes
    suffix: str
    width: int
    height: int


def open_image(data: bytes) -> Image.Image:
    """An image of one of the formats that are decoded here, whatever its name; its pixels are not decoded yet.

    Raises:
        Exception: whatever Pillow raises for a file that it cannot read, OSError and others.
    """
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def prepare(data: bytes, options: ImageOptions) -> EncodedImage:
    """Check an image and hand back its own bytes if a shard can hold them, else a new encoding.

    Raises:
        ImageProblem: unreadable, cut short, or larger than `max_pixels`.
    """
    with _problems(), _opened(data, options) as image:
        suffix = _suffix_as_it_is(image, data, options)
        if suffix is None:
            return encode(_upright_rgb(image), image.format or "", options)
        if options.check == "decode":
            image.load()
        return EncodedImage(data, suffix, image.width, image.height)


def decode(data: bytes, options: ImageOptions = _DEFAULTS) -> Image.Image:
    """The pixels that a shard would hold, RGB; what a shard would hold as PNG is not encoded first, which takes 20 ms.

    Raises:
        ImageProblem: unreadable, cut short, or of too many pixels.
    """
    with _problems(), _opened(data, options) as image:
        if _suffix_as_it_is(image, data, options) is not None:
            return image.convert("RGB")
        upright = _upright_rgb(image)
        if _kind(image.format or "", options) == "PNG":
            return upright.convert("RGB")
        return Image.open(io.BytesIO(encode(upright, image.format or "", options).data)).convert("RGB")


@contextmanager
def _problems() -> Iterator[None]:
    """Whatever opening and decoding raises becomes an ImageProblem."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ImageProblem("not an image that Pillow reads (16-bit or multi-band TIFFs need --geo)") from error
    except ImageProblem:
        raise
    except Exception as error:  # Pillow raises nearly everything for one broken file or another
        raise ImageProblem(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def _opened(data: bytes, options: ImageOptions) -> Image.Image:
    """An image of as many pixels as allowed."""
    if not data:
        raise ImageProblem("the file is empty")
    image = open_image(data)
    if image.width * image.height > options.max_pixels:
        raise ImageProblem(f"{image.width} x {image.height} pixels exceed max_pixels {options.max_pixels}")
    if image.format == "TIFF" and not _covered(image):  # Pillow makes black what no strip is of
        raise ImageProblem(f"its strips or tiles do not cover its {image.width} x {image.height} pixels")
    return image


def _covered(image: Image.Image) -> bool:
    """False if a file names fewer strips or tiles than its pixels need."""
    boxes: list[tuple[int, int, int, int]] = [part.extents for part in getattr(image, "tile", ())]
    area = sum(max(0, right - left) * max(0, lower - upper) for left, upper, right, lower in boxes)
    return area >= image.width * image.height


def _suffix_as_it_is(image: Image.Image, data: bytes, options: ImageOptions) -> str | None:
    """The extension of an image that a shard can hold as it is; None: it is to be encoded."""
    suffix = SUFFIX.get(image.format or "")
    if not suffix or not _passes(image, options):
        return None
    if not _complete(data, suffix):
        raise ImageProblem(f"the {image.format} data is cut short")
    return suffix


def require_one_size(sizes: Iterable[tuple[int, int]]) -> None:
    """Refuse a place whose images of several dates differ in size: its pixels do not lie on one another.

    Raises:
        ImageProblem: they do.
    """
    known = list(dict.fromkeys(sizes))
    if len(known) > 1:
        shown = ", ".join(f"{width} x {height}" for width, height in known)
        raise ImageProblem(f"its dates are of different sizes, {shown}; --resize-px N --resize-mode squash makes one")


def side_by_side(images: Sequence[Image.Image], gap_px: int = 4) -> Image.Image:
    """The images of one place, dates from left to right; a single one as it is.

    Raises:
        ValueError: there is none.
    """
    if len(images) == 1:
        return images[0]
    height = max(image.height for image in images)
    joined = Image.new("RGB", (sum(image.width + gap_px for image in images) - gap_px, height), "white")
    left = 0
    for image in images:
        joined.paste(image.convert("RGB"), (left, 0))
        left += image.width + gap_px
    return joined


def encode(image: Image.Image, source_format: str, options: ImageOptions) -> EncodedImage:
    """Resize as asked and encode; `source_format` decides under encode="auto"."""
    image = _resize(image, options)
    kind = _kind(source_format, options)
    out = io.BytesIO()
    if kind == "PNG":
        image.save(out, "PNG")
    elif kind == "JPEG":
        image.save(out, "JPEG", quality=options.quality, subsampling=0)
    else:
        image.save(out, "WEBP", quality=options.quality)
    return EncodedImage(out.getvalue(), SUFFIX[kind], image.width, image.height)


def _kind(source_format: str, options: ImageOptions) -> str:
    kind = options.encode.upper()
    return {"JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WEBP"}.get(source_format, "PNG") if kind == "AUTO" else kind


def to_8_bit(values: np.ndarray, nodata: float | None = None) -> np.ndarray:
    """Stretch wider data linearly from its minimum and maximum to 0..255; what is no measurement becomes black.

    That is `nodata`, NaN, infinities, and the ends of float32, which many programs write where nothing was measured.

    Raises:
        ImageProblem: no pixel is a measurement.
    """
    known = is_measured(values)
    if nodata is not None:
        with np.errstate(over="ignore"):
            known &= values != (np.float32(nodata) if values.dtype == np.float32 else nodata)
    if not known.any():
        raise ImageProblem("no pixel is a finite number" if nodata is None else "every pixel is nodata")
    low, high = float(values[known].min()), float(values[known].max())
    scaled = (np.where(known, values, low).astype(np.float64) - low) * (255.0 / max(high - low, 1e-12))
    return np.asarray(np.where(known, scaled, 0).round(), dtype=np.uint8)


def is_measured(values: np.ndarray) -> np.ndarray:
    """True where a value is a number that a measurement can have, in the shape of `values`."""
    found: np.ndarray = np.isfinite(values)
    if values.dtype.kind == "f":
        found &= np.abs(values) < _NEVER_MEASURED
    return found


def _nodata(image: Image.Image) -> float | None:
    """The value by which a TIFF says that nothing was measured, as GDAL writes it."""
    try:
        return float(str(getattr(image, "tag_v2", {})[_GDAL_NODATA]).strip(" \0"))
    except (KeyError, ValueError):
        return None


def _passes(image: Image.Image, options: ImageOptions) -> bool:
    if image.mode not in _PLAIN_MODES or _resized(image.size, options) != image.size:
        return False
    # Readers of shards ignore the EXIF orientation, so such a picture has to be turned here.
    return "exif" not in image.info or image.getexif().get(_ORIENTATION, 1) == 1


def _complete(data: bytes, suffix: str) -> bool:
    """True if the end of the file is there; bytes behind the end mark are harmless."""
    if suffix == "jpg":
        return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")  # end of image behind the last start of scan
    if suffix == "png":
        return 0 <= data.rfind(b"IEND") <= len(data) - 8  # name and checksum of the last chunk
    return len(data) >= int.from_bytes(data[4:8], "little") + 8


def _upright_rgb(image: Image.Image) -> Image.Image:
    nodata, turned = _nodata(image), ImageOps.exif_transpose(image)
    if turned.mode.startswith(("I", "F")):
        return Image.fromarray(to_8_bit(np.asarray(turned), nodata)).convert("RGB")
    if turned.mode == "L":
        return turned
    if turned.mode == "P":  # by way of RGBA, as a transparent palette entry asks
        turned = turned.convert("RGBA")
    return turned.convert("RGB")


def _resized(size: tuple[int, int], options: ImageOptions) -> tuple[int, int]:
    target = options.resize_px
    if target is None:
        return size
    if options.resize_mode == "squash":
        return target, target
    side = min(size) if options.resize_mode == "shortest" else max(size)
    if side <= target:
        return size
    return max(1, round(size[0] * target / side)), max(1, round(size[1] * target / side))


def _resize(image: Image.Image, options: ImageOptions) -> Image.Image:
    size = _resized(image.size, options)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
