"""Metadata outlives the version that wrote it: nothing of it is lost on the way through an older one."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from pydantic import ValidationError

from checkpoint_operator.api.metadata import ArtifactMetadata

FULL = {
    "artifact_id": "uid",
    "artifact_type": "merged",
    "job_name": "dpo-7b",
    "algorithm": "dpo",
    "created_at": "2025-01-02T03:04:05.678901Z",
    "size_bytes": 2**53 + 1,
    "storage_path": "s3://bucket/run",
    "base_model": "Qwen/Qwen2.5-7B",
    "peft_method": "lora",
    "final_loss": "0.1234567890123456789",
    "total_steps": 1000,
    "step": 500,
    "stage": "dpo",
    "metrics": {"rewards/margins": "1e-7"},
    "version": "1",
    "parent_artifact_id": "parent",
    "tags": {"team": "grün"},
    "labels": {"app": "x"},
}


def test_every_field_survives_a_round_trip() -> None:
    assert set(FULL) == set(ArtifactMetadata.model_fields)
    assert ArtifactMetadata.from_dict(FULL).to_dict() == FULL


def test_unknown_keys_of_a_newer_version_survive() -> None:
    newer = {"future": {"deep": [1, {"x": None}]}, "score": 0.5, "to_dict": "a name of ours", "done": True, "not yet": None}
    there = ArtifactMetadata.from_dict(newer).to_dict()
    assert {key: there[key] for key in newer} == newer
    assert ArtifactMetadata.from_dict(there).replace(step=3).to_dict() == {**there, "step": 3}


def test_numbers_become_decimal_strings_where_a_float_would_not_survive() -> None:
    metadata = ArtifactMetadata.from_dict({"final_loss": 0.25, "metrics": {"loss": 1, "lr": 5e-7}})
    assert (metadata.final_loss, metadata.metrics) == ("0.25", {"loss": "1", "lr": "5e-07"})


def test_numbers_of_training_code_are_taken_as_they_come() -> None:
    class Float32(float):  # NumPy's scalars are numbers of their own class, with a repr that is no number
        def __repr__(self) -> str:
            return f"Float32({self})"

        def __str__(self) -> str:
            return "0.1"

    metadata = ArtifactMetadata(final_loss=Float32(0.1), metrics={"loss": Decimal("0.5")})
    assert (metadata.final_loss, metadata.metrics) == ("0.1", {"loss": "0.5"})
    assert ArtifactMetadata().replace(final_loss=0.5).to_dict()["final_loss"] == "0.5"
    assert ArtifactMetadata(final_loss=float("nan")).to_dict()["final_loss"] == "nan"
    with pytest.raises(ValidationError, match="final_loss"):
        ArtifactMetadata(final_loss=True)


def test_what_is_changed_is_checked_like_what_is_made() -> None:
    with pytest.raises(ValidationError, match="step"):
        ArtifactMetadata().replace(step="many")


def test_what_was_never_set_is_left_out() -> None:
    assert ArtifactMetadata().to_dict() == {"artifact_type": "checkpoint", "metrics": {}, "tags": {}, "labels": {}}


def test_times_keep_their_instant() -> None:
    instant = datetime(2025, 1, 2, 3, 4, 5, 6, UTC)
    assert ArtifactMetadata.from_dict(ArtifactMetadata(created_at=instant).to_dict()).created_at == instant


def test_a_known_key_of_another_type_is_refused() -> None:
    with pytest.raises(ValidationError, match="step"):
        ArtifactMetadata.from_dict({"step": "many"})
