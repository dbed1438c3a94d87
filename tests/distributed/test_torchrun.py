"""torchrun of ours: the workers' exit code, and signals that reach them."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.support.processes import finish, run, start
from tests.support.servers import wait_until

WRAPPER = (sys.executable, "-m", "rddm_dist.torchrun", "--nproc-per-node=2")
SLOW = """
import os, pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(1)  # saving
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(f"ready-{os.environ['RANK']}").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("code", [0, 2, 75])
def test_the_exit_code_is_that_of_the_workers(code: int, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(f"import sys; sys.exit({code})")
    assert run([*WRAPPER, "--master-port=0", "work.py"], cwd=tmp_path, timeout_s=60).code == code


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_workers_which_end_in_their_own_time(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(SLOW)
    process = start([*WRAPPER, "--master-port=0", "work.py"], cwd=tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, timeout_s=40)
    process.send_signal(number)
    finished = finish(process, timeout_s=40)
    assert finished.code == 75, finished.text
