"""The alert rules: each fires in its own world and in no other, and each asks for numbers that there are."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from checkpoint_operator.controller.metrics import Metrics, StateCollector
from checkpoint_operator.controller.scheduling import Limits, Places
from local_cluster.errors import LocalClusterError
from local_cluster.promtool import ensure_promtool

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "charts" / "checkpoint-operator" / "files" / "alerts.yaml"
WORLDS = Path(__file__).with_name("alerts_test.yaml")
DOCS = ROOT / "docs" / "metrics.md"


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@pytest.fixture(scope="session")
def promtool() -> Path:
    try:
        return ensure_promtool(print)
    except LocalClusterError as error:
        pytest.skip(str(error))


def run(promtool: Path, *arguments: str) -> str:
    done = subprocess.run([str(promtool), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_understands_the_rules(promtool: Path) -> None:
    assert f"SUCCESS: {len(rules())} rules found" in run(promtool, "check", "rules", "--lint-fatal", str(RULES))


def test_each_alert_fires_in_its_own_world_and_in_no_other(promtool: Path, tmp_path: Path) -> None:
    body = yaml.safe_load(RULES.read_text())
    for group in body["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]  # promtool would have every sentence repeated
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(body))
    worlds = tmp_path / "worlds.yaml"
    worlds.write_text(WORLDS.read_text())
    run(promtool, "test", "rules", str(worlds))


def test_no_alert_is_without_a_world_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    played = [case for world in yaml.safe_load(WORLDS.read_text())["tests"] for case in world["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert {case["alertname"] for case in played if case["exp_alerts"]} == names
    assert {case["alertname"] for case in played if not case["exp_alerts"]} == names


def test_every_number_that_an_alert_asks_for_is_told_and_explained() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    registry.register(StateCollector(Places(Limits(1, 1, 1)), dict, lambda: 0, lambda: 0.0))
    told = {sample.name for family in registry.collect() for sample in family.samples}
    asked = {name for rule in rules() for name in re.findall(r"checkpoint_operator_\w+", rule["expr"])}
    assert asked
    assert asked <= told
    # ..._created is when a counter began; a histogram is explained once, not for each of its three series.
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in told if not name.endswith("_created")}
    page = DOCS.read_text()
    assert [name for name in sorted(families) if f"`{name}`" not in page] == []
    assert [rule["alert"] for rule in rules() if f"`{rule['alert']}`" not in page] == []
