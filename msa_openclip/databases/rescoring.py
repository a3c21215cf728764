"""Exact scores on the candidates of any database: those of `Searcher`, on a table of rows with their vectors.

    rescorer = Rescorer(model)
    vector = rescorer.vector("a flooded river")                            # ask the database for the nearest of it,
    best = rescorer.best("a flooded river", candidates, k=10)              # and order what it answers

Shapes: n candidates, S scales, D width of MSCMAT, E embed_dim, R rankings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ..evaluation.loading import LoadedModel
from ..evaluation.scorer import EncodedTexts
from ..search.files import Manifest
from ..search.fingerprint import check_model
from ..search.schema import VECTORS, Product, SchemaError, described, vectors, with_vectors

SCORE, COSINE, MATCH = "score", "cosine", "match_scales"
"""Columns that `Rescorer.best` adds."""


class DatabaseError(ValueError):
    """Rows of a database cannot be written or scored; the message says what is wrong with them."""


def candidates_of(rows: Sequence[Mapping[str, Any]], described_by: str) -> pa.Table:
    """Rows of a database that answers without Arrow as the table that `Rescorer.best` takes.

    Args:
        rows: by column; `global` and `match` are arrays or lists of numbers.
        described_by: what the key `msa_openclip` of the metadata of `Sources.schema` said when they were written.
    Raises:
        DatabaseError: it says nothing of vectors; a row lacks one or has one of another width.
    """
    metadata = {"msa_openclip": described_by}
    try:
        product = described(pa.schema([], metadata=metadata), "described_by")
    except SchemaError as error:
        raise DatabaseError(str(error)) from error
    table = pa.Table.from_pylist([{name: row[name] for name in row if name not in VECTORS} for row in rows])
    features = _halves(rows, "global", (product.embed_dim,))
    projected = _halves(rows, "match", product.match_shape) if product.match_shape else None
    return with_vectors(table, features, projected).replace_schema_metadata(metadata)


def _halves(rows: Sequence[Mapping[str, Any]], name: str, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """A column of vectors as (n, *shape)."""
    found = np.empty((len(rows), math.prod(shape)), np.float16)
    for number, row in enumerate(rows):
        values = np.asarray(row.get(name, ()), dtype=np.float16)
        if values.shape != found.shape[1:]:
            raise DatabaseError(
                f"row {number}: {values.size} numbers of `{name}`, expected {found.shape[1]}; let the query give them."
            )
        found[number] = values
    return found.reshape(len(rows), *shape)


class Rescorer:
    """Orders candidates of a database by the scores that `Searcher` gives them.

    Args:
        model: the model that made the vectors.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model, self._scorer = model, model.scorer
        self._text: tuple[str, EncodedTexts] | None = None
        self._checked: bytes | None = None

    def vector(self, text: str) -> NDArray[np.float32]:
        """The normalised global feature (E) of a text, to find the nearest rows of column `global`.

        Raises:
            DatabaseError: the text is blank.
        """
        found: NDArray[np.float32] = self._encoded(text).feature[0].cpu().numpy()
        return found

    def best(self, text: str, candidates: pa.Table, k: int | None = None) -> pa.Table:
        """The k best of the candidates, or all, by fused score, best first.

        Args:
            text: the query.
            candidates: rows with the columns `global` and, for a model with MSCMAT, `match`, and any others, which are
                kept; the key `msa_openclip` of the table's metadata tells the model of the vectors.
            k: how many to keep.
        Returns:
            The rows with `score`, which orders them, `cosine`, and `match_scales`: MSCMAT's scores, shallow to deep.
        Raises:
            DatabaseError: the text is blank, or k not positive; the vectors are missing, or not of this model.
            ImageIndexError: the vectors are of another model.
        """
        if k is not None and k < 1:
            raise DatabaseError(f"k: {k} must be at least 1.")
        encoded, product = self._encoded(text), self._product(candidates)
        try:
            features, projected = vectors(candidates, product)
        except SchemaError as error:
            raise DatabaseError(f"candidates: {error}; let the query give the columns {', '.join(VECTORS)}.") from error
        scores = self._scores(encoded, features, projected)
        order = np.argsort(-scores[self._scorer.main_ranking], kind="stable")[:k]
        scales = [values for name, values in scores.items() if name.startswith("match_scale")]
        match = np.stack(scales, axis=1) if scales else np.empty((len(features), 0), np.float32)
        found = candidates.take(pa.array(order))
        for name, values in ((SCORE, scores[self._scorer.main_ranking]), (COSINE, scores["global"])):
            found = found.append_column(name, pa.array(values[order], pa.float32()))
        return found.append_column(MATCH, pa.array(list(match[order]), pa.list_(pa.float32())))

    def _encoded(self, text: str) -> EncodedTexts:
        """The text as the model sees it; the one before is kept, since it is needed for the vector and the scores."""
        if not text.strip():
            raise DatabaseError("the query is blank; write what to look for.")
        if self._text is None or self._text[0] != text:
            self._text = text, self._scorer.texts(self._model.tokenizer([text]))
        return self._text[1]

    def _product(self, candidates: pa.Table) -> Product:
        """What the vectors are, compared with the model, which hashes its weights and so is done once a table."""
        said = (candidates.schema.metadata or {}).get(b"msa_openclip")
        try:
            product = described(candidates.schema, "candidates")
        except SchemaError as error:
            raise DatabaseError(str(error)) from error
        if said != self._checked:
            check_model("candidates", Manifest(product.model, product.fingerprint, product.settings), self._model)
            if self._scorer.has_match and product.match_shape is None:
                raise DatabaseError("candidates: without MSCMAT's vectors, which this model needs; write them again.")
            self._checked = said
        return product

    def _scores(
        self, text: EncodedTexts, features: NDArray[np.float16], projected: NDArray[np.float16] | None
    ) -> dict[str, NDArray[np.float32]]:
        """Scores (n) of each ranking."""
        if not len(features):
            return {name: np.empty(0, np.float32) for name in self._scorer.rankings}
        halves = torch.from_numpy(features).float().to(self._scorer.device)
        images = self._scorer.fold(halves, None if projected is None else torch.from_numpy(projected).float())
        scores = self._scorer.scores(images, text)[:, :, 0].cpu().numpy()  # (R, n)
        return dict(zip(self._scorer.rankings, scores, strict=True))
