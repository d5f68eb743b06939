"""Nearest neighbours by cosine similarity: exact, over the Parquet files of `jobs/embed.py`.

Vectors are read a chunk at a time, so memory does not grow with the gallery. Surprising: products
are summed in float64 and compared as float32. The last bits of a matrix product depend on how it
was cut into blocks; so rounded, equal vectors tie, whatever the chunks.
"""

# Q queries, N vectors of the gallery, D features, k neighbours

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage

CHUNK_ROWS = 4096
_QUERIES_AT_A_TIME = 512  # 512 x 4096 similarities in float64 are 16 MiB


class Neighbours(NamedTuple):
    """Of each query, the most similar first; equal ones in the order of the gallery."""

    rows: NDArray[np.int64]
    """(Q, k), places in the gallery."""
    similarities: NDArray[np.float32]
    """(Q, k), cosines."""


class VectorFiles:
    """One column of an output folder of `jobs/embed.py`; vectors are read when they are asked for.

    Args:
        out: the folder, local or a URI.
        column: stage4 ... pyramid16.

    Raises:
        ValueError: no embeddings there, or no vectors in that column.
    """

    def __init__(self, out: str, column: str) -> None:
        self.column = column
        self._filesystem, root = storage.resolve(out)
        files = [str(file.path) for file in storage.list_files(self._filesystem, root)]
        # As readers of Parquet folders do, pass over names that begin with _.
        self._files = [
            path
            for path in files
            if path.endswith(".parquet") and "/_" not in path.removeprefix(root)
        ]
        if not self._files:
            raise ValueError(
                f"'{out}' holds no Parquet files of embeddings; give the --out folder of "
                "jobs/embed.py"
            )
        with self._open(0) as file:
            schema = file.schema_arrow
        sizes = {f.name: f.type.list_size for f in schema if pa.types.is_fixed_size_list(f.type)}
        if column not in sizes:
            raise ValueError(
                f"column='{column}' is not among the vectors in '{out}'; use one of "
                f"{', '.join(sizes) or 'those of another folder, it has none'}"
            )
        self.dim: int = sizes[column]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """(Q, D), the vectors of some rows, in the order asked for."""
        return _vectors(self._take(rows, self.column), self.dim)

    def paths(self, rows: Sequence[int]) -> list[str]:
        """Where the images of some rows are."""
        found: list[str] = self._take(rows, "path").to_pylist()
        return found

    def chunks(self, num_rows: int) -> Iterator[NDArray[np.float32]]:
        """All vectors in order, at most `num_rows` at a time."""
        for i in range(len(self._files)):
            with self._open(i) as file:
                for batch in file.iter_batches(num_rows, columns=[self.column]):
                    yield _vectors(batch[self.column], self.dim)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Rows up to the end of each file."""
        sizes = []
        for i in range(len(self._files)):
            with self._open(i) as file:
                sizes.append(file.metadata.num_rows)
        return np.cumsum(sizes, dtype=np.int64)

    @contextmanager
    def _open(self, i: int) -> Iterator[pq.ParquetFile]:
        with storage.open_retrying(self._filesystem, self._files[i]) as stream:
            yield pq.ParquetFile(stream)

    def _take(self, rows: Sequence[int], name: str) -> pa.Array:
        """Values of a column; each file that holds a row wanted is read once."""
        wanted = np.asarray(rows, dtype=np.int64)
        assert len(wanted), "no rows are asked for"
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if len(outside):
            raise ValueError(f"row {outside[0]} is none of {len(self)}; use 0 to {len(self) - 1}")
        files = np.searchsorted(self._ends, wanted, side="right")
        parts: list[pa.Array] = []
        places: list[NDArray[np.int64]] = []
        for i in np.unique(files).tolist():
            first = int(self._ends[i - 1]) if i else 0
            with self._open(i) as file:
                column = file.read([name])[name].combine_chunks()
            parts.append(column.take(wanted[files == i] - first))
            places.append(np.flatnonzero(files == i))
        return pa.concat_arrays(parts).take(pa.array(np.argsort(np.concatenate(places))))


def nearest(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32] | VectorFiles,
    k: int,
    *,
    own_rows: Sequence[int] | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Neighbours:
    """The k vectors of the gallery that are most similar to each query.

    Args:
        queries: (Q, D).
        gallery: (N, D), or the files that hold them.
        k: neighbours of each query.
        own_rows: place of each query in the gallery, which is then not its neighbour; None: no
            query lies there or, where `queries` is the gallery itself, each at its own place.
        chunk_rows: vectors of the gallery that are held at a time; changes no result.

    Raises:
        ValueError: k is not positive or more than there are, or the vectors differ in size.
    """
    if own_rows is None and queries is gallery:
        own_rows = range(len(queries))
    _check(queries, gallery, k, own_rows)
    excluded = np.full(len(queries), -1) if own_rows is None else np.asarray(own_rows, np.int64)
    rows = np.full((len(queries), k), -1, np.int64)
    similarities = np.full((len(queries), k), -np.inf, np.float32)
    units = _unit(queries)
    first = 0
    for chunk in _chunks(gallery, chunk_rows):
        candidates = _unit(chunk)
        for start in range(0, len(units), _QUERIES_AT_A_TIME):
            part = slice(start, start + _QUERIES_AT_A_TIME)
            found = (units[part] @ candidates.T).astype(np.float32)  # (q, n)
            places = np.broadcast_to(np.arange(first, first + len(chunk)), found.shape)
            found[places == excluded[part, None]] = -np.inf
            joined = np.concatenate([similarities[part], found], axis=1)
            # Stable, and what came earlier stands before: so ties keep the order of the gallery.
            best = np.argsort(-joined, axis=1, kind="stable")[:, :k]
            rows[part] = np.take_along_axis(np.concatenate([rows[part], places], 1), best, 1)
            similarities[part] = np.take_along_axis(joined, best, 1)
        first += len(chunk)
    return Neighbours(rows, similarities)


def _check(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32] | VectorFiles,
    k: int,
    own_rows: Sequence[int] | None,
) -> None:
    dim = gallery.dim if isinstance(gallery, VectorFiles) else gallery.shape[1]
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(
            f"queries of shape {queries.shape} do not fit a gallery of {dim} features; give "
            f"(number, {dim}), of the same column and encoder"
        )
    others = len(gallery) - (own_rows is not None)
    if not 1 <= k <= others:
        way_out = f"use 1 to {others}" if others > 0 else "give a larger gallery"
        raise ValueError(
            f"k={k} is not between 1 and the {others} vectors a query can be near to; {way_out}"
        )
    if own_rows is not None and len(own_rows) != len(queries):
        raise ValueError(
            f"own_rows has {len(own_rows)} places for {len(queries)} queries; give one for each, "
            "or none at all"
        )


def _chunks(
    gallery: NDArray[np.float32] | VectorFiles, num_rows: int
) -> Iterator[NDArray[np.float32]]:
    if isinstance(gallery, VectorFiles):
        yield from gallery.chunks(num_rows)
    else:
        yield from (gallery[i : i + num_rows] for i in range(0, len(gallery), num_rows))


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Vectors of length 1; those that are zero or not finite become zero, similar to none."""
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    usable = np.isfinite(norms) & (norms > 0)
    return np.where(usable, wide, 0.0) / np.where(usable, norms, 1.0)


def _vectors(column: pa.Array, dim: int) -> NDArray[np.float32]:
    """(n, D) of a column of lists of fixed size."""
    values: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, dim)
