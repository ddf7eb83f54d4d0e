"""Writes the CustomResourceDefinition from the models, so that there is one source of the API.

pydantic generates the JSON schema; what is left is to turn it into the *structural* form that Kubernetes demands
(no $ref, no anyOf for optional fields, no titles): https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/
"""

from typing import Any

from checkpoint_operator.api import names
from checkpoint_operator.api.base import ApiModel, JsonObject
from checkpoint_operator.api.quantities import QUANTITY, QUANTITY_MAX
from checkpoint_operator.api.spec import ROOT_RULES, SPEC_RULES, ArtifactSpec
from checkpoint_operator.api.status import ArtifactStatus

_COLUMNS: list[tuple[str, str, str, int, str]] = [
    ("Type", "string", ".spec.artifactType", 0, "What the files are"),
    ("Phase", "string", ".status.phase", 0, "Summary of the conditions"),
    ("Progress", "string", ".status.progress.display", 0, "How much is stored"),
    ("Size", "string", ".status.size", 0, "Sum of the files' sizes"),
    ("Job", "string", ".status.summary.jobName", 0, "The training Job"),
    ("Step", "integer", ".status.summary.step", 0, "Optimizer steps done"),
    ("Loss", "string", ".status.summary.loss", 0, "Last training loss"),
    ("Algorithm", "string", ".status.summary.algorithm", 1, "What trained it"),
    ("Base", "string", ".status.summary.baseModel", 1, "The model that was trained"),
    ("URI", "string", ".status.storageURI", 1, "Where it is stored"),
    ("Age", "date", ".metadata.creationTimestamp", 0, "Time since creation"),
]

# At most eight, and they are forever: removing one breaks whoever selects by it.
_SELECTABLE = [
    ".spec.artifactType",
    ".status.phase",
    ".status.summary.jobName",
    ".status.summary.algorithm",
    ".status.summary.baseModel",
    ".status.summary.peftMethod",
    ".spec.version",
    ".spec.parentRef.name",
]

_QUANTITIES = {
    "type": "object",
    "maxProperties": 3,
    "additionalProperties": {
        "x-kubernetes-int-or-string": True,
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "maxLength": QUANTITY_MAX,
        "pattern": QUANTITY,
    },
    "x-kubernetes-validations": [
        {
            "rule": "self.all(name, name in ['cpu', 'memory', 'ephemeral-storage'])",
            "message": "only cpu, memory and ephemeral-storage can be set for the mover",
        }
    ],
}


def _structural(node: Any, definitions: JsonObject) -> Any:
    """Rewrite one node of a pydantic JSON schema into the structural form."""
    if isinstance(node, list):
        return [_structural(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        # What stands beside the reference (the field's own description) wins over what the type says of itself.
        return _structural({**target, **{key: value for key, value in node.items() if key != "$ref"}}, definitions)
    if "anyOf" in node and "x-kubernetes-int-or-string" not in node:
        [kept] = [option for option in node["anyOf"] if option.get("type") != "null"]
        rest = {key: value for key, value in node.items() if key not in ("anyOf", "default")}
        return _structural({**kept, **rest}, definitions)
    result: JsonObject = {}
    for key, value in node.items():
        if key == "title" or (key == "default" and value is None):
            continue
        if key == "properties":
            result[key] = {name: _structural(schema, definitions) for name, schema in value.items()}
        elif key in ("default", "enum", "required") or key.startswith("x-kubernetes"):
            result[key] = value
        elif key == "const":
            result["enum"] = [value]
        elif key == "additionalProperties" and value is True:
            result["x-kubernetes-preserve-unknown-fields"] = True
        else:
            result[key] = _structural(value, definitions)
    if result.get("type") == "integer":
        result.setdefault("format", "int64")
    return result


def _schema(model: type[ApiModel]) -> JsonObject:
    raw = model.model_json_schema(by_alias=True, mode="validation")
    schema: JsonObject = _structural(raw, raw.get("$defs", {}))
    schema.pop("$defs", None)
    # A class docstring is for whoever reads the code; the field's description is for whoever runs kubectl explain.
    schema.pop("description", None)
    return schema


def custom_resource_definition() -> JsonObject:
    """The CRD of CheckpointArtifact, ready to be dumped as YAML."""
    spec, status = _schema(ArtifactSpec), _schema(ArtifactStatus)
    spec["description"] = "What to store, where, and what is known about it."
    spec["x-kubernetes-validations"] = SPEC_RULES
    # Quantities are an integer or a string, which JSON schema (and so pydantic) has no single word for.
    resources = spec["properties"]["mover"]["properties"]["resources"]["properties"]
    for name in ("requests", "limits"):
        resources[name] = {**_QUANTITIES, "description": resources[name]["description"]}
    status["description"] = "What the operator observed; only the operator writes it."
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.SINGULAR,
                "shortNames": [names.SHORT_NAME],
                "categories": ["checkpoints"],
            },
            "versions": [
                {
                    "name": names.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": path, "priority": priority, "description": description}
                        for name, kind, path, priority, description in _COLUMNS
                    ],
                    "selectableFields": [{"jsonPath": path} for path in _SELECTABLE],
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "description": (
                                "A checkpoint of a training. The operator copies the folder from the volume to the "
                                "target, verifies it, and commits a manifest; it is Ready when, and only when, every "
                                "byte is durable."
                            ),
                            "required": ["spec"],
                            "properties": {
                                "apiVersion": {"type": "string"},
                                "kind": {"type": "string"},
                                "metadata": {"type": "object"},
                                "spec": spec,
                                "status": status,
                            },
                            "x-kubernetes-validations": ROOT_RULES,
                        }
                    },
                }
            ],
        },
    }
