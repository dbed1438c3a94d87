"""Where the state of a run comes from: a checkpoint, a model to start from (train.init_from), or the seed alone."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, EnvironmentFault, ModelError
from data_pipeline.rng import mix_seed
from rddm_dist import comm
from rddm_dist.config import Config, identity_digest, iter_keys
from rddm_dist.factory import make_net
from rddm_dist.loading import Model, load_model
from rddm_dist.model.net import Network
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.ema import Ema, profiles
from rddm_dist.training.engine import MOMENTS, Engine
from rddm_dist.training.prepare import Prepared, naming_init_from, registry_of
from rddm_dist.training.selection import SEARCH_DIR, Selection, read_selection

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run goes on from, known to every worker.

    checkpoint: the newest sound one, of the search while it lasts, None at the beginning; selection: the outcome of
    the search where there is one; skipped: damaged checkpoints that were passed over.
    """

    checkpoint: ckpt.Checkpoint | None
    selection: Selection | None
    skipped: tuple[str, ...]

    @property
    def step(self) -> int:
        return self.checkpoint.progress.step if self.checkpoint else 0


def find_start(prepared: Prepared) -> Start:
    """Look for what the run folder holds. All ranks call it: they share the reading, and fail together.

    Raises ModelError for what does not fit, or where nothing is sound.
    """
    folder, selection = prepared.folder, None
    found, skipped = ckpt.find_newest_together(folder.uri(ckpt.CHECKPOINTS))
    if prepared.config.diffusion.objective == "auto":
        trained = found.progress.selection if found else None
        with comm.together():
            if comm.rank() == 0:
                selection = read_selection(folder) or trained
        selection = comm.broadcast_object(selection)
        if trained and selection and trained.objective != selection.objective:
            raise _shared(
                f"{folder.home} holds a selection of {selection.objective} and a checkpoint trained with "
                f"{trained.objective}; move the one that is not this run's away"
            )
        if selection is None:
            found, more = ckpt.find_newest_together(folder.uri(SEARCH_DIR))
            skipped = skipped + more
    if found is not None and found.progress.config_digest != identity_digest(prepared.config):
        raise _shared(f"checkpoint {found.uri} was written with other settings than config.yaml says")
    if found is not None and found.progress.data_fingerprint != prepared.data_fingerprint:
        raise _shared(
            f"checkpoint {found.uri} was trained on other data (fingerprint "
            f"{found.progress.data_fingerprint[:12]}) than data.uri holds ({prepared.data_fingerprint[:12]}); give the "
            "same dataset back or choose another run.name"
        )
    return Start(found, selection, tuple(skipped))


def _shared(text: str) -> ModelError:
    """What every worker has found out."""
    error = ModelError(text)
    error.is_shared = True
    return error


def check_room(prepared: Prepared, net: Network) -> None:
    """Raise EnvironmentFault where a folder has no room for one more checkpoint. Rank 0."""
    if prepared.folder.is_remote:
        return
    elements = sum(p.numel() for p in net.parameters())
    needed = elements * 4 * (1 + len(MOMENTS) + len(profiles(prepared.config.ema)))
    free = shutil.disk_usage(prepared.run_dir).free
    if free < needed:
        raise EnvironmentFault(
            f"run.storage={prepared.config.run.storage} has {free / 1e6:.0f} MB free, a checkpoint of this run takes "
            f"{needed / 1e6:.0f} MB; make room or choose another --storage"
        )


def load_state(checkpoint: ckpt.Checkpoint, engine: Engine, ema: Ema) -> None:
    """Bring engine and averages to where the checkpoint is. All ranks call it, and fail together."""
    ckpt.load_checkpoint(checkpoint, engine, ema)
    progress = checkpoint.progress
    log.info(
        "resumed from %s at step %d, written by %d worker(s) at ZeRO stage %d",
        checkpoint.uri,
        progress.step,
        progress.world_size,
        progress.zero_stage,
    )


def draw_net(config: Config) -> Network:
    """The network with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix_seed(config.train.seed, "init") % 2**63)
        return make_net(config, activation_checkpointing=config.engine.activation_checkpointing)


def load_init(prepared: Prepared, net: Network) -> Prepared:
    """Fill a new run's network with the EMA weights of train.init_from.   -> the run with the digest of those weights

    Raises ModelError where they do not fit, or are not those that an earlier start of the run began with.
    """
    given = prepared.config.train.init_from
    with naming_init_from():
        model = load_model(given, tracking_uri=registry_of(prepared.config))
    _check_fit(prepared.config, model, net.state_dict())
    if prepared.init_weights not in ("", model.digest):
        raise ModelError(
            f"train.init_from={given} has other weights ({model.digest[:12]}) than {prepared.home} was started from "
            f"({prepared.init_weights[:12]}) and there is no checkpoint yet; give those back or choose another run.name"
        )
    net.load_state_dict(model.net.state_dict())
    log.info("starting from the weights of %s (%s)", model.path, model.digest[:12])
    for key in ("objective", "time_input", "generate"):
        theirs, ours = getattr(model.config.diffusion, key), getattr(prepared.config.diffusion, key)
        if theirs != ours:
            log.warning("train.init_from=%s was trained with diffusion.%s=%s, not %s", given, key, theirs, ours)
    return replace(prepared, init_weights=model.digest)


def check_same_init(prepared: Prepared) -> None:
    """Raise ModelError on every worker where they have read different weights, as of a run that is still trained."""
    digests = comm.gather_object(prepared.init_weights)
    with comm.together():
        if digests is not None and len(set(digests)) > 1:
            raise ModelError(
                f"train.init_from={prepared.config.train.init_from} changed while the workers read it; give a "
                "checkpoint folder or a .safetensors file, which stay as they are"
            )


def _check_fit(config: Config, model: Model, ours: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of the parameters; settings tell more than parameters where they differ.

    What the network is shown counts as well: equal channels may be read in two ways.
    """
    theirs = model.net.state_dict()
    reads_alike = all(
        getattr(config.model, key) == getattr(model.config.model, key) for key in ("condition", "self_condition")
    )
    wrong = [
        name
        for name in {**ours, **theirs}
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
    ]
    if not wrong and reads_alike:
        return
    there = {name: value for name, _, value in iter_keys(model.config.model)}
    named = "; ".join(
        f"model.{name} is {_plain(value)} here and {_plain(there[name])} there"
        for name, _, value in iter_keys(config.model)
        if there[name] != value
    )
    raise ConfigError(
        f"train.init_from={config.train.init_from} does not fit the configured network: "
        f"{named or f'parameter {wrong[0]} differs'}; change the model section, or start from another model"
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
