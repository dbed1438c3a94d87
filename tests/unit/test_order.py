"""The order of the run, by brute force."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.order import Order, choose_lanes, rank_rows
from data_pipeline.rng import permutation

COUNTS = [(1,), (5,), (1, 1, 1), (4, 4, 4), (3, 7, 1, 5), (2, 9, 4, 4, 1, 1, 6, 3), (13, 2)]


def _run(order: Order, first: int, last: int) -> list[tuple[int, int, int]]:
    return [tuple(row) for row in np.stack(order.locate(np.arange(first, last)), axis=1).tolist()]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 6, 12])
def test_every_sample_comes_exactly_once_per_epoch(counts: tuple[int, ...], lanes: int) -> None:
    order = Order(counts, seed=3, lanes=lanes)
    everything = sorted((shard, offset) for shard, count in enumerate(counts) for offset in range(count))
    total = len(everything)
    rows = _run(order, 0, 4 * total)
    for epoch in range(4):
        part = rows[epoch * total : (epoch + 1) * total]
        assert {row[0] for row in part} == {epoch}
        assert sorted(row[1:] for row in part) == everything


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("global_batch, lanes", [(4, 2), (5, 1), (6, 3), (8, 8), (12, 4)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_ranks_together_read_the_run_whatever_their_number(
    counts: tuple[int, ...], global_batch: int, lanes: int, world_size: int
) -> None:
    order = Order(counts, seed=9, lanes=lanes)
    steps = -(-3 * sum(counts) // global_batch)
    seen: dict[int, tuple[int, ...]] = {}
    for rank in range(world_size):
        own = Order(counts, seed=9, lanes=lanes)  # each rank has its own, and starts where it likes
        for step in reversed(range(steps)):
            positions = rank_rows(step, global_batch=global_batch, rank=rank, world_size=world_size)
            assert len(positions) in (global_batch // world_size, -(-global_batch // world_size))
            places = np.stack(own.locate(positions), axis=1).tolist()
            for position, place in zip(positions.tolist(), places, strict=True):
                assert position not in seen
                seen[position] = tuple(place)
    whole = _run(order, 0, steps * global_batch)
    assert [seen[position] for position in range(steps * global_batch)] == whole


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("case", range(8))
def test_the_ranks_read_every_sample_once_per_epoch_for_uneven_shards_lanes_and_batches(
    case: int, world_size: int
) -> None:
    draw = np.random.default_rng(case)
    counts = draw.integers(1, 30, size=draw.integers(1, 20))
    lanes, global_batch = int(draw.integers(1, 25)), int(draw.integers(world_size, 40))
    total = int(counts.sum())
    steps = -(-3 * total // global_batch)
    order = Order(counts, seed=case, lanes=lanes)
    rows: list[tuple[int, int, int]] = []
    for rank in range(world_size):
        positions = np.concatenate(
            [rank_rows(step, global_batch=global_batch, rank=rank, world_size=world_size) for step in range(steps)]
        )
        rows += [tuple(row) for row in np.stack(order.locate(positions), axis=1).tolist()]
    assert len(rows) == steps * global_batch
    everything = [(shard, offset) for shard, count in enumerate(counts.tolist()) for offset in range(count)]
    for epoch in range(3):
        assert sorted(row[1:] for row in rows if row[0] == epoch) == everything


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
def test_the_run_reads_equal_pieces_of_each_epochs_shuffled_shards_side_by_side(
    counts: tuple[int, ...], lanes: int
) -> None:
    expected: list[tuple[int, int, int]] = []
    for epoch in range(3):
        sequence = [
            (epoch, shard, offset)
            for shard in permutation(7, len(counts), "shards", epoch).tolist()
            for offset in permutation(7, counts[shard], "samples", epoch, shard).tolist()
        ]
        pieces = [piece.tolist() for piece in np.array_split(np.arange(len(sequence)), lanes)]
        for step in range(len(pieces[0])):
            expected += [sequence[piece[step]] for piece in pieces if step < len(piece)]
    assert _run(Order(counts, seed=7, lanes=lanes), 0, len(expected)) == expected


def test_an_epoch_may_end_inside_a_batch_and_the_next_follows_on() -> None:
    counts, global_batch = (3, 7, 1, 4), 4  # 15 samples: the fourth batch ends one epoch and begins another
    order = Order(counts, seed=1, lanes=2)
    epochs, shards, offsets = order.locate(rank_rows(3, global_batch=global_batch, rank=0, world_size=1))
    assert epochs.tolist() == [0, 0, 0, 1]
    before, after = _run(order, 0, 12), _run(order, 16, 30)
    batch = list(zip(epochs.tolist(), shards.tolist(), offsets.tolist(), strict=True))
    everything = [(shard, offset) for shard, count in enumerate(counts) for offset in range(count)]
    assert sorted(row[1:] for row in before + batch[:3]) == everything
    assert sorted(row[1:] for row in batch[3:] + after) == everything


def test_the_order_depends_on_counts_seed_and_lanes_and_on_nothing_else() -> None:
    counts, positions = [30, 20, 40, 10], np.arange(300)

    def places(counts: Sequence[int] | np.ndarray, seed: int, lanes: int) -> bytes:
        return np.stack(Order(counts, seed, lanes).locate(positions)).tobytes()

    same = places(counts, 3, 4)
    used = Order(counts, 3, 4)
    used.locate(np.arange(10**6, 10**6 + 500))  # what was asked before plays no part
    assert np.stack(used.locate(positions)).tobytes() == same
    for kind in (tuple(counts), np.array(counts, dtype=np.int32), np.array(counts, dtype=np.int64)):
        assert places(kind, 3, 4) == same
    others = [places(counts, 4, 4), places(counts, 3, 2), places(counts[::-1], 3, 4)]
    assert len({same, *others}) == 4


def test_shards_of_more_than_a_byte_or_two_of_samples_keep_their_offsets() -> None:
    for count in (1, 255, 256, 257, 65_536, 65_537):
        _, shards, offsets = Order((count,), seed=0, lanes=1).locate(np.arange(count))
        assert not shards.any() and offsets.dtype == np.int64
        assert np.array_equal(np.sort(offsets), np.arange(count))


def test_starting_anywhere_gives_what_a_run_from_zero_gives() -> None:
    counts = (3, 7, 1, 5)
    whole = _run(Order(counts, seed=1, lanes=2), 0, 100)
    for start in range(0, 100, 7):
        assert _run(Order(counts, seed=1, lanes=2), start, 100) == whole[start:]


def test_locating_one_position_at_a_time_or_in_any_order_changes_nothing() -> None:
    order = Order((3, 7, 1, 5), seed=1, lanes=4)
    positions = np.array([40, 3, 3, 17, 0, 63, 31, 32])
    together = np.stack(order.locate(positions), axis=1)
    single = np.concatenate([np.stack(order.locate(np.array([position])), axis=1) for position in positions])
    assert np.array_equal(together, single)


def test_epochs_and_seeds_shuffle_shards_and_samples_anew() -> None:
    counts = (50,) * 8
    order = Order(counts, seed=1, lanes=1)
    first, second = _run(order, 0, 400), _run(order, 400, 800)
    other = _run(Order(counts, seed=2, lanes=1), 0, 400)

    def shards_of(rows: list[tuple[int, int, int]]) -> list[int]:
        return [row[1] for row in rows[::50]]

    assert shards_of(first) != shards_of(second) and shards_of(first) != shards_of(other)
    offsets = [[row[2] for row in rows if row[1] == 0] for rows in (first, second, other)]
    assert offsets[0] != offsets[1] and offsets[0] != offsets[2] and offsets[0] != list(range(50))


def test_each_lane_reads_its_shards_one_after_the_other() -> None:
    lanes, counts = 4, (20,) * 40
    _, shards, _ = Order(counts, seed=5, lanes=lanes).locate(np.arange(800))
    for lane in range(lanes):
        runs = 1 + np.count_nonzero(np.diff(shards[lane::lanes]))
        assert runs == len(counts) // lanes


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 40, 100, 1000, 100_000])
@pytest.mark.parametrize("global_batch", [1, 6, 7, 8, 16, 100, 512])
def test_lanes_divide_the_batch_and_follow_the_shards(num_shards: int, global_batch: int) -> None:
    lanes = choose_lanes(num_shards, global_batch)
    assert global_batch % lanes == 0
    assert lanes <= max(1, min(num_shards, 8), num_shards // 10)


def test_a_rank_finds_its_place_among_a_billion_samples() -> None:
    order = Order(np.full(100_000, 10_000), seed=0, lanes=512)
    positions = rank_rows(10**9 // 512, global_batch=512, rank=17, world_size=512)
    epoch, shard, offset = order.locate(positions)
    assert int(epoch[0]) == int(positions[0]) // 10**9
    assert 0 <= int(shard[0]) < 100_000 and 0 <= int(offset[0]) < 10_000


def test_empty_shards_and_no_lanes_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one sample"):
        Order((3, 0), seed=0, lanes=1)
    with pytest.raises(ConfigError, match="at least one shard"):
        Order((), seed=0, lanes=1)
    with pytest.raises(ConfigError, match=r"data\.lanes"):
        Order((3,), seed=0, lanes=0)
