"""A size column must sort as kubectl sorts quantities, so that every text is one."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_operator.api.quantities import QUANTITY, format_bytes, parse_quantity

FACTORS = {suffix: 1024**power for power, suffix in enumerate(("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (1, "1"),
        (1023, "1023"),
        (1024, "1Ki"),
        (1075, "1Ki"),
        (1076, "1.1Ki"),
        (int(9.94 * 1024), "9.9Ki"),
        (int(9.97 * 1024), "10Ki"),
        (10 * 1024, "10Ki"),
        (1023 * 1024, "1023Ki"),
        (int(1023.4 * 1024), "1023Ki"),
        (int(1023.6 * 1024), "1Mi"),
        (1024**2 - 1, "1Mi"),
        (1024**3 - 1, "1Gi"),
        (1024**4 - 1, "1Ti"),
        (120 * 1024, "120Ki"),
        (int(1.2 * 1024**3), "1.2Gi"),
        (1024**6, "1Ei"),
        (2**63 - 1, "8Ei"),
        (5000 * 1024**6, "5000Ei"),
    ],
)
def test_a_count_becomes_the_shortest_quantity(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(min_value=0, max_value=2**64))
def test_every_text_is_a_quantity_near_its_count(count: int) -> None:
    match = re.fullmatch(r"(\d{1,4}(?:\.[1-9])?)(|[KMGTPE]i)", format_bytes(count))
    assert match, format_bytes(count)
    value = Fraction(match[1]) * FACTORS[match[2]]
    assert abs(value - count) <= Fraction(count, 18)


@given(st.integers(min_value=0, max_value=2**63), st.integers(min_value=0, max_value=2**63))
def test_quantities_sort_as_their_counts(one: int, other: int) -> None:
    def value(count: int) -> Fraction:
        match = re.fullmatch(r"([\d.]+)(.*)", format_bytes(count))
        assert match
        factor: int = FACTORS[match[2]]
        return Fraction(match[1]) * factor

    if one <= other:
        assert value(one) <= value(other)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("007", 7),
        ("100m", Fraction(1, 10)),
        ("1.5", Fraction(3, 2)),
        ("2k", 2000),
        ("1M", 10**6),
        ("1Mi", 2**20),
        ("0.5Gi", 2**29),
        ("1E", 10**18),
        ("1Ei", 2**60),
    ],
)
def test_a_quantity_has_its_exact_value(text: str, value: Fraction | int) -> None:
    assert re.search(QUANTITY, text)
    assert parse_quantity(text) == value


@pytest.mark.parametrize(
    "text", ["", "m", "1x", "x1", "1 Gi", "-1", "1Gib", "mi", "1mi", "NaN", "Infinity", "1.0000", "1e3", "1n"]
)
def test_what_is_no_quantity_of_ours_is_refused_or_not_written_by_users(text: str) -> None:
    assert not re.search(QUANTITY, text)
    if text not in ("-1", "1.0000"):
        with pytest.raises(ValueError, match="quantity"):
            parse_quantity(text)


@given(st.integers(0, 2**62))
def test_what_we_format_can_be_read(count: int) -> None:
    assert parse_quantity(format_bytes(count)) >= 0
