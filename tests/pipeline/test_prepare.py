"""The driver of a preparation: ids, splits, order, refusing, setting aside."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import storage
from pipeline.prepare.job import PreparationFailedError, prepare
from pipeline.prepare.records import (
    make_records,
    sample_ids,
    shard_numbers,
    shuffled_order,
    split_of,
)
from pipeline.prepare.report import prepare_report
from pipeline.prepare.settings import PrepareConfig
from pipeline.quarantine import TooManyBadSamplesError, read_quarantine
from pipeline.reproducibility import stable_id
from pipeline.shards import SHARD_SCHEMA
from pipeline.sources import build_index
from tests.pipeline.preparing import contents, no_ray, prepare_rows, read_manifest, read_rows
from tests.pipeline.samples import write_images

pytestmark = pytest.mark.usefixtures(no_ray.__name__)
NAMES = [f"{folder}/{i:02d}.png" for folder in ("a", "b", "c") for i in range(16)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_images(tmp_path / "source", NAMES)
    return tmp_path / "source"


def config_of(source: Path, **settings: Any) -> PrepareConfig:
    values = {"out": str(source.parent / "out"), "shard_mb": 0.04} | settings
    return PrepareConfig(source=str(source), **values)


def test_every_image_is_in_the_shards_once_with_the_bytes_of_its_file(source: Path, tmp_path: Path):
    rows = prepare_rows(source, tmp_path / "out", shard_mb=0.04)
    assert sorted(row["name"] for row in rows) == NAMES
    for row in rows:
        assert row["image"] == (source / row["name"]).read_bytes()
        assert (row["width"], row["height"]) == (40, 32)


def test_the_manifest_agrees_with_the_files(source: Path, tmp_path: Path):
    rows = prepare_rows(source, tmp_path / "out", shard_mb=0.04)
    manifest = read_manifest(tmp_path / "out/train")
    assert manifest.num_samples == len(rows) == 48
    assert len(manifest.shards) > 3
    for shard in manifest.shards:
        content = (tmp_path / "out/train" / shard.file).read_bytes()
        assert shard.sha256 == hashlib.sha256(content).hexdigest()
        assert shard.num_bytes == len(content)
        table = driver_table(tmp_path / "out/train" / shard.file)
        assert table.schema.equals(SHARD_SCHEMA)
        assert shard.num_samples == table.num_rows == sum(shard.row_groups)
    assert manifest.num_bytes == sum(shard.num_bytes for shard in manifest.shards)
    assert manifest.classes == ["a", "b", "c"]
    assert manifest.annotations == ["label"]


def driver_table(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(path)


def test_row_groups_in_the_manifest_are_those_of_the_file(tmp_path: Path):
    import pyarrow.parquet as pq

    write_images(tmp_path / "source", [f"{i:03d}.png" for i in range(130)])
    prepare_rows(tmp_path / "source", tmp_path / "out")
    (shard,) = read_manifest(tmp_path / "out/train").shards
    metadata = pq.read_metadata(tmp_path / "out/train" / shard.file)
    found = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    assert found == shard.row_groups == [64, 64, 2]


def test_ids_are_those_raw_training_gives_and_stay_when_files_are_added(
    source: Path, tmp_path: Path
):
    before = {row["name"]: row["sample_id"] for row in prepare_rows(source, tmp_path / "one")}
    index = build_index(str(source))
    assert before == {name: stable_id(name) for name in index.groups["file"].to_pylist()}
    write_images(source, [*NAMES, "a/zz.png", "0/0.png"])
    after = prepare_rows(source, tmp_path / "two", seed=5, shard_mb=0.1)
    assert before.items() <= {row["name"]: row["sample_id"] for row in after}.items()


def test_adding_files_moves_no_sample_to_another_split(source: Path, tmp_path: Path):
    prepare(config_of(source, out=str(tmp_path / "one"), val_fraction=0.3))
    write_images(source, [*NAMES, *(f"a/new{i}.png" for i in range(20))])
    prepare(config_of(source, out=str(tmp_path / "two"), val_fraction=0.3))
    names = {
        (run, split): {row["name"] for row in read_rows(tmp_path / run / split)}
        for run in ("one", "two")
        for split in ("train", "val")
    }
    assert names["one", "train"] | names["one", "val"] == set(NAMES)
    assert names["one", "train"] == names["two", "train"] & set(NAMES)
    assert names["one", "val"] == names["two", "val"] & set(NAMES)
    assert names["two", "train"].isdisjoint(names["two", "val"])


def test_val_gets_its_share_and_a_larger_share_keeps_what_it_had():
    ids = np.array([stable_id(str(i)) for i in range(20_000)], dtype=np.uint64)
    small, large = split_of(ids, 0, 0.05), split_of(ids, 0, 0.1)
    assert abs(small.mean() - 0.05) < 0.006  # four standard deviations
    assert (large | ~small).all()
    assert (split_of(ids, 1, 0.05) != small).any()
    assert not split_of(ids, 0, 0.0).any()


def test_rows_are_shuffled_so_that_classes_mix(source: Path, tmp_path: Path):
    labels = [row["label"] for row in prepare_rows(source, tmp_path / "out")]
    assert sum(a != b for a, b in itertools.pairwise(labels)) > 15  # sorted: 2
    other = [row["name"] for row in prepare_rows(source, tmp_path / "other", seed=1)]
    assert other != [row["name"] for row in read_rows(tmp_path / "out/train")]


def test_shards_are_of_about_the_size_asked_for():
    num_bytes = np.random.default_rng(0).integers(50, 150, 1000)
    numbers = shard_numbers(num_bytes, 20_000)
    sizes = np.bincount(numbers, weights=num_bytes)
    assert len(sizes) == np.ceil(num_bytes.sum() / 20_000)
    assert (np.diff(numbers) >= 0).all()
    assert sizes.max() <= 20_000 + 150
    assert shard_numbers(np.array([5, 5, 900, 5]), 100).max() + 1 <= 3  # no empty shards
    assert shard_numbers(np.zeros(7, dtype=np.int64), 100).tolist() == [0] * 7


def test_two_samples_with_one_name_are_refused_with_both_places():
    rows = [
        {"name": "x.tar/k", "path": "x.tar", "offset": 512},
        {"name": "other", "path": "other"},
        {"name": "x.tar/k", "path": "x.tar", "offset": 2048},
    ]
    with pytest.raises(ValueError, match=r"root/x\.tar/k .* and root/x\.tar/k .*must differ"):
        sample_ids(make_records(rows), "root")


def test_parquet_rows_are_shuffled_without_reading_row_groups_again_and_again():
    rows = [
        {"name": f"{group}:{row}", "path": "f", "row_group": group, "row": row, "num_bytes": 10}
        for group in range(100)
        for row in range(50)
    ]
    records = make_records(rows)
    ids = sample_ids(records, "")
    window = 4 * 5000
    order = shuffled_order(records, ids, 0, window)
    assert sorted(order.tolist()) == list(range(5000))
    group_of = records["row_group"].to_numpy()[order]
    shards = shard_numbers(records.take(order)["num_bytes"].to_numpy(), 5000)
    reads = Counter(group for group, _ in set(zip(group_of.tolist(), shards.tolist(), strict=True)))
    assert max(reads.values()) <= 5
    assert len(set(group_of[:500].tolist())) > 20  # the rows of a shard come from many row groups


def test_a_finished_set_is_left_alone_and_other_settings_are_refused(source: Path):
    config = config_of(source)
    first = prepare(config)
    written = contents(Path(config.out))
    again = prepare(config)
    assert again.was_finished and not first.was_finished
    assert contents(Path(config.out)) == written
    assert "already prepared" in prepare_report(config, again)
    with pytest.raises(ValueError, match=r"(?s)prepared with other settings.*seed: 0 -> 3"):
        prepare(config_of(source, seed=3))
    prepare(config_of(source, num_cpus=7, max_bad_fraction=0.5))  # they change no result


def test_a_set_written_without_ray_is_the_same_to_the_byte(
    source: Path, monkeypatch: pytest.MonkeyPatch
):
    configs = [config_of(source, out=str(source.parent / out)) for out in ("in-tasks", "here")]
    prepare(configs[0])
    monkeypatch.setattr("pipeline.prepare.job.joined_cluster", None)  # whoever calls it fails
    manifests = prepare(configs[1], with_ray=False).manifests
    assert len(manifests["train"].shards) > 1, "several shards, or the loop is not tried"
    assert contents(Path(configs[1].out)) == contents(Path(configs[0].out))


def test_bad_images_are_set_aside_with_their_reason(source: Path):
    (source / "a/00.png").write_bytes(b"")
    (source / "a/01.png").write_bytes((source / "a/01.png").read_bytes()[:300])
    config = config_of(source, max_bad_fraction=0.1)
    report = prepare_report(config, prepare(config))
    bad = read_quarantine(str(Path(config.out) / "train/_quarantine.parquet"))
    assert [sample.path for sample in bad] == [f"{source}/a/00.png", f"{source}/a/01.png"]
    assert [sample.sample_id for sample in bad] == [stable_id("a/00.png"), stable_id("a/01.png")]
    assert "empty" in bad[0].message
    manifest = read_manifest(Path(config.out) / "train")
    assert manifest.num_samples == 46 and manifest.preparation["num_bad"] == 2
    assert "2 bad samples" in report and "--data.path" in report


def test_too_many_bad_images_stop_the_job_until_they_are_mended(source: Path):
    good = (source / "a/00.png").read_bytes()
    for name in NAMES[:6]:
        (source / name).write_bytes(b"no image")
    config = config_of(source, max_bad_fraction=0.05)
    with pytest.raises(TooManyBadSamplesError, match=r"(?s)max_bad_fraction=0.05.*a/0\d\.png"):
        prepare(config)
    assert not list(Path(config.out).glob("*/_manifest.json"))
    for name in NAMES[:6]:
        (source / name).write_bytes(good)
    prepare(config)
    assert read_manifest(Path(config.out) / "train").num_samples == 48


def test_a_file_that_vanishes_or_is_forbidden_is_bad_but_a_network_error_stops_the_job(
    source: Path, monkeypatch: pytest.MonkeyPatch
):
    read = storage.read_bytes
    errors: dict[str, OSError] = {
        "a/00.png": FileNotFoundError("gone"),
        "a/01.png": PermissionError("not yours"),
    }

    def read_bytes(filesystem: Any, path: str) -> bytes:
        for name, error in errors.items():
            if path.endswith(name):
                raise error
        return read(filesystem, path)

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    config = config_of(source, max_bad_fraction=0.1)
    prepare(config)
    bad = read_quarantine(str(Path(config.out) / "train/_quarantine.parquet"))
    assert [sample.error for sample in bad] == ["FileNotFoundError", "PermissionError"]

    errors["b/00.png"] = storage.StorageUnavailableError("reading b/00.png failed 6 times")
    other = config_of(source, out=str(source.parent / "other"), max_bad_fraction=0.1)
    with pytest.raises(PreparationFailedError, match=r"b/00\.png failed 6 times"):
        prepare(other)


def test_a_quarantine_is_the_same_in_every_run(source: Path):
    (source / "a/00.png").write_bytes(b"no image")
    runs = []
    for name in ("one", "two"):
        prepare(config_of(source, out=str(source.parent / name), max_bad_fraction=0.1))
        runs.append(contents(source.parent / name))
    assert runs[0] == runs[1]


def test_out_inside_the_source_and_foreign_files_in_out_are_refused(source: Path):
    with pytest.raises(ValueError, match="lies in source"):
        prepare(config_of(source, out=str(source / "prepared")))
    out = source.parent / "out"
    write_images(out / "train", ["holiday.jpg"])
    with pytest.raises(ValueError, match=r"1 files \(holiday\.jpg\) but no manifest"):
        prepare(config_of(source))


def test_an_out_that_cannot_be_written_is_a_clear_error(source: Path):
    (source.parent / "file").write_text("")
    with pytest.raises(PreparationFailedError, match="file"):
        prepare(config_of(source, out=str(source.parent / "file/out")))


def test_a_split_without_samples_is_refused(source: Path):
    with pytest.raises(ValueError, match="leaves no sample for 'val'"):
        prepare(config_of(source, val_fraction=1e-9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out": ""}, "out is empty"),
        ({"source": ""}, "source is empty"),
        ({"split_name": "../x"}, "split_name="),
        ({"split_name": "_preparing"}, "split_name="),
        ({"val_fraction": 1.0}, "val_fraction="),
        ({"val_fraction": 0.1, "split_name": "val"}, "drop one"),
        ({"shard_mb": 0}, "shard_mb="),
        ({"short_side": 3}, "short_side="),
        ({"seed": -1}, "seed="),
        ({"num_cpus": 0}, "num_cpus="),
        ({"max_bad_fraction": 2}, "max_bad_fraction="),
        ({"kind": "imagenet"}, "kind='imagenet' must be"),
        ({"masks": "m"}, "without images"),
        ({"masks": "m", "images": "i", "kind": "coco"}, "is for kind=pairs"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**({"source": "s", "out": "o"} | settings))
