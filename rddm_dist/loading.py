"""Load a trained model from wherever it lives: a run or model folder, a checkpoint, a .safetensors, the registry.

Folders may be local or at a URL.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from data_pipeline import storage
from data_pipeline.errors import ConfigError, ModelError
from rddm_dist.config import Config, apply_override, load_config, parse_config
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.factory import make_net, make_sampling_schedule
from rddm_dist.model.net import Network
from rddm_dist.model.weights import load_safetensors, weights_digest

if TYPE_CHECKING:
    from rddm_dist.training.checkpoint import Checkpoint

MODEL_FILE = "model.safetensors"  # alone in a folder, or with a readable copy of its configuration: a model folder
PREVIEW_KEYS = ("every", "images", "size")  # of the sample section, about previews during training alone


@dataclass(frozen=True)
class Model:
    """A network in evaluation mode with EMA weights, its schedule for sampling and the config it was trained with.

    Sampler settings may have been overridden, in config and schedule alike. `digest` is the sha256 of the weights;
    `path` the file or checkpoint folder they came from, a path or a URL.
    """

    net: Network
    schedule: Schedule
    config: Config
    digest: str
    path: str
    extra: dict[str, str]


def locate(model: str, *, tracking_uri: str = "") -> str:
    """Turn MODEL into an absolute path or a URL. Raises ModelError when nothing is there."""
    if model.startswith("models:/"):
        from rddm_dist.tracking.mlflow_tracker import default_uri
        from rddm_dist.tracking.registry import resolve

        return str(resolve(model, uri=tracking_uri or default_uri("runs")))
    if not storage.exists(model):
        raise ModelError(
            f"model {model} does not exist; give a run folder, a model folder, a checkpoint folder, a .safetensors "
            "file or models:/name@alias"
        )
    return str(storage.local_path(model).resolve()) if storage.is_local(model) else model.rstrip("/")


def load_model(model: str, *, tracking_uri: str = "", overrides: Sequence[str] = ()) -> Model:
    """Load MODEL on the CPU, with its sampler settings changed by `overrides` (see `override_sampler`).

    A run folder stands for its newest sound checkpoint; of a checkpoint the EMA weights are taken. A folder that holds
    model.safetensors and is no run folder stands for that file. Raises ModelError in one line for what is
    absent, damaged or not ours.
    """
    path = locate(model, tracking_uri=tracking_uri)
    if _has(path, MODEL_FILE) and not _has(path, "config.yaml"):
        path = storage.join(path, MODEL_FILE)
    if _is_file(path):
        state, values, extra = _load_file(path)
        config = parse_config(values, source=path)
    else:
        path, state, config, extra = _load_folder(path)
    config = override_sampler(config, overrides)
    net = make_net(config)
    own = net.state_dict()
    wrong = sorted(set(own) ^ set(state))
    if wrong:
        raise ModelError(f"{path} does not fit its own configuration: parameter {wrong[0]} is missing or unknown")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ModelError(
                f"{path} does not fit its own configuration: parameter {name} is {tuple(state[name].shape)}, not "
                f"{tuple(tensor.shape)}"
            )
    net.load_state_dict(state)
    net.eval().requires_grad_(False)
    return Model(net, make_sampling_schedule(config), config, weights_digest(state), path, extra)


def override_sampler(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with other sampler settings.   overrides: `sample.KEY=VALUE`, values are YAML

    Raises ConfigError for other sections, unknown keys, keys of previews and values out of range.
    """
    if not overrides:
        return config
    values = config.model_dump()
    for override in overrides:
        section, _, key = override.partition("=")[0].strip().partition(".")
        if section != "sample" or not key:
            raise ConfigError(
                f"--set {override} is no setting of the sampler; give sample.KEY=VALUE, for example sample.steps=10"
            )
        if key in PREVIEW_KEYS:
            raise ConfigError(
                f"--set {override}: sample.{key} is about previews during training, it has no effect here"
            )
        apply_override(values, override)
    return parse_config(values, source="--set")


def _has(folder: str, name: str) -> bool:
    return storage.exists(storage.join(folder, name))


def _is_file(path: str) -> bool:
    return storage.local_path(path).is_file() if storage.is_local(path) else path.endswith(".safetensors")


def _load_file(path: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Weights, configuration and notes of a .safetensors file."""
    if storage.is_local(path):
        return load_safetensors(storage.local_path(path))
    with tempfile.TemporaryDirectory(prefix="rddm-model-") as folder:
        local = Path(folder) / MODEL_FILE
        storage.download(path, local)
        return load_safetensors(local)


def _load_folder(path: str) -> tuple[str, dict[str, Tensor], Config, dict[str, str]]:
    """EMA weights of a run folder's newest sound checkpoint, or of a checkpoint folder; first, which checkpoint."""
    from rddm_dist.training import checkpoint as ckpt

    found, run_dir = find_checkpoint(path)
    config = run_config(run_dir, found)
    if config.diffusion.objective == "auto":
        raise _is_searching(path)
    progress = found.progress
    name = run_dir.rstrip("/").rsplit("/", 1)[-1]
    extra = {"step": str(progress.step), "data_fingerprint": progress.data_fingerprint, "run": name}
    return found.uri, found.read_full(ckpt.EMA), config, extra


def run_config(run_dir: str, checkpoint: Checkpoint) -> Config:
    """The configuration that a checkpoint of a run was trained with, the objective of a search included."""
    from rddm_dist.training.selection import with_outcome

    return with_outcome(load_config(storage.join(run_dir, "config.yaml")), checkpoint.progress.selection)


def find_checkpoint(path: str) -> tuple[Checkpoint, str]:
    """The verified checkpoint that a run folder (its newest sound one) or a checkpoint folder stands for, and its run.

    Raises ModelError where there is none.
    """
    from rddm_dist.training import checkpoint as ckpt

    if _has(path, "config.yaml"):
        found = ckpt.find_newest(storage.join(path, ckpt.CHECKPOINTS))
        if found is not None:
            return found, path
        if load_config(storage.join(path, "config.yaml")).diffusion.objective == "auto":
            raise _is_searching(path)
        raise ModelError(f"run {path} has no checkpoint yet")
    run_dir = path.rsplit("/", 2)[0]
    if not _has(run_dir, "config.yaml"):
        raise ModelError(f"{path} is neither a run folder, a checkpoint inside one, nor a model folder")
    checkpoint = ckpt.read_commit(path)
    ckpt.verify(checkpoint)
    return checkpoint, run_dir


def _is_searching(path: str) -> ModelError:
    return ModelError(
        f"{path} belongs to a search for the objective (diffusion.objective=auto), there is no model yet; continue the "
        "run until it has a checkpoint of the training"
    )
