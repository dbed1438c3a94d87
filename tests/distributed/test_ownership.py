"""The owner of a run folder on object storage: conditional writes against a real S3 server process."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_pipeline import storage
from data_pipeline.errors import ConfigError, EnvironmentFault
from data_pipeline.retry import RetryPolicy
from rddm_dist.training import ownership
from rddm_dist.training.ownership import peek, take
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

FAST = RetryPolicy(deadline_s=20.0, first_delay_s=0.01, max_delay_s=0.05, attempt_timeout_s=0.5)
FIRST, SECOND = "owner-000001.json", "owner-000002.json"
TAKERS = 8
STALE_S = 0.5
NUMBERS = itertools.count()

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, dict[str, str]]]:
    with s3_server() as (endpoint, settings):
        yield endpoint, settings


@pytest.fixture
def line(server: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    """A line to the server, which the environment leads to. It lets one write through at a time: the server behind it
    looks up and writes in two steps, where S3 has one."""
    endpoint, settings = server
    lead_to(settings, monkeypatch)
    with proxy(endpoint) as flaky:
        writing, answer = threading.Lock(), flaky.answer

        def answer_writes_in_turn(request: Request) -> Answer:
            if request.method != "PUT":
                return answer(request)
            with writing:
                return answer(request)

        flaky.answer = answer_writes_in_turn
        monkeypatch.setenv("AWS_ENDPOINT_URL", flaky.url)
        yield flaky


@pytest.fixture
def home(server: tuple[str, dict[str, str]], line: FlakyServer) -> str:
    """A run folder in a bucket of its own."""
    return f"{make_bucket(server[0], f'bucket-{next(NUMBERS)}')}/runs/demo"


def change_writes(line: FlakyServer, change: Callable[[int, Callable[[], Answer]], Answer]) -> None:
    """Answer write 0, 1, ... of the line by change(number, how the server answers it)."""
    numbers, answer = itertools.count(), line.answer

    def changed(request: Request) -> Answer:
        return change(next(numbers), lambda: answer(request)) if request.method == "PUT" else answer(request)

    line.answer = changed


def leave(home: str, name: str = FIRST, **said: object) -> None:
    """An owner file as a process on another machine leaves it."""
    record = {"id": "a", "host": "node7", "boot": "b/1", "pid": 123, "started": 5, "beat": 0, "time": time.time()}
    storage.write_bytes_atomic(f"{home}/{name}", json.dumps({**record, **said}).encode())


def test_one_that_stood_still_while_it_wrote_gives_the_folder_up(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 0.01)
    with take(home) as owned:
        monkeypatch.setattr(ownership, "PAUSE_S", 0.0)
        wait_until(lambda: owned.lost != "")
        assert "this process stood still for 0 s" in owned.lost
    assert not storage.exists(f"{home}/{FIRST}")


def test_a_file_is_created_once_and_then_stays(home: str) -> None:
    assert storage.create(f"{home}/x", b"first")
    assert not storage.create(f"{home}/x", b"second")
    assert storage.read_bytes(f"{home}/x") == b"first"


def test_of_many_that_create_a_file_at_once_one_does(home: str, line: FlakyServer) -> None:
    line.fail(every(3, "drop", "500", "503"))
    with ThreadPoolExecutor(TAKERS) as pool:
        made = list(pool.map(lambda number: storage.create(f"{home}/x", b"%d" % number, retry=FAST), range(TAKERS)))
    [winner] = [number for number in range(TAKERS) if made[number]]
    assert storage.read_bytes(f"{home}/x", retry=FAST) == b"%d" % winner


def test_a_file_whose_answer_was_lost_is_known_as_ours(home: str, line: FlakyServer) -> None:
    answers: list[int] = []

    def lose_the_first(number: int, ask: Callable[[], Answer]) -> Answer:
        answer = ask()
        answers.append(answer.status)
        return answer if number else Answer(500)

    change_writes(line, lose_the_first)
    assert storage.create(f"{home}/x", b"ours", retry=FAST)
    assert answers == [200, 412] and storage.read_bytes(f"{home}/x") == b"ours"
    assert not storage.create(f"{home}/x", b"theirs", retry=FAST)


def test_a_file_whose_answer_came_too_late_is_known_as_ours(home: str, line: FlakyServer) -> None:
    late = threading.Event()

    def answer_the_first_late(number: int, ask: Callable[[], Answer]) -> Answer:
        answer = ask()
        if number == 0:
            late.wait(10)
        return answer

    change_writes(line, answer_the_first_late)
    try:
        assert storage.create(f"{home}/x", b"ours", retry=FAST)
    finally:
        late.set()
    assert [method for method, _ in line.requests].count("PUT") == 2


def test_a_conflict_with_another_write_is_tried_again(home: str, line: FlakyServer) -> None:
    conflict = Answer(409, b"<Error><Code>ConditionalRequestConflict</Code><Message>conflict</Message></Error>")
    change_writes(line, lambda number, ask: ask() if number else conflict)
    assert storage.create(f"{home}/x", b"ours", retry=FAST)


def test_a_refusal_that_names_no_condition_is_understood(home: str, line: FlakyServer) -> None:
    storage.create(f"{home}/x", b"first")
    change_writes(line, lambda number, ask: Answer(ask().status, b"<Error><Code>PreconditionFailed</Code></Error>"))
    assert not storage.create(f"{home}/x", b"second", retry=FAST)


def test_a_missing_bucket_is_one_line(line: FlakyServer) -> None:
    for operation in (lambda uri: storage.create(uri, b"x"), take, peek):
        with pytest.raises(ConfigError, match="^s3://no-such-bucket/x is in a bucket that does not exist; create it"):
            operation("s3://no-such-bucket/x")


def test_a_folder_is_owned_until_it_is_released_whatever_the_line_loses(home: str, line: FlakyServer) -> None:
    line.fail(every(3, "drop", "truncate", "500", "short"))
    with take(home) as owned:
        owned.check()
        assert peek(home).startswith("pid ")
        with pytest.raises(EnvironmentFault, match=rf"^run folder {home} is in use by pid "):
            take(home)
    assert storage.list_names(home) == [] and peek(home) == ""


def test_of_many_that_succeed_a_silent_owner_at_once_one_does(home: str) -> None:
    leave(home)
    start = time.monotonic()

    def try_to_take(_: int) -> ownership.Ownership | str:
        try:
            return take(home, stale_s=STALE_S)
        except EnvironmentFault as error:
            return str(error)

    with ThreadPoolExecutor(TAKERS) as pool:
        results = list(pool.map(try_to_take, range(TAKERS)))
    [winner] = [result for result in results if isinstance(result, ownership.Ownership)]
    assert time.monotonic() - start >= STALE_S
    assert all(f"run folder {home} is in use by pid " in str(result) for result in results if result is not winner)
    winner.check()
    assert storage.list_names(home) == [SECOND]
    winner.release()
    assert storage.list_names(home) == []


def test_an_owner_elsewhere_that_gives_a_sign_of_life_is_left_alone(home: str) -> None:
    leave(home)
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(take, home, stale_s=20.0)
        time.sleep(0.3)
        leave(home, beat=1)
        with pytest.raises(EnvironmentFault, match="is in use by pid 123 on node7"):
            taking.result(10)
    assert storage.list_names(home) == [FIRST]


def test_one_that_was_succeeded_stops_and_touches_nothing(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 0.1)
    owned = take(home)
    leave(home, SECOND)
    wait_until(lambda: owned.lost != "")
    assert "taken over by pid 123 on node7" in owned.lost
    with pytest.raises(EnvironmentFault, match="no longer owned by this process .*, which stops without writing"):
        owned.check()
    owned.release()
    assert storage.list_names(home) == [SECOND]


def test_a_sign_of_life_that_hung_while_others_came_and_went_is_the_last(
    home: str, line: FlakyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 0.1)
    monkeypatch.setattr(ownership, "PAUSE_S", 0.2)
    owned = take(home)
    held, go = threading.Event(), threading.Event()

    def hold(number: int, ask: Callable[[], Answer]) -> Answer:
        held.set()
        go.wait(10)
        return ask()

    change_writes(line, hold)
    assert held.wait(10)
    storage.remove(f"{home}/{FIRST}")  # taken over, used and released
    time.sleep(0.3)
    go.set()
    wait_until(lambda: owned.lost != "")
    assert "this process stood still for" in owned.lost
    owned.release()
    assert storage.list_names(home) == []


def test_a_storage_that_is_away_is_told_once_and_ends_nothing(
    home: str, line: FlakyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 0.05)
    monkeypatch.setattr(ownership, "BEAT_AGAIN_S", 0.05)
    with take(home) as owned:
        line.fail(lambda number: first("503", "drop", "500")(number % 3))
        wait_until(lambda: len(line.requests) > 8)
        line.fail(first())
        assert owned.lost == ""
        [record] = caplog.records
        assert f"no sign of life in {home}" in record.getMessage()
        before = storage.read_bytes(f"{home}/{FIRST}")
        wait_until(lambda: storage.read_bytes(f"{home}/{FIRST}") != before)
        owned.check()
    assert storage.list_names(home) == []
