"""Is this dataset sound? Its files, every image or a counted sample of them, and leaks into another dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from data_pipeline import storage
from data_pipeline.doctor_checks import KINDS, Finding, suspicious_pairs
from data_pipeline.doctor_duplicates import find_duplicates, find_leaks
from data_pipeline.doctor_measures import Measurement, measure
from data_pipeline.errors import AlteredSample, BadSample, ConfigError, DataError
from data_pipeline.manifest import Manifest, ShardInfo, ShardTable
from data_pipeline.reader import Dataset, EvalEntry
from data_pipeline.records import Sample
from data_pipeline.statistics import draw
from data_pipeline.threads import map_ordered

QUICK_IMAGES = 200
QUICK_OTHERS = 2000  # images of the other dataset that a quick run looks at
SEED = 0  # of the samples drawn: two runs look at the same images

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Subject:
    """A dataset as it is examined: what of it can be opened (None for nothing), its whole images, those looked at."""

    uri: str
    dataset: Dataset | None
    num_images: int
    entries: tuple[EvalEntry, ...]

    def sample(self, key: str) -> Sample:
        """An image looked at, whole."""
        assert self.dataset is not None, "what was looked at can be opened"
        return self.dataset.whole(next(entry for entry in self.entries if entry.key == key))


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found. subject, other: the dataset and the one compared with; is_hashed: whether sha256 was
    compared; measurements: of the images that could be read, by key; findings: in the order of KINDS, errors first."""

    manifest: Manifest
    subject: Subject
    other: Subject | None
    is_hashed: bool
    measurements: tuple[Measurement, ...]
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        """Whether there is no error among the findings; warnings are allowed."""
        return all(finding.severity != "error" for finding in self.findings)

    def by_kind(self) -> dict[str, list[Finding]]:
        """The findings of each kind there are any of, errors first."""
        groups = {kind: [finding for finding in self.findings if finding.kind == kind] for kind in KINDS}
        return {kind: found for kind, found in groups.items() if found}


def diagnose(
    uri: str,
    *,
    other_uri: str = "",
    is_quick: bool = False,
    limit: int = 0,
    jobs: int = 0,
    progress: Progress | None = None,
) -> Diagnosis:
    """Examine the dataset at `uri`; the same whatever the number of jobs.

    other_uri: a dataset that must not show the same pictures ("" for none). is_quick: compare no shard hashes and look
    at QUICK_IMAGES counted-random images (and QUICK_OTHERS of the other dataset) instead of all. limit: look at this
    many of `uri` instead; 0 for the default. jobs: threads, 0 for one per core. progress(done, total) counts images and
    hashed shards. Memory: about 4 KB for an image looked at.

    What is wrong inside the dataset is a finding. Raises DataError where there is no dataset, or no sound other one;
    ConfigError for a wrong argument.
    """
    if limit < 0:
        raise ConfigError(f"--limit={limit} must be 0 (no limit) or more")
    manifest = Manifest.load(uri)
    dataset, findings = check_shards(uri, manifest)
    subject = _choose(uri, dataset, limit or (QUICK_IMAGES if is_quick else 0))
    other = _choose(other_uri, Dataset(other_uri), QUICK_OTHERS if is_quick else 0) if other_uri else None
    hashed = [] if is_quick else list(manifest.shards)
    total = len(hashed) + len(subject.entries) + (len(other.entries) if other else 0)
    count = _Counter(total, progress)

    for finding in map_ordered(lambda shard: check_hash(uri, shard), hashed, jobs=jobs):
        count.advance()
        if finding is not None and all(finding.keys != known.keys for known in findings):
            findings.append(finding)
    measured, unreadable = _measure_all(subject, jobs=jobs, count=count)
    findings += [*unreadable, *suspicious_pairs(measured), *find_duplicates(measured)]
    if other is not None:
        other_measured, lost = _measure_all(other, jobs=jobs, count=count)
        if lost and not other_measured:
            raise DataError(f"--against {other_uri} is not readable: {lost[0].text}")
        findings += find_leaks(measured, other_measured, other_uri=other_uri)
        findings += [Finding("partial", (), f"{other_uri}: {bad.text}") for bad in lost]
    findings += _what_was_left_out(subject, other, is_quick=is_quick)
    order = list(KINDS)
    findings.sort(key=lambda finding: order.index(finding.kind))
    return Diagnosis(manifest, subject, other, not is_quick, tuple(measured), tuple(findings))


def check_shards(uri: str, manifest: Manifest) -> tuple[Dataset | None, list[Finding]]:
    """Manifest, indexes and the sizes of the shards.   -> a dataset of the shards that fit (None for none), findings"""
    dataset, findings, sound = Dataset(uri, manifest), [], []
    seen: dict[str, str] = {}
    for number, shard in enumerate(manifest.shards):
        try:
            index = dataset.index(number)
        except DataError as error:
            findings.append(Finding("shard", (shard.name,), str(error)))
            continue
        sound.append(shard)
        for key in index.keys:
            if key in seen:
                findings.append(Finding("key", (key,), f"{key} is in {seen[key]} and in {shard.name}"))
            seen[key] = shard.name
    if not sound:
        return None, findings
    if len(sound) == len(manifest.shards):
        return dataset, findings
    return Dataset(uri, replace(manifest, shards=ShardTable.of(sound))), findings


def check_hash(uri: str, shard: ShardInfo) -> Finding | None:
    """Read a whole shard and compare its sha256 with the manifest's."""
    location, digest = storage.join(uri, shard.name), hashlib.sha256()
    try:
        for chunk in storage.read_chunks(location):
            digest.update(chunk)
    except OSError as error:
        return Finding("shard", (shard.name,), f"{location} cannot be read: {error}")
    if digest.hexdigest() == shard.sha256:
        return None
    return Finding("hash", (shard.name,), f"{location} is not the shard the manifest names (sha256)")


def examine(dataset: Dataset, entry: EvalEntry) -> Measurement | Finding:
    """Read, decode and measure a whole image; a finding where that does not go."""
    try:
        members = [m for place in entry.places for m in dataset.index(place.shard_index)[place.offset].members]
        return measure(dataset.whole(entry), num_bytes=sum(member.size for member in members))
    except AlteredSample as error:
        return Finding("altered", (entry.key,), str(error))
    except BadSample as error:
        return Finding("unreadable", (entry.key,), str(error))


class _Counter:
    """Progress over several stages."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def advance(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _measure_all(subject: Subject, *, jobs: int, count: _Counter) -> tuple[list[Measurement], list[Finding]]:
    """Measurements and findings, each by key."""
    dataset = subject.dataset
    if dataset is None:
        return [], []
    # In the order of the shards, so that an index is read once.
    entries = sorted(subject.entries, key=lambda entry: entry.places)
    measured, bad = [], []
    for row in map_ordered(lambda entry: examine(dataset, entry), entries, jobs=jobs):
        count.advance()
        if isinstance(row, Measurement):
            measured.append(row)
        else:
            bad.append(row)
    return sorted(measured, key=lambda m: m.key), sorted(bad, key=lambda finding: finding.keys)


def _choose(uri: str, dataset: Dataset | None, limit: int) -> Subject:
    """At most `limit` images, counted-random; all for 0."""
    images = [] if dataset is None else dataset.images()
    chosen = draw(len(images), limit or len(images), seed=SEED, purpose="doctor")
    return Subject(uri, dataset, len(images), tuple(images[i] for i in chosen))


def _what_was_left_out(subject: Subject, other: Subject | None, *, is_quick: bool) -> list[Finding]:
    parts = [
        f"{len(part.entries)} of {part.num_images} images of {part.uri}"
        for part in (subject, other)
        if part is not None and len(part.entries) < part.num_images
    ]
    parts += ["no shard hashes"] if is_quick else []
    return [Finding("partial", (), f"looked at {', '.join(parts)}")] if parts else []
