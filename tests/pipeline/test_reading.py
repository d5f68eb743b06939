"""Samples by index row: right bytes in any order, few reads, and what a failed read means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import reading
from pipeline.reading import SampleReader, UnreadableSampleError
from pipeline.reproducibility import stable_id
from pipeline.sources import build_index
from pipeline.storage import StorageUnavailableError
from tests.pipeline.samples import encode, noise_image, write_images, write_parquet, write_prepared
from tests.pipeline.storage_faults import Outage, install, lost_connection

NUM_ROWS = 23
CONTENTS = [b"sample %d " % i * (i + 1) for i in range(NUM_ROWS)]


def write_source(kind: str, folder: Path) -> str:
    """The same 23 contents as files, as Parquet of others, or prepared; row i is content i."""
    folder.mkdir(parents=True)
    if kind == "files":
        for i, content in enumerate(CONTENTS):
            (folder / f"{i:02d}.png").write_bytes(content)
    elif kind == "prepared":
        write_prepared(folder, CONTENTS, rows_per_shard=9, rows_per_group=4)
    else:
        for first in range(0, NUM_ROWS, 9):
            write_parquet(
                folder / f"{first:02d}.parquet",
                list(CONTENTS[first : first + 9]),
                as_struct=kind == "struct",
                row_group_size=4,
            )
    return str(folder)


KINDS = ["files", "parquet", "struct", "prepared"]


def reader_of(path: str | Path) -> SampleReader:
    return SampleReader(build_index(str(path)))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Groups loaded, in order."""
    loaded: list[int] = []
    load = SampleReader._load

    def remember(self: SampleReader, group: int) -> reading._Group:
        loaded.append(group)
        return load(self, group)

    monkeypatch.setattr(SampleReader, "_load", remember)
    return loaded


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_read_exactly_their_bytes(
    kind: str, is_remote: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_source(kind, tmp_path / "data")
    if is_remote:
        install(monkeypatch)
        path = f"faulty://{path}"
    reader = reader_of(path)
    assert len(reader) == NUM_ROWS
    assert [reader.read(row).encoded for row in range(NUM_ROWS)] == CONTENTS
    reader.plan(range(NUM_ROWS))
    assert [reader.read(row).encoded for row in reversed(range(NUM_ROWS))] == CONTENTS[::-1]


@settings(deadline=None, max_examples=30)
@given(
    data=st.data(),
    kind=st.sampled_from(KINDS),
    rows=st.lists(st.integers(0, NUM_ROWS - 1), max_size=40),
)
def test_any_order_and_any_plan_read_the_right_bytes(
    data: st.DataObject,
    kind: str,
    rows: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    reader = reader_of(write_source(kind, tmp_path_factory.mktemp("any") / "data"))
    for row in rows:
        if data.draw(st.booleans()):
            reader.plan(data.draw(st.lists(st.sampled_from(rows))))
        assert reader.read(row).encoded == CONTENTS[row]


@pytest.mark.parametrize("is_remote", [False, True])
def test_planned_groups_are_loaded_once_and_kept_until_the_next_plan(
    is_remote: bool, tmp_path: Path, loads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [b"%d" % i for i in range(60)]
    write_prepared(tmp_path, images, rows_per_group=5)
    path = str(tmp_path)
    if is_remote:
        install(monkeypatch)
        path = f"faulty://{path}"
    reader = reader_of(path)
    rows = np.random.default_rng(0).permutation(40).tolist()
    reader.plan(rows)
    assert [reader.read(row).encoded for row in rows] == [images[row] for row in rows]
    assert sorted(loads) == list(range(8)), "each of 8 planned groups once"
    reader.plan([35, 59, 36])
    assert set(reader._groups) == {7}, "what the new plan does not want is dropped"
    assert [reader.read(row).encoded for row in (35, 59, 36)] == [b"35", b"59", b"36"]
    assert sorted(loads) == [0, 1, 2, 3, 4, 5, 6, 7, 11], "group 7 was there already"


def test_without_a_plan_few_groups_are_kept(tmp_path: Path, loads: list[int]) -> None:
    write_prepared(tmp_path, CONTENTS, rows_per_group=2)
    reader = reader_of(tmp_path)
    for row in range(NUM_ROWS):
        assert reader.read(row).encoded == CONTENTS[row]
        assert len(reader._groups) <= 4
    assert loads == list(range(12)), "reading in order loads each group once"
    for row in np.random.default_rng(0).integers(0, NUM_ROWS, 100).tolist():
        assert reader.read(row).encoded == CONTENTS[row]
        assert len(reader._groups) <= 4


def test_least_recently_used_group_is_dropped_first(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data.parquet", [b"%d" % i for i in range(5)], row_group_size=1)
    reader = reader_of(tmp_path)
    for row in (0, 1, 2, 3, 0, 4):
        reader.read(row)
    assert sorted(reader._groups) == [0, 2, 3, 4]


def test_footer_of_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "data.parquet", list(CONTENTS), row_group_size=1)
    reader = reader_of(tmp_path)
    known: list[bool] = []
    parquet_file = pq.ParquetFile

    def remember(stream: object, metadata: pq.FileMetaData | None) -> pq.ParquetFile:
        known.append(metadata is not None)
        return parquet_file(stream, metadata=metadata)

    monkeypatch.setattr(reading.pq, "ParquetFile", remember)
    for row in range(NUM_ROWS):
        reader.read(row)
    assert known == [False] + [True] * (NUM_ROWS - 1)


# ---- places and ids ----


def test_location_and_id_of_files(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "sub/b.png"])
    reader = reader_of(tmp_path)
    assert [reader.location(row) for row in (0, 1)] == [
        str(tmp_path / name) for name in ("a.png", "sub/b.png")
    ]
    assert [reader.sample_id(row) for row in (0, 1)] == [
        stable_id(name) for name in ("a.png", "sub/b.png")
    ]


def test_location_and_id_of_parquet_rows_name_group_and_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", list(CONTENTS[:2]))
    write_parquet(tmp_path / "sub" / "b.parquet", list(CONTENTS[:8]))
    reader = reader_of(tmp_path)
    assert reader.location(1) == f"{tmp_path}/a.parquet:0:1"
    assert reader.location(2 + 4) == f"{tmp_path}/sub/b.parquet:1:1"
    for row in range(10):
        assert reader.sample_id(row) == reader.read(row).sample_id
    assert reader.sample_id(2 + 4) == stable_id("sub/b.parquet:4")


def test_only_the_shard_knows_the_id_of_a_prepared_sample(tmp_path: Path) -> None:
    write_prepared(tmp_path, CONTENTS, rows_per_group=4)
    reader = reader_of(tmp_path)
    assert reader.sample_id(5) is None
    assert reader.read(5).sample_id == stable_id("sample-5")
    assert reader.location(5) == f"{tmp_path}/shard-00000.parquet:1:1"


# ---- what is not there ----


@pytest.mark.parametrize("as_struct", [False, True])
def test_null_image_reads_as_no_bytes(tmp_path: Path, as_struct: bool) -> None:
    write_parquet(tmp_path / "data.parquet", [b"first", None, b"last"], as_struct=as_struct)
    reader = reader_of(tmp_path)
    assert [reader.read(row).encoded for row in range(3)] == [b"first", b"", b"last"]


def test_wrong_image_column_is_answered_with_the_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data.parquet", list(CONTENTS))
    reader = SampleReader(build_index(str(tmp_path)), "img")
    with pytest.raises(
        ValueError, match=r"image_column='img' is not in .*columns are label, image$"
    ) as caught:
        reader.read(0)
    assert not isinstance(caught.value, UnreadableSampleError), "a setting, not a bad sample"


def test_image_column_of_a_prepared_data_set_is_known(tmp_path: Path) -> None:
    write_prepared(tmp_path, CONTENTS)
    assert SampleReader(build_index(str(tmp_path)), "img").read(3).encoded == CONTENTS[3]


def test_vanished_file_is_an_unreadable_sample(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    reader = reader_of(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UnreadableSampleError, match=r"a.png") as caught:
        reader.read(0)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert reader.read(1).encoded == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("damage", ["gone", "truncated", "zeroed"])
@pytest.mark.parametrize("kind", ["parquet", "prepared"])
def test_rows_of_a_damaged_file_are_unreadable_and_the_others_are_read(
    tmp_path: Path, kind: str, damage: str
) -> None:
    path = write_source(kind, tmp_path / "data")
    reader = reader_of(path)
    file = sorted((tmp_path / "data").glob("*.parquet"))[1]  # rows 9 to 17
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:  # the footer is whole, what it points at is not
        footer = 8 + int.from_bytes(content[-8:-4], "little")
        file.write_bytes(bytes(len(content) - footer) + content[-footer:])
    for row in range(NUM_ROWS):
        if 9 <= row < 18:
            with pytest.raises(UnreadableSampleError, match=r"\w+") as caught:
                reader.read(row)
            assert not isinstance(caught.value.__cause__, StorageUnavailableError)
        else:
            assert reader.read(row).encoded == CONTENTS[row]


# ---- a broken line is no damaged file ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_plan", [False, True])
def test_short_outage_is_not_noticed(
    kind: str, has_plan: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_source(kind, tmp_path / "data")
    outage = Outage(0, lost_connection)
    install(monkeypatch, outage)
    reader = reader_of(f"faulty://{path}")
    for row in range(NUM_ROWS):
        outage.num_failures = 3
        if has_plan:
            reader.plan([row])
        assert reader.read(row).encoded == CONTENTS[row]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_plan", [False, True])
def test_long_outage_is_raised_and_never_a_bad_sample(
    kind: str, has_plan: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_source(kind, tmp_path / "data")
    outage = Outage(0, lost_connection)
    install(monkeypatch, outage)
    reader = reader_of(f"faulty://{path}")
    outage.num_failures = np.inf
    if has_plan:
        reader.plan([7])
    with pytest.raises(StorageUnavailableError, match="failed 6 times, last: connection reset"):
        reader.read(7)
    outage.num_failures = 0
    assert reader.read(7).encoded == CONTENTS[7], "and when the line is back, it is read"


@pytest.mark.parametrize("kind", ["parquet", "prepared"])
def test_outage_while_indexing_is_raised_and_no_file_is_left_out(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_source(kind, tmp_path / "data")
    install(monkeypatch, Outage(np.inf, lost_connection))
    with pytest.raises(StorageUnavailableError, match="failed 6 times"):
        build_index(f"faulty://{path}", max_bad_fraction=1.0)


def test_forbidden_file_is_an_unreadable_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a file system that says so: the superuser may read any local file."""
    write_source("files", tmp_path / "data")
    outage = Outage(0, lambda path: PermissionError(13, "Permission denied", path))
    handler = install(monkeypatch, outage)
    reader = reader_of(f"faulty://{tmp_path / 'data'}")
    outage.num_failures = 1
    reads = handler.num_reads
    with pytest.raises(UnreadableSampleError) as caught:
        reader.read(0)
    assert isinstance(caught.value.__cause__, PermissionError)
    assert handler.num_reads == reads + 1, "not tried again"


def test_reader_works_in_another_process(tmp_path: Path) -> None:
    """Ray hands indices to other processes; readers are built there, from a pickled index."""
    import pickle

    write_prepared(tmp_path, [encode(noise_image(i, (4, 4))) for i in range(3)])
    index = pickle.loads(pickle.dumps(build_index(str(tmp_path))))
    assert SampleReader(index).read(2) == reader_of(tmp_path).read(2)
