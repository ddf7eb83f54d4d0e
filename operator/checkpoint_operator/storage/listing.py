"""Reads the manifests of a listing in parallel: a thousand artifacts are a thousand requests, each of them short.

Nothing is collected: a bucket of a million artifacts is listed with as many manifests in memory as there are requests
under way, in the order in which the store names them.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypedDict, TypeVar

from checkpoint_operator.api.metadata import ArtifactMetadata

Place = TypeVar("Place")
Read = TypeVar("Read")

THREADS = 16


def read_in_order(
    places: Iterable[Place], read: Callable[[Place], Read | None], threads: int = THREADS
) -> Generator[Read, None, None]:
    """What ``read`` makes of each place, in the order of the places; None (no artifact after all) is left out.

    ``read`` runs in several threads at once, ``places`` is advanced in the caller's, at most ``2 * threads`` ahead. The
    first error ends the listing at its place. A caller who stops early waits for the reads under way, and for no other.
    """
    places = iter(places)
    with ThreadPoolExecutor(threads, thread_name_prefix="list") as pool:
        waiting: deque[Future[Read | None]] = deque()
        try:
            while True:
                waiting.extend(pool.submit(read, place) for place in islice(places, 2 * threads - len(waiting)))
                if not waiting:
                    return
                found = waiting.popleft().result()
                if found is not None:
                    yield found
        finally:
            for future in waiting:
                future.cancel()


class Filters(TypedDict, total=False):
    """Which artifacts a caller asks for. Each is exact; of ``tags`` and ``labels`` all must be there; None asks nothing."""

    job_name: str | None
    algorithm: str | None
    base_model: str | None
    peft_method: str | None
    stage: str | None
    step: int | None
    version: str | None
    parent_artifact_id: str | None
    tags: Mapping[str, str] | None
    labels: Mapping[str, str] | None


def matches(metadata: ArtifactMetadata, filters: Filters) -> bool:
    """Whether an artifact is one of those that were asked for.

    Raises:
        TypeError: for a filter that does not exist, instead of a list that is longer than was meant.
    """
    if unknown := filters.keys() - Filters.__annotations__.keys():
        raise TypeError(f"no such filter: {', '.join(sorted(unknown))}")
    for name, wanted in filters.items():
        found = getattr(metadata, name)
        if isinstance(wanted, Mapping):
            if not wanted.items() <= found.items():
                return False
        elif wanted is not None and wanted != found:
            return False
    return True
