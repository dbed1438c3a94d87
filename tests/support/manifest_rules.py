"""Rules that a schema cannot say, of what all manifests have: names, labels, secrets, amounts, pods."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

Manifest = dict[str, Any]

# Unless told otherwise Ray drains for 30 s and Kubernetes kills after 30 s; Ray's processes need time after the drain.

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
DEFAULT_DRAIN_S, DEFAULT_GRACE_S, GRACE_MARGIN_S = 30, 30, 10

LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
NAMES = {
    "DNS-1035 label": re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"),
    "DNS-1123 label": re.compile(LABEL),
    "DNS-1123 subdomain": re.compile(rf"{LABEL}(\.{LABEL})*"),
    "port name": re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]*[a-z0-9])?"),
    "label word": re.compile(r"[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?"),
}
LABEL_MAPS = ("labels", "matchLabels", "nodeSelector", "clusterSelector", "selector")
NAMED_OBJECTS = ("secretKeyRef", "secretRef", "configMapKeyRef", "configMapRef")
OBJECT_NAME_KEYS = ("serviceAccountName", "priorityClassName", "claimName", "secretName", "runtimeClassName")

SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(?![A-Za-z0-9])", re.IGNORECASE)
SECRET_FILE = re.compile(r"_(PATH|FILE)$", re.IGNORECASE)
URL_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/@\s:]*:(?!\$[({])[^/@\s]+@", re.IGNORECASE)

QUANTITY = re.compile(r"([-+]?[0-9.]+)(?:([KMGTPE]i|[numkMGTPE]?)|[eE]([-+]?[0-9.]+))")
SCALES = {suffix: Decimal(1000) ** power for power, suffix in enumerate(["n", "u", "m", "", *"kMGTPE"], -3)}
SCALES |= {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)}


def nodes(value: Any, path: str = "", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every value below one, as (path, the nearest key, value)."""
    if isinstance(value, dict):
        for name, part in value.items():
            here = f"{path}.{name}".lstrip(".")
            yield here, name, part
            yield from nodes(part, here, name)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield f"{path}[{index}]", key, part
            yield from nodes(part, f"{path}[{index}]", key)


def wrong(path: str, *rules: tuple[bool, str, str]) -> Iterator[str]:
    """Lines for the rules (broken, field below the path, text) that are broken."""
    for is_broken, field, text in rules:
        if is_broken:
            yield f"{path}{field}: {text}"


def check_name(path: str, name: str, form: str, limit: int) -> Iterator[str]:
    fits = NAMES[form].fullmatch(name) and len(name) <= limit
    yield from wrong(path, (not fits, "", f"{name!r} is not a {form} of at most {limit} characters"))


def check_labels(manifest: Manifest) -> Iterator[str]:
    for path, key, value in nodes(manifest):
        if isinstance(value, dict) and key in (*LABEL_MAPS, "annotations"):
            for label, text in value.items():
                if isinstance(text, str):
                    prefix, slash, word = label.rpartition("/")
                    if slash:
                        yield from check_name(f"{path}.{label}", prefix, "DNS-1123 subdomain", 253)
                    yield from check_name(f"{path}.{label}", word, "label word", 63)
                    if text and key != "annotations":
                        yield from check_name(f"{path}.{label}", text, "label word", 63)


def check_references(manifest: Manifest) -> Iterator[str]:
    for path, key, value in nodes(manifest):
        if key in NAMED_OBJECTS and isinstance(value, dict):
            yield from check_name(f"{path}.name", value.get("name", ""), "DNS-1123 subdomain", 253)
        if key in OBJECT_NAME_KEYS and isinstance(value, str):
            yield from check_name(path, value, "DNS-1123 subdomain", 253)


def looks_secret(name: str) -> bool:
    return bool(SECRET.search(name)) and not SECRET_FILE.search(name)


def check_secrets(manifest: Manifest) -> Iterator[str]:
    for path, key, value in nodes(manifest):
        if key in ("redisPassword", "redisUsername") and isinstance(value, dict) and "value" in value:
            yield f"{path}.value: a secret in plain text; use valueFrom"
        if key in ("data", "rayStartParams") and isinstance(value, dict):
            for name, text in value.items():
                if text and looks_secret(name):
                    yield f"{path}.{name}: looks like a secret in plain text; use a Secret"
        if isinstance(value, str) and URL_PASSWORD.search(value):
            yield f"{path}: a password inside a URL; use a Secret"


def check_env(path: str, entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    seen: Counter[str] = Counter()
    for index, entry in enumerate(entries):
        here, name = f"{path}[{index}]", entry["name"]
        seen[name] += 1
        if ("value" in entry) == ("valueFrom" in entry):
            yield f"{here}: {name} needs either value or valueFrom"
        elif "valueFrom" in entry and len(entry["valueFrom"]) != 1:
            yield f"{here}.valueFrom: {name} needs exactly one source, given {len(entry['valueFrom'])}"
        elif entry.get("value") and looks_secret(name):
            yield f"{here}.value: {name} looks like a secret in plain text; use valueFrom.secretKeyRef"
        if seen[name] == 2:
            yield f"{here}.name: {name} is given twice"


def _quantity(value: int | str) -> Decimal:
    match = QUANTITY.fullmatch(str(value))
    assert match, value  # the schema has seen it
    number, suffix, exponent = match.groups()
    return Decimal(number) * (SCALES[suffix] if exponent is None else Decimal(10) ** Decimal(exponent))


def check_resources(path: str, resources: dict[str, Any]) -> Iterator[str]:
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


def check_pod(path: str, template: dict[str, Any], *, is_ray: bool) -> Iterator[str]:
    spec, path = template["spec"], f"{path}.spec"
    volumes = spec.get("volumes", [])
    for index, volume in enumerate(volumes):
        here = f"{path}.volumes[{index}]"
        yield from check_name(f"{here}.name", volume["name"], "DNS-1123 label", 63)
        yield from wrong(here, (len(volume) != 2, "", f"needs exactly one source, given {len(volume) - 1}"))
    if not spec["containers"]:
        yield f"{path}.containers: empty"
    names: set[str] = set()
    for field in ("containers", "initContainers", "ephemeralContainers"):
        for index, container in enumerate(spec.get(field, ())):
            here, name = f"{path}.{field}[{index}]", container["name"]
            yield from wrong(here, (name in names, ".name", f"{name} is given twice in this pod"))
            yield from _container(here, container, {volume["name"] for volume in volumes})
            names.add(name)
    yield from check_resources(f"{path}.resources", spec.get("resources", {}))
    yield from _grace(path, spec, is_ray=is_ray)


def _container(path: str, container: dict[str, Any], volumes: set[str]) -> Iterator[str]:
    yield from check_name(f"{path}.name", container["name"], "DNS-1123 label", 63)
    image = container.get("image", "")
    if not image:
        yield f"{path}.image: missing"
    elif "@" not in image and ":" not in image.rpartition("/")[2]:
        yield f"{path}.image: {image!r} has neither tag nor digest"
    for index, port in enumerate(container.get("ports", ())):
        yield from check_name(f"{path}.ports[{index}].name", port.get("name", "port"), "port name", 15)
    yield from check_env(f"{path}.env", container.get("env", ()))
    yield from check_mounts(f"{path}.volumeMounts", container.get("volumeMounts", ()), volumes)
    yield from check_resources(f"{path}.resources", container.get("resources", {}))


def check_mounts(path: str, mounts: Sequence[dict[str, Any]], volumes: set[str]) -> Iterator[str]:
    for index, mount in enumerate(mounts):
        known = ", ".join(sorted(volumes)) or "none"
        missing = mount["name"] not in volumes
        yield from wrong(f"{path}[{index}]", (missing, ".name", f"no volume {mount['name']!r}; there are: {known}"))


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
    yield from wrong(path, (short, ".terminationGracePeriodSeconds", text))
