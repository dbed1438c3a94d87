"""Evaluation on Ray: an actor pool that holds the model and runs units of work."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import ray
import ray.data

from cluster.ray_session import quiet_ray_data, ray_session, require_resources
from data_pipeline import errors
from data_pipeline.errors import RddmError
from rddm_dist.evaluation.evaluate import EvalSettings, Unit, UnitRunner

# Blocks per actor: small enough that a slow actor does not hold up the end, large enough to keep Ray's overhead low.
BLOCKS_PER_ACTOR = 16


class _Actor:
    """A UnitRunner behind Ray Data's calling convention: one row in, one row out, as JSON text."""

    def __init__(self, model: str, uri: str, settings: dict[str, Any], images_dir: str) -> None:
        self._runner = UnitRunner(model, uri, EvalSettings(**settings), images_dir=images_dir)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"rows": json.dumps(self._runner.run(Unit.from_json(row["unit"]))), "error": ""}
        except RddmError as error:
            # Told in one line by whoever asked; Ray would wrap it in its own and print both.
            return {"rows": "[]", "error": f"{type(error).__name__}:{error}"}


def run_on_ray(
    model: str,
    uri: str,
    units: Sequence[Unit],
    settings: EvalSettings,
    *,
    actors: int,
    gpus_per_actor: float = 0.0,
    images_dir: str = "",
) -> Iterator[list[dict[str, Any]]]:
    """Run units on a pool of `actors` Ray actors, yielding each unit's rows as it finishes, in any order.

    `model` must be a path and `uri` a location that every node can read.
    """
    with ray_session(cpus=actors):
        require_resources(cpus=actors * settings.threads, gpus=actors * gpus_per_actor)
        quiet_ray_data()
        dataset = ray.data.from_items(
            [{"unit": unit.to_json()} for unit in units],
            override_num_blocks=min(len(units), BLOCKS_PER_ACTOR * actors),
        ).map(
            _Actor,  # type: ignore[arg-type]  # Ray Data takes classes whose instances are called
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=settings.threads,
            num_gpus=gpus_per_actor or None,
            fn_constructor_kwargs={
                "model": model,
                "uri": uri,
                "settings": asdict(settings),
                "images_dir": images_dir,
            },
        )
        for result in dataset.iter_rows():
            if result["error"]:
                name, _, text = result["error"].partition(":")
                raise getattr(errors, name)(text)
            yield json.loads(result["rows"])
