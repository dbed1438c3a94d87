"""The run configuration: what must fit between its sections, loading from YAML with `a.b=c` overrides, its identity."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from data_pipeline.errors import ConfigError
from rddm_dist.sections import (
    EXECUTION,
    EXTENDABLE,
    IDENTITY,
    DataSection,
    DiffusionSection,
    EmaSection,
    EngineSection,
    ModelSection,
    OptimSection,
    RunSection,
    SampleScheduleSection,
    SampleSection,
    ScheduleSection,
    Section,
    TrackingSection,
    TrainSection,
)

__all__ = [
    "EXECUTION",
    "EXTENDABLE",
    "IDENTITY",
    "LATER_KEYS",
    "Config",
    "DataSection",
    "DiffusionSection",
    "EmaSection",
    "EngineSection",
    "ModelSection",
    "OptimSection",
    "RunSection",
    "SampleScheduleSection",
    "SampleSection",
    "ScheduleSection",
    "Section",
    "TrackingSection",
    "TrainSection",
    "apply_override",
    "differences",
    "explain",
    "identity_digest",
    "iter_keys",
    "load_config",
    "parse_config",
    "to_yaml",
]

# Identity keys that came after runs had been written, with the value that those runs had without knowing.
LATER_KEYS: dict[str, Any] = {"diffusion.generate": False, "optim.noise_lr": 0.0, "ema.lengths": ()}


class Config(Section):
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    diffusion: DiffusionSection = DiffusionSection()
    model: ModelSection = ModelSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    ema: EmaSection = EmaSection()
    sample: SampleSection = SampleSection()
    engine: EngineSection = EngineSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _check(self) -> Config:
        one_output = ("pred_noise", "pred_res", "pred_x0", "pred_v", "auto")
        outputs = 1 if self.diffusion.objective in one_output else 2
        if self.model.kind == "shared_encoder":
            if outputs != 2:
                raise ValueError(
                    f"model.kind=shared_encoder has two outputs, diffusion.objective={self.diffusion.objective} one; "
                    "choose an objective of two, such as pred_res_add_noise, or model.kind=unet"
                )
        elif self.model.num_nets != outputs:
            raise ValueError(
                f"model.num_nets={self.model.num_nets} does not fit diffusion.objective={self.diffusion.objective}; "
                f"set model.num_nets={outputs}"
            )
        if self.diffusion.objective == "auto" and self.train.init_from:
            raise ValueError(
                f"train.init_from={self.train.init_from} does not fit diffusion.objective=auto, whose search starts "
                "from drawn weights; name an objective"
            )
        if self.diffusion.objective == "auto" and self.diffusion.process != "rddm":
            raise ValueError(
                f"diffusion.objective=auto does not fit diffusion.process={self.diffusion.process}, which has no "
                "residual; set diffusion.process=rddm"
            )
        if self.diffusion.objective == "auto" and self.optim.weight_decay:
            raise ValueError(
                f"optim.weight_decay={self.optim.weight_decay} would pull the weight of the search to one side with "
                "diffusion.objective=auto; set it to 0, or name an objective"
            )
        if self.diffusion.generate and self.model.condition != "none":
            raise ValueError(
                f"diffusion.generate=true shows the network no degraded image, model.condition={self.model.condition} "
                "asks for one; set model.condition=none"
            )
        if self.diffusion.generate and (self.data.degrade or self.data.preprocess.equalize):
            key = "degrade" if self.data.degrade else "preprocess.equalize"
            raise ValueError(f"data.{key} is about degraded images and diffusion.generate=true has none; remove one")
        if self.optim.noise_lr and (self.model.kind != "unet" or self.model.num_nets != 2):
            raise ValueError(
                f"optim.noise_lr={self.optim.noise_lr} is for the second of two networks; set it to 0, or "
                "model.kind=unet with model.num_nets=2"
            )
        if self.sample.steps > self.diffusion.num_timesteps:
            raise ValueError(
                f"sample.steps={self.sample.steps} exceeds diffusion.num_timesteps={self.diffusion.num_timesteps}; "
                "lower it"
            )
        if self.optim.warmup_steps > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} exceeds train.steps={self.train.steps}; lower it"
            )
        if self.optim.schedule == "cosine" and self.optim.decay_steps <= self.optim.warmup_steps:
            raise ValueError(
                f"optim.decay_steps={self.optim.decay_steps} must exceed optim.warmup_steps="
                f"{self.optim.warmup_steps} with optim.schedule=cosine; set it to train.steps"
            )
        has_previews = self.sample.every and not self.diffusion.generate
        if self.train.keep_best and self.train.best_metric == "preview/psnr" and not has_previews:
            raise ValueError(
                f"train.keep_best={self.train.keep_best} goes by preview/psnr, which this run does not measure; set "
                "train.best_metric=train/loss" + ("" if self.diffusion.generate else " or sample.every")
            )
        if self.data.lanes and self.train.global_batch % self.data.lanes:
            raise ValueError(
                f"data.lanes={self.data.lanes} does not divide train.global_batch={self.train.global_batch}; change one"
            )
        low, high = self.diffusion.residual_clip
        if not low < high:
            raise ValueError(f"diffusion.residual_clip=[{low}, {high}] must be increasing")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (a path or a URL), apply `section.key=value` overrides (values are YAML), check every key.

    Paths become absolute.

    Raises ConfigError in one line for a missing file, bad YAML, an unknown key (with the nearest known one) or a value
    out of range.
    """
    try:
        values = yaml.safe_load(_read_text(str(path))) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} must hold sections such as 'train:', not a {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    config = parse_config(values, source=str(path))
    run = config.run.model_copy(
        update={
            "name": config.run.name or Path(path).stem,
            "storage": _absolute(config.run.storage),
            "work_dir": _absolute(config.run.work_dir),
        }
    )
    data = config.data.model_copy(
        update={
            "uri": _absolute(config.data.uri)
            if isinstance(config.data.uri, str)
            else tuple(_absolute(uri) for uri in config.data.uri),
            "eval_uri": _absolute(config.data.eval_uri),
            "cache_dir": _absolute(config.data.cache_dir),
            # One spelling for one meaning, so that a run is not refused for another.
            "crop": config.data.crop_schedule if len(config.data.crop_schedule) > 1 else config.data.crop_schedule[0],
            "degrade": _canonical_degradation(config.data.degrade),
        }
    )
    train = config.train.model_copy(
        update={"init_from": _absolute(config.train.init_from), "notice_file": _absolute(config.train.notice_file)}
    )
    return config.model_copy(update={"run": run, "data": data, "train": train})


def _read_text(location: str) -> str:
    """A configuration file: a path, or the config.yaml of a run at a URL."""
    from data_pipeline import storage  # not needed to describe keys

    if storage.is_local(location) and not storage.local_path(location).is_file():
        known = sorted(str(p) for p in Path("configs/train").glob("*.yaml"))
        hint = f"; known presets: {', '.join(known)}" if known else ""
        raise ConfigError(f"config {location} does not exist{hint}")
    return storage.read_bytes(location).decode()


def _canonical_degradation(text: str) -> str:
    if not text:
        return text
    from data_pipeline.degradations import parse_degradation  # torch comes with it

    return parse_degradation(text).spec


def _absolute(location: str) -> str:
    """A local path as seen from here; workers start elsewhere. URLs, models:/ names and the empty string stay."""
    return location if ":/" in location or not location else str(Path(location).absolute())


def parse_config(values: dict[str, Any], *, source: str) -> Config:
    """Check a mapping of sections against the model; `source` names it in the error."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        known = [key for key, _, _ in iter_keys(Config())] + list(Config.model_fields)
        raise ConfigError(f"{source}: {explain(error, known)}") from error


def apply_override(values: dict[str, Any], override: str) -> None:
    """Put the value of `section.key=value` into a mapping of sections. Raises ConfigError for another form."""
    name, separator, text = override.partition("=")
    parts = name.strip().split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise ConfigError(f"override {override!r} must have the form section.key=value, for example train.steps=2000")
    try:
        value = yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    node = values
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part} is not a section")
        node = child
    node[parts[-1]] = value


def explain(error: ValidationError, known: Sequence[str]) -> str:
    """The first problem of a pydantic error in one line, with the nearest of the known keys for an unknown one."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        if not close:
            close = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:1]
        return f"unknown key {name}" + (f"; did you mean {close[0]}?" if close else "")
    if first["type"] == "missing":
        return f"{name} is missing; the file has to give it"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # of our own validators, which name the key
        return message
    return f"{name}={first['input']!r}: {message[0].lower()}{message[1:]}"


def iter_keys(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted name, class, value) of every key."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from iter_keys(value, f"{prefix}{name}.")
        else:
            extra = field.json_schema_extra
            assert isinstance(extra, dict), f"{prefix}{name} has no class"
            yield f"{prefix}{name}", str(extra["class"]), value


def differences(old: Config, new: Config, key_class: str) -> list[str]:
    """Keys of one class that differ, as `name: old -> new`."""
    before = {name: value for name, _, value in iter_keys(old)}
    return [
        f"{name}: {before[name]} -> {value}"
        for name, kind, value in iter_keys(new)
        if kind == key_class and before[name] != value
    ]


def identity_digest(config: Config) -> str:
    """sha256 over the identity keys: two runs with one digest (and one manifest) compute the same thing."""
    identity = {
        name: value
        for name, kind, value in iter_keys(config)
        if kind == IDENTITY and not (name in LATER_KEYS and value == LATER_KEYS[name])
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
