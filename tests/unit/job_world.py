"""Artifacts, claims and pods as the API server gives them, for the tests of the pure half of the Job executor."""

from typing import Any

from checkpoint_operator.api.artifact import CheckpointArtifact, parse_artifact
from checkpoint_operator.controller.config_jobs import JobRules

UID = "11111111-2222-3333-4444-555555555555"
NAME = f"ckpt-{UID}-1"
SECRET = {"credentialsSecretRef": {"name": "bucket-keys"}}


def rules(**changes: Any) -> JobRules:
    return JobRules.model_validate({"image": "registry.example/checkpoint-operator:0.1.0", **changes})


def artifact(
    *,
    target: dict[str, Any] | None = None,
    mover: dict[str, Any] | None = None,
    status: dict[str, Any] | None = None,
    name: str = "step-1000",
    **spec: Any,
) -> CheckpointArtifact:
    """An artifact to s3:// with a Secret, unless it says otherwise."""
    return parse_artifact(
        {
            "metadata": {
                "name": name,
                "namespace": "team-a",
                "uid": UID,
                "creationTimestamp": "2026-11-24T12:00:00Z",
            },
            "spec": {
                "source": {"persistentVolumeClaim": {"claimName": "dpo-output"}, "path": "checkpoint-1000"},
                "target": target or {"uri": "s3://bucket/dpo/checkpoint-1000", **SECRET},
                **({"mover": mover} if mover is not None else {}),
                **spec,
            },
            "status": status or {},
        }
    )


def to_file(claim: str = "archive") -> dict[str, Any]:
    return {"uri": "file:///dpo/checkpoint-1000", "persistentVolumeClaim": {"claimName": claim}}


def claim(*modes: str, phase: str = "Bound", deleted: bool = False, **spec: Any) -> dict[str, Any]:
    metadata = {"deletionTimestamp": "2026-11-24T12:00:00Z"} if deleted else {}
    return {
        "metadata": metadata,
        "spec": {"accessModes": list(modes or ("ReadWriteOnce",)), "volumeName": "pv-1", **spec},
        "status": {"phase": phase},
    }


def pod(
    name: str = "trainer",
    claim: str = "dpo-output",
    *,
    phase: str = "Running",
    node: str | None = "node-a",
    read_only: bool = False,
    pod_security: dict[str, Any] | None = None,
    container_security: dict[str, Any] | None = None,
    seen: dict[str, Any] | None = None,
    started: str = "2026-11-24T11:00:00Z",
    tolerations: list[dict[str, Any]] | None = None,
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One pod with a sidecar that does not mount the claim; ``seen`` is ``containerStatuses[].user.linux``."""
    return {
        "metadata": {"name": name, **(metadata or {})},
        "spec": {
            **({"nodeName": node} if node else {}),
            "securityContext": pod_security or {},
            "tolerations": tolerations or [],
            "containers": [
                {"name": "sidecar", "securityContext": {"runAsUser": 4444}},
                {
                    "name": "main",
                    "securityContext": container_security or {},
                    "volumeMounts": [{"name": "out", "mountPath": "/out", "readOnly": read_only}],
                },
            ],
            "volumes": [
                {"name": "cache", "emptyDir": {}},
                {"name": "out", "persistentVolumeClaim": {"claimName": claim}},
            ],
        },
        "status": {
            "phase": phase,
            "startTime": started,
            "containerStatuses": [
                {"name": "sidecar", "user": {"linux": {"uid": 4444, "gid": 4444}}},
                {"name": "main", **({"user": {"linux": seen}} if seen else {})},
            ],
        },
    }


def mover_pod(name: str = "ckpt-other", *, uid: str = "99999999-2222-3333-4444-555555555555", **more: Any) -> dict[str, Any]:
    """A pod of a mover of ours, of another artifact."""
    return pod(
        name,
        metadata={
            "labels": {"checkpoints.rlhf.dev/artifact-uid": uid},
            "ownerReferences": [{"kind": "Job", "name": f"ckpt-{uid}-3", "controller": True}],
        },
        **more,
    )
