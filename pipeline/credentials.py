"""Keeps passwords out of what a run writes: they belong into the environment, never into a URI.

Surprising: a URI with a password is refused rather than cleaned, because its configuration travels
to MLflow, checkpoints, logs and Ray before anybody has a chance to clean it.
"""

from __future__ import annotations

import re

_USER_INFO = re.compile(r"(?<=://)[^/@:\s]*:(?!\d+/)[^@\s]*@(?=[^/\s])")
_HIDDEN = "***@"
_WAYS = {
    "http": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "postgresql": "PGUSER and PGPASSWORD",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}


def require_no_password(key: str, uri: str) -> None:
    """A ValueError for a URI that holds a password; does not repeat it.

    Args:
        key: the setting.
        uri: a path or URI.
    """
    if not _USER_INFO.search(uri):
        return
    scheme = uri.split(":", 1)[0].split("+", 1)[0].removesuffix("s")
    way = _WAYS.get(scheme, _WAYS.get(f"{scheme}s", "environment variables of that service"))
    raise ValueError(
        f"{key}='{without_passwords(uri)}' held a password, which would be written into the run's "
        f"files and to MLflow; take it out, and set {way} where the job runs"
    )


def without_passwords(text: str) -> str:
    """The text with user and password of every URI hidden."""
    return _USER_INFO.sub(_HIDDEN, text)
