"""What a manifest has its containers run, run as processes: trained to the end, evicted, started again."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kubernetes_start import PREFLIGHT_PORT
from cluster.kubernetes_states import rayjob_state
from cluster.launch import JobState
from tests.support.datasets import make_dataset
from tests.support.manifests import load_all, manifest_of, problems_together
from tests.support.pods import MOUNT, OVERLAY_ETC, Pod, Pods, why_not
from tests.support.processes import Finished, rddm
from tests.support.ray_launches import ONE_THREAD, events, last_step, losses, same_state, undisturbed
from tests.support.ray_nodes import RayNodes
from tests.support.runs import write_config
from tests.support.servers import wait_until

pytestmark = pytest.mark.timeout(400)

STEPS = "train.steps=60"
# On a node: a launch's ConfigMap where pods have it, and the names of the nodes as before.
MOUNT_FILES = f"""
cp /etc/hosts /tmp/hosts
{OVERLAY_ETC}
cp /tmp/hosts /etc/hosts
: > /etc/resolv.conf
mkdir {MOUNT}
mount --bind "$1" {MOUNT}
"""
# On the head: SIGTERM to the driver as soon as three steps are in the journal.
TERMINATE = """
until [ "$(grep -c '"event":"metrics"' "$1" 2> /dev/null)" -ge 3 ] 2> /dev/null; do sleep 0.05; done
exec pkill -TERM --oldest -f "rddm_dist.cli.main train"
"""
REMARKABLE_S = 30.0  # a tiny run saves in less, however busy the machine; the pod has 150


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"), count=20, size=(40, 48))


def manifests_of(folder: Path, data: str, *overrides: str, **keys: Any) -> list[dict[str, Any]]:
    """What `rddm launch kubernetes` would apply for a tiny run whose storage is a volume."""
    config = write_config(folder, data)
    cluster = {
        "kind": "kubernetes", "image": "rddm-dist:0.1.0", "storage": str(folder / "runs"), "here": "none",
        "volumes": [{"claim": "runs", "mount": str(folder)}], "env": {"OMP_NUM_THREADS": "1"}, **keys,
    }  # fmt: skip
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    options = ["--cluster", str(folder / "cluster.yaml"), "--workers", "2", "--dry-run"]
    shown = rddm("launch", "kubernetes", str(config), ONE_THREAD, *overrides, *options, cwd=folder)
    assert shown.code == 0, shown.text
    manifests = load_all(manifest_of(shown.stdout))
    assert problems_together(manifests) == []
    return manifests


def two_pods(folder: Path, data: str, *overrides: str, **keys: Any) -> Pods:
    """The pods of a torchrun Job, one worker each."""
    (folder / "pods").mkdir()
    worker = {"cpus": "1", "memory": "4Gi", "workers": 1}
    manifests = manifests_of(folder, data, *overrides, form="torchrun", worker=worker, shared_memory="512Mi", **keys)
    return Pods(manifests, folder / "pods")


def ends(pods: list[Pod], *, timeout_s: float) -> list[Finished]:
    """Wait for all at once: each has a pipe to be emptied."""
    with ThreadPoolExecutor(len(pods)) as pool:
        return list(pool.map(lambda pod: pod.finish(timeout_s=timeout_s), pods))


def wait_for_step(run_dir: Path, step: int, pods: list[Pod]) -> None:
    def has_come() -> bool:
        if any(pod.process.poll() is not None for pod in pods):
            raise AssertionError("\n".join(each.text for each in ends(pods, timeout_s=30)))
        return last_step(run_dir) >= step

    wait_until(has_come, timeout_s=90)


@pytest.mark.slow
def test_an_evicted_pod_saves_with_the_other_and_new_pods_go_on(data: str, tmp_path: Path) -> None:
    """What comes out are the bits of an undisturbed run."""
    run_dir = tmp_path / "runs" / "tiny"
    with two_pods(tmp_path, data, STEPS) as job:
        pods = [job.start(index) for index in range(2)]
        wait_for_step(run_dir, 3, pods)
        told = time.monotonic()
        pods[1].terminate()
        results = ends(pods, timeout_s=job.grace_s)
        took_s = time.monotonic() - told
        assert [each.code for each in results] == [75, 75], "\n".join(each.text for each in results)
        assert took_s < REMARKABLE_S, f"{took_s:.0f} s of the {job.grace_s} s that the pod has"
        stopped = events(run_dir, "finished")[-1]
        assert stopped["status"] == "stopped" and stopped["reason"] == "SIGTERM" and stopped["step"] < 60
        assert events(run_dir, "saved")[-1]["step"] == stopped["step"]
        assert [job.verdict(75), job.verdict(1), job.verdict(1, is_disrupted=True)] == ["Ignore", "Count", "Ignore"]

        again = ends([job.start(index) for index in (1, 0)], timeout_s=150)
        assert [each.code for each in again] == [0, 0], "\n".join(each.text for each in again)
        assert "trained to step 60" in again[1].stdout
    expected = undisturbed(tmp_path / "local", data, STEPS)
    assert same_state(run_dir, expected) and losses(run_dir) == losses(expected)
    kept = run_dir / "launch" / "0001"
    assert sorted(path.name for path in kept.iterdir()) == ["cluster.yaml", "config.yaml"]


def test_a_pod_that_waits_for_the_others_goes_at_once(data: str, tmp_path: Path) -> None:
    """As when a node is drained before the last pod has found a place: nothing is to be saved."""
    with two_pods(tmp_path, data, STEPS) as job:
        pod = job.start(0)
        wait_until(lambda: pod.listens(PREFLIGHT_PORT), timeout_s=60)
        told = time.monotonic()
        pod.terminate()
        result = pod.finish(timeout_s=job.grace_s)
        assert time.monotonic() - told < REMARKABLE_S
        assert result.code == 143 and job.verdict(143, is_disrupted=True) == "Ignore", result.text
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()


def test_bad_input_ends_the_job_for_good(data: str, tmp_path: Path) -> None:
    """Data that only the pods could look for: one line, exit code 2, no further start."""
    with two_pods(tmp_path, f"{tmp_path}/absent") as job:
        results = ends([job.start(index) for index in range(2)], timeout_s=90)
        assert [each.code for each in results] == [2, 2], "\n".join(each.text for each in results)
        assert job.verdict(2) == "FailJob"
        assert f"{tmp_path}/absent" in results[0].stdout and "Traceback" not in results[0].text + results[1].text


@pytest.mark.ray
@pytest.mark.slow
def test_the_entry_point_of_a_rayjob_saves_on_sigterm_and_goes_on_when_submitted_again(
    data: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Submitted as KubeRay does in HTTPMode; the head pod's environment is that of all it starts."""
    folder = tmp_path_factory.mktemp("rayjob")
    config_map, rayjob = manifests_of(folder, data, STEPS)
    spec, files, run_dir = rayjob["spec"], folder / "launch", folder / "runs" / "tiny"
    files.mkdir()
    for name, text in config_map["data"].items():
        (files / name).write_text(text)
    [head] = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in head["env"]}
    env["PATH"] = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    with RayNodes(tmp_path_factory.getbasetemp(), nodes=2, env=env) as cluster:
        for node in range(2):
            mounted = cluster.run_on(node, ["sh", "-c", MOUNT_FILES, "sh", str(files)])
            assert mounted.code == 0, mounted.text
        submit(cluster, spec["entrypoint"], "tiny-0001-first")
        told = cluster.run_on(0, ["sh", "-c", TERMINATE, "sh", str(run_dir / "metrics.jsonl")], timeout_s=150)
        assert told.code == 0, job_info(cluster, "tiny-0001-first")
        wait_until(lambda: has_ended(cluster, "tiny-0001-first"), timeout_s=60)
        assert state_of(cluster, "tiny-0001-first", failed=1).exit_code == 75
        assert events(run_dir, "saved")[-1]["step"] == events(run_dir, "finished")[-1]["step"] < 60

        submit(cluster, spec["entrypoint"], "tiny-0001-second")
        wait_until(lambda: has_ended(cluster, "tiny-0001-second"), timeout_s=150)
        assert state_of(cluster, "tiny-0001-second").word == "done", job_info(cluster, "tiny-0001-second")
    expected = undisturbed(folder / "local", data, STEPS)
    assert same_state(run_dir, expected) and losses(run_dir) == losses(expected)


def submit(cluster: RayNodes, entrypoint: str, name: str) -> None:
    ask(cluster, "", {"entrypoint": entrypoint, "submission_id": name})


def job_info(cluster: RayNodes, name: str) -> dict[str, Any]:
    return ask(cluster, name)


def has_ended(cluster: RayNodes, name: str) -> bool:
    return job_info(cluster, name)["status"] in ("SUCCEEDED", "FAILED", "STOPPED")


def state_of(cluster: RayNodes, name: str, **status: Any) -> JobState:
    """What the launcher says of a RayJob in whose status KubeRay wrote what Ray says."""
    info = job_info(cluster, name)
    words = {"jobDeploymentStatus": "Failed" if info["status"] == "FAILED" else "Complete"}
    return rayjob_state({"status": {**words, "jobStatus": info["status"], "message": info["message"], **status}})


def ask(cluster: RayNodes, name: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Ray's API of jobs."""
    request = urllib.request.Request(
        f"{cluster.dashboard}/api/jobs/{name}", json.dumps(body).encode() if body else None
    )
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", f"Bearer {cluster.env['RAY_AUTH_TOKEN']}")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
        found: dict[str, Any] = json.load(response)
    return found
