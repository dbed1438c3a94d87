"""A pool of Ray actors, each holding one worker (a model, say) that units of work are handed to, as bytes."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import ray
import ray.data
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.ray_session import quiet_ray_data, ray_session, require_actors
from data_pipeline import errors
from data_pipeline.errors import ConfigError, EnvironmentFault, RddmError, kind_of

# Of a unit whose process dies each time. Ray retries without a limit, so that lost nodes never end a long job.
MAX_STARTS = 5
# A task holds one unit, or several where there are very many: Ray's share of a task is about ten milliseconds. A task
# stays below 1/256 of an actor's work, so that neither progress, a kill nor the end of the job shows it.
TASKS_PER_ACTOR, MAX_UNITS_PER_TASK = 256, 16
# A task waits behind the one that runs, else an actor idles up to 0.1 s until Ray Data looks again; but not where an
# actor has few of them, perhaps long ones: another actor might run it at once.
FEW_TASKS_PER_ACTOR = 8
# Results that are finished and not yet taken: beyond it Ray Data starts no more tasks.
RESULT_BYTES = 128 * 2**20
# Ray calls a worker in a thread of its own, for whose small arena glibc takes and gives back large arrays each time.
ACTOR_ENV = {"MALLOC_ARENA_MAX": "1"}
GROWTH_TIMEOUT_S = 900  # for the nodes of the first `min` actors, on a cluster that adds nodes by itself

Worker = Callable[[bytes], bytes]  # a unit in, its result out


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class _Starts:
    """Counts how often each stage of each unit was started and not finished; it lives where the driver does."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, int]] = Counter()

    def begin(self, stage: tuple[str, int], finished: tuple[str, int] | None) -> int:
        if finished is not None:
            self._counts.pop(finished, None)
        self._counts[stage] += 1
        return self._counts[stage]


class _Actor:
    """A worker behind Ray Data's calling convention: one row in, one row out. It is made with the first unit."""

    def __init__(self, make: Callable[..., Worker], options: Mapping[str, Any], starts: Any) -> None:
        self._make, self._options, self._starts = make, options, starts
        self._worker: Worker | None = None
        self._finished: tuple[str, int] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if self._worker is None:
                with self._stage("make", row, "an actor died while it made its worker"):
                    self._worker = self._make(**self._options)
            with self._stage("run", row, f"{row['name']} killed the process that worked on it"):
                result = self._worker(row["unit"])
            return {"index": row["index"], "result": result, "error": ""}
        except RddmError as error:
            # Told in one line by whoever asked; Ray would wrap it in its own and print both.
            return {"index": row["index"], "result": b"", "error": f"{kind_of(error)}:{error}"}
        except Exception:
            # Raised by whoever asked: in Ray's own report of it the line that counts is hard to find.
            return {"index": row["index"], "result": b"", "error": f":{traceback.format_exc()}"}

    @contextlib.contextmanager
    def _stage(self, name: str, row: dict[str, Any], what: str) -> Iterator[None]:
        """Not entered again when the process died in it MAX_STARTS times."""
        stage = (name, row["index"])
        if ray.get(self._starts.begin.remote(stage, self._finished)) > MAX_STARTS:
            raise EnvironmentFault(
                f"{what}, {MAX_STARTS} times in a row: out of memory, or a crash in native code; "
                "give an actor less to hold (a smaller batch or tile, fewer actors per machine) or more memory"
            )
        yield
        self._finished = stage


def run_on_actors(
    make: Callable[..., Worker],
    options: Mapping[str, Any],
    units: Sequence[bytes],
    *,
    actors: tuple[int, int],
    cpus_per_actor: int = 1,
    gpus_per_actor: float = 0.0,
    names: Sequence[str] = (),
) -> Iterator[bytes]:
    """Run units on a pool of Ray actors, each with a worker `make(**options)`, yielding results in any order.

    `make` is a function of a module that every node can import. `actors` is the least and the most there may be: the
    pool starts with the least, grows while units wait and the cluster has room. `gpus_per_actor` below 1 puts several
    on a GPU. `names` are what the units are called in errors, by default "unit 1 of 9".

    Each unit gives one result, whatever processes and nodes are lost: what was lost with them is run again. Finished
    results that are not yet taken are bounded by RESULT_BYTES, plus those of the tasks that are running. Closing the
    generator, or an exception in whoever reads it, kills the actors.

    Raises ConfigError for impossible numbers; EnvironmentFault if the cluster can never grant the least number of
    actors, if a unit killed its process MAX_STARTS times in a row, or if Ray itself fails; a worker's RddmError as it
    is, the first that comes back; any other exception of a worker as a RuntimeError that ends with its traceback.
    """
    low, high = _checked(actors, cpus_per_actor, gpus_per_actor)
    if not units:
        return
    with ray_session(cpus=low * cpus_per_actor):
        room = require_actors(low, cpus=cpus_per_actor, gpus=gpus_per_actor)
        quiet_ray_data()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        starts = _Starts.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        likely = min(high, max(low, room))
        in_flight = tasks_in_flight(len(units), likely)
        dataset = _rows(units, names, actors=likely).map(
            _Actor,  # type: ignore[arg-type]  # Ray Data takes classes whose instances are called
            compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high, max_tasks_in_flight_per_actor=in_flight),
            num_cpus=cpus_per_actor,
            num_gpus=gpus_per_actor or None,
            runtime_env={"env_vars": ACTOR_ENV},
            fn_constructor_kwargs={"make": make, "options": dict(options), "starts": starts},
        )
        dataset.context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
            object_store_memory=RESULT_BYTES
        )
        # The pool grows while every actor has all the tasks it may have.
        dataset.context.autoscaling_config.actor_pool_util_upscaling_threshold = float(in_flight)
        if room < low:
            dataset.context.wait_for_min_actors_s = GROWTH_TIMEOUT_S
        try:
            with contextlib.closing(_results(dataset, len(units))) as results:
                yield from results
        finally:
            ray.kill(starts)


def _checked(actors: tuple[int, int], cpus: int, gpus: float) -> tuple[int, int]:
    low, high = actors
    if not 1 <= low <= high:
        raise ConfigError(f"--actors {low}:{high} is not possible; give N or MIN:MAX with 1 <= MIN <= MAX")
    if cpus < 1 or gpus < 0 or (gpus > 1 and gpus % 1):
        raise ConfigError(
            f"an actor of {cpus} CPUs and {gpus:g} GPUs is not possible; give at least one CPU, and for "
            "--gpus-per-actor a whole number or a fraction below 1"
        )
    return low, high


def units_per_task(units: int, actors: int) -> int:
    """How many of `units` units one Ray task holds, on `actors` actors.   -> 1..MAX_UNITS_PER_TASK"""
    return min(max(units // (TASKS_PER_ACTOR * actors), 1), MAX_UNITS_PER_TASK)


def tasks_in_flight(units: int, actors: int) -> int:
    """How many tasks an actor is given at once, for `units` units on `actors` actors.   -> 1 or 2"""
    return 1 if units <= FEW_TASKS_PER_ACTOR * actors else 2


def _rows(units: Sequence[bytes], names: Sequence[str], *, actors: int) -> ray.data.Dataset:
    names = names or [f"unit {index + 1} of {len(units)}" for index in range(len(units))]
    rows = [{"index": i, "name": name, "unit": unit} for i, (name, unit) in enumerate(zip(names, units, strict=True))]
    return ray.data.from_items(rows, override_num_blocks=-(-len(rows) // units_per_task(len(rows), actors)))


def _results(dataset: ray.data.Dataset, count: int) -> Generator[bytes, None, None]:
    """The results of a mapped dataset of `count` rows, as its tasks finish."""
    taken: set[int] = set()
    # Without prefetching: it would hold back each result until the next one is there.
    batches: Any = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    with contextlib.closing(batches), _ray_errors():
        for table in batches:
            for row in table.to_pylist():
                if row["error"]:
                    raise _error(row["error"])
                assert row["index"] not in taken
                taken.add(row["index"])
                yield row["result"]
    assert len(taken) == count


def _error(told: str) -> Exception:
    """What an actor told as "TYPE:message" of an RddmError, or as ":traceback" of any other exception."""
    name, _, text = told.partition(":")
    return getattr(errors, name)(text) if name else RuntimeError(f"a worker on Ray failed:\n{text}")


@contextlib.contextmanager
def _ray_errors() -> Iterator[None]:
    """Ray's own failures as an EnvironmentFault in one line."""
    try:
        yield
    except GetTimeoutError as error:
        raise EnvironmentFault(
            f"the cluster gave no room for the first actors within {GROWTH_TIMEOUT_S} s; lower --actors or add nodes"
        ) from error
    except RayError as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise EnvironmentFault(f"Ray cannot run the actors ({type(error).__name__}): {last[:300]}") from error
