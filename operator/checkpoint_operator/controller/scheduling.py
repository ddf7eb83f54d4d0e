"""Who may start a mover now, who is next, and what the others are told: caps, one mover for each place, fairness. Pure.

A free place goes to the namespace with the fewest movers, there to whoever waits longest; so a namespace with a thousand
artifacts does not starve one with a single one. Nobody but those who are next is woken, and a look costs the same whether
ten or ten thousand wait, for one bucket or for as many (:mod:`bisect` in one line for each namespace and bucket, and in one
of their heads for each namespace).
"""

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TypeVar

from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.uris import InvalidURI, Scheme, TargetURI

Key = tuple[str, str]
"""(namespace, name) of an artifact."""
Rank = tuple[datetime, Key]
"""The order within a namespace: since when, then by name."""

SAY_AGAIN = 60.0
"""Seconds after which somebody who waits may be told a new position."""
SAY_OTHERWISE = 10.0
"""Seconds after which somebody who waits may be told another reason."""
SAYS_PER_SECOND = 1.0
"""Positions that are told in the whole cluster: a place that becomes free moves everybody's, and must not write them all."""
_TELLS_POSITION = "position "


@dataclass(frozen=True)
class Demand:
    """An artifact that wants to run, or runs, a mover. ``place`` names what it writes to; one mover at a time has it.

    ``bucket``: what is capped together, as :func:`bucket_of` names it.
    """

    key: Key
    place: str
    since: datetime
    bucket: str

    @property
    def rank(self) -> Rank:
        return self.since, self.key


@dataclass(frozen=True)
class Limits:
    """How many movers may run at once."""

    total: int
    per_namespace: int
    per_bucket: int


class Hindrance(StrEnum):
    """Why somebody waits; a label of a metric."""

    SAME_TARGET = "SameTarget"
    MAX_MOVERS = "MaxMovers"
    MAX_MOVERS_PER_NAMESPACE = "MaxMoversPerNamespace"
    MAX_MOVERS_PER_BUCKET = "MaxMoversPerBucket"
    NOT_FIRST = "NotFirst"


def bucket_of(artifact: CheckpointArtifact) -> str:
    """The bucket or container that an artifact goes to; for ``file://`` the claim, which is a namespace's own."""
    target = artifact.spec.target
    try:
        uri = TargetURI.parse(target.uri)
    except InvalidURI:
        return target.uri  # it will not run
    if uri.scheme is not Scheme.FILE:
        return f"{uri.scheme}://{uri.bucket}"
    claim = target.persistent_volume_claim or artifact.spec.source.persistent_volume_claim
    return f"claim {artifact.metadata.namespace}/{claim.claim_name}"


@dataclass(frozen=True)
class _Said:
    why: Hindrance
    text: str
    at: datetime


_Line = list[Rank]
Name = TypeVar("Name", bound=Hashable)


class Places:
    """Who runs, and who waits. ``limits`` may be changed at any time; lowering them stops nobody."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._running: dict[Key, Demand] = {}
        self._asleep: set[Key] = set()  # some of those
        self._in_namespace: Counter[str] = Counter()
        self._in_bucket: Counter[str] = Counter()
        self._holders: dict[str, Key] = {}
        self._waiting: dict[Key, Demand] = {}
        self._lines: dict[str, _Line] = {}  # by namespace: for positions
        self._bucket_lines: dict[tuple[str, str], _Line] = {}  # by namespace and bucket: for who is next
        self._heads: dict[str, list[tuple[Rank, str]]] = {}  # by namespace: the first of each such line, and its bucket
        self._next: list[Demand] | None = None  # as long as nothing has changed
        self._said: dict[Key, _Said] = {}

    @property
    def limits(self) -> Limits:
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = limits
        self._next = None

    @property
    def running(self) -> int:
        return len(self._running) - len(self._asleep)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def runs(self, key: Key) -> bool:
        return key in self._running

    def sleeps(self, key: Key) -> bool:
        return key in self._asleep

    def waits(self, key: Key) -> bool:
        return key in self._waiting

    def reasons(self) -> Counter[Hindrance]:
        """How many were told to wait for what. Safe to call from another thread."""
        return Counter(said.why for said in list(self._said.values()))

    def take(self, demand: Demand, *, asleep: bool = False) -> None:
        """It runs a mover (or is about to): it waits no longer, and what it has is taken.

        ``asleep``: there is a mover, and somebody else (Kueue) decides when it may run, perhaps never. It counts in its
        namespace alone: no other one's artifact waits for it.
        """
        self.leave(demand.key)
        self._stop(demand.key)
        self._next = None
        self._running[demand.key] = demand
        self._in_namespace[demand.key[0]] += 1
        if asleep:
            self._asleep.add(demand.key)
            return
        self._in_bucket[demand.bucket] += 1
        self._holders.setdefault(demand.place, demand.key)

    def release(self, key: Key) -> bool:
        """It neither runs nor waits any more. True if it did, so that others may be next now."""
        return self._stop(key) | self.leave(key)

    def _stop(self, key: Key) -> bool:
        demand = self._running.pop(key, None)
        if demand is None:
            return False
        self._next = None
        _subtract(self._in_namespace, key[0])
        if key in self._asleep:
            self._asleep.remove(key)
            return True
        _subtract(self._in_bucket, demand.bucket)
        if self._holders.get(demand.place) == key:
            del self._holders[demand.place]
            # Two may run at one place where both were found running at the start.
            awake = (key for key, it in self._running.items() if it.place == demand.place and key not in self._asleep)
            if other := next(awake, None):
                self._holders[demand.place] = other
        return True

    def wait(self, demand: Demand) -> None:
        """It wants to run. A second call does nothing, unless what it wants has changed."""
        if self._waiting.get(demand.key) == demand:
            return
        self._remove(demand.key)
        self._next = None
        self._waiting[demand.key] = demand
        insort(self._lines.setdefault(demand.key[0], []), demand.rank)
        before = self._head(demand)
        insort(self._bucket_lines.setdefault((demand.key[0], demand.bucket), []), demand.rank)
        self._replace_head(demand, before)

    def leave(self, key: Key) -> bool:
        """It does not want to run any more (or now). True if it did."""
        self._said.pop(key, None)
        return self._remove(key)

    def _remove(self, key: Key) -> bool:
        demand = self._waiting.pop(key, None)
        if demand is None:
            return False
        self._next = None
        _take_out(self._lines, key[0], demand.rank)
        before = self._head(demand)
        _take_out(self._bucket_lines, (key[0], demand.bucket), demand.rank)
        self._replace_head(demand, before)
        return True

    def _head(self, demand: Demand) -> Rank | None:
        line = self._bucket_lines.get((demand.key[0], demand.bucket))
        return line[0] if line else None

    def _replace_head(self, demand: Demand, before: Rank | None) -> None:
        """Keep the heads in order after a line has changed."""
        after = self._head(demand)
        if after == before:
            return
        heads = self._heads.setdefault(demand.key[0], [])
        if before is not None:
            del heads[bisect_left(heads, (before, demand.bucket))]
        if after is not None:
            insort(heads, (after, demand.bucket))
        if not heads:
            del self._heads[demand.key[0]]

    def next(self) -> list[Demand]:
        """Who of those who wait may start now, best first."""
        if self._next is None:
            self._next = self._choose()
        return self._next

    def _choose(self) -> list[Demand]:
        free = self._limits.total - self.running
        if free <= 0 or not self._waiting:
            return []
        in_namespace, in_bucket, taken = self._in_namespace.copy(), self._in_bucket.copy(), set(self._holders)
        # The first of each namespace; ranks differ, so nothing behind them is ever compared.
        first: list[tuple[int, Rank, Demand]] = []
        lines = {name: self._in_order(name, in_bucket) for name in self._heads}

        def come_up(namespace: str) -> None:
            if in_namespace[namespace] < self._limits.per_namespace and (demand := next(lines[namespace], None)):
                heapq.heappush(first, (in_namespace[namespace], demand.rank, demand))

        for namespace in lines:
            come_up(namespace)
        chosen: list[Demand] = []
        while first and len(chosen) < free:
            _, _, demand = heapq.heappop(first)
            namespace = demand.key[0]
            # Another namespace's may have taken the one or the other meanwhile.
            if in_bucket[demand.bucket] < self._limits.per_bucket and demand.place not in taken:
                chosen.append(demand)
                in_namespace[namespace] += 1
                in_bucket[demand.bucket] += 1
                taken.add(demand.place)
            come_up(namespace)
        return chosen

    def _in_order(self, namespace: str, in_bucket: Counter[str]) -> Iterator[Demand]:
        """Those of a namespace who wait, by rank; nobody of a full bucket. Looks at no more than it gives."""
        heads = iter(self._heads[namespace])
        head = next(heads, None)
        behind: list[tuple[Rank, int, str]] = []  # the next of each line that was begun, and its index
        while head or behind:
            if head and not (behind and behind[0][0] < head[0]):
                (rank, bucket), index, head = head, 0, next(heads, None)
            else:
                rank, index, bucket = heapq.heappop(behind)
            if in_bucket[bucket] >= self._limits.per_bucket:
                continue
            line = self._bucket_lines[namespace, bucket]
            if index + 1 < len(line):
                heapq.heappush(behind, (line[index + 1], index + 1, bucket))
            yield self._waiting[rank[1]]

    def hindrance(self, demand: Demand) -> Hindrance | None:
        """Why somebody who waits may not start now, or None if it may."""
        if self._holders.get(demand.place, demand.key) != demand.key:
            return Hindrance.SAME_TARGET
        if self.running >= self._limits.total:
            return Hindrance.MAX_MOVERS
        if self._in_namespace[demand.key[0]] >= self._limits.per_namespace:
            return Hindrance.MAX_MOVERS_PER_NAMESPACE
        if self._in_bucket[demand.bucket] >= self._limits.per_bucket:
            return Hindrance.MAX_MOVERS_PER_BUCKET
        return None if demand in self.next() else Hindrance.NOT_FIRST

    def position(self, demand: Demand) -> int:
        """Its place in the order in which those who wait would start if they differed in nothing but namespace and age;
        1 is next. Caps of buckets and used targets let others pass."""
        ahead = bisect_left(self._lines[demand.key[0]], demand.rank)
        level = self._in_namespace[demand.key[0]] + ahead
        for namespace, line in self._lines.items():
            if namespace == demand.key[0]:
                continue
            # Those of this namespace that come up while it has fewer movers than ours then has; at the same number the
            # older one is first.
            fewer = level - self._in_namespace[namespace]
            if fewer < 0:
                continue
            ahead += min(len(line), fewer + (bisect_left(line, demand.rank) > fewer))
        return ahead + 1

    def look_again(self) -> float:
        """Seconds after which somebody who waits is looked at although nobody woke it: for its position."""
        return max(SAY_AGAIN, self.waiting / SAYS_PER_SECOND)

    def explain(self, demand: Demand, now: datetime, told: str | None) -> str | None:
        """What somebody who waits is told now (for the status), or None if it may start.

        It stays the same text until that has grown old, because each new one is a write. ``told``: what the status says
        already; it is believed after a restart, so that a new operator does not write a whole queue anew.
        """
        why = self.hindrance(demand)
        if why is None:
            self._said.pop(demand.key, None)
            return None
        said = self._said.get(demand.key)
        if said is None and told and told.startswith(_TELLS_POSITION):
            said = self._said[demand.key] = _Said(why, told, now)
        if said is not None:
            age = (now - said.at).total_seconds()
            # Whoever is not first for a moment was told what it really waits for.
            is_other = why not in (said.why, Hindrance.NOT_FIRST)
            if age < (SAY_OTHERWISE if is_other else self.look_again()):
                return said.text
        text = f"{_TELLS_POSITION}{self.position(demand)} of {self.waiting} in the queue; {self._sentence(why, demand)}"
        self._said[demand.key] = _Said(why, text, now)
        return text

    def _sentence(self, why: Hindrance, demand: Demand) -> str:
        namespace, limits = demand.key[0], self._limits
        match why:
            case Hindrance.SAME_TARGET:
                # Who else writes there is nobody's business outside of that namespace.
                holder = self._holders[demand.place]
                other = holder[1] if holder[0] == namespace else "an artifact of another namespace"
                return f"{other} is using the same target"
            case Hindrance.MAX_MOVERS:
                return f"{_movers(self.running)} running (maxMovers {limits.total})"
            case Hindrance.MAX_MOVERS_PER_NAMESPACE:
                count = self._in_namespace[namespace]
                return f"{_movers(count)} running in this namespace (maxMoversPerNamespace {limits.per_namespace})"
            case Hindrance.MAX_MOVERS_PER_BUCKET:
                count = self._in_bucket[demand.bucket]
                return f"{_movers(count)} writing to {demand.bucket} (maxMoversPerBucket {limits.per_bucket})"
            case Hindrance.NOT_FIRST:
                return "other artifacts are first in line"


def _movers(count: int) -> str:
    return f"{count} mover{' is' if count == 1 else 's are'}"


def _take_out(lines: dict[Name, _Line], name: Name, rank: Rank) -> None:
    line = lines[name]
    del line[bisect_left(line, rank)]
    if not line:
        del lines[name]


def _subtract(counter: Counter[str], name: str) -> None:
    counter[name] -= 1
    if counter[name] <= 0:  # a Counter keeps its zeros
        del counter[name]
