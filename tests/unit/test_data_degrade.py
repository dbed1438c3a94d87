"""Synthetic degradations: repeatable row by row, of the stated strength, and written as a text that reads back."""

from __future__ import annotations

import io
import pickle
from statistics import NormalDist

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.degradations import KINDS, Number, Span, parse_degradation
from data_pipeline.degrade import (
    fill_holes,
    gaussian_blur,
    gaussian_noise,
    jpeg,
    motion_blur,
    poisson_noise,
    rain,
    to_images,
    to_pixels,
)
from data_pipeline.errors import ConfigError
from data_pipeline.masks import make_masks
from data_pipeline.rng import mix_seed, normal_image, uniform

IDS = torch.tensor([2, 3, 2**40 + 1, 2**62, 0])
# Smooth colours, none near black or white, so that little is clipped.
NORMAL = normal_image(7, "x", IDS, channels=3, height=40, width=52).permute(0, 2, 3, 1)
PIXELS = to_pixels(gaussian_blur(0.5 + 0.6 * NORMAL, 1.5)).numpy()
IMAGES = to_images(PIXELS)
GRAY = torch.full((4, 64, 64, 3), 0.5)

EVERY_KIND = [
    "noise(sigma=5..50)",
    "poisson(peak=10..200)",
    "rain(density=0.005..0.05, length=5..25, strength=0.2..0.9, max_angle=5..40)",
    "blur(sigma=0..3)",
    "motion(length=1..13)",
    "lowlight",
    "jpeg(quality=20..95)",
    "inpaint(mask=center, fill=0..1)",
    "inpaint(mask=box)",
    "inpaint(mask=irregular)",
    "inpaint(mask=free_form)",
    "inpaint(mask=hybrid)",
]
CHAIN = "blur(sigma=1..3)+noise(sigma=2..10)+rain+noise+inpaint(mask=box)+jpeg(quality=60..95)+inpaint"


def applied(spec: str, pixels: np.ndarray = PIXELS, *, seed: int = 1, ids: torch.Tensor | None = None) -> np.ndarray:
    """Inputs and masks side by side, as one array."""
    inputs, masks = parse_degradation(spec).apply(pixels, seed=seed, ids=IDS[: len(pixels)] if ids is None else ids)
    return inputs if masks is None else np.concatenate([inputs, masks], axis=-1)


# What holds for every kind and for chains.


def test_every_kind_is_tested() -> None:
    assert {spec.split("(")[0] for spec in EVERY_KIND} == set(KINDS)


@pytest.mark.parametrize("spec", [*EVERY_KIND, CHAIN])
def test_a_row_depends_on_seed_id_and_its_pixels_alone(spec: str) -> None:
    degradation = parse_degradation(spec)
    whole = applied(spec)
    assert whole.dtype == np.uint8 and whole.shape == (*PIXELS.shape[:3], 4 if degradation.has_mask else 3)
    for row in range(len(IDS)):
        assert np.array_equal(whole[row], applied(spec, PIXELS[row : row + 1], ids=IDS[row : row + 1])[0])
    others = [3, 1, 3]
    assert np.array_equal(whole[others], applied(spec, PIXELS[others], ids=IDS[others]))
    as_arrays, _ = degradation.apply(PIXELS, seed=1, ids=IDS.numpy())
    assert np.array_equal(whole[..., :3], as_arrays)
    assert np.array_equal(whole[1], applied(spec, np.stack([255 - PIXELS[0], PIXELS[1]]))[1])


@pytest.mark.parametrize("spec", [spec for spec in EVERY_KIND if "center" not in spec] + [CHAIN])
def test_another_seed_or_id_gives_another_image(spec: str) -> None:
    same = np.repeat(PIXELS[:1], 5, axis=0)
    rows = applied(spec, same)
    assert len({row.tobytes() for row in rows}) == 5
    assert not np.array_equal(rows, applied(spec, same, seed=2))


@pytest.mark.parametrize(
    "spec",
    [
        "noise(sigma=0)",
        "rain(strength=0)",
        "rain(density=0)",
        "rain(density=1e-12)",
        "blur(sigma=0)",
        "motion(length=1)",
        "lowlight(gamma=1, scale=1, sigma=0)",
        "noise(sigma=0)+blur(sigma=0)+motion(length=1)",
    ],
)
def test_no_strength_is_no_change(spec: str) -> None:
    assert np.array_equal(applied(spec), PIXELS)


def test_what_is_degraded_is_left_alone() -> None:
    frozen = PIXELS.copy()
    frozen.flags.writeable = False
    images = IMAGES.clone()
    assert np.array_equal(applied(CHAIN, frozen), applied(CHAIN, PIXELS[:, ::-1].copy()[:, ::-1]))
    gaussian_noise(images, 25.0, seed=1, ids=IDS)
    rain(images, seed=1, ids=IDS)
    gaussian_blur(images, 2.0)
    assert torch.equal(images, IMAGES)


def test_links_act_in_order_without_rounding_between() -> None:
    chained = applied("blur(sigma=1.5)+noise(sigma=20)")
    assert np.array_equal(chained, to_pixels(gaussian_noise(gaussian_blur(IMAGES, 1.5), 20.0, seed=1, ids=IDS)).numpy())
    assert not np.array_equal(chained, applied("noise(sigma=20)+blur(sigma=1.5)"))


def test_a_second_link_of_a_kind_draws_anew() -> None:
    gray = to_pixels(GRAY).numpy()
    once, twice = (applied(spec, gray).astype(float) for spec in ("noise(sigma=10)", "noise(sigma=10)+noise(sigma=10)"))
    second = twice - once
    assert abs(second.std() - 10.0) < 0.3
    assert abs(np.corrcoef(once.ravel(), second.ravel())[0, 1]) < 0.03


# Noise and light.


def test_noise_is_counted_noise_of_the_stated_strength() -> None:
    noise = gaussian_noise(IMAGES, 25.0, seed=1, ids=IDS) - IMAGES
    assert noise.dtype == torch.float32
    assert abs(float(noise.std()) * 255.0 - 25.0) < 0.5 and abs(float(noise.mean()) * 255.0) < 0.6
    counted = normal_image(1, "gaussian_noise", IDS, channels=3, height=40, width=52).permute(0, 2, 3, 1)
    assert torch.allclose(noise, counted * 25.0 / 255.0, atol=1e-6)


def test_shot_noise_grows_with_the_root_of_the_light() -> None:
    for level in (0.1, 0.4, 0.9):
        noise = poisson_noise(torch.full_like(GRAY, level), 50.0, seed=1, ids=IDS[:4]) - level
        assert abs(float(noise.std()) / (level / 50.0) ** 0.5 - 1.0) < 0.02
        assert abs(float(noise.mean())) < 0.003
    assert not poisson_noise(torch.zeros_like(GRAY), 50.0, seed=1, ids=IDS[:4]).any()


def test_low_light_is_scale_times_power() -> None:
    dark = applied("lowlight(gamma=2.5, scale=0.6, sigma=0)").astype(float)
    assert np.abs(dark - 255.0 * 0.6 * (PIXELS / 255.0) ** 2.5).max() <= 0.5 + 1e-3
    noisy = applied("lowlight(gamma=2, scale=0.8, sigma=10)", to_pixels(GRAY).numpy()).astype(float)
    assert abs(noisy.std() - 10.0) < 0.3 and abs(noisy.mean() - 255.0 * 0.8 * (128 / 255) ** 2) < 0.4


# Rain.


def test_rain_only_brightens_and_stays_in_range() -> None:
    images = IMAGES * 0.6
    rained = rain(images, seed=1, ids=IDS, density=0.02, length=21)
    assert rained.shape == images.shape and rained.dtype == torch.float32
    assert float((rained - images).min()) >= 0.0 and float(rained.max()) <= 1.0
    wet = float((rained > images).any(dim=3).float().mean())
    expected = 1.0 - (1.0 - 0.02) ** 21  # a pixel is dry when none of the 21 heads that could reach it is there
    assert abs(wet - expected) < 0.06


def test_rain_is_the_sum_of_its_streaks() -> None:
    """Streak by streak from the same counted drops."""
    height, width, length = 30, 26, 9
    for number in (2, 2**40 + 1):
        ids = torch.tensor([number])
        angle = 40.0 * (2.0 * float(uniform(5, "rain_angle", ids, count=1)) - 1.0)
        slope = np.tan(np.radians(angle))
        margin = int(np.ceil(abs(slope) * length)) + 1
        presence, glare = normal_image(
            5, "rain_drops", ids, channels=2, height=height + length - 1, width=width + 2 * margin
        )[0].numpy()
        expected = np.zeros((height + length, width + 2 * margin))
        for row, column in np.argwhere(presence > NormalDist().inv_cdf(1 - 0.03)):
            for step in range(length):
                down, right = row - (length - 1 - step), column - margin - round(step * slope)
                if 0 <= down < height and 0 <= right < width:
                    expected[down, right] += 0.5 + 0.5 * min(abs(glare[row, column]) / 2, 1.0)
        expected = 0.7 * np.minimum(expected[:height, :width], 1.0)
        streaks = rain(
            torch.zeros((1, height, width, 3)),
            seed=5,
            ids=ids,
            density=0.03,
            length=length,
            strength=0.7,
            max_angle=40.0,
        )
        assert expected.any() and np.allclose(streaks[0].numpy(), expected[:, :, None], atol=1e-5)


def test_streaks_have_the_stated_length_and_lean_within_the_angle() -> None:
    black = torch.zeros((6, 80, 80, 3))
    ids = torch.arange(6)
    upright = rain(black, seed=1, ids=ids, density=0.0005, length=15, max_angle=0.0)[..., 0].numpy()
    whole = []
    for column in upright.transpose(0, 2, 1).reshape(-1, 80):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], column > 0, [0]])))
        whole += [stop - start for start, stop in zip(edges[::2], edges[1::2], strict=True) if start > 0 and stop < 80]
    assert whole and min(whole) >= 15
    columns = [
        int(rain(black, seed=1, ids=ids, density=0.0002, length=15, max_angle=angle).any(dim=3).any(dim=1).sum())
        for angle in (0.0, 40.0)
    ]
    assert columns[1] > 2 * columns[0] > 0


# Blur.


def impulse(side: int = 41) -> torch.Tensor:
    images = torch.zeros((1, side, side, 3))
    images[:, side // 2, side // 2] = 1.0
    return images


@pytest.mark.parametrize("spec", ["blur(sigma=0.3..9)", "motion(length=1..31)", "blur(sigma=50)", "motion(length=255)"])
def test_blur_leaves_a_constant(spec: str) -> None:
    flat = np.full((4, 24, 31, 3), (3, 128, 255), np.uint8)
    assert np.array_equal(applied(spec, flat), flat)


@pytest.mark.parametrize("sigma", [0.4, 1.7, 25.0])
def test_gaussian_blur_preserves_the_mean(sigma: float) -> None:
    blurred = gaussian_blur(IMAGES, sigma)
    assert torch.allclose(blurred.mean((1, 2)), IMAGES.mean((1, 2)), atol=1e-6)
    assert float(blurred.std()) < float(IMAGES.std())


@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.5])
def test_gaussian_blur_has_the_stated_width(sigma: float) -> None:
    spread = gaussian_blur(impulse(), sigma)[0, :, :, 0]
    place = torch.arange(41.0) - 20.0
    for axis in (0, 1):
        profile = spread.sum(axis)
        assert abs(float(profile.sum()) - 1.0) < 1e-5
        assert abs(float((profile * place.square()).sum()) - sigma**2) < 0.04 * sigma**2  # cut at three sigma
        assert torch.allclose(profile, profile.flip(0))


def test_motion_runs_along_its_angle() -> None:
    row = torch.zeros((41, 41))
    row[20, 18:23] = 0.2
    for angle, expected in ((0.0, row), (180.0, row), (90.0, row.T), (-90.0, row.T)):
        assert torch.allclose(motion_blur(impulse(), 5.0, angle=angle)[0, :, :, 0], expected, atol=1e-6)
    diagonal = motion_blur(impulse(), 15.0, angle=45.0)[0, :, :, 0]
    assert float(diagonal.flip(0).diag().sum()) > 0.999  # counter-clockwise: up to the right


@pytest.mark.parametrize("angle", [0.0, 17.0, 45.0, 71.0, 133.0])
def test_motion_has_the_stated_length_at_any_angle(angle: float) -> None:
    line = motion_blur(impulse(), 21.0, angle=angle)[0, :, :, 0]
    place = torch.arange(41.0) - 20.0
    assert abs(float(line.sum()) - 1.0) < 1e-5
    assert abs(float((line * (place[:, None].square() + place.square())).sum()) - 21.0**2 / 12.0) < 1.0
    assert torch.allclose(line, line.flip(0, 1), atol=1e-6)


@pytest.mark.parametrize(
    "spec", ["blur(sigma=2)", "blur(sigma=0.5..2.5)", "motion(length=10)", "motion(length=3..13)+blur(sigma=1..2)"]
)
def test_a_window_with_its_reach_equals_the_window_of_the_whole(spec: str) -> None:
    degradation = parse_degradation(spec)
    reach, rows, columns = degradation.reach, slice(18, 24), slice(20, 31)
    whole = applied(spec)
    assert 0 < reach <= 16
    context = PIXELS[:, rows.start - reach : rows.stop + reach, columns.start - reach : columns.stop + reach]
    window = applied(spec, context)[:, reach:-reach, reach:-reach]
    assert np.array_equal(window, whole[:, rows, columns])
    assert not np.array_equal(applied(spec, PIXELS[:, rows, columns]), whole[:, rows, columns])


def test_holes_are_those_of_the_window_whatever_context_a_blur_needs() -> None:
    ids = np.arange(8)
    for mask in ("center", "box", "irregular"):
        chain = parse_degradation(f"blur(sigma=3)+inpaint(mask={mask})+noise(sigma=5)")
        grown = np.zeros((8, 48 + 2 * chain.reach, 48 + 2 * chain.reach, 3), np.uint8)
        inputs, masks = chain.apply(grown, seed=1, ids=ids, margin=chain.reach)
        _, alone = parse_degradation(f"inpaint(mask={mask})").apply(np.zeros((8, 48, 48, 3), np.uint8), seed=1, ids=ids)
        assert inputs.shape == (8, 48, 48, 3) and masks is not None and alone is not None
        assert np.array_equal(masks, alone)


def test_only_blurs_reach() -> None:
    assert parse_degradation("noise+poisson+rain+lowlight+jpeg+inpaint").reach == 0
    assert parse_degradation("blur(sigma=1..2.1)+noise+motion(length=2..9)").reach == 7 + 4


# JPEG and holes.


def test_jpeg_is_pillows_at_four_two_zero() -> None:
    degraded = applied("jpeg(quality=37)")
    for pixels, result in zip(PIXELS, degraded, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=37, subsampling=2)
        assert np.array_equal(result, np.asarray(Image.open(buffer)))
    errors = [float((jpeg(IMAGES, quality) - IMAGES).abs().mean()) for quality in (95, 50, 10)]
    assert errors == sorted(errors) and errors[0] < 0.5 * errors[2]


@pytest.mark.parametrize("kind", ["center", "box", "irregular", "free_form", "hybrid"])
def test_holes_are_filled_and_the_rest_is_kept(kind: str) -> None:
    inputs, masks = parse_degradation(f"inpaint(mask={kind})").apply(PIXELS, seed=1, ids=IDS)
    assert masks is not None
    assert np.array_equal(masks[..., 0], make_masks(kind, seed=1, ids=IDS, height=40, width=52).numpy())
    assert np.array_equal(inputs, np.where(masks == 255, np.uint8(128), PIXELS))


def test_masks_of_several_links_are_joined_and_later_links_act_on_holes() -> None:
    inputs, masks = parse_degradation("inpaint+inpaint(mask=box, fill=1)").apply(PIXELS, seed=1, ids=IDS)
    center = make_masks("center", seed=1, ids=IDS, height=40, width=52).numpy()[..., None]
    assert masks is not None
    second = mix_seed(1, "degradation", 1)  # what the link at index 1 draws from, its kind having occurred before
    box = make_masks("box", seed=second, ids=IDS, height=40, width=52).numpy()[..., None]
    assert np.array_equal(masks, np.maximum(center, box))
    assert np.array_equal(inputs, np.where(box > 0, np.uint8(255), np.where(center > 0, np.uint8(128), PIXELS)))
    noisy, _ = parse_degradation("inpaint+noise").apply(PIXELS, seed=1, ids=IDS)
    assert len(np.unique(noisy[center[..., 0] > 0])) > 50
    assert torch.equal(fill_holes(IMAGES, torch.zeros(5, 40, 52), fill=0.5), IMAGES)


# Ranges and the text.


def test_a_range_is_drawn_from_uniformly_for_each_sample() -> None:
    white = np.full((300, 1, 1, 3), 255, np.uint8)
    ids = torch.arange(300)
    scales = applied("lowlight(gamma=1, scale=0.2..0.6, sigma=0)", white, ids=ids)[:, 0, 0, 0] / 255.0
    assert scales.min() >= 0.2 - 0.002 and scales.max() <= 0.6 + 0.002
    assert scales.min() < 0.22 and scales.max() > 0.58 and abs(scales.mean() - 0.4) < 0.03
    noise = applied("noise(sigma=5..30)", np.repeat(to_pixels(GRAY).numpy(), 10, axis=0), ids=torch.arange(40))
    deviations = noise.astype(float).std(axis=(1, 2, 3))
    assert 4.5 < deviations.min() < 9.0 and 26.0 < deviations.max() < 31.0


def test_whole_numbers_reach_both_ends_of_their_range_alike() -> None:
    parameter = Number(Span(1, 4), 1, 100, is_whole=True)
    drawn = parameter.draw(Span(3, 6), uniform(1, "x", torch.arange(4000), count=1)[:, 0])
    values, counts = drawn.unique(return_counts=True)
    assert values.tolist() == [3.0, 4.0, 5.0, 6.0] and counts.min() > 900
    assert parameter.draw(Span(3, 6), torch.tensor([1.0 - 2.0**-32], dtype=torch.float64)).item() == 6.0


def test_parameters_of_one_link_are_drawn_apart() -> None:
    white = np.full((64, 1, 1, 3), 255, np.uint8)
    link = parse_degradation("lowlight(gamma=1..2, scale=0.1..0.9, sigma=0)")
    bright = link.apply(white, seed=1, ids=torch.arange(64))[0][:, 0, 0, 0] / 255.0
    dim = link.apply(white // 2, seed=1, ids=torch.arange(64))[0][:, 0, 0, 0] / 255.0
    gamma = np.log(dim / bright) / np.log(127 / 255)
    assert abs(np.corrcoef(gamma, bright)[0, 1]) < 0.4 and gamma.std() > 0.1


@pytest.mark.parametrize(
    "spec", [*EVERY_KIND, CHAIN, *KINDS, "rain(density=1e-9)+blur(sigma=0.1..0.30000000000000004)"]
)
def test_the_canonical_text_reads_back(spec: str) -> None:
    degradation = parse_degradation(spec)
    assert parse_degradation(degradation.spec) == degradation
    assert parse_degradation(degradation.spec).spec == degradation.spec
    assert pickle.loads(pickle.dumps(degradation)) == degradation


def test_the_canonical_text_names_every_parameter() -> None:
    assert parse_degradation("noise").spec == "noise(sigma=25)"
    assert parse_degradation(" rain( length = 5..9 ,density=.02)+ jpeg() ").spec == (
        "rain(density=0.02, length=5..9, strength=0.8, max_angle=25)+jpeg(quality=50)"
    )
    assert parse_degradation("blur(sigma=2..2)") == parse_degradation("blur(sigma=2.0)")
    assert parse_degradation("inpaint").spec == "inpaint(mask=center, fill=0.5)"


def test_masks_are_foretold() -> None:
    for spec in EVERY_KIND:
        assert parse_degradation(f"noise+{spec}").has_mask == spec.startswith("inpaint")


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "nothing given; .* kinds: noise, poisson"),
        ("  ", "nothing given"),
        ("nois(sigma=3)", r"nois is not known \(did you mean noise\?\); kinds: noise"),
        ("fog", "fog is not known; kinds"),
        ("noise+", "a kind is missing at character 7"),
        ("+noise", "a kind is missing at character 1"),
        ("noise++blur", "a kind is missing at character 7"),
        ("noise blur", "cannot read 'blur'"),
        ("noise(sigma=3", r"cannot read '\(sigma=3'"),
        ("noise((sigma=3))", "cannot read"),
        ("noise(25)", "'25' is not name=value; noise takes sigma"),
        ("noise(sigma=3,)", "'' is not name=value"),
        ("rain(lenght=3)", r"rain has no parameter 'lenght' \(did you mean length\?\); rain takes density, length"),
        ("noise(sigma=1, sigma=2)", "sigma is given twice to noise"),
        ("noise(sigma=)", "sigma='' does not fit noise; give a number or a range low..high within 0..255"),
        ("noise(sigma=loud)", "sigma='loud' does not fit"),
        ("noise(sigma=-1)", "within 0..255"),
        ("noise(sigma=256)", "within 0..255"),
        ("noise(sigma=9..3)", "sigma='9..3' does not fit"),
        ("noise(sigma=1..2..3)", "does not fit"),
        ("noise(sigma=nan)", "does not fit"),
        ("noise(sigma=1e999)", "does not fit"),
        ("noise(sigma=1_0)", "does not fit"),
        ("noise(sigma=__import__)", "does not fit"),
        ("jpeg(quality=50.5)", "give a whole number or a range low..high within 1..100"),
        ("jpeg(quality=0..50)", "within 1..100"),
        ("inpaint(mask=irregula)", r"give one of center, box, irregular, .* \(did you mean irregular\?\)"),
        ("inpaint(mask=1..2)", "give one of center"),
        ("noise\n(sigma=x)", "does not fit"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        parse_degradation(text)
    message = str(caught.value)
    assert message.startswith(f"--degrade / data.degrade={text!r}: ") and "\n" not in message
