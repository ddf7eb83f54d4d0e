"""Artifacts in an object store: drives the commit protocol against any :class:`ObjectStore`."""

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.names import MARKER_NAME
from checkpoint_operator.api.protocol import Layout, Stored
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage import commit, marker
from checkpoint_operator.storage.backend import DeleteRequest, OnProgress, UploadRequest
from checkpoint_operator.storage.commit import Claimant
from checkpoint_operator.storage.conditions import Conditions
from checkpoint_operator.storage.download import download
from checkpoint_operator.storage.driver import Driver, Source, read_marker
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.listing import read_in_order
from checkpoint_operator.storage.manifest import StoredFile
from checkpoint_operator.storage.marker import Manifest, Seen
from checkpoint_operator.storage.meter import Meter
from checkpoint_operator.storage.ranges import Fetch
from checkpoint_operator.storage.store import Arrived, Entry, ObjectStore
from checkpoint_operator.storage.verify import Held, verify

OpenStore = Callable[[TargetURI], ObjectStore]


class ObjectStoreBackend:
    """A :class:`StorageBackend` over any store that has conditional writes (or, for layout Unique, over any store).

    ``now`` gives the time of a commit; ``open_store`` connects to the bucket that a URI names.
    """

    def __init__(self, open_store: OpenStore, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._open_store = open_store
        self._now = now
        self._conditions = Conditions()

    def upload_artifact(self, request: UploadRequest) -> Stored:
        store = self._open_store(request.uri)
        with Source(request) as source:
            uid = request.uid or derive_uid(request.uri, source.listing.fingerprint)
            if request.layout is Layout.UNIQUE:
                return self._upload_unique(store, request, source, uid)
            return self._upload_at(store, request, source, uid, request.uri, unique=False)

    def _upload_unique(self, store: ObjectStore, request: UploadRequest, source: Source, uid: str) -> Stored:
        """Nobody else uses the place, so that even a store without conditions is safe behind the fence."""
        places = list(_unique_places(store, request.uri, uid))
        for place in places:
            seen = read_marker(store, place)
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
        source: Source,
        uid: str,
        place: TargetURI,
        *,
        unique: bool,
    ) -> Stored:
        def writable(in_parts: bool) -> ObjectStore:
            request.on_write()
            return self._conditions.store_for(store, place, in_parts=in_parts, unique=unique)

        driver = Driver(store, place, uid, source, request, writable)
        metadata = request.metadata.replace(
            artifact_id=request.metadata.artifact_id or uid, created_at=request.metadata.created_at or self._now()
        )
        who = Claimant(uid, metadata, marker.new_claim_id, earlier_mover_gone=request.force)
        return _stored(driver.run(commit.upload(who, str(place))), place)

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
        seen = read_marker(store, uri)
        manifest = require_manifest(seen, uri)
        assert seen is not None
        prefix = f"{uri.path}/"
        held = Held(replace(entry, key=entry.key.removeprefix(prefix)) for entry in store.list(prefix))
        verify(manifest, seen.digest, manifest_digest, held, self._fetch_from(uri), Meter(progress), cancelled)
        return manifest

    def _fetch_from(self, uri: TargetURI) -> Fetch:
        store = self._open_store(uri)

        def fetch(file: StoredFile, start: int, into: memoryview, arrived: Arrived) -> None:
            store.fetch(f"{uri.path}/{file.path}", file.token, start, into, arrived)

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
            seen = read_marker(store, place)
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
            store = self._conditions.store_for(store, place, in_parts=False, unique=True)
        driver = Driver(store, place, uid, None, None, lambda _: store)
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
        return require_manifest(read_marker(self._open_store(uri), uri), uri)


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


def _read_listed(store: ObjectStore, place: TargetURI, entry: Entry) -> Seen | None:
    """A marker that was just listed, by the short way of the data; one that has changed since is looked at anew."""
    if entry.size > marker.MAX_BYTES:
        raise marker.too_large(entry.size, str(place))
    if not entry.size:  # there is no range of no bytes, and no marker of none
        return read_marker(store, place)
    try:
        body = bytearray(entry.size)
        store.fetch(entry.key, entry.token, 0, memoryview(body))
        return marker.decode(bytes(body), entry.token, str(place))
    except StorageError as error:
        if error.reason is not Reason.INTEGRITY_MISMATCH:
            raise
        return read_marker(store, place)


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
