"""Every setting of the operator, from flags, environment and one file; wrong values refuse to start, by name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.alias_generators import to_camel
from pydantic_settings import BaseSettings, SettingsConfigDict

from checkpoint_operator.api.spec import ENDPOINT
from checkpoint_operator.api.uris import InvalidURI, TargetURI

ENV_PREFIX = "CHECKPOINT_OPERATOR_"


class ConfigError(Exception):
    """A setting has a wrong value; the message names the setting, the value and what is expected."""


def parse_address(text: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port``; raises ValueError with the way to write it."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"'{text}' is no address to listen at: write it like 0.0.0.0:8080 or [::]:8080")
    return host, int(port)


class FileModel(BaseModel):
    """A part of a file that an admin writes."""

    # A typing error in an admin's file must not widen what the operator may do: unknown keys are refused.
    model_config = ConfigDict(frozen=True, alias_generator=to_camel, populate_by_name=True, extra="forbid")


class InlineTarget(FileModel):
    """One place that a claim's checkpoints may go to, and with which identity."""

    prefix: str = Field(description="Allowed URI prefix, by whole segments: s3://bucket/team-a, file:///")
    endpoint: str | None = Field(default=None, description="Address of the store; artifacts may not name another one.")
    region: str | None = None
    force_path_style: bool = False
    credentials_directory: Path | None = Field(
        default=None,
        description="Credential profile: a folder whose file names are the SDK's variables (AWS_ACCESS_KEY_ID, …).",
    )
    claim: str | None = Field(
        default=None,
        description="For file://: the claim (of the same namespace) that the target lies in; default: the source's.",
    )

    @field_validator("endpoint")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and not re.match(ENDPOINT, value):
            raise ValueError(f"'{value}' is no address of a store: write it like https://minio.example:9000")
        return value

    @field_validator("credentials_directory")
    @classmethod
    def _holds_keys(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError(f"'{value}' is not an existing folder: mount the Secret with the keys there")
        return value

    @field_validator("prefix")
    @classmethod
    def _is_uri(cls, value: str) -> str:
        try:
            return str(TargetURI.parse(value, allow_root=True))
        except InvalidURI as error:
            raise ValueError(str(error)) from error


class InlineClaim(FileModel):
    """A volume that the operator itself has mounted, and what may be done with it."""

    namespace: str
    claim: str
    directory: Path = Field(description="Where the claim is mounted in the operator's own container.")
    targets: tuple[InlineTarget, ...] = ()

    @field_validator("directory")
    @classmethod
    def _exists(cls, value: Path) -> Path:
        if not value.is_absolute() or not value.is_dir():
            raise ValueError(f"'{value}' is not an existing absolute folder: mount the claim there")
        return value


class InlineConfig(FileModel):
    """The file behind the setting ``inline_config``."""

    claims: tuple[InlineClaim, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        listed = [(claim.namespace, claim.claim) for claim in self.claims]
        for key in listed:
            if listed.count(key) > 1:
                raise ValueError(f"claim '{key[1]}' of namespace '{key[0]}' is listed twice: put its targets into one entry")
        for claim in self.claims:
            for target in claim.targets:
                if target.claim and (claim.namespace, target.claim) not in listed:
                    raise ValueError(
                        f"the target '{target.prefix}' of claim '{claim.claim}' lies in claim '{target.claim}', which is "
                        f"not listed for namespace '{claim.namespace}': list it, with its directory"
                    )
        return self


class Settings(BaseSettings):
    """Flags are ``--max-movers 8``, variables ``CHECKPOINT_OPERATOR_MAX_MOVERS=8``; a flag wins."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        frozen=True,
        extra="ignore",
        cli_prog_name="checkpoint-operator",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
    )

    namespaces: Annotated[
        str,
        Field(description="Namespaces to serve, separated by commas; empty: all of them (needs a ClusterRole)."),
    ] = ""
    executor: Annotated[
        Literal["job", "inline"],
        Field(description="Who runs movers: a Job beside the claim, or the operator itself (single-node installs)."),
    ] = "inline"
    jobs_config: Annotated[
        Path | None,
        Field(description="YAML file with the image, bounds and endpoints of mover Jobs; see docs/jobs.md."),
    ] = None
    inline_config: Annotated[
        Path | None,
        Field(description="YAML file that lists the claims which the operator serves itself; see docs/inline.md."),
    ] = None
    state_directory: Annotated[
        Path, Field(description="Folder for the locks of Inline movers; must survive a restart of the operator.")
    ] = Path("/var/lib/checkpoint-operator")
    max_movers: Annotated[int, Field(ge=1, le=1000, description="Movers running at once, in all namespaces.")] = 8
    max_movers_per_namespace: Annotated[
        int, Field(ge=1, le=1000, description="Movers running at once in one namespace.")
    ] = 4
    max_movers_per_bucket: Annotated[
        int, Field(ge=1, le=1000, description="Movers running at once that write to one bucket, container or claim.")
    ] = 1000
    max_attempts: Annotated[
        int, Field(ge=1, le=100, description="After so many failures that may pass by themselves an artifact is Failed.")
    ] = 5
    backoff_seconds: Annotated[float, Field(gt=0, le=3600, description="Wait before the second try; doubles each time.")] = (
        10
    )
    backoff_max_seconds: Annotated[float, Field(gt=0, le=86400, description="The longest wait between two tries.")] = 600
    progress_seconds: Annotated[
        float, Field(ge=1, le=3600, description="Progress is written to the status at most so often.")
    ] = 5
    no_progress_seconds: Annotated[
        float, Field(ge=10, le=86400, description="A mover that moves nothing for so long is stopped and tried again.")
    ] = 900
    resync_seconds: Annotated[
        float, Field(ge=10, le=86400, description="How often everything is listed again, to find what watches missed.")
    ] = 300
    reconcile_workers: Annotated[int, Field(ge=1, le=256, description="Artifacts that are reconciled at once.")] = 8
    shutdown_seconds: Annotated[
        float, Field(ge=0, le=600, description="How long running Inline movers may take to stop with the operator.")
    ] = 10
    limits_file: Annotated[
        Path | None,
        Field(description="YAML file with maxMovers, … that is read again when it changes; see docs/queue.md."),
    ] = None
    listen_address: Annotated[
        str,
        Field(description="host:port where /healthz, /readyz and /metrics are served; empty: nowhere. See docs/metrics.md."),
    ] = ""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="What is logged.")] = "info"
    log_format: Annotated[Literal["plain", "json"], Field(description="How it is logged.")] = "plain"

    @field_validator("listen_address")
    @classmethod
    def _can_be_listened_at(cls, value: str) -> str:
        if value:
            parse_address(value)
        return value

    @property
    def namespace_list(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.namespaces.split(",") if name.strip())


def load_settings(arguments: list[str]) -> Settings:
    """Read flags and environment.

    Raises:
        ConfigError: naming every setting with a wrong value.
        SystemExit: after ``--help``, and for a flag that does not exist.
    """
    try:
        return Settings(_cli_parse_args=arguments)
    except ValidationError as error:
        raise ConfigError(
            explain(error, lambda name: f"{name} (flag --{name.replace('_', '-')}, {ENV_PREFIX}{name.upper()})")
        ) from None


def load_inline(path: Path | None) -> InlineConfig:
    """Read the Inline executor's file; no file means that nothing is served.

    Raises:
        ConfigError: naming the file and the key.
    """
    if path is None:
        return InlineConfig()
    try:
        return InlineConfig.model_validate(yaml.safe_load(path.read_text()) or {})
    except OSError as error:
        raise ConfigError(f"setting inline_config: '{path}' cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"setting inline_config: '{path}' is no YAML: {error}") from None
    except ValidationError as error:
        raise ConfigError(explain(error, lambda name: f"inline_config, in '{path}' at {name}")) from None


def explain(error: ValidationError, locate: Callable[[str], str]) -> str:
    """One line for each wrong value; ``locate`` makes of its path what the admin knows it as."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        lines.append(f"setting {locate(where)}: {item['msg']} (it is {item['input']!r})")
    return "\n".join(lines)
