"""Which storage account, and with which key: decided before the SDK is asked, which would go on looking elsewhere."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.storage.azure_blocks import is_base64
from checkpoint_operator.storage.errors import StorageError

CONNECTION_STRING = "AZURE_STORAGE_CONNECTION_STRING"
ACCOUNT = "AZURE_STORAGE_ACCOUNT"
KEY = "AZURE_STORAGE_KEY"
SAS = "AZURE_STORAGE_SAS_TOKEN"
NAMES = (CONNECTION_STRING, ACCOUNT, KEY, SAS)


@dataclass(frozen=True)
class Access:
    """``endpoint`` is the account's Blob service. Without ``key`` and ``sas`` the process's own identity is meant."""

    endpoint: str
    account: str | None
    key: str | None = field(default=None, repr=False)
    sas: str | None = field(default=None, repr=False)


def find_access(options: TargetOptions) -> Access:
    """Where the account is and how to get in: a profile's folder, or, only where that is allowed, the environment.

    Of a connection string, a key and a SAS token the first in this order is used; one that is there but empty or garbled
    is an error, never a reason to look further.

    Raises:
        StorageError: CredentialsMissing, with the name of the variable and never its content.
    """
    if options.credentials_directory is not None:
        access = _access(_read_folder(Path(options.credentials_directory)), options)
        if access.key is None and access.sas is None:
            raise _missing(f"the credentials have neither '{CONNECTION_STRING}' nor '{KEY}' nor '{SAS}'")
        return access
    if not options.allow_ambient_credentials:
        raise _missing("no credential profile is configured for this target")
    return _access({name: value for name in NAMES if (value := os.environ.get(name, "").strip())}, options)


def _read_folder(folder: Path) -> dict[str, str]:
    found = {}
    for name in NAMES:
        try:
            value = (folder / name).read_text().strip()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _missing(f"the credentials' '{name}' cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:
            # Not chained: that exception holds the bytes.
            value = ""
        if not (value.isascii() and value.isprintable() and value):
            raise _missing(f"the credentials' '{name}' is empty, or no line of text")
        found[name] = value
    return found


def _access(found: Mapping[str, str], options: TargetOptions) -> Access:
    settings = _settings(found[CONNECTION_STRING]) if CONNECTION_STRING in found else {}
    named = settings.get("accountname") if settings else found.get(ACCOUNT)
    if named and options.azure_account and named != options.azure_account:
        raise _missing(f"the credentials are for the account '{named}', the target is in '{options.azure_account}'")
    account = options.azure_account or named
    key = settings.get("accountkey") if settings else found.get(KEY)
    sas = settings.get("sharedaccesssignature") if settings else found.get(SAS)
    if key:
        sas = None
        if not account:
            raise _missing(f"the credentials have a key and no account: add '{ACCOUNT}'")
        if not is_base64(key):
            raise _missing(f"the credentials' key of the account '{account}' is no base64: copy it whole")
    elif sas:
        sas = sas.removeprefix("?")
        if "sig" not in parse_qs(sas):
            raise _missing("the credentials' SAS token has no signature ('sig='): copy it whole")
    return Access(_endpoint(account, settings, options), account, key or None, sas or None)


def _settings(text: str) -> dict[str, str]:
    """The parts of a connection string, which must hold a key or a signature: the SDK would go in as nobody.

    https://learn.microsoft.com/azure/storage/common/storage-configure-connection-string
    """
    parts = [part.partition("=") for part in text.split(";") if part]
    settings = {name.strip().lower(): value.strip() for name, _, value in parts}
    if not settings.get("accountkey") and not settings.get("sharedaccesssignature"):
        raise _missing(f"'{CONNECTION_STRING}' has neither AccountKey nor SharedAccessSignature: copy it whole")
    return settings


def _endpoint(account: str | None, settings: Mapping[str, str], options: TargetOptions) -> str:
    endpoint = options.endpoint or settings.get("blobendpoint")
    if not endpoint:
        if not account:
            raise _missing(f"no storage account is named: set azureAccount, or '{ACCOUNT}'")
        scheme = settings.get("defaultendpointsprotocol", "https")
        return f"{scheme}://{account}.blob.{settings.get('endpointsuffix', 'core.windows.net')}"
    if "?" in endpoint or "@" in endpoint:
        raise StorageError(
            Reason.INVALID_SPEC,
            f"the endpoint has a query or a user: a SAS token belongs into '{SAS}', not into the endpoint",
            backend="azure",
        )
    return endpoint.rstrip("/")


def _missing(what: str) -> StorageError:
    return StorageError(Reason.CREDENTIALS_MISSING, what, backend="azure")
