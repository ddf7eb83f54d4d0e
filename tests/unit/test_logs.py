"""Logs: one line for each record whatever a name holds, and every line about an artifact says which."""

import asyncio
import json
import logging

import pytest

from checkpoint_operator.controller.logs import JsonFormatter, PlainFormatter, about, printable


def record(message: str, *arguments: object, error: BaseException | None = None) -> logging.LogRecord:
    trouble = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("checkpoint_operator.x", logging.WARNING, "x.py", 1, message, arguments, trouble)


def caught(text: str) -> BaseException:
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


HOSTILE = "a\n2026-11-25 12:00:00,000 INFO    operator: all is well\r\x1b[2J\u2028b"


@pytest.mark.parametrize("formatter", [JsonFormatter(), PlainFormatter()], ids=["json", "plain"])
def test_a_hostile_name_makes_no_second_line(formatter: logging.Formatter) -> None:
    line = formatter.format(record("%s failed", HOSTILE))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line


def test_no_line_of_a_traceback_can_pass_for_a_line_of_ours() -> None:
    lines = PlainFormatter().format(record("broke", error=caught(HOSTILE))).splitlines()
    assert len(lines) > 3
    assert all(line.startswith("    ") for line in lines[1:])
    assert not any("\x1b" in line for line in lines)


def test_json_keeps_the_text_and_the_traceback() -> None:
    line = json.loads(JsonFormatter().format(record("%s failed", HOSTILE, error=caught("why"))))
    assert line["message"] == f"{HOSTILE} failed"
    assert line["level"] == "warning"
    assert "ValueError: why" in line["exception"]


def test_a_line_about_an_artifact_says_which_in_fields_of_its_own() -> None:
    with about(("ns", "c"), "u"):
        line = json.loads(JsonFormatter().format(record("x")))
    assert (line["namespace"], line["name"], line["uid"]) == ("ns", "c", "u")
    assert "namespace" not in json.loads(JsonFormatter().format(record("x")))


async def test_a_task_that_is_started_for_an_artifact_logs_about_it_and_its_neighbour_does_not() -> None:
    async def follow() -> str:
        await asyncio.sleep(0)
        return JsonFormatter().format(record("x"))

    with about(("ns", "c"), None):
        mine = asyncio.create_task(follow())
    other = asyncio.create_task(follow())
    assert json.loads(await mine)["name"] == "c"
    assert "name" not in json.loads(await other)


def test_what_can_be_printed_stays_as_it_is() -> None:
    assert printable("größe 5 → ok") == "größe 5 → ok"
    assert printable("a\tb") == "a\\tb"
    assert printable("\ud800") == "\\ud800"
