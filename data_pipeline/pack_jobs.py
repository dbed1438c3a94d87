"""The work of packing as pure functions of picklable arguments: check a chunk of samples, write a shard."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline import storage
from data_pipeline.decode import FORMATS, Window, decode_image, read_size
from data_pipeline.degradations import parse_degradation
from data_pipeline.errors import BadSample, DataError, EnvironmentFault
from data_pipeline.index import Tile
from data_pipeline.manifest import ShardInfo, Tiling
from data_pipeline.records import encode_image, encode_meta
from data_pipeline.rng import stable_id
from data_pipeline.shards import WrittenShard, write_shard
from data_pipeline.sources import Pair

WORK_PREFIX = "writing-"


@dataclass(frozen=True)
class Recipe:
    """What is made of the source files.

    codec: one of CODECS; quality: of jpeg, 1..100; degrade: canonical spec that makes inputs from targets, "" where
    the inputs are given; seed: of the degradation; tiling: None for whole images.
    """

    codec: str
    quality: int
    degrade: str
    seed: int
    tiling: Tiling | None


class Checked(NamedTuple):
    """A pair whose images were decoded: size in pixels, field -> sha256 of the source file, bytes of all of them."""

    width: int
    height: int
    digests: dict[str, str]
    bytes: int


@dataclass(frozen=True)
class Row:
    """A sample to write: a checked pair, or the window of it that is a tile."""

    key: str
    name: str
    pair: Pair
    checked: Checked
    window: Window | None


@dataclass(frozen=True)
class CheckJob:
    """kept: where the result is kept for a later call."""

    pairs: tuple[Pair, ...]
    kept: str


@dataclass(frozen=True)
class EncodeJob:
    """Samples to encode, to see how large they become."""

    rows: tuple[Row, ...]
    recipe: Recipe


@dataclass(frozen=True)
class ShardJob:
    """name: of the shard without extension; folder: where tar and index go; receipts: where the receipt goes; out: the
    dataset, as the user named it."""

    name: str
    rows: tuple[Row, ...]
    recipe: Recipe
    folder: str
    receipts: str
    out: str


def check_chunk(job: CheckJob) -> list[Checked]:
    """Decode every image of some pairs, unless that was done and no file has changed since.

    Raises DataError naming the file that cannot be used.
    """
    identity = _identify(job.pairs)
    kept = _read_kept(job.kept)
    if kept.get("identity") == identity:
        return [Checked(*row) for row in kept["rows"]]
    rows = [_check_pair(pair) for pair in job.pairs]
    storage.write_bytes_atomic(job.kept, json.dumps({"identity": identity, "rows": rows}).encode())
    return rows


def digest_chunk(pairs: tuple[Pair, ...]) -> list[dict[str, str]]:
    """Field -> sha256 of the file, for each pair."""
    return [{field: digest(_read(path)) for field, path in pair.files.items()} for pair in pairs]


def measure_chunk(pairs: tuple[Pair, ...]) -> list[tuple[int, int, int]]:
    """(width, height, bytes of all files) of each pair, from the headers of its images. Raises DataError."""
    measured = []
    for pair in pairs:
        data = {field: _read(path) for field, path in pair.files.items()}
        try:
            height, width = read_size(data["target"], extension_of(pair.target))
        except BadSample as error:
            raise DataError(f"{pair.target} cannot be used: {error}; replace or remove it") from error
        measured.append((width, height, sum(map(len, data.values()))))
    return measured


def count_encoded_bytes(job: EncodeJob) -> int:
    """Bytes of the encoded samples."""
    return sum(sum(map(len, encode_row(row, job.recipe).values())) for row in job.rows)


def write_one_shard(job: ShardJob) -> ShardInfo:
    """Write a shard, its index and then its receipt. Raises DataError for a source file that has changed or cannot be
    encoded, EnvironmentFault when the place cannot be written."""
    local = str(storage.local_path(job.folder)) if storage.is_local(job.folder) else None
    try:
        with tempfile.TemporaryDirectory(prefix=WORK_PREFIX, dir=local) as work:
            tar = Path(work) / f"{job.name}.tar"
            written = write_shard(tar, ((row.key, encode_row(row, job.recipe)) for row in job.rows))
            index = tar.with_suffix(".idx")
            index.write_bytes(written.index)
            for path in (index, tar):
                _place(path, storage.join(job.folder, path.name))
        info = _describe(tar.name, written)
        receipt = storage.join(job.receipts, f"{job.name}.json")
        storage.write_bytes_atomic(receipt, json.dumps(info._asdict()).encode())
    except OSError as error:
        raise EnvironmentFault(f"--out {job.out} cannot be written: {error.strerror or error}") from error
    return info


def encode_row(row: Row, recipe: Recipe) -> dict[str, bytes]:
    """The tar members of a sample, KEY apart: suffix -> bytes. Raises DataError naming the source file."""
    width, height = (row.window.width, row.window.height) if row.window else row.checked[:2]
    tile = None
    if row.window is not None:
        whole = row.checked
        tile = Tile(row.pair.name, row.window.left, row.window.top, whole.width, whole.height)._asdict()
    members = {"json": encode_meta(key=row.key, name=row.name, width=width, height=height, tile=tile)}
    if recipe.codec == "keep":
        for field, path in row.pair.files.items():
            members[f"{field}.{extension_of(path)}"] = _read_unchanged(row, field)
        return members
    for field, image in _make_images(row, recipe).items():
        try:
            extension, data = encode_image(image, recipe.codec, quality=recipe.quality)
        except BadSample as error:
            path = row.pair.files.get(field, row.pair.target)
            raise DataError(f"{path} {error}; choose another --codec") from error
        members[f"{field}.{extension}"] = data
    return members


def digest(data: bytes) -> str:
    """sha256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def extension_of(path: Path) -> str:
    """The extension an image is stored with. Raises DataError for an unknown one."""
    extension = path.suffix.lower().removeprefix(".")
    if extension not in FORMATS:
        raise DataError(f"{path} is of no known image format ({', '.join(sorted(FORMATS))})")
    return "jpg" if extension == "jpeg" else extension


def _make_images(row: Row, recipe: Recipe) -> dict[str, np.ndarray]:
    """Field -> (H, W, 3) uint8, masks (H, W, 1).

    A degradation sees the whole image, so that the tiles of an image agree where they overlap.
    """
    if not recipe.degrade:
        return {field: _decode(row, field, row.window) for field in row.pair.files}
    target = _decode(row, "target", None)
    ids = np.array([stable_id(row.pair.key)], dtype=np.int64)
    try:
        inputs, masks = parse_degradation(recipe.degrade).apply(target[None], seed=recipe.seed, ids=ids)
    except DataError as error:
        raise DataError(f"{row.pair.target}: {error}") from error
    images = {"input": inputs[0], "target": target} | ({} if masks is None else {"mask": masks[0]})
    return images if row.window is None else {field: row.window.cut(image) for field, image in images.items()}


def _decode(row: Row, field: str, window: Window | None) -> np.ndarray:
    path = row.pair.files[field]
    channels, shape = 1 if field == "mask" else 3, (row.checked.height, row.checked.width)
    data = _read_unchanged(row, field)
    return decode_image(data, extension_of(path), channels=channels, shape=shape, window=window)


def _check_pair(pair: Pair) -> Checked:
    digests: dict[str, str] = {}
    total, size = 0, (0, 0)
    for field, path in pair.files.items():
        data = _read(path)
        try:
            image = decode_image(data, extension_of(path), channels=1 if field == "mask" else 3)
        except BadSample as error:
            raise DataError(f"{path} cannot be used: {error}; replace or remove it") from error
        height, width = image.shape[:2]
        if not digests:
            size = (width, height)
        elif size != (width, height):
            raise DataError(
                f"{pair.first} is {size[0]}x{size[1]}, but its {field} {path} is {width}x{height}; sizes must agree"
            )
        digests[field] = digest(data)
        total += len(data)
    return Checked(*size, digests, total)


def _identify(pairs: Sequence[Pair]) -> str:
    """What tells whether files are those that were checked: names, sizes and times."""
    rows = []
    for pair in pairs:
        for field, path in pair.files.items():
            try:
                found = path.stat()
            except OSError as error:
                raise _unreadable(path, error) from error
            rows.append([pair.key, field, str(path.absolute()), found.st_size, found.st_mtime_ns])
    return digest(json.dumps(rows).encode())


def _read_kept(uri: str) -> Mapping[str, list[list[object]] | str]:
    try:
        return json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        return {}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}")


def _read_unchanged(row: Row, field: str) -> bytes:
    path = row.pair.files[field]
    data = _read(path)
    if digest(data) != row.checked.digests[field]:
        raise DataError(f"{path} changed while it was being packed; pack again")
    return data


def _place(path: Path, uri: str) -> None:
    """Put a finished file where it belongs."""
    if not storage.is_local(uri):
        storage.upload(path, uri)
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # a receipt must not outlive its shard, whatever happens to the machine
    os.replace(path, storage.local_path(uri))


def _describe(name: str, written: WrittenShard) -> ShardInfo:
    widths, heights = [entry.width for entry in written.entries], [entry.height for entry in written.entries]
    return ShardInfo(
        name=name,
        count=len(written.entries),
        bytes=written.bytes,
        sha256=written.sha256,
        index_bytes=len(written.index),
        index_sha256=digest(written.index),
        min_width=min(widths),
        max_width=max(widths),
        min_height=min(heights),
        max_height=max(heights),
    )
