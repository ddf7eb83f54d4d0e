"""The command line: a cluster for the shell, `python -m local_cluster up`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from . import detached
from .azurite import ensure_azurite
from .build import build_versitygw
from .errors import LocalClusterError, NodeUnavailable
from .gcs import build_fake_gcs
from .image import ImageUnavailable, ensure_image
from .kind import prepare_kind
from .node import prepare_node
from .providers import NATIVE, chosen_provider, programs_dir


def say(text: str) -> None:
    # To stderr, so that `eval "$(… up)"` sees only the export lines.
    print(text, file=sys.stderr, flush=True)


def prepare() -> None:
    """Everything that the tests start and that is not in the Python environment; each is made once and says so."""
    if chosen_provider() == NATIVE:  # a cluster that is there already needs no programs
        print(programs_dir(say))
        try:
            print(prepare_node(say).node)
        except NodeUnavailable as error:
            say(f"no node can run here: {error}")
    try:
        print(ensure_image(say))
    except ImageUnavailable as error:
        say(f"the image is not built here: {error}")
    print(build_versitygw(say))
    print(build_fake_gcs(say))
    print(ensure_azurite(say))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="local_cluster", description=__doc__)
    parser.add_argument("command", choices=["up", "down", "env", "status", "load", "image", "build", "kind-node"])
    parser.add_argument("archive", nargs="?", type=Path, help="for `load`: an image archive to bring onto the nodes")
    parser.add_argument("--name", default="local", help="several clusters can run side by side (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=0, help="for `up`: so many nodes that run pods (default: none)")
    options = parser.parse_args(arguments)
    # Whoever starts us in the background of a script has SIGINT ignored, and then nothing could interrupt an `up`.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if options.command == "up":
            print(detached.exports(detached.up(options.name, say=say, nodes=options.nodes)))
        elif options.command == "down":
            detached.down(options.name, say=say)
        elif options.command == "env":
            print(detached.exports(detached.existing_or_running(options.name)))
        elif options.command == "status":
            text = detached.status(options.name)
            print(text)
            return 1 if text.startswith("down") else 0
        elif options.command == "load":
            if options.archive is None:
                parser.error("load needs an archive")
            detached.load(options.name, options.archive, say=say)
        elif options.command == "image":
            print(ensure_image(say))
        elif options.command == "kind-node":
            archive = prepare_kind(say).archive
            if archive.exists():
                print(archive)
        else:
            prepare()
    except LocalClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing is left running", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
