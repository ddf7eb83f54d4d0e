"""Writes everything that has its source in the code: the CRD, the tables in docs/, the plain manifests of the chart.

Run ``make generate`` after a change of the models, of the failure table, of the settings or of the chart. A test fails when
they differ.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from manifests import Dumper, plain_manifests
from pydantic import TypeAdapter

from checkpoint_operator import __version__
from checkpoint_operator.api.errors import CODES, FAILURES, ErrorCode, ExitCode, Reason
from checkpoint_operator.controller import crds
from checkpoint_operator.controller.config import ENV_PREFIX, Settings
from checkpoint_operator.controller.config_jobs import JobRules

ROOT = Path(__file__).resolve().parents[1]


def crd() -> str:
    body = yaml.dump(crds.definition(__version__), Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True)
    return f"# Generated from operator/checkpoint_operator/api/ by `make generate`: do not edit.\n{body}"


def failures_table() -> str:
    lines = ["| code | what it means, and what to do | reasons |", "|---|---|---|"]
    for code, meaning in CODES.items():
        reasons = ", ".join(f"`{reason}`" for reason in sorted(FAILURES) if code in _codes(reason))
        lines.append(f"| {code} | {meaning} | {reasons} |")
    lines += ["", "| reason | code | mover's exit | tried again | what to do |", "|---|---|---|---|---|"]
    for reason, failure in sorted(FAILURES.items(), key=lambda item: (item[1].code, item[0])):
        exit_code = ExitCode(failure.exit_code)
        codes = ", ".join(_codes(reason))
        lines.append(f"| `{reason}` | {codes} | {exit_code.value} | {failure.retry} | {failure.help} |")
    return "\n".join(lines)


def _codes(reason: Reason) -> tuple[ErrorCode, ...]:
    """One, or, for a refusal that may meet anything, one for each kind of call."""
    if reason is Reason.REQUEST_REJECTED:
        return ErrorCode.UPLOAD, ErrorCode.DOWNLOAD, ErrorCode.METADATA
    return (FAILURES[reason].code,)


def settings_table() -> str:
    lines = ["| flag | variable | default | what it is |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, "") else f"`{field.default}`"
        flag = f"`--{name.replace('_', '-')}`"
        lines.append(f"| {flag} | `{ENV_PREFIX}{name.upper()}` | {default} | {field.description} |")
    return "\n".join(lines)


def rules_table() -> str:
    lines = ["| key | default | what it is |", "|---|---|---|"]
    for field in JobRules.model_fields.values():
        value = "(required)" if field.is_required() else _yaml(field.get_default(call_default_factory=True))
        lines.append(f"| `{field.alias}` | {value} | {field.description} |")
    return "\n".join(lines)


def _yaml(value: object) -> str:
    """A default as an admin would write it, in one line."""
    plain = TypeAdapter(Any).dump_python(value, mode="json", by_alias=True, exclude_none=True)
    if plain in (None, "", [], {}):
        return ""
    line = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=1000).strip()
    return f"`{line.removesuffix('...').strip()}`"  # the end of a document, after a scalar


def _with_table(path: Path, table: str) -> str:
    """The page with the part between its two comments replaced."""
    begin, end = "<!-- generated: begin -->", "<!-- generated: end -->"
    text = path.read_text()
    if begin not in text or end not in text:
        raise SystemExit(f"{path} has no '{begin}' … '{end}' for the generated table")
    return re.sub(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{table}\n{end}", text, count=1, flags=re.DOTALL
    )


def generated() -> Iterator[tuple[Path, str]]:
    """(path, content) of every generated file but the manifests, which need Helm."""
    yield ROOT / "crds" / "checkpointartifacts.yaml", crd()
    yield ROOT / "docs" / "failures.md", _with_table(ROOT / "docs" / "failures.md", failures_table())
    yield ROOT / "docs" / "jobs.md", _with_table(ROOT / "docs" / "jobs.md", rules_table())
    yield ROOT / "docs" / "configuration.md", _with_table(ROOT / "docs" / "configuration.md", settings_table())


def main() -> int:
    """Write what differs; with ``--check`` only say so."""
    check = "--check" in sys.argv[1:]
    every = [*generated(), *plain_manifests()]
    stale = [(path, content) for path, content in every if not path.exists() or path.read_text() != content]
    for path, content in stale:
        if check:
            print(f"{path.relative_to(ROOT)} is not what the code would write: run `make generate`", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
