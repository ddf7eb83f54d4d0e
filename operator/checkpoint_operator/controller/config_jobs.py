"""What the admin decides about mover Jobs: image, bounds, endpoints, identities; the file behind ``jobs_config``.

It is mounted from a ConfigMap and read once, at the start. A key that is not known, or a value out of its range, refuses to
start: a typing error must not widen what users may do.
"""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator

from checkpoint_operator.api.names import GROUP
from checkpoint_operator.api.quantities import parse_quantity
from checkpoint_operator.api.spec import ComputeResource, Name, Quantity, Toleration
from checkpoint_operator.api.uris import Scheme
from checkpoint_operator.controller.config import ConfigError, FileModel, explain

EVERY = "*"
"""In a list of what is allowed: anything. As the namespace of ``imagePullSecrets``: every one that is not listed."""
CA_BUNDLE_MAX = 48 * 1024
"""The bundle travels in the plan, which has 96 KiB; an organisation's own authorities are a few KiB."""

# scheme://host[:port][/path], the host with one leading '*.' at most.
_ENDPOINT = re.compile(r"https?://(\*\.)?(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[^?#\s]*)?")
_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?|\*)")

Amounts = dict[ComputeResource, Quantity]


class InstanceMetadata(StrEnum):
    """Who may ask the cloud's metadata address, which on most clusters answers with the node's identity."""

    NEVER = "Never"
    WORKLOAD_IDENTITY = "WorkloadIdentity"
    """Movers with an opted-in ServiceAccount, on clusters (GKE) where that address answers with *its* identity."""
    ALWAYS = "Always"
    """Every mover without a Secret may use the identity of its node."""


class Proxy(FileModel):
    """The proxy of movers, as the usual variables have it; ``noProxy`` should name the cluster's own domains."""

    http_proxy: Annotated[str, StringConstraints(pattern=r"^http://[^\s]+$")] | None = None
    https_proxy: Annotated[str, StringConstraints(pattern=r"^http://[^\s]+$")] | None = None
    no_proxy: Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\s]*$")] | None = None

    def variables(self) -> dict[str, str]:
        """Only what is set, in a fixed order, as the values of a pod's variables."""
        named = {"HTTP_PROXY": self.http_proxy, "HTTPS_PROXY": self.https_proxy, "NO_PROXY": self.no_proxy}
        # Kubernetes expands $(NAME) in these, and a password may hold a dollar.
        return {name: value.replace("$", "$$") for name, value in named.items() if value}


class ResourceDefaults(FileModel):
    """What a mover gets where spec.mover.resources is silent."""

    requests: Amounts = Field(default={"cpu": "100m", "memory": "192Mi"})
    limits: Amounts = Field(default={"memory": "512Mi"})


class JobRules(FileModel):
    """Everything that a mover Job is made of, except what the artifact may say."""

    image: Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[^\s]+$")] = Field(
        description="The mover's image. Users cannot choose it."
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="When nodes fetch it."
    )
    image_pull_secrets: dict[str, tuple[Name, ...]] = Field(
        default_factory=dict, description="Names of pull Secrets by namespace of the artifact; '*' for all others."
    )
    resources: ResourceDefaults = Field(
        default_factory=ResourceDefaults, description="What a mover gets where spec.mover.resources is silent."
    )
    max_resources: Amounts = Field(
        default={"cpu": "4", "memory": "4Gi", "ephemeral-storage": "1Gi"},
        description="The most that spec.mover.resources may ask for, in requests and in limits.",
    )
    allowed_schemes: tuple[Scheme, ...] = Field(default=tuple(Scheme), description="Schemes of target.uri.")
    allowed_endpoints: tuple[str, ...] = Field(
        default=(),
        description="What target.endpoint may be: https://minio.example:9000, https://*.example (any host below), or '*'.",
    )
    instance_metadata: InstanceMetadata = Field(
        default=InstanceMetadata.NEVER, description="Whether movers may ask the cloud's metadata address."
    )
    service_account_name: Name | None = Field(
        default=None,
        description="The movers' ServiceAccount where spec.mover names none; it must exist, and allow movers, in every "
        "namespace. Empty: the namespace's default one, without any rights and without an identity.",
    )
    allowed_priority_classes: tuple[str, ...] = Field(default=(), description="What spec.mover may name; '*': any.")
    priority_class_name: Name | None = Field(default=None, description="Where spec.mover names none.")
    allowed_toleration_keys: tuple[str, ...] = Field(
        default=(), description="Taints that spec.mover may tolerate; '*': any that it names."
    )
    allowed_node_selector_keys: tuple[str, ...] = Field(
        default=(EVERY,), description="Labels of nodes that spec.mover may select by; '*': any."
    )
    allowed_labels: tuple[str, ...] = Field(
        default=(), description="Keys that spec.mover.labels may have: team, example.com/team or example.com/*."
    )
    allowed_annotations: tuple[str, ...] = Field(
        default=(), description="Keys with a domain that spec.mover.annotations may have."
    )
    node_selector: dict[str, str] = Field(default_factory=dict, description="Where spec.mover has none.")
    tolerations: tuple[Toleration, ...] = Field(default=(), description="Every mover has these.")
    default_user: Annotated[int, Field(ge=1, le=2**31 - 1)] = Field(
        default=65532, description="The mover's user, and group, where nothing tells who wrote the files."
    )
    ca_bundle: str | None = Field(
        default=None, description="PEM of the authorities that movers trust instead of the system's."
    )
    ca_bundle_file: Path | None = Field(default=None, description="The same in a file, read once at the start.")
    proxy: Proxy = Field(default_factory=Proxy, description="The movers' proxy: httpProxy, httpsProxy, noProxy.")
    progress_from_logs: bool = Field(
        default=True, description="Read progress from the pods' logs (needs pods/log); else only the result is known."
    )
    termination_grace_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        default=30, description="How long a mover may take to stop in order."
    )
    node_lost_seconds: Annotated[int, Field(ge=0, le=3600)] = Field(
        default=60, description="A mover on a node that is gone for so long is evicted, and its artifact goes on elsewhere."
    )
    tmp_size: Quantity = Field(default="64Mi", description="Size limit of the mover's /tmp.")

    @field_validator("allowed_endpoints")
    @classmethod
    def _are_endpoints(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if value != EVERY and not _ENDPOINT.fullmatch(value):
                raise ValueError(f"'{value}' is no endpoint: write it like https://minio.example:9000, without a query")
        return values

    @field_validator("allowed_labels", "allowed_annotations")
    @classmethod
    def _are_keys(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            domain, slash, name = value.partition("/")
            if not _KEY.fullmatch(value) or (name == EVERY and not slash) or value == EVERY:
                raise ValueError(f"'{value}' is no key: write it like example.com/team, or example.com/* for a domain")
            if domain == GROUP or domain.endswith(f".{GROUP}"):
                raise ValueError(f"'{value}' is the operator's own: its labels say whose a pod is")
            if name == EVERY and f".{domain}".endswith((".kubernetes.io", ".k8s.io", ".x-k8s.io")):
                raise ValueError(f"'{value}' would let users speak to the cluster's own controllers: list single keys")
        return values

    @field_validator("ca_bundle")
    @classmethod
    def _is_bundle(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if "-----BEGIN CERTIFICATE-----" not in value or "PRIVATE KEY" in value:
            raise ValueError("it must be the PEM text of certificates (-----BEGIN CERTIFICATE-----), and no private key")
        if len(value.encode()) > CA_BUNDLE_MAX:
            raise ValueError(f"it has {len(value.encode())} bytes, at most {CA_BUNDLE_MAX} fit into a mover's plan")
        return value

    @field_validator("ca_bundle_file")
    @classmethod
    def _is_bundle_file(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError(f"'{path}' is not an existing file: mount the ConfigMap with the certificates there")
        return path

    @model_validator(mode="after")
    def _defaults_are_within_bounds(self) -> Self:
        for part, amounts in (("requests", self.resources.requests), ("limits", self.resources.limits)):
            for name, amount in amounts.items():
                most = self.max_resources.get(name)
                if most is not None and parse_quantity(amount) > parse_quantity(most):
                    raise ValueError(f"resources.{part}.{name} {amount} is above maxResources.{name} {most}")
        return self


def load_job_rules(path: Path | None) -> JobRules:
    """Read the file behind the setting ``jobs_config``.

    A bundle that is in a file of its own is read as well, so that whoever renders a Job needs to read nothing.

    Raises:
        ConfigError: naming the file and the key.
    """
    if path is None:
        raise ConfigError("setting jobs_config: the Job executor needs its file (flag --jobs-config), at least with `image`")
    try:
        rules = JobRules.model_validate(yaml.safe_load(path.read_text()) or {})
        if rules.ca_bundle_file is None:
            return rules
        if rules.ca_bundle is not None:
            raise ConfigError(f"setting jobs_config, in '{path}': set caBundle or caBundleFile, not both")
        said = rules.model_dump(exclude={"ca_bundle_file"}, exclude_unset=True)
        return JobRules.model_validate({**said, "ca_bundle": rules.ca_bundle_file.read_text()})
    except OSError as error:
        raise ConfigError(f"setting jobs_config: '{error.filename or path}' cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"setting jobs_config: '{path}', or its caBundleFile, is no text in UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"setting jobs_config: '{path}' is no YAML: {error}") from None
    except ValidationError as error:
        raise ConfigError(explain(error, lambda name: f"jobs_config, in '{path}' at {name}")) from None
