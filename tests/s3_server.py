"""A real S3 server in a process of its own on loopback: moto's, which knows multipart uploads."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

BUCKET = "vault"
START_TIMEOUT_S = 60.0
_READY = re.compile(r"Running on (http://127\.0\.0\.1:\d+)")
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret-8d1c",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",  # nobody else is asked for credentials
}


class S3Server:
    """A running server with one bucket."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = self.connect(**CREDENTIALS)
        self.client.create_bucket(Bucket=BUCKET)

    def connect(
        self,
        *,
        AWS_ACCESS_KEY_ID: str,
        AWS_SECRET_ACCESS_KEY: str,
        **_: str,
    ) -> Any:
        """A boto3 client, straight to the server."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=AWS_ACCESS_KEY_ID,
            aws_secret_access_key=AWS_SECRET_ACCESS_KEY,
            region_name="us-east-1",
        )

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Content of all objects below a prefix, by what follows it; no markers of folders."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {
            key.removeprefix(prefix).lstrip("/"): self.client.get_object(Bucket=BUCKET, Key=key)[
                "Body"
            ].read()
            for key in keys
            if not key.endswith("/")
        }

    def put_folder(self, folder: Path, prefix: str) -> str:
        """Upload all files of a folder; returns the URI."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                key = f"{prefix}/{file.relative_to(folder).as_posix()}"
                self.client.put_object(Bucket=BUCKET, Key=key, Body=file.read_bytes())
        return f"s3://{BUCKET}/{prefix}"


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start a server and stop it again; skips where moto is not installed."""
    pytest.importorskip("moto.server", reason="needs the S3 server of the `test` extra (moto)")
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **CREDENTIALS},
    )
    assert process.stderr is not None
    try:
        url = _address(process.stderr)
        # A full pipe would stop the server.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield S3Server(url)
    finally:
        process.terminate()
        process.wait(10)


def _address(log: IO[str]) -> str:
    lines = []
    for line in log:
        lines.append(line)
        if found := _READY.search(line):
            return found[1]
    raise AssertionError(f"the S3 server did not start: {''.join(lines)[-2000:]}")


def environment(url: str) -> dict[str, str]:
    """What a user sets for an S3 server of their own."""
    return {**CREDENTIALS, "AWS_ENDPOINT_URL_S3": url, "NO_PROXY": "127.0.0.1"}
