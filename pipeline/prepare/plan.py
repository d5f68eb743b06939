"""Planning a preparation: may OUT be used, what is in the source, which sample goes where.

Surprising: an output folder is never taken over. It is empty, or begun or finished with the same
settings, or refused with the difference.
"""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
from pyarrow import fs

from pipeline import storage
from pipeline.prepare.plan_folder import Plan, PlanFolder, PlannedShard
from pipeline.prepare.record_sources import open_source
from pipeline.prepare.records import (
    WINDOW_SHARDS,
    sample_ids,
    shard_numbers,
    shuffled_order,
    split_of,
)
from pipeline.prepare.settings import PrepareConfig, absolute, settings_diff
from pipeline.shards import Manifest

logger = logging.getLogger(__name__)
_MB = 1_000_000


def finished_before(config: PrepareConfig, folder: PlanFolder) -> dict[str, Manifest]:
    """Manifests of all splits when they are there with the same settings; else none.

    Raises:
        ValueError: the folder of a split holds something else.
    """
    found = {}
    for split in config.splits:
        path = f"{folder.out}/{split}"
        manifest = Manifest.read(folder.filesystem, path)
        if manifest is not None:
            differences = settings_diff(manifest.preparation.get("settings", {}), config.settings())
            if differences:
                raise ValueError(refusal(f"{config.out}/{split} was prepared", differences))
            found[split] = manifest
        elif files := storage.list_files(folder.filesystem, path):
            raise ValueError(
                f"{config.out}/{split} holds {len(files)} files ({files[0].base_name}) but no "
                "manifest: it is no finished data set of ours; empty it or give another --out"
            )
    missing = [split for split in config.splits if split not in found]
    if found and missing:
        raise ValueError(
            f"{config.out} has a finished {', '.join(found)} but no {', '.join(missing)}, which "
            "belong together; delete all of them or give another --out"
        )
    return found


def refusal(what: str, differences: list[str]) -> str:
    """Message for a folder that belongs to other settings."""
    listed = "\n  ".join(differences)
    return (
        f"{what} with other settings:\n  {listed}\nrepeat the old command, or delete the folder, "
        "or give another --out"
    )


def make_plan(config: PrepareConfig, folder: PlanFolder) -> Plan:
    """Index the source, say what was found, write the plan.

    Raises:
        ValueError: a source that cannot be used, or that does not go with what is in OUT.
        FileNotFoundError: a source that does not exist.
    """
    _check_out_is_apart(config)
    storage.write_bytes(folder.filesystem, f"{folder.path}/writable", b"")  # before a long listing
    source = open_source(config)
    _check_classes_agree(folder, config, source.kind, source.classes)
    shown = ", ".join(source.classes[:5]) + (", ..." if len(source.classes) > 5 else "")
    logger.info(
        "source is %s with %d images%s",
        source.kind,
        source.records.num_rows,
        f", {len(source.classes)} classes: {shown}" if source.classes else ", no classes",
    )
    for note in source.notes:
        logger.info("  %s", note)
    shards, records = _plan_shards(config, source.records, source.image_root)
    plan = Plan(
        settings=config.settings(),
        kind=source.kind,
        image_root=source.image_root,
        mask_root=source.mask_root,
        classes=source.classes,
        bad=source.bad,
        shards=shards,
    )
    folder.write_plan(plan, records)
    return plan


def _check_out_is_apart(config: PrepareConfig) -> None:
    out = absolute(config.out).rstrip("/") + "/"
    for key in ("source", "images", "masks"):
        path = absolute(getattr(config, key)).rstrip("/") + "/"
        if path != "/" and out.startswith(path):
            raise ValueError(
                f"out='{config.out}' lies in {key}='{getattr(config, key)}', where a later run "
                "would take its files for a source; give an --out elsewhere"
            )


def _check_classes_agree(
    folder: PlanFolder, config: PrepareConfig, kind: str, classes: list[str]
) -> None:
    """Splits prepared into one folder by several calls must number their classes alike."""
    if all(name.isdigit() for name in classes):
        return  # numbers are their own names
    for entry in storage.list_folder(folder.filesystem, folder.out):
        manifest = None
        if entry.type == fs.FileType.Directory and entry.base_name not in config.splits:
            manifest = Manifest.read(folder.filesystem, entry.path)
        if manifest is not None and manifest.classes and manifest.classes != classes:
            differing = sorted(set(classes) ^ set(manifest.classes))[:10]
            raise ValueError(
                f"the {len(classes)} classes of this {kind} source are not the "
                f"{len(manifest.classes)} of {config.out}/{entry.base_name} (only in one: "
                f"{', '.join(differing) or 'none, another order'}), so labels would mean different "
                "things; make them alike (an empty class folder counts), or give another --out"
            )


def _plan_shards(
    config: PrepareConfig, records: pa.Table, image_root: str
) -> tuple[list[PlannedShard], list[pa.Table]]:
    """Split, shuffle and cut the records into shards."""
    ids = sample_ids(records, image_root)
    is_val = split_of(ids, config.seed, config.val_fraction)
    shards: list[PlannedShard] = []
    tables: list[pa.Table] = []
    shard_bytes = config.shard_mb * _MB
    for split, chosen in zip(config.splits, (~is_val, is_val), strict=False):
        rows = np.flatnonzero(chosen)
        if not len(rows):
            raise ValueError(
                f"val_fraction={config.val_fraction} leaves no sample for '{split}' of {len(ids)}; "
                "change it or the seed"
            )
        part = records.take(pa.array(rows))
        order = shuffled_order(part, ids[rows], config.seed, WINDOW_SHARDS * shard_bytes)
        part = part.take(pa.array(order))
        numbers = shard_numbers(part["num_bytes"].to_numpy(), shard_bytes)
        for number in range(int(numbers[-1]) + 1):
            first, last = np.searchsorted(numbers, [number, number + 1]).tolist()
            file = f"shard-{number:05d}.parquet"
            shards.append(PlannedShard(split=split, file=file, num_records=last - first))
            tables.append(part.slice(first, last - first))
    return shards, tables
