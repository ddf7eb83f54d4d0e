"""One table says what every failure means; nothing falls out of it, and no error tells what it should not."""

from __future__ import annotations

import pytest

from checkpoint_operator.api.errors import FAILURES, ErrorCode, ExitCode, Reason, Retry, reason_for_exit
from checkpoint_operator.storage import StorageError


def test_every_reason_is_in_the_table_with_a_way_out() -> None:
    assert set(FAILURES) == set(Reason)
    for reason, failure in FAILURES.items():
        assert failure.help.endswith("."), reason
        assert failure.exit_code is not ExitCode.DONE, reason


@pytest.mark.parametrize("code", [code for code in ExitCode if code not in (ExitCode.DONE, ExitCode.BUG)])
def test_an_exit_code_alone_leads_to_a_reason_that_is_treated_alike(code: ExitCode) -> None:
    reason = reason_for_exit(code)
    assert FAILURES[reason].exit_code is code
    never = {FAILURES[one].retry is Retry.NEVER for one in Reason if FAILURES[one].exit_code is code}
    assert never == {FAILURES[reason].retry is Retry.NEVER}, "a lost result would turn a retry into a verdict"


@pytest.mark.parametrize("code", [-9, -15, 137, 139, 143])
def test_a_death_by_signal_is_told_from_a_failure(code: int) -> None:
    assert reason_for_exit(code) is Reason.MOVER_KILLED


@pytest.mark.parametrize("code", [1, 2, 70, 99])
def test_an_unknown_exit_code_is_a_bug_and_tried_again(code: int) -> None:
    assert reason_for_exit(code) is Reason.INTERNAL
    assert FAILURES[Reason.INTERNAL].retry is Retry.COUNTED


def test_an_error_says_code_reason_sentence_and_place() -> None:
    error = StorageError(Reason.TARGET_BUSY, "somebody is there", uri="s3://b/x", path=None)
    assert str(error) == "RLHF055 TargetBusy: somebody is there (uri=s3://b/x)"
    assert (error.code, error.retryable, error.context) == (ErrorCode.EXISTS, True, {"uri": "s3://b/x"})
    assert not StorageError(Reason.TARGET_EXISTS, "x").retryable


def test_a_file_name_that_is_no_text_can_still_be_told() -> None:
    error = StorageError(Reason.SOURCE_UNREADABLE, "'a\udcffb' cannot be read", path="a\udcffb")
    assert error.message.encode() == rb"'a\udcffb' cannot be read"
    assert str(error).encode()
    assert error.context["path"].encode()
