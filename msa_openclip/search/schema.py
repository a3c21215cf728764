"""The columns of a partition: what the GeoParquet files of indexes, exports and other people's have in common.

    table = with_vectors(to_table(images), features, projected)      # images -> columns
    write_partition("parts/0.parquet", table, product)               # whole or not there
    features, projected = vectors(pq.read_table("parts/0.parquet"), product)

    id, source, content    name of the image, its file or URL, what tells it from later versions of itself
    place, window          where in that file: bytes of a tar, cell of a table; pixels of a scene
    class, captions        what is said of it
    datetime               when it was taken, UTC, out of `meta.date`
    geometry, bbox         its outline in WGS84 (WKB) and that outline's bounds, as GeoParquet 1.1's covering
    metadata               everything else that is known, as JSON
    ...                    a column for each name in `meta` whose values are all texts, all numbers or all booleans
    global, match          vectors, where the file holds them: (E) and (S * D) numbers a row

Only `id` and `source` must be there and not null.  Shapes: n rows, S scales, D width of MSCMAT, E embed_dim.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..data.captioned import CaptionedImage
from ..data.outlines import OutlineError
from ..shards.records import Location
from ..shards.storage import store
from . import places

ROW_GROUP = 1_024
"""Rows that are decoded to know one of them."""
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_PLACE = pa.struct([("offset", pa.int64()), ("size", pa.int64()), ("row", pa.int64()), ("column", pa.string())])
_WINDOW = pa.struct([(name, pa.int32()) for name in ("col_off", "row_off", "width", "height")])
_BBOX = pa.struct([(name, pa.float64()) for name in ("xmin", "ymin", "xmax", "ymax")])
COLUMNS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        ("content", pa.string()),
        ("place", _PLACE),
        ("window", _WINDOW),
        ("class", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("datetime", pa.timestamp("us", tz="UTC")),
        ("geometry", pa.binary()),
        ("bbox", _BBOX),
        ("metadata", pa.string()),
    ]
)
VECTORS = ("global", "match")
_MOST_NUMBERS = 1 << 16  # of a vector
_MOST_COLUMNS = 256  # of names in `meta`; the others stay in `metadata`
_YEAR_OR_MONTH = re.compile(r"\d{4}(-\d{2})?")


class SchemaError(ValueError):
    """A table is no partition, or not one of the wanted model; the message says what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """What vectors are: of which model, and their shapes."""

    model: str
    """What the model was loaded as; a hint for people."""
    fingerprint: str
    """Of its weights."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else decides what the vectors are, as `fingerprint.settings` tells it."""
    embed_dim: int
    match_shape: tuple[int, int] | None = None
    """(S, D) of MSCMAT's vectors; None for a model without MSCMAT."""

    def embedding(self) -> dict[str, Any]:
        """The keys of the STAC embedding proposal."""
        return {
            "emb:type": "chip",
            "emb:dimensions": self.embed_dim,
            "data_type": "float16",
            "emb:quantization": {"method": "none", "original_dtype": "float32", "quantized_dtype": "float16"},
            "emb:runtime_parameters": {"model": self.model, "fingerprint": self.fingerprint, **self.settings},
            "emb:fit_for_use": ["retrieval", "similarity_search"],
        }


def to_table(images: Sequence[CaptionedImage]) -> pa.Table:
    """A row for each image, in their order, without vectors.

    Raises:
        SchemaError: a name is not Unicode, as of files in other encodings.
        PlaceError: an image lies on Earth, and shapely is missing.
    """
    about = [dict(image.metadata) for image in images]
    wkb = places.outlines(about)
    extra = _meta_columns([_meta(known) for known in about])
    dates = [instant(str(date)) if (date := _meta(known).get("date")) else None for known in about]
    locations = [image.location for image in images]
    columns = {
        "id": [image.image_id for image in images],
        "source": [location.url for location in locations],
        "content": [image.content or None for image in images],
        "place": [_place(location) for location in locations],
        "window": [dict(zip(_names(_WINDOW), at.window, strict=True)) if at.window else None for at in locations],
        "class": [image.label for image in images],
        "captions": [list(image.captions) for image in images],
        "datetime": dates,
        "geometry": wkb,
        "metadata": [
            _rest(known, extra, drop_outline=outline is not None) for known, outline in zip(about, wkb, strict=True)
        ],
    }
    try:
        arrays = {
            field.name: _bbox(places.bounds(wkb)) if field.name == "bbox" else pa.array(columns[field.name], field.type)
            for field in COLUMNS
        }
    except (UnicodeEncodeError, pa.ArrowInvalid) as error:
        raise SchemaError(
            f"{_not_unicode(images)!a}: not Unicode, as Parquet needs it ({error}); rename it."
        ) from error
    table = pa.Table.from_arrays(list(arrays.values()), schema=COLUMNS)
    for name, values in extra.items():
        table = table.append_column(name, values)
    return table


def columns_of_images(schema: pa.Schema) -> list[str]:
    """The columns that `to_images` needs: neither vectors, nor bounds, which the outline has."""
    return [name for name in schema.names if name not in (*VECTORS, "bbox")]


def to_images(table: pa.Table) -> list[CaptionedImage]:
    """The inverse of `to_table`, of the columns `columns_of_images`; others are passed over.

    Raises:
        ValueError: a row holds what `to_table` does not write.
    """
    names = [name for name in columns_of_images(table.schema) if name != "datetime"]
    return [
        _image({**row, "datetime": when})
        for row, when in zip(table.select(names).to_pylist(), _instants(table["datetime"]), strict=True)
    ]


def locations(table: pa.Table) -> list[Location]:
    """Where the images lie, out of the columns `source`, `place` and `window`."""
    return [_location(row) for row in table.select(["source", "place", "window"]).to_pylist()]


def with_vectors(table: pa.Table, features: NDArray[np.float16], projected: NDArray[np.float16] | None) -> pa.Table:
    """The table with its vectors as columns: `global` of features (n, E), `match` of vectors m (n, S, D)."""
    for name, values in zip(VECTORS, (features, projected), strict=True):
        if values is not None:
            flat = np.ascontiguousarray(values).reshape(len(values), math.prod(values.shape[1:]))
            column = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
            table = table.append_column(name, column)
    return table


def vectors(table: pa.Table, product: Product) -> tuple[NDArray[np.float16], NDArray[np.float16] | None]:
    """The vectors of a table: features (n, E) and vectors m (n, S, D), in half precision.

    Raises:
        SchemaError: a column is missing, of another width, or holds what is no finite number of half precision.
    """
    shape = product.match_shape
    features = _numbers(table, "global", (product.embed_dim,))
    return features, _numbers(table, "match", shape) if shape else None


def write_partition(url: str, table: pa.Table, product: Product) -> None:
    """Write a table as one GeoParquet file, rows along a Hilbert curve; it has its name once it is whole.

    Args:
        url: a path or fsspec URL; what is there is replaced.
        table: of `to_table`, with vectors or without.
        product: what the vectors are, kept in the metadata of the file.
    """
    store.write_bytes(url, parquet(table.take(hilbert_order(table)), product))


def parquet(table: pa.Table, product: Product) -> bytes:
    """A table as GeoParquet 1.1 with what its vectors are, rows as they come."""
    described = table.replace_schema_metadata(_file_metadata(table, product))
    out = io.BytesIO()
    # Most texts differ from row to row, and those that do not ZSTD shortens as well: without dictionaries files are
    # smaller by a quarter, and read faster by as much.
    pq.write_table(described, out, compression="zstd", row_group_size=ROW_GROUP, use_dictionary=False)
    return out.getvalue()


def hilbert_order(table: pa.Table) -> NDArray[np.int64]:
    """Numbers (n,) of the rows along a Hilbert curve; as they come, where no place is known."""
    return places.hilbert_order(bounds(table))


def bounds(table: pa.Table) -> NDArray[np.float64]:
    """(n, 4) of the column `bbox`, NaN where nothing is known; each side together in memory."""
    found = np.empty((len(table), 4), dtype=np.float64, order="F")
    for side, name in enumerate(_names(_BBOX)):
        found[:, side] = pc.struct_field(table["bbox"], name).to_numpy()
    return found


def extent(table: pa.Table) -> places.Box | None:
    """The box around all that the column `bbox` knows, None if that is nothing."""
    return places.extent(bounds(table))


def product_of(schema: pa.Schema, name: str) -> Product:
    """What the vectors of a file are.

    Args:
        schema: of the file.
        name: of the file, for complaints.
    Raises:
        SchemaError: it does not say, or its columns are not those of a partition.
    """
    product = described(schema, name)
    for wanted in COLUMNS:
        found = schema.field(wanted.name).type if schema.get_field_index(wanted.name) >= 0 else None
        if found is None and not wanted.nullable:
            raise SchemaError(f"{name}: no column `{wanted.name}`; it has {', '.join(schema.names)}.")
        if found is not None and not _fits(found, wanted.type):
            raise SchemaError(f"{name}: column `{wanted.name}` is {found}, expected {wanted.type}.")
    return product


def described(schema: pa.Schema, name: str) -> Product:
    """What the metadata of a schema says of its vectors, whatever its columns are.

    Raises:
        SchemaError: it says nothing.
    """
    try:
        known = json.loads((schema.metadata or {})[b"msa_openclip"])
        shape = known["match_shape"]
        product = Product(
            model=str(known["model"]),
            fingerprint=str(known["fingerprint"]),
            settings=dict(known["settings"]),
            embed_dim=int(known["embed_dim"]),
            match_shape=(int(shape[0]), int(shape[1])) if shape else None,
        )
        if not all(0 < size <= _MOST_NUMBERS for size in (product.embed_dim, *(product.match_shape or ()))):
            raise ValueError(f"vectors of {product.embed_dim} and {product.match_shape} numbers")
        return product
    except (KeyError, ValueError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise SchemaError(
            f"{name}: its metadata has no key `msa_openclip` that tells model and shapes of its vectors; write it with "
            "`msa-openclip index export`, or set the key."
        ) from error


def conform(table: pa.Table) -> pa.Table:
    """The table with all of COLUMNS in their types, those that it lacks null, then its others.

    Raises:
        SchemaError: values do not fit.
    """
    result = pa.Table.from_arrays([_column(table, field) for field in COLUMNS], schema=COLUMNS)
    for name in table.column_names:
        if name not in COLUMNS.names:
            result = result.append_column(name, table[name])
    return result


def _column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    """A column of COLUMNS in its type; null, if the table lacks it."""
    if field.name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), field.type)])
    try:
        column = table[field.name].cast(field.type)
    except (pa.ArrowException, OverflowError) as error:
        raise SchemaError(f"column `{field.name}`: {str(error).rstrip('.')}") from error
    if column.null_count and not field.nullable:
        raise SchemaError(
            f"column `{field.name}`: null in {column.null_count} rows; every image needs an id and a source"
        )
    return column


def placed(table: pa.Table) -> pa.Table:
    """The table of others with bounds as its outlines have them, and boxes for outlines where only bounds are known.

    Raises:
        SchemaError: an outline is no WKB, or does not lie on Earth.
        PlaceError: there are places, and shapely is missing.
    """
    try:
        wkb = places.or_boxes(table["geometry"].to_pylist(), bounds(table))
        around = places.bounds(wkb)
    except OutlineError as error:
        raise SchemaError(f"column `geometry`: {error}") from error
    west, south, east, north = around.T  # NaN, where nothing is known, compares as false
    if ((west < -180) | (east > 180) | (south < -90) | (north > 90)).any():
        raise SchemaError("column `geometry`: an outline lies beyond 180 or 90 degrees, expected WGS84")
    known = {"geometry": pa.array(wkb, pa.binary()), "bbox": _bbox(around)}
    for name, column in known.items():
        table = table.set_column(table.column_names.index(name), COLUMNS.field(name), column)
    return table


def instant(text: str) -> datetime | None:
    """An ISO year, month, date or time as UTC, its beginning; None if it is none."""
    whole = f"{text}-01-01"[:10] if _YEAR_OR_MONTH.fullmatch(text) else text
    try:
        found = datetime.fromisoformat(whole.replace("Z", "+00:00"))
    except ValueError:
        return None
    return found.astimezone(timezone.utc) if found.tzinfo else found.replace(tzinfo=timezone.utc)


def _names(struct: pa.StructType) -> list[str]:
    return [struct.field(number).name for number in range(struct.num_fields)]


def _meta(about: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = about.get("meta")
    return meta if isinstance(meta, Mapping) else {}


def _place(location: Location) -> dict[str, Any] | None:
    place = {name: getattr(location, name) for name in _names(_PLACE)}
    return place if any(value is not None for value in place.values()) else None


def _bbox(bounds: NDArray[np.float64]) -> pa.Array:
    unknown = pa.array(np.isnan(bounds[:, 0]))
    fields = [_BBOX.field(number) for number in range(_BBOX.num_fields)]
    return pa.StructArray.from_arrays([pa.array(part) for part in bounds.T], fields=fields, mask=unknown)


def _meta_columns(metas: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
    """A column for each name whose values are of one kind; engines compare names without regard to case."""
    taken = {name.lower() for name in (*COLUMNS.names, *VECTORS)}
    found: dict[str, pa.Array] = {}
    for name in dict.fromkeys(name for meta in metas for name in meta):
        values = [meta.get(name) for meta in metas]
        kind = _kind({type(value) for value in values if value is not None})
        if kind is None or name.lower() in taken or len(found) == _MOST_COLUMNS:
            continue
        try:
            name.encode()
            found[name] = pa.array(values, kind)
        except (UnicodeEncodeError, OverflowError, pa.ArrowInvalid):  # lone surrogates, integers of more than 64 bits
            continue
        taken.add(name.lower())
    return found


def _kind(types: set[type]) -> pa.DataType | None:
    for known, kind in (({str}, pa.string()), ({bool}, pa.bool_()), ({int}, pa.int64()), ({int, float}, pa.float64())):
        if types and types <= known:
            return kind
    return None


def _rest(about: Mapping[str, Any], columns: Iterable[str], *, drop_outline: bool) -> str | None:
    """What no column holds, as JSON; None if that is nothing."""
    rest = dict(about)
    if isinstance(rest.get("meta"), Mapping):
        rest["meta"] = {name: value for name, value in rest["meta"].items() if name not in columns}
    if drop_outline:
        rest["geo"] = {name: value for name, value in rest["geo"].items() if name != "footprint"}
    rest = {name: value for name, value in rest.items() if value not in ({}, None)}
    return json.dumps(rest) if rest else None


def _instants(column: pa.ChunkedArray) -> list[datetime | None]:
    """Its values; pyarrow's own way to them imports pandas, which takes a third of a second."""
    micros = column.cast(COLUMNS.field("datetime").type).cast(pa.int64()).to_pylist()
    return [None if value is None else _EPOCH + timedelta(microseconds=value) for value in micros]


def _image(row: Mapping[str, Any]) -> CaptionedImage:
    about = json.loads(row["metadata"]) if row["metadata"] else {}
    meta = {name: value for name, value in row.items() if name not in COLUMNS.names and value is not None}
    if row["datetime"] is not None and "date" not in _meta(about):
        meta.setdefault("date", row["datetime"].isoformat())
    if meta:
        about["meta"] = {**_meta(about), **meta}
    if row["geometry"] is not None:
        about["geo"] = {**(about.get("geo") or {}), "footprint": places.geojson(row["geometry"])}
    captions = tuple(text for text in row["captions"] or () if text is not None)
    return CaptionedImage(row["id"], _location(row), captions, row["class"], about, row["content"] or "")


def _location(row: Mapping[str, Any]) -> Location:
    window = tuple(row["window"][name] for name in _names(_WINDOW)) if row["window"] else None
    return Location(row["source"], **(row["place"] or {}), window=window)


def _numbers(table: pa.Table, name: str, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """A column of vectors as (n, *shape)."""
    width = int(np.prod(shape))
    if name not in table.column_names:
        raise SchemaError(f"no column `{name}`; expected {width} numbers a row")
    kind = table[name].type
    if not (_is_list(kind) and pa.types.is_floating(kind.value_type)):
        raise SchemaError(f"column `{name}` is {kind}, expected lists of floating-point numbers")
    column = table[name].combine_chunks()
    values = np.asarray(column.flatten())  # without the values below nulls
    if not pc.all(pc.equal(pc.list_value_length(column), width), skip_nulls=False, min_count=0).as_py():
        raise SchemaError(f"column `{name}`: {len(values)} numbers in {len(table)} rows, expected {width} a row")
    with np.errstate(over="ignore", invalid="ignore"):
        half: NDArray[np.float16] = values.astype(np.float16).reshape(len(table), *shape)
    if not np.isfinite(half).all():
        raise SchemaError(f"column `{name}`: numbers that float16 cannot hold")
    return half


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _file_metadata(table: pa.Table, product: Product) -> dict[str, str]:
    wkb = table["geometry"].to_pylist()
    box = bounds(table)
    known = ~np.isnan(box[:, 0])
    geometry: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": places.geometry_types(wkb),
        "covering": {"bbox": {name: ["bbox", name] for name in _names(_BBOX)}},
    }
    if known.any():
        geometry["bbox"] = [*box[known, :2].min(axis=0).tolist(), *box[known, 2:].max(axis=0).tolist()]
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
    plain = {"geo": geo, "msa_openclip": asdict(product), **product.embedding()}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in plain.items()}


def _not_unicode(images: Sequence[CaptionedImage]) -> str:
    """The first text among ids, places, classes and captions that cannot be UTF-8."""
    texts = (text for i in images for text in (i.image_id, i.location.url, i.label or "", *i.captions, i.content))
    return next((text for text in texts if any(0xD800 <= ord(letter) < 0xE000 for letter in text)), "a text")


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    try:
        pa.nulls(0, found).cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return False
    return True
