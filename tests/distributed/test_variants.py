"""Every kind of network and process trains, previews and is loaded again through the same entry point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rddm_dist.evaluation.restore import load_restorer
from tests.support.datasets import make_dataset
from tests.support.processes import run_workers
from tests.support.runs import TRAIN, write_config

VARIANTS = {
    "shared encoder": ("model.kind=shared_encoder", "diffusion.objective=pred_res_add_noise"),
    "self-conditioned": ("model.self_condition=true", "engine.zero_stage=3"),
    "DDPM baseline": ("diffusion.process=ddpm", "diffusion.objective=pred_v", "diffusion.schedule.kind=ddim"),
    "residual first": (
        "model.num_nets=2",
        "diffusion.objective=pred_res_noise",
        "diffusion.time_input=clocks",
        "sample.path=residual_first",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_and_restores(variant: str, tmp_path: Path) -> None:
    data = make_dataset(tmp_path, count=6)
    steps = ["train.steps=2", "sample.every=2", *VARIANTS[variant]]
    world_size = 2 if variant == "self-conditioned" else 1  # its second forward must meet on all ranks
    command = [*TRAIN, str(write_config(tmp_path, data)), *steps]
    results = run_workers(command, world_size, cwd=tmp_path, timeout_s=120)
    assert {result.code for result in results} == {0}, "\n".join(result.text for result in results)
    run_dir = tmp_path / "runs" / "tiny"
    assert (run_dir / "samples" / "step-00000002.png").is_file()
    restorer = load_restorer(run_dir / "model.safetensors")
    image = np.full((1, 18, 22, 3), 90, np.uint8)
    assert restorer.restore(image, [1]).shape == image.shape
