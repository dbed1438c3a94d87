"""Masks of holes for inpainting: fixed, or drawn from counted numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.rng import uniform

MASK_KINDS = ("center", "box", "irregular", "free_form", "hybrid")
MIN_SIDE = 8
BOX_MARGIN = 20 / 256  # of a side: a box keeps this far from the border, and shrinks by up to as much at each end
IRREGULAR_AREA = (0.15, 0.5)  # of the image
IRREGULAR_STROKES = 6
BRUSHES = 2
BRUSH_STEPS = (4, 8)  # straight pieces of a brush stroke
BRUSH_WIDTH = (12 / 256, 40 / 256)  # of the shorter side


def make_masks(kind: str, *, seed: int, ids: Tensor, height: int, width: int) -> Tensor:
    """Masks, 255 where the image is missing.   ids: (B,) int64  ->  (B, height, width) uint8 of 0 and 255

    center: rows height/4 .. 3 height/4 - 1, columns alike; box: a rectangle of about 1/3 to 1/2 of each side, off the
    border; irregular: straight strokes, as thick as it takes to cover a share of the image uniform in 0.15..0.5;
    free_form: wandering brush strokes; hybrid: box and free_form together. Every mask has a hole.
    Raises ConfigError for another kind, DataError for images of less than 8 pixels a side.
    """
    if kind not in MASK_KINDS:
        raise ConfigError(f"mask={kind} is not known; choose one of {', '.join(MASK_KINDS)}")
    if min(height, width) < MIN_SIDE:
        raise DataError(
            f"a mask for an image of {height}x{width} pixels: it needs {MIN_SIDE} a side or more; "
            "leave the image out or raise the crop size"
        )
    if kind == "center":
        holes = torch.zeros((len(ids), height, width), dtype=torch.bool)
        holes[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
    elif kind == "irregular":
        holes = _irregular(seed, ids, height, width)
    else:
        parts = []
        if kind in ("box", "hybrid"):
            parts.append(_box(seed, ids, height, width))
        if kind in ("free_form", "hybrid"):
            parts.append(_free_form(seed, ids, height, width))
        holes = torch.stack(parts).any(0)
    return holes.to(torch.uint8) * 255


def _box(seed: int, ids: Tensor, height: int, width: int) -> Tensor:
    """(B, height, width) bool"""
    numbers = uniform(seed, "mask_box", ids, count=4)
    rows = _interval(numbers[:, 0:1], numbers[:, 1:2], height)
    columns = _interval(numbers[:, 2:3], numbers[:, 3:4], width)
    return rows[:, :, None] & columns[:, None, :]


def _interval(place: Tensor, shrink: Tensor, side: int) -> Tensor:
    """Half a side put somewhere between the margins, then shrunk at both ends.   place, shrink: (B, 1) in [0, 1)
    ->  (B, side) bool"""
    size, margin = side // 2, int(BOX_MARGIN * side)
    start = margin + (place * (side - 2 * margin - size + 1)).floor()
    inset = (shrink * (margin + 1)).floor()
    index = torch.arange(side)
    return (index >= start + inset) & (index < start + size - inset)


def _irregular(seed: int, ids: Tensor, height: int, width: int) -> Tensor:
    """The pixels nearest to a few lines, as many as the drawn share asks for.   ->  (B, height, width) bool"""
    strokes = IRREGULAR_STROKES
    numbers = uniform(seed, "mask_irregular", ids, count=5 * strokes + 1).float()
    corners = torch.tensor([height, width], dtype=torch.float32)
    ends = numbers[:, : 4 * strokes].view(-1, 2, strokes, 2) * corners
    thickness = 0.5 + numbers[:, 4 * strokes : 5 * strokes]
    distance = _squared_distance(ends[:, 0], ends[:, 1], thickness, height, width)
    pixels = height * width
    least, most = -int(-IRREGULAR_AREA[0] * pixels // 1), int(IRREGULAR_AREA[1] * pixels)
    counts = (least + (numbers[:, -1] * (most - least + 1)).long()).clamp(max=most)
    # Floats of one sign sort like their bits; the pixel's index below them leaves no ties, so the area is exact.
    keys = (distance.view(torch.int32).flatten(1).long() << 32) | torch.arange(pixels)
    limits = torch.stack([row.kthvalue(count).values for row, count in zip(keys, counts.tolist(), strict=True)])
    return (keys <= limits[:, None]).view(-1, height, width)


def _free_form(seed: int, ids: Tensor, height: int, width: int) -> Tensor:
    """Brush strokes that start anywhere and turn at random.   ->  (B, height, width) bool"""
    fewest, most = BRUSH_STEPS
    numbers = (
        uniform(seed, "mask_free_form", ids, count=BRUSHES * (2 * most + 4)).float().view(-1, BRUSHES, 2 * most + 4)
    )
    corners = torch.tensor([height, width], dtype=torch.float32)
    used = (fewest + (numbers[:, :, 2:3] * (most - fewest + 1)).floor()) > torch.arange(most)
    steps = (numbers[:, :, 4:].reshape(-1, BRUSHES, most, 2) - 0.5) * (corners / 2.0) * used[..., None]
    vertices = [numbers[:, :, :2] * corners]
    for step in steps.unbind(2):
        vertices.append((vertices[-1] + step).clamp(min=torch.zeros(2), max=corners))
    path = torch.stack(vertices, dim=2)  # (B, BRUSHES, most + 1, 2)
    thinnest, thickest = (0.5 * share * min(height, width) for share in BRUSH_WIDTH)
    # Half the diagonal of a pixel at least: wherever the brush stands, it covers the middle of some pixel.
    radius = (thinnest + (thickest - thinnest) * numbers[:, :, 3:4]).clamp(min=0.75).expand(-1, -1, most)
    starts, ends = path[:, :, :-1].flatten(1, 2), path[:, :, 1:].flatten(1, 2)
    return _squared_distance(starts, ends, radius.flatten(1), height, width) <= 1.0


def _squared_distance(starts: Tensor, ends: Tensor, units: Tensor, height: int, width: int) -> Tensor:
    """Squared distance of each pixel's middle to the nearest of S line segments, each measured in its own unit.

    starts, ends: (B, S, 2) float32 (row, column) in pixels; units: (B, S) float32  ->  (B, height, width) float32
    """
    middles = (torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5)
    nearest = torch.full((len(starts), height, width), torch.inf)
    for start, end, unit in zip(starts.unbind(1), ends.unbind(1), units.unbind(1), strict=True):
        # (B, H, 1) and (B, 1, W)
        from_row, from_column = (m - part.view(-1, 1, 1) for m, part in zip(middles, start.unbind(1), strict=True))
        down, right = (part.view(-1, 1, 1) for part in (end - start).unbind(1))
        square = (down * down + right * right).clamp(min=1e-12)
        along = (from_row * (down / square) + from_column * (right / square)).clamp_(0.0, 1.0)
        distance = (from_row - along * down).square_().add_((from_column - along * right).square_())
        nearest = torch.minimum(nearest, distance.div_(unit.square().view(-1, 1, 1)))
    return nearest
