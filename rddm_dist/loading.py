"""Load a trained model from wherever it lives: a run or model folder, a checkpoint, a .safetensors, the registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data_pipeline.errors import ConfigError, ModelError
from rddm_dist.config import Config, apply_override, load_config, parse_config
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.factory import make_net, make_sampling_schedule
from rddm_dist.model.net import Network
from rddm_dist.model.weights import load_safetensors, weights_digest

MODEL_FILE = "model.safetensors"  # alone in a folder, or with a readable copy of its configuration: a model folder
PREVIEW_KEYS = ("every", "images", "size")  # of the sample section, about previews during training alone


@dataclass(frozen=True)
class Model:
    """A network in evaluation mode with EMA weights, its schedule for sampling and the config it was trained with.

    Sampler settings may have been overridden, in config and schedule alike. `digest` is the sha256 of the weights;
    `path` the file or checkpoint folder they came from.
    """

    net: Network
    schedule: Schedule
    config: Config
    digest: str
    path: Path
    extra: dict[str, str]


def locate(model: str, *, tracking_uri: str = "") -> Path:
    """Turn MODEL into a local path. Raises ModelError when nothing is there."""
    if model.startswith("models:/"):
        from rddm_dist.tracking.mlflow_tracker import default_uri
        from rddm_dist.tracking.registry import resolve

        return resolve(model, uri=tracking_uri or default_uri("runs"))
    path = Path(model)
    if not path.exists():
        raise ModelError(
            f"model {model} does not exist; give a run folder, a model folder, a checkpoint folder, a .safetensors "
            "file or models:/name@alias"
        )
    return path.resolve()


def load_model(model: str, *, tracking_uri: str = "", overrides: Sequence[str] = ()) -> Model:
    """Load MODEL on the CPU, with its sampler settings changed by `overrides` (see `override_sampler`).

    A run folder stands for its newest sound checkpoint; of a checkpoint the EMA weights are taken. A folder that holds
    model.safetensors and is no run folder stands for that file. Raises ModelError in one line for what is
    absent, damaged or not ours.
    """
    path = locate(model, tracking_uri=tracking_uri)
    if (path / MODEL_FILE).is_file() and not (path / "config.yaml").exists():
        path /= MODEL_FILE
    if path.is_file():
        state, values, extra = load_safetensors(path)
        config = parse_config(values, source=str(path))
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


def _load_folder(path: Path) -> tuple[Path, dict[str, Tensor], Config, dict[str, str]]:
    """EMA weights of a run folder's newest sound checkpoint, or of a checkpoint folder; first, which checkpoint."""
    from rddm_dist.training import checkpoint as ckpt
    from rddm_dist.training.prepare import CONFIG_FILE
    from rddm_dist.training.selection import with_outcome

    if (path / CONFIG_FILE).is_file():
        run_dir = path
        found = ckpt.find_newest(path / "checkpoints")
        if found is None:
            if load_config(path / CONFIG_FILE).diffusion.objective == "auto":
                raise _is_searching(path)
            raise ModelError(f"run {path} has no checkpoint yet")
    else:
        run_dir = path.parent.parent
        if not (run_dir / CONFIG_FILE).is_file():
            raise ModelError(f"{path} is neither a run folder, a checkpoint inside one, nor a model folder")
        found = ckpt.read_commit(path)
        ckpt.verify(found)
    progress = found.progress
    config = with_outcome(load_config(run_dir / CONFIG_FILE), progress.selection)
    if config.diffusion.objective == "auto":
        raise _is_searching(path)
    extra = {"step": str(progress.step), "data_fingerprint": progress.data_fingerprint, "run": run_dir.name}
    return found.path, dict(ckpt.Reader(found).read_full(ckpt.EMA)), config, extra


def _is_searching(path: Path) -> ModelError:
    return ModelError(
        f"{path} belongs to a search for the objective (diffusion.objective=auto), there is no model yet; continue the "
        "run until it has a checkpoint of the training"
    )
