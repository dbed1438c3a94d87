"""Everything about a run that can be checked before workers start: data, batch plan, what the folder already holds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import ConfigError, EnvironmentFault, ModelError
from data_pipeline.manifest import Manifest
from data_pipeline.retry import RetryPolicy
from rddm_dist.config import EXTENDABLE, IDENTITY, Config, differences, load_config, to_yaml
from rddm_dist.diffusion.selection import check_selection
from rddm_dist.evaluation.restore import restore_settings
from rddm_dist.factory import make_sampling_schedule, make_schedule
from rddm_dist.loading import locate
from rddm_dist.tracking.store import default_uri
from rddm_dist.training.data import TrainData, find_data
from rddm_dist.training.folder import (
    CONFIG_FILE,
    IDENTITY_FILE,
    JOURNAL_FILE,
    SEGMENTS,
    TRACKER_FILE,
    RunFolder,
    run_folder,
)
from rddm_dist.training.ownership import OWNER_PATTERN
from rddm_dist.training.plan import BatchPlan, make_plan
from rddm_dist.training.stopping import LAUNCHES, REQUEST_FILE

QUARANTINE_FILE = "quarantine.jsonl"
INIT_WEIGHTS = "init_weights"  # key of identity.json
# What a start that came to nothing may leave in a run folder.
LEFTOVERS = {"logs", "ray", LAUNCHES, REQUEST_FILE, IDENTITY_FILE, JOURNAL_FILE, SEGMENTS, TRACKER_FILE}


@dataclass(frozen=True)
class Prepared:
    """A checked run: where it lives, what it reads, how the batch is spread.

    `changes`: extendable keys that differ from the earlier start of a continued run, as `name: old -> new`;
    `init_weights`: digest of the weights that train.init_from gave the run, once they are known.
    """

    config: Config
    folder: RunFolder
    data: TrainData
    plan: BatchPlan
    is_continued: bool
    changes: tuple[str, ...] = ()
    init_weights: str = ""

    @property
    def run_dir(self) -> Path:
        """Where this machine writes: the run folder itself, or the work folder of one at a URL."""
        return self.folder.work

    @property
    def home(self) -> str:
        """The run folder: an absolute path or a URL."""
        return self.folder.home

    @property
    def data_fingerprint(self) -> str:
        return self.data.fingerprint


def prepare(config: Config, *, world_size: int) -> Prepared:
    """Check a run against its data and its folder without writing anything.

    Raises ConfigError or DataError with the key to change.
    """
    data = find_data(config)
    plan = check_settings(config, world_size=world_size)
    _check_images(config, data)
    if config.data.eval_uri:
        retry = RetryPolicy(deadline_s=config.data.read_deadline_s)
        _check_preview(config, data, Manifest.load(config.data.eval_uri, retry=retry))
    check_tracking(config)
    folder = run_folder(config)
    is_continued = folder.exists(CONFIG_FILE)
    prepared = Prepared(config, folder, data, plan, is_continued)
    if is_continued:
        return _check_continuation(prepared)
    check_free(folder)
    check_init(config)
    return prepared


def look_again(prepared: Prepared) -> Prepared:
    """The run once this process owns its folder, where another may have been at work since `prepare`."""
    prepared = replace(prepared, is_continued=prepared.folder.exists(CONFIG_FILE))
    return _check_continuation(prepared) if prepared.is_continued else prepared


def check_free(folder: RunFolder) -> None:
    """Raise ConfigError where something else than a run is in the place of a new one."""
    try:
        names = storage.list_names(folder.home)
    except OSError as error:
        raise EnvironmentFault(
            f"run.storage: {folder.home} cannot be used ({error.strerror or error}); choose another --storage"
        ) from error
    if any(name for name in names if name not in LEFTOVERS and name[0] != "." and not OWNER_PATTERN.fullmatch(name)):
        raise ConfigError(
            f"{folder.home} exists but holds no {CONFIG_FILE}, so it is not a run; choose another run.name"
        )


def check_tracking(config: Config) -> None:
    """MLflow's default store is a file beside the run folders, which needs a folder."""
    if config.tracking.backend == "mlflow" and not config.tracking.uri and not storage.is_local(config.run.storage):
        raise ConfigError(
            f"run.storage={config.run.storage} cannot hold MLflow's default store; set tracking.uri to a server, or "
            "tracking.backend=none"
        )


def check_settings(config: Config, *, world_size: int) -> BatchPlan:
    """What can be checked without the data: schedule, sampler, sides of crops.   -> how the batch is spread"""
    multiple = _multiple(config)
    for crop in config.data.crop_schedule.values():
        if crop % multiple:
            raise ConfigError(
                f"data.crop={crop} must be a multiple of {multiple} for model.dim_mults={list(config.model.dim_mults)}"
            )
    if config.diffusion.objective == "auto":
        check_selection(make_schedule(config.diffusion))
    restore_settings(config).check(make_sampling_schedule(config))
    return make_plan(
        global_batch=config.train.global_batch, world_size=world_size, micro_batch=config.train.micro_batch
    )


def _check_images(config: Config, data: TrainData) -> None:
    multiple = _multiple(config)
    for crop in data.rows.crop.values():
        height, width = data.rows.shape(data.manifests, crop)
        if height % multiple or width % multiple:
            raise ConfigError(
                f"images of {width}x{height} are no multiple of {multiple}; set data.crop or "
                f"data.preprocess.pad_multiple={multiple}"
            )
    if config.model.condition == "input_mask" and not data.has_mask:
        way = "add inpaint(...) to data.degrade" if config.data.degrade else "pack with --mask"
        raise ConfigError(
            f"model.condition=input_mask needs masks, {data.uris[0]} gives none; {way} or use model.condition=input"
        )


def _multiple(config: Config) -> int:
    """What the sides of images must be multiples of: the network halves them once per level but the first."""
    return 2 ** (len(config.model.dim_mults) - 1)


def _check_preview(config: Config, data: TrainData, manifest: Manifest) -> None:
    uri = config.data.eval_uri
    if not (manifest.has_input or config.data.degrade or config.diffusion.generate):
        raise ConfigError(f"data.eval_uri={uri} holds clean images only; set data.degrade, or pack pairs")
    if config.model.condition == "input_mask" and "mask" not in data.rows.outputs(manifest):
        raise ConfigError(f"model.condition=input_mask needs masks, data.eval_uri={uri} has none; pack with --mask")


def check_init(config: Config) -> None:
    """Find out whether train.init_from, if any, is there; whether it fits is for the workers to find out."""
    if not config.train.init_from:
        return
    with naming_init_from():
        locate(config.train.init_from, tracking_uri=registry_of(config))


@contextlib.contextmanager
def naming_init_from() -> Iterator[None]:
    """What is said about a model is said about the key that names it."""
    try:
        yield
    except ModelError as error:
        said = str(error).replace("name it with --tracking-uri", "set tracking.uri")
        raise ModelError(f"train.init_from: {said}") from error


def registry_of(config: Config) -> str:
    """The tracking URI that models:/ names of a run's configuration are looked up at."""
    if config.tracking.uri or not config.train.init_from.startswith("models:/"):
        return config.tracking.uri
    if not storage.is_local(config.run.storage):
        raise ConfigError(
            f"models:/ names are looked up at an MLflow server, and run.storage={config.run.storage} holds none; set "
            "tracking.uri"
        )
    return default_uri(config.run.storage)


def _check_continuation(prepared: Prepared) -> Prepared:
    """Compare with what the folder was started with: identity keys must agree, extendable ones may move.

    ->  the run with those that did, and with the weights it was started from
    """
    run_dir, config = prepared.home, prepared.config
    earlier = check_same_settings(config, prepared.folder)
    identity = _read_identity(prepared.folder)
    fingerprint = identity["data_fingerprint"]
    if fingerprint != prepared.data_fingerprint:
        raise ConfigError(
            f"{run_dir} was started on other data (fingerprint {fingerprint[:12]}, {', '.join(config.data.uris)} has "
            f"{prepared.data_fingerprint[:12]}); point data.uri to the same dataset or choose another run.name"
        )
    lanes = list(prepared.data.lanes)
    if identity["lanes"] != lanes:
        raise ConfigError(
            f"{run_dir} was started with {identity['lanes']} lanes, now {lanes} would be chosen; give back data.lanes"
        )
    _check_same_beginning(run_dir, earlier.train.init_from, config.train.init_from)
    return replace(
        prepared,
        changes=tuple(differences(earlier, config, EXTENDABLE)),
        init_weights=identity.get(INIT_WEIGHTS, ""),
    )


def check_same_settings(config: Config, folder: RunFolder) -> Config:
    """Raise ConfigError where the run in `folder` was started with other identity keys.   -> what it began with"""
    earlier = load_config(folder.uri(CONFIG_FILE))
    changed = differences(earlier, config, IDENTITY)
    if changed:
        raise ConfigError(
            f"{folder.home} was started with other settings ({'; '.join(changed)}); give those back or choose another "
            "run.name"
        )
    return earlier


def _read_identity(folder: RunFolder) -> dict[str, Any]:
    content = folder.read(IDENTITY_FILE)
    try:
        if content is None:
            raise ValueError("it is missing")
        return dict(json.loads(content))
    except ValueError as error:
        raise ModelError(
            f"{folder.uri(IDENTITY_FILE)} is damaged ({error}); give the file back, or choose another run.name"
        ) from error


def _check_same_beginning(run_dir: str, earlier: str, now: str) -> None:
    """A run keeps what it was started from, a model or drawn weights; where the model lies may change."""
    if earlier and not now:
        raise ConfigError(
            f"{run_dir} was started from a model; give back train.init_from={earlier} or choose another run.name"
        )
    if now and not earlier:
        raise ConfigError(
            f"{run_dir} was started from drawn weights, not from train.init_from={now}; leave it empty or choose "
            "another run.name"
        )


def make_run_dir(prepared: Prepared) -> None:
    """Create the folder that this machine writes to, or find out that it cannot be written."""
    try:
        prepared.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        key = "run.work_dir" if prepared.folder.is_remote else "run.storage"
        given = prepared.run_dir.parent if prepared.folder.is_remote else prepared.config.run.storage
        raise EnvironmentFault(
            f"{key}={given} cannot be written ({error.strerror}); choose another "
            + ("one" if prepared.folder.is_remote else "--storage")
        ) from error


def write_identity(prepared: Prepared) -> None:
    """Write config.yaml and identity.json into the run folder; config.yaml last, it makes the folder a run."""
    identity: dict[str, Any] = {
        "data_fingerprint": prepared.data_fingerprint,
        "lanes": list(prepared.data.lanes),
    }
    if prepared.init_weights:
        identity[INIT_WEIGHTS] = prepared.init_weights
    text = to_yaml(prepared.config)
    prepared.folder.write(IDENTITY_FILE, json.dumps(identity, indent=1).encode())
    prepared.folder.write(CONFIG_FILE, text.encode())
    if prepared.folder.is_remote:
        (prepared.run_dir / CONFIG_FILE).write_text(text)  # for MLflow, and for whoever looks into the work folder
