"""The training loop: next batch, step, EMA, log, preview, save, stop. Reads top to bottom; there are no callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.batch import Batch
from data_pipeline.errors import TrainingFault
from rddm_dist.config import Config
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.training.ema import Ema
from rddm_dist.training.engine import Engine
from rddm_dist.training.step import learning_rate, train_step
from rddm_dist.training.stopping import StopFlag


@dataclass
class Meter:
    """Loss and throughput since the last log point."""

    samples: int = 0
    losses: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def add(self, loss: float, samples: int) -> None:
        self.losses.append(loss)
        self.samples += samples

    def read(self) -> tuple[float, float]:
        """(mean loss, images per second) since the last reading; starts anew."""
        loss = sum(self.losses) / len(self.losses)
        rate = self.samples / (time.monotonic() - self.started)
        self.samples, self.losses, self.started = 0, [], time.monotonic()
        return loss, rate


@dataclass(frozen=True)
class Actions:
    """What the loop does besides stepping. Every worker calls each at the same step.

    log(step, metrics); preview(step) -> metrics; save(step).
    """

    log: Callable[[int, dict[str, Any]], None]
    preview: Callable[[int], dict[str, float]]
    save: Callable[[int], None]


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

    Raises TrainingFault on a non-finite loss, on every worker, before the weights are touched.
    """
    train, meter = config.train, Meter()
    for batch in batches:
        step = batch.step + 1
        lr = learning_rate(step, config.optim)
        result = train_step(
            engine,
            schedule,
            batch,
            diffusion=config.diffusion,
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
        is_last = step >= train.steps
        is_end = is_last or result.must_stop
        if is_end or step % train.log_every == 0:
            loss, rate = meter.read()
            metrics = {"train/loss": loss, "train/lr": lr, "train/grad_norm": engine.grad_norm()}
            actions.log(step, {**metrics, "perf/images_per_s": rate})
        if is_end or step % train.checkpoint_every == 0:
            actions.save(step)
            meter.started = time.monotonic()
        # After the save, and not when someone waits for the machine.
        if config.sample.every and (is_last or step % config.sample.every == 0) and not result.must_stop:
            actions.log(step, actions.preview(step))
            meter.started = time.monotonic()
        if is_end:
            return step, is_last
    raise AssertionError("the training loader is endless")
