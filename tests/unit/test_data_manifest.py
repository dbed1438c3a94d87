"""Manifest, index and storage: round trips, and refusal of what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import storage
from data_pipeline.errors import BadSample, DataError
from data_pipeline.loader import eval_index, read_sample
from data_pipeline.manifest import Manifest
from data_pipeline.reader import load_index
from data_pipeline.shards import parse_index, read_members
from tests.support.datasets import make_dataset


def test_the_fingerprint_names_the_shards_alone(tmp_path: Path) -> None:
    manifest = Manifest.load(make_dataset(tmp_path))
    assert replace(manifest, source_digest="x", codec="png").fingerprint == manifest.fingerprint
    first = replace(manifest.shards[0], sha256="0" * 64)
    assert replace(manifest, shards=(first, *manifest.shards[1:])).fingerprint != manifest.fingerprint


def test_what_is_no_dataset_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for uri in (tmp_path / "nowhere", tmp_path, tmp_path / "file"):
        with pytest.raises(DataError, match=r"is no packed dataset: it holds no manifest\.json"):
            Manifest.load(str(uri))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 2}, "has format version 2; this program reads up to 1"),
        ({"num_samples": 7}, "do not add up"),
        ({"num_samples": "6"}, "bad value of num_samples"),
        ({"shards": []}, "do not add up"),
        ({"shards": [{"name": "../../x.tar"}]}, "damaged"),
        ({"min_width": 0}, "bad image sizes"),
        ({"fingerprint": "0" * 64}, "fingerprint does not fit"),
        ({"codec": None}, "bad value of codec"),
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
    "content", ["", "[]", "{}", "null", '{"format_version": 1', '{"format_version": 1, "shards": 3}']
)
def test_a_broken_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Manifest.load(str(tmp_path))


def test_a_shard_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path)
    manifest = Manifest.load(uri)
    for name in ("../x.tar", "/etc/x.tar", ".x.tar", "x.zip", "s3://b/x.tar"):
        replace(manifest, shards=(replace(manifest.shards[0], name=name), *manifest.shards[1:])).save(uri)
        with pytest.raises(DataError, match="bad shard"):
            Manifest.load(uri)


def test_missing_cut_and_foreign_shards_and_indexes_are_noticed(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path)
    manifest = Manifest.load(uri)
    tar, index = Path(uri) / "shard-00000.tar", Path(uri) / "shard-00000.idx"
    tar_bytes, index_bytes = tar.read_bytes(), index.read_bytes()
    tar.write_bytes(tar_bytes[:-512])
    with pytest.raises(DataError, match=r"shard-00000\.tar has \d+ bytes instead of"):
        eval_index(uri, manifest)
    tar.unlink()
    with pytest.raises(DataError, match=r"shard-00000\.tar or its index cannot be read"):
        eval_index(uri, manifest)
    tar.write_bytes(tar_bytes)
    index.write_bytes(index_bytes.replace(b"photo", b"phoxo"))
    with pytest.raises(DataError, match=r"shard-00000\.idx is not the index the manifest names"):
        eval_index(uri, manifest)
    index.write_bytes(index_bytes)
    assert len(eval_index(uri, manifest)) == 6


def _index(**change: Any) -> bytes:
    row = {"key": "a", "name": "a", "width": 4, "height": 4, "members": {"input.png": [0, 9], "target.png": [9, 9]}}
    return json.dumps({"format_version": 1, "samples": [{**row, **change}]}).encode()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "damaged"),
        (b"[]", "damaged"),
        (json.dumps({"format_version": 2, "samples": []}).encode(), "format version 2"),
        (json.dumps({"format_version": 1, "samples": []}).encode(), "lists 0 samples, the manifest 1"),
        (_index(key="../a"), "bad key"),
        (_index(width="4"), "bad entry"),
        (_index(members={"input.png": [0, 101], "target.png": [0, 9]}), "bad place of a.input.png"),
        (_index(members={"input.png": [-1, 9], "target.png": [0, 9]}), "bad place"),
        (_index(members={"input.png": [0, 9]}), "sample a has"),
        (_index(members={"input.png": [0, 9], "target.png": [0, 9], "mask.png": [0, 9]}), "sample a has"),
    ],
)
def test_a_bad_index_is_refused(data: bytes, message: str) -> None:
    assert len(parse_index(_index(), source="x.idx", count=1, shard_bytes=100, has_mask=False)) == 1
    with pytest.raises(DataError, match=message):
        parse_index(data, source="x.idx", count=1, shard_bytes=100, has_mask=False)


def test_a_damaged_member_is_a_bad_sample(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path)
    manifest = Manifest.load(uri)
    entry = load_index(uri, manifest.shards[0], has_mask=False)[0]
    tar = Path(uri) / "shard-00000.tar"
    data = bytearray(tar.read_bytes())
    start = entry.members[0].start
    data[start : start + 30] = bytes(30)
    tar.write_bytes(data)
    with pytest.raises(BadSample, match=entry.key):
        read_sample(uri, manifest, 0, 0)
    short = tmp_path / "short.tar"
    short.write_bytes(data[: start + 10])
    with pytest.raises(BadSample, match="ends after 10 of"):
        read_members(str(short), entry)


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
