"""Several datasets in one run, by brute force."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.mixture import (
    WINDOW_BATCHES,
    Mixture,
    build_mixture,
    choose_mixture_lanes,
    deal_batches,
    share_window,
)
from data_pipeline.order import Order, choose_lanes

CASES = [
    # counts of each dataset, weights, lanes, global batch
    ([(3, 7, 1, 5), (2, 9, 4)], (0.7, 0.3), (2, 1), 8),
    ([(13, 2), (1,), (6, 6, 6)], (0.5, 0.01, 1.0), (1, 1, 3), 5),
    ([(4, 4, 4), (5,), (1, 1, 1), (9, 8)], (1, 1, 1, 1), (2, 1, 3, 1), 3),
    ([(3, 7, 1, 5), (2, 9, 4)], (3, 1), (3, 1), 1),
]
WEIGHTS = [(1,), (0.7, 0.3), (0.1, 0.2, 0.7), (1, 1, 1), (1, 2, 3, 4, 5, 6, 7), (1e-2, 1), (50, 10, 3.3), (0.5,) * 11]


def _mixture(case: tuple, seed: int = 5) -> Mixture:
    counts, weights, lanes, global_batch = case
    return build_mixture(counts, weights=weights, seed=seed, lanes=lanes, global_batch=global_batch)


def _rows(mixture: Mixture, positions: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row) for row in np.stack(mixture.locate(positions), axis=1).tolist()]


@pytest.mark.parametrize("case", CASES)
def test_every_sample_comes_exactly_once_per_epoch_of_its_dataset(case: tuple) -> None:
    counts, global_batch = case[0], case[3]
    rows = _rows(_mixture(case), np.arange(6 * WINDOW_BATCHES * global_batch))
    for dataset, own_counts in enumerate(counts):
        everything = sorted((shard, offset) for shard, count in enumerate(own_counts) for offset in range(count))
        own = [row for row in rows if row[0] == dataset]
        epochs = len(own) // len(everything)
        assert epochs >= 2
        for epoch in range(epochs):
            part = own[epoch * len(everything) : (epoch + 1) * len(everything)]
            assert {row[1] for row in part} == {epoch}
            assert sorted(row[2:] for row in part) == everything


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("global_batch", [1, 7, 16, 512])
def test_a_window_holds_the_shares_within_a_row_and_each_batch_their_mean_rounded(
    weights: tuple[float, ...], global_batch: int
) -> None:
    rows = share_window(weights, global_batch)
    total = WINDOW_BATCHES * global_batch
    exact = [Fraction(str(weight)) for weight in weights]
    assert rows.sum() == total
    assert all(abs(got - total * weight / sum(exact)) < 1 for got, weight in zip(rows.tolist(), exact, strict=True))

    table = deal_batches(rows)
    assert table.shape == (WINDOW_BATCHES, len(weights))
    assert np.array_equal(table.sum(axis=0), rows) and (table.sum(axis=1) == global_batch).all()
    assert (table >= rows // WINDOW_BATCHES).all() and (table <= -(-rows // WINDOW_BATCHES)).all()
    share = np.arange(1, WINDOW_BATCHES + 1)[:, None] * rows / WINDOW_BATCHES
    assert np.abs(np.cumsum(table, axis=0) - share).max() < 2.1


@pytest.mark.parametrize("case", CASES)
def test_the_run_holds_what_the_table_says_in_blocks_by_dataset(case: tuple) -> None:
    mixture, global_batch = _mixture(case), case[3]
    window = WINDOW_BATCHES * global_batch
    for start in (0, window, 1000 * window):
        batches = mixture.locate(np.arange(start, start + window)).dataset.reshape(WINDOW_BATCHES, global_batch)
        assert np.array_equal(batches, np.sort(batches, axis=1))
        counts = np.stack([(batches == dataset).sum(axis=1) for dataset in range(len(mixture.orders))], axis=1)
        assert np.array_equal(counts, deal_batches(mixture.rows_per_window))


def test_shares_that_are_whole_numbers_are_the_same_in_every_batch() -> None:
    assert np.array_equal(deal_batches(share_window((0.5, 0.25, 0.25), 8)), np.tile([4, 2, 2], (WINDOW_BATCHES, 1)))
    assert share_window((0.7, 0.2, 0.1), 10).tolist() == [448, 128, 64]  # though 0.7 + 0.2 + 0.1 is not 1 in binary
    assert share_window((2, 6), 16).tolist() == share_window((0.25, 0.75), 16).tolist() == [256, 768]


@pytest.mark.parametrize("case", CASES)
def test_positions_in_any_order_and_any_pieces_give_the_same(case: tuple) -> None:
    total = 3 * WINDOW_BATCHES * case[3] + 7
    whole = _rows(_mixture(case), np.arange(total))
    shuffled = np.random.default_rng(0).permutation(total)
    mixture = _mixture(case)
    assert _rows(mixture, shuffled) == [whole[position] for position in shuffled]
    assert _rows(mixture, np.arange(0)) == []
    for size in (1, 13):
        pieces = [_rows(mixture, np.arange(at, min(at + size, total))) for at in reversed(range(0, total, size))]
        assert [row for piece in reversed(pieces) for row in piece] == whole


def test_starting_far_out_needs_nothing_before_it() -> None:
    mixture = _mixture(CASES[0])
    far = 10**15
    dataset, own = mixture.split(np.arange(far, far + 1000))
    for number, rows in enumerate(mixture.rows_per_window.tolist()):
        mine = own[dataset == number]
        assert np.array_equal(mine, np.arange(mine[0], mine[0] + len(mine)))
        assert abs(mine[0] - far * rows / mixture.rows_per_window.sum()) < rows


def test_one_dataset_alone_is_its_order() -> None:
    counts = (3, 7, 1, 5)
    positions = np.concatenate([np.arange(2000), 10**12 + np.arange(50)])
    mixture = build_mixture([counts], weights=(0.3,), seed=9, lanes=(2,), global_batch=6)
    places = mixture.locate(positions)
    assert not places.dataset.any()
    for got, wanted in zip(places[1:], Order(counts, 9, 2).locate(positions), strict=True):
        assert np.array_equal(got, wanted)
    assert choose_mixture_lanes((40,), weights=(1,), global_batch=12) == (choose_lanes(40, 12),)


def test_equal_datasets_run_in_different_orders() -> None:
    counts = (20,) * 10
    mixture = build_mixture([counts, counts], weights=(1, 1), seed=9, lanes=(2, 2), global_batch=2)
    places = mixture.locate(np.arange(400))
    first, second = (
        [tuple(row) for row in np.stack(places, axis=1)[places.dataset == number][:, 1:].tolist()] for number in (0, 1)
    )
    assert sorted(first) == sorted(second) and len(first) == 200
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20
    other = build_mixture([counts, counts], weights=(1, 1), seed=10, lanes=(2, 2), global_batch=2)
    assert _rows(other, np.arange(400)) != _rows(mixture, np.arange(400))


def test_a_dataset_keeps_its_order_whatever_the_weights_and_the_batch() -> None:
    counts, lanes = [(3, 7, 1, 5), (2, 9, 4)], (2, 1)
    runs = [
        _rows(
            build_mixture(counts, weights=weights, seed=1, lanes=lanes, global_batch=batch),
            np.arange(WINDOW_BATCHES * batch),
        )
        for weights, batch in (((0.7, 0.3), 8), ((1, 9), 5))
    ]
    for dataset in (0, 1):
        first, second = ([row for row in run if row[0] == dataset] for run in runs)
        shorter = min(len(first), len(second))
        assert shorter > 20 and first[:shorter] == second[:shorter]


def test_substitutes_come_from_the_same_dataset() -> None:
    mixture = _mixture(CASES[1])
    positions = np.arange(500)
    dataset, own = mixture.split(positions)
    whole = _rows(mixture, positions)
    assert set(dataset.tolist()) == {0, 1, 2}
    for number in range(3):
        mine = np.flatnonzero(dataset == number)
        again = np.stack(mixture.locate_in(number, own[mine]), axis=1).tolist()
        assert [tuple(row) for row in again] == [whole[position] for position in mine]
        elsewhere = mixture.locate_in(number, own[mine] + 7919)
        assert (elsewhere.dataset == number).all()
        assert (elsewhere.shard < len(CASES[1][0][number])).all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_the_ranks_together_read_the_run_whatever_their_number(world_size: int) -> None:
    case = CASES[0]
    total = 2 * WINDOW_BATCHES * case[3]
    rows = [row for rank in range(world_size) for row in _rows(_mixture(case), np.arange(rank, total, world_size))]
    assert Counter(rows) == Counter(_rows(_mixture(case), np.arange(total)))


@pytest.mark.parametrize(
    "num_shards, weights, global_batch, lanes",
    [
        ((400, 400), (3, 1), 16, (12, 4)),  # whole shares: divisors of 12 and 4
        ((90, 40), (3, 1), 16, (6, 4)),
        ((100, 100), (0.7, 0.3), 16, (10, 4)),  # 11.2 and 4.8 rows: nothing to divide
        ((3, 1000), (0.001, 1), 16, (1, 15)),
    ],
)
def test_lanes_follow_the_shards_and_the_rows_of_each_dataset(
    num_shards: tuple[int, ...], weights: tuple[float, ...], global_batch: int, lanes: tuple[int, ...]
) -> None:
    assert choose_mixture_lanes(num_shards, weights=weights, global_batch=global_batch) == lanes


@pytest.mark.parametrize("weights", [(1, 0), (1, -0.5), (float("nan"), 1), (1, float("inf")), (1,), (1, 1, 1), ()])
def test_weights_that_do_not_fit_are_refused(weights: tuple[float, ...]) -> None:
    orders = (Order((3,), 0, 1), Order((4,), 1, 1))
    with pytest.raises(ConfigError, match=r"data\.weights"):
        Mixture(orders, weights, 8)
    with pytest.raises(ConfigError, match=r"data\.weights"):
        build_mixture([(3,), (4,)], weights=weights, seed=0, lanes=(1, 1), global_batch=8)
    with pytest.raises(ConfigError, match=r"data\.weights"):
        choose_mixture_lanes((1, 1), weights=weights, global_batch=8)


def test_a_dataset_that_would_get_no_row_is_refused() -> None:
    assert share_window((1, 1 / 512), 8).tolist() == [511, 1]
    with pytest.raises(ConfigError, match=r"data\.weights: 0\.0001 for dataset 1 .* train\.global_batch=8"):
        share_window((1, 0.0001), 8)
    with pytest.raises(ConfigError, match=r"data\.weights"):
        share_window((1,) * (WINDOW_BATCHES + 1), 1)


def test_no_dataset_no_batch_and_lanes_of_another_number_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.uri names no dataset"):
        Mixture((), (), 8)
    with pytest.raises(ConfigError, match=r"train\.global_batch=0"):
        Mixture((Order((3,), 0, 1),), (1.0,), 0)
    with pytest.raises(ConfigError, match=r"data\.lanes"):
        build_mixture([(3,), (4,)], weights=(1, 1), seed=0, lanes=(1,), global_batch=8)


def test_the_description_states_what_was_asked_and_what_each_dataset_gets() -> None:
    text = build_mixture([(448,), (64,)], weights=(0.7, 0.3), seed=0, lanes=(1, 1), global_batch=16).describe()
    first, second = text.split("; ")
    assert first == "dataset 0 717 of 1024 rows = 70.020% (asked 70.000%), 1 lane(s), an epoch in 40.0 batches"
    assert second.startswith("dataset 1 307 of 1024 rows = 29.980% (asked 30.000%)")
    named = build_mixture([(4,)], weights=(2,), seed=0, lanes=(1,), global_batch=4).describe(["rain"])
    assert named.startswith("rain 256 of 256 rows = 100.000% (asked 100.000%)")
