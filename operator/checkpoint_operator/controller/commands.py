"""What the image can do besides running the operator: the chart's hooks, and ``helm test``.

``operator crds apply`` · ``operator finalizers remove`` · ``operator check``
"""

import argparse
import asyncio
import http.client
import sys
from collections.abc import Sequence
from contextlib import suppress

from checkpoint_operator import __version__
from checkpoint_operator.api import names
from checkpoint_operator.controller import crds
from checkpoint_operator.controller.kube import Conflict, KubeError, NotFound
from checkpoint_operator.controller.kube_hooks import HookKube, connect_hook

FAILED, OLDER = 1, 3
"""Exit codes besides 0 and argparse's 2: the cluster did not do it; it has a newer CRD."""
AT_ONCE = 16
"""Requests in flight while finalizers are removed: ten thousand take half a minute."""
PASSES = 10
"""How often what was changed under us is looked at again."""


class CheckFailed(Exception):
    """The installation does not work; the message says what was found."""


def main(arguments: Sequence[str]) -> int:
    """Run one subcommand; what came of it is one line on standard output, or on standard error."""
    options = _parser().parse_args(arguments)
    try:
        said: str = asyncio.run(options.run(options))
    except crds.OlderCRD as error:
        print(f"operator: {error}", file=sys.stderr)
        return OLDER
    except (KubeError, CheckFailed) as error:
        print(f"operator: {error}", file=sys.stderr)
        return FAILED
    print(said)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="operator")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    crd = commands.add_parser("crds", help="the CustomResourceDefinitions").add_subparsers(required=True, metavar="COMMAND")
    crd.add_parser("apply", help="bring them to the cluster, unless it has newer ones").set_defaults(run=_apply)

    held = commands.add_parser("finalizers", help="what holds artifacts until their data is dealt with")
    remove = held.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "remove", help="let go of artifacts, when no operator runs any more; data and artifacts stay"
    )
    where = remove.add_mutually_exclusive_group(required=True)
    where.add_argument("--all", action="store_true", help="in all namespaces")
    where.add_argument("namespaces", nargs="*", default=[], metavar="NAMESPACE")
    remove.set_defaults(run=_remove)

    check = commands.add_parser("check", help="does the installation work?")
    check.add_argument("--host", required=True, help="where the operator listens")
    check.add_argument("--port", type=int, default=8080)
    check.add_argument("--seconds", type=float, default=60, help="how long it may take to become ready")
    check.set_defaults(run=_check)
    return parser


async def _apply(_: argparse.Namespace) -> str:
    async with connect_hook() as kube:
        return await crds.apply(kube, __version__)


async def _remove(options: argparse.Namespace) -> str:
    async with connect_hook() as kube:
        places: list[str | None] = [None] if options.all else list(options.namespaces)
        done = sum([await _let_go(kube, place) for place in places])
    return f"took the finalizer {names.FINALIZER} off {done} artifacts; they and their data stay"


async def _let_go(kube: HookKube, namespace: str | None) -> int:
    """How many artifacts of a namespace were let go; repeated until a whole look finds none."""
    turn = asyncio.Semaphore(AT_ONCE)
    done = 0

    async def one(metadata: dict[str, object]) -> bool:
        async with turn:
            with suppress(Conflict, NotFound):
                await kube.let_go(metadata)
                return True
            return False

    for _ in range(PASSES):
        try:
            held = [metadata async for metadata in kube.list_held(namespace)]
        except NotFound:  # no such kind: nothing is held
            return done
        if not held:
            return done
        done += sum(await asyncio.gather(*(one(metadata) for metadata in held)))
    raise KubeError(f"artifacts got the finalizer {names.FINALIZER} again and again: does an operator still run?")


async def _check(options: argparse.Namespace) -> str:
    async with connect_hook() as kube:
        if names.PLURAL not in await kube.served_kinds():
            raise CheckFailed(f"the cluster does not serve {names.PLURAL}.{names.GROUP}: run `operator crds apply`")
    deadline = asyncio.get_running_loop().time() + options.seconds
    while True:
        found = [await asyncio.to_thread(_get, options.host, options.port, path) for path in ("/healthz", "/readyz")]
        if all(status == "200" for status in found):
            return f"the cluster serves {names.PLURAL}, and the operator is healthy and ready"
        if asyncio.get_running_loop().time() > deadline:
            where = f"{options.host} port {options.port}"
            raise CheckFailed(f"the operator at {where} answers /healthz with {found[0]} and /readyz with {found[1]}")
        await asyncio.sleep(1)


def _get(host: str, port: int, path: str) -> str:
    """The status of an answer, or what came instead of one. Proxies are not asked: this is inside the cluster."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        return str(connection.getresponse().status)
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()
