"""What of a run's state is saved, when, where, and which of it is kept."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from functools import partial

from data_pipeline.errors import EnvironmentFault
from data_pipeline.retry import RetryPolicy
from rddm_dist import comm
from rddm_dist.config import identity_digest
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.ema import Ema
from rddm_dist.training.engine import Engine
from rddm_dist.training.fragments import Snapshot
from rddm_dist.training.ownership import Ownership
from rddm_dist.training.prepare import Prepared
from rddm_dist.training.reporting import Reporting
from rddm_dist.training.retention import retention_of, sweep
from rddm_dist.training.saving import Saver, Series
from rddm_dist.training.selection import Selection
from rddm_dist.training.step import StepResult, Word

RETRY = RetryPolicy(deadline_s=120.0)
RETRY_PAUSE_S = 2.0  # before the last save of a run is tried again


class Keeper:
    """Saves a phase of a run: checkpoints in `<run>/<folder>`, and snapshots of the power-function averages.

    selection: what a checkpoint of a step says of the search for the objective; owner: of the run folder, on rank 0.
    All ranks call the same methods at the same steps.
    """

    def __init__(
        self,
        prepared: Prepared,
        engine: Engine,
        ema: Ema,
        *,
        folder: str,
        selection: Callable[[int], Selection | None],
        owner: Ownership | None,
        reporting: Reporting,
    ) -> None:
        self._prepared, self._engine, self._selection, self._owner = prepared, engine, selection, owner
        self._reporting = reporting
        is_writer = comm.rank() == 0 or not engine.is_replicated
        lengths = [profile.kind for profile in ema.profiles if profile.kind != ckpt.EMA]
        self._checkpoints = Series(
            prepared.folder.uri(folder),
            Snapshot(ckpt.sources(engine.pieces, ema)) if is_writer else None,
            after=self.prune,
        )
        self._averages = Series(
            prepared.folder.uri(ckpt.AVERAGES), Snapshot(ckpt.averages(ema, lengths)) if is_writer else None
        )
        self._saver = Saver(
            shapes=engine.shapes,
            session=comm.broadcast_object(uuid.uuid4().hex),
            writers=1 if engine.is_replicated else comm.world_size(),
            max_failures=prepared.config.train.max_failed_saves,
            retry=RETRY,
            guard=self._check_owner,
            before_commit=reporting.send,
            on_saved=reporting.saved,
            on_failed=partial(reporting.save_failed, limit=prepared.config.train.max_failed_saves),
        )

    def word(self, *, wants_stop: bool) -> Word:
        """What this worker tells the others in a step."""
        has_failed, is_committed = self._saver.report()
        return Word(wants_stop, has_failed, is_committed, bool(self._owner and self._owner.lost))

    def settle(self, result: StepResult) -> None:
        """Act on what all have told.

        Raises EnvironmentFault on every worker where the folder has another owner, or too many saves failed in a row.
        """
        if result.has_lost_folder:
            error = EnvironmentFault(
                f"{self._prepared.home} is no longer this run's "
                f"({comm.broadcast_object(self._owner.lost if self._owner else None)}); it has stopped"
            )
            error.is_shared = True
            raise error
        if result.has_failed_save or result.has_committed:
            self._saver.finish()

    def save(self, step: int, *, is_forced: bool = False) -> None:
        """Begin to save what is due at a step; a checkpoint in any case when it is forced."""
        config = self._prepared.config
        series = []
        if is_forced or step % config.train.checkpoint_every == 0:
            series.append(self._checkpoints)
        if config.ema.snapshot_every and step % config.ema.snapshot_every == 0 and self._is_training:
            series.append(self._averages)
        if series:
            self._saver.start(self._progress(step), series)

    def save_last(self, step: int) -> None:
        """Save a checkpoint that nothing comes after: it is tried again until it is done or too many have failed."""
        self.save(step, is_forced=True)
        while not self._saver.finish():
            time.sleep(RETRY_PAUSE_S)
            self.save(step, is_forced=True)

    def finish(self) -> None:
        """Wait for the save in flight."""
        self._saver.finish()

    def close(self) -> None:
        """End the writing thread, also where the other workers are gone."""
        self._saver.close()

    @property
    def _is_training(self) -> bool:
        return self._checkpoints.folder.endswith(ckpt.CHECKPOINTS)

    def _progress(self, step: int) -> ckpt.Progress:
        prepared, engine = self._prepared, self._engine
        return ckpt.Progress(
            step=step,
            position=step * engine.plan.global_batch,
            optimizer_step=engine.optimizer_step,
            config_digest=identity_digest(prepared.config),
            data_fingerprint=prepared.data_fingerprint,
            world_size=engine.plan.world_size,
            zero_stage=engine.stage,
            loss_scaler=engine.loss_scaler,
            selection=self._selection(step),
        )

    def _check_owner(self) -> None:
        if self._owner is not None:
            self._owner.check()

    def prune(self, step: int) -> None:
        """Remove what the newest checkpoint, that of `step`, and the scores known by now make dispensable. Rank 0."""
        if comm.rank() != 0:
            return
        retention = retention_of(self._prepared.config.train)
        sweep(self._checkpoints.folder, retention, newest=step, scores=self._reporting.scores, retry=RETRY)
