"""The Pod Security Standard ``restricted``, as its page has it (https://kubernetes.io/docs/concepts/security/pod-security-standards/),
so that any rendered pod can be held to it without a cluster. ``tests/cluster`` asks the real admission plugin."""

from collections.abc import Iterator
from typing import Any

_HOST_FIELDS = ("hostNetwork", "hostPID", "hostIPC", "hostname", "nodeName", "shareProcessNamespace", "hostAliases")
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def violations(pod: dict[str, Any]) -> Iterator[str]:
    """What a pod's spec violates; every field has to be explicit."""
    for field in _HOST_FIELDS:
        if pod.get(field):
            yield field
    for volume in pod.get("volumes", ()):
        if not set(volume) - {"name"} <= _VOLUMES:
            yield f"volume {volume}"
    yield from _selinux(pod["securityContext"])
    for container in (*pod.get("initContainers", ()), *pod["containers"], *pod.get("ephemeralContainers", ())):
        own = container["securityContext"]
        if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False or own.get("procMount"):
            yield "privileges"
        if own.get("capabilities") != {"drop": ["ALL"]}:
            yield "capabilities"
        if own.get("runAsNonRoot") is not True or pod["securityContext"].get("runAsNonRoot") is not True:
            yield "runAsNonRoot"
        if own.get("runAsUser") == 0 or not pod["securityContext"].get("runAsUser"):
            yield "runAsUser"
        if own.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield "seccompProfile"
        if own.get("readOnlyRootFilesystem") is not True:
            yield "readOnlyRootFilesystem"
        if any("hostPort" in port for port in container.get("ports", ())):
            yield "hostPort"
        yield from _selinux(own)
    if pod["securityContext"].get("sysctls"):
        yield "sysctls"


def _selinux(security: dict[str, Any]) -> Iterator[str]:
    options = security.get("seLinuxOptions", {})
    if set(options) - {"level"}:
        yield f"seLinuxOptions {options}"
