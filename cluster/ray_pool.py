"""A pool of Ray actors, each holding one worker (a model, say) that units of work are handed to, as JSON text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray.data

from cluster.ray_session import quiet_ray_data, ray_session, require_resources
from data_pipeline import errors
from data_pipeline.errors import RddmError

# Blocks per actor: small enough that a slow actor does not hold up the end, large enough to keep Ray's overhead low.
BLOCKS_PER_ACTOR = 16

Worker = Callable[[str], str]  # a unit in, its result out


class _Actor:
    """A worker behind Ray Data's calling convention: one row in, one row out."""

    def __init__(self, make: Callable[..., Worker], options: Mapping[str, Any]) -> None:
        self._make, self._options = make, options
        self._worker: Worker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if self._worker is None:
                self._worker = self._make(**self._options)
            return {"result": self._worker(row["unit"]), "error": ""}
        except RddmError as error:
            # Told in one line by whoever asked; Ray would wrap it in its own and print both.
            return {"result": "", "error": f"{type(error).__name__}:{error}"}


def run_on_actors(
    make: Callable[..., Worker],
    options: Mapping[str, Any],
    units: Sequence[str],
    *,
    actors: int,
    cpus_per_actor: int = 1,
    gpus_per_actor: float = 0.0,
) -> Iterator[str]:
    """Run units on `actors` Ray actors, each with a worker `make(**options)`, yielding results in any order.

    `make` is a function of a module that every node can import. The first error that comes back is raised.
    """
    if not units:
        return
    with ray_session(cpus=actors * cpus_per_actor):
        require_resources(cpus=actors * cpus_per_actor, gpus=actors * gpus_per_actor)
        quiet_ray_data()
        dataset = ray.data.from_items(
            [{"unit": unit} for unit in units],
            override_num_blocks=min(len(units), BLOCKS_PER_ACTOR * actors),
        ).map(
            _Actor,  # type: ignore[arg-type]  # Ray Data takes classes whose instances are called
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=cpus_per_actor,
            num_gpus=gpus_per_actor or None,
            fn_constructor_kwargs={"make": make, "options": dict(options)},
        )
        for row in dataset.iter_rows():
            if row["error"]:
                name, _, text = row["error"].partition(":")
                raise getattr(errors, name)(text)
            yield row["result"]
