"""Training on Ray: a worker group around `rddm_dist.training.run.train`, and a driver that keeps the run alive.

The run folder is the truth: workers write journal, checkpoints and logs there, the driver follows the journal. Ray's
own files live in `<run>/ray/<attempt>` and are never read back: a new group of workers goes on from the last commit.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import PreemptionError

from cluster.ray_drain import Roll, dead_nodes, draining_nodes, enter_roll, this_node
from cluster.ray_session import quiet_raylets, ray_session
from data_pipeline.errors import RddmError, TrainingFault
from rddm_dist.config import Config, parse_config
from rddm_dist.tracking.journal import follow_journal
from rddm_dist.training.folder import JOURNAL_FILE, RunFolder, last_record, run_folder, try_sending
from rddm_dist.training.run import TrainResult
from rddm_dist.training.stopping import PREEMPTED, REQUEST_FILE, clear_request, request_stop, stopped_for_good

log = logging.getLogger(__name__)

POLL_S = 0.3
LOOK_S = 2.0  # between looks at the cluster's nodes and, while workers are awaited, at the run folder

# glibc gives large blocks back to the kernel at once and pays for them again in the next step; keeping them saves a
# tenth of a training step on CPUs.
WORKER_ENV = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}

# What collectives say in a worker that has lost another one, before Ray knows of it. gloo raises plain RuntimeErrors.
BROKEN = re.compile(r"connection (closed|reset) by peer|broken pipe|timed out|connection refused", re.IGNORECASE)
# The base of what torch.distributed raises by itself, and Ray's word for a worker that answers no more.
LOSSES = {"DistError", "WorkerHealthCheckTimeoutError"}


@dataclass(frozen=True)
class Group:
    """Workers of a run, and what each of them has for itself."""

    workers: int
    gpus_per_worker: int = 0
    cpus_per_worker: int = 1


@dataclass(frozen=True)
class Patience:
    """What a driver bears before it gives up.

    retries: how often it starts the workers again after some were lost. Where it is not 0 it also starts them again
    after a node drained, however often: nothing was lost then. wait_s: seconds until all workers of a group must have
    come, whether they lack a place or only take long to start.
    """

    retries: int = 0
    wait_s: float = 600.0


class LostWorkers(TrainingFault):
    """Workers, or the machines they were on, have gone. told: which, and how that showed."""

    def __init__(self, told: str) -> None:
        super().__init__(f"workers lost ({told}); logs/driver.log says more, and the same command continues")
        self.told = told


class _GivenUp(Exception):
    """A group whose workers are not all there is not waited for any longer; the message says why."""


def train_on_ray(
    config: Config,
    group: Group,
    *,
    on_event: Callable[[dict[str, Any]], None],
    tell: Callable[[str], None],
    patience: Patience | None = None,
    is_asked: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Run `config` on Ray Train workers and wait; start them again where `patience` allows it.

    `on_event` hears every journal record as it appears, `tell` in one line each what the driver decides. is_asked:
    whether a person wants the run to stop, after which nothing is started again. train.max_hours counts from here.
    Raises the worker's own error when it is one of ours, else a TrainingFault that names the workers that failed.
    """
    driver = _Driver(config, group, on_event=on_event, tell=tell, patience=patience or Patience(), is_asked=is_asked)
    with ray_session(cpus=group.workers * group.cpus_per_worker):
        quiet_raylets()
        return driver.run()


class _Driver:
    """Starts groups of workers for one run, one after the other, and watches over the one that is there."""

    def __init__(
        self,
        config: Config,
        group: Group,
        *,
        on_event: Callable[[dict[str, Any]], None],
        tell: Callable[[str], None],
        patience: Patience,
        is_asked: Callable[[], bool],
    ) -> None:
        self._config, self._group, self._patience = config, group, patience
        self._folder = run_folder(config)
        self._on_event, self._tell, self._is_asked = on_event, tell, is_asked
        hours = config.train.max_hours
        self._deadline = time.monotonic() + hours * 3600 if hours else float("inf")
        self._step = 0

    def run(self) -> TrainResult:
        """Train to the end, a stop, or an error that starting again does not help against."""
        lost = 0
        while True:
            watch = _Watch(self._folder, self._group)
            try:
                finished = self._attempt(watch)
            except _GivenUp as error:
                self._say(f"stopped before the workers began ({error}); the same command continues")
                return TrainResult("stopped", self._step, self._folder.home)
            except LostWorkers as error:
                told = "; ".join([*watch.lost_nodes(), error.told])
                if lost >= self._patience.retries or self._is_unwanted():
                    raise LostWorkers(told) from error
                lost += 1
                self._say(
                    f"workers lost ({told}); starting again from the last checkpoint ({lost} of "
                    f"{self._patience.retries})"
                )
            else:
                result = TrainResult(finished["status"], finished["step"], self._folder.home)
                if result.status == "done" or not self._goes_on(finished, watch):
                    return result
                self._say(f"starting again from step {result.step}, without the nodes that drain")
            finally:
                watch.close()
            self._forget_preemption()

    def _say(self, text: str) -> None:
        log.info("%s", text)
        self._tell(text)

    def _goes_on(self, finished: dict[str, Any], watch: _Watch) -> bool:
        """Whether a stopped run is to be started again by this driver: the nodes of its workers drained, its own not.

        Any other preemption (a time limit) takes the driver with it, which is for the launcher to start again.
        """
        is_drained = bool(watch.drained) and finished["reason"] == watch.drained
        return is_drained and not watch.is_own and self._patience.retries > 0 and not self._is_unwanted()

    def _is_unwanted(self) -> bool:
        """Whether a person, or the wall-clock limit, wants the run to stop."""
        if self._is_asked() or time.monotonic() >= self._deadline or stopped_for_good(self._folder):
            return True
        request = self._folder.read(REQUEST_FILE)
        return request is not None and not request.startswith(PREEMPTED.encode())

    def _forget_preemption(self) -> None:
        """The request that was for the group before; one by a person stays."""
        request = self._folder.read(REQUEST_FILE)
        if request is not None and request.startswith(PREEMPTED.encode()):
            clear_request(self._folder)

    def _attempt(self, watch: _Watch) -> dict[str, Any]:
        """One group of workers, to its end.   -> the record with which it finished"""
        began, folder = time.time(), self._folder
        records = follow_journal(folder.work / JOURNAL_FILE)
        finished: dict[str, Any] = {}

        def hear() -> None:
            for record in records():
                self._step = record.get("step", self._step)
                if record.get("event") == "finished":
                    finished.update(record)
                self._on_event(record)

        def tick() -> None:
            hear()
            if watch.is_due():
                try:
                    self._look_after(watch)
                except RayError as error:  # the workers go on without Ray's tables, and the next look comes soon
                    log.warning("cannot look at the cluster: %s", error)

        _fit(_make_trainer(self._config, folder.work, self._group, roll=watch.roll.name), tick)
        hear()
        if not finished and folder.is_remote:
            record = last_record(folder, "finished")  # of a journal that grew on another machine
            finished.update(record if record.get("time", 0.0) >= began else {})
        if not finished and self._is_unwanted():  # they were told so before they began
            return {"status": "stopped", "step": self._step, "reason": ""}
        if not finished:
            raise TrainingFault(f"the workers ended without finishing; see {folder.work / 'logs'}")
        return finished

    def _look_after(self, watch: _Watch) -> None:
        """What is to be done now: ask the run to stop, give up waiting for places, or nothing."""
        if not watch.is_complete():
            if self._is_unwanted():
                raise _GivenUp("asked to stop" if time.monotonic() < self._deadline else "train.max_hours are over")
            if watch.age_s > self._patience.wait_s:
                came = f"{watch.count()} of {self._group.workers} workers came"
                raise _GivenUp(f"{came} within {self._patience.wait_s:.0f} s")
        elif time.monotonic() >= self._deadline:
            watch.ask(f"train.max_hours={self._config.train.max_hours:g} are over")
        else:
            watch.look_at_nodes()


class _Watch:
    """What the driver knows of one group of workers.

    drained: the reason that the run was given when nodes began to drain; is_own: the driver's own node is among them.
    """

    def __init__(self, folder: RunFolder, group: Group) -> None:
        self.roll = Roll()
        self.drained, self.is_own = "", False
        self._folder, self._workers = folder, group.workers
        self._began = time.monotonic()
        self._next_look = self._began
        self._is_complete = self._is_asked = False

    def is_due(self) -> bool:
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + LOOK_S
        return True

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._began

    def count(self) -> int:
        """How many workers have come."""
        return self.roll.count()

    def is_complete(self) -> bool:
        """Whether all workers have come."""
        self._is_complete = self._is_complete or self.count() >= self._workers
        return self._is_complete

    def ask(self, reason: str) -> None:
        """Ask the run to save and stop, once."""

        def send() -> None:
            request_stop(self._folder, reason)
            self._is_asked = True

        if not self._is_asked:
            try_sending("the stop request", send)

    def look_at_nodes(self) -> None:
        """Ask the run to stop where a node that it needs is about to go."""
        draining = draining_nodes()
        if not draining or self._is_asked:
            return
        own = this_node()
        needed = self.roll.nodes() | {own}
        addresses = sorted(address for node, address in draining.items() if node in needed)
        if addresses:
            self.is_own = own in draining
            self.drained = f"{PREEMPTED}node {', '.join(addresses)} drains"
            self.ask(self.drained)

    def lost_nodes(self) -> list[str]:
        """What is to be said of nodes of workers that are gone, as far as Ray has noticed."""
        gone = dead_nodes()
        return [f"node {gone[node]} is gone" for node in sorted(self.roll.nodes() & gone.keys())]

    def close(self) -> None:
        self.roll.close()


def _make_trainer(config: Config, run_dir: Path, group: Group, *, roll: str) -> TorchTrainer:
    ray_dir = run_dir / "ray"
    attempt = 1 + max((int(path.name.removeprefix("attempt-")) for path in ray_dir.glob("attempt-*")), default=0)
    # A worker without GPUs must not see any: Ray alone would leave them visible.
    env = WORKER_ENV if group.gpus_per_worker else {**WORKER_ENV, "CUDA_VISIBLE_DEVICES": ""}
    gpus = {"GPU": group.gpus_per_worker} if group.gpus_per_worker else {}
    return TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(mode="json"), "roll": roll},
        scaling_config=ScalingConfig(
            num_workers=group.workers,
            use_gpu=group.gpus_per_worker > 0,
            resources_per_worker={"CPU": group.cpus_per_worker, **gpus},
        ),
        run_config=RunConfig(
            name=f"attempt-{attempt:04d}",
            storage_path=str(ray_dir),
            # To start again is the driver's decision, which knows why a group has ended.
            # (mypy takes it for the older FailureConfig.)
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),  # type: ignore[call-arg]
            worker_runtime_env={"env_vars": env},
        ),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if group.gpus_per_worker else "gloo"),
    )


def _worker(loop_config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    from rddm_dist.comm import topology_from_env
    from rddm_dist.training.run import train

    topology = topology_from_env()
    enter_roll(loop_config["roll"], rank=topology.rank)
    train(parse_config(loop_config["config"], source="driver"), topology)


def _fit(trainer: TorchTrainer, on_tick: Callable[[], None]) -> None:
    """`trainer.fit()` in a thread, so that this one keeps its signal handlers and follows the journal."""
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the waiting thread, which raises it
            outcome.append(error)

    thread = threading.Thread(target=run, name="ray-train-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        on_tick()
    if outcome:
        log.info("what Ray reports", exc_info=outcome[0])  # whole in the log; one line to the person
        raise _ours(outcome[0])


def _ours(error: BaseException) -> RddmError:
    """The first of our errors among what the workers raised, else a fault that names who failed of what."""
    failures = dict(sorted(getattr(error, "worker_failures", {}).items()))
    for failure in (*failures.values(), error):
        for cause in _causes(failure):
            if isinstance(cause, RddmError):
                return cause
    told = ", ".join(f"worker {rank}: {_name(failure)}" for rank, failure in failures.items()) or type(error).__name__
    if isinstance(error, PreemptionError) or any(_is_loss(failure) for failure in failures.values()):
        return LostWorkers(told)
    return TrainingFault(f"{told}; logs/driver.log says more, and the same command continues")


def _name(failure: BaseException) -> str:
    """What a worker failed of: the kind of the error, without what Ray wraps around it."""
    return type(next(_causes(failure))).__name__


def _is_loss(failure: BaseException) -> bool:
    """Whether a worker failed because it, or another one, is gone."""
    for cause in _causes(failure):
        if isinstance(cause, RayActorError) or LOSSES & {base.__name__ for base in type(cause).__mro__}:
            return True
        if isinstance(cause, RuntimeError) and BROKEN.search(str(cause)):
            return True
    return False


def _causes(failure: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, as Python chains them and as Ray wraps them."""
    cause: BaseException | None = failure
    while cause is not None:
        for wrapped in (getattr(cause, "cause", None), getattr(cause, "health_check_failure", None)):
            if isinstance(wrapped, BaseException):
                yield wrapped
        yield cause
        cause = cause.__cause__
