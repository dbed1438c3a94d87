"""Training on Ray: a worker group around `rddm_dist.training.run.train`.

The run folder is the truth: workers write journal, checkpoints and logs there, the driver follows the journal. Ray's
own files live in `<run>/ray/<attempt>` and are never read back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.ray_session import ray_session
from data_pipeline.errors import RddmError, TrainingFault
from rddm_dist.config import Config, parse_config
from rddm_dist.tracking.journal import follow_journal
from rddm_dist.training.folder import JOURNAL_FILE, last_record, run_folder
from rddm_dist.training.run import TrainResult

log = logging.getLogger(__name__)

POLL_S = 0.3

# glibc gives large blocks back to the kernel at once and pays for them again in the next step; keeping them saves a
# tenth of a training step on CPUs.
WORKER_ENV = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def train_on_ray(
    config: Config, *, workers: int, gpus_per_worker: int, on_event: Callable[[dict[str, Any]], None]
) -> TrainResult:
    """Run `config` on `workers` Ray Train workers and wait.

    `on_event` hears every journal record as it appears. Raises the worker's own error when it is one of ours,
    else a TrainingFault that names the workers that failed.
    """
    folder, began = run_folder(config), time.time()
    run_dir = folder.work
    with ray_session(cpus=workers):
        trainer = _make_trainer(config, run_dir, workers=workers, gpus_per_worker=gpus_per_worker)
        records = follow_journal(run_dir / JOURNAL_FILE)
        finished: dict[str, Any] = {}

        def drain() -> None:
            for record in records():
                if record.get("event") == "finished":
                    finished.update(record)
                on_event(record)

        _fit(trainer, drain)
        drain()
    if not finished and folder.is_remote:
        record = last_record(folder, "finished")  # of a journal that grew on another machine
        finished.update(record if record.get("time", 0.0) >= began else {})
    if not finished:
        raise TrainingFault(f"the workers ended without finishing; see {run_dir / 'logs'}")
    return TrainResult(status=finished["status"], step=finished["step"], run_dir=folder.home)


def _make_trainer(config: Config, run_dir: Path, *, workers: int, gpus_per_worker: int) -> TorchTrainer:
    ray_dir = run_dir / "ray"
    attempt = 1 + max((int(path.name.removeprefix("attempt-")) for path in ray_dir.glob("attempt-*")), default=0)
    # A worker without GPUs must not see any: Ray alone would leave them visible.
    env = WORKER_ENV if gpus_per_worker else {**WORKER_ENV, "CUDA_VISIBLE_DEVICES": ""}
    return TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(mode="json")},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker={"CPU": 1, "GPU": gpus_per_worker} if gpus_per_worker else {"CPU": 1},
        ),
        run_config=RunConfig(
            name=f"attempt-{attempt:04d}",
            storage_path=str(ray_dir),
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": env},  # type: ignore[call-arg]  # typed as the older RunConfig
        ),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus_per_worker else "gloo"),
    )


def _worker(loop_config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    from rddm_dist.comm import topology_from_env
    from rddm_dist.training.run import train

    train(parse_config(loop_config["config"], source="driver"), topology_from_env())


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
        cause: BaseException | None = failure
        while cause is not None:
            for candidate in (getattr(cause, "cause", None), cause):
                if isinstance(candidate, RddmError):
                    return candidate
            cause = cause.__cause__
    told = ", ".join(f"worker {rank}: {type(failure).__name__}" for rank, failure in failures.items())
    return TrainingFault(f"{told or type(error).__name__}; logs/driver.log says more, and the same command continues")
