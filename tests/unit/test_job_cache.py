"""What is remembered of Jobs and pods: nothing comes back from the dead, and nothing that is needed is dropped too early."""

from typing import Any

from checkpoint_operator.api import names
from checkpoint_operator.controller.jobs.cache import MoverCache
from checkpoint_operator.controller.jobs.observe import read_job, read_pod

LABELS = {names.LABEL_ARTIFACT_UID: "a", names.LABEL_ARTIFACT_NAME: "c"}
TIME = "2026-11-25T12:00:00Z"


def job(version: int, uid: str = "j", namespace: str = "ns", name: str = "ckpt-a-1") -> dict[str, Any]:
    owner = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": "c", "uid": "a", "controller": True}
    return {
        "metadata": {
            "namespace": namespace,
            "name": name,
            "uid": uid,
            "resourceVersion": str(version),
            "creationTimestamp": TIME,
            "labels": LABELS,
            "ownerReferences": [owner],
        }
    }


def pod(version: int, *, by: str | None = "j", phase: str = "Running") -> dict[str, Any]:
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "ckpt-a-1", "uid": by, "controller": True}
    return {
        "metadata": {
            "namespace": "ns",
            "name": "p",
            "uid": "p",
            "resourceVersion": str(version),
            "creationTimestamp": TIME,
            "labels": LABELS,
            "ownerReferences": [owner] if by else [],
        },
        "status": {"phase": phase},
    }


def gone(cache: MoverCache) -> bool | None:
    found = cache.job("ns", "ckpt-a-1")
    return found.gone if found else None


def test_an_event_names_the_artifact_that_it_is_about() -> None:
    cache = MoverCache(by_namespace=False)
    assert cache.saw_job("ADDED", job(1)) == ("ns", "c")
    assert cache.saw_pod("ADDED", pod(2)) == ("ns", "c")
    assert [found.name for found in cache.jobs_of(("ns", "c"))] == ["ckpt-a-1"]
    assert [found.name for found in cache.pods_of("ns", "a")] == ["p"]
    assert cache.pods_of("elsewhere", "a") == []


def test_the_newer_version_stays_whichever_comes_last() -> None:
    cache = MoverCache(by_namespace=False)
    cache.saw_pod("MODIFIED", pod(9, phase="Failed"))
    cache.saw_pod("MODIFIED", pod(8))
    assert [found.phase for found in cache.pods_of("ns", "a")] == ["Failed"]


def test_what_was_deleted_is_kept_until_it_is_not_needed_any_more() -> None:
    cache = MoverCache(by_namespace=False)
    cache.saw_job("ADDED", job(1))
    cache.saw_pod("ADDED", pod(2))
    cache.saw_pod("DELETED", pod(3))
    cache.saw_job("DELETED", job(4))
    assert gone(cache) is True
    assert [found.gone for found in cache.pods_of("ns", "a")] == [True]
    found = cache.job("ns", "ckpt-a-1")
    assert found is not None
    cache.forget(found)
    assert gone(cache) is None
    assert cache.pods_of("ns", "a") == []


def test_an_old_event_does_not_bring_back_what_was_deleted() -> None:
    cache = MoverCache(by_namespace=False)
    cache.saw_job("ADDED", job(1))
    cache.saw_job("DELETED", job(4))
    cache.saw_job("MODIFIED", job(3))
    assert gone(cache) is True
    cache.saw_pod("ADDED", pod(2))
    cache.saw_pod("DELETED", pod(5))
    cache.saw_pod("MODIFIED", pod(4))
    assert [found.gone for found in cache.pods_of("ns", "a")] == [True]


def test_a_list_that_was_begun_before_the_end_does_not_bring_back_what_was_dropped() -> None:
    cache = MoverCache(by_namespace=False)
    cache.saw_job("ADDED", job(1))
    cache.saw_pod("ADDED", pod(2))
    found = cache.job("ns", "ckpt-a-1")
    assert found is not None
    cache.forget(found)
    mark = cache.mark()
    cache.saw_pod("DELETED", pod(3))
    cache.saw_job("DELETED", job(4))
    cache.put_job(read_job(job(1)))
    cache.put_pod(read_pod(pod(2)))
    cache.sweep(mark, {"j"}, {"p"})
    assert (cache.jobs(), list(cache.pods())) == ([], [])


def test_another_job_of_the_same_name_replaces_the_one_that_is_gone() -> None:
    cache = MoverCache(by_namespace=False)
    cache.saw_job("ADDED", job(1))
    cache.saw_job("DELETED", job(4))
    cache.saw_job("ADDED", job(5, uid="other"))
    assert gone(cache) is False
    cache.saw_job("DELETED", job(4))
    assert gone(cache) is False


def test_of_what_was_forgotten_the_end_leaves_nothing() -> None:
    cache = MoverCache(by_namespace=False)
    cache.saw_job("ADDED", job(1))
    cache.saw_pod("ADDED", pod(2))
    found = cache.job("ns", "ckpt-a-1")
    assert found is not None
    cache.forget(found)
    # It may still run: who wants to know whether an earlier mover is gone asks for it.
    assert len(cache.pods_of("ns", "a")) == 1
    cache.saw_pod("DELETED", pod(6))
    cache.saw_job("DELETED", job(7))
    assert (cache.jobs(), list(cache.pods())) == ([], [])


def test_a_mover_whose_job_was_deleted_and_who_was_left_alone_is_still_a_mover() -> None:
    cache = MoverCache(by_namespace=False)
    cache.saw_pod("ADDED", pod(2))
    cache.saw_pod("MODIFIED", pod(3, by=None))
    assert [found.job_uid for found in cache.pods_of("ns", "a")] == ["j"]


def test_a_watch_that_began_anew_makes_old_what_it_has_not_listed() -> None:
    cache = MoverCache(by_namespace=False)
    cache.saw_job("ADDED", job(1))
    cache.saw_job("ADDED", job(2, uid="k", name="ckpt-b-1"))
    assert cache.is_fresh("ns", "ckpt-a-1")
    cache.saw_job(None, job(2, uid="k", name="ckpt-b-1"))
    assert cache.is_fresh("ns", "ckpt-b-1")
    assert not cache.is_fresh("ns", "ckpt-a-1")
    cache.saw_job(None, job(1))
    assert cache.is_fresh("ns", "ckpt-a-1")
    assert not cache.is_fresh("ns", "never-seen")


def test_a_watch_of_another_namespace_says_nothing_about_this_one() -> None:
    cache = MoverCache(by_namespace=True)
    cache.saw_job("ADDED", job(1))
    cache.saw_job(None, job(2, namespace="other"))
    assert cache.is_fresh("ns", "ckpt-a-1")


def test_what_a_list_does_not_have_is_gone_unless_it_came_meanwhile() -> None:
    cache = MoverCache(by_namespace=False)
    cache.saw_job("ADDED", job(1))
    cache.saw_pod("ADDED", pod(2))
    mark = cache.mark()
    cache.saw_job("ADDED", job(3, uid="k", name="ckpt-b-1"))
    cache.sweep(mark, set(), set())
    assert gone(cache) is True
    assert [found.gone for found in cache.pods_of("ns", "a")] == [True]
    later = cache.job("ns", "ckpt-b-1")
    assert later is not None
    assert not later.gone


def test_what_is_gone_for_two_lists_is_dropped() -> None:
    cache = MoverCache(by_namespace=False)
    cache.saw_job("ADDED", job(1))
    cache.saw_pod("ADDED", pod(2))
    for _ in range(2):
        cache.sweep(cache.mark(), set(), set())
    assert (cache.jobs(), list(cache.pods())) == ([], [])
