"""The end of a sweep: its table, kept beside the runs, and its MLflow run, which must not stay running.

An array of jobs has no driver that could see to it. The last task to end does, with `python -m cluster.sweep_end
SWEEP_JSON`, and where that was killed whoever asks next how the sweep stands.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from cluster.submission import Submitted
from cluster.sweep import TABLE_FILE, SweepTable, finish_parent, home_of, is_parent_running, read_sweep, read_table
from data_pipeline import storage
from data_pipeline.errors import RddmError
from rddm_dist.cli.progress import say
from rddm_dist.config import Config, load_config
from rddm_dist.training.folder import RunFolder, try_sending
from rddm_dist.training.standing import folder_at
from rddm_dist.training.stopping import LAUNCHES

ENDED = "ended-"  # and the name of a run: a file in the record of an array, with the exit code of the run's task
RESUMABLE = 75
WITHOUT_A_WORD = "its job ended without a word; see rddm logs"


def exit_codes(record: Path, names: Iterable[str]) -> dict[str, int]:
    """Name of a run -> exit code, of the tasks of an array that have ended."""
    paths = {name: record / f"{ENDED}{name}" for name in names}
    return {name: int(path.read_text()) for name, path in paths.items() if path.is_file()}


def failures(codes: Mapping[str, int]) -> dict[str, str]:
    """Name of a run -> why it has failed, of those that have."""
    return {name: f"exit code {code}; see rddm logs" for name, code in codes.items() if code not in (0, RESUMABLE)}


def table_of(submitted: Submitted, run: str, *, has_ended: bool = False) -> SweepTable:
    """How the runs of a submitted sweep stand; `run` as given to `rddm status`. Of a sweep that is done, or whose job
    has ended, the table is kept in its folder and the MLflow run ended, if nobody has been there to do it."""
    is_here = storage.is_local(submitted.home)
    home = str(submitted.record.local.parent.parent) if is_here else submitted.home
    failed = failures(exit_codes(submitted.record.local, submitted.trials))
    table = read_table(submitted.trials, home.rpartition("/")[0], failed=failed)
    if has_ended:
        rows = [replace(row, failed=WITHOUT_A_WORD) if row.status == "running" else row for row in table.rows]
        table = SweepTable(tuple(rows))
    folder = folder_at(home)

    def conclude() -> None:
        record = storage.join(home, f"{LAUNCHES}/{submitted.record.number}")
        config = load_config(storage.join(record, f"{next(iter(submitted.trials))}.yaml"))
        # Of one that is not done a driver may have told already, and have known more.
        if table.is_done or is_parent_running(config) or not folder.exists(TABLE_FILE):
            _conclude(table, folder, config)

    if (table.is_done or has_ended) and folder.read(TABLE_FILE) != table.as_markdown().encode():
        try_sending("ending the MLflow run of the sweep", conclude)
    return table


def _conclude(table: SweepTable, folder: RunFolder, config: Config) -> None:
    """End the MLflow run, keep the table."""
    finish_parent(config, table.outcome, best=table.best)
    folder.write(TABLE_FILE, table.as_markdown().encode())


def main() -> None:
    """What every task of an array runs at its end; only after the last one there is something to do."""
    try:
        [path] = sys.argv[1:]
        trials = read_sweep(path)
        codes = exit_codes(Path(path).parent, [trial.name for trial in trials])
        if len(codes) < len(trials):
            return
        values, home = {trial.name: trial.values for trial in trials}, home_of(trials[0])
        table = read_table(values, home.rpartition("/")[0], failed=failures(codes))
        say(table.as_text())
        _conclude(table, folder_at(home), trials[0].config)
    except RddmError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
