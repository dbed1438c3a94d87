"""Storage and cache against a real S3 server process, also through a line that loses answers."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.cache import NodeCache
from data_pipeline.errors import ConfigError, EnvironmentFault
from data_pipeline.retry import RetryPolicy
from tests.support.servers import (
    Answer,
    FlakyServer,
    Request,
    every,
    first,
    lead_to,
    make_bucket,
    proxy,
    s3_server,
    wait_until,
)

FAST = RetryPolicy(deadline_s=30.0, first_delay_s=0.01, max_delay_s=0.05, attempt_timeout_s=3.0)
CONTENT = np.random.default_rng(0).bytes(300_000)
NUMBERS = itertools.count()

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, dict[str, str]]]:
    with s3_server() as (endpoint, settings):
        yield endpoint, settings


@pytest.fixture
def bucket(server: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of its own for the test, with the environment that leads to it and to no other credentials."""
    endpoint, settings = server
    lead_to(settings, monkeypatch)
    return make_bucket(endpoint, f"bucket-{next(NUMBERS)}")


@pytest.fixture
def line(server: tuple[str, dict[str, str]], bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    """A proxy to the server that the environment leads to instead."""
    with proxy(server[0]) as flaky:
        monkeypatch.setenv("AWS_ENDPOINT_URL", flaky.url)
        yield flaky


def test_what_is_written_is_read_back(bucket: str, tmp_path: Path) -> None:
    folder = f"{bucket}/data/set"
    assert storage.list_names(folder) == [] and not storage.exists(f"{folder}/a.bin")
    storage.make_folder(folder)
    storage.write_bytes_atomic(f"{folder}/a.bin", CONTENT)
    (tmp_path / "b").write_bytes(CONTENT[::-1])
    storage.upload(tmp_path / "b", f"{folder}/b.bin")
    storage.write_bytes_atomic(f"{folder}/empty", b"")
    storage.write_bytes_atomic(f"{folder}/deeper/c", b"c")

    assert storage.list_names(folder) == ["a.bin", "b.bin", "deeper", "empty"]
    assert [storage.size(f"{folder}/{name}") for name in ("a.bin", "b.bin", "empty")] == [len(CONTENT)] * 2 + [0]
    assert storage.read_bytes(f"{folder}/a.bin") == CONTENT and storage.read_bytes(f"{folder}/empty") == b""
    assert storage.read_range(f"{folder}/a.bin", 100, 50) == CONTENT[100:150]
    assert storage.read_range(f"{folder}/a.bin", len(CONTENT) - 5, 50) == CONTENT[-5:]
    assert storage.read_range(f"{folder}/a.bin", len(CONTENT), 5) == b""
    assert storage.download(f"{folder}/b.bin", tmp_path / "c") == len(CONTENT)
    assert (tmp_path / "c").read_bytes() == CONTENT[::-1]
    assert storage.exists(f"{folder}/a.bin") and storage.exists(folder)

    storage.write_bytes_atomic(f"{folder}/a.bin", b"other")  # nothing remembers the old one
    assert storage.read_bytes(f"{folder}/a.bin") == b"other" and storage.size(f"{folder}/a.bin") == 5
    storage.remove(f"{folder}/a.bin")
    storage.remove(f"{folder}/a.bin")
    assert not storage.exists(f"{folder}/a.bin") and "a.bin" not in storage.list_names(folder)
    for read in (storage.read_bytes, storage.size):
        with pytest.raises(FileNotFoundError):
            read(f"{folder}/a.bin")
    with pytest.raises(FileNotFoundError):
        storage.read_range(f"{folder}/a.bin", 0, 1)
    with pytest.raises(IsADirectoryError):
        storage.read_bytes(folder)


OPERATIONS: dict[str, Callable[[str], object]] = {
    "read_bytes": storage.read_bytes,
    "read_range": lambda uri: storage.read_range(uri, 0, 1),
    "size": storage.size,
    "exists": storage.exists,
    "list_names": storage.list_names,
    "write": lambda uri: storage.write_bytes_atomic(uri, b"x"),
    "upload": lambda uri: storage.upload(Path(__file__), uri),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_missing_bucket_is_one_line(bucket: str, operation: Callable[[str], object]) -> None:
    with pytest.raises(ConfigError, match="^s3://no-such-bucket/x is in a bucket that does not exist; create it"):
        operation("s3://no-such-bucket/x")


@pytest.mark.parametrize("operation", [*OPERATIONS.values(), storage.remove], ids=[*OPERATIONS, "remove"])
def test_every_operation_is_named_while_it_runs(
    bucket: str, line: FlakyServer, operation: Callable[[str], object]
) -> None:
    storage.write_bytes_atomic(f"{bucket}/x", b"content")
    gate, answer = threading.Event(), line.answer

    def answer_late(request: Request) -> Answer:
        gate.wait(10)
        return answer(request)

    line.answer = answer_late
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(operation, f"{bucket}/x")
        try:
            wait_until(lambda: bool(storage.in_flight()))
            assert [f"{bucket}/x" in entry.what for entry in storage.in_flight()] == [True]
        finally:
            gate.set()
        running.result(10)
    assert storage.in_flight() == ()


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_missing_credentials_are_one_line(
    bucket: str, monkeypatch: pytest.MonkeyPatch, operation: Callable[[str], object]
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(EnvironmentFault, match="refused .*credentials") as caught:
        operation(f"{bucket}/x")
    assert f"{bucket}/x" in str(caught.value) and "AWS_ACCESS_KEY_ID" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_refused_credentials_are_one_line(bucket: str, line: FlakyServer, operation: Callable[[str], object]) -> None:
    code = b"<Error><Code>InvalidAccessKeyId</Code><Message>no such key</Message></Error>"
    line.answer = lambda request: Answer(403, code)
    with pytest.raises(EnvironmentFault, match="refused .*credentials"):
        operation(f"{bucket}/x")
    assert len(line.requests) == 1


def test_a_file_comes_whole_through_the_cache(bucket: str, tmp_path: Path) -> None:
    storage.write_bytes_atomic(f"{bucket}/x.tar", CONTENT)
    cache = NodeCache(tmp_path, 10**6, FAST)
    path = cache.fetch(
        f"{bucket}/x.tar",
        fingerprint="f" * 64,
        name="x.tar",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
    )
    assert path.read_bytes() == CONTENT


def test_a_line_that_loses_answers_loses_no_bytes(bucket: str, line: FlakyServer, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    faults = every(3, "drop", "truncate", "500", "503", "short", "429")
    line.fail(faults)
    for index in range(6):
        storage.upload(tmp_path / "x", f"{bucket}/data/{index}", retry=FAST)
        storage.write_bytes_atomic(f"{bucket}/data/w{index}", CONTENT[index:], retry=FAST)
    assert storage.list_names(f"{bucket}/data", retry=FAST) == [str(i) for i in range(6)] + [f"w{i}" for i in range(6)]
    cache = NodeCache(tmp_path, 10**7, FAST)
    for index in range(6):
        assert storage.exists(f"{bucket}/data/{index}", retry=FAST)
        assert storage.read_bytes(f"{bucket}/data/w{index}", retry=FAST) == CONTENT[index:]
        for start in range(0, len(CONTENT), 60_000):
            assert storage.read_range(f"{bucket}/data/{index}", start, 60_000, retry=FAST) == CONTENT[start:][:60_000]
        sha256 = hashlib.sha256(CONTENT).hexdigest()
        uri, name = f"{bucket}/data/{index}", str(index)
        path = cache.fetch(uri, fingerprint="f" * 64, name=name, sha256=sha256, size=len(CONTENT))
        assert path.read_bytes() == CONTENT
        storage.remove(f"{bucket}/data/{index}", retry=FAST)
    assert len(line.requests) > 80


def test_a_hanging_server_is_cut_and_asked_again(bucket: str, line: FlakyServer) -> None:
    storage.write_bytes_atomic(f"{bucket}/x", CONTENT)
    line.fail(first("hang"))
    policy = RetryPolicy(deadline_s=20.0, first_delay_s=0.01, attempt_timeout_s=0.5)
    assert storage.read_range(f"{bucket}/x", 10, 10, retry=policy) == CONTENT[10:20]
    assert len(line.requests) == 2


def test_a_server_that_stays_away_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    policy = RetryPolicy(deadline_s=0.5, first_delay_s=0.05)
    with pytest.raises(EnvironmentFault, match=r"bytes 0-9 of s3://.*/x failed \d+ times in .*data.read_deadline_s"):
        storage.read_range(f"{bucket}/x", 0, 9, retry=policy)
