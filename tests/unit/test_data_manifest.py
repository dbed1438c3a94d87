"""Manifest, index and storage: round trips, and refusal of what does not fit."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.errors import BadSample, DataError
from data_pipeline.index import Entry, Member, Tile, encode_index, parse_index
from data_pipeline.manifest import Manifest, ShardTable
from data_pipeline.reader import Dataset
from data_pipeline.shards import read_members
from tests.support.datasets import make_dataset


def _with_shard(manifest: Manifest, **change: Any) -> Manifest:
    """The manifest with its first shard changed."""
    first, *rest = manifest.shards
    return replace(manifest, shards=ShardTable.of([first._replace(**change), *rest]))


def test_the_fingerprint_names_the_shards_alone(tmp_path: Path) -> None:
    manifest = Manifest.load(make_dataset(tmp_path))
    assert replace(manifest, source_digest="x", codec="png").fingerprint == manifest.fingerprint
    for change in ({"sha256": "0" * 64}, {"index_sha256": "0" * 64}, {"name": "x.tar"}, {"bytes": 1}, {"count": 1}):
        assert _with_shard(manifest, **change).fingerprint != manifest.fingerprint


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = Manifest.load(make_dataset(tmp_path, mask=True))
    assert manifest.has_input and manifest.has_mask and manifest.num_samples == manifest.counts.sum() == 6
    manifest.save(str(tmp_path))
    assert Manifest.load(str(tmp_path)) == manifest
    assert [manifest.shards[i] for i in range(len(manifest.shards))] == list(manifest.shards) == manifest.shards[:]


def test_what_is_no_dataset_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for uri in (tmp_path / "nowhere", tmp_path, tmp_path / "file"):
        with pytest.raises(DataError, match=r"is no packed dataset: it holds no manifest\.json"):
            Manifest.load(str(uri))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 3}, "has format version 3; this program reads 2: update it"),
        ({"format_version": 1}, "has the old format version 1, .*: pack the dataset again"),
        ({"format_version": "2"}, "has format version 2"),
        ({"num_samples": 7}, "do not add up"),
        ({"num_samples": "6"}, "do not add up"),
        ({"shards": []}, "bad columns"),
        ({"shards": {}}, "bad columns"),
        ({"fields": ["input"]}, "unknown fields"),
        ({"fields": ["target", "input"]}, "unknown fields"),
        ({"fields": [["target"]]}, "unknown fields"),
        ({"fingerprint": "0" * 64}, "fingerprint does not fit"),
        ({"codec": None}, "bad value of codec"),
        ({"source_digest": 3}, "bad value of source_digest"),
        ({"tiling": {"size": 4}}, "damaged"),
        ({"tiling": {"size": 4.5, "overlap": 1}}, "bad value of tiling"),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    uri = make_dataset(tmp_path)
    path = Path(uri) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=message) as caught:
        Manifest.load(uri)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "column, values, message",
    [
        ("count", [0, 6], "bad value of count"),
        ("count", [3.0, 3], "bad value of count"),
        ("count", [True, 5], "bad value of count"),
        ("count", [2**53, 2**53], "more samples than can be counted"),
        ("count", [6], "unequal length"),
        ("bytes", [-1, 5], "bad value of bytes"),
        ("sha256", ["0" * 64, "0" * 63], "bad sha256"),
        ("index_sha256", ["0" * 64, None], "damaged"),
        ("name", {"a.tar": 0, "b.tar": 0}, "no list"),
        ("name", ["a.tar", "a.tar"], "two shards of one name"),
        ("max_width", [1 << 16, 48], "bad value of max_width"),
        ("min_width", [0, 48], "bad value of min_width"),
        ("min_height", [41, 40], "bad heights"),
    ],
)
def test_a_column_of_shards_that_cannot_be_is_refused(tmp_path: Path, column: str, values: Any, message: str) -> None:
    uri = make_dataset(tmp_path)
    path = Path(uri) / "manifest.json"
    document = json.loads(path.read_text())
    document["shards"][column] = values
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=message):
        Manifest.load(uri)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", '{"format_version": 2', '{"format_version": 2, "shards": 3}', "[" * 100_000]
)
def test_a_broken_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Manifest.load(str(tmp_path))


def test_a_shard_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path)
    manifest = Manifest.load(uri)
    for name in ("../x.tar", "/etc/x.tar", ".x.tar", "x.zip", "s3://b/x.tar", "-x.tar", "x.tar\n", "pipe:x.tar"):
        _with_shard(manifest, name=name).save(uri)
        with pytest.raises(DataError, match="bad name"):
            Manifest.load(uri)


def _entries(uri: str) -> list[Entry]:
    return [entry for _, entry in Dataset(uri).entries()]


def test_missing_cut_and_foreign_shards_and_indexes_are_noticed(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path)
    tar, index = Path(uri) / "shard-00000.tar", Path(uri) / "shard-00000.idx"
    tar_bytes, index_bytes = tar.read_bytes(), index.read_bytes()
    tar.write_bytes(tar_bytes[:-512])
    with pytest.raises(DataError, match=r"shard-00000\.tar has \d+ bytes instead of"):
        _entries(uri)
    tar.unlink()
    with pytest.raises(DataError, match=r"shard-00000\.tar or its index cannot be read"):
        _entries(uri)
    tar.write_bytes(tar_bytes)
    index.write_bytes(index_bytes.replace(b"photo", b"phoxo"))
    with pytest.raises(DataError, match=r"shard-00000\.idx is not the index the manifest names"):
        _entries(uri)
    index.write_bytes(index_bytes)
    assert len(_entries(uri)) == 6


@pytest.mark.parametrize("change", [{"min_width": 47}, {"max_height": 41}])
def test_an_index_of_other_sizes_than_the_manifest_says_is_noticed(tmp_path: Path, change: dict[str, int]) -> None:
    uri = make_dataset(tmp_path)
    _with_shard(Manifest.load(uri), **change).save(uri)
    with pytest.raises(DataError, match="does not fit the manifest"):
        _entries(uri)


def test_tiles_that_do_not_fit_the_manifest_are_noticed(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path)
    tiled = make_dataset(tmp_path, tile=24, overlap=8, name="tiled")
    assert all(entry.tile is None for entry in _entries(uri)) and all(entry.tile for entry in _entries(tiled))
    for folder, tiling in ((uri, Manifest.load(tiled).tiling), (tiled, None)):
        replace(Manifest.load(folder), tiling=tiling).save(folder)
        with pytest.raises(DataError, match="does not fit the manifest"):
            _entries(folder)


COLUMNS = {"extension": ["png", "jpg"], "start": [0, 20], "size": [9, 9], "crc32": [0, 2**32 - 1]}
DOCUMENT = {
    "format_version": 2,
    "key": ["a", "b"],
    "name": ["a", "b/c"],
    "width": [4, 4],
    "height": [4, 8],
    "members": {"input": COLUMNS, "target": COLUMNS},
}
TILES = {"image": ["a", "a"], "left": [0, 4], "top": [0, 0], "image_width": [8, 8], "image_height": [8, 8]}


def _parse(document: Any) -> Any:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return parse_index(data, source="x.idx", count=2, shard_bytes=100, fields=("input", "target"))


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = to

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (_set("format_version", to=3), "has format version 3; this program reads 2: update it"),
        (_set("format_version", to=1), "old format version 1"),
        (_set("key", to=["a"]), "lists 1 samples, the manifest 2"),
        (_set("key", to=["a", "a"]), "repeated key"),
        (_set("key", to=["../a", "b"]), "bad or repeated key"),
        (_set("key", to=["a", 1]), "bad column key"),
        (_set("name", to=["a"]), "repeated key"),
        (_set("name", to=["a", "\ud800"]), "damaged"),
        (_set("width", to=["4", 4]), "bad column width"),
        (_set("width", to=[0, 4]), r"column width leaves 1\.\."),
        (_set("height", to=[4, 1 << 16]), r"column height leaves 1\.\."),
        (_set("members", to={}), "the manifest says"),
        (_set("members", to={"input": COLUMNS}), "the manifest says"),
        (_set("members", to={"input": COLUMNS, "target": COLUMNS, "mask": COLUMNS}), "the manifest says"),
        (_set("members", to={"inputs": COLUMNS}), "unknown field"),
        (_set("members", "input", to=[]), "damaged"),
        (_set("members", "input", "start", to=[0, 92]), "lies outside the shard"),
        (_set("members", "input", "start", to=[-1, 0]), "column start leaves"),
        (_set("members", "input", "size", to=[0, 9]), "column size leaves"),
        (_set("members", "input", "size", to=[2**70, 9]), "damaged"),
        (_set("members", "input", "crc32", to=[2**32, 9]), "column crc32 leaves"),
        (_set("members", "input", "extension", to=["png"]), "bad extensions"),
        (_set("members", "input", "extension", to=["png", "a\nb"]), "bad extensions"),
        (_set("tile", to={}), "damaged"),
        (_set("tile", to={**TILES, "left": [0, 5]}), "a tile leaves its image"),
        (_set("tile", to={**TILES, "image": ["a"]}), "bad tiles"),
        (_set("tile", to={**TILES, "image_width": [8, 65535], "image_height": [8, 65535]}), "too large"),
    ],
)
def test_a_bad_index_is_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    document = json.loads(json.dumps(DOCUMENT))
    assert len(_parse(document)) == 2
    change(document)
    with pytest.raises(DataError, match=message) as caught:
        _parse(document)
    assert "x.idx" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"2", b"{}", b"[" * 100_000, b"\xff"])
def test_what_is_no_index_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"x\.idx is damaged"):
        _parse(data)


@pytest.mark.parametrize("has_tiles", [False, True])
def test_an_index_gives_back_what_was_put_in(has_tiles: bool) -> None:
    entries = [
        Entry(
            f"k{number}",
            f"name {number} \u00fc",
            8 + number,
            5,
            tuple(Member(field, "png", 10 * number, 7, 123 + number) for field in ("input", "target")),
            Tile("whole", number, 2, 40, 30) if has_tiles else None,
        )
        for number in range(4)
    ]
    data = encode_index(entries)
    index = parse_index(data, source="x.idx", count=4, shard_bytes=100, fields=("input", "target"))
    assert list(index) == entries and index.has_tiles == has_tiles and len(index) == 4
    assert np.array_equal(index.widths, [8, 9, 10, 11])


def test_a_damaged_member_is_a_bad_sample(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path)
    dataset = Dataset(uri)
    entry = dataset.index(0)[0]
    tar = Path(uri) / "shard-00000.tar"
    assert set(read_members(str(tar), entry)) == {"input", "target"}
    data = bytearray(tar.read_bytes())
    start = entry.members[0].start
    data[start : start + 30] = bytes(30)
    tar.write_bytes(data)
    with pytest.raises(BadSample, match=entry.key):
        dataset.sample(0, 0)
    with pytest.raises(BadSample, match="are not those packed"):
        read_members(str(tar), entry)
    short = tmp_path / "short.tar"
    short.write_bytes(data[: start + 10])
    with pytest.raises(BadSample, match="ends after 10 of"):
        read_members(str(short), entry)


def test_members_far_apart_are_read_one_by_one_with_the_same_result(tmp_path: Path) -> None:
    place = tmp_path / "x.bin"
    place.write_bytes(b"first" + bytes(1 << 20) + b"second")
    first, zeros, second = (zlib.crc32(content) for content in (b"first", bytes(3), b"second"))
    near = Member("input", "png", 0, 5, first), Member("target", "png", 5, 3, zeros)
    far = Member("input", "png", 0, 5, first), Member("target", "png", 5 + (1 << 20), 6, second)
    for members, expected in ((near, bytes(3)), (far, b"second")):
        found = read_members(str(place), Entry("k", "k", 1, 1, members))
        assert found == {"input": ("png", b"first"), "target": ("png", expected)}


def test_the_hash_of_an_index_in_the_manifest_is_that_of_its_file(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path)
    for shard in Manifest.load(uri).shards:
        for name, digest in ((shard.name, shard.sha256), (shard.index_name, shard.index_sha256)):
            assert hashlib.sha256((Path(uri) / name).read_bytes()).hexdigest() == digest


def test_a_file_written_anew_under_the_same_name_is_read_anew(tmp_path: Path) -> None:
    uri = str(tmp_path / "x")
    for content in (b"first content", b"other content"):
        storage.write_bytes_atomic(uri, content)
        assert storage.read_range(uri, 0, 5) == content[:5]
        assert storage.read_range(uri, 6, 100) == content[6:]


def test_local_and_remote_storage_behave_alike(tmp_path: Path) -> None:
    for folder in (str(tmp_path / "folder"), f"file://{tmp_path}/folder2", f"memory://{tmp_path.name}/folder"):
        assert storage.list_names(folder) == [] and storage.is_local(folder) == (not folder.startswith("memory"))
        if storage.is_local(folder):
            storage.local_path(folder).mkdir()
        uri = storage.join(folder, "b.bin")
        assert not storage.exists(uri)
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(uri)
        with pytest.raises(FileNotFoundError):
            storage.size(uri)
        storage.write_bytes_atomic(uri, b"0123456789")
        storage.write_bytes_atomic(storage.join(folder, "a.bin"), b"")
        assert storage.exists(uri) and storage.size(uri) == 10 and storage.read_bytes(uri) == b"0123456789"
        assert storage.read_range(uri, 2, 3) == b"234" and storage.read_range(uri, 8, 5) == b"89"
        assert storage.list_names(folder) == ["a.bin", "b.bin"]
        storage.remove(uri)
        storage.remove(uri)
        assert storage.list_names(folder) == ["a.bin"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "x")
    storage.write_bytes_atomic(uri, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        storage.write_bytes_atomic(uri, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and storage.read_bytes(uri) == b"old"
