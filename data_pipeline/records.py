"""One sample and the members of a tar: KEY.input.EXT, KEY.target.EXT, KEY.mask.EXT (with masks), KEY.json.

Everything here may be fed with bytes nobody vouches for: no pickle, known image formats only, bounded image sizes.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.errors import BadSample, ConfigError

FIELDS = ("input", "target", "mask")
FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "webp": "WEBP",
    "bmp": "BMP",
    "tif": "TIFF",
    "tiff": "TIFF",
    "ppm": "PPM",
}
RAW_EXTENSION = "npy"
CODECS = ("keep", "png", "webp", "jpeg", "raw")
JPEG_QUALITY = 95
MAX_PIXELS = 1 << 26  # Pillow itself warns of decompression bombs from 1.3 times as many
MAX_SIDE = (1 << 16) - 1  # counted random numbers address rows and columns with 16 bits
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")  # a tar name without folders has room for 100 characters
EXIF_ORIENTATION = 0x0112

# What Pillow's readers raise on damaged files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Sample:
    """A decoded sample.   input, target: (H, W, 3) uint8; mask: (H, W, 1) uint8 or None

    key: unique in its dataset, only [A-Za-z0-9_-]; name: what the user called it.
    """

    key: str
    name: str
    input: np.ndarray
    target: np.ndarray
    mask: np.ndarray | None


def decode_image(data: bytes, extension: str, *, channels: int) -> np.ndarray:
    """Pixels of an encoded image.   -> (H, W, channels) uint8; channels: 3 for images, 1 for masks

    The EXIF orientation is applied. Gray, palette, CMYK and other colour modes are converted to RGB; transparency is
    dropped, not blended; of 16-bit values the high byte is kept. Masks are the luma of what they hold.
    Raises BadSample for anything unreadable, larger than MAX_PIXELS or with 32-bit pixels.
    """
    if extension == RAW_EXTENSION:
        return _decode_raw(data, channels=channels)
    if extension not in FORMATS:
        raise BadSample(f"image format .{extension} is not supported")
    try:
        # Our formats only, whatever the extension says: Pillow's others include ones that run programs (EPS).
        with Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values()))) as image:
            width, height = image.size
            _check_size(width, height)
            return _to_array(image, channels=channels)
    except UnidentifiedImageError as error:
        raise BadSample(f"not a readable {extension} image: its content is of no known format") from error
    except DECODE_ERRORS as error:
        raise BadSample(f"not a readable {extension} image: {' '.join(str(error).split())}") from error


def encode_image(image: np.ndarray, codec: str) -> tuple[str, bytes]:
    """Encode (H, W, 3) or (H, W, 1) uint8 pixels.   -> (extension, bytes)

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
            picture.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
            return "jpg", buffer.getvalue()
    except (OSError, ValueError) as error:
        raise BadSample(f"cannot be written as {codec}: {error}") from error
    raise ConfigError(f"--codec={codec} does not encode; choose one of {', '.join(CODECS[1:])}")


def encode_meta(*, key: str, name: str, width: int, height: int) -> bytes:
    """The KEY.json member."""
    return json.dumps({"height": height, "key": key, "name": name, "width": width}, ensure_ascii=True).encode()


def decode_images(
    key: str, members: Mapping[str, tuple[str, bytes]], *, width: int, height: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(field, pixels) of a sample's images, one after the other.   members: field -> (extension, bytes)

    One at a time, so that who keeps no more than a window lets the allocator use the same memory again: holding two
    512x512 images cost 1 ms of page faults a pair. Raises BadSample, naming the member, for what cannot be read or has
    another size.
    """
    for field, (extension, data) in members.items():
        yield field, _decode_member(f"{key}.{field}.{extension}", data, extension, field=field, shape=(height, width))


def _decode_member(name: str, data: bytes, extension: str, *, field: str, shape: tuple[int, int]) -> np.ndarray:
    try:
        image = decode_image(data, extension, channels=1 if field == "mask" else 3)
    except BadSample as error:
        raise BadSample(f"{name}: {error}") from error
    if image.shape[:2] != shape:
        raise BadSample(f"{name} is {image.shape[1]}x{image.shape[0]}, the index says {shape[1]}x{shape[0]}")
    return image


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadSample(f"{width}x{height} pixels; at most {MAX_PIXELS} pixels and {MAX_SIDE} a side are allowed")


def _to_array(image: Image.Image, *, channels: int) -> np.ndarray:
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadSample("32-bit pixels are not supported; save the image with 8 or 16 bits a channel")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette's transparency is resolved here, without Pillow's warning
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        # To luma by way of RGB: CMYK and friends have no direct way.
        image = image.convert("RGB").convert(mode)
    array = np.asarray(image)
    return array[:, :, None] if channels == 1 else array


def _decode_raw(data: bytes, *, channels: int) -> np.ndarray:
    """(H, W, channels) uint8 of an .npy file; its header is checked before anything is allocated."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise BadSample(f"npy format {version[0]}.{version[1]} is not supported")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, SyntaxError, TypeError, EOFError) as error:
        raise BadSample(f"not a readable npy image: {' '.join(str(error).split())}") from error
    if dtype != np.uint8 or is_fortran or len(shape) != 3 or shape[2] != channels:
        raise BadSample(f"npy images must be uint8 of shape (height, width, {channels}), not {dtype} {shape}")
    _check_size(shape[1], shape[0])
    pixels = np.frombuffer(data, dtype=np.uint8, offset=stream.tell())
    if pixels.size != shape[0] * shape[1] * channels:
        raise BadSample(f"npy image of {pixels.size} bytes, its header says {shape}")
    return pixels.reshape(shape)
