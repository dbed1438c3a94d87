"""Remote storage: what a server does wrong costs time, never bytes; what cannot work is one line."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.errors import ConfigError, DataError, EnvironmentFault
from data_pipeline.retry import RetryPolicy, call, deciding, delay_s, is_transient, one_line
from tests.support import servers
from tests.support.processes import run
from tests.support.servers import Fault, every, first, serve_files

FAST = RetryPolicy(deadline_s=20.0, first_delay_s=0.01, max_delay_s=0.02, attempt_timeout_s=0.25)
CONTENT = np.random.default_rng(0).bytes(100_000)
FAULTS: tuple[Fault, ...] = ("500", "503", "429", "drop", "truncate", "short", "hang", "slow")


class Clock:
    """A clock that only moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def time(self) -> float:
        return self.now


def failing(*errors: Exception) -> Callable[[float], str]:
    """An operation that raises these, one after the other, and then succeeds."""
    left = list(errors)

    def operation(limit_s: float) -> str:
        if left:
            raise left.pop(0)
        return "done"

    return operation


def test_an_operation_is_repeated_until_it_succeeds_with_growing_pauses() -> None:
    clock = Clock()
    policy = RetryPolicy(deadline_s=1000.0, first_delay_s=1.0, max_delay_s=8.0)
    errors = [ConnectionError("lost"), TimeoutError(), OSError(5, "input/output error")] * 2
    assert call(failing(*errors), what="x", policy=policy, sleep=clock.sleep, clock=clock.time) == "done"
    assert len(clock.pauses) == 6
    for pause, longest in zip(clock.pauses, [1.0, 2.0, 4.0, 8.0, 8.0, 8.0], strict=True):
        assert longest / 2 <= pause < longest


def test_pauses_are_a_function_of_who_waits_and_how_often() -> None:
    policy = RetryPolicy()
    assert delay_s(policy, 3, who="a") == delay_s(policy, 3, who="a")
    assert len({delay_s(policy, attempt, who=who) for attempt in (1, 2, 3) for who in "abc"}) == 9
    assert delay_s(policy, 10**6, who="a") < policy.max_delay_s


def test_an_attempt_gets_what_is_left_of_the_deadline() -> None:
    clock, limits = Clock(), []

    def operation(limit_s: float) -> None:
        limits.append(limit_s)
        clock.now += limit_s
        raise TimeoutError

    with pytest.raises(EnvironmentFault):
        policy = RetryPolicy(deadline_s=10.0, first_delay_s=1.0, attempt_timeout_s=4.0)
        call(operation, what="x", policy=policy, sleep=clock.sleep, clock=clock.time)
    assert limits[:2] == [4.0, 4.0] and all(0 < limit <= 4.0 for limit in limits) and clock.now <= 10.0


def test_past_the_deadline_one_line_says_what_how_often_why_and_what_to_do() -> None:
    clock = Clock()
    policy = RetryPolicy(deadline_s=5.0, first_delay_s=1.0)
    with pytest.raises(EnvironmentFault) as caught:
        call(failing(*[ConnectionError("lost\nline")] * 99), what="bytes 0-9 of s3://b/x", policy=policy,
             sleep=clock.sleep, clock=clock.time)  # fmt: skip
    message = str(caught.value)
    attempts = len(clock.pauses) + 1
    assert message.startswith(f"bytes 0-9 of s3://b/x failed {attempts} times in {clock.now:.1f} s")
    assert "ConnectionError: lost line" in message and "data.read_deadline_s" in message and "\n" not in message


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), PermissionError("x"), IsADirectoryError("x"), NotADirectoryError("x"),
              ValueError("a bug"), DataError("told")]
)  # fmt: skip
def test_what_will_not_pass_is_raised_at_once(error: Exception) -> None:
    clock = Clock()
    with pytest.raises(type(error)) as caught:
        call(failing(error), what="x", policy=RetryPolicy(), sleep=clock.sleep, clock=clock.time)
    assert caught.value is error and clock.pauses == []


def test_the_deepest_cause_decides_whether_an_error_passes() -> None:
    outer = FileNotFoundError("http://x/y")
    assert not is_transient(outer)
    outer.__cause__ = ConnectionResetError()
    assert is_transient(outer)
    wrapped = OSError("wrapped")
    assert is_transient(wrapped)
    wrapped.__cause__ = PermissionError("refused")
    assert not is_transient(wrapped)


def test_messages_tell_the_cause_that_decided_and_not_what_it_was_wrapped_in(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    refused = FileNotFoundError("http://x/y")
    refused.__cause__ = ConnectionRefusedError("Connection refused")
    with pytest.raises(EnvironmentFault) as caught:
        call(failing(*[refused] * 99), what="x", policy=RetryPolicy(), sleep=clock.sleep, clock=clock.time)
    assert "the last time with ConnectionRefusedError: Connection refused; " in str(caught.value)
    assert "FileNotFoundError" not in str(caught.value) + caplog.text and "Connection refused" in caplog.text
    bare = ValueError("a bug")
    assert deciding(bare) is bare


def test_only_the_first_repetition_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with caplog.at_level(logging.DEBUG, logger="data_pipeline.retry"):
        call(failing(*[TimeoutError()] * 3), what="x", policy=RetryPolicy(), sleep=clock.sleep, clock=clock.time)
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG", "DEBUG"]


def test_signatures_in_urls_are_not_told() -> None:
    assert "secret" not in one_line(OSError("no answer from 'https://h/x?X-Signature=secret'"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_server_loses_nothing(tmp_path: Path, fault: Fault) -> None:
    with serve_files({"/x.bin": CONTENT}) as server:
        uri = f"{server.url}/x.bin"
        server.fail(first(fault, fault))
        assert storage.read_range(uri, 1000, 500, retry=FAST) == CONTENT[1000:1500]
        assert len(server.requests) > (0 if fault == "slow" else 2)
        server.fail(first(None, fault, fault))
        assert storage.read_bytes(uri, retry=FAST) == CONTENT
        server.fail(first(None, fault, fault))
        pieces: list[bytes] = []
        assert storage.download(uri, tmp_path / "x", retry=FAST, on_chunk=pieces.append) == len(CONTENT)
        assert (tmp_path / "x").read_bytes() == b"".join(pieces) == CONTENT
        assert len(server.requests) >= (2 if fault == "slow" else 4)


def test_a_file_comes_in_pieces_and_a_lost_one_is_fetched_again_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "CHUNK_BYTES", 10_000)
    with serve_files({"/x.bin": CONTENT}, plan=first(*([None] * 5), "truncate")) as server:
        pieces: list[bytes] = []
        storage.download(f"{server.url}/x.bin", tmp_path / "x", retry=FAST, on_chunk=pieces.append)
        assert b"".join(pieces) == CONTENT and {len(piece) for piece in pieces} == {10_000}
        assert len(server.requests) == 12 and server.bytes_served == len(CONTENT) + 5_000


def test_reads_at_and_behind_the_end_are_as_of_a_local_file(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(CONTENT[:1000])
    with serve_files({"/x.bin": CONTENT[:1000], "/empty": b""}) as server:
        (tmp_path / "empty").write_bytes(b"")
        for name in ("x.bin", "empty"):
            for start, length in ((0, 1000), (0, 2000), (990, 20), (999, 1), (1000, 5), (5000, 5), (3, 0)):
                remote = storage.read_range(f"{server.url}/{name}", start, length, retry=FAST)
                assert remote == storage.read_range(str(tmp_path / name), start, length)
            assert storage.size(f"{server.url}/{name}") == storage.size(str(tmp_path / name))
            assert storage.read_bytes(f"{server.url}/{name}") == storage.read_bytes(str(tmp_path / name))


def test_a_hanging_read_is_cut_and_a_server_that_stays_away_is_told(tmp_path: Path) -> None:
    policy = RetryPolicy(deadline_s=0.6, first_delay_s=0.01, max_delay_s=0.02, attempt_timeout_s=0.15)
    with serve_files({"/x.bin": CONTENT}, plan=lambda number: "hang") as server:
        start = time.monotonic()
        with pytest.raises(EnvironmentFault, match=r"bytes 0-10 of http://.*/x.bin failed \d times in .*Timeout"):
            storage.read_range(f"{server.url}/x.bin", 0, 10, retry=policy)
        assert time.monotonic() - start < 3.0 and len(server.requests) >= 3
        server.fail(lambda number: "drop")
        with pytest.raises(EnvironmentFault, match="data.read_deadline_s"):
            storage.download(f"{server.url}/x.bin", tmp_path / "x", retry=policy)
        assert not (tmp_path / "x").exists()
    with pytest.raises(EnvironmentFault, match=r"^the look-up of http://.*/x.bin failed .* ConnectionRefusedError: "):
        storage.exists(f"{server.url}/x.bin", retry=policy)  # nobody listens: not the same as no such file


def test_what_a_server_refuses_is_told_at_once() -> None:
    with serve_files({"/x.bin": CONTENT}) as server:
        for read in (storage.read_bytes, storage.size, lambda uri: storage.read_range(uri, 0, 1)):
            with pytest.raises(FileNotFoundError):
                read(f"{server.url}/absent")
        assert not storage.exists(f"{server.url}/absent") and storage.exists(f"{server.url}/x.bin")
        server.fail(lambda number: "403")
        with pytest.raises(EnvironmentFault, match="refused.*credentials"):
            storage.read_range(f"{server.url}/x.bin", 0, 1)
        assert len(server.requests) == 1
        with pytest.raises(EnvironmentFault, match="refused .ClientResponseError: 403"):
            storage.exists(f"{server.url}/x.bin")
        for write in (storage.remove, lambda uri: storage.write_bytes_atomic(uri, b"")):
            with pytest.raises(ConfigError, match="cannot be written"):
                write(f"{server.url}/x.bin")
    with serve_files({"/x.bin": CONTENT}, ranges=False) as server:
        assert storage.read_bytes(f"{server.url}/x.bin") == CONTENT
        with pytest.raises(ConfigError, match="ignores range requests"):
            storage.read_range(f"{server.url}/x.bin", 10, 20)


def test_reads_in_flight_are_named_oldest_first() -> None:
    assert storage.in_flight() == ()
    with serve_files({"/x.bin": CONTENT}, plan=lambda number: "hang") as server:
        policy = RetryPolicy(deadline_s=1.0, attempt_timeout_s=0.8, first_delay_s=1.0)
        failures: list[Exception] = []

        def read(start: int) -> None:
            try:
                storage.read_range(f"{server.url}/x.bin", start, 10, retry=policy)
            except EnvironmentFault as error:
                failures.append(error)

        threads = [threading.Thread(target=read, args=(start,)) for start in (0, 500)]
        for index, thread in enumerate(threads):
            thread.start()
            servers.wait_until(lambda index=index: len(storage.in_flight()) > index)  # type: ignore[misc]
        seen = storage.in_flight()
        assert [entry.what for entry in seen] == [f"bytes {s}-{s + 10} of {server.url}/x.bin" for s in (0, 500)]
        assert seen[0].started <= seen[1].started <= time.monotonic()
        for thread in threads:
            thread.join(10)
    assert len(failures) == 2 and storage.in_flight() == ()


def test_a_local_read_that_stalls_is_named_and_a_quick_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stall(start: int) -> None:
        with contextlib.suppress(OSError):  # a pipe has no place to read at; it only opens late
            storage.read_range(str(tmp_path / "pipe"), start, 10)

    def in_child() -> bool:
        child = os.fork()
        if child == 0:
            os._exit(len(storage.in_flight()))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    os.mkfifo(tmp_path / "pipe")
    threads = [threading.Thread(target=stall, args=(start,)) for start in (0, 500)]
    try:
        for index, thread in enumerate(threads):
            thread.start()
            servers.wait_until(lambda index=index: len(storage._local_reads) > index)  # type: ignore[misc]
        monkeypatch.setattr(storage, "SLOW_READ_S", 3600.0)
        assert storage.in_flight() == ()
        monkeypatch.setattr(storage, "SLOW_READ_S", 0.0)
        seen = storage.in_flight()
        assert [entry.what for entry in seen] == [f"bytes {s}-{s + 10} of {tmp_path}/pipe" for s in (0, 500)]
        assert seen[0].started <= seen[1].started <= time.monotonic()
        assert in_child()  # which has none of these threads
    finally:
        writer = os.open(tmp_path / "pipe", os.O_RDWR)
        for thread in threads:
            thread.join(10)
        os.close(writer)
    assert storage.in_flight() == ()


def test_whole_local_files_are_named_while_they_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    content: list[bytes] = []
    thread = threading.Thread(target=lambda: content.append(storage.read_bytes(str(tmp_path / "pipe"))))
    thread.start()
    try:
        servers.wait_until(lambda: [entry.what for entry in storage.in_flight()] == [f"the bytes of {tmp_path}/pipe"])
    finally:
        (tmp_path / "pipe").write_bytes(b"content")
        thread.join(10)
    assert content == [b"content"] and storage.in_flight() == ()


def test_a_file_that_shrinks_while_it_is_read_is_told() -> None:
    files = {"/x.bin": CONTENT}

    def shrink(number: int) -> None:
        if number == 1:  # the size has been told
            files["/x.bin"] = CONTENT[:500]

    with serve_files(files, plan=shrink) as server, pytest.raises(DataError, match="became shorter"):
        storage.read_bytes(f"{server.url}/x.bin", retry=FAST)


def test_many_threads_read_through_a_flaky_server() -> None:
    with serve_files({"/x.bin": CONTENT}, plan=every(5, "500", "drop", "truncate", "short")) as server:
        parts: dict[int, bytes] = {}

        def read(start: int) -> None:
            for place in range(start, len(CONTENT), 8 * 2500):
                parts[place] = storage.read_range(f"{server.url}/x.bin", place, 2500, retry=FAST)

        threads = [threading.Thread(target=read, args=(2500 * index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert b"".join(parts[place] for place in sorted(parts)) == CONTENT
        assert len(server.requests) > 40


def test_a_forked_child_reads_after_its_parent_did() -> None:
    with serve_files({"/x.bin": CONTENT}) as server:
        uri = f"{server.url}/x.bin"
        assert storage.read_range(uri, 0, 10, retry=FAST) == CONTENT[:10]
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if storage.read_range(uri, 10, 10, retry=FAST) == CONTENT[10:20] else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(("package", "uri", "extra"), [("s3fs", "s3://b/x", "s3"), ("gcsfs", "gs://b/x", "gcs")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, package: str, uri: str, extra: str
) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from data_pipeline import storage\nfrom data_pipeline.errors import ConfigError\n"
        f"try: storage.read_bytes({uri!r})\nexcept ConfigError as error: print(error)"
    )
    finished = run([sys.executable, "-c", code], cwd=tmp_path, timeout_s=30)
    assert finished.stdout.strip() == (
        f"{uri} needs a package that is not installed; run: pip install 'rddm-dist[{extra}]'"
    ), finished.text


def test_loading_storage_loads_no_client_library(tmp_path: Path) -> None:
    code = (
        "import sys, data_pipeline.cache\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'fsspec', 'aiohttp', 'botocore', 's3fs', 'torch', 'numpy'}))"
    )
    assert run([sys.executable, "-c", code], cwd=tmp_path, timeout_s=30).stdout.strip() == "[]"


def test_an_upload_to_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    storage.make_folder(str(tmp_path / "a/b"))
    storage.upload(source, str(tmp_path / "a/b/x"))
    storage.upload(source, f"file://{tmp_path}/a/b/x")
    assert storage.read_bytes(str(tmp_path / "a/b/x")) == CONTENT
    assert storage.list_names(str(tmp_path / "a/b")) == ["x"]
    with pytest.raises(FileNotFoundError):
        storage.upload(tmp_path / "absent", str(tmp_path / "a/b/y"))
    assert storage.list_names(str(tmp_path / "a/b")) == ["x"]


def test_deleted_files_give_back_their_space_when_others_are_read(tmp_path: Path) -> None:
    def deleted_but_open() -> int:
        targets = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return sum(target.startswith(str(tmp_path)) and target.endswith("(deleted)") for target in targets)

    if not Path("/proc/self/fd").exists():
        pytest.skip("open files cannot be listed here")
    for index in range(storage.MAX_OPEN_FILES + 10):
        path = tmp_path / f"{index}"
        path.write_bytes(b"content")
        assert storage.read_range(str(path), 0, 3) == b"con"
        assert deleted_but_open() <= 1
        path.unlink()
    for index in range(storage.MAX_OPEN_FILES + 10):
        path = tmp_path / f"kept-{index}"
        path.write_bytes(b"content")
        assert storage.read_range(str(path), 3, 9) == b"tent"
    assert len(storage._open_files) <= storage.MAX_OPEN_FILES


def test_threads_that_read_more_files_than_stay_open_get_the_bytes_of_their_own(tmp_path: Path) -> None:
    """A file dropped from the table of open files while another thread reads it must stay open for that thread."""
    count = 3 * storage.MAX_OPEN_FILES
    for number in range(count):
        (tmp_path / str(number)).write_bytes(number.to_bytes(4, "little") * 8)

    def read(turn: int) -> bool:
        number = turn * 7919 % count
        return storage.read_range(str(tmp_path / str(number)), 4, 4) == number.to_bytes(4, "little")

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(20_000)))
