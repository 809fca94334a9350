"""Patches: pure functions of an object and a change. Strategic merge is driven by the schemas."""

import copy
from typing import Any

from tests.k8s.miniapi.errors import ApiError

Definitions = dict[str, Any]
_DIRECTIVES = ("$patch", "$retainKeys")
_ORDER = "$setElementOrder/"
_DELETE = "$deleteFromPrimitiveList/"


def merge(old: Any, change: Any) -> Any:
    """RFC 7386."""
    if not isinstance(change, dict):
        return copy.deepcopy(change)
    new = copy.deepcopy(old) if isinstance(old, dict) else {}
    for name, value in change.items():
        if value is None:
            new.pop(name, None)
        else:
            new[name] = merge(new.get(name), value)
    return new


def steps(old: Any, change: list[dict[str, Any]]) -> Any:
    """RFC 6902: add, replace, remove and test.

    Raises:
        ApiError: 422, a path that does not exist, or a test that fails.
    """
    new = copy.deepcopy(old)
    for step in change:
        try:
            _step(new, step)
        except (KeyError, IndexError, ValueError, TypeError):
            raise ApiError(422, "Invalid", f"the JSON patch cannot be applied: {step}") from None
    return new


def _step(new: Any, step: dict[str, Any]) -> None:
    *parents, last = (
        part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]
    )
    for part in parents:
        new = new[int(part)] if isinstance(new, list) else new[part]
    at = last if isinstance(new, dict) else len(new) if last == "-" else int(last)
    if step["op"] == "add" and isinstance(new, list):
        new.insert(at, step["value"])
    elif step["op"] == "add":
        new[at] = step["value"]
    elif step["op"] == "remove":
        del new[at]
    elif step["op"] == "test" and new[at] != step["value"]:
        raise ValueError
    elif step["op"] == "replace":
        new[at]
        new[at] = step["value"]


def strategic(defs: Definitions, schema: dict[str, Any], old: Any, change: dict[str, Any]) -> Any:
    """Kubernetes' strategic merge patch.

    Args:
        schema: of the object, or a reference into `defs`; `x-kubernetes-patch-*` says how lists
            are merged.
    """
    schema = _resolved(defs, schema)
    new: dict[str, Any] = copy.deepcopy(old) if isinstance(old, dict) else {}
    if change.get("$patch") == "replace":
        return {name: value for name, value in change.items() if name != "$patch"}
    for name, value in change.items():
        if name in _DIRECTIVES or name.startswith(_ORDER):
            continue
        if name.startswith(_DELETE):
            field = name.removeprefix(_DELETE)
            new[field] = [item for item in new.get(field, []) if item not in value]
        elif value is None:
            new.pop(name, None)
        else:
            order = change.get(_ORDER + name, [])
            new[name] = _value(defs, _property(schema, name), new.get(name), value, order)
    return new


def _resolved(defs: Definitions, schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return defs.get(reference.rpartition("/")[2], {}) if reference else schema


def _property(schema: dict[str, Any], name: str) -> dict[str, Any]:
    more = schema.get("additionalProperties")
    found: dict[str, Any] = schema.get("properties", {}).get(
        name, more if isinstance(more, dict) else {}
    )
    return found


def _value(
    defs: Definitions, schema: dict[str, Any], old: Any, value: Any, order: list[Any]
) -> Any:
    if isinstance(value, dict):
        new = strategic(defs, schema, old, value)
        kept = value.get("$retainKeys")
        return {name: new[name] for name in new if name in kept} if kept else new
    if isinstance(value, list) and "merge" in schema.get("x-kubernetes-patch-strategy", ""):
        return _list(defs, schema, old or [], value, order)
    return copy.deepcopy(value)


def _list(
    defs: Definitions, schema: dict[str, Any], old: list[Any], change: list[Any], order: list[Any]
) -> list[Any]:
    key = schema.get("x-kubernetes-patch-merge-key")
    if key is None:
        return [*old, *(item for item in change if item not in old)]
    new = copy.deepcopy(old)
    for item in change:
        at = next((at for at, own in enumerate(new) if own.get(key) == item.get(key)), None)
        if item.get("$patch") == "delete":
            new = [own for own in new if own.get(key) != item.get(key)]
        elif at is None:
            new.append(copy.deepcopy(item))
        else:
            new[at] = strategic(defs, schema.get("items", {}), new[at], item)
    places = {item[key]: place for place, item in enumerate(order)}
    return sorted(new, key=lambda own: places.get(own.get(key), len(places)))


def without_dropped(current: Any, before: Any, now: Any) -> Any:
    """`current` without what a manager applied before and applies no longer (server-side apply)."""
    if not isinstance(current, dict):
        return current
    new = copy.deepcopy(current)
    for name, value in before.items():
        if name in ("apiVersion", "kind", "metadata"):
            continue
        if name not in now:
            new.pop(name, None)
        elif isinstance(value, dict) and isinstance(now[name], dict):
            new[name] = without_dropped(new.get(name), value, now[name])
        elif isinstance(value, list):
            new[name] = _kept_items(new.get(name, []), value, now[name])
    return new


def _kept_items(current: list[Any], before: list[Any], now: list[Any]) -> list[Any]:
    """Items of lists by name; other lists are replaced whole."""
    if not all(isinstance(item, dict) and "name" in item for item in now):
        return []
    earlier, later = ({item.get("name"): item for item in items} for items in (before, now))
    return [
        without_dropped(item, earlier.get(item.get("name"), {}), later.get(item.get("name"), {}))
        for item in current
        if item.get("name") in later or item.get("name") not in earlier
    ]
