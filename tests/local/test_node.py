"""A whole node: pods that run, under the rules of a strict namespace, and nothing left of it afterwards."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from node_helpers import Namespace, claim_on, restricted, wait_for

import local_cluster as lc
from local_cluster.node_build import PAUSE_IMAGE

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster() -> Iterator[lc.NodeCluster]:
    try:
        with lc.start_node(nodes=2, timings=lc.Timings(lost_after=20, evicted_after=5)) as started:
            yield started
    except lc.NodeUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def namespace(cluster: lc.NodeCluster, request: pytest.FixtureRequest) -> Namespace:
    """One for each test."""
    made = Namespace(cluster, request.node.name.replace("_", "-")[:50].strip("-"))
    made.create()
    return made


def test_a_job_writes_into_a_claim_as_a_user_without_rights(cluster: lc.NodeCluster, namespace: Namespace) -> None:
    folder = cluster.volumes / "written"
    claim = claim_on(namespace, folder, node="node-1", owner=65532)
    spec = restricted("write", "/data/step", "1000", "write", "/dev/termination-log", "bye", "print", "done")
    spec["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    spec["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]
    namespace.job("writer", spec)
    pod = namespace.finished("writer")
    state = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (state["exitCode"], state["message"]) == (0, "bye")
    assert namespace.kubectl("logs", "job/writer") == "done\n"
    written = folder / "step"
    assert written.read_text() == "1000"
    assert written.stat().st_uid == 65532
    assert pod["spec"]["nodeName"] == "node-1", "the volume is on that node alone"


def test_the_namespace_refuses_what_is_not_restricted(namespace: Namespace) -> None:
    refused = namespace.try_kubectl("run", "root", f"--image={PAUSE_IMAGE}")
    assert "violates PodSecurity" in refused.stderr


def test_a_claim_that_is_mounted_read_only_takes_no_writes(cluster: lc.NodeCluster, namespace: Namespace) -> None:
    claim = claim_on(namespace, cluster.volumes / "guarded", node="node-1", owner=65532)
    spec = restricted("write", "/data/x", "text")
    spec["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data", "readOnly": True}]
    spec["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]
    namespace.job("writer", spec)
    assert namespace.finished("writer")["status"]["phase"] == "Failed"
    assert "read-only file system" in namespace.kubectl("logs", "job/writer")


def test_a_container_that_eats_more_than_its_limit_is_killed_for_it(namespace: Namespace) -> None:
    spec = restricted("eat", "200", "wait")
    spec["containers"][0]["resources"] = {"limits": {"memory": "64Mi", "cpu": "500m"}}
    namespace.job("eater", spec)
    state = namespace.finished("eater")["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (state["reason"], state["exitCode"]) == ("OOMKilled", 137)


def test_an_image_that_nobody_has_is_named_in_the_status(namespace: Namespace) -> None:
    spec = restricted("wait")
    spec["containers"][0]["image"] = "registry.invalid/none:1"
    namespace.pod("imageless", spec)

    def reason() -> str:
        statuses = namespace.get("pod", "imageless")["status"].get("containerStatuses", [{}])
        found: str = statuses[0].get("state", {}).get("waiting", {}).get("reason", "")
        return found

    wait_for(lambda: reason() in ("ErrImagePull", "ImagePullBackOff"), "the pull to fail")


def test_both_nodes_run_pods_that_can_be_entered(cluster: lc.NodeCluster, namespace: Namespace) -> None:
    for node in cluster.nodes:
        spec = restricted("print", f"hello from {node}", "wait")
        namespace.pod(node, {**spec, "nodeSelector": {"kubernetes.io/hostname": node}})
    for node in cluster.nodes:
        namespace.wait_ready(node)
        assert namespace.kubectl("logs", node) == f"hello from {node}\n"
        assert namespace.kubectl("exec", node, "--", "/pause", "read", "/proc/1/cmdline").startswith("/pause\0print\0hello")


def test_a_pod_reaches_a_service_and_what_listens_on_the_host_address(
    cluster: lc.NodeCluster, namespace: Namespace, host_server: str
) -> None:
    spec = restricted("serve", ":8080", "from the pod", "wait")
    namespace.pod("server", {**spec, "nodeSelector": {"kubernetes.io/hostname": "node-1"}}, labels={"app": "server"})
    namespace.wait_ready("server")
    service = {"spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8080}]}}
    namespace.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "server"}, **service})
    address = namespace.get("service", "server")["spec"]["clusterIP"]
    wait_for(lambda: namespace.get("endpointslices", "")["items"][0]["endpoints"], "the service to have an endpoint")
    for node in cluster.nodes:
        job = f"asks-{node}"
        steps = restricted("sleep", "0.5", "get", f"http://{address}", "print", "", "get", host_server)
        namespace.job(job, {**steps, "nodeSelector": {"kubernetes.io/hostname": node}}, retries=5)
        namespace.completed(job)
        assert namespace.kubectl("logs", f"job/{job}") == "from the pod\nfrom the host"


@pytest.fixture
def host_server(cluster: lc.NodeCluster) -> Iterator[str]:
    """The URL of a server of this process, on the outer end of the link."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"from the host")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((cluster.host_address, 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://{cluster.host_address}:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_node_whose_kubelet_is_killed_is_lost_until_it_is_started_again(
    cluster: lc.NodeCluster, namespace: Namespace
) -> None:
    namespace.pod("stays", {**restricted("wait"), "nodeSelector": {"kubernetes.io/hostname": "node-2"}})
    namespace.wait_ready("stays")
    cluster.kill_kubelet("node-2")
    wait_for(lambda: _ready(namespace, "node-2") == "Unknown", "the node to be given up")
    assert _ready(namespace, "node-1") == "True"
    # Nobody is there to end the pod, so it is told to and stays.
    wait_for(lambda: "deletionTimestamp" in namespace.get("pod", "stays")["metadata"], "the pod to be evicted")
    cluster.restart_kubelet("node-2")
    wait_for(lambda: _ready(namespace, "node-2") == "True", "the node to be back")
    wait_for(lambda: namespace.try_kubectl("get", "pod", "stays").returncode != 0, "the pod to end at last")


def _ready(namespace: Namespace, node: str) -> str:
    conditions: list[dict[str, Any]] = namespace.get("node", node)["status"]["conditions"]
    return next(item["status"] for item in conditions if item["type"] == "Ready")
