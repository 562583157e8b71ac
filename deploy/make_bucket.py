"""Make a bucket on S3-compatible storage where it is not there yet: `python make_bucket.py NAME`.

Reads what MLflow reads: MLFLOW_S3_ENDPOINT_URL and AWS_*.
"""

from __future__ import annotations

import os
import sys

import boto3
from botocore.exceptions import ClientError


def main() -> int:
    """Needs no right to list buckets: who may make one, and has it, is answered that it is there."""
    (name,) = sys.argv[1:]
    client = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL"))
    try:
        client.create_bucket(Bucket=name)
    except ClientError as error:
        if error.response["Error"]["Code"] != "BucketAlreadyOwnedByYou":
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
