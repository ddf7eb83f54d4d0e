"""The client for one container: endpoint, credential, timeouts, and a log that shows no signature."""

import logging
import os
import re
import threading
from contextlib import suppress
from typing import Any

import requests
from azure.core.credentials import AzureSasCredential, TokenCredential
from azure.core.pipeline.transport import RequestsTransport
from azure.storage.blob import ContainerClient, ExponentialRetry, StandardBlobTier
from requests.adapters import HTTPAdapter

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.storage import marker
from checkpoint_operator.storage.azure_access import Access, find_access
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.gate import Gate

_MIB = 1 << 20
_CONNECTIONS = 32  # as many as the engine ever has requests under way


class Container:
    """The client for one container, made anew once the credentials it was made with have been replaced.

    Raises, when it is made:
        StorageError: CredentialsMissing and InvalidSpec, before any request.
    """

    def __init__(self, name: str, options: TargetOptions, gate: Gate) -> None:
        if options.sse_kms_key_id:
            raise _invalid("sseKMSKeyID is for s3://: on Azure set the container's default encryption scope instead")
        self.name, self._options, self._gate = name, options, gate
        self._renewing = threading.Lock()
        self._access = find_access(options)
        self.client = self._open()

    def renew(self, refused: ContainerClient) -> bool:
        """Whether there is another client than the refused one: by now, or because the credentials are others.

        Credentials that are gone or not whole (somebody is writing them) are not taken.
        """
        with self._renewing:
            if self.client is not refused:
                return True
            with suppress(StorageError):
                access = find_access(self._options)
                if access != self._access:
                    self._access = access
                    self.client = self._open()
            return self.client is not refused

    def _open(self) -> ContainerClient:
        """The client; nothing is sent yet, and every request will pass the gate."""
        access = self._access
        try:
            return ContainerClient(
                access.endpoint,
                self.name,
                credential=_credential(access),
                retry_policy=ExponentialRetry(initial_backoff=0, increment_base=2, retry_total=3, random_jitter_range=1),
                transport=_transport(self._options, self._gate),
                # A marker must be one request, whatever its size: two writers' blocks could mix.
                max_single_put_size=2 * marker.MAX_BYTES,
                max_single_get_size=32 * _MIB,
            )
        except ValueError as error:
            # The endpoint is no URL, or a token would go over plain http.
            raise _invalid(f"the client for '{access.endpoint}' cannot be made: {error}") from error


class _Gated(RequestsTransport):  # type: ignore[misc]  # the SDK has no types for it
    """Below the SDK's retries, so that nobody stands in the gate while a retry waits for its time."""

    def __init__(self, gate: Gate, **settings: Any) -> None:
        super().__init__(**settings)
        self._gate = gate

    def send(self, request: Any, **settings: Any) -> Any:
        with self._gate.passed():
            response = super().send(request, **settings)
        self._gate.answered(response.status_code)
        return response


def _transport(options: TargetOptions, gate: Gate) -> RequestsTransport:
    """The SDK's own, with more connections kept: by itself it keeps ten, and warns of each one that it throws away."""
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=_CONNECTIONS))
    return _Gated(gate, session=session, connection_timeout=20, read_timeout=60, connection_verify=options.ca_bundle or True)


def access_tier(options: TargetOptions) -> StandardBlobTier | None:
    """The tier of the data (never of markers), from ``storage_class``; None for the account's own.

    Raises:
        StorageError: InvalidSpec.
    """
    if not options.storage_class:
        return None
    tier = {"hot": StandardBlobTier.HOT, "cool": StandardBlobTier.COOL, "cold": StandardBlobTier.COLD}.get(
        options.storage_class.lower()
    )
    if tier is None:
        raise _invalid(
            f"storageClass '{options.storage_class}' is none of Hot, Cool and Cold (what is in Archive can be neither "
            "verified nor read: use a lifecycle rule for that)"
        )
    return tier


def _credential(access: Access) -> AzureSasCredential | dict[str, str] | TokenCredential:
    if access.key:
        return {"account_name": access.account or "", "account_key": access.key}
    if access.sas:
        _hide_signatures()
        return AzureSasCredential(access.sas)
    try:
        from azure.identity import DefaultAzureCredential
    except ImportError as error:
        raise StorageError(
            Reason.BACKEND_NOT_INSTALLED,
            "the process's identity needs azure-identity: pip install 'checkpoint-operator[azure]'",
            backend="azure",
        ) from error
    # The metadata address is asked only where the environment says so (AZURE_TOKEN_CREDENTIALS): anywhere else whoever has
    # that address in the network could be the one who answers.
    return DefaultAzureCredential(
        exclude_managed_identity_credential="AZURE_TOKEN_CREDENTIALS" not in os.environ,
        exclude_interactive_browser_credential=True,
        exclude_broker_credential=True,
    )


class _HideSignatures(logging.Filter):
    """A SAS token is a part of the URL, and urllib3 writes each URL to its debug log."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "sig=" in text:
            record.msg, record.args = re.sub(r"sig=[^&\s'\"]+", "sig=***", text), ()
        return True


_FILTER = _HideSignatures()


def _hide_signatures() -> None:
    for name in ("urllib3.connectionpool", "urllib3.util.retry"):
        logging.getLogger(name).addFilter(_FILTER)  # a filter that is there already is not added again


def _invalid(what: str) -> StorageError:
    return StorageError(Reason.INVALID_SPEC, what, backend="azure")
