"""Where MLflow keeps a run's artifacts: what must be in order before a run starts.

Surprising: data and checkpoints on S3 go through pyarrow, artifacts through MLflow, which needs
boto3 for it. Both read the same environment.
"""

from __future__ import annotations

import importlib.util

from pipeline import storage


def check_artifact_root(root: str) -> None:
    """Refuse a place for artifacts that cannot be written from here.

    Args:
        root: `tracking.artifact_root`; nothing is checked of an empty one.

    Raises:
        ValueError: no client for it, credentials in the URI, or it cannot be written.
    """
    if "://" in root:
        storage.resolve(root)
        require_client(root)
        storage.check_writable(root, "tracking.artifact_root")


def require_client(location: str) -> None:
    """Refuse artifacts on S3 where boto3 is missing, instead of finding out at the first picture.

    Raises:
        ValueError: it is not installed.
    """
    if location.startswith("s3://") and importlib.util.find_spec("boto3") is None:
        raise ValueError(
            f"MLflow keeps the artifacts of this run in {location}, for which it needs boto3; "
            "pip install boto3 (or this project's extra: pip install '.[s3]') on every node"
        )
