"""Tiny models and feature networks as files, and evaluations of them that take a moment."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rddm_dist import load_model
from rddm_dist.config import Config
from rddm_dist.evaluation.evaluate import Plan, plan_restoration
from rddm_dist.evaluation.job import EvalSettings
from rddm_dist.evaluation.sources import Source
from rddm_dist.factory import make_net
from rddm_dist.model.weights import save_safetensors

FEATURES, CLASSES = 6, 4
RESTORING: dict[str, dict[str, Any]] = {
    "model": {"dim": 8, "dim_mults": [1, 2], "num_nets": 1},
    "diffusion": {"objective": "pred_res", "num_timesteps": 20, "sum_scale": 0.01},
    "sample": {"steps": 2},
}
GENERATING: dict[str, dict[str, Any]] = {
    "model": {"dim": 8, "dim_mults": [1, 2], "num_nets": 1, "condition": "none"},
    "diffusion": {"objective": "pred_res", "generate": True, "num_timesteps": 20},
    "data": {"crop": 16},
    "sample": {"steps": 2},
}


def tiny_model(folder: Path, *, seed: int = 0, value: float | None = None, **config: Mapping[str, Any]) -> Path:
    """A restoring model of a few thousand parameters.   -> folder/model.safetensors

    seed: of its random weights; value: of every weight in place of them, such as NaN; config: sections such as
    sample={"steps": 3}, whose keys are put over those of RESTORING.
    """
    return _save(folder, RESTORING, config, seed=seed, value=value)


def tiny_generator(folder: Path, *, seed: int = 0, value: float | None = None, **config: Mapping[str, Any]) -> Path:
    """A model that generates images of 16x16, else as tiny_model.   -> folder/model.safetensors"""
    return _save(folder, GENERATING, config, seed=seed, value=value)


def feature_network(folder: Path, *, seed: int = 0, logits: bool = True) -> Path:
    """A TorchScript network to FEATURES numbers and, with logits, CLASSES classes.   -> folder/features.pt"""
    torch.manual_seed(seed)
    return _script(_Features(logits), folder / "features.pt")


def lpips_network(folder: Path, *, seed: int = 0) -> Path:
    """A TorchScript network of two batches of images to a distance each, 0 for equal ones.   -> folder/lpips.pt"""
    torch.manual_seed(seed)
    return _script(_Distance(), folder / "lpips.pt")


def restoration(model: Path, source: Source, *, limit: int = 0, keep_images: bool = False, **settings: Any) -> Plan:
    """The plan of an evaluation; settings: of EvalSettings, steps and eta by default those of the model."""
    loaded = load_model(model)
    sampler = loaded.config.sample
    chosen = EvalSettings(**{"steps": sampler.steps, "eta": sampler.eta, **settings})
    return plan_restoration(loaded, source, chosen, limit=limit, keep_images=keep_images)


class _Features(nn.Module):
    def __init__(self, has_logits: bool) -> None:
        super().__init__()
        self.filters, self.classes = nn.Conv2d(3, FEATURES, 3, stride=2), nn.Linear(FEATURES, CLASSES)
        self.has_logits = has_logits

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.filters(images / 32).relu().mean(dim=[2, 3])
        return [features, self.classes(features)] if self.has_logits else [features]


class _Distance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(3, FEATURES, 3, stride=2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.filters(x / 255) - self.filters(y / 255)).square().mean(dim=[1, 2, 3])


def _save(
    folder: Path, base: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Mapping[str, Any]], *,
    seed: int, value: float | None,
) -> Path:  # fmt: skip
    sections = {name: {**base.get(name, {}), **changes.get(name, {})} for name in {**base, **changes}}
    config = Config.model_validate(sections)
    torch.manual_seed(seed)
    state = make_net(config).state_dict()
    if value is not None:
        state = {name: torch.full_like(tensor, value) for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(folder / "model.safetensors", state, config=config.model_dump(mode="json"))
    return folder / "model.safetensors"


def _script(module: nn.Module, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
        torch.jit.save(torch.jit.script(module.eval()), path)
    return path
