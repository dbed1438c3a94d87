"""`rddm launch ray` with what cannot be: one line, exit code 2, before a cluster is asked and nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import Here, TinyRun

NOBODY = "http://127.0.0.1:9"

# Keys of the cluster file, arguments, what is said.
BAD: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "no-dashboard": ({}, (), f"no Ray dashboard answers at {NOBODY} (Connection refused); check address"),
    "no-host": ({"address": "http://no-such-host.invalid:8265"}, (), "at http://no-such-host.invalid:8265 ("),
    "other-kind": ({"kind": "slurm"}, (), "kind=slurm does not fit rddm launch ray; it must be kind: ray"),
    "unknown-key": ({"retrys": 1}, (), "unknown key retrys; did you mean retries?"),
    "no-address": ({"address": None}, (), "address"),
    "gcs-address": ({"address": "head:6379"}, (), "address=head:6379 is not the URL of a dashboard"),
    "client-address": ({"address": "ray://head:10001"}, (), "address=ray://head:10001 is not the URL of a dashboard"),
    "too-many": ({"max_workers": 2}, ("--workers", "3"), "--workers 3 is more than this cluster can ever give"),
    "waits-too-little": ({"wait_s": 0}, (), "wait_s=0"),
    "secret": ({"env": {"RAY_AUTH_TOKEN": "x"}}, (), "env.RAY_AUTH_TOKEN looks like a secret"),
    "env-vars": ({"runtime_env": {"env_vars": {"A": "1"}}}, (), "runtime_env.env_vars is set by the launcher; use env"),
    "runtime-key": ({"runtime_env": {"pipp": ["x"]}}, (), "unknown key runtime_env.pipp of the cluster file"),
    "runtime-value": ({"runtime_env": {"pip": 7}}, (), "runtime_env['pip'] must be of type str or List[str]"),
    "workers": ({}, ("--workers", "7"), "7 workers exceed train.global_batch=6"),
    "run-name": ({}, ("--run", "my run"), "run.name=my run cannot name a job"),
    "run-key": ({}, ("train.stepz=3",), "unknown key train.stepz; did you mean train.steps?"),
    "no-config": ({}, ("--job", "drive"), "--job drive is not a job; choose one of train, evaluate, restore, pack"),
    "other-settings": ({}, ("optim.lr=1e-3",), "was started with other settings (optim.lr"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, here: Here, tiny_run: TinyRun, tmp_path: Path) -> None:
    keys, arguments, said = BAD[name]
    assert said in refused(here, tiny_run, tmp_path, keys, *arguments)


def test_a_cluster_file_that_is_not_there(here: Here, tiny_run: TinyRun) -> None:
    for options, said in (((), "--cluster is missing"), (("--cluster", "no.yaml"), "--cluster no.yaml does not exist")):
        result = here("launch", "ray", tiny_run.config, *options)
        assert result.code == 2 and said in one_line(result.stderr)


def refused(here: Here, run: TinyRun, folder: Path, keys: dict[str, Any], *arguments: str) -> str:
    """Launch a run that is there already, with these keys in the cluster file.   -> the one line it ends with"""
    values = {"kind": "ray", "address": NOBODY, **keys}
    (folder / "ray.yaml").write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    shutil.copytree(run.run_dir, folder / "runs" / "tiny")
    before = sorted(folder.rglob("*"))
    options = ["--cluster", "ray.yaml", "--storage", str(folder / "runs")]
    result = here("launch", "ray", run.config, *options, *arguments)
    assert result.code == 2 and result.stdout == "", result.text
    assert sorted(folder.rglob("*")) == before
    return one_line(result.stderr)


def one_line(text: str) -> str:
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text
