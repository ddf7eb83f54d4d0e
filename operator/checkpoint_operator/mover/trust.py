"""The authorities that a plan brings along: a pod has no such file, and what speaks TLS wants one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.storage.errors import StorageError


@contextmanager
def trusted(options: TargetOptions) -> Iterator[TargetOptions]:
    """The options with their PEM in a file of our own, for as long as the block runs.

    Raises:
        StorageError: InternalError where no file can be written.
    """
    if options.ca_bundle_pem is None:
        yield options
        return
    try:
        descriptor, path = tempfile.mkstemp(prefix="ca-", suffix=".pem")  # readable by our user alone
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(options.ca_bundle_pem)
    except OSError as error:
        raise StorageError(
            Reason.INTERNAL, f"the plan's CA bundle cannot be written to the temporary folder: {error.strerror}"
        ) from error
    try:
        yield options.replace(ca_bundle=path, ca_bundle_pem=None)
    finally:
        with suppress(OSError):
            os.unlink(path)
