"""The recorded schemas of manifests are closed, whole, and those of KubeRay's definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.manifest_schemas import CRDS, GOLDEN, reduce_schema, write_reduced


def test_reduction_closes_what_the_server_prunes() -> None:
    reduced = reduce_schema(
        {
            "description": "words",
            "type": "object",
            "required": ["port", "name"],
            "properties": {
                "name": {"type": "string", "default": "x"},
                "port": {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True},
                "free": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
                "mode": {"type": "string", "x-kubernetes-validations": [{"rule": "self in ['a', 'b']", "message": ""}]},
                "restartPolicy": {"type": "string"},
                "ports": {
                    "type": "array",
                    "items": {"type": "object", "properties": {"protocol": {"type": "string", "default": "TCP"}}},
                    "x-kubernetes-list-type": "map",
                    "x-kubernetes-list-map-keys": ["protocol"],
                },
            },
        }
    )
    assert reduced["additionalProperties"] is False
    assert reduced["required"] == ["port"]
    fields = reduced["properties"]
    assert fields["name"] == {"type": "string"}
    assert fields["port"] == {"type": ["integer", "string"]}
    assert "additionalProperties" not in fields["free"]
    assert fields["mode"]["enum"] == ["a", "b"]
    assert fields["restartPolicy"]["enum"] == ["Always", "Never", "OnFailure"]
    assert fields["ports"]["x-unique-by"] == {"protocol": "TCP"}
    assert fields["ports"]["items"]["additionalProperties"] is False


def test_every_object_of_the_schemas_is_closed_and_every_reference_is_there() -> None:
    definitions: dict[str, Any] = {}
    for name in ("ray.json", "plain.json"):
        definitions |= json.loads((GOLDEN / name).read_text())["$defs"]

    def check(schema: dict[str, Any], path: str) -> None:
        if "$ref" in schema:
            assert schema["$ref"].removeprefix("#/$defs/") in definitions, path
        if schema.get("type") == "object":
            assert "additionalProperties" in schema, path
        for name, part in schema.get("properties", {}).items():
            check(part, f"{path}.{name}")
        for name in ("items", "additionalProperties"):
            if isinstance(schema.get(name), dict):
                check(schema[name], f"{path}.{name}")

    for name, schema in definitions.items():
        check(schema, name)


def test_the_schemas_are_those_of_the_definitions(tmp_path: Path) -> None:
    folder = Path(__file__).resolve().parents[3] / "shared" / "kubernetes"
    if not all((folder / name).is_file() for name in CRDS.values()):
        pytest.skip("KubeRay's definitions are not there: shared/kubernetes beside the checkout")
    write_reduced(folder, tmp_path / "ray.json")
    assert (tmp_path / "ray.json").read_text() == (GOLDEN / "ray.json").read_text()
