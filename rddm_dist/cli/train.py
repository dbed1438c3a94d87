"""`rddm train`: one config, any number of workers, continued by the same command."""

from __future__ import annotations

import json
import signal
import threading
from functools import partial
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rddm_dist.cli.arguments import single_count
from rddm_dist.cli.progress import ProgressBar, say

if TYPE_CHECKING:
    from rddm_dist.config import Config
    from rddm_dist.training.folder import RunFolder
    from rddm_dist.training.prepare import Prepared
    from rddm_dist.training.run import TrainResult

RETRIES_HELP = (
    "Start the workers again after some were lost, at most so often; above 0 also after a node drained, however often"
)
WAIT_HELP = "Seconds until all workers must have started, after a loss again; else the run stops (exit 75)"


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: rddm train configs/train/demo.yaml --workers 2 train.steps=1000")(train)


def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, e.g. configs/train/demo.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Override keys")] = None,
    workers: Annotated[str, typer.Option(help="Workers: N, or MIN:MAX")] = "1",
    gpus_per_worker: Annotated[int, typer.Option(min=0, help="GPUs of each worker")] = 0,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="CPU cores of each worker, as Ray counts them")] = 1,
    retries: Annotated[int, typer.Option(min=0, help=RETRIES_HELP)] = 0,
    wait_s: Annotated[float, typer.Option(min=30, help=WAIT_HELP)] = 600.0,
    storage: Annotated[str, typer.Option(help="Folder, or s3:// URL, that holds run folders")] = "",
    run: Annotated[str, typer.Option(help="Name of the run folder; the same name continues it")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing")] = False,
) -> int:
    """Train a model on Ray workers, or continue the run that is there."""
    from rddm_dist.config import load_config
    from rddm_dist.training.folder import run_folder
    from rddm_dist.training.stopping import exit_code_of, stopped_for_good

    resolved = load_config(config, [*(overrides or []), *run_overrides(storage, run)])
    count = single_count(workers, flag="--workers")
    if dry_run:
        _plan_run(resolved, workers=count, gpus_per_worker=gpus_per_worker)
        return 0
    folder = run_folder(resolved)
    if stopped_for_good(folder):
        say(f"{folder.home}: this launch was stopped by rddm stop; launch again to go on")
        return exit_code_of(75, folder)
    result = train_here(
        resolved,
        workers=count,
        gpus_per_worker=gpus_per_worker,
        cpus_per_worker=cpus_per_worker,
        retries=retries,
        wait_s=wait_s,
    )
    return exit_code_of(result.exit_code, folder)


def run_overrides(storage: str, run: str) -> list[str]:
    """--storage and --run as config overrides, quoted so that YAML takes them as they are."""
    pairs = (("run.storage", storage), ("run.name", run))
    return [f"{key}={json.dumps(value)}" for key, value in pairs if value]


def check_run(config: Config, *, workers: int, gpus_per_worker: int) -> Prepared:
    """Everything that can be found out before a worker starts; nothing is written."""
    from rddm_dist.training.prepare import prepare

    prepared = prepare(config, world_size=workers)
    _check_machine(config, gpus_per_worker=gpus_per_worker)
    return prepared


def _check_machine(config: Config, *, gpus_per_worker: int) -> None:
    from rddm_dist.training.engine import check_engine
    from rddm_dist.training.toolchain import check_toolchain

    check_engine(config.engine, on_gpu=gpus_per_worker > 0)
    if not gpus_per_worker:
        check_toolchain()


def train_here(
    config: Config,
    *,
    workers: int,
    gpus_per_worker: int,
    cpus_per_worker: int = 1,
    retries: int = 0,
    wait_s: float = 600.0,
) -> TrainResult:
    """Check the run, then train it on Ray with progress on the console. SIGTERM and Ctrl-C save and stop.

    retries, wait_s: see `cluster.ray_train.Patience`.
    """
    import torch

    from cluster.ray_session import ray_session, require_workers
    from cluster.ray_train import Group, Patience, train_on_ray
    from rddm_dist.log import configure as configure_logging
    from rddm_dist.training.folder import JournalMirror
    from rddm_dist.training.ownership import take
    from rddm_dist.training.prepare import make_run_dir
    from rddm_dist.training.reporting import catch_up
    from rddm_dist.training.run import TrainResult, completed_step
    from rddm_dist.training.stopping import forget_earlier_request, stopped_for_good

    prepared = check_run(config, workers=workers, gpus_per_worker=gpus_per_worker)
    finished = completed_step(prepared)
    if finished:
        say(f"reusing {prepared.home}: complete at step {finished}; raise train.steps to go on")
        if catch_up(prepared):
            say("sent MLflow what it had missed")
        return TrainResult("done", finished, prepared.home)
    if not gpus_per_worker and torch.cuda.is_available():
        say("training on CPUs although this machine has GPUs; add --gpus-per-worker 1 to use them")
    with take(prepared.home):  # in use, or not to be written: better known before Ray starts
        if prepared.folder.is_remote:
            make_run_dir(prepared)
            JournalMirror(prepared.folder).restore()  # the console goes on behind it
    say(f"{'continuing' if prepared.is_continued else 'new run'} {prepared.home}")
    say(f"starting Ray and {workers} worker(s); logs in {prepared.run_dir / 'logs'}")
    with ray_session(cpus=workers * cpus_per_worker):
        require_workers(workers, cpus=cpus_per_worker, gpus=gpus_per_worker)
        make_run_dir(prepared)
        configure_logging(prepared.run_dir / "logs" / "driver.log")
        forget_earlier_request(prepared.folder)
        if stopped_for_good(prepared.folder):  # since the command began
            return TrainResult("stopped", 0, prepared.home)
        # Ray sets a SIGTERM handler of its own when it starts, so ours comes after it.
        with StopOnSignal(prepared.folder) as stopping, TrainConsole(config) as console:
            return train_on_ray(
                config,
                Group(workers, gpus_per_worker, cpus_per_worker),
                on_event=console.on_event,
                tell=say,
                patience=Patience(retries, wait_s),
                is_asked=lambda: stopping.is_asked,
            )


def _plan_run(config: Config, *, workers: int, gpus_per_worker: int) -> None:
    """Check a run and print its plan; where its datasets are not there yet, all that does not need them."""
    from rddm_dist.config import to_yaml
    from rddm_dist.training.data import absent_datasets
    from rddm_dist.training.folder import run_folder
    from rddm_dist.training.prepare import check_init, check_settings

    absent = absent_datasets(config)
    if absent:
        plan = check_settings(config, world_size=workers)
        check_init(config)
        _check_machine(config, gpus_per_worker=gpus_per_worker)
        where = f"{run_folder(config).home} (not looked at)"
        data = f"NOT THERE YET: {', '.join(absent)}; see rddm pack --help; no dataset of the run was checked"
    else:
        prepared = check_run(config, workers=workers, gpus_per_worker=gpus_per_worker)
        plan, data = prepared.plan, prepared.data.describe()
        where = f"{prepared.home} ({'continued' if prepared.is_continued else 'new'})"
    say(to_yaml(config).rstrip())
    say(f"# run folder: {where}")
    say(f"# data: {data}")
    say(f"# {plan.describe()}")


class TrainConsole:
    """Turns journal records into a short story and a progress bar."""

    def __init__(self, config: Config) -> None:
        self._steps = config.train.steps
        self._bar = ProgressBar("train", self._steps)
        self._generates = config.diffusion.generate

    def __enter__(self) -> TrainConsole:
        self._bar.__enter__()
        return self

    def on_event(self, record: dict[str, Any]) -> None:
        event, metrics = record["event"], record.get("metrics", {})
        if event in ("started", "resumed"):
            self._begin(record)
        elif event == "metrics" and "search/loss" in metrics:
            note = f"search: loss {metrics['search/loss']:.4f}  weight {metrics['search/weight']:.4f}"
            self._bar.update(record["step"], f"{note}  {metrics['search/images_per_s']:.1f} images/s")
        elif event == "metrics" and "train/loss" in metrics:
            note = f"loss {metrics['train/loss']:.4f}  {metrics['perf/images_per_s']:.1f} images/s"
            self._bar.update(record["step"], note)
        elif event == "metrics" and "preview/psnr" in metrics:
            say(f"  step {record['step']}: preview PSNR {float(metrics['preview/psnr']):.2f} dB")
        elif event == "preview" and self._generates:
            say(f"  step {record['step']}: preview {record['path']}")
        elif event == "selected":
            self._bar.__exit__(None, None, None)
            say(
                f"objective selected at step {record['step']} of the search: {record['objective']} (weight "
                f"{record['weight']:.4f}); training starts anew with it"
            )
            self._bar = ProgressBar("train", self._steps)
            self._bar.__enter__()
        elif event == "save_failed":
            say(
                f"  step {record['step']}: SAVING FAILED ({record['failures']} in a row of at most {record['limit']}): "
                f"{record['reason']}"
            )
        elif event == "finished":
            if record["status"] == "stopped":
                say(f"stopped at step {record['step']} ({record['reason']}); the same command continues")
            else:
                say(f"trained to step {record['step']}")

    def _begin(self, record: dict[str, Any]) -> None:
        what = "the search for the objective" if record["phase"] == "search" else "training"
        again = f"resumed at step {record['step']}" + (f" of {what}" if record["phase"] == "search" else "")
        say(f"{again if record['event'] == 'resumed' else f'{what} starts'}: {record['plan']}")
        for text in record["skipped"]:
            say(f"SKIPPED: {text}")
        for change in record["changes"]:
            say(f"changed: {change}")
        self._bar.update(record["step"])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)


class StopOnSignal:
    """SIGTERM, SIGUSR1 or the first Ctrl-C ask the run to save and stop; a second Ctrl-C gives up at once."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.is_asked = False

    def __enter__(self) -> StopOnSignal:
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        from rddm_dist.training.folder import try_sending
        from rddm_dist.training.stopping import request_stop

        if number == signal.SIGINT and self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
        # Not here: a URL may take a while to answer, or not answer at all.
        asking = partial(request_stop, self._folder, signal.Signals(number).name)
        threading.Thread(target=try_sending, args=("the stop request", asking)).start()
        say(f"{signal.Signals(number).name}: saving at the next step, then stopping")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
