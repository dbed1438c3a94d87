"""The training loop: next batch, step, log, preview, save, stop. Reads top to bottom; there are no callbacks.

The search for the objective runs in it as well, with a step and names of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.batch import Batch
from data_pipeline.errors import DataError, TrainingFault
from rddm_dist.config import Config
from rddm_dist.training.keeper import Keeper
from rddm_dist.training.quarantine import Quarantine
from rddm_dist.training.step import StepResult, Word, learning_rate
from rddm_dist.training.stopping import StopFlag


@dataclass(frozen=True)
class Names:
    """Where metrics stand. MLflow takes a point only where its step is new to the metric, so phases of a run that
    count steps anew share no names."""

    step: str = "train"
    speed: str = "perf"
    data: str = "data"


@dataclass
class Meter:
    """Losses, throughput and time spent waiting for data since the last log point."""

    samples: int = 0
    waited_s: float = 0.0
    losses: list[Mapping[str, float]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        started = time.monotonic()
        batch = next(batches)
        self.waited_s += time.monotonic() - started
        return batch

    def add(self, losses: Mapping[str, float], samples: int) -> None:
        self.losses.append(losses)
        self.samples += samples

    def read(self, names: Names) -> dict[str, float]:
        """Mean losses, images per second and the share of time waited for data since the last reading; starts anew."""
        elapsed_s = time.monotonic() - self.started
        read = {
            f"{names.step}/{loss}": sum(values[loss] for values in self.losses) / len(self.losses)
            for loss in self.losses[0]
        }
        read[f"{names.speed}/images_per_s"] = self.samples / elapsed_s
        read[f"{names.speed}/data_wait"] = self.waited_s / elapsed_s
        self.samples, self.waited_s, self.losses, self.started = 0, 0.0, [], time.monotonic()
        return read

    def restart_clock(self) -> None:
        """Leave out what took time besides training."""
        self.waited_s, self.started = 0.0, time.monotonic()


@dataclass(frozen=True)
class Actions:
    """What a phase of a run does in the loop. Every worker calls each at the same step.

    take_step(batch, learning rate, what this worker has to say); measures() of the last step, by name; log(step,
    metrics); keeper saves; preview(step) -> metrics, None where there are no previews.
    """

    take_step: Callable[[Batch, float, Word], StepResult]
    measures: Callable[[], dict[str, float]]
    log: Callable[[int, dict[str, Any]], None]
    keeper: Keeper
    preview: Callable[[int], dict[str, float]] | None = None


def run_loop(
    config: Config,
    *,
    batches: Iterable[Batch],
    stop: StopFlag,
    quarantine: Quarantine,
    actions: Actions,
    names: Names,
) -> tuple[int, bool]:
    """Step until `train.steps`, a stop request or the end of a search.   -> (last step, whether the phase is complete)

    What was saved is complete when it returns. Raises TrainingFault on a non-finite loss, on every worker, before the
    weights are touched; DataError, after saving, where more samples are bad than data.bad_sample_budget allows;
    EnvironmentFault where too many saves in a row have failed.
    """
    train, meter, stream, keeper = config.train, Meter(), iter(batches), actions.keeper
    if quarantine.excess:
        raise _too_many(quarantine)
    while True:
        batch = meter.wait_for(stream)
        step = batch.step + 1
        lr = learning_rate(step, config.optim)
        result = actions.take_step(batch, lr, keeper.word(wants_stop=bool(stop.reason)))
        keeper.settle(result)
        if not result.is_finite:
            first = batch.step * train.global_batch
            raise TrainingFault(
                f"the loss is not finite at step {step} (samples {first} to {first + train.global_batch - 1} of the "
                "run); nothing was updated; lower optim.lr, or engine.precision=fp32"
            )
        meter.add(result.losses, train.global_batch)
        if result.has_bad_samples:
            quarantine.record(step, batch.replaced)
            if quarantine.excess:
                keeper.save_last(step)
                raise _too_many(quarantine)
        if result.is_decided:
            keeper.finish()
            actions.log(step, meter.read(names))
            return step, True
        is_last = step >= train.steps
        is_end = is_last or result.must_stop
        if is_end or step % train.log_every == 0:
            metrics = {**meter.read(names), f"{names.step}/lr": lr}
            metrics |= {f"{names.step}/{name}": value for name, value in actions.measures().items()}
            if config.optim.noise_lr:
                metrics[f"{names.step}/noise_lr"] = lr * config.optim.noise_lr / config.optim.lr
            actions.log(step, {**metrics, f"{names.data}/bad_samples": quarantine.count})
        if is_end:
            keeper.save_last(step)
        else:
            keeper.save(step)
        # After the save, and not when someone waits for the machine.
        is_due = config.sample.every and (is_last or step % config.sample.every == 0)
        if actions.preview is not None and is_due and not result.must_stop:
            actions.log(step, actions.preview(step))
            meter.restart_clock()
        if is_end:
            return step, is_last


def _too_many(quarantine: Quarantine) -> DataError:
    """The end of a run with too many bad samples, which every worker comes to at this point."""
    error = DataError(quarantine.excess)
    error.is_shared = True
    return error
