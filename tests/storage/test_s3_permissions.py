"""The policy on the page about S3 is read from the page: it is enough, and each line of its table is true."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from s3_world import BUCKET, S3World, credentials
from storage_world import MARKER, MIB, REPOSITORY, make, refused, tree

import local_cluster as lc
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.storage import StorageError, UploadRequest

PAGE = (REPOSITORY / "docs" / "s3.md").read_text("utf-8")
Policy = dict[str, Any]


def policies() -> list[Policy]:
    """Every policy document of the page, in its order."""
    return [json.loads(found) for found in re.findall(r"```json\n(\{.*?\n\})\n```", PAGE, re.DOTALL) if "Statement" in found]


def table() -> dict[str, set[str]]:
    """Action → what the page says cannot be done without it."""
    rows = re.findall(r"^\| `(s3:\w+)` \| ([\w, ]+) \|", PAGE, re.MULTILINE)
    return {action: set(operations.split(", ")) for action, operations in rows}


def without(policy: Policy, action: str) -> Policy:
    statements = [
        {**statement, "Action": [one for one in statement["Action"] if one != action]} for statement in policy["Statement"]
    ]
    return {**policy, "Statement": [statement for statement in statements if statement["Action"]]}


FULL, READ_ONLY, NARROW = policies()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file in several parts beside a small one."""
    return make(tmp_path / "source", {"model.bin": os.urandom(MIB) * 9, "config.json": b"{}"})


@pytest.fixture
def admin(versitygw_world: S3World) -> S3World:
    """The root user, at a place that the page's policies are for."""
    versitygw_world.base = f"s3://{BUCKET}/experiments/{versitygw_world.work.name}"
    versitygw_world.__post_init__()
    return versitygw_world


class As:
    """The same place, seen by a user whom a policy limits."""

    def __init__(self, admin: S3World, versitygw: lc.VersityGW) -> None:
        self._admin, self._versitygw = admin, versitygw
        self._user: lc.Identity | None = None

    def __call__(self, policy: Policy) -> S3World:
        gateway, admin = self._versitygw, self._admin
        if self._user is None:
            self._user = gateway.add_user(admin.work.name[:60], policy)
        gateway.set_policy(self._user, policy)
        keys = credentials(admin.work / "limited", self._user.access_key, self._user.secret_key)
        options = admin.options.replace(credentials_directory=keys)
        return S3World("limited", admin.base, options, admin.work, server=gateway, client=admin.client)


@pytest.fixture
def limited(admin: S3World, versitygw: lc.VersityGW) -> As:
    return As(admin, versitygw)


def leave_half_sent(world: S3World, source: Path) -> None:
    """As a mover that lost its store when every part was there, and before the object was."""

    def fail(verb: str, key: str) -> None:
        if verb == "finish_upload" and key.endswith("/model.bin"):  # not the question about conditions
            raise StorageError(Reason.STORE_UNAVAILABLE, "played: the store is away")

    world.cues.append(fail)
    request = UploadRequest(str(source.parent), source.name, world.uri(), ArtifactMetadata(), "uid-a", keep_parts=True)
    with refused(Reason.STORE_UNAVAILABLE):
        world.backend.upload_artifact(request)
    world.cues.remove(fail)
    assert world.uploads() == ["run/model.bin"]


# What has to be there before, and what is then done by the user whom the policy limits.
Prepare, Act = Callable[[S3World, Path], object], Callable[[S3World, Path], object]
OPERATIONS: dict[str, tuple[Prepare, Act]] = {
    "upload": (lambda *_: None, lambda world, source: world.upload(source)),
    "resume": (leave_half_sent, lambda world, source: world.upload(source)),
    "list": (lambda world, source: world.upload(source), lambda world, _: list(world.backend.list_artifacts(world.uri()))),
    "download": (lambda world, source: world.upload(source), lambda world, _: world.download()),
    "verify": (lambda world, source: world.upload(source), lambda world, _: world.backend.verify_artifact(world.uri())),
    "delete": (lambda world, source: world.upload(source), lambda world, _: world.delete()),
    "clean up": (leave_half_sent, lambda world, _: world.delete()),
}


def clear(admin: S3World) -> None:
    for path in admin.paths():
        admin.remove(path)
    client, place = admin.client, {"Bucket": admin.bucket, "Prefix": admin.prefix}
    for upload in client.list_multipart_uploads(**place).get("Uploads", []):
        client.abort_multipart_upload(Bucket=admin.bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def refusals(admin: S3World, limited: As, policy: Policy, source: Path) -> set[str]:
    """What cannot be done under a policy; whatever fails must fail as refused credentials."""
    found: dict[str, Reason] = {}
    user = limited(policy)
    for name, (prepare, act) in OPERATIONS.items():
        clear(admin)
        prepare(admin, source)
        try:
            act(user, source)
        except StorageError as error:
            found[name] = error.reason
    assert set(found.values()) <= {Reason.CREDENTIALS_REFUSED}, found
    return set(found)


def test_the_page_says_what_each_permission_of_the_policy_is_for() -> None:
    granted = [action for statement in FULL["Statement"] for action in statement["Action"]]
    assert sorted(table()) == sorted(granted)
    assert all(set(operations) <= set(OPERATIONS) and operations for operations in table().values())


def test_the_policy_of_the_page_is_enough_for_everything(admin: S3World, limited: As, source: Path) -> None:
    assert refusals(admin, limited, FULL, source) == set()


@pytest.mark.parametrize("action", table())
def test_without_one_permission_exactly_what_the_page_says_is_refused(
    admin: S3World, limited: As, source: Path, action: str
) -> None:
    assert refusals(admin, limited, without(FULL, action), source) == table()[action]


def test_the_narrow_policy_is_enough_as_well_and_hides_the_rest_of_the_bucket(
    admin: S3World, limited: As, source: Path
) -> None:
    assert refusals(admin, limited, NARROW, source) == set()
    with pytest.raises(StorageError) as caught:
        list(limited(NARROW).manager().list(f"s3://{BUCKET}/other/"))
    assert caught.value.reason is Reason.CREDENTIALS_REFUSED


def test_a_reader_reads_and_changes_nothing(admin: S3World, limited: As, source: Path) -> None:
    assert refusals(admin, limited, READ_ONLY, source) == {"upload", "resume", "delete", "clean up"}
    clear(admin)
    admin.upload(source)
    before = admin.paths()
    reader = limited(READ_ONLY)
    assert reader.backend.get_metadata(reader.uri()).artifact_id == "uid-a"
    for act in (lambda: reader.upload(source, "other"), lambda: reader.delete(force=True)):
        with pytest.raises(StorageError) as caught:
            act()
        assert caught.value.reason is Reason.CREDENTIALS_REFUSED
    assert admin.paths() == before
    assert json.loads(admin.get(f"run/{MARKER}"))["state"] == "Committed"


def test_outside_its_prefix_the_policy_allows_nothing(admin: S3World, limited: As, source: Path) -> None:
    user = limited(FULL)
    user.base = f"s3://{BUCKET}/elsewhere-{admin.work.name}"
    with pytest.raises(StorageError) as caught:
        user.upload(source)
    assert caught.value.reason is Reason.CREDENTIALS_REFUSED


def test_seaweedfs_takes_the_policy_of_the_page_in_its_identity_file(tmp_path: Path, source: Path) -> None:
    identity = lc.Identity("mover", (), policy=json.dumps(FULL))
    with lc.start_object_store("policy", identities=[identity]) as store:
        client = store.client()
        client.create_bucket(Bucket=BUCKET)
        options = TargetOptions(
            endpoint=store.endpoint,
            force_path_style=True,
            credentials_directory=credentials(tmp_path / "keys", identity.access_key, identity.secret_key),
        )
        world = S3World("policy", f"s3://{BUCKET}/experiments", options, tmp_path, server=store, client=client)
        leave_half_sent(world, source)
        world.upload(source)
        world.manager().verify(str(world.uri()))
        assert len(list(world.manager().list(f"{world.base}/"))) == 1
        assert tree(world.download()) == tree(source)
        world.delete()
        assert world.paths() == []
        client.close()


# ---- Keys that are rotated while a mover runs


NOTHING = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": ["s3:GetObject"], "Resource": "arn:aws:s3:::another-bucket/*"}],
}


def rotate(folder: Path, user: lc.Identity) -> None:
    """As Kubernetes does it: another folder with all the keys, then one rename."""
    fresh = folder.with_name(f"{folder.name}-{user.access_key}")
    credentials(fresh, user.access_key, user.secret_key)
    link = folder.with_name(f"{folder.name}-next")
    link.symlink_to(fresh)
    os.replace(link, folder)


@pytest.mark.parametrize("verb", ["start_upload", "put_part", "finish_upload", "list"])
def test_keys_that_are_rotated_in_the_middle_of_an_upload_are_read_again(
    admin: S3World, versitygw: lc.VersityGW, source: Path, verb: str
) -> None:
    name = f"{admin.work.name[:50]}-{verb}"
    old, new = (versitygw.add_user(f"{name}-{which}", FULL) for which in ("old", "new"))
    folder = admin.work / "mounted"
    rotate(folder, old)
    admin.options = admin.options.replace(credentials_directory=str(folder))
    rotated: list[str] = []

    def swap(what: str, _: str) -> None:
        if what == verb and not rotated:
            rotated.append(what)
            rotate(folder, new)
            versitygw.set_policy(old, NOTHING)

    opened = admin.open(admin.uri())
    admin.settings = lambda: ()  # type: ignore[method-assign]  # this store, whatever the folder says by now
    admin._open = {(admin.bucket,): opened}
    admin.cues.append(swap)
    admin.upload(source)
    assert rotated
    assert tree(admin.download()) == tree(source)


def test_keys_that_were_taken_away_are_used_until_the_store_refuses_them(admin: S3World, source: Path) -> None:
    folder = admin.work / "credentials"

    def take_away(verb: str, _: str) -> None:
        if verb == "start_upload":
            (folder / "AWS_SECRET_ACCESS_KEY").write_text("")

    admin.cues.append(take_away)
    admin.upload(source)
    assert (folder / "AWS_SECRET_ACCESS_KEY").read_text() == ""
    with refused(Reason.CREDENTIALS_MISSING):
        admin.manager().get_metadata(str(admin.uri()))
