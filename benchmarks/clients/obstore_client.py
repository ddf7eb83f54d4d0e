"""obstore (Rust's object_store): ``upload|download ENDPOINT BUCKET PREFIX FOLDER``.

Upload: ``put`` with its defaults (multipart above 5 MiB, 12 parts at once). It has no download to a file: ranges of 16 MiB,
8 at once, written in place. Small files: 64 at once.
"""

import asyncio
import os
import sys
from pathlib import Path

import obstore
from obstore.store import S3Store

MARKER = ".metadata.json"
RANGE = 16 << 20

direction, endpoint, bucket, prefix, folder = sys.argv[1:]
store = S3Store(bucket, endpoint=endpoint, client_options={"allow_http": endpoint.startswith("http:")})
files = asyncio.Semaphore(64)
ranges = asyncio.Semaphore(8)


async def upload(path: Path) -> None:
    async with files:
        await obstore.put_async(store, f"{prefix}/{path.name}", path)


async def download(key: str, size: int) -> None:
    async with files:
        descriptor = os.open(os.path.join(folder, os.path.basename(key)), os.O_WRONLY | os.O_CREAT)
        try:
            if size <= RANGE:
                os.write(descriptor, await (await obstore.get_async(store, key)).bytes_async())
            else:
                await asyncio.gather(
                    *(fetch(descriptor, key, start, min(RANGE, size - start)) for start in range(0, size, RANGE))
                )
        finally:
            os.close(descriptor)


async def fetch(descriptor: int, key: str, start: int, length: int) -> None:
    async with ranges:
        body = await obstore.get_range_async(store, key, start=start, length=length)
    os.pwrite(descriptor, body, start)


async def upload_all(paths: list[Path]) -> None:
    await asyncio.gather(*(upload(path) for path in paths))


async def download_all() -> None:
    found = [item for page in obstore.list(store, f"{prefix}/") for item in page]
    await asyncio.gather(*(download(item["path"], item["size"]) for item in found if not item["path"].endswith(MARKER)))


asyncio.run(upload_all(list(Path(folder).iterdir())) if direction == "upload" else download_all())
# Its runtime's threads outlive the interpreter, which now and then ended with SIGABRT after all the work was done.
os._exit(0)
