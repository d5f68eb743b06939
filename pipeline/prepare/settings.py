"""Settings of `jobs/prepare_data.py`.

Surprising: not every setting decides what is written. `settings()` are those that do; a folder
begun with one set of them is never continued with another.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.credentials import require_no_password
from pipeline.placement import require_labels

Kind = Literal["folder", "class-folders", "coco", "pairs", "webdataset", "parquet"]
_RUNTIME = ("out", "num_cpus", "max_bad_fraction", "worker_resource", "worker_labels")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What to prepare, where to, and how."""

    out: str
    """Folder to write, one sub-folder a split; a path or URI every node can write to."""
    source: str = ""
    """Folder, .json (COCO), .tar or .parquet file; a local path, s3://, gs:// or file:// URI."""
    kind: Literal["auto"] | Kind = "auto"
    """What the source is; auto looks at the names of the files and says what it took it for."""
    images: str = ""
    """Folder of the images, where source does not say (COCO; pairs with masks)."""
    masks: str = ""
    """Folder of the masks, NAME.png for each image NAME.jpg (pairs)."""
    image_column: str = "image"
    """Parquet column with the encoded bytes (plain, or a Hugging Face {bytes, path} struct)."""
    label_column: str = "label"
    """Parquet column with integer labels, used where it exists; empty: none."""
    split_name: str = "train"
    """Name of the split, and of its folder under out."""
    val_fraction: float = 0.0
    """Share of the samples that goes to a second split `val`, by a hash of seed and sample id."""
    seed: int = 0
    """Seed of the order and of the split."""
    shard_mb: float = 128.0
    """Encoded images in a shard, in MB (1e6 bytes)."""
    short_side: int = 0
    """Shrink images whose shorter side has more pixels (JPEG, quality 95); 0: keep the bytes."""
    verify: bool = True
    """Decode every image; without it only the header is read."""
    max_bad_fraction: float = 0.01
    """Share of bad samples above which the job stops."""
    num_cpus: int = 2
    """Shards written at the same time, one CPU each."""
    worker_resource: str = ""
    """Custom Ray resource of the nodes to work on; each takes a thousandth of one."""
    worker_labels: tuple[str, ...] = ()
    """Labels of the nodes to work on: KEY=VALUE, or KEY=!VALUE for all others."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("out is empty; give the folder to write: --out DIR")
        if not self.source and not (self.images and self.masks):
            raise ValueError(
                "source is empty; give --source DIR_OR_FILE (or --images DIR --masks DIR)"
            )
        if not self.split_name or "/" in self.split_name or self.split_name[0] in "._":
            raise ValueError(
                f"split_name='{self.split_name}' must be a plain folder name that starts with "
                "neither '.' nor '_'; use e.g. 'train'"
            )
        for key in ("out", "source", "images", "masks"):
            require_no_password(key, getattr(self, key))
        self._check_numbers()
        self._check_kind()

    def _check_numbers(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must satisfy 0 <= f < 1")
        if self.val_fraction and self.split_name == "val":
            raise ValueError(
                f"val_fraction={self.val_fraction} splits off 'val', but split_name is 'val' too; "
                "drop one of them"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction} must satisfy 0 <= f <= 1")
        if not 0 < self.shard_mb <= 1024:
            raise ValueError(f"shard_mb={self.shard_mb} must satisfy 0 < shard_mb <= 1024")
        if self.short_side < 0 or 0 < self.short_side < 16:
            raise ValueError(f"short_side={self.short_side} must be 0 (keep) or at least 16 pixels")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")
        if self.num_cpus < 1:
            raise ValueError(f"num_cpus={self.num_cpus} must be at least 1")
        require_labels("worker_labels", self.worker_labels)

    def _check_kind(self) -> None:
        if self.kind not in ("auto", *get_args(Kind)):
            raise ValueError(
                f"kind='{self.kind}' must be auto or one of {', '.join(get_args(Kind))}"
            )
        if self.masks and self.kind not in ("auto", "pairs"):
            raise ValueError(f"masks='{self.masks}' is for kind=pairs, not kind={self.kind}")
        if self.masks and not self.images:
            raise ValueError(f"masks='{self.masks}' without images; give --images DIR as well")

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits the job writes."""
        return (self.split_name, "val") if self.val_fraction else (self.split_name,)

    def settings(self) -> dict[str, Any]:
        """What decides the result, as manifests and the plan hold it; local paths absolute."""
        values = dataclasses.asdict(self)
        for key in ("source", "images", "masks"):
            values[key] = absolute(values[key])
        return {key: value for key, value in values.items() if key not in _RUNTIME}


def absolute(path: str) -> str:
    """A local path made absolute; a URI or an empty string as it is."""
    return path if not path or "://" in path else str(Path(path).absolute())


def settings_diff(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Readable differences of two `PrepareConfig.settings()`."""
    keys = sorted(set(old) | set(new))
    pairs = [(key, old.get(key, "<absent>"), new.get(key, "<absent>")) for key in keys]
    return [f"{key}: {a!r} -> {b!r}" for key, a, b in pairs if a != b]
