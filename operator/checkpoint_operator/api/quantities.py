"""Byte counts as people read them and as Kubernetes sorts them: binary quantities such as ``120Ki`` or ``1.2Gi``."""

import re
from fractions import Fraction

QUANTITY = r"^([0-9]+m|[0-9]+(\.[0-9]{1,3})?(k|[MGTPE]|[KMGTPE]i)?)$"
"""What users may write for cpu and memory: Kubernetes' own grammar without signs, exponents, nano and micro."""
QUANTITY_MAX = 32

_QUANTITY = re.compile(r"([+-]?[0-9]+(?:\.[0-9]*)?)(|m|k|[MGTPE]|[KMGTPE]i)")
_SUFFIXES = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def format_bytes(count: int) -> str:
    """Format a number of bytes as a Kubernetes quantity with two significant digits below ten.

    ``kubectl --sort-by`` orders these as quantities, so the string must stay one (no space, no trailing ``B``).
    """
    value = float(count)
    for suffix in _SUFFIXES:
        # 1023.6Ki would print as 1024Ki: round first, then decide.
        if round(value) < 1024 or suffix == _SUFFIXES[-1]:
            text = f"{value:.1f}" if suffix and value < 9.95 else f"{value:.0f}"
            return text.removesuffix(".0") + suffix
        value /= 1024
    raise AssertionError("unreachable")


def parse_quantity(text: str) -> Fraction:
    """The value of a quantity, exactly: ``500m`` is a half, ``1Gi`` is 2**30. For comparisons.

    Raises:
        ValueError: for what is none.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no quantity: write it like 500m, 2 or 1Gi")
    number, suffix = match.groups()
    if suffix == "m":
        factor = Fraction(1, 1000)
    elif suffix.endswith("i"):
        factor = Fraction(1024 ** _SUFFIXES.index(suffix))
    else:
        factor = Fraction(1000 ** "kMGTPE".index(suffix) * 1000 if suffix else 1)
    return Fraction(number) * factor
