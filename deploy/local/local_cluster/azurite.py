"""A real Azure Blob Storage server for tests: Microsoft's Azurite on loopback, gone with whoever started it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import LocalClusterError
from .nodejs import Node, find_node
from .paths import cache_root, locked, new_run_dir
from .processes import free_ports, http_get
from .providers import Say, silent
from .session import Running, Session, start_on_free_ports, sweep
from .versitygw import TLSFiles

SOURCE = Path(__file__).resolve().parent.parent / "azurite"
"""package.json and package-lock.json: the lock names no registry, so that npm asks the one that it is configured for."""
ACCOUNT = "localaccount"
_MAIN = Path("node_modules/azurite/dist/src/blob/main.js")


@dataclass(frozen=True)
class Azurite(Running):
    """As a context manager it is stopped, and its data removed, at the end. `endpoint` has the account in its path."""

    endpoint: str
    account: str
    key: str = field(repr=False)
    state_dir: Path
    ca: Path | None = None

    def client(self, **settings: Any) -> Any:
        """A BlobServiceClient of the account's owner, which does not try again."""
        from azure.storage.blob import BlobServiceClient

        credential = {"account_name": self.account, "account_key": self.key}
        verify = {"connection_verify": str(self.ca)} if self.ca else {}
        return BlobServiceClient(self.endpoint, credential=credential, **{"retry_total": 0, **verify, **settings})


def start_azurite(name: str = "azurite", *, tls: TLSFiles | None = None, say: Say = silent) -> Azurite:
    """Up in two seconds, once it is installed. With `tls` the endpoint is an https one."""
    node, folder = _installed(say)
    sweep()
    return start_on_free_ports(lambda: new_run_dir(name), lambda session: _start(session, node, folder, tls))


def _start(session: Session, node: Node, folder: Path, tls: TLSFiles | None) -> Azurite:
    data = session.state_dir / "data"
    data.mkdir()
    [port] = free_ports(1)
    key = base64.b64encode(secrets.token_bytes(64)).decode()
    arguments: list[str | Path] = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", data]
    # The SDK speaks newer versions of the protocol than Azurite knows by name.
    arguments += ["--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    if tls:
        # "basic": it also takes tokens, and looks at their claims (not at their signature).
        arguments += ["--cert", tls.certificate, "--key", tls.key, "--oauth", "basic"]
    session.start("azurite", [node.node, folder / _MAIN, *arguments], env={"AZURITE_ACCOUNTS": f"{ACCOUNT}:{key}"})
    ca = tls.ca if tls else None
    session.wait_until(
        lambda: http_get(port, f"/{ACCOUNT}", ca=ca)[0] != 0, what="Azurite to answer", seconds=60, program="azurite"
    )
    return Azurite(
        endpoint=f"{'https' if tls else 'http'}://127.0.0.1:{port}/{ACCOUNT}",
        account=ACCOUNT,
        key=key,
        state_dir=session.state_dir,
        ca=ca,
        _stop=session.stop,
        _detach=session.detach,
    )


def ensure_azurite(say: Say) -> Path:
    """The folder with Azurite; installed first where the cache does not hold this very lock file's packages yet."""
    return _installed(say)[1]


def _installed(say: Say) -> tuple[Node, Path]:
    lock = json.loads((SOURCE / "package-lock.json").read_text(encoding="utf-8"))
    azurite = lock["packages"]["node_modules/azurite"]
    major = re.match(r">=(\d+)\.", azurite["engines"]["node"])
    if major is None:
        raise LocalClusterError(f"the lock file in {SOURCE} does not say which Node.js Azurite needs.")
    node = find_node(int(major[1]), say)
    root = cache_root() / "azurite"
    target = root / f"{azurite['version']}-{_digest()}"
    if not (target / _MAIN).exists():
        with locked(root / f"{target.name}.lock", lambda: say("another process installs Azurite, waiting for it")):
            if not (target / _MAIN).exists():
                say(f"installing Azurite {azurite['version']} with npm: half a minute the first time, kept afterwards")
                _install(node, target)
    return node, target


def _digest() -> str:
    digest = hashlib.sha256()
    for name in ("package.json", "package-lock.json"):
        digest.update((SOURCE / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _install(node: Node, target: Path) -> None:
    # Its name is the installation's own, so that the next try removes what a killed one left.
    fresh = target.parent / f".installing-{target.name}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCE / name, fresh)
        # No package's own code runs: what is installed is what the hashes in the lock file say.
        command = [*node.npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        path = os.pathsep.join([str(node.node.parent), os.environ.get("PATH", os.defpath)])
        done = subprocess.run(
            command, cwd=fresh, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        if done.returncode != 0 or not (fresh / _MAIN).exists():
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
            raise LocalClusterError(
                f"installing Azurite failed (npm's status {done.returncode}):\n{tail}\n"
                "To do: check the network and npm's registry setting, then try again."
            )
        if target.exists():
            shutil.rmtree(target)  # Something without its main program in it: no whole installation.
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
