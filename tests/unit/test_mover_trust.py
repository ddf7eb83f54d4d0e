"""Authorities that travel in the plan: a private file for as long as the mover runs, and nothing without them."""

import stat
from pathlib import Path

import pytest

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.mover.trust import trusted
from checkpoint_operator.storage.errors import StorageError

PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


def test_the_bundle_is_a_file_of_our_user_alone_and_goes_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with trusted(TargetOptions(ca_bundle_pem=PEM, region="eu-1")) as options:
        assert options.ca_bundle is not None
        path = Path(options.ca_bundle)
        assert path.parent == tmp_path
        assert path.read_text() == PEM
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (options.ca_bundle_pem, options.region) == (None, "eu-1")
    assert not path.exists()


def test_without_a_bundle_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = TargetOptions(ca_bundle="/etc/ca.pem")
    with trusted(options) as same:
        assert same is options
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_cannot_be_written_to_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(StorageError) as caught, trusted(TargetOptions(ca_bundle_pem=PEM)):
        pass
    assert caught.value.reason is Reason.INTERNAL
