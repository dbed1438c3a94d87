"""Pairs -> shuffled, equal-sized, byte-reproducible shards -> manifest last."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data_pipeline import storage
from data_pipeline.errors import BadSample, ConfigError, DataError, EnvironmentFault
from data_pipeline.manifest import MANIFEST_NAME, Manifest, ShardInfo
from data_pipeline.records import CODECS, FORMATS, KEY_PATTERN, decode_image, encode_image, encode_meta
from data_pipeline.rng import permutation
from data_pipeline.shards import write_shard
from data_pipeline.sources import Pair, check_unique

STAGING_PREFIX = ".packing-"
SIZE_PROBES = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class PackResult:
    """reused: the same dataset was there already and nothing was written."""

    manifest: Manifest
    reused: bool


@dataclass(frozen=True)
class _Checked:
    """A pair whose images were decoded. digests: field -> sha256 of the source file; bytes: of all source files."""

    pair: Pair
    width: int
    height: int
    digests: Mapping[str, str]
    bytes: int


def pack(
    pairs: Sequence[Pair],
    out: str,
    *,
    shard_mb: float = 64.0,
    codec: str = "keep",
    seed: int = 0,
    jobs: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PackResult:
    """Write a dataset into folder or URL `out`; the bytes depend on images, names, codec, shard_mb and seed alone.

    shard_mb: aimed-at size of a shard in 10^6 bytes (shards hold equal numbers of samples); codec: keep stores the
    source files as they are, png, webp (lossless), jpeg (quality 95) and raw (npy) re-encode; jobs: threads, 0 for one
    per core; progress(done, total) counts pairs.

    Every image is decoded once before anything is written. The same dataset found at `out` is reused. On any error, and
    on KeyboardInterrupt, what this call wrote is removed. Raises ConfigError, DataError, EnvironmentFault.
    """
    _check_arguments(pairs, shard_mb=shard_mb, codec=codec, jobs=jobs)
    pairs = sorted(pairs, key=lambda pair: pair.key)
    settings = json.dumps({"format": 1, "codec": codec, "seed": seed, "shard_mb": shard_mb}, sort_keys=True)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done // 2, len(pairs))  # a pair is handled twice: checked, then written

    with _Pool(jobs or os.cpu_count() or 1) as pool:
        if _is_dataset(out):
            digests = pool.map(lambda pair: {field: _digest(_read(path)) for field, path in pair.files.items()}, pairs)
            return _reuse(out, _source_digest(settings, zip(pairs, digests, strict=True)))
        checked = []
        for row in pool.map(_check_pair, pairs):
            checked.append(row)
            advance()
        shuffled = [checked[i] for i in permutation(seed, len(checked), "pack")]
        num_shards = _count_shards(shuffled, codec=codec, shard_mb=shard_mb, pool=pool)
        source_digest = _source_digest(settings, ((row.pair, row.digests) for row in checked))
        with _Output(out) as output:
            shards = _write_shards(shuffled, num_shards, codec=codec, output=output, pool=pool, advance=advance)
            manifest = _make_manifest(checked, shards, codec=codec, source_digest=source_digest)
            output.publish(manifest)
    return PackResult(manifest, reused=False)


def _check_arguments(pairs: Sequence[Pair], *, shard_mb: float, codec: str, jobs: int) -> None:
    if codec not in CODECS:
        raise ConfigError(f"--codec={codec} is unknown; choose one of {', '.join(CODECS)}")
    if not (shard_mb > 0 and math.isfinite(shard_mb)):
        raise ConfigError(f"--shard-mb={shard_mb} must be above 0")
    if jobs < 0:
        raise ConfigError(f"--jobs={jobs} must be 0 (one per core) or more")
    if not pairs:
        raise DataError("there are no pairs to pack")
    check_unique(pairs)
    wrong = [pair.key for pair in pairs if not KEY_PATTERN.fullmatch(pair.key)]
    if wrong:
        raise DataError(f"key {wrong[0]!r} is not allowed; keys are 1 to 80 of A-Z a-z 0-9 _ -")
    unmasked = [pair for pair in pairs if pair.mask is None]
    if unmasked and len(unmasked) < len(pairs):
        raise DataError(
            f"{len(unmasked)} of {len(pairs)} pairs have no mask, the first is {unmasked[0].name}; give all or none"
        )


def _is_dataset(out: str) -> bool:
    """Whether `out` holds a dataset; if not, it must be free for one."""
    try:
        if storage.exists(storage.join(out, MANIFEST_NAME)):
            return True
        if storage.is_local(out):
            path = storage.local_path(out)
            if path.exists() and not path.is_dir():
                raise DataError(f"--out {out} is a file; give a folder")
            for leftover in path.glob(f"{STAGING_PREFIX}*"):
                shutil.rmtree(leftover)  # of a pack that was killed
        names = storage.list_names(out)
    except OSError as error:
        raise EnvironmentFault(f"--out {out} cannot be used: {error.strerror or error}") from error
    if names:
        raise DataError(f"--out {out} holds {names[0]} but no dataset; give another folder or empty it")
    return False


def _reuse(out: str, source_digest: str) -> PackResult:
    manifest = Manifest.load(out)
    if manifest.source_digest != source_digest:
        raise DataError(
            f"--out {out} holds another dataset (other images, names, codec, shard size or seed; "
            f"{manifest.num_samples} samples); give another folder or delete it"
        )
    names = set(storage.list_names(out))
    for shard in manifest.shards:
        if not {shard.name, shard.index_name} <= names or storage.size(storage.join(out, shard.name)) != shard.bytes:
            raise DataError(f"--out {out} is damaged: {shard.name} or its index is not whole; delete it and pack again")
    return PackResult(manifest, reused=True)


def _source_digest(settings: str, rows: Iterable[tuple[Pair, Mapping[str, str]]]) -> str:
    digest = hashlib.sha256(settings.encode())
    for pair, digests in rows:
        digest.update(json.dumps([pair.key, pair.name, dict(digests)], sort_keys=True).encode())
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _extension(path: Path) -> str:
    extension = path.suffix.lower().removeprefix(".")
    if extension not in FORMATS:
        raise DataError(f"{path} is of no known image format ({', '.join(sorted(FORMATS))})")
    return "jpg" if extension == "jpeg" else extension


def _check_pair(pair: Pair) -> _Checked:
    """Decode every image of a pair. Raises DataError naming the file."""
    digests: dict[str, str] = {}
    total, size = 0, (0, 0)
    for field, path in pair.files.items():
        data = _read(path)
        try:
            image = decode_image(data, _extension(path), channels=1 if field == "mask" else 3)
        except BadSample as error:
            raise DataError(f"{path} cannot be used: {error}; replace or remove it") from error
        height, width = image.shape[:2]
        if field == "input":
            size = (width, height)
        elif size != (width, height):
            raise DataError(
                f"{pair.input} is {size[0]}x{size[1]}, but its {field} {path} is {width}x{height}; sizes must agree"
            )
        digests[field] = _digest(data)
        total += len(data)
    return _Checked(pair, size[0], size[1], digests, total)


def _encode(row: _Checked, codec: str) -> dict[str, bytes]:
    """The tar members of a sample, KEY apart: suffix -> bytes."""
    pair = row.pair
    members = {"json": encode_meta(key=pair.key, name=pair.name, width=row.width, height=row.height)}
    for field, path in pair.files.items():
        data = _read(path)
        if _digest(data) != row.digests[field]:
            raise DataError(f"{path} changed while it was being packed; pack again")
        extension = _extension(path)
        if codec != "keep":
            try:
                image = decode_image(data, extension, channels=1 if field == "mask" else 3)
                extension, data = encode_image(image, codec)
            except BadSample as error:
                raise DataError(f"{path} {error}; choose another --codec") from error
        members[f"{field}.{extension}"] = data
    return members


def _count_shards(shuffled: Sequence[_Checked], *, codec: str, shard_mb: float, pool: _Pool) -> int:
    """Shards for the aimed-at size; what re-encoding makes of the images is judged from the first of them."""
    if codec == "keep":
        total = float(sum(row.bytes for row in shuffled))
    else:
        probes = shuffled[:SIZE_PROBES]
        encoded = sum(sum(map(len, members.values())) for members in pool.map(lambda row: _encode(row, codec), probes))
        pixels = sum(row.width * row.height for row in shuffled)
        total = encoded / sum(row.width * row.height for row in probes) * pixels
    return min(len(shuffled), max(1, math.ceil(total / (shard_mb * 1e6))))


def _write_shards(
    shuffled: Sequence[_Checked],
    num_shards: int,
    *,
    codec: str,
    output: _Output,
    pool: _Pool,
    advance: Callable[[], None],
) -> list[ShardInfo]:
    share, rest = divmod(len(shuffled), num_shards)
    encoded = zip(shuffled, pool.map(lambda row: _encode(row, codec), shuffled), strict=True)

    def records(count: int) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        for _ in range(count):
            row, members = next(encoded)
            yield row.pair.key, members
            advance()

    shards = []
    for number in range(num_shards):
        name = f"shard-{number:05d}"
        written = write_shard(output.staging / f"{name}.tar", records(share + (number < rest)))
        (output.staging / f"{name}.idx").write_bytes(written.index)
        shards.append(ShardInfo(f"{name}.tar", written.count, written.bytes, written.sha256, _digest(written.index)))
        output.finished(f"{name}.idx")
        output.finished(f"{name}.tar")
    return shards


def _make_manifest(
    checked: Sequence[_Checked], shards: Sequence[ShardInfo], *, codec: str, source_digest: str
) -> Manifest:
    widths, heights = [row.width for row in checked], [row.height for row in checked]
    return Manifest(
        shards=tuple(shards),
        num_samples=len(checked),
        has_mask=checked[0].pair.mask is not None,
        min_width=min(widths),
        max_width=max(widths),
        min_height=min(heights),
        max_height=max(heights),
        codec=codec,
        source_digest=source_digest,
    )


class _Pool:
    """Threads that map in order and hold few results at a time. Image codecs and hashes release the GIL."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._executor = ThreadPoolExecutor(jobs, thread_name_prefix="pack")

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(self._executor.submit(function, item))
            if len(waiting) > 2 * self._jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Output:
    """Where the files of a pack go. They appear under their names when all are there; leaving without publish() removes
    what was written, folders that were made included."""

    def __init__(self, out: str) -> None:
        self._out = out
        self._is_local = storage.is_local(out)
        self._made: list[Path] = []  # folders this call made, innermost first
        self._names: list[str] = []
        self._placed: list[str] = []
        self._is_published = False

    def __enter__(self) -> _Output:
        try:
            if self._is_local:
                folder = storage.local_path(self._out)
                self._made = [path for path in (folder, *folder.parents) if not path.exists()]
                folder.mkdir(parents=True, exist_ok=True)
                self.staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=folder))
            else:
                self.staging = Path(tempfile.mkdtemp(prefix="rddm-pack-"))
        except OSError as error:
            self._clean()
            raise EnvironmentFault(f"--out {self._out} cannot be written: {error.strerror or error}") from error
        return self

    def finished(self, name: str) -> None:
        """A staged file is complete. A URL has no renaming: it goes there at once and does not take local space."""
        self._names.append(name)
        if not self._is_local:
            self._place(name)

    def publish(self, manifest: Manifest) -> None:
        """Put what is not there yet under its name, the manifest last."""
        for name in self._names if self._is_local else ():
            self._place(name)
        self._placed.append(MANIFEST_NAME)
        manifest.save(self._out)
        self._is_published = True

    def _place(self, name: str) -> None:
        uri = storage.join(self._out, name)
        self._placed.append(name)
        if self._is_local:
            os.replace(self.staging / name, storage.local_path(uri))
        else:
            storage.upload(self.staging / name, uri)
            (self.staging / name).unlink()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        shutil.rmtree(self.staging)
        if not self._is_published:
            for name in self._placed:
                storage.remove(storage.join(self._out, name))
            self._clean()
        if isinstance(error, OSError):
            raise EnvironmentFault(f"--out {self._out} cannot be written: {error.strerror or error}") from error

    def _clean(self) -> None:
        for folder in self._made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
