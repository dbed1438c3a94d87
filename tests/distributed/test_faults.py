"""A run outlives the faults of its storage, and a kill inside a save, with the bits of a run without them."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import storage
from rddm_dist.training import checkpoint as ckpt
from tests.support.datasets import make_dataset
from tests.support.processes import Finished, finish, kill_group, run_workers, start_workers
from tests.support.runs import TRAIN, write_config
from tests.support.servers import Fault, Plan, make_bucket, proxy, s3_server

PROBE = (sys.executable, "-m", "tests.support.fault_probe")
WORKERS = 2
STEPS = 12
KEYS = (f"train.steps={STEPS}", "train.checkpoint_every=2")
START_ROOM = 100_000  # bytes, less than a checkpoint takes
MAX_KILL_DELAY_S = 1.5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"), count=20, size=(40, 48))


@pytest.fixture(scope="module")
def disks() -> Iterator[Any]:
    """Makes a folder a small disk of its own: (folder, KiB)."""
    with contextlib.ExitStack() as stack:

        def mount(folder: Path, size: int) -> None:
            folder.mkdir()
            made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], capture_output=True)
            if made.returncode:
                pytest.skip("file systems cannot be mounted here")
            stack.callback(subprocess.run, ["umount", "-l", folder], check=True)

        yield mount


@dataclass(frozen=True)
class Outcome:
    """How the runs of one launch ended: by name, exit code and message of each start."""

    said: dict[str, list[tuple[int, str]]]
    workers: list[Finished]


def run_probe(folder: Path, data: str, runs: list[dict[str, Any]], *, env: dict[str, str] | None = None) -> Outcome:
    listed = folder / "runs.json"
    listed.write_text(json.dumps(runs))
    command = [*PROBE, "runs", str(write_config(folder, data)), str(listed)]
    workers = run_workers(command, WORKERS, cwd=folder, timeout_s=150, env=env)
    assert {worker.code for worker in workers} == {0}, "\n".join(worker.text for worker in workers)
    said: dict[str, list[tuple[int, str]]] = {}
    for line in workers[0].stdout.splitlines():
        if line.startswith("RUN "):
            _, name, code, message = line.split(" ", 3)
            said.setdefault(name, []).append((int(code), message))
    assert sum(map(len, said.values())) == len(runs), workers[0].text
    return Outcome(said, workers)


def events(run_dir: str, name: str) -> list[dict[str, Any]]:
    lines = storage.read_bytes(storage.join(run_dir, "metrics.jsonl")).splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == name]


def state_of(run_dir: str, steps: int) -> dict[str, torch.Tensor]:
    """Weights, moments and averages of the last step, from a checkpoint that verifies."""
    skipped: list[str] = []
    found = ckpt.find_newest(storage.join(run_dir, "checkpoints"), skipped=skipped)
    assert found is not None and found.progress.step == steps and skipped == []
    kinds = found.open().kinds
    assert {ckpt.WEIGHT, ckpt.EMA, "exp_avg", "exp_avg_sq"} <= set(kinds)
    return {f"{kind}/{name}": value for kind in kinds for name, value in found.read_full(kind).items()}


def assert_equal_bits(run_dir: str, undisturbed: str, *, steps: int = STEPS) -> None:
    expected, state = state_of(undisturbed, steps), state_of(run_dir, steps)
    assert expected.keys() == state.keys() and len(expected) > 20
    assert [name for name in expected if not torch.equal(expected[name], state[name])] == []


def check_saves(run_dir: str) -> None:
    """Storage was away from step 5 to step 11: the saves of steps 6 and 8 failed, that of step 10 may have."""
    failed = [record["step"] for record in events(run_dir, "save_failed")]
    saved = [record["step"] for record in events(run_dir, "saved")]
    assert failed[:2] == [6, 8] and set(failed) <= {6, 8, 10, 12}
    assert saved == [2, 4, *({10} - set(failed)), 12]
    assert ckpt.list_steps(storage.join(run_dir, "checkpoints")) == saved[:-3:-1]


@pytest.fixture(scope="module")
def undisturbed(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    [result, _] = run_workers([*TRAIN, str(write_config(folder, data)), *KEYS], WORKERS, cwd=folder)
    assert result.code == 0, result.text
    return str(folder / "runs" / "tiny")


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_disks(
    data: str, undisturbed: str, disks: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome]:
    """Runs whose disk gets full after the save of step 4: in `passing` it has room again at step 11; `lasting`
    ends, and goes on once there is room. `late` and `blocked` have no room, or no folder, from the start."""
    folder = tmp_path_factory.mktemp("disks")
    size = sum(path.stat().st_size for path in Path(ckpt.step_folder(f"{undisturbed}/checkpoints", STEPS)).iterdir())
    runs: list[dict[str, Any]] = []
    for name in ("passing", "lasting", "late"):
        disks(folder / name, int(3.5 * size / 1024) + 100)
        storage_key = f"run.storage={folder / name}"
        ballast = str(folder / name / "ballast")
        saved = f"{folder / name / name}/checkpoints/step-00000004/COMMIT.json"
        full = [["await", saved], ["fill", ballast, "0"]]
        if name == "passing":
            runs.append(
                {"name": name, "overrides": [*KEYS, storage_key], "at": {"5": full, "11": [["remove", ballast]]}}
            )
        elif name == "lasting":
            keys = [*KEYS, storage_key, "train.max_failed_saves=2"]
            runs.append({"name": name, "overrides": keys, "at": {"5": full}})
            runs.append({"name": name, "overrides": keys, "before": [["remove", ballast]]})
        else:
            room = [["fill", ballast, str(START_ROOM)]]
            runs.append({"name": name, "overrides": [*KEYS, storage_key], "before": room})
    (folder / "blocked").write_text("a file where a folder belongs")
    runs.append({"name": "blocked", "overrides": [*KEYS, f"run.storage={folder / 'blocked'}"]})
    assert size > 2 * START_ROOM
    return folder, run_probe(folder, data, runs)


def test_a_run_goes_on_while_its_disk_is_full_and_saves_again_after(
    full_disks: tuple[Path, Outcome], undisturbed: str
) -> None:
    folder, outcome = full_disks
    run_dir = str(folder / "passing" / "passing")
    assert outcome.said["passing"] == [(0, "")]
    failed = events(run_dir, "save_failed")
    assert [record["failures"] for record in failed] == list(range(1, len(failed) + 1))
    assert all("No space left on device" in record["reason"] for record in failed)
    check_saves(run_dir)
    assert [record["step"] for record in events(run_dir, "metrics")] == list(range(1, STEPS + 1))
    assert_equal_bits(run_dir, undisturbed)


def test_a_disk_that_stays_full_ends_the_run_which_goes_on_once_there_is_room(
    full_disks: tuple[Path, Outcome], undisturbed: str
) -> None:
    folder, outcome = full_disks
    run_dir = str(folder / "lasting" / "lasting")
    (code, said), again = outcome.said["lasting"]
    assert code == 2 and said.startswith("2 saves in a row failed, the last with: OSError: [Errno 28] No space left")
    assert again == (0, "")
    assert [record["step"] for record in events(run_dir, "save_failed")] == [6, 8]
    assert [record["step"] for record in events(run_dir, "resumed")] == [4]
    assert events(run_dir, "resumed")[0]["skipped"] == []
    assert_equal_bits(run_dir, undisturbed)


def test_a_disk_without_room_for_a_checkpoint_is_refused_at_the_start(full_disks: tuple[Path, Outcome]) -> None:
    folder, outcome = full_disks
    [(code, said)] = outcome.said["late"]
    assert code == 2 and said.startswith(f"run.storage={folder / 'late'} has 0 MB free, a checkpoint of this run takes")
    assert said.endswith("make room or choose another --storage")
    left = [path for path in (folder / "late").rglob("*") if path.is_file()]
    assert [path.name for path in left if path.parent.name != "logs"] == ["ballast"]


def test_storage_that_is_no_folder_is_refused_at_the_start(full_disks: tuple[Path, Outcome]) -> None:
    folder, outcome = full_disks
    [(code, said)] = outcome.said["blocked"]
    assert code == 2 and said.startswith("run.storage") and str(folder / "blocked") in said and "\n" not in said
    assert (folder / "blocked").read_text() == "a file where a folder belongs"


# -- a storage server --------------------------------------------------------------------------------------------------


def cut_by(cut: Path, *faults: Fault) -> Plan:
    """The plan of a proxy that has these faults in turn while a file is there."""
    return lambda number: faults[number % len(faults)] if cut.exists() else None


def test_a_run_goes_on_while_its_storage_server_is_away(
    data: str, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut"
    with s3_server() as (endpoint, settings), proxy(endpoint, plan=cut_by(cut, "503", "drop", "500")) as line:
        home = storage.join(make_bucket(endpoint, "bucket"), "runs/away")
        away = {
            "name": "away",
            "overrides": [*KEYS, f"run.storage={home.rpartition('/')[0]}", f"run.work_dir={tmp_path / 'work'}"],
            "at": {
                "5": [["await", f"{home}/checkpoints/step-00000004/COMMIT.json"], ["write", str(cut)]],
                "11": [["remove", str(cut)]],
            },
        }
        outcome = run_probe(tmp_path, data, [away], env={**settings, "AWS_ENDPOINT_URL": line.url})
        assert outcome.said["away"] == [(0, "")]
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        failed = events(home, "save_failed")
        assert all(f"{home}/checkpoints/" in record["reason"] for record in failed)
        check_saves(home)
        assert_equal_bits(home, undisturbed)
        assert storage.exists(f"{home}/model.safetensors")


# -- kills -------------------------------------------------------------------------------------------------------------


def uncommitted(folder: Path) -> list[int]:
    return [step for step in ckpt.list_steps(str(folder)) if not ckpt.is_committed(ckpt.step_folder(str(folder), step))]


def has_written(checkpoints: Path, since: float) -> bool:
    """Whether a rank's file has come, or grown, after a time."""
    with contextlib.suppress(FileNotFoundError):  # removed while it is looked at: leftovers of the kill before
        return any(path.stat().st_mtime > since for path in checkpoints.glob("*/rank-*.safetensors"))
    return False


def kill_inside_a_save(command: list[str], folder: Path, checkpoints: Path, *, delay_s: float) -> bool:
    """Start a run and kill all its workers `delay_s` after it began to save.   -> whether a save was unfinished

    What is there then verifies, and is not behind what was there before.
    """
    before, started = newest_step(checkpoints), time.time()
    processes = start_workers(command, WORKERS, cwd=folder)
    try:
        while not has_written(checkpoints, started):
            assert all(process.poll() is None for process in processes), finish(processes[0], timeout_s=10).text
            assert time.time() < started + 90, "no save began in time"
            time.sleep(0.01)
        time.sleep(delay_s)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            kill_group(process)
    assert newest_step(checkpoints) >= before
    return bool(uncommitted(checkpoints))


def newest_step(checkpoints: Path) -> int:
    """Step of the newest checkpoint, 0 without one; a kill has damaged none."""
    skipped: list[str] = []
    found = ckpt.find_newest(str(checkpoints), skipped=skipped)
    assert skipped == []
    return found.progress.step if found else 0


def check_kills(config: str, undisturbed: str, *, steps: int, kills: int, seed: int) -> None:
    """Kill a run so often at random points inside its saves, and let the same command end it."""
    folder = Path(config).parent
    checkpoints = folder / "runs" / "tiny" / "checkpoints"
    keys = [f"train.steps={steps}", "train.checkpoint_every=1"]
    delays, unfinished = random.Random(seed), 0
    for number in range(kills):
        delay_s = delays.uniform(0.0, MAX_KILL_DELAY_S)
        print(f"kill {number} of seed {seed}, {delay_s:.3f} s after the first byte, at step {newest_step(checkpoints)}")
        unfinished += kill_inside_a_save([*PROBE, "slow", config, *keys], folder, checkpoints, delay_s=delay_s)
    assert unfinished > kills / 2, "the saves were not slow enough to be killed inside"
    assert newest_step(checkpoints) < steps
    [result, _] = run_workers([*TRAIN, config, *keys], WORKERS, cwd=folder)
    assert result.code == 0, result.text
    assert uncommitted(checkpoints) == []
    assert_equal_bits(str(folder / "runs" / "tiny"), undisturbed, steps=steps)


def test_a_run_killed_inside_saves_ends_with_the_same_bits(data: str, undisturbed: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    check_kills(str(config), undisturbed, steps=STEPS, kills=3, seed=5)
