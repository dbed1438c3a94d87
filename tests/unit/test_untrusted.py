"""Datasets nobody vouches for: mutated tars, indexes and manifests are read or refused, and nothing else happens."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import signal
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import DataError, RddmError
from data_pipeline.foreign import index_tars
from data_pipeline.manifest import Manifest, ShardTable
from data_pipeline.reader import Dataset
from tests.support.datasets import make_dataset, random_image

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::UserWarning:PIL")]

CASE_CPU_S = 5.0  # thousands of times what a case needs
MEMORY_MB = 150
PAIRS = {"input": ("lq.png", "lq.jpg"), "target": ("gt.png", "gt.jpg")}
BLOCK = 512
RUNS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")


@dataclass
class _Watch:
    """What the interpreter was seen doing while `folder` is set."""

    folder: Path | None = None
    seen: str = ""


WATCH = _Watch()


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCH.folder is None:
        return
    if event in RUNS:
        WATCH.seen = f"{event} {arguments}"
    is_written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if is_written or event in CHANGES:
        place = arguments[0]
        if not isinstance(place, (str, os.PathLike)) or WATCH.folder not in Path(os.path.abspath(place)).parents:
            WATCH.seen = f"{event} {arguments}"


@pytest.fixture(scope="module")
def auditing() -> None:
    sys.addaudithook(_audit)  # for good: it does nothing while no folder is watched


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut is not at stake here, and waiting for it would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """The block may change files in `folder` only, run nothing, and take CASE_CPU_S of the processor."""

    def too_long(number: int, frame: object) -> None:
        raise TimeoutError(f"a case took more than {CASE_CPU_S} s of processor time")

    previous = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, CASE_CPU_S)
    WATCH.folder, WATCH.seen = folder, ""
    try:
        yield
    finally:
        WATCH.folder = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    assert not WATCH.seen, WATCH.seen


@contextmanager
def bounded_memory() -> Iterator[None]:
    """The process may grow by MEMORY_MB at most, at its highest."""

    def peak_mb() -> float:
        line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    except OSError:
        pytest.skip("this system does not tell how much memory a process took")
    before = peak_mb()
    yield
    assert peak_mb() - before < MEMORY_MB


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self._path, "w")


def png(seed: int, size: tuple[int, int] = (8, 9)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(random_image(seed, size)).save(buffer, "PNG")
    return buffer.getvalue()


def jpg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(random_image(seed, (8, 9))).save(buffer, "JPEG")
    return buffer.getvalue()


def make_tar(members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def originals(witness: Path) -> list[bytes]:
    payload = pickle.dumps(Payload(str(witness)))
    hostile = [(f"a.{kind}", payload) for kind in ("pickle", "pkl", "pyd", "pth", "npy", "json")]
    pair = [("a.lq.png", png(0)), ("a.gt.png", png(1))]
    second = [("pipe:touch x.lq.jpg", jpg(2)), ("pipe:touch x.gt.jpg", jpg(3))]
    long = [("d" * 120 + "/n.lq.png", png(4)), ("d" * 120 + "/n.gt.png", png(5))]
    return [
        make_tar([*pair, *hostile, *second]),
        make_tar([*pair, *long], tarfile.PAX_FORMAT),
        make_tar([*pair, *long, *second], tarfile.GNU_FORMAT),
    ]


def headers_of(tar: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return [info.offset for info in opened]


def checksummed(header: bytes) -> bytes:
    plain = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(plain) + header[156:]


def header(name: bytes, kind: bytes, size: bytes) -> bytes:
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)[:BLOCK])
    block[:100], block[156:157], block[124:136] = name.ljust(100, b"\0"), kind, size.ljust(12, b"\0")
    return checksummed(bytes(block))


NAMES = (
    b"/etc/x.lq.png",
    b"../x.lq.png",
    b"a/../../x.gt.png",
    b"pipe:touch x.lq.png",
    b"a.lq.png",
    b"",
    b".",
    b"x.lq.png",
)
NUMBERS = (
    b"77777777777",
    b"-0000000001",
    b"00000000000",
    b"\x80" + b"\0" * 10 + b"\x05",
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"1_0",
    b" +7 ",
    b"garbage",
)
BODIES = (
    b"30 path=../../x.lq.png\n",
    b"20 size=9999999999\n\n",
    b"12 size=-10\n",
    b"22 GNU.sparse.major=1\n",
    b"99999 path=x\n",
    b"0 path=x\n",
    b"15 path=a.gt.png\n"[:17],
    b"18 path=a.gt.png\n\n",
    b"a" * 300,
    b"\xff\0" * 50,
)


def changed_header(noise: np.random.Generator, tar: bytes) -> bytes:
    """One header with a hostile field and a checksum that fits."""
    at = int(noise.choice(headers_of(tar)))
    block = bytearray(tar[at : at + BLOCK])
    sort = noise.integers(5)
    if sort == 0:
        block[124:136] = NUMBERS[noise.integers(len(NUMBERS))].ljust(12, b"\0")
    elif sort == 1:
        block[156] = b"0\x001234567SLKxgMVAN"[noise.integers(18)]
    elif sort == 2:
        block[:100] = NAMES[noise.integers(len(NAMES))].ljust(100, b"\0")
    elif sort == 3:
        block[noise.integers(257, BLOCK)] = int(noise.integers(256))
    else:
        block[noise.integers(0, BLOCK)] = int(noise.integers(256))
    return tar[:at] + checksummed(bytes(block)) + tar[at + BLOCK :]


def inserted_header(noise: np.random.Generator, tar: bytes) -> bytes:
    """An extension header, a link or an empty file before some member."""
    at = int(noise.choice(headers_of(tar)))
    kind = b"xgLKS12345670\0M"[(place := int(noise.integers(15))) : place + 1]
    if kind in (b"x", b"g", b"L", b"K", b"S"):
        body = BODIES[noise.integers(len(BODIES))]
        size = b"%011o" % len(body) if noise.random() < 0.8 else NUMBERS[noise.integers(len(NUMBERS))]
        new = header(b"extra", kind, size) + body.ljust(-(-len(body) // BLOCK) * BLOCK, b"\0")
    else:
        new = header(NAMES[noise.integers(len(NAMES))], kind, NUMBERS[noise.integers(3)])
    return tar[:at] + new + tar[at:]


def mutated(noise: np.random.Generator, tar: bytes) -> bytes:
    """One tar, changed in one of the ways that files go wrong or are made to."""
    sort = noise.integers(9)
    at, other = (int(place) for place in noise.integers(0, len(tar), 2))
    if sort == 0:
        return tar[:at]
    if sort == 1:
        return tar[: at // BLOCK * BLOCK]
    if sort == 2:
        return tar + tar if noise.random() < 0.5 else tar + noise.bytes(700)
    if sort == 3:
        return tar[:at] + noise.bytes(int(noise.integers(1, 600))) + tar[at:]
    if sort == 4:
        first, second = (place // BLOCK * BLOCK for place in (at, other))
        return tar[:first] + tar[second : second + BLOCK] + tar[first + BLOCK :]
    if sort == 5:
        changed = bytearray(tar)
        for place in noise.integers(0, len(tar), int(noise.integers(1, 5))):
            changed[place] ^= 1 << int(noise.integers(8))
        return bytes(changed)
    return inserted_header(noise, tar) if sort == 6 else changed_header(noise, tar)


def read_all(uri: str) -> int:
    """Samples of a dataset that can be read; the others are refused."""
    count = 0
    try:
        dataset = Dataset(uri)
        places = [place for place, _ in dataset.entries()]
        images = dataset.images()
    except RddmError:
        return 0
    for read in [lambda p=p: dataset.sample(*p) for p in places] + [lambda i=i: dataset.whole(i) for i in images]:
        try:
            assert read().target.dtype == np.uint8
            count += 1
        except RddmError:
            pass
    return count


def check_tar(folder: Path, tar: bytes) -> bool:
    """Index and read a tar.   -> whether it was accepted: then a common reader finds the same members in it"""
    for path in folder.iterdir():
        path.unlink()
    place = folder / "a.tar"
    place.write_bytes(tar)
    with guarded(folder):
        try:
            manifest = index_tars(str(folder), suffixes=PAIRS, jobs=1, skip_incomplete=True).manifest
        except RddmError as error:
            message = str(error)
            assert "\n" not in message and message.isascii() and len(message) < 2000
            return False
        assert manifest.shards[0].sha256 == hashlib.sha256(tar).hexdigest()
        read_all(str(folder))
    assert place.read_bytes() == tar
    with tarfile.open(place) as opened:
        common = {(info.offset_data, info.size): info.name for info in opened if info.isreg()}
    for _, entry in Dataset(str(folder)).entries():
        for member in entry.members:
            assert common[(member.start, member.size)].removeprefix("./").startswith(entry.name)
    return True


def fuzz_tars(tmp_path: Path, *, seed: int, cases: int) -> None:
    noise = np.random.default_rng(seed)
    folder, witness = tmp_path / "data", tmp_path / "executed"
    folder.mkdir()
    tars = originals(witness)
    assert all(check_tar(folder, tar) for tar in tars)  # also loads what is loaded only once
    with bounded_memory():
        accepted = sum(check_tar(folder, mutated(noise, tars[noise.integers(len(tars))])) for _ in range(cases))
    assert cases // 20 < accepted < cases // 2
    assert sorted(tmp_path.iterdir()) == [folder] and not witness.exists()


def mutate_json(noise: np.random.Generator, document: Any) -> None:
    """Replace one value somewhere in a JSON document."""
    while True:
        keys = list(document) if isinstance(document, dict) else list(range(len(document)))
        if not keys:
            return
        key = keys[noise.integers(len(keys))]
        inner = document[key]
        if isinstance(inner, (dict, list)) and inner and noise.random() < 0.85:
            document = inner
            continue
        values = (
            None,
            -1,
            0,
            1,
            3,
            7.5,
            2**31,
            2**63,
            2**70,
            True,
            "",
            "x",
            "../x",
            "/etc/passwd",
            "\ud800",
            [],
            {},
            inner,
        )
        document[key] = values[noise.integers(len(values))]
        if isinstance(document, list) and noise.random() < 0.1:
            document.append(inner)
        return


def fuzz_datasets(tmp_path: Path, *, seed: int, cases: int) -> None:
    """Tars that are not those of their index, and indexes and manifests that lie, with hashes that fit."""
    noise = np.random.default_rng(seed)
    uris = [
        make_dataset(tmp_path, count=4, size=(12, 10), name="whole", mask=True),
        make_dataset(tmp_path, count=2, size=(12, 10), name="tiled", tile=8, overlap=2),
    ]
    with bounded_memory():
        readable = sum(_read_lying(noise, Path(uris[case % 2])) for case in range(cases))
    assert cases // 20 < readable < cases


def _read_lying(noise: np.random.Generator, folder: Path) -> bool:
    """Change one file of a dataset, read what is readable, and put the file back.   -> whether anything was"""
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    manifest = Manifest.load(str(folder))
    first, *rest = manifest.shards
    sort = noise.integers(3)
    if sort == 0:
        tar = mutated(noise, kept[folder / first.name])
        (folder / first.name).write_bytes(tar.ljust(first.bytes, b"\0")[: first.bytes])
    elif sort == 1:
        document = json.loads(kept[folder / first.index_name])
        mutate_json(noise, document)
        data = json.dumps(document).encode()
        (folder / first.index_name).write_bytes(data)
        row = first._replace(index_bytes=len(data), index_sha256=hashlib.sha256(data).hexdigest())
        replace(manifest, shards=ShardTable.of([row, *rest])).save(str(folder))
    else:
        document = json.loads(manifest.to_json())
        mutate_json(noise, document)
        columns = document["shards"]
        if isinstance(columns, dict):
            rows = [columns.get(name) for name in ("name", "count", "bytes", "sha256", "index_bytes", "index_sha256")]
            document["fingerprint"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(document))
    with guarded(folder):
        count = read_all(str(folder))
    assert set(folder.iterdir()) == set(kept)
    for path, data in kept.items():
        if path.read_bytes() != data:
            path.write_bytes(data)
    return count > 0


def test_mutated_tars_are_indexed_or_refused(tmp_path: Path, auditing: None) -> None:
    fuzz_tars(tmp_path, seed=1, cases=1000)


def test_lying_datasets_are_read_or_refused(tmp_path: Path, auditing: None) -> None:
    fuzz_datasets(tmp_path, seed=2, cases=400)


@pytest.mark.slow
def test_many_mutated_tars_are_indexed_or_refused(tmp_path: Path, auditing: None) -> None:
    fuzz_tars(tmp_path, seed=3, cases=10_000)


@pytest.mark.slow
def test_many_lying_datasets_are_read_or_refused(tmp_path: Path, auditing: None) -> None:
    fuzz_datasets(tmp_path, seed=4, cases=4_000)


def test_the_guard_sees_what_it_is_there_for(tmp_path: Path, auditing: None) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with guarded(inside):
        (inside / "x").write_text("")
    with pytest.raises(AssertionError, match="open"), guarded(inside):
        (tmp_path / "outside").write_text("")
    with pytest.raises(AssertionError, match=r"find_class|open"), guarded(inside):
        pickle.loads(pickle.dumps(Payload(str(tmp_path / "executed")))).close()
    assert (tmp_path / "executed").exists()
    with pytest.raises(AssertionError), bounded_memory():
        np.ones((MEMORY_MB + 100) << 20, np.uint8)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _bomb(width: int, height: int, *, extra: bytes = b"") -> bytes:
    """A PNG of few bytes that unpacks to an image of this size."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    body = b"".join([*(packer.compress(row) for _ in range(min(height, 4_000_000 // width))), packer.flush()])
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def test_images_that_would_fill_the_memory_are_refused_unopened(tmp_path: Path, auditing: None) -> None:
    text = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 << 20), 9))
    bombs = [_bomb(60_000, 60_000), _bomb(9_000, 8_000), _bomb(70_000, 1), png(1)[:33] + text + png(1)[33:]]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.tar").write_bytes(
        make_tar([(f"{number}.{field}.png", bomb) for number, bomb in enumerate(bombs) for field in ("lq", "gt")])
    )
    with bounded_memory(), guarded(folder), pytest.raises(DataError, match=r"^4 sample\(s\) are not whole"):
        index_tars(str(folder), suffixes=PAIRS)
    # An image that is allowed is not unpacked while it is indexed.
    (folder / "a.tar").write_bytes(make_tar([("a.lq.png", _bomb(8_000, 8_000)), ("a.gt.png", _bomb(8_000, 8_000))]))
    with bounded_memory(), guarded(folder):
        manifest = index_tars(str(folder), suffixes=PAIRS).manifest
    assert (manifest.max_width, manifest.max_height) == (8_000, 8_000)
