"""Train, evaluate and serve Residual Denoising Diffusion Models (RDDM), the same on a laptop and on a cluster.

The public API: `load_model`, `restore`, `generate`, `evaluate`, `train`. Imports are lazy, so that importing the
package is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from rddm_dist.config import Config
    from rddm_dist.loading import Model
    from rddm_dist.training.run import TrainResult

__all__ = ["evaluate", "generate", "load_model", "restore", "train"]
__version__ = "0.1.0"


def load_model(model: str | Path, *, tracking_uri: str = "", overrides: Sequence[str] = ()) -> Model:
    """Load a run folder, a checkpoint folder, a .safetensors export or `models:/name@alias` on the CPU.

    overrides: `sample.KEY=VALUE`, sampler settings other than the model's own, such as "sample.path=residual_first".
    Raises ModelError for what is absent or damaged, ConfigError for an override that does not fit.
    """
    from rddm_dist.loading import load_model as load

    return load(str(model), tracking_uri=tracking_uri, overrides=overrides)


def restore(
    model: Model,
    images: np.ndarray,
    *,
    masks: np.ndarray | None = None,
    steps: int | None = None,
    eta: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Restore images of one size.   images: (B, H, W, 3) uint8 -> (B, H, W, 3) uint8

    masks: (B, H, W) or (B, H, W, 1) uint8, for a model that sees masks and for no other. The noise of image i is that
    of id i; None takes the model's own sampler settings.
    """
    from rddm_dist.evaluation.restore import make_restorer
    from rddm_dist.model.inputs import check_mask

    restorer = make_restorer(model, steps=steps, eta=eta, seed=seed)
    check_mask(model.config.model.condition, given=masks is not None)
    return restorer.restore(images, range(len(images)), masks)


def generate(
    model: Model,
    num: int,
    *,
    first: int = 0,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    eta: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> np.ndarray:
    """Generate images first .. first + num - 1 with a model of diffusion.generate=true.   -> (num, H, W, 3) uint8

    size: (H, W), None takes that of training. The noise of an image follows from its number and the seed, whatever the
    batch; None takes the model's own sampler settings.
    """
    import numpy as np

    from rddm_dist.evaluation.generate import make_generator, plan_batches

    generator = make_generator(model, size=size, steps=steps, eta=eta, seed=seed)
    batches = plan_batches(range(first, first + num), batch_size=batch_size, written=set())
    empty = np.empty((0, *generator.size, 3), np.uint8)
    return np.concatenate([empty, *(generator.generate(batch) for batch in batches)])


def evaluate(
    model: str | Path,
    data: str,
    *,
    protocol: str = "rgb",
    metrics: Sequence[str] = (),
    steps: int | None = None,
    overrides: Sequence[str] = (),
    out: str | Path = "",
) -> dict[str, Any]:
    """Score a model on a packed dataset in this process.   -> the object of report.json

    out: a folder for the results, with which the same call goes on where it stopped; none: they are not kept.
    Raises ConfigError for an unknown protocol or metric, DataError or ModelError for bad inputs.
    """
    import tempfile

    import torch

    from rddm_dist.evaluation.evaluate import plan_restoration, run_plan
    from rddm_dist.evaluation.job import EvalSettings
    from rddm_dist.evaluation.sources import PackedSource
    from rddm_dist.evaluation.summary import build_report

    loaded = load_model(model, overrides=overrides)
    sampler = loaded.config.sample
    settings = EvalSettings(
        protocol=protocol,
        metrics=tuple(metrics),
        steps=sampler.steps if steps is None else steps,
        eta=sampler.eta,
        overrides=tuple(overrides),
    )
    plan = plan_restoration(loaded, PackedSource(data), settings)
    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory(prefix="rddm-evaluation-") as folder:
            outcome = run_plan(plan, out=str(out) or folder)
    finally:
        torch.set_num_threads(threads)
    return build_report(plan, outcome, name=loaded.extra.get("run", ""), model=loaded)


def train(config: Config) -> TrainResult:
    """Train in this process, or as one worker of a group that torchrun started. See `rddm_dist.config.load_config`."""
    from rddm_dist.comm import topology_from_env
    from rddm_dist.training.run import train as run

    return run(config, topology_from_env())
