"""Where the operator starts: ``python -m checkpoint_operator.controller``, the command ``operator`` in the image."""

import sys

from checkpoint_operator import __version__
from checkpoint_operator.controller import slim


def start() -> int:
    """Entry point; who only asks for the version does not wait for the clients of Kubernetes."""
    if sys.argv[1:] == ["--version"]:
        print(f"operator {__version__}")
        return 0
    slim.without_synchronous_client()
    if sys.argv[1:2] and sys.argv[1] in ("crds", "finalizers", "check"):
        from checkpoint_operator.controller import commands

        return commands.main(sys.argv[1:])
    from checkpoint_operator.controller.main import main

    return main()


if __name__ == "__main__":
    sys.exit(start())
