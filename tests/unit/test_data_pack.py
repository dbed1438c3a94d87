"""Packing: reproducible bytes, plain webdataset tars, nothing half-written, one clear line for each mistake."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline import pack as pack_module
from data_pipeline import storage
from data_pipeline.errors import ConfigError, DataError, EnvironmentFault
from data_pipeline.loader import eval_index, read_sample
from data_pipeline.manifest import Manifest
from data_pipeline.pack import pack
from data_pipeline.records import decode_image
from data_pipeline.sources import Pair, find_pairs
from tests.support.datasets import make_dataset, make_folders


def _pairs(tmp_path: Path, **options: Any) -> list[Pair]:
    return find_pairs(*make_folders(tmp_path / "source", **options))


def _content(uri: str | Path) -> dict[str, bytes]:
    return {name: (Path(uri) / name).read_bytes() for name in sorted(os.listdir(uri))}


@pytest.mark.parametrize("codec", ["keep", "png", "webp", "jpeg", "raw"])
def test_the_bytes_do_not_depend_on_jobs_nor_on_the_order_of_pairs(tmp_path: Path, codec: str) -> None:
    pairs = _pairs(tmp_path, count=7)
    for name, jobs, given in (("a", 1, pairs), ("b", 3, pairs[::-1]), ("c", 0, pairs)):
        pack(given, str(tmp_path / name), shard_mb=0.02, codec=codec, jobs=jobs)
    contents = [_content(tmp_path / name) for name in "abc"]
    assert contents[0] == contents[1] == contents[2]
    assert "manifest.json" in contents[0] and len(contents[0]) >= 5


def test_another_seed_shuffles_otherwise(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, count=12)
    prints = [pack(pairs, str(tmp_path / str(seed)), seed=seed, jobs=1).manifest.fingerprint for seed in (0, 1)]
    assert prints[0] != prints[1]


def test_shards_hold_equal_counts_and_the_manifest_tells_the_truth(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, count=11)
    manifest = pack(pairs, str(tmp_path / "data"), shard_mb=0.02, jobs=2).manifest
    counts = manifest.counts.tolist()
    assert len(counts) > 2 and sum(counts) == manifest.num_samples == 11 and max(counts) - min(counts) <= 1
    for shard in manifest.shards:
        data = (tmp_path / "data" / shard.name).read_bytes()
        assert (len(data), pack_module._digest(data)) == (shard.bytes, shard.sha256)
    assert (manifest.min_width, manifest.max_width, manifest.min_height, manifest.max_height) == (48, 48, 40, 40)
    assert Manifest.load(str(tmp_path / "data")) == manifest


@pytest.mark.parametrize("codec", ["keep", "raw"])
def test_a_large_shard_size_makes_one_shard(tmp_path: Path, codec: str) -> None:
    assert len(pack(_pairs(tmp_path), str(tmp_path / "data"), codec=codec, jobs=1).manifest.shards) == 1


def test_keep_stores_the_source_bytes_and_plain_webdataset_reads_them(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, count=5, mask=True)
    urls = sorted(str(path) for path in Path(uri).glob("shard-*.tar"))
    assert len(urls) > 1
    rows = {row["__key__"]: row for row in webdataset.WebDataset(urls, shardshuffle=False)}
    assert sorted(rows) == [f"photo_{number:03d}" for number in range(5)]
    for key, row in rows.items():
        for field in ("input", "target", "mask"):
            assert row[f"{field}.png"] == (tmp_path / "data-source" / field / f"{key}.png").read_bytes()
        assert json.loads(row["json"]) == {"key": key, "name": key, "width": 48, "height": 40}


@pytest.mark.parametrize("codec", ["keep", "png", "webp", "jpeg", "raw"])
def test_a_sample_comes_back_by_its_place(tmp_path: Path, codec: str) -> None:
    uri = make_dataset(tmp_path, count=5, mask=True, codec=codec)
    manifest = Manifest.load(uri)
    assert manifest.has_mask and manifest.codec == codec
    entries = eval_index(uri, manifest)
    assert [entry.key for entry in entries] == [f"photo_{number:03d}" for number in range(5)]
    for entry in entries:
        sample = read_sample(uri, manifest, entry.shard_index, entry.offset)
        assert sample.key == entry.key and (entry.width, entry.height) == (48, 40)
        for field, image in (("input", sample.input), ("target", sample.target), ("mask", sample.mask)):
            file = tmp_path / "data-source" / field / f"{entry.key}.png"
            expected = decode_image(file.read_bytes(), "png", channels=1 if field == "mask" else 3)
            assert image is not None and image.shape == expected.shape and image.dtype == np.uint8
            if codec != "jpeg" or field == "mask":
                assert np.array_equal(image, expected)


def test_the_same_dataset_is_reused_and_another_one_refused(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path)
    out = str(tmp_path / "data")
    first = pack(pairs, out, jobs=1)
    before = _content(out)
    again = pack(pairs, out, jobs=2)
    assert (first.reused, again.reused) == (False, True) and again.manifest == first.manifest
    for change in ({"seed": 1}, {"codec": "png"}, {"shard_mb": 0.01}):
        with pytest.raises(DataError, match="holds another dataset"):
            pack(pairs, out, jobs=1, **change)
    Image.new("RGB", (48, 40)).save(pairs[0].input)
    with pytest.raises(DataError, match="holds another dataset"):
        pack(pairs, out, jobs=1)
    assert _content(out) == before


def test_a_damaged_dataset_is_not_reused(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path)
    out = tmp_path / "data"
    pack(pairs, str(out), jobs=1)
    (out / "shard-00000.tar").write_bytes(b"cut")
    with pytest.raises(DataError, match="is damaged: shard-00000.tar"):
        pack(pairs, str(out), jobs=1)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="holds thesis.txt but no dataset"):
        pack(_pairs(tmp_path), str(out), jobs=1)
    assert _content(out) == {"thesis.txt": b"precious"}
    with pytest.raises(DataError, match="is a file"):
        pack(_pairs(tmp_path), str(out / "thesis.txt"), jobs=1)


def test_what_a_killed_pack_left_is_swept(tmp_path: Path) -> None:
    out = tmp_path / "data"
    (out / f"{pack_module.STAGING_PREFIX}x").mkdir(parents=True)
    (out / f"{pack_module.STAGING_PREFIX}x" / "shard-00000.tar").write_bytes(b"half")
    pack(_pairs(tmp_path), str(out), jobs=1)
    assert sorted(os.listdir(out)) == ["manifest.json", "shard-00000.idx", "shard-00000.tar"]


class _Interrupted:
    """Progress that raises KeyboardInterrupt or an error after some calls."""

    def __init__(self, calls: int, error: BaseException) -> None:
        self.calls, self.error = calls, error

    def __call__(self, done: int, total: int) -> None:
        self.calls -= 1
        if self.calls == 0:
            raise self.error


@pytest.mark.parametrize("calls", [1, 6, 7, 9, 12])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug")])
def test_nothing_is_left_of_an_interrupted_pack(tmp_path: Path, calls: int, error: BaseException) -> None:
    pairs = _pairs(tmp_path)
    with pytest.raises(type(error)):
        pack(pairs, str(tmp_path / "new" / "data"), shard_mb=0.01, jobs=2, progress=_Interrupted(calls, error))
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(type(error)):
        pack(pairs, str(tmp_path / "old"), shard_mb=0.01, jobs=2, progress=_Interrupted(calls, error))
    assert os.listdir(tmp_path / "old") == []


@pytest.mark.parametrize("failing", ["shard-00001.tar", "manifest.json"])
def test_nothing_is_left_when_publishing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == failing:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(EnvironmentFault, match="cannot be written: No space left on device"):
        pack(_pairs(tmp_path), str(tmp_path / "data"), shard_mb=0.01, jobs=1)
    assert not (tmp_path / "data").exists()


def test_progress_counts_every_pair_once(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    pack(_pairs(tmp_path), str(tmp_path / "data"), jobs=2, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (6, 6) and [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path)
    pairs[3].target.write_bytes(pairs[3].target.read_bytes()[:60])
    with pytest.raises(DataError, match=r"target/photo_003\.png cannot be used: not a readable png"):
        pack(pairs, str(tmp_path / "data"), jobs=2)
    assert not (tmp_path / "data").exists()


def test_a_pair_of_two_sizes_is_named(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path)
    Image.new("RGB", (30, 20)).save(pairs[2].target)
    with pytest.raises(DataError, match=r"input/photo_002\.png is 48x40, but its target .*photo_002\.png is 30x20"):
        pack(pairs, str(tmp_path / "data"), jobs=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"codec": "gif"}, "--codec=gif is unknown; choose one of keep, png, webp, jpeg, raw"),
        ({"shard_mb": 0}, "--shard-mb=0 must be above 0"),
        ({"shard_mb": float("nan")}, "--shard-mb=nan must be above 0"),
        ({"jobs": -1}, "--jobs=-1"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pack(_pairs(tmp_path), str(tmp_path / "data"), **options)


def test_bad_lists_of_pairs_are_refused(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path)
    out = str(tmp_path / "data")
    with pytest.raises(DataError, match="no pairs"):
        pack([], out)
    with pytest.raises(DataError, match="have one name, photo_000"):
        pack([pairs[0], pairs[0]], out)
    with pytest.raises(DataError, match=r"key '\.\./x' is not allowed"):
        pack([Pair("../x", pairs[0].input, pairs[0].target, None, "x")], out)
    half_masked = Pair("masked", pairs[0].input, pairs[0].target, pairs[0].target, "masked")
    with pytest.raises(DataError, match=r"6 of 7 pairs have no mask"):
        pack([*pairs, half_masked], out)
    gone = Pair("gone", tmp_path / "gone.png", pairs[0].target, None, "gone")
    with pytest.raises(DataError, match=r"gone\.png cannot be read"):
        pack([gone], out)


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path)
    calls: list[int] = []

    def spoil(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == total:  # all are checked, none is written
            shutil.copyfile(pairs[0].input, pairs[1].input)

    with pytest.raises(DataError, match=r"photo_001\.png changed while it was being packed"):
        pack(pairs, str(tmp_path / "data"), jobs=1, progress=spoil)
    assert not (tmp_path / "data").exists()


def test_an_image_too_wide_for_webp_is_named(tmp_path: Path) -> None:
    for field in ("input", "target"):
        (tmp_path / field).mkdir()
        Image.new("RGB", (16_400, 2)).save(tmp_path / field / "wide.png")
    pairs = find_pairs(tmp_path / "input", tmp_path / "target")
    with pytest.raises(DataError, match=r"wide\.png cannot be written as webp.*choose another --codec"):
        pack(pairs, str(tmp_path / "data"), codec="webp", jobs=1)


@pytest.fixture
def bucket() -> Iterator[str]:
    """A folder of fsspec's memory:// filesystem."""
    uri = f"memory://{uuid.uuid4().hex}/data"
    yield uri
    for name in storage.list_names(uri):
        storage.remove(storage.join(uri, name))


def test_a_url_holds_the_same_dataset(tmp_path: Path, bucket: str) -> None:
    pairs = _pairs(tmp_path)
    local = pack(pairs, str(tmp_path / "data"), shard_mb=0.01, jobs=1).manifest
    remote = pack(pairs, bucket, shard_mb=0.01, jobs=2).manifest
    assert remote == local == Manifest.load(bucket)
    assert {name: storage.read_bytes(storage.join(bucket, name)) for name in storage.list_names(bucket)} == _content(
        tmp_path / "data"
    )
    assert pack(pairs, bucket, shard_mb=0.01).reused
    for entry in eval_index(bucket, remote):
        assert read_sample(bucket, remote, entry.shard_index, entry.offset).key == entry.key


def test_nothing_is_left_of_an_interrupted_upload(tmp_path: Path, bucket: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack(_pairs(tmp_path), bucket, shard_mb=0.01, jobs=1, progress=_Interrupted(10, KeyboardInterrupt()))
    assert storage.list_names(bucket) == []


def test_an_unknown_kind_of_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing://x"):
        pack(_pairs(tmp_path), "nothing://x", jobs=1)
