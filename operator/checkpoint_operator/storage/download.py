"""Puts a committed artifact back on a disk: whole and verified, or not at all.

Names in a manifest come from a store that others may write to, so each is checked before it becomes a path.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.names import MARKER_NAME
from checkpoint_operator.api.protocol import Stage
from checkpoint_operator.api.uris import bad_segment
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.manifest import StoredFile, link_problem
from checkpoint_operator.storage.marker import Manifest, encode
from checkpoint_operator.storage.transfer import DEFAULT_WORKERS, Meter

CHUNK = 8 << 20

Fetch = Callable[[StoredFile, int, int], bytes]
"""(file, start, length) → bytes of exactly the stored version."""


def download(manifest: Manifest, fetch: Fetch, destination: Path, meter: Meter) -> None:
    """Fetch every file of a manifest into ``destination``, which must not exist.

    The files are staged in ``<destination>.partial`` together with the manifest; a later call for the same manifest keeps
    what is right there. Memory: :data:`CHUNK` for each of the workers.

    Raises:
        StorageError: DestinationExists, IntegrityMismatch, UnsupportedName, RequestRejected where the disk refuses, and
            what ``fetch`` raises.
    """
    if os.path.lexists(destination):
        raise StorageError(
            Reason.DESTINATION_EXISTS, f"'{destination}' exists: download into a new folder", path=str(destination)
        )
    check_names(manifest)
    try:
        _download(manifest, fetch, destination, meter)
    except OSError as error:
        raise StorageError(
            Reason.REQUEST_REJECTED,
            f"writing to '{destination}' failed: {error.strerror}",
            operation="download",
            path=str(destination),
        ) from error


def _download(manifest: Manifest, fetch: Fetch, destination: Path, meter: Meter) -> None:
    staging = destination.with_name(destination.name + ".partial")
    _open_staging(staging, manifest)
    table = manifest.table
    meter.start(Stage.VERIFYING, len(table.files), table.size)
    for path in (*table.empty_directories, *(file.path for file in table.files)):
        parent = staging / path if path in table.empty_directories else (staging / path).parent
        parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(DEFAULT_WORKERS, thread_name_prefix="download") as pool:
        list(pool.map(lambda file: _fetch_file(file, fetch, staging, meter), table.files))
    for link in table.links:
        (staging / link.path).parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(staging / link.path):
            os.symlink(link.target, staging / link.path)
    (staging / MARKER_NAME).unlink()
    os.rename(staging, destination)


def check_names(manifest: Manifest) -> None:
    """Refuse a manifest whose names could lead out of the folder that they are put into, or removed from.

    Raises:
        StorageError: UnsupportedName.
    """
    table = manifest.table
    solid = [*(file.path for file in table.files), *(link.path for link in table.links)]
    for name in (*solid, *table.empty_directories):
        problem = next((problem for part in name.split("/") if (problem := bad_segment(part))), None)
        if problem is None and name == MARKER_NAME:
            problem = "the marker's own name"
        if problem:
            raise _refused(name, f"has {problem}")
    for link in table.links:
        if problem := link_problem(link.path, link.target):
            raise _refused(link.path, f"{problem} ({link.target!r})")
    taken = set(solid)
    if len(taken) < len(solid) or taken & set(table.empty_directories):
        raise _refused(MARKER_NAME, "names a path twice")
    for name in (*solid, *table.empty_directories):
        above = os.path.dirname(name)
        while above:
            if above in taken:
                raise _refused(name, f"lies below {above!r}, which is no folder")
            above = os.path.dirname(above)


def _refused(name: str, why: str) -> StorageError:
    return StorageError(Reason.UNSUPPORTED_NAME, f"the manifest lists {name!r}, which {why}: refused", path=name)


def _open_staging(staging: Path, manifest: Manifest) -> None:
    wanted = encode(manifest)
    try:
        staging.mkdir(parents=True)
    except FileExistsError:
        try:
            left = (staging / MARKER_NAME).read_bytes()
        except OSError as error:
            raise StorageError(
                Reason.DESTINATION_EXISTS,
                f"'{staging}' exists and is no download of ours: remove it, or choose another destination",
                path=str(staging),
            ) from error
        if left == wanted:
            return
        # Of another version of this artifact: ours, but useless.
        shutil.rmtree(staging)
        staging.mkdir()
    (staging / MARKER_NAME).write_bytes(wanted)


def _fetch_file(file: StoredFile, fetch: Fetch, staging: Path, meter: Meter) -> None:
    path = staging / file.path
    if path.is_file() and path.stat().st_size == file.size and _hash(path) == file.sha256:
        meter.add(file.size, files=1)
        return
    digest = hashlib.sha256()
    with path.open("wb") as target:
        for start in range(0, file.size, CHUNK):
            body = fetch(file, start, min(CHUNK, file.size - start))
            digest.update(body)
            target.write(body)
            meter.add(len(body))
    if digest.hexdigest() != file.sha256:
        raise StorageError(
            Reason.INTEGRITY_MISMATCH,
            f"'{file.path}' came back as sha256 {digest.hexdigest()}, the manifest says {file.sha256}",
            path=file.path,
        )
    if file.mode is not None:
        path.chmod(file.mode & 0o777)
    if file.mtime_ns is not None:
        os.utime(path, ns=(file.mtime_ns, file.mtime_ns))
    meter.add(0, files=1)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
