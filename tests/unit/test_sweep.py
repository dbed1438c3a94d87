"""Sweeps without a cluster: what is swept, names and values of runs, their MLflow parent, the table."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from cluster.ray_train import Group
from cluster.ray_tune import DRIVER_BYTES, Progress, _InOrder, _room
from cluster.settings import RayCluster
from cluster.submission import (
    Job,
    Submitted,
    Trial,
    find_submitted,
    plan_record,
    record_files,
    write_record,
    write_submitted,
)
from cluster.sweep import (
    finish_parent,
    home_of,
    make_trials,
    read_sweep,
    read_table,
    short,
    split_sweep,
    sweep_name,
    with_parent,
)
from cluster.sweep_end import table_of
from data_pipeline.errors import ConfigError, EnvironmentFault
from rddm_dist.config import load_config
from rddm_dist.tracking.store import default_uri, open_client
from tests.support.processes import run
from tests.support.runs import write_config

CLUSTER = RayCluster(kind="ray", address="http://127.0.0.1:8265")
SWEPT = {"optim.lr": ["1e-4", "2e-4"], "train.seed": ["0", "1"]}


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(write_config(tmp_path, str(tmp_path / "data")))


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def submit(config: str, trials: tuple[Trial, ...], *, name: str = "s", parent: bool = False) -> Submitted:
    common = load_config(config, [f"run.name={name}"])
    job = Job("train", name, str(Path(common.run.storage).resolve() / name), (), 1, 0, common, trials)
    job = with_parent(job) if parent else job
    record = plan_record(job, CLUSTER)
    write_record(record, record_files(job, CLUSTER, {}, []))
    return write_submitted(record, job, CLUSTER, {})


def write_run(submitted: Submitted, name: str, *records: dict[str, object]) -> None:
    folder = Path(submitted.home).parent / name
    folder.mkdir(parents=True)
    started = {"time": 1.0, "event": "started", "step": 0, "steps": 10}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (started, *records)))


def metrics(step: int, **values: object) -> dict[str, object]:
    named = {name.replace("_", "/"): value for name, value in values.items()}
    return {"time": 2.0, "event": "metrics", "step": step, "metrics": named}


DONE = {"time": 3.0, "event": "finished", "status": "done", "step": 10, "reason": ""}


def test_further_overrides_are_swept_as_well_where_a_sweep_was_asked_for() -> None:
    overrides = ["diffusion.sum_scale=0.01,1", "train.steps=20"]
    assert split_sweep(overrides, ["optim.lr=1e-4, 2e-4"]) == (
        ["train.steps=20"],
        {"optim.lr": ["1e-4", "2e-4"], "diffusion.sum_scale": ["0.01", "1"]},
    )
    assert split_sweep(overrides, []) == (overrides, {})


@pytest.mark.parametrize(
    ("listed", "values"),
    [
        ("[1, 2],[3]", ["[1, 2]", "[3]"]),
        ("{0: 64, 10: 128},32", ["{0: 64, 10: 128}", "32"]),
        ("rain(a=1, b=2),blur(c=3)", ["rain(a=1, b=2)", "blur(c=3)"]),
        ("'a,b',\"c,d\"", ["'a,b'", '"c,d"']),
        ("it's,that's", ["it's", "that's"]),
        ("['x,y', z],w", ["['x,y', z]", "w"]),
        ("7", ["7"]),
    ],
)
def test_commas_inside_brackets_and_quotes_part_nothing(listed: str, values: list[str]) -> None:
    assert split_sweep([], [f"data.key={listed}"])[1] == {"data.key": values}


@pytest.mark.parametrize(
    ("overrides", "sweep", "said"),
    [
        ([], ["optim.lr"], "must have the form section.key=VALUE,VALUE"),
        ([], ["optim.lr="], "has an empty value"),
        ([], ["optim.lr=1,,2"], "has an empty value"),
        ([], ["optim.lr=1,2,1"], "has the value 1 twice"),
        ([], ["optim.lr=1,2", "optim.lr=3"], "optim.lr is given twice"),
        (["optim.lr=3,4"], ["optim.lr=1,2"], "optim.lr is given twice"),
        (["optim.lr=3"], ["optim.lr=1,2"], "given with --sweep and without"),
        ([], ["run.name=a,b"], "sweep another key"),
        ([], ["run.storage=a,b"], "sweep another key"),
        ([], ["tracking.uri=a,b"], "sweep another key"),
        ([], [f"train.seed={','.join(map(str, range(27)))}", f"optim.lr={','.join(map(str, range(1, 20)))}"], "513"),
    ],
)
def test_what_is_no_sweep_is_refused_in_one_line(overrides: list[str], sweep: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        split_sweep(overrides, sweep)
    assert said in one_line(error)


def test_512_runs_are_allowed() -> None:
    _, swept = split_sweep([], [f"train.seed={','.join(map(str, range(512)))}"])
    assert len(swept["train.seed"]) == 512


def test_runs_are_all_combinations_in_the_order_given(config: str) -> None:
    trials = make_trials(config, ["train.steps=20"], SWEPT, name="s")
    assert [trial.name for trial in trials] == ["s-0000", "s-0001", "s-0002", "s-0003"]
    assert [tuple(trial.values.values()) for trial in trials] == [(1e-4, 0), (1e-4, 1), (2e-4, 0), (2e-4, 1)]
    for trial in trials:
        assert (trial.config.optim.lr, trial.config.train.seed) == tuple(trial.values.values())
        assert (trial.config.run.name, trial.config.train.steps) == (trial.name, 20)
        assert (sweep_name(trial.name), Path(home_of(trial)).name) == ("s", "s")
    assert make_trials(config, [], {}, name="s") == ()


def test_two_spellings_of_one_value_are_one_run_too_many(config: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_trials(config, [], {"optim.lr": ["1e-4", "0.0001"]}, name="s")
    assert "optim.lr=0.0001, which is there already" in one_line(error)


@pytest.mark.parametrize(
    ("swept", "name", "said"),
    [
        ({"optim.lr": ["1e-4", "fast"]}, "s", "optim.lr='fast'"),
        ({"optim.speed": ["1", "2"]}, "s", "unknown key optim.speed"),
        ({"optim.lr": ["1e-4", "2e-4"]}, "n" * 59, "at most 58"),
    ],
)
def test_values_that_no_run_can_have_are_refused_in_one_line(
    config: str, swept: dict[str, list[str]], name: str, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        make_trials(config, [], swept, name=name)
    assert said in one_line(error)


def test_the_same_command_is_the_same_sweep_and_no_other_is_under_its_name(config: str) -> None:
    trials = make_trials(config, [], SWEPT, name="s")
    submitted = submit(config, trials)
    assert make_trials(config, [], SWEPT, name="s") == trials
    assert make_trials(config, ["train.steps=20"], SWEPT, name="s")[0].values == trials[0].values
    with pytest.raises(ConfigError) as error:
        make_trials(config, [], {**SWEPT, "train.seed": ["1", "0"]}, name="s")
    assert "optim.lr=0.0001,0.0002 train.seed=0,1" in one_line(error)
    # Where jobs see run folders under another path than this machine, the record is looked for in the latter.
    elsewhere = ["run.storage=/nowhere/runs"]
    assert make_trials(config, elsewhere, {"optim.lr": ["1"]}, name="s")
    with pytest.raises(ConfigError):
        make_trials(config, elsewhere, {"optim.lr": ["1"]}, name="s", records=str(Path(submitted.home).parent))


def test_the_name_of_a_run_is_not_that_of_a_sweep(config: str, tmp_path: Path) -> None:
    submit(config, (), name="launched")
    (tmp_path / "runs" / "trained").mkdir(parents=True)
    (tmp_path / "runs" / "trained" / "config.yaml").write_text("")
    for name, said in (("launched", "launched without --sweep"), ("trained", "is a run of its own")):
        with pytest.raises(ConfigError) as error:
            make_trials(config, [], SWEPT, name=name)
        assert said in one_line(error)


def test_a_recorded_sweep_reads_back(config: str) -> None:
    trials = make_trials(config, [], SWEPT, name="s")
    submitted = submit(config, trials)
    assert tuple(read_sweep(submitted.record.local / "sweep.json")) == trials
    with pytest.raises(ConfigError, match="does not exist"):
        read_sweep(submitted.record.local / "other.json")
    (submitted.record.local / "sweep.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_sweep(submitted.record.local / "sweep.json")


def test_the_parent_of_a_sweep_is_made_once_and_ended(config: str, tmp_path: Path) -> None:
    overrides = ["tracking.backend=mlflow", "tracking.parent=above"]
    trials = make_trials(config, overrides, SWEPT, name="s")
    common = load_config(config, [*overrides, "run.name=s"])
    job = Job("train", "s", str(tmp_path / "runs" / "s"), (), 1, 0, common, trials)
    child = with_parent(job)
    parents = {trial.config.tracking.parent for trial in child.trials}
    assert with_parent(job) == child  # found again
    assert [trial.values for trial in child.trials] == [trial.values for trial in trials]

    client = open_client(default_uri(tmp_path / "runs"))
    (run,) = client.search_runs([client.get_experiment_by_name("rddm").experiment_id])
    assert parents == {run.info.run_id}
    assert (run.info.run_name, run.info.status) == ("s", "RUNNING")
    assert run.data.tags["rddm.sweep"] == job.home
    assert run.data.tags["mlflow.parentRunId"] == "above"
    assert run.data.params == {"optim.lr": "0.0001, 0.0002", "train.seed": "0, 1"}
    finish_parent(child.trials[0].config, "stopped", best="s-0001")
    run = client.get_run(run.info.run_id)
    assert (run.info.status, run.data.tags["rddm.best"]) == ("KILLED", "s-0001")
    with_parent(job)
    assert client.get_run(run.info.run_id).info.status == "RUNNING"


def test_no_parent_is_made_where_there_is_no_store_for_it(config: str, tmp_path: Path) -> None:
    job = Job("train", "s", str(tmp_path / "runs" / "s"), (), 1, 0, load_config(config, ["run.name=s"]))
    untracked = Job(**{**job.__dict__, "trials": make_trials(config, [], SWEPT, name="s")})
    assert with_parent(untracked) is untracked
    overrides = ["tracking.backend=mlflow"]
    elsewhere = Job(
        **{
            **job.__dict__,
            "config": load_config(config, [*overrides, "run.name=s"]),
            "trials": make_trials(config, overrides, SWEPT, name="s"),
        }
    )
    assert with_parent(elsewhere, sees_runs=False) is elsewhere
    assert not (tmp_path / "runs").exists()


def test_a_tracking_server_that_is_away_is_one_line(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    overrides = ["tracking.backend=mlflow", "tracking.uri=http://127.0.0.1:9"]
    trials = make_trials(config, overrides, SWEPT, name="s")
    job = Job("train", "s", str(tmp_path / "s"), (), 1, 0, load_config(config, [*overrides, "run.name=s"]), trials)
    with pytest.raises(EnvironmentFault) as error:
        with_parent(job)
    assert "tracking.uri=http://127.0.0.1:9 cannot be reached" in one_line(error)


def test_the_table_tells_how_each_run_stands_and_which_is_best(config: str) -> None:
    submitted = submit(config, make_trials(config, [], SWEPT, name="s"))
    write_run(submitted, "s-0000", metrics(10, train_loss=0.5), metrics(10, preview_psnr=20.0), DONE)
    write_run(submitted, "s-0001", metrics(10, train_loss=0.7), metrics(10, preview_psnr=21.0), DONE)
    stopped = {"time": 3.0, "event": "finished", "status": "stopped", "step": 4, "reason": "stopped by ada"}
    write_run(submitted, "s-0002", metrics(4, train_loss="nan", preview_psnr=99.0), stopped)
    found = find_submitted(submitted.home)
    assert found is not None
    table = table_of(found, submitted.home)
    assert table.as_text().splitlines() == [
        "   run     optim.lr  train.seed  status       step   loss     psnr   reason",
        "   s-0000  0.0001    0           done         10/10  0.50000  20.00",
        "*  s-0001  0.0001    1           done         10/10  0.70000  21.00",
        "   s-0002  0.0002    0           stopped      4/10   nan      99.00  stopped by ada",
        "   s-0003  0.0002    1           not started",
    ]
    assert table.best == "s-0001" and not table.is_done
    told = json.loads(json.dumps(table.as_json(), allow_nan=False))["trials"]
    assert [each["is_best"] for each in told] == [False, True, False, False]
    assert told[2]["values"] == {"optim.lr": 2e-4, "train.seed": 0} and told[2]["loss"] == "nan"
    markdown = table.as_markdown().splitlines()
    assert {line.count("|") for line in markdown} == {10} and len(markdown) == 6
    assert not (Path(submitted.home) / "sweep.md").exists()


def test_without_previews_the_lowest_finite_loss_is_best_and_before_any_number_nothing(config: str) -> None:
    submitted = submit(config, make_trials(config, [], SWEPT, name="s"))
    parent = str(Path(submitted.home).parent)
    assert read_table(submitted.trials, parent).best == ""
    for name, loss in (("s-0000", 0.3), ("s-0001", "nan"), ("s-0002", 0.2)):
        write_run(submitted, name, metrics(5, train_loss=loss))
    table = read_table(submitted.trials, parent, failed={"s-0001": "the loss is not finite"})
    assert table.best == "s-0002"
    assert [row.status for row in table.rows] == ["running", "failed", "running", "not started"]
    assert math.isnan(table.rows[1].metric("train/loss") or 0.0)
    assert "psnr" not in table.as_text() and "the loss is not finite" in table.as_text()


def test_who_first_sees_that_all_are_done_keeps_the_table_and_ends_the_parent(config: str) -> None:
    path = Path(config)
    path.write_text(path.read_text().replace("backend: none", "backend: mlflow"))
    trials = make_trials(config, [], {"optim.lr": ["1e-4", "2e-4"]}, name="s")
    submitted = submit(config, trials, parent=True)
    client = open_client(default_uri(Path(submitted.home).parent))
    parent = read_sweep(submitted.record.local / "sweep.json")[0].config.tracking.parent
    write_run(submitted, "s-0000", metrics(10, train_loss=0.5), DONE)
    table_of(submitted, submitted.home)
    assert client.get_run(parent).info.status == "RUNNING"
    write_run(submitted, "s-0001", metrics(10, train_loss=0.4), DONE)
    table = table_of(submitted, submitted.home)
    run = client.get_run(parent)
    assert (run.info.status, run.data.tags["rddm.best"]) == ("FINISHED", "s-0001")
    assert (Path(submitted.home) / "sweep.md").read_text() == table.as_markdown()


def test_the_parent_is_ended_also_where_runs_have_failed_or_died(config: str) -> None:
    path = Path(config)
    path.write_text(path.read_text().replace("backend: none", "backend: mlflow"))
    submitted = submit(config, make_trials(config, [], {"optim.lr": ["1e-4", "2e-4"]}, name="s"), parent=True)
    record = submitted.record.local
    client = open_client(default_uri(Path(submitted.home).parent))
    parent = read_sweep(record / "sweep.json")[0].config.tracking.parent
    ending = (sys.executable, "-m", "cluster.sweep_end", str(record / "sweep.json"))
    write_run(submitted, "s-0000", metrics(10, train_loss=0.5), DONE)
    write_run(submitted, "s-0001")
    (record / "ended-s-0000").write_text("0\n")
    early = run(ending, cwd=record)
    assert (early.code, early.stdout, client.get_run(parent).info.status) == (0, "", "RUNNING"), early.text

    table = table_of(submitted, submitted.home, has_ended=True)  # Slurm has no job any more
    assert [row.status for row in table.rows] == ["done", "failed"]
    assert "its job ended without a word" in (Path(submitted.home) / "sweep.md").read_text()
    assert client.get_run(parent).info.status == "FAILED"

    (record / "ended-s-0001").write_text("1\n")
    last = run(ending, cwd=record)
    assert last.code == 0 and "exit code 1; see rddm logs" in last.stdout, last.text
    assert client.get_run(parent).info.status == "FAILED"


def test_tune_is_given_trials_in_order_until_the_sweep_is_stopped() -> None:
    progress = Progress()
    search = _InOrder(["a", "b", "c"], progress)
    assert search.suggest("1") == {"name": "a"}
    assert search.suggest("2") == {"name": "b"}
    search.on_trial_complete("1", {"name": "a", "status": "moves"})
    assert [search.suggest("3"), search.suggest("4")] == [{"name": "c"}, {"name": "a"}]
    assert search.suggest("5") is None  # any of those that run may have to move
    for trial in ("2", "3"):
        search.on_trial_complete(trial, {"name": trial, "status": "done"})
    search.on_trial_complete("4", error=True)
    assert search.suggest("5") == search.FINISHED

    stopping = _InOrder(["a"], progress)
    progress.is_stopping = True
    assert stopping.suggest("1") == stopping.FINISHED


@pytest.mark.parametrize(
    ("value", "text"), [(1e-4, "0.0001"), (1.0, "1"), ("pred_res", "pred_res"), ([1, 2], "[1, 2]")]
)
def test_values_are_shown_shortly(value: object, text: str) -> None:
    assert short(value) == text


def test_as_many_trials_run_as_there_is_room_for_all_their_workers_and_drivers() -> None:
    node = {"CPU": 8.0, "GPU": 4.0, "memory": 3.5 * DRIVER_BYTES}
    assert _room([node, node], Group(4)) == 4
    assert _room([node, node], Group(4, gpus_per_worker=1)) == 2
    assert _room([node, node], Group(5, cpus_per_worker=3)) == 1  # 2 + 2 fit, or the cluster grows
    assert _room([node, node], Group(1)) == 6  # of 16, by memory
    with pytest.raises(EnvironmentFault) as error:
        _room([{"CPU": 8.0, "memory": 0.5 * DRIVER_BYTES}, {"CPU": 8.0}], Group(1))
    assert "512 MiB" in one_line(error)


def test_the_program_refuses_bad_input_before_ray_starts(tmp_path: Path) -> None:
    program = (sys.executable, "-m", "cluster.ray_tune")
    missing = run([*program, "no.json"], cwd=tmp_path)
    assert (missing.code, missing.stdout) == (2, "")
    assert missing.stderr == "error: sweep file no.json does not exist; give the sweep.json of a launch\n"
    none = run([*program, "no.json", "--workers", "0"], cwd=tmp_path)
    assert none.code == 2 and "--workers and --cpus-per-worker must be at least 1" in none.stderr
