"""Which checkpoints stay: the newest, every n-th, the best; and what the sweep deletes."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import pytest

from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.retention import Retention, drop, read_scores, sweep
from tests.support.saved import drawn, leave_unfinished, save

STEPS = tuple(range(10, 101, 10))
ALL = Retention(10**9)


def commit(folder: Path, *steps: int) -> None:
    for step in steps:
        save(folder, step, {"weight": drawn(step, {"a": (3,)})})


def there(folder: Path) -> list[int]:
    return ckpt.list_steps(str(folder))[::-1]


def test_each_rule_keeps_what_it_names_and_says_so() -> None:
    scores = {step: float(-abs(step - 30)) for step in STEPS}
    kept = Retention(2, keep_every=50, keep_best=2, metric="preview/psnr").kept(STEPS, scores)
    assert kept == {20: "best", 30: "best", 50: "every", 90: "last", 100: "last every"}


@pytest.mark.parametrize("order", [STEPS, STEPS[::-1], (50, 10, 100, 20, 90, 30, 80, 40, 70, 60)])
def test_the_order_of_the_steps_does_not_matter(order: tuple[int, ...]) -> None:
    retention = Retention(3, keep_every=40, keep_best=1, metric="preview/psnr")
    assert retention.kept(order, {10: 1.0}) == {
        10: "best", 40: "every", 80: "last every", 90: "last", 100: "last"
    }  # fmt: skip


@pytest.mark.parametrize("keep_last", [1, 2, 5])
@pytest.mark.parametrize("keep_every", [0, 30])
@pytest.mark.parametrize("keep_best", [0, 1, 3])
def test_pruning_after_each_save_keeps_what_pruning_at_the_end_keeps(
    keep_last: int, keep_every: int, keep_best: int
) -> None:
    """So a run may prune as it goes: nothing that would be kept later is gone; and the newest is never missing."""
    retention = Retention(keep_last, keep_every, keep_best, "train/loss")
    scores = {step: float(step * 7 % 50) for step in STEPS}
    left: list[int] = []
    for step in STEPS:
        left = list(retention.kept([*left, step], scores))
        assert left[-1] == step
    assert left == list(retention.kept(STEPS, scores))


def test_a_loss_is_best_when_it_is_low_and_a_psnr_when_it_is_high() -> None:
    scores = {10: 1.0, 20: 3.0, 30: 2.0}
    assert Retention(1, keep_best=2, metric="train/loss").best(STEPS, scores) == [10, 30]
    assert Retention(1, keep_best=2, metric="preview/psnr").best(STEPS, scores) == [20, 30]


def test_of_equal_values_the_earlier_step_is_the_better_one() -> None:
    for metric in ("train/loss", "preview/psnr"):
        assert Retention(1, keep_best=2, metric=metric).best(STEPS, dict.fromkeys(STEPS, 5.0)) == [10, 20]


def test_steps_without_a_value_are_no_candidates_and_neither_are_values_without_a_checkpoint() -> None:
    assert Retention(1, keep_best=3, metric="train/loss").best((10, 20, 30), {20: 1.0, 25: 0.0}) == [20]


@pytest.mark.parametrize("order", list(itertools.permutations((10, 20, 30))))
def test_a_value_that_is_no_number_is_never_the_best(order: tuple[int, ...]) -> None:
    for metric, best in (("train/loss", [20, 10]), ("preview/psnr", [10, 20])):
        scores = {10: float("inf"), 20: 1.0, 30: float("nan")}
        assert Retention(1, keep_best=3, metric=metric).best(order, scores) == best


def test_the_journal_gives_the_scores_and_its_last_word_counts(tmp_path: Path) -> None:
    journal = tmp_path / "metrics.jsonl"
    assert read_scores(journal, "preview/psnr") == {}
    records = [
        {"event": "started", "step": 0},
        {"event": "metrics", "step": 10, "metrics": {"preview/psnr": 20.0}},
        {"event": "metrics", "step": 10, "metrics": {"train/loss": 1.0}},
        {"event": "metrics", "step": 10, "metrics": {"preview/psnr": 21.5}},
        {"event": "metrics", "step": 20, "metrics": {"preview/psnr": "inf"}},
    ]
    journal.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"event": "met')
    assert read_scores(journal, "preview/psnr") == {10: 21.5, 20: float("inf")}
    assert read_scores(journal, "train/loss") == {10: 1.0}


def test_a_sweep_leaves_the_kept_ones_alone(tmp_path: Path) -> None:
    commit(tmp_path, 10, 20, 30, 40)
    scores = {10: 3.0, 20: 1.0, 30: 2.0, 40: 0.5}
    retention = Retention(1, keep_best=1, metric="preview/psnr")
    assert sweep(str(tmp_path), retention, newest=40, scores=scores) == [10, 40] == there(tmp_path)
    for step in (10, 40):
        ckpt.verify(ckpt.read_commit(ckpt.step_folder(str(tmp_path), step)))


def test_a_sweep_deletes_leftovers_and_what_is_newer_than_the_newest_sound_one(tmp_path: Path) -> None:
    commit(tmp_path, 10, 20, 30)
    leave_unfinished(tmp_path, 15)
    leave_unfinished(tmp_path, 40)
    (tmp_path / "notes.txt").write_text("mine")
    assert sweep(str(tmp_path), ALL, newest=20) == [10, 20] == there(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000010", "step-00000020"]


def test_leftovers_take_no_place_of_the_newest(tmp_path: Path) -> None:
    commit(tmp_path, 10, 20)
    leave_unfinished(tmp_path, 15)
    assert sweep(str(tmp_path), Retention(2), newest=20) == [10, 20]


def test_what_cannot_be_deleted_stays_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    commit(tmp_path, 5, 10, 20)
    (tmp_path / "step-00000010" / "folder").mkdir()
    with caplog.at_level(logging.WARNING):
        assert sweep(str(tmp_path), Retention(1), newest=20) == [20]
        drop(str(tmp_path / "absent"))
    [record] = caplog.records
    assert f"cannot remove {tmp_path}/step-00000010" in record.getMessage()
    assert there(tmp_path) == [10, 20], "one that cannot be deleted is in nobody's way"
    assert not ckpt.is_committed(ckpt.step_folder(str(tmp_path), 10)), "half deleted, it is not taken for one"
    assert [found.progress.step for found in ckpt.iter_committed(str(tmp_path), pytest.fail)] == [20]


def test_a_dropped_row_is_gone(tmp_path: Path) -> None:
    commit(tmp_path / "search", 10, 20)
    leave_unfinished(tmp_path / "search", 30)
    drop(str(tmp_path / "search"))
    assert not list(tmp_path.iterdir())
