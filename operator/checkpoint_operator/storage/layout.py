"""Makes every name of a checkpoint in an empty or half-filled folder, before the first byte is fetched.

A disk may fold names (case, Unicode forms), change them (a trailing dot) or refuse them. Each name is created exclusively
and read back, so that two files never become one and none comes back under another name.
"""

import errno
import os
from collections import defaultdict

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.folders import DIRECTORY, opened_below
from checkpoint_operator.storage.hostile import folders_of
from checkpoint_operator.storage.manifest import FileTable

_REFUSED_NAMES = frozenset({errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG, errno.EPERM, errno.ENOTSUP})
"""What file systems say to a name, or to a symlink, that they cannot hold."""


def lay_out(folder: int, table: FileTable, shown: str) -> set[str]:
    """Make the folders, empty files and links of a table below an open folder.

    The files that were there already (with what an earlier attempt put into them) are returned. ``shown`` is the place in
    messages. The table's names have been checked.

    Raises:
        StorageError: UnsupportedName, also for two names that are one on this disk.
        OSError: what else the disk says.
    """
    names = _Names(shown)
    found: set[str] = set()
    contents: dict[str, set[str]] = defaultdict(set)
    for path in folders_of(table):
        contents[path.rpartition("/")[0]].add(path.rpartition("/")[2])
        contents[path]  # also an empty one is looked at
    for path in (*(file.path for file in table.files), *(link.path for link in table.links)):
        contents[path.rpartition("/")[0]].add(path.rpartition("/")[2])
    files = {file.path for file in table.files}
    targets = {link.path: link.target for link in table.links}
    for above in sorted(contents, key=lambda path: (path.count("/") if path else -1, path)):
        with opened_below(folder, above) as directory:
            for name in sorted(contents[above]):
                path = f"{above}/{name}" if above else name
                if path in files:
                    if not names.make_file(directory, name, path):
                        found.add(path)
                elif path in targets:
                    names.make_link(directory, name, path, targets[path])
                else:
                    names.make_folder(directory, name, path)
            names.check_kept(directory, contents[above], above)
    return found


class _Names:
    """Who has which inode: two names with one are two names that the disk takes for the same."""

    def __init__(self, shown: str) -> None:
        self._shown = shown
        self._owners: dict[tuple[int, int], str] = {}

    def make_file(self, directory: int, name: str, path: str) -> bool:
        """Create a file; False where it is there already."""
        try:
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=directory)
        except FileExistsError:
            self._enter(os.stat(name, dir_fd=directory, follow_symlinks=False), path)
            return False
        except OSError as error:
            raise self._cannot_hold(path, error) from error
        try:
            self._enter(os.fstat(descriptor), path)
        finally:
            os.close(descriptor)
        return True

    def make_folder(self, directory: int, name: str, path: str) -> None:
        try:
            os.mkdir(name, 0o777, dir_fd=directory)
        except FileExistsError:
            pass
        except OSError as error:
            raise self._cannot_hold(path, error) from error
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        self._enter(status, path)
        os.close(os.open(name, DIRECTORY, dir_fd=directory))

    def make_link(self, directory: int, name: str, path: str, target: str) -> None:
        try:
            os.symlink(target, name, dir_fd=directory)
        except FileExistsError as error:
            self._enter(os.stat(name, dir_fd=directory, follow_symlinks=False), path)
            raise StorageError(
                Reason.DESTINATION_EXISTS, f"'{path}' appeared in the folder for '{self._shown}'", path=path
            ) from error
        except OSError as error:
            raise self._cannot_hold(path, error) from error
        self._enter(os.stat(name, dir_fd=directory, follow_symlinks=False), path)

    def _enter(self, status: os.stat_result, path: str) -> None:
        other = self._owners.setdefault((status.st_dev, status.st_ino), path)
        if other != path:
            raise StorageError(
                Reason.UNSUPPORTED_NAME,
                f"'{other}' and '{path}' are one name to the disk of '{self._shown}': choose a destination on a file system "
                "that tells upper from lower case and keeps Unicode as it is",
                path=path,
            )

    def check_kept(self, directory: int, wanted: set[str], above: str) -> None:
        """Whether every name is listed as it was given."""
        lost = min(wanted - set(os.listdir(directory)), default=None)
        if lost is not None:
            path = f"{above}/{lost}" if above else lost
            raise StorageError(
                Reason.UNSUPPORTED_NAME,
                f"the disk of '{self._shown}' keeps '{path}' under another name: choose another destination",
                path=path,
            )

    def _cannot_hold(self, path: str, error: OSError) -> Exception:
        if error.errno not in _REFUSED_NAMES:
            return error
        return StorageError(
            Reason.UNSUPPORTED_NAME,
            f"the disk of '{self._shown}' cannot hold '{path}': {error.strerror}; choose another destination",
            path=path,
        )
