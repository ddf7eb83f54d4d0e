"""CRC32C of a whole from the CRC32Cs of its pieces: Google's library can extend a checksum, but not join two.

A CRC is the remainder of a polynomial over GF(2), so the checksum of ``a + b`` is that of ``a``, shifted by the length of
``b``, plus that of ``b``. The same arithmetic as zlib's ``crc32_combine``, with CRC32C's polynomial (RFC 3720, 12.1).
"""

import base64
from functools import lru_cache

import google_crc32c

from checkpoint_operator.storage.store import Body, bites_of

_POLYNOMIAL = 0x82F63B78  # reflected: bit 31 is the coefficient of x⁰
_ONE = 1 << 31
_X_TO_THE_8 = 1 << (31 - 8)  # one byte of zeros
_STEP = 256 << 10


def crc32c(body: Body) -> int:
    """The CRC32C of a body.

    In steps, because Google's extension holds the interpreter's lock and takes nothing but ``bytes``: each step's copy
    stays in the CPU's cache, and other threads get their turn in between.
    """
    found = 0
    for bite in bites_of(body, _STEP):
        found = google_crc32c.extend(found, bytes(bite))
    return found


def combine(first: int, second: int, length: int) -> int:
    """The CRC32C of two bodies behind each other; ``length`` is the second's, in bytes."""
    return _times(_zeros(length), first) ^ second


def encode(crc: int) -> str:
    """As the JSON API shows it: base64 of the big-endian bytes."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def decode(text: str) -> bytes:
    """The four bytes behind :func:`encode`'s text."""
    return base64.b64decode(text)


def _times(left: int, right: int) -> int:
    """The product of two polynomials, modulo CRC32C's."""
    product = 0
    for bit in range(31, -1, -1):
        if left >> bit & 1:
            product ^= right
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
    return product


@lru_cache(maxsize=64)  # the pieces of a file have one size, but for the last
def _zeros(length: int) -> int:
    """What ``length`` zero bytes behind a body multiply its checksum by: x to the power of 8 · length."""
    power, square = _ONE, _X_TO_THE_8
    while length:
        if length & 1:
            power = _times(square, power)
        square = _times(square, square)
        length >>= 1
    return power
