"""A container of a real Azurite, for each test a prefix in it that nobody else uses.

The service itself runs nowhere but at Microsoft: what only it can show is listed in docs/azure.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from azure.storage.blob import ContainerClient, ContainerSasPermissions, generate_container_sas
from storage_world import Fault, ObjectWorld

import local_cluster as lc
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage.azure import AzureStore, open_azure
from checkpoint_operator.storage.transfer import STREAMS

CONTAINER = "checkpoints"


@dataclass
class AzureWorld(ObjectWorld):
    server: Any = None
    client: Any = None

    def connect(self, uri: TargetURI) -> AzureStore:
        return open_azure(uri, self.options, STREAMS)

    def store(self) -> AzureStore:
        """A store of its own, as a new process has it."""
        return self.connect(self.uri())

    def suffer(self, fault: Fault) -> None:
        match fault:
            case Fault.WRONG_CREDENTIALS:
                credentials(self.work / "credentials", AZURE_STORAGE_KEY="d3Jvbmctc2VjcmV0")
            case Fault.MISSING_BUCKET:
                self.base = "azure://no-such-container/x"
            case Fault.READ_ONLY:
                self.use_sas("rl")

    def use_sas(self, permissions: str, *, minutes: int = 60) -> str:
        """From now on the backend has a SAS token of the container, with these letters, and nothing else."""
        token = sas(self.server, self.bucket, permissions, minutes=minutes)
        folder = self.work / "credentials"
        (folder / "AZURE_STORAGE_KEY").unlink(missing_ok=True)
        credentials(folder, AZURE_STORAGE_SAS_TOKEN=token)
        return token

    def put(self, path: str, data: bytes) -> None:
        self.client.get_blob_client(self.prefix + path).upload_blob(data, overwrite=True)

    def get(self, path: str) -> bytes:
        body: bytes = self.client.get_blob_client(self.prefix + path).download_blob().readall()
        return body

    def remove(self, path: str) -> None:
        self.client.get_blob_client(self.prefix + path).delete_blob()

    def paths(self) -> list[str]:
        found = self.client.list_blobs(name_starts_with=self.prefix)
        return sorted(blob.name.removeprefix(self.prefix) for blob in found)


def credentials(folder: Path, **values: str) -> str:
    """A folder of credentials as a mounted Secret has it; what is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name).write_text(value + "\n")
    return str(folder)


def sas(server: lc.Azurite, container: str, permissions: str, *, minutes: int = 60) -> str:
    token: str = generate_container_sas(
        server.account,
        container,
        account_key=server.key,
        permission=ContainerSasPermissions.from_string(permissions),
        expiry=datetime.now(UTC) + timedelta(minutes=minutes),
    )
    return token


@pytest.fixture(scope="session")
def azurite() -> Iterator[lc.Azurite]:
    with lc.start_azurite("storage-tests") as server:
        with server.client() as client:
            client.create_container(CONTAINER)
        yield server


@pytest.fixture
def azure_world(azurite: lc.Azurite, tmp_path: Path) -> Iterator[AzureWorld]:
    options = TargetOptions(
        endpoint=azurite.endpoint,
        credentials_directory=credentials(
            tmp_path / "credentials", AZURE_STORAGE_ACCOUNT=azurite.account, AZURE_STORAGE_KEY=azurite.key
        ),
    )
    client: ContainerClient = azurite.client().get_container_client(CONTAINER)
    base = f"azure://{CONTAINER}/test-{secrets.token_hex(6)}"
    with client:
        yield AzureWorld("azure", base, options, tmp_path, server=azurite, client=client)
