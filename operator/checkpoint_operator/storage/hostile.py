"""What a manifest may name: it comes from a store that others can write to, so each name is checked before it is a path.

Whoever restores, verifies or removes by a manifest asks here first; then a name is a plain path below the folder.
"""

from collections.abc import Iterable

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.names import MARKER_NAME, PROBE_PREFIX
from checkpoint_operator.api.uris import bad_segment
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.manifest import FileTable, link_problem
from checkpoint_operator.storage.marker import DELETING_NAME
from checkpoint_operator.storage.source import MAX_DEPTH

MAX_SEGMENT_BYTES = 255
"""NAME_MAX of every file system that Linux writes to."""


def check_names(table: FileTable) -> None:
    """Refuse a table whose names could lead out of the folder that they are put into, or cannot all be there at once.

    Linear in the number of files: a segment and a folder are looked at once, however many files share them.

    Raises:
        StorageError: UnsupportedName, for the first name that is refused.
    """
    solid = [*(file.path for file in table.files), *(link.path for link in table.links)]
    segments: set[str] = set()
    taken: set[str] = set()
    for name in (*solid, *table.empty_directories):
        if problem := _problem(name, segments):
            raise _refused(name, f"has {problem}")
        if name in taken:
            raise _refused(name, "it names twice")
        taken.add(name)
    for link in table.links:
        if problem := link_problem(link.path, link.target):
            raise _refused(link.path, f"{problem} ({link.target!r})")
    _check_folders((*solid, *table.empty_directories), set(solid))


def _problem(name: str, sound: set[str]) -> str | None:
    """Why a name is refused, or None; ``sound`` are the segments that were found to be fine before."""
    segments = name.split("/")
    if len(segments) > MAX_DEPTH:
        return f"more than {MAX_DEPTH} segments"
    if MARKER_NAME in segments or name == DELETING_NAME:
        return "the marker's own name"
    if name.startswith(PROBE_PREFIX):
        return f"the reserved prefix '{PROBE_PREFIX}'"
    for segment in segments:
        if segment in sound:
            continue
        if problem := bad_segment(segment):
            return problem
        if (length := len(segment.encode())) > MAX_SEGMENT_BYTES:
            return f"a segment of {length} bytes, a file system allows {MAX_SEGMENT_BYTES}"
        sound.add(segment)
    return None


def _check_folders(names: Iterable[str], solid: set[str]) -> None:
    folders: set[str] = set()
    for name in names:
        above = name.rpartition("/")[0]
        while above and above not in folders:
            if above in solid:
                raise _refused(name, f"lies below {above!r}, which is no folder")
            folders.add(above)
            above = above.rpartition("/")[0]


def folders_of(table: FileTable) -> list[str]:
    """Every folder that a table implies, each after the one that it lies in."""
    folders: set[str] = set(table.empty_directories)
    for path in (*table.empty_directories, *(file.path for file in table.files), *(link.path for link in table.links)):
        above = path.rpartition("/")[0]
        while above and above not in folders:
            folders.add(above)
            above = above.rpartition("/")[0]
    return sorted(folders, key=lambda path: (path.count("/"), path))


def _refused(name: str, why: str) -> StorageError:
    shown = name if len(name) <= 120 else f"{name[:60]}…{name[-60:]}"
    return StorageError(Reason.UNSUPPORTED_NAME, f"the manifest lists {shown!r}, which {why}: refused", path=shown)
