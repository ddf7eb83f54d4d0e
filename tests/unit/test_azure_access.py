"""Where a Secret may send a mover: nowhere but to Azure's own addresses, whatever stands in it."""

from pathlib import Path

import pytest

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.storage.azure_access import find_access
from checkpoint_operator.storage.errors import StorageError

KEY = "AccountKey=a2V5"
SAS = "SharedAccessSignature=sv=1&sig=a2V5"


def options(folder: Path, *, endpoint: str | None = None, **files: str) -> TargetOptions:
    for name, content in files.items():
        (folder / name).write_text(content)
    return TargetOptions(credentials_directory=str(folder), endpoint=endpoint, only_this_endpoint=True)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        (f"AccountName=archive;{KEY}", "https://archive.blob.core.windows.net"),
        (f"AccountName=archive;{KEY};EndpointSuffix=core.chinacloudapi.cn", "https://archive.blob.core.chinacloudapi.cn"),
        (f"BlobEndpoint=https://archive.blob.core.windows.net/;{SAS}", "https://archive.blob.core.windows.net"),
    ],
)
def test_what_azure_itself_hands_out_is_used(tmp_path: Path, text: str, endpoint: str) -> None:
    assert find_access(options(tmp_path, AZURE_STORAGE_CONNECTION_STRING=text)).endpoint == endpoint


@pytest.mark.parametrize(
    "text",
    [
        f"BlobEndpoint=https://evil.example/;{SAS}",
        f"BlobEndpoint=http://169.254.169.254/;AccountName=archive;{KEY}",
        f"BlobEndpoint=https://archive.blob.core.windows.net.evil.example/;{SAS}",
        f"BlobEndpoint=https://evil.example/x.blob.core.windows.net;{SAS}",
        f"BlobEndpoint=https://evil.example?.blob.core.windows.net;{SAS}",
        f"BlobEndpoint=http://archive.blob.core.windows.net;{SAS}",
        f"AccountName=archive;{KEY};EndpointSuffix=evil.example",
        f"AccountName=archive;{KEY};DefaultEndpointsProtocol=http",
    ],
)
def test_an_address_among_the_keys_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    with pytest.raises(StorageError) as caught:
        find_access(options(tmp_path, AZURE_STORAGE_CONNECTION_STRING=text))
    assert caught.value.reason is Reason.ENDPOINT_NOT_ALLOWED
    assert "evil" not in str(caught.value)
    assert "sig" not in str(caught.value)


@pytest.mark.parametrize("account", ["evil.example/", "evil.example/x?", "a@evil.example/", "evil.example#", "ab", "A" * 10])
def test_an_account_that_is_no_name_makes_no_address(tmp_path: Path, account: str) -> None:
    with pytest.raises(StorageError) as caught:
        find_access(options(tmp_path, AZURE_STORAGE_ACCOUNT=account, AZURE_STORAGE_KEY="a2V5"))
    assert caught.value.reason is Reason.CREDENTIALS_MISSING


def test_the_targets_own_endpoint_which_the_admin_listed_is_before_all(tmp_path: Path) -> None:
    text = f"BlobEndpoint=https://evil.example/;AccountName=archive;{KEY}"
    given = options(tmp_path, endpoint="http://azurite.example:10000/archive", AZURE_STORAGE_CONNECTION_STRING=text)
    assert find_access(given).endpoint == "http://azurite.example:10000/archive"
