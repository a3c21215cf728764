"""Everything that can be asked of a build: frozen, validated, with the help texts the command line shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .records import SPLITS, ShardError

KINDS = ("auto", "karpathy", "levir-cc", "nwpu", "precomp", "table", "folder", "tar", "hf")
LEAST_SHARD_MB = 0.001  # a sample is larger than that
PILLOW_BOMB_LIMIT = 178_956_970  # Pillow itself refuses images of more pixels


def _option(default: Any, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help, **extra})


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ShardError(message)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How the captions are read (`kind` decides which of the rest apply)."""

    kind: str = _option("auto", "format of the captions; auto looks at the file and says what it found", choices=KINDS)
    image_column: str | None = _option(None, "table: column with the image path (default: filepath, filename, path, …)")
    caption_columns: tuple[str, ...] = _option((), "table, tar, hf: columns (members) with captions, comma-separated")
    split_column: str | None = _option(None, "table, hf: column with the split (default: split, if there is one)")
    label_column: str | None = _option(None, "table, hf: column with the scene class")
    image_member: str | None = _option(None, "tar: member with the image bytes, e.g. img_content (default: any image)")
    templates: tuple[str, ...] = _option(
        ("a satellite photo of {}.", "an aerial image of {}."),
        "folder: caption templates, {} is the class name; separate them by '|'",
        separator="|",
    )
    split: str | None = _option(None, "split of images that name none (default: train)")
    split_map: tuple[str, ...] = _option((), "rename splits, e.g. validation=val,restval=train")
    holdout: tuple[str, ...] = _option(
        (), "share of the training images to hold out, drawn by name, e.g. val=0.1,test=0.1"
    )

    def __post_init__(self) -> None:
        _require(self.kind in KINDS, f"kind: {self.kind!r} is unknown; choose one of {', '.join(KINDS)}.")
        _require(self.split in (None, *SPLITS), f"split: {self.split!r} is not one of {', '.join(SPLITS)}.")
        _require(bool(self.templates), "templates: empty; give at least one, e.g. 'an aerial image of {}.'")
        for template in self.templates:
            _require("{}" in template, f"templates: {template!r} has no {{}} to put the class name in.")
        for new in self.renames.values():
            _require(new in SPLITS, f"split_map: {new!r} is not one of {', '.join(SPLITS)}.")
        for name, share in self.shares.items():
            _require(name in SPLITS, f"holdout: {name!r} is not one of {', '.join(SPLITS)}.")
            _require(0 < share < 1, f"holdout: {name}={share} must lie between 0 and 1.")
        _require(sum(self.shares.values()) < 1, f"holdout: the shares {self.holdout} sum to 1 or more.")

    @property
    def renames(self) -> dict[str, str]:
        """`split_map` as a dictionary, with the spellings that circulate."""
        known = {"restval": "train", "training": "train", "validation": "val", "valid": "val", "dev": "val"}
        return known | _pairs("split_map", self.split_map)

    @property
    def shares(self) -> dict[str, float]:
        """`holdout` as a dictionary."""
        pairs = _pairs("holdout", self.holdout)
        try:
            return {name: float(share) for name, share in pairs.items()}
        except ValueError as error:
            raise ShardError(f"holdout: {self.holdout} must read like val=0.1 ({error}).") from error


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What happens to the image bytes; by default jpg, png and webp pass through untouched."""

    check: str = _option(
        "structure",
        "structure: header and end of the file (fast); decode: every pixel",
        choices=("structure", "decode"),
    )
    encode: str = _option(
        "auto",
        "format of images that must be encoded anew; auto: JPEG stays JPEG, WebP stays WebP, all else lossless PNG",
        choices=("auto", "png", "jpeg", "webp"),
    )
    quality: int = _option(95, "quality of newly encoded JPEG and WebP, 1 to 100")
    resize_px: int | None = _option(None, "resize to this many pixels (default: keep the size)")
    resize_mode: str = _option(
        "shortest",
        "which side is resize_px; shortest and longest only shrink, squash makes a square",
        choices=("shortest", "longest", "squash"),
    )
    max_pixels: int = _option(PILLOW_BOMB_LIMIT, "reject images with more pixels, before decoding them")
    geo: bool = _option(False, "read TIFFs through rasterio: bands, 16 bit, nodata, CRS, bounds, GSD")
    bands: tuple[str, ...] = _option((), "geo: three (or one) bands by number or name, e.g. 4,3,2 or red,green,blue")
    stretch: tuple[str, ...] = _option(("2", "98"), "geo: percentiles that become black and white, beyond 8 bit")
    tile_px: int | None = _option(None, "geo: cut scenes larger than this into tiles of this many pixels")

    def __post_init__(self) -> None:
        for name, allowed in (
            ("check", ("structure", "decode")),
            ("encode", ("auto", "png", "jpeg", "webp")),
            ("resize_mode", ("shortest", "longest", "squash")),
        ):
            value = getattr(self, name)
            _require(value in allowed, f"{name}: {value!r} is unknown; choose one of {', '.join(allowed)}.")
        _require(1 <= self.quality <= 100, f"quality: {self.quality} is not within 1 to 100.")
        _require(self.resize_px is None or self.resize_px > 0, f"resize_px: {self.resize_px} must be positive.")
        _require(self.tile_px is None or self.tile_px > 0, f"tile_px: {self.tile_px} must be positive.")
        _require(
            1 <= self.max_pixels <= PILLOW_BOMB_LIMIT,
            f"max_pixels: {self.max_pixels} is not within 1 to {PILLOW_BOMB_LIMIT}, where Pillow stops;"
            " cut larger scenes with geo and tile_px.",
        )
        _require(len(self.bands) in (0, 1, 3), f"bands: {self.bands} names {len(self.bands)} bands; give 3 or 1.")
        _require(self.geo or not (self.bands or self.tile_px), "bands, tile_px: these need geo (rasterio).")
        low, high = self.percentiles
        _require(0 <= low < high <= 100, f"stretch: {low}, {high} must rise within 0 to 100.")

    @property
    def percentiles(self) -> tuple[float, float]:
        """`stretch` as numbers."""
        try:
            low, high = (float(value) for value in self.stretch)
        except ValueError as error:
            raise ShardError(f"stretch: {self.stretch} must be two percentiles like 2,98.") from error
        return low, high


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What decides the bytes of the shards, beside the input itself."""

    name: str = _option("", "first part of the shard names: NAME-train-000000.tar (default: train-000000.tar)")
    layout: str = _option(
        "image",
        "image: one sample per image with all its captions; pair: one per caption, for open_clip without this plugin",
        choices=("image", "pair"),
    )
    seed: int = _option(0, "seed of the global shuffle")
    shards: int | None = _option(None, "number of shards per split (default: from the three options below)")
    shard_mb: float = _option(256.0, "largest shard, in MB, when the number of shards is not given")
    loader_workers: int = _option(4, "data loader workers (open_clip's --workers) that will read the shards")
    ranks: int = _option(1, "training processes that will read the shards")
    read: ReadOptions = field(default_factory=ReadOptions)
    image: ImageOptions = field(default_factory=ImageOptions)

    def __post_init__(self) -> None:
        _require(self.layout in ("image", "pair"), f"layout: {self.layout!r} is unknown; choose image or pair.")
        _require(not set(self.name) & set("/\\{}:*? "), f"name: {self.name!r} cannot be part of a file name pattern.")
        for name in ("shards", "loader_workers", "ranks"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name}: {value} must be positive.")
        _require(
            self.shard_mb >= LEAST_SHARD_MB, f"shard_mb: {self.shard_mb} must be a number of at least {LEAST_SHARD_MB}."
        )

    @property
    def readers(self) -> int:
        """Loader workers of all ranks: open_clip needs at least as many training shards."""
        return self.loader_workers * self.ranks

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return asdict(self)


def _pairs(option: str, items: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE of each item; a name that comes twice is refused, for one of the two would be lost."""
    pairs: dict[str, str] = {}
    for item in items:
        name, found, value = item.partition("=")
        _require(bool(found and name and value), f"{option}: {item!r} must read like NAME=VALUE.")
        _require(
            name not in pairs, f"{option}: {name} comes twice, as {pairs.get(name)} and {value}; give one of them."
        )
        pairs[name] = value
    return pairs
