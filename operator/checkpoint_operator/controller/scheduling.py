"""Who may start a mover now: caps, one mover for each URI, and fairness between namespaces. Pure."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

Key = tuple[str, str]
"""(namespace, name) of an artifact."""


@dataclass(frozen=True)
class Demand:
    """An artifact that wants to run, or runs, a mover. ``place`` names what it writes to; one mover at a time has it."""

    key: Key
    place: str
    since: datetime


@dataclass(frozen=True)
class Limits:
    """How many movers may run at once."""

    total: int
    per_namespace: int


def admit(running: Collection[Demand], waiting: Collection[Demand], limits: Limits) -> list[Demand]:
    """Who of the waiting may start now, best first.

    A free place goes to the namespace with the fewest movers, there to whoever waits longest; so a namespace with a
    thousand artifacts does not starve one with a single one.
    """
    in_namespace = Counter(demand.key[0] for demand in running)
    places = {demand.place for demand in running}
    admitted: list[Demand] = []
    for _ in range(limits.total - len(running)):
        candidates = [
            demand for demand in waiting if demand.place not in places and in_namespace[demand.key[0]] < limits.per_namespace
        ]
        if not candidates:
            break
        chosen = min(candidates, key=lambda demand: (in_namespace[demand.key[0]], demand.since, demand.key))
        admitted.append(chosen)
        in_namespace[chosen.key[0]] += 1
        places.add(chosen.place)
    return admitted


def blocked(candidate: Demand, running: Collection[Demand], waiting: Collection[Demand], limits: Limits) -> str | None:
    """Why the candidate may not start now (for the status), or None if it may."""
    for demand in running:
        if demand.place == candidate.place and demand.key != candidate.key:
            return f"{demand.key[0]}/{demand.key[1]} is using the same target"
    if len(running) >= limits.total:
        return f"{limits.total} movers are running (max_movers)"
    if sum(demand.key[0] == candidate.key[0] for demand in running) >= limits.per_namespace:
        return f"{limits.per_namespace} movers are running in this namespace (max_movers_per_namespace)"
    others = [demand for demand in waiting if demand.key != candidate.key]
    if candidate in admit(running, [*others, candidate], limits):
        return None
    return "other artifacts are first in line"
