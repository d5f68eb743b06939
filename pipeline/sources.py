"""Where encoded images come from: a folder of files, or Parquet of encoded bytes.

The index (one row per image) is built once, on one process. Surprising: a sample's id is a hash of
its place in the data set, not its row, so adding files leaves the other samples' crops and masks
alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from pipeline.reproducibility import stable_id

PARQUET_SUFFIXES = (".parquet", ".pq")
_CACHED_ROW_GROUPS = 4


def build_index(path: str, setting: str = "data.path") -> pa.Table:
    """Index a data set.

    Args:
        path: folder of images (recursive), folder of Parquet files, or one Parquet file.
        setting: the setting the path came from, for error messages.

    Returns:
        Table with sample_id (uint64), path (string), row_group and row (int32; -1 for image files),
        sorted by path, row group, row.

    Raises:
        ValueError: nothing there that could be an image.
        FileNotFoundError: the path does not exist.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(
            f"{setting}='{path}' does not exist; give a folder of images or Parquet files"
        )
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    parquet = [p for p in files if p.suffix.lower() in PARQUET_SUFFIXES]
    if parquet:
        return _index_parquet(root, parquet)
    readable = _readable_suffixes()
    images = [p for p in files if p.suffix.lower() in readable]
    if not images:
        raise ValueError(
            f"{setting}='{path}' holds no image among {len(files)} files; give a folder with files "
            "Pillow can read (.jpg, .png, .webp, .tif, ...) or with .parquet files"
        )
    return _index_table(
        [stable_id(_name(root, p)) for p in images],
        [str(p.absolute()) for p in images],
        np.full(len(images), -1),
        np.full(len(images), -1),
    )


def _readable_suffixes() -> set[str]:
    """Suffixes of the formats Pillow can open; some of its formats it can only write."""
    Image.init()
    readable = {suffix for suffix, name in Image.EXTENSION.items() if name in Image.OPEN}
    return readable | {".mpo"}  # opened by the JPEG plugin


def _index_parquet(root: Path, files: Sequence[Path]) -> pa.Table:
    ids: list[int] = []
    paths: list[str] = []
    row_groups: list[NDArray[np.int64]] = []
    rows: list[NDArray[np.int64]] = []
    for file in files:
        name = _name(root, file)
        metadata = pq.read_metadata(file)
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        ids += [stable_id(f"{name}:{row}") for row in range(sum(sizes))]
        paths += [str(file.absolute())] * sum(sizes)
        row_groups.append(np.repeat(np.arange(len(sizes)), sizes))
        rows += [np.arange(size) for size in sizes]
    if not ids:
        raise ValueError(f"{root}: {len(files)} Parquet files hold no rows")
    return _index_table(ids, paths, np.concatenate(row_groups), np.concatenate(rows))


def _name(root: Path, file: Path) -> str:
    return file.name if root.is_file() else file.relative_to(root).as_posix()


def _index_table(
    ids: list[int], paths: list[str], row_groups: NDArray[np.int64], rows: NDArray[np.int64]
) -> pa.Table:
    return pa.table(
        {
            "sample_id": pa.array(ids, pa.uint64()),
            "path": pa.array(paths, pa.string()).dictionary_encode(),
            "row_group": pa.array(row_groups, pa.int32()),
            "row": pa.array(rows, pa.int32()),
        }
    )


def group_sizes(index: pa.Table) -> NDArray[np.int64]:
    """Rows that are read together (a Parquet row group, or one file), in index order."""
    row_group = index["row_group"].to_numpy()
    path = index["path"].combine_chunks().indices.to_numpy()
    changes = np.flatnonzero((np.diff(row_group) != 0) | (np.diff(path) != 0)) + 1
    return np.diff(np.concatenate([[0], changes, [index.num_rows]]))


class SampleReader:
    """Reads encoded bytes of samples by index row; keeps a few Parquet row groups in memory."""

    def __init__(self, index: pa.Table, image_column: str) -> None:
        self.index = index
        self.image_column = image_column
        self.sample_ids = index["sample_id"].to_numpy()
        self._paths = index["path"].combine_chunks()
        self._row_groups = index["row_group"].to_numpy()
        self._rows = index["row"].to_numpy()
        self._cache: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()

    def __len__(self) -> int:
        return self.index.num_rows

    def location(self, row: int) -> str:
        """Where a sample is, for people: a path, or path:row-group:row."""
        path = str(self._paths[row].as_py())
        if self._rows[row] < 0:
            return path
        return f"{path}:{self._row_groups[row]}:{self._rows[row]}"

    def read(self, row: int) -> bytes:
        """Encoded bytes of one sample.

        Raises:
            ValueError: the Parquet file has no such image column.
            OSError: the file cannot be read.
        """
        path = str(self._paths[row].as_py())
        if self._rows[row] < 0:
            return Path(path).read_bytes()
        column = self._row_group(path, int(self._row_groups[row]))
        value = column[int(self._rows[row])].as_py()
        encoded = value["bytes"] if isinstance(value, dict) else value  # Hugging Face struct
        return bytes(encoded or b"")

    def _row_group(self, path: str, row_group: int) -> pa.ChunkedArray:
        key = (path, row_group)
        if key not in self._cache:
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if self.image_column not in names:
                    raise ValueError(
                        f"data.image_column='{self.image_column}' is not in {path}; its columns "
                        f"are {', '.join(names)}"
                    )
                table = file.read_row_group(row_group, columns=[self.image_column])
            self._cache[key] = table[self.image_column]
            if len(self._cache) > _CACHED_ROW_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]
