"""Tracking and registry against a real MLflow with an SQLite file."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rddm_dist.tracking.mlflow_tracker as tracking
from data_pipeline.errors import ConfigError, DataError, EnvironmentFault, ModelError
from rddm_dist import generate, load_model
from rddm_dist.config import Config
from rddm_dist.evaluation.restore import load_restorer
from rddm_dist.factory import make_net
from rddm_dist.model.weights import save_safetensors
from rddm_dist.tracking.journal import Journal
from rddm_dist.tracking.mlflow_tracker import MlflowTracker, default_uri, flatten
from rddm_dist.tracking.registry import Registration, register, resolve
from rddm_dist.tracking.store import open_client, sqlite_path


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with MLflow's tables; making them takes seconds, so it is done once."""
    uri = default_uri(tmp_path_factory.mktemp("mlflow"))
    open_client(uri).search_experiments()
    return sqlite_path(uri)


@pytest.fixture
def uri(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh store in tmp_path/runs, with the process in an empty folder and quick retries."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(tracking, "RETRY_S", 0.05)
    monkeypatch.setattr(tracking, "POLL_S", 0.05)
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
    return default_uri(tmp_path / "runs")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "demo").mkdir(parents=True, exist_ok=True)
    return tmp_path / "runs" / "demo"


def start(run_dir: Path, uri: str, **options: Any) -> MlflowTracker:
    tracker = MlflowTracker(run_dir, uri=uri, experiment="rddm", run_name="demo")
    tracker.start(**{"params": {"train.steps": 20}, "tags": {}, "journal": run_dir / "metrics.jsonl", **options})
    return tracker


def write(run_dir: Path, steps: range, **metrics: float) -> None:
    journal = Journal(run_dir / "metrics.jsonl")
    for step in steps:
        values = {"train/loss": 1.0 / (1 + step), **metrics}
        journal.append({"time": time.time(), "event": "metrics", "step": step, "metrics": values})
    journal.close()


def points(uri: str, run_id: str, key: str = "train/loss") -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in open_client(uri).get_metric_history(run_id, key)]


def expected(steps: range) -> list[tuple[int, float]]:
    return [(step, 1.0 / (1 + step)) for step in steps]


def wait_for(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_arrives_whole_and_nothing_lands_in_the_current_folder(uri: str, run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "config.yaml").write_text("train: {}")
    params = {"train": {"steps": 20, "note": "x" * 9000}, **{f"p{i}": i for i in range(150)}}
    tracker = start(
        run_dir, uri, params=params, tags={"rddm.config_digest": "abc"}, dataset=("data/train", "f" * 64)
    )  # fmt: skip
    tracker.log_artifact(run_dir / "config.yaml", "config")
    write(run_dir, range(1, 1301))
    assert tracker.close("FINISHED")
    client = open_client(uri)
    run = client.get_run(tracker.run_id)
    assert points(uri, tracker.run_id) == expected(range(1, 1301))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "demo")
    assert len(run.data.params) == 152 and run.data.params["train.note"] == "x" * 6000
    assert run.data.tags["rddm.config_digest"] == "abc"
    assert [item.dataset.digest for item in run.inputs.dataset_inputs] == ["f" * 36]
    assert [item.path for item in client.list_artifacts(tracker.run_id, "config")] == ["config/config.yaml"]
    assert list((tmp_path / "runs" / "mlartifacts").rglob("config.yaml"))
    assert list((tmp_path / "cwd").iterdir()) == []


def test_points_carry_the_journals_time(uri: str, run_dir: Path) -> None:
    journal = Journal(run_dir / "metrics.jsonl")
    journal.append({"time": 1234567890.125, "event": "metrics", "step": 3, "metrics": {"a": 1.5}})
    journal.append({"time": 1234567891.0, "event": "saved", "step": 3, "path": "x"})
    journal.close()
    tracker = start(run_dir, uri)
    assert tracker.close()
    (point,) = open_client(uri).get_metric_history(tracker.run_id, "a")
    assert (point.timestamp, point.step, point.value) == (1234567890125, 3, 1.5)


def test_an_outage_delays_points_and_loses_none(
    uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(run_dir, uri)
    failures = []

    def broken(*args: Any, **options: Any) -> None:
        failures.append(1)
        raise ConnectionError("server away")

    with monkeypatch.context() as outage, caplog.at_level(logging.WARNING):
        outage.setattr("mlflow.MlflowClient.log_batch", broken)
        write(run_dir, range(1, 6))
        wait_for(lambda: len(failures) >= 3)
        write(run_dir, range(6, 11))
    assert tracker.close()
    assert points(uri, tracker.run_id) == expected(range(1, 11))
    assert caplog.text.count("server away") == 1  # told once, not at every attempt


def test_a_store_that_stays_away_costs_the_deadline_and_the_next_start_catches_up(
    uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = start(run_dir, uri)
    assert first.close("KILLED")
    assert open_client(uri).get_run(first.run_id).info.status == "KILLED"

    def away(uri: str) -> None:
        raise EnvironmentFault("server away")

    with monkeypatch.context() as outage:
        outage.setattr(tracking, "open_client", away)
        second = start(run_dir, uri)
        write(run_dir, range(1, 4))
        (run_dir / "grid.png").write_bytes(b"png")
        second.log_artifact(run_dir / "grid.png", "samples")
        began = time.monotonic()
        assert not second.close(deadline_s=0.3)
        assert time.monotonic() - began < 2
    assert "metrics are safe" in caplog.text

    third = start(run_dir, uri)
    assert third.close()
    assert first.run_id == second.run_id == third.run_id
    assert points(uri, third.run_id) == expected(range(1, 4))
    assert [item.path for item in open_client(uri).list_artifacts(third.run_id, "samples")] == ["samples/grid.png"]


def test_a_restart_continues_the_run_and_repeated_steps_give_one_point(uri: str, run_dir: Path) -> None:
    first = start(run_dir, uri)
    write(run_dir, range(1, 8))
    assert first.close("FAILED")
    second = start(run_dir, uri, tags={"rddm.batch_plan": "new"})
    wait_for(lambda: open_client(uri).get_run(first.run_id).info.status == "RUNNING")
    write(run_dir, range(5, 11))  # from the checkpoint of step 4
    assert second.close("FINISHED")
    assert second.run_id == first.run_id
    assert points(uri, first.run_id) == expected(range(1, 11))
    run = open_client(uri).get_run(first.run_id)
    assert (run.info.status, run.data.tags["rddm.batch_plan"]) == ("FINISHED", "new")


def test_points_sent_again_after_a_crash_are_kept_once(uri: str, run_dir: Path) -> None:
    first = start(run_dir, uri)
    before = json.loads((run_dir / "mlflow.json").read_text())
    write(run_dir, range(1, 6), **{"train/lr": math.nan})
    assert first.close()
    (run_dir / "mlflow.json").write_text(json.dumps(before))  # killed between sending and noting it down
    second = start(run_dir, uri)
    write(run_dir, range(6, 8))
    assert second.close()
    assert points(uri, first.run_id) == expected(range(1, 8))
    assert len(points(uri, first.run_id, "train/lr")) == 5


def test_numbers_that_are_not_finite_arrive_with_a_tag(uri: str, run_dir: Path) -> None:
    write(run_dir, range(3, 4), **{"a": math.nan, "b": math.inf})
    tracker = start(run_dir, uri)
    assert tracker.close()
    assert math.isnan(points(uri, tracker.run_id, "a")[0][1])
    tags = open_client(uri).get_run(tracker.run_id).data.tags
    assert (tags["nonfinite.a"], tags["nonfinite.b"]) == ("nan at step 3", "inf at step 3")


def test_a_run_that_was_deleted_from_the_store_begins_again_with_the_whole_journal(uri: str, run_dir: Path) -> None:
    write(run_dir, range(1, 4))
    first = start(run_dir, uri)
    assert first.close()
    state = json.loads((run_dir / "mlflow.json").read_text())
    (run_dir / "mlflow.json").write_text(json.dumps({**state, "run_id": "0" * 32}))
    second = start(run_dir, uri)
    assert second.close()
    assert second.run_id not in (first.run_id, "0" * 32)
    assert points(uri, second.run_id) == expected(range(1, 4))


def test_an_artifact_that_is_gone_does_not_hold_up_the_rest(uri: str, run_dir: Path) -> None:
    tracker = start(run_dir, uri)
    tracker.log_artifact(run_dir / "missing.png", "samples")
    write(run_dir, range(1, 3))
    assert tracker.close()
    assert points(uri, tracker.run_id) == expected(range(1, 3))


def test_a_new_run_needs_a_store_that_answers(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(EnvironmentFault, match=r"http://127.0.0.1:9 cannot be reached .*tracking.backend=none"):
        start(run_dir, "http://127.0.0.1:9")
    (run_dir / "no.db").write_text("this is not a database, but long enough to be taken for one" * 40)
    with pytest.raises(EnvironmentFault, match="not a database"):
        start(run_dir, f"sqlite:///{run_dir / 'no.db'}")
    with pytest.raises(ConfigError, match="tracking.uri=mlruns is not a store"):
        start(run_dir, "mlruns")
    assert not (run_dir / "mlflow.json").exists()


def test_flatten_joins_names_with_dots() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}


def export(path: Path, seed: int, *, condition: str = "input", generate: bool = False) -> Path:
    """A tiny model file; another seed gives other weights."""
    import torch

    config = Config.model_validate(
        {
            "data": {"crop": 16},
            "model": {"dim": 8, "dim_mults": [1, 2], "num_nets": 1, "condition": condition},
            "diffusion": {"objective": "pred_res", "num_timesteps": 20, "generate": generate},
            "sample": {"steps": 2},
        }
    )
    torch.manual_seed(seed)
    save_safetensors(path, make_net(config).state_dict(), config=config.model_dump(mode="json"))
    return path


def load_pyfunc(model_uri: str, uri: str) -> Any:
    """A registered model as anybody's MLflow loads it."""
    import mlflow

    previous = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        return mlflow.pyfunc.load_model(model_uri)
    finally:
        mlflow.set_tracking_uri(previous)


def test_the_champion_changes_only_for_a_better_one_and_loads_as_any_mlflow_model(
    uri: str, run_dir: Path, tmp_path: Path
) -> None:
    run_id = start(run_dir, uri).run_id

    def enter(
        seed: int, psnr: float | None, *, margin_db: float = 0.0, config: str = "c", **score: Any
    ) -> Registration:
        return register(
            export(tmp_path / f"{seed}.safetensors", seed),
            uri=uri,
            name="rddm-demo",
            digests={"weights": f"w{seed}", "data": "d", "config": config, "code": "v"},
            score={"psnr": psnr, "protocol": "rgb", "size": "native", "data_fingerprint": "eval", "images": 2, **score},
            margin_db=margin_db,
            run_id=run_id,
        )

    first = enter(1, 25.0)
    assert (first.version, first.alias_moved, first.model_uri) == ("1", True, "models:/rddm-demo/1")
    again = enter(1, 99.0)
    assert (again.version, again.alias_moved) == ("1", False) and "already" in again.reason
    results = [
        enter(2, 24.9),
        enter(3, 25.05, margin_db=0.1),
        enter(4, 30.0, protocol="y"),
        enter(5, 30.0, data_fingerprint="other"),
        enter(6, math.nan),
        enter(8, None),
        enter(9, 30.0, size="resized to 64x64"),
        enter(7, 25.2, margin_db=0.1),
    ]
    assert [result.alias_moved for result in results] == [False] * 7 + [True]
    assert "another protocol" in results[2].reason and "another data_fingerprint" in results[3].reason
    assert "PSNR is not known" in results[5].reason and "+0.200 dB" in results[7].reason
    assert "another size" in results[6].reason
    # The same weights read in another way are another version.
    assert enter(1, 24.0, config="clocks").version == "10"

    client = open_client(uri)
    champion = client.get_model_version_by_alias("rddm-demo", "champion")
    assert (str(champion.version), champion.run_id) == ("9", run_id)
    assert (champion.tags["rddm.weights_digest"], champion.tags["rddm.score.psnr"]) == ("w7", "25.2")

    local = resolve("models:/rddm-demo@champion", uri=uri)
    assert local.read_bytes() == (tmp_path / "7.safetensors").read_bytes()
    assert resolve("models:/rddm-demo/2", uri=uri).read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    for wrong, message in (
        ("models:/rddm-demo@best", "known: .*models:/rddm-demo@champion"),
        ("models:/rddm-demo/99", "does not exist"),
        ("models:/other@champion", "registered there: rddm-demo"),
        ("models:/rddm-demo", "must look like"),
    ):
        with pytest.raises(ModelError, match=message):
            resolve(wrong, uri=uri)

    files = {path.name for path in local.parents[1].rglob("*") if path.is_file()}
    assert {"MLmodel", "pyfunc.py", "7.safetensors", "requirements.txt"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt"))]

    loaded = load_pyfunc("models:/rddm-demo@champion", uri)
    assert loaded.metadata.signature.inputs.to_dict()[0]["tensor-spec"]["shape"] == (-1, -1, -1, 3)
    images = np.random.default_rng(0).integers(0, 256, (2, 10, 13, 3), dtype=np.uint8)
    restored = loaded.predict(images)
    assert (restored.shape, restored.dtype) == (images.shape, np.uint8)
    assert not np.array_equal(restored, loaded.predict(images, params={"steps": 1}))
    assert np.array_equal(restored[1:], loaded.predict(images[1:]))
    assert load_restorer(local).settings.steps == 2
    assert list((tmp_path / "cwd").iterdir()) == []


def test_a_registered_model_that_sees_masks_takes_both_by_name(uri: str, tmp_path: Path) -> None:
    from mlflow import MlflowException

    path = export(tmp_path / "masked.safetensors", 1, condition="input_mask")
    loaded = load_pyfunc(register(path, uri=uri, name="masked", digests={"weights": "w"}).model_uri, uri)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 10, 13, 3), dtype=np.uint8)
    masks = rng.integers(0, 256, (2, 10, 13), dtype=np.uint8)
    restored = loaded.predict({"images": images, "masks": masks})
    assert (restored.shape, restored.dtype) == (images.shape, np.uint8)
    assert not np.array_equal(restored, loaded.predict({"images": images, "masks": 255 - masks}))
    assert np.array_equal(restored[1:], loaded.predict({"images": images[1:], "masks": masks[1:]}))
    for wrong in (images, {"images": images}, {"images": images, "masks": images}):
        with pytest.raises(MlflowException):
            loaded.predict(wrong)
    with pytest.raises(DataError, match="masks for these images must be"):
        loaded.predict({"images": images, "masks": masks[:, :9]})
    assert list((tmp_path / "cwd").iterdir()) == []


def test_a_registered_model_that_generates_takes_numbers(uri: str, tmp_path: Path) -> None:
    path = export(tmp_path / "generating.safetensors", 1, condition="none", generate=True)
    loaded = load_pyfunc(register(path, uri=uri, name="generating", digests={"weights": "w"}).model_uri, uri)
    images = loaded.predict(np.array([7, 3]), params={"seed": 5})
    assert np.array_equal(images, generate(load_model(path), 8, seed=5)[[7, 3]])
    assert loaded.predict(np.array([7]), params={"side": 20}).shape == (1, 20, 20, 3)


def test_a_model_that_cannot_be_registered_leaves_no_version(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="do not exist"):
        register(tmp_path / "no.safetensors", uri=uri, name="rddm", digests={"weights": "w"})
    with pytest.raises(ConfigError, match="may hold letters"):
        register(export(tmp_path / "a.safetensors", 0), uri=uri, name="a/b", digests={"weights": "w"})
    with pytest.raises(EnvironmentFault, match="registering rddm"):
        register(tmp_path / "a.safetensors", uri=uri, name="rddm", digests={"weights": "w"}, run_id="0" * 32)
    with pytest.raises(ModelError, match="registered there: nothing"):
        resolve("models:/rddm@champion", uri=uri)
