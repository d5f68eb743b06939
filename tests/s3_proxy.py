"""A proxy before an S3 server that answers badly when told to, the same way every time.

Which request meets which fault is a function of the seed, the request (method and address) and how
often that request came before; threads that race change nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal["slow", "503", "500", "reset", "lost_answer", "truncated", "hang", "403"]
"""slow: answered late. 503: SlowDown. 500: InternalError. reset: the connection is reset before
anything is done. lost_answer: done, then reset instead of an answer. truncated: half of the body,
then a reset. hang: no answer for a long time. 403: AccessDenied."""
METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE")
_ERRORS = {
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "403": (403, "AccessDenied", "Access Denied"),
}
_DROPPED = {"connection", "transfer-encoding", "content-length", "keep-alive", "expect"}


@dataclass(frozen=True)
class Request:
    """What a rule is asked about."""

    method: str
    path: str
    """With its query."""
    number: int
    """How many requests came before, of all."""
    repeat: int
    """How often the same method and path came before."""


Rule = Callable[[Request], Kind | None]


def seeded(shares: dict[Kind, float], seed: int = 0, methods: tuple[str, ...] = METHODS) -> Rule:
    """Each kind meets its share of the requests with these methods."""

    def rule(request: Request) -> Kind | None:
        if request.method not in methods:
            return None
        text = f"{seed}|{request.method}|{request.path}|{request.repeat}"
        draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
        for kind, share in shares.items():
            if draw < share:
                return kind
            draw -= share
        return None

    return rule


def nth(kind: Kind, *numbers: int, methods: tuple[str, ...] = METHODS, part: str = "") -> Rule:
    """The n-th requests (from 0) with these methods and this in their path; no number: all."""
    counter = iter(range(10**9))

    def rule(request: Request) -> Kind | None:
        if request.method not in methods or part not in request.path:
            return None
        number = next(counter)
        return kind if not numbers or number in numbers else None

    return rule


@dataclass
class FaultProxy:
    """A running proxy.

    `rule` may be replaced at any time.
    """

    target: str
    rule: Rule | None = None
    slow_s: float = 0.3
    hang_s: float = 60.0
    url: str = ""
    met: Counter[str] = field(default_factory=Counter)
    """Faults that happened, by kind."""
    requests: list[str] = field(default_factory=list)
    """METHOD path of each request."""
    _repeats: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def judge(self, method: str, path: str) -> Kind | None:
        """The fault of a request; counts both."""
        with self._lock:
            # An upload id is new each time; faults must not depend on it.
            stable = path.partition("uploadId=")[0]
            what = f"{method} {stable}"
            request = Request(method, stable, len(self.requests), self._repeats[what])
            self.requests.append(what)
            self._repeats[what] += 1
            fault = self.rule(request) if self.rule else None
            if fault:
                self.met[fault] += 1
            return fault

    def wait(self, seconds: float) -> None:
        """Sleep, but not longer than the proxy lives."""
        self._stopped.wait(seconds)

    @property
    def is_stopped(self) -> bool:
        """Whether the proxy is gone."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Let hanging requests go."""
        self._stopped.set()


@contextlib.contextmanager
def fault_proxy(target: str, rule: Rule | None = None, **settings: float) -> Iterator[FaultProxy]:
    """A proxy in threads of this process."""
    proxy = FaultProxy(target, rule, **settings)  # type: ignore[arg-type]
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    server = _Server(("127.0.0.1", 0), handler)
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stop()
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections end in all ways here."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        body = self._read_body()
        if self.proxy.is_stopped:  # a client of another test kept its connection
            return self._reset()
        fault = self.proxy.judge(self.command, self.path)
        if fault == "hang":
            self.proxy.wait(self.proxy.hang_s)
            return self._reset()
        if fault == "reset":
            return self._reset()
        if fault in _ERRORS:
            return self._answer_error(*_ERRORS[fault])
        if fault == "slow":
            self.proxy.wait(self.proxy.slow_s)
        status, reason, headers, content = self._forward(body)
        if fault == "lost_answer":
            return self._reset()
        self._answer(status, reason, headers, content, is_truncated=fault == "truncated")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        target = urlsplit(self.proxy.target)
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _DROPPED}
            headers |= {"Content-Length": str(len(body)), "Connection": "close"}
            connection.request(self.command, self.path, body or None, headers)
            response = connection.getresponse()
            content = response.read()
            return response.status, response.reason, response.getheaders(), content
        finally:
            connection.close()

    def _answer(
        self,
        status: int,
        reason: str,
        headers: list[tuple[str, str]],
        content: bytes,
        *,
        is_truncated: bool = False,
    ) -> None:
        self.send_response_only(status, reason)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            if name.lower() not in _DROPPED:
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            content = b""
        if is_truncated:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            return self._reset()
        self.wfile.write(content)
        self.wfile.flush()

    def _answer_error(self, status: int, code: str, message: str) -> None:
        xml = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}'
            f"</Message><Resource>{self.path.partition('?')[0]}</Resource>"
            "<RequestId>0</RequestId></Error>"
        )
        headers = [("Content-Type", "application/xml"), ("x-amz-request-id", "0")]
        self._answer(status, code, headers, b"" if self.command == "HEAD" else xml.encode())

    def _reset(self) -> None:
        """End the connection with a TCP reset instead of an ordinary close."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        # `finish` would flush and wait for the other side.
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: `FaultProxy.requests` has it."""


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)
