"""Preprocessing of whole images: the official pipeline's numbers, and what each step may and may not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import ConfigError
from data_pipeline.preprocess import Preprocess, equalize, pad_bottom_right, resize

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
# The json's remaining entry tells what the official reader makes of a file list: nothing that preprocessing does.
FACTS = json.loads((GOLDEN / "data_pipeline.json").read_text())
with np.load(GOLDEN / "data_pipeline.npz") as archive:
    ARRAYS = {name: archive[name] for name in archive.files}
CASES = sorted({name.split("/")[0] for name in ARRAYS if "/sample" in name})
RESULTS = sorted(name.rsplit("/", 1)[0] for name in ARRAYS if "/sample" in name and name.endswith("/in"))
SIZE, MULTIPLE = 32, 8  # of every case
IMAGE = ARRAYS["pil_bicubic/src"]


def official(case: str, image: np.ndarray, *, field: str, sample: bool, equalized: bool, mirrored: bool) -> np.ndarray:
    """The official order: pad, crop (training), equalise (input), mirror (where asked for, always), resize."""
    image = Preprocess(pad_to=SIZE, pad_multiple=MULTIPLE).apply(image, field=field)
    is_cropped = case.startswith("crop")
    if is_cropped and not sample:
        top, left = FACTS[case]["random.seed(10) crop (row,col) if cropping"]
        image = image[top : top + SIZE, left : left + SIZE]
    image = Preprocess(equalize=equalized).apply(image, field=field)
    if mirrored:
        image = image[:, ::-1]
    return Preprocess(resize=0 if is_cropped else SIZE).apply(image, field=field)


def test_the_reference_holds_every_combination() -> None:
    assert len(CASES) == 4 and len(RESULTS) == 4 * 2 * 2 * 2


@pytest.mark.parametrize("name", RESULTS)
def test_every_official_result_is_reproduced(name: str) -> None:
    case, variant = name.split("/")
    flags = {part[:-1]: part[-1] == "1" for part in variant.split("_")}
    for field, stored in (("input", "in"), ("target", "gt")):
        image = official(
            case,
            ARRAYS[f"{case}/src_{stored}"],
            field=field,
            sample=flags["sample"],
            equalized=flags["eq"],
            mirrored=flags["flip"],
        )
        assert np.array_equal(image.transpose(2, 0, 1), ARRAYS[f"{name}/{stored}"])


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("resize")])
@pytest.mark.parametrize("equalized", [False, True])
def test_one_preprocess_is_the_official_test_pipeline(case: str, equalized: bool) -> None:
    whole = Preprocess(pad_to=SIZE, pad_multiple=MULTIPLE, equalize=equalized, resize=SIZE)
    for field, stored in (("input", "in"), ("target", "gt")):
        image = whole.apply(ARRAYS[f"{case}/src_{stored}"], field=field)
        expected = ARRAYS[f"{case}/sample1_eq{int(equalized)}_flip0/{stored}"]
        assert np.array_equal(image.transpose(2, 0, 1), expected)


@pytest.mark.parametrize("case", CASES)
def test_cases_are_padded_as_officially(case: str) -> None:
    height, width = ARRAYS[f"{case}/src_in"].shape[:2]
    padded = Preprocess(pad_to=SIZE, pad_multiple=MULTIPLE).output_size(height, width)
    assert [padded[0] - height, padded[1] - width] == FACTS[case]["pad_bottom_right"]
    resized = Preprocess(pad_to=SIZE, pad_multiple=MULTIPLE, resize=0 if case.startswith("crop") else SIZE)
    assert [3, *resized.output_size(height, width)] == FACTS[case]["first_out_shapes"][0]


@pytest.mark.parametrize("name, more", FACTS["pad_bottom_right_table"].items())
def test_padding_follows_the_table(name: str, more: list[int]) -> None:
    size, patch = name.split("_patch")
    height, width = (int(side) for side in size.split("x"))
    image = np.full((height, width, 1), 7, np.uint8)
    padded = pad_bottom_right(image, min_side=int(patch), multiple=8)
    assert padded.shape == (height + more[0], width + more[1], 1)
    assert np.array_equal(padded[:height, :width], image)
    assert padded.sum(dtype=np.int64) == image.sum(dtype=np.int64)  # all the rest is zero


def test_equalize_is_opencvs_channel_by_channel() -> None:
    assert np.array_equal(equalize(ARRAYS["equalizeHist/src"]), ARRAYS["equalizeHist/dst_per_channel"])


def test_resize_is_pillows_bicubic() -> None:
    assert np.array_equal(resize(IMAGE, 32), ARRAYS["pil_bicubic/dst_32x32"])


def test_equalize_spreads_the_levels_and_keeps_their_order() -> None:
    dull = (IMAGE // 8 + 100).astype(np.uint8)
    spread = equalize(dull)
    assert spread.min() == 0 and spread.max() == 255
    for channel in range(3):
        order = np.argsort(dull[:, :, channel], axis=None, kind="stable")
        assert (np.diff(spread[:, :, channel].ravel()[order].astype(int)) >= 0).all()
        assert np.array_equal(equalize(dull[:, :, channel : channel + 1])[:, :, 0], spread[:, :, channel])


def test_equalize_leaves_a_channel_of_one_level() -> None:
    flat = np.full((5, 6, 3), (0, 17, 255), np.uint8)
    assert np.array_equal(equalize(flat), flat)


def test_only_the_input_is_equalized() -> None:
    preprocess = Preprocess(equalize=True)
    dull = (IMAGE // 8).astype(np.uint8)
    assert not np.array_equal(preprocess.apply(dull, field="input"), dull)
    for field in ("target", "mask"):
        assert np.array_equal(preprocess.apply(dull, field=field), dull)


def test_a_mask_is_resized_like_a_channel_of_an_image() -> None:
    mask = IMAGE[:, :, :1]
    resized = Preprocess(resize=20).apply(mask, field="mask")
    assert np.array_equal(resized, resize(IMAGE, 20)[:, :, :1]) and resized.shape == (20, 20, 1)
    assert np.array_equal(resize(mask, 48)[:, :, 0], np.asarray(Image.fromarray(mask[:, :, 0]).resize((48, 48), 3)))


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(),
        Preprocess(pad_to=50),
        Preprocess(pad_multiple=16),
        Preprocess(pad_to=33, pad_multiple=7),
        Preprocess(resize=24),
        Preprocess(pad_to=64, pad_multiple=8, equalize=True, resize=30),
    ],
)
@pytest.mark.parametrize("height, width", [(1, 1), (33, 47), (48, 64)])
def test_images_have_the_size_foretold(preprocess: Preprocess, height: int, width: int) -> None:
    tall = np.tile(IMAGE, (2, 2, 1))[:height, :width]
    for field, image in (("input", tall), ("target", tall), ("mask", tall[:, :, :1])):
        result = preprocess.apply(image, field=field)
        assert result.shape == (*preprocess.output_size(height, width), image.shape[2]) and result.dtype == np.uint8


def test_the_identity_changes_nothing() -> None:
    for preprocess in (Preprocess(), Preprocess(pad_multiple=1)):
        assert preprocess.is_identity and not preprocess.needs_whole_image
        assert np.array_equal(preprocess.apply(IMAGE, field="input"), IMAGE)
    for other in (Preprocess(pad_to=1), Preprocess(pad_multiple=2), Preprocess(equalize=True), Preprocess(resize=40)):
        assert not other.is_identity


def test_a_window_of_a_padded_image_is_the_window_of_the_image() -> None:
    padding = Preprocess(pad_to=64, pad_multiple=8)
    assert not padding.needs_whole_image
    assert np.array_equal(padding.apply(IMAGE, field="input")[5:30, 7:40], IMAGE[5:30, 7:40])
    for whole in (Preprocess(equalize=True), Preprocess(resize=32)):
        assert whole.needs_whole_image


@pytest.mark.parametrize("name", ["pad_to", "pad_multiple", "resize"])
def test_negative_sizes_are_refused(name: str) -> None:
    options: dict[str, Any] = {name: -1}
    with pytest.raises(ConfigError, match=f"data.preprocess.{name}=-1 "):
        Preprocess(**options)
