"""Artifacts in a folder of a mounted volume: staged beside the target, committed by one rename(2).

A folder needs no marker states: ``.partial-<uid>`` beside the target is the claim (its flock says whether the writer
lives), the manifest is written inside it, and rename(2) refuses a target that is not empty. A deletion first renames the
manifest to ``.metadata.deleting.json``, so that the artifact is invisible before its first byte goes.
"""

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.names import MARKER_NAME
from checkpoint_operator.api.protocol import Layout, Stored
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage import marker
from checkpoint_operator.storage.backend import DeleteRequest, OnProgress, UploadRequest
from checkpoint_operator.storage.download import download
from checkpoint_operator.storage.errors import Cancelled, StorageError
from checkpoint_operator.storage.folders import (
    hold,
    make_below,
    make_link,
    open_directory_in,
    open_in,
    sync_folders,
    unlink_below,
    write_durably,
)
from checkpoint_operator.storage.listing import read_in_order
from checkpoint_operator.storage.manifest import FileTable, StoredFile, content_digest
from checkpoint_operator.storage.marker import Manifest, Seen
from checkpoint_operator.storage.meter import Meter
from checkpoint_operator.storage.objects import derive_uid, require_manifest, stored_at, unique_place
from checkpoint_operator.storage.parallel import for_each
from checkpoint_operator.storage.source import Listing, SourceFile, SourceTree
from checkpoint_operator.storage.staging import CHUNK, JOURNAL, WORKERS, stage_all
from checkpoint_operator.storage.verify import verify
from checkpoint_operator.storage.volume import (
    NOTHING_LEFT,
    PARTIAL,
    busy,
    contents,
    empty_staging,
    read_manifest,
    read_marker,
    read_range,
    remove,
    remove_staging,
)

_REASONS = {
    errno.EACCES: Reason.CREDENTIALS_REFUSED,
    errno.EPERM: Reason.CREDENTIALS_REFUSED,
    errno.EROFS: Reason.CREDENTIALS_REFUSED,
    errno.ENOSPC: Reason.STORE_UNAVAILABLE,
    errno.EDQUOT: Reason.STORE_UNAVAILABLE,
    errno.EIO: Reason.STORE_UNAVAILABLE,
    errno.ESTALE: Reason.STORE_UNAVAILABLE,
    errno.ENAMETOOLONG: Reason.UNSUPPORTED_NAME,
}
_WAYS_OUT = {
    errno.ENOSPC: "make room on the volume, what was stored so far is kept for the next attempt",
    errno.EDQUOT: "make room or raise the quota, what was stored so far is kept for the next attempt",
    errno.EROFS: "mount the volume writable",
}


class LocalStorageBackend:
    """A :class:`StorageBackend` below one folder; ``file:///a/b`` is ``<root>/a/b``. No symlink below it is followed."""

    def __init__(self, root: str | Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._root = str(root)
        self._now = now

    def upload_artifact(self, request: UploadRequest) -> Stored:
        with ExitStack() as stack, _errors(request.uri, "upload"):
            # The marker is read before the source: what is committed may have been rotated away there.
            if request.uid and (done := self._committed_before(request.uri, request.uid, request.layout)):
                return done
            tree = stack.enter_context(request.source_tree())
            listing = tree.scan()
            uid = request.uid or derive_uid(request.uri, listing.fingerprint)
            place = request.uri
            if request.layout is Layout.UNIQUE:
                place = unique_place(request.uri, uid, listing.fingerprint)
            parent, name = self._parent(stack, place, tree)
            seen = read_marker(parent, name, place)
            if seen is not None:
                return _judge(seen, uid, lambda: content_digest(_hash_all(tree, listing.files, request)), place)
            request.on_write()
            staging = stack.enter_context(_staging(parent, uid, place, keep=request.keep_parts))
            table = _fill(staging, tree, listing, request)
            manifest = Manifest(
                artifact_uid=uid,
                claim_id=marker.new_claim_id(),
                source_fingerprint=listing.fingerprint,
                content_digest=content_digest(table),
                metadata=request.metadata.replace(
                    artifact_id=request.metadata.artifact_id or uid,
                    created_at=request.metadata.created_at or self._now(),
                    size_bytes=table.size,
                    storage_path=str(place),
                ),
                table=table,
            )
            data = marker.encode(manifest)
            write_durably(staging, MARKER_NAME, data)
            sync_folders(staging)
            # As late as can be: without it a next attempt copies everything again.
            unlink_below(staging, JOURNAL)
            os.fsync(staging)
            try:
                os.rename(PARTIAL + uid, name, src_dir_fd=parent, dst_dir_fd=parent)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                seen = read_marker(parent, name, place)
                if seen is None:
                    raise
                # The place is decided: nobody will come back for this copy.
                empty_staging(parent, uid, staging)
                return _judge(seen, uid, lambda: manifest.content_digest, place)
            os.fsync(parent)
            return stored_at(place, manifest, marker.digest(data), owner=True)

    def _committed_before(self, uri: TargetURI, uid: str, layout: Layout) -> Stored | None:
        for place in self._places(uri, uid, layout):
            with suppress(FileNotFoundError, NotADirectoryError), ExitStack() as stack:
                parent, name = self._existing_parent(stack, place)
                seen = read_marker(parent, name, place)
                if seen and isinstance(seen.marker, Manifest) and seen.marker.artifact_uid == uid:
                    return stored_at(place, seen.marker, seen.digest, owner=True)
        return None

    def _places(self, uri: TargetURI, uid: str, layout: Layout) -> list[TargetURI]:
        if layout is Layout.PLAIN:
            return [uri]
        with suppress(FileNotFoundError, NotADirectoryError), ExitStack() as stack:
            folder = open_in(stack, self._root, uri.path)
            return [uri.child(name) for name in sorted(os.listdir(folder)) if name.startswith(f"{uid}-")]
        return []

    def download_artifact(
        self,
        uri: TargetURI,
        destination: Path,
        progress: OnProgress | None = None,
        cancelled: threading.Event | None = None,
    ) -> ArtifactMetadata:
        manifest, _, folder, stack = self._opened(uri, "download")
        with stack:
            download(manifest, partial(read_range, folder), destination, Meter(progress), cancelled)
        return manifest.metadata

    def verify_artifact(
        self,
        uri: TargetURI,
        manifest_digest: str | None = None,
        progress: OnProgress | None = None,
        cancelled: threading.Event | None = None,
    ) -> Manifest:
        manifest, seen, folder, stack = self._opened(uri, "verify")
        with stack, _errors(uri, "verify"):
            verify(
                manifest,
                seen.digest,
                manifest_digest,
                contents(folder),
                partial(read_range, folder),
                Meter(progress),
                cancelled,
            )
        return manifest

    def delete_artifact(self, request: DeleteRequest) -> str:
        said = []
        with _errors(request.uri, "delete"):
            for place in self._places(request.uri, request.uid or "", request.layout):
                with suppress(FileNotFoundError, NotADirectoryError), ExitStack() as stack:
                    parent, name = self._existing_parent(stack, place)
                    if request.uid:
                        remove_staging(parent, request.uid, place)
                    said.append(remove(parent, name, place, request))
            if request.layout is Layout.UNIQUE and request.uid:
                with suppress(FileNotFoundError, NotADirectoryError), ExitStack() as stack:
                    remove_staging(open_in(stack, self._root, request.uri.path), request.uid, request.uri)
        return "; ".join(said) or NOTHING_LEFT

    def list_artifacts(
        self, uri: TargetURI, artifact_type: str | None = None, prefix: str = ""
    ) -> Iterator[ArtifactMetadata]:
        def read(place: TargetURI) -> ArtifactMetadata | None:
            try:
                metadata = self.get_metadata(place)
            except StorageError as error:
                if error.reason not in (Reason.NOT_FOUND, Reason.TARGET_NOT_EMPTY):
                    raise
                return None  # gone by now, or somebody else's .metadata.json
            return metadata.replace(storage_path=str(place)) if artifact_type in (None, metadata.artifact_type) else None

        return read_in_order(self._marked(uri, prefix), read)

    def _marked(self, uri: TargetURI, prefix: str) -> Iterator[TargetURI]:
        """Folders with a marker, in the order of the walk; those that cannot begin with the prefix are not entered."""
        top = os.path.join(self._root, uri.path)
        for folder, folders, files in os.walk(top):
            below = "" if folder == top else f"{os.path.relpath(folder, top)}/"
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(PARTIAL)
                and (f"{below}{name}/".startswith(prefix) or prefix.startswith(f"{below}{name}/"))
            )
            path = os.path.relpath(folder, self._root)
            if MARKER_NAME in files and below.startswith(prefix) and path != ".":
                yield TargetURI(uri.scheme, "", path)

    def get_metadata(self, uri: TargetURI) -> ArtifactMetadata:
        return self.get_manifest(uri).metadata

    def get_manifest(self, uri: TargetURI) -> Manifest:
        manifest, _, _, stack = self._opened(uri, "get manifest")
        stack.close()
        return manifest

    def _opened(self, uri: TargetURI, operation: str) -> tuple[Manifest, Seen, int, ExitStack]:
        """A committed artifact: its manifest, its marker, its open folder, and the stack that closes the folder."""
        with _errors(uri, operation), ExitStack() as stack:
            try:
                folder = open_in(stack, self._root, uri.path)
                seen = read_manifest(folder, MARKER_NAME, uri)
            except (FileNotFoundError, NotADirectoryError):
                seen = None
            manifest = require_manifest(seen, uri)
            assert seen is not None
            return manifest, seen, folder, stack.pop_all()

    def _parent(self, stack: ExitStack, place: TargetURI, tree: SourceTree) -> tuple[int, str]:
        """The open folder that the target lies in (made if need be), and the target's name."""
        folder = open_in(stack, self._root, "")
        *parents, name = place.path.split("/")
        for segment in parents:
            _refuse_inside_source(folder, tree, place)
            folder = hold(stack, make_below(folder, segment))
        _refuse_inside_source(folder, tree, place)
        return folder, name

    def _existing_parent(self, stack: ExitStack, place: TargetURI) -> tuple[int, str]:
        parents, _, name = place.path.rpartition("/")
        return open_in(stack, self._root, parents), name


def _refuse_inside_source(folder: int, tree: SourceTree, place: TargetURI) -> None:
    status = os.fstat(folder)
    if not tree.is_single_file and (status.st_dev, status.st_ino) == tree.identity():
        raise StorageError(
            Reason.INVALID_SPEC,
            f"target.uri '{place}' lies inside the source folder: choose a place outside of it",
            uri=str(place),
        )


def _judge(seen: Seen, uid: str, digest: Callable[[], str], place: TargetURI) -> Stored:
    """The target exists: ours, the same content, or another checkpoint."""
    manifest = seen.marker
    if not isinstance(manifest, Manifest):
        raise StorageError(Reason.TARGET_BUSY, "a checkpoint is being removed there", uri=str(place))
    if manifest.artifact_uid == uid or digest() == manifest.content_digest:
        return stored_at(place, manifest, seen.digest, owner=manifest.artifact_uid == uid)
    raise StorageError(
        Reason.TARGET_EXISTS,
        f"artifact {manifest.artifact_uid} has committed another checkpoint there: choose another URI",
        uri=str(place),
    )


@contextmanager
def _staging(parent: int, uid: str, place: TargetURI, *, keep: bool) -> Iterator[int]:
    """The locked staging folder of an artifact; an earlier attempt's is taken over.

    ``keep``: whether one that was cancelled leaves it for the next attempt.
    """
    with ExitStack() as stack:
        folder = open_directory_in(stack, parent, PARTIAL + uid)
        if folder is None:
            raise busy(place)
        with suppress(FileNotFoundError):
            # A manifest of an earlier attempt describes that attempt's files.
            os.unlink(MARKER_NAME, dir_fd=folder)
        try:
            yield folder
        except (Cancelled, KeyboardInterrupt):
            if not keep:
                empty_staging(parent, uid, folder)
            raise


def _fill(staging: int, tree: SourceTree, listing: Listing, request: UploadRequest) -> FileTable:
    """Copy a source into its staging folder; what it holds then."""
    files = stage_all(tree, listing.files, staging, request)
    if tree.scan().fingerprint != listing.fingerprint:
        raise StorageError(Reason.SOURCE_CHANGED, "files were added, removed or written while the checkpoint was stored")
    for path in listing.empty_directories:
        os.close(make_below(staging, path))
    for link in listing.links:
        make_link(staging, link.path, link.target)
    return FileTable(files=files, links=list(listing.links), empty_directories=list(listing.empty_directories))


def _hash_all(tree: SourceTree, files: tuple[SourceFile, ...], request: UploadRequest) -> FileTable:
    listing, digests = tree.scan(), {}

    def hash_one(file: SourceFile) -> None:
        digest = hashlib.sha256()
        with tree.open(file) as source:
            for offset in range(0, file.size, CHUNK):
                if request.cancelled.is_set():
                    raise Cancelled
                digest.update(source.read(offset, min(CHUNK, file.size - offset)))
            source.check_unchanged()
        digests[file.path] = digest.hexdigest()

    for_each(hash_one, files, workers=WORKERS, name="hash")
    return FileTable(
        files=[StoredFile(path=file.path, size=file.size, sha256=digests[file.path]) for file in files],
        links=list(listing.links),
        empty_directories=list(listing.empty_directories),
    )


@contextmanager
def _errors(uri: TargetURI, operation: str) -> Iterator[None]:
    """Turn the errors of the target's file system into ours; those of the source are StorageErrors already."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        way_out = f": {_WAYS_OUT[number]}" if number in _WAYS_OUT else ""
        raise StorageError(
            _REASONS.get(number, Reason.REQUEST_REJECTED),
            f"{operation} at {uri} failed: {error.strerror}{way_out}",
            uri=str(uri),
            backend="file",
            operation=operation,
        ) from error
