"""What the tests of the chart share: the values that they try, and looking into what Helm made of them."""

from collections.abc import Iterator
from typing import Any

from manifests import Manifest

PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"

# A name for what somebody may want, and the values that say so.
INSTALLATIONS: dict[str, Manifest] = {
    "as it comes": {},
    "two namespaces": {"watchNamespaces": ["team-a", "team-b"]},
    "two namespaces, and nodes": {"watchNamespaces": ["team-a", "team-b"], "rbac": {"readNodes": True}},
    "no logs": {"progress": {"fromLogs": False}},
    "inline": {
        "executor": "inline",
        "settings": {"inline_config": "/etc/inline/inline.yaml"},
        "extraVolumes": [{"name": "output", "persistentVolumeClaim": {"claimName": "output"}}],
        "extraVolumeMounts": [{"name": "output", "mountPath": "/volumes/output"}],
    },
    "private registry": {
        "image": {
            "repository": "registry.example/checkpoint-operator",
            "digest": f"sha256:{'a' * 64}",
            "pullPolicy": "Always",
        },
        "imagePullSecrets": [{"name": "regcred"}],
        "movers": {"imagePullSecrets": {"team-a": ["regcred", "other"], "*": ["default"]}},
    },
    "private authority, as text": {"caBundle": {"pem": PEM}},
    "private authority, from a ConfigMap": {"caBundle": {"configMap": {"name": "corporate-ca", "key": "bundle.pem"}}},
    "behind a proxy": {
        "movers": {"proxy": {"httpProxy": "http://proxy.example:3128", "noProxy": "10.0.0.0/8,.svc"}},
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.example:3128"}],
    },
    "bounds for movers": {
        "movers": {
            "resources": {"requests": {"cpu": 2, "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
            "maxResources": {"cpu": 8, "memory": "16Gi"},
            "allowedSchemes": ["s3"],
            "allowedEndpoints": ["https://minio.example:9000", "https://*.storage.example"],
            "instanceMetadata": "WorkloadIdentity",
            "serviceAccountName": "mover",
            "allowedPriorityClasses": ["low", "high"],
            "priorityClassName": "low",
            "allowedTolerationKeys": ["*"],
            "allowedNodeSelectorKeys": ["topology.kubernetes.io/zone"],
            "allowedLabels": ["kueue.x-k8s.io/queue-name"],
            "allowedAnnotations": ["example.com/*"],
            "nodeSelector": {"kubernetes.io/os": "linux"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "defaultUser": 1000,
            "terminationGraceSeconds": 60,
            "nodeLostSeconds": 300,
            "tmpSize": "128Mi",
        }
    },
    "settings": {"settings": {"backoff_seconds": 20, "max_attempts": 8}, "log": {"level": "debug", "format": "plain"}},
    "everything around it": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
        "networkPolicy": {
            "enabled": True,
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "apiServerCIDRs": ["10.96.0.1/32"],
        },
        "reserveLabels": {"enabled": True},
        "service": {"annotations": {"prometheus.io/scrape": "true"}},
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d"},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "control-plane", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-cluster-critical",
    },
    "nothing but the operator": {
        "crds": {"apply": False},
        "uninstall": {"removeFinalizers": False},
        "rbac": {"create": False, "userRoles": False},
        "serviceAccount": {"create": False, "name": "given"},
    },
}


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The object of that kind; there has to be exactly one that is no hook, or one of that name."""
    found = [
        manifest
        for manifest in manifests
        if manifest["kind"] == kind
        and (
            manifest["metadata"]["name"] == name
            if name
            else "helm.sh/hook" not in manifest["metadata"].get("annotations", {})
        )
    ]
    assert len(found) == 1, f"{kind} {name}: {[manifest['metadata']['name'] for manifest in found]}"
    return found[0]


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod spec) of everything that becomes a pod."""
    for manifest in manifests:
        if manifest["kind"] in ("Deployment", "Job"):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]
        elif manifest["kind"] == "Pod":
            yield manifest["metadata"]["name"], manifest["spec"]


def rights(role: Manifest) -> dict[str, set[str]]:
    """The verbs of a role by ``resource.group``."""
    found: dict[str, set[str]] = {}
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                found.setdefault(f"{resource}.{group}" if group else resource, set()).update(rule["verbs"])
    return found
