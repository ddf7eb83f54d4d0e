"""The kubelet and the scheduler, by hand: on a control plane without nodes a test says what becomes of a mover's pod."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from conftest import Operator

UID_LABEL = "checkpoints.rlhf.dev/artifact-uid"
NAME_LABEL = "checkpoints.rlhf.dev/artifact-name"


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def stored(uri: str, **changes: Any) -> str:
    """The termination message of a mover that has committed."""
    said = {
        "storageURI": uri,
        "sizeBytes": 2048,
        "fileCount": 2,
        "manifestDigest": "sha256:" + "1" * 64,
        "contentDigest": "sha256:" + "2" * 64,
        "dataOwner": True,
        **changes,
    }
    return json.dumps({"type": "result", "stored": said})


def failed(reason: str, message: str = "why") -> str:
    return json.dumps({"type": "result", "failure": {"reason": reason, "message": message}})


@dataclass
class HandKubelet:
    """Looks at the Jobs and pods of one operator's namespace, as the admin, and says what nodes would say."""

    operator: Operator

    def jobs(self, name: str) -> list[dict[str, Any]]:
        """The Jobs of an artifact."""
        return self._list("jobs", name)

    def pods(self, name: str) -> list[dict[str, Any]]:
        return self._list("pods", name)

    def _list(self, kind: str, name: str) -> list[dict[str, Any]]:
        shown = self.operator.kubectl("get", kind, "-l", f"{NAME_LABEL}={name}", "-o", "json")
        items: list[dict[str, Any]] = json.loads(shown.stdout)["items"]
        return items

    def job(self, name: str, launch: int = 1) -> dict[str, Any]:
        """The Job of an artifact's n-th launch, once it is there."""
        return until(
            lambda: next((job for job in self.jobs(name) if job["metadata"]["name"].endswith(f"-{launch}")), None),
            f"Job {launch} of {name}",
            self.operator,
        )

    def pod(self, name: str, launch: int = 1) -> str:
        """The name of the pod of that Job, once it is there."""
        job = self.job(name, launch)["metadata"]["name"]
        found = until(
            lambda: next((pod for pod in self.pods(name) if _owner(pod) == job), None), f"a pod of Job {job}", self.operator
        )
        return str(found["metadata"]["name"])

    def bind(self, pod: str, node: str) -> None:
        """What the scheduler does."""
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod}, "target": {"kind": "Node", "name": node}}
        path = f"/api/v1/namespaces/{self.operator.namespace}/pods/{pod}/binding"
        self.operator.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body))

    def run(self, pod: str) -> None:
        self.say(pod, "Running", state={"running": {"startedAt": now()}})

    def end(self, pod: str, code: int, message: str = "", *, reason: str = "", **more: Any) -> None:
        """The container has ended; ``more`` are fields of the pod's status."""
        ended = {
            "exitCode": code,
            "reason": reason or ("Completed" if code == 0 else "Error"),
            "message": message,
            "startedAt": now(),
            "finishedAt": now(),
        }
        self.say(pod, "Failed" if code else "Succeeded", state={"terminated": ended}, **more)

    def wait(self, pod: str, reason: str, message: str) -> None:
        """The container does not start."""
        self.say(pod, "Pending", state={"waiting": {"reason": reason, "message": message}})

    def say(self, pod: str, phase: str, *, state: dict[str, Any] | None = None, **more: Any) -> None:
        status: dict[str, Any] = {"phase": phase, **more}
        if state is not None:
            status["containerStatuses"] = [
                {"name": "mover", "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": state}
            ]
        self.operator.kubectl("patch", "pod", pod, "--subresource=status", "-p", json.dumps({"status": status}))

    def condition(self, pod: str, type_: str, status: str, reason: str, message: str) -> None:
        one = {"type": type_, "status": status, "reason": reason, "message": message, "lastTransitionTime": now()}
        self.operator.kubectl(
            "patch", "pod", pod, "--subresource=status", "-p", json.dumps({"status": {"conditions": [one]}})
        )

    def complete(self, name: str, launch: int = 1, **changes: Any) -> None:
        """The mover of an artifact commits."""
        uri = self.operator.get(name)["spec"]["target"]["uri"]
        pod = self.pod(name, launch)
        self.run(pod)
        self.end(pod, 0, stored(uri, **changes))

    def gone(self, pod: str) -> None:
        """The kubelet has stopped a pod that was deleted."""
        self.operator.kubectl("delete", "pod", pod, "--force", "--grace-period=0", "--wait=false", check=False)


def _owner(body: dict[str, Any]) -> str | None:
    return next((owner["name"] for owner in body["metadata"].get("ownerReferences", []) if owner.get("controller")), None)


def until(look: Callable[[], Any], what: str, operator: Operator, seconds: float = 40) -> Any:
    """What `look` returns once it is something."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for {what}\n{operator.log.read_text()[-4000:]}")
        time.sleep(0.1)
