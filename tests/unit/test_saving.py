"""A save holds the state of its step, is committed or leaves nothing, and its failures are counted."""

from __future__ import annotations

import json
import subprocess
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline import storage
from data_pipeline.errors import EnvironmentFault
from data_pipeline.retry import RetryPolicy
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training import saving
from rddm_dist.training.fragments import Key, Snapshot
from rddm_dist.training.saving import Saved, Saver, Series
from tests.support.servers import wait_until
from tests.unit.test_checkpoint_faults import progress_at

pytestmark = pytest.mark.timeout(60)

RETRY = RetryPolicy(deadline_s=1.0, first_delay_s=0.01)


class GatedSnapshot(Snapshot):
    """Waits before it writes until the gate is open."""

    gate: threading.Event

    def write(self, uri: str, *, retry: RetryPolicy = RETRY) -> str:
        assert self.gate.wait(30)
        return super().write(uri, retry=retry)


@dataclass
class Run:
    """A saver of one tensor, and what it told."""

    folder: Path
    value: Tensor
    snapshot: Snapshot
    saver: Saver
    saved: list[Saved] = field(default_factory=list)
    failed: list[tuple[int, str, int]] = field(default_factory=list)

    def start(self, step: int) -> None:
        self.saver.start(progress_at(step, "run"), [Series(str(self.folder), self.snapshot)])

    def save(self, step: int) -> bool:
        self.start(step)
        return self.saver.finish()

    def place(self, step: int) -> Path:
        return Path(ckpt.step_folder(str(self.folder), step))


def make_run(
    folder: Path,
    *,
    numel: int = 100,
    kind: type[Snapshot] = Snapshot,
    writers: int = 1,
    max_failures: int = 3,
    guard: Callable[[], None] = lambda: None,
    before_commit: Callable[[], None] = lambda: None,
) -> Run:
    value = torch.arange(numel, dtype=torch.float32)
    saved: list[Saved] = []
    failed: list[tuple[int, str, int]] = []
    saver = Saver(
        shapes={"a": (numel,)},
        session="session",
        writers=writers,
        max_failures=max_failures,
        retry=RETRY,
        guard=guard,
        before_commit=before_commit,
        on_saved=saved.append,
        on_failed=lambda *what: failed.append(what),
    )
    return Run(folder, value, kind([(Key(ckpt.WEIGHT, "a", 0), value)]), saver, saved, failed)


def content_of(folder: Path, step: int) -> Tensor:
    """The tensor in the newest checkpoint, which is sound and of this step."""
    skipped: list[str] = []
    found = ckpt.find_newest(str(folder), skipped=skipped)
    assert found is not None and found.progress.step == step and not skipped
    return found.read_full(ckpt.WEIGHT)["a"]


def test_a_save_is_a_sound_checkpoint_and_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "new" / "checkpoints")
    assert run.saver.finish() and run.saver.report() == (False, False)
    assert run.save(5)
    assert torch.equal(content_of(run.folder, 5), run.value)
    [told] = run.saved
    found = ckpt.find_newest(str(run.folder))
    assert found is not None and (told.step, told.uri, told.num_bytes) == (5, found.uri, found.num_bytes)
    assert 0 <= told.stall_s <= told.seconds and run.failed == []


def test_the_state_that_is_saved_is_that_of_its_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, kind=GatedSnapshot)
    run.snapshot.gate = threading.Event()
    expected = run.value.clone()
    run.start(5)
    run.value.fill_(-1.0)
    assert run.saver.report() == (False, False) and not ckpt.is_committed(str(run.place(5)))
    run.snapshot.gate.set()
    wait_until(lambda: run.saver.report() == (False, True))
    assert run.saver.finish()
    assert torch.equal(content_of(run.folder, 5), expected)


def test_the_next_save_waits_for_the_one_in_flight(tmp_path: Path) -> None:
    run = make_run(tmp_path, kind=GatedSnapshot)
    run.snapshot.gate = threading.Event()
    run.start(5)
    run.value.add_(1.0)
    second = threading.Thread(target=run.start, args=(6,), daemon=True)
    second.start()
    second.join(0.3)
    assert second.is_alive() and not run.place(6).exists()
    run.snapshot.gate.set()
    second.join(30)
    assert [saved.step for saved in run.saved] == [5]
    assert run.saver.finish() and [saved.step for saved in run.saved] == [5, 6]
    assert torch.equal(content_of(run.folder, 6), run.value)
    first = ckpt.read_commit(str(run.place(5)))
    ckpt.verify(first)
    assert torch.equal(first.read_full(ckpt.WEIGHT)["a"], run.value - 1.0)


def test_saves_after_the_first_take_no_more_memory(tmp_path: Path) -> None:
    run = make_run(tmp_path, numel=5_000_000)
    tracemalloc.start()
    try:
        assert run.save(1)
        held, _ = tracemalloc.get_traced_memory()
        assert run.snapshot.num_bytes <= held < 1.1 * run.snapshot.num_bytes
        tracemalloc.reset_peak()
        assert run.save(2) and run.save(3)
        assert tracemalloc.get_traced_memory()[1] < held + 0.1 * run.snapshot.num_bytes
    finally:
        tracemalloc.stop()
    assert torch.equal(content_of(run.folder, 3), run.value)


def test_failures_are_counted_until_a_save_succeeds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "checkpoints")
    run.folder.write_text("a file where the folder belongs")
    assert not run.save(1) and not run.save(2)
    assert not run.saver.finish()  # the last save is not complete
    run.folder.unlink()
    assert run.save(3) and run.saver.finish()
    run.place(4).write_text("in the way")
    assert not run.save(4)
    assert [(step, count) for step, _, count in run.failed] == [(1, 1), (2, 2), (4, 1)]
    assert all("NotADirectoryError" in reason or "FileExistsError" in reason for _, reason, _ in run.failed)
    assert [saved.step for saved in run.saved] == [3]
    assert torch.equal(content_of(run.folder, 3), run.value)


def test_too_many_failures_in_a_row_are_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "checkpoints", max_failures=2)
    run.folder.write_text("in the way")
    assert not run.save(1)
    run.start(2)
    with pytest.raises(EnvironmentFault, match="^2 saves in a row failed, the last with: .*max_failed_saves") as caught:
        run.saver.finish()
    assert caught.value.is_shared and "\n" not in str(caught.value)
    assert [count for _, _, count in run.failed] == [1, 2]
    run.saver.close()


def test_a_failed_save_is_told_in_the_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "checkpoints")
    run.folder.write_text("in the way")
    run.start(1)
    wait_until(lambda: run.saver.report() == (True, False))
    assert not run.saver.finish() and run.saver.report() == (False, False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("room", [0, 300_000])
def test_a_full_disk_fails_a_save_and_gets_its_room_back(small_disk: Path, room: int) -> None:
    """The disk is full already, or gets full while the file is written."""
    run = make_run(small_disk / "checkpoints", numel=200_000)
    assert run.save(1)
    used = bytes_used(small_disk)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes((2 << 20) - used - room))
    full = bytes_used(small_disk)
    for step in (2, 3):
        run.start(step)
        wait_until(lambda: run.saver.report() == (True, False))
        assert bytes_used(small_disk) == full  # at once, for what else is written there
        assert not run.saver.finish()
        assert bytes_used(small_disk) == full and not run.place(step).exists()
    assert all("No space left on device" in reason for _, reason, _ in run.failed)
    assert torch.equal(content_of(run.folder, 1), run.value)
    ballast.unlink()
    run.value.mul_(2.0)
    assert run.save(4)
    assert torch.equal(content_of(run.folder, 4), run.value)


def bytes_used(disk: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in disk.rglob("*") if path.is_file())


def refuse() -> None:
    raise EnvironmentFault("the folder is no longer ours")


def test_a_folder_that_is_no_longer_ours_is_neither_committed_nor_cleared(tmp_path: Path) -> None:
    run = make_run(tmp_path, guard=refuse)
    assert not run.save(5)
    assert not ckpt.is_committed(str(run.place(5)))
    assert (run.place(5) / "rank-00000.safetensors").stat().st_size == run.snapshot.num_bytes
    assert "no longer ours" in run.failed[0][1]


def test_nothing_is_committed_before_what_belongs_to_it_is_at_home(tmp_path: Path) -> None:
    run = make_run(tmp_path, before_commit=refuse)
    assert not run.save(5)
    assert not run.place(5).exists() and run.saved == []


def test_retention_sees_the_committed_step(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    seen: list[tuple[int, bool]] = []

    def after(step: int) -> None:
        seen.append((step, ckpt.is_committed(str(run.place(step)))))

    run.saver.start(progress_at(7, "run"), [Series(str(tmp_path), run.snapshot, after=after)])
    assert run.saver.finish() and seen == [(7, True)]


# -- of several ranks --------------------------------------------------------------------------------------------------


def write_as_other_rank(run: Run, step: int) -> None:
    """What rank 1 writes in the save in flight: an average."""
    first, other = run.place(step) / "rank-00000.json", run.place(step) / "rank-00001.json"
    wait_until(first.exists)
    snapshot = Snapshot([(Key(ckpt.EMA, "a", 0), run.value)])
    snapshot.take()
    digest = snapshot.write(str(other.with_suffix(".safetensors")))
    receipt = {**json.loads(first.read_text()), "bytes": snapshot.num_bytes, "sha256": digest}
    storage.write_bytes_atomic(str(other), json.dumps(receipt).encode())


def check_two_ranks(run: Run, step: int) -> None:
    assert torch.equal(content_of(run.folder, step), run.value)
    found = ckpt.find_newest(str(run.folder))
    assert found is not None and len(found.files) == 4
    assert torch.equal(found.read_full(ckpt.EMA)["a"], run.value)


def test_a_save_is_committed_when_every_rank_has_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, writers=2)
    run.start(5)
    wait_until((run.place(5) / "rank-00000.json").exists)
    assert run.saver.report() == (False, False)
    write_as_other_rank(run, 5)
    assert run.saver.finish()
    check_two_ranks(run, 5)


def test_close_lets_a_save_end_whose_other_ranks_are_still_writing(tmp_path: Path) -> None:
    run = make_run(tmp_path, writers=2)
    run.start(5)
    other = threading.Timer(0.3, write_as_other_rank, (run, 5))
    other.start()
    run.saver.close()
    other.join()
    check_two_ranks(run, 5)
    run.saver.close()


@pytest.mark.parametrize("is_there", [False, True])
def test_close_ends_where_the_receipt_of_another_rank_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    """That of an earlier attempt does not count."""
    monkeypatch.setattr(saving, "RECEIPT_LIMIT_S", 0.3)
    run = make_run(tmp_path, writers=2)
    if is_there:
        run.place(5).mkdir()
        stale = {"attempt": "session-0", "bytes": 1, "sha256": "0" * 64}
        (run.place(5) / "rank-00001.json").write_text(json.dumps(stale))
    run.start(5)
    closing = threading.Thread(target=run.saver.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive() and run.saver.report() == (False, False)
    assert (run.place(5) / "rank-00000.json").exists() and not ckpt.is_committed(str(run.place(5)))
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint-writer"]
