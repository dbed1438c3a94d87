"""Bad samples of a run: each written down once in quarantine.jsonl, counted, and bounded by a budget."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.batch import Replaced
from data_pipeline.errors import DataError
from rddm_dist import comm
from rddm_dist.training.prepare import QUARANTINE_FILE, Prepared

LISTED = 10


class Quarantine:
    """The bad samples this run has met, over all its starts. Rank 0 keeps the file."""

    def __init__(self, prepared: Prepared) -> None:
        self._path = prepared.run_dir / QUARANTINE_FILE
        self._uris = prepared.data.uris
        self._budget, self._num_samples = prepared.config.data.bad_sample_budget, prepared.data.num_samples
        with comm.together():
            self._known = _read(self._path) if comm.rank() == 0 else {}
        self.count = comm.broadcast_object(len(self._known) if comm.rank() == 0 else None)

    def record(self, step: int, replaced: Sequence[Replaced]) -> None:
        """Write down what is new. Every worker calls it, with the bad samples of its own rows of the batch.

        Raises DataError on every worker when the run's bad samples exceed the budget.
        """
        gathered = comm.gather_object(list(replaced))
        with comm.together():
            if gathered is not None:
                self._append(step, sorted({bad for own in gathered for bad in own}, key=lambda bad: bad.position))
        self.count = comm.broadcast_object(len(self._known) if comm.rank() == 0 else None)
        with comm.together():
            if comm.rank() == 0 and self.count > self._budget * self._num_samples:
                raise DataError(self._describe_excess())

    def _append(self, step: int, found: Sequence[Replaced]) -> None:
        lines = []
        for bad in found:
            name = (self._uris[bad.dataset], bad.key)
            if name in self._known:
                continue
            self._known[name] = bad.reason
            row = {"data": name[0], "key": bad.key, "reason": bad.reason, "step": step, "position": bad.position}
            lines.append(json.dumps(row) + "\n")
        if not lines:
            return
        with open(self._path, "a") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())

    def _describe_excess(self) -> str:
        listed = "; ".join(list(self._known.values())[:LISTED])
        more = f"; and {self.count - LISTED} more" if self.count > LISTED else ""
        return (
            f"{self.count} of {self._num_samples} samples cannot be read, more than data.bad_sample_budget="
            f"{self._budget} allows: {listed}{more}; all are in {self._path}; mend the data or raise the budget"
        )


def _read(path: Path) -> dict[tuple[str, str], str]:
    """(dataset, key) -> reason of what is written down; a last line that was cut short does not count."""
    if not path.is_file():
        return {}
    known = {}
    text = path.read_text()
    for line in text[: text.rfind("\n") + 1].splitlines():
        row = json.loads(line)
        known[(row["data"], row["key"])] = row["reason"]
    if not text.endswith("\n") and text:
        path.write_text(text[: text.rfind("\n") + 1])
    return known
