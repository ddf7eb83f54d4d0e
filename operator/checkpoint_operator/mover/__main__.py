"""Where a mover starts: ``python -m checkpoint_operator.mover``, the command ``mover`` in the image."""

import gc
import os
import sys
from contextlib import suppress
from typing import NoReturn

from checkpoint_operator import __version__

_USAGE = """usage: mover [--version]

Runs the plan in the variable CHECKPOINT_PLAN once and ends: a mover is started by the operator, not by hand."""


def start() -> int:
    """Entry point; only what the run needs is imported, and nothing for a question about the program itself."""
    match sys.argv[1:]:
        case []:
            return _run()
        case ["--version"]:
            print(f"mover {__version__}")
            return 0
        case ["--help" | "-h"]:
            print(_USAGE)
            return 0
        case _:
            from checkpoint_operator.api.errors import ExitCode

            print(_USAGE, file=sys.stderr)
            return ExitCode.CONFIGURATION


def _run() -> NoReturn:
    # A mover starts once for each artifact, and nothing that an import makes is ever garbage: never look for it.
    gc.disable()
    # A plugin of pydantic is looked for in the metadata of every package that is installed.
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"
    # Azure's library imports aiohttp wherever it is installed, for clients that nothing here uses: a fifth of its start.
    sys.modules["aiohttp"] = None  # type: ignore[assignment]  # the documented way to say that there is none
    from checkpoint_operator.mover.main import main

    gc.freeze()
    gc.enable()
    code = main()
    # What was said is said and every thread has ended. Taking the interpreter apart takes longer than a small upload.
    with suppress(OSError):  # who listened may be gone, and the code says what it says
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(start())
