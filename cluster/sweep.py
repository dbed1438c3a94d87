"""Sweeps: the runs that a command line asks for, their parent in MLflow, and the table of how they stand."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.submission import LOCAL_RECORDS, RUN_NAME, Job, Trial, find_submitted
from data_pipeline import storage
from data_pipeline.errors import ConfigError, EnvironmentFault, UserError
from rddm_dist.config import Config, load_config
from rddm_dist.tracking.journal import json_safe
from rddm_dist.tracking.store import default_uri, ensure_experiment, open_client
from rddm_dist.training.folder import CONFIG_FILE, run_folder
from rddm_dist.training.standing import Standing, folder_at, read_standing

MAX_TRIALS = 512
SHARED = ("run.", "tracking.")  # keys by which the runs of a sweep belong together
TABLE_FILE = "sweep.md"
SWEEP_TAG, BEST_TAG, PARENT_TAG = "rddm.sweep", "rddm.best", "mlflow.parentRunId"
LOSS, PSNR = "train/loss", "preview/psnr"
EXAMPLE = "for example --sweep optim.lr=1e-4,2e-4"
MAX_PARAM = 6000  # characters that MLflow takes
OPENING, CLOSING = "([{", ")]}"


def split_sweep(overrides: Sequence[str], sweep: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Tell what is the same in all runs from what is swept.   -> (overrides, key -> its values, as YAML)

    sweep: `section.key=VALUE,VALUE`. Where there are any, overrides of several values are swept as well. Commas inside
    brackets and quotes are part of a value. ConfigError for what is no sweep.
    """
    fixed: list[str] = []
    swept: dict[str, list[str]] = {}
    for text in sweep:
        _add(text, swept)
    for text in overrides:
        if sweep and len(_values(text.partition("=")[2])) > 1:
            _add(text, swept)
        else:
            fixed.append(text)
    twice = next((key for text in fixed if (key := text.partition("=")[0].strip()) in swept), None)
    if twice:
        raise ConfigError(f"{twice} is given with --sweep and without; leave one out")
    count = math.prod(len(values) for values in swept.values())
    if count > MAX_TRIALS:
        raise ConfigError(f"--sweep asks for {count} runs, at most {MAX_TRIALS} are allowed; give fewer values")
    return fixed, swept


def _add(text: str, swept: dict[str, list[str]]) -> None:
    name, separator, listed = text.partition("=")
    key, values = name.strip(), _values(listed)
    if not separator or not key:
        raise ConfigError(f"--sweep {text!r} must have the form section.key=VALUE,VALUE; {EXAMPLE}")
    if key.startswith(SHARED):
        raise ConfigError(f"--sweep {key}: all runs of a sweep have this one in common; sweep another key")
    if key in swept:
        raise ConfigError(f"--sweep {key} is given twice; give all its values at once, {EXAMPLE}")
    if not all(values):
        raise ConfigError(f"--sweep {text!r} has an empty value; write '' in quotes if it is meant, {EXAMPLE}")
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise ConfigError(f"--sweep {text!r} has the value {twice} twice; give it once")
    swept[key] = values


def _values(text: str) -> list[str]:
    """A text split at its commas, but not inside brackets and quotes."""
    parts, depth, quote, before = [""], 0, "", ","
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and before in f",:={OPENING}":  # an apostrophe within a word opens nothing
            quote = letter
        elif letter in OPENING:
            depth += 1
        elif letter in CLOSING:
            depth -= 1
        elif letter == "," and depth <= 0:
            parts.append("")
            before = ","
            continue
        parts[-1] += letter
        before = before if letter.isspace() else letter
    return [part.strip() for part in parts]


def make_trials(
    config_path: str, overrides: Sequence[str], swept: Mapping[str, Sequence[str]], *, name: str, records: str = ""
) -> tuple[Trial, ...]:
    """The runs of a sweep: all combinations of its values in the order given, named `<name>-0000` and on.

    records: folder of run folders as this machine sees it; empty: run.storage. Raises ConfigError where a value does
    not fit, two runs would be the same, or the name has been used for something else.
    """
    if not swept:
        return ()
    if not RUN_NAME.fullmatch(f"{name}-0000"):
        raise ConfigError(
            f"run.name={name} cannot name the runs of a sweep; use letters, digits, '-', '_' and '.', at most 58, e.g. "
            "--run derain-1"
        )
    trials: list[Trial] = []
    for index, chosen in enumerate(itertools.product(*swept.values())):
        run = f"{name}-{index:04d}"
        pairs = [f"{key}={value}" for key, value in zip(swept, chosen, strict=True)]
        config = load_config(config_path, [*overrides, *pairs, f"run.name={json.dumps(run)}"])
        values = _values_in(config, swept)
        same = next((trial for trial in trials if trial.values == values), None)
        if same is not None:
            raise ConfigError(f"--sweep: {' '.join(pairs)} is {_pairs(values)}, which is there already; leave one out")
        trials.append(Trial(run, config, values))
    _check_recorded(trials, name=name, parent=records or trials[0].config.run.storage)
    return tuple(trials)


def _values_in(config: Config, keys: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration has of these keys, as JSON has it."""
    whole = config.model_dump(mode="json")
    found: dict[str, Any] = {}
    for key in keys:
        found[key] = whole
        for part in key.split("."):
            found[key] = found[key][part]
    return found


def _check_recorded(trials: Sequence[Trial], *, name: str, parent: str) -> None:
    """Raise ConfigError where the name is that of another sweep, or of no sweep."""
    home = storage.join(parent, name)
    for place in (home, f"{LOCAL_RECORDS}/{name}"):
        earlier = find_submitted(place)
        if earlier is not None and not earlier.trials:
            raise ConfigError(f"{place} was launched without --sweep; choose another --run")
        if earlier is not None and earlier.trials != {trial.name: trial.values for trial in trials}:
            raise ConfigError(
                f"{place} was launched as another sweep ({_ranges(earlier.trials)}); give those values back in this "
                "order, or choose another --run"
            )
    if folder_at(home).exists(CONFIG_FILE):
        raise ConfigError(f"{home} is a run of its own, not a sweep; choose another --run")


def ranges_of(trials: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Key -> the values it takes in a sweep, in their order."""
    ranges: dict[str, list[Any]] = {}
    for values in trials.values():
        for key, value in values.items():
            known = ranges.setdefault(key, [])
            if value not in known:
                known.append(value)
    return ranges


def _ranges(trials: Mapping[str, Mapping[str, Any]]) -> str:
    return " ".join(f"{key}={','.join(map(short, values))}" for key, values in ranges_of(trials).items())


def _pairs(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={short(value)}" for key, value in values.items())


def short(value: Any) -> str:
    """A value of a configuration for people."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def sweep_name(trial: str) -> str:
    """The name of the sweep that a run belongs to."""
    return trial.rpartition("-")[0]


def with_parent(job: Job, *, sees_runs: bool = True) -> Job:
    """The job with its runs as children of one MLflow run, which is made or found.

    sees_runs: whether this machine sees the run folders; where it does not, MLflow's default store lies with them, and
    whoever runs the trials there opens the parent.
    """
    config = job.config
    if config is None or not job.trials or config.tracking.backend == "none":
        return job
    if not sees_runs and not config.tracking.uri:
        return job
    trials = {trial.name: trial.values for trial in job.trials}
    parent = open_parent(config, home=job.home, name=job.name, trials=trials)
    return replace(
        job,
        config=child_of(parent, config),
        trials=tuple(replace(trial, config=child_of(parent, trial.config)) for trial in job.trials),
    )


def child_of(parent: str, config: Config) -> Config:
    """The configuration of a run that is a child of an MLflow run."""
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"parent": parent})})


def open_parent(config: Config, *, home: str, name: str, trials: Mapping[str, Mapping[str, Any]]) -> str:
    """Make the MLflow run of a sweep, or find the one that has its home as a tag.   -> its id, set running

    config: what the runs have in common; their parent is a child of its tracking.parent, if any. EnvironmentFault when
    the store cannot be reached.
    """
    uri = _uri(config)
    with _reaching(uri):
        client = open_client(uri)
        experiment = ensure_experiment(client, uri=uri, name=config.tracking.experiment)
        quote = '"' if "'" in home else "'"
        found = client.search_runs([experiment], f"tags.`{SWEEP_TAG}` = {quote}{home}{quote}", max_results=1)
        if found:
            parent = str(found[0].info.run_id)
            client.update_run(parent, status="RUNNING")
        else:
            above = {PARENT_TAG: config.tracking.parent} if config.tracking.parent else {}
            made = client.create_run(experiment, run_name=name, tags={SWEEP_TAG: home, **above})
            parent = str(made.info.run_id)
        for key, values in ranges_of(trials).items():
            client.log_param(parent, key, ", ".join(map(short, values))[:MAX_PARAM])
    return parent


def is_parent_running(config: Config) -> bool:
    """Whether nobody has ended the MLflow run of a sweep yet; false of a sweep without one."""
    parent, uri = config.tracking.parent, _uri(config)
    if not parent or config.tracking.backend == "none":
        return False
    with _reaching(uri):
        return str(open_client(uri).get_run(parent).info.status) == "RUNNING"


def finish_parent(config: Config, status: str, *, best: str = "") -> None:
    """End the MLflow run of a sweep. config: of one of its runs; status: done, stopped or failed; best: name of a run.

    EnvironmentFault when the store cannot be reached.
    """
    parent, uri = config.tracking.parent, _uri(config)
    if not parent or config.tracking.backend == "none":
        return
    with _reaching(uri):
        client = open_client(uri)
        if best:
            client.set_tag(parent, BEST_TAG, best)
        client.set_terminated(parent, status={"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[status])


def _uri(config: Config) -> str:
    return config.tracking.uri or default_uri(config.run.storage)


@contextlib.contextmanager
def _reaching(uri: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MLflow's own, its server's, a driver's, the network's
        told = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise EnvironmentFault(
            f"tracking.uri={uri} cannot be reached ({told}); start the server, change tracking.uri, or sweep with "
            "tracking.backend=none"
        ) from error


@dataclass(frozen=True)
class Row:
    """One run of a sweep: what sets it apart, and how it stands. failed: why, if its driver says that it has."""

    name: str
    values: Mapping[str, Any]
    standing: Standing
    failed: str = ""

    @property
    def status(self) -> str:
        if self.failed:
            return "failed"
        return "not started" if self.standing.status == "none" else self.standing.status

    @property
    def reason(self) -> str:
        return self.failed or (self.standing.reason if self.standing.status == "stopped" else "")

    def metric(self, name: str) -> float | None:
        """The newest value, None where there is none."""
        return (self.standing.metrics or {}).get(name)


@dataclass(frozen=True)
class SweepTable:
    """How the runs of a sweep stand."""

    rows: tuple[Row, ...]

    @property
    def is_done(self) -> bool:
        return all(row.status == "done" for row in self.rows)

    @property
    def outcome(self) -> str:
        """Of a sweep that has ended: done, stopped while any can go on (those that never began too), else failed."""
        if any(row.status not in ("done", "failed") for row in self.rows):
            return "stopped"
        return "done" if self.is_done else "failed"

    @property
    def best(self) -> str:
        """The run with the highest preview PSNR, without previews with the lowest loss, among those that are done if
        any is; empty before there are numbers."""
        rows = [row for row in self.rows if row.status == "done"] or self.rows
        for metric, sign in ((PSNR, 1), (LOSS, -1)):
            values = {row.name: row.metric(metric) for row in rows}
            known = {name: sign * value for name, value in values.items() if value is not None and math.isfinite(value)}
            if known:
                return max(known, key=lambda name: known[name])
        return ""

    def as_text(self) -> str:
        """For a console; the best run has a star."""
        header, *lines = self._cells()
        widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (header, *lines)
        )

    def as_markdown(self) -> str:
        header, *lines = self._cells()
        cells = [[cell.replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *lines)]
        return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"

    def as_json(self) -> dict[str, Any]:
        best = self.best
        rows = [
            {
                "name": row.name,
                "values": dict(row.values),
                "status": row.status,
                "step": row.standing.step,
                "steps": row.standing.steps,
                "loss": row.metric(LOSS),
                "psnr": row.metric(PSNR),
                "reason": row.reason,
                "is_best": row.name == best,
            }
            for row in self.rows
        ]
        return {"trials": json_safe(rows)}

    def _cells(self) -> list[list[str]]:
        """A line of titles and a line per run, without columns that would be empty."""
        best = self.best
        keys = list(self.rows[0].values)
        lines = [["", "run", *keys, "status", "step", "loss", "psnr", "reason"]]
        for row in self.rows:
            step = f"{row.standing.step}/{row.standing.steps}" if row.standing.steps else ""
            values = [short(row.values[key]) for key in keys]
            numbers = [_number(row.metric(LOSS), 5), _number(row.metric(PSNR), 2)]
            lines.append(["*" if row.name == best else "", row.name, *values, row.status, step, *numbers, row.reason])
        kept = [column for column in range(len(lines[0])) if any(line[column] for line in lines[1:])]
        return [[line[column] for column in kept] for line in lines]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def read_table(
    trials: Mapping[str, Mapping[str, Any]], parent: str, *, failed: Mapping[str, str] | None = None
) -> SweepTable:
    """Read how the runs of a sweep stand from their folders in `parent`, a folder or URL. failed: name -> why."""
    why = failed or {}
    rows = [
        Row(name, values, read_standing(folder_at(storage.join(parent, name))), why.get(name, ""))
        for name, values in trials.items()
    ]
    return SweepTable(tuple(rows))


def read_sweep(path: str | Path) -> list[Trial]:
    """The runs of a recorded sweep, whose configurations lie beside its file. ConfigError where they do not."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"sweep file {path} does not exist; give the sweep.json of a launch")
    try:
        recorded = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"sweep file {path} is not JSON ({error}); give the sweep.json of a launch") from error
    return [Trial(name, load_config(path.with_name(f"{name}.yaml")), values) for name, values in recorded.items()]


def home_of(trial: Trial) -> str:
    """The folder of the sweep that a run belongs to, beside the run's."""
    run = trial.config.run.model_copy(update={"name": sweep_name(trial.name)})
    return run_folder(trial.config.model_copy(update={"run": run})).home
