"""Google Cloud Storage as two emulators have it, and a proxy before them that says what neither of them can say.

Google's service itself runs nowhere but at Google. What only it can show is marked ``needs_real_gcs`` with the reason; there
our side is held to answers as Google's reference prints them, given by :class:`Proxy`. The proxy also judges the conditions
on compose and delete that fake-gcs-server ignores: what a mover does when they do not hold is then seen in every test, and
only whether Google judges them in the same way is not.
"""

from __future__ import annotations

import http.client
import json
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from storage_world import Fault, ObjectWorld

import local_cluster as lc
from checkpoint_operator.api.protocol import TargetOptions
from checkpoint_operator.api.uris import TargetURI
from checkpoint_operator.storage.gcs import GCSStore, open_gcs
from checkpoint_operator.storage.transfer import STREAMS

BUCKET = "checkpoints"

# As in https://cloud.google.com/storage/docs/json_api/v1/status-codes
REASONS = {
    401: ("authError", "Invalid Credentials"),
    403: ("forbidden", "reader@project.iam.gserviceaccount.com does not have storage.objects.create access."),
    404: ("notFound", "Not Found"),
    412: ("conditionNotMet", "At least one of the pre-conditions you specified did not hold."),
    429: ("rateLimitExceeded", "The rate of change requests to the object exceeds the rate limit."),
    503: ("backendError", "We encountered an internal error. Please try again."),
}


STALL = -1


@dataclass
class Rule:
    """Requests whose "METHOD /path?query" the pattern finds are answered so instead, ``times`` often (None: always), but
    not the first ``after`` of them.

    ``status`` 0 passes the request on and then hangs up: the reply is lost. :data:`STALL` never answers.
    """

    pattern: str
    status: int
    reason: str = ""
    times: int | None = None
    after: int = 0

    def takes(self, line: str) -> bool:
        """Whether this request is one of them; counts."""
        if self.times == 0 or not re.search(self.pattern, line):
            return False
        if self.after:
            self.after -= 1
            return False
        if self.times:
            self.times -= 1
        return True

    def answer(self) -> bytes:
        reason, message = REASONS.get(self.status, ("", ""))
        one = {"domain": "global", "reason": self.reason or reason, "message": message}
        return json.dumps({"error": {"code": self.status, "message": message, "errors": [one]}}).encode()


_HOP_BY_HOP = ("host", "connection", "transfer-encoding")
_OBJECT = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<object>[^/]+)(?P<compose>/compose)?")


@dataclass
class Proxy:
    """Passes requests on to an emulator, remembers them, counts the bytes of their bodies, and plays answers.

    ``judges``: conditions on compose and delete are looked at here, with no other write in between.
    """

    emulator: str
    judges: bool = True
    rules: list[Rule] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    sent: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _writing: threading.Lock = field(default_factory=threading.Lock)
    _closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet, else each answer waits for an acknowledgement
            disable_nagle_algorithm = True

            def handle_any(self) -> None:
                proxy.handle(self)

            do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = handle_any  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        size = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(size)
        if len(body) < size:  # the client hung up in the middle, and the emulator would wait for the rest
            request.close_connection = True
            return
        line = f"{request.command} {request.path}"
        with self._lock:
            self.requests.append(line)
            self.sent += len(body)
            rule = next((rule for rule in self.rules if rule.takes(line)), None)
        if rule and rule.status == STALL:
            self._closing.wait()
            request.close_connection = True
            return
        if rule and rule.status:
            self._refuse(request, rule)
            return
        with nullcontext() if request.command == "GET" else self._writing:
            status = self._judge(request.command, request.path, body) if self.judges else None
            if status is None:
                headers = {key: value for key, value in request.headers.items() if key.lower() not in _HOP_BY_HOP}
                answer, content = self._ask(request.command, request.path, body, headers)
        if status is not None:
            self._refuse(request, Rule("", status))
        elif rule:
            request.close_connection = True  # without a word
        else:
            kept = {key: value for key, value in answer.getheaders() if key.lower() not in _HOP_BY_HOP}
            self._reply(request, answer.status, kept, content)

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        target = http.client.HTTPConnection(urlsplit(self.emulator).netloc, timeout=60)
        target.request(method, path, body, dict(headers or {}))
        answer = target.getresponse()
        content = answer.read()
        target.close()
        return answer, content

    def _judge(self, method: str, path: str, body: bytes) -> int | None:
        """The status of a refusal, as the references of objects.delete and objects.compose have it, or None."""
        parts = urlsplit(path)
        found = _OBJECT.fullmatch(parts.path)
        if found is None or (method, bool(found["compose"])) not in {("DELETE", False), ("POST", True)}:
            return None
        bucket = found["bucket"]
        wanted = parse_qs(parts.query).get("ifGenerationMatch")
        if wanted and wanted[0] != self._generation(bucket, found["object"]):
            return 412
        for source in json.loads(body)["sourceObjects"] if found["compose"] else ():
            current = self._generation(bucket, quote(source["name"], safe=""))
            if current == "0":
                return 404
            if str(source.get("objectPreconditions", {}).get("ifGenerationMatch", current)) != current:
                return 412
        return None

    def _generation(self, bucket: str, name: str) -> str:
        """In decimal; "0" where there is no such object."""
        answer, content = self._ask("GET", f"/storage/v1/b/{bucket}/o/{name}")
        return str(json.loads(content)["generation"]) if answer.status == 200 else "0"

    def _refuse(self, request: BaseHTTPRequestHandler, rule: Rule) -> None:
        headers = {"Content-Type": "application/json", "X-GUploader-UploadID": "played"}
        self._reply(request, rule.status, headers, rule.answer())

    @staticmethod
    def _reply(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes) -> None:
        request.send_response_only(status)
        for key, value in headers.items():
            if key.lower() != "content-length":
                request.send_header(key, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass
class GCSWorld(ObjectWorld):
    """``proxy`` lies between the backend and the emulator; the raw way in goes past it."""

    proxy: Any = None
    client: Any = None

    def connect(self, uri: TargetURI) -> GCSStore:
        return open_gcs(uri, self.options, STREAMS)

    def store(self) -> GCSStore:
        """A store of its own, as a new process has it."""
        return self.connect(self.uri())

    def suffer(self, fault: Fault) -> None:
        """The emulators know no identities: what Google would say is played."""
        match fault:
            case Fault.WRONG_CREDENTIALS:
                self.proxy.rules.append(Rule("", 401))
            case Fault.MISSING_BUCKET:
                self.base = "gs://no-such-bucket/x"
            case Fault.READ_ONLY:
                self.proxy.rules.append(Rule("^(POST|DELETE|PUT|PATCH)", 403))

    def put(self, path: str, data: bytes) -> None:
        self.client.bucket(self.bucket).blob(self.prefix + path).upload_from_string(data)

    def get(self, path: str) -> bytes:
        body: bytes = self.client.bucket(self.bucket).blob(self.prefix + path).download_as_bytes()
        return body

    def remove(self, path: str) -> None:
        self.client.bucket(self.bucket).blob(self.prefix + path).delete()

    def paths(self) -> list[str]:
        found = self.client.list_blobs(self.bucket, prefix=self.prefix)
        return sorted(blob.name.removeprefix(self.prefix) for blob in found)


@pytest.fixture(scope="session")
def fake_gcs() -> Iterator[lc.GCSEmulator]:
    with lc.start_fake_gcs("storage-tests") as emulator:
        emulator.create_bucket(BUCKET)
        yield emulator


@pytest.fixture(scope="session")
def gcp_storage_emulator() -> Iterator[lc.GCSEmulator]:
    with lc.start_gcp_storage_emulator("storage-tests") as emulator:
        emulator.create_bucket(BUCKET)
        yield emulator


def _world(kind: str, emulator: lc.GCSEmulator, work: Path, *, judges: bool) -> Iterator[GCSWorld]:
    proxy = Proxy(emulator.endpoint, judges=judges)
    client = storage.Client(
        project="test", credentials=AnonymousCredentials(), client_options={"api_endpoint": emulator.endpoint}
    )
    base = f"gs://{BUCKET}/test-{secrets.token_hex(6)}"
    yield GCSWorld(kind, base, TargetOptions(endpoint=proxy.endpoint), work, proxy=proxy, client=client)
    client.close()
    proxy.close()


@pytest.fixture
def gcs_world(fake_gcs: lc.GCSEmulator, tmp_path: Path) -> Iterator[GCSWorld]:
    yield from _world("gcs", fake_gcs, tmp_path, judges=True)


@pytest.fixture
def gcs_without_conditions_world(gcp_storage_emulator: lc.GCSEmulator, tmp_path: Path) -> Iterator[GCSWorld]:
    yield from _world("gcs_without_conditions", gcp_storage_emulator, tmp_path, judges=False)
