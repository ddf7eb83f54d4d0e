"""boto3's own transfer layer (what ``upload_file`` and the aws CLI use): ``upload|download ENDPOINT BUCKET PREFIX FOLDER``.

Defaults: 10 threads, parts of 8 MiB, CRC32 trailers. One transfer manager for all files, as the aws CLI does it, because
``upload_file`` for each would start and end its threads for each.
"""

import os
import sys
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config

MARKER = ".metadata.json"

direction, endpoint, bucket, prefix, folder = sys.argv[1:]
client = boto3.client(
    "s3", endpoint_url=endpoint, config=Config(s3={"addressing_style": "path"}, proxies={}, max_pool_connections=20)
)
with create_transfer_manager(client, TransferConfig(preferred_transfer_client="classic")) as manager:
    if direction == "upload":
        futures = [manager.upload(str(path), bucket, f"{prefix}/{path.name}") for path in Path(folder).iterdir()]
    else:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        keys = [item["Key"] for page in pages for item in page["Contents"] if not item["Key"].endswith(MARKER)]
        futures = [manager.download(bucket, key, os.path.join(folder, os.path.basename(key))) for key in keys]
    for future in futures:
        future.result()
