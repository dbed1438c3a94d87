"""One run folder has one owner: the living are left alone, the dead are succeeded by exactly one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline import storage
from data_pipeline.errors import ConfigError, EnvironmentFault
from rddm_dist.training import ownership
from rddm_dist.training.ownership import OWNER_PATTERN, peek, take
from tests.support.ownership_probe import STALE_S, Child
from tests.support.servers import wait_until

pytestmark = pytest.mark.timeout(60)

FIRST, SECOND = "owner-000001.json", "owner-000002.json"
TAKERS = 8


def leave(home: Path, name: str = FIRST, **said: object) -> Path:
    """An owner file as a process on another machine leaves it."""
    record = {"id": "a", "host": "node7", "boot": "b/1", "pid": 123, "started": 5, "beat": 0, "time": time.time()}
    home.mkdir(parents=True, exist_ok=True)
    (home / name).write_text(json.dumps({**record, **said}))
    return home / name


def names(home: Path) -> list[str]:
    return sorted(os.listdir(home))


def test_a_file_is_created_once_and_then_stays(tmp_path: Path) -> None:
    uri = str(tmp_path / "x")
    assert storage.create(uri, b"first")
    assert not storage.create(uri, b"second") and not storage.create(uri, b"first")
    assert storage.read_bytes(uri) == b"first" and names(tmp_path) == ["x"]


def test_of_many_that_create_a_file_at_once_one_does(tmp_path: Path) -> None:
    barrier = threading.Barrier(TAKERS)

    def create(number: int) -> list[bool]:
        made = []
        for round_number in range(20):
            barrier.wait(10)
            made.append(storage.create(str(tmp_path / str(round_number)), b"%d" % number))
        return made

    with ThreadPoolExecutor(TAKERS) as pool:
        made = list(pool.map(create, range(TAKERS)))
    for round_number in range(20):
        [winner] = [number for number in range(TAKERS) if made[number][round_number]]
        assert (tmp_path / str(round_number)).read_bytes() == b"%d" % winner
    assert len(names(tmp_path)) == 20


def test_what_cannot_be_created_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^http://h/x cannot be written; give a folder"):
        storage.create("http://h/x", b"")
    with pytest.raises(FileNotFoundError):
        storage.create(str(tmp_path / "absent" / "x"), b"")


def test_a_folder_is_owned_until_it_is_released(tmp_path: Path) -> None:
    home = tmp_path / "runs" / "demo"
    assert peek(str(home)) == "" and not home.exists()
    with take(str(home)) as owned:
        assert names(home) == [FIRST] and OWNER_PATTERN.fullmatch(FIRST)
        assert re.fullmatch(
            rf"pid {os.getpid()} on {re.escape(socket.gethostname())}, last sign of life \d s ago", peek(str(home))
        )
        owned.check()
        with pytest.raises(EnvironmentFault, match=rf"^run folder {home} is in use by pid {os.getpid()} on "):
            take(str(home))
        owned.check()
    assert owned.lost == "" and not home.exists()
    owned.release()  # again


def test_only_a_folder_that_taking_made_goes_and_only_when_it_is_empty(tmp_path: Path) -> None:
    before, used = tmp_path / "before", tmp_path / "used"
    before.mkdir()
    take(str(before)).release()
    with take(str(used)):
        (used / "config.yaml").touch()
    assert names(tmp_path) == ["before", "used"] and names(before) == [] and names(used) == ["config.yaml"]
    with take(str(used)):
        assert names(used) == ["config.yaml", FIRST]


def test_a_live_process_is_named_at_once_and_a_killed_one_succeeded_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "demo"
    with Child(home) as child:
        assert child.ask("take") == "taken"
        start = time.monotonic()
        with pytest.raises(EnvironmentFault) as caught:
            take(str(home))
        assert re.fullmatch(
            rf"run folder {home} is in use by pid {child.pid} on {re.escape(socket.gethostname())} "
            r"\(last sign of life \d s ago\); stop that one, or choose another run.name",
            str(caught.value),
        )
        assert caught.value.exit_code == 2 and peek(str(home)).startswith(f"pid {child.pid} on ")
        child.process.send_signal(signal.SIGKILL)
        wait_until(lambda: peek(str(home)) == "")  # also as a zombie that its parent has not waited for
        with take(str(home)) as owned:
            owned.check()
            assert names(home) == [SECOND]
        assert time.monotonic() - start < 5.0
        [record] = [entry for entry in caplog.records if entry.name == ownership.__name__]
        assert f"took over run folder {home} from pid {child.pid} on " in record.getMessage()
    assert names(home) == []


def test_a_process_that_has_the_number_of_a_dead_one_is_not_it(tmp_path: Path) -> None:
    me = ownership._this_process()
    leave(tmp_path, boot=me.boot, pid=me.pid, started=me.started + 1)
    assert peek(str(tmp_path)) == ""
    take(str(tmp_path)).release()
    leave(tmp_path, boot=me.boot, pid=me.pid, started=me.started)
    with pytest.raises(EnvironmentFault, match="is in use"):
        take(str(tmp_path))


def test_a_silent_owner_elsewhere_is_succeeded_after_a_while(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave(tmp_path, time=time.time() + 1000.0)  # whatever its clock says
    start = time.monotonic()
    with take(str(tmp_path), stale_s=STALE_S) as owned:
        assert STALE_S <= time.monotonic() - start < STALE_S + 5.0
        assert names(tmp_path) == [SECOND]
        owned.check()
    waiting, took = [entry.getMessage() for entry in caplog.records]
    assert "pid 123 on node7" in waiting and "waiting up to 0.5 s for a sign of life" in waiting
    assert "took over" in took


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"id": "a"}', b"\xff", b'{"pid": "x"}'])
def test_a_file_that_says_nothing_is_an_owner_elsewhere(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FIRST).write_bytes(content)
    assert peek(str(tmp_path)) == ""
    start = time.monotonic()
    take(str(tmp_path), stale_s=0.1).release()
    assert time.monotonic() - start >= 0.1 and names(tmp_path) == []


def test_an_owner_elsewhere_that_gives_a_sign_of_life_is_left_alone(tmp_path: Path) -> None:
    home = tmp_path / "demo"
    with Child(home, boot="other/1", beat_s=0.2) as child:
        assert child.ask("take") == "taken"
        start = time.monotonic()
        with pytest.raises(EnvironmentFault, match=rf"is in use by pid {child.pid} on .*; stop that one"):
            take(str(home), stale_s=20.0)
        assert time.monotonic() - start < 5.0
        assert child.ask("look") == "ours" and names(home) == [FIRST]


def test_a_folder_that_is_released_meanwhile_is_taken(tmp_path: Path) -> None:
    leave(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(take, str(tmp_path), stale_s=50.0)
        time.sleep(0.2)
        assert not taking.done()
        (tmp_path / FIRST).unlink()
        with taking.result(10) as owned:
            owned.check()
            assert names(tmp_path) == [FIRST]


def test_of_owners_elsewhere_peek_believes_the_clock(tmp_path: Path) -> None:
    leave(tmp_path, time=time.time() - 3.0)
    assert re.fullmatch(r"pid 123 on node7, last sign of life [34] s ago", peek(str(tmp_path)))
    leave(tmp_path, SECOND, time=time.time() - ownership.STALE_S - 1.0)
    assert peek(str(tmp_path)) == "" and names(tmp_path) == [FIRST, SECOND]


@pytest.mark.parametrize("boot", ["", "other/1"], ids=["dead", "silent"])
def test_of_many_processes_that_succeed_a_dead_owner_at_once_one_does(tmp_path: Path, boot: str) -> None:
    me = ownership._this_process()
    leave(tmp_path, boot=boot or me.boot, pid=me.pid, started=1)
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(Child(tmp_path)) for _ in range(TAKERS)]
        for child in children:
            child.tell("take")
        answers = [child.answer() for child in children]
        [winner] = [child for child, answer in zip(children, answers, strict=True) if answer == "taken"]
        refusals = [answer for answer in answers if answer != "taken"]
        assert len(refusals) == TAKERS - 1
        assert all(re.match(rf"exit 2: run folder .* is in use by pid {winner.pid} on ", each) for each in refusals)
        assert winner.ask("look") == "ours" and names(tmp_path) == [SECOND]


@pytest.mark.parametrize("change", ["woke up", "was removed", "another came first"])
def test_a_change_in_the_instant_of_taking_undoes_it(tmp_path: Path, change: str) -> None:
    home = str(tmp_path)
    seen = ownership._Seen(1, leave(tmp_path).read_bytes())
    if change == "woke up":
        leave(tmp_path, beat=1)
    elif change == "was removed":
        (tmp_path / FIRST).unlink()
    else:
        leave(tmp_path, "owner-000003.json")
    before = names(tmp_path)
    assert not ownership._create_next(home, seen, ownership._this_process()) and names(tmp_path) == before
    if change == "another came first":
        (tmp_path / FIRST).unlink()  # and it cleared up
        assert not ownership._create_next(home, None, ownership._this_process())
        assert names(tmp_path) == ["owner-000003.json"]


def test_one_that_was_succeeded_while_it_stood_still_stops_and_touches_nothing(tmp_path: Path) -> None:
    home = tmp_path / "demo"
    with Child(home, boot="other/1", beat_s=0.1) as child:
        assert child.ask("take") == "taken"
        child.process.send_signal(signal.SIGSTOP)
        with take(str(home), stale_s=STALE_S) as owned:
            child.process.send_signal(signal.SIGCONT)
            answer = child.ask("look")
            assert re.match(
                rf"exit 2: run folder {home} is no longer owned by this process \(taken over by pid {os.getpid()} on ",
                answer,
            )
            assert child.ask("release") == "released"
            owned.check()
            assert names(home) == [SECOND]


@pytest.mark.parametrize("how", ["succeeded", "removed", "overwritten"])
def test_the_heartbeat_notices_that_the_folder_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 0.5)  # the first beat comes after what follows
    owned = take(str(tmp_path))
    if how == "succeeded":
        leave(tmp_path, SECOND)
    elif how == "removed":
        (tmp_path / FIRST).unlink()
    else:
        replaced = leave(tmp_path, "new")
        os.replace(replaced, tmp_path / FIRST)
    wait_until(lambda: owned.lost != "")
    assert ("its owner file is gone" if how == "removed" else "taken over by pid 123 on node7") in owned.lost
    with pytest.raises(EnvironmentFault, match="no longer owned by this process"):
        owned.check()
    owned.release()
    assert names(tmp_path) == {"succeeded": [SECOND], "removed": [], "overwritten": [FIRST]}[how]


def test_signs_of_life_are_whole_and_of_one_length_and_end_with_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 0.002)
    seen: set[int] = set()

    def has_seen_many() -> bool:
        content = (tmp_path / FIRST).read_bytes()
        seen.add(json.loads(content)["beat"])
        return len(content) == ownership.FILE_BYTES and len(seen) > 12

    owned = take(str(tmp_path))
    wait_until(has_seen_many)
    owned.release()
    time.sleep(0.05)
    assert names(tmp_path) == [] and owned.lost == ""


def test_a_storage_that_is_away_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 0.01)
    monkeypatch.setattr(ownership, "BEAT_AGAIN_S", 0.01)
    caplog.set_level(logging.INFO, logger=ownership.__name__)
    home, folder, file = tmp_path / "demo", tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.touch()

    def lead_to(target: Path) -> None:
        (tmp_path / "link").symlink_to(target)
        os.replace(tmp_path / "link", home)

    lead_to(folder)
    with take(str(home)) as owned:
        lead_to(file)
        wait_until(lambda: len(caplog.records) == 1)
        with pytest.raises(EnvironmentFault, match=rf"^run.storage: {home} cannot be read \(Not a directory\)"):
            owned.check()
        time.sleep(0.1)
        assert owned.lost == "" and "no sign of life in" in caplog.text and len(caplog.records) == 1
        lead_to(folder)
        wait_until(lambda: len(caplog.records) == 2)
        assert "signs of life in" in caplog.records[1].getMessage()
        owned.check()


def test_a_slow_disk_does_not_end_a_run_and_a_beat_makes_no_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 0.01)
    with take(str(tmp_path)) as owned:
        monkeypatch.setattr(ownership, "PAUSE_S", 0.0)
        before = (tmp_path / FIRST).read_bytes()
        wait_until(lambda: (tmp_path / FIRST).read_bytes() != before)
        assert owned.lost == ""
        (tmp_path / FIRST).unlink()
        wait_until(lambda: owned.lost != "")
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        EnvironmentFault, match=r"^run.storage: .*/file/demo cannot be written \(Not a directory\); choose another"
    ):
        take(str(tmp_path / "file" / "demo"))
    assert peek(str(tmp_path / "file" / "demo")) == ""
    with pytest.raises(EnvironmentFault, match=r"^run.storage: .*/file cannot be read \(Not a directory\)"):
        peek(str(tmp_path / "file"))
