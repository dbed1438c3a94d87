"""`rddm launch kubernetes` up to where a cluster would answer: manifests, secrets, what is refused."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline import storage
from tests.e2e.conftest import Here
from tests.support.datasets import make_dataset
from tests.support.manifests import GOLDEN, load_all, problems_together
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


@pytest.fixture
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


def manifest_of(shown: str) -> str:
    """The part of a dry run that kubectl would get."""
    parts = shown.split("# ---- ")
    return next(part.partition("\n")[2] for part in parts if part.partition("\n")[0].endswith("manifest.yaml"))


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
