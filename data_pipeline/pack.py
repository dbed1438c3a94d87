"""The course of a pack: samples -> shuffled, equal-sized, byte-reproducible shards -> manifest last."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import PIL

from data_pipeline import storage
from data_pipeline.degradations import parse_degradation
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.manifest import FORMAT_VERSION, Manifest, ShardInfo, ShardTable, Tiling
from data_pipeline.pack_executors import Executor, choose_executor
from data_pipeline.pack_jobs import (
    Checked,
    CheckJob,
    CutJob,
    EncodeJob,
    Recipe,
    Row,
    ShardJob,
    check_chunk,
    count_encoded_bytes,
    cut_chunk,
    digest_chunk,
    measure_chunk,
    write_one_shard,
)
from data_pipeline.pack_output import Output, Plan, clear_staging, is_dataset, is_interrupted, read_plan
from data_pipeline.records import CODECS, JPEG_QUALITY, KEY_PATTERN
from data_pipeline.rng import permutation
from data_pipeline.sources import Pair, check_unique
from data_pipeline.tiles import plan_tiles

AUTO_CODEC = "auto"
SIZE_PROBES = 32
# Pairs of a job that checks them: few enough to show progress, so many that their results are not too many files.
MIN_CHUNK, MAX_CHUNK, CHUNKS = 8, 256, 64
# Images whose tiles go into one file: as many as make so many pixels, so that the file fits into memory well.
CUT_PIXELS = 1 << 23


@dataclass(frozen=True)
class PackResult:
    """reused: the same dataset was there already and nothing was written."""

    manifest: Manifest
    reused: bool


@dataclass(frozen=True)
class Outlook:
    """What a pack would write.   widths, heights: (least, most) pixels of the whole images; source_bytes: of all files;
    num_samples: tiles where images are cut, else images; course: a new dataset, an interrupted pack that goes on, or
    the dataset is there"""

    course: Literal["new", "continued", "reused"]
    num_images: int
    num_samples: int
    widths: tuple[int, int]
    heights: tuple[int, int]
    source_bytes: int
    fields: tuple[str, ...]
    codec: str


class _Progress:
    """Counts pairs: an equal share of each when it is checked, when it is cut into tiles (if it is), and when its
    samples are written."""

    def __init__(self, num_pairs: int, *, stages: int, report: Callable[[int, int], None] | None) -> None:
        self._num_pairs, self._stages, self._report = num_pairs, stages, report
        self._prepared = self._written = 0
        self._num_samples = 1

    def prepared(self, pairs: int) -> None:
        self._prepared += pairs
        self._tell()

    def written(self, samples: int, num_samples: int) -> None:
        self._written, self._num_samples = self._written + samples, num_samples
        self._tell()

    def _tell(self) -> None:
        if self._report is not None:
            done = self._prepared + self._written * self._num_pairs // self._num_samples
            self._report(done // self._stages, self._num_pairs)


def pack(
    pairs: Sequence[Pair],
    out: str,
    *,
    shard_mb: float = 64.0,
    codec: str = AUTO_CODEC,
    quality: int = JPEG_QUALITY,
    seed: int = 0,
    degrade: str = "",
    tile: int = 0,
    overlap: int = 0,
    jobs: int = 0,
    executor: AbstractContextManager[Executor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PackResult:
    """Write a dataset into folder or URL `out`; its bytes depend on images, names and the options up to overlap alone.

    shard_mb: aimed-at size of a shard in 10^6 bytes (shards hold equal numbers of samples); codec: keep stores the
    source files as they are, png, webp (lossless), jpeg (of `quality`, 1..100) and raw (npy) re-encode, auto is keep
    where that is possible and else png; degrade: makes the inputs (and masks) of clean images, parse_degradation's
    text; tile, overlap: cut images into tiles of that many pixels a side, 0 for none; jobs: threads or processes, 0
    for one per core; executor: who works instead of these; progress(done, total) counts pairs.

    Every image is decoded once before anything is written, and once more where its pixels are stored anew, however many
    tiles it makes. Until the end tiles wait in OUT/.packing, which takes their room once more. The same dataset found
    at `out` is reused, an interrupted pack of it is continued. After bad input nothing is left at `out`; what an
    interruption leaves is no dataset before its manifest. Raises ConfigError, DataError, EnvironmentFault.
    """
    recipe = _make_recipe(codec=codec, quality=quality, seed=seed, degrade=degrade, tile=tile, overlap=overlap)
    _check_numbers(shard_mb=shard_mb, jobs=jobs)
    _check_pairs(pairs, recipe)
    pairs = sorted(pairs, key=lambda pair: pair.key)
    settings = _settings(recipe, seed=seed, shard_mb=shard_mb)
    workers = executor or choose_executor((path for pair in pairs for path in pair.files.values()), out, jobs=jobs)
    if is_dataset(out):
        with workers as work:
            manifest = _find_same(out, _digest_files(pairs, settings, work))
        clear_staging(out)
        return PackResult(manifest, reused=True)
    counter = _Progress(len(pairs), stages=3 if recipe.tiling else 2, report=progress)
    with Output(out) as output, workers as work:
        checked = _check(pairs, output, work, counter, out=out)
        rows = _plan_rows(pairs, checked, recipe)
        source_digest = _source_digest(settings, zip(pairs, (row.digests for row in checked), strict=True))
        digest = _plan_digest(source_digest)
        cuts = output.place_cuts(digest)
        if recipe.tiling is not None:
            rows = _cut(pairs, checked, rows, recipe, work, counter, output=output, kept=cuts, out=out)
        rows = [rows[i] for i in permutation(seed, len(rows), "pack")]
        shards = _write(rows, recipe, output, work, counter, digest=digest, shard_mb=shard_mb, out=out)
        manifest = Manifest(
            shards=ShardTable.of(shards),
            fields=_fields(pairs, recipe),
            codec=recipe.codec,
            source_digest=source_digest,
            tiling=recipe.tiling,
        )
        output.publish(manifest)
    return PackResult(manifest, reused=False)


def foresee(
    pairs: Sequence[Pair],
    out: str,
    *,
    shard_mb: float = 64.0,
    codec: str = AUTO_CODEC,
    quality: int = JPEG_QUALITY,
    seed: int = 0,
    degrade: str = "",
    tile: int = 0,
    overlap: int = 0,
    jobs: int = 0,
) -> Outlook:
    """What pack() would do, from the headers of the targets; nothing is written. Raises what it does.

    Whole files are read only where something is at `out` that could be the same dataset.
    """
    recipe = _make_recipe(codec=codec, quality=quality, seed=seed, degrade=degrade, tile=tile, overlap=overlap)
    _check_numbers(shard_mb=shard_mb, jobs=jobs)
    _check_pairs(pairs, recipe)
    pairs = sorted(pairs, key=lambda pair: pair.key)
    with choose_executor((), "", jobs=jobs) as work:
        course = _foresee_course(pairs, out, _settings(recipe, seed=seed, shard_mb=shard_mb), work)
        measured = list(chain.from_iterable(work.map(measure_chunk, _chunks(pairs))))
    widths, heights = [row[0] for row in measured], [row[1] for row in measured]
    num_samples = len(pairs)
    if recipe.tiling is not None:
        sizes = zip(heights, widths, strict=True)
        num_samples = sum(len(plan_tiles(*size, **recipe.tiling._asdict())) for size in sizes)
    return Outlook(
        course=course,
        num_images=len(pairs),
        num_samples=num_samples,
        widths=(min(widths), max(widths)),
        heights=(min(heights), max(heights)),
        source_bytes=sum(row[2] for row in measured),
        fields=_fields(pairs, recipe),
        codec=recipe.codec,
    )


def _foresee_course(
    pairs: Sequence[Pair], out: str, settings: str, work: Executor
) -> Literal["new", "continued", "reused"]:
    if is_dataset(out):
        _find_same(out, _digest_files(pairs, settings, work))
        return "reused"
    if not is_interrupted(out):
        return "new"
    plan = read_plan(out)
    is_same = plan is None or plan.digest == _plan_digest(_digest_files(pairs, settings, work))
    return "continued" if is_same else "new"


def _make_recipe(*, codec: str, quality: int, seed: int, degrade: str, tile: int, overlap: int) -> Recipe:
    if codec not in (AUTO_CODEC, *CODECS):
        raise ConfigError(f"--codec={codec} is unknown; choose one of {', '.join((AUTO_CODEC, *CODECS))}")
    if not 1 <= quality <= 100:
        raise ConfigError(f"--quality={quality} must lie in 1..100")
    if quality != JPEG_QUALITY and codec != "jpeg":
        raise ConfigError(f"--quality={quality} goes with --codec=jpeg, not with --codec={codec}")
    if overlap and not tile:
        raise ConfigError(f"--overlap={overlap} goes with --tile")
    if tile:
        plan_tiles(1, 1, size=tile, overlap=overlap)  # refuses what cannot be
    makes_pixels = "--tile cuts them" if tile else "--degrade makes new ones" if degrade else ""
    if codec == "keep" and makes_pixels:
        raise ConfigError(
            f"--codec=keep stores the source images as they are, but {makes_pixels}; choose png, webp, jpeg or raw"
        )
    if codec == AUTO_CODEC:
        codec = "png" if makes_pixels else "keep"
    spec = parse_degradation(degrade).spec if degrade else ""
    return Recipe(codec, quality, spec, seed, Tiling(tile, overlap) if tile else None)


def _check_numbers(*, shard_mb: float, jobs: int) -> None:
    if not (shard_mb > 0 and math.isfinite(shard_mb)):
        raise ConfigError(f"--shard-mb={shard_mb} must be above 0")
    if jobs < 0:
        raise ConfigError(f"--jobs={jobs} must be 0 (one per core) or more")


def _check_pairs(pairs: Sequence[Pair], recipe: Recipe) -> None:
    if not pairs:
        raise DataError("there are no pairs to pack")
    check_unique(pairs)
    wrong = [pair.key for pair in pairs if not KEY_PATTERN.fullmatch(pair.key)]
    if wrong:
        raise DataError(f"key {wrong[0]!r} is not allowed; keys are 1 to 80 of A-Z a-z 0-9 _ -")
    for field in ("input", "mask"):
        lacking = [pair for pair in pairs if field not in pair.files]
        if lacking and len(lacking) < len(pairs):
            raise DataError(
                f"{len(lacking)} of {len(pairs)} pairs have no {field}, the first is {lacking[0].name}; "
                "give all or none"
            )
    first = pairs[0]
    if first.mask is not None and first.input is None:
        raise DataError(f"{first.name} has a mask but no input; a mask belongs to a pair")
    if recipe.degrade and first.input is not None:
        raise ConfigError("--degrade makes inputs from clean images, but these have inputs; give --clean DIR")


def _fields(pairs: Sequence[Pair], recipe: Recipe) -> tuple[str, ...]:
    if not recipe.degrade:
        return tuple(pairs[0].files)
    return ("input", "target", "mask") if parse_degradation(recipe.degrade).has_mask else ("input", "target")


def _settings(recipe: Recipe, *, seed: int, shard_mb: float) -> str:
    """What besides the images decides the bytes of a dataset."""
    values = {
        "format": FORMAT_VERSION,
        "codec": recipe.codec,
        "quality": recipe.quality if recipe.codec == "jpeg" else None,
        "degrade": recipe.degrade,
        "tiling": recipe.tiling,
        "seed": seed,
        "shard_mb": shard_mb,
    }
    return json.dumps(values, sort_keys=True)


def _source_digest(settings: str, rows: Iterable[tuple[Pair, Mapping[str, str]]]) -> str:
    digest = hashlib.sha256(settings.encode())
    for pair, digests in rows:
        digest.update(json.dumps([pair.key, pair.name, dict(digests)], sort_keys=True).encode())
    return digest.hexdigest()


def _plan_digest(source_digest: str) -> str:
    # Another Pillow may compress to other bytes: shards of two versions do not go into one dataset.
    return hashlib.sha256(f"{source_digest} {PIL.__version__}".encode()).hexdigest()


def _digest_files(pairs: Sequence[Pair], settings: str, work: Executor) -> str:
    digests = chain.from_iterable(work.map(digest_chunk, _chunks(pairs)))
    return _source_digest(settings, zip(pairs, digests, strict=True))


def _find_same(out: str, source_digest: str) -> Manifest:
    """The manifest of the finished dataset. Raises DataError where it is another one or not whole."""
    manifest = Manifest.load(out)
    if manifest.source_digest != source_digest:
        raise DataError(
            f"--out {out} holds another dataset (other images, names or options; {manifest.num_samples} samples); "
            "give another folder or delete it"
        )
    names = set(storage.list_names(out))
    for shard in manifest.shards:
        if not {shard.name, shard.index_name} <= names or storage.size(storage.join(out, shard.name)) != shard.bytes:
            raise DataError(f"--out {out} is damaged: {shard.name} or its index is not whole; delete it and pack again")
    return manifest


def _check(pairs: Sequence[Pair], output: Output, work: Executor, counter: _Progress, *, out: str) -> list[Checked]:
    jobs = [
        CheckJob(chunk, storage.join(output.staging, f"check-{number:05d}.json"), out)
        for number, chunk in enumerate(_chunks(pairs))
    ]
    checked = []
    for rows in work.map(check_chunk, jobs):
        output.check()
        checked += rows
        counter.prepared(len(rows))
    return checked


def _cut(
    pairs: Sequence[Pair],
    checked: Sequence[Checked],
    tiles: Sequence[Row],
    recipe: Recipe,
    work: Executor,
    counter: _Progress,
    *,
    output: Output,
    kept: str,
    out: str,
) -> list[Row]:
    """Make the tiles.   tiles: in the order of the pairs   ->  the same, each with the place where it waits"""
    jobs: list[CutJob] = []
    rows: list[Row] = []
    pixels = 0
    for number, (pair, found) in enumerate(zip(pairs, checked, strict=True), start=1):
        rows.append(Row(pair.key, pair.name, pair, found))
        pixels += found.width * found.height
        if pixels >= CUT_PIXELS or number == len(pairs):
            jobs.append(CutJob(tuple(rows), recipe, f"{kept}{len(jobs):06d}", out))
            rows, pixels = [], 0
    cuts = []
    for job, made in zip(jobs, work.map(cut_chunk, jobs), strict=True):
        output.check()
        cuts += made
        counter.prepared(len(job.rows))
    return [replace(tile, cut=cut) for tile, cut in zip(tiles, cuts, strict=True)]


def _plan_rows(pairs: Sequence[Pair], checked: Sequence[Checked], recipe: Recipe) -> list[Row]:
    """The samples: whole images, or their tiles with keys KEY-NNNN."""
    rows = []
    for pair, found in zip(pairs, checked, strict=True):
        if recipe.tiling is None:
            rows.append(Row(pair.key, pair.name, pair, found))
            continue
        for number, window in enumerate(plan_tiles(found.height, found.width, **recipe.tiling._asdict())):
            name = f"{pair.name}@{window.left},{window.top}"
            rows.append(Row(f"{pair.key}-{number:04d}", name, pair, found, window))
    wrong = next((row for row in rows if not KEY_PATTERN.fullmatch(row.key)), None)
    if wrong is not None:
        raise DataError(f"{wrong.pair.name} makes tiles with keys of over 80 characters ({wrong.key}); raise --tile")
    return rows


def _write(
    rows: Sequence[Row],
    recipe: Recipe,
    output: Output,
    work: Executor,
    counter: _Progress,
    *,
    digest: str,
    shard_mb: float,
    out: str,
) -> list[ShardInfo]:
    """Write the shards that are not finished yet.   -> all of them, in order"""
    num_shards = output.kept_num_shards(digest) or _count_shards(rows, recipe, work, shard_mb=shard_mb)
    plan = Plan(digest, num_shards)
    finished = output.begin(plan)
    share, rest = divmod(len(rows), num_shards)
    jobs, start = [], 0
    for number, name in enumerate(plan.shards):
        count = share + (number < rest)
        if name not in finished:
            own = tuple(rows[start : start + count])
            jobs.append(ShardJob(name, own, recipe, output.shard_folder, output.staging, out))
        start += count
    counter.written(sum(info.count for info in finished.values()), len(rows))
    for job, info in zip(jobs, work.map(write_one_shard, jobs), strict=True):
        output.check()
        finished[job.name] = info
        counter.written(info.count, len(rows))
    return [finished[name] for name in plan.shards]


def _count_shards(rows: Sequence[Row], recipe: Recipe, work: Executor, *, shard_mb: float) -> int:
    """Shards for the aimed-at size; what re-encoding makes of the images is judged from the first of them."""
    if recipe.codec == "keep":
        total = float(sum(row.checked.bytes for row in rows))
    else:
        probes = rows[:SIZE_PROBES]
        jobs = [EncodeJob((row,), recipe) for row in probes]
        total = sum(work.map(count_encoded_bytes, jobs)) / sum(map(_pixels, probes)) * sum(map(_pixels, rows))
    return min(len(rows), max(1, math.ceil(total / (shard_mb * 1e6))))


def _pixels(row: Row) -> int:
    return row.window.width * row.window.height if row.window else row.checked.width * row.checked.height


def _chunks(pairs: Sequence[Pair]) -> list[tuple[Pair, ...]]:
    """The same pieces of the same pairs in every call, so that kept checks fit."""
    size = min(max(math.ceil(len(pairs) / CHUNKS), MIN_CHUNK), MAX_CHUNK)
    return [tuple(pairs[start : start + size]) for start in range(0, len(pairs), size)]
