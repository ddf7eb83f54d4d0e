"""Movers whose node is lost, and operators that die among many movers; what a node would say is said by hand."""

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Operator
from hand_kubelet import NAME_LABEL, HandKubelet, failed, stored, until
from jobs_world import create, environment, prepare, ready_condition

import local_cluster as lc
from local_cluster.operator_process import kubectl

CROWD = 24


@pytest.fixture(scope="module")
def operator(cluster: lc.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    prepared = prepare(cluster, tmp_path_factory.mktemp("jobs-nodes"), "jobs-nodes")
    prepared.start()
    yield prepared
    assert prepared.process is not None
    assert prepared.process.poll() is None, "the operator died"
    assert prepared.stop() == 0


@pytest.fixture(scope="module")
def kubelet(operator: Operator) -> HandKubelet:
    return HandKubelet(operator)


def add_node(cluster: lc.Cluster, name: str) -> None:
    """A node without a kubelet: it never becomes Ready."""
    body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}}
    kubectl(cluster, "create", "-f", "-", stdin=json.dumps(body))


def lose(operator: Operator, kubelet: HandKubelet, name: str, node: str) -> str:
    """The mover of an artifact runs on a node that goes silent, and is deleted there as a drain would; its pod."""
    add_node(operator.cluster, node)
    pod = kubelet.pod(name)
    kubelet.bind(pod, node)
    kubelet.run(pod)
    operator.kubectl("delete", "pod", pod, "--grace-period=1", "--wait=false")
    return pod


def test_a_mover_on_a_lost_node_does_not_hold_its_artifact_and_the_next_one_joins(
    operator: Operator, kubelet: HandKubelet
) -> None:
    create(operator, "lost")
    pod = lose(operator, kubelet, "lost", "lost-1")
    plan = json.loads(environment(kubelet.job("lost", 2))["CHECKPOINT_PLAN"])
    assert (plan["operation"], plan.get("earlierMoverGone", False)) == ("Upload", False)
    assert operator.status("lost")["attempts"] == 0
    kubelet.complete("lost", 2)
    operator.wait("lost", "Ready")
    assert ("Warning", "MoverDisrupted") in {event[:2] for event in operator.events("lost")}
    kubelet.gone(pod)
    operator.kubectl("delete", "node", "lost-1")


def test_a_swap_of_the_claim_waits_until_the_lost_node_is_deleted(operator: Operator, kubelet: HandKubelet) -> None:
    create(operator, "swap")
    lose(operator, kubelet, "swap", "lost-2")
    pod = kubelet.pod("swap", 2)
    kubelet.end(pod, 22, failed("EarlierMoverNotGone"))
    status = operator.until(
        "swap", lambda status: "lost-2" in ready_condition(status).get("message", ""), "the fence to be told"
    )
    assert (ready_condition(status)["reason"], status["launches"]) == ("EarlierMoverNotGone", 2)
    # The controller manager deletes the pods of a node that is no more; that is what the operator sees.
    operator.kubectl("delete", "node", "lost-2")
    plan = json.loads(environment(kubelet.job("swap", 3))["CHECKPOINT_PLAN"])
    assert plan["earlierMoverGone"] is True
    kubelet.complete("swap", 3)
    operator.wait("swap", "Ready")


def test_a_deletion_waits_until_the_lost_node_is_out_of_service(operator: Operator, kubelet: HandKubelet) -> None:
    create(operator, "fenced")
    lose(operator, kubelet, "fenced", "lost-3")
    until(lambda: len(kubelet.jobs("fenced")) > 0, "a Job", operator)
    operator.kubectl("delete", "ckpt", "fenced", "--wait=false")
    status = operator.until(
        "fenced", lambda status: ready_condition(status).get("reason") == "EarlierMoverNotGone", "the fence to be told"
    )
    assert status["phase"] == "Deleting"
    assert "out-of-service" in ready_condition(status)["message"]
    launches = status["launches"]
    operator.kubectl("taint", "node", "lost-3", "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute")
    pod = kubelet.pod("fenced", launches + 1)
    kubelet.run(pod)
    kubelet.end(pod, 0, json.dumps({"type": "result", "deleted": "done"}))
    operator.wait_gone("fenced")
    operator.kubectl("delete", "node", "lost-3")


def everybody(operator: Operator, kind: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads(operator.kubectl("get", kind, "-o", "json").stdout)["items"]
    return items


def test_operators_that_die_among_many_movers_start_none_twice_and_lose_none(
    operator: Operator, kubelet: HandKubelet
) -> None:
    names = [f"crowd-{number}" for number in range(CROWD)]
    for index, name in enumerate(names):
        create(operator, name)
        if index % 6 == 5:  # some of them are just being started
            operator.stop(signal.SIGKILL)
            operator.start()

    def pods() -> dict[str, dict[str, Any]]:
        """The pods of Jobs that are not being deleted, by the artifact."""
        return {pod["metadata"]["labels"][NAME_LABEL]: pod for pod in everybody(operator, "pods")}

    def status_of() -> dict[str, dict[str, Any]]:
        return {body["metadata"]["name"]: body.get("status", {}) for body in everybody(operator, "ckpt")}

    until(lambda: pods().keys() >= set(names), "a pod for each", operator, 120)
    for name, pod in pods().items():
        if name in names:
            kubelet.run(pod["metadata"]["name"])
    running = {name: status["launches"] for name, status in status_of().items() if name in names}
    operator.stop(signal.SIGKILL)
    operator.start()
    ending = pods()
    for name in names:
        kubelet.end(ending[name]["metadata"]["name"], 0, stored(f"s3://bucket/{operator.namespace}/{name}"))
    until(lambda: all(status_of()[name]["phase"] == "Ready" for name in names), "all to be Ready", operator, 120)
    ended = {name: status["launches"] for name, status in status_of().items() if name in names}
    assert ended == running, "a mover that ran was started again"
    assert {status_of()[name]["attempts"] for name in names} == {1}

    def kept() -> set[str]:
        return {job["metadata"]["labels"][NAME_LABEL] for job in everybody(operator, "jobs")} & set(names)

    until(lambda: not kept(), "the Jobs to go", operator)
