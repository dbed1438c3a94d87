"""Load a trained model from wherever it lives: a run folder, a checkpoint, a .safetensors export, or the registry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data_pipeline.errors import ModelError
from rddm_dist.config import Config, load_config, parse_config
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.factory import make_net, make_sampling_schedule
from rddm_dist.model.net import Network
from rddm_dist.model.weights import load_safetensors, weights_digest


@dataclass(frozen=True)
class Model:
    """A network in evaluation mode with EMA weights, its schedule for sampling and the config it was trained with.

    `digest` is the sha256 of the weights; `path` the file or checkpoint folder they came from.
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
            f"model {model} does not exist; give a run folder, a checkpoint folder, a .safetensors file or "
            "models:/name@alias"
        )
    return path.resolve()


def load_model(model: str, *, tracking_uri: str = "") -> Model:
    """Load MODEL on the CPU.

    A run folder stands for its newest sound checkpoint; of a checkpoint the EMA weights are taken. Raises ModelError
    in one line for what is absent, damaged or not ours.
    """
    path = locate(model, tracking_uri=tracking_uri)
    if path.is_file():
        state, values, extra = load_safetensors(path)
        config = parse_config(values, source=str(path))
    else:
        path, state, config, extra = _load_folder(path)
    net = make_net(config)
    wrong = sorted(set(net.state_dict()) ^ set(state))
    if wrong:
        raise ModelError(f"{path} does not fit its own configuration: parameter {wrong[0]} is missing or unknown")
    net.load_state_dict(state)
    net.eval().requires_grad_(False)
    return Model(net, make_sampling_schedule(config), config, weights_digest(state), path, extra)


def _load_folder(path: Path) -> tuple[Path, dict[str, Tensor], Config, dict[str, str]]:
    """EMA weights of a run folder's newest sound checkpoint, or of a checkpoint folder; first, which checkpoint."""
    from rddm_dist.training import checkpoint as ckpt
    from rddm_dist.training.prepare import CONFIG_FILE

    if (path / CONFIG_FILE).is_file():
        run_dir = path
        found = ckpt.find_newest(path / "checkpoints")
        if found is None:
            raise ModelError(f"run {path} has no checkpoint yet")
    else:
        run_dir = path.parent.parent
        if not (run_dir / CONFIG_FILE).is_file():
            raise ModelError(f"{path} is neither a run folder nor a checkpoint inside one")
        found = ckpt.read_commit(path)
        ckpt.verify(found)
    progress = found.progress
    extra = {"step": str(progress.step), "data_fingerprint": progress.data_fingerprint, "run": run_dir.name}
    return found.path, dict(ckpt.Reader(found).read_full(ckpt.EMA)), load_config(run_dir / CONFIG_FILE), extra
