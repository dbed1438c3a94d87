"""Evaluation on Ray: a pool of actors that hold the model and run units of work."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from cluster.ray_pool import Worker, run_on_actors
from rddm_dist.evaluation.evaluate import EvalSettings, Unit, UnitRunner


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
    results = run_on_actors(
        _make_worker,
        {"model": model, "uri": uri, "settings": settings, "images_dir": images_dir},
        [unit.to_json() for unit in units],
        actors=actors,
        cpus_per_actor=settings.threads,
        gpus_per_actor=gpus_per_actor,
    )
    return (json.loads(rows) for rows in results)


def _make_worker(model: str, uri: str, settings: EvalSettings, images_dir: str) -> Worker:
    """A UnitRunner that takes a unit and gives its rows, both as JSON text."""
    runner = UnitRunner(model, uri, settings, images_dir=images_dir)
    return lambda unit: json.dumps(runner.run(Unit.from_json(unit)))
