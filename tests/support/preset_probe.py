"""Trains each preset for two steps at toy size on generated data and prints what became of it, as JSON.

python -m tests.support.preset_probe FOLDER PRESET.yaml...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.pack import pack
from data_pipeline.sources import find_clean
from rddm_dist.comm import Topology
from rddm_dist.config import Config, load_config
from rddm_dist.loading import load_model
from rddm_dist.log import quiet_frameworks
from rddm_dist.tracking.journal import read_journal
from rddm_dist.training.run import train
from tests.support.datasets import make_dataset, make_folders

SIDE = 16
TOY = (
    "model.dim=8", "model.dim_mults=[1, 2]", "optim.warmup_steps=0", "optim.schedule=constant", "train.steps=2",
    "train.global_batch=2", "train.log_every=1", "train.checkpoint_every=2", "sample.every=2", "sample.steps=2",
    f"sample.size={SIDE}", "sample.images=2", "tracking.backend=none",
)  # fmt: skip


def toy_overrides(config: Config, data: str, storage: Path) -> list[str]:
    """What makes a preset small and leaves its ways alone: squares stay squares, crops stay crops."""
    overrides = [*TOY, f"data.uri={json.dumps(data)}", f"run.storage={json.dumps(str(storage))}"]
    if config.data.eval_uri:
        overrides.append(f"data.eval_uri={json.dumps(data)}")
    preprocess = config.data.preprocess
    for key in ("pad_to", "resize"):
        if getattr(preprocess, key):
            overrides.append(f"data.preprocess.{key}={SIDE}")
    if config.data.crop:
        overrides.append(f"data.crop={SIDE}")
    if config.diffusion.objective == "auto":
        # One step moves the weight of the search by about the learning rate.
        overrides.append("optim.lr=0.02")
    return overrides


def make_data(folder: Path) -> dict[str, str]:
    """Datasets of pairs, of pairs with masks, of clean images."""
    make_folders(folder / "photos", count=4)
    pack(find_clean(folder / "photos" / "target"), str(folder / "clean"), shard_mb=0.02, jobs=1)
    return {
        "pairs": make_dataset(folder, count=4, name="pairs"),
        "masks": make_dataset(folder, count=4, name="masks", mask=True),
        "clean": str(folder / "clean"),
    }


def kind_of(config: Config) -> str:
    if config.data.degrade or config.diffusion.generate:
        return "clean"
    return "masks" if config.model.condition == "input_mask" else "pairs"


def run_preset(path: str, data: dict[str, str], storage: Path) -> dict[str, Any]:
    preset = load_config(path)
    config = load_config(path, toy_overrides(preset, data[kind_of(preset)], storage))
    result = train(config, Topology())
    run_dir = Path(result.run_dir)
    losses = [record["metrics"] for record in read_journal(run_dir / "metrics.jsonl") if record["event"] == "metrics"]
    return {
        "status": result.status,
        "step": result.step,
        "losses": [metrics["train/loss"] for metrics in losses if "train/loss" in metrics],
        "previews": [path.name for path in sorted((run_dir / "samples").glob("*.png"))],
        "objective": load_model(str(run_dir / "model.safetensors")).config.diffusion.objective,
    }


def main(folder: Path, presets: Sequence[str]) -> None:
    quiet_frameworks()
    data = make_data(folder)
    for path in presets:
        print(json.dumps({"preset": Path(path).stem, **run_preset(path, data, folder / "runs")}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
