"""Finds the keys and the place of an S3 bucket, and opens botocore's client and the wire to it. Nothing is sent here."""

import os
import ssl
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import parse_qs, urlsplit

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from botocore.httpsession import get_cert_path

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage import listing
from checkpoint_operator.storage.connector import CONNECT_SECONDS, STALL_SECONDS
from checkpoint_operator.storage.errors import StorageError
from checkpoint_operator.storage.s3_keys import MountedKeys
from checkpoint_operator.storage.s3_wire import Wire

if TYPE_CHECKING:
    from botocore.loaders import Loader
    from botocore.session import Session
    from mypy_boto3_s3.client import S3Client


class Connection:
    """botocore's client for one bucket, and beside it the wire for the bodies; each is opened at first use."""

    def __init__(self, bucket: str, options: TargetOptions, keys: MountedKeys | None, streams: int) -> None:
        self.bucket, self.options = bucket, options
        self._keys, self._streams = keys, streams
        self._endpoint = options.endpoint or _endpoint_alias()
        self._opening = threading.Lock()
        self._client: S3Client | None = None
        self._wire: Wire | None = None
        self._session: Session

    @property
    def client(self) -> "S3Client":
        """For everything but bodies. Raises RequestRejected where endpoint, region or CA bundle make no client."""
        with self._opening:
            if self._client is None:
                self._client = self._open_client()
            return self._client

    @property
    def wire(self) -> Wire:
        """For bodies. Raises as :attr:`client` does, and botocore's NoCredentialsError."""
        client = None if self._is_plain() else self.client
        with self._opening:
            if self._wire is None:
                self._wire = self._open_plain_wire() if client is None else self._open_wire(client)
            return self._wire

    def follow(self, key: str) -> None:
        """Let botocore find the region of the bucket, by asking for a key; the wire begins anew from there."""
        with suppress(ClientError):
            self.client.head_object(Bucket=self.bucket, Key=key)
        client = self.client
        with self._opening:
            self._wire = self._open_wire(client)

    def _is_plain(self) -> bool:
        """Whether everything about the wire was said: then it need not wait for botocore's client, which takes a third of
        a second of CPU to make; a download needs none."""
        said = self.options.endpoint and self.options.force_path_style and self.options.region
        return bool(said) and self._keys is not None

    def _open_plain_wire(self) -> Wire:
        assert self._keys is not None
        endpoint = (self.options.endpoint or "").rstrip("/")
        tls = self._trust(None) if urlsplit(endpoint).scheme == "https" else None
        return Wire(f"{endpoint}/{self.bucket}", self._keys, self.options.region or "", tls, limit=self._streams)

    def _open_wire(self, client: "S3Client") -> Wire:
        """Where botocore sends this bucket's requests (endpoint rules, path or virtual style, the region that it was
        redirected to), the wire does as well: it is read from a URL that botocore signs."""
        signed = urlsplit(
            client.generate_presigned_url("get_object", Params={"Bucket": self.bucket, "Key": "x"}, ExpiresIn=1)
        )
        region = parse_qs(signed.query)["X-Amz-Credential"][0].split("/")[-3]
        bundle = self._session.get_config_variable("ca_bundle")
        tls = self._trust(bundle) if signed.scheme == "https" else None
        base = f"{signed.scheme}://{signed.netloc}{signed.path.removesuffix('/x')}"
        credentials = self._session.get_credentials()
        if credentials is None:
            raise NoCredentialsError
        return Wire(base, credentials, region, tls, limit=self._streams)

    def _trust(self, configured: str | None) -> ssl.SSLContext:
        path = self.options.ca_bundle or configured or str(get_cert_path(True))
        try:
            return ssl.create_default_context(cafile=path)
        except OSError as error:  # ssl.SSLError is one
            raise self._rejected(f"the CA bundle '{path}' cannot be read: {error.strerror or error}") from error

    def _open_client(self) -> "S3Client":
        import botocore.session

        options = self.options
        try:
            self._session = session = botocore.session.get_session()
            session.register_component("data_loader", _loader(session))
            # Nobody reads the times in a listing, and parsing them takes longer than all the rest of it.
            session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
            if self._keys:
                session.register_component("credential_provider", self._keys)
            bundle = options.ca_bundle or session.get_config_variable("ca_bundle")
            if bundle:
                self._trust(bundle)
            client = session.create_client(
                "s3",
                endpoint_url=self._endpoint,
                region_name=options.region or (None if session.get_config_variable("region") else "us-east-1"),
                verify=bundle,
                config=Config(
                    retries={"mode": "standard", "total_max_attempts": 5},
                    connect_timeout=CONNECT_SECONDS,
                    read_timeout=2 * STALL_SECONDS,
                    tcp_keepalive=True,
                    max_pool_connections=max(self._streams, listing.THREADS) + 2,
                    signature_version="s3v4",
                    s3={"addressing_style": "path" if options.force_path_style else "auto"},
                    # We send our own checksum with every body, and compare what comes back with the manifest.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )
        except (BotoCoreError, ValueError) as error:
            raise self._rejected(f"the S3 client cannot be made: {error}") from error
        return cast("S3Client", client)

    def _rejected(self, what: str) -> StorageError:
        return StorageError(Reason.REQUEST_REJECTED, what, uri=f"s3://{self.bucket}", backend="s3")


def connect(uri: TargetURI, options: TargetOptions, streams: int) -> Connection:
    """A connection to the bucket of a URI. Nothing is sent yet. ``streams``: bodies that may be under way at once.

    Raises:
        StorageError: CredentialsMissing, before any request, where only a profile may be used and it holds no keys.
    """
    return Connection(uri.bucket, options, _find_keys(options), streams)


def _loader(session: "Session") -> "Loader":
    """botocore's own, which would look into the folder of each of four hundred services before it opens that of S3."""
    from botocore.loaders import create_loader

    loader = create_loader(session.get_config_variable("data_path"))
    folders = [path for path in map(Path, loader.search_paths) if path.is_dir()]
    names = sorted({entry.name for folder in folders for entry in os.scandir(folder)})
    loader.list_available_services = lambda type_name: names  # type: ignore[method-assign]
    return loader


def _find_keys(options: TargetOptions) -> MountedKeys | None:
    """None: botocore looks for the identity of the process."""
    if options.credentials_directory is not None:
        return MountedKeys(Path(options.credentials_directory))
    if not options.allow_ambient_credentials:
        raise StorageError(Reason.CREDENTIALS_MISSING, "no credential profile is configured for this target", backend="s3")
    return None


def _endpoint_alias() -> str | None:
    """S3_ENDPOINT_URL, where none of the SDK's own variables (which come first) is set."""
    if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        return None
    return os.environ.get("S3_ENDPOINT_URL")
