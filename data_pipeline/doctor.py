"""Is this dataset sound? Its files, every image or a counted sample of them, and leaks into another dataset."""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline import storage
from data_pipeline.doctor_checks import KINDS, Finding, suspicious_pairs
from data_pipeline.doctor_duplicates import find_duplicates, find_leaks
from data_pipeline.doctor_measures import Measurement, measure
from data_pipeline.errors import AlteredSample, BadSample, ConfigError, DataError
from data_pipeline.index import Entry, ShardIndex
from data_pipeline.manifest import Manifest, ShardInfo
from data_pipeline.reader import Dataset, EvalEntry, Place
from data_pipeline.records import Sample, decode_member, make_key
from data_pipeline.statistics import draw, draw_places
from data_pipeline.threads import map_ordered

QUICK_IMAGES = 200
QUICK_OTHERS = 2000  # images of the other dataset that a quick run looks at
SEED = 0  # of the samples drawn: two runs look at the same images

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Subject:
    """A dataset as it is examined.

    num_images: its whole images, as the manifest says (of a tiled dataset: those of which a tile was found);
    num_opened: shards whose index was read and fits; entries: the images looked at.
    """

    dataset: Dataset
    num_images: int
    num_opened: int
    entries: tuple[EvalEntry, ...]

    @property
    def uri(self) -> str:
        return self.dataset.uri

    def sample(self, key: str) -> Sample:
        """An image looked at, whole."""
        return self.dataset.whole(self._entry(key))

    def altered(self, key: str) -> list[tuple[str, np.ndarray]]:
        """What still decodes of an image looked at whose bytes are not those packed; of a tiled one, of such tiles.

        -> (caption, (H, W, 3) uint8). Raises DataError for a shard that is gone.
        """
        return [picture for place in self._entry(key).places for picture in read_altered(self.dataset, place)]

    def _entry(self, key: str) -> EvalEntry:
        return next(entry for entry in self.entries if entry.key == key)


@dataclass(frozen=True)
class Plan:
    """What of a dataset is read. limit: images looked at, 0 for all; shards: those opened; offsets: of the images in
    each shard, where they could be drawn from the manifest alone."""

    dataset: Dataset
    limit: int
    shards: tuple[int, ...]
    offsets: Mapping[int, Sequence[int]] | None


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
    at QUICK_IMAGES counted-random images (and QUICK_OTHERS of the other dataset) instead of all, in which case only the
    shards they lie in are opened, all only where images are cut into tiles. limit: look at this many of `uri` instead;
    0 for the default. jobs: threads, 0 for one per core. progress(stage, done, total) counts indexes in stage "open",
    then images and hashed shards in stage "examine". Memory: about 4 KB for an image looked at, 8 bytes for others.

    What is wrong inside the dataset is a finding. Raises DataError where there is no dataset, or no sound other one;
    ConfigError for a wrong argument.
    """
    if limit < 0:
        raise ConfigError(f"--limit={limit} must be 0 (no limit) or more")
    plan = plan_reading(Dataset(uri), limit or (QUICK_IMAGES if is_quick else 0), is_quick=is_quick)
    other_plan = None
    if other_uri:
        other_plan = plan_reading(Dataset(other_uri), QUICK_OTHERS if is_quick else 0, is_quick=is_quick)
    count = _Counter("open", len(plan.shards) + (len(other_plan.shards) if other_plan else 0), progress)
    subject, findings = open_shards(plan, jobs=jobs, count=count)
    other = None
    if other_plan is not None:
        other, faults = open_shards(other_plan, jobs=jobs, count=count)
        broken = next((fault for fault in faults if fault.kind == "shard"), None)
        if broken is not None:
            raise DataError(f"--against {other_uri} is not sound: {broken.text}")
    manifest = subject.dataset.manifest
    hashed = [] if is_quick else list(manifest.shards)
    count = _Counter("examine", len(hashed) + len(subject.entries) + (len(other.entries) if other else 0), progress)

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


def plan_reading(dataset: Dataset, limit: int, *, is_quick: bool) -> Plan:
    """What to read for at most `limit` images (0: all), counted-random; is_quick: no shard without one of them."""
    every = tuple(range(len(dataset.manifest.shards)))
    # Which tiles make an image stands in the indexes alone.
    if not limit or dataset.manifest.tiling is not None:
        return Plan(dataset, limit, every, None)
    offsets: dict[int, list[int]] = {}
    for place in draw_places(dataset, limit, seed=SEED):
        offsets.setdefault(place.shard_index, []).append(place.offset)
    return Plan(dataset, limit, tuple(offsets) if is_quick else every, offsets)


def open_shards(plan: Plan, *, jobs: int, count: _Counter) -> tuple[Subject, list[Finding]]:
    """Read indexes and the sizes of their shards.   -> the images of those that fit, findings"""
    dataset, findings = plan.dataset, []
    manifest, parts = dataset.manifest, []
    hashes: dict[int, np.ndarray] = {}
    found = map_ordered(lambda number: _open_index(dataset, number), plan.shards, jobs=jobs)
    for number, index in zip(plan.shards, found, strict=True):
        count.advance()
        if isinstance(index, DataError):
            findings.append(Finding("shard", (manifest.shards[number].name,), str(index)))
            continue
        digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in index.keys)
        hashes[number] = np.frombuffer(b"".join(digests), np.uint64)
        offsets = range(len(index)) if plan.offsets is None else plan.offsets.get(number, ())
        parts += [_as_image(Place(number, offset), index[offset]) for offset in offsets]
    findings += find_repeated_keys(dataset, hashes)
    if manifest.tiling is None:
        return Subject(dataset, manifest.num_samples, len(hashes), tuple(sorted(parts))), findings
    images = join_tiles(parts)
    chosen = draw(len(images), plan.limit or len(images), seed=SEED, purpose="doctor")
    return Subject(dataset, len(images), len(hashes), tuple(images[i] for i in chosen)), findings


def _open_index(dataset: Dataset, shard_index: int) -> ShardIndex | DataError:
    try:
        return dataset.index(shard_index)
    except DataError as error:
        return error


def _as_image(place: Place, entry: Entry) -> EvalEntry:
    """A sample as a whole image, a tile as a part of one."""
    tile = entry.tile
    if tile is None:
        return EvalEntry(entry.key, entry.width, entry.height, (place,))
    return EvalEntry(make_key(tile.image), tile.image_width, tile.image_height, (place,))


def join_tiles(parts: Sequence[EvalEntry]) -> list[EvalEntry]:
    """Whole images by key, each with the places of all its parts in the order given."""
    groups: dict[str, list[EvalEntry]] = {}
    for part in parts:
        groups.setdefault(part.key, []).append(part)
    return [
        group[0]._replace(places=tuple(place for part in group for place in part.places))
        for _, group in sorted(groups.items())
    ]


def find_repeated_keys(dataset: Dataset, hashes: Mapping[int, np.ndarray]) -> list[Finding]:
    """Keys in more than one shard.   hashes: shard -> (count,) uint64 of its keys, which tell where to look for them"""
    if not hashes:
        return []
    values, counts = np.unique(np.concatenate(list(hashes.values())), return_counts=True)
    repeated = values[counts > 1]
    findings = []
    seen: dict[str, str] = {}
    for number, own in hashes.items():
        name = dataset.manifest.shards[number].name
        for offset in np.flatnonzero(np.isin(own, repeated)).tolist():
            key = dataset.index(number).keys[offset]
            if key in seen:
                findings.append(Finding("key", (key,), f"{key} is in {seen[key]} and in {name}"))
            seen[key] = name
    return findings


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


def read_altered(dataset: Dataset, place: Place) -> list[tuple[str, np.ndarray]]:
    """What decodes of a sample some of whose bytes are not those packed; nothing of any other.

    -> (caption, (H, W, 3) uint8). Raises DataError for a shard that is gone.
    """
    entry = dataset.index(place.shard_index)[place.offset]
    shard = storage.join(dataset.uri, dataset.manifest.shards[place.shard_index].name)
    try:
        contents = [storage.read_range(shard, member.start, member.size) for member in entry.members]
    except OSError as error:
        raise DataError(f"{shard} cannot be read: {error}") from error
    is_altered = [zlib.crc32(data) != m.crc32 for m, data in zip(entry.members, contents, strict=True)]
    if not any(is_altered):
        return []
    pictures = []
    for member, data, altered in zip(entry.members, contents, is_altered, strict=True):
        caption = f"{entry.key}.{member.field}{', altered' if altered else ''}"
        with contextlib.suppress(BadSample):  # which of them are altered the finding says
            image = decode_member(entry.key, member.field, (member.extension, data), shape=(entry.height, entry.width))
            pictures.append((caption, np.repeat(image, 3 // image.shape[2], axis=2)))
    return pictures


class _Counter:
    """Progress over the steps of a stage."""

    def __init__(self, stage: str, total: int, progress: Progress | None) -> None:
        self._stage, self._total, self._progress, self._done = stage, total, progress, 0

    def advance(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._stage, self._done, self._total)


def _measure_all(subject: Subject, *, jobs: int, count: _Counter) -> tuple[list[Measurement], list[Finding]]:
    """Measurements and findings, each by key."""
    dataset = subject.dataset
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


def _what_was_left_out(subject: Subject, other: Subject | None, *, is_quick: bool) -> list[Finding]:
    parts = []
    for part in (subject, other):
        if part is not None and len(part.entries) < part.num_images:
            parts.append(f"{len(part.entries)} of {part.num_images} images of {part.uri}")
        if part is not None and part.num_opened < len(part.dataset.manifest.shards):
            parts.append(f"{part.num_opened} of {len(part.dataset.manifest.shards)} shards of {part.uri}")
    parts += ["no shard hashes"] if is_quick else []
    return [Finding("partial", (), f"looked at {', '.join(parts)}")] if parts else []
