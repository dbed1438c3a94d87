"""Counter-based random numbers: known answers, independence of batching, and the shape of the distributions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.rng import Draws, integers, mix_seed, normal_image, permutation, philox, stable_id, uniform

ROOT = Path(__file__).resolve().parents[2]


def _philox_of(word: int, key: int) -> list[str]:
    counter = torch.tensor(word, dtype=torch.int64)
    return [f"{int(value):08x}" for value in philox((counter, counter, counter, counter), key)]


def test_philox_gives_the_known_answers_of_random123() -> None:
    assert _philox_of(0, 0) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert _philox_of(0xFFFFFFFF, 2**64 - 1) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def test_philox_gives_the_known_answer_for_the_digits_of_pi() -> None:
    words = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    counter = tuple(torch.tensor(word, dtype=torch.int64) for word in words)
    answer = philox(counter, 0x299F31D0A4093822)  # type: ignore[arg-type]
    assert [f"{int(value):08x}" for value in answer] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_seeds_are_the_same_in_every_process() -> None:
    code = "from data_pipeline.rng import mix_seed, stable_id; print(mix_seed(7, 'noise', 3), stable_id('a/b'))"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout.decode()
        for salt in ("0", "1")
    ]
    assert outputs == [f"{mix_seed(7, 'noise', 3)} {stable_id('a/b')}\n"] * 2


def test_seeds_tell_parts_apart() -> None:
    parts: list[tuple[int | str, ...]] = [(), (1,), ("1",), (1, 2), ("12",), (12,)]
    assert len({mix_seed(seed, *part) for part in parts for seed in (0, 1)}) == 12
    assert mix_seed(0, int(np.int64(5))) == mix_seed(0, np.int64(5))  # type: ignore[arg-type]


def test_ids_are_63_bits() -> None:
    assert all(0 <= stable_id(str(number)) < 2**63 for number in range(200))


IDS = torch.tensor([0, 1, 5, 2**31, 2**32, 2**40 + 3, 2**62 - 1])


def test_a_batch_equals_batches_of_one() -> None:
    whole = normal_image(3, "noise", IDS, channels=3, height=13, width=17)
    parts = [normal_image(3, "noise", IDS[i : i + 1], channels=3, height=13, width=17) for i in range(len(IDS))]
    assert torch.equal(whole, torch.cat(parts))
    numbers = uniform(3, "augment", IDS, count=6)
    assert torch.equal(numbers, torch.cat([uniform(3, "augment", IDS[i : i + 1], count=6) for i in range(len(IDS))]))


@pytest.mark.parametrize("top, left, height, width", [(0, 0, 5, 7), (3, 4, 6, 9), (12, 16, 1, 1)])
def test_a_window_equals_the_window_of_the_whole(top: int, left: int, height: int, width: int) -> None:
    whole = normal_image(3, "noise", IDS, channels=5, height=13, width=17)
    window = normal_image(3, "noise", IDS, channels=5, height=height, width=width, top=top, left=left)
    assert torch.equal(window, whole[:, :, top : top + height, left : left + width])


def test_fewer_channels_are_the_first_of_more() -> None:
    more = normal_image(3, "noise", IDS, channels=7, height=4, width=5)
    for channels in range(1, 7):
        assert torch.equal(normal_image(3, "noise", IDS, channels=channels, height=4, width=5), more[:, :channels])


def test_order_of_ids_and_memory_layout_do_not_matter() -> None:
    backwards = normal_image(3, "noise", IDS.flip(0), channels=3, height=4, width=5)
    assert torch.equal(backwards.flip(0), normal_image(3, "noise", IDS, channels=3, height=4, width=5))
    spread = torch.stack([IDS, IDS + 1], dim=1)[:, 0]
    assert torch.equal(uniform(1, "a", spread), uniform(1, "a", IDS))


def test_the_number_of_compute_threads_does_not_matter() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(normal_image(3, "noise", torch.arange(4), channels=3, height=97, width=101))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_seed_purpose_id_step_and_place_all_matter() -> None:
    def draw(seed: int = 0, purpose: str = "noise", first: int = 0, step: int = 0, top: int = 0) -> bytes:
        ids = torch.tensor([first])
        return normal_image(seed, purpose, ids, channels=3, height=4, width=4, step=step, top=top).numpy().tobytes()

    variants = [draw(), draw(seed=1), draw(purpose="other"), draw(first=1), draw(first=2**32), draw(step=1)]
    variants.append(draw(top=1))
    assert len(set(variants)) == len(variants)


def test_normals_are_standard_and_uncorrelated() -> None:
    z = normal_image(11, "noise", torch.arange(32), channels=4, height=64, width=64).double()
    count = z.numel()
    assert abs(float(z.mean())) < 4 / count**0.5
    assert abs(float(z.square().mean()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float(z.pow(4).mean()) - 3) < 4 * (96 / count) ** 0.5
    channels = ((z[:, 0], z[:, 1]), (z[:, 2], z[:, 3]))
    for a, b in (*channels, (z[..., 1:], z[..., :-1]), (z[:, :, 1:], z[:, :, :-1]), (z[1:], z[:-1])):
        assert abs(float((a * b).mean())) < 4 / a.numel() ** 0.5


def test_uniforms_lie_in_range_and_are_flat() -> None:
    numbers = uniform(2, "augment", torch.arange(50_000), count=3)
    assert numbers.dtype == torch.float64 and numbers.shape == (50_000, 3)
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    assert float((numbers.mean(0) - 0.5).abs().max()) < 4 * (1 / 12 / 50_000) ** 0.5


@pytest.mark.parametrize("high", [1, 2, 7, 1000, 2**31])
def test_integers_cover_their_range(high: int) -> None:
    numbers = integers(2, "timestep", torch.arange(20_000), high)
    assert int(numbers.min()) >= 0 and int(numbers.max()) < high
    if high <= 1000:
        assert numbers.unique().numel() == high


def test_a_permutation_is_one_and_depends_on_its_parts() -> None:
    first = permutation(5, 1000, "shards", 0)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert np.array_equal(first, permutation(5, 1000, "shards", 0))
    assert not np.array_equal(first, permutation(5, 1000, "shards", 1))
    assert not np.array_equal(first, permutation(6, 1000, "shards", 0))
    assert permutation(5, 0).size == 0


def test_draws_are_timesteps_in_range_and_noise_by_step() -> None:
    draws = Draws(seed=4, ids=torch.arange(5000))
    timesteps = draws.timesteps(10)
    assert timesteps.dtype == torch.int64 and sorted(timesteps.unique().tolist()) == list(range(1, 11))
    few = Draws(seed=4, ids=torch.arange(3))
    assert few.noise((3, 3, 5, 6)).dtype == torch.float32 and few.noise((3, 3, 5, 6)).shape == (3, 3, 5, 6)
    assert not torch.equal(few.noise((3, 3, 5, 6)), few.noise((3, 3, 5, 6), step=1))


def test_self_condition_coins_are_fair_and_belong_to_the_sample() -> None:
    draws = Draws(seed=4, ids=torch.arange(10_000))
    coins = draws.self_condition()
    assert coins.dtype == torch.bool and abs(int(coins.sum()) - 5000) < 4 * 50
    assert torch.equal(coins[7:20], Draws(seed=4, ids=torch.arange(7, 20)).self_condition())
    # Independent of the parity of the timestep, which is drawn for the same samples.
    odd = draws.timesteps(1000) % 2 == 1
    assert abs(int((coins & odd).sum()) - 2500) < 4 * 44


def test_nothing_of_torch_or_numpy_random_state_is_touched() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Draws(seed=4, ids=torch.arange(3)).noise((3, 3, 5, 6))
    permutation(1, 10)
    assert torch.equal(before, torch.get_rng_state())


def test_images_beyond_the_counter_are_refused() -> None:
    with pytest.raises(ValueError, match="65536"):
        normal_image(0, "noise", torch.arange(1), channels=1, height=1, width=1, left=65536)
