"""Who may start a mover: caps hold, one URI has one mover, and no namespace starves another."""

from datetime import UTC, datetime, timedelta

from checkpoint_operator.controller.scheduling import Demand, Limits, admit, blocked

START = datetime(2026, 11, 24, tzinfo=UTC)
LIMITS = Limits(total=4, per_namespace=2)


def demand(namespace: str, number: int, place: str | None = None) -> Demand:
    return Demand((namespace, f"c{number}"), place or f"{namespace}/{number}", START + timedelta(seconds=number))


def test_a_free_operator_starts_whoever_asks() -> None:
    assert blocked(demand("a", 1), [], [], LIMITS) is None


def test_no_more_movers_run_than_the_cap_allows() -> None:
    running = [demand("a", 1), demand("a", 2), demand("b", 1), demand("b", 2)]
    assert blocked(demand("c", 1), running, [], LIMITS) == "4 movers are running (max_movers)"


def test_no_namespace_has_more_movers_than_its_cap() -> None:
    running = [demand("a", 1), demand("a", 2)]
    assert blocked(demand("a", 3), running, [], LIMITS) == (
        "2 movers are running in this namespace (max_movers_per_namespace)"
    )
    assert blocked(demand("b", 3), running, [], LIMITS) is None


def test_one_place_has_one_mover_at_a_time() -> None:
    running = [demand("a", 1, "s3://bucket/x")]
    assert blocked(demand("b", 1, "s3://bucket/x"), running, [], LIMITS) == "a/c1 is using the same target"


def test_of_two_that_want_the_same_place_the_older_goes_first() -> None:
    older, younger = demand("a", 1, "p"), demand("b", 2, "p")
    assert admit([], [younger, older], LIMITS) == [older]
    assert blocked(younger, [], [older], LIMITS) == "other artifacts are first in line"


def test_a_namespace_with_a_thousand_artifacts_does_not_starve_one_with_a_single_one() -> None:
    crowd = [demand("big", number) for number in range(1000)]
    small = demand("small", 5000)
    running = [demand("big", -1), demand("other", 0), demand("other", 1)]
    assert admit(running, [*crowd, small], LIMITS) == [small]
    assert blocked(crowd[0], running, [*crowd, small], LIMITS) == "other artifacts are first in line"
    assert blocked(small, running, [*crowd, small], LIMITS) is None


def test_within_a_namespace_whoever_waits_longest_goes_first() -> None:
    waiting = [demand("a", 3), demand("a", 1), demand("a", 2)]
    assert admit([], waiting, LIMITS) == [demand("a", 1), demand("a", 2)]


def test_exactly_those_who_are_admitted_are_not_blocked() -> None:
    waiting = [demand(namespace, number) for namespace in "abc" for number in range(4)]
    running = [demand("a", 9)]
    admitted = admit(running, waiting, LIMITS)
    assert len(admitted) == 3
    for candidate in waiting:
        assert (blocked(candidate, running, waiting, LIMITS) is None) == (candidate in admitted)
