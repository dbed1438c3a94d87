"""What a protocol compares, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from data_pipeline.errors import ConfigError, DataError
from rddm_dist.evaluation.color import match_mean_gray, mean_gray, srgb_to_lab, studio_luma
from rddm_dist.evaluation.metrics import PAIR_METRICS, ssim
from rddm_dist.evaluation.protocol import PROTOCOLS, check_metrics, check_sizes, get_protocol, score
from rddm_dist.evaluation.resize import imresize

PAIR_PROTOCOLS = sorted(name for name, protocol in PROTOCOLS.items() if protocol.compares_pairs)


def image(seed: int, height: int = 24, width: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def half_mask(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width, 1), dtype=np.uint8)
    mask[:, : width // 2] = 255
    return mask


def decibels(squared_error: float) -> float:
    return 10 * math.log10(255**2 / squared_error)


def squares(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.square(x.astype(np.float64) - y.astype(np.float64)).mean())


def test_rgb_psnr_is_over_all_pixels_and_channels() -> None:
    target = image(0)
    restored = target.copy()
    restored[3, 4, 1] ^= 16
    assert score(PROTOCOLS["rgb"], restored, target)["psnr"] == pytest.approx(decibels(16**2 / target.size), abs=1e-9)


def test_y_ignores_a_change_of_colour_that_luma_does_not_show() -> None:
    target = np.full((16, 16, 3), 100, dtype=np.uint8)
    restored = target.copy()
    restored[..., 2] += 1  # 24.966 / 255 of a luma step, rounded away
    assert score(PROTOCOLS["y"], restored, target)["psnr"] == float("inf")
    assert score(PROTOCOLS["rgb"], restored, target)["psnr"] < 60
    exact = score(get_protocol("y+float"), restored, target)["psnr"]
    assert exact == pytest.approx(decibels((24.966 / 255) ** 2), abs=1e-6)


def test_a_border_does_not_count() -> None:
    target = image(1)
    restored = target.copy()
    restored[:3] = 255 - restored[:3]
    restored[:, -3:] = 255 - restored[:, -3:]
    assert score(get_protocol("rgb+border3"), restored, target)["psnr"] == float("inf")
    assert score(get_protocol("rgb+border2"), restored, target)["psnr"] < 60


def test_only_the_metrics_asked_for_are_computed() -> None:
    assert list(score(PROTOCOLS["rgb"], image(0, 4, 4), image(1, 4, 4), metrics=("psnr",))) == ["psnr"]
    assert list(score(PROTOCOLS["rgb"], image(0), image(1))) == list(PROTOCOLS["rgb"].metrics)


@pytest.mark.parametrize("name", PAIR_PROTOCOLS)
def test_equal_images_are_perfect_under_every_protocol(name: str) -> None:
    target = image(2, 256, 256)
    scores = score(PROTOCOLS[name], target, target, mask=half_mask(256, 256), metrics=PAIR_METRICS[:-1])
    for key, value in scores.items():
        if not key.startswith("pixels"):
            perfect = {"psnr": math.inf, "ssim": 1.0, "ms_ssim": 1.0}.get(
                key.removesuffix("_shadow").removesuffix("_non"), 0.0
            )
            assert value == pytest.approx(perfect, abs=1e-9), key


def test_float_scores_what_rounding_would_hide() -> None:
    target = image(3)
    restored = (target + np.float32(0.25)).clip(0, 255)
    assert score(PROTOCOLS["rgb"], np.rint(restored).astype(np.uint8), target)["psnr"] == math.inf
    exact = score(get_protocol("rgb+float"), restored, target, metrics=("psnr", "mae"))
    assert exact["psnr"] == pytest.approx(decibels(squares(restored, target)), abs=1e-9)
    assert exact["mae"] == pytest.approx(float(np.abs(restored - target.astype(np.float64)).mean()), abs=1e-9)


@pytest.mark.parametrize("name", ["rgb", "lol-gtmean", "istd"])
def test_8_bit_images_score_the_same_under_float_where_nothing_else_is_rounded(name: str) -> None:
    target, restored = image(4, 40, 40), image(5, 40, 40)
    target = np.full_like(target, 128) if name == "lol-gtmean" else target
    restored = np.full_like(restored, 64) if name == "lol-gtmean" else restored
    scores = [
        score(get_protocol(protocol), restored, target, mask=half_mask(40, 40), metrics=("psnr", "ssim"))
        for protocol in (name, f"{name}+float")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-12)


def test_rddm_256_compares_the_rounded_luma_of_8_bit_images_of_256() -> None:
    target, restored = image(6, 300, 280), image(7, 256, 256)
    small = imresize(target, (256, 256))
    found = score(PROTOCOLS["rddm-256"], restored, target)
    rmse = math.sqrt(squares(studio_luma(restored), studio_luma(small)))
    assert found["psnr"] == pytest.approx(20 * math.log10(255 / rmse), abs=1e-9)
    planes = [torch.from_numpy(studio_luma(pixels) / 255)[None, None] for pixels in (restored, small)]
    assert found["ssim"] == pytest.approx(ssim(*planes).item(), abs=1e-12)
    assert found == score(PROTOCOLS["y"], restored, small)


def test_istd_multiplies_by_the_mask_over_the_whole_frame_resized_without_rounding() -> None:
    target, restored, mask = image(8, 300, 280), image(9, 300, 280), half_mask(300, 280)
    found = score(PROTOCOLS["istd"], restored, target, mask=mask)
    x, y = (imresize(pixels.astype(np.float64), (256, 256)) for pixels in (restored, target))
    assert x.min() < 0 and x.max() > 255
    shadow = imresize(mask, (256, 256)) > 0
    errors = {"psnr": squares(x, y), "psnr_shadow": squares(x * shadow, y * shadow)}
    errors["psnr_non_shadow"] = errors["psnr"] - errors["psnr_shadow"]
    for key, error in errors.items():
        assert found[key] == pytest.approx(decibels(error), abs=1e-9), key
    assert found["pixels_shadow"] == shadow.sum()
    assert found["pixels_shadow"] + found["pixels_non_shadow"] == 256 * 256


def test_istd_lab_mae_is_of_8_bit_images_and_pools_over_the_regions() -> None:
    target, restored = image(10, 64, 80), image(11, 64, 80)
    found = score(PROTOCOLS["istd"], restored, target, mask=half_mask(64, 80), metrics=("lab_mae",))
    labs = [srgb_to_lab(imresize(pixels, (256, 256)) / 255.0) for pixels in (restored, target)]
    assert found["lab_mae"] == pytest.approx(np.abs(labs[0] - labs[1]).sum(axis=-1).mean(), abs=1e-9)
    pooled = sum(found[f"lab_mae_{part}"] * found[f"pixels_{part}"] for part in ("shadow", "non_shadow"))
    assert pooled / 256**2 == pytest.approx(found["lab_mae"], abs=1e-9)


def test_a_change_outside_the_shadow_leaves_the_shadow_perfect() -> None:
    target, mask = image(12, 256, 256), half_mask(256, 256)
    restored = target.copy()
    restored[:, 200:] = 255 - restored[:, 200:]
    found = score(PROTOCOLS["istd"], restored, target, mask=mask)
    assert found["psnr_shadow"] == math.inf and found["lab_mae_shadow"] == 0.0
    assert found["psnr_non_shadow"] == pytest.approx(found["psnr"])
    assert found["lab_mae_non_shadow"] == pytest.approx(2 * found["lab_mae"])


def test_an_image_without_shadow_has_no_mean_over_the_shadow() -> None:
    found = score(PROTOCOLS["istd"], image(1), image(2), mask=np.zeros((24, 20, 1), dtype=np.uint8))
    assert found["pixels_shadow"] == 0
    assert math.isnan(found["lab_mae_shadow"])
    assert found["lab_mae_non_shadow"] == found["lab_mae"]


def test_gtmean_forgives_a_wrong_brightness_and_lol_does_not() -> None:
    target = image(13) // 2 * 2
    dark = target // 2
    assert score(PROTOCOLS["lol-gtmean"], dark, target)["psnr"] == math.inf
    assert score(PROTOCOLS["lol"], dark, target)["psnr"] < 12
    assert mean_gray(dark) * 2 == pytest.approx(mean_gray(target))
    assert get_protocol("lol-gtmean").describe()["uses_target"] is True
    assert [name for name, protocol in PROTOCOLS.items() if protocol.describe()["uses_target"]] == ["lol-gtmean"]


def test_gtmean_under_float_rounds_nothing() -> None:
    target, dark = image(13), image(14) // 5
    matched = match_mean_gray(dark.astype(np.float64), target)
    found = score(get_protocol("lol-gtmean+float"), dark, target, metrics=("psnr",))["psnr"]
    assert found == pytest.approx(decibels(squares(matched, target)), abs=1e-9)
    assert found != pytest.approx(score(PROTOCOLS["lol-gtmean"], dark, target)["psnr"], abs=1e-9)


def test_lol_and_rgb_have_the_same_psnr_and_ssim() -> None:
    lol, rgb = (score(PROTOCOLS[name], image(1), image(2), metrics=("psnr", "ssim")) for name in ("lol", "rgb"))
    assert lol == rgb


@pytest.mark.parametrize("name", ["rgb", "y", "istd"])
def test_lpips_sees_the_rgb_images_in_levels(name: str) -> None:
    seen: list[torch.Tensor] = []

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.extend([x, y])
        return (x - y).abs().flatten(1).mean(dim=1)

    restored, target = image(14, 256, 256), image(15, 256, 256)
    found = score(PROTOCOLS[name], restored, target, mask=half_mask(256, 256), metrics=("lpips",), lpips=distance)
    for planes, pixels in zip(seen, (restored, target), strict=True):
        assert planes.dtype == torch.float32
        assert np.array_equal(planes[0].permute(1, 2, 0).numpy(), pixels)
    assert found["lpips"] == pytest.approx(np.abs(restored.astype(float) - target).mean(), rel=1e-5)


@pytest.mark.parametrize("name", [*sorted(PROTOCOLS), "rgb+border4", "istd+border4+float", "y+float"])
def test_a_protocol_describes_itself_in_json(name: str) -> None:
    described = json.loads(json.dumps(get_protocol(name).describe()))
    assert described == get_protocol(name).describe()
    assert described["name"] == name
    assert {"summary", "color", "rounding", "size", "border", "regions", "uses_target"} <= set(described)
    if get_protocol(name).compares_pairs:
        assert {"procedure", "psnr", "ssim", "ms_ssim", "mae", "lab_mae", "lpips", "mean"} <= set(described)


def test_protocols_that_compute_something_else_describe_something_else() -> None:
    names = [
        f"{name}{modifiers}" for name in PAIR_PROTOCOLS for modifiers in ("", "+border1", "+float", "+border2+float")
    ]
    described = {name: get_protocol(name).describe() for name in names}
    told = {
        json.dumps([{k: v for k, v in value.items() if k not in ("name", "summary")}, value["summary"]])
        for value in described.values()
    }
    assert len(told) == len(names)


def test_modifiers_have_one_order_in_the_name_and_commute() -> None:
    assert get_protocol("y+float+border4") == get_protocol("y+border4+float")
    assert get_protocol("y+float+border4").name == "y+border4+float"
    assert get_protocol("rgb") == PROTOCOLS["rgb"]
    assert get_protocol("rgb+border4") == dataclasses.replace(PROTOCOLS["rgb"], name="rgb+border4", border=4)


def test_an_unknown_protocol_names_the_known_ones() -> None:
    known = "generation, istd, lol, lol-gtmean, rddm-256, rgb, sidd, y"
    with pytest.raises(ConfigError, match=f"protocol lab is not known; choose one of {known}"):
        get_protocol("lab")


@pytest.mark.parametrize(
    "name", ["rgb+border0", "rgb+border", "rgb+half", "rgb+", "y+float+float", "y+border1+border2"]
)
def test_a_bad_modifier_names_the_allowed_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed are \+borderN \(N from 1 to 9999\) and \+float"):
        get_protocol(name)


def test_generation_compares_no_pairs() -> None:
    protocol = get_protocol("generation")
    assert not protocol.compares_pairs and not protocol.needs_mask and protocol.metrics == ()
    with pytest.raises(ConfigError, match="compares no pairs of images"):
        score(protocol, image(0), image(1))
    with pytest.raises(ConfigError, match=r"generation takes no \+float"):
        get_protocol("generation+float")


def test_metrics_that_cannot_be_computed_are_refused() -> None:
    with pytest.raises(ConfigError, match="metric pnsr is not known; pairs are compared by psnr, ssim"):
        check_metrics(PROTOCOLS["rgb"], ("psnr", "pnsr"), has_lpips=False)
    with pytest.raises(ConfigError, match="metric fid is of whole sets of images"):
        check_metrics(PROTOCOLS["rgb"], ("fid",), has_lpips=False)
    with pytest.raises(ConfigError, match="metric lpips needs the file of its network; give --lpips FILE"):
        score(PROTOCOLS["rgb"], image(0), image(1), metrics=("lpips",))
    assert check_metrics(PROTOCOLS["y"], has_lpips=False) == PROTOCOLS["y"].metrics


def test_images_of_other_types_are_refused() -> None:
    with pytest.raises(DataError, match=r"8-bit images, got float32 and uint8; add \+float"):
        score(PROTOCOLS["rgb"], image(0).astype(np.float32), image(0))
    with pytest.raises(DataError, match=r"RGB images in \[0, 255\], got \(24, 20, 1\) uint8"):
        score(PROTOCOLS["rgb"], image(0), image(0)[..., :1])
    with pytest.raises(DataError, match="got .* int64"):
        score(get_protocol("rgb+float"), image(0).astype(np.int64), image(0))


@pytest.mark.parametrize("name", ["rgb", "y", "lol", "lol-gtmean"])
def test_protocols_at_native_size_refuse_other_sizes(name: str) -> None:
    with pytest.raises(DataError, match="a.png: protocol .* images of one size, got 20x24 for a target of 24x20"):
        check_sizes(PROTOCOLS[name], restored=(24, 20), target=(20, 24), what="a.png")
    with pytest.raises(DataError, match="20x24 for a target of 24x20"):
        score(PROTOCOLS[name], image(0), image(0, 20, 24))


@pytest.mark.parametrize("name", ["rddm-256", "istd"])
def test_protocols_that_resize_take_any_sizes(name: str) -> None:
    check_sizes(PROTOCOLS[name], restored=(5, 7), target=(900, 30), what="a.png")
    assert score(PROTOCOLS[name], image(0, 5, 7), image(1, 9, 30), mask=half_mask(8, 9))["psnr"] > 0


def test_sidd_takes_its_blocks_alone() -> None:
    check_sizes(PROTOCOLS["sidd"], restored=(256, 256), target=(256, 256), what="a.png")
    for restored, target in [((512, 512), (512, 512)), ((256, 256), (256, 512))]:
        with pytest.raises(DataError, match="a.png: protocol sidd takes 256x256 blocks"):
            check_sizes(PROTOCOLS["sidd"], restored=restored, target=target, what="a.png")


def test_a_missing_or_unfit_mask_is_refused() -> None:
    with pytest.raises(DataError, match="protocol istd needs the mask of every image"):
        score(PROTOCOLS["istd"], image(0), image(1))
    with pytest.raises(DataError, match=r"masks of one channel and 8 bits, got \(24, 20\) bool"):
        score(PROTOCOLS["istd"], image(0), image(1), mask=np.zeros((24, 20), dtype=bool))
    assert [name for name, protocol in PROTOCOLS.items() if protocol.needs_mask] == ["istd"]


def test_images_too_small_for_a_border_or_a_window_are_refused() -> None:
    with pytest.raises(DataError, match=r"a border of 12 pixels leaves nothing of 40x24; lower \+borderN"):
        check_sizes(get_protocol("rgb+border12"), restored=(24, 40), target=(24, 40), what="a.png")
    with pytest.raises(DataError, match="a.png: SSIM needs images of at least 11x11 pixels, got 40x10; leave"):
        check_sizes(PROTOCOLS["rgb"], restored=(10, 40), target=(10, 40), what="a.png")
    with pytest.raises(DataError, match="at least 11x11 pixels, got 32x8 inside the border"):
        check_sizes(get_protocol("y+border4"), restored=(16, 40), target=(16, 40), what="a.png")
    with pytest.raises(DataError, match="MS-SSIM needs images of at least 176x176"):
        check_sizes(PROTOCOLS["rgb"], restored=(99, 900), target=(99, 900), what="a.png", metrics=("ms_ssim",))
    check_sizes(PROTOCOLS["rgb"], restored=(4, 4), target=(4, 4), what="a.png", metrics=("psnr", "mae"))
