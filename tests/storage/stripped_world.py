"""A store that has never heard of conditions or checksums: SeaweedFS behind a proxy that takes both out of all that is said.

Shared places are refused there, so everything is stored with layout Unique, in a folder of its own below the place. This
world hides that folder: ``run/config.json`` is the file of the newest upload to ``run``, wherever that lies. So the suite
that holds for every store runs here word for word, but for what :data:`CANNOT_HOLD` names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from proxy import proxy
from s3_world import S3World, world_on
from storage_world import MARKER

import local_cluster as lc
from checkpoint_operator.api.protocol import Layout, Stored
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage.objects import unique_place

SHARED = "two artifacts never share a place of layout Unique, so neither can find the other's there"
OWN = "a folder of layout Unique is empty whatever lies around it, so nothing of a stranger's is ever in the way"
STATE = "another state of the source has a folder of its own, so no earlier mover is in its way"
BELOW = "with layout Unique the URI is a folder below the place"
DIRECT = "asks the backend for a shared place, which is refused here: test_s3_providers.py"

CANNOT_HOLD = {
    "test_the_same_content_of_another_artifact_is_shared": SHARED,
    "test_other_content_of_another_artifact_is_refused_and_the_first_stays": SHARED,
    "test_nothing_is_visible_before_the_commit_and_another_artifact_finds_the_place_busy": SHARED,
    "test_a_deletion_leaves_the_data_of_another_artifact_alone": SHARED,
    "test_foreign_files_at_the_place_are_never_touched": OWN,
    "test_a_foreign_metadata_file_is_neither_overwritten_nor_listed_nor_removed": OWN,
    "test_a_checkpoint_of_a_newer_version_is_not_touched_by_this_one": OWN,
    "test_after_a_change_of_the_source_only_the_new_state_is_committed": STATE,
    "test_every_place_is_kept_exactly": BELOW,
    "test_it_is_said_before_anything_is_written": DIRECT,
}
"""Test → why it cannot hold in this world. Each must exist: ``conftest.py`` looks."""


@dataclass
class StrippedWorld(S3World):
    """``folders``: where the newest upload to each place lies, both below ``base``."""

    folders: dict[str, str] = field(default_factory=dict)

    def uri(self, name: str = "run") -> TargetURI:
        return TargetURI.parse(f"{self.base}/{self._real(name)}")

    def _real(self, path: str) -> str:
        for place in sorted(self.folders, key=len, reverse=True):
            if path == place or path.startswith(f"{place}/"):
                return self.folders[place] + path.removeprefix(place)
        return path

    def _shown(self, path: str) -> str:
        for place, folder in sorted(self.folders.items(), key=lambda item: len(item[1]), reverse=True):
            if path.startswith(f"{folder}/"):
                return place + path.removeprefix(folder)
        return path

    def upload(self, source: Path, name: str = "run", uid: str | None = "uid-a", **options: Any) -> Stored:
        known = self.folders.pop(name, None)  # the place itself is meant, inside of what lies around it
        place = self._real(name)
        try:
            stored = super().upload(source, name, uid, **{**options, "layout": Layout.UNIQUE})
            self.folders[name] = stored.storage_uri.removeprefix(f"{self.base}/")
            return stored
        except BaseException:
            if found := self._begun(place) or known:
                self.folders[name] = found
            raise

    def _begun(self, place: str) -> str | None:
        """The folder of an upload that did not come to its end: the one whose claim is the newest."""
        listed = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.prefix}{place}/").get("Contents", [])
        claims = [item for item in listed if item["Key"].endswith(f"/{MARKER}")]
        newest = max(claims, key=lambda item: item["LastModified"], default=None)
        if newest is None:
            return None
        folder: str = newest["Key"].removeprefix(self.prefix).removesuffix(f"/{MARKER}")
        return folder

    def delete(self, name: str = "run", uid: str | None = "uid-a", **options: Any) -> str:
        if uid is None:
            return super().delete(name, uid, **options)
        known = self.folders.pop(name, None)
        try:
            return super().delete(name, uid, **{**options, "layout": Layout.UNIQUE})
        finally:
            if known:
                self.folders[name] = known

    def put(self, path: str, data: bytes) -> None:
        super().put(self._real(path), data)

    def get(self, path: str) -> bytes:
        return super().get(self._real(path))

    def remove(self, path: str) -> None:
        super().remove(self._real(path))

    def paths(self) -> list[str]:
        return sorted(map(self._shown, super().paths()))

    def real_paths(self) -> list[str]:
        return super().paths()

    def prefix_of_files(self) -> str:
        return f"{unique_place(self.place(), 'uid-a', 'sha256:0123456789abcdef').path}/"

    def uploads(self) -> list[str]:
        return sorted(map(self._shown, super().uploads()))


@pytest.fixture
def s3_stripped_world(object_store: lc.ObjectStore, tmp_path: Path) -> Iterator[StrippedWorld]:
    keys = object_store.access_key, object_store.secret_key
    with (
        proxy(object_store.endpoint, *keys, strips=True) as old,
        world_on("s3_stripped", object_store, tmp_path, StrippedWorld) as world,
    ):
        world.options = world.options.replace(endpoint=old.endpoint)
        yield world
