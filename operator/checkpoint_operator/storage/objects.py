"""Artifacts in an object store: drives the commit protocol against any :class:`ObjectStore`."""

import secrets
import threading
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.names import MARKER_NAME, PROBE_PREFIX
from checkpoint_operator.api.protocol import Layout, Stored
from checkpoint_operator.api.uris import TargetURI, bad_segment
from checkpoint_operator.storage import commit, marker
from checkpoint_operator.storage.backend import DeleteRequest, OnProgress, UploadRequest
from checkpoint_operator.storage.commit import Claimant, Found
from checkpoint_operator.storage.download import download
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.listing import read_in_order
from checkpoint_operator.storage.manifest import FileTable, StoredFile, content_digest
from checkpoint_operator.storage.marker import Manifest, Marker, Seen
from checkpoint_operator.storage.meter import Meter
from checkpoint_operator.storage.ranges import Fetch
from checkpoint_operator.storage.source import Listing, SourceTree
from checkpoint_operator.storage.store import Buffer, Entry, ObjectStore, Upload
from checkpoint_operator.storage.transfer import FILES_AT_ONCE, STREAMS, Transfer
from checkpoint_operator.storage.verify import Held, verify

MAX_OBJECT_BYTES = 5 << 40  # what every S3 takes; with 10,000 parts it also bounds a part, and so our memory

OpenStore = Callable[[TargetURI], ObjectStore]
Outcome = TypeVar("Outcome")


class ObjectStoreBackend:
    """A :class:`StorageBackend` over any store that has conditional writes (or, for layout Unique, over any store).

    ``now`` gives the time of a commit; ``open_store`` connects to the bucket that a URI names.
    """

    def __init__(self, open_store: OpenStore, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._open_store = open_store
        self._now = now
        self._honours: dict[tuple[str, str], bool] = {}

    def upload_artifact(self, request: UploadRequest) -> Stored:
        store = self._open_store(request.uri)
        with _Source(request) as source:
            uid = request.uid or derive_uid(request.uri, source.listing.fingerprint)
            if request.layout is Layout.UNIQUE:
                return self._upload_unique(store, request, source, uid)
            return self._upload_at(store, request, source, uid, request.uri, unique=False)

    def _upload_unique(self, store: ObjectStore, request: UploadRequest, source: "_Source", uid: str) -> Stored:
        """Nobody else uses the place, so that even a store without conditions is safe behind the fence."""
        places = list(_unique_places(store, request.uri, uid))
        for place in places:
            seen = _read_marker(store, place)
            if seen and isinstance(seen.marker, Manifest) and seen.marker.artifact_uid == uid:
                return _stored(commit.Committed(seen, seen.marker, owner=True), place)
        here = unique_place(request.uri, uid, source.listing.fingerprint)
        stored = self._upload_at(store, request, source, uid, here, unique=True)
        # What earlier attempts left of another state of the source, now that the checkpoint is safe. It is no reason to
        # fail any more: without force their mover may be running still, and the artifact's deletion finds the places too.
        for place in places:
            if place != here and request.force:
                with suppress(StorageError):
                    self._delete_at(store, place, DeleteRequest(place, uid, Layout.UNIQUE, keep_committed=True, force=True))
        return stored

    def _upload_at(
        self,
        store: ObjectStore,
        request: UploadRequest,
        source: "_Source",
        uid: str,
        place: TargetURI,
        *,
        unique: bool,
    ) -> Stored:
        def writable() -> ObjectStore:
            request.on_write()
            return self._conditional(store, place, unique=unique)

        driver = _Driver(store, place, uid, source, request, writable)
        metadata = request.metadata.replace(
            artifact_id=request.metadata.artifact_id or uid, created_at=request.metadata.created_at or self._now()
        )
        who = Claimant(uid, metadata, marker.new_claim_id, earlier_mover_gone=request.force)
        return _stored(driver.run(commit.upload(who, str(place))), place)

    def _conditional(self, store: ObjectStore, place: TargetURI, *, unique: bool) -> ObjectStore:
        """The store to write with. Asked before the first write, once for each bucket."""
        known = (place.scheme, place.bucket)
        if known not in self._honours:
            self._honours[known] = store.honours_conditions(f"{place.path}/{PROBE_PREFIX}{secrets.token_hex(8)}")
        if self._honours[known]:
            return store
        if unique:
            return store.without_conditions()
        raise StorageError(
            Reason.CONDITIONAL_WRITES_UNSUPPORTED,
            "the store ignores If-None-Match or If-Match, so that two writers could mix their files: use layout Unique",
            uri=str(place),
        )

    def download_artifact(
        self,
        uri: TargetURI,
        destination: Path,
        progress: OnProgress | None = None,
        cancelled: threading.Event | None = None,
    ) -> ArtifactMetadata:
        manifest = self.get_manifest(uri)
        download(manifest, self._fetch_from(uri), destination, Meter(progress), cancelled)
        return manifest.metadata

    def verify_artifact(
        self,
        uri: TargetURI,
        manifest_digest: str | None = None,
        progress: OnProgress | None = None,
        cancelled: threading.Event | None = None,
    ) -> Manifest:
        store = self._open_store(uri)
        seen = _read_marker(store, uri)
        manifest = require_manifest(seen, uri)
        assert seen is not None
        prefix = f"{uri.path}/"
        held = Held(replace(entry, key=entry.key.removeprefix(prefix)) for entry in store.list(prefix))
        verify(manifest, seen.digest, manifest_digest, held, self._fetch_from(uri), Meter(progress), cancelled)
        return manifest

    def _fetch_from(self, uri: TargetURI) -> Fetch:
        store = self._open_store(uri)

        def fetch(file: StoredFile, start: int, length: int) -> Buffer:
            return store.fetch(f"{uri.path}/{file.path}", file.token, start, length)

        return fetch

    def delete_artifact(self, request: DeleteRequest) -> str:
        store = self._open_store(request.uri)
        places: Iterable[TargetURI] = [request.uri]
        try:
            if request.layout is Layout.UNIQUE and request.uid:
                places = list(_unique_places(store, request.uri, request.uid))
            said = [self._delete_at(store, place, request) for place in places]
        except StorageError as error:
            if error.reason is Reason.BUCKET_NOT_FOUND:
                return "nothing is left there: the bucket does not exist"
            raise
        return "; ".join(said) or "nothing is left there"

    def _delete_at(self, store: ObjectStore, place: TargetURI, request: DeleteRequest) -> str:
        uid, force = request.uid, request.force
        try:
            seen = _read_marker(store, place)
        except marker.ForeignMarker:
            return "left alone: the .metadata.json there was not written by this software"
        if uid is None:
            if seen is None:
                return "nothing is left there"
            uid = seen.marker.artifact_uid
            # Nobody else is writing below a manifest; only what was never committed may have a mover at work.
            force = force or isinstance(seen.marker, Manifest)
        who = Claimant(uid, ArtifactMetadata(), marker.new_claim_id, earlier_mover_gone=force)
        if request.layout is Layout.UNIQUE:
            store = self._conditional(store, place, unique=True)
        driver = _Driver(store, place, uid, None, None, lambda: store)
        return driver.run(commit.delete(who, str(place), keep_committed=request.keep_committed)).message

    def list_artifacts(
        self, uri: TargetURI, artifact_type: str | None = None, prefix: str = ""
    ) -> Iterator[ArtifactMetadata]:
        store = self._open_store(uri)

        def read(entry: Entry) -> ArtifactMetadata | None:
            place = TargetURI(uri.scheme, uri.bucket, entry.key.removesuffix(f"/{MARKER_NAME}"))
            try:
                seen = _read_listed(store, place, entry)
            except StorageError as error:
                if error.reason is not Reason.TARGET_NOT_EMPTY:
                    raise
                return None  # somebody else's .metadata.json
            if not (seen and isinstance(seen.marker, Manifest)):
                return None
            metadata = seen.marker.metadata
            return metadata.replace(storage_path=str(place)) if artifact_type in (None, metadata.artifact_type) else None

        entries = store.list((f"{uri.path}/" if uri.path else "") + prefix)
        return read_in_order((entry for entry in entries if entry.key.endswith(f"/{MARKER_NAME}")), read)

    def get_metadata(self, uri: TargetURI) -> ArtifactMetadata:
        return self.get_manifest(uri).metadata

    def get_manifest(self, uri: TargetURI) -> Manifest:
        return require_manifest(_read_marker(self._open_store(uri), uri), uri)


def require_manifest(seen: Seen | None, uri: TargetURI) -> Manifest:
    """The manifest behind a marker.

    Raises:
        StorageError: NotFound, which says what is there instead.
    """
    if seen and isinstance(seen.marker, Manifest):
        return seen.marker
    what = f"one is {seen.marker.state.lower()} there" if seen else "nothing is there"
    raise StorageError(Reason.NOT_FOUND, f"no committed checkpoint at {uri}: {what}", uri=str(uri))


def derive_uid(uri: TargetURI, fingerprint: str) -> str:
    """The uid of an artifact that has none (library use), so that a second run finds the claim of the first."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{uri}#{fingerprint}"))


def unique_place(uri: TargetURI, uid: str, fingerprint: str) -> TargetURI:
    """Where layout Unique puts one state of one artifact's source."""
    return uri.child(f"{uid}-{fingerprint.removeprefix('sha256:')[:16]}")


def _unique_places(store: ObjectStore, uri: TargetURI, uid: str) -> Iterable[TargetURI]:
    start = f"{uri.path}/{uid}-"
    for entry in store.list(start):
        folder, _, name = entry.key.rpartition("/")
        if name == MARKER_NAME and "/" not in folder.removeprefix(start):
            yield TargetURI(uri.scheme, uri.bucket, folder)


def _marker_key(place: TargetURI) -> str:
    return f"{place.path}/{MARKER_NAME}"


def _read_marker(store: ObjectStore, place: TargetURI) -> Seen | None:
    found = store.read(_marker_key(place))
    return marker.decode(*found, str(place)) if found else None


def _read_listed(store: ObjectStore, place: TargetURI, entry: Entry) -> Seen | None:
    """A marker that was just listed, by the short way of the data; one that has changed since is looked at anew."""
    if entry.size > marker.MAX_BYTES:
        raise marker.too_large(entry.size, str(place))
    if not entry.size:  # there is no range of no bytes, and no marker of none
        return _read_marker(store, place)
    try:
        return marker.decode(bytes(store.fetch(entry.key, entry.token, 0, entry.size)), entry.token, str(place))
    except StorageError as error:
        if error.reason is not Reason.INTEGRITY_MISMATCH:
            raise
        return _read_marker(store, place)


def stored_at(place: TargetURI, manifest: Manifest, digest: str, *, owner: bool) -> Stored:
    """What a committed checkpoint is, for whoever asked; ``digest`` is that of the manifest's bytes."""
    return Stored(
        storage_uri=str(place),
        size_bytes=manifest.table.size,
        file_count=len(manifest.table.files),
        manifest_digest=digest,
        content_digest=manifest.content_digest,
        data_owner=owner,
    )


def _stored(committed: commit.Committed, place: TargetURI) -> Stored:
    return stored_at(place, committed.manifest, committed.seen.digest, owner=committed.owner)


class _Source:
    """The source, opened and scanned at first use: after a commit it may be gone, and nobody needs it any more."""

    def __init__(self, request: UploadRequest) -> None:
        self._tree = SourceTree(request.root, request.path, request.selection, request.cancelled)
        self._opened = False
        self._listing: Listing | None = None

    @property
    def tree(self) -> SourceTree:
        if not self._opened:
            self._tree.__enter__()
            self._opened = True
        return self._tree

    @property
    def listing(self) -> Listing:
        """What the first look saw; one run stores one state of the source."""
        if self._listing is None:
            self._listing = self.tree.scan()
        return self._listing

    def check_unchanged(self) -> None:
        if self.tree.scan().fingerprint != self.listing.fingerprint:
            raise StorageError(
                Reason.SOURCE_CHANGED,
                "files were added, removed or written while the checkpoint was stored: create the artifact only after it "
                "is saved",
            )

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *_: object) -> None:
        if self._opened:
            self._tree.__exit__()


def _by_key(uploads: Iterable[Upload]) -> dict[str, list[Upload]]:
    found: dict[str, list[Upload]] = {}
    for upload in uploads:
        found.setdefault(upload.key, []).append(upload)
    return found


def _written(new: Marker, data: bytes, token: str | None) -> Seen | None:
    return Seen(new, token, marker.digest(data)) if token else None


class _Driver:
    """Answers the requests of :mod:`checkpoint_operator.storage.commit` with a real store and a real source."""

    def __init__(
        self,
        store: ObjectStore,
        place: TargetURI,
        uid: str,
        source: _Source | None,
        request: UploadRequest | None,
        conditional: Callable[[], ObjectStore],
    ) -> None:
        self._store = store
        self._place = place
        self._prefix = f"{place.path}/"
        self._uid = uid
        self._source = source
        self._request = request
        self._conditional = conditional
        self._found: dict[str, int] | None = None
        self._nested: tuple[str, ...] = ()

    def run(self, steps: Generator[commit.Request, object, Outcome]) -> Outcome:
        """Drive a protocol to its end; errors are raised inside it, so that it may clean up."""
        try:
            request = next(steps)
            while True:
                try:
                    answer = self._perform(request)
                except Exception as error:
                    request = steps.throw(error)
                else:
                    request = steps.send(answer)
        except StopIteration as stop:
            outcome: Outcome = stop.value
            return outcome

    def _perform(self, request: commit.Request) -> object:
        match request:
            case commit.ReadMarker():
                return _read_marker(self._store, self._place)
            case commit.CreateMarker(new):
                data = marker.encode(new)
                return _written(new, data, self._store.create(_marker_key(self._place), data))
            case commit.SwapMarker(seen, new):
                data = marker.encode(new)
                return _written(new, data, self._store.swap(_marker_key(self._place), seen.token, data))
            case commit.RemoveMarker(seen):
                self._store.remove(_marker_key(self._place), seen.token)
            case commit.ListObjects():
                return self._list_objects()
            case commit.ScanSource():
                return self._scan()
            case commit.HashSource():
                return content_digest(self._transfer().hash_all())
            case commit.PutObjects():
                return self._put_objects()
            case commit.Verify(table):
                return self._verify(table)
            case commit.RemoveObjects(objects):
                self._found = None  # that listing is history
                for found in objects:
                    # The names may come from a manifest, and so from whoever can write to the bucket.
                    if any(bad_segment(part) for part in found.path.split("/")):
                        raise StorageError(
                            Reason.UNSUPPORTED_NAME, f"the manifest lists {found.path!r}: nothing is removed by that name"
                        )
                    self._store.remove(self._prefix + found.path, found.token)
            case commit.AbortUploads():
                self._abort_uploads()
        return None

    def _entries(self, expected: Callable[[str, Entry], bool] = lambda *_: False) -> dict[str, tuple[int, str]]:
        """Path → (size, token) of every data object: no marker, no probes, nothing that belongs to a nested artifact.

        What is ``expected`` is left out at once: of a folder of 50,000 files nobody needs a second list.
        """
        listed = ((entry.key.removeprefix(self._prefix), entry) for entry in self._store.list(self._prefix))
        entries = {path: entry for path, entry in listed if not expected(path, entry)}
        nested = tuple(
            path.removesuffix(MARKER_NAME) for path in entries if path.endswith(f"/{MARKER_NAME}") and path != MARKER_NAME
        )
        self._nested = nested
        return {
            path: (entry.size, entry.token)
            for path, entry in entries.items()
            if path and path != MARKER_NAME and not path.startswith(PROBE_PREFIX) and not path.startswith(nested)
        }

    def _uploads(self) -> Iterator[Upload]:
        """Unfinished uploads of this artifact. Those of a nested one are somebody else's, and may be running."""
        nested = tuple(self._prefix + folder for folder in self._nested)
        return (upload for upload in self._store.list_uploads(self._prefix) if not upload.key.startswith(nested))

    def _abort_uploads(self) -> None:
        self._entries()  # says what is nested
        for upload in self._uploads():
            self._store.abort_upload(upload.key, upload.id)

    def _list_objects(self) -> tuple[Found, ...]:
        entries = self._entries()
        self._found = {path: size for path, (size, _) in entries.items()}
        return tuple(found for path in entries if (found := self._look(path)))

    def _look(self, path: str) -> Found | None:
        stat = self._store.stat(self._prefix + path)
        return Found(path, stat.size, stat.token, stat.owner) if stat else None

    def _scan(self) -> str:
        assert self._source is not None
        listing = self._source.listing
        for file in listing.files:
            if problem := self._store.refusal(self._prefix + file.path):
                raise StorageError(
                    Reason.UNSUPPORTED_NAME,
                    f"the name '{file.path}' {problem}: rename or exclude the file, or use another target.uri",
                    path=file.path,
                )
            if file.size > MAX_OBJECT_BYTES:
                raise StorageError(
                    Reason.SOURCE_UNSUPPORTED,
                    f"'{file.path}' has {file.size} bytes, a store allows {MAX_OBJECT_BYTES} (5 TiB): exclude it",
                    path=file.path,
                )
        self._refuse_nested()
        # The last moment before the first write.
        self._store = self._conditional()
        return listing.fingerprint

    def _refuse_nested(self) -> None:
        """Another artifact may lie below this place; none of our files may come to lie inside it."""
        assert self._source is not None
        for file in self._source.listing.files:
            inside = next((folder for folder in self._nested if file.path.startswith(folder)), None)
            if inside:
                raise StorageError(
                    Reason.TARGET_NOT_EMPTY,
                    f"'{file.path}' would lie inside another checkpoint, at '{inside}': choose another URI",
                    uri=str(self._place),
                    path=file.path,
                )

    def _transfer(self) -> Transfer:
        assert self._source is not None
        assert self._request is not None
        request, source = self._request, self._source
        return Transfer(
            self._store,
            self._prefix,
            source.tree,
            source.listing,
            self._uid,
            Meter(request.progress),
            request.cancelled,
            keep_parts=request.keep_parts,
            files_at_once=FILES_AT_ONCE,
            streams=STREAMS,
        )

    def _put_objects(self) -> commit.Put:
        transfer = self._transfer()
        if self._found is not None:
            # A fresh claim comes right after a listing; nothing was begun under it yet.
            transfer.existing = self._found
            self._found = None
            return transfer.put_all()
        transfer.existing = {path: size for path, (size, _) in self._entries().items()}
        self._refuse_nested()
        uploads = list(self._uploads())
        transfer.unfinished = _by_key(uploads)
        put = transfer.put_all()
        if self._request and self._request.force:
            # Whoever began them is gone, and what was of use in them was taken over.
            for upload in uploads:
                self._store.abort_upload(upload.key, upload.id)
        return put

    def _verify(self, table: FileTable) -> tuple[Found, ...]:
        """One listing: every version that a confirmed write (or a compared checksum) named must still be there."""
        assert self._source is not None
        self._source.check_unchanged()
        missing = {file.path: file for file in table.files}

        def confirms(path: str, entry: Entry) -> bool:
            file = missing.get(path)
            if file is None or (file.size, file.token) != (entry.size, entry.token):
                return False
            del missing[path]
            return True

        entries = self._entries(confirms)
        for file in missing.values():
            raise StorageError(
                Reason.INTEGRITY_MISMATCH,
                f"'{file.path}' was written as {file.token} ({file.size} bytes), the store now lists "
                f"{entries.get(file.path, 'nothing')}",
                uri=str(self._place),
                path=file.path,
            )
        return tuple(found for path in entries if (found := self._look(path)))
