"""Asks each bucket once, before the first write that depends on it, whether it keeps the conditions of that write.

A store that has never heard of a condition ignores it, and nothing but trying tells. What is written in one request and what
is completed from several parts are two questions: there are stores that learned the one long before the other. The second is
asked only where a file is large enough for parts.
"""

import secrets
from collections.abc import Callable
from contextlib import suppress

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.names import PROBE_PREFIX
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.store import ObjectStore, Part, UploadLost, Written

_TRIES = 3
_BODY = b"p"


class Conditions:
    """What is known of the buckets of one backend. Two threads that ask at once ask twice, and learn the same."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str], bool] = {}

    def store_for(self, store: ObjectStore, place: TargetURI, *, in_parts: bool, unique: bool) -> ObjectStore:
        """The store to write with at a place. ``in_parts``: some object will be completed from several parts.

        Raises:
            StorageError: ConditionalWritesUnsupported, where the place is shared (not ``unique``).
        """
        missing = None
        if not self._ask(place, "write", store.honours_conditions):
            missing = "ignores If-None-Match or If-Match"
        elif in_parts and not self._ask(place, "complete", lambda key: _honours_on_completion(store, key)):
            missing = "ignores the condition when a file of several parts is completed"
        if missing is None:
            return store
        if unique:
            return store.without_conditions()
        raise StorageError(
            Reason.CONDITIONAL_WRITES_UNSUPPORTED,
            f"the store {missing}, so that two writers could mix their files: use layout Unique",
            uri=str(place),
        )

    def _ask(self, place: TargetURI, question: str, ask: Callable[[str], bool]) -> bool:
        known = (place.scheme, place.bucket, question)
        if known not in self._known:
            self._known[known] = ask(f"{place.path}/{PROBE_PREFIX}{secrets.token_hex(8)}")
        return self._known[known]


def _honours_on_completion(store: ObjectStore, key: str) -> bool:
    """Whether an object of parts is refused where the key exists: seven small requests, on a key that nobody else uses."""
    token = store.create(key, _BODY)
    if token is None:  # the reply was lost
        token = (store.read(key) or (b"", ""))[1]
    written = None
    try:
        written = _complete(store, key)
    except StorageError as error:
        if error.reason is not Reason.CONDITIONAL_WRITES_UNSUPPORTED:
            raise
        return False  # it says so itself
    finally:
        store.without_conditions().remove(key, written.token if written else token)
    return written is None


def _complete(store: ObjectStore, key: str) -> Written | None:
    digest = store.digest(_BODY)
    for _ in range(_TRIES):
        upload_id = store.start_upload(key, "probe")
        try:
            token = store.put_part(key, upload_id, 1, _BODY, digest)
            written = store.finish_upload(key, upload_id, [Part(1, len(_BODY), token, digest)], "probe")
        except UploadLost:  # whoever holds the claim at this place may remove what is open below it
            continue
        except StorageError:
            _forget(store, key, upload_id)
            raise
        if written is None:
            _forget(store, key, upload_id)
        return written
    raise StorageError(Reason.STORE_UNAVAILABLE, f"the store gave up {_TRIES} uploads to a key that nobody else uses")


def _forget(store: ObjectStore, key: str, upload_id: str) -> None:
    with suppress(StorageError):  # not allowed to, perhaps: then it is one of those that a lifecycle rule removes
        store.abort_upload(key, upload_id)
