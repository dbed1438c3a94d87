"""How a run stands, by its journal alone: for whoever looks at it from outside."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from data_pipeline import storage
from rddm_dist.training.folder import CONFIG_FILE, JOURNAL_FILE, RunFolder, read_segments

Status = Literal["none", "running", "done", "stopped"]


@dataclass(frozen=True)
class Standing:
    """What a run's journal says.

    status: running also where a start died without a word; steps: of the whole run, 0 if not known; step: the last one
    logged; starts: how often it was started or resumed; reason: of the last stop; saved: step of the last checkpoint;
    time: of the last record, seconds since the epoch; metrics: the newest value of each name.
    """

    status: Status = "none"
    step: int = 0
    steps: int = 0
    starts: int = 0
    reason: str = ""
    saved: int = 0
    time: float = 0.0
    metrics: dict[str, float] | None = None

    @property
    def age_s(self) -> float:
        return max(0.0, time.time() - self.time)


def folder_at(run: str) -> RunFolder:
    """The run folder at a path or URL, to be looked at."""
    if storage.is_local(run):
        home = storage.local_path(run).resolve()
        return RunFolder(str(home), home)
    return RunFolder(run.rstrip("/"), Path())


def read_standing(folder: RunFolder) -> Standing:
    """Read config and journal of a run; status `none` where it has not begun."""
    content = read_segments(folder) if folder.is_remote else folder.read(JOURNAL_FILE) or b""
    config = yaml.safe_load(folder.read(CONFIG_FILE) or b"") or {}
    steps = int(config.get("train", {}).get("steps", 0))
    return standing_of([json.loads(line) for line in content.splitlines() if line.endswith(b"}")], steps=steps)


def standing_of(records: list[dict[str, Any]], *, steps: int) -> Standing:
    """The same of journal records. steps: of the configuration, where no start says them."""
    status: Status = "none"
    step = starts = saved = 0
    reason = ""
    metrics: dict[str, float] = {}
    for record in records:
        event = record.get("event")
        step = record.get("step", step) if event in ("started", "resumed", "metrics", "finished") else step
        if event in ("started", "resumed"):
            status, starts, steps = "running", starts + 1, record["steps"]
        elif event == "metrics":
            metrics |= {name: float(value) for name, value in record["metrics"].items()}
        elif event == "saved":
            saved = record["step"]
        elif event == "finished":
            status, reason = record["status"], record["reason"]
    return Standing(status, step, steps, starts, reason, saved, records[-1]["time"] if records else 0.0, metrics)
