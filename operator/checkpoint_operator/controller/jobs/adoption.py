"""Whether a Job that is in the cluster already is the one that we would have made: what may be adopted (DESIGN §5). Pure.

Names are deterministic, so that whoever may create Jobs in a namespace can be there first. What is adopted must be equal in
everything that says what runs, as whom and with which volumes; a hash in an annotation would prove nothing.
"""

from collections.abc import Mapping
from typing import Any

from checkpoint_operator.api.base import JsonObject
from checkpoint_operator.api.names import GROUP
from checkpoint_operator.api.quantities import parse_quantity

# The API server labels the pods of a Job.
_GENERATED = (
    "batch.kubernetes.io/controller-uid",
    "batch.kubernetes.io/job-name",
    "controller-uid",
    "job-name",
)
_KUEUE = ("kueue.x-k8s.io/", "provider.kueue.x-k8s.io/")


def equals(live: JsonObject, rendered: JsonObject) -> bool:
    """Whether a Job in the cluster is the one that :func:`template.render` gives.

    What the API server fills in is allowed for, and what Kueue adds when it lets a Job start (``suspend``, node selectors,
    tolerations, its own labels); nothing else. Whether it is being deleted is the caller's to look at.
    """
    have, want = dict(live.get("metadata") or {}), rendered["metadata"]
    if not _same({key: have.get(key) for key in ("name", "namespace", "ownerReferences")}, {**want, "labels": None}):
        return False
    if not _labels_allowed(have.get("labels"), want["labels"], lambda key: not _is_own(key)):
        return False
    spec, wanted = dict(live.get("spec") or {}), dict(rendered["spec"])
    if spec.pop("manualSelector", None):
        return False  # its selector would be anybody's; otherwise it is the API server's own
    for ignored in ("selector", "suspend"):
        spec.pop(ignored, None)
        wanted.pop(ignored, None)
    template, wanted_template = spec.pop("template", None) or {}, wanted.pop("template")
    return _same(spec, wanted) and _same_template(template, wanted_template)


def _same_template(live: JsonObject, want: JsonObject) -> bool:
    have, wanted = dict(live.get("metadata") or {}), want["metadata"]
    have.pop("creationTimestamp", None)
    labels = have.pop("labels", None)
    annotations = have.pop("annotations", None)
    if have or not (
        _labels_allowed(labels, wanted["labels"], lambda key: key in _GENERATED or key.startswith(_KUEUE))
        and _labels_allowed(annotations, wanted.get("annotations"), lambda key: key.startswith(_KUEUE))
    ):
        return False
    pod, wanted_pod = dict(live.get("spec") or {}), dict(want["spec"])
    # An older name of the same field, which the API server keeps filled.
    if pod.pop("serviceAccount", None) != wanted_pod.get("serviceAccountName"):
        return False
    selector, wanted_selector = pod.pop("nodeSelector", None) or {}, wanted_pod.pop("nodeSelector", {})
    if any(selector.get(key) != value for key, value in wanted_selector.items()):
        return False
    tolerations, wanted_tolerations = pod.pop("tolerations", None) or [], wanted_pod.pop("tolerations")
    if tolerations[: len(wanted_tolerations)] != wanted_tolerations:
        return False
    return _same(pod, wanted_pod)


def _labels_allowed(live: Any, want: Mapping[str, str] | None, is_fine: Any) -> bool:
    live, want = live or {}, want or {}
    return all(live.get(key) == value for key, value in want.items()) and all(key in want or is_fine(key) for key in live)


def _is_own(key: str) -> bool:
    domain = key.rpartition("/")[0]
    return domain == GROUP or domain.endswith(f".{GROUP}")


def _same(live: Any, want: Any, key: str = "") -> bool:
    """Equal, where an absent field is as good as an empty one, and a quantity may be spelled otherwise."""
    if isinstance(want, dict):
        if not isinstance(live, dict):
            return False
        if key in ("requests", "limits"):
            return live.keys() == want.keys() and all(_same_amount(live[name], want[name]) for name in want)
        return all(_same(live.get(name), value, name) for name, value in want.items() if value is not None) and all(
            _is_empty(value) for name, value in live.items() if name not in want
        )
    if isinstance(want, list):
        return (
            isinstance(live, list)
            and len(live) == len(want)
            and all(_same(mine, other) for mine, other in zip(live, want, strict=True))
        )
    if key == "sizeLimit":
        return _same_amount(live, want)
    return type(live) is type(want) and bool(live == want)


def _is_empty(value: Any) -> bool:
    """What an API server may leave out. A zero says something (a time to live)."""
    return value is None or value is False or value in ("", [], {})


def _same_amount(live: Any, want: str) -> bool:
    try:
        return parse_quantity(str(live)) == parse_quantity(want)
    except ValueError:
        return False
