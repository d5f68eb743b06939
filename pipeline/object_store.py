"""Object stores: S3 as pyarrow opens it with settings that survive a store having a bad day.

Everything comes from the environment every AWS tool reads (AWS_ENDPOINT_URL_S3,
AWS_ACCESS_KEY_ID, ...), so no secret is ever part of a config, a log or an artifact. Surprising:
of pyarrow's ways to write, only unbuffered opening with background writes is safe. With
`background_writes=False` a part that fails leaves the parts before it as a whole object, with
`allow_delayed_open=True` a refused upload leaves an empty one (pyarrow 25; tests/pipeline/
test_s3_storage.py looks).
"""

from __future__ import annotations

import functools
import os
import re
from urllib.parse import unquote

from pyarrow import fs

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 20.0
"""A request that has moved no byte for so long is given up (pyarrow's own: 3 s)."""
SDK_RETRIES = 4
"""Of one request, with pauses of 25 ms, doubled each time; `storage.with_retries` comes after."""
CREDENTIALS_HELP = (
    "credentials come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (and "
    "AWS_SESSION_TOKEN), AWS_REGION, for stores other than Amazon's AWS_ENDPOINT_URL_S3"
)
_BUCKET_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss")
_SECRET_SETTING = re.compile(r"key|secret|token|password|sig=", re.IGNORECASE)
_REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|"
    r"UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION_TOKEN|INVALID_SIGNATURE|HTTP status 40[13]"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|Bucket '[^']*' not found")


def check_uri(uri: str) -> None:
    """Refuse URIs with credentials or settings in them; the message repeats nothing of them.

    Raises:
        ValueError: a user or password before the host, or of s3 a query.
    """
    scheme, _, rest = uri.partition("://")
    authority, query = re.split("[/?#]", rest, maxsplit=1)[0], rest.partition("?")[2]
    # hdfs://host:port and abfs://container@account are no secrets; a key may hold a slash.
    user = authority.rpartition("@")[0]
    is_secret = ":" in user or (scheme in _BUCKET_SCHEMES and ":" in authority)
    if is_secret or (scheme == "s3" and user) or _SECRET_SETTING.search(query):
        raise ValueError(
            f"a {scheme}:// URI here holds credentials, which would end up in configs and logs; "
            f"write {scheme}://bucket/folder alone; {CREDENTIALS_HELP}"
        )
    if scheme == "s3" and query:
        raise ValueError(
            f"'{uri}' holds settings of the store after its ?; leave them out: {CREDENTIALS_HELP}"
        )


def open_s3(uri: str) -> tuple[fs.S3FileSystem, str]:
    """File system of an s3:// URI, and the path in it: bucket/key.

    Raises:
        ValueError: no bucket, or credentials in the URI.
    """
    check_uri(uri)
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ValueError(f"'{uri}' names no bucket; use s3://bucket/folder")
    path = f"{bucket}/{unquote(key)}".rstrip("/")
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return _connect(bucket, tuple(sorted(settings.items()))), path


@functools.lru_cache(maxsize=32)
def _connect(bucket: str, environment: tuple[tuple[str, str], ...]) -> fs.S3FileSystem:
    """One client a bucket and environment: the region is looked up once."""
    settings = dict(environment)
    # pyarrow reads these in `from_uri` only, which takes no time-outs.
    endpoint = settings.get("AWS_ENDPOINT_URL_S3") or settings.get("AWS_ENDPOINT_URL") or ""
    region = settings.get("AWS_REGION") or settings.get("AWS_DEFAULT_REGION")
    options: dict[str, object] = {}
    if endpoint:
        scheme, separator, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
        if separator and scheme not in ("http", "https"):
            raise ValueError(
                f"AWS_ENDPOINT_URL_S3='{endpoint}' is no address; use http://host:port or https://"
            )
        region = region or "us-east-1"
    else:
        region = _region_of(bucket) or region
    if settings.get("AWS_CA_BUNDLE"):
        options["tls_ca_file_path"] = settings["AWS_CA_BUNDLE"]
    return fs.S3FileSystem(
        region=region,
        connect_timeout=CONNECT_TIMEOUT_S,
        # Its documentation says it is ignored on Linux; there it is how long may pass without a
        # byte, and without it three seconds.
        request_timeout=SILENCE_TIMEOUT_S,
        # Not the standard one: its quota of retries is used up in a bad hour, after which a file
        # of many parts never arrives. The number it is given is of retries, too.
        retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=SDK_RETRIES),
        background_writes=True,
        **options,
    )


def _region_of(bucket: str) -> str | None:
    """Where Amazon keeps a bucket; None when it does not say."""
    try:
        return str(fs.resolve_s3_region(bucket))
    except (OSError, ValueError):
        return None


def refusal(error: BaseException) -> str | None:
    """What to do about an error no retry can mend: no rights, no bucket; None for others."""
    text = str(error)
    if _NO_BUCKET.search(text):
        return "the bucket does not exist; create it, or correct its name"
    if _REFUSED.search(text):
        return f"the store refuses access; {CREDENTIALS_HELP}"
    return None
