"""The training loop: next batch, step, EMA, log, preview, save, stop. Reads top to bottom; there are no callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.batch import Batch, Replaced
from data_pipeline.errors import DataError, TrainingFault
from rddm_dist.config import Config
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.training.ema import Ema
from rddm_dist.training.engine import Engine
from rddm_dist.training.step import learning_rate, train_step
from rddm_dist.training.stopping import StopFlag


@dataclass
class Meter:
    """Loss, throughput and time spent waiting for data since the last log point."""

    samples: int = 0
    waited_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        started = time.monotonic()
        batch = next(batches)
        self.waited_s += time.monotonic() - started
        return batch

    def add(self, loss: float, samples: int) -> None:
        self.losses.append(loss)
        self.samples += samples

    def read(self) -> dict[str, float]:
        """Mean loss, images per second and the share of time waited for data since the last reading; starts anew."""
        elapsed_s = time.monotonic() - self.started
        read = {
            "train/loss": sum(self.losses) / len(self.losses),
            "perf/images_per_s": self.samples / elapsed_s,
            "perf/data_wait": self.waited_s / elapsed_s,
        }
        self.samples, self.waited_s, self.losses, self.started = 0, 0.0, [], time.monotonic()
        return read

    def restart_clock(self) -> None:
        """Leave out what took time besides training."""
        self.waited_s, self.started = 0.0, time.monotonic()


@dataclass(frozen=True)
class Actions:
    """What the loop does besides stepping. Every worker calls each at the same step.

    log(step, metrics); preview(step) -> metrics; save(step); quarantine(step, this worker's bad samples) -> how many
    the run has met, and what to say where they are too many.
    """

    log: Callable[[int, dict[str, Any]], None]
    preview: Callable[[int], dict[str, float]]
    save: Callable[[int], None]
    quarantine: Callable[[int, Sequence[Replaced]], tuple[int, str]]


def run_loop(
    config: Config,
    *,
    engine: Engine,
    ema: Ema,
    schedule: Schedule,
    batches: Iterable[Batch],
    stop: StopFlag,
    actions: Actions,
) -> tuple[int, bool]:
    """Train until `train.steps` or a stop request.   -> (last finished step, whether the run is complete)

    Raises TrainingFault on a non-finite loss, on every worker, before the weights are touched, and DataError, after
    saving, where more samples are bad than data.bad_sample_budget allows.
    """
    train, meter, stream = config.train, Meter(), iter(batches)
    num_bad, excess = actions.quarantine(0, ())
    if excess:
        raise _too_many(excess)
    while True:
        batch = meter.wait_for(stream)
        step = batch.step + 1
        lr = learning_rate(step, config.optim)
        result = train_step(
            engine,
            schedule,
            batch,
            diffusion=config.diffusion,
            self_condition=config.model.self_condition,
            seed=train.seed,
            lr=lr,
            wants_stop=bool(stop.reason),
        )
        if not result.is_finite:
            first = batch.step * train.global_batch
            raise TrainingFault(
                f"the loss is not finite at step {step} (samples {first} to {first + train.global_batch - 1} of the "
                "run); nothing was updated; lower optim.lr, or engine.precision=fp32"
            )
        ema.update(step, config.ema)
        meter.add(result.loss, train.global_batch)
        if result.has_bad_samples:
            num_bad, excess = actions.quarantine(step, batch.replaced)
            if excess:
                actions.save(step)
                raise _too_many(excess)
        is_last = step >= train.steps
        is_end = is_last or result.must_stop
        if is_end or step % train.log_every == 0:
            metrics = {"train/lr": lr, "train/grad_norm": engine.grad_norm(), "data/bad_samples": num_bad}
            actions.log(step, {**meter.read(), **metrics})
        if is_end or step % train.checkpoint_every == 0:
            actions.save(step)
            meter.restart_clock()
        # After the save, and not when someone waits for the machine.
        if config.sample.every and (is_last or step % config.sample.every == 0) and not result.must_stop:
            actions.log(step, actions.preview(step))
            meter.restart_clock()
        if is_end:
            return step, is_last


def _too_many(excess: str) -> DataError:
    """The end of a run with too many bad samples, which every worker comes to at this point."""
    error = DataError(excess)
    error.is_shared = True
    return error
