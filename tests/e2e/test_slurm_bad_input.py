"""What `rddm launch slurm` refuses without asking Slurm: one line, exit code 2, nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import Here, TinyRun
from tests.support.runs import write_config

CLUSTER: dict[str, Any] = {"kind": "slurm", "partition": "main", "workers_per_node": 2}
BAD: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "unknown-key": ({"partitoin": "x"}, (), "unknown key partitoin; did you mean partition?"),
    "no-partition": ({"partition": ""}, (), "partition"),
    "another-kind": ({"kind": "ray"}, (), "kind=ray does not fit rddm launch slurm; it must be kind: slurm"),
    "bad-time": ({"time": "one day"}, (), "time"),
    "bad-form": ({"form": "mpi"}, (), "form"),
    "shared-nodes-with-ray": ({"form": "ray", "exclusive": False}, (), "exclusive=false does not fit form=ray"),
    "secret": ({"env": {"HF_TOKEN": "x"}}, (), "env.HF_TOKEN looks like a secret"),
    "too-many": ({"max_workers": 4}, ("--workers", "6"), "--workers 6 is more than this cluster can ever give"),
    "unequal-nodes": ({}, ("--workers", "3"), "--workers 3 is no multiple of workers_per_node=2"),
    "unseen-storage": ({"here": "none"}, (), "here=none does not fit Slurm"),
    "bad-name": ({}, ("--run", "a b"), "run.name"),
    "bad-sweep": ({}, ("--sweep", "optim.lrr=1,2"), "optim.lrr"),
    "bad-override": ({}, ("train.steps=-1",), "train.steps"),
}


def cluster_file(folder: Path, **keys: Any) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump({**CLUSTER, **keys}))
    return path


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, here: Here, tiny_run: TinyRun, tmp_path: Path) -> None:
    keys, arguments, said = BAD[name]
    config = write_config(tmp_path, tiny_run.data)
    refused = here("launch", "slurm", config, "--cluster", cluster_file(tmp_path, **keys), *arguments)
    assert (refused.code, said in refused.stderr) == (2, True), refused.text
    assert len(refused.stderr.splitlines()) == 1 and not (tmp_path / "runs").exists()


def test_cluster_files_that_are_not_there_or_hold_no_keys(here: Here, tiny_run: TinyRun, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_run.data)
    (tmp_path / "list.yaml").write_text("- kind: slurm\n")
    (tmp_path / "broken.yaml").write_text("kind: [slurm\n")
    (tmp_path / "no-partition.yaml").write_text("kind: slurm\n")
    for path, said in (
        ("gone.yaml", "--cluster gone.yaml does not exist"),
        ("list.yaml", "must hold keys such as 'kind: slurm'"),
        ("broken.yaml", "is not valid YAML"),
        ("no-partition.yaml", "partition"),
        ("", "--cluster is missing"),
    ):
        refused = here("launch", "slurm", config, "--cluster", path)
        assert (refused.code, said in refused.stderr) == (2, True), refused.text
        assert len(refused.stderr.splitlines()) == 1


def test_a_name_that_another_config_has_taken(here: Here, tiny_run: TinyRun, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_run.data)
    shutil.copytree(tiny_run.run_dir, tmp_path / "runs" / "tiny")
    before = sorted(tmp_path.rglob("*"))
    refused = here("launch", "slurm", config, "--cluster", cluster_file(tmp_path), "diffusion.num_timesteps=30")
    said = "other settings (diffusion.num_timesteps: 20 -> 30); give those back or choose another run.name"
    assert (refused.code, said in refused.stderr) == (2, True), refused.text
    assert len(refused.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "cluster.yaml"])


def test_a_machine_without_slurm_is_named(
    here: Here, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, cluster = write_config(tmp_path, tiny_run.data), cluster_file(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    away = here("launch", "slurm", config, "--cluster", cluster)
    assert away.code == 2 and "sinfo is not on this machine" in away.stderr, away.text
    assert len(away.stderr.splitlines()) == 1 and not (tmp_path / "runs").exists()


@pytest.mark.slow  # waits for Slurm's own patience
@pytest.mark.skipif(shutil.which("sinfo") is None, reason="Slurm's commands are not installed")
def test_a_slurm_that_does_not_answer_is_one_line(
    here: Here, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, cluster = write_config(tmp_path, tiny_run.data), cluster_file(tmp_path)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "gone.conf"))
    away = here("launch", "slurm", config, "--cluster", cluster)
    assert away.code == 2 and "error: sinfo failed: " in away.stderr, away.text
    assert len(away.stderr.splitlines()) == 1 and not (tmp_path / "runs").exists()
