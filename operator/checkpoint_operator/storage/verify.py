"""Reads a committed checkpoint back and compares it with its manifest: the same fetching as a restore, without a disk.

A problem is not the end: the whole place is looked at, and the error lists what was found first.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.names import MARKER_NAME, PROBE_PREFIX
from checkpoint_operator.api.protocol import Stage
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.hostile import check_names
from checkpoint_operator.storage.manifest import FileTable, StoredFile, content_digest
from checkpoint_operator.storage.marker import Manifest
from checkpoint_operator.storage.meter import Meter
from checkpoint_operator.storage.ranges import Fetch, Stream, by_size, fetch_all
from checkpoint_operator.storage.store import Entry

MAX_SHOWN = 10
_OF_THE_FILE = frozenset({Reason.INTEGRITY_MISMATCH, Reason.NOT_FOUND})
"""What says something about one file; any other failure says that nobody can tell, and ends the verification."""


@dataclass
class _Problems:
    """How many there are, and the first of them."""

    count: int = 0
    shown: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, problem: str) -> None:
        with self._lock:
            self.count += 1
            if self.count <= MAX_SHOWN:
                self.shown.append(problem)


@dataclass(frozen=True)
class Held:
    """What lies at a place. ``entries`` have keys relative to it; a token that is empty is not compared.

    ``others`` maps paths to what is there beside files, in words ("a symlink to 'x'", :data:`FOLDER`); None for a store
    that has nothing but objects: there, links and empty folders live in the manifest alone.
    """

    entries: Iterable[Entry]
    others: Mapping[str, str] | None = None


FOLDER = "a folder"


def link_to(target: str) -> str:
    """What :attr:`Held.others` says of a symlink."""
    return f"a symlink to {target!r}"


def verify(
    manifest: Manifest,
    digest: str,
    expected_digest: str | None,
    held: Held,
    fetch: Fetch,
    meter: Meter,
    cancelled: threading.Event | None = None,
) -> None:
    """Compare what lies at a place with its manifest, byte by byte. ``digest`` is that of the manifest as it was read.

    Memory: that of :mod:`checkpoint_operator.storage.ranges`; on top of it one line for each entry.

    Raises:
        StorageError: IntegrityMismatch with the first :data:`MAX_SHOWN` problems, and what ``fetch`` raises of the store.
        Cancelled: when the event was set; it is looked at before each range.
    """
    problems = _Problems()
    for problem in _of_the_manifest(manifest, digest, expected_digest):
        problems.add(problem)
    table = manifest.table
    meter.start(Stage.VERIFYING, len(table.files), table.size)
    try:
        check_names(table)
    except StorageError as error:
        problems.add(error.message)  # nothing is fetched by names that are refused
    else:
        entries = {entry.key: entry for entry in held.entries}
        there = [file for file in table.files if _is_as_listed(file, entries.get(file.path), problems)]
        for problem in _extra(entries, table):
            problems.add(problem)
        if held.others is not None:
            for problem in _beside_files(table, held.others):
                problems.add(problem)
        for small, files in by_size(there):
            checked = (_Checked(file, problems) for file in files)
            fetch_all(checked, fetch, meter, cancelled or threading.Event(), small=small)
    meter.stage(Stage.VERIFYING)
    if problems.count:
        listed = "; ".join(problems.shown)
        more = f"; and {problems.count - MAX_SHOWN} more" if problems.count > MAX_SHOWN else ""
        what = "1 problem" if problems.count == 1 else f"{problems.count} problems"
        raise StorageError(
            Reason.INTEGRITY_MISMATCH,
            f"the checkpoint is not what its manifest says, {what}: {listed}{more}",
            uri=manifest.metadata.storage_path,
            operation="verify",
        )


def _of_the_manifest(manifest: Manifest, digest: str, expected: str | None) -> Iterator[str]:
    """What shows that a manifest was edited by hand."""
    if expected is not None and digest != expected:
        yield f"the manifest has the digest {digest}, expected was {expected}"
    if (computed := content_digest(manifest.table)) != manifest.content_digest:
        yield f"the manifest says contentDigest {manifest.content_digest}, its table has {computed}"
    if manifest.metadata.size_bytes != manifest.table.size:
        yield f"the manifest says size_bytes {manifest.metadata.size_bytes}, its files have {manifest.table.size}"


def _is_as_listed(file: StoredFile, entry: Entry | None, problems: _Problems) -> bool:
    if entry is None:
        problems.add(f"'{file.path}' is missing")
    elif entry.size != file.size:
        problems.add(f"'{file.path}' has {entry.size} bytes, listed are {file.size}")
    elif entry.token and entry.token != file.token:
        problems.add(f"'{file.path}' is another version ({entry.token}) than the one that was stored ({file.token})")
    else:
        return True
    return False


def _extra(entries: Mapping[str, Entry], table: FileTable) -> Iterator[str]:
    """What nobody listed. Below another marker lies another artifact; probes and the marker itself are nobody's data."""
    nested = tuple(path.removesuffix(MARKER_NAME) for path in entries if path.endswith(f"/{MARKER_NAME}"))
    listed = {file.path for file in table.files}
    for path in entries:
        is_ours = path in ("", MARKER_NAME) or path.startswith(PROBE_PREFIX)
        if path not in listed and not is_ours and not path.startswith(nested):
            yield f"'{path}' is there and not listed"


def _beside_files(table: FileTable, others: Mapping[str, str]) -> Iterator[str]:
    wanted = {
        **{link.path: link_to(link.target) for link in table.links},
        **dict.fromkeys(table.empty_directories, FOLDER),
    }
    for path, what in wanted.items():
        if (found := others.get(path)) != what:
            yield f"'{path}' is {found or 'missing'}, listed is {what}"
    for path, what in others.items():
        if path not in wanted and what != FOLDER:
            yield f"'{path}' is {what} and not listed"


class _Checked(Stream):
    """A file that is only hashed."""

    def __init__(self, file: StoredFile, problems: _Problems) -> None:
        super().__init__(file)
        self._problems = problems

    def finish(self, sha256: str) -> None:
        if sha256 != self.file.sha256:
            self._problems.add(f"'{self.file.path}' has sha256 {sha256}, listed is {self.file.sha256}")

    def fail(self, error: StorageError) -> None:
        if error.reason not in _OF_THE_FILE:
            raise error
        self._problems.add(error.message)
