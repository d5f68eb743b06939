"""The index of a folder, of Parquet files and of a prepared data set; what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import sources
from pipeline.prepare.job import prepare
from pipeline.prepare.settings import PrepareConfig
from pipeline.prepare.shard_writer import write_planned_shard
from pipeline.quarantine import BadSample
from pipeline.reading import SampleReader
from pipeline.reproducibility import stable_id
from pipeline.shards import MANIFEST_FILE
from pipeline.sources import Index, build_index
from tests.pipeline.samples import encode, noise_image, write_images, write_parquet, write_prepared

NAMES = ["b.png", "a.jpg", "sub/deep/c.webp", "sub/d.JPG", "Z.tif"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images among other files."""
    folder = tmp_path / "images"
    write_images(folder, NAMES)
    for name in ("notes.txt", "sub/labels.json", ".DS_Store", "no_suffix"):
        (folder / name).write_text("not an image")
    return folder


def files(path: Path) -> list[str]:
    return build_index(str(path)).groups["file"].to_pylist()


def sample_ids(path: Path | str) -> list[int]:
    """Ids in index order, as the reader gives them."""
    reader = SampleReader(build_index(str(path)), "image")
    return [reader.read(row).sample_id for row in range(len(reader))]


def sizes(index: Index) -> list[int] | int:
    return index.sizes if isinstance(index.sizes, int) else index.sizes.tolist()


def encoded_rows(num_rows: int, first: int = 0) -> list[bytes | None]:
    return [f"bytes of row {first + i}".encode() * (i + 1) for i in range(num_rows)]


# ---- folders of images ----


def test_folder_index_is_recursive_sorted_and_ignores_other_files(folder: Path) -> None:
    assert files(folder) == ["Z.tif", "a.jpg", "b.png", "sub/d.JPG", "sub/deep/c.webp"]
    index = build_index(str(folder))
    assert index.sizes == index.num_samples == 5
    assert not index.is_parquet and not index.is_prepared and not index.bad_files


def test_file_types_pillow_can_write_but_not_read_are_no_images(folder: Path) -> None:
    (folder / "paper.pdf").write_bytes(b"%PDF-1.4")
    assert "paper.pdf" not in files(folder)


def test_ids_hash_the_place_in_the_folder_and_ignore_other_files(folder: Path) -> None:
    before = dict(zip(files(folder), sample_ids(folder), strict=True))
    assert before == {name: stable_id(name) for name in NAMES}
    write_images(folder, ["0.png", "sub/a.png"])
    after = dict(zip(files(folder), sample_ids(folder), strict=True))
    assert len(after) == 7
    assert {name: after[name] for name in before} == before
    moved = folder.rename(folder.with_name("moved"))
    assert sample_ids(moved) == list(after.values())


def test_relative_path_and_uri_are_indexed_as_the_absolute_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    for path in ("images", "images/", folder.as_uri(), f"{folder.as_uri()}/"):
        assert build_index(path) == build_index(str(folder)), path


@pytest.mark.parametrize("as_uri", [False, True])
def test_single_image_file_is_a_data_set_of_one(folder: Path, as_uri: bool) -> None:
    path = folder / "b.png"
    assert sample_ids(path.as_uri() if as_uri else path) == [stable_id("b.png")]


def test_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"data.path='.*gone' does not exist; give a folder"
    ):
        build_index(str(tmp_path / "gone"))


def test_unknown_kind_of_uri_is_refused_with_those_that_work() -> None:
    with pytest.raises(ValueError, match=r"'ftp2://x/y' is no location .* use a local path, s3://"):
        build_index("ftp2://x/y")


@pytest.mark.parametrize("names", [(), ("a.txt", "b.json", "c/d.csv")])
def test_folder_without_images_is_refused_with_the_number_of_files(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    with pytest.raises(ValueError, match=f"holds no image among {len(names)} files; give a folder"):
        build_index(str(tmp_path))


# ---- Parquet of others ----


@pytest.mark.parametrize("as_uri", [False, True])
def test_parquet_file_is_indexed_by_its_row_groups(tmp_path: Path, as_uri: bool) -> None:
    path = tmp_path / "data.parquet"
    write_parquet(path, encoded_rows(8))
    index = build_index(path.as_uri() if as_uri else str(path))
    assert sizes(index) == [3, 3, 2]
    assert sample_ids(path) == [stable_id(f"data.parquet:{row}") for row in range(8)]


def test_parquet_folder_is_indexed_by_file_and_row_group(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", encoded_rows(4), as_struct=True)
    write_parquet(tmp_path / "a.pq", encoded_rows(5, first=100))
    write_parquet(tmp_path / "empty.parquet", [])
    write_parquet(tmp_path / "more" / "a.PARQUET", encoded_rows(2, first=200), row_group_size=1)
    write_images(tmp_path, ["preview.png"])  # beside Parquet, images are no samples
    index = build_index(str(tmp_path))
    assert index.groups.to_pydict() == {
        "file": ["a.pq", "a.pq", "b.parquet", "b.parquet", "more/a.PARQUET", "more/a.PARQUET"],
        "row_group": [0, 1, 0, 1, 0, 1],
        "num_rows": [3, 2, 3, 1, 1, 1],
        "first_row": [0, 3, 0, 3, 0, 1],
    }
    assert (index.num_samples, index.is_parquet, index.is_prepared) == (11, True, False)


def test_parquet_ids_survive_new_files_and_other_row_groups(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", encoded_rows(7), row_group_size=2)
    before = sample_ids(tmp_path)
    write_parquet(tmp_path / "b.parquet", encoded_rows(7), row_group_size=5)
    write_parquet(tmp_path / "a.parquet", encoded_rows(3))
    assert sample_ids(tmp_path)[3:] == before


def test_parquet_without_rows_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data.parquet", [])
    with pytest.raises(ValueError, match="1 Parquet files hold no rows"):
        build_index(str(tmp_path))


def test_row_group_too_large_to_read_for_one_sample_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "data.parquet", [bytes([i]) * 5000 for i in range(3)])
    monkeypatch.setattr(sources, "MAX_GROUP_BYTES", 14_000)
    with pytest.raises(ValueError, match=r"data.parquet has a row group of .* is refused. Rewrite"):
        build_index(str(tmp_path))


def test_truncated_parquet_is_left_out_with_its_reason_when_little_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_parquet(tmp_path / "good.parquet", [bytes(20_000)] * 50)
    for name, content in (("cut.parquet", b"PAR1 no footer"), ("zero.parquet", b"")):
        (tmp_path / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        index = build_index(str(tmp_path))
    assert index.num_samples == 50
    cut, zero = index.bad_files
    assert (cut.path, cut.sample_id) == (str(tmp_path / "cut.parquet"), None)
    assert (cut.error, zero.error) == ("ArrowInvalid", "ArrowInvalid")
    assert "Parquet" in cut.message
    assert [f"left out: {bad}" for bad in (cut, zero)] == caplog.messages


def test_many_damaged_parquet_files_are_refused_with_the_first_and_the_limit(
    tmp_path: Path,
) -> None:
    for name in ("a.parquet", "b.parquet", "c.parquet"):
        write_parquet(tmp_path / name, encoded_rows(9))
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    message = (
        r"data.val_path=.*: 1 of 3 Parquet files cannot be read, first .*b.parquet: ArrowInvalid: "
        r".*; that is more than data.max_bad_fraction=0.1 of the bytes; mend or remove them"
    )
    with pytest.raises(ValueError, match=message):
        build_index(str(tmp_path), "data.val_path", max_bad_fraction=0.1)
    assert build_index(str(tmp_path), max_bad_fraction=0.3).num_samples == 18


# ---- prepared data sets ----


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """40 images in 3 shards of row groups of 6."""
    folder = tmp_path / "prepared"
    images = [encode(noise_image(i, (8, 8))) for i in range(40)]
    write_prepared(folder, images, rows_per_shard=16, rows_per_group=6)
    return folder


def test_prepared_data_set_is_indexed_by_its_manifest_alone(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.pq, "read_metadata", lambda *_: pytest.fail("opened a shard"))
    index = build_index(str(prepared))
    assert index.is_parquet and index.is_prepared
    assert sizes(index) == [6, 6, 4, 6, 6, 4, 6, 2]
    assert index.num_samples == 40
    assert index.classes == ("cat", "dog")
    assert build_index(prepared.as_uri()) == index


def test_ids_of_a_prepared_data_set_are_its_own(prepared: Path) -> None:
    assert sample_ids(prepared) == [stable_id(f"sample-{i}") for i in range(40)]


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_damaged_shard_is_refused_or_warned_of_by_how_much_it_holds(
    prepared: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    shard = prepared / "shard-00002.parquet"  # 8 of 40 samples
    whole = shard.stat().st_size
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: whole // 2])
    left = 0 if damage == "gone" else whole // 2
    message = (
        rf"data.path='{prepared}': {shard} has {left} bytes, its manifest says {whole}; "
        r"8 of 40 samples lie in damaged shards, more than data.max_bad_fraction=0.1 allows; "
        "prepare the data again, or raise the limit"
    )
    with pytest.raises(ValueError, match=message):
        build_index(str(prepared), max_bad_fraction=0.1)
    with caplog.at_level(logging.WARNING):
        index = build_index(str(prepared), max_bad_fraction=0.2)
    assert index.num_samples == 40, "its samples are quarantined when they are met"
    assert f"{shard} has {left} bytes" in caplog.text


def test_prepared_data_set_without_samples_is_refused(tmp_path: Path) -> None:
    write_prepared(tmp_path, [])
    with pytest.raises(ValueError, match="is a prepared data set without samples"):
        build_index(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "has schema_version=2, this program reads 1; prepare the data"),
        ({"shards": [{"file": "x"}]}, "is no manifest of a prepared data set .TypeError"),
    ],
    ids=["version", "shards"],
)
def test_manifest_of_another_program_is_refused(
    prepared: Path, change: dict[str, object], message: str
) -> None:
    path = prepared / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        build_index(str(prepared))


# ---- half-written data sets ----


UNFINISHED = (
    r"data.path='{}' holds shards of a prepared data set without its _manifest.json, so they may "
    r"be not all of it; (give one of the finished sets in it \(.*{}\), or )?"
    r"repeat jobs/prepare_data"
)


def test_shards_without_their_manifest_are_not_taken_for_a_data_set(prepared: Path) -> None:
    (prepared / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=UNFINISHED.format(prepared, "")):
        build_index(str(prepared))


def test_a_folder_of_prepared_sets_is_not_taken_for_one_but_names_them(prepared: Path) -> None:
    parent = prepared.parent
    with pytest.raises(ValueError, match=UNFINISHED.format(parent, prepared)) as caught:
        build_index(str(parent))
    assert str(prepared) in str(caught.value)


def test_one_shard_by_its_own_name_is_a_data_set(prepared: Path) -> None:
    assert build_index(str(prepared / "shard-00000.parquet")).num_samples == 16


def test_what_a_killed_preparation_leaves_is_refused_wherever_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its plan, after its first shard, and after its last one."""

    class KilledError(BaseException):
        pass

    out = tmp_path / "out"
    config = PrepareConfig(source=str(folder), out=str(out), shard_mb=1e-9)

    def tasks(config: PrepareConfig, uri: str, todo: list[int]) -> object:
        assert len(todo) > 2
        raise KilledError

    monkeypatch.setattr("pipeline.prepare.job._run_tasks", tasks)
    monkeypatch.setattr("pipeline.prepare.job.joined_cluster", lambda _: _NoCluster())
    with pytest.raises(KilledError):
        prepare(config)
    with pytest.raises(ValueError, match=UNFINISHED.format(out, "")):
        build_index(str(out))
    plan = json.loads((out / "_preparing" / "plan.json").read_text())
    for number in range(len(plan["shards"])):
        write_planned_shard(str(out), number)
        for path in (out, out / "train"):
            with pytest.raises(ValueError, match=UNFINISHED.format(path, "")):
                build_index(str(path))
    assert prepare(config).manifests["train"].num_samples == 5
    assert build_index(str(out / "train")).num_samples == 5


class _NoCluster:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def test_parquet_of_others_may_have_columns_of_the_same_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data.parquet", encoded_rows(4))
    table = pq.read_table(tmp_path / "data.parquet")
    for name in ("sample_id", "name", "width", "height"):
        table = table.append_column(name, [list(np.arange(4))])
    pq.write_table(table, tmp_path / "data.parquet")
    assert build_index(str(tmp_path)).num_samples == 4


def test_bad_file_reads_as_place_class_and_reason() -> None:
    bad = BadSample("folder/x.parquet", None, "ArrowInvalid", "no footer")
    assert str(bad) == "folder/x.parquet: ArrowInvalid: no footer"
