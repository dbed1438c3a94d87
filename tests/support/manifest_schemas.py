"""The closed schemas that manifests are checked with, and how they are made of KubeRay's definitions.

python -m tests.support.manifest_schemas CRD_FOLDER tests/golden/kubernetes/ray.json   writes them anew
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from jsonschema.exceptions import ValidationError

GOLDEN = Path(__file__).parents[1] / "golden" / "kubernetes"
CRDS = {"RayJob": "ray.io_rayjobs.yaml", "RayCluster": "ray.io_rayclusters.yaml"}

# What KubeRay and the API server accept where the CRD only says "string".
CHOICES = {
    "dnsPolicy": ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
    "effect": ["NoExecute", "NoSchedule", "PreferNoSchedule"],
    "imagePullPolicy": ["Always", "IfNotPresent", "Never"],
    "preemptionPolicy": ["Never", "PreemptLowerPriority"],
    "protocol": ["SCTP", "TCP", "UDP"],
    "resizePolicy.restartPolicy": ["NotRequired", "RestartContainer"],
    "restartPolicy": ["Always", "Never", "OnFailure"],
    "serviceType": ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"],
    "submissionMode": ["HTTPMode", "InteractiveMode", "K8sJobMode", "SidecarMode"],
    "whenUnsatisfiable": ["DoNotSchedule", "ScheduleAnyway"],
}

KEPT = ("type", "enum", "pattern", "minimum", "minLength", "maxLength", "minItems")


@functools.cache
def validator_of(kind: str) -> jsonschema.protocols.Validator:
    files = [json.loads((GOLDEN / name).read_text()) for name in ("ray.json", "plain.json")]
    definitions = files[0]["$defs"] | files[1]["$defs"]
    return _Strict({"$ref": f"#/$defs/{kind}", "$defs": definitions})


def _closed(validator: Any, rule: Any, instance: Any, schema: dict[str, Any]) -> Iterator[ValidationError]:
    if rule is not False:
        yield from jsonschema.Draft202012Validator.VALIDATORS["additionalProperties"](validator, rule, instance, schema)
    elif isinstance(instance, dict):
        known = schema.get("properties", {})
        for key in instance:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                yield ValidationError("unknown field" + (f"; near: {near[0]}" if near else ""), path=[key])


def _required(validator: Any, keys: list[str], instance: Any, schema: dict[str, Any]) -> Iterator[ValidationError]:
    if isinstance(instance, dict):
        yield from (ValidationError("missing", path=[key]) for key in keys if key not in instance)


def _unique_by(validator: Any, keys: dict[str, Any], items: Any, schema: dict[str, Any]) -> Iterator[ValidationError]:
    seen = set()
    for index, item in enumerate(items if isinstance(items, list) else []):
        if isinstance(item, dict):
            mark = json.dumps([item.get(key, default) for key, default in keys.items()], default=str)
            if mark in seen:
                yield ValidationError(f"{', '.join(keys)} {mark[1:-1]} is given twice", path=[index])
            seen.add(mark)


# A float is no integer, even a whole one.
_TYPES = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
_Strict = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {"additionalProperties": _closed, "required": _required, "x-unique-by": _unique_by},
    type_checker=_TYPES,
)


def reduce_crds(folder: Path) -> dict[str, Any]:
    """The closed schemas of RayJob, RayCluster, and of the pod template, service and label selector inside of them."""
    schemas, sources = {}, {}
    for kind, name in CRDS.items():
        data = (folder / name).read_bytes()
        sources[name] = hashlib.sha256(data).hexdigest()
        versions = yaml.load(data, yaml.CSafeLoader)["spec"]["versions"]
        schema = next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]
        schemas[kind] = reduce_schema(schema)
        schemas[kind]["required"] = ["apiVersion", "kind", "metadata", "spec"]
        schemas[kind]["properties"] |= {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": kind},
            "metadata": {"$ref": "#/$defs/ObjectMeta"},
        }
    cluster = schemas["RayCluster"]["properties"]["spec"]
    head = cluster["properties"]["headGroupSpec"]["properties"]
    spread = head["template"]["properties"]["spec"]["properties"]["topologySpreadConstraints"]["items"]["properties"]
    named = {
        **schemas,
        "RayClusterSpec": cluster,
        "PodTemplate": head["template"],
        "ServiceSpec": head["headService"]["properties"]["spec"],
        "LabelSelector": spread["labelSelector"],
    }
    made_of = ", ".join(f"{name} (sha256 {digest})" for name, digest in sources.items())
    return {"$comment": f"Made by tests.support.manifest_schemas of {made_of}.", "$defs": _share(named)}


def reduce_schema(schema: dict[str, Any], key: str = "") -> dict[str, Any]:
    """An openAPIV3Schema as a JSON schema without words, closed where the server prunes what it does not know."""
    kept = {name: schema[name] for name in KEPT if name in schema}
    if schema.get("x-kubernetes-int-or-string"):
        kept["type"] = ["integer", "string"]
    if schema.get("format") == "int32":
        kept["maximum"] = 2**31 - 1
    if kept == {"type": "string"} and (choices := CHOICES.get(key, CHOICES.get(key.rpartition(".")[2]))):
        kept["enum"] = choices
    for rule in schema.get("x-kubernetes-validations", ()):
        if match := re.fullmatch(r"self in \[(.*)\]", rule["rule"]):
            kept["enum"] = re.findall(r"'([^']*)'", match[1])
    if "properties" in schema:
        parts = dict(sorted(schema["properties"].items()))
        if "spec" in parts:
            parts.pop("status", None)  # the server's to write
        holder = key.rpartition(".")[2]
        kept["properties"] = {name: reduce_schema(part, f"{holder}.{name}") for name, part in parts.items()}
        # Defaults are filled in before the server looks for what is missing.
        required = [name for name in schema.get("required", ()) if "default" not in schema["properties"][name]]
        kept |= {"required": required} if required else {}
        kept |= {} if schema.get("x-kubernetes-preserve-unknown-fields") else {"additionalProperties": False}
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = reduce_schema(schema["additionalProperties"])
    if "items" in schema:
        kept["items"] = reduce_schema(schema["items"], key)
    if schema.get("x-kubernetes-list-type") == "set":
        kept["uniqueItems"] = True
    if schema.get("x-kubernetes-list-type") == "map":
        fields = schema["items"]["properties"]
        kept["x-unique-by"] = {name: fields[name].get("default") for name in schema["x-kubernetes-list-map-keys"]}
    return kept


def _share(named: dict[str, Any]) -> dict[str, Any]:
    """The named schemas with every part that stands in several places moved to a definition of its own."""
    names = {_text(schema): name for name, schema in named.items()}
    counts: Counter[str] = Counter()
    hints: dict[str, str] = {}

    def parts(schema: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
        for name, part in schema.get("properties", {}).items():
            yield name, part, ("properties", name)
        for name in ("items", "additionalProperties"):
            if isinstance(schema.get(name), dict):
                yield key, schema[name], (name,)

    def count(schema: dict[str, Any], key: str) -> None:
        text = _text(schema)
        counts[text] += 1
        hints.setdefault(text, key)
        if counts[text] == 1:
            for name, part, _ in parts(schema, key):
                count(part, name)

    def emit(schema: dict[str, Any], key: str) -> dict[str, Any]:
        result = json.loads(_text(schema))
        for name, part, place in parts(schema, key):
            holder = result["properties"] if place[0] == "properties" else result
            holder[place[-1]] = refer(part, name)
        return result

    def refer(schema: dict[str, Any], key: str) -> dict[str, Any]:
        text = _text(schema)
        if text not in names:
            if counts[text] < 2 or len(text) < 120:
                return emit(schema, key)
            taken = set(names.values())
            numbered = (f"{hints[text]}{n if n > 1 else ''}" for n in range(1, len(counts)))
            names[text] = next(name for name in numbered if name not in taken)
        if names[text] not in definitions:
            definitions[names[text]] = emit(schema, key)
        return {"$ref": f"#/$defs/{names[text]}"}

    definitions: dict[str, Any] = {}
    for name, schema in named.items():
        count(schema, name)
    for name, schema in named.items():
        refer(schema, name)
    return dict(sorted(definitions.items()))


def _text(schema: dict[str, Any]) -> str:
    return json.dumps(schema, sort_keys=True)


def write_reduced(folder: Path, path: Path) -> None:
    reduced = reduce_crds(folder)
    lines = ",\n".join(f"{json.dumps(name)}: {_text(schema)}" for name, schema in reduced["$defs"].items())
    path.write_text(f'{{"$comment": {json.dumps(reduced["$comment"])},\n"$defs": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    write_reduced(Path(sys.argv[1]), Path(sys.argv[2]))
