"""Packing: reproducible bytes, plain webdataset tars, nothing half-written, one clear line for each mistake."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image

from data_pipeline import pack_owner, storage
from data_pipeline.decode import decode_image
from data_pipeline.degradations import parse_degradation
from data_pipeline.errors import ConfigError, DataError, EnvironmentFault
from data_pipeline.manifest import Manifest
from data_pipeline.pack import foresee, pack
from data_pipeline.pack_executors import Executor, processes, threads
from data_pipeline.pack_jobs import CheckJob, check_chunk, digest
from data_pipeline.pack_output import STAGING, Output, clear_staging
from data_pipeline.pack_owner import WORK_PREFIX
from data_pipeline.reader import Dataset
from data_pipeline.rng import stable_id
from data_pipeline.sources import Pair, find_clean, find_pairs
from tests.support.datasets import make_dataset, make_folders
from tests.support.processes import kill_group, start
from tests.support.servers import make_bucket, s3_server, wait_until


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
        assert (len(data), digest(data)) == (shard.bytes, shard.sha256)
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
    dataset = Dataset(uri, manifest)
    entries = dataset.images()
    assert [entry.key for entry in entries] == [f"photo_{number:03d}" for number in range(5)]
    for entry in entries:
        sample = dataset.whole(entry)
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
    Image.new("RGB", (48, 40)).save(pairs[0].files["input"])
    with pytest.raises(DataError, match="holds another dataset"):
        pack(pairs, out, jobs=1)
    assert _content(out) == before


def test_what_a_pack_killed_at_its_very_end_left_is_removed_by_the_next(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path)
    out = tmp_path / "data"
    pack(pairs, str(out), jobs=1)
    before = _content(out)
    (out / STAGING).mkdir()
    (out / STAGING / "plan.json").write_text('{"digest": "0", "num_shards": 1}')
    assert pack(pairs, str(out), jobs=1).reused
    assert _content(out) == before


def test_a_dataset_that_is_just_being_finished_is_reused(tmp_path: Path) -> None:
    """The one who packed it has written the manifest and still holds the staging folder."""
    pairs = _pairs(tmp_path)
    out = tmp_path / "data"
    manifest = pack(pairs, str(out), jobs=1).manifest
    (out / "manifest.json").rename(tmp_path / "manifest.json")
    output = Output(str(out))
    # What stands there now is a pack at its very end.
    with pytest.raises(DataError, match="holds shard-00000.idx but no dataset"):
        pack(pairs, str(out), jobs=1)
    with output:
        (tmp_path / "manifest.json").rename(out / "manifest.json")
        again = pack(pairs, str(out), jobs=1)
        assert again.reused and again.manifest == manifest and (out / STAGING / "lock").exists()
    assert sorted(os.listdir(out)) == ["manifest.json", "shard-00000.idx", "shard-00000.tar"]


def test_leftovers_in_a_read_only_dataset_are_told_and_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = _pairs(tmp_path)
    out = tmp_path / "data"
    pack(pairs, str(out), jobs=1)
    (out / STAGING).mkdir()
    opened = os.open

    def refuse(path: Any, flags: int, *mode: Any, **options: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(out)):
            raise OSError(30, "Read-only file system")
        return opened(path, flags, *mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert pack(pairs, str(out), jobs=1).reused
    assert "of a killed pack cannot be removed: [Errno 30] Read-only file system" in caplog.text
    clear_staging(str(out))
    assert not (out / STAGING).exists()


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


class _Interrupted:
    """Progress that raises an error when it is called for the n-th time."""

    def __init__(self, calls: int, error: BaseException) -> None:
        self.calls, self.error = calls, error

    def __call__(self, done: int, total: int) -> None:
        self.calls -= 1
        if self.calls == 0:
            raise self.error


def _mtimes(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}


@pytest.mark.parametrize("calls", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), EnvironmentFault("no space")])
def test_an_interrupted_pack_is_no_dataset_and_the_same_command_finishes_it(
    tmp_path: Path, calls: int, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Two chunks of checks, one report of what was there, then a report for each of six shards."""
    pairs = _pairs(tmp_path, count=10)
    pack(pairs, str(tmp_path / "whole"), shard_mb=0.01, jobs=1)
    out = tmp_path / "new" / "data"
    with pytest.raises(type(error)):
        pack(pairs, str(out), shard_mb=0.01, jobs=2, progress=_Interrupted(calls, error))
    assert os.listdir(out) == [STAGING] and "the same command goes on from there" in caplog.text
    finished = _mtimes(out / STAGING, "shard-*.json")
    assert len(finished) >= calls - 3
    kept = _mtimes(out / STAGING, "check-*.json") | {
        name.replace(".json", ".tar"): (out / STAGING / name.replace(".json", ".tar")).stat().st_mtime_ns
        for name in finished
    }
    reports: list[int] = []
    result = pack(pairs, str(out), shard_mb=0.01, jobs=3, progress=lambda done, total: reports.append(done))
    assert not result.reused and reports[-1] == 10
    assert _content(out) == _content(tmp_path / "whole")
    assert kept and _mtimes(out, "*.tar").items() >= {n: t for n, t in kept.items() if n.endswith("tar")}.items()


@pytest.mark.parametrize("change", [{"seed": 1}, {"codec": "png"}, {"shard_mb": 0.03}, "image"])
def test_what_an_interrupted_pack_left_is_swept_by_another_one(tmp_path: Path, change: Any) -> None:
    pairs = _pairs(tmp_path, count=10)
    out = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        pack(pairs, str(out), shard_mb=0.02, jobs=1, progress=_Interrupted(6, KeyboardInterrupt()))
    assert len(list((out / STAGING).glob("*.tar"))) >= 3
    (out / STAGING / f"{WORK_PREFIX}x").mkdir()
    if change == "image":
        Image.new("RGB", (48, 40)).save(pairs[0].files["input"])
    options = {"shard_mb": 0.02, **(change if isinstance(change, dict) else {})}
    pack(pairs, str(out), jobs=1, **options)
    pack(pairs, str(tmp_path / "whole"), jobs=1, **options)
    assert _content(out) == _content(tmp_path / "whole")


def test_only_checks_of_unchanged_files_are_kept(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, count=17)
    out = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        pack(pairs, str(out), jobs=1, progress=_Interrupted(4, KeyboardInterrupt()))
    before = _mtimes(out / STAGING, "check-*.json")
    Image.new("RGB", (48, 40)).save(pairs[8].files["input"])
    with pytest.raises(KeyboardInterrupt):
        pack(pairs, str(out), jobs=1, progress=_Interrupted(4, KeyboardInterrupt()))
    after = _mtimes(out / STAGING, "check-*.json")
    assert len(before) == 3 and [name for name in sorted(before) if before[name] != after[name]] == ["check-00001.json"]


KILLED = """
import sys
from pathlib import Path
from data_pipeline.pack import pack
from data_pipeline.pack_executors import processes, threads
from data_pipeline.sources import find_pairs

if __name__ == "__main__":
    source, out, executor = Path(sys.argv[1]), sys.argv[2], {"threads": threads, "processes": processes}[sys.argv[3]]
    pairs, tile = find_pairs(source / "input", source / "target"), int(sys.argv[4])
    pack(pairs, out, shard_mb=0.001, codec="webp", tile=tile, executor=executor(2))
"""


@pytest.mark.parametrize("kind, tile", [("threads", 96), ("processes", 0), ("threads", 0)])
def test_a_killed_pack_is_continued_with_the_same_bytes(tmp_path: Path, kind: str, tile: int) -> None:
    """Twelve shards of one pair, or of one of its tiles; killed when two are finished."""
    count = 3 if tile else 12
    pairs = _pairs(tmp_path, count=count, size=(128, 128))
    options: dict[str, Any] = {"shard_mb": 0.001, "codec": "webp", "jobs": 2, "tile": tile}
    pack(pairs, str(tmp_path / "whole"), **options)
    script, out = tmp_path / "killed.py", tmp_path / "data"
    script.write_text(KILLED)
    process = start([sys.executable, str(script), str(tmp_path / "source"), str(out), kind, str(tile)], cwd=tmp_path)
    try:
        wait_until(lambda: len(list((out / STAGING).glob("shard-*.json"))) >= 2, timeout_s=30)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait(timeout=10)
        assert not psutil.wait_procs(workers, timeout=10)[1], "workers end with the one they work for"
    finally:
        kill_group(process)
    assert len(workers) >= 2 or kind == "threads"
    assert os.listdir(out) == [STAGING]
    finished = {path.with_suffix(".tar").name for path in (out / STAGING).glob("shard-*.json")}
    before = {name: time for name, time in _mtimes(out / STAGING, "shard-*.tar").items() if name in finished}
    assert 2 <= len(before) == len(finished) < 12
    pack(pairs, str(out), **options)
    assert _content(out) == _content(tmp_path / "whole")
    after = _mtimes(out, "*.tar")
    assert {name for name, time in before.items() if after[name] == time} == finished


def test_a_second_pack_into_one_folder_is_refused(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path)
    out = tmp_path / "data"
    with Output(str(out)):
        with pytest.raises(DataError, match="is being packed by another process; wait for it"):
            pack(pairs, str(out), jobs=1)
        assert os.listdir(out) == [STAGING]
    assert not out.exists()
    assert not pack(pairs, str(out), jobs=1).reused


@pytest.mark.parametrize("failing", ["shard-00001.tar", "manifest.json"])
def test_a_place_that_cannot_be_written_is_told_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == failing:
            raise OSError(28, "No space left on device")
        replace(source, target)

    pairs = _pairs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(EnvironmentFault, match="cannot be written: No space left on device"):
            pack(pairs, str(tmp_path / "data"), shard_mb=0.01, jobs=1)
    assert "manifest.json" not in os.listdir(tmp_path / "data")
    pack(pairs, str(tmp_path / "data"), shard_mb=0.01, jobs=1)
    pack(pairs, str(tmp_path / "whole"), shard_mb=0.01, jobs=1)
    assert _content(tmp_path / "data") == _content(tmp_path / "whole")


def test_a_manifest_that_a_killed_pack_had_begun_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = _pairs(tmp_path)
    out = tmp_path / "data"
    begun: list[Path] = []
    replace = os.replace

    def stop(source: Any, target: Any) -> None:
        if Path(target).name == "manifest.json":
            begun.append(Path(source))
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        pack(pairs, str(out), shard_mb=0.01, jobs=1)
    begun[0].write_bytes(b'{"half')  # a kill leaves it where an error does not
    pack(pairs, str(out), shard_mb=0.01, jobs=1)
    begun[0].write_bytes(b'{"half')
    assert pack(pairs, str(out), shard_mb=0.01, jobs=1).reused
    pack(pairs, str(tmp_path / "whole"), shard_mb=0.01, jobs=1)
    assert _content(out) == _content(tmp_path / "whole")
    stranger = tmp_path / "other" / ".manifest.json-precious"
    stranger.parent.mkdir()
    stranger.write_bytes(b"mine")
    with pytest.raises(DataError, match="holds .manifest.json-precious but no dataset"):
        pack(pairs, str(stranger.parent), jobs=1)


def test_a_check_that_cannot_be_kept_is_a_fault_of_the_place(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, count=1)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentFault, match="^--out data cannot be written: Not a directory$"):
        check_chunk(CheckJob(tuple(pairs), str(tmp_path / "file" / "check.json"), "data"))


@pytest.mark.parametrize("place", ["folder", "url"])
@pytest.mark.parametrize("name", ["shard-00001.tar", "shard-00001.idx"])
def test_no_manifest_is_written_where_a_file_is_not_what_was_written(
    tmp_path: Path, bucket: str, place: str, name: str
) -> None:
    pairs = _pairs(tmp_path)
    out = str(tmp_path / "data") if place == "folder" else bucket
    folder = storage.join(out, STAGING) if place == "folder" else out

    def cut_short(done: int, total: int) -> None:
        if done == total:
            storage.write_bytes_atomic(storage.join(folder, name), b"cut")

    with pytest.raises(DataError, match=f"{name} is not as it was written; see that nobody else writes there"):
        pack(pairs, out, shard_mb=0.01, jobs=1, progress=cut_short)
    assert storage.list_names(out) == []
    pack(pairs, out, shard_mb=0.01, jobs=1)


def test_bad_input_leaves_nothing_even_where_shards_were_finished(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, count=10)
    out = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        pack(pairs, str(out), shard_mb=0.02, jobs=1, progress=_Interrupted(6, KeyboardInterrupt()))
    pairs[3].target.write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be used"):
        pack(pairs, str(out), shard_mb=0.02, jobs=1)
    assert os.listdir(out) == []


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
        ({"codec": "gif"}, "--codec=gif is unknown; choose one of auto, keep, png, webp, jpeg, raw"),
        ({"shard_mb": 0}, "--shard-mb=0 must be above 0"),
        ({"shard_mb": float("nan")}, "--shard-mb=nan must be above 0"),
        ({"jobs": -1}, "--jobs=-1"),
        ({"codec": "jpeg", "quality": 0}, r"--quality=0 must lie in 1\.\.100"),
        ({"codec": "png", "quality": 80}, "--quality=80 goes with --codec=jpeg, not with --codec=png"),
        ({"overlap": 8}, "--overlap=8 goes with --tile"),
        ({"tile": 32, "overlap": 32}, r"--tile=32 with --overlap=32: the overlap must lie in 0\.\.31"),
        ({"tile": 32, "codec": "keep"}, "--codec=keep stores .* but --tile cuts them; choose png, webp, jpeg or raw"),
        ({"degrade": "noise", "codec": "keep"}, "--codec=keep .* but --degrade makes new ones; choose png"),
        ({"degrade": "noise"}, "--degrade makes inputs from clean images, but these have inputs"),
        ({"degrade": "fog"}, "--degrade"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pack(_pairs(tmp_path), str(tmp_path / "data"), **options)


def test_bad_lists_of_pairs_are_refused(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path)
    out = str(tmp_path / "data")
    image = pairs[0].target
    with pytest.raises(DataError, match="no pairs"):
        pack([], out)
    with pytest.raises(DataError, match="have one name, photo_000"):
        pack([pairs[0], pairs[0]], out)
    with pytest.raises(DataError, match=r"key '\.\./x' is not allowed"):
        pack([Pair("../x", "x", image, image)], out)
    with pytest.raises(DataError, match=r"6 of 7 pairs have no mask"):
        pack([*pairs, Pair("masked", "masked", image, image, image)], out)
    with pytest.raises(DataError, match=r"1 of 7 pairs have no input, the first is clean"):
        pack([*pairs, Pair("clean", "clean", None, image)], out)
    with pytest.raises(DataError, match="masked has a mask but no input"):
        pack([Pair("masked", "masked", None, image, image)], out)
    with pytest.raises(DataError, match=r"gone\.png cannot be read"):
        pack([Pair("gone", "gone", tmp_path / "gone.png", image)], out)
    assert not Path(out).exists()


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path)

    def spoil(done: int, total: int) -> None:
        if done == total // 2:  # all are checked, none is written
            shutil.copyfile(pairs[0].files["input"], pairs[1].files["input"])

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
    for folder in (storage.join(uri, STAGING), uri):
        for name in set(storage.list_names(folder)) - {STAGING}:
            storage.remove(storage.join(folder, name))


def _remote_content(uri: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(uri, name)) for name in storage.list_names(uri)}


def test_a_url_holds_the_same_dataset(tmp_path: Path, bucket: str) -> None:
    pairs = _pairs(tmp_path)
    local = pack(pairs, str(tmp_path / "data"), shard_mb=0.01, jobs=1).manifest
    remote = pack(pairs, bucket, shard_mb=0.01, jobs=2).manifest
    assert remote == local == Manifest.load(bucket)
    assert _remote_content(bucket) == _content(tmp_path / "data")
    assert pack(pairs, bucket, shard_mb=0.01).reused
    dataset = Dataset(bucket, remote)
    assert [dataset.whole(entry).key for entry in dataset.images()] == [pair.key for pair in pairs]


def test_an_interrupted_upload_is_continued_and_finished_shards_are_not_sent_again(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = _pairs(tmp_path, count=10)
    sent: list[str] = []
    upload = storage.upload

    def send(path: Path, uri: str) -> None:
        if is_broken and path.name == "shard-00003.tar":
            raise EnvironmentFault("the server is gone")
        sent.append(path.name)
        upload(path, uri)

    monkeypatch.setattr(storage, "upload", send)
    is_broken = True
    with pytest.raises(EnvironmentFault, match="the server is gone"):
        pack(pairs, bucket, shard_mb=0.01, jobs=1)
    kept = storage.list_names(storage.join(bucket, STAGING))
    finished = {name.removesuffix(".json") for name in kept if name.startswith("shard-")}
    assert len(finished) >= 3 and "manifest.json" not in storage.list_names(bucket)
    is_broken = False
    sent.clear()
    pack(pairs, bucket, shard_mb=0.01, jobs=1)
    monkeypatch.undo()
    pack(pairs, str(tmp_path / "whole"), shard_mb=0.01, jobs=1)
    content = _content(tmp_path / "whole")
    assert _remote_content(bucket) == content
    every = {name.partition(".")[0] for name in content} - {"manifest"}
    assert {name.partition(".")[0] for name in sent} == every - finished != set()


def _overtake(bucket: str, *, age_s: float = 0.0) -> None:
    """What another process that packs into the URL writes, `age_s` seconds ago."""
    owner = json.dumps({"id": "another", "time": time.time() - age_s}).encode()
    storage.write_bytes_atomic(storage.join(storage.join(bucket, STAGING), "owner.json"), owner)


@pytest.mark.parametrize("seed", [0, 1])
def test_of_two_packs_into_one_url_the_second_is_refused_and_the_first_is_whole(
    tmp_path: Path, bucket: str, seed: int
) -> None:
    """The second comes at every step of the first."""
    pairs = _pairs(tmp_path)
    refused = []

    def disturb(done: int, total: int) -> None:
        with pytest.raises(
            DataError, match="--out memory://.* is being packed by another process, which wrote there 0 s"
        ):
            pack(pairs, bucket, shard_mb=0.01, seed=seed, jobs=1)
        with pytest.raises(DataError, match="is being packed by another process"):
            foresee(pairs, bucket)
        refused.append(done)

    pack(pairs, bucket, shard_mb=0.01, jobs=1, progress=disturb)
    pack(pairs, str(tmp_path / "whole"), shard_mb=0.01, jobs=1)
    assert len(refused) > 3 and _remote_content(bucket) == _content(tmp_path / "whole")


@pytest.mark.parametrize("calls, num_shards", [(1, 0), (2, 2), (4, 2)])
def test_a_pack_that_was_overtaken_leaves_the_others_files_and_writes_no_manifest(
    tmp_path: Path, bucket: str, calls: int, num_shards: int
) -> None:
    """Reports: after the check, before the first shard, after each of two shards."""
    reports: list[int] = []

    def overtake(done: int, total: int) -> None:
        reports.append(done)
        if len(reports) == calls:
            _overtake(bucket)

    with pytest.raises(DataError, match="was taken over by another process; wait for it"):
        pack(_pairs(tmp_path), bucket, shard_mb=0.02, jobs=1, progress=overtake)
    names = storage.list_names(bucket)
    assert STAGING in names and "manifest.json" not in names
    assert len([name for name in names if name.endswith(".tar")]) == num_shards
    assert b"another" in storage.read_bytes(storage.join(storage.join(bucket, STAGING), "owner.json"))


def test_a_dataset_that_another_pack_finished_meanwhile_is_left_alone(tmp_path: Path, bucket: str) -> None:
    def finish(done: int, total: int) -> None:
        if done == total:
            storage.write_bytes_atomic(storage.join(bucket, "manifest.json"), b"theirs")

    with pytest.raises(DataError, match="was finished by another process meanwhile; run the command again"):
        pack(_pairs(tmp_path), bucket, jobs=1, progress=finish)
    assert {"manifest.json", "shard-00000.idx", "shard-00000.tar"} <= set(storage.list_names(bucket))
    assert storage.read_bytes(storage.join(bucket, "manifest.json")) == b"theirs"


def test_who_gives_no_sign_of_life_at_a_url_is_succeeded(tmp_path: Path, bucket: str) -> None:
    pairs = _pairs(tmp_path)
    _overtake(bucket, age_s=pack_owner.STALE_S - 5)
    with pytest.raises(DataError, match="wrote there 115 s ago.* is taken over after 120 s"):
        pack(pairs, bucket, jobs=1)
    _overtake(bucket, age_s=pack_owner.STALE_S + 1)
    pack(pairs, bucket, jobs=1)
    assert storage.list_names(bucket) == ["manifest.json", "shard-00000.idx", "shard-00000.tar"]


def test_the_owner_of_a_url_gives_signs_of_life_and_looks_out(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_owner, "BEAT_S", 0.02)
    owner = storage.join(storage.join(bucket, STAGING), "owner.json")

    def has_fault() -> bool:
        try:
            output.check()
        except DataError:
            return True
        return False

    with Output(bucket) as output:
        first = storage.read_bytes(owner)
        wait_until(lambda: storage.read_bytes(owner) != first)
        assert not has_fault()
        _overtake(bucket)
        wait_until(has_fault)
    assert b"another" in storage.read_bytes(owner)


def test_a_full_folder_for_temporary_files_is_named(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is gone stands for one that is full."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(EnvironmentFault, match=r"the folder .*/gone, in which shards are made, .* set TMPDIR"):
        pack(_pairs(tmp_path), bucket, jobs=1)


def test_work_folders_of_killed_packs_are_swept_and_those_in_use_stay(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("killed", "in-use", "young"):
        folder = tmp_path / "tmp" / f"{WORK_PREFIX}{name}"
        folder.mkdir(parents=True)
        (folder / "shard-00000.tar").write_bytes(b"half")
        if name != "young":
            os.utime(folder, (0, 0))
    (tmp_path / "tmp" / "writing-of-others").mkdir()
    lock = os.open(tmp_path / "tmp" / f"{WORK_PREFIX}in-use", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pack(_pairs(tmp_path), bucket, jobs=2)
    finally:
        os.close(lock)
    left = sorted(os.listdir(tmp_path / "tmp"))
    assert left == [f"{WORK_PREFIX}in-use", f"{WORK_PREFIX}young", "writing-of-others"]


def test_nothing_is_left_of_bad_input_at_a_url(tmp_path: Path, bucket: str) -> None:
    pairs = _pairs(tmp_path, count=10)
    with pytest.raises(KeyboardInterrupt):
        pack(pairs, bucket, shard_mb=0.02, jobs=1, progress=_Interrupted(6, KeyboardInterrupt()))
    pairs[3].target.write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be used"):
        pack(pairs, bucket, shard_mb=0.02, jobs=1)
    assert storage.list_names(bucket) == []


def test_a_bucket_holds_the_same_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = _pairs(tmp_path)
    with s3_server() as (endpoint, settings):
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        uri = f"{make_bucket(endpoint, 'images')}/train"
        with pytest.raises(KeyboardInterrupt):
            pack(pairs, uri, shard_mb=0.01, jobs=2, progress=_Interrupted(4, KeyboardInterrupt()))
        pack(pairs, uri, shard_mb=0.01, jobs=2)
        content = _remote_content(uri)
        assert pack(pairs, uri, shard_mb=0.01, jobs=2).reused
    pack(pairs, str(tmp_path / "data"), shard_mb=0.01, jobs=1)
    assert content == _content(tmp_path / "data")


def test_urls_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path)
    with pytest.raises(ConfigError, match="nothing://x"):
        pack(pairs, "nothing://x", jobs=1)
    with pytest.raises(ConfigError, match="--out https://host/x cannot be written; give a folder or an s3:// URL"):
        pack(pairs, "https://host/x", jobs=1)


def _refuse(number: int) -> int:
    if number == 2:
        raise DataError("two is no good")
    return number


def test_processes_give_the_same_bytes_and_errors_as_threads_and_their_death_is_told(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, count=10, mask=True)
    options: dict[str, Any] = {"codec": "webp", "shard_mb": 0.02, "tile": 32, "overlap": 4}
    with threads(2) as work:
        pack(pairs, str(tmp_path / "threads"), executor=nullcontext(work), **options)
        _check_refusal(work)
    with pytest.raises(EnvironmentFault, match="a packing process died"), processes(1) as work:
        pack(pairs[::-1], str(tmp_path / "processes"), executor=nullcontext(work), **options)
        _check_refusal(work)
        assert list(work.map(abs, [-1, -2])) == [1, 2]
        list(work.map(os._exit, [3]))
    assert _content(tmp_path / "threads") == _content(tmp_path / "processes")


def _check_refusal(work: Executor) -> None:
    results = work.map(_refuse, range(100))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(DataError, match="^two is no good$"):
        next(results)


def test_clean_images_alone_make_a_dataset_of_targets(tmp_path: Path) -> None:
    _, targets = make_folders(tmp_path / "source", count=5)
    pairs = find_clean(targets)
    manifest = pack(pairs, str(tmp_path / "data"), jobs=1).manifest
    assert (manifest.fields, manifest.codec, manifest.has_input) == (("target",), "keep", False)
    dataset = Dataset(str(tmp_path / "data"))
    for entry, pair in zip(dataset.images(), pairs, strict=True):
        sample = dataset.whole(entry)
        assert sample.input is None and sample.mask is None
        assert np.array_equal(sample.target, decode_image(pair.target.read_bytes(), "png", channels=3))


@pytest.mark.parametrize("spec, has_mask", [("noise(sigma=25)", False), ("inpaint(mask=box)", True)])
def test_degraded_inputs_are_made_from_seed_and_key_alone(tmp_path: Path, spec: str, has_mask: bool) -> None:
    _, targets = make_folders(tmp_path / "source", count=5)
    pairs = find_clean(targets)
    pack(pairs, str(tmp_path / "all"), degrade=spec, seed=3, jobs=2)
    pack(pairs[1:2], str(tmp_path / "one"), degrade=spec, seed=3, codec="webp")
    pack(pairs[1:2], str(tmp_path / "other"), degrade=spec, seed=4)
    every, one, other = (Dataset(str(tmp_path / name)) for name in ("all", "one", "other"))
    assert every.manifest.has_mask == has_mask and every.manifest.codec == "png"
    entry = every.images()[1]
    samples = [every.whole(entry), one.whole(one.images()[0]), other.whole(other.images()[0])]
    expected, masks = parse_degradation(spec).apply(
        samples[0].target[None], seed=3, ids=np.array([stable_id("photo_001")])
    )
    for sample in samples[:2]:
        assert np.array_equal(sample.target, decode_image(pairs[1].target.read_bytes(), "png", channels=3))
        assert np.array_equal(sample.input, expected[0]) and not np.array_equal(sample.input, sample.target)
        assert np.array_equal(sample.mask, masks[0]) if masks is not None else sample.mask is None
    assert not np.array_equal(samples[2].input, samples[0].input)


def test_an_image_too_small_to_degrade_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "clean").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "clean" / "tiny.png")
    with pytest.raises(DataError, match=r"tiny\.png: a mask for an image of 4x4"):
        pack(find_clean(tmp_path / "clean"), str(tmp_path / "data"), degrade="inpaint(mask=box)", jobs=1)
    assert not (tmp_path / "data").exists()


def test_the_quality_of_jpeg_counts(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, count=2)
    sizes = [
        pack(pairs, str(tmp_path / str(quality)), codec="jpeg", quality=quality, jobs=1).manifest.shards[0].bytes
        for quality in (40, 95)
    ]
    assert sizes[0] < sizes[1]
    with pytest.raises(DataError, match="holds another dataset"):
        pack(pairs, str(tmp_path / "40"), codec="jpeg", quality=41, jobs=1)


def test_a_dry_run_foresees_what_is_packed(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, count=3, mask=True)
    out = str(tmp_path / "data")
    with pytest.raises(KeyboardInterrupt):
        pack(pairs, out, tile=32, overlap=4, jobs=1, progress=_Interrupted(4, KeyboardInterrupt()))
    before = _tree(Path(out))
    assert foresee(pairs, out, tile=32, overlap=5).course == "new"
    outlook = foresee(pairs, out, tile=32, overlap=4)
    assert outlook.course == "continued" and _tree(Path(out)) == before
    with Output(out), pytest.raises(DataError, match="is being packed by another process"):
        foresee(pairs, out, tile=32, overlap=4)
    manifest = pack(pairs, str(tmp_path / "data"), tile=32, overlap=4, jobs=1).manifest
    assert (outlook.num_images, outlook.widths, outlook.heights) == (3, (48, 48), (40, 40))
    assert (outlook.num_samples, outlook.fields, outlook.codec) == (
        manifest.num_samples,
        manifest.fields,
        manifest.codec,
    )
    assert outlook.source_bytes == sum(path.stat().st_size for pair in pairs for path in pair.files.values())
    (tmp_path / "data" / STAGING).mkdir()
    before = _tree(Path(out))
    assert foresee(pairs, out, tile=32, overlap=4).course == "reused" and _tree(Path(out)) == before
    assert foresee(pairs, str(tmp_path / "elsewhere")).course == "new" and not (tmp_path / "elsewhere").exists()
    with pytest.raises(DataError, match="holds another dataset"):
        foresee(pairs, out, seed=1, tile=32, overlap=4)
    with pytest.raises(DataError, match="holds input but no dataset"):
        foresee(pairs, str(tmp_path / "source"))
    for name in ("", "file://"):
        for run in (foresee, pack):
            with pytest.raises(ConfigError, match="--out is empty; give a folder or an s3:// URL"):
                run(pairs, name)


def test_a_dry_run_reads_headers_alone(tmp_path: Path) -> None:
    expected = _odd_images(tmp_path / "clean")
    pairs = find_clean(tmp_path / "clean")
    turned = pairs[[pair.name for pair in pairs].index("turned")]
    assert (foresee([turned], "x").widths, foresee([turned], "x").heights) == ((24, 24), (32, 32))
    assert foresee(pairs, "x").widths == (24, 32) and len(pairs) == len(expected)
    os.truncate(tmp_path / "clean" / "rgb8.png", 100)  # within its pixels
    assert foresee(pairs, "x").widths == (24, 32)
    turned.target.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"turned\.png cannot be used: not a readable png image"):
        foresee(pairs, "x")
    turned.target.unlink()
    with pytest.raises(DataError, match=r"turned cannot be read: No such file or directory"):
        foresee(pairs, "x")


def _tree(folder: Path) -> dict[str, int]:
    """Every file and folder in a folder, and when it was changed."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def _odd_images(folder: Path) -> dict[str, np.ndarray]:
    """One image of each kind in files of their own.   -> name -> (H, W, 3) uint8 as it should be read"""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    color, gray, alpha = pixels[:, :, :3], pixels[:, :, 0], Image.fromarray(pixels, "RGBA")
    smooth = Image.new("RGB", (32, 24), (200, 40, 90))
    palette = smooth.quantize(4)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned: rows are columns
    folder.mkdir(parents=True)
    Image.fromarray(color).save(folder / "rgb8.png")
    Image.fromarray(gray).save(folder / "gray8.png")
    Image.fromarray(gray.astype(np.uint16) * 256 + 77).save(folder / "gray16.png")
    alpha.save(folder / "rgba.png")
    palette.save(folder / "palette.png")
    smooth.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    Image.fromarray(color).save(folder / "turned.png", exif=turned)
    with Image.open(folder / "cmyk.jpg") as image:
        cmyk = np.asarray(image.convert("RGB"))
    as_rgb = np.repeat(gray[:, :, None], 3, axis=2)
    return {
        "rgb8": color,
        "gray8": as_rgb,
        "gray16": as_rgb,
        "rgba": color,
        "palette": np.asarray(palette.convert("RGB")),
        "cmyk": cmyk,
        "turned": np.rot90(color, -1),
    }


@pytest.mark.parametrize("options", [{}, {"codec": "png"}, {"codec": "raw"}, {"tile": 16, "overlap": 3}], ids=str)
def test_odd_kinds_of_images_come_back_as_plain_rgb(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = _odd_images(tmp_path / "clean")
    pack(find_clean(tmp_path / "clean"), str(tmp_path / "data"), jobs=1, **options)
    dataset = Dataset(str(tmp_path / "data"))
    found = {sample.name: sample.target for sample in map(dataset.whole, dataset.images())}
    assert set(found) == set(expected)
    for name, image in expected.items():
        assert np.array_equal(found[name], image), name
