"""Windows of images: bit for bit those of the whole image, whichever decoder is installed."""

from __future__ import annotations

import importlib.util
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

from data_pipeline import decode
from data_pipeline.decode import FORMATS, Window, decode_image, read_jpeg_header, read_size
from data_pipeline.errors import BadSample
from data_pipeline.records import encode_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

needs_simplejpeg = pytest.mark.skipif(
    importlib.util.find_spec("simplejpeg") is None, reason="needs the package simplejpeg"
)
SIZES = ((97, 41), (33, 150), (64, 64), (1, 1))
ORIENTATION = 0x0112
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def noisy(seed: int, size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """Smooth colours with noise: neither flat nor incompressible.   size: (H, W) -> (H, W, channels) uint8"""
    noise = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    waves = [127 + 100 * np.sin(rows / (5 + 3 * c) + columns / (7 + c)) for c in range(channels)]
    return np.clip(np.stack(waves, 2) + noise.normal(0, 12, (*size, channels)), 0, 255).astype(np.uint8)


def exif(orientation: int) -> Image.Exif:
    values = Image.Exif()
    values[ORIENTATION] = orientation
    return values


def photograph_exif() -> Image.Exif:
    """What cameras write beside an orientation, with a block of their own."""
    values = exif(1)
    values[271], values[272], values[282], values[306] = "Maker", "Model", 72.0, "2020:01:02 03:04:05"
    values.get_ifd(0x8769)[37500] = bytes(range(256)) * 20
    return values


def exif_without_orientation() -> Image.Exif:
    values = Image.Exif()
    values[271] = "Maker"
    return values


def _save(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _rgb(form: str, **options: Any) -> Callable[[np.ndarray], bytes]:
    return lambda pixels: _save(Image.fromarray(pixels), form, **options)


def _mode(form: str, mode: str, **options: Any) -> Callable[[np.ndarray], bytes]:
    return lambda pixels: _save(Image.fromarray(pixels).convert(mode), form, **options)


def _palette(pixels: np.ndarray) -> bytes:
    return _save(Image.fromarray(pixels).quantize(32), "PNG", transparency=bytes(range(0, 256, 8)))


def _deep(pixels: np.ndarray) -> bytes:
    return _save(Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257), "PNG")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(pixels: np.ndarray, *, depth: int = 8, interlaced: bool = False, behind: bytes = b"") -> bytes:
    """A PNG written by hand: 16 bits a channel, Adam7, or chunks behind the pixels."""
    height, width = pixels.shape[:2]
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    raw = b""
    for top, left, down, right in passes if interlaced else ((0, 0, 1, 1),):
        part = pixels[top::down, left::right]
        values = part.astype(">u2") * 257 if depth == 16 else part
        raw += b"".join(b"\0" + np.ascontiguousarray(row).tobytes() for row in values if row.size)
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, interlaced))
    body = zlib.compress(raw)
    parts = [_chunk(b"IDAT", body[at : at + 1000]) for at in range(0, len(body), 1000)]
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(parts) + behind + _chunk(b"IEND", b"")


def _adobe(pixels: np.ndarray) -> bytes:
    """A JPEG that an Adobe segment declares to be YCbCr, without JFIF."""
    data = _save(Image.fromarray(pixels), "JPEG")
    start = 4 + struct.unpack_from(">H", data, 4)[0]
    return data[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01" + data[start:]


def _text(name: str, value: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(name, value)
    return info


def _tiff(pixels: np.ndarray, *, xmp: bytes, orientation: int = 0) -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[700], tags.tagtype[700] = xmp, 1
    if orientation:
        tags[ORIENTATION] = orientation
    return _save(Image.fromarray(pixels), "TIFF", tiffinfo=tags)


KINDS: dict[str, tuple[str, Callable[[np.ndarray], bytes]]] = {
    "jpeg 4:4:4": ("jpg", _rgb("JPEG", subsampling=0)),
    "jpeg 4:2:2": ("jpg", _rgb("JPEG", subsampling=1)),
    "jpeg 4:2:0": ("jpg", _rgb("JPEG", subsampling=2)),
    "jpeg restart markers": ("jpg", _rgb("JPEG", restart_marker_blocks=3)),
    "jpeg optimised": ("jpg", _rgb("JPEG", optimize=True)),
    "jpeg progressive": ("jpg", _rgb("JPEG", progressive=True)),
    "jpeg rgb": ("jpg", _rgb("JPEG", keep_rgb=True)),
    "jpeg gray": ("jpg", _mode("JPEG", "L")),
    "jpeg cmyk": ("jpg", _mode("JPEG", "CMYK")),
    "jpeg adobe": ("jpg", _adobe),
    "jpeg upside down": ("jpg", _rgb("JPEG", exif=exif(3))),
    "jpeg turned": ("jpg", _rgb("JPEG", exif=exif(6))),
    "jpeg turned by xmp": ("jpg", _rgb("JPEG", xmp=XMP)),
    "jpeg upright exif": ("jpg", _rgb("JPEG", exif=exif(1))),
    "jpeg exif of a camera": ("jpg", _rgb("JPEG", exif=photograph_exif())),
    "jpeg exif of a camera, turned by xmp": ("jpg", _rgb("JPEG", exif=exif_without_orientation(), xmp=XMP)),
    "jpeg upright xmp": ("jpg", _rgb("JPEG", xmp=XMP.replace(b"6", b"1"))),
    "jpeg exif without orientation": ("jpg", _rgb("JPEG", exif=exif_without_orientation())),
    "jpeg exif of several images": (
        "jpg",
        lambda pixels: _save(
            Image.fromarray(pixels),
            "MPO",
            save_all=True,
            append_images=[Image.fromarray(255 - pixels)],
            exif=photograph_exif(),
        ),
    ),
    "jpeg of several images": (
        "jpg",
        lambda pixels: _save(
            Image.fromarray(pixels), "MPO", save_all=True, append_images=[Image.fromarray(255 - pixels)]
        ),
    ),
    "png": ("png", _rgb("PNG")),
    "png rgba": ("png", _mode("PNG", "RGBA")),
    "png palette": ("png", _palette),
    "png gray": ("png", _mode("PNG", "L")),
    "png one bit": ("png", _mode("PNG", "1")),
    "png 16 bit gray": ("png", _deep),
    "png 16 bit colour": ("png", lambda pixels: _png(pixels, depth=16)),
    "png interlaced": ("png", lambda pixels: _png(pixels, interlaced=True)),
    "png turned": ("png", _rgb("PNG", exif=exif(8))),
    "png turned behind the pixels": (
        "png",
        lambda pixels: _png(pixels, behind=_chunk(b"eXIf", exif(6).tobytes()[6:])),
    ),
    "png turned by xmp": ("png", _rgb("PNG", pnginfo=_text("XML:com.adobe.xmp", XMP.decode()))),
    "webp": ("webp", _rgb("WEBP", lossless=True)),
    "bmp": ("bmp", _rgb("BMP")),
    "tiff": ("tif", _rgb("TIFF")),
    "tiff turned": ("tif", _rgb("TIFF", exif=exif(8))),
    "tiff turned by xmp": ("tif", lambda pixels: _tiff(pixels, xmp=XMP)),
    "tiff turned by its tag, not twice by xmp": ("tif", lambda pixels: _tiff(pixels, xmp=XMP, orientation=6)),
    "tiff deflated": ("tif", _rgb("TIFF", compression="tiff_adobe_deflate")),
    "ppm": ("ppm", _rgb("PPM")),
    "ppm 16 bit gray": ("ppm", lambda pixels: _save(Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257), "PPM")),
    "npy": ("npy", lambda pixels: encode_image(pixels, "raw")[1]),
}


def windows(noise: np.random.Generator, size: tuple[int, int], count: int) -> Iterator[Window]:
    """Corners, the whole, single pixels and random ones of an image of this (H, W)."""
    height, width = size
    yield Window(0, 0, height, width)
    yield Window(height - 1, width - 1, 1, 1)
    yield Window(0, 0, 1, 1)
    yield Window(height // 2, 0, height - height // 2, width)
    for _ in range(count):
        top, left = int(noise.integers(height)), int(noise.integers(width))
        yield Window(top, left, int(noise.integers(1, height - top + 1)), int(noise.integers(1, width - left + 1)))


@pytest.fixture(params=[pytest.param(True, marks=needs_simplejpeg), False], ids=["simplejpeg", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether simplejpeg decodes; without it as where it is not installed."""
    if not request.param:
        monkeypatch.setattr(decode, "_fast_jpeg_decoder", lambda: None)
    else:
        assert decode._fast_jpeg_decoder() is not None
    return bool(request.param)


def _whole(data: bytes, extension: str, channels: int = 3) -> np.ndarray:
    """The whole image by way of Pillow alone."""
    if extension == "npy":
        return decode_image(data, extension, channels=channels)
    return decode._decode_with_pillow(data, None, None, channels=channels)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_is_that_of_the_whole_image(kind: str, decoder: bool) -> None:
    extension, make = KINDS[kind]
    noise = np.random.default_rng(len(kind))
    for number, size in enumerate(SIZES):
        data = make(noisy(number, size))
        whole = _whole(data, extension)
        shape = whole.shape[:2]
        assert shape == read_size(data, extension) == (size[::-1] if "turned" in kind else size)
        assert np.array_equal(decode_image(data, extension, channels=3, shape=shape), whole)
        for window in windows(noise, shape, 8):
            part = decode_image(data, extension, channels=3, shape=shape, window=window)
            assert part.dtype == np.uint8 and np.array_equal(part, window.cut(whole)), window
        for wrong in ((shape[0] + 1, shape[1]), (shape[0], shape[1] + 1)):
            with pytest.raises(BadSample, match="the index says"):
                decode_image(data, extension, channels=3, shape=wrong, window=Window(0, 0, 1, 1))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "npy"])
def test_a_window_of_a_mask_is_that_of_the_whole_mask(kind: str) -> None:
    extension, make = KINDS[kind]
    data = make(noisy(1, (40, 56)))
    whole = _whole(data, extension, channels=1)
    for window in windows(np.random.default_rng(1), whole.shape[:2], 6):
        assert np.array_equal(decode_image(data, extension, channels=1, window=window), window.cut(whole))


def test_the_rows_below_a_window_are_not_decoded(decoder: bool) -> None:
    """Otherwise the tests above would show nothing about windows."""
    data = _save(Image.fromarray(noisy(0, (300, 64))), "JPEG", restart_marker_blocks=4)
    header = read_jpeg_header(data)
    assert header is not None and header.is_streamable and (header.height, header.width) == (300, 64)
    top = Window(0, 0, 40, 64)
    expected = top.cut(_whole(data, "jpg"))
    damaged = bytearray(data)
    damaged[-3000:-2] = b"\x55" * 2998
    assert not np.array_equal(_whole(bytes(damaged), "jpg"), _whole(data, "jpg"))
    assert np.array_equal(decode_image(bytes(damaged), "jpg", channels=3, window=top), expected)
    png = bytearray(_save(Image.fromarray(noisy(0, (300, 64))), "PNG", compress_level=1))
    png[-4000:-2000] = bytes(2000)
    with pytest.raises(BadSample):
        decode_image(bytes(png), "png", channels=3)


UPRIGHT_APP1 = [
    "jpeg upright exif",
    "jpeg exif of a camera",
    "jpeg upright xmp",
    "jpeg exif without orientation",
]


@pytest.mark.parametrize("kind", UPRIGHT_APP1)
def test_a_photograph_that_lies_upright_is_decoded_no_further_than_its_window(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EXIF and XMP alone cost no full decode: the rows asked for are those of a file without them."""
    asked: list[int] = []
    fast = decode._decode_jpeg_fast

    def spy(data: bytes, rows: int, width: int, *, is_short: bool) -> np.ndarray | None:
        asked.append(rows)
        return fast(data, rows, width, is_short=is_short)

    monkeypatch.setattr(decode, "_decode_jpeg_fast", spy)
    pixels, window = noisy(0, (300, 64)), Window(16, 8, 40, 50)
    for name in (kind, "jpeg 4:2:0"):
        data = KINDS[name][1](pixels)
        header = read_jpeg_header(data)
        assert header is not None and header.has_app1 is (name == kind)
        decode_image(data, "jpg", channels=3, window=window)
    assert len(asked) == 2 and asked[0] == asked[1] < 100


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_read_is_that_of_the_decoded_image(extension: str, orientation: int) -> None:
    data = _save(Image.fromarray(noisy(0, (10, 24))), FORMATS[extension], exif=exif(orientation))
    is_turned = orientation >= 5 and extension not in ("bmp", "ppm")  # which have no place for it
    expected = (24, 10) if is_turned else (10, 24)
    assert read_size(data, extension) == decode_image(data, extension, channels=3).shape[:2] == expected


GRAY = noisy(0, (10, 24), 1)[:, :, 0]


def _multiplied(pixels: np.ndarray) -> bytes:
    """A TIFF whose tag ExtraSamples says that its gray is multiplied by its transparency."""
    data = _save(Image.fromarray(pixels).convert("LA"), "TIFF")
    tag = struct.pack("<HHI", 338, 3, 1)
    assert data.count(tag + b"\2") == 1
    return data.replace(tag + b"\2", tag + b"\1")


PIXELS_REFUSED = {
    "float tiff": ("tif", lambda: _save(Image.fromarray(GRAY.astype(np.float32)), "TIFF")),
    "32 bit tiff": ("tif", lambda: _save(Image.fromarray(GRAY.astype(np.int32)), "TIFF")),
    "float ppm": ("ppm", lambda: _save(Image.fromarray(GRAY.astype(np.float32)), "PPM")),
    "tiff with multiplied transparency": ("tif", lambda: _multiplied(GRAY)),
}


@pytest.mark.parametrize("kind", PIXELS_REFUSED)
def test_pixels_that_are_not_decoded_have_no_size(kind: str) -> None:
    """Otherwise an index would list what nobody can read."""
    extension, make = PIXELS_REFUSED[kind]
    data = make()
    for read in (lambda: decode_image(data, extension, channels=3), lambda: read_size(data, extension)):
        with pytest.raises(BadSample, match="not supported; save the image with"):
            read()


@pytest.mark.parametrize("head", [b"P5 24 10 65535\n", b"P2 24 10 65535\n"])
def test_of_a_16_bit_gray_ppm_the_high_byte_is_kept(head: bytes) -> None:
    deep = GRAY.astype(np.uint16) * 256 + 255
    body = deep.astype(">u2").tobytes() if head.startswith(b"P5") else " ".join(map(str, deep.ravel())).encode()
    decoded = decode_image(head + body, "ppm", channels=3)
    assert np.array_equal(decoded, np.repeat(GRAY[:, :, None], 3, axis=2))


def _verdict(data: bytes, window: Window | None) -> np.ndarray | None:
    try:
        return decode_image(data, "jpg", channels=3, window=window)
    except BadSample:
        return None


def _mutate(noise: np.random.Generator, data: bytes) -> bytes:
    """A few changes of one sort, half of the time near the start, where the headers are."""
    mutated = bytearray(data)
    sort = noise.integers(6)
    for _ in range(noise.integers(1, 4)):
        end = len(mutated) if noise.random() < 0.5 else min(len(mutated), 700)
        at, other, length = (int(noise.integers(high)) for high in (end, end, 20))
        if sort == 0:
            mutated[at] = int(noise.integers(256))
        elif sort == 1:
            mutated[at] ^= 1 << int(noise.integers(8))
        elif sort == 2:
            del mutated[at : at + length]
        elif sort == 3:
            mutated[at:at] = noise.bytes(length)
        elif sort == 4:
            mutated[at] = 0xFF
        else:
            mutated[at : at + 16] = mutated[other : other + 16]
    return bytes(mutated)


def _compare_decoders(monkeypatch: pytest.MonkeyPatch, *, seed: int, cases: int) -> None:
    """Damaged JPEGs give the same pixels with and without simplejpeg, or are bad samples with both."""
    fast = decode._fast_jpeg_decoder()
    noise = np.random.default_rng(seed)
    kinds = [make for kind, (_, make) in KINDS.items() if kind.startswith("jpeg")]
    originals = [make(noisy(number, size)) for number, size in enumerate(((96, 40), (33, 47))) for make in kinds]
    bad = 0
    for _ in range(cases):
        data = _mutate(noise, originals[noise.integers(len(originals))])
        header = read_jpeg_header(data)
        window = None
        if header is not None and 0 < header.height < 500 and 0 < header.width < 500 and noise.random() < 0.7:
            *_, window = windows(noise, (header.height, header.width), 1)
        results = []
        for decoder in (fast, None):
            monkeypatch.setattr(decode, "_fast_jpeg_decoder", lambda decoder=decoder: decoder)
            results.append(_verdict(data, window))
        if results[0] is None or results[1] is None:
            assert results[0] is results[1], (header, window, data.hex())
            bad += 1
        else:
            assert np.array_equal(results[0], results[1]), (header, window, data.hex())
    assert cases // 10 < bad < cases


@needs_simplejpeg
def test_damaged_jpegs_are_the_same_with_and_without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    _compare_decoders(monkeypatch, seed=1, cases=2500)


@needs_simplejpeg
@pytest.mark.slow
def test_many_damaged_jpegs_are_the_same_with_and_without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    _compare_decoders(monkeypatch, seed=2, cases=25_000)


@needs_simplejpeg
def test_what_simplejpeg_gives_up_on_is_never_left_over_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan that names a Huffman table which is not there fails before its first row; simplejpeg says nothing where
    it had to warn of something else before, here of a scan without the highest frequencies."""
    data = _save(Image.fromarray(noisy(0, (96, 40))), "JPEG")
    scan = data.index(b"\xff\xda")
    broken = data[: scan + 6] + b"\x33" + data[scan + 7 : scan + 12] + b"\x32" + data[scan + 13 :]
    with pytest.raises(BadSample):
        decode_image(broken, "jpg", channels=3, window=Window(0, 0, 8, 8))
    # An image whose rows have the very colour that marks rows not reached is left to Pillow, not refused.
    flat = _save(Image.fromarray(np.full((64, 16, 3), decode.UNLIKELY_COLOUR, np.uint8)), "JPEG", quality=100)
    assert np.array_equal(decode_image(flat, "jpg", channels=3, window=Window(0, 0, 8, 8)), _whole(flat, "jpg")[:8, :8])


def test_real_photographs_have_the_same_windows(shared_data: Path, decoder: bool) -> None:
    noise = np.random.default_rng(3)
    paths = [path for extension in ("jpg", "JPG", "png") for path in sorted(shared_data.rglob(f"*.{extension}"))[::40]]
    assert len(paths) > 5
    for path in paths[:14]:
        data, extension = path.read_bytes(), path.suffix.lower()[1:]
        whole = _whole(data, extension)
        assert read_size(data, extension) == whole.shape[:2]
        for window in windows(noise, whole.shape[:2], 3):
            assert np.array_equal(decode_image(data, extension, channels=3, window=window), window.cut(whole))


def test_reading_a_size_does_not_unpack_the_pixels() -> None:
    data = bytearray(_save(Image.fromarray(noisy(0, (64, 48))), "PNG"))
    data[200:300] = bytes(100)
    assert read_size(bytes(data), "png") == (64, 48)
    with pytest.raises(BadSample):
        decode_image(bytes(data), "png", channels=3)


@pytest.mark.parametrize(
    "header", ["-" * 9000 + "1", "(" * 9000, "1+" * 4000 + "1", "{'descr':" + "[" * 190 + "]" * 190]
)
def test_an_npy_header_is_not_evaluated(header: str) -> None:
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    for read in (lambda: decode_image(data, "npy", channels=3), lambda: read_size(data, "npy")):
        with pytest.raises(BadSample, match="npy images must be uint8"):
            read()


def test_an_npy_cut_at_any_byte_is_a_bad_sample() -> None:
    _, data = encode_image(noisy(0, (3, 4)), "raw")
    for length in range(len(data)):
        with pytest.raises(BadSample):
            decode_image(data[:length], "npy", channels=3)
