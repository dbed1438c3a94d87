"""Generating images on Ray: a pool of actors that hold the model and write their images themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.ray_pool import Worker, run_on_actors
from rddm_dist.evaluation.generate import GenerateSettings, load_generator, write_batch

CPUS_PER_ACTOR = 1


def run_on_ray(
    model: str,
    batches: Sequence[Sequence[int]],
    settings: GenerateSettings,
    *,
    out: Path,
    actors: int,
    gpus_per_actor: float = 0.0,
) -> Iterator[list[int]]:
    """Generate batches of numbered images on a pool of `actors` Ray actors, yielding the numbers that are written.

    `model` must be a path that every node can read, `out` a folder that every node can write.
    """
    results = run_on_actors(
        _make_worker,
        {"model": model, "settings": replace(settings, threads=CPUS_PER_ACTOR), "out": str(out.resolve())},
        [json.dumps(list(numbers)).encode() for numbers in batches],
        actors=(actors, actors),
        cpus_per_actor=CPUS_PER_ACTOR,
        gpus_per_actor=gpus_per_actor,
    )
    return (json.loads(numbers) for numbers in results)


def _make_worker(model: str, settings: GenerateSettings, out: str) -> Worker:
    """Takes the numbers of a batch as JSON, writes their images and gives back the numbers of those it wrote."""
    generator = load_generator(model, settings)
    return lambda numbers: json.dumps(write_batch(generator, json.loads(numbers), out=Path(out))).encode()
