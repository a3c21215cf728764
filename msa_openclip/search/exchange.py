"""Indexes out to plain GeoParquet, vectors included, and in again: also what others made with the same model.

    export_index("tiles.index", "tiles")                # tiles/*.parquet, one for each segment
    import_partitions("other.index", ["tiles/*.parquet"])

No model is needed: files say by its fingerprint which one made their vectors, and those of two models never meet.
"""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..shards.storage import store
from ..shards.storage.locking import one_writer
from .build import Known, publish
from .files import (
    TILES,
    ImageIndexError,
    Manifest,
    Segment,
    checked_files,
    is_written,
    open_parquet,
    read_columns,
    read_manifest,
    read_segment,
    remove_left_over,
    write_segment,
)
from .options import SEGMENT_IMAGES
from .schema import (
    VECTORS,
    Product,
    SchemaError,
    conform,
    parquet,
    placed,
    product_of,
    to_images,
    vectors,
    with_vectors,
)
from .vectors import Vectors

_ROUNDING = 0.02  # of vectors of length 1 in bfloat16
_log = logging.getLogger(__name__)


class Imported(NamedTuple):
    """What `import_partitions` has done."""

    added: int
    known: int
    """Rows that were in the index already, by id and content, or came twice."""


def export_index(folder: str, out: str) -> int:
    """Write an index as GeoParquet with the columns `global` and `match`, a file for each segment; returns the rows.

    Files that are there already are kept: equal names mean equal content.

    Args:
        folder: the index.
        out: folder for the files, a path or fsspec URL.
    Raises:
        ImageIndexError: there is no index, or it is damaged.
    """
    root, rows = Path(folder), 0
    manifest = read_manifest(root)
    store.make_folder(out)
    for segment in manifest.segments:
        url = store.join(out, f"{segment.name}.parquet")
        rows += segment.images
        if not segment.images or store.exists(url):
            continue
        store.write_bytes(url, parquet(*segment_table(root, manifest, segment)))
    return rows


def segment_table(root: Path, manifest: Manifest, segment: Segment) -> tuple[pa.Table, Product]:
    """All that an index holds of a segment, vectors included, and what those are.

    Raises:
        ImageIndexError: it is damaged.
    """
    path, files = root / segment.name, checked_files(root, segment)
    tiles = open_parquet(path, files[TILES])
    table = read_columns(path, tiles, tiles.schema_arrow.names, segment.images)
    features = Vectors(path, files["features.npy"], segment.images).block(0, segment.images)
    match = files.get("projected.npy")
    projected = Vectors(path, match, segment.images).block(0, segment.images) if match else None
    return with_vectors(table, features, projected), manifest.product(features, projected)


def import_partitions(folder: str, sources: Sequence[str], *, segment_images: int = SEGMENT_IMAGES) -> Imported:
    """Add the rows of GeoParquet files to an index, making it if there is none.

    Interrupted, the same call goes on where it stopped.  Rows that are there already are passed over and counted.

    Args:
        folder: the index.
        sources: files, folders of them or patterns, local or fsspec URLs.
        segment_images: rows a segment.
    Raises:
        ImageIndexError: a file is not whole, no partition, or of another model than the index or the files before it.
        BeingWritten: another process is writing to the index.
    """
    root = Path(folder)
    files = expand(sources)
    products = {url: read_product(url) for url in files}
    store.make_folder(folder)
    with one_writer(folder):
        exists = (root / "index.json").exists()
        manifest = read_manifest(root) if exists else _manifest(products[files[0]])
        for url, product in products.items():
            check_product(url, product, manifest, products[files[0]])
        known, names, twice = Known(root, manifest), [], 0
        for url, product in products.items():
            for table in read_tables(url, segment_images):
                new, seen = _new_rows(url, table, known)
                twice += seen
                if len(new):
                    names.append(_write(root, url, new, product, manifest))
        remove_left_over(root)
        added = [read_segment(root, name) for name in names]
        if added or not exists:
            publish(root, replace(manifest, segments=(*manifest.segments, *added)))
    return Imported(sum(segment.images for segment in added), twice)


def expand(sources: Iterable[str]) -> list[str]:
    """The files that sources name: files, folders of them or patterns, local or fsspec URLs.

    Raises:
        ImageIndexError: one of them names none.
    """
    files: list[str] = []
    for source in sources:
        if store.is_folder(source):
            found = [store.join(source, name) for name in store.names(source) if name.endswith(".parquet")]
        elif store.is_local(source) and not store.exists(source):
            found = sorted(glob.glob(store.local_path(source)))
        else:
            found = [source]
        found = [name for name in found if not store.base_name(name).startswith(".")]  # half written
        if not found:
            raise ImageIndexError(f"{source}: no Parquet file is there.")
        files += found
    return list(dict.fromkeys(files))


def read_product(url: str) -> Product:
    """What the vectors of a file are.

    Raises:
        ImageIndexError: it is not whole, or no partition.
    """
    try:
        with store.open_read(url) as file:
            return product_of(pq.read_schema(file), url)
    except (SchemaError, store.NotReadable) as error:
        raise ImageIndexError(str(error)) from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _not_whole(url, error) from error


def _not_whole(url: str, error: Exception) -> ImageIndexError:
    return ImageIndexError(f"{url}: no whole Parquet file ({error}); was its writer killed? Write it again.")


def _manifest(product: Product) -> Manifest:
    return Manifest(product.model, product.fingerprint, dict(product.settings))


def check_product(url: str, product: Product, manifest: Manifest, first: Product) -> None:
    """Raise ImageIndexError unless a file's vectors are of the model of the index, in the shapes of the first file."""
    if product.fingerprint != manifest.fingerprint:
        raise ImageIndexError(
            f"{url}: its vectors are of other weights ({product.model}, {product.fingerprint[:12]}) than the index "
            f"({manifest.model}, {manifest.fingerprint[:12]}); scores of two models do not compare."
        )
    different = [name for name, value in manifest.settings.items() if product.settings.get(name) != value]
    if different:
        raise ImageIndexError(
            f"{url}: of the weights of the index, but with another {different[0]} "
            f"({product.settings.get(different[0])}, in the index {manifest.settings[different[0]]})."
        )
    if (product.embed_dim, product.match_shape) != (first.embed_dim, first.match_shape):
        raise ImageIndexError(
            f"{url}: vectors of {product.embed_dim} and {product.match_shape} numbers, in the first file "
            f"{first.embed_dim} and {first.match_shape}."
        )


def read_tables(url: str, rows: int) -> Iterator[pa.Table]:
    """A file in pieces of so many rows, with all columns of a partition.

    Raises:
        ImageIndexError: it is not whole.
    """
    try:
        with store.open_read(url) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=rows, use_threads=False):
                yield placed(conform(pa.Table.from_batches([batch])))
    except SchemaError as error:
        raise ImageIndexError(f"{url}: {error}.") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _not_whole(url, error) from error


def _new_rows(url: str, table: pa.Table, known: Known) -> tuple[pa.Table, int]:
    """The rows that are not in the index yet, and how many are."""
    try:
        images = to_images(table.drop_columns([name for name in VECTORS if name in table.column_names]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ImageIndexError(
            f"{url}: a row is not what a partition holds ({type(error).__name__}: {error})."
        ) from error
    fresh: list[int] = []
    for row, image in enumerate(images):
        if not known.has(image):
            known.add(image)
            fresh.append(row)
    known.require_unchanged([images[row] for row in fresh])
    seen = len(images) - len(fresh)
    if seen:
        _log.warning("%s: %d rows are in the index already and passed over.", url, seen)
    return table.take(pa.array(fresh, pa.int64())) if seen else table, seen


def _require_length_one(features: NDArray[np.float16]) -> None:
    """Raise SchemaError unless all global features (n, E) are normalised: a longer one would win every search."""
    length = np.linalg.norm(features.astype(np.float32), axis=1)
    worst = float(length[np.abs(length - 1).argmax()]) if len(length) else 1.0
    if abs(worst - 1) > _ROUNDING:
        raise SchemaError(f"column `global`: a vector of length {worst:.3g}, expected 1; normalise them")


def _write(root: Path, url: str, table: pa.Table, product: Product, manifest: Manifest) -> str:
    """Write rows as a segment, unless it is there; returns its name."""
    try:
        features, projected = vectors(table, product)
        _require_length_one(features)
    except SchemaError as error:
        raise ImageIndexError(f"{url}: {error}.") from error
    name = hashlib.sha256(parquet(table, product)).hexdigest()[:16]
    if not is_written(root, name):
        kept = [name for name in table.column_names if name not in VECTORS]
        write_segment(root, name, manifest, table.select(kept), features, projected)
    return name
