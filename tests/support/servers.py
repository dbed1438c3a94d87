"""Servers on loopback: an HTTP server with faults on demand, a proxy with the same faults, and a real S3 server."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.support.processes import environment, free_port

Fault = Literal["500", "503", "429", "403", "drop", "truncate", "short", "hang", "slow"]
Plan = Callable[[int], Fault | None]

START_TIMEOUT_S = 20.0
SLOW_S = 0.15
DROPPED_HEADERS = ("connection", "transfer-encoding", "content-length", "date", "server")


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


def never(number: int) -> Fault | None:
    """No fault."""
    return None


def first(*faults: Fault | None) -> Plan:
    """These faults for the first requests, one each, then none."""
    return lambda number: faults[number] if number < len(faults) else None


def every(period: int, *faults: Fault) -> Plan:
    """A fault for every `period`-th request, taken in turn."""
    return lambda number: faults[number // period % len(faults)] if number % period == period - 1 else None


class FlakyServer:
    """Answers requests through `answer`, with the fault that `plan` names for the number of the request (from 0).

    500, 503, 429, 403: that status instead; drop: the connection closes without an answer; truncate: the right
    Content-Length, half of the body; short: half of the body and a Content-Length that fits it; hang: nothing until
    the server stops; slow: the body in two parts, SLOW_S apart.
    """

    def __init__(self, answer: Callable[[Request], Answer], *, plan: Plan = never) -> None:
        self.answer = answer
        self.plan = plan
        self.requests: list[tuple[str, str]] = []  # (method, path), refused ones included
        self.bytes_served = 0
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FlakyServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, plan: Plan) -> None:
        """Follow this plan from now on, counting requests anew."""
        with self._lock:
            self.plan, self.requests, self.bytes_served = plan, [], 0

    def next_fault(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append((request.method, request.path))
            return self.plan(len(self.requests) - 1)

    def served(self, count: int) -> None:
        with self._lock:
            self.bytes_served += count


def serve_files(files: Mapping[str, bytes], *, plan: Plan = never, ranges: bool = True) -> FlakyServer:
    """An HTTP server of these files ("/name" -> content); without `ranges` it always sends whole ones."""

    def answer(request: Request) -> Answer:
        content = files.get(request.path)
        if content is None:
            return Answer(404)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if asked is None or not ranges:
            return Answer(200, content)
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        if start >= len(content):
            return Answer(416)
        body = content[start : end + 1]
        place = f"bytes {start}-{start + len(body) - 1}/{len(content)}"
        return Answer(206, body, {"Content-Range": place})

    return FlakyServer(answer, plan=plan)


def proxy(endpoint: str, *, plan: Plan = never) -> FlakyServer:
    """An HTTP server that hands every request on to `endpoint`."""
    host = endpoint.removeprefix("http://")

    def answer(request: Request) -> Answer:
        connection = http.client.HTTPConnection(host, timeout=10)
        try:
            connection.request(request.method, request.path, request.body, dict(request.headers))
            response = connection.getresponse()
            headers = {name: value for name, value in response.getheaders() if name.lower() not in DROPPED_HEADERS}
            body = response.read()
            if request.method == "HEAD":
                headers["Content-Length"] = response.getheader("Content-Length") or "0"
            return Answer(response.status, body, headers)
        finally:
            connection.close()

    return FlakyServer(answer, plan=plan)


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[str, dict[str, str]]]:
    """A real S3 server process on loopback.   -> its endpoint, and the environment variables that lead clients to it

    Skips the test where moto or s3fs is not installed.
    """
    for package in ("moto", "flask", "flask_cors", "s3fs"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; run: pip install -e '.[test]'")
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env=environment(settings),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(endpoint, process)
        yield endpoint, settings
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)


def lead_to(settings: Mapping[str, str], patch: pytest.MonkeyPatch) -> None:
    """Lead this process to an `s3_server()`, and to no other credentials, until the patch is undone."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        patch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        patch.setenv(name, "/nonexistent/aws")
    for name, value in settings.items():
        patch.setenv(name, value)


def make_bucket(endpoint: str, name: str) -> str:
    """A new bucket of an `s3_server()`.   -> its s3:// URL"""
    with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT"), timeout=10):
        return f"s3://{name}"


def wait_until(is_true: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    """Return when `is_true()`; AssertionError when it does not become so."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder, as their lengths say."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _wait_for(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(endpoint, timeout=5):
                return
        except OSError as error:
            if process.poll() is not None:
                raise RuntimeError(f"the S3 server ended with {process.returncode}") from error
            if time.monotonic() > deadline:
                raise TimeoutError(f"the S3 server did not answer in {START_TIMEOUT_S} s") from error
        time.sleep(0.05)


def _handler(server: FlakyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, self.rfile.read(length))
            fault = server.next_fault(request)
            self.close_connection = fault is not None or self.close_connection
            if fault == "hang":
                server.stopping.wait(START_TIMEOUT_S)
            elif fault in ("500", "503", "429", "403"):
                self._send(Answer(int(fault)), None)
            elif fault != "drop":
                self._send(server.answer(request), fault)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def _send(self, answer: Answer, fault: Fault | None) -> None:
            fault = None if self.command == "HEAD" else fault
            half = answer.body[: len(answer.body) // 2]
            body = half if fault == "short" else answer.body
            sent = half if fault == "truncate" else body
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            with contextlib.suppress(ConnectionError):  # a client that was told to give up did
                if fault == "slow":
                    self.wfile.write(half)
                    time.sleep(SLOW_S)
                    sent = sent[len(half) :]
                    server.served(len(half))
                self.wfile.write(sent)
                server.served(len(sent))

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    return Handler
