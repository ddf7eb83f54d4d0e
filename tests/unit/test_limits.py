"""Caps that change while the operator runs: a good file takes effect, a wrong one changes nothing."""

import asyncio
import os
from pathlib import Path

import pytest

from checkpoint_operator.controller.config import ConfigError
from checkpoint_operator.controller.limits import LimitsFile, follow_limits, load_limits
from checkpoint_operator.controller.scheduling import Limits

DEFAULTS = Limits(8, 4, 1000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "limits.yaml"
    made.write_text("maxMovers: 2\n")
    return made


def replace(path: Path, text: str) -> None:
    """As an editor does it; the same size and second may come out, the inode differs."""
    new = path.with_name("new")
    new.write_text(text)
    new.replace(path)


def test_what_the_file_does_not_say_is_as_the_settings_have_it(path: Path) -> None:
    assert load_limits(path, DEFAULTS) == Limits(2, 4, 1000)
    path.write_text("{maxMovers: 5, maxMoversPerNamespace: 3, maxMoversPerBucket: 2}")
    assert load_limits(path, DEFAULTS) == Limits(5, 3, 2)
    path.write_text("")
    assert load_limits(path, DEFAULTS) == DEFAULTS


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("maxMovers: 0", "maxMovers"),
        ("maxMovers: many", "'many'"),
        ("maxMover: 3", "maxMover"),
        ("maxMovers: [", "is no YAML"),
        ("- 3", "limits_file"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(path: Path, text: str, named: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match="limits_file") as caught:
        LimitsFile(path, DEFAULTS)
    assert named in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_not_started_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        LimitsFile(tmp_path / "missing", DEFAULTS)


def test_a_change_takes_effect_once(path: Path) -> None:
    file = LimitsFile(path, DEFAULTS)
    assert not file.poll()
    replace(path, "maxMovers: 3\n")
    assert file.poll()
    assert file.limits == Limits(3, 4, 1000)
    assert not file.poll()
    replace(path, "maxMovers: 3  # the same\n")
    assert not file.poll()


def test_a_wrong_change_keeps_what_held_and_says_so_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = LimitsFile(path, DEFAULTS)
    replace(path, "maxMovers: -1\n")
    assert not file.poll()
    assert not file.poll()
    assert (file.limits, file.valid) == (Limits(2, 4, 1000), False)
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    path.unlink()
    assert not file.poll()
    assert (file.limits, file.valid) == (Limits(2, 4, 1000), False)
    replace(path, "maxMovers: 2\n")
    assert not file.poll()
    assert file.valid


def test_a_configmap_that_is_updated_by_a_swap_of_links_is_seen(tmp_path: Path) -> None:
    for name, text in (("..1", "maxMovers: 1"), ("..2", "maxMovers: 9")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "limits.yaml").write_text(text)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "limits.yaml").symlink_to("..data/limits.yaml")
    file = LimitsFile(tmp_path / "limits.yaml", DEFAULTS)
    (tmp_path / "..tmp").symlink_to("..2")
    os.replace(tmp_path / "..tmp", tmp_path / "..data")
    assert file.poll()
    assert file.limits.total == 9


async def test_whoever_follows_is_told_of_each_change_and_of_what_is_wrong(path: Path) -> None:
    told: asyncio.Queue[Limits] = asyncio.Queue()
    checked: asyncio.Queue[bool] = asyncio.Queue()
    task = asyncio.create_task(follow_limits(LimitsFile(path, DEFAULTS), told.put_nowait, checked.put_nowait, 0.001))
    replace(path, "maxMovers: 7\n")
    assert (await told.get()).total == 7
    replace(path, "nonsense\n")
    while await checked.get():
        pass
    assert told.empty()
    task.cancel()
