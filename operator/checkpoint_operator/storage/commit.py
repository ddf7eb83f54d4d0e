"""The commit protocol: the one place where a half-written folder is kept from ever being called a checkpoint.

**Invariant I**: a Committed manifest means that every byte it lists is durable and right, for whoever plays by the
marker (:mod:`checkpoint_operator.storage.marker`). Outside writers and lifecycle rules of the bucket are out of scope.

The protocol is written as generators that *yield* what the store should do next and receive what it answered. They do
no I/O: :mod:`checkpoint_operator.storage.driver` drives them against a real store, and ``tests/unit/test_commit.py``
walks all interleavings of several of them, killed and revived at every step. The rules, in the order of the code:

1. Read the marker before the source, and claim before the first byte.
2. Data objects are create-only. An uploader never overwrites; a joiner (who found the claim of an earlier mover of the
   same artifact) never removes: meeting an object that does not match, it first swaps the claim.
3. **The fence**: a claim swap, a deletion, and going on with a deletion start only when the earlier mover of the artifact
   is confirmed gone (``Claimant.earlier_mover_gone``). Without it the invariant breaks; the test shows how.
4. A removal names the version that it means, from the manifest or from a listing made after the swap; after such a
   listing the marker is read again, and only if it is still ours anything is removed.
5. Commit is one swap of the claim that was read at the start. A zombie's commit fails.

What is left: a killed mover's DELETE that arrives late, where identical content has been stored again in the meantime.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.manifest import FileTable, content_digest
from checkpoint_operator.storage.marker import Deleting, Manifest, Marker, Seen, Uploading

MAX_ROUNDS = 16
"""How often a marker may change under one mover before it gives up as TargetBusy."""

# ---- What the generators ask for. One request is atomic towards the marker; PutObjects is atomic for each object.


@dataclass(frozen=True)
class ReadMarker:
    """Answer: the :class:`Seen` marker, or None."""


@dataclass(frozen=True)
class CreateMarker:
    """Create if absent. Answer: it as :class:`Seen`, or None where it was not created or the reply was lost."""

    marker: Marker


@dataclass(frozen=True)
class SwapMarker:
    """Replace exactly the version that was seen. Answer: as for :class:`CreateMarker`."""

    seen: Seen
    marker: Marker


@dataclass(frozen=True)
class RemoveMarker:
    """Remove exactly the version that was seen. Answer: ignored; what matters is the next read."""

    seen: Seen


@dataclass(frozen=True)
class Found:
    """An object below the prefix. ``owner`` is the uid that its writer attached, None where there is none."""

    path: str
    size: int
    token: str
    owner: str | None


@dataclass(frozen=True)
class ListObjects:
    """Answer: every :class:`Found` data object; neither marker nor probes, and nothing below a nested marker."""


@dataclass(frozen=True)
class ScanSource:
    """Answer: the source's fingerprint, as it is now."""


@dataclass(frozen=True)
class HashSource:
    """Read the whole source. Answer: its content digest."""


@dataclass(frozen=True)
class PutObjects:
    """Create every object of the source that is not there with the same content. Answer: :class:`Put`."""


@dataclass(frozen=True)
class Put:
    """``table`` is what the store confirmed; ``mismatched`` what was there with other content: then nothing is committed."""

    table: FileTable
    mismatched: tuple[Found, ...] = ()


@dataclass(frozen=True)
class Verify:
    """Ask the store what it holds now. Answer: objects that no line of the table explains (a zombie's, a stranger's).

    Raises IntegrityMismatch when a line is not confirmed, SourceChanged when the source is no longer what was scanned.
    """

    table: FileTable


@dataclass(frozen=True)
class RemoveObjects:
    """Remove these versions; one that is gone or different is left alone. Answer: None."""

    objects: Sequence[Found]


@dataclass(frozen=True)
class AbortUploads:
    """Abort every unfinished multipart upload below the prefix: the claim holder owns them. Answer: None."""


# ---- What comes out.


@dataclass(frozen=True)
class Committed:
    """The place holds this checkpoint. ``owner`` is False where another artifact committed the same content."""

    seen: Seen
    manifest: Manifest
    owner: bool


@dataclass(frozen=True)
class Removed:
    """The outcome of a deletion: True when data was (or had been) removed, else why it was left."""

    removed: bool
    message: str


Request = (
    ReadMarker
    | CreateMarker
    | SwapMarker
    | RemoveMarker
    | ListObjects
    | ScanSource
    | HashSource
    | PutObjects
    | Verify
    | RemoveObjects
    | AbortUploads
)
# The answers' types depend on the request; the generators unpack each with the type that the request documents.
Steps = Generator[Request, object, Committed]
Removal = Generator[Request, object, Removed]
Look = Generator[Request, object, Seen | None]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Claimant:
    """Who acts: an artifact, and whether it is known that no earlier mover of it is running."""

    uid: str
    metadata: ArtifactMetadata
    new_claim: Callable[[], str]
    earlier_mover_gone: bool = False


def upload(who: Claimant, uri: str) -> Steps:
    """Store the source and commit it. See the module for the rules.

    Raises:
        StorageError: TargetNotEmpty, TargetExists, TargetBusy, EarlierMoverNotGone; and what the driver raises.
    """
    seen = yield from _read()
    for _ in range(MAX_ROUNDS):
        if seen is None:
            seen = yield from _claim(who, uri)
        elif seen.marker.artifact_uid != who.uid:
            return (yield from _share(seen, uri))
        elif isinstance(seen.marker, Manifest):
            return Committed(seen, seen.marker, owner=True)
        elif isinstance(seen.marker, Deleting):
            seen = yield from _mark_deleting(who, seen, seen.marker.previous, uri)
        else:
            seen = yield from _fill(who, seen, seen.marker, uri)
    raise _busy(uri, "the marker there keeps changing")


def _claim(who: Claimant, uri: str) -> Look:
    if found := (yield from _list()):
        # Somebody may have claimed the place since our look, and these be theirs. What lay there before and after a moment
        # without a marker is nobody's.
        now = yield from _read()
        if now is not None or not set(found) & set((yield from _list())):
            return now
        raise StorageError(
            Reason.TARGET_NOT_EMPTY,
            "there are objects at the target that belong to no checkpoint: choose another URI",
            uri=uri,
        )
    fingerprint = yield from _ask(ScanSource(), str)
    claim = Uploading(artifact_uid=who.uid, claim_id=who.new_claim(), source_fingerprint=fingerprint)
    return (yield from _change(CreateMarker(claim)))


def _fill(who: Claimant, seen: Seen, claim: Uploading, uri: str) -> Look:
    """Go on under our own claim: new, or of an earlier mover of this artifact whom we join."""
    fingerprint = yield from _ask(ScanSource(), str)
    if claim.source_fingerprint != fingerprint:
        # An earlier attempt was storing another state of the source: it must not commit any more.
        return (yield from _swap_claim(who, seen, fingerprint, uri))
    put = yield from _ask(PutObjects(), Put)
    unexplained = put.mismatched
    if not unexplained:
        unexplained = yield from _ask(Verify(put.table), tuple)
    if unexplained:
        return (yield from _clean(who, seen, fingerprint, unexplained, uri))
    manifest = Manifest(
        artifact_uid=who.uid,
        claim_id=claim.claim_id,
        source_fingerprint=fingerprint,
        content_digest=content_digest(put.table),
        metadata=who.metadata.replace(size_bytes=put.table.size, storage_path=uri),
        table=put.table,
    )
    return (yield from _change(SwapMarker(seen, manifest)))


def _swap_claim(who: Claimant, seen: Seen, fingerprint: str, uri: str) -> Look:
    """Replace our claim by a fresh one, behind the fence, so that an earlier mover can no longer commit."""
    _fence(who, uri)
    fresh = Uploading(artifact_uid=who.uid, claim_id=who.new_claim(), source_fingerprint=fingerprint)
    now = yield from _change(SwapMarker(seen, fresh))
    if now is not None and now.marker == fresh:
        yield AbortUploads()
    return now


def _clean(who: Claimant, seen: Seen, fingerprint: str, unexplained: Sequence[Found], uri: str) -> Look:
    """Remove what is ours and does not match, or fail for what is not ours."""
    for found in unexplained:
        if found.owner != who.uid:
            raise StorageError(
                Reason.TARGET_NOT_EMPTY,
                f"'{found.path}' appeared at the target, written by somebody else: choose another URI",
                uri=uri,
                path=found.path,
            )
    now = yield from _swap_claim(who, seen, fingerprint, uri)
    if now is None or now.marker == seen.marker or not isinstance(now.marker, Uploading):
        return now
    # From a listing made after the swap: what was seen before it may have been stored again by somebody else.
    doomed = [found for found in (yield from _list()) if found in unexplained]
    if doomed:
        again = yield from _read()
        if again != now:
            return again
        yield RemoveObjects(doomed)
    return now


def _share(seen: Seen, uri: str) -> Steps:
    """The place belongs to another artifact: the same content is success, anything else is not."""
    marker = seen.marker
    if not isinstance(marker, Manifest):
        raise _busy(
            uri,
            f"artifact {marker.artifact_uid} is {marker.state.lower()} there; if it is gone for good, remove "
            "the place with the library: delete(uri, force=True)",
        )
    digest = yield from _ask(HashSource(), str)
    if digest != marker.content_digest:
        raise StorageError(
            Reason.TARGET_EXISTS,
            f"artifact {marker.artifact_uid} has committed another checkpoint there: choose another URI",
            uri=uri,
        )
    # Hashing took its time, and the owner may have been deleted meanwhile.
    if (yield from _read()) != seen:
        raise _busy(uri, "the checkpoint there is being replaced")
    return Committed(seen, marker, owner=False)


def delete(who: Claimant, uri: str, *, keep_committed: bool) -> Removal:
    """Remove what the artifact has stored. Nothing there, or somebody else's, is success: level-based, like all else.

    ``keep_committed`` (policy Retain) removes only what was never committed.

    Raises:
        StorageError: EarlierMoverNotGone; TargetBusy when the marker keeps changing.
    """
    seen = yield from _read()
    for _ in range(MAX_ROUNDS):
        if seen is None:
            return Removed(True, "nothing is left there")
        marker = seen.marker
        if marker.artifact_uid != who.uid:
            return Removed(False, f"left alone: it belongs to artifact {marker.artifact_uid}")
        if isinstance(marker, Manifest) and keep_committed:
            return Removed(False, "the committed checkpoint was kept (deletionPolicy: Retain)")
        previous = marker.previous if isinstance(marker, Deleting) else marker
        seen = yield from _mark_deleting(who, seen, previous, uri)
    raise _busy(uri, "the marker there keeps changing")


def _mark_deleting(who: Claimant, seen: Seen, previous: Uploading | Manifest, uri: str) -> Look:
    """Swap to Deleting and go on from there. A deletion that was left half way is claimed anew as well: the last request
    of its killed mover, which removes the marker, must not open the place while this one still removes data."""
    _fence(who, uri)
    deleting = Deleting(artifact_uid=who.uid, claim_id=who.new_claim(), previous=previous)
    now = yield from _change(SwapMarker(seen, deleting))
    if now is None or now.marker != deleting:
        return now
    return (yield from _finish_deletion(who, now, deleting))


def _finish_deletion(who: Claimant, seen: Seen, marker: Deleting) -> Look:
    """Remove the data, then the marker. What is gone already is left out by itself."""
    # Also below a manifest: an attempt before the one that committed may have been killed in the middle of a file.
    yield AbortUploads()
    if isinstance(marker.previous, Manifest):
        files = marker.previous.table.files
        yield RemoveObjects([Found(file.path, file.size, file.token, who.uid) for file in files])
    else:
        doomed = [found for found in (yield from _list()) if found.owner == who.uid]
        if doomed:
            again = yield from _read()
            if again != seen:
                return again
            yield RemoveObjects(doomed)
    yield RemoveMarker(seen)
    return (yield from _read())


def _fence(who: Claimant, uri: str) -> None:
    if not who.earlier_mover_gone:
        raise StorageError(
            Reason.EARLIER_MOVER_NOT_GONE,
            "an earlier mover of this artifact left something behind and may still be running: in the library pass "
            "force=True once it is certainly gone",
            uri=uri,
        )


def _busy(uri: str, what: str) -> StorageError:
    return StorageError(Reason.TARGET_BUSY, f"{what}; tried again later", uri=uri)


def _ask(request: Request, kind: type[Answer]) -> Generator[Request, object, Answer]:
    """Yield one request and check that the driver answered with the documented type."""
    answer = yield request
    if not isinstance(answer, kind):
        raise TypeError(f"{type(request).__name__} was answered with {type(answer).__name__}")
    return answer


def _read() -> Look:
    answer = yield ReadMarker()
    if answer is not None and not isinstance(answer, Seen):
        raise TypeError(f"ReadMarker was answered with {type(answer).__name__}")
    return answer


def _change(request: CreateMarker | SwapMarker) -> Look:
    """What the marker is after an attempt to change it; after a lost race, or a lost reply, only a read can tell."""
    answer = yield request
    return answer if isinstance(answer, Seen) else (yield from _read())


def _list() -> Generator[Request, object, tuple[Found, ...]]:
    return (yield from _ask(ListObjects(), tuple))
