"""Bad samples of a run: each written down once in quarantine.jsonl, counted, and bounded by a budget."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from data_pipeline.batch import Replaced
from data_pipeline.errors import BadSample, DataError, EnvironmentFault
from data_pipeline.reader import Dataset
from data_pipeline.retry import RetryPolicy
from rddm_dist import comm
from rddm_dist.training.folder import RunFolder
from rddm_dist.training.prepare import QUARANTINE_FILE, Prepared

log = logging.getLogger(__name__)

LISTED = 10


@dataclass(frozen=True)
class _Row:
    """A line of the file. fingerprint, shard_index, offset, key: the sample, wherever its dataset lies; data: where it
    lay then; step, position: where the run met it."""

    fingerprint: str
    shard_index: int
    offset: int
    key: str
    reason: str
    data: str
    step: int
    position: int

    @property
    def sample(self) -> tuple[str, str]:
        return self.fingerprint, self.key


class Quarantine:
    """The bad samples this run has met, over all its starts. Rank 0 keeps the file.

    `count`: how many; `excess`: what to say where they are more than the budget allows, else empty. Both are known to
    every worker.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._folder, self._path = prepared.folder, prepared.folder.uri(QUARANTINE_FILE)
        self._data, self._budget = prepared.data, prepared.config.data.bad_sample_budget
        self._retry = RetryPolicy(deadline_s=prepared.config.data.read_deadline_s)
        self._known: dict[tuple[str, str], _Row] = {}
        self._is_behind = False  # what is known could not be written down yet
        with comm.together():
            if comm.rank() == 0:
                self._known = _read(self._folder)
                if self._is_over_budget():
                    self._release_mended()
        self._share()

    def record(self, step: int, replaced: Sequence[Replaced]) -> None:
        """Write down what is new. Every worker calls it, with the bad samples of its own rows of the batch."""
        gathered = comm.gather_object(list(replaced))
        with comm.together():
            if gathered is not None:
                self._append(step, sorted((bad for own in gathered for bad in own), key=lambda bad: bad.position))
        self._share()

    def _share(self) -> None:
        excess = self._describe_excess() if self._is_over_budget() else ""
        self.count, self.excess = comm.broadcast_object((len(self._known), excess) if comm.rank() == 0 else None)

    def _is_over_budget(self) -> bool:
        return len(self._known) > self._budget * self._data.num_samples

    def _append(self, step: int, found: Sequence[Replaced]) -> None:
        before = len(self._known)
        for bad in found:
            row = _Row(
                fingerprint=self._data.manifests[bad.dataset].fingerprint,
                shard_index=bad.shard_index,
                offset=bad.offset,
                key=bad.key,
                reason=bad.reason,
                data=self._data.uris[bad.dataset],
                step=step,
                position=bad.position,
            )
            self._known.setdefault(row.sample, row)
        if len(self._known) > before or self._is_behind:
            try:
                self._write()
                self._is_behind = False
            except (OSError, EnvironmentFault) as error:  # storage that is away costs no run
                log.warning("%s cannot be written, it will be tried again: %s", self._path, error)
                self._is_behind = True

    def _write(self) -> None:
        lines = "".join(json.dumps(asdict(row)) + "\n" for row in self._known.values())
        self._folder.write(QUARANTINE_FILE, lines.encode())

    def _release_mended(self) -> None:
        """Forget what can be read again: someone has mended the data."""
        datasets = {
            manifest.fingerprint: Dataset(uri, manifest, retry=self._retry)
            for uri, manifest in zip(self._data.uris, self._data.manifests, strict=True)
        }
        for row in list(self._known.values()):
            try:
                datasets[row.fingerprint].sample(row.shard_index, row.offset)
            except BadSample:
                continue
            del self._known[row.sample]
        self._write()

    def _describe_excess(self) -> str:
        listed = "; ".join(row.reason for row in list(self._known.values())[:LISTED])
        more = f"; and {len(self._known) - LISTED} more" if len(self._known) > LISTED else ""
        return (
            f"{len(self._known)} of {self._data.num_samples} samples cannot be read, more than data.bad_sample_budget="
            f"{self._budget} allows: {listed}{more}; all are in {self._path}; mend the data or raise the budget"
        )


def _read(folder: RunFolder) -> dict[tuple[str, str], _Row]:
    """What is written down, by sample; a last line that was cut short is left out. DataError for a damaged file."""
    content = folder.read(QUARANTINE_FILE) or b""
    whole = content.rfind(b"\n") + 1
    try:
        rows = [_Row(**json.loads(line)) for line in content[:whole].decode().splitlines() if line.strip()]
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{folder.uri(QUARANTINE_FILE)} is damaged ({error}); remove the line, or the file to count anew"
        ) from error
    return {row.sample: row for row in rows}
