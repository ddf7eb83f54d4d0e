"""A real API server in seconds: etcd, kube-apiserver and kube-controller-manager on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import credentials
from .errors import LocalClusterError
from .processes import free_ports, http_get
from .session import ATTEMPTS, Session, start_on_free_ports

PROGRAMS = ("etcd", "kube-apiserver", "kubectl")
CONTROLLER_MANAGER = "kube-controller-manager"
# Generous: a machine that is busy with something else takes many times what an idle one does.
_PATIENCE = 120.0


@dataclass(frozen=True)
class ControlPlane:
    session: Session
    kubeconfig: Path
    server: str
    has_controller_manager: bool


def start_control_plane(
    bin_dir: Path,
    *,
    name: str,
    new_state_dir: Callable[[], Path],
    with_manager: bool,
    say: Callable[[str], None],
) -> ControlPlane:
    """Start in a fresh state folder; once more with other ports when somebody was faster to take one."""
    for program in PROGRAMS:
        if not (bin_dir / program).is_file():
            raise LocalClusterError(f"there is no {program} in {bin_dir}; a control plane needs {', '.join(PROGRAMS)}.")
    return start_on_free_ports(
        new_state_dir,
        lambda session: _start(session, bin_dir, name, with_manager, say),
        lambda attempt: say(f"somebody took a port in between, trying others ({attempt} of {ATTEMPTS})"),
    )


def _start(session: Session, bin_dir: Path, name: str, with_manager: bool, say: Callable[[str], None]) -> ControlPlane:
    etcd_port, peer_port, server_port, manager_port = free_ports(4)
    _start_etcd(session, bin_dir / "etcd", etcd_port, peer_port)
    say(f"etcd answers; starting kube-apiserver on port {server_port}")

    state = session.state_dir
    admin, manager = credentials.new_token(), credentials.new_token()
    tokens = credentials.write_token_file(state / "tokens.csv", admin=admin, controller_manager=manager)
    key = credentials.write_signing_key(state / "service-account.key")
    certificates = state / "apiserver"
    served, ca = certificates / "apiserver.crt", state / "ca.crt"
    server = f"https://127.0.0.1:{server_port}"
    session.start(
        "kube-apiserver",
        [
            bin_dir / "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{etcd_port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            # A loopback address is refused as an endpoint; nothing inside the cluster needs one.
            "--endpoint-reconciler-type=none",
            f"--secure-port={server_port}",
            f"--cert-dir={certificates}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=Node,RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--profiling=false",
            # Without a controller manager no namespace gets its `default` account, and pods would be refused.
            *([] if with_manager else ["--disable-admission-plugins=ServiceAccount"]),
        ],
    )
    session.wait_until(
        lambda: credentials.extract_ca(served, ca) and is_ready(server_port, ca, admin),
        what="the API server's /readyz",
        seconds=_PATIENCE,
        program="kube-apiserver",
    )
    kubeconfig = credentials.write_kubeconfig(
        state / "kubeconfig", name=name, server=server, ca=ca, user="local-admin", token=admin
    )
    if with_manager:
        say("the API server is ready; starting kube-controller-manager")
        _start_manager(session, bin_dir, server, ca, key, manager, manager_port)
        _wait_default_account(session, server_port, ca, admin)
    return ControlPlane(session, kubeconfig, server, with_manager)


def _start_etcd(session: Session, program: Path, port: int, peer_port: int) -> None:
    session.start(
        "etcd",
        [
            program,
            "--unsafe-no-fsync",
            f"--data-dir={session.state_dir / 'etcd'}",
            f"--listen-client-urls=http://127.0.0.1:{port}",
            f"--advertise-client-urls=http://127.0.0.1:{port}",
            f"--listen-peer-urls=http://127.0.0.1:{peer_port}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer_port}",
            f"--initial-cluster=default=http://127.0.0.1:{peer_port}",
        ],
    )
    # Before the API server starts: were this port another cluster's, it would write into that one's store.
    session.wait_until(lambda: http_get(port, "/health")[0] == 200, what="etcd to answer", seconds=_PATIENCE, program="etcd")


def _start_manager(session: Session, bin_dir: Path, server: str, ca: Path, key: Path, token: str, port: int) -> None:
    user = "system:kube-controller-manager"
    kubeconfig = credentials.write_kubeconfig(
        session.state_dir / "controller-manager.kubeconfig",
        name="local",
        server=server,
        ca=ca,
        user=user,
        token=token,
    )
    certificates = session.state_dir / "controller-manager"
    session.start(
        CONTROLLER_MANAGER,
        [
            bin_dir / CONTROLLER_MANAGER,
            f"--kubeconfig={kubeconfig}",
            # Its own endpoint asks the API server who may read it, instead of looking for a pod's account.
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            # There are no client certificates here whose authority could be looked up.
            "--authentication-skip-lookup",
            # Each controller asks for a token of its own; at the default 20 requests a second that takes 5 s.
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--cert-dir={certificates}",
            "--leader-elect=false",
            "--use-service-account-credentials",
            f"--root-ca-file={ca}",
            f"--service-account-private-key-file={key}",
            "--profiling=false",
        ],
    )
    own_ca = certificates / "kube-controller-manager.crt"
    session.wait_until(
        lambda: own_ca.exists() and http_get(port, "/healthz", ca=own_ca)[0] == 200,
        what="the controller manager's /healthz",
        seconds=_PATIENCE,
        program=CONTROLLER_MANAGER,
    )


def is_ready(port: int, ca: Path, token: str) -> bool:
    """Checked against the cluster's own certificate, so another cluster on that port does not count."""
    return http_get(port, "/readyz", ca=ca, token=token)[0] == 200


def _wait_default_account(session: Session, port: int, ca: Path, token: str) -> None:
    path = "/api/v1/namespaces/default/serviceaccounts"

    def appeared() -> bool:
        status, text = http_get(port, path, ca=ca, token=token)
        if status != 200:
            return False
        return any(item["metadata"]["name"] == "default" for item in json.loads(text)["items"])

    session.wait_until(appeared, what="the `default` service account", seconds=_PATIENCE, program=CONTROLLER_MANAGER)
