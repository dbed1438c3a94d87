"""Reading and writing images: what every kind of file becomes, and what is refused."""

from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import MAX_PIXELS, Window, decode_image
from data_pipeline.errors import BadSample, ConfigError
from data_pipeline.records import JPEG_QUALITY, decode_member, encode_image
from tests.support.datasets import random_image

# Pillow warns of odd tags in the TIFF files that these tests damage.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

RGB = random_image(1, (24, 40))
MASK = (random_image(2, (24, 40), channels=1) > 127).astype(np.uint8) * 255


def _saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("codec", ["png", "webp", "raw"])
def test_lossless_codecs_give_the_pixels_back(codec: str) -> None:
    extension, data = encode_image(RGB, codec)
    assert np.array_equal(decode_image(data, extension, channels=3), RGB)


@pytest.mark.parametrize("codec", ["png", "webp", "jpeg", "raw"])
def test_masks_are_stored_without_loss_by_every_codec(codec: str) -> None:
    extension, data = encode_image(MASK, codec)
    assert np.array_equal(decode_image(data, extension, channels=1), MASK)


def test_jpeg_is_close_and_keeps_full_colour_resolution() -> None:
    extension, data = encode_image(RGB, "jpeg")
    assert extension == "jpg" and JPEG_QUALITY == 95
    assert np.abs(decode_image(data, extension, channels=3).astype(int) - RGB).mean() < 4.0


def test_a_codec_that_encodes_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--codec=keep"):
        encode_image(RGB, "keep")


def test_a_transparent_image_loses_its_alpha_only() -> None:
    rgba = np.concatenate([RGB, MASK], axis=2)
    assert np.array_equal(decode_image(_saved(Image.fromarray(rgba), "PNG"), "png", channels=3), RGB)


def test_gray_becomes_three_equal_channels() -> None:
    decoded = decode_image(_saved(Image.fromarray(RGB[:, :, 0]), "PNG"), "png", channels=3)
    assert np.array_equal(decoded, np.repeat(RGB[:, :, :1], 3, axis=2))


def test_a_palette_image_becomes_its_colours() -> None:
    palette = Image.fromarray(RGB).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(decode_image(_saved(palette, "PNG"), "png", channels=3), expected)
    assert np.array_equal(decode_image(_saved(palette, "PNG", transparency=bytes(16)), "png", channels=3), expected)


def test_cmyk_becomes_rgb() -> None:
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    data = _saved(Image.fromarray(flat).convert("CMYK"), "JPEG", quality=100)
    decoded = decode_image(data, "jpg", channels=3)
    assert decoded.shape == (16, 16, 3) and np.abs(decoded.astype(int) - flat).max() <= 4


def test_of_16_bits_the_high_byte_is_kept() -> None:
    deep = RGB[:, :, 0].astype(np.uint16) * 256 + 255
    decoded = decode_image(_saved(Image.fromarray(deep), "PNG"), "png", channels=3)
    assert np.array_equal(decoded[:, :, 1], RGB[:, :, 0])


def test_32_bit_pixels_are_refused() -> None:
    data = _saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    with pytest.raises(BadSample, match="32-bit"):
        decode_image(data, "tif", channels=3)


def test_a_colour_image_as_mask_becomes_its_luma() -> None:
    decoded = decode_image(_saved(Image.fromarray(RGB), "PNG"), "png", channels=1)
    assert np.array_equal(decoded[:, :, 0], np.asarray(Image.fromarray(RGB).convert("L")))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    data = _saved(Image.fromarray(RGB), form, exif=exif)
    upright = decode_image(_saved(Image.fromarray(RGB), form), form.lower(), channels=3)
    assert np.array_equal(decode_image(data, form.lower(), channels=3), np.rot90(upright, -1))


def test_the_content_counts_not_the_extension() -> None:
    assert np.array_equal(decode_image(_saved(Image.fromarray(RGB), "PNG"), "jpg", channels=3), RGB)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "bmp", "tif", "ppm", "npy"])
def test_damaged_files_are_bad_samples(extension: str) -> None:
    form = {"jpg": "JPEG", "tif": "TIFF"}.get(extension, extension.upper())
    data = encode_image(RGB, "raw")[1] if extension == "npy" else _saved(Image.fromarray(RGB), form)
    for broken in (b"", data[:10], data[: len(data) // 2], b"not an image", bytes(64) + data[64:]):
        with pytest.raises(BadSample):
            decode_image(broken, extension, channels=3)


def test_mutated_files_are_read_or_refused_and_nothing_else() -> None:
    noise = np.random.default_rng(0)
    files = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "ppm": "PPM"}
    originals = {extension: _saved(Image.fromarray(RGB), form) for extension, form in files.items()}
    originals["npy"] = encode_image(RGB, "raw")[1]
    refused = 0
    for extension, data in originals.items():
        for _ in range(60):
            mutated = bytearray(data)
            for place in noise.integers(0, len(data), 4):
                mutated[place] = noise.integers(256)
            try:
                assert decode_image(bytes(mutated), extension, channels=3).dtype == np.uint8
            except BadSample:
                refused += 1
    assert refused > 50


def test_an_unknown_format_and_postscript_are_refused() -> None:
    with pytest.raises(BadSample, match=r"\.gif is not supported"):
        decode_image(b"GIF89a", "gif", channels=3)
    with pytest.raises(BadSample, match="not a readable png"):
        decode_image(_saved(Image.fromarray(RGB), "EPS"), "png", channels=3)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    side = int((1.2 * MAX_PIXELS) ** 0.5)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with pytest.raises(BadSample, match=f"at most {MAX_PIXELS} pixels"):
        decode_image(bomb, "png", channels=3)


def test_an_npy_header_cannot_allocate_or_execute() -> None:
    def npy(array: np.ndarray, shape: str | None = None, allow_pickle: bool = False) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=allow_pickle)
        data = buffer.getvalue()
        if shape is None:
            return data
        given = str(array.shape).encode()
        padded = shape.encode().ljust(len(given))
        return data.replace(given, padded)

    small = np.zeros((40, 48, 3), np.uint8)
    assert decode_image(npy(small), "npy", channels=3).shape == (40, 48, 3)
    for data, message in (
        (npy(small, "(4, 9999, 3)"), "its header says"),
        (npy(np.zeros((40000, 1, 3), np.uint8), "(90000, 90, 3)"), "pixels; at most"),
        (npy(small.astype(np.float32)), "uint8"),
        (npy(small[:, :, 0]), "uint8 of shape"),
        (npy(np.asfortranarray(small)), "uint8 of shape"),
        (npy(np.array([{"a": 1}], dtype=object), allow_pickle=True), "uint8"),
        (pickle.dumps(small), "not a readable npy"),
    ):
        with pytest.raises(BadSample, match=message):
            decode_image(data, "npy", channels=3)


def test_an_image_of_another_size_than_the_index_says_is_bad() -> None:
    with pytest.raises(BadSample, match=r"k\.target\.png: it is 40x8, the index says 40x24"):
        decode_member("k", "target", encode_image(RGB[:8], "png"), shape=(24, 40))


def test_a_bad_sample_names_its_member() -> None:
    with pytest.raises(BadSample, match=r"k\.target\.png: not a readable png image"):
        decode_member("k", "target", ("png", b"nothing"), shape=(24, 40))


@pytest.mark.parametrize("codec", ["png", "webp", "raw"])
def test_a_member_is_read_whole_or_by_window_images_in_colour_and_masks_in_gray(codec: str) -> None:
    window = Window(3, 5, 7, 11)
    for field, pixels in (("input", RGB), ("target", RGB), ("mask", MASK)):
        member = encode_image(pixels, codec)
        assert np.array_equal(decode_member("k", field, member, shape=(24, 40)), pixels)
        part = decode_member("k", field, member, shape=(24, 40), window=window)
        assert np.array_equal(part, pixels[3:10, 5:16])
