"""Create the buckets named on the command line unless they exist; compose.yaml runs it once.

    python create_buckets.py BUCKET ...

The endpoint and the credentials come from AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY.
"""

from __future__ import annotations

import sys

import boto3


def main(names: list[str]) -> int:
    """Create what is missing; anything else that goes wrong is the client's error, unchanged."""
    client = boto3.client("s3")
    existing = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for name in names:
        if name not in existing:
            client.create_bucket(Bucket=name)
        print(f"bucket {name}: {'there' if name in existing else 'created'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
