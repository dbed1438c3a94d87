"""Masks of holes: their shape, their area, and that a mask is a function of seed, id and size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.masks import MASK_KINDS, make_masks

IDS = torch.arange(120) * 977 + 2**40
SIZES = [(8, 8), (9, 31), (33, 24), (64, 64)]
RANDOM_KINDS = [kind for kind in MASK_KINDS if kind != "center"]


def masks_of(kind: str, height: int, width: int, *, seed: int = 1, ids: torch.Tensor = IDS) -> np.ndarray:
    return make_masks(kind, seed=seed, ids=ids, height=height, width=width).numpy()


@pytest.mark.parametrize("height, width", SIZES)
def test_the_center_is_cut_at_quarters(height: int, width: int) -> None:
    rows, columns = np.arange(height)[:, None], np.arange(width)
    expected = (rows >= height // 4) & (rows < 3 * height // 4) & (columns >= width // 4) & (columns < 3 * width // 4)
    for mask in masks_of("center", height, width, ids=IDS[:3]):
        assert np.array_equal(mask, np.where(expected, 255, 0))


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("height, width", SIZES)
def test_a_mask_is_two_valued_and_has_a_hole(kind: str, height: int, width: int) -> None:
    masks = masks_of(kind, height, width)
    assert masks.shape == (len(IDS), height, width) and masks.dtype == np.uint8
    assert set(np.unique(masks)) == {0, 255}
    assert (masks == 255).any(axis=(1, 2)).all()


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_a_mask_depends_on_seed_and_id_alone(kind: str) -> None:
    masks = masks_of(kind, 32, 40, ids=IDS[:7])
    rows = [masks_of(kind, 32, 40, ids=IDS[i : i + 1]) for i in range(7)]
    assert np.array_equal(masks, np.concatenate(rows))
    assert np.array_equal(masks[[4, 2]], masks_of(kind, 32, 40, ids=IDS[[4, 2]]))
    assert len({mask.tobytes() for mask in masks}) == 7
    assert not np.array_equal(masks, masks_of(kind, 32, 40, seed=2, ids=IDS[:7]))


@pytest.mark.parametrize("height, width", SIZES)
def test_a_box_is_one_rectangle_off_the_border(height: int, width: int) -> None:
    masks = masks_of("box", height, width).astype(bool)
    rows, columns = masks.max(axis=2), masks.max(axis=1)
    assert np.array_equal(masks, rows[:, :, None] & columns[:, None, :])
    for lines, side in ((rows, height), (columns, width)):
        margin = 20 * side // 256
        lengths = lines.sum(axis=1)
        assert lengths.max() <= side // 2 and lengths.min() >= side // 2 - 2 * margin
        assert (np.abs(np.diff(lines, axis=1).astype(int)).sum(axis=1) <= 2).all()  # one run
        assert not lines[:, :margin].any() and not lines[:, side - margin :].any()
        assert len(set(lines.argmax(axis=1))) > 1


@pytest.mark.parametrize("height, width", SIZES)
def test_irregular_holes_cover_a_share_within_bounds_and_all_over_them(height: int, width: int) -> None:
    share = (masks_of("irregular", height, width) > 0).mean(axis=(1, 2))
    assert share.min() >= 0.15 and share.max() <= 0.5
    assert share.min() < 0.19 and share.max() > 0.46
    assert abs(share.mean() - 0.325) < 0.03


def test_strokes_are_smooth_at_any_size() -> None:
    """A hole's edge is short against its area: strokes, not scattered pixels."""
    for kind in ("irregular", "free_form"):
        holes = masks_of(kind, 64, 64, ids=IDS[:20]) > 0
        edges = np.diff(holes, axis=1).sum(axis=(1, 2)) + np.diff(holes, axis=2).sum(axis=(1, 2))
        scattered = 2 * 64 * 63 * 2 * holes.mean(axis=(1, 2)) * (1 - holes.mean(axis=(1, 2)))
        assert (edges < 0.5 * scattered).all()


def test_free_form_holes_leave_most_of_the_image() -> None:
    share = (masks_of("free_form", 64, 64) > 0).mean(axis=(1, 2))
    assert share.min() > 0.01 and share.max() < 0.6 and share.max() > 2 * share.min()


def test_a_hybrid_is_a_box_and_strokes_together() -> None:
    box, strokes = masks_of("box", 40, 33), masks_of("free_form", 40, 33)
    assert np.array_equal(masks_of("hybrid", 40, 33), np.maximum(box, strokes))


def test_other_kinds_and_tiny_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="mask=round .* center, box, irregular"):
        masks_of("round", 16, 16)
    for size in ((7, 30), (30, 7)):
        with pytest.raises(DataError, match=f"{size[0]}x{size[1]} .* 8 a side"):
            masks_of("center", *size)
