"""`rddm launch kubernetes` up to where a cluster would answer: manifests, secrets, what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.launch import make_plan
from cluster.settings import load_cluster
from cluster.submission import write_record, write_submitted
from data_pipeline import storage
from rddm_dist.cli.launch import make_job
from rddm_dist.config import load_config, to_yaml
from tests.e2e.conftest import Here
from tests.support.datasets import make_dataset
from tests.support.manifest_schemas import GOLDEN
from tests.support.manifests import load_all, manifest_of, problems_together
from tests.support.processes import ROOT
from tests.support.servers import lead_to, make_bucket, s3_server

CLUSTERS = sorted(path.parent.name for path in GOLDEN.glob("*/cluster.yaml"))
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "bucket-secret-5150",
    "AWS_SESSION_TOKEN": "session-secret-5151",
    "RAY_AUTH_TOKEN": "ray-secret-5152",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-secret-5153",
    "HF_TOKEN": "hub-secret-5154",
}
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"), count=8, size=(136, 144))


@pytest.fixture(scope="module")
def s3(data: str) -> Iterator[dict[str, str]]:
    """A server with a dataset in the bucket `vision`.   -> the environment variables that lead to it"""
    with s3_server() as (endpoint, settings), pytest.MonkeyPatch.context() as patch:
        lead_to(settings, patch)
        bucket = make_bucket(endpoint, "vision")
        for path in Path(data).iterdir():
            storage.upload(path, f"{bucket}/data/rain/train/{path.name}")
        yield settings


@pytest.fixture
def bucket(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to the bucket, in an environment full of secrets."""
    lead_to(s3, monkeypatch)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """kubectl knows one cluster, at a port where nobody listens."""
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "lab",
        "clusters": [{"name": "lab", "cluster": {"server": "http://127.0.0.1:9"}}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": ""}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))


def command_of(name: str) -> list[str]:
    """What the first line of a cluster file says to run, without `rddm`."""
    return shlex.split((GOLDEN / name / "cluster.yaml").read_text().splitlines()[0].removeprefix("# rddm "))


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_manifest_of_a_typical_cluster(name: str, here: Here, bucket: None, tmp_path: Path) -> None:
    """Byte for byte the recorded one (UPDATE_GOLDEN=1 records it), which breaks no rule of the schemas."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    shown = here(*command_of(name))
    assert shown.code == 0, shown.text
    manifest, golden = manifest_of(shown.stdout), GOLDEN / name / "manifest.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(manifest)
    assert manifest == golden.read_text()
    assert problems_together(load_all(manifest)) == []


def test_the_cluster_files_that_come_with_the_code_are_good_for_the_command_they_name(
    here: Here, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for kind in ("kubernetes", "slurm", "ray"):
        lines = (tmp_path / "configs" / "cluster" / f"{kind}.yaml").read_text().splitlines()
        shown = here(*shlex.split(lines[1].removeprefix("#   rddm ")))
        assert shown.code == 0 and "# ---- to submit" in shown.stdout, shown.text


def test_what_the_cluster_file_suggests_is_good(here: Here, tmp_path: Path) -> None:
    text = (ROOT / "configs" / "cluster" / "kubernetes.yaml").read_text()
    (tmp_path / "all.yaml").write_text(re.sub(r"(?m)^# (\w+: )", r"\1", text))
    shutil.copy(GOLDEN / "train.yaml", tmp_path)
    shown = here("launch", "kubernetes", "train.yaml", "--cluster", "all.yaml", "--workers", 16, "--dry-run")
    assert shown.code == 0, shown.text
    manifest = manifest_of(shown.stdout)
    assert problems_together(load_all(manifest)) == [] and "fsGroup: 1000" in manifest


@needs_kubectl
@pytest.mark.parametrize("name", CLUSTERS)
def test_kubectl_reads_the_manifest_as_it_was_meant(name: str) -> None:
    """The real kubectl, without a server. Its own types drop what Kubernetes does not know of a Job."""
    path = GOLDEN / name / "manifest.yaml"
    meant = {manifest["kind"]: manifest for manifest in load_all(path.read_text())}
    for document in path.read_text().split("---\n"):
        kind = yaml.safe_load(document)["kind"]
        is_typed = kind == "Job"
        change = ["set", "image", "rddm=other:1"] if is_typed else ["annotate", "note=x"]
        [verb, *rest] = change if not is_typed else [" ".join(change[:2]), change[2]]
        command = ["kubectl", *verb.split(), "--local", "--filename=-", *rest, "--output=json"]
        read = subprocess.run(command, input=document, capture_output=True, text=True, timeout=30, check=True)
        expected = json.loads(json.dumps(meant[kind]))
        if is_typed:
            expected["spec"]["template"]["spec"]["containers"][0]["image"] = "other:1"
        else:
            expected["metadata"].setdefault("annotations", {})["note"] = "x"
        assert holds(json.loads(read.stdout), expected) == []


def holds(found: Any, expected: Any, path: str = "") -> list[str]:
    """Paths at which `found` lacks something of `expected`; it may have more."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return [line for key, value in expected.items() for line in holds(found.get(key), value, f"{path}.{key}")]
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for i, (one, other) in pairs for line in holds(one, other, f"{path}[{i}]")]
    return [] if found == expected else [f"{path}: {found!r} instead of {expected!r}"]


def test_no_secret_of_the_environment_is_written_anywhere(here: Here, bucket: None, tmp_path: Path) -> None:
    """Pods get the credentials of a bucket from a Secret: the launch folder has them neither here nor there."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    shown = here(*command_of("gpus-s3-kueue"))
    # Uncommitted changes of the code are shown too, and these secrets may be among them.
    printed = [part for part in shown.text.split("# ---- ") if not part.partition("\n")[0].endswith("code.patch")]
    cluster = load_cluster("gpus-s3-kueue/cluster.yaml")
    overrides = ["train.yaml", "data.uri=s3://vision/data/rain/train"]
    job = make_job("train", overrides, cluster, workers=16, gpus_per_worker=1, storage="", run="secretive", sweep=[])
    plan = make_plan(job, cluster)
    write_record(plan.record, plan.files)
    write_submitted(plan.record, job, cluster, {"rayjob": "secretive-0001", "namespace": "vision"})

    launch = "s3://vision/runs/secretive/launch/0001"
    names = storage.list_names(launch)
    assert set(names) >= {"config.yaml", "cluster.yaml", "manifest.yaml", "command.txt", "launch.json"}
    assert sorted(path.name for path in plan.record.local.iterdir()) == names
    written = [storage.read_bytes(f"{launch}/{name}").decode() for name in names if name != "code.patch"]
    written += [path.read_text() for path in plan.record.local.iterdir() if path.name != "code.patch"]
    secrets = {*SECRETS.values(), os.environ["AWS_ACCESS_KEY_ID"]}
    assert [value for value in secrets for text in (*printed, *written) if value in text] == []
    assert "secretRef" in manifest_of(shown.stdout) and "s3-credentials" in manifest_of(shown.stdout)


# Keys of the cluster file, arguments, what is said. All of it is known before any cluster is asked.
BAD: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "no-tag": ({"image": "rddm-dist"}, (), "image=rddm-dist has no tag"),
    "latest": ({"image": "rddm-dist:latest"}, (), "image=rddm-dist:latest has no tag"),
    "space": ({"image": "my image:1"}, (), "image=my image:1 has a space in it"),
    "other-kind": ({"kind": "slurm"}, (), "kind=slurm does not fit rddm launch kubernetes"),
    "unknown-key": ({"imagee": 1}, (), "unknown key imagee; did you mean image?"),
    "inner-key": ({"worker": {"cpu": "1"}}, (), "unknown key worker.cpu; did you mean worker.cpus?"),
    "cores": ({"worker": {"cpus": "8 cores"}}, (), "worker.cpus='8 cores'"),
    "secret": ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, (), "env.AWS_SECRET_ACCESS_KEY looks like a secret"),
    "secret-url": ({"env": {"PROXY": "http://me:word@proxy"}}, (), "env.PROXY looks like a secret"),
    "mlflow-password": ({"mlflow": "http://me:word@mlflow:5000"}, (), "mlflow holds a URL with a password"),
    "launcher-env": ({"env": {"RDDM_LAUNCH": "7"}}, (), "env.RDDM_LAUNCH is set by the launcher itself"),
    "variable": ({"env": {"MY VAR": "7"}}, (), "env.MY VAR"),
    "label": ({"labels": {"team": "team a"}}, (), "labels.team='team a'"),
    "label-key": ({"labels": {"my team": "a"}}, (), "my team"),
    "claim": ({"volumes": [{"claim": "Runs_1", "mount": "/runs"}]}, (), "volumes.0.claim='Runs_1'"),
    "secret-name": ({"secrets": ["S3_Keys"]}, (), "secrets.0='S3_Keys'"),
    "toleration": ({"worker": {"tolerations": [{"ky": "spot"}]}}, (), "unknown key worker.tolerations.0.ky"),
    "mounts": ({"volumes": [{"claim": n, "mount": "/runs"} for n in "ab"]}, (), "two are mounted at /runs"),
    "ours": ({"volumes": [{"claim": "runs", "mount": "/dev/shm"}]}, (), "mount=/dev/shm is used by the launcher"),
    "no-volume": ({"volumes": []}, (), "storage=/runs is on no volume of the cluster file (volumes: none)"),
    "read-only": ({"volumes": [{"claim": "runs", "mount": "/runs", "read_only": True}]}, (), "read_only=true"),
    "too-many": ({"max_workers": 8}, ("--workers", "16"), "--workers 16 is more than this cluster can ever give"),
    "no-gpus": ({}, ("--gpus-per-worker", "1"), "--gpus-per-worker 1 asks for GPUs, the cluster file has none"),
    "few-cpus": ({"cpus_per_worker": 16}, (), "worker.cpus=8 is too few for 1 workers of cpus_per_worker=16"),
    "memory": ({"shared_memory": "9Gi"}, (), "shared_memory=9Gi leaves nothing of head.memory=8Gi"),
    "kueue-autoscaled": ({"queue": "q", "worker": {"min_pods": 1}}, ("--workers", "2"), "Kueue admits whole jobs"),
    "uneven": ({"form": "torchrun", "worker": {"workers": 2}}, ("--workers", "3"), "--workers 3 is no multiple"),
    "sweep": ({"form": "torchrun"}, ("--sweep", "optim.lr=1e-4,2e-4"), "--sweep needs form: ray"),
    "run-name": ({}, ("--run", "so/rain"), "so/rain"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, here: Here, tmp_path: Path) -> None:
    keys, arguments, said = BAD[name]
    assert said in refused(here, tmp_path, keys, *arguments, "--dry-run")


def refused(here: Here, folder: Path, keys: dict[str, Any], *arguments: str) -> str:
    """Launch a training with these keys in the cluster file.   -> the one line with which it ends"""
    base = {"kind": "kubernetes", "image": "rddm-dist:0.1.0", "storage": "/runs", "here": "none"}
    (folder / "cluster.yaml").write_text(
        yaml.safe_dump({**base, "volumes": [{"claim": "runs", "mount": "/runs"}], **keys})
    )
    shutil.copy(GOLDEN / "train.yaml", folder)
    before = sorted(folder.rglob("*"))
    result = here("launch", "kubernetes", "train.yaml", "--cluster", "cluster.yaml", *arguments)
    assert result.code == 2 and result.stdout == "", result.text
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.text
    assert sorted(folder.rglob("*")) == before, "something was written"
    return result.stderr


def test_a_missing_or_broken_cluster_file_is_one_line(here: Here, tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "train.yaml", tmp_path)
    (tmp_path / "broken.yaml").write_text("kind: kubernetes: 1")
    (tmp_path / "list.yaml").write_text("[kubernetes]")
    for path, said in (
        ("absent.yaml", "--cluster absent.yaml does not exist"),
        ("broken.yaml", "--cluster broken.yaml is not valid YAML"),
        ("list.yaml", "--cluster list.yaml must hold keys such as 'kind: kubernetes', not a list"),
        ("", "--cluster is missing; give a cluster file"),
    ):
        result = here("launch", "kubernetes", "train.yaml", "--cluster", path)
        assert result.code == 2 and result.stderr.startswith(f"error: {said}"), result.text
        assert result.stderr.count("\n") == 1


def test_the_name_of_a_run_of_other_settings_is_refused(here: Here, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "derain"
    run_dir.mkdir(parents=True)
    config = load_config(GOLDEN / "train.yaml", [f"run.storage={tmp_path}/runs", "run.name=derain", "model.dim=32"])
    (run_dir / "config.yaml").write_text(to_yaml(config))
    keys = {"storage": f"{tmp_path}/runs", "here": "same", "volumes": [{"claim": "runs", "mount": str(tmp_path)}]}
    said = refused(here, tmp_path, keys)
    assert "model.dim: 32 -> 64" in said
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("seen_at", ["same", "/mnt/absent/runs"])
def test_a_volume_that_this_machine_does_not_have_is_refused(seen_at: str, here: Here, tmp_path: Path) -> None:
    volumes = [{"claim": "runs", "mount": "/absent/shared"}]
    said = refused(here, tmp_path, {"storage": "/absent/shared/runs", "here": seen_at, "volumes": volumes})
    place = "/absent/shared" if seen_at == "same" else seen_at
    assert f"here={seen_at}, but {place} does not exist on this machine" in said


@needs_kubectl
def test_an_api_server_that_does_not_answer_is_one_line(here: Here, tmp_path: Path) -> None:
    said = refused(here, tmp_path, {})
    assert "no Kubernetes API server answers (The connection to the server 127.0.0.1:9 was refused)" in said
    assert 'context "moon" does not exist; change context' in refused(here, tmp_path, {"context": "moon"})


@needs_kubectl
def test_a_job_of_a_cluster_that_does_not_answer_is_one_line(here: Here, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    cluster = load_cluster("torchrun-nodes/cluster.yaml")
    job = make_job("train", ["train.yaml"], cluster, workers=8, gpus_per_worker=1, storage="", run="", sweep=[])
    plan = make_plan(job, cluster)
    write_record(plan.record, plan.files)
    write_submitted(plan.record, job, cluster, {"job": "derain-0001", "namespace": "vision", "context": "lab"})
    for command in ("logs", "stop"):
        result = here(command, "launches/derain")
        assert result.code == 2 and "no Kubernetes API server answers" in result.stderr, result.text
        assert result.stderr.count("\n") == 1
    status = here("status", "launches/derain")
    assert "no Kubernetes API server answers" in status.text and "Traceback" not in status.text


def test_a_machine_without_kubectl_is_one_line(here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "kubectl is not installed here; install it" in refused(here, tmp_path, {})
