"""A few threads that share one list of things to do, where the first failure ends the work of all."""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from checkpoint_operator.storage.errors import Cancelled

Item = TypeVar("Item")
_END = object()


def for_each(
    work: Callable[[Item], object],
    items: Iterable[Item],
    *,
    workers: int,
    name: str,
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Do ``work`` for every item, in ``workers`` threads that take the items in their order.

    The items may be a generator, however long: it is run by one thread at a time, and what was taken is always worked on.
    ``on_stop`` is called once when no more is taken, so that a generator that waits for something can be let go.

    Raises:
        whatever ``work`` raised first. The others finish the item that they have in hand.
    """
    iterator = iter(items)
    taking, stop = threading.Lock(), threading.Event()
    failures: list[BaseException] = []

    def end() -> None:
        if not stop.is_set():
            stop.set()
            on_stop()

    def run() -> None:
        try:
            while not stop.is_set():
                with taking:
                    item = next(iterator, _END)
                if item is _END:
                    return
                work(item)  # type: ignore[arg-type]
        except BaseException as error:
            failures.append(error)
            end()

    with ThreadPoolExecutor(workers, thread_name_prefix=name) as pool:
        futures = [pool.submit(run) for _ in range(workers)]
        try:
            wait(futures)
        finally:  # a KeyboardInterrupt in a notebook as well
            end()
    if failures:
        raise first_cause(failures)


def first_cause(failures: Sequence[BaseException]) -> BaseException:
    """Of several failures the one to tell: what was cancelled because of another one is not the cause."""
    return next((error for error in failures if not isinstance(error, Cancelled)), failures[0])
