"""One sample and the members of a tar: KEY.input.EXT, KEY.target.EXT, KEY.mask.EXT (with masks), KEY.json."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.decode import RAW_EXTENSION, Window, decode_image
from data_pipeline.errors import BadSample, ConfigError, DataError

FIELDS = ("input", "target", "mask")
CODECS = ("keep", "png", "webp", "jpeg", "raw")
JPEG_QUALITY = 95
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")  # a tar name without folders has room for 100 characters
MAX_PLAIN_KEY = 60


@dataclass(frozen=True)
class Sample:
    """A decoded sample.   input, target: (H, W, 3) uint8; mask: (H, W, 1) uint8; what the dataset lacks is None

    key: unique in its dataset, only [A-Za-z0-9_-]; name: what the user called it.
    """

    key: str
    name: str
    input: np.ndarray | None
    target: np.ndarray
    mask: np.ndarray | None


def make_key(name: str) -> str:
    """A key for a name: the name itself where it is plain and short, else what is plain of it and a hash.

    Raises DataError for a file name that is not UTF-8.
    """
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    if plain == name and len(name) <= MAX_PLAIN_KEY:
        return name
    try:
        data = name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the name {ascii(name)} is not UTF-8; rename the file") from error
    return f"{plain[:MAX_PLAIN_KEY]}-{hashlib.blake2b(data, digest_size=5).hexdigest()}"


def encode_image(image: np.ndarray, codec: str, *, quality: int = JPEG_QUALITY) -> tuple[str, bytes]:
    """Encode (H, W, 3) or (H, W, 1) uint8 pixels.   quality: of jpeg, 1 to 100  ->  (extension, bytes)

    One-channel images (masks) are stored without loss whatever the codec. Raises BadSample where the codec cannot hold
    the image (WebP ends at 16383 pixels a side).
    """
    buffer = io.BytesIO()
    if codec == "raw":
        np.save(buffer, np.ascontiguousarray(image), allow_pickle=False)
        return RAW_EXTENSION, buffer.getvalue()
    is_mask = image.shape[2] == 1
    picture = Image.fromarray(image[:, :, 0] if is_mask else image)
    try:
        if codec == "png" or is_mask:
            picture.save(buffer, format="PNG")
            return "png", buffer.getvalue()
        if codec == "webp":
            picture.save(buffer, format="WEBP", lossless=True, quality=50, method=4)
            return "webp", buffer.getvalue()
        if codec == "jpeg":
            picture.save(buffer, format="JPEG", quality=quality, subsampling=0)
            return "jpg", buffer.getvalue()
    except (OSError, ValueError) as error:
        raise BadSample(f"cannot be written as {codec}: {error}") from error
    raise ConfigError(f"--codec={codec} does not encode; choose one of {', '.join(CODECS[1:])}")


def encode_meta(*, key: str, name: str, width: int, height: int, tile: Mapping[str, Any] | None = None) -> bytes:
    """The KEY.json member; tile: where a tile lies in its image (index.Tile as a mapping)."""
    values = {"height": height, "key": key, "name": name, "width": width}
    return json.dumps(values if tile is None else {**values, "tile": dict(tile)}, ensure_ascii=True).encode()


def decode_member(
    key: str,
    field: str,
    member: tuple[str, bytes],
    *,
    shape: tuple[int, int],
    window: Window | None = None,
) -> np.ndarray:
    """An image of a sample, or a window of it.   member: (extension, bytes); shape: (H, W) of the whole image

    -> (H, W, 3) uint8, masks (H, W, 1). Raises BadSample, naming the member, for what cannot be read or has another
    shape.
    """
    extension, data = member
    try:
        return decode_image(data, extension, channels=1 if field == "mask" else 3, shape=shape, window=window)
    except BadSample as error:
        raise BadSample(f"{key}.{field}.{extension}: {error}") from error
