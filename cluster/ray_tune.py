"""A sweep on Ray Tune, each trial of which drives a training on Ray Train: `python -m cluster.ray_tune SWEEP_JSON`.

SWEEP_JSON is that of a launch, with the configurations of the trials beside it. The run folders are the truth: trials
that are complete are skipped, others go on, and what Tune notes down is never read back. A stop request in the sweep's
own folder (Ctrl-C and SIGTERM make one) lets running trials save and stop, and no other trial begin.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from cluster.ray_drain import draining_nodes, this_node
from cluster.ray_session import actors_that_fit, may_grow, quiet_ray_data, ray_session, require_workers
from cluster.ray_train import Group, Patience, train_on_ray
from cluster.submission import Trial
from cluster.sweep import (
    TABLE_FILE,
    child_of,
    finish_parent,
    home_of,
    open_parent,
    read_sweep,
    read_table,
    short,
    sweep_name,
)
from data_pipeline.errors import ConfigError, EnvironmentFault, RddmError
from rddm_dist.cli.progress import say
from rddm_dist.cli.train import StopOnSignal, check_run
from rddm_dist.config import Config, parse_config
from rddm_dist.log import configure as configure_logging
from rddm_dist.log import configure_console, quiet_frameworks
from rddm_dist.training.folder import RunFolder, run_folder, try_sending
from rddm_dist.training.ownership import take
from rddm_dist.training.prepare import make_run_dir
from rddm_dist.training.reporting import catch_up
from rddm_dist.training.run import completed_step
from rddm_dist.training.standing import folder_at, read_standing
from rddm_dist.training.stopping import REQUEST_FILE, clear_request, exit_code_of, request_stop, stopped_for_good

log = logging.getLogger(__name__)

POLL_S, REMOTE_POLL_S = 0.5, 5.0
INTERRUPTED = 130
# What a trial's driver is placed by: its memory. It needs no core, and a core would be one less for workers, whose
# groups might then all wait for each other.
DRIVER_BYTES = 512 * 2**20
MOVES = "moves"  # how a trial ends whose driver's node is about to go away: it is to go on elsewhere
# Nothing of Tune on the console, and no files for viewers that nobody reads.
TUNE_ENV = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}


@dataclass(frozen=True)
class Shared:
    """What all trials need. sweep: the folder of the sweep; configs: of the trials, by name."""

    sweep: str
    configs: dict[str, dict[str, Any]]
    group: Group
    patience: Patience


@dataclass
class Progress:
    """How the sweep stands, as Tune's thread tells the main one. Plain values: Tune stores a copy of it."""

    running: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    is_stopping: bool = False


def main() -> None:
    """Run a sweep. Exit codes: 0 all trials done, 75 some stopped, 1 some failed, 2 bad input."""
    quiet_frameworks()
    configure_console()
    parser = argparse.ArgumentParser("python -m cluster.ray_tune", description="The trials of a sweep on Ray.")
    parser.add_argument("sweep", metavar="SWEEP_JSON", help="sweep.json of a launch")
    parser.add_argument("--workers", type=int, default=1, help="workers of each trial")
    parser.add_argument("--gpus-per-worker", type=int, default=0)
    parser.add_argument("--cpus-per-worker", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=0, help="trials at a time; 0: as many as there is room for")
    parser.add_argument("--retries", type=int, default=3, help="starts of a trial after lost workers or machines")
    parser.add_argument("--wait-s", type=float, default=600.0, help="seconds until all workers must have come")
    given = parser.parse_args()
    try:
        group = Group(given.workers, given.gpus_per_worker, given.cpus_per_worker)
        code = run_sweep(given.sweep, group, patience=Patience(given.retries, given.wait_s), parallel=given.parallel)
    except RddmError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
    sys.exit(code)


def run_sweep(path: str | Path, group: Group, *, patience: Patience, parallel: int = 0) -> int:
    """Run what is left of a recorded sweep, print its table and keep it.   -> exit code

    parallel: trials at a time; 0: as many as the cluster has room for.
    """
    if group.workers < 1 or group.gpus_per_worker < 0 or group.cpus_per_worker < 1 or parallel < 0:
        raise ConfigError("--workers and --cpus-per-worker must be at least 1, --gpus-per-worker and --parallel 0")
    trials = read_sweep(path)
    if not trials:
        raise ConfigError(f"{path} holds no trials; give the sweep.json of a launch")
    home = home_of(trials[0])
    folder = folder_at(home)
    if stopped_for_good(folder):
        say(f"{home}: this launch was stopped by rddm stop; launch again to go on")
        return exit_code_of(75, folder)
    left = [trial for trial in trials if not _is_complete(trial, group)]
    if len(left) < len(trials):
        say(f"{len(trials) - len(left)} of {len(trials)} trials are complete already")
    progress = Progress()
    if left:
        trials = _with_parent(trials, home)
        names = {trial.name for trial in left}
        with take(home):
            clear_request(folder)
            _tune([trial for trial in trials if trial.name in names], folder, group, patience, parallel, progress)
            clear_request(folder)
    return _conclude(trials, folder, progress)


def _is_complete(trial: Trial, group: Group) -> bool:
    """Check what can be checked of a trial before anything starts, and whether it has nothing left to do."""
    prepared = check_run(trial.config, workers=group.workers, gpus_per_worker=group.gpus_per_worker)
    if not completed_step(prepared):
        return False
    catch_up(prepared)
    return True


def _with_parent(trials: list[Trial], home: str) -> list[Trial]:
    """The trials as children of one MLflow run, which the launch could not make where it did not see the store."""
    config = trials[0].config
    if config.tracking.backend == "none" or config.tracking.parent:
        return trials
    values = {trial.name: trial.values for trial in trials}
    parent = open_parent(config, home=home, name=sweep_name(trials[0].name), trials=values)
    return [replace(trial, config=child_of(parent, trial.config)) for trial in trials]


def _conclude(trials: Sequence[Trial], folder: RunFolder, progress: Progress) -> int:
    """Tell how it ended, keep it, end the MLflow run.   -> exit code"""
    values = {trial.name: trial.values for trial in trials}
    table = read_table(values, folder.home.rpartition("/")[0], failed=progress.failed)
    say(table.as_text())
    for name, why in progress.failed.items():
        say(f"{name} failed: {why}")
    # Also those that never began.
    is_stopped = any(row.status not in ("done", "failed") for row in table.rows)
    status = "stopped" if is_stopped else "failed" if progress.failed else "done"
    try_sending("writing the table", lambda: folder.write(TABLE_FILE, table.as_markdown().encode()))
    try_sending("ending the MLflow run of the sweep", lambda: finish_parent(trials[0].config, status, best=table.best))
    if is_stopped:
        say("the same command continues those that are not done")
    return exit_code_of({"done": 0, "failed": 1, "stopped": 75}[status], folder)


def _tune(
    trials: Sequence[Trial], folder: RunFolder, group: Group, patience: Patience, parallel: int, progress: Progress
) -> None:
    """Let Tune run the trials, and carry a stop request of the sweep to those that run."""
    work = run_folder(trials[0].config).work.with_name(folder.home.rpartition("/")[2])
    configs = {trial.name: trial.config for trial in trials}
    with ray_session(cpus=group.workers * group.cpus_per_worker * max(parallel, 1)):
        require_workers(group.workers, cpus=group.cpus_per_worker, gpus=group.gpus_per_worker)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        room = _room([node["Resources"] for node in nodes], group)
        if parallel:
            room = parallel if may_grow(node["Labels"] for node in nodes) else min(parallel, room)
        at_once = min(room, len(trials))
        configure_logging(work / "logs" / "sweep.log")
        quiet_ray_data()  # what raylets say of the many processes of a sweep
        say(f"{len(trials)} trials of {group.workers} worker(s), {at_once} at a time; logs in each run's logs/")
        if at_once > 1:
            configs = {name: _with_threads(config, group.cpus_per_worker) for name, config in configs.items()}
        sent = {name: config.model_dump(mode="json") for name, config in configs.items()}
        shared = Shared(folder.home, sent, group, patience)
        tuner = _make_tuner(trials, shared, progress, work=work, at_once=at_once)
        # Ray sets a SIGTERM handler of its own when it starts, so ours comes after it.
        with StopOnSignal(folder):
            _fit(tuner, _Carrier(folder, configs, progress))


def _with_threads(config: Config, threads: int) -> Config:
    """The configuration with as many threads as cores were set aside, where it does not say: a worker that takes all
    of a machine's for itself gets in the way of those of other trials, and each then waits for the others' threads."""
    engine = config.engine.model_copy(update={"threads": config.engine.threads or threads})
    return config.model_copy(update={"engine": engine})


def _room(nodes: Sequence[Mapping[str, float]], group: Group) -> int:
    """How many trials may run at a time on nodes with these resources: each has its driver and all its workers, none
    waits for workers that another holds."""
    drivers = sum(int(node.get("memory", 0.0) // DRIVER_BYTES) for node in nodes)
    if not drivers:
        raise EnvironmentFault(
            f"no node of the Ray cluster has {DRIVER_BYTES >> 20} MiB of memory for the driver of a trial; start nodes "
            "with more (ray start --memory)"
        )
    workers = actors_that_fit(nodes, cpus=group.cpus_per_worker, gpus=group.gpus_per_worker)
    return max(min(drivers, workers // group.workers), 1)


def _make_tuner(trials: Sequence[Trial], shared: Shared, progress: Progress, *, work: Path, at_once: int) -> tune.Tuner:
    for name, value in TUNE_ENV.items():
        os.environ.setdefault(name, value)
    place = work / "ray"
    attempt = 1 + max((int(path.name.removeprefix("sweep-")) for path in place.glob("sweep-*")), default=0)
    trainable = tune.with_resources(tune.with_parameters(_run_trial, shared=shared), {"memory": DRIVER_BYTES})
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_InOrder([trial.name for trial in trials], progress),
            num_samples=-1,  # as many as the search gives
            max_concurrent_trials=at_once,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            name=f"sweep-{attempt:04d}",
            storage_path=str(place),
            # Of trials whose driver has gone with its machine; what workers do is its own affair.
            failure_config=tune.FailureConfig(max_failures=shared.patience.retries),
            callbacks=[_Story({trial.name: trial.values for trial in trials}, progress)],
            verbose=0,
        ),
    )


def _name_of(trial: Any) -> str:
    return str(trial.config["name"])


def _fit(tuner: tune.Tuner, carrier: _Carrier) -> None:
    """`tuner.fit()` in a thread, so that this one keeps its signal handlers and looks for stop requests."""
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            tuner.fit()
        except BaseException as error:  # handed to the waiting thread, which raises it
            outcome.append(error)

    thread = threading.Thread(target=run, name="ray-tune-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        carrier.look()
    if outcome:
        raise outcome[0]


class _Carrier:
    """Carries the stop request of a sweep to its trials."""

    def __init__(self, folder: RunFolder, configs: dict[str, Config], progress: Progress) -> None:
        self._folder, self._configs, self._progress = folder, configs, progress
        self._reason = ""
        self._told: set[str] = set()
        self._next_look = 0.0

    def look(self) -> None:
        """Look for a request, now and then; once there is one, ask every trial that runs to stop."""
        now = time.monotonic()
        if not self._progress.is_stopping and now >= self._next_look:
            self._next_look = now + (REMOTE_POLL_S if self._folder.is_remote else POLL_S)
            try_sending("the look for a stop request", self._read)
        if self._progress.is_stopping:
            for name in [name for name in self._progress.running if name not in self._told]:
                try_sending("the stop request", partial(self._ask, name))

    def _read(self) -> None:
        request = self._folder.read(REQUEST_FILE)
        if request is not None:
            self._reason = request.decode(errors="replace").strip()
            self._progress.is_stopping = True
            say(f"stopping ({self._reason or 'asked to'}): running trials save, no other begins")

    def _ask(self, name: str) -> None:
        request_stop(run_folder(self._configs[name]), self._reason)
        self._told.add(name)


class _InOrder(Searcher):
    """Gives Tune one trial after the other as there is room, and none once the sweep is stopping."""

    def __init__(self, names: list[str], progress: Progress) -> None:
        super().__init__()
        self._waiting, self._given = list(names), set[str]()
        self._progress = progress

    def suggest(self, trial_id: str) -> Any:
        if self._waiting and not self._progress.is_stopping:
            self._given.add(trial_id)
            return {"name": self._waiting.pop(0)}
        # One that runs may have to move, and is then given again.
        return None if self._given and not self._progress.is_stopping else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._given.discard(trial_id)
        if result and result.get("status") == MOVES and not error:
            self._waiting.append(result["name"])

    def save(self, checkpoint_path: str) -> None:
        """Nothing is read back: the run folders say what is left."""


class _Story(tune.Callback):
    """Tells of each trial that it began and how it ended."""

    def __init__(self, values: dict[str, dict[str, Any]], progress: Progress) -> None:
        self._values, self._progress = values, progress

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = _name_of(trial)
        if name not in self._progress.running:
            self._progress.running.append(name)
            say(f"{name} begins: {' '.join(f'{key}={short(value)}' for key, value in self._values[name].items())}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        say(f"{_name_of(trial)} lost its driver and begins again")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        told = trial.last_result
        self._end(_name_of(trial), told["status"], told["why"], told["step"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(_name_of(trial), "failed", "its driver was lost; logs/sweep.log of the sweep says more", 0)

    def _end(self, name: str, status: str, why: str, step: int) -> None:
        if name in self._progress.running:
            self._progress.running.remove(name)
        if status == "failed":
            self._progress.failed[name] = why
            say(f"{name} failed: {why}")
        elif status == "done":
            say(f"{name} done at step {step}")
        else:
            say(f"{name} {status} at step {step} ({why})")


def _run_trial(spec: dict[str, Any], shared: Shared) -> None:
    """What Tune runs for each trial: the driver of a training. Reports once, how it ended."""
    config = parse_config(shared.configs[spec["name"]], source="sweep")
    try:
        status, why, step = _train(config, shared)
    except RddmError as error:
        log.info("the trial failed", exc_info=True)
        status, why, step = "failed", str(error), 0
    tune.report({"name": spec["name"], "status": status, "why": why, "step": step})


def _train(config: Config, shared: Shared) -> tuple[str, str, int]:
    """Train, or go on.   -> (how it ended, why, last step)"""
    folder, sweep, group = run_folder(config), folder_at(shared.sweep), shared.group
    # That of an earlier start goes. Whoever stops the sweep writes its request first, the trial's after it.
    clear_request(folder)
    if sweep.exists(REQUEST_FILE):
        return "stopped", "before it began", 0
    make_run_dir(check_run(config, workers=group.workers, gpus_per_worker=group.gpus_per_worker))
    configure_logging(folder.work / "logs" / "driver.log")
    result = train_on_ray(
        config,
        group,
        on_event=lambda record: None,
        tell=lambda text: log.info("%s", text),
        patience=shared.patience,
        is_asked=lambda: sweep.exists(REQUEST_FILE),
    )
    if result.status == "done":
        return "done", "", result.step
    is_leaving = shared.patience.retries > 0 and this_node() in draining_nodes() and not sweep.exists(REQUEST_FILE)
    return MOVES if is_leaving else "stopped", read_standing(folder).reason, result.step


if __name__ == "__main__":
    # As a module under its own name, so that other processes find its functions there.
    from cluster.ray_tune import main as run_main

    run_main()
