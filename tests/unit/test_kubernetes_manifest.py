"""Manifests of typical clusters are what the KubeRay and Kubernetes schemas take, and say what they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.datasets import make_dataset
from tests.support.manifests import load_all, problems_together
from tests.support.processes import Finished, rddm
from tests.support.runs import write_config

IMAGE = "registry.example.com/vision/rddm-dist:0.1.0"
CLUSTERS: dict[str, dict[str, Any]] = {
    "gpus-autoscaled": {
        "storage": "/runs", "here": "none", "volumes": [{"claim": "runs", "mount": "/runs"}],
        "gpus_per_worker": 1, "secrets": ["s3-credentials"], "scratch": "100Gi",
        "service_account": "rddm", "mlflow": "http://mlflow.mlflow:5000",
        "worker": {"cpus": "16", "memory": "128Gi", "workers": 8, "min_pods": 1},
    },
    "unseen-volume": {
        "storage": "/runs", "here": "none", "volumes": [{"claim": "runs", "mount": "/runs"}],
        "worker": {"cpus": "4", "memory": "16Gi", "workers": 2},
    },
    "kueue-on-spot": {
        "storage": "/runs", "here": "none", "volumes": [{"claim": "runs", "mount": "/runs"}], "gpus_per_worker": 1,
        "queue": "team-a", "priority_class": "research", "drain_s": 300,
        "worker": {
            "cpus": "8", "memory": "64Gi", "workers": 4, "node_selector": {"pool": "spot"},
            "tolerations": [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}],
        },
    },
    "torchrun": {
        "form": "torchrun", "storage": "/runs", "here": "none", "volumes": [{"claim": "runs", "mount": "/runs"}],
        "gpus_per_worker": 1, "worker": {"cpus": "8", "memory": "64Gi", "workers": 8},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    path = write_config(folder, make_dataset(folder / "data", count=20, size=(40, 48)))
    path.write_text(path.read_text().replace("global_batch: 6", "global_batch: 48"))
    return path


def dry_run(config: Path, folder: Path, keys: dict[str, Any], *arguments: str) -> Finished:
    cluster = folder / "kubernetes.yaml"
    values = {"kind": "kubernetes", "image": IMAGE, "namespace": "vision", "preflight": True, **keys}
    cluster.write_text(yaml.safe_dump(values))
    command = ["launch", "kubernetes", str(config), "--cluster", str(cluster), "--dry-run", *arguments]
    return rddm(*command, cwd=folder)


def manifest_of(shown: str) -> str:
    """The part of a dry run that kubectl would get."""
    parts = shown.split("# ---- ")
    return next(part.partition("\n")[2] for part in parts if part.partition("\n")[0].endswith("manifest.yaml"))


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_manifest_breaks_no_rule_of_the_schemas(name: str, config: Path, tmp_path: Path) -> None:
    keys = CLUSTERS[name]
    shown = dry_run(config, tmp_path, keys, "--workers", "16")
    assert shown.code == 0, shown.text
    manifests = load_all(manifest_of(shown.stdout))
    assert problems_together(manifests) == []
    main = next(each for each in manifests if each["kind"] in ("RayJob", "Job"))
    assert main["kind"] == ("Job" if keys.get("form") == "torchrun" else "RayJob")
    gpus = keys.get("gpus_per_worker", 0) * keys["worker"]["workers"]
    assert ("nvidia.com/gpu" in manifest_of(shown.stdout)) == (gpus > 0)


BAD = {
    "no-tag": ({"image": "rddm-dist"}, (), "image=rddm-dist has no tag"),
    "latest": ({"image": "rddm-dist:latest"}, (), "image=rddm-dist:latest has no tag"),
    "secret": ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, (), "env.AWS_SECRET_ACCESS_KEY looks like a secret"),
    "unknown-key": ({"imagee": 1}, (), "unknown key imagee; did you mean image?"),
    "too-many": ({"max_workers": 8}, ("--workers", "16"), "--workers 16 is more than this cluster can ever give"),
    "kueue-autoscaled": ({"queue": "q", "worker": {"min_pods": 1}}, ("--workers", "2"), "Kueue admits whole jobs"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, config: Path, tmp_path: Path) -> None:
    keys, arguments, said = BAD[name]
    refused = dry_run(config, tmp_path, {"storage": "/runs", "here": "none", **keys}, *arguments)
    assert refused.code == 2 and said in refused.stderr, refused.text
    assert len(refused.stderr.splitlines()) == 1
