"""The keys in a mounted folder: read whole or not at all, and read again when they have been rotated.

A mover may run for hours, and its Secret be replaced meanwhile (a session's token lives for one). Kubernetes then swaps the
files below the mover, so what is signed is signed with the keys that lie there at that moment.
"""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from botocore.credentials import Credentials, ReadOnlyCredentials

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.storage.errors import StorageError

_ID, _SECRET, _TOKEN = _NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

_Look = tuple[tuple[int, int, int] | None, ...]
"""Of each file its inode, its time and its size; None where it is not there."""
_EDITED_SECONDS = 1.0
"""How long a file that is written to in its place may go unseen; one that is swapped, as Kubernetes does it, is seen now."""


class MountedKeys(Credentials):
    """botocore's credentials, as its signers ask for them: before each request.

    Raises:
        StorageError: CredentialsMissing, when it is made. Later, keys that are gone or not whole (somebody is writing them)
            are not taken: the ones from before go on until the store refuses them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._reading = folder, threading.Lock()
        self._files = [str(folder / name) for name in _NAMES]
        self._glance = self._now()
        self._seen = self._look()
        super().__init__(*_read(folder), method="mounted")

    def load_credentials(self) -> "MountedKeys":
        """As a session's component of this name: botocore then looks nowhere else."""
        return self

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        with self._reading:
            # For each small file there is a request, so mostly one look at the folder has to do.
            if (glance := self._now()) is None or glance != self._glance:
                self._glance = glance if self._read_again() else None
            return super().get_frozen_credentials()

    def _read_again(self) -> bool:
        """Take the keys that lie there, where they are others; False where they could not be taken, or not yet."""
        if (now := self._look()) == self._seen:
            return True
        with suppress(StorageError):
            keys = _read(self._folder)
            if self._look() == now:  # else the files are being swapped: half of them could be of the old Secret
                self.access_key, self.secret_key, self.token = keys
                self._seen = now
                return True
        return False

    def _now(self) -> tuple[int, int, int] | None:
        """What changes where a file of the folder, or the folder itself, is swapped for another, and with each second."""
        try:
            status = os.stat(self._folder)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, int(time.monotonic() / _EDITED_SECONDS)

    def _look(self) -> _Look:
        def look(file: str) -> tuple[int, int, int] | None:
            try:
                status = os.stat(file)
            except OSError:
                return None
            return status.st_ino, status.st_mtime_ns, status.st_size

        return tuple(look(file) for file in self._files)


def _read(folder: Path) -> tuple[str, str, str | None]:
    token = _value(folder, _TOKEN, required=False) or None
    return _value(folder, _ID), _value(folder, _SECRET), token


def _value(folder: Path, name: str, *, required: bool = True) -> str:
    """One line of text; empty where there is no such file and none is needed."""
    try:
        value = (folder / name).read_text().strip()
    except OSError as error:
        if required:
            raise _missing(f"the credentials have no key '{name}'") from error
        return ""
    except UnicodeDecodeError:
        # Not chained: that exception holds the bytes.
        value = "" if required else "\0"
    if value.isascii() and value.isprintable() and (value or not required):
        return value
    # An empty key would make boto3 look for other credentials: those of the process.
    raise _missing(f"the credentials' key '{name}' is empty, or no line of text")


def _missing(what: str) -> StorageError:
    return StorageError(Reason.CREDENTIALS_MISSING, what, backend="s3")
