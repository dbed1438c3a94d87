"""Models for others: model folders, .safetensors files, and the authors' trainer files."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from data_pipeline.errors import ConfigError, EnvironmentFault, ModelError
from rddm_dist.config import Config, DiffusionSection, iter_keys, to_yaml
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.factory import make_schedule
from rddm_dist.importing import flat, interpret, plain, usual_objective
from rddm_dist.loading import MODEL_FILE, Model
from rddm_dist.model.published import LINEAGES, Published, identify_network, read_published, write_published
from rddm_dist.model.weights import save_safetensors

CONFIG_COPY = "model.yaml"  # not config.yaml, which marks a run folder
COPY_NOTE = f"# The configuration inside {MODEL_FILE}, for reading: a change made here has no effect.\n"
LAYOUTS = ("auto", "folder", "safetensors", "published")
AMBIGUOUS = (".pth", ".ckpt", ".bin", ".safetensor", ".yaml")  # of names meant for files, but which?
# Sections that decide how a model is used, and keys in them that only training or its previews read.
USED = ("diffusion.", "model.", "sample.", "data.preprocess.")
UNUSED = ("diffusion.loss", "sample.every", "sample.images", "sample.size")
# Without tables an import assumes these, which need not be our defaults.
FALLBACKS = ("diffusion.schedule.kind", "diffusion.num_timesteps", "diffusion.sum_scale", "diffusion.parity")
SCHEDULE = ("diffusion.schedule.", "diffusion.num_timesteps", "diffusion.sum_scale", "diffusion.parity")


@dataclass(frozen=True)
class Exported:
    """Where a model was written, whether it lay there already, and the settings (`key=value`) it went without."""

    path: Path
    is_reused: bool
    lost: tuple[str, ...] = ()


def choose_layout(out: str | Path, layout: str = "auto") -> str:
    """The layout of a name: .safetensors and .pt are files, all else is a folder. ConfigError for an unknown one."""
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout={layout} is not known; choose one of {', '.join(LAYOUTS)}")
    if layout != "auto":
        return layout
    suffix = Path(out).suffix
    if suffix in AMBIGUOUS:
        raise ConfigError(f"--out {out}: name a file .safetensors or .pt, or say what it is with --layout")
    return {".safetensors": "safetensors", ".pt": "published"}.get(suffix, "folder")


def export_model(model: Model, out: str | Path, *, layout: str = "auto", lineage: str = "") -> Exported:
    """Write a model: a model folder, one .safetensors file, or a trainer file of the authors (layout published).

    lineage: whose trainer file, one of LINEAGES; empty: that of the file the model was imported from, or the first.
    A trainer file is read back before it gets its name. Raises ConfigError for what has no counterpart in the layout,
    ModelError where something else lies at `out`.
    """
    layout, out = choose_layout(out, layout), Path(out)
    if lineage and layout != "published":
        raise ConfigError(f"--lineage={lineage} goes with --layout published, or with a name that ends in .pt")
    check_target(out, layout=layout)
    state = model.net.state_dict()
    if layout == "folder":
        return write_model_folder(out, state, config=model.config, extra=model.extra)
    if layout == "safetensors":
        values = model.config.model_dump(mode="json")
        return _publish(out, lambda staged: save_safetensors(staged, state, config=values, extra=model.extra))
    return _export_published(model, out, lineage=lineage or model.extra.get("lineage", LINEAGES[0]))


def write_model_folder(
    folder: str | Path, state: Mapping[str, Tensor], *, config: Config, extra: Mapping[str, str]
) -> Exported:
    """Write a model folder: model.safetensors and the same configuration to be read, both or neither.

    state: our keys, float32. A folder that holds this very model is left alone; ModelError where anything else is.
    """
    check_target(Path(folder), layout="folder")

    def write(staged: Path) -> None:
        staged.mkdir()
        save_safetensors(staged / MODEL_FILE, state, config=config.model_dump(mode="json"), extra=extra)
        (staged / CONFIG_COPY).write_text(COPY_NOTE + to_yaml(config))

    return _publish(Path(folder), write)


def check_target(out: Path, *, layout: str) -> None:
    """Raise ModelError where something lies at `out` that cannot be such a model."""
    if layout != "folder":
        if out.is_dir():
            raise ModelError(f"--out {out} is a folder; give the name of a file")
    elif out.is_file():
        raise ModelError(f"--out {out} is a file; give the name of a new folder")
    elif out.is_dir():
        strange = sorted({path.name for path in out.iterdir()} - {MODEL_FILE, CONFIG_COPY})
        if strange:
            raise ModelError(f"--out {out} holds {strange[0]} and is no model folder; give the name of a new one")


def _export_published(model: Model, out: Path, *, lineage: str) -> Exported:
    config = model.config
    if config.diffusion.process != "rddm":
        raise ConfigError(
            f"the authors' trainer files hold no model of diffusion.process={config.diffusion.process}; export it as "
            ".safetensors"
        )
    if config.diffusion.objective == "auto":
        raise ConfigError("diffusion.objective=auto: the search of this run has not ended, there is no model yet")
    state, schedule = model.net.state_dict(), make_schedule(config.diffusion)
    lost: list[str] = []

    def write(staged: Path) -> None:
        write_published(
            staged,
            state,
            model=config.model.model_dump(),
            schedule=schedule,
            step=int(model.extra.get("step", 0)),
            lineage=lineage,
            alpha_res=float(model.extra["alpha_res"]) if "alpha_res" in model.extra else None,
        )
        back = read_published(staged, self_condition=config.model.self_condition)
        if not all(torch.equal(tensor, state[name]) for name, tensor in back.state.items()):
            raise EnvironmentFault(f"{out}: other weights were read back than were written; check the disk")
        lost.extend(_lost(back, config, schedule))

    exported = _publish(out, write)
    return Exported(exported.path, exported.is_reused, tuple(lost))


def _lost(file: Published, config: Config, schedule: Schedule) -> list[str]:
    """The settings, as `key=value`, that must be given to import the file as the same model."""
    given: dict[str, Any] = {"diffusion": {"objective": config.diffusion.objective}}
    lost = []
    if file.alpha_res is None and config.diffusion.objective != usual_objective(
        config.model.kind, config.model.num_nets
    ):
        lost.append(f"diffusion.objective={config.diffusion.objective}")
    if config.model.self_condition and not identify_network(file.state)["self_condition"]:
        lost.append("model.self_condition=true")
    is_told = file.schedule is not None and _is_same_schedule(make_schedule(_diffusion(file.schedule)), schedule)
    if not is_told:
        names = ("schedule", "num_timesteps", "sum_scale", "parity")
        given["diffusion"] |= config.diffusion.model_dump(include=set(names))
        defaults = flat({"diffusion": DiffusionSection().model_dump()})
        keys = flat({"diffusion": config.diffusion.model_dump()})
        lost += [
            f"{name}={plain(value)}"
            for name, value in keys.items()
            if name in FALLBACKS or (name.startswith("diffusion.schedule.") and value != defaults[name])
        ]
    again = {name: value for name, _, value in iter_keys(interpret(file, source=Path("it"), given=given).config)}
    lost += [
        f"{name}={plain(value)}"
        for name, _, value in iter_keys(config)
        if name.startswith(USED) and not name.startswith((*UNUSED, *SCHEDULE)) and again[name] != value
    ]
    return lost


def _diffusion(schedule: Mapping[str, Any]) -> DiffusionSection:
    """Arguments of `make_schedule` as a section of the configuration."""
    top = {key: value for key, value in schedule.items() if key in ("num_timesteps", "sum_scale", "parity")}
    rest = {key: value for key, value in schedule.items() if key not in top}
    return DiffusionSection.model_validate({"schedule": rest, **top})


def _is_same_schedule(one: Schedule, other: Schedule) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def _publish(out: Path, write: Callable[[Path], None]) -> Exported:
    """Write a file or folder beside its place, then put it there at once; the same content again changes nothing."""
    place = out.absolute()
    staged = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write(staged)
        is_taken = place.is_file() or (place.is_dir() and any(place.iterdir()))
        if is_taken and not _is_same(staged, place):
            raise ModelError(f"--out {out} holds another model already; give another name, or take it away first")
        if not is_taken:
            os.replace(staged, place)
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(f"--out {out} cannot be written: {' '.join(str(error).split())}") from error
    finally:
        if staged.is_dir():
            shutil.rmtree(staged)
        elif staged.exists():
            staged.unlink()
    return Exported(out, is_taken)


def _is_same(one: Path, other: Path) -> bool:
    """Whether two files, or two folders of files, have the same content."""
    if not one.is_dir():
        return filecmp.cmp(one, other, shallow=False)
    names = {path.name for path in one.iterdir()}
    if names != {path.name for path in other.iterdir()}:
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])
