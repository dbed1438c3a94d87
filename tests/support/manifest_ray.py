"""Rules of KubeRay that its definitions do not say, of the fields that the launcher writes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.support.manifest_rules import check_name, wrong

QUEUE = "kueue.x-k8s.io/queue-name"
RAY_JOB_FIELDS = frozenset(
    ("submissionMode", "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished")
) | {"activeDeadlineSeconds", "suspend", "rayClusterSpec"}
CLUSTER_FIELDS = frozenset(
    ["rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"]
)
AUTOSCALER_FIELDS = frozenset(("version", "upscalingMode", "idleTimeoutSeconds"))
HEAD_FIELDS = frozenset(("rayStartParams", "template"))
GROUP_FIELDS = HEAD_FIELDS | {"groupName", "replicas", "minReplicas", "maxReplicas"}


def check_ray_job(spec: dict[str, Any], labels: dict[str, str]) -> Iterator[str]:
    """What KubeRay asks of a RayJob that is submitted in HTTPMode to a cluster of its own."""
    is_shut = spec.get("shutdownAfterJobFinishes", False)
    is_queued = spec.get("suspend", False) or QUEUE in labels
    yield from _known("spec", spec, RAY_JOB_FIELDS)
    yield from wrong(
        "spec",
        ("rayClusterSpec" not in spec, ".rayClusterSpec", "missing"),
        (not spec.get("entrypoint"), ".entrypoint", "missing"),
        (spec.get("submissionMode") != "HTTPMode", ".submissionMode", "another pod follows the job, and fails it"),
        (spec.get("backoffLimit", 0) < 0, ".backoffLimit", "negative"),
        (spec.get("activeDeadlineSeconds", 1) <= 0, ".activeDeadlineSeconds", "has to be positive"),
        (is_queued and not is_shut, ".shutdownAfterJobFinishes", "has to be true with suspend or a Kueue queue"),
        (spec.get("ttlSecondsAfterFinished", 0) < 0, ".ttlSecondsAfterFinished", "negative"),
        (
            spec.get("ttlSecondsAfterFinished", 0) > 0 and not is_shut,
            ".ttlSecondsAfterFinished",
            "needs shutdownAfterJobFinishes: true",
        ),
    )
    if "rayClusterSpec" in spec:
        yield from check_ray_cluster("spec.rayClusterSpec", spec["rayClusterSpec"])


def _known(path: str, found: dict[str, Any], fields: frozenset[str]) -> Iterator[str]:
    """Nothing here knows the conditions of other fields."""
    for field in found.keys() - fields:
        yield f"{path}.{field}: the schema knows it, no rule here does; write what KubeRay asks of it"


def check_ray_cluster(path: str, cluster: dict[str, Any]) -> Iterator[str]:
    scales, options = cluster.get("enableInTreeAutoscaling", False), cluster.get("autoscalerOptions", {})
    match = re.fullmatch(r"([0-9]+)\.([0-9]+)\.[0-9]+", cluster.get("rayVersion", ""))
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    has_token = "authOptions" in cluster and cluster["authOptions"].get("mode", "token") == "token"
    names = Counter(group["groupName"] for group in cluster.get("workerGroupSpecs", ()))
    yield from _known(path, cluster, CLUSTER_FIELDS)
    yield from _known(f"{path}.autoscalerOptions", options, AUTOSCALER_FIELDS)
    yield from wrong(
        path,
        (not match, ".rayVersion", "has to be the version of Ray in the image, as 2.60.0"),
        (bool(match) and has_token and version < (2, 52), ".rayVersion", "authOptions.mode token needs Ray 2.52"),
        (
            cluster.get("authOptions", {}).get("enableK8sTokenAuth", False),
            ".authOptions.enableK8sTokenAuth",
            "is not supported for a RayJob",
        ),
        (options.get("idleTimeoutSeconds", 0) < 0, ".autoscalerOptions.idleTimeoutSeconds", "negative"),
        *((count > 1, ".workerGroupSpecs", f"groupName {name} is given twice") for name, count in names.items()),
    )
    for here, group in groups_of(path, cluster):
        restart = group["template"]["spec"].get("restartPolicy", "Never")
        yield from _known(here, group, GROUP_FIELDS if "groupName" in group else HEAD_FIELDS)
        yield from wrong(
            here,
            ("labels" in group.get("rayStartParams", {}), ".rayStartParams.labels", "use labels of the group"),
            (
                scales and options.get("version") != "v1" and restart != "Never",
                ".template.spec.restartPolicy",
                "has to be Never with the autoscaler v2",
            ),
        )
        if "groupName" in group:
            yield from _worker_group(here, group)


def _worker_group(path: str, group: dict[str, Any]) -> Iterator[str]:
    low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    replicas = group.get("replicas", low)
    yield from check_name(f"{path}.groupName", group["groupName"], "DNS-1123 label", 63)
    yield from wrong(
        path,
        (low < 0, ".minReplicas", "negative"),
        (low > high, ".minReplicas", f"{low} exceeds maxReplicas {high}"),
        (low <= high and not low <= replicas <= high, ".replicas", f"{replicas} is not within {low} to {high}"),
    )


def groups_of(path: str, cluster: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The head, then the worker groups, with their paths."""
    workers = [(f"{path}.workerGroupSpecs[{i}]", group) for i, group in enumerate(cluster.get("workerGroupSpecs", ()))]
    return [(f"{path}.headGroupSpec", cluster["headGroupSpec"]), *workers]
