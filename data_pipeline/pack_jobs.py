"""The work of packing as functions of picklable arguments: check some samples, cut images into tiles, write a shard."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline import storage
from data_pipeline.decode import FORMATS, Window, decode_image
from data_pipeline.degradations import parse_degradation
from data_pipeline.errors import BadSample, DataError
from data_pipeline.index import Tile
from data_pipeline.manifest import ShardInfo, Tiling
from data_pipeline.pack_output import placing
from data_pipeline.pack_owner import using_temporary_folder, work_folder
from data_pipeline.records import encode_image, encode_meta
from data_pipeline.rng import stable_id
from data_pipeline.shards import WrittenShard, write_shard
from data_pipeline.sources import Pair, read_header
from data_pipeline.tiles import plan_tiles


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


class Cut(NamedTuple):
    """Where the encoded images of a tile wait: a staging file, the first byte, (suffix, bytes) of each in turn."""

    uri: str
    start: int
    members: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Row:
    """A sample to write: a checked pair, or the window of it that is a tile, and then where its images wait."""

    key: str
    name: str
    pair: Pair
    checked: Checked
    window: Window | None = None
    cut: Cut | None = None


@dataclass(frozen=True)
class CheckJob:
    """kept: where the result is kept for a later call; out: the dataset, as the user named it."""

    pairs: tuple[Pair, ...]
    kept: str
    out: str


@dataclass(frozen=True)
class CutJob:
    """rows: whole images; kept: the location, without extension, of the file of their tiles and of its receipt, which
    names what decides their content; out: the dataset, as the user named it."""

    rows: tuple[Row, ...]
    recipe: Recipe
    kept: str
    out: str


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

    Raises DataError naming the file that cannot be used, EnvironmentFault when the result cannot be kept.
    """
    identity = _identify(job.pairs)
    with placing(job.out):
        kept = _read_kept(job.kept)
    if kept.get("identity") == identity:
        return [Checked(*row) for row in kept["rows"]]
    rows = [_check_pair(pair) for pair in job.pairs]
    with placing(job.out):
        storage.write_bytes_atomic(job.kept, json.dumps({"identity": identity, "rows": rows}).encode())
    return rows


def cut_chunk(job: CutJob) -> list[Cut]:
    """Make each image once, encode its tiles and put those of all images into one file, unless that was done.

    -> the tiles, image by image, in the order of plan_tiles. Raises DataError for a source file that has changed or
    cannot be encoded, EnvironmentFault when the place cannot be written.
    """
    assert job.recipe.tiling is not None, "only tiles are cut"
    uri, receipt = f"{job.kept}.bin", f"{job.kept}.json"
    keys = [row.key for row in job.rows]
    with placing(job.out):
        kept = _read_kept(receipt)
    if kept.get("keys") == keys:
        return [Cut(uri, start, tuple((suffix, size) for suffix, size in members)) for start, members in kept["cuts"]]
    cuts: list[Cut] = []
    data = bytearray()
    for row in job.rows:
        images = _make_images(row, job.recipe)
        for window in plan_tiles(row.checked.height, row.checked.width, **job.recipe.tiling._asdict()):
            start, members = len(data), []
            for field, image in images.items():
                suffix, encoded = _encode(row, field, window.cut(image), job.recipe)
                members.append((suffix, len(encoded)))
                data += encoded
            cuts.append(Cut(uri, start, tuple(members)))
    with placing(job.out):
        storage.write_bytes_atomic(uri, bytes(data))
        found = {"keys": keys, "cuts": [(cut.start, cut.members) for cut in cuts]}
        storage.write_bytes_atomic(receipt, json.dumps(found).encode())
    return cuts


def digest_chunk(pairs: tuple[Pair, ...]) -> list[dict[str, str]]:
    """Field -> sha256 of the file, for each pair."""
    return [{field: digest(_read(path)) for field, path in pair.files.items()} for pair in pairs]


def measure_chunk(pairs: tuple[Pair, ...]) -> list[tuple[int, int, int]]:
    """(width, height, bytes of all files) of each pair, from the header of its target. Raises DataError.

    An orientation that a PNG tells behind its pixels is not seen.
    """
    measured = []
    for pair in pairs:
        try:
            total = sum(path.stat().st_size for path in pair.files.values())
            width, height = read_header(pair.target)
        except BadSample as error:
            raise DataError(f"{pair.target} cannot be used: {error}; replace or remove it") from error
        except OSError as error:
            raise DataError(f"{pair.name} cannot be read: {error.strerror or error} ({error.filename})") from error
        measured.append((width, height, total))
    return measured


def count_encoded_bytes(job: EncodeJob) -> int:
    """Bytes of the encoded samples."""
    return sum(sum(map(len, encode_row(row, job.recipe).values())) for row in job.rows)


def write_one_shard(job: ShardJob) -> ShardInfo:
    """Write a shard, its index and then its receipt. Raises DataError for a source file that has changed or cannot be
    encoded, EnvironmentFault when the place, or the folder for temporary files, cannot be written."""
    local = str(storage.local_path(job.folder)) if storage.is_local(job.folder) else None
    with contextlib.ExitStack() as stack:
        with placing(job.out) if local else using_temporary_folder():
            work = stack.enter_context(work_folder(local))
            tar = work / f"{job.name}.tar"
            written = write_shard(tar, ((row.key, encode_row(row, job.recipe)) for row in job.rows))
            index = tar.with_suffix(".idx")
            index.write_bytes(written.index)
        with placing(job.out):
            for path in (index, tar):
                _place(path, storage.join(job.folder, path.name))
            info = _describe(tar.name, written)
            receipt = storage.join(job.receipts, f"{job.name}.json")
            storage.write_bytes_atomic(receipt, json.dumps(info._asdict()).encode())
    return info


def encode_row(row: Row, recipe: Recipe) -> dict[str, bytes]:
    """The tar members of a sample, KEY apart: suffix -> bytes; of a tile those that cut_chunk made.

    Raises DataError naming the file that cannot be used.
    """
    width, height = (row.window.width, row.window.height) if row.window else row.checked[:2]
    tile = None
    if row.window is not None:
        whole = row.checked
        tile = Tile(row.pair.name, row.window.left, row.window.top, whole.width, whole.height)._asdict()
    members = {"json": encode_meta(key=row.key, name=row.name, width=width, height=height, tile=tile)}
    if row.cut is not None:
        return members | _gather(row.cut)
    if recipe.codec == "keep":
        for field, path in row.pair.files.items():
            members[f"{field}.{extension_of(path)}"] = _read_unchanged(row, field)
        return members
    return members | dict(_encode(row, field, image, recipe) for field, image in _make_images(row, recipe).items())


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
    """Field -> (H, W, 3) uint8, masks (H, W, 1): the whole images, which a degradation needs as well, so that the tiles
    of an image agree where they overlap."""
    if not recipe.degrade:
        return {field: _decode(row, field) for field in row.pair.files}
    target = _decode(row, "target")
    ids = np.array([stable_id(row.pair.key)], dtype=np.int64)
    try:
        inputs, masks = parse_degradation(recipe.degrade).apply(target[None], seed=recipe.seed, ids=ids)
    except DataError as error:
        raise DataError(f"{row.pair.target}: {error}") from error
    return {"input": inputs[0], "target": target} | ({} if masks is None else {"mask": masks[0]})


def _decode(row: Row, field: str) -> np.ndarray:
    channels, shape = 1 if field == "mask" else 3, (row.checked.height, row.checked.width)
    data = _read_unchanged(row, field)
    return decode_image(data, extension_of(row.pair.files[field]), channels=channels, shape=shape)


def _encode(row: Row, field: str, image: np.ndarray, recipe: Recipe) -> tuple[str, bytes]:
    """(suffix of the tar member, bytes)"""
    try:
        extension, data = encode_image(image, recipe.codec, quality=recipe.quality)
    except BadSample as error:
        path = row.pair.files.get(field, row.pair.target)
        raise DataError(f"{path} {error}; choose another --codec") from error
    return f"{field}.{extension}", data


def _gather(cut: Cut) -> dict[str, bytes]:
    """Suffix -> bytes of the images of a tile."""
    length = sum(size for _, size in cut.members)
    try:
        data = storage.read_range(cut.uri, cut.start, length)
    except FileNotFoundError:
        data = b""
    if len(data) != length:
        raise DataError(f"{cut.uri} was removed or cut short while it was in use; pack again")
    found, start = {}, 0
    for suffix, size in cut.members:
        found[suffix] = data[start : start + size]
        start += size
    return found


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


def _read_kept(uri: str) -> Mapping[str, Any]:
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
