"""The small pure parts of the reconciler: the cache that never goes back in time, and minimal patches."""

from typing import Any

from checkpoint_operator.controller.cache import ArtifactCache
from checkpoint_operator.controller.reconciler import merge_patch


def body(version: int, uid: str = "u", name: str = "a", uri: str = "s3://b/x", **status: Any) -> dict[str, Any]:
    metadata = {"namespace": "ns", "name": name, "uid": uid, "resourceVersion": str(version), "managedFields": ["big"]}
    return {
        "metadata": metadata,
        "spec": {"source": {"persistentVolumeClaim": {"claimName": "c"}}, "target": {"uri": uri}},
        "status": status,
    }


def version_of(cache: ArtifactCache) -> str:
    found = cache.get(("ns", "a"))
    assert found is not None
    return str(found["metadata"]["resourceVersion"])


def test_the_cache_keeps_the_newer_version_whichever_comes_last() -> None:
    cache = ArtifactCache()
    cache.put(body(9))
    cache.put(body(10))
    cache.put(body(9))
    assert version_of(cache) == "10"


def test_an_object_that_was_made_again_under_the_same_name_replaces_the_old_one() -> None:
    cache = ArtifactCache()
    cache.put(body(10))
    cache.put(body(12, uid="other"))
    cache.put(body(11))
    assert version_of(cache) == "12"


def test_what_was_read_live_is_believed_even_if_it_looks_older() -> None:
    cache = ArtifactCache()
    cache.put(body(10))
    cache.put(body(5), live=True)
    assert version_of(cache) == "5"


def test_the_cache_does_not_keep_what_nobody_reads() -> None:
    cache = ArtifactCache()
    cache.put(body(1))
    found = cache.get(("ns", "a"))
    assert found is not None
    assert "managedFields" not in found["metadata"]


def test_only_a_ready_artifact_that_stays_counts_as_naming_the_data() -> None:
    cache = ArtifactCache()
    cache.put(body(1, phase="Ready"))
    cache.put(body(2, name="b", uid="v", phase="Deleting"))
    leaving = body(3, name="c", uid="w", phase="Ready")
    leaving["metadata"]["deletionTimestamp"] = "2026-11-24T12:00:00Z"
    cache.put(leaving)
    cache.put(body(4, name="d", uid="x", uri="s3://b/other", phase="Ready"))
    assert [found["metadata"]["name"] for found in cache.ready_at("s3://b/x/")] == ["a"]


def test_the_cache_does_not_grow_with_what_users_write_into_annotations() -> None:
    cache = ArtifactCache()
    big = body(1)
    big["metadata"]["annotations"] = {"mine": "x" * 1000, "checkpoints.rlhf.dev/retry": "1"}
    big["metadata"]["labels"] = {"mine": "x"}
    cache.put(big)
    found = cache.get(("ns", "a"))
    assert found is not None
    assert found["metadata"]["annotations"] == {"checkpoints.rlhf.dev/retry": "1"}
    assert "labels" not in found["metadata"]


def test_a_patch_has_what_changed_and_null_for_what_is_gone() -> None:
    old = {"a": 1, "b": {"c": 1, "d": 2}, "e": [1], "f": "gone"}
    new = {"a": 1, "b": {"c": 1, "d": 3}, "e": [2], "g": "new"}
    assert merge_patch(old, new) == {"b": {"d": 3}, "e": [2], "f": None, "g": "new"}


def test_no_change_is_no_patch() -> None:
    assert merge_patch({"a": {"b": [1]}}, {"a": {"b": [1]}}) == {}


def test_of_an_artifact_that_has_ended_only_a_remnant_is_kept() -> None:
    cache = ArtifactCache()
    full = body(1, phase="Ready", observedGeneration=1, contentDigest="sha256:c")
    full["metadata"]["generation"] = 1
    full["spec"]["tags"] = {"a": "b"}
    cache.put(full)
    found = cache.get(("ns", "a"))
    assert found is not None
    assert "tags" not in found["spec"]
    assert found["status"] == {"phase": "Ready", "observedGeneration": 1}
    full["metadata"] = {**full["metadata"], "resourceVersion": "2", "deletionTimestamp": "2026-11-24T12:00:00Z"}
    cache.put(full)
    whole = cache.get(("ns", "a"))
    assert whole is not None
    assert whole["spec"]["tags"] == {"a": "b"}
