"""Artifacts in a folder of a mounted volume: staged beside the target, committed by one rename(2).

A folder needs no marker states: ``.partial-<uid>`` beside the target is the claim (its flock says whether the writer
lives), the manifest is written inside it, and rename(2) refuses a target that is not empty. A deletion first renames the
manifest to ``.metadata.deleting.json``, so that the artifact is invisible before its first byte goes.
"""

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.names import MARKER_NAME
from checkpoint_operator.api.protocol import Layout, Stage, Stored
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage import marker
from checkpoint_operator.storage.backend import DeleteRequest, Report, UploadRequest
from checkpoint_operator.storage.download import check_names, download
from checkpoint_operator.storage.errors import Cancelled, StorageError
from checkpoint_operator.storage.folders import (
    DIRECTORY,
    make_below,
    make_link,
    open_file,
    open_in,
    opened_below,
    remove_except,
    sync_folders,
    unlink_below,
    write_all,
    write_durably,
)
from checkpoint_operator.storage.manifest import FileTable, StoredFile, content_digest
from checkpoint_operator.storage.marker import DELETING_NAME, ForeignMarker, Manifest, Seen
from checkpoint_operator.storage.objects import derive_uid, require_manifest, stored_at, unique_place
from checkpoint_operator.storage.source import OpenFile, SourceFile, SourceTree
from checkpoint_operator.storage.transfer import Meter

PARTIAL = ".partial-"
CHUNK = 4 << 20

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
            tree = stack.enter_context(SourceTree(request.root, request.path, request.selection, request.cancelled))
            listing = tree.scan()
            uid = request.uid or derive_uid(request.uri, listing.fingerprint)
            place = request.uri
            if request.layout is Layout.UNIQUE:
                place = unique_place(request.uri, uid, listing.fingerprint)
            parent, name = self._parent(stack, place, tree)
            seen = _read_marker(parent, name, place)
            if seen is not None:
                return _judge(seen, uid, lambda: content_digest(_hash_all(tree, listing.files, request)), place)
            request.on_write()
            staging = stack.enter_context(_staging(parent, uid, place))
            table = FileTable(
                files=_copy_all(tree, listing.files, staging, request),
                links=list(listing.links),
                empty_directories=list(listing.empty_directories),
            )
            if tree.scan().fingerprint != listing.fingerprint:
                raise StorageError(
                    Reason.SOURCE_CHANGED, "files were added, removed or written while the checkpoint was stored"
                )
            for path in table.empty_directories:
                os.close(make_below(staging, path))
            for link in table.links:
                make_link(staging, link.path, link.target)
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
            try:
                os.rename(PARTIAL + uid, name, src_dir_fd=parent, dst_dir_fd=parent)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                seen = _read_marker(parent, name, place)
                if seen is None:
                    raise
                return _judge(seen, uid, lambda: manifest.content_digest, place)
            os.fsync(parent)
            return stored_at(place, manifest, marker.digest(data), owner=True)

    def _committed_before(self, uri: TargetURI, uid: str, layout: Layout) -> Stored | None:
        for place in self._places(uri, uid, layout):
            with suppress(FileNotFoundError, NotADirectoryError), ExitStack() as stack:
                parent, name = self._existing_parent(stack, place)
                seen = _read_marker(parent, name, place)
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

    def download_artifact(self, uri: TargetURI, destination: Path, report: Report | None = None) -> ArtifactMetadata:
        manifest = self.get_manifest(uri)
        with ExitStack() as stack, _errors(uri, "download"):
            folder = open_in(stack, self._root, uri.path)

            def fetch(file: StoredFile, start: int, length: int) -> bytes:
                try:
                    with open_file(folder, file.path, os.O_RDONLY) as descriptor:
                        status = os.fstat(descriptor)
                        if status.st_size == file.size and stat.S_ISREG(status.st_mode):
                            scanned = SourceFile(file.path, status.st_size, status.st_mtime_ns, status.st_ino, 0)
                            return OpenFile(scanned, descriptor).read(start, length)
                        what = f"has {status.st_size} bytes, the manifest lists {file.size}"
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                        raise
                    what = f"was replaced or removed: {error.strerror}"
                raise StorageError(Reason.INTEGRITY_MISMATCH, f"'{file.path}' at {uri} {what}", uri=str(uri), path=file.path)

            download(manifest, fetch, destination, Meter(report))
        return manifest.metadata

    def delete_artifact(self, request: DeleteRequest) -> str:
        said = []
        with _errors(request.uri, "delete"):
            for place in self._places(request.uri, request.uid or "", request.layout):
                with suppress(FileNotFoundError, NotADirectoryError), ExitStack() as stack:
                    parent, name = self._existing_parent(stack, place)
                    if request.uid:
                        _remove_staging(parent, request.uid, place)
                    said.append(_delete(parent, name, place, request))
            if request.layout is Layout.UNIQUE and request.uid:
                with suppress(FileNotFoundError, NotADirectoryError), ExitStack() as stack:
                    _remove_staging(open_in(stack, self._root, request.uri.path), request.uid, request.uri)
        return "; ".join(said) or "nothing is left there"

    def list_artifacts(self, prefix: TargetURI, artifact_type: str | None = None) -> Iterator[ArtifactMetadata]:
        base = os.path.join(self._root, prefix.path)
        for folder, folders, files in os.walk(base):
            folders[:] = sorted(name for name in folders if not name.startswith(PARTIAL))
            if MARKER_NAME not in files:
                continue
            path = os.path.relpath(folder, self._root)
            try:
                metadata = self.get_metadata(TargetURI(prefix.scheme, "", path))
            except StorageError as error:
                if error.reason not in (Reason.NOT_FOUND, Reason.TARGET_NOT_EMPTY):
                    raise
                continue  # gone by now, or somebody else's .metadata.json
            if artifact_type in (None, metadata.artifact_type):
                yield metadata

    def get_metadata(self, uri: TargetURI) -> ArtifactMetadata:
        return self.get_manifest(uri).metadata

    def get_manifest(self, uri: TargetURI) -> Manifest:
        with _errors(uri, "get manifest"), ExitStack() as stack:
            try:
                folder = open_in(stack, self._root, uri.path)
            except (FileNotFoundError, NotADirectoryError):
                return require_manifest(None, uri)
            return require_manifest(_read_manifest(folder, MARKER_NAME, uri), uri)

    def _parent(self, stack: ExitStack, place: TargetURI, tree: SourceTree) -> tuple[int, str]:
        """The open folder that the target lies in (made if need be), and the target's name."""
        folder = open_in(stack, self._root, "")
        *parents, name = place.path.split("/")
        for segment in parents:
            _refuse_inside_source(folder, tree, place)
            folder = make_below(folder, segment)
            stack.callback(os.close, folder)
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


def _read_marker(parent: int, name: str, place: TargetURI) -> Seen | None:
    """What lies at the target; None where nothing does (an empty folder is nothing).

    Raises:
        StorageError: TargetNotEmpty, or TargetBusy where a deletion is under way.
    """
    with ExitStack() as stack:
        try:
            folder = os.open(name, DIRECTORY, dir_fd=parent)
        except FileNotFoundError:
            return None
        except (NotADirectoryError, OSError) as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise _not_empty(place, "a file or a symlink is there") from error
        stack.callback(os.close, folder)
        names = os.listdir(folder)
        if DELETING_NAME in names:
            raise StorageError(Reason.TARGET_BUSY, "a checkpoint is being removed there", uri=str(place))
        if names and MARKER_NAME not in names:
            raise _not_empty(place, "the folder is not empty")
        return _read_manifest(folder, MARKER_NAME, place) if names else None


def _not_empty(place: TargetURI, what: str) -> StorageError:
    return StorageError(Reason.TARGET_NOT_EMPTY, f"{what} and belongs to no checkpoint: choose another URI", uri=str(place))


def _read_manifest(folder: int, name: str, place: TargetURI) -> Seen | None:
    try:
        with open_file(folder, name, os.O_RDONLY) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
            if (size := os.fstat(descriptor).st_size) > marker.MAX_BYTES:
                raise marker.too_large(size, str(place))
            return marker.decode(file.read(), "", str(place))
    except FileNotFoundError:
        return None


@contextmanager
def _staging(parent: int, uid: str, place: TargetURI) -> Iterator[int]:
    """The locked staging folder of an artifact; an earlier attempt's is taken over."""
    with suppress(FileExistsError):
        os.mkdir(PARTIAL + uid, 0o777, dir_fd=parent)
    folder = os.open(PARTIAL + uid, DIRECTORY, dir_fd=parent)
    try:
        _lock_staging(parent, folder, uid, place)
        with suppress(FileNotFoundError):
            # A manifest of an earlier attempt describes that attempt's files.
            os.unlink(MARKER_NAME, dir_fd=folder)
        yield folder
    finally:
        os.close(folder)


def _lock(folder: int, place: TargetURI) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StorageError(
            Reason.TARGET_BUSY, "another process is writing or removing this artifact right now", uri=str(place)
        ) from error


def _lock_staging(parent: int, folder: int, uid: str, place: TargetURI) -> None:
    """Lock a staging folder that still is one: between our open and our lock its last holder may have committed it."""
    _lock(folder, place)
    try:
        current = os.stat(PARTIAL + uid, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        current = None
    if current is None or not os.path.samestat(current, os.fstat(folder)):
        raise StorageError(Reason.TARGET_BUSY, "another process has just finished this artifact", uri=str(place))


def _copy_all(tree: SourceTree, files: tuple[SourceFile, ...], staging: int, request: UploadRequest) -> list[StoredFile]:
    meter = Meter(request.report)
    meter.start(Stage.UPLOADING, len(files), sum(file.size for file in files))
    remove_except(staging, {file.path for file in files})
    stored = []
    for file in files:
        with tree.open(file) as source:
            digest = _copy(source, staging, request, meter)
        stored.append(StoredFile(path=file.path, size=file.size, sha256=digest, mode=file.mode, mtime_ns=file.mtime_ns))
        meter.add(0, files=1)
    meter.stage(Stage.VERIFYING)
    for one in stored:
        with open_file(staging, one.path, os.O_RDONLY) as descriptor:
            if (size := os.fstat(descriptor).st_size) != one.size:
                raise StorageError(Reason.INTEGRITY_MISMATCH, f"'{one.path}' has {size} bytes after {one.size} were written")
    return stored


def _copy(source: OpenFile, staging: int, request: UploadRequest, meter: Meter) -> str:
    """Copy one file durably; what an earlier attempt left is rewritten only where it differs."""
    file, digest = source.file, hashlib.sha256()
    parent, _, _ = file.path.rpartition("/")
    os.close(make_below(staging, parent))
    with open_file(staging, file.path, os.O_RDWR | os.O_CREAT, 0o666) as target:
        for offset in range(0, file.size, CHUNK):
            if request.cancelled.is_set():
                raise Cancelled
            body = source.read(offset, min(CHUNK, file.size - offset))
            digest.update(body)
            if os.pread(target, len(body), offset) != body:
                write_all(target, body, offset)
            meter.add(len(body))
        os.ftruncate(target, file.size)
        source.check_unchanged()
        os.utime(target, ns=(file.mtime_ns, file.mtime_ns))
        os.fsync(target)
    return digest.hexdigest()


def _hash_all(tree: SourceTree, files: tuple[SourceFile, ...], request: UploadRequest) -> FileTable:
    listing, stored = tree.scan(), []
    for file in files:
        digest = hashlib.sha256()
        with tree.open(file) as source:
            for offset in range(0, file.size, CHUNK):
                if request.cancelled.is_set():
                    raise Cancelled
                digest.update(source.read(offset, min(CHUNK, file.size - offset)))
            source.check_unchanged()
        stored.append(StoredFile(path=file.path, size=file.size, sha256=digest.hexdigest()))
    return FileTable(files=stored, links=list(listing.links), empty_directories=list(listing.empty_directories))


def _delete(parent: int, name: str, place: TargetURI, request: DeleteRequest) -> str:
    with ExitStack() as stack:
        folder = os.open(name, DIRECTORY, dir_fd=parent)
        stack.callback(os.close, folder)
        _lock(folder, place)
        try:
            seen = _read_manifest(folder, DELETING_NAME, place)
            visible = _read_manifest(folder, MARKER_NAME, place) if seen is None else None
        except ForeignMarker:
            return "left alone: the .metadata.json there was not written by this software"
        found = seen or visible
        if found is None or not isinstance(found.marker, Manifest):
            return "nothing is left there"
        manifest = found.marker
        if request.uid and manifest.artifact_uid != request.uid:
            return f"left alone: it belongs to artifact {manifest.artifact_uid}"
        check_names(manifest)
        if visible is not None:
            if request.keep_committed:
                return "the committed checkpoint was kept (deletionPolicy: Retain)"
            os.rename(MARKER_NAME, DELETING_NAME, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        table = manifest.table
        for path in (*(file.path for file in table.files), *(link.path for link in table.links)):
            unlink_below(folder, path)
        for path in _folders_of(table):
            above, _, last = path.rpartition("/")
            with suppress(OSError), opened_below(folder, above) as directory:
                os.rmdir(last, dir_fd=directory)
        # Last: without it nobody knows what else is ours, and folders that are left would block the place for ever.
        os.unlink(DELETING_NAME, dir_fd=folder)
        with suppress(OSError):
            os.rmdir(name, dir_fd=parent)
        return "nothing is left there"


def _folders_of(table: FileTable) -> list[str]:
    """Every folder that the table implies, deepest first."""
    folders: set[str] = set()
    for path in (
        *table.empty_directories,
        *(os.path.dirname(file.path) for file in table.files),
        *(os.path.dirname(link.path) for link in table.links),
    ):
        while path:
            folders.add(path)
            path = os.path.dirname(path)
    return sorted(folders, key=lambda path: (-path.count("/"), path))


def _remove_staging(parent: int, uid: str, place: TargetURI) -> None:
    with suppress(FileNotFoundError), ExitStack() as stack:
        folder = os.open(PARTIAL + uid, DIRECTORY, dir_fd=parent)
        stack.callback(os.close, folder)
        _lock_staging(parent, folder, uid, place)
        remove_except(folder, set())
        os.rmdir(PARTIAL + uid, dir_fd=parent)


@contextmanager
def _errors(uri: TargetURI, operation: str) -> Iterator[None]:
    """Turn the errors of the target's file system into ours; those of the source are StorageErrors already."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, Reason.REQUEST_REJECTED)
        raise StorageError(
            reason, f"{operation} at {uri} failed: {error.strerror}", uri=str(uri), backend="file", operation=operation
        ) from error
