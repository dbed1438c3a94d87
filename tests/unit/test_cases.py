"""The pictures of a report: which images, chosen in parts and in any order, and how they are stored and shown."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rddm_dist.evaluation.cases import MAX_SIDE, SIDES, SPREAD_FULL, Case, CaseStore, Extremes, heat_map, make_case
from tests.support.datasets import random_image


def scores(count: int, *, seed: int = 0) -> dict[str, float]:
    """Scores by key, with many that are equal, and one that is infinite."""
    values = np.random.default_rng(seed).integers(10, 30, count).astype(float)
    values[count // 2] = np.inf
    return {f"k{number:03d}": float(value) for number, value in enumerate(values)}


def decode(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)))


def case(key: str) -> Case:
    return make_case(key, restored=random_image(len(key), (8, 8)))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 60])
def test_the_extremes_are_the_lowest_and_the_highest_scores(count: int) -> None:
    found = Extremes(4)
    values = scores(count)
    for key, value in values.items():
        found.add(value, key)
    ordered = [key for _, key in sorted((value, key) for key, value in values.items())]
    assert found.keys == (ordered if count <= 8 else ordered[:4] + ordered[-4:])


@pytest.mark.parametrize("seed", range(5))
def test_the_extremes_do_not_depend_on_the_order(seed: int) -> None:
    values = scores(60)
    keys = list(values)
    found, shuffled = Extremes(4), Extremes(4)
    for key in keys:
        found.add(values[key], key)
    np.random.default_rng(seed).shuffle(keys)
    for key in keys:
        shuffled.add(values[key], key)
    assert shuffled.keys == found.keys


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_the_extremes_of_all_were_extremes_of_their_part_when_they_came(parts: int, seed: int) -> None:
    values = scores(80, seed=seed)
    whole = Extremes(4)
    for key, value in values.items():
        whole.add(value, key)
    rng = np.random.default_rng(seed)
    workers = [Extremes(4) for _ in range(parts)]
    pictured = {key for key in rng.permutation(list(values)) if workers[rng.integers(parts)].add(values[key], key)}
    assert set(whole.keys) <= pictured < set(values)


def test_an_image_that_comes_again_takes_no_place_of_another() -> None:
    once, twice = Extremes(4), Extremes(4)
    for key, value in scores(30).items():
        once.add(value, key)
        twice.add(value, key)
        twice.add(value, key)
    assert twice.keys == once.keys


def test_a_case_holds_the_sides_there_are_in_their_order_and_pixels() -> None:
    images = {side: random_image(number, (12, 20)) for number, side in enumerate(SIDES[:4])}
    shown = make_case("k", target=images["target"], mean=None, restored=images["restored"], input=images["input"])
    assert list(shown.sides) == ["input", "restored", "target"]
    for side, uri in shown.sides.items():
        assert uri.startswith("data:image/png;base64,")
        assert np.array_equal(decode(uri), images[side])
    spread = np.random.default_rng(0).uniform(0, SPREAD_FULL, (12, 20))
    assert list(make_case("k", spread=spread, mean=images["mean"]).sides) == ["mean", "spread"]
    assert np.array_equal(decode(make_case("k", spread=spread).sides["spread"]), heat_map(spread))


def test_a_case_survives_json() -> None:
    shown = case("key")
    assert Case.from_json(shown.to_json()) == Case.from_json(shown.to_json().encode()) == shown


@pytest.mark.parametrize(
    ("size", "expected"), [((900, 1280), (450, 640)), ((1300, 30), (640, 15)), ((640, 8), (640, 8))]
)
def test_large_images_are_shown_reduced(size: tuple[int, int], expected: tuple[int, int]) -> None:
    shown = decode(make_case("k", restored=np.full((*size, 3), 90, np.uint8)).sides["restored"])
    assert shown.shape == (*expected, 3)
    assert max(shown.shape) <= MAX_SIDE and (shown == 90).all()


def test_what_png_does_not_compress_is_shown_as_jpeg() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    smooth = np.full((300, 300, 3), 7, np.uint8)
    assert make_case("k", restored=noise).sides["restored"].startswith("data:image/jpeg;")
    assert make_case("k", restored=smooth).sides["restored"].startswith("data:image/png;")


def test_the_map_of_the_spread_goes_from_black_over_red_and_yellow_to_white() -> None:
    levels = SPREAD_FULL * np.array([[0, 1 / 9, 4 / 9, 1, 5]])  # thirds of the root
    expected = [[0, 0, 0], [255, 0, 0], [255, 255, 0], [255, 255, 255], [255, 255, 255]]
    assert heat_map(levels)[0].tolist() == expected
    rising = heat_map(np.linspace(0, SPREAD_FULL, 200)[None])[0].astype(int).sum(axis=-1)
    assert (np.diff(rising) >= 0).all() and heat_map(levels).dtype == np.uint8


def test_cases_are_found_again_by_another_process_in_the_order_asked_for(tmp_path: Path) -> None:
    store = CaseStore(str(tmp_path))
    for key in ("b", "aa", "ccc"):
        store.put(case(key))
    again = CaseStore(str(tmp_path))
    assert again.load(["ccc", "absent", "b"]) == [case("ccc"), case("b")]


def test_cases_that_are_not_shown_are_removed(tmp_path: Path) -> None:
    store = CaseStore(str(tmp_path))
    for key in ("b", "aa", "ccc"):
        store.put(case(key))
    store.keep(["aa", "absent"])
    assert store.load(["b", "aa", "ccc"]) == [case("aa")]
    assert [path.name for path in tmp_path.rglob("*.json")] == ["aa.json"]


def test_what_an_interrupted_writer_left_is_no_case(tmp_path: Path) -> None:
    store = CaseStore(str(tmp_path))
    store.put(case("aa"))
    (written,) = tmp_path.rglob("aa.json")
    (written.parent / ".b.json.123.tmp").write_bytes(b'{"key": "b", "si')
    assert CaseStore(str(tmp_path)).load(["aa", "b"]) == [case("aa")]


def test_a_damaged_case_counts_as_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CaseStore(str(tmp_path))
    for key in ("a", "b"):
        store.put(Case(key, {"restored": "data:,"}))
    path = tmp_path / "cases" / "a.json"
    path.write_text(path.read_text()[:-3])
    assert store.keys == {"b"} and [case.key for case in store.load(["a", "b"])] == ["b"]
    assert "is damaged and made again" in caplog.text
