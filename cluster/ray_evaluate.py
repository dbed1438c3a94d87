"""Evaluation on Ray: a pool of actors that hold the model and run units of work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.ray_pool import Worker, run_on_actors
from rddm_dist.evaluation.job import Job, Unit
from rddm_dist.evaluation.runner import UnitRunner


def run_on_ray(
    job: Job, units: Sequence[Unit], *, actors: tuple[int, int], gpus_per_actor: float = 0.0
) -> Iterator[bytes]:
    """Run units on a pool of `actors` (least, most) Ray actors, yielding each unit's table as it finishes.

    The model, the data and the feature networks must lie where every node can read them.
    """
    return run_on_actors(
        _make_worker,
        {"job": job},
        [unit.to_bytes() for unit in units],
        actors=actors,
        cpus_per_actor=job.settings.threads,
        gpus_per_actor=gpus_per_actor,
        names=[f"the forward batch that begins with {unit.entries[0].key}" for unit in units],
    )


def _make_worker(job: Job) -> Worker:
    return UnitRunner(job).run
