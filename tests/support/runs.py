"""A tiny run: config, data and how to start it."""

from __future__ import annotations

import sys
from pathlib import Path

TINY = """
data: {{uri: {data}, crop: 16}}
diffusion: {{objective: pred_res, num_timesteps: 20, loss: l2}}
model: {{dim: 8, dim_mults: [1, 2], num_nets: 1}}
optim: {{lr: 1.0e-4}}
train: {{steps: 10, global_batch: 6, log_every: 1, checkpoint_every: 5}}
ema: {{update_every: 1, start_step: 2}}
sample: {{steps: 2, every: 0, size: 16}}
run: {{storage: {storage}, name: tiny}}
tracking: {{backend: none}}
"""
TRAIN = (sys.executable, "-m", "rddm_dist.training")


def write_config(folder: Path, data: str) -> Path:
    """A run of ten steps of six crops, without previews and MLflow."""
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(data=data, storage=folder / "runs"))
    return path
