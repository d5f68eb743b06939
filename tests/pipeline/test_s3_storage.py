"""Reading, writing, listing and deleting on a real S3 server that answers badly."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import fs

from pipeline import object_store, storage
from pipeline.storage import StorageRefusedError, StorageUnavailableError
from tests.s3_proxy import FaultProxy, Kind, Request, nth, seeded
from tests.s3_server import BUCKET, S3Server

MANY = bytes(range(256)) * 100_000  # 25.6 MB, three parts of an upload
FAULTS: list[Kind] = ["503", "500", "reset", "lost_answer", "truncated", "slow"]


@pytest.fixture
def one_try(faulty_s3: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call is tried once, too: what a failure leaves behind is seen."""
    monkeypatch.setattr(storage, "RETRY_PAUSES_S", ())


def place(name: str) -> tuple[fs.FileSystem, str]:
    return storage.resolve(f"s3://{BUCKET}/{name}")


def test_the_environment_names_the_server_and_paths_are_bucket_and_key(
    faulty_s3: FaultProxy,
) -> None:
    filesystem, path = place("folder/a%20b/")
    assert path == f"{BUCKET}/folder/a b"
    storage.write_bytes(filesystem, path, b"x")
    assert faulty_s3.requests, "the endpoint of the environment was asked"
    assert place("folder")[0] is filesystem, "one client for all"


@pytest.mark.parametrize("content", [b"", b"small", MANY], ids=["empty", "small", "parts"])
@pytest.mark.parametrize("kind", FAULTS)
def test_what_is_written_and_read_through_faults_is_the_same(
    kind: Kind, content: bytes, s3: S3Server, faulty_s3: FaultProxy
) -> None:
    filesystem, path = place(f"through-{kind}-{len(content)}")
    # Every request fails before it succeeds, those of each try of an upload, too.
    faulty_s3.rule = lambda request: kind if request.repeat < 1 else None
    storage.write_bytes(filesystem, path, content)
    assert storage.read_bytes(filesystem, path) == content
    assert storage.info_of(filesystem, path).size == len(content)
    assert s3.objects(f"through-{kind}-{len(content)}") == {"": content}
    assert faulty_s3.met[kind] >= 4, "create, part, completion, look, read"


def failing_requests() -> dict[str, Callable[[FaultProxy], None]]:
    """Ways in which one upload can be cut off, by name."""

    def rule(**which: object) -> Callable[[FaultProxy], None]:
        return lambda proxy: setattr(proxy, "rule", nth("503", **which))  # type: ignore[arg-type]

    return {
        "start": rule(methods=("POST",), part="?uploads"),
        "first part": rule(methods=("PUT",), part="partNumber=1"),
        "a later part": rule(methods=("PUT",), part="partNumber=2"),
        "completion": lambda proxy: setattr(
            proxy,
            "rule",
            lambda request: (
                "503" if request.method == "POST" and "uploads" not in request.path else None
            ),
        ),
    }


@pytest.mark.parametrize("cut", failing_requests())
@pytest.mark.parametrize("content", [b"new", MANY], ids=["small", "parts"])
def test_an_upload_that_fails_leaves_what_was_there(
    cut: str, content: bytes, one_try: None, s3: S3Server, faulty_s3: FaultProxy
) -> None:
    """Not an empty object, and not the parts that had arrived."""
    if content == b"new" and cut == "a later part":
        pytest.skip("a small object has one part")
    filesystem, path = place("kept")
    storage.write_bytes(filesystem, path, b"old")
    s3.client.delete_object(Bucket=BUCKET, Key="fresh")
    failing_requests()[cut](faulty_s3)
    for target in (path, f"{BUCKET}/fresh"):
        with pytest.raises(StorageUnavailableError, match=r"writing .* SLOW_DOWN"):
            storage.write_bytes(filesystem, target, content)
    assert s3.objects("kept") == {"": b"old"} and s3.objects("fresh") == {}


def test_a_write_that_is_interrupted_or_fails_by_itself_sends_nothing(
    s3: S3Server, faulty_s3: FaultProxy
) -> None:
    filesystem, path = place("half")

    def half(file: pa.NativeFile) -> None:
        file.write(MANY)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_atomically(filesystem, path, half)
    assert s3.objects("half") == {} and not faulty_s3.requests


def test_listings_and_deletions_go_through_faults_and_may_be_repeated(
    s3: S3Server, faulty_s3: FaultProxy
) -> None:
    for i in range(5):
        s3.client.put_object(Bucket=BUCKET, Key=f"many/{i % 2}/{i}", Body=b"x")
    filesystem, path = place("many")
    faulty_s3.rule = seeded({"503": 0.1, "lost_answer": 0.1, "truncated": 0.1}, seed=3)
    files = storage.list_files(filesystem, path)
    assert [f.path for f in files] == [f"{path}/{n}" for n in ("0/0", "0/2", "0/4", "1/1", "1/3")]
    assert {f.base_name for f in storage.list_folder(filesystem, path)} == {"0", "1"}
    for _ in range(2):
        storage.delete_file(filesystem, f"{path}/1/1")
        storage.delete_folder(filesystem, f"{path}/0")
    assert set(s3.objects("many")) == {"1/3"}
    assert faulty_s3.met.total() >= 3
    assert storage.list_files(filesystem, f"{path}/nothing") == []


def test_a_large_file_is_copied_here_through_truncated_answers(
    tmp_path: Path, s3: S3Server, faulty_s3: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_CHUNK_BYTES", 4 * 2**20)
    s3.client.put_object(Bucket=BUCKET, Key="large", Body=MANY)
    filesystem, path = place("large")
    faulty_s3.rule = nth("truncated", 0, 1, 3, 4, 8, methods=("GET",))
    storage.download(filesystem, path, tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == MANY
    assert faulty_s3.met["truncated"] == 5


def test_a_client_still_retries_after_a_bad_hour(
    s3: S3Server, faulty_s3: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK's standard strategy has a quota, which this uses up."""
    monkeypatch.setattr(object_store, "SDK_RETRIES", 2)
    monkeypatch.setattr(storage, "RETRY_PAUSES_S", ())
    object_store._connect.cache_clear()
    filesystem, path = place("hour")

    def rule(request: Request) -> Kind | None:
        is_bad = request.method in ("HEAD", "PUT", "GET") and request.repeat % 3 < 2
        return "503" if is_bad else None

    faulty_s3.rule = rule
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda i: storage.info_of(filesystem, f"{path}/{i}"), range(100)))
    storage.write_bytes(filesystem, path, MANY)
    assert s3.objects("hour") == {"": MANY}
    assert faulty_s3.met["503"] > 300


def test_a_server_that_hangs_is_given_up(
    faulty_s3: FaultProxy, one_try: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "SILENCE_TIMEOUT_S", 1.0)
    object_store._connect.cache_clear()
    filesystem, path = place("silent")
    faulty_s3.rule = nth("hang")
    started = time.monotonic()
    with pytest.raises(StorageUnavailableError, match="Less than 1 bytes/sec"):
        storage.read_bytes(filesystem, path)
    assert time.monotonic() - started < 20


def test_a_server_that_is_not_there_is_given_up(
    monkeypatch: pytest.MonkeyPatch, faulty_s3: FaultProxy
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    filesystem, path = place("gone")
    with pytest.raises(StorageUnavailableError, match=r"reading .* failed 13 times.*connect"):
        storage.info_of(filesystem, path)


# ---- refusals ----


def test_a_bucket_that_does_not_exist_is_named_at_once(faulty_s3: FaultProxy) -> None:
    with pytest.raises(ValueError, match=r"run.checkpoint_path='s3://nowhere/x' cannot be written"):
        storage.check_writable("s3://nowhere/x", "run.checkpoint_path")
    filesystem, path = storage.resolve("s3://nowhere/x")
    with pytest.raises(StorageRefusedError, match="the bucket does not exist; create it"):
        storage.write_bytes(filesystem, path, b"x")
    assert len(faulty_s3.requests) == 2, "no retries"


def test_no_right_to_write_is_named_at_once(s3: S3Server, faulty_s3: FaultProxy) -> None:
    faulty_s3.rule = nth("403", methods=("PUT", "POST"))
    with pytest.raises(ValueError, match=r"cannot be written: .*refuses access.*AWS_ACCESS_KEY_ID"):
        storage.check_writable(f"s3://{BUCKET}/readonly", "out")
    faulty_s3.rule = nth("403", methods=("DELETE",))
    storage.check_writable(f"s3://{BUCKET}/nodelete", "out")
    faulty_s3.rule = None
    storage.check_writable(f"s3://{BUCKET}/rights", "out")
    assert s3.objects("rights") == {} == s3.objects("readonly")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:hunter2@bucket/data",
        "s3://AKIA@bucket/data",
        "s3://AKIA:hunter2/x@bucket/data",
        "gs://me:hunter2@bucket/data",
        "s3://bucket/data?access_key=AKIA&secret_key=hunter2",
        "s3://AKIA:hunter2@bucket/data?region=eu-west-1",
        "abfs://:hunter2@account.blob.core.windows.net/data",
        "gs://bucket/data?access_token=hunter2",
    ],
)
def test_credentials_in_a_uri_are_refused_without_repeating_them(uri: str) -> None:
    with pytest.raises(ValueError, match="AWS_SECRET_ACCESS_KEY") as caught:
        storage.resolve(uri)
    assert "hunter2" not in str(caught.value) and "AKIA" not in str(caught.value)


def test_a_uri_without_a_bucket_or_an_endpoint_without_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="names no bucket"):
        storage.resolve("s3:///folder")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "ftp://127.0.0.1")
    with pytest.raises(ValueError, match=r"AWS_ENDPOINT_URL_S3='ftp://127.0.0.1' is no address"):
        storage.resolve("s3://bucket/folder")
