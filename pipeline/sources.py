"""Where encoded images come from: a prepared data set, any Parquet files, or a folder of images.

The index is built once, on one process; it has a row for each image file, or only one for each
Parquet row group, so it stays small however many images the Parquet files hold. Surprising: a
sample's id is a hash of its name in the data set, not its row, so adding files leaves the other
samples' crops and masks alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from pyarrow import fs

from pipeline import storage
from pipeline.prepare.plan_folder import WORK_FOLDER
from pipeline.quarantine import BadSample
from pipeline.shards import MANIFEST_FILE, SHARD_SCHEMA, Manifest

logger = logging.getLogger(__name__)
PARQUET_SUFFIXES = (".parquet", ".pq")
MAX_GROUP_BYTES = 2**30
_NUM_TELLING = 5  # columns of a shard before the first nested one, which Parquet spells otherwise


@dataclass(frozen=True)
class Index:
    """What a data set holds, without its images."""

    root: str
    """Folder as `storage.resolve` takes it; absolute when local."""
    groups: pa.Table
    """file (string, relative to root); for Parquet also row_group, num_rows (int32) and first_row
    (int64, of the group in its file). Sorted by file, then row group."""
    is_parquet: bool
    is_prepared: bool = False
    """Parquet with a manifest, where sample ids are a column."""
    bad_files: tuple[BadSample, ...] = ()
    """Files that were left out because they cannot be read."""
    classes: tuple[str, ...] = ()
    """Names of the labels of a prepared data set."""
    annotations: tuple[str, ...] = ()
    """Those of label, boxes, box_masks, mask that samples of a prepared data set have."""

    @cached_property
    def sizes(self) -> NDArray[np.int64] | int:
        """Rows of each group, or the number of files when each file is one sample."""
        if not self.is_parquet:
            return int(self.groups.num_rows)
        return self.groups["num_rows"].to_numpy().astype(np.int64)

    @property
    def num_samples(self) -> int:
        """Images in the data set."""
        return self.sizes if isinstance(self.sizes, int) else int(self.sizes.sum())


def build_index(path: str, setting: str = "data.path", max_bad_fraction: float = 0.01) -> Index:
    """Index a data set.

    Args:
        path: prepared folder, folder of images or of Parquet files (recursive), or one such file;
            local, or a URI pyarrow opens (s3://, gs://, ...).
        setting: the setting the path came from, for error messages.
        max_bad_fraction: largest share of the data that damaged Parquet files may hold.

    Raises:
        ValueError: nothing there that could be an image, a set that was never finished, or too
            much of it damaged.
        FileNotFoundError: the path does not exist.
    """
    filesystem, root = storage.resolve(path)
    try:
        kind = storage.info_of(filesystem, root).type
    except storage.StorageRefusedError as error:
        raise storage.StorageRefusedError(f"{setting}='{path}': {error}") from error
    if kind == fs.FileType.NotFound:
        raise FileNotFoundError(
            f"{setting}='{path}' does not exist; give a folder of images or Parquet files"
        )
    files = storage.list_files(filesystem, root)
    where = root if storage.is_local(filesystem) else path.rstrip("/")
    if kind == fs.FileType.File:
        root, where = root.rsplit("/", 1)[0], where.rsplit("/", 1)[0]
    manifest = Manifest.read(filesystem, root) if kind == fs.FileType.Directory else None
    if manifest is not None:
        return _index_prepared(where, manifest, files, setting, max_bad_fraction)
    unfinished = _unfinished(setting, path, files) if kind == fs.FileType.Directory else ""
    if unfinished and any(WORK_FOLDER in _name(root, f.path).split("/") for f in files):
        raise ValueError(unfinished)
    parquet = [f for f in files if f.path.lower().endswith(PARQUET_SUFFIXES)]
    if parquet:
        limits = (setting, max_bad_fraction, unfinished)
        return _index_parquet(where, filesystem, root, parquet, *limits)
    readable = readable_suffixes()
    images = [f for f in files if _suffix(f.path) in readable]
    if not images:
        raise ValueError(
            f"{setting}='{path}' holds no image among {len(files)} files; give a folder with files "
            "Pillow can read (.jpg, .png, .webp, .tif, ...) or with .parquet files"
        )
    names = pa.array([_name(root, f.path) for f in images], pa.string())
    return Index(where, pa.table({"file": names}), is_parquet=False)


def _unfinished(setting: str, path: str, files: Sequence[fs.FileInfo]) -> str:
    """Why shards without a manifest, or a folder of several data sets, are not taken for one."""
    manifests = [f.path for f in files if f.path.endswith(f"/{MANIFEST_FILE}")]
    whole = [manifest.rsplit("/", 1)[0] for manifest in manifests]
    way_out = f"give one of the finished sets in it ({', '.join(whole)}), or " if whole else ""
    return (
        f"{setting}='{path}' holds shards of a prepared data set without its {MANIFEST_FILE}, so "
        f"they may be not all of it; {way_out}repeat jobs/prepare_data.py, which goes on where it "
        "stopped"
    )


def readable_suffixes() -> set[str]:
    """Suffixes of the formats Pillow can open; some of its formats it can only write."""
    Image.init()
    readable = {suffix for suffix, name in Image.EXTENSION.items() if name in Image.OPEN}
    return readable | {".mpo"}  # opened by the JPEG plugin


def _suffix(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    return "." + name.rsplit(".", 1)[-1].lower() if "." in name.lstrip(".") else ""


def _name(root: str, path: str) -> str:
    return path.removeprefix(root).lstrip("/")


def _index_prepared(
    where: str, manifest: Manifest, files: list[fs.FileInfo], setting: str, max_bad_fraction: float
) -> Index:
    """Index from the manifest alone; no Parquet file is opened."""
    sizes = {f.path.rsplit("/", 1)[-1]: f.size for f in files}
    damaged = [s for s in manifest.shards if sizes.get(s.file) != s.num_bytes]
    lost = sum(shard.num_samples for shard in damaged)
    for shard in damaged:
        problem = (
            f"{where}/{shard.file} has {sizes.get(shard.file, 0)} bytes, its manifest says "
            f"{shard.num_bytes}"
        )
        if lost > max_bad_fraction * manifest.num_samples:
            raise ValueError(
                f"{setting}='{where}': {problem}; {lost} of {manifest.num_samples} samples lie in "
                f"damaged shards, more than data.max_bad_fraction={max_bad_fraction} allows; "
                "prepare the data again, or raise the limit"
            )
        logger.warning("%s: samples of it that cannot be read are quarantined", problem)
    if not manifest.num_samples:
        raise ValueError(f"{setting}='{where}' is a prepared data set without samples")
    table = _group_table([(shard.file, shard.row_groups) for shard in manifest.shards])
    return Index(
        where,
        table,
        is_parquet=True,
        is_prepared=True,
        classes=tuple(manifest.classes),
        annotations=tuple(manifest.annotations),
    )


def _index_parquet(
    where: str,
    filesystem: fs.FileSystem,
    root: str,
    files: Sequence[fs.FileInfo],
    setting: str,
    max_bad_fraction: float,
    unfinished: str,
) -> Index:
    """Index from the footers of all files; `unfinished` refuses shards of a prepared data set."""
    readable: list[tuple[str, list[int]]] = []
    bad: list[BadSample] = []
    for file in files:
        try:
            with storage.open_retrying(filesystem, file.path) as stream:
                metadata = pq.read_metadata(stream)
        except storage.StorageUnavailableError:
            raise
        except (OSError, pa.ArrowInvalid) as error:
            bad.append(BadSample.of(str(file.path), None, error))
            continue
        if unfinished and metadata.schema.names[:_NUM_TELLING] == SHARD_SCHEMA.names[:_NUM_TELLING]:
            raise ValueError(unfinished)
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        _check_group_bytes(file.path, [group.total_byte_size for group in groups])
        readable.append((_name(root, file.path), [group.num_rows for group in groups]))
    bad_paths = {sample.path for sample in bad}
    bad_bytes = sum(f.size for f in files if f.path in bad_paths)
    if bad and bad_bytes > max_bad_fraction * sum(f.size for f in files):
        raise ValueError(
            f"{setting}='{where}': {len(bad)} of {len(files)} Parquet files cannot be read, first "
            f"{bad[0]}; that is more than data.max_bad_fraction={max_bad_fraction} of the bytes; "
            "mend or remove them, or raise the limit"
        )
    for sample in bad:
        logger.warning("left out: %s", sample)
    if not any(sum(sizes) for _, sizes in readable):
        raise ValueError(f"{setting}='{where}': {len(files)} Parquet files hold no rows")
    return Index(where, _group_table(readable), is_parquet=True, bad_files=tuple(bad))


def _check_group_bytes(path: str, sizes: list[int]) -> None:
    if max(sizes, default=0) > MAX_GROUP_BYTES:
        raise ValueError(
            f"{path} has a row group of {max(sizes) / 2**30:.1f} GiB, which would be read for each "
            f"sample; more than {MAX_GROUP_BYTES / 2**30:g} GiB is refused. Rewrite it with "
            "jobs/prepare_data.py"
        )


def _group_table(files: Sequence[tuple[str, list[int]]]) -> pa.Table:
    """Groups table from (file, rows of each row group); groups without rows are left out."""
    rows = [
        (name, group, size, sum(sizes[:group]))
        for name, sizes in files
        for group, size in enumerate(sizes)
        if size
    ]
    names, groups, sizes, firsts = zip(*rows, strict=True)
    return pa.table(
        {
            "file": pa.array(names, pa.string()).dictionary_encode(),
            "row_group": pa.array(groups, pa.int32()),
            "num_rows": pa.array(sizes, pa.int32()),
            "first_row": pa.array(firsts, pa.int64()),
        }
    )
