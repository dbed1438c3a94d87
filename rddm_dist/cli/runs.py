"""`rddm status`, `rddm logs`, `rddm stop`: looking after a run, wherever it was launched."""

from __future__ import annotations

import getpass
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rddm_dist.cli.progress import say

if TYPE_CHECKING:
    from cluster.launch import Backend, JobState
    from cluster.submission import Submitted
    from rddm_dist.training.standing import Standing

RUN_HELP = "Run folder or URL; launches/NAME where this machine cannot see run folders"
FOLLOW_S = 1.0
FOLLOW_PATIENCE_S, FOLLOW_AGAIN_S = 300.0, 5.0  # without an answer of the cluster; between two tries
CODES = {"done": 0, "stopped": 75, "failed": 1, "gone": 1, "unknown": 1}


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: rddm status runs/mine")(status)
    app.command(epilog="Example: rddm logs runs/mine --follow")(logs)
    app.command(epilog="Example: rddm stop runs/mine")(stop)


def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object")] = False,
) -> int:
    """How a run stands: its job in the cluster, its step, its last checkpoint. Of a sweep: a table."""
    from cluster.launch import ENDED

    submitted, standing = _look(run)
    state = state_or_why(submitted) if submitted else None
    if submitted is not None and submitted.trials:
        from cluster.sweep_end import table_of

        table = table_of(submitted, run, has_ended=state is not None and state.word in ENDED)
        say(json.dumps(table.as_json()) if as_json else table.as_text())
        return 0
    if as_json:
        say(json.dumps(_as_json(submitted, state, standing)))
        return 0
    for line in _lines(run, submitted, state, standing):
        say(line)
    return 0


def logs(
    run: Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP)],
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends")] = False,
) -> int:
    """Show what a run's job has printed; of a run that was not launched, its driver's log."""
    from cluster.launch import backend_of

    submitted, _ = _look(run)
    if submitted is not None and follow:
        return follow_job(submitted, run)
    pieces = (
        backend_of(submitted.cluster).logs(submitted, follow=False) if submitted else _driver_log(run, follow=follow)
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    return 0


def stop(
    run: Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP)],
    now: Annotated[bool, typer.Option("--now", help="End the job at once; what is not saved is lost")] = False,
    preempted: Annotated[
        str, typer.Option(metavar="WHY", help="For launchers: save and stop, to be started again")
    ] = "",
    number: Annotated[str, typer.Option("--launch", metavar="NUMBER", hidden=True)] = "",
) -> int:
    """Save at the next step and stop (exit 75); a job that waits in a queue is taken out of it.

    Of evaluate, restore and pack: end the job. The same command goes on from what is there.
    """
    from cluster.launch import ENDED, backend_of
    from data_pipeline.errors import EnvironmentFault
    from rddm_dist.training.standing import folder_at
    from rddm_dist.training.stopping import PREEMPTED, end_launch, request_stop

    if preempted:
        request_stop(folder_at(run), f"{PREEMPTED}{preempted}")
        return 0
    reason = f"stopped by {getpass.getuser()}"
    if number:  # from outside, by `run_inside`
        end_launch(folder_at(run), number, reason)
        return 0
    submitted, standing = _look(run)
    if submitted is None:
        _ask(run, standing)
        return 0
    backend = backend_of(submitted.cluster)
    state = state_or_why(submitted)
    if state.word in ENDED:
        say(f"nothing to stop: the job has ended ({state.word}{f', {state.detail}' if state.detail else ''})")
        return 0
    if state.word == "unknown" and not submitted.record.is_shared:
        raise EnvironmentFault(state.detail)  # nothing can be told to it
    homes = _homes(submitted)
    if submitted.record.is_shared:
        for home in homes:
            end_launch(folder_at(home), submitted.record.number, reason)
    elif state.word == "running" and submitted.kind == "train":
        for home in homes:
            backend.run_inside(submitted, ["rddm", "stop", home, "--launch", submitted.record.number])
    if state.word == "unknown" and submitted.record.is_shared:
        say(f"asked to save and stop, if it still runs: {state.detail}")
    elif state.word == "pending" or now or submitted.kind != "train":
        backend.cancel(submitted)
        say("taken out of the queue" if state.word == "pending" else "ended at once")
    else:
        say(f"asked to save and stop; rddm status {run} tells when it has")
    return 0


def follow_job(submitted: Submitted, run: str) -> int:
    """Print a job's output until it ends.   -> its exit code"""
    from cluster.launch import ENDED, JobState, backend_of

    backend = backend_of(submitted.cluster)
    patience = _Patience()
    try:
        for piece in _pieces(backend, submitted, patience):
            print(piece, end="", flush=True)
        state = JobState("unknown")
        while state.word not in ENDED:
            with patience:
                state = backend.state(submitted)
            time.sleep(0 if state.word in ENDED else FOLLOW_S)
    except KeyboardInterrupt:
        say(f"\nnot following any more; the job goes on (rddm stop {run} stops it)")
        return 0
    say(f"{state.word}{f' ({state.detail})' if state.detail else ''}")
    if submitted.trials:
        from cluster.sweep_end import table_of

        say(table_of(submitted, run, has_ended=True).as_text())
    return state.exit_code if state.exit_code is not None else CODES[state.word]


class _Patience:
    """A block around what asks a cluster: once it has answered, it may go without for FOLLOW_PATIENCE_S."""

    def __init__(self) -> None:
        self._has_heard = False
        self._entered, self._silent_since = 0.0, float("inf")

    def heard(self) -> None:
        self._has_heard, self._silent_since = True, float("inf")

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        from data_pipeline.errors import EnvironmentFault

        now = time.monotonic()
        if error is None:
            self.heard()
            return False
        if not isinstance(error, EnvironmentFault) or not self._has_heard:
            return False
        if now - self._entered > FOLLOW_PATIENCE_S:  # for so long a job had nothing to say, and its cluster was there
            self._silent_since = float("inf")
        self._silent_since = min(self._silent_since, now)
        if now - self._silent_since >= FOLLOW_PATIENCE_S:
            return False
        time.sleep(FOLLOW_AGAIN_S)
        return True


def _pieces(backend: Backend, submitted: Submitted, patience: _Patience) -> Iterator[str]:
    """What a job prints, until it ends; after a time without an answer from where it was."""
    shown, has_ended = 0, False
    while not has_ended:
        seen = 0
        with patience:
            for piece in backend.logs(submitted, follow=True):
                patience.heard()
                fresh = piece[max(0, shown - seen) :]
                seen += len(piece)
                shown = max(shown, seen)
                if fresh:
                    yield fresh
            has_ended = True


def state_or_why(submitted: Submitted) -> JobState:
    """The state of a job; unknown, and why, where its cluster cannot be asked."""
    from cluster.launch import JobState, backend_of
    from data_pipeline.errors import EnvironmentFault

    try:
        return backend_of(submitted.cluster).state(submitted)
    except EnvironmentFault as error:
        return JobState("unknown", str(error))


def _look(run: str) -> tuple[Submitted | None, Standing]:
    """What is known of a run: its last submission, and its journal where this machine can read it."""
    from cluster.submission import find_submitted
    from data_pipeline import storage
    from data_pipeline.errors import ConfigError
    from rddm_dist.training.standing import folder_at, read_standing

    submitted = find_submitted(run)
    home = submitted.home if submitted is not None and not storage.is_local(submitted.home) else run
    standing = read_standing(folder_at(home))
    if submitted is None and standing.status == "none":
        raise ConfigError(f"{run} holds neither a run nor a launch; give a run folder, e.g. runs/mine")
    return submitted, standing


def _homes(submitted: Submitted) -> list[str]:
    """The run folders of a submission: of the run, or of a sweep and its trials; as this machine sees them, or else
    as jobs do."""
    from data_pipeline import storage

    is_seen_alike = not storage.is_local(submitted.home) or not submitted.record.is_shared
    here = submitted.home if is_seen_alike else str(submitted.record.local.parent.parent)
    parent = here.rpartition("/")[0]
    return [here, *(f"{parent}/{name}" for name in submitted.trials)]


def _ask(run: str, standing: Standing) -> None:
    from rddm_dist.training.standing import folder_at
    from rddm_dist.training.stopping import request_stop

    if standing.status != "running":
        say(f"nothing to stop: the run is {standing.status} at step {standing.step}")
        return
    request_stop(folder_at(run), f"stopped by {getpass.getuser()}")
    say("asked to save and stop")


def _lines(run: str, submitted: Submitted | None, state: JobState | None, standing: Standing) -> Iterator[str]:
    """The story of a run in a few lines."""
    yield f"run      {run}"
    if submitted is not None and state is not None:
        ids = ", ".join(f"{key} {value}" for key, value in submitted.ids.items())
        code = f", exit code {state.exit_code}" if state.exit_code is not None else ""
        yield f"job      {ids}: {state.word}{code}{f' ({state.detail})' if state.detail else ''}"
    if standing.status == "none":
        yield "step     not started"
        return
    metrics = standing.metrics or {}
    loss = f", loss {metrics['train/loss']:.4f}" if "train/loss" in metrics else ""
    speed = f", {metrics['perf/images_per_s']:.1f} images/s" if "perf/images_per_s" in metrics else ""
    share = f" ({100 * standing.step / standing.steps:.0f} %)" if standing.steps else ""
    yield f"step     {standing.step} of {standing.steps}{share}{loss}{speed}; last word {ago(standing.age_s)}"
    yield f"saved    step {standing.saved}" if standing.saved else "saved    nothing yet"
    again = f", {standing.starts} starts" if standing.starts > 1 else ""
    yield f"state    {standing.status}{f': {standing.reason}' if standing.reason else ''}{again}"


def _as_json(submitted: Submitted | None, state: JobState | None, standing: Standing) -> dict[str, Any]:
    job = None
    if submitted is not None and state is not None:
        job = {
            "backend": submitted.backend,
            "ids": submitted.ids,
            "launch": submitted.record.number,
            "state": state.word,
            "detail": state.detail,
            "exit_code": state.exit_code,
        }
    return {"job": job, "run": standing.__dict__}


def ago(seconds: float) -> str:
    """A time span for people."""
    if seconds < 100:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 5400 else f"{seconds / 3600:.0f} h ago"


def _driver_log(run: str, *, follow: bool) -> Iterator[str]:
    """The log of a run that was started by hand on this machine."""
    from data_pipeline.errors import ConfigError
    from rddm_dist.training.standing import folder_at, read_standing

    folder = folder_at(run)
    path = Path(folder.work) / "logs" / "driver.log"
    if not path.is_file():
        path = path.with_name("rank-00000.log")  # started by torchrun
    if folder.is_remote or not path.is_file():
        raise ConfigError(f"{run} has no launch and no logs on this machine; see its logs/")
    with open(path) as file:
        while True:
            piece = file.read()
            if piece:
                yield piece
            elif not follow or read_standing(folder).status != "running":
                return
            else:
                time.sleep(FOLLOW_S)
