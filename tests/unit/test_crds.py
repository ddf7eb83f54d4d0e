"""Which CRD may replace which: an older one would drop fields that artifacts have by now."""

import pytest

from checkpoint_operator.api import names
from checkpoint_operator.api.base import JsonObject
from checkpoint_operator.controller.crds import definition, refusal


def there(version: str) -> JsonObject:
    return definition(version)


def test_where_there_is_none_ours_is_taken() -> None:
    assert refusal(None, "0.1.0") is None


def test_one_without_a_version_is_older_than_all_that_have_one() -> None:
    body = there("0.1.0")
    del body["metadata"]["annotations"]
    assert refusal(body, "0.1.0") is None


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("0.1.0", "0.1.1"),
        ("0.9.0", "0.10.0"),
        ("0.10.9", "1.0.0"),
        ("0.2.0-rc.1", "0.2.0"),
        ("0.2.0rc1", "0.2.0"),
        ("0.2.0-alpha.2", "0.2.0-beta.1"),
        ("0.2.0-rc.2", "0.2.0-rc.10"),
        ("0.2.0.dev3", "0.2.0a1"),
        ("0.1.9", "0.2.0.dev1"),
    ],
)
def test_a_later_version_replaces_an_earlier_one_and_never_the_other_way(earlier: str, later: str) -> None:
    assert refusal(there(earlier), later) is None
    said = refusal(there(later), earlier)
    assert said is not None
    assert later in said
    assert earlier in said


@pytest.mark.parametrize(("one", "other"), [("0.1.0", "0.1.0"), ("0.2.0rc1", "v0.2.0-rc.1"), ("0.1.0+build.5", "0.1.0")])
def test_the_same_version_is_applied_again(one: str, other: str) -> None:
    assert refusal(there(one), other) is None
    assert refusal(there(other), one) is None


@pytest.mark.parametrize("version", ["", "latest", "1.0", "1.0.0-whatever", "x" * 5000])
def test_a_version_that_cannot_be_ordered_stays_and_the_message_says_what_to_do(version: str) -> None:
    said = refusal(there(version), "0.1.0")
    assert said is not None
    assert names.ANNOTATION_CRD_VERSION in said
    assert len(said) < 500
