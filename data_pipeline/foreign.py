"""Index a webdataset that others wrote: its tars become a dataset as they are, none is rewritten.

A tar may come from anywhere. It is read once, front to back, in bounded memory and by strict rules: what two programs
could read differently is refused, and only members with a wanted suffix are looked into.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeVar

import numpy as np

from data_pipeline import storage
from data_pipeline.decode import FORMATS, RAW_EXTENSION, read_size
from data_pipeline.errors import BadSample, ConfigError, DataError, EnvironmentFault, UserError
from data_pipeline.index import MAX_MEMBER_BYTES, Entry, Member, encode_index, parse_index
from data_pipeline.manifest import FIELD_SETS, MANIFEST_NAME, SHARD_NAME, Manifest, ShardInfo, ShardTable
from data_pipeline.records import FIELDS, make_key
from data_pipeline.tarstream import ReadOnce, read_tar

CODEC = "foreign"
MAX_SAMPLES = 1 << 20  # of one tar: they are held in memory until it is read
SHOWN_PROBLEMS = 5
PARTIAL_FORMAT = 1
PARTIAL_SUFFIX = ".idx.partial"  # what is known of one tar while others are still being read
SUFFIX = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
COMPRESSED_NAMES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".tzst")
INDEX_START = b'{"format_version":'

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class IndexResult:
    """reused: everything was there already; left_out: samples, resumed: tars known from a run that was interrupted."""

    manifest: Manifest
    reused: bool
    left_out: int
    resumed: int


class _Tar(NamedTuple):
    name: str
    bytes: int


class _Suffix(NamedTuple):
    text: str
    field: str


@dataclass(frozen=True)
class _Scan:
    """What one tar holds. entries: its whole samples, under their own names; problems: the first few of num_problems
    samples that are not whole, in words."""

    sha256: str
    entries: tuple[Entry, ...]
    problems: tuple[str, ...]
    num_problems: int
    is_resumed: bool = False


class _Found(NamedTuple):
    """A _Scan without its entries: the 64-bit hashes of their keys, (count,) uint64."""

    sha256: str
    key_hashes: np.ndarray
    problems: tuple[str, ...]
    num_problems: int
    is_resumed: bool


def index_tars(
    uri: str,
    *,
    suffixes: Mapping[str, tuple[str, ...]],
    pattern: str = "*.tar",
    skip_incomplete: bool = False,
    jobs: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> IndexResult:
    """Write SHARD.idx beside each tar of folder or URL `uri`, and manifest.json.

    suffixes: field (target; input and target; these and mask) -> what follows a sample's name and a dot, without
    regard to case, alternatives in any order; where several fit, the longest counts. pattern: which tars.
    skip_incomplete: leave out samples that lack an image, whose images differ in size or that are no images; without
    it they are an error. jobs: threads, 0 for one per core; progress(done, total) counts bytes, from any thread but
    never twice at a time.

    Samples keep their names, or are called SHARD/NAME throughout when tars repeat names. A run that was interrupted
    goes on with the tars it had not finished (SHARD.idx.partial), if the others still have the same number of bytes.
    Raises ConfigError, DataError for what cannot be used, and EnvironmentFault where `uri` cannot be written.
    """
    wanted = _check_suffixes(suffixes)
    if jobs < 0:
        raise ConfigError(f"--jobs={jobs} must be 0 (one per core) or more")
    there = _list_names(uri)
    names = _find_tars(uri, there, pattern)
    old = _find_manifest(uri, there, names)
    settings = json.dumps({"format": PARTIAL_FORMAT, "suffixes": sorted(wanted)})
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1, thread_name_prefix="index") as pool:
        tars = _map(pool, lambda name: _Tar(name, _size(uri, name)), names)
        _check_writable(uri)
        meter = _Meter(sum(tar.bytes for tar in tars), progress)
        found = _map(pool, lambda tar: _find(uri, tar, wanted, settings=settings, meter=meter), tars, stop=meter.stop)
        left_out = _check_problems(names, found, skip_incomplete=skip_incomplete)
        used = [(tar, scan) for tar, scan in zip(tars, found, strict=True) if len(scan.key_hashes)]
        if not used:
            raise DataError(f"{uri}: no tar holds a whole sample with {_describe(suffixes)}; check the suffixes")
        prefixed = _has_repeats([scan.key_hashes for _, scan in used])
        finished = _map(pool, lambda row: _finish(uri, row[0], settings=settings, prefixed=prefixed), used)
        digest = hashlib.sha256(json.dumps([settings, [[tar.name, scan.sha256] for tar, scan in used]]).encode())
        manifest = Manifest(
            shards=ShardTable.of([shard for shard, _ in finished]),
            fields=tuple(field for field in FIELDS if field in suffixes),
            codec=CODEC,
            source_digest=digest.hexdigest(),
        )
        if manifest != old:
            _write(uri, MANIFEST_NAME, manifest.to_json())
        # Each tar has one by now: it was found there or written here.
        _map(pool, lambda name: storage.remove(storage.join(uri, _partial_name(name))), names)
    reused = manifest == old and not any(is_written for _, is_written in finished)
    return IndexResult(manifest, reused, left_out, sum(scan.is_resumed for scan in found))


def _check_suffixes(suffixes: Mapping[str, tuple[str, ...]]) -> tuple[_Suffix, ...]:
    """The suffixes in lower case, longest first. Raises ConfigError."""
    if tuple(field for field in FIELDS if field in suffixes) not in FIELD_SETS or set(suffixes) - set(FIELDS):
        raise ConfigError(
            f"suffixes for {', '.join(suffixes) or 'nothing'}: give --target-suffix alone, or with --input-suffix, or "
            "with --input-suffix and --mask-suffix"
        )
    wanted: dict[str, str] = {}
    for field, alternatives in suffixes.items():
        for given in alternatives or ("",):
            text = given.strip().lower().removeprefix(".")
            flag = f"--{field}-suffix={','.join(alternatives)}"
            if not SUFFIX.fullmatch(text):
                raise ConfigError(f"{flag}: {given!r} is no suffix; give what follows a name and a dot, like lq.png")
            if text.rpartition(".")[2] not in (*FORMATS, RAW_EXTENSION):
                allowed = ", ".join(sorted((*FORMATS, RAW_EXTENSION)))
                raise ConfigError(f"{flag}: {given!r} does not end in an image format; use {allowed}")
            if text in wanted:
                raise ConfigError(f"{flag}: {given!r} is given twice (--{wanted[text]}-suffix); name it once")
            wanted[text] = field
    return tuple(sorted((_Suffix(*item) for item in wanted.items()), key=lambda s: (-len(s.text), s.text)))


def _describe(suffixes: Mapping[str, tuple[str, ...]]) -> str:
    return " ".join(f"--{field}-suffix={','.join(alternatives)}" for field, alternatives in suffixes.items())


def _list_names(uri: str) -> list[str]:
    try:
        return storage.list_names(uri)
    except NotADirectoryError as error:
        raise DataError(f"{uri} is a file; give the folder that holds it and --pattern") from error
    except OSError as error:
        raise DataError(f"{uri} cannot be listed: {error}") from error


def _find_tars(uri: str, names: Sequence[str], pattern: str) -> list[str]:
    """Names of the tars, sorted. Raises DataError when there are none, or some that no manifest can name."""
    found = [name for name in names if fnmatchcase(name, pattern)]
    packed = [name for name in found or names if name.lower().endswith(COMPRESSED_NAMES)]
    if packed:
        raise DataError(
            f"{uri} holds compressed tars ({ascii(packed[0])}), which cannot be read from the middle; unpack them "
            "(gunzip) first"
        )
    if not found:
        raise DataError(f"{uri} holds nothing that matches --pattern={pattern}; give the folder that holds the tars")
    bad = next((name for name in found if not SHARD_NAME.fullmatch(name)), None)
    if bad is not None:
        raise DataError(
            f"{uri}: {ascii(bad)} cannot be a shard; names start with a letter, digit or _, go on with these, . or "
            "-, and end in .tar: rename it (or link it under such a name), or narrow --pattern"
        )
    return found


def _find_manifest(uri: str, there: Sequence[str], tars: Sequence[str]) -> Manifest | None:
    """The manifest of an earlier indexing. Raises DataError for files of others that would be overwritten."""
    old = Manifest.load(uri) if MANIFEST_NAME in there else None
    if old is not None and old.codec != CODEC:
        raise DataError(f"{uri} holds a dataset that rddm pack wrote; it has an index already, use it as it is")
    for name in sorted({f"{tar.removesuffix('.tar')}.idx" for tar in tars} & set(there)):
        if (_read(uri, name, length=len(INDEX_START)) or b"") != INDEX_START:
            raise DataError(
                f"{uri} holds {name}, which another program wrote; move it away, or link the tars into a folder of "
                "your own and index that"
            )
    return old


def _read(uri: str, name: str, *, length: int | None = None) -> bytes | None:
    """A file beside the tars, or its first bytes; None where there is none."""
    place = storage.join(uri, name)
    try:
        return storage.read_bytes(place) if length is None else storage.read_range(place, 0, length)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error}") from error


def _size(uri: str, name: str) -> int:
    try:
        return storage.size(storage.join(uri, name))
    except OSError as error:
        raise DataError(f"{storage.join(uri, name)} cannot be read: {error}") from error


def _check_writable(uri: str) -> None:
    """Known before hours of reading: raises EnvironmentFault where nothing can be written beside the tars."""
    probe = f".probe{PARTIAL_SUFFIX}"  # no shard has this name
    _write(uri, probe, b"")
    storage.remove(storage.join(uri, probe))


def _write(uri: str, name: str, data: bytes) -> None:
    try:
        storage.write_bytes_atomic(storage.join(uri, name), data)
    except (OSError, UserError) as error:
        raise EnvironmentFault(
            f"{uri} cannot be written ({error}), but the index lies beside the tars; link or copy the tars into a "
            "folder of your own and index that"
        ) from error


def _find(uri: str, tar: _Tar, wanted: Sequence[_Suffix], *, settings: str, meter: _Meter) -> _Found:
    """Read a tar, unless an interrupted run did, and leave what it holds in its partial."""
    scan = _load_partial(uri, tar, settings=settings)
    if scan is None:
        scan = _scan(storage.join(uri, tar.name), tar.bytes, wanted, advance=meter.advance)
        _save_partial(uri, tar, scan, settings=settings)
    else:
        meter.advance(tar.bytes)
    hashes = b"".join(hashlib.blake2b(entry.key.encode(), digest_size=8).digest() for entry in scan.entries)
    return _Found(
        scan.sha256, np.frombuffer(hashes, np.uint64), scan.problems, scan.num_problems, is_resumed=scan.is_resumed
    )


def _scan(uri: str, size: int, wanted: Sequence[_Suffix], *, advance: Callable[[int], None]) -> _Scan:
    """Read one tar. Raises DataError for one that cannot be used."""
    samples: dict[str, dict[str, Member]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    problems: dict[str, str] = {}
    stream = ReadOnce(uri, size, advance=advance)
    for info in read_tar(stream):
        match = _match(info.name, wanted)
        if match is None:
            continue
        name, field, extension = match
        if not info.is_file:
            raise stream.fault(f"{info.shown} is a link or device, not an image")
        if info.size > MAX_MEMBER_BYTES:
            raise stream.fault(f"{info.shown} has {info.size} bytes; at most {MAX_MEMBER_BYTES} are allowed")
        sample = samples.setdefault(name, {})
        if field in sample:
            raise stream.fault(f"{info.shown} gives the {field} of its sample a second time")
        if len(samples) > MAX_SAMPLES:
            raise stream.fault(f"it has more than {MAX_SAMPLES} samples; cut it into several tars")
        data = stream.read(info.size)
        sample[field] = Member(field, extension, info.start, info.size, zlib.crc32(data))
        try:
            shape = read_size(data, extension)
        except BadSample as error:
            problems.setdefault(name, f"{info.shown}: {error}")
            continue
        if shapes.setdefault(name, shape) != shape:
            problems.setdefault(name, f"{ascii(name)}: its images differ in size")
    fields = {suffix.field for suffix in wanted}
    for name, sample in samples.items():
        missing = [field for field in FIELDS if field in fields - sample.keys()]
        if missing:
            problems[name] = f"{ascii(name)}: no {' and no '.join(missing)}"
    entries = tuple(
        Entry(make_key(name), name, shapes[name][1], shapes[name][0], tuple(sample[f] for f in FIELDS if f in fields))
        for name, sample in samples.items()
        if name not in problems
    )
    if len({entry.key for entry in entries}) != len(entries):
        raise stream.fault("two of its samples get the same key; rename one")
    return _Scan(stream.sha256, entries, tuple(problems.values())[:SHOWN_PROBLEMS], len(problems))


def _match(name: str, wanted: Sequence[_Suffix]) -> tuple[str, str, str] | None:
    """(name of the sample, field, extension) of a member; None for one that nobody asked for."""
    for suffix in wanted:
        length = len(suffix.text) + 1
        if name[-length:].lower() == f".{suffix.text}":
            sample = name[:-length]
            # Hidden files, like the ._ twins of macOS, are no samples; other readers skip them too.
            is_hidden = sample.rpartition("/")[2][:1] in ("", ".")
            return None if is_hidden else (sample, suffix.field, suffix.text.rpartition(".")[2])
    return None


def _partial_name(name: str) -> str:
    return f"{name.removesuffix('.tar')}{PARTIAL_SUFFIX}"


def _save_partial(uri: str, tar: _Tar, scan: _Scan, *, settings: str) -> None:
    head = {
        "settings": settings,
        "bytes": tar.bytes,
        "sha256": scan.sha256,
        "count": len(scan.entries),
        "problems": scan.problems,
        "num_problems": scan.num_problems,
    }
    index = encode_index(scan.entries) if scan.entries else b""
    _write(uri, _partial_name(tar.name), json.dumps(head).encode() + b"\n" + index)


def _load_partial(uri: str, tar: _Tar, *, settings: str) -> _Scan | None:
    """What an interrupted run found in a tar; None where it did not, or under other settings, or in other bytes."""
    data = _read(uri, _partial_name(tar.name))
    if data is None:
        return None
    head, _, index = data.partition(b"\n")
    try:
        given = json.loads(head)
        if (given["settings"], given["bytes"]) != (settings, tar.bytes):
            return None
        fields = {field for _, field in json.loads(settings)["suffixes"]}
        entries: Iterable[Entry] = ()
        if given["count"]:
            entries = parse_index(
                index, source=tar.name, count=given["count"], shard_bytes=tar.bytes, fields=tuple(fields)
            )
        problems = tuple(map(str, given["problems"]))
        return _Scan(str(given["sha256"]), tuple(entries), problems, int(given["num_problems"]), is_resumed=True)
    except (ValueError, KeyError, TypeError, RecursionError, DataError):
        return None  # damaged: the tar is read again


def _check_problems(names: Sequence[str], found: Sequence[_Found], *, skip_incomplete: bool) -> int:
    """Samples that are not whole. Raises DataError naming the first few, unless they are to be left out."""
    total = sum(scan.num_problems for scan in found)
    if total and not skip_incomplete:
        shown = [f"{name}: {text}" for name, scan in zip(names, found, strict=True) for text in scan.problems]
        raise DataError(
            f"{total} sample(s) are not whole: {'; '.join(shown[:SHOWN_PROBLEMS])}"
            f"{'; ...' if total > SHOWN_PROBLEMS else ''}; mend them, or give --skip-incomplete to leave them out"
        )
    return total


def _has_repeats(hashes: Sequence[np.ndarray]) -> bool:
    every = np.concatenate(hashes)
    return len(np.unique(every)) != len(every)


def _finish(uri: str, tar: _Tar, *, settings: str, prefixed: bool) -> tuple[ShardInfo, bool]:
    """The tar's row of the manifest, and whether its index had to be written."""
    scan = _load_partial(uri, tar, settings=settings)
    if scan is None:
        raise DataError(f"{storage.join(uri, _partial_name(tar.name))} was changed by another program; run again")
    entries = scan.entries
    if prefixed:
        names = [f"{tar.name.removesuffix('.tar')}/{entry.name}" for entry in entries]
        entries = tuple(e._replace(name=name, key=make_key(name)) for e, name in zip(entries, names, strict=True))
    index = encode_index(entries)
    widths, heights = [entry.width for entry in entries], [entry.height for entry in entries]
    digest = hashlib.sha256(index).hexdigest()
    sides = min(widths), max(widths), min(heights), max(heights)
    shard = ShardInfo(tar.name, len(entries), tar.bytes, scan.sha256, len(index), digest, *sides)
    is_there = _read(uri, shard.index_name) == index
    if not is_there:
        _write(uri, shard.index_name, index)
    return shard, not is_there


class _Meter:
    """Counts bytes for all threads, and stops them: each comes by with every piece it reads."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._total, self._progress = total, progress
        self._done = 0
        self._lock = threading.Lock()
        self._is_stopped = False

    def advance(self, count: int) -> None:
        """Raises CancelledError once stop() was called."""
        if self._is_stopped:
            raise CancelledError
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)

    def stop(self) -> None:
        self._is_stopped = True


def _map(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    stop: Callable[[], None] = lambda: None,
) -> list[Result]:
    """The results in order; on an error what has not begun is dropped and what has is stopped."""
    futures = [pool.submit(function, item) for item in items]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future.done():
                future.result()
        return [future.result() for future in futures]
    except BaseException:
        stop()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
