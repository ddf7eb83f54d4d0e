"""Who may start a mover: caps hold, one place has one mover, no namespace starves another, and few are told anew."""

import heapq
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_operator.api.artifact import parse_artifact
from checkpoint_operator.controller import scheduling
from checkpoint_operator.controller.scheduling import Demand, Hindrance, Limits, Places, bucket_of

START = datetime(2026, 11, 24, tzinfo=UTC)
LIMITS = Limits(total=4, per_namespace=2, per_bucket=100)


def demand(namespace: str, number: int, place: str | None = None, bucket: str = "s3://b") -> Demand:
    return Demand((namespace, f"c{number}"), place or f"{namespace}/{number}", START + timedelta(seconds=number), bucket)


def places(running: Sequence[Demand] = (), waiting: Sequence[Demand] = (), limits: Limits = LIMITS) -> Places:
    made = Places(limits)
    for item in running:
        made.take(item)
    for item in waiting:
        made.wait(item)
    return made


def told(made: Places, who: Demand, seconds: float = 0, before: str | None = None) -> str | None:
    made.wait(who)
    return made.explain(who, START + timedelta(seconds=seconds), before)


def test_a_free_operator_starts_whoever_asks() -> None:
    assert told(places(), demand("a", 1)) is None


def test_no_more_movers_run_than_the_cap_allows() -> None:
    running = [demand("a", 1), demand("a", 2), demand("b", 1), demand("b", 2)]
    assert told(places(running), demand("c", 1)) == "position 1 of 1 in the queue; 4 movers are running (maxMovers 4)"


def test_no_namespace_has_more_movers_than_its_cap() -> None:
    made = places([demand("a", 1), demand("a", 2)])
    assert told(made, demand("a", 3)) == (
        "position 1 of 1 in the queue; 2 movers are running in this namespace (maxMoversPerNamespace 2)"
    )
    assert told(made, demand("b", 3)) is None


def test_no_bucket_has_more_movers_than_its_cap() -> None:
    made = places([demand("a", 1)], limits=Limits(4, 4, 1))
    assert told(made, demand("b", 2)) == (
        "position 1 of 1 in the queue; 1 mover is writing to s3://b (maxMoversPerBucket 1)"
    )
    assert told(made, demand("b", 3, bucket="s3://other")) is None


def test_one_place_has_one_mover_at_a_time() -> None:
    made = places([demand("a", 1, "p")])
    assert told(made, demand("a", 2, "p")) == "position 1 of 1 in the queue; c1 is using the same target"


def test_who_uses_the_same_target_in_another_namespace_is_not_told() -> None:
    made = places([demand("secret", 1, "p")])
    said = told(made, demand("b", 2, "p"))
    assert said is not None
    assert "secret" not in said
    assert said.endswith("an artifact of another namespace is using the same target")


def test_a_place_stays_taken_while_one_of_two_movers_that_were_found_there_still_runs() -> None:
    made = places([demand("a", 1, "p"), demand("a", 2, "p")])
    made.release(("a", "c1"))
    assert told(made, demand("b", 3, "p")) is not None
    made.release(("a", "c2"))
    assert told(made, demand("b", 3, "p")) is None


def test_of_two_that_want_the_same_place_the_older_goes_first() -> None:
    older, younger = demand("a", 1, "p"), demand("b", 2, "p")
    made = places([], [younger, older])
    assert made.next() == [older]
    assert made.hindrance(younger) is Hindrance.NOT_FIRST


def test_a_namespace_with_a_thousand_artifacts_does_not_starve_one_with_a_single_one() -> None:
    crowd = [demand("big", number) for number in range(1000)]
    small = demand("small", 5000)
    made = places([demand("big", -1), demand("other", 0), demand("other", 1)], [*crowd, small])
    assert made.next() == [small]
    assert made.hindrance(crowd[0]) is Hindrance.NOT_FIRST
    assert made.hindrance(small) is None
    assert made.position(small) == 1
    assert made.position(crowd[0]) == 2


def test_within_a_namespace_whoever_waits_longest_goes_first() -> None:
    assert places([], [demand("a", 3), demand("a", 1), demand("a", 2)]).next() == [demand("a", 1), demand("a", 2)]


def test_a_full_bucket_holds_up_nobody_who_goes_to_another_one() -> None:
    waiting = [*(demand("a", number, bucket="s3://slow") for number in range(50)), demand("a", 99, bucket="s3://fast")]
    made = places([demand("b", 0, bucket="s3://slow")], waiting, Limits(4, 4, 1))
    assert made.next() == [demand("a", 99, bucket="s3://fast")]


def test_whoever_wants_another_target_than_before_waits_for_that_one() -> None:
    made = places([demand("x", 0, "p")], [demand("a", 1, "p")])
    assert made.next() == []
    made.wait(demand("a", 1, "q"))
    assert made.next() == [demand("a", 1, "q")]
    assert made.waiting == 1


def test_a_raised_cap_lets_in_as_many_more_and_a_lowered_one_stops_nobody() -> None:
    waiting = [demand("abc"[number % 3], number) for number in range(30)]
    made = places([demand("x", 100)], waiting, Limits(1, 9, 9))
    assert made.next() == []
    made.limits = Limits(4, 9, 9)
    assert made.next() == waiting[:3]
    for item in waiting[:3]:
        made.take(item)
    made.limits = Limits(2, 9, 9)
    assert (made.running, made.next()) == (4, [])
    for item in waiting[:2]:
        assert made.release(item.key)
        assert made.next() == []
    made.release(("x", "c100"))
    assert len(made.next()) == 1


NAMES = st.sampled_from("abcd")
DEMANDS = st.lists(
    st.builds(
        lambda namespace, number, place, bucket: demand(namespace, number, f"{bucket}/{place}", f"s3://{bucket}"),
        NAMES,
        st.integers(0, 30),
        st.integers(0, 12),
        st.sampled_from("xyz"),
    ),
    max_size=24,
    unique_by=lambda item: item.key,
)


def by_looking_at_everybody(running: list[Demand], waiting: list[Demand], limits: Limits) -> list[Demand]:
    """The rule, word by word."""
    running, chosen = list(running), []
    while len(running) < limits.total:
        count = Counter(item.key[0] for item in running)
        may = [
            item
            for item in waiting
            if item not in chosen
            and item.place not in {other.place for other in running}
            and count[item.key[0]] < limits.per_namespace
            and sum(other.bucket == item.bucket for other in running) < limits.per_bucket
        ]
        if not may:
            break
        chosen.append(min(may, key=lambda item: (count[item.key[0]], item.since, item.key)))
        running.append(chosen[-1])
    return chosen


@given(DEMANDS, st.integers(0, 8), st.integers(1, 8), st.integers(1, 4), st.integers(1, 4))
def test_the_fast_way_chooses_as_the_rule_says(items: list[Demand], split: int, total: int, each: int, bucket: int) -> None:
    running, waiting, limits = items[:split], items[split:], Limits(total, each, bucket)
    made = places(running, waiting, limits)
    admitted = by_looking_at_everybody(running, waiting, limits)
    assert made.next() == admitted
    for item in waiting:
        assert (made.hindrance(item) is None) == (item in admitted)
    for item in waiting[::2]:
        assert made.leave(item.key)
    assert made.next() == by_looking_at_everybody(running, waiting[1::2], limits)


@given(DEMANDS, st.integers(0, 8))
def test_a_position_is_the_number_of_the_start_if_nothing_but_namespace_and_age_counts(
    items: list[Demand], split: int
) -> None:
    items = [Demand(item.key, f"{item.key}", item.since, item.bucket) for item in items]
    made = places(items[:split], items[split:], Limits(1000, 1000, 1000))
    order = made.next()
    assert [made.position(item) for item in order] == list(range(1, len(order) + 1))


def test_a_thousand_artifacts_drain_in_order_and_each_free_place_wakes_one() -> None:
    namespaces = ["team-a", "team-b", "team-c", "team-d"]
    crowd = [demand(namespaces[number % 4], number) for number in range(1000)]
    made = places([], [], Limits(4, 4, 100))
    written = Counter[str]()
    seen: dict[tuple[str, str], str] = {}
    started: list[Demand] = []
    woken = 0

    def look(item: Demand, second: float) -> None:
        made.wait(item)
        text = made.explain(item, START + timedelta(seconds=second), seen.get(item.key))
        if text is None:
            made.take(item)
            started.append(item)
        elif seen.get(item.key) != text:
            seen[item.key] = text
            written[item.key[1]] += 1

    for number, item in enumerate(crowd):
        look(item, number * 0.03)
    for second in range(30, 1030):  # one of the four ends each second, which is slow: the oldest one
        if len(started) == len(crowd):
            break
        made.release(started[second - 30].key)
        for item in made.next():
            woken += 1
            look(item, second)
    assert started == crowd
    assert woken == 996
    assert max(written.values()) == 1


def test_a_crowd_with_a_bucket_each_costs_no_more_to_choose_from_than_one_with_a_single_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bucket names are a user's own invention: a namespace full of them must not slow down the whole cluster's queue."""
    moves = Counter[str]()

    class Counted:
        @staticmethod
        def heappush(*arguments: Any) -> None:
            moves["push"] += 1
            heapq.heappush(*arguments)

        @staticmethod
        def heappop(heap: list[Any]) -> Any:
            moves["pop"] += 1
            return heapq.heappop(heap)

    crowd = [demand("a", number, bucket=f"s3://{number}") for number in range(5000)]
    made = places([], [*crowd, demand("b", 9999)], Limits(8, 4, 1000))
    monkeypatch.setattr(scheduling, "heapq", Counted)
    assert [item.key[0] for item in made.next()] == ["a", "b", "a", "a", "a"]
    assert moves.total() < 50


def test_movers_that_somebody_else_lets_sleep_keep_nobody_waiting_outside_of_their_namespace() -> None:
    """A queue of Kueue's that does not exist, named by two namespaces, must not stop the cluster."""
    sleepers = [demand(namespace, number, place=f"p{number}") for namespace in "ab" for number in range(4)]
    made = Places(Limits(8, 4, 4))
    for item in sleepers:
        made.take(item, asleep=True)
    same_target, own = demand("c", 1, place="p1"), demand("a", 9)
    made.wait(same_target)
    made.wait(own)
    assert made.next() == [same_target]
    assert made.hindrance(same_target) is None
    assert made.hindrance(own) is Hindrance.MAX_MOVERS_PER_NAMESPACE
    made.take(same_target)
    made.take(sleepers[1])  # it was woken
    assert made.running == 2
    assert not made.sleeps(sleepers[1].key)
    for item in (*sleepers, same_target):
        assert made.release(item.key)
    assert made.running == 0
    assert made.next() == [own]


def test_a_position_is_told_again_when_it_has_grown_old_and_not_before() -> None:
    made = places([demand("x", 0)], [demand("a", 1)], Limits(1, 1, 1))
    who = demand("a", 2)
    first = told(made, who)
    assert first == "position 2 of 2 in the queue; 1 mover is running (maxMovers 1)"
    made.leave(("a", "c1"))
    assert told(made, who, 59) == first
    assert told(made, who, 60) == "position 1 of 1 in the queue; 1 mover is running (maxMovers 1)"


def test_the_more_wait_the_more_seldom_each_is_told_its_position() -> None:
    made = places([demand("x", 0)], [demand("a", number) for number in range(1, 1000)], Limits(1, 1, 1))
    who = demand("a", 1000)
    first = told(made, who)
    made.leave(("a", "c1"))
    assert made.look_again() == 999
    assert told(made, who, 998) == first
    assert told(made, who, 999) != first


def test_another_reason_is_told_soon_but_not_in_the_same_breath() -> None:
    made = places([demand("x", 0)], limits=Limits(1, 1, 1))
    who = demand("a", 2)
    first = told(made, who)
    made.limits = Limits(2, 1, 1)
    made.take(demand("y", 1, bucket="s3://other"))
    made.limits = Limits(3, 1, 1)
    assert told(made, who, 9) == first
    said = told(made, who, 10)
    assert said == "position 1 of 1 in the queue; 1 mover is writing to s3://b (maxMoversPerBucket 1)"


def test_who_is_not_first_for_a_moment_was_told_what_it_waits_for() -> None:
    made = places([demand("x", 0), demand("y", 0)], [demand("a", 1)], Limits(2, 2, 100))
    who = demand("a", 2)
    first = told(made, who)
    made.release(("x", "c0"))
    assert made.hindrance(who) is Hindrance.NOT_FIRST
    assert told(made, who, 30) == first


def test_a_new_operator_believes_what_the_old_one_told() -> None:
    before = "position 7 of 9 in the queue; 4 movers are running (maxMovers 4)"
    made = places([demand("x", 0)], limits=Limits(1, 1, 1))
    assert told(made, demand("a", 2), 0, before) == before
    assert told(made, demand("a", 2), 60, before) != before


def test_the_metric_counts_by_reason_and_forgets_who_started() -> None:
    made = places([demand("x", 0)], limits=Limits(1, 1, 1))
    told(made, demand("a", 1))
    told(made, demand("a", 2, "x/0"))
    assert made.reasons() == {Hindrance.MAX_MOVERS: 1, Hindrance.SAME_TARGET: 1}
    made.take(demand("a", 1))
    made.leave(("a", "c2"))
    assert made.reasons() == {}


@pytest.mark.parametrize(
    ("uri", "claim", "bucket"),
    [
        ("s3://bucket/a/b", None, "s3://bucket"),
        ("azure://container/a", None, "azure://container"),
        ("gs://bucket/a", None, "gs://bucket"),
        ("file:///a/b", "archive", "claim ns/archive"),
    ],
)
def test_what_is_capped_together_is_a_bucket_or_a_claim(uri: str, claim: str | None, bucket: str) -> None:
    target = {"uri": uri} | ({"persistentVolumeClaim": {"claimName": claim}} if claim else {})
    metadata = {"name": "c", "namespace": "ns", "uid": "u", "resourceVersion": "1", "generation": 1}
    made = parse_artifact(
        {
            "metadata": {**metadata, "creationTimestamp": "2026-11-24T12:00:00Z", "finalizers": []},
            "spec": {"source": {"persistentVolumeClaim": {"claimName": "v"}, "path": "c"}, "target": target},
        }
    )
    assert bucket_of(made) == bucket
