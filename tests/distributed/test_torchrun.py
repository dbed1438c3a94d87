"""torchrun of ours: the workers' exit code, and signals that reach them."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from rddm_dist.training.standing import folder_at
from rddm_dist.training.stopping import LAUNCH_ENV, end_launch
from tests.support.datasets import make_dataset
from tests.support.processes import finish, run, start
from tests.support.runs import write_config
from tests.support.servers import free_port, wait_until

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


def test_a_launch_that_was_stopped_meanwhile_does_not_train_and_its_ranks_agree(tmp_path: Path) -> None:
    config = write_config(tmp_path, make_dataset(tmp_path / "data", count=4, size=(40, 48)))
    run_dir = tmp_path / "runs" / "tiny"
    end_launch(folder_at(str(run_dir)), "0001", "stopped by ann")
    command = [*WRAPPER, f"--master-port={free_port()}", "-m", "rddm_dist.training", str(config)]
    stopped = run(command, cwd=tmp_path, timeout_s=90, env={LAUNCH_ENV: "0001"})
    assert stopped.code == 75 and "this launch was stopped by rddm stop; launch again to go on" in stopped.stdout
    assert not (run_dir / "checkpoints").exists()
    again = run(command, cwd=tmp_path, timeout_s=90, env={LAUNCH_ENV: "0002"})
    assert again.code == 0 and "trained to step 10" in again.stdout, again.text
