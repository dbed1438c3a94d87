"""Many kills inside saves, and storage servers that hang or stay away."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_pipeline import storage
from rddm_dist.training import checkpoint as ckpt
from tests.distributed.test_faults import (
    KEYS,
    STEPS,
    WORKERS,
    assert_equal_bits,
    check_kills,
    check_saves,
    cut_by,
    data,
    events,
    run_probe,
    undisturbed,
)
from tests.support.processes import run_workers
from tests.support.runs import TRAIN, write_config
from tests.support.servers import make_bucket, proxy, s3_server

__all__ = ["data", "undisturbed"]  # fixtures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = 20
MANY_STEPS = 4 * KILLS


def test_a_run_killed_inside_twenty_saves_ends_with_the_same_bits(data: str, tmp_path: Path) -> None:
    (tmp_path / "undisturbed").mkdir()
    config = write_config(tmp_path / "undisturbed", data)
    keys = [f"train.steps={MANY_STEPS}", "train.checkpoint_every=20"]
    [result, _] = run_workers([*TRAIN, str(config), *keys], WORKERS, cwd=tmp_path)
    assert result.code == 0, result.text
    config = write_config(tmp_path, data)
    undisturbed = str(tmp_path / "undisturbed" / "runs" / "tiny")
    check_kills(str(config), undisturbed, steps=MANY_STEPS, kills=KILLS, seed=7)


def test_servers_that_hang_or_stay_away_cost_saves_and_not_the_run(
    data: str, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hanging` answers again at step 11; `gone` stays away until the run has ended, and the same command goes on."""
    cut = tmp_path / "cut"
    with s3_server() as (endpoint, settings), proxy(endpoint, plan=cut_by(cut, "hang", "drop")) as line:
        bucket = make_bucket(endpoint, "bucket")
        runs = []
        for name in ("hanging", "gone"):
            saved = f"{bucket}/runs/{name}/checkpoints/step-00000004/COMMIT.json"
            runs.append(
                {
                    "name": name,
                    "overrides": [*KEYS, f"run.storage={bucket}/runs", f"run.work_dir={tmp_path / 'work'}"],
                    "at": {"5": [["await", saved], ["write", str(cut)]]},
                }
            )
        runs[0]["at"]["11"] = [["remove", str(cut)]]
        runs[1]["overrides"].append("train.max_failed_saves=2")
        env = {**settings, "AWS_ENDPOINT_URL": line.url}
        outcome = run_probe(tmp_path, data, runs, env=env)
        assert outcome.said["hanging"] == [(0, "")]
        [(code, said)] = outcome.said["gone"]
        assert code == 2 and said.startswith("2 saves in a row failed, the last with: ")

        cut.unlink()
        shutil.rmtree(tmp_path / "work")  # another machine, which knows of the run what is in the bucket
        again = {**runs[1], "at": {}}
        assert run_probe(tmp_path, data, [again], env=env).said["gone"] == [(0, "")]
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        check_saves(f"{bucket}/runs/hanging")
        assert_equal_bits(f"{bucket}/runs/hanging", undisturbed)
        home = f"{bucket}/runs/gone"
        assert [record["step"] for record in events(home, "resumed")] == [4]
        assert [record["step"] for record in events(home, "metrics")][-8:] == list(range(5, STEPS + 1))
        assert ckpt.list_steps(storage.join(home, "checkpoints")) == [12, 10]
        assert_equal_bits(home, undisturbed)
