"""Where the suite runs: each provider gives the same few things, and no test knows which one it is.

``CLUSTER`` chooses. A provider is one function that yields a :class:`Place`; a new one is one more entry in PROVIDERS.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import local_cluster as lc
from local_cluster.image import TAG, ImageUnavailable, ensure_image
from local_cluster.kind import start_kind
from local_cluster.operator_process import kubectl
from local_cluster.providers import existing_cluster

VARIABLE = "CLUSTER"
EARLIER_TAG = "docker.io/library/checkpoint-operator:earlier"
LOST_AFTER, EVICTED_AFTER = 8, 4
"""Seconds; a cluster that is started here gives a node up so soon."""


class Unavailable(Exception):
    """This machine cannot run the suite in the wanted way; the text says why."""


@dataclass(frozen=True)
class Place:
    """A cluster with nodes, an image of the operator on all of them, and an address of this machine that pods reach."""

    cluster: lc.Cluster
    nodes: tuple[str, ...]
    host_address: str
    image: str
    earlier_image: str
    """The same one under another tag: what an earlier chart installs."""
    pull_policy: str
    volumes: Path | None = None
    """A folder that is at the same path here and on every node; None: claims come from the default storage class."""
    kill_kubelet: Callable[[str], None] | None = None
    restart_kubelet: Callable[[str], None] | None = None
    is_ours: bool = False
    """It goes when the suite ends, so nothing in it need be tidied up."""


@contextmanager
def native() -> Iterator[Place]:
    """Two nodes in namespaces of this machine. E2E_IMAGE_ARCHIVE: an archive of the image, not made of this checkout."""
    given = os.environ.get("E2E_IMAGE_ARCHIVE")
    try:
        archive = Path(given) if given else ensure_image(_say)
        with lc.start_node(
            nodes=2, name="e2e", images=[archive], timings=lc.Timings(LOST_AFTER, EVICTED_AFTER), say=_say
        ) as cluster:
            load_earlier(archive, cluster.volumes.parent, cluster.load_image)
            yield Place(
                cluster,
                cluster.nodes,
                cluster.host_address,
                TAG,
                EARLIER_TAG,
                "Never",
                volumes=cluster.volumes,
                kill_kubelet=cluster.kill_kubelet,
                restart_kubelet=cluster.restart_kubelet,
                is_ours=True,
            )
    except (lc.NodeUnavailable, ImageUnavailable) as error:
        raise Unavailable(str(error)) from error


@contextmanager
def existing() -> Iterator[Place]:
    """Whatever KUBECONFIG names. E2E_IMAGE is on its nodes or can be pulled, E2E_HOST_ADDRESS is this machine to its pods.

    E2E_EARLIER_IMAGE: the same under another tag. E2E_VOLUMES: a folder that is at the same path here and on every node.
    """
    missing = [name for name in ("E2E_IMAGE", "E2E_HOST_ADDRESS") if not os.environ.get(name)]
    if missing:
        raise Unavailable(f"{VARIABLE}=existing needs {' and '.join(missing)}")
    cluster = existing_cluster()
    listed = json.loads(kubectl(cluster, "get", "nodes", "-o", "json").stdout)["items"]
    image, volumes = os.environ["E2E_IMAGE"], os.environ.get("E2E_VOLUMES")
    yield Place(
        cluster,
        tuple(node["metadata"]["name"] for node in listed),
        os.environ["E2E_HOST_ADDRESS"],
        image,
        os.environ.get("E2E_EARLIER_IMAGE", image),
        "IfNotPresent",
        volumes=Path(volumes) if volumes else None,
    )


@contextmanager
def kind() -> Iterator[Place]:
    """A cluster by kind. KIND_NODE_IMAGE and KIND_CONFIG: another image of the node, another configuration.

    E2E_OPTIONAL: a cluster that does not start is a reason to skip, too.
    """
    given = os.environ.get("E2E_IMAGE_ARCHIVE")
    try:
        archive = Path(given) if given else ensure_image(_say)
        cluster = start_kind("e2e", images=[archive], say=_say)
    except (lc.NodeUnavailable, ImageUnavailable) as error:
        raise Unavailable(str(error)) from error
    except lc.LocalClusterError as error:
        if os.environ.get("E2E_OPTIONAL"):
            raise Unavailable(f"kind makes no cluster here: {error}") from error
        raise
    with cluster:
        assert cluster.state_dir is not None
        load_earlier(archive, cluster.state_dir, cluster.load_image)
        yield Place(
            cluster,
            cluster.nodes,
            cluster.host_address,
            TAG,
            EARLIER_TAG,
            "Never",
            volumes=cluster.volumes,
            is_ours=True,
        )


PROVIDERS: dict[str, Callable[[], AbstractContextManager[Place]]] = {"native": native, "kind": kind, "existing": existing}


def chosen() -> AbstractContextManager[Place]:
    """The provider that ``CLUSTER`` names, not entered yet.

    Raises:
        Unavailable: there is none of that name.
    """
    name = os.environ.get(VARIABLE) or "native"
    if name not in PROVIDERS:
        raise Unavailable(f"{VARIABLE}={name!r} names no provider: use one of {', '.join(PROVIDERS)}")
    return PROVIDERS[name]()


def load_earlier(archive: Path, folder: Path, load: Callable[[Path], None]) -> None:
    """Bring the image onto the nodes once more, as the earlier one; ``folder`` holds the archive meanwhile."""
    earlier = folder / "earlier.tar"
    retag(archive, earlier, EARLIER_TAG)
    load(earlier)
    earlier.unlink()


def retag(archive: Path, target: Path, tag: str) -> None:
    """Write the docker-archive once more, with its image under that tag alone."""
    with tarfile.open(archive) as source, tarfile.open(target, "w") as copy:
        for member in source:
            stream = source.extractfile(member) if member.isfile() else None
            if member.name == "manifest.json" and stream is not None:
                listed = json.load(stream)
                text = json.dumps([{**item, "RepoTags": [tag]} for item in listed]).encode()
                member.size = len(text)
                stream = BytesIO(text)
            if member.name != "repositories":
                copy.addfile(member, stream)


def _say(text: str) -> None:
    print(text, flush=True)
