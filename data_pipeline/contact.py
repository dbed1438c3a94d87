"""Contact sheets: samples of a dataset in rows of input, target, their difference and mask, with names and sizes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.records import Sample

CELL = 256  # pixels a side that a picture may take
GAP = 12
LABEL, HEAD = 22, 26  # pixels of height of a row's label and of the heading
FONT_SIZE = 14
PAPER, INK, FAINT = (250, 250, 248), (28, 32, 40), (110, 118, 130)
MAX_GAIN = 16.0
BUSY = 99.0  # percentile of the difference that is made to fill the range


def amplified_difference(degraded: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    """input - target around middle gray, amplified so that it shows.   degraded, target: (H, W, 3) uint8
    ->  (H, W, 3) uint8, gain: a power of two from 1 to MAX_GAIN"""
    residual = degraded.astype(np.float32) - target
    size = float(np.percentile(np.abs(residual), BUSY))
    gain = 1.0
    while gain < MAX_GAIN and 2.0 * gain * size <= 127.0:
        gain *= 2.0
    return np.clip(np.rint(128.0 + gain * residual), 0, 255).astype(np.uint8), gain


def contact_sheet(samples: Sequence[Sample], *, title: str) -> Image.Image:
    """A row for each sample: input, target, difference and mask, as far as the dataset has them. Images above CELL
    pixels are reduced, small ones enlarged by a whole factor."""
    font = ImageFont.load_default(size=FONT_SIZE)
    rows = [(_label(sample), _pictures(sample)) for sample in samples]
    num_columns = max(len(pictures) for _, pictures in rows)
    heights = [max(picture.height for _, picture in pictures) for _, pictures in rows]
    width = GAP + num_columns * (CELL + GAP)
    sheet = Image.new("RGB", (width, GAP + HEAD + sum(heights) + len(rows) * (2 * LABEL + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), _fitted(title, width - 2 * GAP, font), INK, font=font)
    top = GAP + HEAD
    for (label, pictures), height in zip(rows, heights, strict=True):
        pen.text((GAP, top), _fitted(label, width - 2 * GAP, font), INK, font=font)
        for column, (caption, picture) in enumerate(pictures):
            left = GAP + column * (CELL + GAP)
            sheet.paste(picture, (left, top + LABEL))
            pen.text((left, top + LABEL + height + 2), caption, FAINT, font=font)
        top += height + 2 * LABEL + GAP
    return sheet


def encode_sheet(sheet: Image.Image) -> bytes:
    """A sheet as a PNG file."""
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _label(sample: Sample) -> str:
    height, width = sample.target.shape[:2]
    return f"{sample.key}   {width}x{height}"


def _pictures(sample: Sample) -> list[tuple[str, Image.Image]]:
    """Captions and pictures of a row."""
    pictures = [("target", sample.target)]
    if sample.input is not None:
        difference, gain = amplified_difference(sample.input, sample.target)
        pictures = [("input", sample.input), *pictures, (f"input - target, x{gain:g}", difference)]
    if sample.mask is not None:
        pictures.append(("mask", np.repeat(sample.mask, 3, axis=2)))
    return [(caption, _scaled(image)) for caption, image in pictures]


def _scaled(image: np.ndarray) -> Image.Image:
    """(H, W, 3) uint8  ->  a picture of at most CELL pixels a side"""
    picture = Image.fromarray(image)
    factor = CELL // max(picture.size)
    if factor > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return picture


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, its middle left out where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    kept = len(text) - 1
    while kept > 2 and font.getlength(f"{text[: kept // 2]}...{text[-(kept // 2) :]}") > width:
        kept -= 1
    return f"{text[: kept // 2]}...{text[-(kept // 2) :]}"
