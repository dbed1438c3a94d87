"""The search for the objective (diffusion.objective=auto) as data: its curve, its outcome, the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.errors import ModelError
from rddm_dist.config import Config
from rddm_dist.diffusion.selection import SELECTABLE
from rddm_dist.training.folder import RunFolder

SELECTION_FILE = "selection.json"
SEARCH_DIR = "search"


@dataclass(frozen=True)
class Selection:
    """How far a search has come.

    objective: the outcome, "" while the search goes on; step: the one that found the weight outside the band before its
    update, else the last finished one; weight: before that update; curve: (step, weight) at log points.
    """

    objective: str
    step: int
    weight: float
    curve: tuple[tuple[int, float], ...] = ()


def parse_selection(values: Mapping[str, Any]) -> Selection:
    """What `asdict` and JSON have made of a Selection. Raises TypeError, ValueError or KeyError for anything else."""
    selection = Selection(
        objective=str(values["objective"]),
        step=int(values["step"]),
        weight=float(values["weight"]),
        curve=tuple((int(step), float(weight)) for step, weight in values["curve"]),
    )
    if selection.objective not in ("", *SELECTABLE):
        raise ValueError(f"objective {selection.objective} is none of {', '.join(SELECTABLE)}")
    return selection


def read_selection(folder: RunFolder) -> Selection | None:
    """The outcome that stands in `<run>/selection.json`; None: there is none yet. Raises ModelError when damaged."""
    try:
        content = folder.read(SELECTION_FILE)
        if content is None:
            return None
        selection = parse_selection(json.loads(content))
        if not selection.objective:
            raise ValueError("it names no objective")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{folder.uri(SELECTION_FILE)} is damaged ({error}); remove it: the training's checkpoints know the "
            "outcome too, and without them the search starts anew"
        ) from error
    return selection


def write_selection(folder: RunFolder, selection: Selection) -> None:
    """Write the outcome; it is there whole and on disk, or not at all."""
    folder.write(SELECTION_FILE, json.dumps(asdict(selection), indent=1).encode())


def with_outcome(config: Config, selection: Selection | None) -> Config:
    """The configuration of the training that follows a search; of a run without a search it is the given one."""
    if config.diffusion.objective != "auto" or selection is None or not selection.objective:
        return config
    diffusion = config.diffusion.model_copy(update={"objective": selection.objective})
    return config.model_copy(update={"diffusion": diffusion})
