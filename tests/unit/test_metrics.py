"""PSNR and SSIM against closed forms, an independent implementation and published scores of real images."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.errors import DataError
from rddm_dist.evaluation.metrics import psnr, ssim
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


def test_an_image_scores_the_same_in_any_batch() -> None:
    x, y = random_pair(1, (4, 3, 20, 24))
    for metric in (psnr, ssim):
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


def test_images_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="at least 11x11 pixels, got 12x10"):
        ssim(torch.zeros(1, 3, 10, 12), torch.zeros(1, 3, 10, 12))
    with pytest.raises(DataError, match="different shapes"):
        psnr(torch.zeros(1, 3, 10, 12), torch.zeros(1, 3, 12, 10))


def test_scores_of_real_noisy_photographs_are_the_published_ones(shared_data: Path) -> None:
    folder = shared_data / "polyu"
    with open(folder / "pairs.tsv") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["split"] == "test"]
    found: dict[str, list[dict[str, float]]] = {"rgb": [], "y": []}
    for row in rows:
        noisy, clean = (np.asarray(Image.open(folder / row[side]).convert("RGB")) for side in ("input", "target"))
        for name, scores in found.items():
            scores.append(score(PROTOCOLS[name], noisy, clean))
    mean = {
        name: {metric: float(np.mean([value[metric] for value in scores])) for metric in ("psnr", "ssim")}
        for name, scores in found.items()
    }
    assert len(rows) == 27
    assert mean["rgb"]["psnr"] == pytest.approx(36.658, abs=1e-3)
    assert mean["y"]["psnr"] == pytest.approx(39.031, abs=1e-3)
    assert mean["rgb"]["ssim"] == pytest.approx(0.9123, abs=1e-4)
    assert mean["y"]["ssim"] == pytest.approx(0.9411, abs=1e-4)
