"""WebDataset tars and Parquet exports: every byte back, labels, damage reported."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.prepare import sample_reader
from pipeline.prepare.job import PreparationFailedError
from pipeline.prepare.record_sources import open_source
from pipeline.prepare.settings import PrepareConfig
from pipeline.quarantine import read_quarantine
from pipeline.reproducibility import stable_id
from pipeline.sources import build_index
from tests.pipeline.preparing import image_bytes, no_ray, prepare_rows, read_manifest, write_tar

pytestmark = pytest.mark.usefixtures(no_ray.__name__)


def write_web_dataset(folder: Path) -> dict[str, bytes]:
    """Two tars with labels of both kinds; returns the images by sample name."""
    folder.mkdir(parents=True)
    images = {f"s{tar}/{key:03d}": image_bytes(10 * tar + key) for tar in (0, 1) for key in (0, 1)}
    write_tar(
        folder / "a.tar",
        {
            "./s0/000.png": images["s0/000"],
            "./s0/000.cls": b"3\n",
            "./s0/000.txt": b"a caption",
            "./s0/001.seg.png": image_bytes(99),
            "./s0/001.PNG": images["s0/001"],
            "./s0/001.json": json.dumps({"label": 1, "more": "x"}).encode(),
        },
    )
    long = {f"s1/{'k' * 150}/{key}": value for key, value in (("x.png", images["s1/000"]),)}
    write_tar(folder / "sub.tar", long | {"s1/001.png": images["s1/001"]})
    return {
        "a.tar/s0/000": images["s0/000"],
        "a.tar/s0/001": images["s0/001"],
        f"sub.tar/s1/{'k' * 150}/x": images["s1/000"],
        "sub.tar/s1/001": images["s1/001"],
    }


def test_images_of_tars_come_back_byte_for_byte_with_their_labels(tmp_path: Path):
    images = write_web_dataset(tmp_path / "in")
    rows = prepare_rows(tmp_path / "in", tmp_path / "out", shard_mb=0.008)
    assert {row["name"]: row["image"] for row in rows} == images
    assert len(read_manifest(tmp_path / "out/train").shards) > 1
    labels = {row["name"]: row["label"] for row in rows}
    assert labels["a.tar/s0/000"] == 3 and labels["a.tar/s0/001"] == 1
    assert labels["sub.tar/s1/001"] is None
    assert read_manifest(tmp_path / "out/train").classes == ["0", "1", "2", "3"]
    for row in rows:
        assert row["sample_id"] == stable_id(row["name"])


def test_one_tar_is_a_source_too(tmp_path: Path):
    write_web_dataset(tmp_path / "in")
    rows = prepare_rows(tmp_path / "in/a.tar", tmp_path / "out")
    assert sorted(row["name"] for row in rows) == ["a.tar/s0/000", "a.tar/s0/001"]


@pytest.mark.parametrize("where", ["inside the last image", "inside a header", "at a member's end"])
def test_of_a_truncated_tar_the_rest_is_used_and_the_end_reported(tmp_path: Path, where: str):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/a.tar"
    write_tar(path, {f"{i}.png": image_bytes(i) for i in range(6)})
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    end = {
        "inside the last image": members[5].offset_data + 100,
        "inside a header": members[5].offset + 100,
        "at a member's end": members[5].offset,
    }[where]
    path.write_bytes(path.read_bytes()[:end])
    rows = prepare_rows(tmp_path / "in", tmp_path / "out")
    assert sorted(row["image"] for row in rows) == sorted(image_bytes(i) for i in range(5))
    (bad,) = read_quarantine(f"{tmp_path}/out/train/_quarantine.parquet")
    assert bad.path == f"{tmp_path}/in/a.tar" and bad.error == "TruncatedTarError"
    assert str(end) in bad.message


def test_a_whole_tar_is_not_reported(tmp_path: Path):
    write_web_dataset(tmp_path / "in")
    source = open_source(PrepareConfig(source=str(tmp_path / "in"), out="o"))
    assert not source.bad


def test_two_images_of_one_key_are_refused_with_both_names(tmp_path: Path):
    (tmp_path / "in").mkdir()
    members = {"k.png": image_bytes(0), "k.jpg": image_bytes(1, image_format="JPEG")}
    write_tar(tmp_path / "in/a.tar", members)
    with pytest.raises(ValueError, match=r"two samples have the same id .*a\.tar/k.* names"):
        prepare_rows(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(("label", "message"), [(b"cat", "'cat'"), (b"-1", "-1 is not in 0 ...")])
def test_a_label_that_is_no_class_number_sets_the_sample_aside(
    tmp_path: Path, label: bytes, message: str
):
    (tmp_path / "in").mkdir()
    members = {f"{i}.png": image_bytes(i) for i in range(4)} | {"2.cls": label}
    write_tar(tmp_path / "in/a.tar", members)
    assert len(prepare_rows(tmp_path / "in", tmp_path / "out")) == 3
    (bad,) = read_quarantine(f"{tmp_path}/out/train/_quarantine.parquet")
    assert bad.path.endswith("a.tar/2.png") and message in bad.message


def test_a_compressed_tar_is_refused_with_the_way_out(tmp_path: Path):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match="gunzip"):
        prepare_rows(tmp_path / "a.tar.gz", tmp_path / "out")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(gzip.compress(b"really gzip"))
    with pytest.raises(ValueError, match=r"(?s)no image .*TruncatedTarError"):
        prepare_rows(tmp_path / "in", tmp_path / "out")


IMAGES = [image_bytes(i) for i in range(30)]


def write_parquet(path: Path, columns: dict[str, Any], metadata: dict[str, Any] | None = None):
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)


def names_metadata(names: list[str]) -> dict[str, Any]:
    return {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}


def test_plain_bytes_come_back_with_the_ids_of_raw_training(tmp_path: Path):
    write_parquet(tmp_path / "in/x/a.parquet", {"image": IMAGES[:20]})
    write_parquet(tmp_path / "in/b.parquet", {"image": IMAGES[20:], "extra": list(range(10))})
    rows = prepare_rows(tmp_path / "in", tmp_path / "out", shard_mb=0.04)
    assert len(read_manifest(tmp_path / "out/train").shards) > 2
    expected = {f"x/a.parquet:{i}": IMAGES[i] for i in range(20)}
    expected |= {f"b.parquet:{i}": IMAGES[20 + i] for i in range(10)}
    assert {row["name"]: row["image"] for row in rows} == expected
    assert [row["name"] for row in rows] != sorted(expected)
    assert all(row["sample_id"] == stable_id(row["name"]) for row in rows)
    assert build_index(str(tmp_path / "in")).num_samples == len(rows)


def test_long_row_groups_are_streamed_without_mixing_up_rows(tmp_path: Path):
    images = [image_bytes(i, (8, 8)) for i in range(150)]
    table = pa.table({"image": images, "label": [i % 7 for i in range(150)]})
    pq.write_table(table, tmp_path / "a.parquet")  # one row group, read 64 rows at a time
    rows = prepare_rows(tmp_path / "a.parquet", tmp_path / "out", shard_mb=0.01)
    assert len(read_manifest(tmp_path / "out/train").shards) > 1
    found = {int(row["name"].split(":")[1]): (row["image"], row["label"]) for row in rows}
    assert found == {i: (image, i % 7) for i, image in enumerate(images)}


def test_a_network_error_while_reading_parquet_is_no_bad_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_parquet(tmp_path / "a.parquet", {"image": IMAGES})

    def fail(*_: Any) -> Any:
        raise storage.StorageUnavailableError("reading a.parquet failed 6 times")

    monkeypatch.setattr(sample_reader, "_stream_row_group", fail)
    with pytest.raises(PreparationFailedError, match=r"a\.parquet failed 6 times"):
        prepare_rows(tmp_path / "a.parquet", tmp_path / "out", max_bad_fraction=1.0)


def test_hugging_face_exports_keep_labels_and_class_names(tmp_path: Path):
    images = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(IMAGES)]
    columns = {"image": images, "label": [i % 3 for i in range(30)]}
    write_parquet(tmp_path / "a.parquet", columns, names_metadata(["cat", "dog", "eel", "fox"]))
    rows = prepare_rows(tmp_path / "a.parquet", tmp_path / "out")
    assert read_manifest(tmp_path / "out/train").classes == ["cat", "dog", "eel", "fox"]
    for row in rows:
        number = int(row["name"].split(":")[1])
        assert (row["image"], row["label"]) == (IMAGES[number], number % 3)


def test_labels_without_names_are_numbered_and_negative_ones_mean_none(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", {"image": IMAGES[:3], "label": [2, -1, None]})
    rows = prepare_rows(tmp_path / "a.parquet", tmp_path / "out")
    assert sorted(str(row["label"]) for row in rows) == ["2", "None", "None"]
    assert read_manifest(tmp_path / "out/train").classes == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"img": IMAGES[:2]}, {}, "image_column='image' is not in .* its columns are img"),
        ({"image": IMAGES[:2], "label": ["a", "b"]}, {}, "not an integer .*--label-column ''"),
        ({"image": IMAGES[:2], "label": [0, 2**40]}, {}, "label_column='label' of"),
        ({"image": IMAGES[:2], "label": [0, 2**30]}, {}, "no class number"),
        ({"image": pa.array([], pa.binary())}, {}, "hold no rows"),
    ],
)
def test_parquet_that_cannot_be_used_is_refused(
    tmp_path: Path, columns: dict[str, Any], settings: dict[str, Any], message: str
):
    write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=message):
        prepare_rows(tmp_path / "a.parquet", tmp_path / "out", **settings)


def test_other_columns_can_be_named_and_text_labels_left_out(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", {"img": IMAGES[:2], "y": [1, 0], "label": ["a", "b"]})
    rows = prepare_rows(
        tmp_path / "a.parquet", tmp_path / "out", image_column="img", label_column="y"
    )
    assert {row["image"]: row["label"] for row in rows} == {IMAGES[0]: 1, IMAGES[1]: 0}
    rows = prepare_rows(
        tmp_path / "a.parquet", tmp_path / "none", image_column="img", label_column=""
    )
    assert {row["label"] for row in rows} == {None}


def test_a_label_without_a_name_is_refused(tmp_path: Path):
    columns = {"image": IMAGES[:2], "label": [0, 5]}
    write_parquet(tmp_path / "a.parquet", columns, names_metadata(["cat", "dog"]))
    with pytest.raises(ValueError, match="label 5 has no name"):
        prepare_rows(tmp_path / "a.parquet", tmp_path / "out")


def test_rows_without_bytes_are_set_aside(tmp_path: Path):
    images = [{"bytes": IMAGES[0], "path": "a"}, {"bytes": None, "path": "b"}, None]
    write_parquet(tmp_path / "a.parquet", {"image": images + images[:1] * 5})
    rows = prepare_rows(tmp_path / "a.parquet", tmp_path / "out", max_bad_fraction=0.5)
    assert len(rows) == 6
    bad = read_quarantine(f"{tmp_path}/out/train/_quarantine.parquet")
    assert [sample.path.split("/")[-1] for sample in bad] == ["a.parquet:0:1", "a.parquet:0:2"]
    assert "0 bytes" in bad[0].message


def test_a_truncated_parquet_file_is_named(tmp_path: Path):
    write_parquet(tmp_path / "in/a.parquet", {"image": IMAGES})
    write_parquet(tmp_path / "in/b.parquet", {"image": IMAGES})
    path = tmp_path / "in/b.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"b\.parquet is no whole Parquet file"):
        prepare_rows(tmp_path / "in", tmp_path / "out")


def test_rows_of_a_damaged_row_group_are_set_aside(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"image": IMAGES}),
        path,
        row_group_size=10,
        use_dictionary=False,
        compression="ZSTD",
    )
    column = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    rows = prepare_rows(path, tmp_path / "out", max_bad_fraction=0.5)
    assert sorted(int(row["name"].split(":")[1]) for row in rows) == [*range(10), *range(20, 30)]
    bad = read_quarantine(f"{tmp_path}/out/train/_quarantine.parquet")
    assert len(bad) == 10 and "row group 1 cannot be read" in bad[0].message
