"""Byte counts as people read them and as Kubernetes sorts them: binary quantities such as ``120Ki`` or ``1.2Gi``."""

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
