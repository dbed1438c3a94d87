"""Evaluation on Ray: whoever runs the units, and whatever is killed meanwhile, the report has the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
from PIL import Image

from cluster.ray_evaluate import run_on_ray
from cluster.ray_session import ray_session
from data_pipeline.pack import pack
from data_pipeline.sources import find_pairs
from rddm_dist import load_model
from rddm_dist.evaluation.evaluate import Outcome, run_plan
from rddm_dist.evaluation.report import write_report_files
from rddm_dist.evaluation.runner import run_here
from rddm_dist.evaluation.sources import PackedSource
from rddm_dist.evaluation.summary import build_report
from tests.support.datasets import make_folders
from tests.support.evaluation import restoration, tiny_model
from tests.support.processes import RDDM, Finished, finish, kill_group, start
from tests.support.servers import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

COUNT, SIZES = 12, ((72, 96), (96, 72))
STEPS = 8
ACTOR_TITLE = "ray::MapWorker"  # what Ray Data's actors call their processes


@dataclass(frozen=True)
class Case:
    """A model, a packed dataset of images of two sizes, and the report that this process makes of them."""

    model: Path
    data: str
    expected: bytes


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("evaluation")
    make_folders(folder, count=COUNT, size=SIZES[0])
    for number in range(0, COUNT, 3):
        for field in ("input", "target"):
            path = folder / field / f"photo_{number:03d}.png"
            Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)
    data = str(folder / "data")
    pack(find_pairs(folder / "input", folder / "target"), data, shard_mb=0.1, jobs=2)
    made = Case(tiny_model(folder), data, b"")
    evaluate(made, folder / "here")
    return Case(made.model, data, (folder / "here" / "report.json").read_bytes())


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """One Ray for the tests that run in this process: starting it takes longer than what they do."""
    with ray_session(cpus=2):
        yield


def evaluate(
    case: Case, out: Path, *, actors: tuple[int, int] | None = None, progress: Callable[[int, int], None] | None = None
) -> Outcome:
    """Evaluate in this process, or on so many actors, and write the report into `out`."""
    plan = restoration(case.model, PackedSource(case.data), steps=STEPS, batch_size=1)
    execute = partial(run_on_ray, actors=actors) if actors else run_here
    outcome = run_plan(plan, out=str(out), execute=execute, progress=progress)
    report = build_report(plan, outcome, name="model", model=load_model(case.model))
    write_report_files(out, report, command="rddm evaluate", cases=outcome.cases)
    return outcome


def command(case: Case, out: Path, actors: str) -> list[str]:
    """The same evaluation as a command."""
    options = ["--actors", actors, "--steps", str(STEPS), "--batch-size", "1", "--out", str(out)]
    return [*RDDM, "evaluate", str(case.model), "--data", case.data, *options]


def actors_of(pid: int) -> list[psutil.Process]:
    """The processes of the pool's actors below a driver."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if ACTOR_TITLE in " ".join(child.cmdline()):
                found.append(child)
    return found


def result_times(out: Path) -> dict[str, int]:
    """Name -> time of writing, of the results in a report folder."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("results/*/*.parquet")}


def check(case: Case, out: Path) -> None:
    assert (out / "report.json").read_bytes() == case.expected
    assert len(result_times(out)) == COUNT


@pytest.mark.usefixtures("two_cpus")
@pytest.mark.parametrize(
    "actors", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 2), pytest.param((1, 2), marks=pytest.mark.slow)]
)
def test_actors_and_this_process_write_the_same_report(case: Case, tmp_path: Path, actors: tuple[int, int]) -> None:
    outcome = evaluate(case, tmp_path, actors=actors)
    assert outcome.reused == 0
    report = json.loads(case.expected)
    assert len(report["images"]) == COUNT and not report["failed"]
    assert {(row["height"], row["width"]) for row in report["images"]} == set(SIZES)
    check(case, tmp_path)


@pytest.mark.usefixtures("two_cpus")
def test_actors_killed_in_the_middle_do_not_show(case: Case, tmp_path: Path) -> None:
    """All actors die after the first result, and those that took their places later."""
    killed: dict[int, int] = {}  # process id -> images done

    def kill(done: int, total: int) -> None:
        if done in (1, 6):
            wait_until(lambda: bool(actors_of(os.getpid())), timeout_s=60)
            for actor in actors_of(os.getpid()):
                actor.kill()
                killed[actor.pid] = done

    evaluate(case, tmp_path, actors=(2, 2), progress=kill)
    assert set(killed.values()) == {1, 6}
    check(case, tmp_path)


@pytest.mark.usefixtures("two_cpus")
def test_a_killed_command_continues_with_the_units_that_are_missing(case: Case, tmp_path: Path) -> None:
    process = start(command(case, tmp_path, "1"), cwd=tmp_path)
    try:
        wait_until(lambda: len(result_times(tmp_path)) >= 3 or process.poll() is not None, timeout_s=90)
    finally:
        kill_group(process)
    kept = result_times(tmp_path)
    assert 3 <= len(kept) < COUNT and not (tmp_path / "report.json").exists()
    outcome = evaluate(case, tmp_path, actors=(2, 2))
    assert outcome.reused == len(kept)
    assert {name: time for name, time in result_times(tmp_path).items() if name in kept} == kept
    check(case, tmp_path)


@pytest.mark.slow
def test_four_actors_of_a_command_write_the_same_report(case: Case, tmp_path: Path) -> None:
    result = finish(start(command(case, tmp_path, "4"), cwd=tmp_path), timeout_s=200)
    assert result.code == 0 and not result.stderr, result.text
    check(case, tmp_path)


@pytest.mark.slow
def test_a_node_lost_in_the_middle_does_not_show(case: Case, tmp_path: Path) -> None:
    """Two nodes with a CPU each; the one without the command goes, and its actor with it."""
    with two_nodes() as (address, lose_node):
        process = start(command(case, tmp_path, "1:2"), cwd=tmp_path, env={"RAY_ADDRESS": address})
        result = finish_losing(process, tmp_path, lose_node)
    assert result.code == 0 and "Traceback" not in result.stderr, result.text
    check(case, tmp_path)


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[str, Callable[[], None]]]:
    """A cluster of two raylets.   -> its address, and what kills the second"""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster.address, lambda: cluster.remove_node(second, allow_graceful=False)
    finally:
        cluster.shutdown()


def finish_losing(process: subprocess.Popen[str], out: Path, lose_node: Callable[[], None]) -> Finished:
    """Wait for the command; a node is lost when a few units are done."""
    try:
        wait_until(lambda: len(result_times(out)) >= 4 or process.poll() is not None, timeout_s=90)
        assert process.poll() is None, finish(process, timeout_s=5).text
        assert len(result_times(out)) < COUNT
        lose_node()
        return finish(process, timeout_s=120)
    finally:
        kill_group(process)
