"""Samples inside larger files: WebDataset tars and Parquet (Hugging Face exports).

A tar is indexed by its headers alone, so that its images can be read at random. Surprising:
Python's tarfile takes a truncated archive for a shorter one; here its end is checked and reported.
"""

from __future__ import annotations

import contextlib
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline import storage
from pipeline.prepare.records import RECORD_SCHEMA, Source, make_records
from pipeline.quarantine import BadSample

TAR_IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jp2")
MAX_CLASSES = 1_000_000
_INDEX_THREADS = 16  # reading headers waits for the disk or the network
_BLOCK = 512


class TruncatedTarError(ValueError):
    """A tar file that does not end as tar files do."""


class BadLabelError(ValueError):
    """A label that is no class number."""


def webdataset_source(root: str, files: list[tuple[str, int]]) -> Source:
    """Samples of tar files; name: `<tar>/<key>`, key: member name up to the first dot.

    The image is the member with an image's extension (`key.jpg`), the label the integer in
    `key.cls` or the "label" of `key.json`; other members, such as `key.txt`, are not used.
    """
    if not files:
        raise ValueError(f"source='{root}' holds no .tar file; give one, or another --kind")
    filesystem, inner = storage.resolve(root)
    with ThreadPoolExecutor(_INDEX_THREADS) as pool:
        tars = list(pool.map(lambda f: _index_tar(filesystem, inner, root, *f), files))
    rows = [row for tar in tars for row in tar.rows]
    bad = [sample for tar in tars for sample in tar.bad]
    if not rows:
        problems = "".join(f"\n  {sample}" for sample in bad[:5])
        raise ValueError(
            f"source='{root}': {len(files)} tar files hold no image "
            f"({', '.join(TAR_IMAGE_EXTENSIONS)}){problems}"
        )
    records = make_records(rows)
    return Source(
        kind="webdataset",
        image_root=root,
        records=records,
        classes=numbered_classes(records["label"], root),
        bad=bad,
        notes=[f"{len(files)} tar files indexed"],
    )


@dataclass
class _Tar:
    rows: list[dict[str, Any]]
    bad: list[BadSample]


def _index_tar(filesystem: fs.FileSystem, inner: str, root: str, tar: str, size: int) -> _Tar:
    result = _Tar([], [])
    images: list[tuple[str, tarfile.TarInfo]] = []
    labels: dict[str, int] = {}
    wrong: dict[str, Exception] = {}
    try:
        for member, content in _members(filesystem, f"{inner}/{tar}", size):
            key, extension = _key(member.name)
            if extension in TAR_IMAGE_EXTENSIONS:
                images.append((key, member))
            elif content is not None:
                _read_label(key, extension, content, labels, wrong)
    except TruncatedTarError as error:
        result.bad.append(BadSample.of(f"{root}/{tar}", None, error))
    for key, member in images:
        if key in wrong:
            result.bad.append(BadSample.of(f"{root}/{tar}/{member.name}", None, wrong[key]))
            continue
        row = {"name": f"{tar}/{key}", "path": tar, "label": labels.get(key)}
        result.rows.append({**row, "offset": member.offset_data, "num_bytes": member.size})
    return result


def _members(
    filesystem: fs.FileSystem, path: str, size: int
) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Regular members that are whole, with the content of those that may hold a label.

    Raises:
        TruncatedTarError: after the last whole member, when the archive does not end there.
    """
    with storage.open_retrying(filesystem, path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.offset_data + member.size > size:
                        raise TruncatedTarError(
                            f"the file ends at byte {size}, inside its member '{member.name}'; "
                            "what comes before it is used"
                        )
                    if member.isreg() and not member.issparse():
                        yield member, _label_content(archive, member)
                end = archive.offset
        except tarfile.TarError as error:
            raise TruncatedTarError(f"{error}; what could be indexed is used") from None
        file.seek(min(end, size))
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise TruncatedTarError(
                f"no end of archive at byte {end} of {size}: truncated or damaged there; what "
                "comes before is used"
            )


def _label_content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    if _key(member.name)[1] not in ("cls", "json"):
        return None
    file = archive.extractfile(member)
    return file.read() if file else None


def _key(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key is the path up to the first dot of the last component."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return (path.parent / stem).as_posix(), extension.lower()


def _read_label(
    key: str, extension: str, content: bytes, labels: dict[str, int], wrong: dict[str, Exception]
) -> None:
    """`.cls` counts before `.json`; what is no class number makes the sample bad."""
    try:
        if extension == "cls":
            labels[key] = _class_number(int(content))
            return
        values = json.loads(content)
        label = values.get("label") if isinstance(values, dict) else None
        if isinstance(label, int) and not isinstance(label, bool) and key not in labels:
            labels[key] = _class_number(label)
    except ValueError as error:
        wrong[key] = BadLabelError(f"its .{extension} holds no class number: {error}")


def _class_number(label: int) -> int:
    if not 0 <= label < MAX_CLASSES:
        raise ValueError(f"{label} is not in 0 ... {MAX_CLASSES - 1}")
    return label


def numbered_classes(labels: pa.ChunkedArray, where: str) -> list[str]:
    """Names "0", "1", ... up to the highest label, where a source has numbers but no names.

    Raises:
        ValueError: a number too large to be a class.
    """
    highest = pc.max(labels).as_py()
    if highest is not None and highest >= MAX_CLASSES:
        raise ValueError(
            f"{where}: label {highest} is no class number (at most {MAX_CLASSES - 1}); number the "
            "classes from 0, or leave labels out with --label-column ''"
        )
    return [] if highest is None else [str(i) for i in range(highest + 1)]


def parquet_source(
    root: str, files: list[tuple[str, int]], image_column: str, label_column: str
) -> Source:
    """Rows of Parquet files; name: `<file>:<row of the file>`.

    Labels are integers; negative ones mean "none", as in Hugging Face test sets. Class names come
    from the Hugging Face metadata of the first file.

    Raises:
        ValueError: no rows, no such image column, labels that are no integers or have no name.
    """
    if not files:
        raise ValueError(f"source='{root}' holds no Parquet file; give one, or another --kind")
    tables = [_index_parquet(root, name, image_column, label_column) for name, _ in files]
    records = pa.concat_tables(tables)
    if not records.num_rows:
        raise ValueError(f"source='{root}': {len(files)} Parquet files hold no rows")
    names = _huggingface_names(root, files[0][0], label_column)
    numbers = numbered_classes(records["label"], root)
    if names and len(numbers) > len(names):
        raise ValueError(
            f"{root}: label {len(numbers) - 1} has no name, the metadata of {files[0][0]} names "
            f"{len(names)} classes; mend the metadata or the labels"
        )
    notes = [] if numbers else [f"no labels: no integers in a column '{label_column}'"]
    classes = names if names and numbers else numbers
    return Source(kind="parquet", image_root=root, records=records, classes=classes, notes=notes)


@contextlib.contextmanager
def _open_parquet(root: str, name: str) -> Iterator[pq.ParquetFile]:
    filesystem, inner = storage.resolve(root)
    with storage.open_retrying(filesystem, f"{inner}/{name}") as stream:
        try:
            file = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"{root}/{name} is no whole Parquet file ({error}); fetch it again or remove it"
            ) from error
        yield file


def _index_parquet(root: str, name: str, image_column: str, label_column: str) -> pa.Table:
    with _open_parquet(root, name) as file:
        columns = file.schema_arrow.names
        if image_column not in columns:
            raise ValueError(
                f"image_column='{image_column}' is not in {root}/{name}; its columns are "
                f"{', '.join(columns)}: pass --image-column"
            )
        metadata = file.metadata
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        sizes = np.array([group.num_rows for group in groups], dtype=np.int64)
        bytes_per_row = [_image_bytes(g, image_column) // max(1, g.num_rows) for g in groups]
        num_rows = int(sizes.sum())
        ends = np.cumsum(sizes)
        return pa.Table.from_arrays(
            [
                pa.array([f"{name}:{row}" for row in range(num_rows)], pa.string()),
                pa.repeat(pa.scalar(name), num_rows),
                pa.repeat(pa.scalar(-1, pa.int64()), num_rows),
                pa.array(np.repeat(np.array(bytes_per_row, dtype=np.int64), sizes)),
                pa.array(np.repeat(np.arange(len(groups)), sizes), pa.int32()),
                pa.array(np.arange(num_rows) - np.repeat(ends - sizes, sizes), pa.int32()),
                _labels(file, label_column, f"{root}/{name}"),
                pa.nulls(num_rows, pa.string()),
                pa.nulls(num_rows, pa.string()),
            ],
            schema=RECORD_SCHEMA,
        )


def _image_bytes(group: Any, image_column: str) -> int:
    columns = [group.column(i) for i in range(group.num_columns)]
    path = f"{image_column}."
    return sum(
        c.total_uncompressed_size for c in columns if f"{c.path_in_schema}.".startswith(path)
    )


def _labels(file: pq.ParquetFile, column: str, where: str) -> pa.Array:
    if not column or column not in file.schema_arrow.names:
        return pa.nulls(file.metadata.num_rows, pa.int32())
    kind = file.schema_arrow.field(column).type
    if not pa.types.is_integer(kind):
        raise ValueError(
            f"label_column='{column}' of {where} is {kind}, not an integer class number; name "
            "another column, or none with --label-column ''"
        )
    labels = file.read(columns=[column])[column]
    labels = pc.if_else(pc.less(labels, 0), None, labels)
    try:
        return pa.array(labels.to_pylist(), pa.int32())
    except (pa.ArrowInvalid, OverflowError) as error:
        raise ValueError(f"label_column='{column}' of {where}: {error}") from error


def _huggingface_names(root: str, name: str, column: str) -> list[str]:
    """Class names as `datasets` writes them into the schema; empty when there are none."""
    with _open_parquet(root, name) as file:
        metadata = file.schema_arrow.metadata or {}
    try:
        info = json.loads(metadata.get(b"huggingface", b"{}"))
        return [str(n) for n in info["info"]["features"][column]["names"]]
    except (ValueError, KeyError, TypeError):
        return []
