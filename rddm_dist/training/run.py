"""`train`: the one entry point, called by torchrun and by a Ray worker alike. Wires the rooms together."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from data_pipeline.errors import RddmError
from data_pipeline.loader import build_train_loader
from data_pipeline.rng import mix_seed
from rddm_dist import comm
from rddm_dist.comm import Topology
from rddm_dist.config import Config, identity_digest
from rddm_dist.factory import make_net, make_schedule
from rddm_dist.log import configure as configure_logging
from rddm_dist.model.weights import save_safetensors
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.ema import Ema, make_ema
from rddm_dist.training.engine import Engine
from rddm_dist.training.loop import Actions, run_loop
from rddm_dist.training.prepare import Prepared, prepare, write_identity
from rddm_dist.training.preview import Preview
from rddm_dist.training.reporting import JOURNAL_FILE, Reporting, open_reporting
from rddm_dist.training.stopping import StopFlag, clear_request

log = logging.getLogger(__name__)

EXPORT_FILE = "model.safetensors"
__all__ = ["EXPORT_FILE", "JOURNAL_FILE", "Hooks", "TrainResult", "completed_step", "train"]


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

    Raises UserError for bad input, TrainingFault for a non-finite loss; the same error on every worker.
    """
    hooks = hooks or Hooks()
    started = time.monotonic()
    prepared = prepare(config, world_size=topology.world_size)
    run_dir = prepared.run_dir
    configure_logging(run_dir / "logs" / f"rank-{topology.rank:05d}.log")
    _use_threads(config, topology)
    comm.initialize(topology)
    engine = make_engine(prepared, topology)
    ema = make_ema(engine.pieces)
    if comm.rank() == 0:
        write_identity(prepared)
        ckpt.sweep(run_dir / "checkpoints", keep_last=config.train.keep_last)
    step = resume(prepared, engine, ema)
    reporting = open_reporting(prepared, hooks.on_event, step=step, device=str(engine.device))
    stop = StopFlag(run_dir)
    status: Literal["done", "stopped"] = "done"
    failure: BaseException | None = None
    try:
        if step < config.train.steps:
            step, is_complete = _run(prepared, engine, ema, stop, reporting, first_step=step)
            status = "done" if is_complete else "stopped"
        if status == "done":
            _export(prepared, engine, ema, step, reporting)
        elif comm.rank() == 0:
            clear_request(run_dir)
        reporting.finished(status, step, stop.reason, seconds=time.monotonic() - started)
    except BaseException as error:
        failure = error
        raise
    finally:
        stop.close()
        reporting.close(status if failure is None else "failed")
    return TrainResult(status, step, str(run_dir))


def completed_step(prepared: Prepared) -> int:
    """The last step of a run that has nothing left to do, else 0."""
    if not prepared.is_continued or not (prepared.run_dir / EXPORT_FILE).is_file():
        return 0
    found = ckpt.find_newest(prepared.run_dir / "checkpoints")
    return found.progress.step if found and found.progress.step >= prepared.config.train.steps else 0


def make_engine(prepared: Prepared, topology: Topology) -> Engine:
    """The network, with weights that depend on the seed alone, under DeepSpeed."""
    config = prepared.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix_seed(config.train.seed, "init") % 2**63)
        net = make_net(config.model, activation_checkpointing=config.engine.activation_checkpointing)
    return Engine(net, engine=config.engine, optim=config.optim, plan=prepared.plan, topology=topology)


def resume(prepared: Prepared, engine: Engine, ema: Ema) -> int:
    """Load the newest sound checkpoint on every worker.   -> the step to go on from, 0 for a new run"""
    found: ckpt.Checkpoint | None = None
    error: RddmError | None = None
    try:
        found = ckpt.find_newest(prepared.run_dir / "checkpoints") if comm.rank() == 0 else None
    except RddmError as problem:
        error = problem
    comm.raise_together(error)
    found = comm.broadcast_object(found)
    if found is None:
        return 0
    try:
        ckpt.load_checkpoint(found, engine, ema)
    except RddmError as problem:
        error = problem
    comm.raise_together(error)
    log.info("resumed from %s at step %d", found.path, found.progress.step)
    return found.progress.step


def _use_threads(config: Config, topology: Topology) -> None:
    """Share a node's cores among its workers, so that they do not fight for them."""
    shared = max(1, (os.cpu_count() or 1) // topology.local_world_size)
    torch.set_num_threads(config.engine.threads or shared)


def _run(
    prepared: Prepared, engine: Engine, ema: Ema, stop: StopFlag, reporting: Reporting, *, first_step: int
) -> tuple[int, bool]:
    config, plan = prepared.config, prepared.plan
    schedule = make_schedule(config.diffusion).to(engine.device)
    checkpoints = prepared.run_dir / "checkpoints"
    preview = Preview(prepared) if config.sample.every and comm.rank() == 0 else None

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
            ckpt.sweep(checkpoints, keep_last=config.train.keep_last)
            reporting.saved(step, path)

    def show(step: int) -> dict[str, float]:
        state = ckpt.gather_full(ema.as_pieces(), engine.shapes)
        if state is None or preview is None:
            return {}
        metrics, grid = preview.make(state)
        reporting.preview(step, grid)
        return metrics

    loader = build_train_loader(
        config.data.uri,
        prepared.manifest,
        seed=config.train.seed,
        global_batch=plan.global_batch,
        lanes=prepared.lanes,
        rank=comm.rank(),
        world_size=plan.world_size,
        rows_per_rank=plan.rows_per_rank,
        start_step=first_step,
        crop=config.data.crop,
        flip=config.data.flip,
        threads=config.data.threads,
        prefetch_batches=config.data.prefetch_batches,
    )
    try:
        return run_loop(
            config,
            engine=engine,
            ema=ema,
            schedule=schedule,
            batches=loader,
            stop=stop,
            actions=Actions(log=reporting.metrics, preview=show, save=save),
        )
    finally:
        loader.close()


def _export(prepared: Prepared, engine: Engine, ema: Ema, step: int, reporting: Reporting) -> Path | None:
    """Write the EMA weights with their config as `<run>/model.safetensors`, the form that leaves the run folder."""
    state = ckpt.gather_full(ema.as_pieces(), engine.shapes)
    if state is None:
        return None
    path = prepared.run_dir / EXPORT_FILE
    extra = {"step": str(step), "data_fingerprint": prepared.data_fingerprint, "run": prepared.config.run.name}
    save_safetensors(path, state, config=prepared.config.model_dump(mode="json"), extra=extra)
    reporting.exported(path)
    return path
