"""What every test may rely on: no credentials and no cluster of whoever runs the tests, nothing that leaves this machine."""

import os

import pytest

_FOREIGN = ("AWS_", "AZURE_", "GOOGLE_", "CHECKPOINT_", "RLHF_", "S3_ENDPOINT_URL")


def pytest_configure(config: pytest.Config) -> None:
    for name in [name for name in os.environ if name.startswith(_FOREIGN) and name != "CHECKPOINT_OPERATOR_CACHE"]:
        del os.environ[name]
    # Else an AWS client without credentials asks the metadata address of a cloud.
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
