"""Whose rights are used towards Google, decided before anything is sent: a profile, the process's own, or nobody's.

A credentials file may come from somebody else's Secret, and Google's library does what it says: runs a program, fetches a
URL, sends an assertion to any token endpoint. So the two kinds that need none of this are let through, and they may talk to
Google alone (https://cloud.google.com/docs/authentication/external/externally-sourced-credentials).
"""

import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.storage.errors import StorageError

GOOGLE = "https://storage.googleapis.com"
PROFILE = "gcp.json"
_MAX_BYTES = 64 << 10
_URLS = ("token_uri", "token_url", "token_info_url", "service_account_impersonation_url")


@dataclass(frozen=True)
class Identity:
    """``profile`` is the parsed file; without one the process's own identity is meant, unless ``anonymous``."""

    endpoint: str
    anonymous: bool = False
    profile: Mapping[str, Any] | None = field(default=None, repr=False)


def choose_identity(options: TargetOptions, environment: Mapping[str, str] = os.environ) -> Identity:
    """Where to go, and as whom. Reads the profile, sends nothing.

    Raises:
        StorageError: CredentialsMissing, InvalidSpec for an endpoint that is not https:// (but for a loopback emulator).
    """
    given = options.endpoint or environment.get("STORAGE_EMULATOR_HOST") or GOOGLE
    endpoint = (given if "://" in given else f"http://{given}").rstrip("/")
    parts = urlsplit(endpoint)
    if parts.scheme == "http" and _is_loopback(parts.hostname or ""):
        return Identity(endpoint, anonymous=True)
    if parts.scheme != "https" or not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
        # Not quoted: it may hold a password.
        raise StorageError(
            Reason.INVALID_SPEC,
            "the endpoint for gs:// must be https://host (a token travels there), or http:// on loopback for an emulator",
            backend="gcs",
        )
    if options.credentials_directory is not None:
        return Identity(endpoint, profile=_read_profile(Path(options.credentials_directory) / PROFILE))
    if not options.allow_ambient_credentials:
        raise _missing("no credential profile is configured for this target")
    if not _has_own_identity(environment):
        raise _missing(
            "neither GOOGLE_APPLICATION_CREDENTIALS nor gcloud's application default credentials are there; the metadata "
            "server is asked only where NO_GCE_CHECK=false says so"
        )
    return Identity(endpoint)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _has_own_identity(environment: Mapping[str, str]) -> bool:
    """Whether Google's chain ends before the metadata server, whose identity is the node's and not this process's."""
    if environment.get("GOOGLE_APPLICATION_CREDENTIALS") or environment.get("NO_GCE_CHECK") == "false":
        return True
    home = Path(environment.get("HOME") or Path.home())
    gcloud = Path(environment.get("CLOUDSDK_CONFIG") or home / ".config" / "gcloud")
    return (gcloud / "application_default_credentials.json").is_file()


def _read_profile(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise _missing(f"the credentials have no key '{PROFILE}'") from error
    try:
        found = json.loads(data) if len(data) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        found = None  # not chained: that exception holds the bytes
    if not isinstance(found, dict):
        raise _missing(f"the credentials' key '{PROFILE}' is empty, or no JSON object")
    if problem := profile_problem(found):
        raise _missing(f"the credentials' key '{PROFILE}' is refused: {problem}")
    return found


def profile_problem(profile: Mapping[str, Any]) -> str | None:
    """Why a credentials file is not used, or None. Names keys, never their values."""
    match profile.get("type"):
        case "service_account":
            if missing := [key for key in ("client_email", "private_key", "token_uri") if not _text(profile, key)]:
                return f"it has no '{missing[0]}'"
        case "external_account":
            source = profile.get("credential_source")
            if not isinstance(source, dict) or set(source) - {"file", "format"} or not _text(source, "file"):
                return "of the credential sources only 'file' is allowed: no programs, no URLs, no cloud's metadata"
            if missing := [key for key in ("audience", "subject_token_type", "token_url") if not _text(profile, key)]:
                return f"it has no '{missing[0]}'"
        case _:
            return "its 'type' must be 'service_account' or 'external_account' (workload identity federation)"
    foreign = next((key for key in _URLS if key in profile and not _is_google(profile[key])), None)
    if foreign:
        return f"'{foreign}' is no https:// address of Google's"
    if profile.get("universe_domain", "googleapis.com") != "googleapis.com":
        return "'universe_domain' is not googleapis.com"
    return None


def _text(values: Mapping[str, Any], key: str) -> bool:
    return isinstance(values.get(key), str) and bool(values[key])


def _is_google(url: object) -> bool:
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        host = parts.netloc if parts and parts.scheme == "https" else ""
    except ValueError:
        return False
    # The whole netloc: with a port or user information it is none of Google's.
    return host == "accounts.google.com" or (  # in the key files of before 2018
        host.endswith(".googleapis.com") and host.replace(".", "").replace("-", "").isalnum()
    )


def _missing(what: str) -> StorageError:
    return StorageError(Reason.CREDENTIALS_MISSING, what, backend="gcs")
