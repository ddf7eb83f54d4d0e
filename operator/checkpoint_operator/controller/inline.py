"""The Inline executor: the mover as a child process of the operator, for claims that the operator has mounted itself.

It serves only what the admin listed (:class:`InlineConfig`): this claim, in this folder, to these targets, with this
identity. The child gets a scrubbed environment; nothing that a custom resource says becomes part of a command line.
"""

import asyncio
import fcntl
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from checkpoint_operator.api import names
from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Failure, Operation, Plan, Progress, Result, parse_line
from checkpoint_operator.api.uris import InvalidURI, Scheme, TargetURI
from checkpoint_operator.controller.config import InlineClaim, InlineConfig, InlineTarget
from checkpoint_operator.controller.executor import (
    EarlierMover,
    FinishedMover,
    MoverState,
    NoMover,
    Preparation,
    Prepared,
    RunningMover,
    StopReason,
)
from checkpoint_operator.controller.mover_plan import encode_plan, mover_plan, target_options

KILL_AFTER = 30.0
"""Seconds between asking a mover to stop and killing it."""
LINE_MAX = 64 * 1024
NICENESS = 10
"""Movers compute checksums for as long as they have bytes; on few cores the operator itself must stay quick beside them."""
_KEPT_ENVIRONMENT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TZ",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
)

_log = logging.getLogger(__name__)


@dataclass
class _Child:
    """What is known of one mover process."""

    key: tuple[str, str]
    uid: str
    moved_at: datetime
    process: asyncio.subprocess.Process | None = None
    progress: Progress | None = None
    result: Result | None = None
    exit_code: int | None = None
    stopping: StopReason | None = None
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class InlineExecutor:
    """Implements :class:`checkpoint_operator.controller.executor.Executor`.

    ``notify`` is called with an artifact's key whenever there is news of its mover; ``now`` is the clock.
    """

    kind: Literal["Inline"] = "Inline"

    def __init__(
        self,
        config: InlineConfig,
        state_directory: Path,
        notify: Callable[[tuple[str, str]], None],
        now: Callable[[], datetime],
    ) -> None:
        self._config = config
        self._state_directory = state_directory
        self._notify = notify
        self._now = now
        self._children: dict[str, _Child] = {}

    async def resync(self) -> None:
        """Nothing: children are known."""

    def artifacts(self) -> list[tuple[str, str]]:
        return [child.key for child in self._children.values()]

    def refuse(self, artifact: CheckpointArtifact) -> Failure | None:
        chosen = self._choose(artifact)
        return chosen if isinstance(chosen, Failure) else None

    def place(self, artifact: CheckpointArtifact) -> str:
        uri, chosen = artifact.spec.target.uri.removesuffix("/"), self._choose(artifact)
        if isinstance(chosen, Failure):
            return f"{artifact.metadata.uid}|{uri}"  # it will not run
        _, target, directory = chosen
        return f"{directory or target.endpoint or ''}|{uri}"

    async def look(self, artifact: CheckpointArtifact) -> None:
        """Nothing: what is known of a child is never old."""

    def state(self, artifact: CheckpointArtifact) -> MoverState:
        mover = artifact.status.mover
        child = self._children.get(mover.name) if mover else None
        if child is None:
            return EarlierMover() if self._is_locked(artifact.metadata.uid) else NoMover()
        if child.exit_code is None:
            return RunningMover(child.progress, child.moved_at, child.stopping)
        return FinishedMover(child.exit_code, child.result, child.stopping)

    async def prepare(self, name: str, artifact: CheckpointArtifact, operation: Operation) -> Preparation:
        return Prepared()

    async def start(self, name: str, artifact: CheckpointArtifact, operation: Operation, now: datetime) -> None:
        if name in self._children:
            return
        child = self._children[name] = _Child(artifact.key, artifact.metadata.uid, now)
        try:
            plan = self._plan(artifact, operation)
            text = encode_plan(plan)
            if isinstance(text, Failure):
                raise _RefusedError(text)
            child.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "checkpoint_operator.mover",
                env=self._environment(text),
                cwd="/",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_MAX,
                start_new_session=True,  # a Ctrl-C in the operator's terminal is the operator's to handle
            )
        except _RefusedError as error:
            self._finish(child, 30, Result(failure=error.failure))
        except OSError as error:
            failure = Failure(reason=Reason.MOVER_KILLED, message=f"the mover could not be started: {error.strerror}")
            self._finish(child, 70, Result(failure=failure))
        else:
            with suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, child.process.pid, NICENESS)
            child.task = asyncio.create_task(self._follow(child), name=f"mover {name}")

    async def stop(self, name: str, artifact: CheckpointArtifact, reason: StopReason) -> None:
        self._stop(name, reason)

    def _stop(self, name: str, reason: StopReason) -> None:
        child = self._children.get(name)
        if child is None or child.process is None or child.exit_code is not None or child.stopping:
            return
        child.stopping = reason
        self._signal(child, signal.SIGTERM)
        asyncio.get_running_loop().call_later(KILL_AFTER, self._signal, child, signal.SIGKILL)

    async def stop_others(self, key: tuple[str, str], uid: str | None) -> bool:
        others = [name for name, child in self._children.items() if child.key == key and child.uid != uid]
        for name in others:
            self._stop(name, StopReason.DELETED)
            self._drop(name)
        return any(name in self._children for name in others)

    async def forget(self, key: tuple[str, str], uid: str, name: str | None = None) -> None:
        mine = [other for other, child in self._children.items() if (child.key, child.uid) == (key, uid)]
        for other in [name] if name else mine:
            self._drop(other)

    def _drop(self, name: str) -> None:
        child = self._children.get(name)
        if child is not None and child.exit_code is not None:
            del self._children[name]

    async def shutdown(self, seconds: float) -> None:
        """Stop every mover, and kill those that have not stopped after so many seconds."""
        for name in list(self._children):
            self._stop(name, StopReason.SHUTDOWN)
        # The processes are waited for, not our tasks: kopf, at its end, cancels every task that it did not know before.
        alive = {
            asyncio.create_task(child.process.wait()): child
            for child in self._children.values()
            if child.process is not None and child.process.returncode is None
        }
        if not alive:
            return
        _, late = await asyncio.wait(alive, timeout=seconds)
        if late:
            for task in late:
                self._signal(alive[task], signal.SIGKILL)
            await asyncio.wait(late)

    async def _follow(self, child: _Child) -> None:
        assert child.process is not None
        assert child.process.stdout is not None
        async for line in _lines(child.process.stdout):
            message = parse_line(line)
            if isinstance(message, Result):
                child.result = message
            elif isinstance(message, Progress) and message != child.progress:
                child.progress, child.moved_at = message, self._now()
                self._notify(child.key)
        self._finish(child, await child.process.wait(), child.result)

    def _finish(self, child: _Child, exit_code: int, result: Result | None) -> None:
        child.exit_code, child.result = exit_code, result
        self._notify(child.key)

    @staticmethod
    def _signal(child: _Child, number: signal.Signals) -> None:
        if child.process is not None and child.exit_code is None and child.process.returncode is None:
            child.process.send_signal(number)

    def _lock_file(self, uid: str) -> Path:
        return self._state_directory / f"{uid}.lock"

    def _is_locked(self, uid: str) -> bool:
        try:
            descriptor = os.open(self._lock_file(uid), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    @staticmethod
    def _environment(plan: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        return {
            **kept,
            "HOME": "/nonexistent",
            "PYTHONUNBUFFERED": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
            names.ENV_PLAN: plan,
            names.ENV_EXIT_WITH_PARENT: "1",
        }

    def _plan(self, artifact: CheckpointArtifact, operation: Operation) -> Plan:
        chosen = self._choose(artifact)
        if isinstance(chosen, Failure):
            raise _RefusedError(chosen)
        claim, target, file_root = chosen
        said = target_options(artifact)
        options = said.replace(
            endpoint=target.endpoint or said.endpoint,
            region=target.region or said.region,
            force_path_style=target.force_path_style or said.force_path_style,
            file_root=str(file_root) if file_root else None,
            credentials_directory=str(target.credentials_directory) if target.credentials_directory else None,
            azure_account=None,  # the profile's alone: an account is an address, and a token would be sent there
        )
        return mover_plan(
            artifact,
            operation,
            options,
            str(claim.directory),
            # By construction: the mover starts only with the lock of this artifact in its hand.
            earlier_mover_gone=True,
            lock_file=str(self._lock_file(artifact.metadata.uid)),
        )

    def _choose(self, artifact: CheckpointArtifact) -> tuple[InlineClaim, InlineTarget, Path | None] | Failure:
        """The admin's entry for an artifact, or why there is none. Each sentence names the field and the way out."""
        spec, namespace = artifact.spec, artifact.metadata.namespace
        name = spec.source.persistent_volume_claim.claim_name
        claim = self._claim(namespace, name)
        if claim is None:
            return Failure(
                reason=Reason.CLAIM_NOT_SERVED,
                message=f"spec.source.persistentVolumeClaim.claimName '{name}': this operator does not serve that claim of "
                f"namespace '{namespace}'; ask the admin to list it (setting inline_config)",
            )
        if spec.target.credentials_secret_ref:
            return Failure(
                reason=Reason.SECRET_NOT_SUPPORTED,
                message="spec.target.credentialsSecretRef is not supported by the Inline executor, which reads no Secrets: "
                "remove it, the admin's credential profile for the target is used",
            )
        try:
            uri = TargetURI.parse(spec.target.uri)
        except InvalidURI as error:
            return Failure(reason=Reason.UNSUPPORTED_URI, message=f"spec.target.uri: {error}")
        matching = [target for target in claim.targets if uri.is_within(target.prefix)]
        if not matching:
            allowed = ", ".join(target.prefix for target in claim.targets) or "nothing"
            return Failure(
                reason=Reason.TARGET_NOT_ALLOWED,
                message=f"spec.target.uri '{uri}': checkpoints of claim '{name}' may go to: {allowed}",
            )
        target = max(matching, key=lambda candidate: len(candidate.prefix))
        if spec.target.endpoint and spec.target.endpoint.rstrip("/") != (target.endpoint or "").rstrip("/"):
            return Failure(
                reason=Reason.TARGET_NOT_ALLOWED,
                message=f"spec.target.endpoint '{spec.target.endpoint}': for '{target.prefix}' the admin set "
                f"{target.endpoint or 'no endpoint'}; remove the field",
            )
        if uri.scheme is not Scheme.FILE:
            return claim, target, None
        wanted = spec.target.persistent_volume_claim
        archive = self._claim(namespace, target.claim or name)
        if wanted is None or archive is None or wanted.claim_name != archive.claim:
            return Failure(
                reason=Reason.TARGET_NOT_ALLOWED,
                message=f"spec.target.persistentVolumeClaim.claimName: file:// targets of claim '{name}' may lie in claim "
                f"'{target.claim or name}' only",
            )
        return claim, target, archive.directory

    def _claim(self, namespace: str, name: str) -> InlineClaim | None:
        return next((c for c in self._config.claims if (c.namespace, c.claim) == (namespace, name)), None)


class _RefusedError(Exception):
    """The configuration does not allow what was asked."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a stream; one that is too long is dropped, whatever it was: it cannot be of our protocol."""
    while True:
        try:
            line = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                yield error.partial
            return
        except asyncio.LimitOverrunError as error:
            await stream.readexactly(max(error.consumed, 1))
            continue
        yield line
