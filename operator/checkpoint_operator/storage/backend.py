"""What every backend does, whatever it stands on; the conformance suite holds each of them to this page.

Call order and promises:

* ``upload_artifact`` returns only after the commit: then, and only then, the other calls see the artifact. Called again
  after any failure or kill, it goes on with what is there. It never overwrites: a place holds one artifact.
* ``download_artifact`` gives the whole artifact, verified, or nothing: the destination appears by one rename.
* ``delete_artifact`` makes the artifact invisible first and removes the data then; nothing there is success.
* ``list_artifacts`` and ``get_metadata`` know committed artifacts alone; ``verify_artifact`` reads everything back.

Whoever waits can be let go: a call that is given ``cancelled`` looks at it between two pieces, raises
:class:`checkpoint_operator.storage.errors.Cancelled`, and leaves nothing that anybody would take for an artifact.
"""

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import Layout, Progress, Stored
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.marker import Manifest
from checkpoint_operator.storage.pace import Pace
from checkpoint_operator.storage.source import Selection, SourceTree

OnProgress = Callable[[Progress], None]
"""Told how far a transfer is: at the start and the end of each stage, and at most once a second between. Any thread."""

# It becomes part of the names of files, and of headers.
_UID = re.compile(r"[A-Za-z0-9_:-][A-Za-z0-9_.:-]{0,127}")


@dataclass(frozen=True)
class UploadRequest:
    """One upload. ``root`` and ``path`` name the source; ``uid`` the artifact (None: derived from URI and source).

    ``force`` is the fence of DESIGN §6: the caller knows that no earlier mover of this artifact is running.

    ``keep_parts`` says what a cancelled upload leaves of files that were half sent: the mover keeps them, because its
    next attempt takes them over; a caller who gave up for good wants them gone, so that nobody pays for them. Whole
    objects stay under the claim either way: they are invisible, another run may count on them already, and a second
    upload finds them.
    """

    root: str
    path: str
    uri: TargetURI
    metadata: ArtifactMetadata
    uid: str | None = None
    layout: Layout = Layout.PLAIN
    selection: Selection = field(default_factory=Selection)
    force: bool = False
    progress: OnProgress | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    keep_parts: bool = False
    on_write: Callable[[], None] = lambda: None
    """Called before anything is written to the store: what fails earlier leaves nothing to clean up."""
    max_bytes_per_second: int | None = None
    """How fast the source is read at most, over all threads; None: as fast as it goes."""

    def source_tree(self) -> SourceTree:
        """The source, not opened yet."""
        pace = Pace(self.max_bytes_per_second, self.cancelled)
        return SourceTree(self.root, self.path, self.selection, self.cancelled, pace)

    def __post_init__(self) -> None:
        if self.uid is not None and not _UID.fullmatch(self.uid):
            raise StorageError(
                Reason.INVALID_SPEC,
                f"the uid {self.uid[:80]!r} is none: up to 128 letters, digits and any of '-_.:', no '.' at its beginning",
            )


@dataclass(frozen=True)
class DeleteRequest:
    """One deletion. ``uid`` None: whoever's artifact is there. ``keep_committed``: only what was never committed."""

    uri: TargetURI
    uid: str | None = None
    layout: Layout = Layout.PLAIN
    keep_committed: bool = False
    force: bool = False


class StorageBackend(Protocol):
    """A place for artifacts. Every method raises :class:`checkpoint_operator.storage.errors.StorageError`."""

    def upload_artifact(self, request: UploadRequest) -> Stored:
        """Store a folder or a file and commit it.

        Raises (by reason): SourceNotFound, SourceUnreadable, SourceUnsupported, SourceEmpty, SourceChanged,
        UnsupportedName; TargetExists, TargetNotEmpty, TargetBusy, EarlierMoverNotGone; CredentialsMissing,
        CredentialsRefused, BucketNotFound, ConditionalWritesUnsupported, StoreUnavailable, IntegrityMismatch.
        """

    def download_artifact(
        self,
        uri: TargetURI,
        destination: Path,
        progress: OnProgress | None = None,
        cancelled: threading.Event | None = None,
    ) -> ArtifactMetadata:
        """Fetch a committed artifact into a folder that does not exist yet.

        Raises: NotFound, DestinationExists, IntegrityMismatch, and the store's own.
        """

    def delete_artifact(self, request: DeleteRequest) -> str:
        """Remove an artifact; one sentence about what was removed or kept. Raises: EarlierMoverNotGone, TargetBusy."""

    def list_artifacts(
        self, uri: TargetURI, artifact_type: str | None = None, prefix: str = ""
    ) -> Iterator[ArtifactMetadata]:
        """Every committed artifact at or below a URI (which may be a whole bucket), in the order of the store.

        ``prefix`` is what the artifact's path relative to the URI, with a slash at its end, must begin with: a plain
        string, as object stores have it. ``storage_path`` is where the artifact was found.
        """

    def get_metadata(self, uri: TargetURI) -> ArtifactMetadata:
        """What is known about the committed artifact at a URI. Raises: NotFound."""

    def get_manifest(self, uri: TargetURI) -> Manifest:
        """The whole manifest of the committed artifact at a URI. Raises: NotFound."""

    def verify_artifact(
        self,
        uri: TargetURI,
        manifest_digest: str | None = None,
        progress: OnProgress | None = None,
        cancelled: threading.Event | None = None,
    ) -> Manifest:
        """Read a committed artifact back, every byte, and compare it with its manifest, which is returned.

        Found: a file with other bytes or another length, one that is missing, one that the manifest does not list (a
        nested artifact's are its own), and a manifest that was written by hand: its ``contentDigest`` is not that of its
        table, its ``metadata.size_bytes`` not the sum, or its own digest not ``manifest_digest``, where that is given
        (``status.manifestDigest`` has it).

        Raises: NotFound; IntegrityMismatch, whose message lists the first ten problems; and the store's own.
        """
