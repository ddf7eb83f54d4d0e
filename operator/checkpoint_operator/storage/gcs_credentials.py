"""Google's credentials for an identity; those of a mounted profile are read again for each token."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import google.auth
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.exceptions import GoogleAuthError
from google.auth.identity_pool import Credentials as FederatedCredentials
from google.oauth2.service_account import Credentials as ServiceAccountCredentials

from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.gcs_identity import Identity

SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"


def make_credentials(identity: Identity, read_again: Callable[[], Identity]) -> Credentials:
    """What signs for an identity; ``read_again`` gives it as it is by then. Nothing is sent yet.

    Raises:
        GoogleAuthError, ValueError: what is there cannot be used; their texts quote it.
    """
    found: Credentials
    if identity.anonymous:
        found = AnonymousCredentials()
    elif identity.profile is None:
        found, _ = google.auth.default(scopes=[SCOPE])
    else:
        found = MountedCredentials(identity, read_again)
    return found


class MountedCredentials(Credentials):
    """Of a profile: each token (they live for an hour, and a 401 ends one early) is asked for with the file as it is then.

    A file that is gone or not whole by then (somebody is writing it) is not taken: the one from before goes on.
    """

    def __init__(self, identity: Identity, read_again: Callable[[], Identity]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read_again, self._inner = read_again, _of_profile(identity)

    def refresh(self, request: Any) -> None:
        with suppress(StorageError, GoogleAuthError, ValueError):
            self._inner = _of_profile(self._read_again())
        self._inner.refresh(request)
        self.token, self.expiry = self._inner.token, self._inner.expiry


def _of_profile(identity: Identity) -> Any:
    profile = identity.profile or {}
    if profile["type"] == "service_account":
        return ServiceAccountCredentials.from_service_account_info(profile, scopes=[SCOPE])
    return FederatedCredentials.from_info(profile, scopes=[SCOPE])
