"""The Kubernetes manifest of a job as one plain YAML file: a ConfigMap, and a RayJob of KubeRay or a plain Job."""

from __future__ import annotations

import re
from typing import Any

import yaml

from cluster.kubernetes_job import plain_job, service
from cluster.kubernetes_pod import Manifest, metadata
from cluster.kubernetes_rayjob import ray_job
from cluster.kubernetes_shape import Shape, object_name, shape_of
from cluster.kubernetes_start import START_FILE, carried, start_script
from cluster.settings import KubernetesCluster
from cluster.submission import Job, Record
from data_pipeline.errors import ConfigError

MANIFEST_FILE = "manifest.yaml"
CONFIG_MAP_BYTES = 1_000_000  # etcd takes 1 MiB, what surrounds the data included


def render(settings: KubernetesCluster, job: Job, record: Record) -> str:
    """The whole manifest, as `kubectl apply -f` takes it."""
    shape = shape_of(settings, job)
    name = object_name(job, record)
    objects = [_config_map(settings, job, record, shape)]
    if shape.is_ray:
        objects.append(ray_job(settings, job, record, shape))
    else:
        if shape.pods > 1:
            objects.append(service(settings, job, record))
        objects.append(plain_job(settings, job, record, shape))
    title = f"# {job.kind} {job.name}, launch {record.number}. To do away with it: kubectl delete -n "
    title += f"{settings.namespace} {','.join(item['kind'].lower() for item in objects)} {name}\n"
    return title + "---\n".join(_dump(item) for item in objects)


def _config_map(settings: KubernetesCluster, job: Job, record: Record, shape: Shape) -> Manifest:
    data = {START_FILE: start_script(settings, job, record, shape)}
    if not record.is_shared:
        data |= carried(settings, job)
    size = sum(len(text.encode()) for text in data.values())
    if size > CONFIG_MAP_BYTES:
        raise ConfigError(
            f"the configs of this launch ({size / 1e6:.1f} MB) do not fit into a ConfigMap (1 MB); sweep fewer values, "
            "or let this machine see the storage (here of the cluster file, or an s3:// URL as storage)"
        )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(settings, job, record),
        "immutable": True,
        "data": data,
    }


class _Dumper(yaml.SafeDumper):
    """YAML to be read by people: scripts as blocks, nothing abbreviated; strings that a reader of YAML 1.1 takes for
    something else in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


OTHERWISE_READ = re.compile(r"[yYnN]|[-+.\d]*\d[-+.\d]*([eE][-+]?\d+)?")


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else '"' if OTHERWISE_READ.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _dump(manifest: Manifest) -> str:
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=1000)
