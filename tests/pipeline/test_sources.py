"""The index of a folder or of Parquet, and reading the right bytes by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import sources
from pipeline.reproducibility import stable_id
from pipeline.sources import SampleReader, build_index, group_sizes
from tests.pipeline.samples import write_images

NAMES = ["b.png", "a.jpg", "sub/deep/c.webp", "sub/d.JPG", "Z.tif"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images among other files."""
    folder = tmp_path / "images"
    write_images(folder, NAMES)
    for name in ("notes.txt", "sub/labels.json", ".DS_Store", "no_suffix"):
        (folder / name).write_text("not an image")
    return folder


def relative_paths(folder: Path) -> list[str]:
    index = build_index(str(folder))
    return [Path(str(path)).relative_to(folder).as_posix() for path in index["path"]]


def ids_by_path(folder: Path) -> dict[str, int]:
    ids = build_index(str(folder))["sample_id"].to_pylist()
    return dict(zip(relative_paths(folder), ids, strict=True))


def test_folder_index_is_recursive_sorted_and_ignores_other_files(folder: Path) -> None:
    assert relative_paths(folder) == ["Z.tif", "a.jpg", "b.png", "sub/d.JPG", "sub/deep/c.webp"]
    index = build_index(str(folder))
    assert index["row"].to_pylist() == index["row_group"].to_pylist() == [-1] * 5
    assert group_sizes(index).tolist() == [1] * 5


def test_file_types_pillow_can_write_but_not_read_are_no_images(folder: Path) -> None:
    (folder / "paper.pdf").write_bytes(b"%PDF-1.4")
    assert "paper.pdf" not in relative_paths(folder)


def test_ids_hash_the_place_in_the_folder_and_ignore_other_files(folder: Path) -> None:
    before = ids_by_path(folder)
    assert before == {name: stable_id(name) for name in NAMES}
    write_images(folder, ["0.png", "sub/a.png"])
    after = ids_by_path(folder)
    assert len(after) == 7
    assert {name: after[name] for name in before} == before
    moved = folder.rename(folder.with_name("moved"))
    assert ids_by_path(moved) == after


def test_folder_rows_read_their_files(folder: Path) -> None:
    reader = SampleReader(build_index(str(folder)), "image")
    assert len(reader) == 5
    for row, name in enumerate(relative_paths(folder)):
        assert reader.read(row) == (folder / name).read_bytes()
        assert reader.location(row) == str(folder / name)


def test_relative_path_is_indexed_as_absolute(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert build_index("images").equals(build_index(str(folder)))


def test_single_image_file_is_a_data_set_of_one(folder: Path) -> None:
    index = build_index(str(folder / "b.png"))
    assert index["sample_id"].to_pylist() == [stable_id("b.png")]


def test_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"data.path='.*gone' does not exist; give a folder"
    ):
        build_index(str(tmp_path / "gone"))


@pytest.mark.parametrize("names", [(), ("a.txt", "b.json", "c/d.csv")])
def test_folder_without_images_is_refused_with_the_number_of_files(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    with pytest.raises(ValueError, match=f"holds no image among {len(names)} files; give a folder"):
        build_index(str(tmp_path))


def encoded_rows(num_rows: int, first: int = 0) -> list[bytes]:
    return [f"bytes of row {first + i}".encode() * (i + 1) for i in range(num_rows)]


def write_parquet(
    path: Path, rows: list[bytes | None], *, as_struct: bool = False, row_group_size: int = 3
) -> None:
    image: list[object] = list(rows)
    if as_struct:  # as Hugging Face datasets write images
        image = [None if row is None else {"bytes": row, "path": "x.jpg"} for row in rows]
    table = pa.table({"label": list(range(len(rows))), "image": image})
    pq.write_table(table, path, row_group_size=row_group_size)


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_file_rows_read_exactly_their_bytes(tmp_path: Path, as_struct: bool) -> None:
    rows = encoded_rows(8)
    write_parquet(tmp_path / "data.parquet", rows, as_struct=as_struct)
    index = build_index(str(tmp_path / "data.parquet"))
    reader = SampleReader(index, "image")
    assert [reader.read(row) for row in range(8)] == rows
    assert group_sizes(index).tolist() == [3, 3, 2]
    assert index["sample_id"].to_pylist() == [stable_id(f"data.parquet:{row}") for row in range(8)]
    assert reader.location(4) == f"{tmp_path / 'data.parquet'}:1:1"


def test_parquet_folder_rows_read_exactly_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    write_parquet(tmp_path / "b.parquet", encoded_rows(4), as_struct=True)
    write_parquet(tmp_path / "a.pq", encoded_rows(5, first=100))
    write_parquet(tmp_path / "empty.parquet", [])
    write_parquet(tmp_path / "more" / "a.parquet", encoded_rows(2, first=200), row_group_size=1)
    index = build_index(str(tmp_path))
    reader = SampleReader(index, "image")
    expected = encoded_rows(5, first=100) + encoded_rows(4) + encoded_rows(2, first=200)
    assert [reader.read(row) for row in range(len(reader))] == expected
    assert group_sizes(index).tolist() == [3, 2, 3, 1, 1, 1]


def test_parquet_ids_survive_new_files_and_other_row_groups(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", encoded_rows(7), row_group_size=2)
    before = build_index(str(tmp_path))["sample_id"].to_pylist()
    write_parquet(tmp_path / "b.parquet", encoded_rows(7), row_group_size=5)
    write_parquet(tmp_path / "a.parquet", encoded_rows(3))
    assert build_index(str(tmp_path))["sample_id"].to_pylist()[3:] == before


@pytest.mark.parametrize("as_struct", [False, True])
def test_null_image_reads_as_no_bytes(tmp_path: Path, as_struct: bool) -> None:
    write_parquet(tmp_path / "data.parquet", [b"first", None, b"last"], as_struct=as_struct)
    reader = SampleReader(build_index(str(tmp_path)), "image")
    assert [reader.read(row) for row in range(3)] == [b"first", b"", b"last"]


def test_wrong_image_column_is_answered_with_the_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data.parquet", encoded_rows(2))
    reader = SampleReader(build_index(str(tmp_path)), "img")
    with pytest.raises(
        ValueError, match=r"image_column='img' is not in .*columns are label, image$"
    ):
        reader.read(0)


def test_parquet_without_rows_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data.parquet", [])
    with pytest.raises(ValueError, match="1 Parquet files hold no rows"):
        build_index(str(tmp_path))


def test_reader_keeps_few_row_groups_and_still_reads_the_right_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = encoded_rows(60)
    write_parquet(tmp_path / "data.parquet", rows, row_group_size=5)
    reader = SampleReader(build_index(str(tmp_path)), "image")
    opened: list[str] = []
    parquet_file = pq.ParquetFile
    monkeypatch.setattr(
        sources.pq, "ParquetFile", lambda path: opened.append(path) or parquet_file(path)
    )
    assert [reader.read(row) for row in range(60)] == rows
    assert len(opened) == 12, "reading in order opens each of the 12 row groups once"
    for row in np.random.default_rng(0).integers(0, 60, 200).tolist():
        assert reader.read(row) == rows[row]
        assert len(reader._cache) <= 4


def test_least_recently_used_row_group_is_dropped_first(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data.parquet", encoded_rows(5), row_group_size=1)
    reader = SampleReader(build_index(str(tmp_path)), "image")
    for row in (0, 1, 2, 3, 0, 4):
        reader.read(row)
    assert sorted(row_group for _, row_group in reader._cache) == [0, 2, 3, 4]
