"""What wants a run to stop, and what launchers tell apart by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rddm_dist.config import TrainSection
from rddm_dist.training.folder import RunFolder
from rddm_dist.training.standing import standing_of
from rddm_dist.training.stopping import (
    LAUNCH_ENV,
    PREEMPTED,
    REQUEST_FILE,
    REQUESTED,
    STOPPED_CODE_ENV,
    StopFlag,
    end_launch,
    exit_code_of,
    request_stop,
    stopped_for_good,
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path), tmp_path)


def reason(folder: RunFolder, **train: object) -> str:
    flag = StopFlag(folder, train=TrainSection.model_validate(train))
    try:
        return flag.reason
    finally:
        flag.close()


def test_nothing_wants_it_to_stop(folder: RunFolder) -> None:
    assert reason(folder, max_hours=1.0, notice_file=str(folder.work / "notice")) == ""


def test_the_wall_clock_limit_counts_from_the_start(folder: RunFolder) -> None:
    assert reason(folder, max_hours=1e-12) == "train.max_hours=1e-12 are over"


def test_the_notice_of_a_spot_machine_is_a_preemption(folder: RunFolder) -> None:
    notice = folder.work / "notice"
    notice.touch()
    assert reason(folder, notice_file=str(notice)) == f"{PREEMPTED}{notice} is there"


def test_a_request_says_why_and_one_by_hand_need_not(folder: RunFolder) -> None:
    (folder.work / REQUEST_FILE).touch()
    assert reason(folder) == REQUESTED
    request_stop(folder, "stopped by ann")
    assert reason(folder) == "stopped by ann"


def test_a_person_s_request_is_not_taken_for_a_preemption(folder: RunFolder) -> None:
    request_stop(folder, f"{PREEMPTED}a node drains")
    assert reason(folder) == f"{PREEMPTED}a node drains"
    request_stop(folder, "stopped by ann")
    request_stop(folder, f"{PREEMPTED}another node drains")
    assert reason(folder) == "stopped by ann"


def test_only_the_launch_that_a_person_stopped_ends_for_good(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_launch(folder, "0002", "stopped by ann")
    assert reason(folder) == "stopped by ann"
    assert not stopped_for_good(folder)  # started by hand
    monkeypatch.setenv(LAUNCH_ENV, "0001")
    assert not stopped_for_good(folder)
    monkeypatch.setenv(LAUNCH_ENV, "0002")
    assert stopped_for_good(folder) and exit_code_of(75, folder) == 75
    monkeypatch.setenv(STOPPED_CODE_ENV, "0")
    assert (exit_code_of(75, folder), exit_code_of(1, folder), exit_code_of(0, folder)) == (0, 1, 0)


def test_a_journal_tells_how_a_run_stands() -> None:
    assert standing_of([], steps=9).status == "none"
    records = [
        {"event": "started", "step": 0, "steps": 9, "time": 1.0},
        {"event": "metrics", "step": 2, "metrics": {"train/loss": 0.5}, "time": 2.0},
        {"event": "saved", "step": 2, "time": 3.0},
        {"event": "finished", "status": "stopped", "step": 2, "reason": "SIGTERM", "time": 4.0},
    ]
    stopped = standing_of(records, steps=0)
    assert (stopped.status, stopped.step, stopped.steps, stopped.saved, stopped.starts) == ("stopped", 2, 9, 2, 1)
    again = standing_of([*records, {"event": "resumed", "step": 2, "steps": 9, "time": 5.0}], steps=0)
    assert (again.status, again.starts, again.metrics) == ("running", 2, {"train/loss": 0.5})
