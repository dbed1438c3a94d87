"""What rank 0 tells the world about a run: the journal first, then MLflow, previews and the caller."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from rddm_dist import comm
from rddm_dist.config import identity_digest, iter_keys
from rddm_dist.tracking.journal import Journal
from rddm_dist.training.folder import CONFIG_FILE, JOURNAL_FILE, JournalMirror, try_sending
from rddm_dist.training.prepare import Prepared
from rddm_dist.training.retention import read_scores
from rddm_dist.training.saving import Saved

if TYPE_CHECKING:
    from rddm_dist.tracking.mlflow_tracker import MlflowTracker

log = logging.getLogger(__name__)

EventHandler = Callable[[dict[str, Any]], None]


class Reporting:
    """On rank 0 everything goes to the journal and from there on; on other ranks every method does nothing.

    scores: step -> value of train.best_metric, over all starts of the run.
    """

    def __init__(self, prepared: Prepared, on_event: EventHandler) -> None:
        self._prepared, self._on_event = prepared, on_event
        self._journal: Journal | None = None
        self._tracker: MlflowTracker | None = None
        self._mirror: JournalMirror | None = None
        self.scores: dict[int, float] = {}
        if comm.rank() == 0:
            path = prepared.run_dir / JOURNAL_FILE
            self._mirror = JournalMirror(prepared.folder)
            self._mirror.restore()
            self._journal = Journal(path)
            self.scores = read_scores(path, prepared.config.train.best_metric)

    def track_with(self, tracker: MlflowTracker) -> None:
        self._tracker = tracker

    def event(self, name: str, **values: Any) -> None:
        """Append one record to the journal and hand it to the caller."""
        if self._journal is None:
            return
        record = {"time": time.time(), "event": name, **values}
        self._journal.append(record)
        self._on_event(record)

    def metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if metrics:
            best = self._prepared.config.train.best_metric
            if best in metrics:
                self.scores[step] = float(metrics[best])
            samples = step * self._prepared.config.train.global_batch
            self.event("metrics", step=step, samples_seen=samples, metrics=metrics)

    def preview(self, step: int, grid: Image.Image) -> None:
        """Keep a grid of restored images."""
        path = self._prepared.run_dir / "samples" / f"step-{step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            grid.save(path)
        except OSError as error:
            log.warning("the preview of step %d could not be kept: %s", step, error)
            return
        self.event("preview", step=step, path=str(path))
        self._artifact(path, "samples")
        if self._mirror is not None:
            self._mirror.add(f"{path.parent.name}/{path.name}")

    def saved(self, saved: Saved) -> None:
        """A checkpoint is committed.   stall_s: what the steps waited for; seconds: until it was on the storage"""
        self.event(
            "saved",
            step=saved.step,
            path=saved.uri,
            bytes=saved.num_bytes,
            stall_s=round(saved.stall_s, 4),
            seconds=round(saved.seconds, 3),
        )

    def save_failed(self, step: int, reason: str, failures: int, *, limit: int) -> None:
        """A save came to nothing; training goes on until `limit` of them have failed in a row."""
        log.warning("SAVING step %d FAILED (%d of %d in a row): %s", step, failures, limit, reason)
        self.event("save_failed", step=step, reason=reason, failures=failures, limit=limit)

    def send(self) -> None:
        """Bring home what has grown in the work folder of a run at a URL. From one thread at a time."""
        if self._mirror is not None:
            self._mirror.send()

    def configured(self) -> None:
        self._artifact(self._prepared.run_dir / CONFIG_FILE, "config")

    def exported(self, path: Path) -> None:
        self._artifact(path, "model")

    def finished(self, status: str, step: int, reason: str, *, seconds: float) -> None:
        self.event("finished", status=status, step=step, reason=reason, seconds=round(seconds, 3))

    def close(self, status: str, *, is_ours: bool) -> None:
        """Flush and close; `status` is done, stopped or failed. is_ours: whether the run folder still is this run's."""
        if self._journal is not None:
            self._journal.close()
        if self._tracker is not None:
            self._tracker.close({"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[status])
        if self._mirror is not None and is_ours:
            try_sending("sending the journal", self._mirror.send)
            if status == "done":
                try_sending("sending the journal", lambda: self._prepared.folder.send(JOURNAL_FILE))

    def _artifact(self, path: Path, folder: str) -> None:
        if self._tracker is not None:
            self._tracker.log_artifact(path, folder)


def open_reporting(
    prepared: Prepared,
    on_event: EventHandler,
    *,
    step: int,
    device: str,
    skipped: Sequence[str],
    is_searching: bool,
) -> Reporting:
    """Open the MLflow run and the journal, and write down how the run starts or continues.

    All ranks call it; they fail together when tracking is away. `skipped`: damaged checkpoints that were passed over;
    `is_searching`: `step` counts steps of the search for the objective.
    """
    with comm.together():
        reporting = Reporting(prepared, on_event)
        if comm.rank() == 0 and prepared.config.tracking.backend == "mlflow":
            reporting.track_with(_start_tracker(prepared))
    reporting.event(
        "resumed" if step else "started",
        phase="search" if is_searching else "train",
        step=step,
        steps=prepared.config.train.steps,
        world_size=prepared.plan.world_size,
        device=device,
        plan=prepared.plan.describe(),
        changes=list(prepared.changes),
        skipped=list(skipped),
    )
    return reporting


def catch_up(prepared: Prepared) -> bool:
    """Send MLflow what an outage kept from it, for a run with nothing else to do.   -> whether there was anything"""
    from rddm_dist.tracking.mlflow_tracker import is_behind

    if prepared.config.tracking.backend != "mlflow" or not is_behind(prepared.run_dir, prepared.run_dir / JOURNAL_FILE):
        return False
    _start_tracker(prepared).close("FINISHED")
    return True


def _start_tracker(prepared: Prepared) -> MlflowTracker:
    from rddm_dist.tracking.mlflow_tracker import MlflowTracker, default_uri

    config = prepared.config
    origin = {"rddm.init_weights": prepared.init_weights} if prepared.init_weights else {}
    if config.tracking.parent:
        origin["mlflow.parentRunId"] = config.tracking.parent
    tracker = MlflowTracker(
        prepared.run_dir,
        uri=config.tracking.uri or default_uri(config.run.storage),
        experiment=config.tracking.experiment,
        run_name=config.run.name,
    )
    tracker.start(
        params={name: value for name, _, value in iter_keys(config)},
        tags={
            "rddm.data_fingerprint": prepared.data_fingerprint,
            "rddm.data_uri": ", ".join(config.data.uris),
            "rddm.config_digest": identity_digest(config),
            "rddm.run_dir": prepared.home,
            "rddm.batch_plan": prepared.plan.describe(),
            **origin,
        },
        journal=prepared.run_dir / JOURNAL_FILE,
        dataset=(", ".join(config.data.uris), prepared.data_fingerprint),
    )
    return tracker
