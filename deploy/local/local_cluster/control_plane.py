"""A real API server in seconds: etcd, kube-apiserver and kube-controller-manager, on loopback or in the world of a node."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from . import credentials
from .errors import LocalClusterError
from .processes import LOOPBACK, free_ports, http_get
from .session import ATTEMPTS, Session, start_on_free_ports

PROGRAMS = ("etcd", "kube-apiserver", "kubectl")
CONTROLLER_MANAGER = "kube-controller-manager"
_MANAGER_USER = "system:kube-controller-manager"
# Generous: a machine that is busy with something else takes many times what an idle one does.
_PATIENCE = 120.0


@dataclass(frozen=True)
class Certificates:
    """What an authority that was there before signed for the API server; without it the server makes up its own."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class Place:
    """Where a control plane runs, and what it needs there besides its usual flags."""

    address: str = LOOPBACK
    """The API server's; what nobody but the control plane talks to is on loopback everywhere."""
    services: str = "10.96.0.0/16"
    wrap: tuple[str, ...] = ()
    """Starts a program there."""
    enter: Callable[[], AbstractContextManager[None]] = nullcontext
    """To connect to the loopback of that place."""
    certificates: Certificates | None = None
    accounts: tuple[credentials.Account, ...] = ()
    # A loopback address is refused as an endpoint; nothing inside the cluster needs one.
    server_flags: tuple[str, ...] = ("--endpoint-reconciler-type=none",)
    manager_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class ControlPlane:
    session: Session
    kubeconfig: Path
    server: str
    has_controller_manager: bool
    ca: Path
    admin: credentials.Account


def start_control_plane(
    bin_dir: Path,
    *,
    name: str,
    new_state_dir: Callable[[], Path],
    with_manager: bool,
    say: Callable[[str], None],
) -> ControlPlane:
    """Start in a fresh state folder; once more with other ports when somebody was faster to take one."""
    check_programs(bin_dir, PROGRAMS)
    return start_on_free_ports(
        new_state_dir,
        lambda session: start_at(Place(), session, bin_dir, name, with_manager=with_manager, say=say),
        lambda attempt: say(f"somebody took a port in between, trying others ({attempt} of {ATTEMPTS})"),
    )


def check_programs(bin_dir: Path, names: Sequence[str]) -> None:
    for program in names:
        if not (bin_dir / program).is_file():
            raise LocalClusterError(f"there is no {program} in {bin_dir}; this needs {', '.join(names)}.")


def start_at(
    place: Place, session: Session, bin_dir: Path, name: str, *, with_manager: bool, say: Callable[[str], None]
) -> ControlPlane:
    """Start all of it in that place, in a session that is there already."""
    etcd_port, peer_port, server_port, manager_port = free_ports(4)
    _start_etcd(place, session, bin_dir / "etcd", etcd_port, peer_port)
    say(f"etcd answers; starting kube-apiserver on port {server_port}")

    state = session.state_dir
    admin, manager = credentials.Account("local-admin", "system:masters"), credentials.Account(_MANAGER_USER)
    tokens = credentials.write_token_file(state / "tokens.csv", [admin, manager, *place.accounts])
    key = credentials.write_signing_key(state / "service-account.key")
    own = state / "apiserver"
    served, ca = own / "apiserver.crt", state / "ca.crt"
    server = f"https://{place.address}:{server_port}"
    identity = [f"--cert-dir={own}"]
    if place.certificates is not None:
        ca = place.certificates.ca
        identity += [
            f"--tls-cert-file={place.certificates.certificate}",
            f"--tls-private-key-file={place.certificates.key}",
        ]
    session.start(
        "kube-apiserver",
        [
            *place.wrap,
            bin_dir / "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{etcd_port}",
            f"--bind-address={place.address}",
            f"--advertise-address={place.address}",
            f"--secure-port={server_port}",
            *identity,
            f"--token-auth-file={tokens}",
            "--authorization-mode=Node,RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            f"--service-cluster-ip-range={place.services}",
            "--profiling=false",
            # Without a controller manager no namespace gets its `default` account, and pods would be refused.
            *([] if with_manager else ["--disable-admission-plugins=ServiceAccount"]),
            *place.server_flags,
        ],
    )
    session.wait_until(
        lambda: credentials.extract_ca(served, ca) and is_ready(server, ca, admin.token),
        what="the API server's /readyz",
        seconds=_PATIENCE,
        program="kube-apiserver",
    )
    kubeconfig = credentials.write_kubeconfig(state / "kubeconfig", name=name, server=server, ca=ca, account=admin)
    plane = ControlPlane(session, kubeconfig, server, with_manager, ca, admin)
    if with_manager:
        say("the API server is ready; starting kube-controller-manager")
        _start_manager(place, plane, bin_dir, key, manager, manager_port)
        _wait_default_account(plane)
    return plane


def _start_etcd(place: Place, session: Session, program: Path, port: int, peer_port: int) -> None:
    session.start(
        "etcd",
        [
            *place.wrap,
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

    def answers() -> bool:
        with place.enter():
            return http_get(port, "/health")[0] == 200

    # Before the API server starts: were this port another cluster's, it would write into that one's store.
    session.wait_until(answers, what="etcd to answer", seconds=_PATIENCE, program="etcd")


def _start_manager(
    place: Place, plane: ControlPlane, bin_dir: Path, key: Path, account: credentials.Account, port: int
) -> None:
    session = plane.session
    certificates = session.state_dir / "controller-manager"
    session.start(
        CONTROLLER_MANAGER,
        [
            *place.wrap,
            bin_dir / CONTROLLER_MANAGER,
            *component_flags(plane, "controller-manager", account),
            # Each controller asks for a token of its own; at the default 20 requests a second that takes 5 s.
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
            f"--secure-port={port}",
            f"--cert-dir={certificates}",
            "--use-service-account-credentials",
            f"--root-ca-file={plane.ca}",
            f"--service-account-private-key-file={key}",
            *place.manager_flags,
        ],
    )
    own_ca = certificates / "kube-controller-manager.crt"

    def healthy() -> bool:
        with place.enter():
            return own_ca.exists() and http_get(port, "/healthz", ca=own_ca)[0] == 200

    session.wait_until(healthy, what="the controller manager's /healthz", seconds=_PATIENCE, program=CONTROLLER_MANAGER)


def component_flags(plane: ControlPlane, name: str, account: credentials.Account) -> list[str]:
    """What the controller manager and the scheduler have in common."""
    kubeconfig = credentials.write_kubeconfig(
        plane.session.state_dir / f"{name}.kubeconfig", name="local", server=plane.server, ca=plane.ca, account=account
    )
    return [
        f"--kubeconfig={kubeconfig}",
        # Its own endpoint asks the API server who may read it, instead of looking for a pod's account.
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        # There are no client certificates here whose authority could be looked up.
        "--authentication-skip-lookup",
        f"--bind-address={LOOPBACK}",
        "--leader-elect=false",
        "--profiling=false",
    ]


def api_get(server: str, path: str, ca: Path, token: str) -> tuple[int, str]:
    """Checked against the cluster's own certificate, so another cluster on that port does not count."""
    host, _, port = server.removeprefix("https://").rpartition(":")
    return http_get(int(port), path, ca=ca, token=token, host=host)


def is_ready(server: str, ca: Path, token: str) -> bool:
    return api_get(server, "/readyz", ca, token)[0] == 200


def _wait_default_account(plane: ControlPlane) -> None:
    def appeared() -> bool:
        path = "/api/v1/namespaces/default/serviceaccounts"
        status, text = api_get(plane.server, path, plane.ca, plane.admin.token)
        if status != 200:
            return False
        return any(item["metadata"]["name"] == "default" for item in json.loads(text)["items"])

    what = "the `default` service account"
    plane.session.wait_until(appeared, what=what, seconds=_PATIENCE, program=CONTROLLER_MANAGER)
