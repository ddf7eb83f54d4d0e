"""Performs what the commit protocol asks for: on a real store, with a real source."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.names import MARKER_NAME, PROBE_PREFIX
from checkpoint_operator.api.uris import TargetURI, bad_segment
from checkpoint_operator.storage import commit, marker
from checkpoint_operator.storage.backend import UploadRequest
from checkpoint_operator.storage.commit import Found
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.manifest import FileTable, content_digest
from checkpoint_operator.storage.marker import Marker, Seen
from checkpoint_operator.storage.meter import Meter
from checkpoint_operator.storage.parallel import for_each
from checkpoint_operator.storage.source import Listing, SourceTree
from checkpoint_operator.storage.store import Entry, ObjectStore, Upload
from checkpoint_operator.storage.transfer import FILES_AT_ONCE, STREAMS, Transfer

MAX_OBJECT_BYTES = 5 << 40  # what every S3 takes; with 10,000 parts it also bounds a part, and so our memory

Outcome = TypeVar("Outcome")


def marker_key(place: TargetURI) -> str:
    return f"{place.path}/{MARKER_NAME}"


def read_marker(store: ObjectStore, place: TargetURI) -> Seen | None:
    found = store.read(marker_key(place))
    return marker.decode(*found, str(place)) if found else None


class Source:
    """The source, opened and scanned at first use: after a commit it may be gone, and nobody needs it any more."""

    def __init__(self, request: UploadRequest) -> None:
        self._tree = request.source_tree()
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

    def __enter__(self) -> "Source":
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


class Driver:
    """Answers the requests of :mod:`checkpoint_operator.storage.commit` with a real store and a real source.

    ``writable`` gives the store to write with, and is told whether some object will be completed from several parts.
    """

    def __init__(
        self,
        store: ObjectStore,
        place: TargetURI,
        uid: str,
        source: Source | None,
        request: UploadRequest | None,
        writable: Callable[[bool], ObjectStore],
    ) -> None:
        self._store = store
        self._place = place
        self._prefix = f"{place.path}/"
        self._uid = uid
        self._source = source
        self._request = request
        self._writable = writable
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
                return read_marker(self._store, self._place)
            case commit.CreateMarker(new):
                data = marker.encode(new)
                return _written(new, data, self._store.create(marker_key(self._place), data))
            case commit.SwapMarker(seen, new):
                data = marker.encode(new)
                return _written(new, data, self._store.swap(marker_key(self._place), seen.token, data))
            case commit.RemoveMarker(seen):
                self._store.remove(marker_key(self._place), seen.token)
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
                # The first one by itself: it may be the one that tells how this store is to be asked.
                self._remove_all(objects[:1])
                self._remove_all(objects[1:])
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

    def _remove_all(self, objects: Sequence[Found]) -> None:
        """Several at once, in no order: one after the other, 10,000 files would take as many round trips."""
        for_each(
            lambda found: self._store.remove(self._prefix + found.path, found.token),
            objects,
            workers=max(1, min(STREAMS, len(objects))),
            name="remove",
        )

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
        self._store = self._writable(any(file.size > self._store.part_size(file.size) for file in listing.files))
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
