"""The server's objects, and what is checked before one changes."""

import copy
import threading
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from jsonschema import Draft202012Validator
from tests.k8s import schemas
from tests.k8s.miniapi import patches, rules
from tests.k8s.miniapi.errors import ApiError, invalid
from tests.k8s.miniapi.kinds import Key, Kind, built_in

Object = dict[str, Any]
_OWN = ("uid", "creationTimestamp", "resourceVersion", "generation", "managedFields")


class Store:
    """All objects of a server of some Kubernetes version. Callers hold `lock` around a call."""

    def __init__(self, version: str, custom: list[Kind]) -> None:
        self.version = version
        self.lock = threading.Lock()
        self.kinds = {kind.key: kind for kind in [*built_in(), *custom]}
        self._objects: dict[tuple[Key, str, str], Object] = {}
        self._applied: dict[tuple[Key, str, str, str], Object] = {}
        self._version = 0
        self._validators: dict[Key, Draft202012Validator] = {}

    def newest(self) -> str:
        """The version of the last change."""
        return str(self._version)

    def _next(self) -> str:
        self._version += 1
        return self.newest()

    def kind(self, key: Key) -> Kind:
        """404 if there is none."""
        if key not in self.kinds:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        return self.kinds[key]

    def get(self, key: Key, namespace: str, name: str) -> Object:
        """404 if there is none."""
        found = self._objects.get((key, namespace, name))
        if found is None:
            what = f"{key.plural}.{key.group}" if key.group else key.plural
            raise ApiError(404, "NotFound", f'{what} "{name}" not found')
        return found

    def list(
        self, key: Key, namespace: str, labels: Mapping[str, str] = MappingProxyType({})
    ) -> list[Object]:
        """All of a kind with these labels, in a namespace or, with "", anywhere."""
        return [
            found
            for (own, where, _), found in sorted(self._objects.items())
            if own == key
            and namespace in ("", where)
            and labels.items() <= found["metadata"].get("labels", {}).items()
        ]

    def create(self, key: Key, namespace: str, obj: Object, *, strict: bool, dry: bool) -> Object:
        """201, or why not."""
        kind, metadata = self.kind(key), obj.setdefault("metadata", {})
        name = metadata["name"]
        if kind.namespaced:
            if metadata.setdefault("namespace", namespace) != namespace:
                raise ApiError(400, "BadRequest", "the namespace of the object is another one")
            if (Key("", "v1", "namespaces"), "", namespace) not in self._objects:
                raise ApiError(404, "NotFound", f'namespaces "{namespace}" not found')
        obj = self._checked(kind, obj, strict)
        if (key, namespace, name) in self._objects:
            raise ApiError(409, "AlreadyExists", f'{key.plural} "{name}" already exists')
        obj["metadata"] |= {
            "uid": str(uuid.uuid4()),
            "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "resourceVersion": self._next(),
            "generation": 1,
        }
        if not dry:
            self._objects[key, namespace, name] = obj
        return obj

    def update(
        self, key: Key, namespace: str, name: str, new: Object, *, strict: bool, dry: bool
    ) -> Object:
        """The object as it is afterwards; the same one if nothing changed."""
        old = self.get(key, namespace, name)
        new = self._checked(self.kind(key), copy.deepcopy(new), strict)
        rules.check_change(old, new)
        if _plain(old) == _plain(new):
            return old
        changed = new.get("spec") != old.get("spec")
        new["metadata"] |= {
            "uid": old["metadata"]["uid"],
            "creationTimestamp": old["metadata"]["creationTimestamp"],
            "resourceVersion": self._next(),
            "generation": old["metadata"]["generation"] + changed,
        }
        if not dry:
            self._objects[key, namespace, name] = new
        return new

    def delete(self, key: Key, namespace: str, name: str) -> Object:
        """The object that was; a namespace takes what is in it along."""
        gone = self.get(key, namespace, name)
        del self._objects[key, namespace, name]
        if key.plural == "namespaces":
            inside = [place for place in self._objects if place[1] == name]
            for place in inside:
                del self._objects[place]
        return gone

    def patched(self, key: Key, namespace: str, name: str, content: str, change: Any) -> Object:
        """The object after a patch of this content type, not yet stored."""
        old = self.get(key, namespace, name)
        if content == "application/merge-patch+json":
            return dict(patches.merge(old, change))
        if content == "application/strategic-merge-patch+json":
            return self._strategic(self.kind(key), old, change)
        if content == "application/json-patch+json":
            return dict(patches.steps(old, change))
        raise ApiError(415, "UnsupportedMediaType", content)

    def apply(
        self, key: Key, namespace: str, name: str, manager: str, obj: Object, *, dry: bool
    ) -> tuple[int, Object]:
        """Server-side apply: (201 or 200, the object)."""
        place = (key, namespace, name, manager)
        before = self._applied.get(place, {})
        try:
            old = self.get(key, namespace, name)
        except ApiError:
            code = 201
            done = self.create(key, namespace, copy.deepcopy(obj), strict=True, dry=dry)
        else:
            base, code = patches.without_dropped(old, before, obj), 200
            new = self._strategic(self.kind(key), base, obj)
            done = self.update(key, namespace, name, new, strict=True, dry=dry)
        if not dry:
            self._applied[place] = obj
        return code, done

    def _strategic(self, kind: Kind, old: Object, change: Object) -> Object:
        if kind.schema is not None:
            return dict(patches.merge(old, change))
        defs = schemas.definitions(self.version, strict=False)
        return dict(patches.strategic(defs, {"$ref": f"/{self._schema(kind)}"}, old, change))

    def _schema(self, kind: Kind) -> str:
        return schemas.names_of_kinds(self.version)[kind.key.api_version, kind.name]

    def _validator(self, kind: Kind) -> Draft202012Validator:
        if kind.key not in self._validators:
            self._validators[kind.key] = (
                schemas.builtin_validator(self.version, self._schema(kind))
                if kind.schema is None
                else Draft202012Validator(schemas.strict_schema(kind.schema, root=True))
            )
        return self._validators[kind.key]

    def _checked(self, kind: Kind, obj: Object, strict: bool) -> Object:
        if kind.schema is not None:
            obj = schemas.with_defaults(kind.schema, obj)
        unknown, other = [], []
        for error in self._validator(kind).iter_errors(obj):
            path = error.json_path.removeprefix("$").removeprefix(".")
            if error.validator == "additionalProperties":
                known = error.schema.get("properties", {})
                extra = sorted(error.instance.keys() - known.keys())
                unknown += [f'unknown field "{path}.{name}"'.replace('".', '"') for name in extra]
            else:
                other.append(f"{path}: {error.message[:300]}")
        if unknown and strict:
            text = f"strict decoding error: {', '.join(sorted(unknown))}"
            raise ApiError(400, "BadRequest", text)
        if other:
            raise invalid(obj, "; ".join(sorted(other)))
        rules.check(obj)
        return obj


def _plain(obj: Object) -> Object:
    metadata = {name: value for name, value in obj["metadata"].items() if name not in _OWN}
    return {**obj, "metadata": metadata}
