"""The run folder has one home; the journal of a run at a URL goes up in segments and comes back whole."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import storage
from rddm_dist.config import parse_config
from rddm_dist.tracking.journal import Journal, read_journal
from rddm_dist.training.folder import (
    JOURNAL_FILE,
    SEGMENTS,
    TRACKER_FILE,
    JournalMirror,
    RunFolder,
    last_record,
    read_segments,
    run_folder,
)
from rddm_dist.training.inspection import read_scores_of
from tests.support.servers import lead_to, make_bucket, s3_server

pytestmark = pytest.mark.timeout(60)
_names = itertools.count()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as (endpoint, settings), pytest.MonkeyPatch.context() as patch:
        lead_to(settings, patch)
        yield make_bucket(endpoint, "runs")


@pytest.fixture
def home(bucket: str) -> str:
    return f"{bucket}/run-{next(_names)}"


class Machine:
    """A run at `home` as one machine sees it, with a work folder of its own, from one start to the next."""

    def __init__(self, home: str, work: Path) -> None:
        work.mkdir(exist_ok=True)
        self.folder = RunFolder(home, work)
        self.path = work / JOURNAL_FILE
        self.mirror = JournalMirror(self.folder)
        self.mirror.restore()

    def write(self, *steps: int) -> None:
        journal = Journal(self.path)
        for step in steps:
            journal.append({"event": "metrics", "step": step, "metrics": {"train/loss": step / 10}})
        journal.close()

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in read_journal(self.path)]

    @property
    def steps_at_home(self) -> list[int]:
        return [json.loads(line)["step"] for line in read_segments(self.folder).splitlines()]

    @property
    def segments(self) -> list[str]:
        return storage.list_names(self.folder.uri(SEGMENTS))


# -- places ------------------------------------------------------------------------------------------------------------


def test_a_local_home_is_its_own_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for location in ("runs", str(tmp_path / "runs"), f"file://{tmp_path}/runs"):
        folder = run_folder(parse_config({"run": {"storage": location, "name": "demo"}}, source="test"))
        assert folder == RunFolder(str(tmp_path / "runs" / "demo"), tmp_path / "runs" / "demo")
        assert not folder.is_remote and not folder.work.exists()


def test_each_remote_home_has_a_work_folder_of_its_own_which_is_always_the_same(tmp_path: Path) -> None:
    def at(storage: str, name: str) -> RunFolder:
        values = {"storage": storage, "name": name, "work_dir": str(tmp_path)}
        return run_folder(parse_config({"run": values}, source="test"))

    folders = [at("s3://a/runs", "demo"), at("s3://b/runs", "demo"), at("s3://a/runs", "other")]
    assert [folder.home for folder in folders] == ["s3://a/runs/demo", "s3://b/runs/demo", "s3://a/runs/other"]
    assert all(folder.is_remote and folder.work.parent == tmp_path.resolve() for folder in folders)
    assert len({folder.work for folder in folders}) == 3 and at("s3://a/runs/", "demo") == folders[0]


@pytest.mark.parametrize("is_remote", [False, True])
def test_small_files_are_written_read_and_removed(is_remote: bool, tmp_path: Path, home: str) -> None:
    folder = RunFolder(home if is_remote else str(tmp_path), tmp_path)
    assert folder.read("a.json") is None and not folder.exists("a.json")
    folder.write("a.json", b"one")
    folder.write("a.json", b"two")
    assert folder.read("a.json") == b"two" and folder.exists("a.json")
    folder.remove("a.json")
    folder.remove("a.json")
    assert folder.read("a.json") is None


def test_a_local_run_sends_nothing(tmp_path: Path) -> None:
    machine = Machine(str(tmp_path), tmp_path)
    machine.write(1, 2)
    before = machine.path.read_bytes()
    machine.mirror.add("samples/a.png")
    machine.mirror.send()
    again = Machine(str(tmp_path), tmp_path)
    assert again.path.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [JOURNAL_FILE]
    assert last_record(machine.folder, "metrics")["step"] == 2 and last_record(machine.folder, "saved") == {}


# -- segments ----------------------------------------------------------------------------------------------------------


def test_each_send_brings_what_has_come_since(home: str, tmp_path: Path) -> None:
    machine = Machine(home, tmp_path / "a")
    machine.mirror.send()
    assert machine.segments == [], "nothing yet"
    sizes = [0]
    for steps in ((1, 2), (3,), ()):
        machine.write(*steps)
        machine.mirror.send()
        sizes.append(machine.path.stat().st_size)
    assert machine.segments == [f"{size:012d}.jsonl" for size in sizes[:2]]
    assert read_segments(machine.folder) == machine.path.read_bytes() and machine.steps_at_home == [1, 2, 3]
    assert last_record(machine.folder, "metrics")["step"] == 3 and last_record(machine.folder, "saved") == {}
    assert read_scores_of(home, "train/loss") == {1: 0.1, 2: 0.2, 3: 0.3}


def test_a_line_that_is_still_being_written_waits_for_its_end(home: str, tmp_path: Path) -> None:
    machine = Machine(home, tmp_path / "a")
    machine.write(1)
    with open(machine.path, "ab") as file:
        file.write(b'{"event": "metrics", "step": ')
        file.flush()
        machine.mirror.send()
        assert machine.steps_at_home == [1]
        file.write(b"2}\n")
    machine.mirror.send()
    assert machine.steps_at_home == [1, 2] and len(machine.segments) == 2


def test_files_that_wait_go_up_once_with_the_next_send(home: str, tmp_path: Path) -> None:
    machine = Machine(home, tmp_path / "a")
    for name in ("a.png", "b.png"):
        (machine.folder.work / name).write_text(name)
        machine.mirror.add(name)
    assert not machine.folder.exists("a.png")
    machine.mirror.send()
    assert machine.folder.read("a.png") == b"a.png" and machine.folder.read("b.png") == b"b.png"
    machine.folder.remove("a.png")
    machine.mirror.send()
    assert not machine.folder.exists("a.png")


# -- restoring ---------------------------------------------------------------------------------------------------------


def test_another_machine_goes_on_from_the_journal_at_home(home: str, tmp_path: Path) -> None:
    one = Machine(home, tmp_path / "a")
    one.write(1, 2)
    (one.folder.work / TRACKER_FILE).write_text('{"run_id": "r"}')
    one.mirror.send()
    one.write(3)  # never sent: the machine is gone
    two = Machine(home, tmp_path / "b")
    assert two.steps == [1, 2] and (two.folder.work / TRACKER_FILE).read_text() == '{"run_id": "r"}'
    two.write(3, 4)
    two.mirror.send()
    assert two.steps_at_home == [1, 2, 3, 4] == Machine(home, tmp_path / "c").steps


def test_a_journal_that_begins_with_the_one_at_home_stays_with_what_is_behind_it(home: str, tmp_path: Path) -> None:
    one = Machine(home, tmp_path / "a")
    one.write(1)
    one.mirror.send()
    one.write(2)
    again = Machine(home, tmp_path / "a")
    assert again.steps == [1, 2]
    again.mirror.send()
    assert again.steps_at_home == [1, 2]


@pytest.mark.parametrize("has_tracker", [False, True])
def test_a_journal_of_an_earlier_life_gives_way(home: str, tmp_path: Path, has_tracker: bool) -> None:
    one = Machine(home, tmp_path / "a")
    one.write(1)
    one.mirror.send()
    one.write(2, 3)  # never sent
    (one.folder.work / TRACKER_FILE).write_text("old")
    two = Machine(home, tmp_path / "b")
    two.write(20)
    if has_tracker:
        (two.folder.work / TRACKER_FILE).write_text("new")
    two.mirror.send()
    again = Machine(home, tmp_path / "a")
    assert again.steps == [1, 20]
    tracker = again.folder.work / TRACKER_FILE
    assert (tracker.read_text() if tracker.exists() else "") == ("new" if has_tracker else "")
    again.write(21)
    again.mirror.send()
    assert again.steps_at_home == [1, 20, 21]


def test_the_journal_at_home_ends_before_a_gap(home: str, tmp_path: Path) -> None:
    one = Machine(home, tmp_path / "a")
    for step in (1, 2, 3):
        one.write(step)
        one.mirror.send()
    one.folder.remove(f"{SEGMENTS}/{one.segments[1]}")
    assert one.steps_at_home == [1]


@pytest.mark.parametrize("place", ["a", "b"])
def test_a_run_goes_on_over_a_gap_and_its_journal_is_whole_again(
    home: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    """What lies behind the gap must not be joined to what is written now: machine a still has it, machine b has not."""
    one = Machine(home, tmp_path / "a")
    for step in (1, 2, 3):
        one.write(step)
        one.mirror.send()
    one.folder.remove(f"{SEGMENTS}/{one.segments[1]}")
    with caplog.at_level(logging.WARNING):
        again = Machine(home, tmp_path / place)
    assert f"{SEGMENTS} of {home} has a gap" in caplog.text
    assert again.steps == ([1, 2, 3] if place == "a" else [1])
    for steps in ((80,), (9,)):  # of another length than what is missing
        again.write(*steps)
        again.mirror.send()
    wanted = [1, 2, 3, 80, 9] if place == "a" else [1, 80, 9]
    assert again.steps_at_home == again.steps == wanted == Machine(home, tmp_path / "c").steps
