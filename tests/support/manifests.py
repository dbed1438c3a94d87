"""Strict checks of Kubernetes manifests: closed schemas, and the rules of the servers that a schema cannot say.

`problems` names what the API server or KubeRay would refuse, and what they would take but should not be given:
unknown fields, secrets in plain text, a grace period shorter than the drain, fields whose conditions no rule knows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml

from tests.support.manifest_ray import check_ray_job, groups_of
from tests.support.manifest_rules import (
    Manifest,
    check_labels,
    check_name,
    check_pod,
    check_references,
    check_secrets,
    wrong,
)
from tests.support.manifest_schemas import validator_of

# KubeRay appends to the names of its objects; the whole has to stay within 63 characters.

OBJECT_NAMES = {
    "RayJob": ("DNS-1035 label", 47),
    "Job": ("DNS-1123 label", 63),
    "Service": ("DNS-1035 label", 63),
    "ConfigMap": ("DNS-1123 subdomain", 253),
}


class ManifestLoader(yaml.SafeLoader):
    """YAML as kubectl reads it: `y` and `1e-4` without quotes are no strings; a key given twice is refused."""

    bool_values = yaml.SafeLoader.bool_values | {"y": True, "n": False}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            fault = "is given twice" if key in seen else "is no string; put it in quotes"
            if key in seen or not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} {fault}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


ManifestLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"[yYnN]$"), list("yYnN"))
ManifestLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def load_all(text: str) -> list[Manifest]:
    """The documents of a YAML text; a key given twice, or a document that is no mapping, raises yaml.YAMLError."""
    documents = [document for document in yaml.load_all(text, ManifestLoader) if document is not None]
    for document in documents:
        if not isinstance(document, dict):
            raise yaml.YAMLError(f"a document is {type(document).__name__}, not a mapping")
    return documents


def manifest_of(shown: str) -> str:
    """The part of `rddm launch kubernetes --dry-run` that kubectl would get."""
    parts = shown.split("# ---- ")
    return next(part.partition("\n")[2] for part in parts if part.partition("\n")[0].endswith("manifest.yaml"))


def problems(manifest: Manifest) -> list[str]:
    """What is wrong with one manifest, as lines `path: text`; the rules are asked once the schema is satisfied."""
    kind = manifest.get("kind")
    if kind not in OBJECT_NAMES:
        return [f"kind: {kind!r} is not one of {', '.join(OBJECT_NAMES)}"]
    errors = validator_of(kind).iter_errors(manifest)
    return sorted(f"{place_of(error.absolute_path)}: {told(error.message)}" for error in errors) or list(
        _rules(manifest)
    )


def problems_together(manifests: Sequence[Manifest]) -> list[str]:
    """What is wrong with manifests that are applied together, as lines `kind/name: path: text`."""
    found = [f"{title_of(manifest)}: {line}" for manifest in manifests for line in problems(manifest)]
    return found or [*_between(manifests)]


def place_of(parts: Iterable[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".") or "(document)"


def told(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= 200 else f"{line[:100]} ... {line[-95:]}"


def title_of(manifest: Manifest) -> str:
    metadata = manifest.get("metadata")
    return f"{manifest.get('kind')}/{metadata.get('name') if isinstance(metadata, dict) else None}"


def _rules(manifest: Manifest) -> Iterator[str]:
    kind, spec, metadata = manifest["kind"], manifest.get("spec", {}), manifest["metadata"]
    yield from check_name("metadata.name", metadata["name"], *OBJECT_NAMES[kind])
    yield from check_name("metadata.namespace", metadata.get("namespace", "default"), "DNS-1123 label", 63)
    yield from check_labels(manifest)
    yield from check_references(manifest)
    yield from check_secrets(manifest)
    if kind == "RayJob":
        yield from check_ray_job(spec, metadata.get("labels", {}))
    if kind == "Job":
        yield from _job(spec, metadata["name"])
    if kind == "Service":
        ports = spec.get("ports", [])
        for index, port in enumerate(ports):
            unnamed = len(ports) > 1 and "name" not in port
            yield from wrong(f"spec.ports[{index}]", (unnamed, ".name", "missing; several ports need names"))
    for path, template, is_ray in _templates(manifest):
        yield from check_pod(path, template, is_ray=is_ray)


def _templates(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """The pod templates of a manifest as (path, template, whether Ray's nodes are made of it)."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "Job":
        yield "spec.template", spec["template"], False
    if manifest["kind"] == "RayJob" and "rayClusterSpec" in spec:
        for path, group in groups_of("spec.rayClusterSpec", spec["rayClusterSpec"]):
            yield f"{path}.template", group["template"], True


def _job(spec: dict[str, Any], name: str) -> Iterator[str]:
    pod = spec["template"]["spec"]
    last_pod = f"{name}-{spec.get('completions', 1) - 1}"
    rules = spec.get("podFailurePolicy", {}).get("rules", ())
    yield from wrong(
        "spec",
        (pod.get("restartPolicy") != "Never", ".template.spec.restartPolicy", "has to be Never with podFailurePolicy"),
        (spec.get("completionMode") != "Indexed", ".completionMode", "pods have no index without Indexed"),
        ("completions" not in spec, ".completions", "missing; completionMode Indexed needs it"),
        (len(last_pod) > 63, ".completions", f"the host name {last_pod!r} exceeds 63 characters"),
        (spec.get("activeDeadlineSeconds", 1) == 0, ".activeDeadlineSeconds", "has to be positive"),
        (
            spec.get("podReplacementPolicy", "Failed") != "Failed",
            ".podReplacementPolicy",
            "has to be Failed with podFailurePolicy",
        ),
        *(
            (field in spec, f".{field}", "no rule here knows it; write what Kubernetes asks of it")
            for field in ("backoffLimitPerIndex", "maxFailedIndexes", "successPolicy", "selector", "manualSelector")
        ),
    )
    containers = {container["name"] for container in pod["containers"]}
    for index, rule in enumerate(rules):
        codes = rule.get("onExitCodes", {})
        watched = codes.get("containerName")
        yield from wrong(
            f"spec.podFailurePolicy.rules[{index}]",
            (("onExitCodes" in rule) == ("onPodConditions" in rule), "", "needs either onExitCodes or onPodConditions"),
            (rule["action"] == "FailIndex", ".action", "FailIndex needs backoffLimitPerIndex"),
            (codes.get("operator") == "In" and 0 in codes["values"], ".onExitCodes.values", "0 is no failure"),
            (
                watched is not None and watched not in containers,
                ".onExitCodes.containerName",
                f"no container {watched}",
            ),
        )


def _between(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Names that are taken once, and services that find the pods whose host names need them."""

    def place(manifest: Manifest) -> str:
        return manifest["metadata"].get("namespace", "default")

    objects = Counter((title_of(manifest), place(manifest)) for manifest in manifests)
    yield from (f"{title}: metadata.name: is given twice" for (title, _), count in objects.items() if count > 1)
    services = {
        (place(manifest), manifest["metadata"]["name"]): manifest["spec"].get("selector", {})
        for manifest in manifests
        if manifest["kind"] == "Service"
    }
    for manifest in manifests:
        name = manifest["metadata"]["name"]
        for path, template, _ in _templates(manifest):
            subdomain = template["spec"].get("subdomain")
            if subdomain is None:
                continue
            own = {"job-name": name, "batch.kubernetes.io/job-name": name} if manifest["kind"] == "Job" else {}
            labels = template.get("metadata", {}).get("labels", {}) | own
            selector = services.get((place(manifest), subdomain), {})
            where = f"{title_of(manifest)}: {path}.spec.subdomain"
            if (place(manifest), subdomain) not in services:
                yield f"{where}: no Service {subdomain} in this namespace"
            elif not selector or not selector.items() <= labels.items():
                yield f"{where}: the selector of Service {subdomain} does not find these pods"
