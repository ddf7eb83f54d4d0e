"""Which storage account, and with which key: decided before the SDK is asked, which would go on looking elsewhere."""

import os
import re
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
# The public clouds: https://learn.microsoft.com/azure/storage/common/storage-account-overview#standard-endpoints
_SUFFIXES = ("core.windows.net", "core.usgovcloudapi.net", "core.chinacloudapi.cn")
_NAME = re.compile("[a-z0-9]{3,24}(-secondary)?")
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
        StorageError: CredentialsMissing, with the name of the variable and never its content; EndpointNotAllowed.
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
    own = settings.get("blobendpoint")
    if own and options.only_this_endpoint and not options.endpoint:
        name, _, suffix = own.rstrip("/").removeprefix("https://").partition(".blob.")
        if not own.startswith("https://") or not _NAME.fullmatch(name) or suffix not in _SUFFIXES:
            raise _own_address()
    endpoint = options.endpoint or own
    if not endpoint:
        if not account:
            raise _missing(f"no storage account is named: set azureAccount, or '{ACCOUNT}'")
        if not _NAME.fullmatch(account):
            raise _missing(f"the storage account '{ACCOUNT}' is no account's name: 3 to 24 of a-z and 0-9")
        scheme, suffix = settings.get("defaultendpointsprotocol", "https"), settings.get("endpointsuffix", _SUFFIXES[0])
        if options.only_this_endpoint and (scheme != "https" or suffix not in _SUFFIXES):
            raise _own_address()
        return f"{scheme}://{account}.blob.{suffix}"
    if "?" in endpoint or "@" in endpoint:
        raise StorageError(
            Reason.INVALID_SPEC,
            f"the endpoint has a query or a user: a SAS token belongs into '{SAS}', not into the endpoint",
            backend="azure",
        )
    return endpoint.rstrip("/")


def _own_address() -> StorageError:
    # Not quoted: it may hold a signature.
    return StorageError(
        Reason.ENDPOINT_NOT_ALLOWED,
        f"'{CONNECTION_STRING}' names an address that is not Azure's own: say it in the target's endpoint, where the "
        "admin's list is asked, or leave BlobEndpoint, EndpointSuffix and DefaultEndpointsProtocol out",
        backend="azure",
    )


def _missing(what: str) -> StorageError:
    return StorageError(Reason.CREDENTIALS_MISSING, what, backend="azure")
