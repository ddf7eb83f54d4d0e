"""A second S3 server, stricter than the first: other limits of parts and names, and AWS's own permissions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_world import BUCKET, S3World, world_on

import local_cluster as lc

READER = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{BUCKET}/*"},
        {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": f"arn:aws:s3:::{BUCKET}"},
    ],
}


@pytest.fixture(scope="session")
def versitygw() -> Iterator[lc.VersityGW]:
    with lc.start_versitygw("versitygw") as gateway:
        client = gateway.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        gateway.add_user("reader", READER)
        yield gateway


@pytest.fixture
def versitygw_world(versitygw: lc.VersityGW, tmp_path: Path) -> Iterator[S3World]:
    with world_on("versitygw", versitygw, tmp_path) as world:
        yield world
