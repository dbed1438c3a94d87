"""From encoded bytes to pixels, or to the pixels of one window, without decoding the rows below it.

Everything here may be fed with bytes nobody vouches for: no pickle, known image formats only, bounded image sizes.
What a window holds, and whether an image counts as damaged, does not depend on which optional decoder is installed:
simplejpeg either gives the pixels that Pillow gives or leaves the image to Pillow.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from data_pipeline.errors import BadSample

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
PILLOW_FORMATS = tuple(sorted(set(FORMATS.values())))
RAW_EXTENSION = "npy"
NPY_START = b"\x93NUMPY\x01\x00"
NPY_HEADER = re.compile(
    rb"\{ *'descr': *'[|<>=]u1', *'fortran_order': *False,"
    rb" *'shape': *\((\d{1,9}), *(\d{1,9}), *(\d{1,9}),?\) *,? *\}\s*"
)
MAX_PIXELS = 1 << 26  # Pillow itself warns of decompression bombs from 1.3 times as many
MAX_SIDE = (1 << 16) - 1  # counted random numbers address rows and columns with 16 bits
EXIF_ORIENTATION = 0x0112
TURNING_ORIENTATIONS = (5, 6, 7, 8)  # they swap width and height

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

# What a PNG that has an orientation contains: the eXIf chunk, or a text chunk with one of these names.
PNG_ORIENTATION_MARKS = (b"eXIf", b"exif", b"xmp")
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
SOF_SEQUENTIAL = (0xC0, 0xC1)  # every row complete when it comes
SOF_HUFFMAN = (*SOF_SEQUENTIAL, 0xC2)
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in the coded pixels: all but stuffing, restarts and filling
JPEG_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD9))
# Rows decoded below a window: one MCU row of the coarsest subsampling, so that chroma upsampling sees its neighbours.
JPEG_MCU_ROWS = 16


UNLIKELY_COLOUR = (1, 254, 3)


class Window(NamedTuple):
    """A part of an upright image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        return self.top + self.height

    @property
    def right(self) -> int:
        return self.left + self.width

    def cut(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) -> (height, width, C), a view"""
        return image[self.top : self.bottom, self.left : self.right]


class JpegHeader(NamedTuple):
    """What decides how a JPEG is decoded. height_at: where its height stands in the file; is_streamable: rows come in
    order in a single scan and nothing but the end follows, so that decoding may end early; has_app1: it has EXIF or
    XMP data, both of which may hold an orientation, and hold none or 1 in most photographs."""

    height: int
    width: int
    height_at: int
    num_components: int
    is_streamable: bool
    has_app1: bool


def decode_image(
    data: bytes,
    extension: str,
    *,
    channels: int,
    shape: tuple[int, int] | None = None,
    window: Window | None = None,
) -> np.ndarray:
    """Pixels of an encoded image, or of a window of it.   -> (H, W, channels) uint8; channels: 3 images, 1 masks

    The EXIF orientation is applied. Gray, palette, CMYK and other colour modes are converted to RGB; transparency is
    dropped, not blended; of 16-bit values the high byte is kept (colour PPM: the nearest of 256 levels). Masks are the
    luma of what they hold. shape: (H, W) the upright image must have. Damage in rows below a window may go unnoticed.
    Raises BadSample for anything unreadable, of another shape, larger than MAX_PIXELS or with 32-bit pixels.
    """
    if extension == RAW_EXTENSION:
        return _cut(_decode_raw(data, channels=channels), shape, window)
    if extension not in FORMATS:
        raise BadSample(f"image format .{extension} is not supported")
    try:
        if channels == 3 and data.startswith(JPEG_START):
            return _decode_jpeg(data, shape, window)
        if data.startswith(b"\x89PNG"):
            return _decode_png(data, shape, window, channels=channels)
        return _decode_with_pillow(data, shape, window, channels=channels)
    except UnidentifiedImageError as error:
        raise BadSample(f"not a readable {extension} image: its content is of no known format") from error
    except DECODE_ERRORS as error:
        raise BadSample(f"not a readable {extension} image: {' '.join(str(error).split())}") from error


def read_size(data: bytes, extension: str) -> tuple[int, int]:
    """(height, width) of the upright image, from its header; raises BadSample as decode_image does."""
    if extension == RAW_EXTENSION:
        (height, width, _), _ = _parse_raw_header(data)
        return height, width
    if extension not in FORMATS:
        raise BadSample(f"image format .{extension} is not supported")
    try:
        with _open(data) as image:
            if image.format == "PNG" and not any(mark in data for mark in PNG_ORIENTATION_MARKS):
                return image.height, image.width  # Pillow would unpack the pixels to look behind them
            is_turned = _orientation(image) in TURNING_ORIENTATIONS
            return (image.width, image.height) if is_turned else (image.height, image.width)
    except UnidentifiedImageError as error:
        raise BadSample(f"not a readable {extension} image: its content is of no known format") from error
    except DECODE_ERRORS as error:
        raise BadSample(f"not a readable {extension} image: {' '.join(str(error).split())}") from error


def _open(data: bytes) -> Image.Image:
    # Our formats only, whatever the extension says: Pillow's others include ones that run programs (EPS).
    image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    check_size(*image.size)
    _check_mode(image)
    return image


def _check_mode(image: Image.Image) -> None:
    """Raise BadSample for pixels that _to_array has no way for."""
    # A PPM opens in 32 bits when it has more than 8, and its values then reach up to 65535.
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise BadSample("32-bit pixels are not supported; save the image with 8 or 16 bits a channel")
    if image.mode == "La":
        raise BadSample("gray multiplied by its transparency is not supported; save the image without transparency")


def check_size(width: int, height: int) -> None:
    """Raise BadSample for an image too large to be decoded safely."""
    if width < 1 or height < 1 or width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadSample(f"{width}x{height} pixels; at most {MAX_PIXELS} pixels and {MAX_SIDE} a side are allowed")


def _check_shape(height: int, width: int, shape: tuple[int, int] | None) -> None:
    if shape is not None and shape != (height, width):
        raise BadSample(f"it is {width}x{height}, the index says {shape[1]}x{shape[0]}")


def _cut(image: np.ndarray, shape: tuple[int, int] | None, window: Window | None) -> np.ndarray:
    _check_shape(image.shape[0], image.shape[1], shape)
    return image if window is None else window.cut(image)


def _decode_with_pillow(
    data: bytes, shape: tuple[int, int] | None, window: Window | None, *, channels: int
) -> np.ndarray:
    with _open(data) as image:
        upright = _upright(image)
        _check_shape(upright.height, upright.width, shape)
        return _to_array(_crop(upright, window), channels=channels)


def _crop(image: Image.Image, window: Window | None) -> Image.Image:
    if window is None:
        return image
    return image.crop((window.left, window.top, window.right, window.bottom))


def _orientation(image: Image.Image) -> object:
    """The EXIF orientation that Pillow leaves to be applied, 1 for none; a damaged one may be anything."""
    # Pillow gives the size of a TIFF as it will be upright, and turns it by its own tag when it loads it.
    if isinstance(image, TiffImagePlugin.TiffImageFile) and EXIF_ORIENTATION in image.tag_v2:
        return 1
    return image.getexif().get(EXIF_ORIENTATION, 1)


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image


def _to_array(image: Image.Image, *, channels: int) -> np.ndarray:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette's transparency is resolved here, without Pillow's warning
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        # To luma by way of RGB: CMYK and friends have no direct way.
        image = image.convert("RGB").convert(mode)
    array = np.asarray(image)
    return array[:, :, None] if channels == 1 else array


def _decode_png(data: bytes, shape: tuple[int, int] | None, window: Window | None, *, channels: int) -> np.ndarray:
    """A PNG's rows come from the top: those below the window are not unpacked."""
    if window is None:
        return _decode_with_pillow(data, shape, window, channels=channels)
    with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
        check_size(*image.size)
        rows = image.tile[0] if len(image.tile) == 1 else None
        if rows is None or rows.codec_name != "zip" or image.info.get("interlace") or image.n_frames > 1:
            return _decode_with_pillow(data, shape, window, channels=channels)
        image.tile = [rows._replace(extents=(0, 0, image.width, min(window.bottom, image.height)))]
        image.load()
        # The orientation may stand behind the pixels, so it is known only now.
        if _orientation(image) != 1:
            return _decode_with_pillow(data, shape, window, channels=channels)
        _check_shape(image.height, image.width, shape)
        return _to_array(_crop(image, window), channels=channels)


def _decode_jpeg(data: bytes, shape: tuple[int, int] | None, window: Window | None) -> np.ndarray:
    """A JPEG whose rows come in order is told to end below the window: it is decoded with a smaller height."""
    header = read_jpeg_header(data)
    if header is None or header.num_components != 3 or not data.endswith(JPEG_END):
        return _decode_with_pillow(data, shape, window, channels=3)
    if header.has_app1:
        with _open(data) as photograph:
            if _orientation(photograph) != 1:
                return _decode_with_pillow(data, shape, window, channels=3)
    check_size(header.width, header.height)
    _check_shape(header.height, header.width, shape)
    rows = header.height
    if window is not None and header.is_streamable:
        rows = min(rows, -(-window.bottom // JPEG_MCU_ROWS) * JPEG_MCU_ROWS + JPEG_MCU_ROWS)
        data = data[: header.height_at] + struct.pack(">H", rows) + data[header.height_at + 2 :]
    image = _decode_jpeg_fast(data, rows, header.width, is_short=rows < header.height)
    if image is None:  # Pillow decides what a damaged file is
        return _decode_with_pillow(data, None, window, channels=3)
    return image if window is None else window.cut(image)


def _decode_jpeg_fast(data: bytes, rows: int, width: int, *, is_short: bool) -> np.ndarray | None:
    """(rows, width, 3) uint8; None where there is no fast decoder or it finds anything odd.

    is_short: pixels follow behind the last row. The decoder counts that as damage, so that it has to be told to give
    what it has whatever happened; its last row then shows whether it got there.
    """
    fast = _fast_jpeg_decoder()
    if fast is None:
        return None
    pixels = np.empty((rows, width, 3), np.uint8)
    pixels[-1] = UNLIKELY_COLOUR
    try:
        fast(data, "RGB", buffer=pixels, strict=not is_short)
    except ValueError:
        return None
    return None if (pixels[-1] == UNLIKELY_COLOUR).all() else pixels


@functools.cache
def _fast_jpeg_decoder() -> Callable[..., Any] | None:
    """simplejpeg's decoder where the package is installed: the same libjpeg-turbo pixels without Pillow's copies."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg.decode_jpeg


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Walk the marker segments up to the first scan; None for anything unusual."""
    height = width = height_at = num_components = 0
    is_sequential = has_app1 = False
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in JPEG_WITHOUT_LENGTH:
            return None
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker == 0xDA:
            if not height or at + 5 > len(data):
                return None
            is_streamable = is_sequential and data[at + 4] == num_components and _is_last_scan(data, at + 2 + length)
            return JpegHeader(height, width, height_at, num_components, is_streamable, has_app1)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in SOF_HUFFMAN or height or at + 10 > len(data) or data[at + 4] != 8:
                return None
            height_at = at + 5
            height, width, num_components = struct.unpack_from(">HHB", data, height_at)
            is_sequential = marker in SOF_SEQUENTIAL
        elif marker == 0xE1:
            has_app1 = True
        at += 2 + length
    return None


def _is_last_scan(data: bytes, start: int) -> bool:
    """Whether no marker but the end of the image follows from `start`.

    Decoders look at what is behind the last row they were asked for, and differ in what they say of strange markers.
    """
    marker = JPEG_MARKER.search(data, start)
    return marker is not None and marker.start() == len(data) - len(JPEG_END) and data.endswith(JPEG_END)


def _parse_raw_header(data: bytes) -> tuple[tuple[int, int, int], int]:
    """((height, width, channels), where the pixels start) of an .npy file.

    numpy's own reader evaluates the header as Python, which costs any amount of memory on a hostile one.
    """
    if not data.startswith(NPY_START) or len(data) < len(NPY_START) + 2:
        raise BadSample("not a readable npy image: it does not start as npy format 1.0 does")
    start = len(NPY_START) + 2
    end = start + int.from_bytes(data[start - 2 : start], "little")
    header = NPY_HEADER.fullmatch(data, start, end)
    if header is None or end > len(data):
        shown = ascii(data[start : min(end, start + 80)].decode("latin-1").strip())
        raise BadSample(f"npy images must be uint8 of shape (height, width, channels) in C order, not {shown}")
    height, width, channels = map(int, header.groups())
    check_size(width, height)
    return (height, width, channels), end


def _decode_raw(data: bytes, *, channels: int) -> np.ndarray:
    """(H, W, channels) uint8 of an .npy file."""
    shape, start = _parse_raw_header(data)
    if shape[2] != channels:
        raise BadSample(f"npy images must be uint8 of shape (height, width, {channels}), not {shape}")
    pixels = np.frombuffer(data, dtype=np.uint8, offset=start)
    if pixels.size != shape[0] * shape[1] * channels:
        raise BadSample(f"npy image of {pixels.size} bytes, its header says {shape}")
    return pixels.reshape(shape)
