"""Finds the keys and the place of an S3 bucket, and opens botocore's client and the wire to it. Nothing is sent here."""

import os
import ssl
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import parse_qs, urlsplit

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, NoCredentialsError
from botocore.httpsession import get_cert_path

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage import listing
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.s3_wire import CONNECT_SECONDS, STALL_SECONDS, Wire

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


class Connection:
    """botocore's client for one bucket, and beside it the wire for the bodies, opened at first use."""

    def __init__(
        self, session: botocore.session.Session, client: "S3Client", bucket: str, options: TargetOptions, streams: int
    ) -> None:
        self.client, self.bucket, self.options = client, bucket, options
        self._session, self._streams = session, streams

    @cached_property
    def wire(self) -> Wire:
        """Where botocore sends this bucket's requests (endpoint rules, path or virtual style, the region that it was
        redirected to), the wire does as well: it is read from a URL that botocore signs."""
        signed = urlsplit(
            self.client.generate_presigned_url("get_object", Params={"Bucket": self.bucket, "Key": "x"}, ExpiresIn=1)
        )
        region = parse_qs(signed.query)["X-Amz-Credential"][0].split("/")[-3]
        authorities = self.options.ca_bundle or self._session.get_config_variable("ca_bundle") or get_cert_path(True)
        tls = ssl.create_default_context(cafile=authorities) if signed.scheme == "https" else None
        base = f"{signed.scheme}://{signed.netloc}{signed.path.removesuffix('/x')}"
        credentials = self._session.get_credentials()
        if credentials is None:
            raise NoCredentialsError
        return Wire(base, credentials, region, tls, limit=self._streams)


def connect(uri: TargetURI, options: TargetOptions, streams: int) -> Connection:
    """Make the client for the bucket of a URI. Nothing is sent yet. ``streams``: bodies that may be under way at once.

    Raises:
        StorageError: CredentialsMissing, before any request, where only a profile may be used and it holds no keys;
            RequestRejected where endpoint, region or CA bundle make no client.
    """
    keys = _read_credentials(options)
    session = botocore.session.get_session()
    # Nobody reads the times in a listing, and parsing them takes longer than all the rest of it.
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
    if keys:
        session.set_credentials(keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"], keys.get("AWS_SESSION_TOKEN"))
    try:
        client = session.create_client(
            "s3",
            endpoint_url=options.endpoint or _endpoint_alias(),
            region_name=options.region or (None if session.get_config_variable("region") else "us-east-1"),
            verify=options.ca_bundle,
            config=Config(
                retries={"mode": "standard", "total_max_attempts": 5},
                connect_timeout=CONNECT_SECONDS,
                read_timeout=2 * STALL_SECONDS,
                tcp_keepalive=True,
                max_pool_connections=max(streams, listing.THREADS) + 2,
                signature_version="s3v4",
                s3={"addressing_style": "path" if options.force_path_style else "auto"},
                # We send our own checksum with every body, and compare what comes back with the manifest.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
    except (BotoCoreError, ValueError, OSError) as error:
        raise StorageError(
            Reason.REQUEST_REJECTED, f"the S3 client cannot be made: {error}", uri=str(uri), backend="s3"
        ) from error
    return Connection(session, cast("S3Client", client), uri.bucket, options, streams)


def _read_credentials(options: TargetOptions) -> dict[str, str]:
    if options.credentials_directory is None:
        if not options.allow_ambient_credentials:
            raise StorageError(
                Reason.CREDENTIALS_MISSING, "no credential profile is configured for this target", backend="s3"
            )
        return {}
    folder, found = Path(options.credentials_directory), {}
    for name, required in (("AWS_ACCESS_KEY_ID", True), ("AWS_SECRET_ACCESS_KEY", True), ("AWS_SESSION_TOKEN", False)):
        try:
            value = (folder / name).read_text().strip()
        except OSError as error:
            if required:
                raise StorageError(
                    Reason.CREDENTIALS_MISSING, f"the credentials have no key '{name}'", backend="s3"
                ) from error
            continue
        except UnicodeDecodeError:
            # Not chained: that exception holds the bytes.
            value = ""
        if value.isascii() and value.isprintable() and value:
            found[name] = value
        elif required or value:
            # An empty key would make boto3 look for other credentials: those of the process.
            raise StorageError(
                Reason.CREDENTIALS_MISSING, f"the credentials' key '{name}' is empty, or no line of text", backend="s3"
            )
    return found


def _endpoint_alias() -> str | None:
    """S3_ENDPOINT_URL, where none of the SDK's own variables (which come first) is set."""
    if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        return None
    return os.environ.get("S3_ENDPOINT_URL")
