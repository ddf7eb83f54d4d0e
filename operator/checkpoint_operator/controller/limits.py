"""The caps on movers, from a file that may change while the operator runs: no restart, and no wrong file takes effect."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from checkpoint_operator.controller.config import ConfigError, FileModel, explain
from checkpoint_operator.controller.scheduling import Limits

POLL = 2.0
"""Seconds between two looks at the file. A stat costs microseconds, and unlike inotify it works on every volume."""

_log = logging.getLogger(__name__)


class _LimitsModel(FileModel):
    max_movers: int | None = Field(default=None, ge=1, le=1000)
    max_movers_per_namespace: int | None = Field(default=None, ge=1, le=1000)
    max_movers_per_bucket: int | None = Field(default=None, ge=1, le=1000)


def load_limits(path: Path, defaults: Limits) -> Limits:
    """What the file says; what it does not say is as the settings have it.

    Raises:
        ConfigError: naming the file and the key.
    """
    try:
        content = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"setting limits_file: '{path}' cannot be read: {error}") from None
    try:
        model = _LimitsModel.model_validate(yaml.safe_load(content) or {})
    except yaml.YAMLError as error:
        raise ConfigError(f"setting limits_file: '{path}' is no YAML: {error}") from None
    except ValidationError as error:
        raise ConfigError(explain(error, lambda name: f"limits_file, in '{path}' at {name}")) from None
    return Limits(
        model.max_movers or defaults.total,
        model.max_movers_per_namespace or defaults.per_namespace,
        model.max_movers_per_bucket or defaults.per_bucket,
    )


class LimitsFile:
    """One file, its last good content, and whether that is still what it says."""

    def __init__(self, path: Path, defaults: Limits) -> None:
        """Raises :class:`ConfigError`: what is wrong at the start is not started with."""
        self._path = path
        self._defaults = defaults
        self._mark = self._look()
        self.limits = load_limits(path, defaults)
        self.valid = True

    def _look(self) -> tuple[int, ...] | None:
        """What differs when the file does: a ConfigMap is changed by a swap of links, so the links are followed."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size

    def poll(self) -> bool:
        """Read the file if it has changed; True if other limits hold now. A wrong file changes nothing."""
        mark = self._look()
        if mark == self._mark:
            return False
        self._mark = mark
        try:
            limits = load_limits(self._path, self._defaults)
        except ConfigError as error:
            _log.error("%s; the limits stay as they were: %s", error, self.limits)
            self.valid = False
            return False
        self.valid = True
        changed, self.limits = limits != self.limits, limits
        if changed:
            _log.info("limits from %s: %s", self._path, limits)
        return changed


async def follow_limits(
    file: LimitsFile, changed: Callable[[Limits], None], checked: Callable[[bool], None], every: float = POLL
) -> None:
    """Tell of every change, and of whether the file is good."""
    while True:
        await asyncio.sleep(every)
        if file.poll():
            changed(file.limits)
        checked(file.valid)
