"""The pictures of a report: which images are shown, side by side, as data: URIs."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MAX_IMAGES = 24
MAX_SIDE = 640  # larger images are shown reduced
PNG_BYTES = 64 * 1024  # what compresses worse than this is shown as JPEG
SIDES = ("input", "restored", "target")


@dataclass(frozen=True)
class ReportImage:
    """One held-out image; input, restored, target: (H, W, 3) uint8 of one size."""

    key: str
    input: np.ndarray
    restored: np.ndarray
    target: np.ndarray


def load_report_images(report: Mapping[str, Any], *, images_dir: Path, limit: int = MAX_IMAGES) -> list[ReportImage]:
    """Up to `limit` images of an evaluation that kept its results as `images_dir`/KEY.png, by key.

    Of more images those evenly spread from the lowest to the highest PSNR are taken. A file that is not the result of
    this evaluation (another sha256 than in the report) is left out.
    """
    from data_pipeline.preprocess import Preprocess
    from data_pipeline.reader import Dataset

    kept = [row for row in report["images"] if (images_dir / f"{row['key']}.png").is_file()]
    if not kept:
        return []
    chosen = {row["key"]: row for row in _spread(kept, limit)}
    uri = report["data"]["uri"]
    dataset, preprocess = Dataset(uri), Preprocess(**report["sampler"]["preprocess"])
    images = []
    for entry in dataset.images():
        row = chosen.get(entry.key)
        if row is None:
            continue
        restored = np.asarray(Image.open(images_dir / f"{entry.key}.png").convert("RGB"))
        if hashlib.sha256(restored.tobytes()).hexdigest() != row["restored_sha256"]:
            continue
        sample = dataset.whole(entry)
        assert sample.input is not None, "what was restored has an input"
        sides = [sample.input, sample.target]
        if preprocess.resize:  # shown as they were scored
            sides = [preprocess.apply(side, field="target") for side in sides]
        images.append(ReportImage(entry.key, sides[0], restored, sides[1]))
    return images


def _spread(rows: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """At most `limit` rows, evenly spread over their PSNR, with the lowest and the highest."""
    if len(rows) <= limit:
        return list(rows)
    ranked = sorted(rows, key=lambda row: (float(row["psnr"]), row["key"]))
    last = len(ranked) - 1
    return [ranked[round(i * last / max(1, limit - 1))] for i in range(limit)]


def gallery(report: Mapping[str, Any], images: Sequence[ReportImage]) -> str:
    """Cards of input, restored and target, with the scores of the report's row; "" for no images."""
    if not images:
        return ""
    rows = {row["key"]: row for row in report["images"]}
    cards = "".join(_card(image, rows[image.key]) for image in images[:MAX_IMAGES])
    shown = min(len(images), MAX_IMAGES)
    note = f"{shown} of {len(rows)} images. Click one to compare two sides with a slider."
    if any(max(image.target.shape[:2]) > MAX_SIDE for image in images[:MAX_IMAGES]):
        note += f" Images above {MAX_SIDE} pixels are shown reduced."
    note += " Scores belong to the exact 8-bit results, whatever is shown."
    return f'<h2>Images</h2><p class="note">{note}</p><div class="cards">{cards}</div>'


def _card(image: ReportImage, row: Mapping[str, Any]) -> str:
    name = escape(str(row.get("name") or image.key), quote=True)
    captions = {
        "input": f"<b>input</b> {decimals(row['input_psnr'], 2)} dB, SSIM {decimals(row['input_ssim'], 3)}",
        "restored": f"<b>restored</b> {decimals(row['psnr'], 2)} dB, SSIM {decimals(row['ssim'], 3)}",
        "target": "<b>target</b>",
    }
    figures = "".join(
        f'<figure><button aria-label="compare {side} of {name}"><img data-side="{side}" alt="{side} of {name}" '
        f'src="{data_uri(getattr(image, side))}"></button><figcaption>{captions[side]}</figcaption></figure>'
        for side in SIDES
    )
    header = (
        f"<header><b>{name}</b><span>{row['width']}x{row['height']}</span><span>{gain(row):+.2f} dB</span></header>"
    )
    return f'<article class="card" data-name="{name}">{header}<div class="triple">{figures}</div></article>'


def data_uri(image: np.ndarray) -> str:
    """(H, W, 3) uint8 -> a data: URI, reduced to MAX_SIDE; PNG, or JPEG where PNG is large."""
    picture = Image.fromarray(image)
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "png"
    picture.save(buffer, "PNG", optimize=True)
    if buffer.tell() > PNG_BYTES:
        buffer, kind = io.BytesIO(), "jpeg"
        picture.save(buffer, "JPEG", quality=92, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def gain(row: Mapping[str, Any]) -> float:
    """PSNR gained on the input, in dB."""
    return float(row["psnr"]) - float(row["input_psnr"])


def decimals(value: Any, digits: int) -> str:
    """A number, or what float() reads, as text; "-" for None."""
    return "-" if value is None else f"{float(value):.{digits}f}"
