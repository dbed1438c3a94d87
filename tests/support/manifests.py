"""Strict checks of Kubernetes manifests: closed schemas, and the rules of the servers that a schema cannot say.

`problems` names what the API server or KubeRay would refuse, and what they would take but should not be given:
unknown fields, secrets in plain text, a grace period shorter than the drain.

python -m tests.support.manifests CRD_FOLDER OUT      reduces KubeRay's CRDs to OUT (tests/golden/kubernetes/ray.json)
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from jsonschema.exceptions import ValidationError

GOLDEN = Path(__file__).parents[1] / "golden" / "kubernetes"
CRDS = {"RayJob": "ray.io_rayjobs.yaml", "RayCluster": "ray.io_rayclusters.yaml"}

# Unless told otherwise Ray drains for 30 s and Kubernetes kills after 30 s; Ray's processes need time after the drain.
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
DEFAULT_DRAIN_S, DEFAULT_GRACE_S, GRACE_MARGIN_S = 30, 30, 10

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

LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
NAMES = {
    "DNS-1035 label": re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"),
    "DNS-1123 label": re.compile(LABEL),
    "DNS-1123 subdomain": re.compile(rf"{LABEL}(\.{LABEL})*"),
    "port name": re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]*[a-z0-9])?"),
    "label word": re.compile(r"[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?"),
}
# KubeRay appends to the names of its objects; the whole has to stay within 63 characters.
OBJECT_NAMES = {
    "RayJob": ("DNS-1035 label", 47),
    "RayCluster": ("DNS-1035 label", 53),
    "Job": ("DNS-1123 label", 63),
    "Service": ("DNS-1035 label", 63),
    "ConfigMap": ("DNS-1123 subdomain", 253),
}
LABEL_MAPS = ("labels", "matchLabels", "nodeSelector", "clusterSelector", "selector")
NAMED_OBJECTS = ("secretKeyRef", "secretRef", "configMapKeyRef", "configMapRef")
OBJECT_NAME_KEYS = ("serviceAccountName", "priorityClassName", "claimName", "secretName", "runtimeClassName")
QUEUE = "kueue.x-k8s.io/queue-name"

SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(?![A-Za-z0-9])", re.IGNORECASE)
SECRET_FILE = re.compile(r"_(PATH|FILE)$", re.IGNORECASE)
URL_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/@\s:]*:(?!\$[({])[^/@\s]+@", re.IGNORECASE)

QUANTITY = re.compile(r"([-+]?[0-9.]+)(?:([KMGTPE]i|[numkMGTPE]?)|[eE]([-+]?[0-9.]+))")
SCALES = {suffix: Decimal(1000) ** power for power, suffix in enumerate(["n", "u", "m", "", *"kMGTPE"], -3)}
SCALES |= {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)}

Manifest = dict[str, Any]


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
    errors = _validator(kind).iter_errors(manifest)
    return sorted(f"{_at(error.absolute_path)}: {_told(error.message)}" for error in errors) or list(_rules(manifest))


def problems_together(manifests: Sequence[Manifest]) -> list[str]:
    """What is wrong with manifests that are applied together, as lines `kind/name: path: text`."""
    found = [f"{_title(manifest)}: {line}" for manifest in manifests for line in problems(manifest)]
    return found or [*_between(manifests)]


# ----------------------------------------------------------------------------------------------------------- schemas


@functools.cache
def _validator(kind: str) -> jsonschema.protocols.Validator:
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
    return {"$comment": f"Made by tests.support.manifests of {made_of}.", "$defs": _share(named)}


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


# ------------------------------------------------------------------------------------------------------------- rules


def _at(parts: Iterable[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".") or "(document)"


def _told(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= 200 else f"{line[:100]} ... {line[-95:]}"


def _title(manifest: Manifest) -> str:
    metadata = manifest.get("metadata")
    return f"{manifest.get('kind')}/{metadata.get('name') if isinstance(metadata, dict) else None}"


def _nodes(value: Any, path: str = "", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every value below one, as (path, the nearest key, value)."""
    if isinstance(value, dict):
        for name, part in value.items():
            here = f"{path}.{name}".lstrip(".")
            yield here, name, part
            yield from _nodes(part, here, name)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield f"{path}[{index}]", key, part
            yield from _nodes(part, f"{path}[{index}]", key)


def _wrong(path: str, *rules: tuple[bool, str, str]) -> Iterator[str]:
    """Lines for the rules (broken, field below the path, text) that are broken."""
    for is_broken, field, text in rules:
        if is_broken:
            yield f"{path}{field}: {text}"


def _rules(manifest: Manifest) -> Iterator[str]:
    kind, spec, metadata = manifest["kind"], manifest.get("spec", {}), manifest["metadata"]
    yield from _name("metadata.name", metadata["name"], *OBJECT_NAMES[kind])
    yield from _name("metadata.namespace", metadata.get("namespace", "default"), "DNS-1123 label", 63)
    yield from _labels(manifest)
    yield from _references(manifest)
    yield from _secrets(manifest)
    if kind == "RayJob":
        yield from _ray_job(spec, metadata.get("labels", {}))
    if kind == "Job":
        yield from _job(spec, metadata["name"])
    if kind == "Service":
        ports = spec.get("ports", [])
        for index, port in enumerate(ports):
            unnamed = len(ports) > 1 and "name" not in port
            yield from _wrong(f"spec.ports[{index}]", (unnamed, ".name", "missing; several ports need names"))
    for path, cluster in _clusters(manifest):
        yield from _ray_cluster(path, cluster)
    for path, template, is_ray in _templates(manifest):
        yield from _pod(path, template, is_ray=is_ray)


def _clusters(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    if manifest["kind"] == "RayCluster":
        yield "spec", manifest["spec"]
    elif manifest["kind"] == "RayJob" and "rayClusterSpec" in manifest["spec"]:
        yield "spec.rayClusterSpec", manifest["spec"]["rayClusterSpec"]


def _templates(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """The pod templates of a manifest as (path, template, whether Ray's nodes are made of it)."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "Job":
        yield "spec.template", spec["template"], False
    if "submitterPodTemplate" in spec:
        yield "spec.submitterPodTemplate", spec["submitterPodTemplate"], False
    for path, cluster in _clusters(manifest):
        for group_path, group in _groups(path, cluster):
            yield f"{group_path}.template", group["template"], True


def _groups(path: str, cluster: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The head, then the worker groups, with their paths."""
    workers = [(f"{path}.workerGroupSpecs[{i}]", group) for i, group in enumerate(cluster.get("workerGroupSpecs", ()))]
    return [(f"{path}.headGroupSpec", cluster["headGroupSpec"]), *workers]


def _name(path: str, name: str, form: str, limit: int) -> Iterator[str]:
    fits = NAMES[form].fullmatch(name) and len(name) <= limit
    yield from _wrong(path, (not fits, "", f"{name!r} is not a {form} of at most {limit} characters"))


def _labels(manifest: Manifest) -> Iterator[str]:
    for path, key, value in _nodes(manifest):
        if isinstance(value, dict) and key in (*LABEL_MAPS, "annotations"):
            for label, text in value.items():
                if isinstance(text, str):
                    prefix, slash, word = label.rpartition("/")
                    if slash:
                        yield from _name(f"{path}.{label}", prefix, "DNS-1123 subdomain", 253)
                    yield from _name(f"{path}.{label}", word, "label word", 63)
                    if text and key != "annotations":
                        yield from _name(f"{path}.{label}", text, "label word", 63)


def _references(manifest: Manifest) -> Iterator[str]:
    for path, key, value in _nodes(manifest):
        if key in NAMED_OBJECTS and isinstance(value, dict):
            yield from _name(f"{path}.name", value.get("name", ""), "DNS-1123 subdomain", 253)
        if key in OBJECT_NAME_KEYS and isinstance(value, str):
            yield from _name(path, value, "DNS-1123 subdomain", 253)


def _looks_secret(name: str) -> bool:
    return bool(SECRET.search(name)) and not SECRET_FILE.search(name)


def _secrets(manifest: Manifest) -> Iterator[str]:
    for path, key, value in _nodes(manifest):
        if key in ("redisPassword", "redisUsername") and isinstance(value, dict) and "value" in value:
            yield f"{path}.value: a secret in plain text; use valueFrom"
        if key in ("data", "rayStartParams") and isinstance(value, dict):
            for name, text in value.items():
                if text and _looks_secret(name):
                    yield f"{path}.{name}: looks like a secret in plain text; use a Secret"
        if isinstance(value, str) and URL_PASSWORD.search(value):
            yield f"{path}: a password inside a URL; use a Secret"


def _env(path: str, entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    seen: Counter[str] = Counter()
    for index, entry in enumerate(entries):
        here, name = f"{path}[{index}]", entry["name"]
        seen[name] += 1
        if ("value" in entry) == ("valueFrom" in entry):
            yield f"{here}: {name} needs either value or valueFrom"
        elif "valueFrom" in entry and len(entry["valueFrom"]) != 1:
            yield f"{here}.valueFrom: {name} needs exactly one source, given {len(entry['valueFrom'])}"
        elif entry.get("value") and _looks_secret(name):
            yield f"{here}.value: {name} looks like a secret in plain text; use valueFrom.secretKeyRef"
        if seen[name] == 2:
            yield f"{here}.name: {name} is given twice"


def _quantity(value: int | str) -> Decimal:
    match = QUANTITY.fullmatch(str(value))
    assert match, value  # the schema has seen it
    number, suffix, exponent = match.groups()
    return Decimal(number) * (SCALES[suffix] if exponent is None else Decimal(10) ** Decimal(exponent))


def _resources(path: str, resources: dict[str, Any]) -> Iterator[str]:
    """Amounts that fit each other; devices (nvidia.com/gpu) and huge pages cannot be overcommitted."""
    requests = {name: _quantity(value) for name, value in resources.get("requests", {}).items()}
    limits = {name: _quantity(value) for name, value in resources.get("limits", {}).items()}
    for name in dict.fromkeys([*requests, *limits]):
        request, limit = requests.get(name), limits.get(name)
        field = f"{'requests' if request is not None else 'limits'}.{name}"
        amounts = [amount for amount in (request, limit) if amount is not None]
        is_device = ("/" in name and "kubernetes.io/" not in name) or name.startswith("hugepages-")
        if min(amounts) < 0:
            yield f"{path}.{field}: negative"
        elif is_device and (limit is None or request not in (None, limit)):
            yield f"{path}.{field}: request {request} and limit {limit} of a device have to be equal"
        elif is_device and limit != int(limit or 0):
            yield f"{path}.{field}: {limit} of a device; only whole ones can be had"
        elif request is not None and limit is not None and request > limit:
            yield f"{path}.{field}: request {resources['requests'][name]} exceeds limit {resources['limits'][name]}"
        elif name in ("memory", "ephemeral-storage") and min(amounts) < 2**20:
            yield f"{path}.{field}: less than 1Mi; units are Ki, Mi, Gi (m is a thousandth)"


def _pod(path: str, template: dict[str, Any], *, is_ray: bool) -> Iterator[str]:
    spec, path = template["spec"], f"{path}.spec"
    volumes = spec.get("volumes", [])
    for index, volume in enumerate(volumes):
        here = f"{path}.volumes[{index}]"
        yield from _name(f"{here}.name", volume["name"], "DNS-1123 label", 63)
        yield from _wrong(here, (len(volume) != 2, "", f"needs exactly one source, given {len(volume) - 1}"))
    if not spec["containers"]:
        yield f"{path}.containers: empty"
    names: set[str] = set()
    for field in ("containers", "initContainers", "ephemeralContainers"):
        for index, container in enumerate(spec.get(field, ())):
            here, name = f"{path}.{field}[{index}]", container["name"]
            yield from _wrong(here, (name in names, ".name", f"{name} is given twice in this pod"))
            yield from _container(here, container, {volume["name"] for volume in volumes})
            names.add(name)
    yield from _resources(f"{path}.resources", spec.get("resources", {}))
    yield from _grace(path, spec, is_ray=is_ray)


def _container(path: str, container: dict[str, Any], volumes: set[str]) -> Iterator[str]:
    yield from _name(f"{path}.name", container["name"], "DNS-1123 label", 63)
    image = container.get("image", "")
    if not image:
        yield f"{path}.image: missing"
    elif "@" not in image and ":" not in image.rpartition("/")[2]:
        yield f"{path}.image: {image!r} has neither tag nor digest"
    for index, port in enumerate(container.get("ports", ())):
        yield from _name(f"{path}.ports[{index}].name", port.get("name", "port"), "port name", 15)
    yield from _env(f"{path}.env", container.get("env", ()))
    yield from _mounts(f"{path}.volumeMounts", container.get("volumeMounts", ()), volumes)
    yield from _resources(f"{path}.resources", container.get("resources", {}))


def _mounts(path: str, mounts: Sequence[dict[str, Any]], volumes: set[str]) -> Iterator[str]:
    for index, mount in enumerate(mounts):
        known = ", ".join(sorted(volumes)) or "none"
        missing = mount["name"] not in volumes
        yield from _wrong(f"{path}[{index}]", (missing, ".name", f"no volume {mount['name']!r}; there are: {known}"))


def _grace(path: str, spec: dict[str, Any], *, is_ray: bool) -> Iterator[str]:
    """Kubernetes may kill a pod only after Ray has drained it, and has had time to end its processes."""
    drains = [DEFAULT_DRAIN_S] if is_ray else [0]
    for i, container in enumerate(spec["containers"]):
        for j, entry in enumerate(container.get("env", ())):
            if entry["name"] == DRAIN:
                text = entry.get("value", "")
                if not re.fullmatch(r"[0-9]+", text):
                    yield f"{path}.containers[{i}].env[{j}].value: {DRAIN} needs whole seconds, given {text!r}"
                    return
                drains = [int(text)] if i == 0 else [*drains, int(text)]
    grace, drain = spec.get("terminationGracePeriodSeconds", DEFAULT_GRACE_S), max(drains)
    short = drain > 0 and grace < drain + GRACE_MARGIN_S
    text = f"{grace} s is less than the drain of {drain} s ({DRAIN}) and {GRACE_MARGIN_S} s more"
    yield from _wrong(path, (short, ".terminationGracePeriodSeconds", text))


def _ray_job(spec: dict[str, Any], labels: dict[str, str]) -> Iterator[str]:
    mode = spec.get("submissionMode", "K8sJobMode")
    selector, cluster = spec.get("clusterSelector", {}), spec.get("rayClusterSpec")
    is_shut, retries = spec.get("shutdownAfterJobFinishes", False), spec.get("backoffLimit", 0)
    submitter = spec.get("submitterPodTemplate", {}).get("spec", {})
    head_restart = (cluster or {}).get("headGroupSpec", {}).get("template", {}).get("spec", {}).get("restartPolicy")
    is_interactive, is_sidecar = mode == "InteractiveMode", mode == "SidecarMode"
    is_queued = spec.get("suspend", False) or QUEUE in labels
    yield from _wrong(
        "spec",
        (bool(selector) == (cluster is not None), "", "needs either rayClusterSpec or clusterSelector"),
        (bool(selector) and not selector.get("ray.io/cluster"), ".clusterSelector", "needs ray.io/cluster"),
        (bool(selector) and retries > 0, ".backoffLimit", "cannot be had with clusterSelector"),
        (bool(selector) and is_sidecar, ".submissionMode", "SidecarMode cannot be had with clusterSelector"),
        (bool(selector) and is_queued, ".clusterSelector", "cannot be had with suspend or a Kueue queue"),
        (not spec.get("entrypoint") and not is_interactive, ".entrypoint", "missing"),
        (retries < 0, ".backoffLimit", "negative"),
        (retries > 0 and is_interactive, ".backoffLimit", "cannot be had with InteractiveMode"),
        (spec.get("activeDeadlineSeconds", 1) <= 0, ".activeDeadlineSeconds", "has to be positive"),
        (spec.get("submitterConfig", {}).get("backoffLimit", 0) < 0, ".submitterConfig.backoffLimit", "negative"),
        (is_sidecar and "submitterConfig" in spec, ".submitterConfig", "cannot be had with SidecarMode"),
        (bool(submitter) and mode != "K8sJobMode", ".submitterPodTemplate", f"cannot be had with {mode}"),
        (
            bool(submitter) and submitter.get("restartPolicy") not in ("Never", "OnFailure"),
            ".submitterPodTemplate.spec.restartPolicy",
            "has to be Never or OnFailure",
        ),
        (
            is_sidecar and head_restart not in (None, "Never"),
            ".rayClusterSpec.headGroupSpec.template.spec.restartPolicy",
            "has to be Never with SidecarMode",
        ),
        (
            (cluster or {}).get("authOptions", {}).get("enableK8sTokenAuth", False),
            ".rayClusterSpec.authOptions.enableK8sTokenAuth",
            "is not supported for a RayJob",
        ),
        (is_queued and not is_shut, ".shutdownAfterJobFinishes", "has to be true with suspend or a Kueue queue"),
        (spec.get("ttlSecondsAfterFinished", 0) < 0, ".ttlSecondsAfterFinished", "negative"),
        (
            spec.get("ttlSecondsAfterFinished", 0) > 0 and not is_shut,
            ".ttlSecondsAfterFinished",
            "needs shutdownAfterJobFinishes: true",
        ),
    )
    yield from _deletion(spec)
    yield from _runtime_env(spec.get("runtimeEnvYAML", "{}"))
    try:
        is_object = isinstance(json.loads(spec.get("entrypointResources", "{}")), dict)
    except json.JSONDecodeError:
        is_object = False
    yield from _wrong("spec", (not is_object, ".entrypointResources", "is not a JSON object"))


def _deletion(spec: dict[str, Any]) -> Iterator[str]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    path, rules = "spec.deletionStrategy", strategy.get("deletionRules", ())
    ends = [strategy[key].get("policy") for key in ("onSuccess", "onFailure") if key in strategy]
    is_shut = spec.get("shutdownAfterJobFinishes", False)
    policies = [*ends, *(rule["policy"] for rule in rules)]
    for_own = {"DeleteCluster", "DeleteWorkers"} & set(policies)
    scales = spec.get("rayClusterSpec", {}).get("enableInTreeAutoscaling", False)
    yield from _wrong(
        path,
        (bool(rules) and is_shut, ".deletionRules", "cannot be had with shutdownAfterJobFinishes"),
        (bool(rules) and bool(ends), ".deletionRules", "cannot be had with onSuccess and onFailure"),
        (not rules and (len(ends) < 2 or None in ends), "", "needs deletionRules, or policies onSuccess and onFailure"),
        (is_shut and "DeleteNone" in ends, "", "DeleteNone cannot be had with shutdownAfterJobFinishes"),
        (bool(for_own) and bool(spec.get("clusterSelector")), "", "only the own cluster can be deleted"),
        (scales and "DeleteWorkers" in policies, "", "DeleteWorkers cannot be had with autoscaling"),
    )
    order = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
    waits: dict[tuple[str | None, str | None], dict[str, int]] = {}
    for index, rule in enumerate(rules):
        condition = rule["condition"]
        ends_in = condition.get("jobStatus"), condition.get("jobDeploymentStatus")
        known = waits.setdefault(ends_in, {})
        wait, place = condition.get("ttlSeconds", 0), order.index(rule["policy"]) if rule["policy"] in order else -1
        earlier = [known[policy] for policy in order[: max(place, 0)] if policy in known]
        later = [known[policy] for policy in order[place + 1 :] if policy in known] if place >= 0 else []
        is_late = wait < max(earlier, default=0) or wait > min(later, default=wait)
        yield from _wrong(
            f"{path}.deletionRules[{index}]",
            (
                (None in ends_in) == (ends_in == (None, None)),
                ".condition",
                "needs jobStatus or jobDeploymentStatus, not both",
            ),
            (rule["policy"] in known, "", f"{rule['policy']} is given twice for one condition"),
            (is_late, ".condition.ttlSeconds", "workers go first, then the cluster, then the RayJob"),
        )
        known[rule["policy"]] = wait


def _runtime_env(text: str) -> Iterator[str]:
    path = "spec.runtimeEnvYAML"
    try:
        documents = load_all(text)
    except yaml.YAMLError as error:
        yield f"{path}: {_told(str(error))}"
        return
    variables = documents[0].get("env_vars", {}) if len(documents) == 1 else None
    if not isinstance(variables, dict):
        yield f"{path}: needs one mapping, and a mapping of names to strings as env_vars"
        return
    for name, value in variables.items():
        yield from _wrong(
            f"{path} env_vars.{name}",
            (not isinstance(value, str), "", f"{value!r} is no string; put it in quotes"),
            (isinstance(value, str) and bool(value) and _looks_secret(name), "", "looks like a secret in plain text"),
        )


def _ray_cluster(path: str, cluster: dict[str, Any]) -> Iterator[str]:
    scales, options = cluster.get("enableInTreeAutoscaling", False), cluster.get("autoscalerOptions", {})
    match = re.fullmatch(r"([0-9]+)\.([0-9]+)\.[0-9]+", cluster.get("rayVersion", ""))
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    has_token = "authOptions" in cluster and cluster["authOptions"].get("mode", "token") == "token"
    names = Counter(group["groupName"] for group in cluster.get("workerGroupSpecs", ()))
    yield from _wrong(
        path,
        (not match, ".rayVersion", "has to be the version of Ray in the image, as 2.60.0"),
        (bool(match) and has_token and version < (2, 52), ".rayVersion", "authOptions.mode token needs Ray 2.52"),
        (options.get("idleTimeoutSeconds", 0) < 0, ".autoscalerOptions.idleTimeoutSeconds", "negative"),
        *((count > 1, ".workerGroupSpecs", f"groupName {name} is given twice") for name, count in names.items()),
    )
    head_volumes = {volume["name"] for volume in cluster["headGroupSpec"]["template"]["spec"].get("volumes", ())}
    yield from _env(f"{path}.autoscalerOptions.env", options.get("env", ()))
    yield from _mounts(f"{path}.autoscalerOptions.volumeMounts", options.get("volumeMounts", ()), head_volumes)
    yield from _resources(f"{path}.autoscalerOptions.resources", options.get("resources", {}))
    collector = cluster.get("historyServerOptions", {}).get("collectorOptions", {})
    yield from _env(f"{path}.historyServerOptions.collectorOptions.env", collector.get("env", ()))
    for here, group in _groups(path, cluster):
        start = group.get("rayStartParams", {})
        by_flags = {"num-cpus", "num-gpus", "memory", "resources"} & set(start)
        restart = group["template"]["spec"].get("restartPolicy", "Never")
        yield from _wrong(
            here,
            (
                bool(by_flags) and bool(group.get("resources")),
                ".resources",
                "cannot be had with rayStartParams of the same",
            ),
            ("labels" in start, ".rayStartParams.labels", "use labels of the group"),
            (
                scales and options.get("version") != "v1" and restart != "Never",
                ".template.spec.restartPolicy",
                "has to be Never with the autoscaler v2",
            ),
        )
        if "groupName" in group:
            yield from _worker_group(here, group, scales=scales, is_v2=scales and options.get("version") == "v2")


def _worker_group(path: str, group: dict[str, Any], *, scales: bool, is_v2: bool) -> Iterator[str]:
    low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    replicas = group.get("replicas", low)
    yield from _name(f"{path}.groupName", group["groupName"], "DNS-1123 label", 63)
    yield from _wrong(
        path,
        (low < 0, ".minReplicas", "negative"),
        (low > high, ".minReplicas", f"{low} exceeds maxReplicas {high}"),
        (low <= high and not low <= replicas <= high, ".replicas", f"{replicas} is not within {low} to {high}"),
        (group.get("numOfHosts", 1) < 1, ".numOfHosts", "has to be positive"),
        (group.get("idleTimeoutSeconds", 0) < 0, ".idleTimeoutSeconds", "negative"),
        ("idleTimeoutSeconds" in group and not is_v2, ".idleTimeoutSeconds", "needs autoscalerOptions.version: v2"),
        (group.get("priority", 0) != 0 and not is_v2, ".priority", "needs autoscalerOptions.version: v2"),
        (group.get("suspend", False) and scales, ".suspend", "cannot be had with autoscaling"),
    )


def _job(spec: dict[str, Any], name: str) -> Iterator[str]:
    pod = spec["template"]["spec"]
    restart, is_indexed = pod.get("restartPolicy"), spec.get("completionMode") == "Indexed"
    last_pod = f"{name}-{spec.get('completions', 1) - 1}"
    per_index, rules = "backoffLimitPerIndex" in spec, spec.get("podFailurePolicy", {}).get("rules", ())
    needs_never = "backoffLimitPerIndex" if per_index else "podFailurePolicy"
    yield from _wrong(
        "spec",
        (restart not in ("Never", "OnFailure"), ".template.spec.restartPolicy", "has to be Never or OnFailure"),
        (
            restart == "OnFailure" and (per_index or bool(rules)),
            ".template.spec.restartPolicy",
            f"has to be Never with {needs_never}",
        ),
        (is_indexed and "completions" not in spec, ".completions", "missing; completionMode Indexed needs it"),
        (is_indexed and len(last_pod) > 63, ".completions", f"the host name {last_pod!r} exceeds 63 characters"),
        (per_index and not is_indexed, ".backoffLimitPerIndex", "needs completionMode Indexed"),
        ("successPolicy" in spec and not is_indexed, ".successPolicy", "needs completionMode Indexed"),
        ("maxFailedIndexes" in spec and not per_index, ".maxFailedIndexes", "needs backoffLimitPerIndex"),
        (spec.get("activeDeadlineSeconds", 1) == 0, ".activeDeadlineSeconds", "has to be positive"),
        ("selector" in spec and not spec.get("manualSelector"), ".selector", "needs manualSelector: true"),
        (
            bool(rules) and spec.get("podReplacementPolicy", "Failed") != "Failed",
            ".podReplacementPolicy",
            "has to be Failed with podFailurePolicy",
        ),
    )
    containers = {container["name"] for container in [*pod["containers"], *pod.get("initContainers", ())]}
    for index, rule in enumerate(rules):
        codes = rule.get("onExitCodes", {})
        watched = codes.get("containerName")
        yield from _wrong(
            f"spec.podFailurePolicy.rules[{index}]",
            (("onExitCodes" in rule) == ("onPodConditions" in rule), "", "needs either onExitCodes or onPodConditions"),
            (rule["action"] == "FailIndex" and not per_index, ".action", "FailIndex needs backoffLimitPerIndex"),
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

    objects = Counter((_title(manifest), place(manifest)) for manifest in manifests)
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
            where = f"{_title(manifest)}: {path}.spec.subdomain"
            if (place(manifest), subdomain) not in services:
                yield f"{where}: no Service {subdomain} in this namespace"
            elif not selector or not selector.items() <= labels.items():
                yield f"{where}: the selector of Service {subdomain} does not find these pods"


if __name__ == "__main__":
    write_reduced(Path(sys.argv[1]), Path(sys.argv[2]))
