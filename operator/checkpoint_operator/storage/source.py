"""Reads a checkpoint folder that somebody else can change at any moment, and never leaves it.

The mover may be more powerful than whoever owns the volume, so every name is opened component by component with
O_NOFOLLOW: a folder that is swapped for a symlink between scan and read gives an error, not another file's content.
"""

import errno
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

from wcmatch import glob

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.names import MARKER_NAME, PROBE_PREFIX
from checkpoint_operator.api.uris import bad_segment
from checkpoint_operator.storage.errors import Cancelled, StorageError
from checkpoint_operator.storage.folders import DIRECTORY, open_below, open_directory
from checkpoint_operator.storage.manifest import Link, digest_lines, link_problem
from checkpoint_operator.storage.marker import DELETING_NAME
from checkpoint_operator.storage.pace import Pace

MAX_DEPTH = 64
"""Folders below each other; no framework comes near, and a volume could hold a chain that outlives our stack."""
_GLOB = glob.GLOBSTAR | glob.DOTGLOB | glob.MATCHBASE | glob.FORCEUNIX


@dataclass(frozen=True, order=True, slots=True)
class SourceFile:
    """A file as the scan saw it. ``path`` is relative to the folder, with '/'."""

    path: str
    size: int
    mtime_ns: int
    inode: int
    mode: int = field(compare=False)


@dataclass(frozen=True)
class Listing:
    """What a folder holds, sorted by path."""

    files: tuple[SourceFile, ...]
    links: tuple[Link, ...] = ()
    empty_directories: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """``sha256:…`` over [path, size, mtimeNs] and what else the folder holds: cheap, and it changes with any write."""
        return digest_lines(
            chain(
                ([file.path, file.size, file.mtime_ns] for file in self.files),
                (["link", link.path, link.target] for link in self.links),
                (["directory", path] for path in self.empty_directories),
            )
        )


@dataclass(frozen=True)
class Selection:
    """Which paths of a folder are stored: those that ``include`` names (all, if empty) less those of ``exclude``."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def wants(self, path: str) -> bool:
        """Whether a file is stored. A pattern that names a folder speaks for everything below it."""
        return (not self.include or _matches(path, self._included)) and not self.excludes(path)

    def excludes(self, path: str) -> bool:
        return bool(self.exclude) and _matches(path, self._excluded)

    @cached_property
    def _included(self) -> "glob.WcMatcher[str]":
        return glob.compile(self.include, flags=_GLOB, limit=0)

    @cached_property
    def _excluded(self) -> "glob.WcMatcher[str]":
        return glob.compile(self.exclude, flags=_GLOB, limit=0)


def _matches(path: str, patterns: "glob.WcMatcher[str]") -> bool:
    parts = path.split("/")
    return any(patterns.match("/".join(parts[:depth])) for depth in range(len(parts), 0, -1))


@dataclass
class SourceTree:
    """An opened source: a folder, or a single file (then ``path`` names the file and the listing has one entry).

    Use as a context manager. Raises :class:`StorageError` with SourceNotFound, SourceUnreadable, SourceUnsupported.
    """

    root: str
    path: str
    selection: Selection = field(default_factory=Selection)
    cancelled: threading.Event = field(default_factory=threading.Event)
    pace: Pace = field(default_factory=Pace)
    _descriptor: int = -1
    _looked: int = 0
    _single: str | None = None

    def __enter__(self) -> "SourceTree":
        path = self.path.strip("/")
        if ".." in path.split("/"):
            raise StorageError(
                Reason.INVALID_SPEC, f"source.path '{self.path}' has a '..' segment: write it out in full", path=self.path
            )
        parent, _, name = path.rpartition("/")
        try:
            above = open_directory(self.root, parent)
        except OSError as error:
            raise self._cannot_open(error, parent or self.root) from error
        try:
            if name in ("", "."):
                self._descriptor = os.dup(above)
                return self
            found = os.stat(name, dir_fd=above, follow_symlinks=False)
            if stat.S_ISREG(found.st_mode):
                self._single, self._descriptor = name, os.dup(above)
            else:
                try:
                    self._descriptor = os.open(name, DIRECTORY, dir_fd=above)
                except PermissionError as error:
                    raise _unreadable(path, found) from error
        except FileNotFoundError as error:
            there = "what this user may not list"
            with suppress(PermissionError):
                there = ", ".join(sorted(os.listdir(above))[:10]) or "nothing"
            raise StorageError(
                Reason.SOURCE_NOT_FOUND,
                f"source.path '{_short(self.path)}' does not exist; beside it lie: {there}",
                path=self.path,
            ) from error
        except OSError as error:
            raise self._cannot_open(error, path) from error
        finally:
            os.close(above)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def identity(self) -> tuple[int, int]:
        """(device, inode) of the opened folder, to notice a target inside the source."""
        status = os.fstat(self._descriptor)
        return status.st_dev, status.st_ino

    @property
    def is_single_file(self) -> bool:
        return self._single is not None

    def scan(self) -> Listing:
        """Look at every name once, without reading a byte of content.

        Raises:
            StorageError: SourceUnsupported for a symlink that leaves the folder and for special files,
                UnsupportedName for a name that not every store can keep, SourceEmpty, SourceUnreadable.
        """
        files: list[SourceFile] = []
        links: list[Link] = []
        empty: list[str] = []
        if self._single is not None:
            status = os.stat(self._single, dir_fd=self._descriptor, follow_symlinks=False)
            self._check_name(self._single)
            files.append(_source_file(self._single, status))
        else:
            for path, found, link in self._walk(self._descriptor, ""):
                if link is not None:
                    links.append(Link(path=path, target=link))
                elif found is None:
                    empty.append(path)
                else:
                    files.append(_source_file(path, found))
        if not files:
            raise StorageError(
                Reason.SOURCE_EMPTY,
                f"source.path '{self.path}' holds no file that source.include and source.exclude leave over",
                path=self.path,
            )
        return Listing(
            tuple(sorted(files, key=lambda file: file.path.encode())),
            tuple(sorted(links, key=lambda link: link.path.encode())),
            tuple(sorted(empty, key=str.encode)),
        )

    def _walk(self, directory: int, prefix: str) -> Iterator[tuple[str, os.stat_result | None, str | None]]:
        """Yield (path, status of a file or None for an empty folder, target of a link)."""
        try:
            with os.scandir(directory) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError as error:
            raise self._cannot_open(error, prefix or self.path) from error
        if prefix.count("/") > MAX_DEPTH:
            raise StorageError(
                Reason.SOURCE_UNSUPPORTED,
                f"'{prefix[:60]}…' is nested deeper than {MAX_DEPTH} folders: exclude it",
                path=prefix,
            )
        for name in names:
            self._looked += 1
            if self._looked % 256 == 0 and self.cancelled.is_set():
                raise Cancelled
            path = prefix + name
            if self.selection.excludes(path):
                continue
            status = self._stat(name, directory, path)
            kind = status.st_mode
            if path == MARKER_NAME and stat.S_ISREG(kind):
                continue  # of the checkpoint that this folder was copied from
            if stat.S_ISDIR(kind):
                yield from self._walk_directory(name, directory, path)
                continue
            if not self.selection.wants(path):
                continue
            self._check_name(path)
            if stat.S_ISREG(kind):
                yield path, status, None
            elif stat.S_ISLNK(kind):
                yield path, None, self._inner_link(name, directory, path)
            else:
                raise StorageError(
                    Reason.SOURCE_UNSUPPORTED,
                    f"'{path}' is neither a file nor a folder (a FIFO, socket or device): remove it or exclude it",
                    path=path,
                )

    def _walk_directory(
        self, name: str, directory: int, path: str
    ) -> Iterator[tuple[str, os.stat_result | None, str | None]]:
        try:
            descriptor = os.open(name, DIRECTORY, dir_fd=directory)
        except PermissionError as error:
            raise _unreadable(path, self._stat(name, directory, path)) from error
        except OSError as error:
            raise self._cannot_open(error, path) from error
        try:
            with os.scandir(descriptor) as entries:
                is_empty = next(entries, None) is None
            if is_empty:
                if self.selection.wants(path):
                    self._check_name(path)
                    yield path, None, None
                return
            yield from self._walk(descriptor, path + "/")
        finally:
            os.close(descriptor)

    def _stat(self, name: str, directory: int, path: str) -> os.stat_result:
        try:
            return os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError as error:
            raise StorageError(Reason.SOURCE_CHANGED, f"'{path}' vanished while the folder was listed", path=path) from error
        except OSError as error:
            raise self._cannot_open(error, path) from error

    def _check_name(self, path: str) -> None:
        problem = next((problem for part in path.split("/") if (problem := bad_segment(part))), None)
        if problem is None and path.startswith(PROBE_PREFIX):
            problem = f"the reserved prefix '{PROBE_PREFIX}'"
        if problem is None and (MARKER_NAME in path.split("/") or path == DELETING_NAME):
            # Below the target it would be taken for the marker of a nested artifact, or of this one.
            problem = "a reserved name: it is the marker of another stored checkpoint"
        if problem:
            shown = path.encode("utf-8", "backslashreplace").decode()
            raise StorageError(
                Reason.UNSUPPORTED_NAME, f"the name {shown!r} has {problem}: rename it or exclude it", path=shown
            )

    def _inner_link(self, name: str, directory: int, path: str) -> str:
        target = os.readlink(name, dir_fd=directory)
        if problem := link_problem(path, target):
            raise StorageError(
                Reason.SOURCE_UNSUPPORTED,
                f"the symlink '{path}' {problem} (to '{target}'): replace it by the file, or exclude it",
                path=path,
            )
        return target

    def open(self, file: SourceFile) -> "OpenFile":
        """Open one scanned file for reading.

        Raises:
            StorageError: SourceUnreadable with owner and mode, or SourceChanged.
        """
        parent, _, name = file.path.rpartition("/")
        try:
            directory = open_below(self._descriptor, parent) if parent else self._descriptor
            try:
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
            finally:
                if parent:
                    os.close(directory)
        except PermissionError as error:
            raise self._unreadable(file) from error
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise StorageError(
                    Reason.SOURCE_UNREADABLE,
                    f"'{_short(file.path)}' cannot be opened: {error.strerror}; run fewer transfers at once in this "
                    "process, or raise its limit (ulimit -n)",
                    path=file.path,
                ) from error
            raise StorageError(
                Reason.SOURCE_CHANGED, f"'{file.path}' was replaced or removed: {error.strerror}", path=file.path
            ) from error
        opened = OpenFile(file, descriptor, self.pace)
        try:
            opened.check_unchanged()
        except BaseException:
            opened.close()
            raise
        return opened

    def _unreadable(self, file: SourceFile) -> StorageError:
        # safetensors 0.8 leaves its files with mode 0600, so this is the usual first failure of a new installation.
        owner: os.stat_result | None = None
        with suppress(OSError):
            directory = open_below(self._descriptor, file.path.rpartition("/")[0])
            try:
                owner = os.stat(file.path.rpartition("/")[2], dir_fd=directory, follow_symlinks=False)
            finally:
                os.close(directory)
        return _unreadable(file.path, owner)

    def _cannot_open(self, error: OSError, path: str) -> StorageError:
        shown, given = _short(path), _short(self.path)
        if isinstance(error, FileNotFoundError):
            reason = Reason.SOURCE_NOT_FOUND
            text = f"source.path '{given}': '{shown}' does not exist; it is relative to the root of the claim"
        elif error.errno == errno.ENAMETOOLONG:
            reason = Reason.SOURCE_NOT_FOUND
            text = f"source.path '{given}': '{shown}' is too long for a name; a segment has at most 255 bytes"
        elif isinstance(error, PermissionError):
            reason, text = Reason.SOURCE_UNREADABLE, f"'{shown}' cannot be opened by user {os.geteuid()}: let it read there"
        else:
            reason = Reason.SOURCE_UNSUPPORTED
            text = f"'{shown}' is no folder, or a symlink (links are not followed): {error.strerror}"
        return StorageError(reason, text, path=path)


def _unreadable(path: str, owner: os.stat_result | None) -> StorageError:
    """``owner``: the status of what cannot be read, None where even that cannot be seen."""
    if owner is None:
        why = "its owner cannot be seen; give the mover's user access to the folder"
    else:
        whose = f"it belongs to {owner.st_uid}:{owner.st_gid} with mode {stat.S_IMODE(owner.st_mode):04o}"
        way_out = f"let the mover run as user {owner.st_uid} (spec.mover.runAsUser), or chmod it"
        if owner.st_uid == 0:
            way_out = "chmod it, and let the training run as another user than root"
        why = f"{whose}; {way_out}"
    return StorageError(
        Reason.SOURCE_UNREADABLE, f"'{_short(path)}' cannot be read by user {os.geteuid()}: {why}", path=path
    )


def _short(path: str) -> str:
    """A path for a sentence that must keep room for what it says."""
    return path if len(path) <= 120 else f"{path[:60]}…{path[-60:]}"


@dataclass
class OpenFile:
    """One file being read; ``pread`` into private buffers, never mmap: a truncation would be a SIGBUS, and what was
    hashed might differ from what was sent."""

    file: SourceFile
    descriptor: int
    pace: Pace = field(default_factory=Pace)

    def read(self, offset: int, length: int) -> bytearray:
        """Exactly ``length`` bytes at ``offset``. Raises as :meth:`read_into` does."""
        body = bytearray(length)
        self.read_into(offset, memoryview(body))
        return body

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes at ``offset``, at the pace of the upload.

        Raises:
            Cancelled: while it waited for its turn.
            StorageError: SourceChanged when the file has become shorter, SourceUnreadable on an I/O error.
        """
        self.pace.spend(len(buffer))
        self._fill(offset, buffer)

    def read_again(self, offset: int, buffer: memoryview) -> None:
        """The same for bytes that were read before and are needed anew to be sent: what they cost is paid.

        Raises:
            StorageError: as :meth:`read_into` does.
        """
        self._fill(offset, buffer)

    def _fill(self, offset: int, buffer: memoryview) -> None:
        got = 0
        while got < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[got:]], offset + got)
            except OSError as error:
                raise StorageError(
                    Reason.SOURCE_UNREADABLE,
                    f"reading '{self.file.path}' failed: {error.strerror}",
                    path=self.file.path,
                ) from error
            if not count:
                raise self.changed("became shorter")
            got += count

    def check_unchanged(self) -> None:
        """Compare with what the scan saw: before the first and after the last byte.

        Raises:
            StorageError: SourceChanged.
        """
        status = os.fstat(self.descriptor)
        if _source_file(self.file.path, status) != self.file or not stat.S_ISREG(status.st_mode):
            raise self.changed("changed")

    def changed(self, what: str) -> StorageError:
        """The error for a file that is not what it was."""
        return StorageError(
            Reason.SOURCE_CHANGED,
            f"'{self.file.path}' {what} while it was read: create the artifact only after the checkpoint is saved",
            path=self.file.path,
        )

    def close(self) -> None:
        """Once is enough."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _source_file(path: str, status: os.stat_result) -> SourceFile:
    return SourceFile(path, status.st_size, status.st_mtime_ns, status.st_ino, stat.S_IMODE(status.st_mode))
