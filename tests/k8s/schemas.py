"""Whether a Kubernetes of some version takes manifests: every field known, every type right.

Built-in kinds by the OpenAPI schemas in `kubernetes-validate`, RayService by KubeRay's CRD, the
others by schemas made from the CRDs of their operators (crds/README.md).
"""

import copy
import functools
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator
from tests.k8s.rendering import Manifest, label

OLDEST, NEWEST = "1.31.0", "1.37.0"
"""Kubernetes versions that the manifests are for."""
_SCHEMAS = Path(str(kubernetes_validate.__file__)).parent / "kubernetes-json-schema"
_CRD = Path(__file__).parent / "crds" / "kuberay-v1.7.0-rayservices-v1.json.gz"
_OPERATORS = _CRD.parent / "operators.json.gz"
_KEPT = (
    "type", "enum", "minimum", "maximum", "pattern", "required", "minLength", "maxLength",
    "minItems", "maxItems", "anyOf", "allOf", "oneOf",
)  # fmt: skip


@functools.cache
def definitions(version: str, *, strict: bool) -> dict[str, Any]:
    """All schemas of a version by name."""
    folder = _SCHEMAS / f"v{version}-local{'-strict' if strict else ''}"
    found: dict[str, Any] = json.loads((folder / "_definitions.json").read_bytes())["$defs"]
    return found


@functools.cache
def names_of_kinds(version: str) -> dict[tuple[str, str], str]:
    """(apiVersion, kind) -> the name of its schema."""
    return {
        (f"{own['group']}/{own['version']}".removeprefix("/"), own["kind"]): name
        for name, schema in definitions(version, strict=False).items()
        for own in schema.get("x-kubernetes-group-version-kind", [])
    }


@functools.cache
def builtin_validator(version: str, name: str) -> Draft202012Validator:
    """Of one built-in kind."""
    schema = {"$ref": f"#/$defs/{name}", "$defs": definitions(version, strict=True)}
    return Draft202012Validator(schema)


@functools.cache
def ray_service_schema() -> dict[str, Any]:
    """KubeRay's own, structural."""
    found: dict[str, Any] = json.loads(gzip.decompress(_CRD.read_bytes()))
    return found


@functools.cache
def ray_service_validator() -> Draft202012Validator:
    """Of RayService."""
    return Draft202012Validator(strict_schema(ray_service_schema(), root=True))


def strict_schema(structural: dict[str, Any], *, root: bool = False) -> dict[str, Any]:
    """A CRD's structural schema as a JSON schema that refuses unknown fields."""
    schema = {key: structural[key] for key in _KEPT if key in structural}
    if "properties" in structural:
        own = {name: strict_schema(sub) for name, sub in structural["properties"].items()}
        schema["properties"] = own
    if "items" in structural:
        schema["items"] = strict_schema(structural["items"])
    more = structural.get("additionalProperties")
    if more is not None:
        schema["additionalProperties"] = strict_schema(more) if isinstance(more, dict) else more
    elif "properties" in schema and not structural.get("x-kubernetes-preserve-unknown-fields"):
        schema["additionalProperties"] = False
    if root:
        common = {"apiVersion": {}, "kind": {}, "metadata": {"type": "object"}}
        schema["properties"] = schema.get("properties", {}) | common
    if structural.get("nullable") and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    if structural.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    return schema


def with_defaults(structural: dict[str, Any], value: Any) -> Any:
    """As the API server: drop nulls, then fill in defaults."""
    if isinstance(value, list):
        return [with_defaults(structural.get("items", {}), item) for item in value]
    if not isinstance(value, dict):
        return value
    known = structural.get("properties", {})
    more = structural.get("additionalProperties")
    rest = more if isinstance(more, dict) else {}
    kept = {
        name: with_defaults(known.get(name, rest), item)
        for name, item in value.items()
        if item is not None or known.get(name, {}).get("nullable")
    }
    missing = {
        name: copy.deepcopy(schema["default"])
        for name, schema in known.items()
        if "default" in schema and name not in kept
    }
    return missing | kept


def faults(documents: list[Manifest], version: str = NEWEST) -> list[str]:
    """What is wrong, each with kind, name and field."""
    return [fault for document in documents for fault in _of_one(document, version)]


def _of_one(document: Manifest, version: str) -> Iterator[str]:
    key = (document["apiVersion"], document["kind"])
    if key == ("ray.io/v1", "RayService"):
        filled = with_defaults(ray_service_schema(), document)
        yield from _violations(ray_service_validator(), filled)
    elif key in names_of_kinds(version):
        validator = builtin_validator(version, names_of_kinds(version)[key])
        yield from _violations(validator, document)
    elif key in operator_validators():
        yield from _violations(operator_validators()[key], document)
    else:
        yield f"{label(document)}: apiVersion {key[0]} has no kind {key[1]} in {version}"


def _violations(validator: Draft202012Validator, document: Manifest) -> Iterator[str]:
    for error in sorted(validator.iter_errors(document), key=lambda error: error.json_path):
        yield f"{label(document)}: {error.json_path.removeprefix('$.')}: {error.message[:300]}"


@functools.cache
def operator_validators() -> dict[tuple[str, str], Draft202012Validator]:
    """Of kinds that come with operators of others."""
    found = json.loads(gzip.decompress(_OPERATORS.read_bytes()))
    return {
        (name.rpartition("/")[0], name.rpartition("/")[2]): Draft202012Validator(schema)
        for name, schema in found.items()
    }
