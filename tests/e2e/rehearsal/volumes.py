"""What a Pod mounts, as files here."""

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.rehearsal.outside import STATE

Manifest = dict[str, Any]
Get = Callable[[str, str], Manifest | None]
"""(kind, name) -> the object, None if there is none."""


class NotThereError(Exception):
    """A Pod cannot start: what it mounts or reads does not exist."""


def made(pod: str, spec: dict[str, Any], get: Get) -> dict[str, Path]:
    """Volume name -> its folder.

    Raises:
        NotThereError: a ConfigMap or Secret that is not optional.
    """
    group = spec.get("securityContext", {}).get("fsGroup", 0)
    found = {}
    for volume in spec.get("volumes", []):
        folder = STATE / "pods" / pod / "volumes" / volume["name"]
        claim = volume.get("persistentVolumeClaim")
        if claim:
            folder = STATE / "claims" / claim["claimName"]
        folder.mkdir(parents=True, exist_ok=True)
        content = _content(volume, get)
        if content is None:  # empty, and the Pod's own
            os.chown(folder, 0, group)
            folder.chmod(0o2777)
        else:
            _write(folder, content, _mode(volume), group)
        found[volume["name"]] = folder
    return found


def _mode(volume: dict[str, Any]) -> int:
    source = volume.get("secret") or volume.get("configMap") or {}
    return int(source.get("defaultMode", 0o644))


def _content(volume: dict[str, Any], get: Get) -> dict[str, bytes] | None:
    for kind, field in (("ConfigMap", "name"), ("Secret", "secretName")):
        source = volume.get(kind[0].lower() + kind[1:])
        if source is None:
            continue
        found = get(kind, source[field])
        if found is None and not source.get("optional"):
            raise NotThereError(f"volume {volume['name']}: no {kind} {source[field]}")
        return data_of(found) if found else {}
    return None


def data_of(found: Manifest) -> dict[str, bytes]:
    """Of a ConfigMap or a Secret."""
    if found["kind"] == "ConfigMap":
        return {name: text.encode() for name, text in found.get("data", {}).items()}
    plain = {name: text.encode() for name, text in found.get("stringData", {}).items()}
    return plain | {name: base64.b64decode(own) for name, own in found.get("data", {}).items()}


def _write(folder: Path, content: dict[str, bytes], mode: int, group: int) -> None:
    for name, data in content.items():
        path = folder / name
        new = path.with_name(f".{name}.new")  # a reader sees the old file or the new one
        new.write_bytes(data)
        os.chown(new, 0, group)
        new.chmod(mode)
        new.replace(path)


def environment(container: dict[str, Any], pod: Manifest, get: Get) -> dict[str, str]:
    """The container's own variables.

    Raises:
        NotThereError: a Secret or ConfigMap, or a key in it.
    """
    found: dict[str, str] = {}
    for own in container.get("env", []):
        value = own["value"] if "value" in own else _from(own["valueFrom"], pod, get)
        for name, other in found.items():
            value = value.replace(f"$({name})", other)
        found[own["name"]] = value
    return found


def _from(source: dict[str, Any], pod: Manifest, get: Get) -> str:
    if "fieldRef" in source:
        path = source["fieldRef"]["fieldPath"]
        if path.startswith("metadata.labels['"):
            return str(pod["metadata"]["labels"][path[len("metadata.labels['") : -2]])
        return str(pod["metadata"][path.removeprefix("metadata.")])
    reference = source["secretKeyRef"]
    secret = get("Secret", reference["name"])
    data = data_of(secret) if secret else {}
    if reference["key"] not in data:
        raise NotThereError(f"no key {reference['key']} in Secret {reference['name']}")
    return data[reference["key"]].decode()
