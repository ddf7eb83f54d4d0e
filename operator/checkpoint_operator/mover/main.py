"""Runs one plan and says how it ended, in a way that survives every kind of death (DESIGN §5).

Progress and the result are JSON lines on standard output; the result goes once more into the termination message; the
exit code says the class of a failure to whoever lost both. Logs go to standard error.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TextIO

from pydantic import ValidationError

from checkpoint_operator.api.errors import FAILURES, ExitCode, Reason
from checkpoint_operator.api.names import ENV_EXIT_WITH_PARENT, ENV_PLAN, ENV_TERMINATION_MESSAGE
from checkpoint_operator.api.protocol import Failure, Operation, Plan, Progress, Result, encode_line
from checkpoint_operator.api.uris import InvalidURI, TargetURI
from checkpoint_operator.mover.lock import hold_lock
from checkpoint_operator.mover.trust import trusted
from checkpoint_operator.storage import DeleteRequest, StorageError, StorageManager, UploadRequest
from checkpoint_operator.storage.errors import Cancelled
from checkpoint_operator.storage.source import Selection

TERMINATED = 128 + signal.SIGTERM
"""The exit code after SIGTERM: no result is printed, what was stored stays for the next attempt."""

ORPHAN_SECONDS = 30.0
"""How long a mover whose operator died may take to end in order."""

_log = logging.getLogger("checkpoint_operator.mover")


class Mover:
    """One run. ``output`` is where the lines go."""

    def __init__(self, environment: Mapping[str, str], output: TextIO) -> None:
        self._environment = environment
        self._output = output
        self._writing = threading.Lock()
        self.cancelled = threading.Event()
        self._wrote = False
        self._who = "a mover without a plan"

    def run(self) -> int:
        """Run the plan of the environment; the exit code. Every exception becomes a result."""
        try:
            result = self._execute(self._read_plan())
        except Cancelled:
            _log.info("%s: stopped on request; what was stored stays", self._who)
            return TERMINATED
        except StorageError as error:
            # The operator says it too, with the artifact's name; here is where to look closer.
            _log.info("%s: %s", self._who, error)
            result = Result(failure=Failure(reason=error.reason, message=error.message, wrote=self._wrote))
        except BrokenPipeError:
            raise  # the operator is gone, and nobody reads our progress any more: see main()
        except Exception as error:
            # Only the type goes into the result: the text of an unknown exception may hold anything.
            _log.exception("%s: a bug", self._who)
            result = Result(
                failure=Failure(
                    reason=Reason.INTERNAL, message=f"{type(error).__name__}: see the mover's log, and report it"
                )
            )
        self._emit(result)
        self._write_termination_message(result)
        return FAILURES[result.failure.reason].exit_code if result.failure else ExitCode.DONE

    def _read_plan(self) -> Plan:
        text = self._environment.get(ENV_PLAN)
        if text is None:
            raise StorageError(
                Reason.INVALID_SPEC, f"the variable {ENV_PLAN} is not set: a mover is started by the operator"
            )
        try:
            return Plan.model_validate_json(text)
        except ValidationError as error:
            fields = ", ".join(".".join(str(part) for part in item["loc"]) for item in error.errors())
            raise StorageError(Reason.INVALID_SPEC, f"the plan in {ENV_PLAN} is not valid, see: {fields}") from error

    def _execute(self, plan: Plan) -> Result:
        self._who = f"{plan.operation.lower()} of artifact {plan.artifact_uid}"
        try:
            uri = TargetURI.parse(plan.target_uri)
        except InvalidURI as error:
            raise StorageError(Reason.UNSUPPORTED_URI, str(error)) from error
        with ExitStack() as stack:
            if plan.lock_file:
                stack.enter_context(hold_lock(Path(plan.lock_file)))
            options = stack.enter_context(trusted(plan.options))
            backend = StorageManager(options).backend(uri.scheme)
            match plan.operation:
                case Operation.DELETE:
                    request = DeleteRequest(
                        uri,
                        plan.artifact_uid,
                        plan.layout,
                        keep_committed=plan.keep_committed,
                        force=plan.earlier_mover_gone,
                    )
                    return Result(deleted=backend.delete_artifact(request))
                case Operation.UPLOAD:
                    return Result(stored=backend.upload_artifact(self._upload_request(plan, uri)))

    def _upload_request(self, plan: Plan, uri: TargetURI) -> UploadRequest:
        if plan.source is None:
            raise StorageError(Reason.INVALID_SPEC, f"the plan in {ENV_PLAN} has no source")
        return UploadRequest(
            root=plan.source.root,
            path=plan.source.path,
            uri=uri,
            metadata=plan.metadata,
            uid=plan.artifact_uid,
            layout=plan.layout,
            selection=Selection(tuple(plan.source.include), tuple(plan.source.exclude)),
            force=plan.earlier_mover_gone,
            progress=self._emit,
            cancelled=self.cancelled,
            keep_parts=True,
            on_write=self._note_write,
            max_bytes_per_second=plan.options.max_bytes_per_second,
        )

    def _note_write(self) -> None:
        self._wrote = True

    def _emit(self, message: Progress | Result) -> None:
        with self._writing:
            self._output.write(encode_line(message) + "\n")
            self._output.flush()

    def _write_termination_message(self, result: Result) -> None:
        path = self._environment.get(ENV_TERMINATION_MESSAGE)
        if path:
            try:
                Path(path).write_text(encode_line(result))
            except OSError as error:
                _log.warning("the termination message could not be written: %s", error.strerror)


def _exit_with_parent(cancelled: threading.Event) -> None:
    """Stop when standard input ends: the operator holds its other end, so its death, however sudden, is seen here."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        cancelled.set()
        # A scan of a slow volume, or a wait inside the SDK, may not look at the event for long; nobody is left to kill us.
        time.sleep(ORPHAN_SECONDS)
        os._exit(TERMINATED)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _own_output() -> TextIO:
    """Standard output for our lines alone, in UTF-8 whatever the locale; what a library prints goes to standard error."""
    sys.stdout.flush()
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return output


def _be_the_first_to_go() -> None:
    """We share the operator's memory limit: where it is met, the kernel shall end us and not the operator."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> int:
    """Entry point; reads the plan from the environment."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    # The identity of the machine belongs to nobody who may write a custom resource, unless the admin said so.
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    output = _own_output()
    mover = Mover(os.environ, output)
    signal.signal(signal.SIGTERM, lambda *_: mover.cancelled.set())
    signal.signal(signal.SIGINT, lambda *_: mover.cancelled.set())
    if os.environ.get(ENV_EXIT_WITH_PARENT):
        _be_the_first_to_go()
        _exit_with_parent(mover.cancelled)
    try:
        return mover.run()
    except BrokenPipeError:
        # Nobody listens any more; the store keeps what was done, the next attempt finds it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        return TERMINATED
