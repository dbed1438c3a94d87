"""The training loader: byte-identical global batches for every topology, substitutes, errors, clean ends."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import loader as loader_module
from data_pipeline import storage
from data_pipeline.batch import Batch
from data_pipeline.cache import NodeCache
from data_pipeline.degradations import parse_degradation
from data_pipeline.errors import BadSample, ConfigError, DataError
from data_pipeline.loader import Pace, Share, TrainLoader, build_train_loader
from data_pipeline.manifest import Manifest
from data_pipeline.mixture import build_mixture
from data_pipeline.order import Order
from data_pipeline.pack import pack
from data_pipeline.preprocess import Preprocess
from data_pipeline.reader import Dataset
from data_pipeline.rows import MAX_SUBSTITUTES, SUBSTITUTE_STRIDE, RowSettings
from data_pipeline.sources import find_clean, find_pairs
from data_pipeline.transforms import draw_augments, place_window, turn_rows
from tests.support.datasets import make_dataset, make_folders
from tests.support.servers import serve_files

GLOBAL_BATCH, LANES = 6, 2


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """11 pairs with masks in several shards: an epoch ends inside a batch of 6."""
    return make_dataset(tmp_path_factory.mktemp("loader"), count=11, mask=True)


def _loader(
    *uris: str,
    rank: int = 0,
    world_size: int = 1,
    rows: int = 0,
    threads: int = 2,
    batches: int = 4,
    lanes: int | tuple[int, ...] = LANES,
    global_batch: int = GLOBAL_BATCH,
    start_step: int = 0,
    weights: tuple[float, ...] = (1.0,),
    cache: NodeCache | None = None,
    **settings: Any,
) -> TrainLoader:
    """A loader over datasets; settings: of RowSettings, crop as a number or a schedule."""
    crop = settings.pop("crop", 16)
    settings["crop"] = crop if isinstance(crop, dict) else {0: crop}
    return build_train_loader(
        [Dataset(uri, cache=cache) for uri in uris],
        RowSettings(**settings),
        seed=5,
        global_batch=global_batch,
        lanes=(lanes,) if isinstance(lanes, int) else lanes,
        weights=weights,
        share=Share(rank, world_size, rows or -(-global_batch // world_size)),
        start_step=start_step,
        pace=Pace(threads, batches),
    )


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
    return _rows(_take(_loader(uri, threads=1, batches=1), 6))


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


def test_batches_of_eight_rows_are_the_same_for_eight_workers(uri: str) -> None:
    alone = _rows(_take(_loader(uri, global_batch=8), 5))
    spread: dict[int, tuple[str, str]] = {}
    for rank in range(8):
        spread.update(_rows(_take(_loader(uri, global_batch=8, rank=rank, world_size=8), 5)))
    assert spread == alone and len(alone) == 40


def test_rows_are_the_ordered_samples_cropped_and_mirrored_by_position(uri: str) -> None:
    dataset = Dataset(uri)
    order = Order(dataset.manifest.counts, seed=5, lanes=LANES)
    for batch in _take(_loader(uri), 4):
        positions = batch.positions.numpy()
        assert positions.tolist() == list(range(batch.step * GLOBAL_BATCH, (batch.step + 1) * GLOBAL_BATCH))
        augments = draw_augments(5, positions, flip=True)
        _, shards, offsets = order.locate(positions)
        assert batch.mask is not None
        for row in range(GLOBAL_BATCH):
            sample = dataset.sample(int(shards[row]), int(offsets[row]))
            assert batch.keys[row] == sample.key and sample.mask is not None and sample.input is not None
            window = place_window(augments.top[row], augments.left[row], shape=(40, 48), crop=16)
            for got, image in ((batch.input, sample.input), (batch.target, sample.target), (batch.mask, sample.mask)):
                expected = window.cut(image)[:, ::-1] if augments.is_mirrored[row] else window.cut(image)
                assert np.array_equal(got[row].permute(1, 2, 0).numpy(), expected)


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
        batch = _take(_loader(uri, rank=rank, world_size=4, rows=3), 1)[0]
        assert batch.weight.tolist() == [1.0] * share + [0.0] * (3 - share)
        assert torch.equal(batch.input[share:], batch.input[:1].expand(3 - share, -1, -1, -1))
        assert batch.keys[share:] == batch.keys[:1] * (3 - share)
        assert batch.positions[share:].tolist() == [rank] * (3 - share)


def test_flips_turns_and_windows_vary_and_can_be_switched_off() -> None:
    positions = np.arange(400)
    augments = draw_augments(0, positions, flip=True, rotate=True)
    assert 140 < int(augments.is_mirrored.sum()) < 260
    assert all(60 < int((augments.turns == turns).sum()) < 140 for turns in range(4))
    plain = draw_augments(0, positions, flip=False)
    assert not plain.is_mirrored.any() and not plain.turns.any() and np.array_equal(plain.top, augments.top)
    windows = {place_window(*at, shape=(10, 12), crop=8) for at in zip(augments.top, augments.left, strict=True)}
    assert {(window.top, window.left) for window in windows} == {(top, left) for top in range(3) for left in range(5)}
    assert {place_window(t, 0.0, shape=(10, 12), crop=10).top for t in augments.top} == {0}


def test_turned_rows_are_mirrored_first_and_then_turned() -> None:
    images = torch.arange(4 * 5 * 5 * 3, dtype=torch.int64).reshape(4, 5, 5, 3).to(torch.uint8)
    turned = images.clone()
    augments = draw_augments(0, np.arange(4), flip=True, rotate=True)
    augments = augments._replace(is_mirrored=np.array([True, False, True, False]), turns=np.array([1, 2, 3, 0]))
    turn_rows(turned, augments)
    for row in range(4):
        expected = images[row].numpy()
        expected = expected[:, ::-1] if augments.is_mirrored[row] else expected
        assert np.array_equal(turned[row].numpy(), np.rot90(expected, int(augments.turns[row])))


def _damage(uri: str, key: str) -> None:
    """Overwrite the input image of a sample inside its shard."""
    dataset = Dataset(uri)
    for place, entry in dataset.entries():
        if entry.key == key:
            path = Path(uri) / dataset.manifest.shards[place.shard_index].name
            start = entry.members[0].start
            data = bytearray(path.read_bytes())
            data[start : start + 40] = bytes(40)
            path.write_bytes(data)
            return
    raise AssertionError(f"no sample {key}")


def test_a_bad_sample_gives_way_to_one_chosen_by_position(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = make_dataset(tmp_path, count=7)
    before = _take(_loader(uri), 7)
    _damage(uri, "photo_003")
    dataset = Dataset(uri)
    order = Order(dataset.manifest.counts, seed=5, lanes=LANES)
    entries = {tuple(place): entry.key for place, entry in dataset.entries()}
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
            [bad] = [bad for batch in after for bad in batch.replaced if bad.position == position][:1]
            assert bad.key == "photo_003" and bad.dataset == 0 and "photo_003.input.png" in bad.reason
    assert replaced >= 5 and not any(batch.replaced for batch in before)
    assert {bad.key for batch in after for bad in batch.replaced} == {"photo_003"}
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

    monkeypatch.setattr(Dataset, "read", fail)
    loader = _loader(uri)
    with pytest.raises(RuntimeError, match="a bug"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_a_lost_shard_is_an_error_and_no_bad_sample(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path)
    for shard in Manifest.load(uri).shards:
        (Path(uri) / shard.name).unlink()
    with _loader(uri) as loader, pytest.raises(DataError, match="is incomplete"):
        next(loader)


def test_closing_ends_the_threads_at_once_and_may_be_repeated(uri: str) -> None:
    before = threading.active_count()
    loader = _loader(uri, threads=4, batches=8)
    next(loader)
    assert threading.active_count() > before
    started = time.perf_counter()
    loader.close()
    loader.close()
    assert time.perf_counter() - started < 2.0 and threading.active_count() == before
    assert list(loader) == []


def test_prefetch_is_bounded_in_batches_and_in_bytes(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    read = Dataset.read

    def count(*arguments: Any) -> Any:
        decoded.append(1)
        return read(*arguments)

    monkeypatch.setattr(Dataset, "read", count)
    with _loader(uri, batches=2, threads=2) as loader:
        for taken in range(1, 4):
            next(loader)
            time.sleep(0.05)
            assert len(decoded) <= (taken + 2) * GLOBAL_BATCH
    decoded.clear()
    size = GLOBAL_BATCH * 16 * 16 * 7  # decoded; what is encoded adds to it
    datasets, share = [Dataset(uri)], Share(0, 1, GLOBAL_BATCH)
    given: dict[str, Any] = {"seed": 5, "global_batch": GLOBAL_BATCH, "lanes": (LANES,), "share": share}
    pace = Pace(threads=2, batches=50, bytes=3 * size)
    with build_train_loader(datasets, RowSettings(crop={0: 16}), start_step=0, pace=pace, **given) as loader:
        next(loader)
        time.sleep(0.2)
        assert GLOBAL_BATCH < len(decoded) <= 4 * GLOBAL_BATCH


def test_a_batch_is_not_overwritten_by_later_ones(uri: str) -> None:
    with _loader(uri, batches=1) as loader:
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
        ({"crop": {5: 16}}, r"data\.crop=\{5: 16\} must say what holds from step 0 on"),
        ({"crop": 0, "rotate": True}, r"data\.rotate=true needs square images or data\.crop"),
        ({"lanes": 4}, r"data\.lanes=4 does not divide train\.global_batch=6"),
        ({"world_size": 7, "rank": 6}, r"train\.global_batch=6"),
        ({"rows": 5}, "5 rows do not hold rank 0's share"),
        ({"threads": 0}, r"data\.threads=0"),
        ({"batches": 0}, r"data\.prefetch_batches=0"),
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
    dataset = Dataset(uri)
    with pytest.raises(BadSample, match=r"photo_001\.input\.png: its bytes .* are not those packed"):
        dataset.whole(dataset.images()[1])


@pytest.fixture
def remote(tmp_path: Path, uri: str) -> Iterator[str]:
    """The dataset on a URL."""
    location = f"memory://{tmp_path.name}/data"
    for path in Path(uri).iterdir():
        storage.upload(path, storage.join(location, path.name))
    yield location
    for name in storage.list_names(location):
        storage.remove(storage.join(location, name))


def test_urls_and_the_cache_give_the_same_batches(
    tmp_path: Path, uri: str, remote: str, expected: dict[int, tuple[str, str]]
) -> None:
    assert _rows(_take(_loader(remote), 6)) == expected
    cache = NodeCache(tmp_path / "cache", 10**6)
    assert _rows(_take(_loader(remote, cache=cache), 6)) == expected
    assert _rows(_take(_loader(uri, cache=cache), 6)) == expected
    shards = {shard.name for shard in Manifest.load(uri).shards}
    kept = [path.name for path in (tmp_path / "cache").rglob("*.tar")]
    assert len(kept) == len(shards) and {name.split("-", 1)[1] for name in kept} == shards


def test_a_cache_too_small_for_all_lanes_changes_nothing(
    tmp_path: Path, remote: str, expected: dict[int, tuple[str, str]]
) -> None:
    largest = max(shard.bytes for shard in Manifest.load(remote).shards)
    assert _rows(_take(_loader(remote, cache=NodeCache(tmp_path / "small", largest)), 6)) == expected


def test_a_copy_damaged_in_the_cache_is_fetched_anew(
    tmp_path: Path, remote: str, expected: dict[int, tuple[str, str]]
) -> None:
    cache = NodeCache(tmp_path / "cache", 10**6)
    assert _rows(_take(_loader(remote, cache=cache), 6)) == expected
    for path in (tmp_path / "cache").rglob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    batches = _take(_loader(remote, cache=cache), 6)
    assert _rows(batches) == expected and not any(batch.replaced for batch in batches)


def test_a_shard_missing_behind_the_cache_is_named(tmp_path: Path, remote: str) -> None:
    cache = NodeCache(tmp_path / "cache", 10**6)
    for shard in Manifest.load(remote).shards:
        storage.remove(storage.join(remote, shard.name))
    with _loader(remote, cache=cache) as loader, pytest.raises(DataError, match=r"shard-0000\d\.tar cannot be read"):
        next(loader)


def test_threads_that_miss_one_index_fetch_it_once(uri: str) -> None:
    files = {f"/{path.name}": path.read_bytes() for path in Path(uri).iterdir()}
    with serve_files(files) as server:
        dataset = Dataset(server.url)
        before = len(server.requests)
        with ThreadPoolExecutor(8) as pool:
            indexes = list(pool.map(lambda _: dataset.index(0), range(8)))
        assert len(server.requests) - before <= 4  # the index and the size of its tar, each perhaps asked for twice
        assert all(index is indexes[0] for index in indexes)


def test_a_batch_that_is_done_the_moment_patience_ends_is_no_error(uri: str) -> None:
    class Late(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            if not self.done():
                self.set_result(([], []))
                raise TimeoutError
            return super().result(timeout)

    with _loader(uri) as loader:
        assert loader._wait(Late(), 0) == ([], [])


def test_altered_bytes_are_a_bad_sample_even_where_decoders_do_not_look(remote: str) -> None:
    """Still a PNG, but not the one that was packed: only the index's CRC can tell."""
    dataset = Dataset(remote)
    place, entry = next(iter(dataset.entries()))
    tar = storage.join(remote, dataset.manifest.shards[place.shard_index].name)
    data = bytearray(storage.read_bytes(tar))
    member = entry.members[1]
    data[member.start + member.size - 1] ^= 1  # in the CRC of PNG's own end marker, which decoders do not read
    storage.write_bytes_atomic(tar, bytes(data))
    with pytest.raises(BadSample, match=rf"{entry.key}\.target\.png: its bytes .* are not those packed"):
        Dataset(remote).sample(*place)
    batches = _take(_loader(remote), 6)
    assert {bad.key for batch in batches for bad in batch.replaced} == {entry.key}


def test_a_late_batch_says_what_it_waits_for(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = Dataset.read

    def slow(*arguments: Any) -> Any:
        with storage.waiting("bytes 0-10 of a far shard"):
            time.sleep(0.4)
        return read(*arguments)

    monkeypatch.setattr(Dataset, "read", slow)
    monkeypatch.setattr(loader_module, "STALL_S", 0.1)
    with caplog.at_level(logging.WARNING, logger="data_pipeline"), _loader(uri, global_batch=2, batches=1) as loader:
        next(loader)
    assert "batch 0 is late" in caplog.text and "waiting for bytes 0-10 of a far shard" in caplog.text


def test_the_crop_grows_at_its_steps_and_nothing_else_changes(uri: str) -> None:
    batches = _take(_loader(uri, crop={0: 16, 3: 24, 5: 32}), 7)
    assert [batch.input.shape[-1] for batch in batches] == [16, 16, 16, 24, 24, 32, 32]
    plain = _take(_loader(uri), 7)
    assert [batch.keys for batch in batches] == [batch.keys for batch in plain]
    assert all(torch.equal(batches[step].input, plain[step].input) for step in range(3))
    assert torch.equal(_take(_loader(uri, crop={0: 16, 3: 24}, start_step=4), 1)[0].target, batches[4].target)


def test_several_datasets_share_every_batch_by_their_weights(tmp_path: Path) -> None:
    uris = [make_dataset(tmp_path, count=count, seed=count, name=f"set{count}") for count in (7, 10)]
    options: dict[str, Any] = {"lanes": (1, 1), "weights": (1.0, 2.0)}
    batches = _take(_loader(*uris, **options), 8)
    targets = [
        {entry.key: Dataset(uri).whole(entry).target.tobytes() for entry in Dataset(uri).images()} for uri in uris
    ]
    assert targets[0].keys() < targets[1].keys()  # names do not tell them apart, pixels do
    whole = _take(_loader(*uris, crop=0, flip=False, **options), 8)
    for batch in whole:
        owners = [
            [batch.target[row].permute(1, 2, 0).numpy().tobytes() == pixels.get(key) for pixels in targets].index(True)
            for row, key in enumerate(batch.keys)
        ]
        assert owners == [0, 0, 1, 1, 1, 1]
    together = _rows(batches)
    for world_size in (2, 3):
        parts = [_rows(_take(_loader(*uris, rank=r, world_size=world_size, **options), 8)) for r in range(world_size)]
        assert {position: row for part in parts for position, row in part.items()} == together
    later = _rows(_take(_loader(*uris, start_step=5, **options), 3))
    assert later == {position: row for position, row in together.items() if position >= 5 * GLOBAL_BATCH}


def test_a_bad_sample_of_a_mixture_gives_way_to_one_of_its_own_dataset(tmp_path: Path) -> None:
    uris = [make_dataset(tmp_path, count=count, seed=count, name=f"set{count}") for count in (5, 9)]
    _damage(uris[0], "photo_002")
    options: dict[str, Any] = {"lanes": (1, 1), "weights": (1.0, 1.0)}
    batches = _take(_loader(*uris, **options), 6)
    replaced = [bad for batch in batches for bad in batch.replaced]
    assert replaced and {(bad.dataset, bad.key) for bad in replaced} == {(0, "photo_002")}
    mixture = build_mixture(
        [Manifest.load(uri).counts for uri in uris], weights=(1.0, 1.0), seed=5, lanes=(1, 1), global_batch=GLOBAL_BATCH
    )
    keys = {int(p): key for batch in batches for p, key in zip(batch.positions.tolist(), batch.keys, strict=True)}
    dataset = Dataset(uris[0])
    names = {tuple(place): entry.key for place, entry in dataset.entries()}
    for bad in replaced:
        _, own = mixture.split(np.array([bad.position]))
        places = mixture.locate_in(0, own + SUBSTITUTE_STRIDE * np.arange(1, MAX_SUBSTITUTES + 1))
        found = [names[place] for place in zip(places.shard.tolist(), places.offset.tolist(), strict=True)]
        assert keys[bad.position] == next(name for name in found if name != "photo_002")


@pytest.mark.parametrize("spec", ["noise(sigma=25)", "blur(sigma=1)+noise(sigma=5)", "motion(length=7)", "inpaint"])
def test_degradation_on_the_fly_is_that_of_the_whole_target_at_the_position(uri: str, spec: str) -> None:
    degrade = parse_degradation(spec)
    batches = _take(_loader(uri, degrade=degrade), 4)
    plain = _take(_loader(uri), 4)
    for batch, same in zip(batches, plain, strict=True):
        assert torch.equal(batch.target, same.target) and batch.keys == same.keys
        assert (batch.mask is not None) == degrade.has_mask
        assert not torch.equal(batch.input, batch.target)
    if degrade.reach == 0:
        pixels = batches[1].target.permute(0, 2, 3, 1).numpy()
        inputs, masks = degrade.apply(pixels, seed=5, ids=batches[1].positions)
        assert np.array_equal(batches[1].input.permute(0, 2, 3, 1).numpy(), inputs)
    together = _rows(batches)
    for world_size in (2, 3):
        parts = [
            _rows(_take(_loader(uri, rank=rank, world_size=world_size, degrade=degrade, threads=3), 4))
            for rank in range(world_size)
        ]
        assert {position: row for part in parts for position, row in part.items()} == together
    epochs = _take(_loader(uri, degrade=degrade, crop=0, flip=False), 4)
    if "noise" in spec:  # 11 samples: the same key comes again in the second epoch, with new noise
        inputs = [
            epochs[step].input[row]
            for step in range(4)
            for row, key in enumerate(epochs[step].keys)
            if key == epochs[0].keys[0]
        ]
        assert len(inputs) >= 2 and not torch.equal(inputs[0], inputs[1])


def test_a_blurred_window_has_the_context_of_its_image(uri: str) -> None:
    degrade = parse_degradation("blur(sigma=1.5)")
    windows = _take(_loader(uri, degrade=degrade, flip=False), 3)
    dataset = Dataset(uri)
    samples = {entry.key: dataset.whole(entry) for entry in dataset.images()}
    for batch in windows:
        augments = draw_augments(5, batch.positions.numpy(), flip=False)
        for row, key in enumerate(batch.keys):
            blurred, _ = degrade.apply(samples[key].target[None], seed=5, ids=batch.positions[row : row + 1])
            window = place_window(augments.top[row], augments.left[row], shape=(40, 48), crop=16)
            assert np.array_equal(batch.input[row].permute(1, 2, 0).numpy(), window.cut(blurred[0]))


def test_preprocessing_comes_before_the_window(uri: str) -> None:
    preprocess = Preprocess(equalize=True, resize=32)
    batch = _take(_loader(uri, crop=0, flip=False, preprocess=preprocess), 1)[0]
    dataset = Dataset(uri)
    samples = {entry.key: dataset.whole(entry) for entry in dataset.images()}
    for row, key in enumerate(batch.keys):
        sample = samples[key]
        assert sample.input is not None and sample.mask is not None and batch.mask is not None
        for got, image, field in (
            (batch.input, sample.input, "input"),
            (batch.target, sample.target, "target"),
            (batch.mask, sample.mask, "mask"),
        ):
            assert np.array_equal(got[row].permute(1, 2, 0).numpy(), preprocess.apply(image, field=field))
    assert _take(_loader(uri, crop=56, preprocess=Preprocess(pad_to=60)), 1)[0].input.shape == (6, 3, 56, 56)


def test_clean_images_alone_need_a_degradation(tmp_path: Path) -> None:
    pack(find_clean(make_folders(tmp_path, count=4)[1]), str(tmp_path / "clean"), jobs=1)
    with pytest.raises(ConfigError, match=r"holds clean images only; set data\.degrade"):
        _loader(str(tmp_path / "clean"))
    batch = _take(_loader(str(tmp_path / "clean"), degrade=parse_degradation("noise(sigma=25)")), 1)[0]
    assert batch.input.shape == batch.target.shape and not torch.equal(batch.input, batch.target)
