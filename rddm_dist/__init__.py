"""Train, evaluate and serve Residual Denoising Diffusion Models (RDDM), the same on a laptop and on a cluster.

The public API: `load_model`, `restore`, `evaluate`, `train`. Imports are lazy, so that importing the package is cheap.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from rddm_dist.config import Config
    from rddm_dist.loading import Model
    from rddm_dist.training.run import TrainResult

__all__ = ["evaluate", "load_model", "restore", "train"]
__version__ = "0.1.0"


def load_model(model: str | Path, *, tracking_uri: str = "") -> Model:
    """Load a run folder, a checkpoint folder, a .safetensors export or `models:/name@alias` on the CPU.

    Raises ModelError for what is absent or damaged.
    """
    from rddm_dist.loading import load_model as load

    return load(str(model), tracking_uri=tracking_uri)


def restore(
    model: Model, images: np.ndarray, *, steps: int | None = None, eta: float | None = None, seed: int = 0
) -> np.ndarray:
    """Restore images of one size.   images: (B, H, W, 3) uint8 -> (B, H, W, 3) uint8

    The noise of image i is that of id i; None takes the model's own sampler settings.
    """
    from rddm_dist.evaluation.restore import make_restorer

    return make_restorer(model, steps=steps, eta=eta, seed=seed).restore(images, range(len(images)))


def evaluate(model: str | Path, data: str, *, protocol: str = "rgb", steps: int | None = None) -> dict[str, Any]:
    """Score a model on a packed dataset in this process.   -> the object of report.json

    Raises ConfigError for an unknown protocol, DataError or ModelError for bad inputs.
    """
    from data_pipeline.manifest import Manifest
    from rddm_dist.evaluation.evaluate import EvalSettings, plan_units, run_here
    from rddm_dist.evaluation.summary import build_report

    loaded = load_model(model)
    sampler = loaded.config.sample
    settings = EvalSettings(protocol=protocol, steps=sampler.steps if steps is None else steps, eta=sampler.eta)
    settings.check()
    manifest = Manifest.load(data)
    units = plan_units(data, manifest, batch_size=settings.batch_size)
    rows = [row for unit_rows in run_here(str(loaded.path), data, units, settings) for row in unit_rows]
    return build_report(rows, model=loaded, data=data, manifest=manifest, settings=settings)


def train(config: Config) -> TrainResult:
    """Train in this process, or as one worker of a group that torchrun started. See `rddm_dist.config.load_config`."""
    from rddm_dist.comm import topology_from_env
    from rddm_dist.training.run import train as run

    return run(config, topology_from_env())
