"""The pool of actors on a real Ray: each unit once whatever dies, errors in one line, no actor left behind."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from cluster.ray_pool import (
    MAX_STARTS,
    MAX_UNITS_PER_TASK,
    RESULT_BYTES,
    TASKS_PER_ACTOR,
    run_on_actors,
    tasks_in_flight,
    units_per_task,
)
from cluster.ray_session import actors_that_fit, ray_session
from data_pipeline.errors import ConfigError, EnvironmentFault, ModelError
from tests.support.processes import finish, kill_group, run, start
from tests.support.ray_probe import make_worker, number_of, processes, starts, unit

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

Pool = Callable[..., Iterator[bytes]]


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    with ray_session(cpus=2):
        yield
    assert not ray.is_initialized()


@pytest.fixture
def pool(two_cpus: None, tmp_path: Path) -> Pool:
    def start_pool(
        units: list[bytes], *, actors: tuple[int, int] = (1, 1), fails: str = "", **more: object
    ) -> Iterator[bytes]:
        options = {"folder": str(tmp_path), "fails": fails}
        return run_on_actors(make_worker, options, units, actors=actors, **more)  # type: ignore[arg-type]

    return start_pool


def _wait_until_gone(folder: Path, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(psutil.pid_exists(process) for process in processes(folder)):
        assert time.monotonic() < deadline, "actors were left behind"
        time.sleep(0.05)


def test_every_unit_comes_once_though_its_process_is_killed(
    pool: Pool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    deaths = {3: 1, 6: 2}
    units = [unit(number, sleep=0.05, die_times=deaths.get(number, 0)) for number in range(12)]
    assert sorted(map(number_of, pool(units, actors=(2, 2)))) == list(range(12))
    # Run again is what the killed process had in hand, and nothing else.
    assert starts(tmp_path) == {number: 1 + deaths.get(number, 0) for number in range(12)}
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_pool_starts_small_and_grows_while_units_wait(pool: Pool, tmp_path: Path) -> None:
    results = pool([unit(number, sleep=0.4) for number in range(12)], actors=(1, 64))
    next(results)
    assert len(processes(tmp_path)) == 1
    assert len(list(results)) == 11
    # The cluster has room for two, whatever the limit.
    assert len(processes(tmp_path)) == 2


def test_a_worker_s_user_error_is_raised_as_it_is(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="^weights: wrong shape: 3$"):
        list(pool([unit(0), unit(1, user_error="weights: wrong shape: 3"), unit(2)]))
    with pytest.raises(ModelError, match="^no such model: give another path$"):
        list(pool([unit(0), unit(1)], fails="make"))
    assert max(starts(tmp_path).values()) == 1


@pytest.mark.slow
def test_a_bug_in_a_worker_is_raised_once_with_its_traceback(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        list(pool([unit(0, bug="boom")]))
    assert str(caught.value).splitlines()[-1] == "ZeroDivisionError: boom"
    assert "ray_probe.py" in str(caught.value)
    assert starts(tmp_path) == {0: 1}


def test_a_unit_that_kills_its_process_each_time_is_named(pool: Pool, tmp_path: Path) -> None:
    units = [unit(number, die_times=99 if number == 2 else 0) for number in range(4)]
    with pytest.raises(EnvironmentFault, match=f"^photo_2 killed the process .*, {MAX_STARTS} times in a row: "):
        list(pool(units, names=[f"photo_{number}" for number in range(4)]))
    assert starts(tmp_path)[2] == MAX_STARTS
    assert all(starts(tmp_path)[number] <= 1 for number in (0, 1, 3))


@pytest.mark.slow
def test_closing_the_results_kills_the_actors(pool: Pool, tmp_path: Path) -> None:
    results = pool([unit(number, sleep=0.0 if number < 2 else 60.0) for number in range(8)], actors=(2, 2))
    next(results)
    assert any(psutil.pid_exists(process) for process in processes(tmp_path))
    begin = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    _wait_until_gone(tmp_path, timeout_s=10.0)
    assert time.monotonic() - begin < 15.0  # far below what a unit takes


@pytest.mark.slow
def test_an_error_kills_the_actors_that_are_still_at_work(pool: Pool, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(ModelError, match="^bad$"):
        list(pool([unit(0, sleep=60.0), unit(1, user_error="bad")], actors=(2, 2)))
    assert time.monotonic() - begin < 45.0, "the second unit waited behind the first"
    _wait_until_gone(tmp_path, timeout_s=10.0)


@pytest.mark.slow
def test_a_slow_reader_stops_the_actors_at_a_bounded_number_of_results(pool: Pool, tmp_path: Path) -> None:
    kilobytes, count = 8 * 1024, 30
    results = pool([unit(number, kilobytes=kilobytes) for number in range(count)])
    next(results)
    bound = RESULT_BYTES // (1024 * kilobytes) + tasks_in_flight(count, 1) + 1
    deadline = time.monotonic() + 20.0
    while len(starts(tmp_path)) < bound - 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    assert bound - 4 <= len(starts(tmp_path)) <= bound < count
    assert len(list(results)) == count - 1


def test_only_the_least_number_of_actors_must_be_grantable(pool: Pool) -> None:
    with pytest.raises(EnvironmentFault, match="has room for 2 actors of 1 CPUs and 0 GPUs, the job asks for 3; lower"):
        next(pool([unit(0)], actors=(3, 64)))
    with pytest.raises(EnvironmentFault, match=r"has room for 0 actors of 1 CPUs and 64\.?0? GPUs"):
        next(pool([unit(0)], gpus_per_actor=64))
    for actors in ((0, 1), (3, 2)):
        with pytest.raises(ConfigError, match=f"--actors {actors[0]}:{actors[1]} is not possible"):
            next(pool([unit(0)], actors=actors))
    with pytest.raises(ConfigError, match=r"1\.5 GPUs is not possible"):
        next(pool([unit(0)], gpus_per_actor=1.5))
    assert list(pool([])) == []


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "expected"),
    [
        ([{"CPU": 4.0}, {"CPU": 3.0}], 2, 0, 3),  # an actor is on one node
        ([{"CPU": 64.0, "GPU": 4.0}], 1, 0.3, 12),  # and a fraction on one GPU
        ([{"CPU": 64.0, "GPU": 4.0}], 1, 0.1, 40),
        ([{"CPU": 64.0, "GPU": 3.0}], 1, 2, 1),
        ([{"CPU": 2.0, "GPU": 8.0}, {"CPU": 64.0}], 1, 0.25, 2),
        ([{}], 1, 0, 0),
    ],
)
def test_room_for_actors_is_counted_by_node_and_gpu(
    nodes: list[dict[str, float]], cpus: float, gpus: float, expected: int
) -> None:
    assert actors_that_fit(nodes, cpus=cpus, gpus=gpus) == expected


@pytest.mark.parametrize("actors", [1, 2, 64])
@pytest.mark.parametrize("units", [1, 100, 2_000, 1_000_000])
def test_a_task_is_one_unit_or_a_small_part_of_an_actor_s_share(units: int, actors: int) -> None:
    size = units_per_task(units, actors)
    assert 1 <= size <= MAX_UNITS_PER_TASK
    assert size == 1 or size * TASKS_PER_ACTOR * actors <= units


@pytest.mark.slow
def test_every_unit_comes_once_though_a_node_comes_late_and_is_lost(tmp_path: Path) -> None:
    # In a process of its own: it starts a cluster of two raylets, all of which is killed at the limit.
    result = run([sys.executable, "-m", "tests.support.ray_probe", str(tmp_path)], cwd=tmp_path, timeout_s=100.0)
    assert result.code == 0, result.text
    told = json.loads(result.stdout.splitlines()[-1])
    assert sorted(told["numbers"]) == list(range(12))
    counts = dict(told["starts"])
    assert sorted(counts) == list(range(12)) and max(counts.values()) < MAX_STARTS
    # What the lost node had in hand was run again on the other.
    assert len(told["late"]) == 2 and max(counts[number] for number in told["late"]) >= 2


_INTERRUPTED = """
import sys
from cluster.ray_pool import run_on_actors
from tests.support.ray_probe import make_worker, unit
units = [unit(number, sleep=0.0 if number < 2 else 60.0) for number in range(8)]
for _ in run_on_actors(make_worker, {"folder": sys.argv[1]}, units, actors=(2, 2)):
    print("result", flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_ends_it_and_kills_the_actors(tmp_path: Path) -> None:
    process = start([sys.executable, "-c", _INTERRUPTED, str(tmp_path)], cwd=tmp_path)
    try:
        assert process.stdout is not None and process.stdout.readline() == "result\n"
        time.sleep(1.0)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        result = finish(process, timeout_s=40.0)
    finally:
        kill_group(process)
    assert time.monotonic() - begin < 30.0  # a unit takes a minute
    assert result.code != 0 and result.stderr.rstrip().endswith("KeyboardInterrupt"), result.text
    _wait_until_gone(tmp_path, timeout_s=10.0)
