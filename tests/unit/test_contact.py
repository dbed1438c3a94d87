"""Contact sheets, and which samples come onto them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.contact import CELL, GAP, MAX_GAIN, amplified_difference, contact_sheet, encode_sheet
from data_pipeline.errors import DataError
from data_pipeline.pack import pack
from data_pipeline.reader import Dataset
from data_pipeline.records import Sample
from data_pipeline.sources import find_clean
from data_pipeline.statistics import collect_facts, draw_places, read_sample
from tests.support.datasets import make_dataset, make_folders, random_image


@pytest.mark.parametrize("size", [0, 1, 3, 7, 20, 60, 127, 200])
def test_the_difference_is_shown_at_the_gain_it_says(size: int) -> None:
    target = np.full((20, 20, 3), 20, np.uint8)
    degraded = target.copy()
    degraded[::2] += np.uint8(size)
    shown, gain = amplified_difference(degraded, target)
    assert gain in (1, 2, 4, 8, 16) and gain <= MAX_GAIN
    assert np.array_equal(shown, np.clip(128 + gain * (degraded.astype(float) - target), 0, 255))
    # As much as fits, and no more.
    assert gain * size <= 127 or gain == 1
    assert 2 * gain * size > 127 or gain == MAX_GAIN


def sample(size: tuple[int, int], *, has_input: bool = True, has_mask: bool = False) -> Sample:
    image = random_image(3, size)
    mask = (image[:, :, :1] > 127).astype(np.uint8) * 255
    return Sample("key", "name", image if has_input else None, image, mask if has_mask else None)


@pytest.mark.parametrize(("has_input", "has_mask", "columns"), [(True, True, 4), (True, False, 3), (False, False, 1)])
def test_a_row_has_a_picture_for_everything_a_sample_holds(has_input: bool, has_mask: bool, columns: int) -> None:
    sheet = contact_sheet([sample((64, 32), has_input=has_input, has_mask=has_mask)] * 3, title="title")
    assert sheet.width == GAP + columns * (CELL + GAP)
    assert 3 * CELL < sheet.height < 3 * (CELL + 80)


def test_small_images_are_enlarged_by_whole_pixels_and_large_ones_reduced() -> None:
    image = random_image(3, (50, 100))
    sheet = np.asarray(contact_sheet([sample((50, 100), has_input=False)], title=""))
    enlarged = image.repeat(2, axis=0).repeat(2, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(sheet[:, GAP : GAP + 200], (100, 200, 3))[:, 0, 0]
    assert (windows == enlarged).all(axis=(1, 2, 3)).sum() == 1
    large = contact_sheet([sample((300, 2000), has_input=False)], title="")
    assert large.width == GAP + CELL + GAP and large.height < CELL


def test_a_long_name_stays_on_the_sheet_with_both_its_ends_legible() -> None:
    long = Sample("k" * 80, "name", None, random_image(1, (40, 40)), None)
    sheet = np.asarray(contact_sheet([long], title="t" * 200))
    assert (sheet[:, -GAP:] == sheet[0, 0]).all()


@pytest.mark.parametrize("num", [1, 4, 9, 50])
def test_the_samples_shown_are_different_ones_and_the_same_every_time(tmp_path: Path, num: int) -> None:
    dataset = Dataset(make_dataset(tmp_path, count=9, shard_mb=0.01))
    places = draw_places(dataset, num, seed=5)
    assert len(set(places)) == min(num, 9) and places == draw_places(Dataset(dataset.uri), num, seed=5)
    assert set(places) <= {place for place, _ in dataset.entries()}


def test_another_seed_shows_other_samples(tmp_path: Path) -> None:
    dataset = Dataset(make_dataset(tmp_path, count=9, shard_mb=0.01))
    assert len({tuple(draw_places(dataset, 4, seed=seed)) for seed in range(8)}) > 4


def test_any_kind_of_dataset_can_be_shown_and_counted(tmp_path: Path) -> None:
    make_folders(tmp_path, count=3, size=(70, 90))
    pack(find_clean(tmp_path / "target"), str(tmp_path / "clean"), jobs=1)
    pack(find_clean(tmp_path / "target"), str(tmp_path / "tiled"), tile=32, overlap=8, jobs=1)
    for uri in (make_dataset(tmp_path, count=3, mask=True), str(tmp_path / "clean"), str(tmp_path / "tiled")):
        dataset = Dataset(uri)
        samples = [read_sample(dataset, place) for place in draw_places(dataset, 3, seed=0)]
        path = tmp_path / "sheet.png"
        path.write_bytes(encode_sheet(contact_sheet(samples, title=uri)))
        assert Image.open(path).height > 3 * 200
        facts = list(collect_facts(dataset, 1000, seed=0, jobs=2))
        assert len(facts) == dataset.manifest.num_samples
        assert all((fact.pair is not None) == dataset.manifest.has_input for fact in facts)
        members = [member for _, entry in dataset.entries() for member in entry.members]
        assert sum(fact.bytes for fact in facts) == sum(member.size for member in members)


def test_a_sample_that_cannot_be_read_leads_to_the_doctor(tmp_path: Path) -> None:
    dataset = Dataset(make_dataset(tmp_path, count=1))
    place, entry = next(dataset.entries())
    shard = Path(dataset.uri) / dataset.manifest.shards[place.shard_index].name
    data = bytearray(shard.read_bytes())
    data[entry.members[0].start : entry.members[0].start + 8] = bytes(8)
    shard.write_bytes(data)
    with pytest.raises(DataError, match="rddm doctor data"):
        read_sample(dataset, place)
