"""How the operator logs: one line for each thing that happened, and every line about an artifact says which.

Names and messages come from users and stores, so nothing in a line may look like the next one.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

_ABOUT: ContextVar[dict[str, str]] = ContextVar("about", default={})  # noqa: B039 - never changed, only replaced


@contextmanager
def about(key: tuple[str, str], uid: str | None) -> Iterator[None]:
    """Whatever is logged inside, by whichever module and by tasks that are started here, is about this artifact."""
    token = _ABOUT.set({"namespace": key[0], "name": key[1], **({"uid": uid} if uid else {})})
    try:
        yield
    finally:
        _ABOUT.reset(token)


def about_now() -> dict[str, str]:
    """Which artifact the work is about at the moment, if it is about one."""
    return _ABOUT.get()


class JsonFormatter(logging.Formatter):
    """One JSON object for each line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **about_now(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


class PlainFormatter(logging.Formatter):
    """For people. A traceback takes several lines; all but the first begin with spaces, as no line of ours does."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802 - logging's name
        text = super().formatException(ei)  # type: ignore[arg-type]
        return "\n".join(f"    {printable(line)}" for line in text.splitlines())


def printable(text: str) -> str:
    """The text with control characters (line ends, terminal escapes) and line separators written out."""
    return "".join(
        char if char.isprintable() or char == " " else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def configure(level: str, log_format: Literal["plain", "json"]) -> None:
    """Log to standard error, and there alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else PlainFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
