"""The authors' trainer files as models: what a file says, what its reader must say, and what is assumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.errors import ConfigError
from rddm_dist.config import Config, SampleSection, ScheduleSection, iter_keys, parse_config
from rddm_dist.factory import make_schedule
from rddm_dist.model.published import BUFFERS, Published, read_published
from rddm_dist.model.recognition import TOLERANCE

Values = Mapping[str, Any]  # sections of a configuration, of which not all keys need be there

TWO_OUTPUTS = ("pred_res_noise", "pred_res_add_noise", "pred_x0_noise", "pred_x0_add_noise")
ONE_OUTPUT = ("pred_res", "pred_noise", "pred_x0")
SEARCH_MARGIN = 0.01  # the authors' search goes on while alpha_res is closer than this to one half


@dataclass(frozen=True, eq=False)
class Imported:
    """A trainer file as a model, and where its configuration comes from.

    state: weights under our keys, float32; extra: step, lineage, source (the file's name), weights and, after an
    objective search, alpha_res; found: what the file says, as {"model.dim": 64}; assumed: sentences, one for each thing
    that neither the file nor its reader says.
    """

    state: dict[str, Tensor]
    config: Config
    extra: dict[str, str]
    found: dict[str, Any]
    assumed: tuple[str, ...]


def import_published(
    path: str | Path, *, given: Values | None = None, self_condition: bool | None = None, weights: str = "ema"
) -> Imported:
    """Read a trainer file of the authors as a model.

    given: sections of a configuration; they are checked against the file, and say what it does not. self_condition and
    weights are as for `read_published`. Raises ConfigError for a contradiction, or for what must be given and is not,
    ModelError for a file that is not one of the authors'; each in one line.
    """
    path, given = Path(path), given or {}
    said = _part(given, "model").get("self_condition")
    said = said if isinstance(said, bool) else None
    if self_condition is not None and said not in (None, self_condition):
        flag = "--self-condition" if self_condition else "--no-self-condition"
        raise ConfigError(f"model.self_condition={plain(said)} contradicts {flag}; drop one of them")
    is_told = self_condition is not None or not {"condition", "self_condition"}.isdisjoint(_part(given, "model"))
    file = read_published(path, self_condition=said if self_condition is None else self_condition, weights=weights)
    imported = interpret(file, source=path, given=given)
    told = []
    if file.weights != weights:
        told.append("weights=model: those of the last step, the file holds no averaged ones")
    if not is_told and not file.model["self_condition"] and file.model["condition"] != "none":
        told.append(
            f"model.condition={file.model['condition']}: --self-condition if one of its images is its own estimate"
        )
    return replace(imported, assumed=(*imported.assumed, *told))


def interpret(file: Published, *, source: Path, given: Values) -> Imported:
    """What was read from `source`, with the settings its reader gives, as a model. See `import_published`."""
    diffusion = _part(given, "diffusion")
    if file.alpha_res is not None and diffusion.get("objective") == "auto":
        # The outcome of the search stands in the file.
        given = {**given, "diffusion": {key: value for key, value in diffusion.items() if key != "objective"}}
    found = _found(file, given, source)
    _check_network(file, given, source)
    assumed = _assumptions(file, given, source)
    guesses = _nested({key: value for key, value, _ in assumed})
    values = _merged(_merged(guesses, found), given)
    config = parse_config(values, source=f"{source} with the given keys")
    told = [f"{key}={plain(value)}: {why}" for key, value, why in assumed]
    told += _check_schedule(file, config, source)
    extra = {"step": str(file.step), "lineage": file.lineage, "source": source.name, "weights": file.weights}
    if file.alpha_res is not None:
        extra["alpha_res"] = repr(file.alpha_res)
    return Imported(file.state, config, extra, flat(found), tuple(told))


def usual_objective(kind: str, num_nets: int) -> str | None:
    """What the authors train a network of this form for; None for one U-Net, which goes with several objectives."""
    if kind == "shared_encoder":
        return "pred_res_add_noise"
    return "pred_res_noise" if num_nets == 2 else None


def flat(values: Values, prefix: str = "") -> dict[str, Any]:
    """{"model": {"dim": 64}} as {"model.dim": 64}."""
    keys: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            keys |= flat(value, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = value
    return keys


def plain(value: Any) -> str:
    """A value as an override takes it."""
    return json.dumps(value) if isinstance(value, (bool, tuple, list)) else str(value)


def _found(file: Published, given: Values, source: Path) -> dict[str, Any]:
    """The file's part of the configuration. A schedule that is given stands as a whole and is checked later."""
    diffusion: dict[str, Any] = {}
    is_given = "schedule" in _part(given, "diffusion")
    if file.schedule is not None:
        schedule = dict(file.schedule)
        diffusion = {key: schedule.pop(key) for key in ("num_timesteps", "sum_scale", "parity")}
        if _hides_sum_scale(file.schedule):
            del diffusion["sum_scale"]
        diffusion |= {} if is_given else {"schedule": schedule}
    elif not is_given:
        what = "tables of no known schedule" if file.tables else "no tables of its schedule"
        raise ConfigError(
            f"{source} holds {what}; give diffusion.schedule.kind with the other diffusion.schedule.* keys, "
            "diffusion.num_timesteps and diffusion.sum_scale as in its training"
        )
    elif file.tables is not None:
        diffusion["num_timesteps"] = file.tables["alphas"].numel()
    return {"model": file.model, "diffusion": diffusion}


def _check_network(file: Published, given: Values, source: Path) -> None:
    """Raise ConfigError where another network is given, or an objective that the file's cannot have."""
    for key, value in _part(given, "model").items():
        if key in file.model and (tuple(value) if isinstance(value, list) else value) != file.model[key]:
            hint = "; or is one of its images its own estimate? then --self-condition" if key == "condition" else ""
            raise _contradiction(source, f"model.{key}", file.model[key], value, hint)
    objective = _part(given, "diffusion").get("objective")
    if objective is None:
        return
    outputs = file.model["num_nets"]
    allowed = ONE_OUTPUT if outputs == 1 else TWO_OUTPUTS
    if objective not in allowed:
        raise ConfigError(
            f"diffusion.objective={objective} contradicts {source}, whose network has {outputs} output(s); choose one "
            f"of {', '.join(allowed)}"
        )
    if file.alpha_res is not None and outputs == 1 and objective != _winner(file.alpha_res):
        theirs = f"{_winner(file.alpha_res)} (alpha_res {file.alpha_res:.4g})"
        raise _contradiction(source, "diffusion.objective", theirs, objective)


def _assumptions(file: Published, given: Values, source: Path) -> list[tuple[str, Any, str]]:
    """(key, value, why) of what neither the file nor its reader says."""
    diffusion = _part(given, "diffusion")
    assumed: list[tuple[str, Any, str]] = []

    def assume(key: str, value: Any, why: str) -> None:
        section, name = key.split(".")
        if name not in _part(given, section):
            assumed.append((key, value, why))

    if "objective" not in diffusion:
        assumed.append(("diffusion.objective", *_derive_objective(file, source)))
    assume("diffusion.residual_clip", [-1.0, 1.0], "the authors' clamp")
    assume("diffusion.time_input", "index", "files do not tell; clocks for the authors' experiments 0, 4 and 5")
    schedule = file.schedule or {}
    if not schedule:
        if file.tables is None:
            assume("diffusion.num_timesteps", 1000, "the file does not tell")
        assume("diffusion.sum_scale", 1.0, "the file does not tell")
        assume("diffusion.parity", "official", "the file does not tell")
    elif _hides_sum_scale(schedule):
        assume("diffusion.sum_scale", 1.0, "the authors' tables of kind ddim do not contain it")
    if file.model["condition"] == "none":
        assume("diffusion.generate", False, "files do not tell; true for models that make images from noise alone")
    timesteps = diffusion.get("num_timesteps", schedule.get("num_timesteps", 1000))
    if isinstance(timesteps, int) and 1 <= timesteps < SampleSection().steps:
        assume("sample.steps", timesteps, "all timesteps")
    return assumed


def _derive_objective(file: Published, source: Path) -> tuple[str, str]:
    """The objective that the file suggests, and why. Raises ConfigError where it suggests none."""
    usual = usual_objective(file.model["kind"], file.model["num_nets"])
    if usual is not None:
        return usual, "the authors' for a network of this form; files do not tell"
    if file.alpha_res is None:
        raise ConfigError(
            f"{source} holds one U-Net and does not tell what it predicts; give diffusion.objective, one of "
            f"{', '.join(ONE_OUTPUT)}"
        )
    undecided = ", undecided" if abs(file.alpha_res - 0.5) < SEARCH_MARGIN else ""
    return _winner(file.alpha_res), f"the file's objective search stands at alpha_res {file.alpha_res:.4g}{undecided}"


def _winner(alpha_res: float) -> str:
    return "pred_res" if alpha_res > 0.5 else "pred_noise"


def _hides_sum_scale(schedule: Values) -> bool:
    """Whether tables of this schedule are the same for every sum_scale."""
    return schedule["parity"] == "official" and schedule.get("beta2_kind", schedule["kind"]) == "ddim"


def _check_schedule(file: Published, config: Config, source: Path) -> list[str]:
    """Compare the file's tables with those of the configuration.   -> what to tell

    Raises ConfigError naming the key where a schedule that was recognised is another one. Tables that were not
    recognised only say by how much they differ from what was given.
    """
    schedule = make_schedule(config.diffusion)
    if file.tables is None:
        return []
    count = file.tables["alphas"].numel()
    if schedule.num_timesteps != count:
        raise _contradiction(source, "diffusion.num_timesteps", count, schedule.num_timesteps)
    gaps = {}
    for name in ("alphas_cumsum", "betas2_cumsum"):
        theirs = file.tables[name].double()
        gap = (getattr(schedule, BUFFERS[name])[1:].double() - theirs).abs()
        if not bool(gap.max() <= TOLERANCE * theirs.abs().max()):
            gaps[BUFFERS[name]] = gap
    if not gaps:
        return []
    if file.schedule is None:
        name, gap = max(gaps.items(), key=lambda entry: float(entry[1].max()))
        t = int(gap.argmax())
        return [f"diffusion.schedule.* as given, although {name}[{t + 1}] differs by {float(gap[t]):.3g} from the file"]
    recognised = dict(file.schedule)
    top = {key: recognised.pop(key) for key in ("num_timesteps", "sum_scale", "parity")}
    theirs_by_key = {name: value for name, _, value in iter_keys(ScheduleSection(**recognised), "diffusion.schedule.")}
    theirs_by_key |= {f"diffusion.{key}": value for key, value in top.items()}
    ours = {name: value for name, _, value in iter_keys(config)}
    key = next(key for key, value in theirs_by_key.items() if ours[key] != value)
    raise _contradiction(source, key, theirs_by_key[key], ours[key])


def _contradiction(source: Path, key: str, theirs: Any, ours: Any, hint: str = "") -> ConfigError:
    return ConfigError(
        f"{key}={plain(ours)} contradicts {source}, which has {plain(theirs)}; drop the key, or take the file it "
        f"belongs to{hint}"
    )


def _part(values: Values, section: str) -> Values:
    """A section of given values; empty where there is none, or no section under that name (told by parse_config)."""
    part = values.get(section)
    return part if isinstance(part, Mapping) else {}


def _nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """{"model.dim": 64} as {"model": {"dim": 64}}."""
    values: dict[str, Any] = {}
    for key, value in keys.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    return values


def _merged(below: Values, above: Values) -> dict[str, Any]:
    """Both mappings in one; where both have a value, that of `above`."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
