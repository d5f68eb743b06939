"""Retries, what a retry cannot mend, and files that are whole or absent."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from pipeline import storage
from pipeline.storage import (
    StorageRefusedError,
    StorageUnavailableError,
    open_retrying,
    read_bytes,
    with_retries,
)
from tests.pipeline.storage_faults import Outage, install, lost_connection

LOCAL = fs.LocalFileSystem()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses asked for; none is taken."""
    taken: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", taken.append)
    return taken


def failing(num_failures: int, error: BaseException) -> Callable[[], str]:
    """A read that fails so many times."""
    tries = iter(range(num_failures))

    def read() -> str:
        if next(tries, None) is not None:
            raise error
        return "content"

    return read


@pytest.mark.parametrize("num_failures", [0, 1, 5])
@pytest.mark.parametrize("error", [OSError("reset"), ConnectionError("refused"), TimeoutError()])
def test_transient_errors_are_tried_again_with_growing_pauses(
    num_failures: int, error: OSError, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    assert with_retries(failing(num_failures, error), "s3://bucket/a.jpg") == "content"
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0][:num_failures]
    assert len(caplog.messages) == num_failures
    assert all("reading s3://bucket/a.jpg failed" in message for message in caplog.messages)


def test_errors_that_do_not_end_are_raised_with_the_file_and_the_number_of_tries(
    pauses: list[float],
) -> None:
    message = r"reading s3://bucket/a.jpg failed 6 times, last: reset by peer"
    with pytest.raises(StorageUnavailableError, match=message) as caught:
        with_retries(failing(99, OSError("reset by peer")), "s3://bucket/a.jpg")
    assert isinstance(caught.value.__cause__, OSError)
    assert len(pauses) == 5


@pytest.mark.parametrize("kind", storage.ABSENT_ERRORS)
def test_absence_is_raised_at_once(kind: type[OSError], pauses: list[float]) -> None:
    with pytest.raises(kind, match="not for you"):
        with_retries(failing(1, kind("not for you")), "a.jpg")
    assert not pauses


@pytest.mark.parametrize("code", ["ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "NO_SUCH_BUCKET"])
def test_a_store_that_refuses_is_no_property_of_a_file_and_not_asked_again(
    code: str, pauses: list[float]
) -> None:
    refused = OSError(f"When reading: AWS Error {code} during GetObject")
    with pytest.raises(StorageRefusedError, match=rf"reading s3://b/a.jpg failed: .*{code}") as e:
        with_retries(failing(1, refused), "s3://b/a.jpg")
    assert not isinstance(e.value, storage.ABSENT_ERRORS), "which would make the sample bad"
    assert not pauses


def test_other_errors_are_not_the_storages(pauses: list[float]) -> None:
    with pytest.raises(ZeroDivisionError):
        with_retries(failing(1, ZeroDivisionError()), "a.jpg")
    assert not pauses


# ---- through Arrow ----


def test_a_file_is_read_whole_over_a_broken_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"content")
    handler = install(monkeypatch, Outage(2, lost_connection))
    filesystem, path = storage.resolve(f"faulty://{tmp_path}/a.jpg")
    assert read_bytes(filesystem, path) == b"content"
    assert handler.num_reads >= 3


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_reading_parts_over_a_broken_line_gives_the_parts_of_the_file(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = np.random.default_rng(0).bytes(1000)
    path = tmp_path_factory.mktemp("parts") / "file"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as monkeypatch:
        outage = Outage(0, lost_connection)
        install(monkeypatch, outage)
        filesystem, inner = storage.resolve(f"faulty://{path}")
        with open_retrying(filesystem, inner) as file:
            assert file.size() == 1000
            for _ in range(6):
                outage.num_failures = data.draw(st.integers(0, 5))
                offset = data.draw(st.integers(0, 1000))
                size = data.draw(st.integers(0, 1200))
                file.seek(offset)
                assert file.read(size) == content[offset : offset + size]
                assert file.tell() == min(1000, offset + size)
            file.seek(990)
            assert file.read() == content[990:]


def test_parquet_is_read_over_a_broken_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"x": list(range(1000))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    outage = Outage(1, lost_connection)

    def every_other(path: str) -> None:
        outage(path)
        outage.num_failures = 1

    handler = install(monkeypatch, outage)
    handler.fault = every_other
    filesystem, path = storage.resolve(f"faulty://{tmp_path}/a.parquet")
    with open_retrying(filesystem, path) as stream:
        assert pq.ParquetFile(stream).read() == table
    assert handler.num_reads >= 4


def test_an_outage_under_parquet_is_unavailable_storage_and_no_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    outage = Outage(0, lost_connection)
    install(monkeypatch, outage)
    filesystem, path = storage.resolve(f"faulty://{tmp_path}/a.parquet")
    with open_retrying(filesystem, path) as stream:
        outage.num_failures = np.inf
        with pytest.raises(StorageUnavailableError, match=r"a.parquet failed 6 times"):
            pq.ParquetFile(stream)


# ---- locations ----


def test_paths_and_file_uris_are_local_and_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "with space").mkdir()
    for path in ("with space", str(tmp_path / "with space"), (tmp_path / "with space").as_uri()):
        filesystem, inner = storage.resolve(path)
        assert storage.is_local(filesystem)
        assert inner == str(tmp_path / "with space")


def test_listing_is_recursive_and_sorted_and_takes_single_files(tmp_path: Path) -> None:
    for name in ("b/2", "b/1", "a", "c/d/3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(path: Path) -> list[str]:
        return [f.path for f in storage.list_files(LOCAL, str(path))]

    assert names(tmp_path) == [str(tmp_path / name) for name in ("a", "b/1", "b/2", "c/d/3")]
    assert names(tmp_path / "a") == [str(tmp_path / "a")]
    assert names(tmp_path / "gone") == []


# ---- writing ----


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    storage.write_bytes(LOCAL, str(path), b"old")

    def half(file: pa.NativeFile) -> None:
        file.write(b"half of the new")
        raise KeyboardInterrupt

    for target, expected in ((path, [path]), (path.with_name("other"), [path])):
        with pytest.raises(KeyboardInterrupt):
            storage.write_atomically(LOCAL, str(target), half)
        assert list(path.parent.iterdir()) == expected
    assert path.read_bytes() == b"old"


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(file: pa.NativeFile) -> None:
        file.write(b"first ")
        assert not path.exists()
        file.write(b"second")

    storage.write_atomically(LOCAL, str(path), write)
    assert path.read_bytes() == b"first second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_written_through_a_network_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    filesystem, path = storage.resolve(f"faulty://{tmp_path}/new/file")
    storage.write_bytes(filesystem, path, b"content")
    assert (tmp_path / "new" / "file").read_bytes() == b"content"
    assert not logging.getLogger("pipeline.storage").handlers, "only jobs configure logging"
