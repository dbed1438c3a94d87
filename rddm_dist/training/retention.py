"""Which checkpoints of a run are kept, and the removal of the others."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import EnvironmentFault
from data_pipeline.retry import DEFAULT_RETRY, RetryPolicy
from rddm_dist.config import TrainSection
from rddm_dist.tracking.journal import read_journal
from rddm_dist.training import checkpoint as ckpt

log = logging.getLogger(__name__)

BEST_IS_LOWEST = {"train/loss"}


@dataclass(frozen=True)
class Retention:
    """keep_last: the newest; keep_every: every so many steps, 0: none; keep_best: those with the best values of a
    metric, 0: none; metric: its name."""

    keep_last: int
    keep_every: int = 0
    keep_best: int = 0
    metric: str = ""

    def kept(self, steps: Collection[int], scores: Mapping[int, float]) -> dict[int, str]:
        """Of the steps with a checkpoint those that stay, each with the reason: "last", "every", "best" or several.

        scores: step -> value of the metric. Of equal values the earlier step is the better one.
        """
        reasons: dict[int, list[str]] = {}
        for step in sorted(steps)[-self.keep_last :]:
            reasons.setdefault(step, []).append("last")
        for step in steps:
            if self.keep_every and step % self.keep_every == 0:
                reasons.setdefault(step, []).append("every")
        for step in self.best(steps, scores):
            reasons.setdefault(step, []).append("best")
        return {step: " ".join(reasons[step]) for step in sorted(reasons)}

    def best(self, steps: Collection[int], scores: Mapping[int, float]) -> list[int]:
        """The steps that keep_best keeps, the best first; those without a value, or with nan, are no candidates."""
        sign = 1.0 if self.metric in BEST_IS_LOWEST else -1.0
        values = [(sign * scores[step], step) for step in steps if step in scores]
        candidates = sorted(value for value in values if not math.isnan(value[0]))
        return [step for _, step in candidates[: self.keep_best]]


def retention_of(train: TrainSection) -> Retention:
    return Retention(train.keep_last, train.keep_every, train.keep_best, train.best_metric)


def read_scores(journal: Path, metric: str) -> dict[int, float]:
    """Step -> value of a metric, as a run's journal has it; the last word counts."""
    return scores_in(read_journal(journal), metric)


def scores_in(records: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """`read_scores` of records that are read already."""
    return {
        int(record["step"]): float(record["metrics"][metric])
        for record in records
        if metric in record.get("metrics", {})
    }


def sweep(
    folder: str,
    retention: Retention,
    *,
    newest: int,
    scores: Mapping[int, float] | None = None,
    retry: RetryPolicy = DEFAULT_RETRY,
) -> list[int]:
    """Delete what is not committed, what is newer than step `newest` (the last one known to be sound) and what the
    retention does not keep.   -> the steps that are left

    For the run's owner only. What cannot be deleted stays, with a warning.
    """
    try:
        steps = ckpt.list_steps(folder, retry=retry)
        committed = [s for s in steps if s <= newest and ckpt.is_committed(ckpt.step_folder(folder, s), retry=retry)]
    except (OSError, EnvironmentFault) as error:
        log.warning("cannot clear %s of old checkpoints: %s", folder, error)
        return []
    kept = retention.kept(committed, scores or {})
    for step in steps:
        if step not in kept:
            _try_removing(ckpt.step_folder(folder, step), retry)
    return list(kept)


def _try_removing(uri: str, retry: RetryPolicy) -> None:
    try:
        ckpt.remove(uri, retry=retry)
    except (OSError, EnvironmentFault) as error:
        log.warning("cannot remove %s: %s", uri, error)


def drop(folder: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> None:
    """Delete a whole row of checkpoints. What cannot be deleted stays, with a warning."""
    try:
        for step in ckpt.list_steps(folder, retry=retry):
            ckpt.remove(ckpt.step_folder(folder, step), retry=retry)
        if storage.is_local(folder) and storage.exists(folder):
            storage.local_path(folder).rmdir()
    except (OSError, EnvironmentFault) as error:
        log.warning("cannot remove %s: %s", folder, error)
