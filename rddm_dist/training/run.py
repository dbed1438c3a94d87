"""`train`: the one entry point, called by torchrun and by a Ray worker alike. Wires the rooms together."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from data_pipeline.batch import Replaced
from data_pipeline.errors import ModelError
from data_pipeline.rng import mix_seed
from rddm_dist import comm
from rddm_dist.comm import Topology
from rddm_dist.config import Config, identity_digest
from rddm_dist.factory import make_net, make_schedule
from rddm_dist.log import configure as configure_logging
from rddm_dist.model.weights import save_safetensors
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.data import open_loader
from rddm_dist.training.ema import Ema, make_ema
from rddm_dist.training.engine import Engine
from rddm_dist.training.loop import Actions, run_loop
from rddm_dist.training.prepare import Prepared, make_run_dir, prepare, run_dir_of, write_identity
from rddm_dist.training.preview import Preview
from rddm_dist.training.quarantine import Quarantine
from rddm_dist.training.reporting import Reporting, open_reporting
from rddm_dist.training.stopping import StopFlag, clear_request

log = logging.getLogger(__name__)

EXPORT_FILE = "model.safetensors"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. exit_code: 0 complete, 75 stopped and resumable by the same command."""

    status: Literal["done", "stopped"]
    step: int
    run_dir: str

    @property
    def exit_code(self) -> int:
        return 0 if self.status == "done" else 75


@dataclass(frozen=True)
class Hooks:
    """What the caller wants to hear, on rank 0: one dict per event (started, resumed, metrics, saved, finished)."""

    on_event: Callable[[dict[str, Any]], None] = lambda event: None


def train(config: Config, topology: Topology, hooks: Hooks | None = None) -> TrainResult:
    """Train until `train.steps`, or until a stop request, on this process's share of the workers.

    Every worker calls it with the same config. The run folder `<run.storage>/<run.name>` is continued when it exists.

    Raises UserError for bad input and TrainingFault for a non-finite loss. What is found while setting up, saving or
    loading is raised on every worker (`error.is_shared`); what one worker meets in between, such as a shard that is
    gone, on that one alone, and the launcher ends the others.
    """
    hooks = hooks or Hooks()
    started = time.monotonic()
    stop = StopFlag(run_dir_of(config))
    try:
        comm.initialize(topology)
        with comm.together():
            prepared = prepare(config, world_size=topology.world_size)
            make_run_dir(prepared)
            configure_logging(prepared.run_dir / "logs" / f"rank-{topology.rank:05d}.log")
        _use_threads(config, topology)
        engine = make_engine(prepared, topology)
        ema = make_ema(engine.pieces)
        step, skipped = resume(prepared, engine, ema)
        reporting = open_reporting(prepared, hooks.on_event, step=step, device=str(engine.device), skipped=skipped)
        status = "failed"
        try:
            _settle(prepared, step)
            reporting.configured()
            step, status = _run(prepared, engine, ema, stop, reporting, first_step=step)
            reasons = comm.gather_object(stop.reason if status == "stopped" else "") or [""]
            reporting.finished(status, step, max(reasons, key=len), seconds=time.monotonic() - started)
        finally:
            reporting.close(status)
        engine.close()
        # A launcher that sees one worker gone may signal the others: nobody leaves before all are through.
        comm.meet()
    finally:
        stop.close()
    return TrainResult("done" if status == "done" else "stopped", step, str(prepared.run_dir))


def completed_step(prepared: Prepared) -> int:
    """The last step of a run that has nothing left to do, else 0."""
    if not prepared.is_continued or not (prepared.run_dir / EXPORT_FILE).is_file():
        return 0
    found = ckpt.find_newest(prepared.run_dir / "checkpoints")
    return found.progress.step if found and found.progress.step >= prepared.config.train.steps else 0


def _settle(prepared: Prepared, step: int) -> None:
    """Rank 0 makes the folder a run and clears what an earlier start left in it."""
    with comm.together():
        if comm.rank() == 0:
            write_identity(prepared)
            ckpt.sweep(prepared.run_dir / "checkpoints", newest=step, keep_last=prepared.config.train.keep_last)
            if step < prepared.config.train.steps:
                # The export of a shorter run is not this run's.
                (prepared.run_dir / EXPORT_FILE).unlink(missing_ok=True)


def make_engine(prepared: Prepared, topology: Topology) -> Engine:
    """The network, with weights that depend on the seed alone, under DeepSpeed."""
    config = prepared.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix_seed(config.train.seed, "init") % 2**63)
        net = make_net(config, activation_checkpointing=config.engine.activation_checkpointing)
    return Engine(net, engine=config.engine, optim=config.optim, plan=prepared.plan, topology=topology)


def resume(prepared: Prepared, engine: Engine, ema: Ema) -> tuple[int, list[str]]:
    """Load the newest sound checkpoint on every worker.

    -> the step to go on from, 0 for a new run; and, on rank 0, what was skipped on the way to it
    """
    found: ckpt.Checkpoint | None = None
    skipped: list[str] = []
    with comm.together():
        if comm.rank() == 0:
            found = ckpt.find_newest(prepared.run_dir / "checkpoints", skipped=skipped)
            if found is not None and found.progress.config_digest != identity_digest(prepared.config):
                raise ModelError(f"checkpoint {found.path} was written with other settings than config.yaml says")
    found = comm.broadcast_object(found)
    if found is None:
        return 0, []
    ckpt.load_checkpoint(found, engine, ema)
    progress = found.progress
    log.info(
        "resumed from %s at step %d, written by %d worker(s) at ZeRO stage %d",
        found.path,
        progress.step,
        progress.world_size,
        progress.zero_stage,
    )
    return progress.step, skipped


def _use_threads(config: Config, topology: Topology) -> None:
    """Share a node's cores among its workers, so that they do not fight for them."""
    shared = max(1, len(os.sched_getaffinity(0)) // topology.local_world_size)
    torch.set_num_threads(config.engine.threads or shared)


def _run(
    prepared: Prepared, engine: Engine, ema: Ema, stop: StopFlag, reporting: Reporting, *, first_step: int
) -> tuple[int, Literal["done", "stopped"]]:
    """Train from `first_step` to the end or a stop.   -> (last finished step, how it ended)"""
    config, plan = prepared.config, prepared.plan
    if first_step >= config.train.steps:
        _export(prepared, engine, ema, first_step, reporting)
        return first_step, "done"
    schedule = make_schedule(config.diffusion).to(engine.device)
    with comm.together():
        loader = open_loader(config, prepared.data, plan, rank=comm.rank(), start_step=first_step)
    try:
        step, is_complete = run_loop(
            config,
            engine=engine,
            ema=ema,
            schedule=schedule,
            batches=loader,
            stop=stop,
            actions=_make_actions(prepared, engine, ema, reporting),
        )
    finally:
        loader.close()
    if is_complete:
        _export(prepared, engine, ema, step, reporting)
        return step, "done"
    if comm.rank() == 0:
        clear_request(prepared.run_dir)
    return step, "stopped"


def _make_actions(prepared: Prepared, engine: Engine, ema: Ema, reporting: Reporting) -> Actions:
    """What the loop does on log, preview and save steps."""
    config, plan = prepared.config, prepared.plan
    checkpoints = prepared.run_dir / "checkpoints"
    preview = None
    with comm.together():
        if config.sample.every and comm.rank() == 0:
            preview = Preview(prepared)
    quarantine = Quarantine(prepared)

    def save(step: int) -> None:
        progress = ckpt.Progress(
            step=step,
            position=step * plan.global_batch,
            optimizer_step=engine.optimizer_step,
            config_digest=identity_digest(config),
            data_fingerprint=prepared.data_fingerprint,
            world_size=plan.world_size,
            zero_stage=engine.stage,
        )
        path = ckpt.save_checkpoint(checkpoints, engine, ema, progress)
        if comm.rank() == 0:
            ckpt.sweep(checkpoints, newest=step, keep_last=config.train.keep_last)
            reporting.saved(step, path)

    def show(step: int) -> dict[str, float]:
        state = ckpt.gather_full(ema.as_pieces(), engine.shapes)
        if state is None or preview is None:
            return {}
        metrics, grid = preview.make(state)
        reporting.preview(step, grid)
        return metrics

    def isolate(step: int, replaced: Sequence[Replaced]) -> tuple[int, str]:
        quarantine.record(step, replaced)
        return quarantine.count, quarantine.excess

    return Actions(log=reporting.metrics, preview=show, save=save, quarantine=isolate)


def _export(prepared: Prepared, engine: Engine, ema: Ema, step: int, reporting: Reporting) -> None:
    """Write the EMA weights with their config as `<run>/model.safetensors`, the form that leaves the run folder."""
    state = ckpt.gather_full(ema.as_pieces(), engine.shapes)
    path = prepared.run_dir / EXPORT_FILE
    extra = {"step": str(step), "data_fingerprint": prepared.data_fingerprint, "run": prepared.config.run.name}
    with comm.together():
        if state is not None:
            save_safetensors(path, state, config=prepared.config.model_dump(mode="json"), extra=extra)
    reporting.exported(path)
