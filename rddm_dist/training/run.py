"""`train`: the one entry point, called by torchrun and by a Ray worker alike. Wires the rooms together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from data_pipeline.batch import Batch
from data_pipeline.errors import EnvironmentFault
from rddm_dist import comm
from rddm_dist.comm import Topology
from rddm_dist.config import Config
from rddm_dist.factory import make_schedule
from rddm_dist.log import configure as configure_logging
from rddm_dist.model.weights import save_safetensors
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.data import open_loader
from rddm_dist.training.ema import Ema, make_ema, profiles
from rddm_dist.training.engine import Engine
from rddm_dist.training.folder import RETRY, RunFolder, run_folder, try_sending
from rddm_dist.training.keeper import Keeper
from rddm_dist.training.loop import Actions, Names, run_loop
from rddm_dist.training.ownership import Ownership, take
from rddm_dist.training.prepare import Prepared, look_again, make_run_dir, prepare, write_identity
from rddm_dist.training.preview import Preview
from rddm_dist.training.quarantine import Quarantine
from rddm_dist.training.reporting import Reporting, open_reporting
from rddm_dist.training.retention import Retention, drop, sweep
from rddm_dist.training.search import Search
from rddm_dist.training.selection import SEARCH_DIR, Selection, with_outcome, write_selection
from rddm_dist.training.state import Start, check_room, check_same_init, draw_net, find_start, load_init, load_state
from rddm_dist.training.step import StepResult, Word, measures, train_step
from rddm_dist.training.stopping import StopFlag, clear_request, forget_earlier_request, stopped_for_good

EXPORT_FILE = "model.safetensors"
EVERYTHING = Retention(keep_last=10**9)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. exit_code: 0 complete, 75 stopped and resumable by the same command; run_dir: path or URL."""

    status: Literal["done", "stopped"]
    step: int
    run_dir: str

    @property
    def exit_code(self) -> int:
        return 0 if self.status == "done" else 75


@dataclass(frozen=True)
class Training:
    """The training phase of a run, ready to go on from `first_step`.

    config: that of the run, with the objective that a search has found; selection: what that was, None without one.
    """

    prepared: Prepared
    config: Config
    engine: Engine
    ema: Ema
    selection: Selection | None
    first_step: int


@dataclass(frozen=True)
class Hooks:
    """What the caller wants to hear, on rank 0: one dict per event (started, resumed, metrics,
    preview, saved, selected, finished)."""

    on_event: Callable[[dict[str, Any]], None] = lambda event: None


def train(
    config: Config, topology: Topology, hooks: Hooks | None = None, *, forgets_request: bool = False
) -> TrainResult:
    """Train until `train.steps`, or until a stop request, on this process's share of the workers.

    Every worker calls it with the same config. The run folder `<run.storage>/<run.name>` is continued when it exists.
    With diffusion.objective=auto a search for the objective comes first. forgets_request: a stop request that lies
    there was for an earlier start.

    Raises UserError for bad input and TrainingFault for a non-finite loss or a search without an outcome. What is found
    while setting up, saving or loading is raised on every worker (`error.is_shared`); what one worker meets in between,
    such as a shard that is gone, on that one alone, and the launcher ends the others.
    """
    hooks = hooks or Hooks()
    started = time.monotonic()
    stop = StopFlag(run_folder(config), rank=topology.rank, train=config.train)
    owner: Ownership | None = None
    try:
        comm.initialize(topology)
        if comm.broadcast_object(comm.rank() == 0 and stopped_for_good(run_folder(config))):
            return TrainResult("stopped", 0, run_folder(config).home)
        with comm.together():
            prepared = prepare(config, world_size=topology.world_size)
            if comm.rank() == 0:
                owner = take(prepared.home)
                if forgets_request:
                    forget_earlier_request(prepared.folder)
                if stopped_for_good(prepared.folder):  # since the look above; its request may just have been forgotten
                    stop.request("stopped by rddm stop")
        with comm.together():
            prepared = look_again(prepared)
            make_run_dir(prepared)
            configure_logging(prepared.run_dir / "logs" / f"rank-{topology.rank:05d}.log")
        _use_threads(config, topology)
        step, status = _train_as_owner(prepared, topology, stop, owner, hooks=hooks, started=started)
        # A launcher that sees one worker gone may signal the others: nobody leaves before all are through.
        comm.meet()
    finally:
        stop.close()
        if owner is not None:
            owner.release()
    return TrainResult("done" if status == "done" else "stopped", step, prepared.home)


def _train_as_owner(
    prepared: Prepared,
    topology: Topology,
    stop: StopFlag,
    owner: Ownership | None,
    *,
    hooks: Hooks,
    started: float,
) -> tuple[int, str]:
    """Everything between taking the run folder and letting it go.   -> (last finished step, how the run ended)"""
    start = find_start(prepared)
    is_searching = prepared.config.diffusion.objective == "auto" and start.selection is None
    _clear(prepared, start, is_searching=is_searching)
    phase: Search | Training
    phase = Search(prepared, topology, start) if is_searching else open_training(prepared, topology, start)
    reporting = open_reporting(
        phase.prepared,
        hooks.on_event,
        step=start.step,
        device=str(topology.device),
        skipped=start.skipped,
        is_searching=is_searching,
    )
    status = "failed"
    try:
        _settle(phase.prepared, start, is_searching=is_searching)
        reporting.configured()
        step, status = _run(phase, topology, stop, reporting, owner)
        reasons = comm.gather_object(stop.reason if status == "stopped" else "") or [""]
        reporting.finished(status, step, max(reasons, key=len), seconds=time.monotonic() - started)
    finally:
        is_ours = _is_ours(owner)
        reporting.close(status, is_ours=is_ours)
        if prepared.folder.is_remote and is_ours:
            try_sending("sending a log", lambda: prepared.folder.send(f"logs/rank-{topology.rank:05d}.log"))
    return step, status


def _is_ours(owner: Ownership | None) -> bool:
    """Whether nobody else has the run folder, as far as this worker can see.

    Asked at the end, with the patience of what is still to be sent there: a server that is away holds nobody longer.
    """
    try:
        if owner is not None:
            owner.check(retry=RETRY)
    except EnvironmentFault:
        return False
    return True


def completed_step(prepared: Prepared) -> int:
    """The last step of a run that has nothing left to do, else 0."""
    if not prepared.is_continued or not prepared.folder.exists(EXPORT_FILE):
        return 0
    found = ckpt.find_newest(prepared.folder.uri(ckpt.CHECKPOINTS))
    return found.progress.step if found and found.progress.step >= prepared.config.train.steps else 0


def open_training(prepared: Prepared, topology: Topology, start: Start) -> Training:
    """The network under DeepSpeed and its averages: as the checkpoint left them, else as the run begins."""
    config = with_outcome(prepared.config, start.selection)
    with comm.together():
        net = draw_net(config)
        if config.train.init_from and start.checkpoint is None:
            prepared = load_init(prepared, net)
        if comm.rank() == 0:
            check_room(prepared, net)
    check_same_init(prepared)
    engine = Engine(net, engine=config.engine, optim=config.optim, plan=prepared.plan, topology=topology)
    ema = make_ema(engine.pieces, profiles(config.ema))
    if start.checkpoint is not None:
        load_state(start.checkpoint, engine, ema)
    return Training(prepared, config, engine, ema, start.selection, start.step)


def _use_threads(config: Config, topology: Topology) -> None:
    """Share a node's cores among its workers, so that they do not fight for them."""
    shared = max(1, len(os.sched_getaffinity(0)) // topology.local_world_size)
    torch.set_num_threads(config.engine.threads or shared)


def _clear(prepared: Prepared, start: Start, *, is_searching: bool) -> None:
    """Rank 0 removes what is unfinished or newer than where the run goes on. What else need not be kept goes with the
    next commit, when scores are known."""
    folder = prepared.folder
    with comm.together():
        if comm.rank() == 0:
            sweep(folder.uri(SEARCH_DIR if is_searching else ckpt.CHECKPOINTS), EVERYTHING, newest=start.step)
            if not is_searching:
                sweep(folder.uri(ckpt.AVERAGES), EVERYTHING, newest=start.step)


def _settle(prepared: Prepared, start: Start, *, is_searching: bool) -> None:
    """Rank 0 makes the folder a run, without what an earlier start of another kind left in it."""
    train, folder = prepared.config.train, prepared.folder
    with comm.together():
        if comm.rank() == 0:
            write_identity(prepared)
            if start.selection is not None:
                _keep(start.selection, folder)
            if is_searching or start.step < train.steps:
                # The export of a shorter run is not this run's.
                folder.remove(EXPORT_FILE)


def _keep(selection: Selection, folder: RunFolder) -> None:
    """Write down the outcome of the search, whose checkpoints then have no use. Rank 0 only."""
    write_selection(folder, selection)
    drop(folder.uri(SEARCH_DIR))


def _run(
    phase: Search | Training, topology: Topology, stop: StopFlag, reporting: Reporting, owner: Ownership | None
) -> tuple[int, Literal["done", "stopped"]]:
    """Go through the phases that are left, to the end or a stop.   -> (last finished step, how it ended)"""
    if isinstance(phase, Search):
        selection = phase.run(stop, reporting, owner)
        phase.close()
        if selection.objective:
            with comm.together():
                if comm.rank() == 0:
                    _keep(selection, phase.prepared.folder)
            reporting.event("selected", step=selection.step, objective=selection.objective, weight=selection.weight)
            phase = open_training(phase.prepared, topology, Start(None, selection, ()))
    if isinstance(phase, Search):
        step, is_complete = selection.step, False
    else:
        step, is_complete = _train(phase, stop, reporting, owner)
        phase.engine.close()
    prepared = phase.prepared
    if not is_complete and comm.rank() == 0:
        try_sending("the removal of the stop request", lambda: clear_request(prepared.folder))
    return step, "done" if is_complete else "stopped"


def _train(training: Training, stop: StopFlag, reporting: Reporting, owner: Ownership | None) -> tuple[int, bool]:
    """Train from the first step to the end or a stop.   -> (last finished step, whether the run is complete)"""
    config, prepared, step = training.config, training.prepared, training.first_step
    is_complete = step >= config.train.steps
    if not is_complete:
        with comm.together():
            loader = open_loader(config, prepared.data, prepared.plan, rank=comm.rank(), start_step=step)
        keeper = Keeper(
            prepared,
            training.engine,
            training.ema,
            folder=ckpt.CHECKPOINTS,
            selection=lambda step: training.selection,
            owner=owner,
            reporting=reporting,
        )
        try:
            step, is_complete = run_loop(
                config,
                batches=loader,
                stop=stop,
                quarantine=Quarantine(prepared),
                actions=_make_actions(training, reporting, keeper),
                names=Names(),
            )
            keeper.prune(step)
        finally:
            keeper.close()
            loader.close()
    if is_complete:
        _export(training, step, reporting)
    return step, is_complete


def _make_actions(training: Training, reporting: Reporting, keeper: Keeper) -> Actions:
    """What the loop does in each step, and on log, preview and save steps."""
    config, prepared, engine, ema = training.config, training.prepared, training.engine, training.ema
    schedule = make_schedule(config.diffusion).to(engine.device)
    preview = None
    with comm.together():
        if config.sample.every and comm.rank() == 0:
            preview = Preview(replace(prepared, config=config))

    def take_step(batch: Batch, lr: float, word: Word) -> StepResult:
        result = train_step(
            engine,
            schedule,
            batch,
            diffusion=config.diffusion,
            self_condition=config.model.self_condition,
            seed=config.train.seed,
            lr=lr,
            word=word,
        )
        if result.is_finite:
            ema.update(batch.step + 1)
        return result

    def show(step: int) -> dict[str, float]:
        state = ckpt.gather_full(ema.as_pieces(), engine.shapes)
        if state is None or preview is None:
            return {}
        metrics, grid = preview.make(state)
        reporting.preview(step, grid)
        return metrics

    return Actions(
        take_step=take_step, measures=partial(measures, engine), log=reporting.metrics, keeper=keeper, preview=show
    )


def _export(training: Training, step: int, reporting: Reporting) -> None:
    """Write the EMA weights with their config as `<run>/model.safetensors`, the form that leaves the run folder."""
    prepared, config = training.prepared, training.config
    state = ckpt.gather_full(training.ema.as_pieces(), training.engine.shapes)
    path = prepared.run_dir / EXPORT_FILE
    extra = {"step": str(step), "data_fingerprint": prepared.data_fingerprint, "run": config.run.name}
    with comm.together():
        if state is not None:
            save_safetensors(path, state, config=config.model_dump(mode="json"), extra=extra)
            prepared.folder.send(EXPORT_FILE)
    reporting.exported(path)
