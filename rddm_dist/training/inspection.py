"""What a run folder holds, for those who look after it: its checkpoints listed, verified and pruned."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from data_pipeline import storage
from data_pipeline.errors import ConfigError, EnvironmentFault, ModelError
from rddm_dist.config import Config, load_config
from rddm_dist.tracking.journal import read_journal
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.folder import CONFIG_FILE, JOURNAL_FILE, RunFolder, read_segments
from rddm_dist.training.ownership import peek, take
from rddm_dist.training.retention import Retention, scores_in
from rddm_dist.training.selection import SEARCH_DIR

ROWS = (ckpt.CHECKPOINTS, SEARCH_DIR, ckpt.AVERAGES)

State = Literal["committed", "unfinished", "damaged", "newer format"]


@dataclass(frozen=True)
class Place:
    """What somebody named: a run folder (path or URL), or with `checkpoint` one checkpoint folder inside it."""

    home: str
    checkpoint: str = ""


@dataclass(frozen=True)
class Entry:
    """A checkpoint folder as its COMMIT.json alone tells; its files are not looked at.

    row: checkpoints, search or averages; checkpoint: None unless the state is "committed"; problem: "" or why it is
    not; num_bytes: of its files.
    """

    row: str
    step: int
    uri: str
    state: State
    checkpoint: ckpt.Checkpoint | None
    problem: str
    num_bytes: int


# -- finding -----------------------------------------------------------------------------------------------------------


def place_of(given: str) -> Place:
    """The run folder or checkpoint that RUN or CHECKPOINT names. Raises ModelError for anything else."""
    uri = str(storage.local_path(given).resolve()) if storage.is_local(given) else given.rstrip("/")
    if _is_run(uri):
        return Place(uri)
    home, row, name = ["", "", *uri.rsplit("/", 2)][-3:]
    if row in ROWS and ckpt.STEP_NAME.fullmatch(name) and _is_run(home) and storage.exists(uri):
        return Place(home, uri)
    raise ModelError(
        f"{given} is neither a run folder (one with {CONFIG_FILE}) nor a checkpoint inside one; give for example "
        "runs/demo or runs/demo/checkpoints/step-00001000"
    )


def run_of(given: str) -> str:
    """The run folder that RUN names. Raises ModelError for anything else, a checkpoint included."""
    place = place_of(given)
    if place.checkpoint:
        raise ModelError(f"{given} is one checkpoint; give its run folder {place.home}")
    return place.home


def config_of(home: str) -> Config:
    """The configuration in a run folder."""
    return load_config(storage.join(home, CONFIG_FILE))


def scan(home: str, row: str) -> list[Entry]:
    """The checkpoints of one row of a run, newest first; [] where it has none."""
    folder = storage.join(home, row)
    return [look(row, ckpt.step_folder(folder, step)) for step in ckpt.list_steps(folder)]


def look(row: str, uri: str) -> Entry:
    """A checkpoint folder of a run as its COMMIT.json tells."""
    step = int(uri.rsplit("-", 1)[-1])
    if not ckpt.is_committed(uri):
        return Entry(row, step, uri, "unfinished", None, "it was never finished", _measure(uri))
    try:
        checkpoint = ckpt.read_commit(uri)
    except ckpt.NewerFormat as error:
        return Entry(row, step, uri, "newer format", None, str(error), _measure(uri))
    except ModelError as error:
        return Entry(row, step, uri, "damaged", None, str(error), _measure(uri))
    return Entry(row, step, uri, "committed", checkpoint, "", checkpoint.num_bytes)


def read_scores_of(home: str, metric: str) -> dict[int, float]:
    """Step -> value of a metric, from the journal of a run, wherever it lives."""
    if storage.is_local(home):
        return scores_in(read_journal(storage.local_path(home) / JOURNAL_FILE), metric)
    segments = read_segments(RunFolder(home, work=storage.local_path(".")))
    return scores_in([json.loads(line) for line in segments.splitlines()], metric)


def newest_sound(home: str) -> ckpt.Checkpoint:
    """The newest checkpoint of a run that verifies, of its search while that lasts. ModelError where there is none."""
    for row in (ckpt.CHECKPOINTS, SEARCH_DIR):
        found = ckpt.find_newest(storage.join(home, row))
        if found is not None:
            return found
    raise ModelError(f"run {home} has no checkpoint yet")


def _is_run(uri: str) -> bool:
    return RunFolder(uri, storage.local_path(".")).exists(CONFIG_FILE)


def _measure(uri: str) -> int:
    """Bytes of the files in a folder that others may be writing or deleting."""
    total = 0
    for name in storage.list_names(uri):
        try:
            total += storage.size(storage.join(uri, name))
        except FileNotFoundError:
            continue
    return total


# -- verifying ---------------------------------------------------------------------------------------------------------


def find_damage(entry: Entry, *, on_file: Callable[[], None] = lambda: None) -> str:
    """Read every byte of a checkpoint.   -> "" or what is wrong with it

    on_file: called after each file.
    """
    if entry.checkpoint is None:
        return entry.problem
    count = len(entry.checkpoint.files)
    for index in range(count):
        try:
            ckpt.verify(entry.checkpoint, share=(index, count))
        except ModelError as error:
            return str(error)
        on_file()
    return ""


# -- pruning -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruning:
    """What a prune deletes and what it leaves.

    removed: the checkpoints and leftovers that go; kept: step -> why, of the checkpoints; notes: what is out of order.
    """

    removed: tuple[Entry, ...]
    kept: Mapping[int, str]
    notes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.removed)


def prune(home: str, retention: Retention, *, dry_run: bool = False) -> Pruning:
    """Delete the checkpoints that the retention does not keep, and all unfinished leftovers.

    The newest sound one stays in any case: it is verified before anything is deleted, and the retention counts from it.
    Committed averages stay. The run folder is owned meanwhile. dry_run: delete nothing. Raises ConfigError for a
    retention that keeps nothing, EnvironmentFault while somebody owns the run or where files cannot be deleted,
    ModelError where no checkpoint is sound or one is of a later version.
    """
    if retention.keep_last < 1:
        raise ConfigError(
            f"--keep-last {retention.keep_last} would leave nothing to go on from; give 1 or more (to delete a whole "
            "run, remove its folder)"
        )
    if somebody := peek(home):
        raise EnvironmentFault(f"run folder {home} is in use by {somebody}; a running training prunes by itself")
    if dry_run:
        return plan_pruning(home, retention)
    with take(home) as owner:
        pruning = plan_pruning(home, retention)
        for entry in pruning.removed:
            owner.check()
            try:
                ckpt.remove(entry.uri)
            except OSError as error:
                raise EnvironmentFault(f"{entry.uri} cannot be deleted: {error.strerror or error}") from error
    return pruning


def plan_pruning(home: str, retention: Retention) -> Pruning:
    """What `prune` would delete now; nothing is written."""
    scores = read_scores_of(home, retention.metric) if retention.keep_best else {}
    if retention.keep_best and not scores:
        raise ConfigError(
            f"keep_best={retention.keep_best} goes by {retention.metric}, of which the journal of {home} has no value; "
            "give another --metric, or --keep-best 0"
        )
    removed: list[Entry] = []
    notes: list[str] = []
    kept: dict[int, str] = {}
    for row in ROWS:
        entries = scan(home, row)
        newer = [entry.problem for entry in entries if entry.state == "newer format"]
        if newer:
            raise ckpt.NewerFormat(newer[0])
        removed += [entry for entry in entries if entry.state == "unfinished"]
        committed = [entry for entry in entries if entry.state != "unfinished"]
        if row == ckpt.AVERAGES or not committed:
            continue
        newest = _find_sound(storage.join(home, row), committed, notes)
        candidates = [entry.step for entry in committed if entry.checkpoint and entry.step <= newest]
        reasons = retention.kept(candidates, scores)
        removed += [entry for entry in committed if entry.step <= newest and entry.step not in reasons]
        if row == ckpt.CHECKPOINTS:
            kept = reasons
    return Pruning(tuple(removed), kept, tuple(notes))


def _find_sound(folder: str, committed: Sequence[Entry], notes: list[str]) -> int:
    """The step of the newest sound one; the damaged ones above it are noted."""
    damaged: list[str] = []
    for entry in committed:
        problem = find_damage(entry)
        if not problem:
            if damaged:
                notes += [f"{each}; it is left as it is" for each in damaged]
                notes.append(f"the newest sound checkpoint is {entry.uri}, which stays")
            return entry.step
        damaged.append(problem)
    raise ckpt.none_sound(folder, damaged)
