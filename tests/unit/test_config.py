"""Settings: where they come from, and that a wrong one refuses to start by name."""

from pathlib import Path

import pytest

from checkpoint_operator.controller.config import ConfigError, load_inline, load_settings


def test_flags_win_over_variables_and_variables_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT_OPERATOR_MAX_MOVERS", "3")
    monkeypatch.setenv("CHECKPOINT_OPERATOR_MAX_ATTEMPTS", "9")
    settings = load_settings(["--max-movers", "7", "--namespaces", "a, b,"])
    assert (settings.max_movers, settings.max_attempts, settings.backoff_seconds) == (7, 9, 10)
    assert settings.namespace_list == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--max-movers", "0"], ["max_movers", "--max-movers", "CHECKPOINT_OPERATOR_MAX_MOVERS", "'0'"]),
        (["--listen-address", "8080"], ["listen_address", "'8080'", "write it like 0.0.0.0:8080"]),
        (["--log-level", "loud"], ["log_level", "'loud'", "'debug', 'info'"]),
        (["--backoff-seconds", "soon", "--max-attempts", "-1"], ["backoff_seconds", "max_attempts"]),
    ],
)
def test_a_wrong_value_is_told_by_the_name_of_its_setting(arguments: list[str], names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(arguments)
    for name in names:
        assert name in str(caught.value)


def test_a_flag_that_does_not_exist_refuses_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(["--max-mover", "1"])
    assert caught.value.code == 2
    assert "--max-mover" in capsys.readouterr().err


def test_without_a_file_nothing_is_served_inline() -> None:
    assert load_inline(None).claims == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("claims: [", "is no YAML"),
        ("claim: []", "claim"),
        ("claims: [{namespace: a, claim: b, directory: relative}]", "claims.0.directory"),
        ("claims: [{namespace: a, claim: b, directory: /does/not/exist}]", "mount the claim there"),
        ("claims: [{namespace: a, claim: b, directory: /, targets: [{prefix: 'http://x'}]}]", "no supported scheme"),
        ("claims: [{namespace: a, claim: b, directory: /, targets: [{prefix: 's3://bucket', endpiont: x}]}]", "endpiont"),
        (
            "claims: [{namespace: a, claim: b, directory: /, targets: [{prefix: 's3://bucket', endpoint: 'minio:9000'}]}]",
            "https://",
        ),
        (
            "claims: [{namespace: a, claim: b, directory: /, targets: [{prefix: 's3://buck', credentialsDirectory: /x}]}]",
            "mount the Secret",
        ),
        ("claims: [{namespace: a, claim: b, directory: /}, {namespace: a, claim: b, directory: /}]", "listed twice"),
        (
            "claims: [{namespace: a, claim: b, directory: /, targets: [{prefix: 'file:///', claim: archive}]}]",
            "'archive', which is not listed",
        ),
    ],
)
def test_a_mistake_in_the_inline_file_is_told_with_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "inline.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_inline(path)
    assert "inline_config" in str(caught.value)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load_inline(tmp_path / "missing.yaml")
