"""The two ways in which an S3 store can be made to verify a body on arrival, and to say later what it holds.

CRC64NVME of the whole object, where the store has it (AWS, SeaweedFS, versitygw, recent MinIO and Ceph). Elsewhere
Content-MD5, which every store checks, and the ETag, which is the MD5 (of the MD5s, for several parts).
https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from awscrt.checksums import combine_crc64nvme, crc64nvme

from checkpoint_operator.storage.store import Body, Part, Piece, hashed, slices_of


class Checksums(Protocol):
    """How one kind of checksum is written into requests and read from answers."""

    def digest(self, body: Body) -> bytes:
        """Of one body."""

    def whole(self, pieces: Sequence[Piece] | Sequence[Part]) -> str:
        """Of an object in these pieces, in the form of :meth:`said_by`."""

    def headers(self, digest: bytes) -> dict[str, str]:
        """What is sent with a body over the wire."""

    def parameters(self, digest: bytes) -> dict[str, Any]:
        """The same for botocore's client."""

    def start(self) -> dict[str, Any]:
        """Of CreateMultipartUpload."""

    def part(self, digest: bytes | None) -> dict[str, Any]:
        """Of one part in CompleteMultipartUpload."""

    def finish(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Of CompleteMultipartUpload itself."""

    def listed(self, item: Mapping[str, Any]) -> bytes | None:
        """The digest in one line of ListParts."""

    def said_by(self, answer: Mapping[str, Any]) -> str | None:
        """The whole object's checksum in an answer of botocore's client."""

    def said_in(self, headers: Mapping[str, str]) -> str | None:
        """The same in the headers of an answer to a PUT."""


class _CRC64:
    def digest(self, body: Body) -> bytes:
        crc = 0
        for one in slices_of(body):
            crc = int(crc64nvme(one, crc))
        return crc.to_bytes(8, "big")

    def whole(self, pieces: Sequence[Piece] | Sequence[Part]) -> str:
        crc = 0
        for piece in pieces:
            assert piece.digest is not None
            crc = combine_crc64nvme(crc, int.from_bytes(piece.digest, "big"), piece.size)
        return _base64(crc.to_bytes(8, "big"))

    def headers(self, digest: bytes) -> dict[str, str]:
        return {"x-amz-checksum-crc64nvme": _base64(digest)}

    def parameters(self, digest: bytes) -> dict[str, Any]:
        return {"ChecksumCRC64NVME": _base64(digest)}

    def start(self) -> dict[str, Any]:
        return {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"}

    def part(self, digest: bytes | None) -> dict[str, Any]:
        return {"ChecksumCRC64NVME": _base64(digest or b"")}

    def finish(self, parts: Sequence[Part]) -> dict[str, Any]:
        size = sum(part.size for part in parts)
        return {"ChecksumType": "FULL_OBJECT", "ChecksumCRC64NVME": self.whole(parts), "MpuObjectSize": size}

    def listed(self, item: Mapping[str, Any]) -> bytes | None:
        said = item.get("ChecksumCRC64NVME")
        return base64.b64decode(said) if said else None

    def said_by(self, answer: Mapping[str, Any]) -> str | None:
        return answer.get("ChecksumCRC64NVME")

    def said_in(self, headers: Mapping[str, str]) -> str | None:
        return headers.get("x-amz-checksum-crc64nvme")


class _MD5:
    def digest(self, body: Body) -> bytes:
        return hashed(body, hashlib.md5(usedforsecurity=False)).digest()

    def whole(self, pieces: Sequence[Piece] | Sequence[Part]) -> str:
        digests = [piece.digest or b"" for piece in pieces]
        return digests[0].hex() if len(digests) == 1 else f"{self.digest(b''.join(digests)).hex()}-{len(digests)}"

    def headers(self, digest: bytes) -> dict[str, str]:
        return {"Content-MD5": _base64(digest)}

    def parameters(self, digest: bytes) -> dict[str, Any]:
        return {"ContentMD5": _base64(digest)}

    def start(self) -> dict[str, Any]:
        return {}

    def part(self, digest: bytes | None) -> dict[str, Any]:
        return {}

    def finish(self, parts: Sequence[Part]) -> dict[str, Any]:
        return {}

    def listed(self, item: Mapping[str, Any]) -> bytes | None:
        return None

    def said_by(self, answer: Mapping[str, Any]) -> str | None:
        return str(answer["ETag"]).strip('"')

    def said_in(self, headers: Mapping[str, str]) -> str | None:
        return headers["ETag"].strip('"')


CRC64: Checksums = _CRC64()
MD5: Checksums = _MD5()


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
