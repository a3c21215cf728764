"""Rows that name images -> the same rows with their vectors: one class for every engine, with no engine in it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from ..data.captioned import CaptionedImage, EvalDataError
from ..data.pixels import image_pixels, preprocessed
from ..data.streams import StreamError, is_absent
from ..evaluation.encoder import Encoded, ImageEncoder, fastest_precision, image_scorer
from ..evaluation.loading import LoadedModel, ModelError, load
from ..evaluation.options import ENCODER_PRECISIONS
from ..evaluation.scorer import Scorer
from ..search.fingerprint import fingerprint, settings
from ..search.schema import COLUMNS, VECTORS, Product, conform, to_images
from ..shards.imagery.prepare import open_image
from ..shards.storage import store

VECTOR_TYPES = ("float16", "float32")
_PICTURES = "image"
_ERROR = "error"


class EmbedError(ValueError):
    """A batch is not what an Embedder takes; the message names the column and the remedy."""


class Embedder:
    """Adds vectors to a batch of images; runs unchanged in a loop, under torchrun, Ray Data, Spark and Daft.

        embedder = Embedder("MSA-ViT-B=epoch_9.pt")
        columns = embedder({"id": ["a"], "source": ["tiles/a.tif"]})      # a pyarrow.Table
        data.map_batches(Embedder, fn_constructor_args=("MSA-ViT-B=epoch_9.pt",), batch_format="pyarrow", concurrency=2)

    A pickled Embedder is the name of its model and no weights: where it arrives, it loads them once a process, and
    refuses others.

    Args:
        model: the model, or what `load` takes, so that each worker loads it for itself.
        device: of a model that is loaded here.
        precision: of the image tower: `bf16`, `fp32` (or what the model was loaded in), or `auto`, the faster one on
            this machine; give it where machines differ.
        batch_size: images that the tower takes at once; batches that come in may be larger or smaller.
        readers: threads that read and decode while the tower works.
        threads: of the tower, for this process as a whole; None leaves them as they are (OMP_NUM_THREADS, which Ray,
            Spark and torchrun set). Workers that share a machine take cores / workers each.
        vectors: `float16`, in lists of fixed size, as indexes keep them; `float32`, in plain lists, for engines and
            their files: Spark and Daft have no half precision, Spark no fixed size, and Parquet loses fixed sizes
            beside nulls.
    Raises:
        ModelError: the model cannot be loaded, or is another than the one that was pickled.
        ValueError: an argument is unknown or out of range.
    """

    def __init__(
        self,
        model: LoadedModel | str,
        *,
        device: str = "cpu",
        precision: str = "auto",
        batch_size: int = 32,
        readers: int = 1,
        threads: int | None = None,
        vectors: str = "float16",
    ) -> None:
        for name, value, known in (("precision", precision, ENCODER_PRECISIONS), ("vectors", vectors, VECTOR_TYPES)):
            if value not in known:
                raise ValueError(f"{name}: {value!r} is unknown; choose one of {', '.join(known)}.")
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = load(model, device) if isinstance(model, str) else model
        if precision == "auto":  # a model that was loaded in a precision of its own keeps it
            precision = fastest_precision(loaded.scorer.device) if loaded.precision == "fp32" else "fp32"
        self._how: dict[str, Any] = {
            "device": device,
            "precision": precision,
            "batch_size": batch_size,
            "readers": readers,
            "threads": threads,
            "vectors": vectors,
        }
        scorer = image_scorer(loaded.scorer, precision)
        self._preprocess = loaded.preprocess
        self._encode = ImageEncoder(scorer, batch_size=batch_size, readers=readers)
        self.product = self._product(loaded, scorer)
        """What the vectors are: model, fingerprint, settings and widths."""

    def __call__(self, batch: Any) -> pa.Table:
        """The rows of a batch in their order, with the columns `global`, `match` (with MSCMAT) and `error`.

        An image that cannot be read keeps its row: its vectors are null, and `error` says why.

        Args:
            batch: pyarrow.Table or RecordBatch, pandas.DataFrame, or columns by name (lists, NumPy arrays).  `id` and
                `source` (path or URL) are needed, the other columns of a partition used (`window`, `class`, ...), any
                more passed on.  A column `image` of pictures (arrays (h, w, 3) uint8, PIL images, encoded bytes) is
                taken in place of the files, and not passed on.
        Raises:
            EmbedError: a column is missing, or of another type.
            StreamError: a store cannot be reached, which says nothing of its images.
        """
        table, pictures = _rows(batch)
        images = to_images(table)
        if pictures is None:
            encoded = self._encode(images, self._pixels)
        else:
            encoded = self._encode(list(zip(images, pictures, strict=True)), self._pixels_of_picture)
        return self._with_vectors(table, encoded)

    def _product(self, loaded: LoadedModel, scorer: Scorer) -> Product:
        """What the vectors are, told from those of a black image; the fingerprint is that of the weights as loaded."""
        precision = "pure_bf16" if self._how["precision"] == "bf16" else loaded.precision
        black = [Image.new("RGB", (64, 64))] * scorer.dates
        feature, projected = scorer.project(preprocessed(black, self._preprocess)[None])
        return Product(
            model=loaded.spec,
            fingerprint=fingerprint(loaded.scorer),
            settings=settings(replace(loaded, precision=precision)),
            embed_dim=feature.shape[1],
            match_shape=None if projected is None else (projected.shape[1], projected.shape[2]),
        )

    def _pixels(self, image: CaptionedImage) -> Tensor:
        try:
            return image_pixels(image, self._preprocess)
        except EvalDataError as error:
            cause = error.__cause__
            if isinstance(cause, StreamError) and not store.is_local(image.location.url) and not is_absent(cause):
                raise cause from error
            raise

    def _pixels_of_picture(self, item: tuple[CaptionedImage, Any]) -> Tensor:
        image, picture = item
        try:
            return self._preprocess(_picture(picture))
        except Exception as error:  # Pillow raises nearly everything for one broken file or another
            raise EvalDataError(f"image {image.image_id} cannot be read: {error}") from error

    def _with_vectors(self, table: pa.Table, encoded: Encoded) -> pa.Table:
        """The table with a row of vectors, or nulls and the reason, for each of its rows."""
        widths = (self.product.embed_dim, *(self.product.match_shape or ()))
        kept = [problem is None for problem in encoded.problems]
        places = zip(np.cumsum(kept) - 1, kept, strict=True)
        place = pa.array([number if keep else None for number, keep in places], pa.int64())
        dtype = pa.type_for_alias(self._how["vectors"])
        shapes = ((widths[0],), widths[1:])
        for name, values, shape in zip(VECTORS, (encoded.features, encoded.projected), shapes, strict=True):
            if not shape:
                continue
            width = int(np.prod(shape))
            flat = pa.array(np.empty(0, np.float16) if values is None else values.ravel()).cast(dtype)
            column = pa.FixedSizeListArray.from_arrays(flat, width).take(place)
            plain = self._how["vectors"] == "float32"
            table = table.append_column(name, column.cast(pa.list_(dtype)) if plain else column)
        return table.append_column(_ERROR, pa.array(encoded.problems, pa.string()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.product, self._how)


def _restored(product: Product, how: Mapping[str, Any]) -> Embedder:
    """An Embedder on the machine where its pickle arrived."""
    embedder = Embedder(_loaded(product.model, how["device"], product.fingerprint), **how)
    if embedder.product != product:
        raise ModelError(
            f"{product.model}: here it is another model (fingerprint {embedder.product.fingerprint[:12]}) than where "
            f"the work was handed out ({product.fingerprint[:12]}); give every machine the same files."
        )
    return embedder


@functools.lru_cache(maxsize=1)
def _loaded(spec: str, device: str, fingerprint: str) -> LoadedModel:
    """The model, once a process: some engines unpickle their functions for every task.

    By its fingerprint, too, which the caller compares: of the same name there may be newer weights by now.
    """
    return load(spec, device)


def _rows(batch: Any) -> tuple[pa.Table, Sequence[Any] | None]:
    """A batch as a table with all columns of a partition but vectors, and its pictures, if it brings them."""
    pictures = None
    if not isinstance(batch, (pa.Table, pa.RecordBatch)):
        columns = {str(name): batch[name] for name in batch}
        pictures = columns.pop(_PICTURES, None)
        batch = _table(columns)
    elif _PICTURES in batch.schema.names:
        pictures = batch.column(_PICTURES).to_pylist()
    passed = [name for name in batch.schema.names if name not in (*VECTORS, _ERROR, _PICTURES)]
    table = pa.table({name: batch.column(name) for name in passed})
    for name in (field.name for field in COLUMNS if not field.nullable):
        if name not in table.column_names or table[name].null_count:
            raise EmbedError(f"column {name!r}: missing, or null in a row; every image needs an id and a source.")
    try:
        return conform(table), None if pictures is None else list(pictures)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, ValueError) as error:
        raise EmbedError(f"a batch with columns {', '.join(table.column_names)}: {error}") from error


def _table(columns: Mapping[str, Any]) -> pa.Table:
    """Columns of lists or arrays as a table; those of a partition in their types."""
    arrays = {}
    for name, values in columns.items():
        known = COLUMNS.field(name).type if name in COLUMNS.names else None
        try:
            arrays[name] = pa.array(list(values), known, from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise EmbedError(f"column {name!r}: {error}; expected {known or 'values of one type'}.") from error
    return pa.table(arrays)


def _picture(value: Any) -> Image.Image:
    """An RGB image out of an array (h, w, 3), encoded bytes, or a PIL image."""
    if isinstance(value, bytes):
        return open_image(value).convert("RGB")
    return value.convert("RGB") if isinstance(value, Image.Image) else Image.fromarray(np.asarray(value)).convert("RGB")
