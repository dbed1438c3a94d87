"""An evaluation from beginning to end: what is to be computed, the units that are not done yet, and what came out.

Each result is stored, under a name made of everything it follows from, as soon as it comes: an evaluation that was
killed goes on where it stopped, and whoever runs the units, in whatever order, the report is the same.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline import storage
from data_pipeline.decode import decode_image
from data_pipeline.errors import BadSample, ConfigError, DataError, EnvironmentFault, RddmError
from data_pipeline.rng import stable_id
from rddm_dist.evaluation import results
from rddm_dist.evaluation.cases import Case, CaseStore, Extremes
from rddm_dist.evaluation.job import (
    EvalSettings,
    Job,
    Unit,
    digest_of,
    make_identity,
    numbered_entries,
    plan_units,
)
from rddm_dist.evaluation.protocol import get_protocol
from rddm_dist.evaluation.results import ResultStore
from rddm_dist.evaluation.runner import GENERATED_CASES, run_here
from rddm_dist.evaluation.sources import Entry, Source, attach_outputs, check_entry_sizes, require
from rddm_dist.evaluation.writing import writing

if TYPE_CHECKING:
    from rddm_dist.loading import Model

log = logging.getLogger(__name__)

IMAGES = "images"
PICTURES = (results.PNG, results.CASE)
READERS = 16

Execute = Callable[[Job, Sequence[Unit]], Iterator[bytes]]
Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True)
class Plan:
    """A job and its units; source: what they are read from, None for generation."""

    job: Job
    units: Sequence[Unit]
    source: Source | None = None
    networks: dict[str, Any] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return sum(len(unit.entries) for unit in self.units)


@dataclass(frozen=True)
class Outcome:
    """Rows of all images by key, those that failed included; how long they took; the pictures for a report."""

    rows: list[dict[str, Any]]
    seconds: list[float]
    cases: list[Case]
    reused: int
    vectors: dict[str, np.ndarray]  # (N, D) float32 in the order of the keys


def plan_restoration(
    model: Model, source: Source, settings: EvalSettings, *, limit: int = 0, keep_images: bool = False
) -> Plan:
    """A model restores the inputs of `source`, all or those of the first `limit` keys.

    Raises ConfigError, DataError or ModelError for what does not fit together, before anything is computed.
    """
    from rddm_dist.evaluation.restore import restore_settings

    settings.check()
    sampler = restore_settings(model.config, steps=settings.steps, eta=settings.eta, seed=settings.seed)
    sampler.check_restoring()
    sampler.check(model.schedule)
    protocol = get_protocol(settings.protocol)
    if not protocol.compares_pairs:
        raise ConfigError(
            f"protocol {protocol.name} compares no pairs of images; what a model restores is scored by another one, "
            "such as rgb"
        )
    require(source, input_for="the evaluation of a model that restores")
    sees_mask = model.config.model.condition == "input_mask"
    if sees_mask or protocol.needs_mask:
        needing = f"protocol {protocol.name}" if protocol.needs_mask else "the model"
        require(source, mask_for=needing)
    entries = _first(source.entries(), limit)
    networks, lpips_side = describe_networks(settings)
    check_entry_sizes(
        protocol,
        entries,
        metrics=settings.pair_metrics,
        side=sampler.preprocess.resize,
        needs_mask=sees_mask,
        lpips_side=lpips_side,
    )
    _check_count(settings, len(entries))
    identity = make_identity(
        settings,
        fingerprint=source.fingerprint,
        weights_digest=model.digest,
        sampler=sampler.describe(),
        networks=networks,
    )
    job = Job(
        "restoration",
        settings,
        identity,
        source=source.spec(),
        model=model.path,
        weights_digest=model.digest,
        keep_images=keep_images,
    )
    return Plan(job, plan_units(entries, batch_size=settings.batch_size), source, networks)


def plan_files(source: Source, folder: Path, settings: EvalSettings, *, limit: int = 0) -> Plan:
    """The images of `folder` are what another method made of the inputs of `source`; they belong together by name."""
    settings.check()
    protocol = get_protocol(settings.protocol)
    if protocol.needs_mask:
        require(source, mask_for=f"protocol {protocol.name}")
    entries = _first(attach_outputs(source.entries(), folder), limit)
    networks, lpips_side = describe_networks(settings)
    check_entry_sizes(protocol, entries, metrics=settings.pair_metrics, lpips_side=lpips_side)
    _check_count(settings, len(entries))
    outputs = digest_of([[entry.key, entry.digests["restored"]] for entry in entries])
    identity = make_identity(settings, fingerprint=source.fingerprint, weights_digest=outputs, networks=networks)
    job = Job("files", settings, identity, source=source.spec(), weights_digest=outputs)
    return Plan(job, plan_units(entries, batch_size=settings.batch_size), source, networks)


def plan_generation(
    model: Model, numbers: range, settings: EvalSettings, *, size: tuple[int, int], keep_images: bool = False
) -> Plan:
    """A model makes the images of these numbers.   size: (height, width)"""
    from rddm_dist.evaluation.restore import restore_settings

    settings.check()
    sampler = restore_settings(model.config, steps=settings.steps, eta=settings.eta, seed=settings.seed)
    sampler.check_generating()
    sampler.check(model.schedule)
    protocol = get_protocol(settings.protocol)
    if protocol.compares_pairs:
        raise ConfigError(
            f"protocol {protocol.name} compares pairs of images and --num makes images without partners; give "
            "--protocol generation"
        )
    _check_count(settings, len(numbers))
    networks, _ = describe_networks(settings)
    identity = make_identity(
        settings, fingerprint="", weights_digest=model.digest, sampler=sampler.describe(), networks=networks, size=size
    )
    job = Job(
        "generation",
        settings,
        identity,
        model=model.path,
        weights_digest=model.digest,
        size=size,
        keep_images=keep_images,
    )
    return Plan(job, plan_units(numbered_entries(numbers, size), batch_size=settings.batch_size), None, networks)


def plan_features(source: Source, settings: EvalSettings, *, limit: int = 0, shows_cases: bool = False) -> Plan:
    """The targets of `source` go through the feature network as they are.

    What they give does not depend on sampler and protocol, so that one reference serves all evaluations.
    """
    settings.check()
    plain = EvalSettings(
        protocol="generation",
        metrics=settings.set_metrics,
        batch_size=settings.batch_size,
        threads=settings.threads,
        device=settings.device,
        features=settings.features,
    )
    networks, _ = describe_networks(plain)
    identity = make_identity(plain, fingerprint=source.fingerprint, networks=networks)
    job = Job("features", plain, identity, source=source.spec(), shows_cases=shows_cases)
    entries = _first(source.entries(), limit)
    _check_count(plain, len(entries))
    return Plan(job, plan_units(entries, batch_size=settings.batch_size), source, networks)


def _check_count(settings: EvalSettings, count: int) -> None:
    """Raise DataError for fewer images than metrics of a whole set need."""
    if settings.set_metrics and count < 2:
        raise DataError(f"{','.join(settings.set_metrics)} of {count} image(s) means nothing; give at least 2")


def describe_networks(settings: EvalSettings) -> tuple[dict[str, Any], int]:
    """What LPIPS and set metrics are computed with, and the least side that LPIPS takes.

    Raises ModelError for a file that does not hold it.
    """
    networks: dict[str, Any] = {}
    lpips_side = 1
    if settings.lpips and "lpips" in settings.pair_metrics:
        from rddm_dist.evaluation.features import load_lpips

        distance = load_lpips(settings.lpips)
        networks["lpips"], lpips_side = distance.describe(), distance.smallest
    if settings.features:
        from rddm_dist.evaluation.features import load_features

        network = load_features(settings.features)
        networks["features"] = network.describe()
        if "is" in settings.set_metrics and not network.has_logits:
            from data_pipeline.errors import ModelError

            raise ModelError(
                f"--metrics=is needs class logits and --features {settings.features} ({network.name}) gives none; "
                "leave it out or give a network with them"
            )
    return networks, lpips_side


def run_plan(plan: Plan, *, out: str, execute: Execute = run_here, progress: Progress | None = None) -> Outcome:
    """Run the units whose results are not below `out` yet, and collect all.   out: a path or a URL

    execute: runs units somewhere, giving the bytes of their tables in any order. Raises RddmError where one is missing
    at the end.
    """
    return _Collector(plan, out, progress or (lambda done, total: None)).run(execute)


class _Collector:
    """Results of one job as they come: stored, and kept for the report."""

    def __init__(self, plan: Plan, out: str, progress: Progress) -> None:
        self._plan, self._job, self._progress = plan, plan.job, progress
        self._store = ResultStore(out, plan.job.digest)
        self._cases = CaseStore(self._store.folder)
        self._images = storage.join(out, IMAGES)
        self._extremes = Extremes()
        self._units = {unit.digest(plan.job.digest): unit for unit in plan.units}
        self._rows: list[dict[str, Any]] = []
        self._done = 0

    def run(self, execute: Execute) -> Outcome:
        missing = self._take_finished()
        reused = self._done
        if reused:
            log.info("%d of %d images were evaluated before", reused, self._plan.num_images)
        self._progress(self._done, self._plan.num_images)
        if missing:
            # The largest first: at the end no worker waits long for another, and what does not fit shows at once.
            order = [self._units[digest] for digest in reversed(missing)]
            for data in execute(self._job, order):
                table = results.from_bytes(data)
                digest = table.schema.metadata[results.UNIT_KEY].decode()
                if digest not in missing:
                    raise RddmError(
                        f"the results of a unit came twice, or of one that nobody asked for ({digest[:12]})"
                    )
                del missing[digest]
                self._keep(digest, table)
                self._progress(self._done, self._plan.num_images)
        if missing:
            raise RddmError(f"{len(missing)} of {len(self._units)} units came back without results")
        return self._outcome(reused)

    def _take_finished(self) -> dict[str, None]:
        """Count in what is stored with its pictures.   -> the digests of the units that are not, in their order"""
        with ThreadPoolExecutor(READERS) as pool:
            found = dict(zip(self._units, pool.map(self._finished_rows, self._units), strict=True))
        finished = {digest: rows for digest, rows in found.items() if rows is not None}
        for rows in finished.values():
            self._count(rows)
        # An evaluation of fewer of these images may have removed pictures that this one shows.
        lacking = set(self._shown()) - self._cases.keys
        again = {digest for digest, rows in finished.items() if any(row["key"] in lacking for row in rows)}
        self._rows = [row for digest, rows in finished.items() if digest not in again for row in rows]
        self._done = len(self._rows)
        return {digest: None for digest in self._units if digest not in finished or digest in again}

    def _finished_rows(self, digest: str) -> list[dict[str, Any]] | None:
        """The stored rows of a unit; None where it is to be computed, or computed again for its images."""
        table = self._store.get(digest)
        rows = None if table is None else results.rows_of(table)
        if rows is None or (self._job.keep_images and not all(self._is_kept(row) for row in rows)):
            return None
        return rows

    def _is_kept(self, row: dict[str, Any]) -> bool:
        """Whether the image of a row lies among those that are kept, and not another one of its name."""
        if "kind" in row:
            return True
        try:
            image = decode_image(storage.read_bytes(storage.join(self._images, f"{row['key']}.png")), "png", channels=3)
        except (BadSample, FileNotFoundError):
            return False
        return hashlib.sha256(image.tobytes()).hexdigest() == row["restored_sha256"]

    def _keep(self, digest: str, table: results.Table) -> None:
        """Store a table, its pictures first: what is stored is complete."""
        rows = results.rows_of(table)
        self._count(results.rows_of(results.without(table, PICTURES)))
        with writing(self._images):
            self._write(digest, table, rows)

    def _write(self, digest: str, table: results.Table, rows: Sequence[dict[str, Any]]) -> None:
        shown = set(self._shown()) if any(results.CASE in row for row in rows) else set()
        for row in rows:
            if results.PNG in row:
                storage.make_folder(self._images)
                storage.write_bytes_atomic(storage.join(self._images, f"{row['key']}.png"), row[results.PNG])
            elif "kind" in row and self._job.keep_images:
                storage.remove(storage.join(self._images, f"{row['key']}.png"))  # of an earlier evaluation
            if results.CASE in row and row["key"] in shown:
                self._cases.put(Case.from_json(row[results.CASE]))
        self._store.put(digest, results.without(table, PICTURES))

    def _count(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows.extend(rows)
        self._done += len(rows)
        for row in rows:
            if "psnr" in row:
                self._extremes.add(row["psnr"], row["key"])
            elif self._job.kind == "features" and "kind" not in row:
                self._extremes.add(stable_id(row["key"]), row["key"])

    def _shown(self) -> list[str]:
        """The images that the report shows, as far as is known: those whose pictures workers send."""
        if not self._job.shows_cases:
            return []
        if self._job.kind != "generation":
            return self._extremes.keys
        made = (row["key"] for row in self._rows if "kind" not in row)
        return sorted(key for key in made if int(key) < GENERATED_CASES)

    def _outcome(self, reused: int) -> Outcome:
        shown = self._shown()
        self._cases.keep(shown)
        return Outcome(
            rows=sorted(self._rows, key=lambda row: row["key"]),
            seconds=[row["seconds"] for row in self._rows if "seconds" in row],
            cases=self._cases.load(shown),
            reused=reused,
            vectors=self._vectors() if self._job.settings.features else {},
        )

    def _vectors(self) -> dict[str, np.ndarray]:
        found: dict[str, list[tuple[str, np.ndarray]]] = {name: [] for name in results.VECTORS}
        with ThreadPoolExecutor(READERS) as pool:
            tables = list(pool.map(partial(self._store.get, whole=False), self._units))
        for table in tables:
            if table is None:
                raise EnvironmentFault(f"results in {self._store.folder} went away; run the same command again")
            for name, values in found.items():
                values.extend(results.vectors_of(table, name))
        ordered = {name: sorted(values, key=lambda item: item[0]) for name, values in found.items() if values}
        return {name: np.stack([vector for _, vector in values]) for name, values in ordered.items()}


def seconds_per_image(outcome: Outcome) -> float | None:
    """The median over images of the time their forward batch took, divided by its images."""
    return statistics.median(outcome.seconds) if outcome.seconds else None


def _first(entries: list[Entry], limit: int) -> list[Entry]:
    return entries[:limit] if limit else entries
