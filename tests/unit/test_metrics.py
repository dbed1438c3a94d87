"""Metrics of pairs against closed forms, an independent implementation and published scores of real images."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.errors import ConfigError, DataError
from rddm_dist.evaluation.color import srgb_to_lab
from rddm_dist.evaluation.metrics import (
    METRICS,
    MS_SSIM_WEIGHTS,
    PAIR_METRICS,
    PLANE_METRICS,
    lab_mae,
    mae,
    metric_info,
    ms_ssim,
    psnr,
    ssim,
)
from rddm_dist.evaluation.protocol import PROTOCOLS, score


def random_pair(seed: int, shape: tuple[int, ...], noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    return x, (x + noise * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(0, 1)


@pytest.mark.parametrize("difference", [0.5, 0.1, 1 / 255])
def test_psnr_of_a_constant_difference_is_its_decibels(difference: float) -> None:
    x = torch.full((2, 3, 8, 9), 0.25)
    expected = -20 * np.log10(difference)
    assert psnr(x, x + difference).tolist() == pytest.approx([expected, expected], abs=1e-5)
    assert psnr(x, x + difference).dtype == torch.float64


def test_equal_images_have_infinite_psnr_and_ssim_one() -> None:
    x, _ = random_pair(0, (2, 3, 16, 16))
    assert psnr(x, x).tolist() == [float("inf")] * 2
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    assert mae(x, x).tolist() == lab_mae(x, x).tolist() == [0.0, 0.0]
    large, _ = random_pair(0, (2, 3, 176, 180))
    assert ms_ssim(large, large).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_an_image_scores_the_same_in_any_batch() -> None:
    x, y = random_pair(1, (4, 3, 180, 176))
    for metric in (*PLANE_METRICS.values(), lab_mae):
        alone = torch.cat([metric(x[i : i + 1], y[i : i + 1]) for i in range(4)])
        assert torch.equal(metric(x, y), alone)


@pytest.mark.parametrize("shape", [(2, 3, 31, 40), (1, 1, 11, 64)])
def test_ssim_equals_torchmetrics_over_the_valid_region(shape: tuple[int, ...]) -> None:
    from torchmetrics.functional.image.ssim import structural_similarity_index_measure

    x, y = random_pair(2, shape)
    _, full = structural_similarity_index_measure(
        x, y, data_range=1.0, sigma=1.5, kernel_size=11, return_full_image=True, reduction="none"
    )
    height, width = shape[-2:]
    valid = full[:, :, 5 : height - 5, 5 : width - 5].flatten(1).mean(dim=1)
    assert ssim(x, y).tolist() == pytest.approx(valid.tolist(), abs=1e-12)


def test_ms_ssim_of_constant_images_is_their_luminance_term() -> None:
    """Contrast and structure are 1 at all scales; torchmetrics agrees."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    a, b = 0.3, 0.5
    x, y = (torch.full((1, 3, 176, 190), value, dtype=torch.float64) for value in (a, b))
    luminance = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    expected = multiscale_structural_similarity_index_measure(x, y, data_range=1.0, normalize="relu")
    assert ms_ssim(x, y).item() == pytest.approx(luminance ** MS_SSIM_WEIGHTS[-1], abs=1e-9)
    assert ms_ssim(x, y).item() == pytest.approx(expected.item(), abs=1e-9)


def torchmetrics_ms_ssim(x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """From torchmetrics' SSIM and contrast at each scale, over the valid region at the coarsest one too."""
    from torchmetrics.functional.image.ssim import structural_similarity_index_measure

    product = torch.ones(len(x), dtype=torch.float64)
    for weight in MS_SSIM_WEIGHTS[:-1]:
        _, contrast = structural_similarity_index_measure(
            x, y, data_range=1.0, return_contrast_sensitivity=True, reduction="none"
        )
        product *= contrast.clamp(min=0) ** weight
        x, y = (torch.nn.functional.avg_pool2d(image, 2) for image in (x, y))
    _, full = structural_similarity_index_measure(x, y, data_range=1.0, return_full_image=True, reduction="none")
    valid = full[..., 5:-5, 5:-5].flatten(1).mean(dim=1)
    return (product * valid.clamp(min=0) ** MS_SSIM_WEIGHTS[-1]).tolist()


@pytest.mark.parametrize("shape", [(2, 3, 176, 201), (1, 1, 215, 188)])
def test_ms_ssim_equals_torchmetrics_over_the_valid_region(shape: tuple[int, ...]) -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    x, y = random_pair(3, shape, noise=0.3)
    assert ms_ssim(x, y).tolist() == pytest.approx(torchmetrics_ms_ssim(x, y), abs=1e-12)
    whole = multiscale_structural_similarity_index_measure(x, y, data_range=1.0, normalize="relu", reduction="none")
    assert ms_ssim(x, y).tolist() == pytest.approx(whole.tolist(), abs=0.02)


def test_ms_ssim_of_a_negative_is_zero_and_not_complex() -> None:
    x, _ = random_pair(4, (1, 3, 176, 176))
    assert ms_ssim(x, 1 - x).tolist() == [0.0]


def test_mae_of_a_constant_difference_is_its_levels() -> None:
    x = torch.full((2, 3, 8, 9), 0.25, dtype=torch.float64)
    assert mae(x, x + 7 / 255).tolist() == pytest.approx([7.0, 7.0], abs=1e-12)


def test_lab_mae_is_the_sum_over_channels_averaged_over_the_pixels_of_the_region() -> None:
    x, y = torch.full((1, 3, 4, 6), 0.2), torch.full((1, 3, 4, 6), 0.2)
    color = torch.tensor([0.9, 0.1, 0.4])
    y[0, :, 0, :2] = color[:, None]
    expected = abs(srgb_to_lab(color.double().numpy()) - srgb_to_lab(np.full(3, 0.2, dtype=np.float32))).sum()
    region = torch.zeros(4, 6, dtype=torch.bool)
    region[0, :4] = True
    assert expected > 10
    assert lab_mae(x, y).item() == pytest.approx(expected * 2 / 24, rel=1e-6)
    assert lab_mae(x, y, region=region).item() == pytest.approx(expected * 2 / 4, rel=1e-6)
    assert lab_mae(x, y, region=~region).item() == 0.0
    assert np.isnan(lab_mae(x, y, region=region & ~region).item())


def test_images_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="at least 11x11 pixels, got 12x10"):
        ssim(torch.zeros(1, 3, 10, 12), torch.zeros(1, 3, 10, 12))
    with pytest.raises(DataError, match="at least 176x176 pixels, got 300x175"):
        ms_ssim(torch.zeros(1, 3, 175, 300), torch.zeros(1, 3, 175, 300))
    for metric in (*PLANE_METRICS.values(), lab_mae):
        with pytest.raises(DataError, match="different shapes"):
            metric(torch.zeros(1, 3, 10, 12), torch.zeros(1, 3, 12, 10))


def test_every_score_of_a_report_has_a_label_a_unit_and_a_better_side() -> None:
    assert set(PAIR_METRICS) < set(METRICS) and set(PLANE_METRICS) < set(PAIR_METRICS)
    better = {name: metric_info(name).better for name in METRICS}
    assert [name for name, side in better.items() if side == "higher"] == ["psnr", "ssim", "ms_ssim", "is"]
    assert metric_info("psnr_shadow").label == "PSNR (shadow)"
    assert metric_info("lab_mae_non_shadow").label == "LAB MAE (non-shadow)"
    assert metric_info("input_psnr_shadow").label == "PSNR (shadow) of the input"
    assert metric_info("mean4_psnr").label == "PSNR of the mean of 4"
    assert metric_info("mean4_psnr").unit == metric_info("gain_db").unit == "dB"
    assert metric_info("spread").better == "lower"


@pytest.mark.parametrize("name", ["pnsr", "input_fid", "psnr_sky", "mean_psnr", "mean0_psnr", "psnr_input"])
def test_a_name_that_is_no_score_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"score {name} is not known; the metrics are psnr, ssim"):
        metric_info(name)


def mean_scores(folder: Path, *, splits: set[str]) -> tuple[int, list[float]]:
    """Number of pairs, and the means of RGB PSNR, Y PSNR, Y SSIM and RGB SSIM of the untouched inputs."""
    with open(folder / "pairs.tsv") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["split"] in splits]
    found = []
    for row in rows:
        noisy, clean = (np.asarray(Image.open(folder / row[side]).convert("RGB")) for side in ("input", "target"))
        rgb, y = (score(PROTOCOLS[name], noisy, clean, metrics=("psnr", "ssim")) for name in ("rgb", "y"))
        found.append((rgb["psnr"], y["psnr"], y["ssim"], rgb["ssim"]))
    return len(rows), np.mean(found, axis=0).tolist()


def test_scores_of_real_noisy_photographs_are_the_published_ones(shared_data: Path) -> None:
    count, means = mean_scores(shared_data / "polyu", splits={"test"})
    assert count == 27
    assert means[:2] == pytest.approx([36.658, 39.031], abs=1e-3)
    assert means[2:] == pytest.approx([0.9411, 0.9123], abs=1e-4)


@pytest.mark.slow
def test_scores_of_all_real_noisy_photographs_are_the_published_ones(shared_data: Path) -> None:
    count, means = mean_scores(shared_data / "polyu", splits={"train", "test"})
    assert count == 100
    assert means[:2] == pytest.approx([35.969, 38.491], abs=1e-3)
    assert means[2:] == pytest.approx([0.9390, 0.9130], abs=1e-4)
