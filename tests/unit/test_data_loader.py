"""The training loader: byte-identical global batches for every topology, substitutes, errors, clean ends."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import storage
from data_pipeline.batch import Batch
from data_pipeline.errors import BadSample, ConfigError, DataError
from data_pipeline.loader import (
    MAX_SUBSTITUTES,
    SUBSTITUTE_STRIDE,
    TrainLoader,
    build_train_loader,
    eval_index,
    read_sample,
)
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from data_pipeline.pack import pack
from data_pipeline.reader import load_index, read_images
from data_pipeline.sources import find_pairs
from data_pipeline.transforms import cut, draw_augments
from tests.support.datasets import make_dataset, make_folders

GLOBAL_BATCH, LANES = 6, 2


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """11 pairs with masks in several shards: an epoch ends inside a batch of 6."""
    return make_dataset(tmp_path_factory.mktemp("loader"), count=11, mask=True)


def _loader(uri: str, **options: Any) -> TrainLoader:
    defaults: dict[str, Any] = {
        "seed": 5,
        "global_batch": GLOBAL_BATCH,
        "lanes": LANES,
        "rank": 0,
        "world_size": 1,
        "start_step": 0,
        "crop": 16,
        "flip": True,
    }
    given = {**defaults, **options}
    given.setdefault("rows_per_rank", -(-given["global_batch"] // given["world_size"]))
    return build_train_loader(uri, Manifest.load(uri), **given)


def _take(loader: TrainLoader, count: int) -> list[Batch]:
    with loader:
        return [next(loader) for _ in range(count)]


def _rows(batches: Iterator[Batch] | list[Batch]) -> dict[int, tuple[str, str]]:
    """Position -> (key, sha256 of the images) of rows of weight 1."""
    rows = {}
    for batch in batches:
        for row in torch.nonzero(batch.weight)[:, 0].tolist():
            images = [batch.input[row], batch.target[row], *([] if batch.mask is None else [batch.mask[row]])]
            digest = hashlib.sha256(b"".join(image.numpy().tobytes() for image in images)).hexdigest()
            position = int(batch.positions[row])
            assert position not in rows
            rows[position] = (batch.keys[row], digest)
    return rows


@pytest.fixture(scope="module")
def expected(uri: str) -> dict[int, tuple[str, str]]:
    return _rows(_take(_loader(uri, threads=1, prefetch_batches=1), 6))


@pytest.mark.parametrize("world_size, threads", [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (4, 2)])
def test_global_batches_are_the_same_for_every_topology(
    uri: str, expected: dict[int, tuple[str, str]], world_size: int, threads: int
) -> None:
    rows: dict[int, tuple[str, str]] = {}
    for rank in range(world_size):
        batches = _take(_loader(uri, rank=rank, world_size=world_size, threads=threads), 6)
        assert [batch.step for batch in batches] == list(range(6))
        own = _rows(batches)
        assert all(position % GLOBAL_BATCH % world_size == rank for position in own)
        rows.update(own)
    assert rows == expected


@pytest.mark.parametrize("start_step", [1, 2, 5])
def test_starting_later_gives_what_a_run_from_zero_gives(
    uri: str, expected: dict[int, tuple[str, str]], start_step: int
) -> None:
    rows = _rows(_take(_loader(uri, start_step=start_step, threads=3), 6 - start_step))
    assert rows == {position: row for position, row in expected.items() if position >= start_step * GLOBAL_BATCH}


def test_rows_are_the_ordered_samples_cropped_and_mirrored_by_position(uri: str) -> None:
    manifest = Manifest.load(uri)
    order = Order(manifest.counts, seed=5, lanes=LANES)
    for batch in _take(_loader(uri), 4):
        positions = batch.positions.numpy()
        assert positions.tolist() == list(range(batch.step * GLOBAL_BATCH, (batch.step + 1) * GLOBAL_BATCH))
        augments = draw_augments(5, positions, flip=True)
        _, shards, offsets = order.locate(positions)
        assert batch.mask is not None
        for row in range(GLOBAL_BATCH):
            sample = read_sample(uri, manifest, int(shards[row]), int(offsets[row]))
            assert batch.keys[row] == sample.key and sample.mask is not None
            for got, image in ((batch.input, sample.input), (batch.target, sample.target), (batch.mask, sample.mask)):
                assert np.array_equal(got[row].permute(1, 2, 0).numpy(), cut(image, augments[row], crop=16))


def test_every_sample_comes_once_per_epoch(uri: str) -> None:
    keys = [key for batch in _take(_loader(uri), 11) for key in batch.keys]
    assert len(keys) == 66
    for epoch in range(6):
        assert len(set(keys[11 * epoch : 11 * (epoch + 1)])) == 11


def test_batches_have_the_promised_shapes_and_types(uri: str, tmp_path: Path) -> None:
    batch = _take(_loader(uri, crop=0, flip=False), 1)[0]
    assert batch.input.shape == batch.target.shape == (6, 3, 40, 48) and batch.input.dtype == torch.uint8
    assert batch.mask is not None and batch.mask.shape == (6, 1, 40, 48) and batch.mask.dtype == torch.uint8
    assert batch.positions.dtype == torch.int64 and batch.weight.dtype == torch.float32
    assert batch.weight.tolist() == [1.0] * 6 and len(batch.keys) == 6
    assert batch.input[:, :, 0, 0].unique(dim=1).shape == (6, 1)  # pixel (0, 0) is gray: the corner, not mirrored
    assert _take(_loader(make_dataset(tmp_path, count=3)), 1)[0].mask is None


def test_a_rank_with_fewer_rows_is_filled_up_with_weightless_copies(uri: str) -> None:
    for rank, share in ((0, 2), (1, 2), (2, 1), (3, 1)):
        batch = _take(_loader(uri, rank=rank, world_size=4, rows_per_rank=3), 1)[0]
        assert batch.weight.tolist() == [1.0] * share + [0.0] * (3 - share)
        assert torch.equal(batch.input[share:], batch.input[:1].expand(3 - share, -1, -1, -1))
        assert batch.keys[share:] == batch.keys[:1] * (3 - share)
        assert batch.positions[share:].tolist() == [rank] * (3 - share)


def test_flips_and_windows_vary_and_can_be_switched_off() -> None:
    augments = draw_augments(0, np.arange(400), flip=True)
    assert 140 < sum(augment.mirrored for augment in augments) < 260
    assert not any(augment.mirrored for augment in draw_augments(0, np.arange(400), flip=False))
    image = np.arange(10 * 12, dtype=np.uint8).reshape(10, 12, 1)
    corners = {int(cut(image, augment, crop=8)[0, -1 if augment.mirrored else 0, 0]) for augment in augments}
    assert corners == {12 * top + left for top in range(3) for left in range(5)}
    assert all(cut(image, augment, crop=10).shape == (10, 10, 1) for augment in augments)


def _damage(uri: str, key: str) -> None:
    """Overwrite the input image of a sample inside its shard."""
    manifest = Manifest.load(uri)
    for shard in manifest.shards:
        for entry in load_index(uri, shard, has_mask=manifest.has_mask):
            if entry.key == key:
                start = entry.members[0].start
                data = bytearray((Path(uri) / shard.name).read_bytes())
                data[start : start + 40] = bytes(40)
                (Path(uri) / shard.name).write_bytes(data)
                return
    raise AssertionError(f"no sample {key}")


def test_a_bad_sample_gives_way_to_one_chosen_by_position(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = make_dataset(tmp_path, count=7)
    before = _take(_loader(uri), 7)
    _damage(uri, "photo_003")
    manifest = Manifest.load(uri)
    order = Order(manifest.counts, seed=5, lanes=LANES)
    entries = {(entry.shard_index, entry.offset): entry.key for entry in eval_index(uri, manifest)}
    with caplog.at_level(logging.WARNING, logger="data_pipeline"):
        after = _take(_loader(uri, threads=3), 7)
    assert len([record for record in caplog.records if "photo_003" in record.getMessage()]) == 1
    keys = dict(item for batch in after for item in zip(batch.positions.tolist(), batch.keys, strict=True))
    replaced = 0
    for batch in before:
        for position, key in zip(batch.positions.tolist(), batch.keys, strict=True):
            if key != "photo_003":
                assert keys[position] == key
                continue
            replaced += 1
            candidates = position + SUBSTITUTE_STRIDE * np.arange(1, MAX_SUBSTITUTES + 1)
            _, shards, offsets = order.locate(candidates)
            found = [entries[place] for place in zip(shards.tolist(), offsets.tolist(), strict=True)]
            assert keys[position] == next(name for name in found if name != "photo_003")
    assert replaced >= 5
    together = _rows(after)
    for world_size in (2, 3):
        parts = [_rows(_take(_loader(uri, rank=rank, world_size=world_size), 7)) for rank in range(world_size)]
        assert {position: row for part in parts for position, row in part.items()} == together


def test_a_dataset_of_bad_samples_stops_the_run(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, count=2)
    for number in range(2):
        _damage(uri, f"photo_{number:03d}")
    with _loader(uri) as loader, pytest.raises(DataError, match=f"{1 + MAX_SUBSTITUTES} samples in a row"):
        next(loader)


def test_an_error_in_a_thread_is_raised_to_the_consumer_and_ends_the_loader(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("data_pipeline.loader.read_images", fail)
    loader = _loader(uri)
    with pytest.raises(RuntimeError, match="a bug"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_a_lost_shard_is_an_error_and_no_bad_sample(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path)
    manifest = Manifest.load(uri)
    for shard in manifest.shards:
        (Path(uri) / shard.name).unlink()
    with _loader(uri) as loader, pytest.raises(DataError, match="is incomplete"):
        next(loader)


def test_closing_ends_the_threads_at_once_and_may_be_repeated(uri: str) -> None:
    before = threading.active_count()
    loader = _loader(uri, threads=4, prefetch_batches=8)
    next(loader)
    assert threading.active_count() > before
    started = time.perf_counter()
    loader.close()
    loader.close()
    assert time.perf_counter() - started < 2.0 and threading.active_count() == before
    assert list(loader) == []


def test_prefetch_is_bounded(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def count(*arguments: Any) -> Any:
        decoded.append(1)
        return read_images(*arguments)

    monkeypatch.setattr("data_pipeline.loader.read_images", count)
    with _loader(uri, prefetch_batches=2, threads=2) as loader:
        for taken in range(1, 4):
            next(loader)
            time.sleep(0.05)
            assert len(decoded) <= (taken + 2) * GLOBAL_BATCH


def test_a_batch_is_not_overwritten_by_later_ones(uri: str) -> None:
    with _loader(uri, prefetch_batches=1) as loader:
        first = next(loader)
        copy = first.input.clone()
        for _ in range(5):
            next(loader)
    assert torch.equal(first.input, copy)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"crop": 41}, r"data\.crop=41: .* holds images of 48x40 to 48x40; .*1\.\.40"),
        ({"crop": -1}, r"data\.crop=-1"),
        ({"lanes": 4}, r"data\.lanes=4 does not divide train\.global_batch=6"),
        ({"world_size": 7, "rank": 6}, r"train\.global_batch=6"),
        ({"rows_per_rank": 5}, "5 rows do not hold rank 0's share"),
        ({"threads": 0}, r"data\.threads=0"),
        ({"prefetch_batches": 0}, r"data\.prefetch_batches=0"),
    ],
)
def test_settings_that_do_not_fit_are_named(uri: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _loader(uri, **options)


def test_whole_images_must_have_one_size(tmp_path: Path) -> None:
    pairs = []
    for number, size in enumerate([(40, 48), (48, 40)]):
        input_dir, target_dir = make_folders(tmp_path / str(number), count=1, size=size)
        for folder in (input_dir, target_dir):
            (folder / "photo_000.png").rename(folder / f"photo_{number}.png")
        pairs += find_pairs(input_dir, target_dir)
    pack(pairs, str(tmp_path / "data"), jobs=1)
    with pytest.raises(ConfigError, match=r"data\.crop=0 needs images of one size.*40x40 to 48x48; set data\.crop"):
        _loader(str(tmp_path / "data"), crop=0)
    assert _take(_loader(str(tmp_path / "data"), crop=40), 1)[0].input.shape == (6, 3, 40, 40)


def test_reading_one_sample_raises_what_is_wrong_with_it(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, count=2)
    _damage(uri, "photo_001")
    manifest = Manifest.load(uri)
    entry = eval_index(uri, manifest)[1]
    with pytest.raises(BadSample, match=r"photo_001\.input\.png: not a readable png image"):
        read_sample(uri, manifest, entry.shard_index, entry.offset)


def test_the_loader_reads_urls(tmp_path: Path, uri: str, expected: dict[int, tuple[str, str]]) -> None:
    remote = f"memory://{tmp_path.name}/data"
    for path in Path(uri).iterdir():
        storage.upload(path, storage.join(remote, path.name))
    assert _rows(_take(_loader(remote), 6)) == expected
    for name in storage.list_names(remote):
        storage.remove(storage.join(remote, name))
