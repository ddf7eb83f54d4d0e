"""What a cluster tells of one kind of object in one namespace: all of it, in order, so that nothing has to be polled."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Body = dict[str, Any]
T = TypeVar("T")


class Watch:
    """Follows `kubectl get --watch` from its start on. ``current`` by name; ``history`` has every version that was told."""

    def __init__(self, command: Sequence[str]) -> None:
        self.current: dict[str, Body] = {}
        self.history: list[Body] = []
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            [*command, "--watch", "--output-watch-events", "--output=json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._thread = threading.Thread(target=self._read, name=f"watch of {command[-1]}", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                self._take(json.loads(line))
        with self._news:
            self._news.notify_all()

    def _take(self, event: Body) -> None:
        body = event["object"]
        with self._news:
            if event["type"] == "DELETED":
                self.current.pop(body["metadata"]["name"], None)
            else:
                self.current[body["metadata"]["name"]] = body
                self.history.append(body)
            self._news.notify_all()

    def until(self, found: Callable[[dict[str, Body]], T | None], seconds: float) -> T | None:
        """The first answer that is not None or False, or None when there was none in that time."""
        deadline = time.monotonic() + seconds
        with self._news:
            while True:
                answer = found(self.current)
                if answer is not None and answer is not False:
                    return answer
                left = deadline - time.monotonic()
                if left <= 0 or self._process.poll() is not None:
                    return None
                self._news.wait(min(left, 1))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join(timeout=10)
