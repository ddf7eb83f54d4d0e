"""The commit protocol keeps its invariant under every interleaving, and the fence is what keeps it."""

import pytest
from marker_world import Actor, Exploration, LateRequests, explore

A1 = Actor("upload", "A", (("x", "a1"),))
A2 = Actor("upload", "A", (("x", "a2"),))
A_TWO_FILES = Actor("upload", "A", (("x", "a1"), ("y", "a1")))
A_OTHER_FILES = Actor("upload", "A", (("y", "a2"), ("z", "a2")))
A1_JOINER = Actor("upload", "A", (("x", "a1"),), fenced=False)
A2_JOINER = Actor("upload", "A", (("x", "a2"),), fenced=False)
B1 = Actor("upload", "B", (("x", "b1"),))
B_SAME = Actor("upload", "B", (("x", "a1"),))
DELETE_A = Actor("delete", "A")
DELETE_B = Actor("delete", "B")
CLEAN_A = Actor("clean", "A")

SCENARIOS = {
    "three attempts of one artifact whose source changed": (A1, A1, A2),
    "two attempts of one artifact, and another artifact at the same place": (A1, A2, B1),
    "uploaded, deleted twice, while another artifact wants the place": (A1, DELETE_A, B1, DELETE_A),
    "two attempts, a deletion and another artifact at once": (A1, A2, DELETE_A, B1),
    "the source changes and changes back": (A1, A2, A1, DELETE_A),
    "two artifacts with the same content": (A1, DELETE_A, B_SAME, DELETE_A),
    "both artifacts are deleted": (A1, DELETE_A, B1, DELETE_B),
    "what was never committed is cleaned up": (A1, CLEAN_A, B1, A2),
    "several files, of which an earlier attempt left others": (A_TWO_FILES, A_OTHER_FILES, B1),
    "several files, deleted half way": (A_TWO_FILES, DELETE_A, A_OTHER_FILES),
    "a joiner that cannot know whether the earlier mover is gone": (A1, A1_JOINER, B1),
    "a joiner with another state of the source": (A1, A2_JOINER, A2),
}


def explain(exploration: Exploration) -> str:
    return f"{exploration.broken} after {exploration.states} states:\n  " + "\n  ".join(exploration.path)


@pytest.mark.parametrize("actors", SCENARIOS.values(), ids=SCENARIOS)
def test_a_committed_manifest_never_lies_whoever_is_killed_whenever(actors: tuple[Actor, ...]) -> None:
    exploration = explore(actors)
    assert exploration.broken is None, explain(exploration)
    assert exploration.states > 100, "the scenario did not interleave anything"


@pytest.mark.parametrize(
    "scenario",
    [
        "three attempts of one artifact whose source changed",
        "two attempts of one artifact, and another artifact at the same place",
        "two artifacts with the same content",
        "both artifacts are deleted",
    ],
)
def test_a_write_of_a_killed_mover_may_arrive_at_any_later_time(scenario: str) -> None:
    exploration = explore(SCENARIOS[scenario], late=LateRequests.WRITES)
    assert exploration.broken is None, explain(exploration)


@pytest.mark.parametrize("actors", [(A1, DELETE_A, B1, DELETE_B)], ids=["different content"])
def test_a_late_removal_is_harmless_where_the_content_differs(actors: tuple[Actor, ...]) -> None:
    exploration = explore(actors, late=LateRequests.ALL)
    assert exploration.broken is None, explain(exploration)


def test_the_one_residue_is_a_late_removal_that_meets_the_same_content_stored_again() -> None:
    """Named in docs/commit.md: no store can tell the two objects apart when their ETag is a hash of the content."""
    exploration = explore(SCENARIOS["two artifacts with the same content"], late=LateRequests.ALL)
    assert exploration.broken == "committed x=a1, the store holds None"
    assert any(" late Found(" in step for step in exploration.path)


@pytest.mark.parametrize(
    "actors",
    [(A1, A2, A1), (A1, A2, DELETE_A)],
    ids=["claims are swapped under a running mover", "data is deleted under a running mover"],
)
def test_without_the_fence_the_invariant_breaks(actors: tuple[Actor, ...]) -> None:
    """Shows that the walk can see a violation at all, and why EarlierMoverNotGone exists."""
    exploration = explore(actors, fence=False)
    assert exploration.broken is not None


def test_every_ending_of_a_crowded_place_is_one_that_the_design_names() -> None:
    exploration = explore((A1, A2, DELETE_A, B1))
    assert {outcome.partition(": ")[2] for outcome in exploration.outcomes} == {
        "committed",
        "removed",
        "kept",
        "TargetBusy",
        "TargetExists",
    }


def test_the_same_content_of_another_artifact_is_shared_not_stored_twice() -> None:
    assert "upload B: shared" in explore((A1, B_SAME)).outcomes
